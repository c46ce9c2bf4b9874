"""How long the shortest linear recurrence is that makes a sequence of bits, by Berlekamp and Massey.

A sequence of N bits from a good generator needs one of about N/2. A generator that is linear over GF(2) is found out:
no bit of MT19937 ever needs more than 19,937, and neither does the sum modulo 2 of any number of such sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Recurrence", "linear_complexity", "shortest_recurrence"]


@dataclass(frozen=True, kw_only=True)
class Recurrence:
    """``s[n] = taps[1] s[n-1] + … + taps[order] s[n-order]`` modulo 2.

    Attributes:
        order: how many bits determine all that follow.
        taps: bit i is the coefficient of ``s[n-i]``; bit 0 is 1.
    """

    order: int
    taps: int

    def continued(self, known: NDArray[np.integer], count: int) -> NDArray[np.uint8]:
        """Return the ``count`` bits that follow ``known``, which is at least ``order`` bits long.

        >>> Recurrence(order=2, taps=0b111).continued(np.array([0, 1]), 4)
        array([1, 0, 1, 1], dtype=uint8)
        """
        if len(known) < self.order:
            raise ValueError(f"{len(known)} bits do not determine a recurrence of order {self.order}")
        window, mask = 0, (1 << self.order) - 1
        for bit in known[len(known) - self.order :].tolist():
            window = window << 1 | bit
        taps, found = self.taps >> 1, []
        for _ in range(count):
            found.append((window & taps).bit_count() & 1)
            window = (window << 1 | found[-1]) & mask
        return np.array(found, np.uint8)


def shortest_recurrence(bits: NDArray[np.integer]) -> Recurrence:
    """Return the shortest recurrence that makes ``bits``, a vector of zeros and ones.

    It is the only one of its order when there are at least ``2 * order`` bits. A polynomial is one integer:
    45,000 bits take a tenth of a second.

    Reference: Massey, Shift-register synthesis and BCH decoding, IEEE Trans. Inf. Theory 15 (1969), Algorithm.

    >>> fibonacci = np.array([0, 1, 1, 0, 1, 1, 0, 1, 1])
    >>> shortest_recurrence(fibonacci)
    Recurrence(order=2, taps=7)
    """
    taps, before = 1, 1
    order, since = 0, 1
    past = 0  # bit i is s[n-i]
    for number, bit in enumerate(bits.tolist()):
        past = past << 1 | bit
        if not (past & taps).bit_count() & 1:
            since += 1
            continue
        corrected = taps ^ before << since
        if 2 * order <= number:
            order, before, since = number + 1 - order, taps, 1
        else:
            since += 1
        taps = corrected
    return Recurrence(order=order, taps=taps)


def linear_complexity(bits: NDArray[np.integer]) -> int:
    """Return the order of the shortest recurrence that makes ``bits``.

    >>> linear_complexity(np.zeros(9, np.uint8)), linear_complexity(np.array([0, 0, 0, 1]))
    (0, 4)
    """
    return shortest_recurrence(bits).order
