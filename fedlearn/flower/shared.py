"""Arrays between this process and its workers, in memory that both see instead of in a pipe.

What is pickled of a message is its small parts and where in the shared memory its arrays lie. A model that many
messages carry is written once, and each worker copies it out once. What does not fit is pickled as ever, so that
nothing depends on the sizes guessed here.
"""

from __future__ import annotations

import io
import mmap
import pickle
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeAlias

from flwr.app import Array

__all__ = ["Inbox", "Outbox", "Returns", "size_of_arrays"]

_LEAST = 1 << 14  # bytes: below this an array travels with the rest
_SLOTS = 4
_REMEMBERED = 4

_Place: TypeAlias = Callable[[bytes], tuple[int, int, int] | None]
"""Puts bytes into the shared memory and says where they are: start, length, number; ``None``: they found no place."""

_Find: TypeAlias = Callable[[int, int, int], bytes]
_finding: list[_Find] = []
"""How what is loaded just now finds the bytes that were left out."""


class Outbox:
    """Memory that this process writes and its workers read: a few slots, each for the bytes of one array.

    A slot is written anew only when no one can still be reading it: every message that refers to it was answered.

    Args:
        capacity: bytes a slot.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._memory = mmap.mmap(-1, max(1, capacity) * _SLOTS)
        self._slots: OrderedDict[int, tuple[bytes, int]] = OrderedDict()  # slot → what is in it, and its number
        self._readers: dict[Hashable, set[int]] = {}
        self._written = 0

    def dumps(self, value: object, reader: Hashable) -> bytes:
        """Return the pickle of ``value`` for one reader, who is answered for by ``read``."""
        used: set[int] = set()

        def place(data: bytes) -> tuple[int, int, int] | None:
            slot = self._slot(data, used)
            if slot is None:
                return None
            used.add(slot)
            return slot * self.capacity, len(data), self._slots[slot][1]

        pickled = _dumps(value, place)
        self._readers[reader] = used
        return pickled

    def read(self, reader: Hashable) -> None:
        """Note that a reader has answered, or never will."""
        self._readers.pop(reader, None)

    def close(self) -> None:
        """Let go of the memory."""
        self._memory.close()

    def inbox(self) -> Inbox:
        """Return what a worker, which inherits the memory, reads it by."""
        return Inbox(self._memory)

    def _slot(self, data: bytes, used: set[int]) -> int | None:
        """Return the slot with these bytes, written now if need be; ``None`` where there is none to be had."""
        for slot, (held, _) in self._slots.items():
            if held is data:
                return slot
        if len(data) > self.capacity:
            return None
        being_read = used.union(*self._readers.values())
        free = next((slot for slot in range(_SLOTS) if slot not in self._slots), None)
        if free is None:
            free = next((slot for slot in self._slots if slot not in being_read), None)
        if free is None:
            return None
        self._slots.pop(free, None)
        self._memory[free * self.capacity : free * self.capacity + len(data)] = data
        self._written += 1
        self._slots[free] = (data, self._written)
        return free


class Returns:
    """Memory that one worker writes and this process reads: the arrays of one answer, one after the other.

    Args:
        capacity: bytes.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._memory = mmap.mmap(-1, max(1, capacity))

    def dumps(self, value: object) -> bytes:
        """Return the pickle of one answer; the last one's arrays are overwritten, which were read before."""
        end = 0

        def place(data: bytes) -> tuple[int, int, int] | None:
            nonlocal end
            if end + len(data) > self.capacity:
                return None
            start, end = end, end + len(data)
            self._memory[start:end] = data
            return start, len(data), 0

        return _dumps(value, place)

    def loads(self, pickled: bytes) -> Any:
        """Return the answer, with arrays of its own."""
        return _loads(pickled, lambda start, length, _: self._memory[start : start + length])

    def close(self) -> None:
        """Let go of the memory."""
        self._memory.close()


class Inbox:
    """An ``Outbox`` as a worker sees it: an array that comes again is the same bytes object."""

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory
        self._known: OrderedDict[int, bytes] = OrderedDict()

    def loads(self, pickled: bytes) -> Any:
        """Return what the outbox pickled."""
        return _loads(pickled, self._bytes)

    def _bytes(self, start: int, length: int, number: int) -> bytes:
        """Return the bytes with this number, copied out the first time."""
        if number not in self._known:
            self._known[number] = self._memory[start : start + length]
            while len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)
        return self._known[number]


def size_of_arrays(value: object) -> int:
    """Return how many bytes the arrays in a value have that would go into shared memory."""
    total = 0

    def place(data: bytes) -> None:
        nonlocal total
        total += len(data)

    _dumps(value, place)
    return total


def _dumps(value: object, place: _Place) -> bytes:
    """Return the pickle of a value, with the bytes of large arrays left out where ``place`` finds a place for them."""

    def reduced(array: Array) -> tuple[Any, ...]:
        where = place(array.data) if len(array.data) >= _LEAST else None
        if where is None:
            return Array, (array.dtype, tuple(array.shape), array.stype, array.data)
        return _found, (array.dtype, tuple(array.shape), array.stype, where)

    file = io.BytesIO()
    pickler = pickle.Pickler(file, pickle.HIGHEST_PROTOCOL)
    pickler.dispatch_table = {Array: reduced}  # asked for arrays alone, which a ``persistent_id`` is not
    pickler.dump(value)
    return file.getvalue()


def _loads(pickled: bytes, find: _Find) -> Any:
    """Return what was pickled; ``find`` gives the bytes of arrays that were left out."""
    _finding.append(find)
    try:
        return pickle.loads(pickled)  # noqa: S301 (this process or its own fork wrote it)
    finally:
        _finding.pop()


def _found(dtype: str, shape: tuple[int, ...], stype: str, where: tuple[int, int, int]) -> Array:
    """Return an array whose bytes were left out."""
    return Array(dtype, shape, stype, _finding[-1](*where))
