"""Partitions: nothing lost, nothing twice, nobody empty, and skewed the way the scheme says."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlearn.data import SCHEMES, dirichlet, iid, label_counts, natural, partition, quantity, shards
from fedlearn.errors import ConfigError, TaskError
from fedlearn.sources import SeedTree

RANDOM_SCHEMES = [scheme for scheme in SCHEMES if scheme != "natural"]
few = settings(max_examples=40, deadline=None)


def deal(scheme, *, clients=5, size=100, labels="balanced", groups=None, alpha=0.5, shards_each=2, seed=0):
    if isinstance(labels, str):
        labels = np.arange(size) % 4
    return partition(
        scheme,
        clients=clients,
        size=size,
        labels=labels,
        groups=groups,
        alpha=alpha,
        labels_per_client=shards_each,
        seed=SeedTree.root(seed),
    )


def check_cover(parts, size):
    assert all(part.dtype == np.int64 and part.ndim == 1 for part in parts)
    assert all(part.size >= 1 for part in parts)
    assert all(np.all(np.diff(part) > 0) for part in parts)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(size))


def same(a, b):
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_the_package_lists_its_names_sorted():
    import fedlearn.data

    assert list(fedlearn.data.__all__) == sorted(fedlearn.data.__all__)


@few
@given(
    scheme=st.sampled_from(RANDOM_SCHEMES),
    clients=st.integers(1, 12),
    extra=st.integers(0, 150),
    kinds=st.integers(1, 15),
    alpha=st.sampled_from([5e-324, 1e-200, 1e-3, 0.1, 1.0, 1e6, 1e300]),
    shards_each=st.integers(1, 3),
    seed=st.integers(0, 2**32),
)
def test_every_example_goes_to_exactly_one_client_and_nobody_is_empty(
    scheme, clients, extra, kinds, alpha, shards_each, seed
):
    size = clients * shards_each + extra
    labels = np.random.default_rng(seed).integers(0, kinds, size)
    parts = deal(scheme, clients=clients, size=size, labels=labels, alpha=alpha, shards_each=shards_each, seed=seed)
    assert len(parts) == clients
    check_cover(parts, size)


@pytest.mark.parametrize("scheme", RANDOM_SCHEMES)
def test_the_same_seed_gives_the_same_parts_and_another_seed_others(scheme):
    assert same(deal(scheme, seed=3), deal(scheme, seed=3))
    assert not same(deal(scheme, seed=3), deal(scheme, seed=4))


@pytest.mark.parametrize("scheme", RANDOM_SCHEMES)
def test_the_arguments_are_left_as_they_were(scheme):
    labels = np.arange(100) % 4
    labels.setflags(write=False)
    deal(scheme, labels=labels)


@few
@given(size=st.integers(1, 300), clients=st.integers(1, 50), seed=st.integers(0, 99))
def test_iid_sizes_differ_by_at_most_one(size, clients, seed):
    clients = min(clients, size)
    sizes = [part.size for part in iid(size, clients, np.random.default_rng(seed))]
    assert max(sizes) - min(sizes) <= 1


def largest_share(parts, labels):
    counts = label_counts(parts, labels, int(labels.max()) + 1)
    return (counts.max(axis=1) / counts.sum(axis=1)).mean()


def test_a_large_alpha_gives_everyone_the_same_mix():
    labels = np.arange(4000) % 4
    counts = label_counts(dirichlet(labels, 10, 1e6, np.random.default_rng(0)), labels, 4)
    assert np.all(np.abs(counts - 100) <= 2)


def test_a_small_alpha_is_skewed_and_skew_falls_with_alpha():
    labels = np.arange(4000) % 4
    shares = [
        np.mean([largest_share(dirichlet(labels, 10, alpha, np.random.default_rng(s)), labels) for s in range(5)])
        for alpha in (0.01, 1.0, 100.0)
    ]
    assert shares[0] > 0.9 > shares[1] > shares[2]
    assert shares[2] < 0.35


def test_dirichlet_gives_each_client_its_drawn_share_of_each_label():
    """Mean 1/n and variance (n-1)/(n^2 (n alpha + 1)), to sampling error, over many labels at once."""
    labels = np.repeat(np.arange(2000), 100)
    parts = dirichlet(labels, 5, 0.3, np.random.default_rng(1))
    share = label_counts(parts, labels, 2000) / 100
    assert np.allclose(share.mean(axis=1), 1 / 5, atol=0.02)
    assert np.allclose(share.var(axis=1), 4 / (25 * 2.5), rtol=0.15)


def test_an_alpha_that_underflows_gives_each_label_to_one_client():
    labels = np.arange(900) % 3
    counts = label_counts(dirichlet(labels, 3, 1e-12, np.random.default_rng(5)), labels, 3)
    assert np.all(np.sort(counts, axis=0)[-1] >= 298)  # but for what was moved to the empty


def test_as_many_clients_as_examples_get_one_each():
    for scheme in ("dirichlet", "quantity"):
        assert [p.size for p in deal(scheme, clients=100, alpha=1e-3)] == [1] * 100


def test_the_repair_takes_from_the_largest_only():
    parts = quantity(1000, 10, 1e-12, np.random.default_rng(0))
    assert sorted(part.size for part in parts) == [1] * 9 + [991]


@few
@given(clients=st.integers(1, 10), each=st.integers(1, 4), shard=st.integers(1, 6), seed=st.integers(0, 99))
def test_shards_bound_the_labels_of_a_client_where_the_sizes_divide(clients, each, shard, seed):
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(clients * each), shard))
    parts = shards(labels, clients, each, np.random.default_rng(seed))
    check_cover(parts, labels.size)
    assert {part.size for part in parts} == {each * shard}
    assert max(np.unique(labels[part]).size for part in parts) <= each


def test_shards_of_unequal_size_lose_nothing():
    labels = np.arange(103) % 10
    parts = shards(labels, 7, 3, np.random.default_rng(0))
    check_cover(parts, 103)
    assert max(p.size for p in parts) - min(p.size for p in parts) <= 3


def test_quantity_skews_sizes_and_not_labels():
    labels = np.arange(20_000) % 2
    parts = quantity(20_000, 5, 0.5, np.random.default_rng(0))
    assert max(part.size for part in parts) > 2 * min(part.size for part in parts)
    assert all(abs(labels[part].mean() - 0.5) < 0.05 for part in parts if part.size > 1000)


def test_natural_is_one_client_per_id_in_order_of_id():
    groups = np.array(["w3", "w1", "w3", "w2", "w1"])
    assert [part.tolist() for part in natural(groups)] == [[1, 4], [3], [0, 2]]
    assert [part.tolist() for part in deal("natural", clients=3, size=5, groups=groups)] == [
        [1, 4],
        [3],
        [0, 2],
    ]


def test_string_labels_work():
    labels = np.array(["cat", "dog"] * 20)
    check_cover(deal("dirichlet", size=40, labels=labels), 40)


def test_counts_have_a_row_a_client_and_a_column_a_label():
    parts = (np.array([0, 3]), np.array([1]), np.array([], dtype=np.int64))
    counts = label_counts(parts, np.array([2, 0, 0, 2]), 4)
    assert counts.dtype == np.int64
    assert counts.tolist() == [[0, 0, 2, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert label_counts((), np.array([1]), 2).shape == (0, 2)


@pytest.mark.parametrize("labels", [np.array([0, 4]), np.array([-1, 0]), np.array([0.0, 1.0])])
def test_labels_that_cannot_be_counted_are_refused(labels):
    with pytest.raises(TaskError):
        label_counts((np.array([0, 1]),), labels, 4)


def refusal(scheme, **arguments):
    with pytest.raises(ConfigError) as caught:
        deal(scheme, **arguments)
    return caught.value


@pytest.mark.parametrize("scheme", RANDOM_SCHEMES)
@pytest.mark.parametrize("clients", [101, 0, -1])
def test_too_many_or_too_few_clients(scheme, clients):
    assert refusal(scheme, clients=clients, size=100).key == "federation.clients"


def test_an_unknown_scheme_names_the_nearest():
    error = refusal("dirichlett")
    assert (error.key, error.suggestion) == ("data.partition", "dirichlet")
    assert "quantity" in error.reason


@pytest.mark.parametrize("scheme", ["dirichlet", "shards"])
@pytest.mark.parametrize("labels", [None, np.linspace(0, 1, 100), np.zeros((100, 2), dtype=np.int64)])
def test_a_task_without_classes_is_told_what_works(scheme, labels):
    error = refusal(scheme, labels=labels)
    assert error.key == "data.partition"
    assert "class labels" in error.reason
    assert "iid, quantity would work" in error.reason
    assert "natural, quantity" in refusal(scheme, labels=labels, groups=np.arange(100) % 3).reason


def test_a_task_without_natural_ids_is_told_what_works():
    error = refusal("natural")
    assert error.key == "data.partition"
    assert "natural ids" in error.reason
    assert "dirichlet, iid, quantity, shards would work" in error.reason


@pytest.mark.parametrize("clients", [3, 5, 1000])
def test_natural_needs_as_many_clients_as_ids(clients):
    error = refusal("natural", clients=clients, groups=np.arange(100) % 4)
    assert error.key == "federation.clients"
    assert error.reason == "the data has 4 natural ids; set federation.clients = 4"


@pytest.mark.parametrize("scheme", ["dirichlet", "quantity"])
@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_an_impossible_alpha(scheme, alpha):
    assert refusal(scheme, alpha=alpha).key == "data.alpha"


@pytest.mark.parametrize("shards_each", [0, 21])
def test_an_impossible_number_of_shards(shards_each):
    error = refusal("shards", shards_each=shards_each)
    assert error.key == "data.labels-per-client"
    assert "1 to 20" in error.reason


@pytest.mark.parametrize("what", ["labels", "groups"])
def test_labels_and_ids_are_as_many_as_the_examples(what):
    with pytest.raises(TaskError, match="100 examples but 99"):
        deal("iid", **{what: np.zeros(99, dtype=np.int64)})


@pytest.mark.parametrize("scheme", RANDOM_SCHEMES)
def test_a_large_federation_is_dealt_out_quickly(scheme):
    start = time.perf_counter()
    deal(scheme, clients=1000, size=60_000)
    assert time.perf_counter() - start < 2.0  # takes about 0.02; the machine may be busy
