"""What left a trust boundary, as data: a ``Release`` says what was done, and computes nothing.

Epsilon is computed elsewhere (``fedlearn.privacy.accounting``), from releases alone. A release never changes its
meaning: what is not known here, a mechanism, a draw, a field of a later version, has an infinite epsilon.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, Literal

from fedlearn.config_reading import kebab, snake

__all__ = ["Adjacency", "Lattice", "Matrix", "Query", "Release", "Sampling", "Unit", "read_number", "written_number"]

Unit = Literal["none", "example", "client"]
Adjacency = Literal["add-remove", "zero-out"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Query:
    """One vector, or one number, to which noise was added.

    Attributes:
        name: what it is: ``update``, ``clip-count``, ``metrics``, ``gradient``.
        sensitivity_l2: how far one unit can move it, in L2 norm.
        stddev: of the noise on every coordinate, in the same units; 0: there was none.
    """

    name: str
    sensitivity_l2: float
    stddev: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How those who took part were really drawn.

    Attributes:
        method: ``everyone``, ``fixed-size``, ``poisson`` or ``separated`` (at least ``Matrix.min_separation`` rounds
            apart). Only ``poisson`` amplifies.
        rate: the probability with which each took part, for ``poisson``; else at most 1.
        population: how many could have been drawn: N clients, or N examples of one client.
    """

    method: str
    rate: float
    population: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Matrix:
    """Where the noise of one round belongs in a correlated sequence (DP-FTRL): releases of one ``instance`` are one.

    With C the lower-triangular Toeplitz matrix of ``coefficients``, the rounds together release C·X + Z, Z independent
    of standard deviation ``stddev`` of the query; nothing else about the noise matters for epsilon.

    Attributes:
        instance: a name that all rounds of one mechanism share.
        row: this round's row, counted from 0.
        coefficients: the first column of C, from the diagonal down; not negative, not increasing.
        min_separation: rounds between two participations of one client, at least; enforced.
    """

    instance: str
    row: int
    coefficients: tuple[float, ...]
    min_separation: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Lattice:
    """Skellam noise on a sum of integers, as it was drawn: in units of the lattice, which is what epsilon comes of.

    Attributes:
        sensitivity_l1: how far one unit can move the sum, in L1 norm.
        sensitivity_l2: how far in L2 norm; in relation to √variance as the query's is to its stddev.
        variance: of the noise on every coordinate: no more than what is certainly in the sum.
        slack: how far the logarithm of the noise's probabilities may be off, for all coordinates and clients together
            (``fedlearn.privacy.skellam.Slack.log_ratio``).
        slack_delta: how far off they may be in total variation besides.
    """

    sensitivity_l1: float
    sensitivity_l2: float
    variance: float
    slack: float = 0.0
    slack_delta: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Release:
    """One thing that left a trust boundary.

    Attributes:
        what: ``model``, ``evaluation`` or ``update`` (of one client's DP-SGD).
        round_number: counted from 1.
        unit: whose presence the noise hides; ``none``: nobody's.
        adjacency: what neighbouring data sets are: a unit is added or removed, or its contributions become zero.
        mechanism: ``gaussian``, ``dp-ftrl``, ``skellam``, or a name that is not known here.
        queries: what was answered with noise, jointly.
        sampling: how those who took part were drawn.
        steps: how often it was done, each with a fresh draw and fresh noise.
        matrix: where the noise is correlated over rounds.
        lattice: where the noise is Skellam's; the query then says the same in the model's units, for people.
        simulated: whether the noise came from a seed; it then protects nobody.
        evidence: what else was observed, as strings: hashes of the model before and after, of the realised draw.
        unknown: names of fields that this version does not know; any of them makes epsilon infinite.
    """

    what: str
    round_number: int
    unit: Unit
    adjacency: str
    mechanism: str
    queries: tuple[Query, ...]
    sampling: Sampling
    steps: int = 1
    matrix: Matrix | None = None
    lattice: Lattice | None = None
    simulated: bool
    evidence: Mapping[str, str] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "queries", tuple(self.queries))
        object.__setattr__(self, "evidence", MappingProxyType(dict(self.evidence)))

    @classmethod
    def not_known(cls, what: str) -> Release:
        """Return the release of something that this version does not know: its epsilon is infinite."""
        return cls(
            what=what,
            round_number=0,
            unit="none",
            adjacency="unknown",
            mechanism="unknown",
            queries=(),
            sampling=Sampling(method="unknown", rate=1.0, population=0),
            simulated=False,
            unknown=(what,),
        )

    @property
    def noise_multiplier(self) -> float:
        """The σ/Δ of all queries together, (Σ (Δ/σ)²)^(-1/2); 0 where one has no noise, or numbers that cannot be.

        Reference: Andrew et al., arXiv:1905.03871, Theorem 1 (several Gaussian queries answered jointly are one).
        """
        numbers = [value for each in self.queries for value in (each.stddev, each.sensitivity_l2)]
        if not numbers or any(not (value > 0 and math.isfinite(value)) for value in numbers):
            return 0.0
        return 1.0 / math.hypot(*(each.sensitivity_l2 / each.stddev for each in self.queries))

    def to_body(self) -> dict[str, Any]:
        """Return it as JSON without floats: numbers that are no integers are decimal strings."""
        body: dict[str, Any] = {
            kebab(each.name): _written(getattr(self, each.name)) for each in fields(self) if each.name != "unknown"
        }
        for name in ("matrix", "lattice"):
            if body[name] is None:
                del body[name]
        return body

    @classmethod
    def from_body(cls, body: Mapping[str, Any]) -> Release:
        """Return the release that ``to_body`` wrote; fields that are not known here are named in ``unknown``.

        Raises:
            ValueError: a field is missing or of another kind.
        """
        known = {kebab(each.name) for each in fields(cls)} - {"unknown"}
        unknown = tuple(sorted(set(body) - known))
        try:
            extra = list(unknown)
            matrix = _read(Matrix, body["matrix"], extra) if "matrix" in body else None
            lattice = _read(Lattice, body["lattice"], extra) if "lattice" in body else None
            return cls(
                what=_text(body["what"]),
                round_number=_whole(body["round-number"]),
                unit=body["unit"] if body["unit"] in ("example", "client") else "none",
                adjacency=_text(body["adjacency"]),
                mechanism=_text(body["mechanism"]),
                queries=tuple(_read(Query, each, extra) for each in body["queries"]),
                sampling=_read(Sampling, body["sampling"], extra),
                steps=_whole(body["steps"]),
                matrix=matrix,
                lattice=lattice,
                simulated=_flag(body["simulated"]),
                evidence={_text(name): _text(value) for name, value in body["evidence"].items()},
                unknown=tuple(extra),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a release: {error}") from error


def written_number(value: float) -> str:
    """Return a number as the shortest decimal string that reads back to it; infinity as ``inf``.

    >>> written_number(0.1), written_number(float("inf"))
    ('0.1', 'inf')
    """
    return repr(float(value))


def read_number(text: object) -> float:
    """Return the number that ``written_number`` wrote; never NaN.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(text, str) or math.isnan(number := float(text)):
        raise ValueError(f"expected a number as a string, got {text!r}")
    return number


def _written(value: Any) -> Any:
    """Return a value as JSON without floats."""
    if isinstance(value, float):
        return written_number(value)
    if isinstance(value, Query | Sampling | Matrix | Lattice):
        return {kebab(each.name): _written(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, Mapping):
        return {name: _written(each) for name, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_written(each) for each in value]
    return value


def _read(kind: Any, body: Mapping[str, Any], unknown: list[str]) -> Any:
    """Return a ``Query``, ``Sampling``, ``Matrix`` or ``Lattice``; unknown fields are added to ``unknown`` by name."""
    names = {each.name: str(each.type) for each in fields(kind)}
    unknown.extend(sorted(f"{kind.__name__.lower()}.{name}" for name in body if snake(name) not in names))
    return kind(**{name: _READERS[hint](body[kebab(name)]) for name, hint in names.items()})


def _text(value: object) -> str:
    """Return a string."""
    if not isinstance(value, str):
        raise TypeError(f"expected a string, got {value!r}")
    return value


def _whole(value: object) -> int:
    """Return an integer that is not negative."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise TypeError(f"expected a whole number, got {value!r}")
    return value


def _flag(value: object) -> bool:
    """Return a boolean."""
    if not isinstance(value, bool):
        raise TypeError(f"expected true or false, got {value!r}")
    return value


def _numbers(values: Iterable[object]) -> tuple[float, ...]:
    """Return several numbers."""
    return tuple(read_number(each) for each in values)


_READERS: dict[str, Any] = {"str": _text, "int": _whole, "float": read_number, "tuple[float, ...]": _numbers}
"""How a field is read, by its annotation."""
