"""The gradients of a batch's examples, written out or in factors: their norms, and their sum with a weight each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Gradients", "Lookup", "Outer", "Rows"]


class Gradients(Protocol):
    """One parameter's gradient of every example of a batch."""

    def norms(self) -> Tensor:
        """Return each example's norm, shape (b,), float64."""

    def weighted(self, factors: Tensor) -> Tensor:
        """Return Σ factorᵢ · gradientᵢ, flat, float64; what has factor 0 may be anything."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Gradients that are written out, shape (b, size)."""

    rows: Tensor

    def norms(self) -> Tensor:
        """Return each row's norm."""
        return torch.linalg.vector_norm(self.rows, dim=1, dtype=torch.float64)  # type: ignore[no-any-return]

    def weighted(self, factors: Tensor) -> Tensor:
        """Return the weighted sum of the rows."""
        return factors @ _without(self.rows, factors).double()


@dataclass(frozen=True, eq=False)
class Outer:
    """Gradients that are outer products: unit vectors of shapes (b, out) and (b, in), and lengths; float64."""

    left: Tensor
    right: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, left: Tensor, right: Tensor) -> Outer:
        """Take lengths and directions apart: of a tiny vector times a huge one nothing vanishes."""
        (left, one), (right, two) = _direction(left), _direction(right)
        return cls(left, right, one * two)

    def norms(self) -> Tensor:
        """Return the products of the norms."""
        return self.lengths

    def weighted(self, factors: Tensor) -> Tensor:
        """Return the weighted sum in one product of matrices."""
        left, right, lengths = (_without(each, factors) for each in (self.left, self.right, self.lengths[:, None]))
        return ((left * (lengths * factors[:, None])).T @ right).flatten()


def _direction(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's unit vector and length, in float64; zero has no direction but zero."""
    wide, least = rows.double(), torch.finfo(torch.float64).tiny
    largest = wide.abs().amax(dim=1).clamp(min=least)
    wide = wide / largest[:, None]
    norms = wide.norm(dim=1)
    return wide / norms.clamp(min=least)[:, None], norms * largest


@dataclass(frozen=True, eq=False)
class Lookup:
    """Gradients that are a few rows of a table each: every (example, row of the table) once.

    Attributes:
        examples: whose row it is, shape (k,).
        places: where it is in the table, shape (k,).
        rows: shape (k, width), float64.
        shape: how many examples, and how many rows the table has.
    """

    examples: Tensor
    places: Tensor
    rows: Tensor
    shape: tuple[int, int]

    @classmethod
    def of(cls, places: Tensor, backprops: Tensor, length: int) -> Lookup:
        """Add up what one example looks up more than once."""
        count = len(places)
        flat = places.reshape(count, -1)
        keys = flat + torch.arange(count)[:, None] * length
        keys, place = torch.unique(keys, return_inverse=True)
        rows = torch.zeros(len(keys), backprops.shape[-1], dtype=torch.float64)
        rows.index_add_(0, place.flatten(), backprops.reshape(-1, backprops.shape[-1]).double())
        return cls(keys // length, keys % length, rows, (count, length))

    def norms(self) -> Tensor:
        """Return the norm over each example's rows."""
        squares = torch.zeros(self.shape[0], dtype=torch.float64)
        return squares.index_add_(0, self.examples, self.rows.square().sum(dim=1)).sqrt()

    def weighted(self, factors: Tensor) -> Tensor:
        """Return the weighted sum as a whole table."""
        of_row = factors[self.examples]
        table = torch.zeros(self.shape[1], self.rows.shape[1], dtype=torch.float64)
        return table.index_add_(0, self.places, _without(self.rows, of_row) * of_row[:, None]).flatten()


def _without(rows: Tensor, factors: Tensor) -> Tensor:
    """Return rows with zero where the factor is: no factor makes zero of what is not finite."""
    lost = factors == 0
    return rows.masked_fill(lost[:, None], 0.0) if bool(lost.any()) else rows
