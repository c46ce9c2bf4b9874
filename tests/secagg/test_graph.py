"""The graph: regular, symmetric, connected, the same for everybody; its parameters are the published ones, exactly."""

from __future__ import annotations

import hashlib
from collections import Counter
from fractions import Fraction
from itertools import combinations, permutations
from math import comb, floor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlearn.secagg import graph as graphs
from fedlearn.secagg.graph import (
    COMPLETE_UP_TO,
    Graph,
    Ring,
    choose_graph,
    find_parameters,
    graph_of,
    neighbours,
    ring_permutation,
)

SEEDS = st.binary(min_size=32, max_size=32)

GOLDEN = {  # design/secagg.md, "Graph parameters": (n, share colluding and dropping, active) -> (k, t)
    (100, 0.05, False): (12, 6),
    (100, 0.1, False): (22, 11),
    (100, 0.05, True): (16, 11),
    (100, 0.1, True): (32, 22),
    (1000, 0.05, False): (30, 17),
    (1000, 0.1, False): (48, 27),
    (1000, 0.05, True): (66, 49),
    (1000, 0.1, True): (120, 87),
    (5000, 0.05, False): (32, 19),
    (5000, 0.1, False): (52, 30),
    (5000, 0.05, True): (78, 58),
    (5000, 0.1, True): (152, 110),
}


@st.composite
def sparse(draw):
    """A sparse graph and a ring for it."""
    n = draw(st.integers(4, 60))
    k = 2 * draw(st.integers(1, (n - 2) // 2))
    return Graph(n=n, k=k, threshold=draw(st.integers(1, k))), ring_permutation(n, draw(SEEDS))


def connected(graph: Graph, ring: Ring, left: set[int]) -> bool:
    """Whether those that are ``left`` can reach each other, by breadth-first search."""
    reached = set(list(left)[:1])
    edge = list(reached)
    while edge:
        new = {j for i in edge for j in neighbours(graph, i, ring)} & left - reached
        reached |= new
        edge = list(new)
    return reached == left


# -- parameters ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "parameters"), GOLDEN.items(), ids=str)
def test_the_designs_table_is_met_exactly(case, parameters):
    n, share, active = case
    assert find_parameters(n, colluding=share, dropping=share, active=active) == parameters


def more_than(population: int, marked: int, draws: int, level: int) -> Fraction:
    """P[Hyp(population, marked, draws) > level], summed term by term."""
    ways = sum(comb(marked, x) * comb(population - marked, draws - x) for x in range(level + 1, draws + 1))
    return Fraction(ways, comb(population, draws))


def by_hand(n: int, colluding: float, dropping: float, *, active: bool) -> tuple[int, int] | None:
    """The module's docstring, read literally: every even k and every t, every probability summed."""
    corrupt, dropped = floor(Fraction(str(colluding)) * n), floor(Fraction(str(dropping)) * n)
    rare = Fraction(1, 2 ** (81 if active else 41))
    for k in range(2, n - 1, 2):
        cut = Fraction(n * (n - k + 1), 2) * Fraction(comb(corrupt + dropped, k), comb(n, k))
        if cut > rare:
            continue
        a = next(x for x in range(k + 1) if more_than(n - 1, corrupt, k, x) <= rare / n)
        for t in range(2, k + 1):
            if t <= a or (active and 2 * t <= k + a):
                continue
            if more_than(n - 1, dropped, k, k - t) <= Fraction(1, 2**20) / n:  # P[k - Z < t]
                return k, t
    return None


@settings(max_examples=40, deadline=None)
@given(
    st.integers(2, 150),
    st.sampled_from([0, 0.01, 0.05, 0.1, 0.29, 0.33]),
    st.sampled_from([0, 0.05, 0.2]),
    st.booleans(),
)
def test_parameters_are_the_smallest_that_keep_the_conditions(n, colluding, dropping, active):
    expected = by_hand(n, colluding, dropping, active=active)
    if expected is None:
        with pytest.raises(ValueError, match="no k < n - 1"):
            find_parameters(n, colluding=colluding, dropping=dropping, active=active)
    else:
        assert find_parameters(n, colluding=colluding, dropping=dropping, active=active) == expected


@given(st.integers(1, 30), st.data())
def test_levels_are_quantiles_of_the_hypergeometric_distribution(population, data):
    marked = data.draw(st.integers(0, population))
    rarity = data.draw(st.integers(1, 10**6))
    assert list(graphs._levels(population, marked, rarity)) == [
        next(
            x for x in range(-1, draws + 1) if x >= 0 and more_than(population, marked, draws, x) <= Fraction(1, rarity)
        )
        for draws in range(population + 1)
    ]


def test_tails_agree_with_scipy():
    stats = pytest.importorskip("scipy.stats")
    for population, marked, rarity in [(4999, 500, 5000 << 81), (999, 50, 1000 << 41), (999, 333, 1000 << 20)]:
        for draws, level in enumerate(graphs._levels(population, marked, rarity)):
            if draws % 37 == 1:
                assert stats.hypergeom.sf(level, population, marked, draws) <= (1 + 1e-6) / rarity
                assert level == 0 or stats.hypergeom.sf(level - 1, population, marked, draws) >= (1 - 1e-6) / rarity


def test_the_share_of_clients_is_the_decimal_number_that_is_written():
    assert floor(0.29 * 100) == 28
    assert graphs.counts(100, 0.29, 0.07) == (29, 7)
    assert graphs.counts(1000, np.float64(0.1), 0) == (100, 0)


@pytest.mark.parametrize(
    ("n", "colluding", "dropping", "active"),
    [(1000, 0.3, 0.6, True), (150, 0.5, 0.49, False), (200, 0.45, 0.3, True), (3, 0.0, 0.0, False)],
)
def test_shares_that_no_sparse_graph_bears_are_refused_with_all_that_was_asked(n, colluding, dropping, active):
    with pytest.raises(ValueError, match=f"n = {n}, colluding = {colluding}, dropping = {dropping}"):
        find_parameters(n, colluding=colluding, dropping=dropping, active=active)


@pytest.mark.parametrize(
    ("n", "colluding", "dropping", "reason"),
    [
        (1, 0.1, 0.1, "n must be"),
        (2**32, 0.1, 0.1, "n must be"),
        (200, -0.1, 0.1, "colluding must be"),
        (200, float("nan"), 0.1, "colluding must be"),
        (200, 0.1, 1.0, "dropping must be"),
        (200, 0.5, 0.5, "below 1"),
    ],
)
def test_what_is_no_share_of_clients_is_refused(n, colluding, dropping, reason):
    with pytest.raises(ValueError, match=reason):
        find_parameters(n, colluding=colluding, dropping=dropping, active=True)
    with pytest.raises(ValueError, match=reason):
        choose_graph(n, colluding=colluding, dropping=dropping, active=True)


@pytest.mark.parametrize("share", [0.05, 0.1, 0.2])
def test_an_active_server_costs_neighbours_and_raises_the_threshold(share):
    k, t = find_parameters(1000, colluding=share, dropping=share, active=False)
    k_active, t_active = find_parameters(1000, colluding=share, dropping=share, active=True)
    assert k_active > k
    assert Fraction(t_active, k_active) > Fraction(t, k)
    assert 2 * t_active > k_active


# -- the cut -------------------------------------------------------------------------------------------------------


def gaps(n: int, gone: frozenset[int]) -> list[int]:
    """How many are gone between one that is left and the next, around a ring of n places."""
    left = [place for place in range(n) if place not in gone]
    return [(after - before) % n - 1 for before, after in zip(left, [*left[1:], left[0] + n], strict=True)]


@pytest.mark.parametrize(("n", "k"), [(9, 2), (10, 4), (12, 4), (11, 6)])
def test_survivors_are_cut_only_by_two_gaps_and_no_more_often_than_the_bound(n, k):
    """All ways to lose any number of clients, on one ring: as many as shuffles of the ring against one loss."""
    graph, ring = Graph(n=n, k=k, threshold=1), Ring(order=tuple(range(n)), places=tuple(range(n)))
    for count in range(n - 1):
        cut = 0
        for gone in map(frozenset, combinations(range(n), count)):
            apart = not connected(graph, ring, set(range(n)) - gone)
            assert apart == (sum(gap >= k // 2 for gap in gaps(n, gone)) >= 2)
            cut += apart
        assert Fraction(cut, comb(n, count)) <= graphs._cut_bound(n, k, count)


@given(st.integers(4, 400), st.data())
def test_the_bound_on_cuts_falls_with_k_and_rises_with_those_gone(n, data):
    gone = data.draw(st.integers(1, n - 1))
    k = 2 * data.draw(st.integers(1, (n - 2) // 2))
    bound = graphs._cut_bound(n, k, gone)
    assert graphs._cut_bound(n, k, gone - 1) <= bound
    assert graphs._cut_bound(n, k + 2, gone) <= bound
    assert (bound == 0) == (k > gone)


@pytest.mark.parametrize("active", [False, True])
@pytest.mark.parametrize(("n", "share"), [(150, 0.1), (400, 0.05), (400, 0.2)])
def test_chosen_graphs_keep_their_promises_when_clients_collude_and_drop(n, share, active):
    graph = choose_graph(n, colluding=share, dropping=share, active=active)
    chance = np.random.Generator(np.random.PCG64(n))
    for trial in range(20):
        ring = ring_permutation(n, hashlib.sha256(b"%d" % trial).digest())
        corrupt, dropped, _ = np.split(chance.permutation(n), [int(share * n), 2 * int(share * n)])
        left = set(range(n)) - set(corrupt.tolist()) - set(dropped.tolist())
        assert connected(graph, ring, left)
        for i in left:
            near = neighbours(graph, i, ring)
            colluding = len(set(near) & set(corrupt.tolist()))
            answering = len(set(near) - set(dropped.tolist()))
            assert colluding < graph.threshold <= answering
            assert not active or 2 * graph.threshold > graph.k + colluding


@pytest.mark.parametrize("n", [200, 1000, 5000])
@pytest.mark.parametrize("share", [0.05, 0.1, 0.2])
def test_a_server_that_lies_about_who_dropped_needs_unlikely_accomplices_at_both_ends_of_a_stretch(n, share):
    k, t = find_parameters(n, colluding=share, dropping=share, active=True)
    one_pair = more_than(n, int(share * n), k, 2 * t - k - 1)
    assert Fraction(n * (n - k + 1), 2) * one_pair <= Fraction(n - k + 1, 2) / 2**81


# -- the graph -----------------------------------------------------------------------------------------------------


@given(st.integers(2, COMPLETE_UP_TO), st.booleans())
def test_everybody_is_everybodys_neighbour_up_to_128(n, active):
    graph = choose_graph(n, colluding=0.3, dropping=0.1, active=active)
    assert graph.complete
    assert (graph.k, graph.threshold) == (n - 1, floor(Fraction(2 * n, 3)) + 1)
    ring = ring_permutation(n, bytes(32))
    for i in range(n):
        assert neighbours(graph, i, ring) == tuple(j for j in range(n) if j != i)


def test_above_128_the_graph_is_sparse():
    graph = choose_graph(129, colluding=0.1, dropping=0.1, active=True)
    assert not graph.complete
    assert (graph.k, graph.threshold) == find_parameters(129, colluding=0.1, dropping=0.1, active=True)


@given(st.integers(3, 128), st.data(), st.booleans())
def test_a_complete_graph_has_a_threshold_that_no_colluders_reach(n, data, active):
    """However many of them there are: of a cohort most of which never came, they may be all that is left."""
    corrupt = data.draw(st.integers(0, n - 1))
    threshold = graph_of(n, corrupt=corrupt, dropped=0, active=active).threshold
    assert corrupt < threshold <= n
    assert threshold >= 2 * n // 3 + 1
    assert not active or 2 * threshold > n + corrupt


def test_a_graph_of_colluders_alone_is_refused():
    with pytest.raises(ValueError, match="100 of n = 100 clients colluding"):
        graph_of(100, corrupt=100, dropped=0, active=True)


def test_a_semi_honest_server_may_have_more_accomplices():
    assert choose_graph(100, colluding=0.5, dropping=0.1, active=False).threshold == 67


@given(sparse())
def test_the_graph_is_regular_symmetric_and_connected(pair):
    graph, ring = pair
    near = [neighbours(graph, i, ring) for i in range(graph.n)]
    for i, those in enumerate(near):
        assert len(set(those)) == len(those) == graph.k
        assert i not in those
        assert those == tuple(sorted(those))
        assert all(i in near[j] for j in those)
    assert connected(graph, ring, set(range(graph.n)))


@given(sparse(), st.data())
def test_neighbours_are_those_nearest_on_the_ring(pair, data):
    graph, ring = pair
    i, j = data.draw(st.permutations(range(graph.n)))[:2]
    steps = abs(ring.order.index(i) - ring.order.index(j))
    assert (j in neighbours(graph, i, ring)) == (min(steps, graph.n - steps) <= graph.k // 2)


@pytest.mark.parametrize(
    ("n", "k", "threshold", "reason"),
    [
        (1, 0, 1, "n must be"),
        (10, 0, 1, "k must be"),
        (10, 3, 2, "k must be"),
        (10, 10, 2, "k must be"),
        (10, 4, 0, "threshold must be"),
        (10, 4, 5, "threshold must be"),
        (10, 9, 11, "threshold must be"),
    ],
)
def test_what_is_no_graph_is_refused(n, k, threshold, reason):
    with pytest.raises(ValueError, match=reason):
        Graph(n=n, k=k, threshold=threshold)


def test_clients_that_are_not_there_have_no_neighbours():
    graph = Graph(n=10, k=4, threshold=3)
    for index in (-1, 10):
        with pytest.raises(ValueError, match="index must be"):
            neighbours(graph, index, ring_permutation(10, bytes(32)))
    with pytest.raises(ValueError, match="ring of 11"):
        neighbours(graph, 0, ring_permutation(11, bytes(32)))


# -- the shuffle ---------------------------------------------------------------------------------------------------


def test_the_ring_is_frozen():
    """Clients of every version must agree on it: a change here is a new suite."""
    assert ring_permutation(16, bytes(range(32))).order == (5, 2, 4, 3, 12, 11, 8, 7, 9, 6, 14, 10, 1, 15, 13, 0)
    order = ring_permutation(5000, hashlib.sha256(b"roster").digest()).order
    assert order[:4] == (1490, 1917, 2245, 1601)
    assert hashlib.sha256(b"".join(i.to_bytes(4, "big") for i in order)).hexdigest() == (
        "0fb754d9ead05a479789de50c6f2f5d8097fdbfe3187fb941b2ce469ef3109bd"
    )


def test_neighbours_are_frozen():
    graph = choose_graph(1000, colluding=0.05, dropping=0.05, active=False)
    assert neighbours(graph, 0, ring_permutation(1000, bytes(32))) == (
        13, 56, 89, 105, 114, 129, 154, 207, 258, 267, 269, 292, 401, 412, 439, 496, 545, 570, 710, 738, 739, 764, 769,
        779, 829, 879, 915, 921, 934, 971,
    )  # fmt: skip


@given(st.integers(1, 300), SEEDS)
def test_a_ring_is_a_permutation_and_its_inverse(n, seed):
    ring = ring_permutation(n, seed)
    assert sorted(ring.order) == list(range(n))
    assert [ring.order[place] for place in ring.places] == list(range(n))
    assert ring == ring_permutation(n, seed)


def test_every_order_comes_equally_often():
    """All sequences of draws for five clients, those to be dropped left out: each order exactly once."""
    draws = [(a, b, c, d) for a in range(5) for b in range(4) for c in range(3) for d in range(2)]
    seen = Counter(tuple(graphs._shuffled(5, iter(each))) for each in draws)
    assert seen == Counter(permutations(range(5)))


def test_words_that_are_too_large_are_dropped_and_only_the_lowest_bits_count():
    assert graphs._shuffled(5, iter([7, 6, 5, 2, 3, 1, 0])) == graphs._shuffled(5, iter([2, 3, 1, 0]))
    assert graphs._shuffled(5, iter([8 + 2, 4 + 3, 2**31 + 1, 6])) == graphs._shuffled(5, iter([2, 3, 1, 0]))


def test_words_are_sha256_in_counter_mode():
    seed = bytes(range(32))
    words = graphs._words(seed)
    expected = b"".join(
        hashlib.sha256(b"fedlearn.secagg/graph/1" + seed + i.to_bytes(8, "big")).digest() for i in range(3)
    )
    assert b"".join(next(words).to_bytes(4, "big") for _ in range(24)) == expected


def test_places_are_uniform_over_seeds():
    n, seeds = 12, 6000
    counts = np.zeros((n, n))
    for number in range(seeds):
        counts[np.arange(n), ring_permutation(n, hashlib.sha256(b"%d" % number).digest()).places] += 1
    chi2 = ((counts - seeds / n) ** 2 / (seeds / n)).sum()
    assert 70 < chi2 < 190  # 121 degrees of freedom: six standard deviations would be 214, and 28


@pytest.mark.parametrize("length", [0, 31, 33])
def test_seeds_of_another_length_are_refused(length):
    with pytest.raises(ValueError, match="32 bytes"):
        ring_permutation(10, bytes(length))


@pytest.mark.parametrize("n", [0, 2**32])
def test_rings_of_no_client_or_too_many_are_refused(n):
    with pytest.raises(ValueError, match="n must be"):
        ring_permutation(n, bytes(32))
