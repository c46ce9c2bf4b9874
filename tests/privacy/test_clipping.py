"""The clip: its bound holds for every vector there is, and nothing but its result can be summed."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedlearn.arrays import ParamEntry, ParamSpec
from fedlearn.errors import ReplyError
from fedlearn.privacy.clipping import ClippedSum, ClippedUpdate, Update, clip, l2_norm

BOUNDS = st.floats(1e-30, 1e30)
FLOATS = {np.float32: st.floats(width=32), np.float64: st.floats()}  # NaN, infinities, denormals and zeros among them


@st.composite
def vectors(draw):
    """Return any vector at all, of either type."""
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    return draw(arrays(dtype, st.integers(0, 40), elements=FLOATS[dtype]))


def exact_norm(vector) -> float:
    """Return the norm by ``math.hypot``, which is exact to rounding and overflows only where the norm does."""
    return math.hypot(*map(float, vector))


@given(vectors(), BOUNDS)
def test_the_norm_is_at_most_the_bound_whatever_the_vector(vector, bound):
    clipped = clip(Update(vector), bound)
    assert clipped.vector.dtype == vector.dtype
    assert clipped.vector.shape == vector.shape
    assert np.isfinite(clipped.vector).all()
    assert clipped.norm <= bound
    assert exact_norm(clipped.vector) <= bound * (1 + 1e-15)


@given(vectors(), BOUNDS)
def test_a_vector_within_the_bound_is_left_as_it_is_and_clipping_twice_is_clipping_once(vector, bound):
    clipped = clip(Update(vector), bound)
    finite = bool(np.isfinite(vector).all())
    assert clipped.finite == finite
    if finite and l2_norm(vector) <= bound:
        assert clipped.within
        assert clipped.vector.tobytes() == vector.tobytes()
    else:
        assert not clipped.within
    again = clip(Update(clipped.vector), bound)
    assert again.vector.tobytes() == clipped.vector.tobytes()


@given(arrays(np.float64, 7, elements=st.floats(-1e6, 1e6)), st.floats(1e-3, 1e3))
def test_a_longer_vector_keeps_its_direction_and_reaches_the_bound(vector, bound):
    norm = l2_norm(vector)
    if norm <= bound:
        return
    clipped = clip(Update(vector), bound)
    np.testing.assert_allclose(clipped.vector, vector * (bound / norm), rtol=1e-12, atol=1e-300)
    assert clipped.norm == pytest.approx(bound, rel=1e-12)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_non_finite_update_becomes_zero_and_says_so(value, dtype):
    clipped = clip(Update(np.array([1.0, value, 2.0], dtype=dtype)), 1.0)
    assert not clipped.vector.any()
    assert not clipped.finite


def test_the_zero_update_and_denormals_and_huge_numbers_are_like_any_other():
    assert clip(Update.of([0.0, 0.0]), 1.0).norm == 0.0
    assert clip(Update.of([]), 1.0).norm == 0.0
    tiny = float(np.finfo(np.float64).smallest_subnormal)
    assert clip(Update.of([3 * tiny, 4 * tiny]), 1.0).norm == 5 * tiny
    assert clip(Update.of([3 * tiny, 4 * tiny]), 2 * tiny).norm <= 2 * tiny
    huge = clip(Update.of([1.7e308, 1.7e308]), 1.0)  # whose own norm overflows
    np.testing.assert_allclose(huge.vector, math.sqrt(0.5), rtol=1e-12)


@pytest.mark.parametrize("bound", [0.0, -1.0, math.inf, math.nan])
def test_a_bound_that_bounds_nothing_is_refused(bound):
    with pytest.raises(ValueError, match="bound_l2 must be above 0 and finite"):
        clip(Update.of([1.0]), bound)


def test_the_argument_is_not_changed_and_the_result_cannot_be():
    vector = np.array([3.0, 4.0])
    clipped = clip(Update(vector), 1.0)
    assert vector.tolist() == [3.0, 4.0]
    with pytest.raises(ValueError, match="read-only"):
        clipped.vector[0] = 1.0


# -- a model's entries: one vector, so that none can escape ----------------------------------------------------------

ENTRIES = (
    ParamEntry(name="temperature", shape=(), dtype="float32", trainable=True),
    ParamEntry(name="w", shape=(2, 3), dtype="float16", trainable=True),
    ParamEntry(name="wide", shape=(2,), dtype="float64", trainable=True),
    ParamEntry(name="frozen", shape=(4,), dtype="float32", trainable=False),
    ParamEntry(name="bn.running_mean", shape=(3,), dtype="float32", trainable=False),
)


@given(st.permutations(ENTRIES), st.data())
def test_zero_d_mixed_types_and_any_order_of_keys_are_clipped_together(entries, data):
    spec = ParamSpec(tuple(entries))
    state = {
        each.name: data.draw(arrays(each.dtype, each.shape, elements=st.floats(-100, 100, width=16)))
        for each in data.draw(st.permutations(entries))
    }
    clipped = clip(Update(spec.flatten(state)), 0.5)
    assert clipped.norm <= 0.5
    joint = math.hypot(*(float(value) for each in entries for value in np.ravel(state[each.name])))
    if joint > 0.5:
        for name, array in spec.unflatten(clipped.vector).items():
            wanted = state[name].astype(np.float64) * (0.5 / joint)
            np.testing.assert_allclose(array.astype(np.float64), wanted, rtol=2e-3, atol=1e-7)


# -- nothing else can be summed ---------------------------------------------------------------------------------------


def summed(size: int = 2, bound: float = 1.0, grid: float = 2.0**-30) -> ClippedSum:
    return ClippedSum(size, bound_l2=bound, grid=grid)


@pytest.mark.parametrize(
    "thing", [np.zeros(2), Update.of([0.0, 0.0]), [0.0, 0.0], None], ids=lambda x: type(x).__name__
)
def test_only_a_clipped_update_can_be_summed(thing):
    with pytest.raises(TypeError, match="only a ClippedUpdate can be summed"):
        summed().add(thing)


@pytest.mark.parametrize("thing", [np.zeros(2), [3.0], None], ids=lambda x: type(x).__name__)
def test_only_an_update_can_be_clipped(thing):
    with pytest.raises(TypeError, match="only an Update can be clipped"):
        clip(thing, 1.0)


def test_a_clipped_update_cannot_be_made_of_a_longer_vector():
    for vector in ([1.0, 1.0], [math.nan, 0.0], [math.inf, 0.0]):
        with pytest.raises(ValueError, match="above the bound"):
            ClippedUpdate(vector=np.array(vector), bound_l2=1.0)
        with pytest.raises(ReplyError) as refused:
            ClippedUpdate.received(np.array(vector), 1.0)
        assert refused.value.code == "not-clipped"
    assert ClippedUpdate.received(np.array([0.6, 0.0]), 1.0, within=False).within is False


def test_an_update_for_a_larger_bound_or_of_another_length_is_refused():
    total = summed()
    with pytest.raises(ValueError, match="cannot be added"):
        total.add(clip(Update.of([1.0, 1.0]), 2.0))
    with pytest.raises(ValueError, match="cannot be added"):
        total.add(clip(Update.of([1.0]), 1.0))
    assert total.count == 0


@given(st.lists(arrays(np.float32, 5, elements=st.floats(-10, 10, width=32)), max_size=20), st.randoms())
def test_a_sum_does_not_depend_on_the_order_and_is_within_rounding_of_the_float_sum(updates, chance):
    clipped = [clip(Update(each), 1.0) for each in updates]
    one, other = summed(5), summed(5)
    for each in clipped:
        one.add(each)
    chance.shuffle(clipped)
    for each in clipped:
        other.add(each)
    assert one.units.tolist() == other.units.tolist()
    assert one.count == len(updates)
    assert one.within == sum(each.within for each in clipped)
    exact = sum((each.vector.astype(np.float64) for each in clipped), np.zeros(5))
    assert np.abs(one.units * one.grid - exact).max() <= len(updates) * one.grid / 2 + 1e-12


@given(arrays(np.float64, 6, elements=st.floats(-2, 2)), st.sampled_from([2.0**-3, 2.0**-10, 2.0**-30]))
def test_one_client_moves_a_sum_by_at_most_its_sensitivity(vector, grid):
    total = summed(6, grid=grid)
    total.add(clip(Update(vector), 1.0))
    assert l2_norm(total.units.astype(np.float64)) * grid <= total.sensitivity_l2 + 1e-12


@pytest.mark.parametrize("grid", [0.0, -1.0, 0.3, math.nan])
def test_a_grid_is_a_power_of_two(grid):
    with pytest.raises(ValueError, match="power of two"):
        summed(grid=grid)
