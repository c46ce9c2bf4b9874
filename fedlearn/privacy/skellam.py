"""The Skellam distribution: integer noise that stays of its kind when it is added up, and what it costs in privacy.

The difference of two independent Poisson numbers of mean μ/2 has mean 0, variance μ, and p(y) = exp(-μ)·I_|y|(μ), I the
modified Bessel function. The sum of h of them is one of variance h·μ, so that every client adds its share of the noise.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedlearn.privacy.gaussian import discrete_gaussian
from fedlearn.privacy.noise import Keystream

__all__ = ["LEAST_VARIANCE", "MOST_VARIANCE", "Slack", "rdp", "sensitivity", "skellam", "skellam_slack"]

LEAST_VARIANCE = 2.0**-64
"""The smallest variance: of 2^64 numbers one is not 0."""

MOST_VARIANCE = 2.0**80
"""The largest variance: 2^19 numbers, each 16 standard deviations out, fit into an int64."""

_MOST_IN_TABLE = 2.0**20
_LOG_RATIO = 2.0**-42
_TOTAL_VARIATION = 2.0**-180
_SIGMAS = 16.0
_BATCH = 1 << 15  # candidates at a time: their arrays stay in the processor's cache

_WORDS = 4  # of 64 bits: what a number of the table is compared to
_FRACTION = 320  # bits after the point, while a table is computed
_EXPONENT = 128.01  # exp(-128)·2 < 2^-183: what lies beyond a table


class Slack(NamedTuple):
    """How far from ideal noise is that was drawn, in all its numbers together.

    There is a distribution whose probability of every outcome is the ideal one's times a factor in
    [exp(-``log_ratio``), exp(``log_ratio``)], and from which that of the noise differs by at most ``total_variation``.
    """

    log_ratio: float
    total_variation: float


def skellam(stream: Keystream, variance: float, size: int) -> NDArray[np.int64]:
    """Draw ``size`` integers, each y with probability exp(-``variance``)·I_|y|(``variance``).

    Up to a variance of 2^20 by a table of the distribution function in 256 bits, computed with integers alone: the
    first 64 bits of a uniform number nearly always decide, and where they do not, 192 more are drawn. Above, by
    rejection from a discrete Gaussian of the same variance, of which less than 1 in 380 is refused. A table takes up to
    a tenth of a second to compute; the last few are kept.

    Guarantees: with the keystream taken as uniform, ``skellam_slack(variance, size)``. For each number:

    *Table.* It ends where Chernoff's bound of the tail, 2·exp(-μ·g(n/μ)), g(t) = t·asinh(t) - √(1+t²) + 1, is below
    2^-183. Its at most 2^15.1 thresholds are each rounded by less than 2^-256, and what they are computed from is right
    to 2^-270: r_n = I_n+1/I_n comes of r_n-1 = 1/(2n/μ + r_n), downwards from r_N = 1. Below the end of the table an
    error does not grow; from N to there it shrinks by (1 + 2n/μ)² in two steps, in all by 2^320.

    *Rejection*, for μ ≥ 2^20 and |y| ≤ 16·√μ; beyond lies less than 2^-183. Shifting the contour of Bessel's integral
    to its saddle gives, with w = √(μ²+y²), exactly

        p(y) = exp(w - μ - y·asinh(y/μ)) · 1/2π ∫ exp(-w(1 - cos θ)) cos(y(θ - sin θ)) dθ over [-π, π].

    With u = 2√w·sin(θ/2) the integral is a Gaussian's of u. Its weight (1 - u²/4w)^(-1/2) gives (2πw)^(-1/2)·(1 + 1/8w
    + 9/128w² + ρ), 0 ≤ ρ ≤ w^-3; and the mean of cos is 1 - 5y²/24w³·(1 + ρ'), |ρ'| ≤ 10/w, up to y⁴/(2w⁶). So
    p(y)/p(0)·exp(y²/2μ) is exp(h), where h in powers of v = (y/μ)² ≤ 2^-12 is the polynomial in ``_refused``, to 2^-50.
    A candidate is kept with probability exp(h - H), where H = 16⁴/24μ ≥ h. In units of 2^-47 the logarithm of a
    probability is thus wrong by 17 at most for the discrete Gaussian, 6 for its variance, 1/8 for h and the comparison,
    and 2 for what all this takes from the normalisation: less than 32.

    Args:
        stream: the uniform bits; 8 bytes are used for a number of the table, about 66 for another.
        variance: μ, in [2^-64, 2^80].
        size: how many, not negative.

    Returns:
        Independent integers, shape (size,).

    Raises:
        ValueError: ``variance`` is out of range, or ``size`` negative.

    >>> skellam(Keystream(bytes(32)), 1e-9, 5).tolist()
    [0, 0, 0, 0, 0]
    """
    _check_variance(variance)
    if size < 0:
        raise ValueError(f"size must not be negative, got {size}")
    if variance <= _MOST_IN_TABLE:
        return _from_table(stream, variance, size)
    return _by_rejection(stream, variance, size)


def skellam_slack(variance: float, draws: int) -> Slack:
    """Return how far ``draws`` numbers of ``skellam`` with this variance are from ideal, all together.

    For one: nothing but 2^-180 in total variation from a table, and a log-ratio of 2^-42 besides by rejection; both add
    up over independent numbers. What is computed of them, such as the sum over clients, is no further from ideal.

    Args:
        variance: of each number, as ``skellam`` is given it: one client's share.
        draws: how many: coordinates times clients, say.

    Raises:
        ValueError: ``variance`` is out of range, or ``draws`` negative.

    >>> skellam_slack(2.0**20, 10**9).log_ratio, skellam_slack(2.0**30, 2**32).log_ratio
    (0.0, 0.0009765625)
    """
    _check_variance(variance)
    if draws < 0:
        raise ValueError(f"draws must not be negative, got {draws}")
    return Slack(_LOG_RATIO * draws if variance > _MOST_IN_TABLE else 0.0, _TOTAL_VARIATION * draws)


# -- what it costs ---------------------------------------------------------------------------------------------------


def sensitivity(scale: float, bound_l2: float, size: int, beta: float = 2.0**-20) -> tuple[float, float]:
    """Return (Δ₁, Δ₂), how far one client can move the sum on the lattice, in L1 and in L2 norm.

    For a vector of norm at most C, scaled by s and rounded at random to integers, again and again until its norm is at
    most Δ₂ = min{sC + √d, √(s²C² + d/4 + √(2·ln(1/β))·(sC + √d/2))}: that takes one more try with probability at most
    β. And Δ₁ = min{√d·Δ₂, Δ₂²}, since no integer is above its square. Both are rounded up.

    Args:
        scale: s, above 0.
        bound_l2: C, above 0.
        size: d, at least 1.
        beta: β, in (0, 1).

    Raises:
        ValueError: an argument is out of range, or the sensitivity no float.

    Reference: Kairouz, Liu, Steinke, arXiv:2102.06387 (conditional rounding); Agarwal, Kairouz, Liu, arXiv:2110.04995.

    >>> [round(each, 6) for each in sensitivity(8.0, 0.5, 100)]
    [88.389839, 9.401587]
    """
    if not (0 < scale < math.inf and 0 < bound_l2 < math.inf and size >= 1 and 0 < beta < 1):
        raise ValueError(f"no sensitivity for scale {scale}, bound {bound_l2}, size {size}, beta {beta}")
    longest, root = scale * bound_l2, math.sqrt(size)
    likely = longest * longest + size / 4 + math.sqrt(-2 * math.log(beta)) * (longest + root / 2)
    l2 = min(longest + root, math.sqrt(likely)) * (1 + 2.0**-48)  # a dozen roundings of 2^-53
    l1 = min(root * l2, l2 * l2) * (1 + 2.0**-48)
    if not l1 < math.inf:
        raise ValueError(f"scale {scale} times bound {bound_l2} is too large")
    return l1, l2


def rdp(
    orders: Sequence[float] | NDArray[np.float64], *, sensitivity_l1: float, sensitivity_l2: float, variance: float
) -> NDArray[np.float64]:
    """Return bounds of the Rényi divergences of these orders between Skellam noise and itself, moved by integers.

    Guarantees: with noise of variance μ on every coordinate, moved by integers of norms at most Δ₁ and Δ₂, the
    divergence of every order α > 1, in either direction, is at most the least of

    - for a whole α, c·α·Δ₂²/2, with c = 2·ln(I₀(μ)/I₁(μ)) = 1/μ + 1/2μ² + …: as if it were Gaussian of variance 1/c;
    - for any other, c·(α·Δ₂²/2 + Δ₁/(8(α-1)));
    - for a whole α, α·Δ₂²/2μ + min{((2α-1)·Δ₂² + 6·Δ₁)/4μ², 3·Δ₁/2μ} (Agarwal et al.);
    - the bound for a larger α.

    *Proof of the first two.* It is enough to see one coordinate, moved by Δ. Let L(y) = ln p(y) on the integers, and
    drawn straight between them. (i) L(y) + c·y²/2 is convex on the integers, that is r_n/r_n-1 ≥ r₀² for r_n =
    I_n+1/I_n and n ≥ 1: g = r_n² + 2n·r_n/μ - r₀², which is r_n/r_n-1 - r₀², is above 0 for small μ; and wherever it is
    0, its derivative in μ is 2(√(r₀² + n²/μ²) - r₀)(1 - r₀²) > 0, from r_n' = 1 - r_n² - (2n+1)·r_n/μ. It can never
    come down to 0. (ii) y - Δ is (y - αΔ)/α + (1 - 1/α)·y. By (i), with φ the fraction of αΔ,
    α·L(y-Δ) ≤ L(y-αΔ) + (α-1)·L(y) + c·(α(α-1)Δ² + φ(1-φ))/2. (iii) The divergence is ln(Σ exp(α·L(y-Δ) - (α-1)·L(y)))
    / (α-1), and Σ exp L(y-αΔ) ≤ 1 over the integers, since a geometric mean is at most the arithmetic one. Add up the
    coordinates: at most Δ₁ are moved at all, and φ(1-φ) ≤ 1/4.

    Args:
        orders: each above 1.
        sensitivity_l1: Δ₁.
        sensitivity_l2: Δ₂.
        variance: μ, above 0.

    Returns:
        One bound for each order.

    Raises:
        ValueError: an argument is out of range.

    Reference: Agarwal, Kairouz, Liu, arXiv:2110.04995.

    >>> rdp([2, 4], sensitivity_l1=3.0, sensitivity_l2=3.0, variance=100.0).round(4).tolist()
    [0.0905, 0.1809]
    """
    order = np.asarray(orders, dtype=np.float64)
    if not (order > 1).all() or not all(0 < each < math.inf for each in (sensitivity_l1, sensitivity_l2, variance)):
        raise ValueError("orders are above 1, and sensitivities and variance above 0 and finite")
    square, curvature = sensitivity_l2 * sensitivity_l2, _curvature(variance)
    whole = np.ceil(order)
    between = np.where(whole == order, 0.0, sensitivity_l1 / (8 * (order - 1)))
    ours = curvature * np.minimum(order * square / 2 + between, whole * square / 2)
    first = ((2 * whole - 1) * square + 6 * sensitivity_l1) / 4 / variance / variance
    theirs = whole * square / 2 / variance + np.minimum(first, 1.5 * sensitivity_l1 / variance)
    least: NDArray[np.float64] = np.minimum(ours, theirs)
    return least


@lru_cache(maxsize=1024)
def _curvature(variance: float) -> float:
    """Return 2·ln(I₀(μ)/I₁(μ)), rounded up.

    Up to 256 from the power series of both, all of whose terms are positive. Above by I₀/I₁ ≤ U = 1 + 1/2μ + 3/8μ² +
    1/2μ³, which holds at 8, and stays: I₀/I₁ solves u' = 1 - u² + u/μ, where U' is more for all μ ≥ 8.
    """
    if variance > 256:
        excess = (0.5 + (0.375 + 0.5 / variance) / variance) / variance
        return 2 * math.log1p(excess) * (1 + 1e-9)
    half = variance / 2
    term, index, zeroth, first = 1.0, 0, 1.0, 1.0
    while term > 1e-20 * zeroth:
        index += 1
        term *= (half / index) ** 2
        zeroth += term
        first += term / (index + 1)
    return 2 * math.log(zeroth / (half * first)) * (1 + 1e-9)


# -- the two ways to draw --------------------------------------------------------------------------------------------


class _Table(NamedTuple):
    """The distribution function at -radius, …, radius - 1, in units of 2^-256, and the first 64 bits of each."""

    radius: int
    thresholds: tuple[int, ...]
    high: NDArray[np.uint64]


def _from_table(stream: Keystream, variance: float, size: int) -> NDArray[np.int64]:
    """Return as many numbers: how many thresholds are at most a uniform number of 256 bits, less the radius."""
    table = _table(variance)
    high = stream.words(size)
    found = np.searchsorted(table.high, high, side="right")
    tied = np.flatnonzero(table.high[np.maximum(found, 1) - 1] == high)
    for index in tied.tolist():  # a table of n thresholds has one in 2^64/n numbers
        uniform = int(high[index])
        for word in stream.words(_WORDS - 1).tolist():
            uniform = uniform << 64 | word
        found[index] = bisect_right(table.thresholds, uniform)
    return found.astype(np.int64) - table.radius


@lru_cache(maxsize=8)
def _table(variance: float) -> _Table:
    """Return the table of one variance."""
    radius = _radius(variance)
    weights = [1 << _FRACTION]  # p(0), p(1), … in proportion
    for ratio in _ratios(variance, radius):
        weights.append(weights[-1] * ratio >> _FRACTION)
    total = 2 * sum(weights) - weights[0]
    below, thresholds = 0, []
    for weight in [*weights[:0:-1], *weights[:-1]]:
        below += weight
        thresholds.append((below << 64 * _WORDS) // total)
    high = np.array([each >> 64 * (_WORDS - 1) for each in thresholds], dtype=np.uint64)
    return _Table(radius, tuple(thresholds), high)


def _radius(variance: float) -> int:
    """Return the least n for which Chernoff's bound of P[|y| > n] is below 2^-183."""

    def exponent(n: int) -> float:
        return n * math.asinh(n / variance) - math.hypot(n, variance) + variance

    most = 1
    while exponent(most) < _EXPONENT:
        most *= 2
    return bisect_right(range(most), False, key=lambda n: exponent(n) >= _EXPONENT)


def _ratios(variance: float, count: int) -> list[int]:
    """Return I_n+1/I_n for n = 0, …, count - 1, in units of 2^-320."""
    numerator, denominator = variance.as_integer_ratio()
    step = (denominator << _FRACTION + 1) // numerator  # 2/μ
    square = 1 << 2 * _FRACTION
    ratio = 1 << _FRACTION
    kept = []
    for n in range(count + math.ceil(_FRACTION / math.log2(1 + 2 * count / variance)) + 2, 0, -1):
        ratio = square // (n * step + ratio)
        if n <= count:
            kept.append(ratio)
    return kept[::-1]


def _by_rejection(stream: Keystream, variance: float, size: int) -> NDArray[np.int64]:
    """Return as many numbers, each a discrete Gaussian that was not refused."""
    drawn, filled, stddev = np.empty(size, dtype=np.int64), 0, math.sqrt(variance)
    while filled < size:
        tries = min(_BATCH, size - filled + (size - filled >> 7) + 4)
        candidates = discrete_gaussian(stream, stddev, tries)
        kept = stream.words(tries) >= _refused(candidates, variance)
        kept &= np.abs(candidates) <= _SIGMAS * stddev
        accepted = candidates[kept][: size - filled]
        drawn[filled : filled + accepted.size] = accepted
        filled += accepted.size
    return drawn


def _refused(candidates: NDArray[np.int64], variance: float) -> NDArray[np.uint64]:
    """Return ⌊(1 - exp(h - H))·2^64⌋ for each candidate; h = x·ψ(√v) - ln(1+v)/4 - 13v/48x + 23v²/64x for x = μ.

    x·ψ(t) = √(x²+y²) - x - y·asinh(t) + y²/2x is x·(t⁴/24 - t⁶/80 + 5t⁸/896 - 7t¹⁰/2304 + …), and the last two terms
    are (1/w - 1/x)/8 - 5y²/24w³ with w = x·√(1+v).
    """
    x = variance
    v = candidates / x
    v *= v
    h = v * (-7 * x / 2304)
    for coefficient in (5 * x / 896 + 1 / 16, -x / 80 - 1 / 12, x / 24 + 1 / 8 + 23 / (64 * x), -1 / 4 - 13 / (48 * x)):
        h += coefficient
        h *= v
    h -= _SIGMAS**4 / (24 * x)
    np.minimum(h, 0.0, out=h)
    np.expm1(h, out=h)
    h *= -(2.0**64)
    return h.astype(np.uint64)


def _check_variance(variance: float) -> None:
    """Raise unless numbers of that variance can be drawn."""
    if not LEAST_VARIANCE <= variance <= MOST_VARIANCE:
        raise ValueError(f"variance must be in [2^-64, 2^80], got {variance}")
