"""One flat vector: nothing is lost, nothing is broadcast, nothing that is not a number gets in."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlearn.arrays import ParamEntry, ParamSpec
from fedlearn.errors import ReplyError

SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)
DTYPES = st.sampled_from(["float16", "float32", "float64"])


@st.composite
def specs(draw, min_size=0):
    names = draw(st.lists(st.text(max_size=5), unique=True, min_size=min_size, max_size=6))
    return ParamSpec(
        tuple(
            ParamEntry(name=name, shape=draw(SHAPES), dtype=draw(DTYPES), trainable=draw(st.booleans()))
            for name in names
        )
    )


def arrays_of(spec, seed):
    """Random arrays in the entries' own types."""
    generator = np.random.default_rng(seed)
    return {e.name: np.asarray(generator.normal(size=e.shape)).astype(e.dtype) for e in spec.entries}


def entry(name="w", shape=(2,), dtype="float32", trainable=True):
    return ParamEntry(name=name, shape=shape, dtype=dtype, trainable=trainable)


@given(specs(), st.integers(0, 9))
def test_flatten_and_unflatten_lose_nothing(spec, seed):
    arrays = arrays_of(spec, seed)
    vector = spec.flatten(arrays)
    assert vector.shape == (spec.size,)
    assert vector.dtype == spec.dtype
    back = spec.unflatten(vector)
    assert list(back) == [e.name for e in spec.entries]
    for each in spec.entries:
        assert back[each.name].shape == each.shape
        assert back[each.name].dtype == each.dtype
        np.testing.assert_array_equal(back[each.name], arrays[each.name])


@given(specs(), st.integers(0, 9), st.randoms())
def test_the_order_of_the_arrays_does_not_matter(spec, seed, random):
    arrays = arrays_of(spec, seed)
    shuffled = list(arrays.items())
    random.shuffle(shuffled)
    np.testing.assert_array_equal(spec.flatten(arrays), spec.flatten(dict(shuffled)))


@given(specs())
def test_what_is_trained_stands_first_in_the_models_own_order(spec):
    flags = [e.trainable for e in spec.entries]
    assert flags == sorted(flags, reverse=True)
    assert spec.trainable_size == sum(e.size for e in spec.entries if e.trainable)
    places = [place for e in spec.entries for place in range(spec.size)[spec.slices[e.name]]]
    assert places == list(range(spec.size))


def test_the_models_order_is_kept_among_the_trained_and_among_the_others():
    spec = ParamSpec(tuple(entry(name, trainable=name.isupper()) for name in "bZaAcB"))
    assert [e.name for e in spec.entries] == ["Z", "A", "B", "b", "a", "c"]


@given(specs(min_size=1), st.integers(0, 9))
def test_flatten_and_unflatten_share_no_memory_with_their_arguments(spec, seed):
    arrays = arrays_of(spec, seed)
    vector = spec.flatten(arrays)
    before = vector.copy()
    back = spec.unflatten(vector)
    for array in (*arrays.values(), *back.values()):
        assert not np.shares_memory(array, vector)
        array[...] = 99
    np.testing.assert_array_equal(vector, before)


@pytest.mark.parametrize("wrong", [(), (1,), (1, 2), (2, 1), (3,), (0,)], ids=str)
def test_nothing_is_ever_broadcast_or_reshaped(wrong):
    with pytest.raises(ValueError, match="shape"):
        ParamSpec((entry(shape=(2,)),)).flatten({"w": np.ones(wrong)})


def test_a_missing_and_an_unknown_entry_are_named():
    spec = ParamSpec((entry("w"), entry("b")))
    with pytest.raises(ValueError, match="'b' is missing"):
        spec.flatten({"w": np.ones(2)})
    with pytest.raises(ValueError, match="'extra'"):
        spec.flatten({"w": np.ones(2), "b": np.ones(2), "extra": np.ones(2)})


@given(specs(min_size=1))
def test_a_vector_of_another_length_is_not_unflattened(spec):
    for shape in ((spec.size + 1,), (spec.size, 1), ()):
        with pytest.raises(ValueError, match="shape"):
            spec.unflatten(np.zeros(shape, spec.dtype))


def test_two_entries_may_not_share_a_name_and_integers_are_not_federated():
    with pytest.raises(ValueError, match="share a name"):
        ParamSpec((entry(), entry()))
    with pytest.raises(ValueError, match="only floating"):
        entry(dtype="int64")


def test_the_vector_is_as_wide_as_its_widest_entry_and_never_half():
    assert ParamSpec(()).dtype == np.float32
    assert ParamSpec((entry(dtype="float16"), entry("b", dtype="bfloat16"))).dtype == np.float32
    assert ParamSpec((entry(dtype="float16"), entry("b", dtype="float64"))).dtype == np.float64


@given(specs(min_size=1), st.sampled_from([np.nan, np.inf, -np.inf]), st.data())
def test_one_number_that_is_none_is_refused_wherever_it_stands(spec, value, data):
    vector = np.zeros(spec.size, spec.dtype)
    assert spec.check(vector) is vector
    if spec.size:
        vector[data.draw(st.integers(0, spec.size - 1))] = value
        with pytest.raises(ReplyError) as refused:
            spec.check(vector)
        assert refused.value.code == "not-finite"


@pytest.mark.parametrize(
    "vector",
    [
        np.zeros(3, np.float32),
        np.zeros(1, np.float32),
        np.zeros((2, 1), np.float32),
        np.zeros((), np.float32),
        np.zeros(2, np.float64),
        np.zeros(2, np.float16),
        np.zeros(2, np.int32),
        np.zeros(2, ">f4"),
        np.zeros(2, object),
        np.array(["a", "b"]),
    ],
    ids=lambda v: f"{v.dtype}{v.shape}",
)
def test_another_shape_or_type_is_a_bad_reply(vector):
    with pytest.raises(ReplyError) as refused:
        ParamSpec((entry(),)).check(vector)
    assert refused.value.code == "bad-reply"


def test_the_hash_changes_with_anything_and_with_nothing_else():
    first, second = entry("w", (2, 3)), entry("b", (3,))
    spec = ParamSpec((first, second))
    others = [
        ParamSpec((second, first)),
        ParamSpec((first,)),
        ParamSpec((first, second, entry("c"))),
        *(
            ParamSpec((replace(first, **change), second))
            for change in (
                {"name": "v"},
                {"shape": (3, 2)},
                {"shape": (6,)},
                {"dtype": "float16"},
                {"trainable": False},
            )
        ),
    ]
    assert len({each.sha256 for each in (spec, *others)}) == 1 + len(others)
    assert ParamSpec((entry("w", (2, 3)), entry("b", (3,)))).sha256 == spec.sha256
