"""A random rotation that spreads a vector's length evenly over its coordinates, so that none overflows its lane.

Block by block: signs that everybody knows, then a Hadamard transform, which is additions and subtractions in a fixed
order. The result is therefore the same to the last bit on every machine, which a matrix product's is not. The last
block overlaps the one before, so that a vector of any length keeps its length; each step is a rotation, and so is the
whole.

Reference: Suresh et al., arXiv:1611.00429, section 3; Kairouz, Liu, Steinke, arXiv:2102.06387, section 4.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from fedlearn.arrays import Vector

__all__ = ["block_size", "rotate", "rotate_back"]

Floats = NDArray[np.float64]

_LARGEST_BLOCK = 1 << 14
_SIDE = 1 << 7


def block_size(size: int) -> int:
    """Return p, the number of coordinates that are mixed with each other: the largest power of two up to 2^14 and d."""
    return min(_LARGEST_BLOCK, 1 << (size.bit_length() - 1)) if size else 1


def rotate(vector: Vector, seed: bytes) -> Floats:
    """Return the rotated vector, shape (d,).

    Guarantees: linear and, to rounding, orthogonal; with the signs taken as random, each coordinate is sub-Gaussian
    with variance at most ‖vector‖²/p.

    Args:
        vector: shape (d,).
        seed: 32 bytes, the same for all whose vectors are added.
    """
    turned = vector.astype(np.float64, copy=True)
    for block, signs in _blocks(turned, seed):
        block *= signs
        _hadamard(block)
    return turned


def rotate_back(vector: Floats, seed: bytes) -> Floats:
    """Return what ``rotate`` turned into ``vector``, to rounding."""
    turned = vector.astype(np.float64, copy=True)
    for block, signs in reversed(list(_blocks(turned, seed))):
        _hadamard(block)
        block *= signs
    return turned


def _blocks(vector: Floats, seed: bytes) -> Iterator[tuple[Floats, Floats]]:
    """Yield each block of a vector, as a view, and its signs."""
    size, width = vector.size, block_size(vector.size)
    if not size:
        return
    starts = [*range(0, size - width + 1, width)]
    if starts[-1] + width < size:
        starts.append(size - width)
    stream = (
        Cipher(algorithms.AES256(seed), modes.CTR(bytes(16))).encryptor().update(bytes(len(starts) * -(-width // 8)))
    )
    drawn = np.unpackbits(np.frombuffer(stream, dtype=np.uint8)).reshape(len(starts), -1)
    for row, start in enumerate(starts):
        signs = drawn[row, :width].astype(np.float64)
        yield vector[start : start + width], 2 * signs - 1


def _hadamard(block: Floats) -> None:
    """Apply the orthonormal Hadamard matrix in place; the block's length is a power of two."""
    width = block.size
    side = min(width, _SIDE)
    square = block.reshape(-1, side)
    _butterflies(square)  # mixes rows, in long contiguous runs
    across = np.ascontiguousarray(square.T)
    _butterflies(across)
    across *= width**-0.5
    square[:] = across.T


def _butterflies(rows: Floats) -> None:
    """Transform along the first axis, whose length is a power of two."""
    count, half = rows.shape[0], 1
    while half < count:
        pairs = rows.reshape(count // (2 * half), 2, half, -1)
        low, high = pairs[:, 0], pairs[:, 1]
        kept = low - high
        low += high
        high[...] = kept
        half *= 2
