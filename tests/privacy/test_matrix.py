"""Correlated noise: the sensitivity is the largest there is, the error the dense matrix's, rows those of C⁻¹Z."""

from __future__ import annotations

import math
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlearn.privacy.matrix import (
    COEFFICIENT_STEP,
    MOST_BANDS,
    choose_bands,
    correlate,
    error,
    sensitivity,
    square_root_coefficients,
)

COLUMNS = (
    st.lists(st.floats(0, 1), min_size=1, max_size=6)
    .map(lambda values: tuple(sorted(values, reverse=True)))
    .filter(lambda values: values[0] > 1e-3)
)


def dense(coefficients, rows: int) -> np.ndarray:
    """C, written out."""
    matrix = np.zeros((rows, rows))
    for index, coefficient in enumerate(coefficients[:rows]):
        matrix += coefficient * np.eye(rows, k=-index)
    return matrix


def largest(coefficients, rows: int, min_separation: int) -> float:
    """The largest norm of a sum of columns that are far enough apart: every pattern is tried."""
    matrix, found = dense(coefficients, rows), 0.0
    for count in range(1, rows + 1):
        for pattern in combinations(range(rows), count):
            if all(later - earlier >= min_separation for earlier, later in pairwise(pattern)):
                found = max(found, float(np.linalg.norm(matrix[:, pattern].sum(axis=1))))
    return found


@given(COLUMNS, st.integers(1, 8), st.integers(1, 9))
def test_the_sensitivity_is_that_of_the_worst_of_all_patterns(coefficients, rows, min_separation):
    found = sensitivity(coefficients, rows=rows, min_separation=min_separation)
    assert found == pytest.approx(largest(coefficients, rows, min_separation), rel=1e-12)


@given(COLUMNS, st.integers(1, 8), st.integers(1, 4), st.integers(0, 2**32))
def test_no_updates_of_norm_one_move_it_further_whatever_their_directions(coefficients, rows, min_separation, seed):
    updates = np.zeros((rows, 3))
    taking_part = range(0, rows, min_separation)
    directions = np.random.default_rng(seed).normal(size=(len(taking_part), 3))
    updates[list(taking_part)] = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    moved = float(np.linalg.norm(dense(coefficients, rows) @ updates))
    assert moved <= sensitivity(coefficients, rows=rows, min_separation=min_separation) * (1 + 1e-12)


def test_bands_that_do_not_overlap_cost_the_root_of_the_participations():
    coefficients = square_root_coefficients(4)
    found = sensitivity(coefficients, rows=40, min_separation=10)
    assert found == pytest.approx(math.sqrt(4) * np.linalg.norm(coefficients), rel=1e-12)
    assert sensitivity((1.0,), rows=41, min_separation=10) == pytest.approx(math.sqrt(5), rel=1e-12)


@pytest.mark.parametrize("coefficients", [(), (0.0,), (-1.0,), (1.0, 2.0), (1.0, -0.5), (math.nan,), (math.inf, 1.0)])
def test_coefficients_for_which_nothing_is_proved_are_refused(coefficients):
    with pytest.raises(ValueError, match="coefficients"):
        sensitivity(coefficients, rows=3, min_separation=1)
    with pytest.raises(ValueError, match="coefficients"):
        error(coefficients, 3)
    with pytest.raises(ValueError, match="coefficients"):
        correlate((), np.zeros(2), coefficients)


@pytest.mark.parametrize(("rows", "min_separation"), [(0, 1), (1, 0), (-1, 1)])
def test_there_is_a_round_at_least(rows, min_separation):
    with pytest.raises(ValueError, match="at least 1"):
        sensitivity((1.0,), rows=rows, min_separation=min_separation)
    with pytest.raises(ValueError, match="at least 1"):
        choose_bands(rows, min_separation)


def test_the_coefficients_are_the_square_root_of_the_prefix_sum():
    exact = [math.comb(2 * index, index) / 4**index for index in range(MOST_BANDS)]
    found = square_root_coefficients(MOST_BANDS)
    np.testing.assert_allclose(found, exact, rtol=0, atol=COEFFICIENT_STEP / 2)
    root = dense(found, MOST_BANDS)
    np.testing.assert_allclose(root @ root, np.tril(np.ones((MOST_BANDS, MOST_BANDS))), atol=1e-3)
    assert all((each / COEFFICIENT_STEP).is_integer() for each in found)
    assert all(later < earlier for earlier, later in pairwise(found))
    with pytest.raises(ValueError, match="bands"):
        square_root_coefficients(0)


@given(COLUMNS.filter(lambda values: values[0] > 0.2), st.integers(1, 12))
def test_the_error_is_the_dense_matrixs(coefficients, rows):
    product = np.tril(np.ones((rows, rows))) @ np.linalg.inv(dense(coefficients, rows))
    assert error(coefficients, rows) == pytest.approx(np.linalg.norm(product) / math.sqrt(rows), rel=1e-6)


@given(COLUMNS.filter(lambda values: values[0] > 0.2), st.integers(1, 12), st.integers(0, 2**32))
def test_rows_are_those_of_the_dense_inverse_from_the_latest_rows_alone(coefficients, rows, seed):
    fresh = np.random.default_rng(seed).normal(size=(rows, 3))
    expected = np.linalg.solve(dense(coefficients, rows), fresh)
    history: tuple[np.ndarray, ...] = ()
    for row in range(rows):
        before = fresh[row].copy()
        found = correlate(history, fresh[row], coefficients)
        np.testing.assert_allclose(found, expected[row], rtol=1e-6, atol=1e-6 * np.abs(expected).max())
        np.testing.assert_array_equal(fresh[row], before)
        history = (found, *history)[: len(coefficients) - 1]


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match="shape"):
        correlate([np.zeros(1)], np.zeros(3), (1.0, 0.5))


@pytest.mark.parametrize(("rows", "min_separation"), [(1, 1), (5, 9), (12, 3), (64, 8), (70, 70), (200, 100)])
def test_the_number_of_bands_is_the_best_of_all(rows, min_separation):
    costs = {}
    for bands in range(1, min(rows, min_separation, MOST_BANDS) + 1):
        column = square_root_coefficients(bands)
        costs[bands] = sensitivity(column, rows=rows, min_separation=min_separation) * error(column, rows)
    assert choose_bands(rows, min_separation) == min(costs, key=costs.__getitem__)


def test_one_band_is_independent_noise_in_every_round():
    assert choose_bands(50, 1) == 1
    assert square_root_coefficients(1) == (1.0,)
    assert sensitivity((1.0,), rows=50, min_separation=1) == pytest.approx(math.sqrt(50))  # 50 Gaussians composed
    assert error((1.0,), 50) == pytest.approx(math.sqrt(51 / 2))  # the mean of 1 to 50
    fresh = np.arange(3.0)
    np.testing.assert_array_equal(correlate((), fresh, (1.0,)), fresh)


def test_correlated_noise_halves_the_error_of_64_rounds_at_equal_privacy():
    def cost(column) -> float:
        return sensitivity(column, rows=64, min_separation=8) * error(column, 64)

    best = square_root_coefficients(choose_bands(64, 8))
    assert len(best) == 8
    assert cost((1.0,)) / cost(best) == pytest.approx(2.096, abs=0.001)


def test_ten_thousand_rounds_can_be_planned():
    assert choose_bands(10_000, 1_000) == MOST_BANDS
