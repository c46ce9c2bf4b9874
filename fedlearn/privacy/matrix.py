"""Correlated noise (DP-FTRL): noise of one round is partly taken back in the next, so that sums over rounds have less.

With C lower-triangular and Toeplitz, its first column the ``coefficients``, rounds release X + C⁻¹Z instead of X + Z.
All rows together are a post-processing of C·X + Z, one Gaussian mechanism with the sensitivity of C; and what a model
adds up over rounds carries the noise A·C⁻¹Z, A the lower triangle of ones. C = 1 is independent noise.

Reference: Choquette-Choo et al., arXiv:2306.08153 (banded matrices); Kalinin and Lampert, arXiv:2405.13763 (the square
root of A, cut to a band, and its sensitivity).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "COEFFICIENT_STEP",
    "MOST_BANDS",
    "choose_bands",
    "correlate",
    "error",
    "sensitivity",
    "square_root_coefficients",
]

COEFFICIENT_STEP = 2.0**-16
"""What the coefficients of the square root are multiples of."""

MOST_BANDS = 64
"""The most bands that are chosen: a server keeps one vector less of past noise."""


def square_root_coefficients(bands: int) -> tuple[float, ...]:
    """Return the first ``bands`` coefficients of the square root of A: c₀ = 1, cᵢ = cᵢ₋₁·(2i-1)/(2i), to 2^-16.

    They are rounded to multiples of ``COEFFICIENT_STEP``: for a C of such numbers and an X of integers, C·X can be
    computed without a rounding, and noise be drawn on the very lattice where it lies.

    Raises:
        ValueError: ``bands`` is below 1.

    Reference: Kalinin and Lampert, arXiv:2405.13763, section 3 (banded square root factorisation).

    >>> square_root_coefficients(4)
    (1.0, 0.5, 0.375, 0.3125)
    """
    if bands < 1:
        raise ValueError(f"bands must be at least 1, got {bands}")
    found = [1.0]
    for index in range(1, bands):
        found.append(found[-1] * (2 * index - 1) / (2 * index))
    return tuple(round(each / COEFFICIENT_STEP) * COEFFICIENT_STEP for each in found)


def sensitivity(coefficients: Sequence[float], *, rows: int, min_separation: int) -> float:
    """Return how far one client can move C·X in L2 norm, if each of its updates has norm at most 1.

    The largest norm of a sum of columns of C that are at least ``min_separation`` apart. With coefficients that are
    neither negative nor increasing it is reached by taking part as early and as often as possible: in rows 0, b, 2b, …,
    ⌈rows/b⌉ times. Updates that point in different directions move it less, as no entry of CᵀC is negative.

    Args:
        coefficients: the first column of C, from the diagonal down.
        rows: how many rounds there will be.
        min_separation: b, rounds from one participation of a client to its next, at least.

    Raises:
        ValueError: there is no coefficient; one is negative, larger than the one before, or not finite; the first is
            not above 0; ``rows`` or ``min_separation`` is below 1.

    Reference: Kalinin and Lampert, arXiv:2405.13763, Theorem 2.

    >>> sensitivity((1.0,), rows=9, min_separation=1), sensitivity((1.0,), rows=9, min_separation=5)
    (3.0, 1.4142135623730951)
    """
    column = _checked(coefficients)
    _check_rounds(rows, min_separation)
    moved = np.zeros(rows)
    for start in range(0, rows, min_separation):
        length = min(column.size, rows - start)
        moved[start : start + length] += column[:length]
    return math.sqrt(float(moved @ moved))


def error(coefficients: Sequence[float], rows: int) -> float:
    """Return the standard deviation of the noise in a sum over rounds, as a root-mean-square over 1 to ``rows`` rounds.

    It is sqrt(‖A·C⁻¹‖²/rows) in the Frobenius norm, for independent Z of standard deviation 1, per coordinate.

    Raises:
        ValueError: as for ``sensitivity``.

    >>> error((1.0,), 7) == math.sqrt(sum(range(1, 8)) / 7)
    True
    """
    column = _checked(coefficients)
    _check_rounds(rows, 1)
    return float(_errors(column[None, :], rows)[0])


@lru_cache(maxsize=64)
def choose_bands(rows: int, min_separation: int) -> int:
    """Return the number of bands with the least noise in sums over rounds at equal privacy: sensitivity × ``error``.

    At most ``min_separation`` (two participations of a client then share no row), ``rows`` and ``MOST_BANDS``; in time
    proportional to ``rows``, all numbers of bands at once.

    Raises:
        ValueError: ``rows`` or ``min_separation`` is below 1.

    >>> choose_bands(100, 1), choose_bands(100, 10)
    (1, 10)
    """
    _check_rounds(rows, min_separation)
    most = min(rows, min_separation, MOST_BANDS)
    columns = np.tril(np.ones((most, 1)) * square_root_coefficients(most))
    noise = _errors(columns, rows)
    cost = [
        sensitivity(square_root_coefficients(bands), rows=rows, min_separation=min_separation) * noise[bands - 1]
        for bands in range(1, most + 1)
    ]
    return int(np.argmin(cost)) + 1


def correlate(
    history: Sequence[NDArray[np.float64]], fresh: NDArray[np.float64], coefficients: Sequence[float]
) -> NDArray[np.float64]:
    """Return one row of C⁻¹Z: yₜ = (zₜ - Σᵢ cᵢ·yₜ₋ᵢ) / c₀ over i ≥ 1.

    Args:
        history: earlier rows yₜ₋₁, yₜ₋₂, …, newest first, each of shape (d,): all there were, or bands - 1 of them.
        fresh: zₜ, shape (d,), independent of all earlier ones.
        coefficients: the first column of C, from the diagonal down.

    Raises:
        ValueError: the coefficients are none, as for ``sensitivity``, or a row has another shape.
    """
    column = _checked(coefficients)
    row = fresh.astype(np.float64)  # a copy
    for coefficient, earlier in zip(column[1:], history, strict=False):
        if earlier.shape != row.shape:
            raise ValueError(f"a row of shape {earlier.shape} cannot follow on one of shape {row.shape}")
        row -= coefficient * earlier
    row /= column[0]
    return row


def _errors(columns: NDArray[np.float64], rows: int) -> NDArray[np.float64]:
    """Return ``error`` for every row of ``columns``, shape (matrices, bands), each the first column of a C."""
    matrices, bands = columns.shape
    reversed_tail = columns[:, :0:-1]
    inverse = np.zeros((matrices, bands - 1 + rows))  # the first column of C⁻¹, after bands - 1 zeros
    for index in range(rows):
        place = bands - 1 + index
        taken = np.einsum("ij,ij->i", reversed_tail, inverse[:, index:place])
        inverse[:, place] = (float(index == 0) - taken) / columns[:, 0]
    sums = np.cumsum(inverse[:, bands - 1 :], axis=1)  # the first column of A·C⁻¹, itself Toeplitz
    squares: NDArray[np.float64] = sums**2 @ np.arange(rows, 0.0, -1.0)
    return np.sqrt(squares / rows)


def _checked(coefficients: Sequence[float]) -> NDArray[np.float64]:
    """Return the coefficients as an array, or raise where ``sensitivity`` would not be their sensitivity."""
    column = np.array(coefficients, dtype=np.float64)
    if column.ndim != 1 or not column.size or not np.isfinite(column).all() or not column[0] > 0:
        raise ValueError(f"coefficients are finite numbers, the first above 0, got {tuple(coefficients)}")
    if (column < 0).any() or (np.diff(column) > 0).any():
        raise ValueError(f"coefficients may be neither negative nor increasing, got {tuple(coefficients)}")
    return column


def _check_rounds(rows: int, min_separation: int) -> None:
    """Raise for less than one round."""
    if rows < 1 or min_separation < 1:
        raise ValueError(f"rows and min_separation must be at least 1, got {rows} and {min_separation}")
