"""A model's parameters as one flat vector, and the description that turns it back.

Everything that is summed, clipped, masked or sent is one vector of shape (d,). What 0-d, integer and
non-finite entries mean, and in which order entries stand, is decided here and nowhere else:

* **order**: trainable entries first, then the others (buffers, frozen parameters), each in the model's own order;
* **0-d** entries take one place, like any other;
* **integer and boolean** entries are not federated: each side keeps its own (BatchNorm's counter is one);
* **tied** entries appear once, under their first name;
* **the vector's type** is float32, or float64 where any entry is float64; half-precision entries travel as float32.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedlearn.errors import ReplyError

__all__ = ["ParamEntry", "ParamSpec", "Vector", "vector_sha256"]

Vector: TypeAlias = NDArray[np.floating[Any]]

_FLOATS = ("float64", "float32", "float16", "bfloat16")


def vector_sha256(vector: NDArray[Any]) -> bytes:
    """Return the hash of a vector as it travels, 32 bytes: what a model is called in ledgers and offers."""
    return hashlib.sha256(np.ascontiguousarray(vector).tobytes()).digest()


@dataclass(frozen=True, slots=True, kw_only=True)
class ParamEntry:
    """One named array of a model.

    Attributes:
        name: its name in the model's state.
        shape: its shape; ``()`` for a scalar.
        dtype: its own floating type, by name.
        trainable: whether local training changes it by gradient (else it is averaged as it is).
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    trainable: bool

    def __post_init__(self) -> None:
        if self.dtype not in _FLOATS:
            raise ValueError(f"{self.name}: only floating entries are federated, got {self.dtype}")

    @property
    def size(self) -> int:
        """The number of its elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class ParamSpec:
    """The names, shapes and types behind a flat vector of shape (d,).

    >>> spec = ParamSpec((ParamEntry(name="w", shape=(2, 2), dtype="float32", trainable=True),
    ...                   ParamEntry(name="temperature", shape=(), dtype="float32", trainable=True)))
    >>> vector = spec.flatten({"temperature": np.array(7.0), "w": np.arange(4.0).reshape(2, 2)})
    >>> vector.tolist(), spec.unflatten(vector)["temperature"].shape
    ([0.0, 1.0, 2.0, 3.0, 7.0], ())
    """

    entries: tuple[ParamEntry, ...]

    def __post_init__(self) -> None:
        names = [entry.name for entry in self.entries]
        if len(set(names)) != len(names):
            raise ValueError("two entries share a name")
        ordered = sorted(self.entries, key=lambda entry: not entry.trainable)  # stable: keeps the model's order
        object.__setattr__(self, "entries", tuple(ordered))

    @cached_property
    def size(self) -> int:
        """The length d of the vector."""
        return sum(entry.size for entry in self.entries)

    @cached_property
    def trainable_size(self) -> int:
        """How many leading places of the vector are trained by gradient."""
        return sum(entry.size for entry in self.entries if entry.trainable)

    @cached_property
    def dtype(self) -> np.dtype[np.floating[Any]]:
        """The vector's type: float32, or float64 where any entry is float64."""
        wide = any(entry.dtype == "float64" for entry in self.entries)
        return np.dtype(np.float64 if wide else np.float32)

    @cached_property
    def slices(self) -> dict[str, slice]:
        """The places of each entry, by name."""
        places, start = {}, 0
        for entry in self.entries:
            places[entry.name] = slice(start, start + entry.size)
            start += entry.size
        return places

    @cached_property
    def sha256(self) -> str:
        """The hash of the description: two sides that agree on it mean the same model."""
        rows = [[e.name, list(e.shape), e.dtype, e.trainable] for e in self.entries]
        return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()

    def flatten(self, arrays: Mapping[str, NDArray[Any]]) -> Vector:
        """Return the entries of ``arrays`` as one new vector of shape (d,).

        Raises:
            ValueError: an entry is missing, left over, or of another shape (nothing is ever broadcast).
        """
        if unknown := set(arrays) - set(self.slices):
            raise ValueError(f"entries not in the model: {sorted(unknown)}")
        vector = np.empty(self.size, dtype=self.dtype)
        for entry in self.entries:
            if entry.name not in arrays:
                raise ValueError(f"entry {entry.name!r} is missing")
            array = np.asarray(arrays[entry.name])
            if array.shape != entry.shape:
                raise ValueError(f"entry {entry.name!r} has shape {array.shape}, not {entry.shape}")
            vector[self.slices[entry.name]] = array.reshape(-1)
        return vector

    def unflatten(self, vector: Vector) -> dict[str, NDArray[Any]]:
        """Return new arrays by name, in their own types (bfloat16, unknown to NumPy, as float32)."""
        if vector.shape != (self.size,):
            raise ValueError(f"the vector has shape {vector.shape}, not ({self.size},)")
        arrays = {}
        for entry in self.entries:
            dtype = "float32" if entry.dtype == "bfloat16" else entry.dtype
            arrays[entry.name] = vector[self.slices[entry.name]].astype(dtype).reshape(entry.shape)
        return arrays

    def check(self, vector: NDArray[Any]) -> Vector:
        """Return ``vector`` if it can be one of this description's, else refuse it.

        Raises:
            ReplyError: ``bad-reply`` for another shape or type, ``not-finite`` for NaN or infinity.
        """
        if vector.shape != (self.size,):
            raise ReplyError("bad-reply", f"the vector has shape {vector.shape}, not ({self.size},)")
        if vector.dtype != self.dtype:
            raise ReplyError("bad-reply", f"the vector is {vector.dtype}, not {self.dtype}")
        if not np.isfinite(vector).all():
            raise ReplyError("not-finite", "the vector holds NaN or infinity")
        return vector
