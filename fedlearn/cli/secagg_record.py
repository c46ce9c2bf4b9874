"""What a run under secure aggregation wrote down, checked line by line, and whether a vector looks like noise."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlearn.errors import MissingError, RunUnreadableError

__all__ = ["MODES", "Flatness", "Lanes", "Try", "flatness", "flatness_text", "legs_of", "read_tries"]

_LEGS = {
    "advertise": ("advertised", "public keys"),
    "share": ("shared", "sealed shares of secrets"),
    "mask": ("masked", "the masked vector"),
    "consistent": ("confirmed", "who is in it, signed"),
    "unmask": ("unmasked", "shares to take masks off"),
}
"""Leg → the name of its count, and what clients send in it."""

_IDEAL = {"ideal": ("masked", "the update, not masked")}
MODES = {
    "active": "active: holds against a server that lies, too",
    "semi-honest": "semi-honest: holds against a server that keeps to the protocol",
    "ideal": "ideal: NO MASKS. The sum is the same to the last bit, and nobody is protected",
}
_NEXT = "Run with it: fedlearn simulate --set secagg.mode=active"
_BINS = 64
_LEAST_A_BIN = 5  # below it, χ² says little
_UNEVEN = 0.001


# -- what a run wrote down -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Lanes:
    """A client's vector as a histogram: how many of its integers lie in each of 64 equal bins."""

    client: int
    counts: Sequence[int]


@dataclass(frozen=True, kw_only=True)
class Try:
    """One line of ``secagg.jsonl``: a try of a round.

    Attributes:
        line: the line as it was written; the other attributes are those of its fields that are shown, checked.
        counts: how many clients answered, by the count's name; those noted when it was given up included.
        furthest: by client, the last leg it answered; empty: none.
        graph: how many neighbours a client has, and how many shares a secret takes; zeros where there are none.
        sent_bytes: by leg, what the clients sent and what they received.
        aborted: in which leg it was given up and why, or ``None``.
    """

    line: Mapping[str, Any]
    round_number: int
    attempt: int
    mode: str
    bits: int
    size: int
    words: int
    graph: tuple[int, int]
    counts: Mapping[str, int]
    furthest: Mapping[str, str]
    sent_bytes: Mapping[str, tuple[int, int]]
    failures: Mapping[str, str]
    aborted: tuple[str, str] | None
    seen: Lanes | None
    plain: Lanes | None
    transcript: str
    released: bool

    @property
    def legs(self) -> Mapping[str, tuple[str, str]]:
        """The legs of its mode."""
        return legs_of(self.mode)

    @property
    def in_sum(self) -> int:
        """How many vectors came, which are those in the sum if there is one."""
        return self.counts.get("masked", 0)


def legs_of(mode: str) -> Mapping[str, tuple[str, str]]:
    """Return the legs of a mode, in order."""
    if mode == "semi-honest":
        return {leg: told for leg, told in _LEGS.items() if leg != "consistent"}
    return _IDEAL if mode == "ideal" else _LEGS


def read_tries(run: Path) -> list[Try]:
    """Return every try of every round."""
    path = run / "secagg.jsonl"
    if not run.is_dir():
        raise RunUnreadableError(f"{run} is no run's folder. {_NEXT} --out {run}")
    if not path.exists() and not (run / "config.toml").exists():
        raise RunUnreadableError(f"{run} holds no run (no config.toml). {_NEXT} --out {run}")
    if not path.exists():
        raise MissingError(f"{run} ran without secure aggregation: the server saw every update. {_NEXT}")
    try:
        complete = path.read_bytes().split(b"\n")[:-1]  # what follows the last newline was never finished
    except OSError as error:
        raise RunUnreadableError(f"{path} cannot be read: {error.strerror}") from error
    tries = []
    for number, line in enumerate(complete, 1):
        try:
            noted = json.loads(line)
            if noted["mode"] == "off":
                raise MissingError(f"{run} ran without secure aggregation: the server saw every update. {_NEXT}")
            tries.append(_try_of(noted))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            what = f"has no {error}" if isinstance(error, KeyError) else f"is damaged ({error})"
            raise RunUnreadableError(f"{path}, line {number}, {what}; only a new run writes a new one") from error
    if not tries:
        raise MissingError(f"{path} is empty: no round was tried yet. Go on: fedlearn simulate --resume {run}")
    return tries


def _try_of(line: dict[str, Any]) -> Try:
    """Return a line's fields, checked."""
    from fedlearn.secagg.ring import words_needed

    json.dumps(line, allow_nan=False)  # it is told again as it is
    mode, aborted = _word(line["mode"]), line["aborted"]
    if mode not in MODES:
        raise ValueError(f"there is no mode {mode!r}")
    furthest = {_word(client): _word(leg) for client, leg in line["furthest"].items()}
    if strange := [leg for leg in (*furthest.values(), *line["bytes"]) if leg and leg not in legs_of(mode)]:
        raise ValueError(f"there is no leg {strange[0]!r}")
    noted = aborted["counts"] if aborted is not None else {}
    bits, size = _whole(line["bits"]), _whole(line["dimension"])
    return Try(
        line=line,
        round_number=_whole(line["round"], least=1),
        attempt=_whole(line["attempt"], least=1),
        mode=mode,
        bits=bits,
        size=size,
        words=words_needed(size, bits),
        graph=(_whole(line["degree"] or 0), _whole(line["threshold"] or 0)),
        counts={name: _whole(count) for name, count in {**noted, **line["counts"]}.items()},
        furthest=furthest,
        sent_bytes={leg: (_whole(sent["up"]), _whole(sent["down"])) for leg, sent in line["bytes"].items()},
        failures={client: _word(code) for client, code in line["failures"].items()},
        aborted=(_word(aborted["phase"]), _word(aborted["reason"])) if aborted is not None else None,
        seen=_lanes_of(line["seen"]),
        plain=_lanes_of(line["plain"]),
        transcript=_word(line["transcript"] or ""),
        released=line["released"] is True,
    )


def _word(value: object) -> str:
    """Return a text that may be shown: nothing in it moves the cursor of a terminal."""
    if not isinstance(value, str) or not value.isprintable():
        raise TypeError(f"{value!r:.40} is no text")
    return value


def _whole(value: object, *, least: int = 0) -> int:
    """Return a number that counts something."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**53:
        raise TypeError(f"{value!r:.40} counts nothing")
    return value


def _lanes_of(noted: Any) -> Lanes | None:
    """Return a histogram, checked."""
    if noted is None:
        return None
    if len(noted["histogram"]) != _BINS:
        raise ValueError(f"a histogram has {_BINS} bins")
    return Lanes(client=_whole(noted["client"]), counts=[_whole(count) for count in noted["histogram"]])


# -- whether it looks like noise -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Flatness:
    """How far a histogram is from even.

    Attributes:
        chi2: Σ (count - mean)² / mean over its bins.
        dof: degrees of freedom, one less than there are bins.
        p: the share of even histograms that are at least as uneven, by Wilson and Hilferty's approximation.
    """

    chi2: float
    dof: int
    p: float


def flatness(counts: Sequence[int]) -> Flatness | None:
    """Return how far a histogram is from even; ``None`` where it holds too little to say.

    Reference: Wilson and Hilferty, The distribution of chi-square, PNAS 17 (1931): (χ²/k)^(1/3) is about normal with
    mean 1 - 2/(9k) and variance 2/(9k).
    """
    mean, dof = sum(counts) / len(counts), len(counts) - 1
    if mean < _LEAST_A_BIN:
        return None
    chi2 = sum((count - mean) ** 2 for count in counts) / mean
    variance = 2 / (9 * dof)
    score = ((chi2 / dof) ** (1 / 3) - (1 - variance)) / math.sqrt(variance)
    return Flatness(chi2=chi2, dof=dof, p=math.erfc(score / math.sqrt(2)) / 2)


def flatness_text(counts: Sequence[int]) -> str:
    """Say whether a masked vector is as even as noise is."""
    found = flatness(counts)
    if found is None:
        return f"{sum(counts):,} integers are too few to tell even from uneven; {_LEAST_A_BIN * _BINS} would do"
    p = f"p ≈ {found.p:.2g}" if found.p >= 1e-6 else "p < 0.000001"
    words = f"χ² against perfectly even is {found.chi2:,.1f} with {found.dof} degrees of freedom, {p}"
    if found.p < _UNEVEN:
        return f"The masked vector is NOT FLAT: {words}. Masks would make it flat: something is wrong with them"
    return (
        f"The masked vector is flat: {words} (the share of even noise that is at least as uneven). Flat is what hidden "
        "looks like; it is no proof: that rests on the keys"
    )
