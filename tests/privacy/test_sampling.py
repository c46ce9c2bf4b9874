"""Cohorts: drawn as they say, the same for the same seed or by nobody, and honest about what the draw justifies."""

from __future__ import annotations

import math
import random
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlearn.privacy.noise import Keystream, Noise, SecureNoise, SimulatedNoise
from fedlearn.privacy.sampling import Draw, draw_cohort, draw_poisson, draw_separated
from fedlearn.sources import SecureRandom, SeedTree

POPULATIONS = st.lists(st.integers(0, 2**62), unique=True, min_size=1, max_size=40)


@given(POPULATIONS, st.data(), st.randoms())
def test_a_cohort_is_a_sorted_part_of_the_population_whatever_its_order(population, data, chance):
    size = data.draw(st.integers(1, len(population)))
    draw = draw_cohort(population, size, SeedTree.root(1))
    assert len(set(draw.cohort)) == len(draw.cohort) == size
    assert set(draw.cohort) <= set(population)
    assert list(draw.cohort) == sorted(draw.cohort)
    assert draw.population == len(population)
    assert draw.method == ("everyone" if size == len(population) else "fixed-size")
    chance.shuffle(population)
    assert draw_cohort(population, size, SeedTree.root(1)) == draw


@given(POPULATIONS)
def test_a_size_that_cannot_be_drawn_is_refused(population):
    for size in (-1, 0, len(population) + 1):
        with pytest.raises(ValueError, match="cannot draw"):
            draw_cohort(population, size, SeedTree.root(0))


def test_nobody_can_be_drawn_from_nobody():
    with pytest.raises(ValueError, match="0 clients"):
        draw_cohort([], 1, SeedTree.root(0))


def test_every_pair_is_drawn_equally_often():
    draws = 3000
    seeds = SeedTree.root(5)
    seen = Counter(draw_cohort(range(5), 2, seeds.child(number)).cohort for number in range(draws))
    assert set(seen) == set(combinations(range(5), 2))
    expected = draws / 10
    chi_squared = sum((count - expected) ** 2 / expected for count in seen.values())
    assert chi_squared < 27.9  # 9 degrees of freedom, p = 0.001; the seed is fixed


def test_a_draw_does_not_depend_on_earlier_draws():
    seeds = SeedTree.root(0)
    alone = draw_cohort(range(100), 10, seeds.child("cohort", 7, 1))
    for number in range(7):
        draw_cohort(range(100), 10, seeds.child("cohort", number, 1))
    assert draw_cohort(range(100), 10, seeds.child("cohort", 7, 1)) == alone
    assert draw_cohort(range(100), 10, seeds.child("cohort", 7, 2)) != alone


# -- Poisson -------------------------------------------------------------------------------------------------------

KEYS = st.binary(min_size=32, max_size=32)


@given(POPULATIONS, st.floats(1e-3, 1), KEYS, st.randoms())
def test_a_poisson_draw_is_a_sorted_part_of_the_population_whatever_its_order(population, rate, key, chance):
    draw = draw_poisson(population, rate, Keystream(key))
    assert list(draw.cohort) == sorted(set(draw.cohort))
    assert set(draw.cohort) <= set(population)
    assert (draw.method, draw.rate, draw.population) == ("poisson", rate, len(population))
    shuffled = [*population, *population[:3]]  # and some of them named twice
    chance.shuffle(shuffled)
    assert draw_poisson(shuffled, rate, Keystream(key)) == draw


@given(POPULATIONS, KEYS)
def test_with_probability_one_everybody_is_invited(population, key):
    assert list(draw_poisson(population, 1.0, Keystream(key)).cohort) == sorted(population)


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.0001, math.nan, math.inf])
def test_a_rate_that_is_no_probability_is_refused(rate):
    with pytest.raises(ValueError, match="sampling rate"):
        draw_poisson([1, 2], rate, Keystream(bytes(32)))


def test_an_empty_cohort_is_a_draw_and_is_not_drawn_again():
    draws = [draw_poisson(range(3), 0.1, Keystream(bytes([n]) * 32)) for n in range(50)]
    assert any(draw.cohort == () for draw in draws)
    assert {draw.sampling(claimed=True, enrolled=3, share=0.5).rate for draw in draws} == {0.1}


CHI_SQUARED = {1: 23.93, 15: 55.0, 39: 95.0}
"""Beyond it, with so many degrees of freedom, lies a chance of about 10^-6."""


def invited(draws: int, clients: int, rate: float, noise: Noise) -> np.ndarray:
    """Who was invited in which round: shape (draws, clients)."""
    found = np.zeros((draws, clients))
    for number in range(draws):
        found[number, list(draw_poisson(range(clients), rate, noise.stream("cohort", number, 1)).cohort)] = 1
    return found


NOISES = [SimulatedNoise(SeedTree.root(4)), SecureNoise(SecureRandom())]


@pytest.mark.parametrize("noise", NOISES, ids=["simulated", "secure"])
def test_each_client_is_invited_with_its_probability_and_independently(noise):
    draws, clients, rate = 3000, 40, 0.15
    found = invited(draws, clients, rate, noise)
    counts = found.sum(axis=0)
    variance = draws * rate * (1 - rate)
    assert ((counts - draws * rate) ** 2 / variance).sum() < CHI_SQUARED[39] + 5
    sizes = found.sum(axis=1)  # binomial: with less spread it would be a fixed size, with more a common cause
    assert sizes.mean() == pytest.approx(clients * rate, abs=5 * math.sqrt(clients * rate * (1 - rate) / draws))
    spread = sizes.var() / (clients * rate * (1 - rate))
    assert abs(spread - 1) < 5 * math.sqrt(2 / draws)
    standard = (found - rate) / math.sqrt(rate * (1 - rate))
    between = standard.T @ standard / draws  # clients
    assert np.abs(between - np.diag(np.diag(between))).max() < 6 / math.sqrt(draws)
    later = (standard[1:] * standard[:-1]).mean(axis=0)  # rounds
    assert np.abs(later).max() < 5 / math.sqrt(draws)


@pytest.mark.parametrize("noise", NOISES, ids=["simulated", "secure"])
def test_every_subset_of_four_clients_has_its_own_probability(noise):
    draws, rate = 8_000, 0.3
    found = invited(draws, 4, rate, noise) @ np.array([1, 2, 4, 8])
    chi_squared = 0.0
    for subset in range(16):
        size = bin(subset).count("1")
        expected = draws * rate**size * (1 - rate) ** (4 - size)
        chi_squared += (float((found == subset).sum()) - expected) ** 2 / expected
    assert chi_squared < CHI_SQUARED[15]


def test_a_simulation_can_seek_to_any_round_and_a_real_run_cannot_be_drawn_again():
    simulated = SimulatedNoise(SeedTree.root(4))
    all_of_them = [draw_poisson(range(50), 0.3, simulated.stream("cohort", n, 1)).cohort for n in range(20)]
    assert draw_poisson(range(50), 0.3, simulated.stream("cohort", 13, 1)).cohort == all_of_them[13]
    assert len(set(all_of_them)) == 20
    other = SimulatedNoise(SeedTree.root(5))
    assert draw_poisson(range(50), 0.3, other.stream("cohort", 13, 1)).cohort != all_of_them[13]
    secure = SecureNoise(SecureRandom())
    again = [draw_poisson(range(50), 0.3, secure.stream("cohort", 13, 1)).cohort for _ in range(20)]
    assert len(set(again)) == 20


def test_one_client_more_changes_no_other_clients_draw():
    """Adding one is the neighbour that the promise speaks of: the others' chances must not hang on it."""
    with_it = draw_poisson(range(41), 0.3, Keystream(bytes(32))).cohort
    without = draw_poisson(range(40), 0.3, Keystream(bytes(32))).cohort
    assert [client for client in with_it if client < 40] == list(without)


def test_what_the_ledger_is_told_is_what_was_drawn():
    seeds = SeedTree.root(0)
    poisson = draw_poisson(range(10), 0.3, Keystream(bytes(32)))
    separated = draw_separated(range(10), 3, round_number=1, last_round={}, min_separation=2, seeds=seeds)
    draws = {"poisson": poisson, "fixed-size": draw_cohort(range(10), 3, seeds), "separated": separated}
    draws["everyone"] = draw_cohort(range(10), 10, seeds)
    for method, draw in draws.items():
        claimed = draw.sampling(claimed=True, enrolled=12, share=0.25)  # ten of twelve were there: a server's secret
        assert (claimed.method, claimed.population) == (method, 12)
        assert claimed.rate == (0.3 if method == "poisson" else 0.25)
        observed = draw.sampling(claimed=False, enrolled=12, share=0.25)
        assert observed.method == ("poisson-observed" if method == "poisson" else method)


@pytest.mark.parametrize("cohort", [(1, 1), (1, 2, 2), (2, 1)])
def test_a_cohort_with_a_client_twice_is_none(cohort):
    with pytest.raises(ValueError, match="no client is in it twice"):
        Draw(cohort=cohort, population=3, method="poisson", rate=0.5)


# -- populations that are never listed -------------------------------------------------------------------------------


@given(first=st.integers(0, 5), clients=st.integers(1, 60), size=st.integers(1, 60), number=st.integers(1, 9))
def test_a_range_is_drawn_from_as_the_list_of_its_clients_is(first, clients, size, number):
    there, seeds, size = range(first, first + clients), SeedTree.root(3).child(number), min(size, clients)
    listed = list(there)
    assert draw_cohort(there, size, seeds) == draw_cohort(listed, size, seeds)
    assert draw_poisson(there, 0.3, Keystream(bytes(32))) == draw_poisson(listed, 0.3, Keystream(bytes(32)))
    last = {client: 1 + client % number for client in range(0, first + clients + 5, 2)}  # some of them are gone
    one, same = (
        draw_separated(each, size, round_number=number, last_round=last, min_separation=3, seeds=seeds)
        for each in (there, listed)
    )
    assert one == same


# -- separated -----------------------------------------------------------------------------------------------------


@given(
    clients=st.integers(1, 25),
    size=st.integers(1, 8),
    separation=st.integers(1, 9),
    seed=st.integers(0, 2**32),
)
def test_a_client_rests_as_long_as_it_must_whoever_is_missing_and_whenever_a_run_goes_on(
    clients, size, separation, seed
):
    """Clients come and go, rounds are drawn again with others there, and none is ever invited too soon."""
    last: dict[int, int] = {}
    seeds, chance = SeedTree.root(1), random.Random(seed)
    for number in range(1, 40):
        for attempt in (1, 2) if chance.random() < 0.2 else (1,):
            there = [client for client in range(clients) if chance.random() < 0.7]
            draw = draw_separated(
                there,
                size,
                round_number=number,
                last_round=last,
                min_separation=separation,
                seeds=seeds.child(number, attempt),
            )
            assert set(draw.cohort) <= set(there)
            assert len(draw.cohort) <= size
            assert all(number - last[client] >= separation for client in draw.cohort if client in last)
            due = [client for client in there if client not in last or number - last[client] >= separation]
            assert len(draw.cohort) == min(size, len(due))  # as many as there can be
            last.update(dict.fromkeys(draw.cohort, number))


def test_with_everybody_there_every_client_takes_its_turn():
    last: dict[int, int] = {}
    counts = Counter()
    for number in range(1, 41):
        draw = draw_separated(
            range(20), 5, round_number=number, last_round=last, min_separation=4, seeds=SeedTree.root(number)
        )
        assert len(draw.cohort) == 5
        last.update(dict.fromkeys(draw.cohort, number))
        counts.update(draw.cohort)
    assert set(counts.values()) == {10}
