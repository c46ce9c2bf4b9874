"""Exact samplers on a keystream: Bernoulli, discrete Gaussian, and a Gaussian to 2^-40 of its standard deviation.

No logarithm, sine or inverse of a distribution function stands between the uniform bits and what is drawn, so that no
hole or step of floating-point numbers is in it (Mironov 2012). The time that a draw takes depends on what is drawn: do
not let anybody time it who must not know the noise.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from fedlearn.privacy.noise import Keystream

__all__ = ["LEAST_STDDEV", "MOST_STDDEV", "bernoulli", "discrete_gaussian", "gaussian", "power_of_two", "to_grid"]

LEAST_STDDEV = 2.0**-10
"""The smallest standard deviation of a discrete Gaussian; nothing but zeros would come of it."""

MOST_STDDEV = 2.0**45
"""The largest standard deviation of a discrete Gaussian: 2^17 of them fit into an int64."""

_STEP = 8
"""Exponents are treated in steps of 8: exp(-8) is above 2^-12, so that a threshold has 52 bits at least."""

_RESOLUTION = 2.0**40
_BATCH = 1 << 15  # candidates at a time: their arrays stay in the processor's cache


def discrete_gaussian(stream: Keystream, stddev: float, size: int) -> NDArray[np.int64]:
    """Draw ``size`` integers, each y with probability in proportion to exp(-y² / (2·stddev²)).

    By rejection from a discrete Laplace distribution. Its scale t is the power of two next to ``stddev`` (any scale is
    right; the paper's ⌊stddev⌋ + 1 is accepted a tenth more often), so that uniform integers below t are bits, and
    y/t is exact. Every Bernoulli(exp(-x)) compares a 64-bit uniform with ⌊exp(-x)·2^64⌋, for x < 8; a larger x takes
    one more Bernoulli(exp(-8)) for every whole 8 in it.

    Guarantees: with the keystream taken as uniform, the probability of every y is right to a relative error of
    (1 + k²/16)·2^-47, where y is k standard deviations out, for k ≤ 40; beyond lies less than 2^-1100. In units of
    2^-53, with ``exp`` to two units in the last place: 4 for exp(-U/t), 6 + k for the geometric part, 7 for the last
    acceptance and 4.5 for each unit of its exponent, which is computed with four roundings and is at most max(1, k²/2);
    and once more what the normalisation takes, at most 20. ``stddev`` itself is met to 2^-53: the variance is rounded
    once, and then used as it is. A release of d entries loses at most about d·2^-46 of epsilon to all this: below
    10^-7 for a million.

    Args:
        stream: the uniform bits; about 58 bytes are used for a number.
        stddev: the parameter σ, in [2^-10, 2^45]. The standard deviation is this to 10^-6 from 1 on, and less below.
        size: how many, not negative.

    Returns:
        Independent integers, shape (size,).

    Raises:
        ValueError: ``stddev`` is out of range, or ``size`` negative.

    Reference: Canonne, Kamath, Steinke, arXiv:2004.00010, Algorithms 2 and 3.

    >>> from fedlearn.privacy.noise import Keystream
    >>> from fedlearn.sources import SeedTree
    >>> discrete_gaussian(Keystream(SeedTree.root(0).digest), 0.01, 5).tolist()
    [0, 0, 0, 0, 0]
    """
    if not LEAST_STDDEV <= stddev <= MOST_STDDEV:
        raise ValueError(f"stddev must be in [2^-10, 2^45], got {stddev}")
    if size < 0:
        raise ValueError(f"size must not be negative, got {size}")
    drawn = np.empty(size, dtype=np.int64)
    filled = 0
    while filled < size:
        tries = min(_BATCH, int(2.5 * (size - filled)) + 16)
        accepted = _accepted(stream, stddev, tries)[: size - filled]
        drawn[filled : filled + accepted.size] = accepted
        filled += accepted.size
    return drawn


def gaussian(stream: Keystream, stddev: float, size: int) -> NDArray[np.float64]:
    """Draw ``size`` Gaussian numbers: ``stddev``·2^-40 times a discrete Gaussian of parameter 2^40.

    That is a Gaussian seen at a resolution of 2^-40 of its standard deviation, as far into the tails as anybody will
    see. It is good for what is computed with further before it is released: noise that is correlated over rounds, or
    added to gradients.

    Guarantees: as for ``discrete_gaussian``; the multiplication by ``stddev`` rounds once, to 2^-53.

    What is *not* guaranteed: the numbers lie on a grid of their own, of step ``stddev``·2^-40, and a float that was
    added to one shows in the last bits of the sum, where noise no longer covers it (Mironov 2012). What leaves must
    therefore be rounded to a much coarser grid that does not depend on the data: ``to_grid``.

    Args:
        stream: the uniform bits.
        stddev: the standard deviation, above 0 and finite.
        size: how many.

    Returns:
        Independent numbers, shape (size,).

    Raises:
        ValueError: ``stddev`` is not above 0 and finite, or ``size`` negative.
    """
    if not 0 < stddev < math.inf:
        raise ValueError(f"stddev must be above 0 and finite, got {stddev}")
    return discrete_gaussian(stream, _RESOLUTION, size).astype(np.float64) / _RESOLUTION * stddev


def bernoulli(stream: Keystream, probability: float, size: int) -> NDArray[np.bool_]:
    """Draw ``size`` booleans, each true with ``probability``, exact to 2^-64 and never above it; one word for each.

    Raises:
        ValueError: ``probability`` is not in [0, 1].

    >>> from fedlearn.privacy.noise import Keystream
    >>> stream = Keystream(bytes(32))
    >>> bernoulli(stream, 1.0, 3).tolist(), bernoulli(stream, 0.0, 3).tolist()
    ([True, True, True], [False, False, False])
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"probability must be in [0, 1], got {probability}")
    words = stream.words(size)
    if probability == 1:
        return np.ones(size, dtype=np.bool_)
    return words < np.uint64(math.ldexp(probability, 64))


def power_of_two(at_most: float) -> float:
    """Return the largest power of two that is not above ``at_most``.

    Raises:
        ValueError: ``at_most`` is not above 0 and finite.

    >>> power_of_two(3.0), power_of_two(0.25)
    (2.0, 0.25)
    """
    if not 0 < at_most < math.inf:
        raise ValueError(f"a power of two is above 0 and finite; none is at most {at_most}")
    return math.ldexp(0.5, math.frexp(at_most)[1])


def to_grid(vector: NDArray[np.float64], grid: float) -> NDArray[np.float64]:
    """Return ``vector`` with every entry rounded to the nearest multiple of ``grid``, a power of two.

    Raises:
        ValueError: ``grid`` is no power of two, or an entry is not finite.

    >>> to_grid(np.array([0.3, -0.3]), 0.25).tolist()
    [0.25, -0.25]
    """
    if power_of_two(grid) != grid:
        raise ValueError(f"grid must be a power of two, got {grid}")
    if not np.isfinite(vector).all():
        raise ValueError("a vector with NaN or infinity in it has no place on a grid")
    rounded: NDArray[np.float64] = vector / grid
    np.rint(rounded, out=rounded)
    rounded *= grid
    return rounded


def _accepted(stream: Keystream, stddev: float, tries: int) -> NDArray[np.int64]:
    """Return the numbers that come of ``tries`` candidates, in their order; about 45 of 100 do."""
    scale, variance = _laplace_scale(stddev), stddev * stddev
    words = stream.words(tries)
    low = ((words >> np.uint64(1)) & np.uint64(scale - 1)).astype(np.int64)
    negative = (words & np.uint64(1)).astype(np.bool_)
    kept = stream.words(tries) < _threshold(low / scale)
    low, negative = low[kept], negative[kept]
    magnitude = low + scale * _geometric(stream, low.size)
    distance = magnitude.astype(np.float64) - variance / scale
    exponent = distance * distance / (2 * variance)
    kept = _survives(stream, exponent)
    kept &= ~negative | (magnitude != 0)  # zero has one sign only, or it would come twice as often
    magnitude, negative = magnitude[kept], negative[kept]
    return np.where(negative, -magnitude, magnitude)


def _laplace_scale(stddev: float) -> int:
    """Return the power of two nearest to ``stddev`` in ratio, at least 1."""
    return 1 << max(0, round(math.log2(stddev)))


def _geometric(stream: Keystream, size: int) -> NDArray[np.int64]:
    """Return integers that are at least v with probability exp(-v): in steps of 8, since it has no memory."""
    value = np.zeros(size, dtype=np.int64)
    waiting = np.arange(size)
    while waiting.size:
        words = stream.words(waiting.size)
        steps = np.zeros(waiting.size, dtype=np.int8)
        for threshold in _GEOMETRIC:
            steps += words < threshold
        value[waiting] += steps
        waiting = waiting[steps == _STEP]
    return value


def _survives(stream: Keystream, exponent: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return booleans, each true with probability exp(-exponent), for exponents that are not negative."""
    large = np.flatnonzero(exponent >= _STEP)
    steps = np.floor(exponent[large] / _STEP)
    rest = exponent.copy()
    rest[large] -= _STEP * steps  # exact: both are multiples of the smaller one's last bit
    alive = stream.words(rest.size) < _threshold(rest)
    while large.size:  # exp(-8) of them are left each time
        going = alive[large] & (steps > 0)
        large, steps = large[going], steps[going] - 1
        alive[large] = stream.words(large.size) < _GEOMETRIC[-1]
    return alive


def _threshold(exponent: NDArray[np.float64]) -> NDArray[np.uint64]:
    """Return ⌊exp(-exponent)·2^64⌋, or what is next below 2^64 in float64 where that is 2^64; exponents in [0, 8]."""
    return np.minimum(np.exp(-exponent) * 2.0**64, 2.0**64 - 2.0**11).astype(np.uint64)


_GEOMETRIC = _threshold(np.arange(1.0, _STEP + 1))
