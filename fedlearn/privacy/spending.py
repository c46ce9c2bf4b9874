"""What a release spends, as numbers: all that an accountant has to know of it.

The rules, for each release (``fedlearn.privacy.releases``):

- ``gaussian`` is one Gaussian mechanism with noise multiplier σ/Δ, ``steps`` times. Only a secret Poisson draw, under
  adding and removing, amplifies it; every other draw counts as if everybody took part.
- ``skellam`` is what its ``Lattice`` says, ``steps`` times, and no draw amplifies it. It holds between neighbours of
  which one contributes zero (``zero-out``): a client that is not there brings no noise either, and that shows.
- ``dp-ftrl``: all rows of one ``Matrix.instance`` together are one Gaussian mechanism, C·X + Z.
- Epsilon for a client needs releases that hide a client. Epsilon for an example counts those that hide an example and
  those that hide a client; the latter with twice the sensitivity, since a record does not take its client away, it
  changes what the client contributes.
- Whatever is not known, contradicts itself or has a number that is none is infinite.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from fedlearn.privacy.matrix import sensitivity
from fedlearn.privacy.releases import Lattice, Release, Sampling, Unit

__all__ = ["Account", "Discrete", "Draws", "Spending"]

_HIDES: dict[Unit, tuple[Unit, ...]] = {"none": (), "example": ("example", "client"), "client": ("client",)}
_LEAST_NOISE = 1e-3
"""A noise multiplier below it counts as none: epsilon would be above 500,000."""

_LEAST_RATE = 1e-9
"""A smaller probability counts as this one, and more noise than ``_MOST_NOISE`` as that much: both can only add."""

_MOST_NOISE = 1e6
_MOST_ROWS = 1_000_000
_SAME = 1e-6
"""How far a query may be from its lattice, relatively: both say the same, in other units."""

_DRAWS = ("everyone", "fixed-size", "poisson", "poisson-observed", "separated")

_row_sensitivity = lru_cache(maxsize=1024)(sensitivity)


class Draws(NamedTuple):
    """A Gaussian release to which every unit contributes with a secret probability, independently.

    Attributes:
        rate: the probability, in (0, 1).
        noise_multiplier: σ/Δ, above 0.
        replaced: whether the unit does not come or go but changes: a record within a client's update. Δ is then already
            twice the client's, and what may be claimed is that whoever was not drawn has no loss.
    """

    rate: float
    noise_multiplier: float
    replaced: bool = False


class Discrete(NamedTuple):
    """A release with Skellam noise: how far the unit moves the sum, and the noise's variance, in lattice units.

    ``slack`` and ``slack_delta`` are the ``Lattice``'s.
    """

    sensitivity_l1: float
    sensitivity_l2: float
    variance: float
    slack: float
    slack_delta: float


@dataclass(frozen=True, kw_only=True)
class Spending:
    """All that matters of releases for epsilon.

    Attributes:
        gaussian: Σ (Δ/σ)² over Gaussian releases without amplification: together one, with noise (Σ (Δ/σ)²)^(-1/2).
        sampled: how many steps of each amplified kind.
        discrete: how many releases of each kind of Skellam noise.
    """

    gaussian: float = 0.0
    sampled: Mapping[Draws, int] = field(default_factory=dict)
    discrete: Mapping[Discrete, int] = field(default_factory=dict)

    @property
    def nothing(self) -> bool:
        """Whether nothing was spent."""
        return not (self.gaussian or self.sampled or self.discrete)

    @property
    def steps(self) -> int:
        """How many amplified steps there are."""
        return sum(self.sampled.values())

    @property
    def noise_multiplier(self) -> float:
        """The σ/Δ of all Gaussian releases without amplification together; infinite where there are none."""
        return self.gaussian**-0.5 if self.gaussian else math.inf


class Account:
    """Adds releases up to what matters of them; from the first that is not known, infinite."""

    def __init__(self, unit: Unit) -> None:
        self._unit: Unit = unit
        self._known = True
        self._plain: list[float] = []
        self._sampled: Counter[Draws] = Counter()
        self._discrete: Counter[Discrete] = Counter()
        self._sequences: dict[str, list[Release]] = {}

    def add(self, release: Release) -> None:
        """Count one release."""
        noise = _noise_multiplier(release) if _is_known(release) and release.unit in _HIDES[self._unit] else 0.0
        replaced = release.unit != self._unit
        noise = min(noise / 2 if replaced else noise, _MOST_NOISE)
        sampling = release.sampling
        if noise < _LEAST_NOISE:
            self._known = False
        elif release.lattice is not None:
            self._discrete[_moved(release.lattice, 2.0 if replaced else 1.0)] += release.steps
        elif release.matrix is not None:
            self._sequences.setdefault(release.matrix.instance, []).append(release)
        elif sampling.method == "poisson" and sampling.rate < 1:
            self._sampled[Draws(max(sampling.rate, _LEAST_RATE), noise, replaced)] += release.steps
        else:
            self._plain.append(release.steps * noise**-2)

    def spending(self) -> Spending | None:
        """Return what was spent by all that was added; ``None``: no bound is known."""
        sequences = [self._sequence(rows) for rows in self._sequences.values()] if self._known else []
        if not self._known or not all(map(math.isfinite, sequences)):
            return None
        plain = math.fsum([*self._plain, *sequences])
        return Spending(gaussian=plain, sampled=dict(self._sampled), discrete=dict(self._discrete))

    def _sequence(self, rows: Sequence[Release]) -> float:
        """Return the (Δ/σ)² of the rounds of one correlated mechanism; infinity where they do not belong together."""
        first = rows[0]
        matrices = [each.matrix for each in rows if each.matrix is not None]
        numbers = {each.row for each in matrices}
        one = {(each.coefficients, each.min_separation) for each in matrices}
        alike = all((each.queries, each.unit) == (first.queries, first.unit) for each in rows)
        separated = all(each.sampling.method == "separated" for each in rows) or matrices[0].min_separation == 1
        if len(numbers) < len(rows) or len(one) > 1 or not alike or not separated:
            return math.inf
        if min(numbers) < 0 or max(numbers) >= _MOST_ROWS:
            return math.inf
        coefficients, separation = one.pop()
        try:
            moved: float = _row_sensitivity(coefficients, rows=max(numbers) + 1, min_separation=separation)
        except ValueError:  # the coefficients are negative, increasing, or none
            return math.inf
        moved *= 1.0 if first.unit == self._unit else 2.0
        return float((moved / _noise_multiplier(first)) ** 2)


def _is_known(release: Release) -> bool:
    """Return whether this version knows what a release says, and it does not contradict itself."""
    numbers = [number for query in release.queries for number in (query.sensitivity_l2, query.stddev)]
    return (
        not release.unknown
        and release.mechanism in ("gaussian", "dp-ftrl", "skellam")
        and (release.matrix is not None) == (release.mechanism == "dp-ftrl")
        and (release.lattice is not None) == (release.mechanism == "skellam")
        and (release.steps >= 1 if release.matrix is None else release.steps == 1)
        and (len(release.queries) >= 1 if release.mechanism == "gaussian" else len(release.queries) == 1)
        and all(0 < number < math.inf for number in numbers)
        and (release.lattice is None or _is_lattice(release.lattice, numbers[0] / numbers[1]))
        and _draw_bears(release.sampling, release.adjacency, amplified=release.lattice is None)
    )


def _is_lattice(lattice: Lattice, moved: float) -> bool:
    """Return whether a lattice has numbers that integers can have, and moves by as many standard deviations."""
    l1, l2, variance = lattice.sensitivity_l1, lattice.sensitivity_l2, lattice.variance
    numbers = (l1, l2, variance, lattice.slack, lattice.slack_delta)
    if any(isinstance(each, bool) or not 0 <= each < math.inf for each in numbers) or not variance > 0:
        return False
    if not (1 <= l2 <= l1 * (1 + _SAME) and l1 <= l2 * l2 * (1 + _SAME)):
        return False
    return math.isclose(moved, l2 / math.sqrt(variance), rel_tol=_SAME)


def _moved(lattice: Lattice, factor: float) -> Discrete:
    """Return what a lattice says, of a unit that moves the sum ``factor`` times as far."""
    l1, l2 = factor * lattice.sensitivity_l1, factor * lattice.sensitivity_l2
    return Discrete(l1, l2, lattice.variance, lattice.slack, lattice.slack_delta)


def _draw_bears(sampling: Sampling, adjacency: str, *, amplified: bool) -> bool:
    """Return whether the sensitivity of a sum holds for this draw between such neighbours.

    Where a draw is never ``amplified`` it does not matter which it is, if only a client contributes nothing.

    Where the number drawn is fixed, or depends on who is there, a client that leaves makes room for another, and the
    sum moves by both: only that a client contributes nothing (``zero-out``) keeps to the sensitivity.
    """
    if not 0 <= sampling.rate <= 1:
        return False
    if not amplified:
        return sampling.method in _DRAWS and adjacency == "zero-out"
    if sampling.method == "poisson":  # of a client who contributes nothing, dp_accounting has no bound for it
        return sampling.rate > 0 and adjacency == "add-remove"
    if sampling.method in ("everyone", "poisson-observed"):
        return adjacency in ("add-remove", "zero-out")
    return sampling.method in ("fixed-size", "separated") and adjacency == "zero-out"


def _noise_multiplier(release: Release) -> float:
    """Return σ/Δ, never rounded up, so that rounds which differ in a float's last bits are one kind of release."""
    try:
        noise = release.noise_multiplier
    except (ArithmeticError, ValueError):  # sensitivities that vanish beside their noise
        return 0.0
    return float(f"{noise:.10g}") * (1 - 1e-9) if math.isfinite(noise) else 0.0
