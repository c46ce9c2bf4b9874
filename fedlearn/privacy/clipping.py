"""Clip once, in one type: ``Update`` → ``ClippedUpdate`` → ``ClippedSum``. Nothing else is summed, noised or masked.

What a flat vector's entries are (0-d, tied, integer, of mixed type, in which order) is decided in
``fedlearn.arrays``, once; here a model is one vector, so that no entry can escape the clip.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlearn.arrays import Vector
from fedlearn.errors import ReplyError

__all__ = ["ClippedGroup", "ClippedSum", "ClippedUpdate", "Update", "clip", "l2_norm"]


def l2_norm(vector: NDArray[np.floating[Any]]) -> float:
    """Return the Euclidean norm in float64; exact to rounding for denormal and for huge entries too.

    NaN or infinity in the vector gives NaN or infinity.

    >>> l2_norm(np.array([3e-320, 4e-320])) > 0, l2_norm(np.array([3e300, 4e300]))
    (True, 5e+300)
    """
    wide = vector.astype(np.float64, copy=False)
    with np.errstate(all="ignore"):
        square = float(np.dot(wide, wide))
    if 1e-200 < square < 1e200:  # no square of what matters overflowed or vanished
        return math.sqrt(square)
    largest = float(np.abs(wide).max(initial=0.0))
    if largest == 0.0 or not math.isfinite(largest):
        return largest
    _, exponent = math.frexp(largest)
    scaled = np.ldexp(wide, -exponent)
    with np.errstate(over="ignore"):  # the norm itself may be beyond float64
        return float(np.ldexp(math.sqrt(float(np.dot(scaled, scaled))), exponent))


@dataclass(frozen=True, eq=False)
class Update:
    """What a client learned: its model minus the one it received. Neither clipped nor noised.

    Attributes:
        vector: shape (d,), float32 or float64, in the model's own units; never written to.

    Raises:
        ValueError: the vector has another shape or type.
    """

    vector: Vector

    def __post_init__(self) -> None:
        object.__setattr__(self, "vector", _read_only(self.vector))

    @classmethod
    def of(cls, values: Sequence[float]) -> Update:
        """Return the update with these entries, in float64."""
        return cls(np.array(values, dtype=np.float64))

    @property
    def norm(self) -> float:
        """The L2 norm; NaN or infinite where an entry is."""
        return l2_norm(self.vector)


@dataclass(frozen=True, eq=False, kw_only=True)
class ClippedUpdate:
    """An update whose norm is at most ``bound_l2``: the only thing that is ever summed, noised or masked.

    It is made by ``clip`` or, of a vector that came from outside, by ``received``; both enforce the bound.

    Attributes:
        vector: shape (d,), finite, of norm at most ``bound_l2``; never written to.
        bound_l2: the clipping norm.
        within: whether the update was within the bound before it was clipped.
        finite: whether it was finite; else it is zero now.

    Raises:
        ValueError: the vector is longer than the bound, or not finite.
    """

    vector: Vector
    bound_l2: float
    within: bool = True
    finite: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "vector", _read_only(self.vector))
        if not self.norm <= self.bound_l2:  # also where the norm is NaN
            raise ValueError(f"the vector's norm is {self.norm:g}, above the bound {self.bound_l2:g}")

    @property
    def norm(self) -> float:
        """The L2 norm, at most ``bound_l2``."""
        return l2_norm(self.vector)

    @classmethod
    def received(cls, vector: Vector, bound_l2: float, *, within: bool = True) -> ClippedUpdate:
        """Return what a client says it clipped, if it did: a server believes no norm that it did not compute.

        Raises:
            ReplyError: ``not-clipped`` where the norm is above the bound, or the vector is not finite.
        """
        try:
            return cls(vector=vector, bound_l2=bound_l2, within=within)
        except ValueError as error:
            raise ReplyError("not-clipped", str(error)) from error


@dataclass(frozen=True, eq=False, kw_only=True)
class ClippedGroup:
    """A sum of clipped updates that were never formed one by one: what a simulation computes of many clients at once.

    Nobody can see from the sum that each part of it is within the bound; whoever makes one has clipped each.

    Attributes:
        total: shape (d,), float64, finite; never written to.
        bound_l2: the clipping norm of every part.
        count: how many updates it is of.
        within: how many of them were within the bound before they were clipped.

    Raises:
        ValueError: the sum is longer than so many clipped updates can be, or not finite.
    """

    total: NDArray[np.float64]
    bound_l2: float
    count: int
    within: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "total", _read_only(self.total))
        if not l2_norm(self.total) <= self.count * self.bound_l2 * (1 + 1e-9) or not 0 <= self.within <= self.count:
            raise ValueError(
                f"a sum of norm {l2_norm(self.total):g} is not one of {self.count} updates clipped to {self.bound_l2:g}"
            )


def clip(update: Update, bound_l2: float) -> ClippedUpdate:
    """Scale ``update`` so that its L2 norm is at most ``bound_l2``.

    Guarantees: ``norm(result) <= bound_l2``, computed in float64 on the very numbers that are returned, for every
    input, the zero update and 0-d parameters included; a non-finite update becomes zero and says so; an update within
    the bound is returned as it is; clipping twice is clipping once. The argument is not changed.

    Args:
        update: vector of shape (d,), in the model's own units.
        bound_l2: the clipping norm, above 0 and finite.

    Raises:
        TypeError: ``update`` is no ``Update``.
        ValueError: the bound is not above 0 and finite.

    Reference: McMahan et al., arXiv:1710.06963, Algorithm 1, FlatClip.

    >>> clip(Update.of([3.0, 4.0]), bound_l2=1.0).norm
    1.0
    """
    if not isinstance(update, Update):
        raise TypeError(f"only an Update can be clipped, got {type(update).__name__}")
    if not (bound_l2 > 0 and math.isfinite(bound_l2)):
        raise ValueError(f"bound_l2 must be above 0 and finite, got {bound_l2}")
    vector, norm = update.vector, update.norm
    if not math.isfinite(norm) and not np.isfinite(vector).all():  # a finite vector's norm may be beyond float64
        return ClippedUpdate(vector=np.zeros_like(vector), bound_l2=bound_l2, within=False, finite=False)
    if norm <= bound_l2:
        return ClippedUpdate(vector=vector, bound_l2=bound_l2)
    scaled, length = vector.astype(np.float64, copy=False), norm
    if not (1e-100 < norm < 1e100 and bound_l2 > 1e-100):  # their quotient might vanish, or the norm be infinite
        _, exponent = math.frexp(float(np.abs(scaled).max()))
        scaled = np.ldexp(scaled, -exponent)  # every entry within [-1, 1]: the norm is finite even where it was not
        length = l2_norm(scaled)
    shrink = 1.0
    while True:  # rounding to the vector's own type can add to the norm; at most a few steps of its precision
        clipped = (scaled * (bound_l2 * shrink / length)).astype(vector.dtype)
        if l2_norm(clipped) <= bound_l2:
            return ClippedUpdate(vector=clipped, bound_l2=bound_l2, within=False)
        shrink -= float(np.finfo(vector.dtype).eps) / 2


class ClippedSum:
    """A sum of clipped updates, exact whatever their order: every entry is rounded to a grid and added as an integer.

    Rounding to a grid, with noise that is drawn on the same grid, is what keeps floating-point artefacts from giving an
    update away (Mironov 2012): the released number is an integer times ``grid``, and nothing of a float's last bits.

    Args:
        size: the length d.
        bound_l2: the clipping norm of everything that may be added.
        grid: the grid's step, a power of two.

    Attributes:
        count: how many updates were added.
        within: how many of them were within the bound before they were clipped.
    """

    def __init__(self, size: int, *, bound_l2: float, grid: float) -> None:
        if not grid > 0 or math.frexp(grid)[0] != 0.5:
            raise ValueError(f"grid must be a power of two, got {grid}")
        self.bound_l2, self.grid = bound_l2, grid
        self.count = self.within = 0
        self._rounding = 0.5  # how far one client can move an entry by rounding, in steps of the grid
        self._regrouped = 0.0  # and the sum by making 64 others be clipped in another way
        self._units: NDArray[np.int64] = np.zeros(size, dtype=np.int64)

    def add(self, update: ClippedUpdate) -> None:
        """Add one client's update.

        Raises:
            TypeError: it is no ``ClippedUpdate``.
            ValueError: it was clipped to another bound, or has another length.
        """
        if not isinstance(update, ClippedUpdate):
            raise TypeError(f"only a ClippedUpdate can be summed, got {type(update).__name__}; clip it first")
        if update.bound_l2 > self.bound_l2 or update.vector.shape != self._units.shape:
            raise ValueError(
                f"an update of shape {update.vector.shape} clipped to {update.bound_l2:g} cannot be added to a sum of "
                f"shape {self._units.shape} for {self.bound_l2:g}"
            )
        wide = update.vector.astype(np.float64)
        wide /= self.grid
        self._units += np.rint(wide, out=wide).astype(np.int64)
        self.count += 1
        self.within += update.within

    def add_group(self, group: ClippedGroup) -> None:
        """Add the sum of many clients' updates, rounded as a whole.

        Without one of them, a sum may be rounded up where it was rounded down: a client then moves the result by up to
        one step of the grid in each entry beside its own update. And if a group comes to nothing because of one client,
        the others are clipped one by one, to the bound itself instead of 2^-20 less. ``sensitivity_l2`` counts both.

        Raises:
            ValueError: it was clipped to another bound, or has another length.
        """
        if group.bound_l2 > self.bound_l2 or group.total.shape != self._units.shape:
            raise ValueError(
                f"a sum of shape {group.total.shape} clipped to {group.bound_l2:g} cannot be added to one of shape "
                f"{self._units.shape} for {self.bound_l2:g}"
            )
        self._units += np.rint(group.total / self.grid).astype(np.int64)
        self.count += group.count
        self.within += group.within
        self._rounding, self._regrouped = 1.0, 2.0**-14 * self.bound_l2

    @property
    def units(self) -> NDArray[np.int64]:
        """The sum in units of the grid, shape (d,), as a copy."""
        return self._units.copy()

    @property
    def sensitivity_l2(self) -> float:
        """How far one client can move the sum: the bound, and what rounding its entries can add."""
        return self.bound_l2 + self._regrouped + self._rounding * self.grid * math.sqrt(self._units.size)


def _read_only(vector: NDArray[Any]) -> Vector:
    """Return a read-only view of a floating vector."""
    if not isinstance(vector, np.ndarray) or vector.ndim != 1 or vector.dtype not in (np.float32, np.float64):
        found = f"{vector.dtype} of shape {vector.shape}" if isinstance(vector, np.ndarray) else type(vector).__name__
        raise ValueError(f"an update is a float32 or float64 vector of shape (d,), got {found}")
    view: Vector = vector.view()
    view.flags.writeable = False
    return view
