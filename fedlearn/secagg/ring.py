"""Signed integers in lanes of 64-bit words, so that one addition modulo 2^64 adds as many as fit.

A word holds ⌊64/b⌋ lanes of b bits. Packing is Σ lane·2^(b·k), signs and all: a negative lane takes one from the next,
and the decoder, which goes from the lowest lane up and extends each one's sign, gives it back. A sum that leaves its
lane's range is wrong in that lane and by one unit in the next, no further: its neighbours' bits are not lost.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedlearn.secagg.prg import Words

__all__ = ["BITS", "Integers", "lanes", "pack", "unpack", "words_needed"]

Integers = NDArray[np.int64]

BITS = (16, 21, 32)
"""The widths there are: 4, 3 and 2 lanes a word, with no bit (or one, of 64) left over."""


def lanes(bits: int) -> int:
    """Return how many lanes a word has.

    >>> [lanes(bits) for bits in BITS]
    [4, 3, 2]
    """
    if bits not in BITS:
        raise ValueError(f"a lane has {BITS} bits, not {bits}")
    return 64 // bits


def words_needed(size: int, bits: int) -> int:
    """Return how many words hold ``size`` integers."""
    return -(-size // lanes(bits))


def pack(values: Integers, bits: int) -> Words:
    """Return integers of shape (d,) as words of shape (⌈d/lanes⌉,): lane k holds the k-th part of the vector.

    Whole parts rather than neighbours share a word, so that packing adds contiguous memory.
    """
    count = words_needed(values.size, bits)
    words: Words = np.zeros(count, dtype=np.uint64)
    for lane in range(lanes(bits)):
        part = values[lane * count : (lane + 1) * count]
        words[: part.size] += part.view(np.uint64) << np.uint64(lane * bits)
    return words


def unpack(words: Words, size: int, bits: int) -> Integers:
    """Return the ``size`` integers of a sum of packed vectors, each in [-2^(b-1), 2^(b-1)).

    Guarantees: exact for every lane whose sum, and those of all lower lanes of its word, are in that range.
    """
    count, rest = words_needed(size, bits), words.copy()
    values: Integers = np.empty(count * lanes(bits), dtype=np.int64)
    top = np.uint64(64 - bits)
    for lane in range(lanes(bits)):
        signed = (rest << top).view(np.int64) >> np.int64(64 - bits)
        values[lane * count : (lane + 1) * count] = signed
        rest -= signed.view(np.uint64)
        rest >>= np.uint64(bits)
    return values[:size]
