"""The fixed binary encoding: big-endian, length-prefixed, sizes checked before memory is taken, nothing left over."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Sequence

from fedlearn.secagg.errors import MalformedMessageError

__all__ = ["Reader", "Writer", "bitmap", "members"]

_MAGIC = b"FLSA\x01"


class Writer:
    """Builds one message; ``kind`` is its leg's number."""

    def __init__(self, kind: int) -> None:
        self._parts = [_MAGIC, bytes([kind])]

    def integer(self, value: int, size: int) -> Writer:
        """Append an unsigned integer of ``size`` bytes."""
        self._parts.append(value.to_bytes(size, "big"))
        return self

    def number(self, value: float) -> Writer:
        """Append a float64."""
        self._parts.append(struct.pack(">d", value))
        return self

    def fixed(self, data: bytes) -> Writer:
        """Append bytes whose number the reader knows."""
        self._parts.append(data)
        return self

    def blob(self, data: bytes) -> Writer:
        """Append bytes after their number (four bytes)."""
        return self.integer(len(data), 4).fixed(data)

    def done(self) -> bytes:
        """Return the message."""
        return b"".join(self._parts)


class Reader:
    """Takes one message apart; whatever does not fit is a ``MalformedMessageError``.

    Args:
        data: the message.
        kind: which leg's it must be.
        longest: more bytes than this are refused unread.
    """

    def __init__(self, data: bytes, kind: int, *, longest: int) -> None:
        if not isinstance(data, bytes):
            raise MalformedMessageError(f"expected bytes, got {type(data).__name__}")
        if len(data) > longest:
            raise MalformedMessageError(f"a message of leg {kind} has at most {longest} bytes, got {len(data)}")
        if data[: len(_MAGIC)] != _MAGIC or data[len(_MAGIC) : len(_MAGIC) + 1] != bytes([kind]):
            raise MalformedMessageError(f"not a message of leg {kind}")
        self._data, self._at = data, len(_MAGIC) + 1

    def fixed(self, size: int) -> bytes:
        """Return the next ``size`` bytes."""
        return bytes(self.view(size))

    def view(self, size: int) -> memoryview:
        """Return the next ``size`` bytes without copying them."""
        end = self._at + size
        if size < 0 or end > len(self._data):
            raise MalformedMessageError(f"the message ends {end - len(self._data)} bytes too early")
        found, self._at = memoryview(self._data)[self._at : end], end
        return found

    def integer(self, size: int, *, most: int | None = None) -> int:
        """Return an unsigned integer of ``size`` bytes, at most ``most``."""
        value = int.from_bytes(self.fixed(size), "big")
        if most is not None and value > most:
            raise MalformedMessageError(f"expected at most {most}, got {value}")
        return value

    def number(self) -> float:
        """Return a float64, which is finite."""
        (value,) = struct.unpack(">d", self.fixed(8))
        if not math.isfinite(value):
            raise MalformedMessageError("expected a finite number")
        return float(value)

    def blob(self, *, most: int) -> bytes:
        """Return bytes that follow their number, at most ``most``."""
        return self.fixed(self.integer(4, most=most))

    def end(self) -> None:
        """Check that nothing is left."""
        if self._at != len(self._data):
            raise MalformedMessageError(f"{len(self._data) - self._at} bytes too many")


def bitmap(indices: Iterable[int], size: int) -> bytes:
    """Return one bit for each of ``size`` clients, the first as the lowest bit of the first byte.

    >>> bitmap([0, 9], 10).hex()
    '0102'
    """
    bits = bytearray(-(-size // 8))
    for index in indices:
        bits[index // 8] |= 1 << index % 8
    return bytes(bits)


def members(bits: bytes, size: int) -> Sequence[int]:
    """Return which of ``size`` clients a bitmap names, in ascending order.

    Raises:
        MalformedMessageError: it has another length, or names a client that is none.
    """
    if len(bits) != -(-size // 8) or (size % 8 and bits[-1] >> size % 8):
        raise MalformedMessageError(f"not a bitmap of {size} clients")
    return tuple(index for index in range(size) if bits[index // 8] >> index % 8 & 1)
