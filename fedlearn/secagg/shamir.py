"""Shamir's secret sharing of 32-byte secrets over the prime 2^256 + 297, in Python's integers.

A secret is the value at 0 of a polynomial of degree ``threshold`` − 1 whose other coefficients are uniform; a share
is its value at another point. Every secret of 32 bytes is below the prime, so that none has to be refused or mapped;
a share needs one bit more, hence 33 bytes.

**What is not guaranteed.** The time that Python's integers take depends on how long they are, and their memory is
never overwritten. Whoever times these functions to the nanosecond on the device itself could learn how many of a
secret's or a coefficient's leading bits are zero: a bit or two of 256. A secret is shared once and lives for one
session, so that no such measurements add up; and nobody can take one over the network, where shares leave together
with everything else of their leg, after ciphers and signatures. Do not share long-lived keys with this module.

Reference: Shamir, "How to share a secret", CACM 22(11), 1979.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from fedlearn.secagg.errors import MalformedMessageError
from fedlearn.sources import SecureRandom

__all__ = [
    "PRIME",
    "SECRET_BYTES",
    "SHARE_BYTES",
    "combine",
    "lagrange_at_zero",
    "share_from_bytes",
    "share_to_bytes",
    "split",
]

PRIME = 2**256 + 297
"""The smallest prime above 2^256: shares and coefficients are integers in [0, PRIME)."""

SECRET_BYTES = 32
"""The length of what is shared."""

SHARE_BYTES = 33
"""The length of a share on the wire, big-endian."""

_LAZY = 16  # products by a point between two reductions: with points below 2^16 no number has more than 514 bits


def share_to_bytes(value: int) -> bytes:
    """Return a share as 33 bytes, big-endian.

    Raises:
        ValueError: ``value`` is not in [0, PRIME).

    >>> share_to_bytes(258).hex()[-6:]
    '000102'
    """
    if not 0 <= value < PRIME:
        raise ValueError("a share must be in [0, 2^256 + 297)")  # without the value: it may be a secret
    return value.to_bytes(SHARE_BYTES, "big")


def share_from_bytes(data: bytes) -> int:
    """Return the share that ``share_to_bytes`` wrote.

    Guarantees: of all byte strings exactly one is read as any one share.

    Raises:
        MalformedMessageError: ``data`` has not 33 bytes, or stands for a number that is not below the prime.
    """
    if len(data) != SHARE_BYTES:
        raise MalformedMessageError(f"a share has {SHARE_BYTES} bytes, this has {len(data)}")
    value = int.from_bytes(data, "big")
    if value >= PRIME:
        raise MalformedMessageError("a share must be below 2^256 + 297")
    return value


def split(secret: bytes, threshold: int, points: Sequence[int], random: SecureRandom) -> list[int]:
    """Return one share of ``secret`` for each of ``points``; any ``threshold`` of them give it back.

    Guarantees: any ``threshold`` − 1 shares are independent and uniform on [0, PRIME) whatever the secret is, and so
    say nothing about it, as long as ``random`` is. The coefficients are drawn anew in every call.

    Args:
        secret: 32 bytes.
        threshold: how many shares give the secret back; from 1, where each share *is* the secret, to ``len(points)``.
        points: where the polynomial is evaluated: distinct integers in [1, PRIME). For a client with index i, i + 1.
        random: where the coefficients come from.

    Returns:
        The shares in the order of ``points``, integers in [0, PRIME).

    Raises:
        ValueError: ``secret`` has another length, ``threshold`` is out of range, or ``points`` are not distinct
            integers in range.

    >>> shares = split(bytes(31) + b"!", 2, [1, 2, 3], SecureRandom())
    >>> combine([shares[2], shares[0]], lagrange_at_zero([3, 1]))[-1:]
    b'!'
    """
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"a secret must have {SECRET_BYTES} bytes, this has {len(secret)}")
    _check_points(points, PRIME)
    if not 1 <= threshold <= len(points):
        raise ValueError(f"threshold must be in [1, {len(points)}], the number of points, got {threshold}")
    coefficients = [int.from_bytes(secret, "big"), *(random.below(PRIME) for _ in range(threshold - 1))]
    return _evaluate(coefficients, points, PRIME)


def lagrange_at_zero(points: Sequence[int]) -> tuple[int, ...]:
    """Return what the shares at ``points`` are multiplied by, so that their sum is the polynomial's value at 0.

    One modular inversion and O(n²) products for n points. It depends on the points only: compute it once for all
    secrets that the same clients hold shares of.

    Args:
        points: as in ``split``, at least one; exactly as many as the threshold, or more.

    Returns:
        The coefficients in the order of ``points``, integers in [0, PRIME).

    Raises:
        ValueError: there is no point, or they are not distinct integers in [1, PRIME).

    >>> lagrange_at_zero([1, 2]) == (2, PRIME - 1)
    True
    """
    return _lagrange(points, PRIME)


def combine(shares: Sequence[int], coefficients: Sequence[int]) -> bytes | None:
    """Return the secret that ``shares`` make together, or ``None`` where they make none.

    Guarantees: shares of one secret, at least as many as its threshold, give that secret. One wrong share always gives
    something else, and that is ``None`` almost never: compare the result with what its owner committed to.

    Args:
        shares: integers in [0, PRIME).
        coefficients: those of ``lagrange_at_zero`` for the same clients in the same order.

    Returns:
        32 bytes; ``None`` if the value is 2^256 or more, which no secret is.

    Raises:
        ValueError: there are not as many ``coefficients`` as ``shares``.
    """
    value = sum(share * weight for share, weight in zip(shares, coefficients, strict=True)) % PRIME
    return value.to_bytes(SECRET_BYTES, "big") if value < 1 << (8 * SECRET_BYTES) else None


def _evaluate(coefficients: Sequence[int], points: Sequence[int], prime: int) -> list[int]:
    """Return the polynomial's values at ``points``: Horner's rule, reduced every few steps only."""
    highest_first = coefficients[::-1]
    groups = [highest_first[start : start + _LAZY] for start in range(0, len(highest_first), _LAZY)]
    values = []
    for point in points:
        value = 0
        for group in groups:
            for coefficient in group:
                value = value * point + coefficient
            value %= prime
        values.append(value)
    return values


def _lagrange(points: Sequence[int], prime: int) -> tuple[int, ...]:
    """Return Πx_j / (x_i·Π_{j≠i}(x_j − x_i)) for each i, inverting the product of all denominators at once."""
    _check_points(points, prime)
    if not points:
        raise ValueError("there must be a point at least")
    numerator = math.prod(points) % prime
    denominators = [point * math.prod([each - point for each in points if each != point]) % prime for point in points]
    before = [1]  # before[i] is the product of the denominators ahead of i
    for denominator in denominators:
        before.append(before[-1] * denominator % prime)
    inverse = pow(before.pop(), -1, prime) * numerator % prime
    weights = []
    for denominator, product in zip(reversed(denominators), reversed(before), strict=True):
        weights.append(inverse * product % prime)
        inverse = inverse * denominator % prime
    return tuple(reversed(weights))


def _check_points(points: Sequence[int], prime: int) -> None:
    """Refuse points at which a share would be the secret itself, or two shares the same."""
    for point in points:
        if not 1 <= point < prime:
            raise ValueError(f"a point must be in [1, {'2^256 + 297' if prime == PRIME else prime}), got {point}")
    if len(set(points)) != len(points):
        raise ValueError("points must be distinct")
