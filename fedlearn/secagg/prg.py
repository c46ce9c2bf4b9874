"""Masks: the keystream of a cipher in counter mode, added to a vector tile by tile, all masks to one tile at a time.

What limits the speed is the memory, not the cipher: a tile of the sum and one of the keystream stay in the processor's
cache while every mask is added to it. A cipher in counter mode can start anywhere, so that threads share the vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

__all__ = ["SUITES", "Words", "add_masks"]

Words = NDArray[np.uint64]
"""A vector over the ring of integers modulo 2^64."""

SUITES = {1: "AES-256-CTR", 2: "ChaCha20"}
"""The ciphers that expand a mask, by number. The second is for processors without AES instructions."""

_TILE_WORDS = 1 << 14  # 128 KiB: it, its keystream and the zeros stay in a core's own cache
_BLOCK_WORDS = 8  # of ChaCha20, 64 bytes; AES has 16: ranges of threads begin at a multiple of both
_LEAST_RANGE = 1 << 16


class _Keystream(Protocol):
    """What a cipher's encryptor does."""

    def update_into(self, data: bytes | memoryview, buf: memoryview) -> int:
        """Write the encrypted data into ``buf``."""


def add_masks(
    vector: Words,
    *,
    plus: Sequence[bytes] = (),
    minus: Sequence[bytes] = (),
    suite: int = 1,
    threads: int = 1,
) -> None:
    """Add to ``vector``, in place and modulo 2^64, the keystreams of the keys in ``plus``, less those of ``minus``.

    Guarantees: the keystream of a key is the encryption of zeros from counter 0, as little-endian words; a key must be
    used for one vector only, which is the caller's to see to.

    Args:
        vector: shape (w,), contiguous.
        plus: keys of 32 bytes.
        minus: keys of 32 bytes.
        suite: a key of ``SUITES``.
        threads: how many share the work; the cipher lets go of the interpreter meanwhile.
    """
    shares = max(1, min(threads, vector.size // _LEAST_RANGE))
    if shares == 1:
        _add_range(vector, 0, plus, minus, suite)
        return
    step = -(-vector.size // shares // _BLOCK_WORDS) * _BLOCK_WORDS
    starts = range(0, vector.size, step)
    with ThreadPoolExecutor(shares) as pool:
        for done in [pool.submit(_add_range, vector[at : at + step], at, plus, minus, suite) for at in starts]:
            done.result()


def _add_range(part: Words, first_word: int, plus: Sequence[bytes], minus: Sequence[bytes], suite: int) -> None:
    """Add the masks to words from ``first_word`` on."""
    adding = [_keystream(key, first_word, suite) for key in plus]
    taking = [_keystream(key, first_word, suite) for key in minus]
    zeros = memoryview(bytes(8 * min(_TILE_WORDS, part.size)))
    room = bytearray(len(zeros) + 15)  # cryptography asks for a block more than it writes, in some versions
    buffer, stream = memoryview(room), np.frombuffer(room, dtype="<u8", count=len(zeros) // 8)
    for start in range(0, part.size, _TILE_WORDS):
        tile = part[start : start + _TILE_WORDS]
        source, drawn = zeros[: 8 * tile.size], stream[: tile.size]
        for keystream in adding:
            keystream.update_into(source, buffer)
            np.add(tile, drawn, out=tile)
        for keystream in taking:
            keystream.update_into(source, buffer)
            np.subtract(tile, drawn, out=tile)


def _keystream(key: bytes, first_word: int, suite: int) -> _Keystream:
    """Return a cipher that encrypts from word ``first_word`` of its stream on."""
    if suite == 1:
        counter = (first_word // 2).to_bytes(16, "big")
        return Cipher(algorithms.AES256(key), modes.CTR(counter)).encryptor()
    if suite == 2:
        counter = (first_word // _BLOCK_WORDS).to_bytes(8, "little") + bytes(8)
        return Cipher(algorithms.ChaCha20(key, counter), mode=None).encryptor()
    raise ValueError(f"there is no suite {suite}; there are {sorted(SUITES)}")
