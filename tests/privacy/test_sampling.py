"""Cohorts: uniform, without replacement, the same for the same seed, and honest about what the draw justifies."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlearn.privacy.sampling import draw_cohort
from fedlearn.sources import SeedTree

POPULATIONS = st.lists(st.integers(0, 2**62), unique=True, min_size=1, max_size=40)


@given(POPULATIONS, st.data(), st.randoms())
def test_a_cohort_is_a_sorted_part_of_the_population_whatever_its_order(population, data, random):
    size = data.draw(st.integers(1, len(population)))
    draw = draw_cohort(population, size, SeedTree.root(1))
    assert len(set(draw.cohort)) == len(draw.cohort) == size
    assert set(draw.cohort) <= set(population)
    assert list(draw.cohort) == sorted(draw.cohort)
    assert draw.population == len(population)
    assert draw.method == ("everyone" if size == len(population) else "fixed-size")
    random.shuffle(population)
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
