"""Ledgers as the command line is given them: a file, or a run's folder; checked before anything is said of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlearn.errors import LedgerError, RunUnreadableError, UsageError

if TYPE_CHECKING:
    from fedlearn.privacy.ledger import Event, Head
    from fedlearn.privacy.releases import Release, Unit

__all__ = ["CheckedLedger", "delta_of", "open_ledgers", "unit_of"]


@dataclass(frozen=True, kw_only=True)
class CheckedLedger:
    """A ledger whose chain holds.

    Attributes:
        path: the file.
        events: its lines.
        expected: how far it has to go, from the run's ``summary.json``; ``None`` where there is none.
    """

    path: Path
    events: tuple[Event, ...]
    expected: Head | None

    @property
    def head(self) -> Head:
        """How far it goes."""
        from fedlearn.privacy.ledger import Head

        return Head.of(self.events)

    @property
    def policy(self) -> Mapping[str, Any]:
        """What the run promised: the body of its last ``run.policy``; empty where it promised nothing."""
        return next((each.body for each in reversed(self.events) if each.kind == "run.policy"), {})

    @property
    def is_closed(self) -> bool:
        """Whether the run has ended and said so."""
        return bool(self.events) and self.events[-1].kind == "run.close"

    @property
    def releases(self) -> list[Release]:
        """Everything that left."""
        from fedlearn.privacy.ledger import releases_of

        return releases_of(self.events)

    @property
    def state(self) -> str:
        """Whether lines may be missing at the end, in words."""
        if self.is_closed:
            reason = self.events[-1].body.get("reason")
            return "closed: the next round would have exceeded the budget" if reason == "budget" else "closed"
        if self.expected is not None:
            return "open; as far as summary.json says"
        return "open: lines may be missing at its end"

    @property
    def clients(self) -> list[Path]:
        """The clients' own ledgers beside a run's whose noise is theirs; they say what it is worth, this one cannot."""
        return list(self._clients)

    @property
    def _clients(self) -> dict[Path, Head | None]:
        """Those ledgers that are there or that ``summary.json`` names, and how far it says that each goes."""
        if self.policy.get("unit") != "example":
            return {}
        folder = self.path.with_name("clients")
        named = _stated(self.path.with_name("summary.json"), "client_ledgers") or {}
        found = {path.parent.name for path in folder.glob("*/ledger.jsonl")} | set(named)
        names = sorted(found, key=lambda name: (len(name), name))
        return {folder / name / "ledger.jsonl": _head(named[name]) if name in named else None for name in names}

    def open_clients(self) -> list[CheckedLedger]:
        """Return the clients' own ledgers, each checked to its end where ``summary.json`` says where that is.

        Raises:
            LedgerMissingError: one that is named there is missing.
            LedgerError: the chain of one does not hold, or lines are missing at its end.
        """
        return [_checked(path, expected) for path, expected in self._clients.items()]

    def number(self, name: str) -> float | None:
        """Return a number of the policy, or ``None`` where it has none.

        Raises:
            LedgerError: it has something else there.
        """
        from fedlearn.privacy.releases import read_number

        if name not in self.policy:
            return None
        try:
            return read_number(self.policy[name])
        except ValueError as error:
            line = next(each.seq for each in reversed(self.events) if each.kind == "run.policy")
            raise LedgerError(f"{name} is no number: {error}", line=line) from error

    def to_json(self) -> dict[str, Any]:
        """Return what machines are told of the file."""
        return {
            "path": str(self.path.resolve()),
            "lines": self.head.count,
            "sha256": self.head.sha256,
            "closed": self.is_closed,
            "end_checked": self.expected is not None,
            "releases": len(self.releases),
        }


def open_ledgers(paths: Sequence[Path]) -> list[CheckedLedger]:
    """Return these ledgers, each checked from its first line to its last.

    Raises:
        LedgerMissingError: one is not there.
        LedgerError: the chain of one does not hold; the error carries the line's number.
        RunUnreadableError: the ``summary.json`` beside one is damaged.
        UsageError: two are of one run.
    """
    found = [_open(path) for path in paths]
    firsts: dict[str, Path] = {}
    for each in found:
        if not each.events:
            continue
        first = each.events[0].sha256
        if first in firsts:
            raise UsageError(f"{firsts[first]} and {each.path} are ledgers of the same run; give each run once")
        firsts[first] = each.path
    return found


def unit_of(ledgers: Sequence[CheckedLedger]) -> Unit:
    """Return whose presence all these ledgers can hide: clients, else examples; nobody's where one hides nobody."""
    units = {str(each.policy.get("unit", "none")) for each in ledgers}
    if units == {"client"}:
        return "client"
    return "example" if units <= {"client", "example"} else "none"


def delta_of(ledgers: Sequence[CheckedLedger], given: float | None) -> float:
    """Return delta: the one that is given, else the policy's of the largest population; checked against all of them.

    Raises:
        UsageError: there is none.
        ConfigError: it is at least 1/N.
    """
    from fedlearn.privacy.accounting import check_delta, default_delta

    largest = max(ledgers, key=_population)
    population = _population(largest)
    delta = given if given is not None else largest.number("delta")
    if delta is None:
        if all(release.unit == "none" for each in ledgers for release in each.releases):  # infinite, whatever delta is
            return default_delta(max(population, 2))
        raise UsageError(f"{largest.path} states no delta; give one, such as --delta 1e-5 (below 1/N for N units)")
    if population and largest.policy.get("unit") != "none":
        check_delta(delta, population)
    return delta


def _population(ledger: CheckedLedger) -> int:
    """Return N of a ledger's policy; 0 where it states none."""
    found = ledger.policy.get("examples", ledger.policy.get("population"))  # of one client, or of all clients
    return found if isinstance(found, int) else 0


def _open(path: Path) -> CheckedLedger:
    """Read one ledger and check it."""
    file = path / "ledger.jsonl" if path.is_dir() else path
    stated = _stated(file.with_name("summary.json"), "ledger") if file.name == "ledger.jsonl" else None
    return _checked(file, None if stated is None else _head(stated))


def _checked(file: Path, expected: Head | None) -> CheckedLedger:
    """Read one ledger and check that its chain holds, as far as is expected at least."""
    from fedlearn.privacy.ledger import read_events

    try:
        events = read_events(file, expected)
    except LedgerError as error:
        error.add_note(f"What {file} says is not what was written; restore it from a copy")
        raise
    return CheckedLedger(path=file, events=tuple(events), expected=expected)


def _stated(summary: Path, name: str) -> Any:
    """Return what a run's summary says under ``privacy`` by this name, or ``None`` where it says nothing."""
    if not summary.exists():
        return None
    try:
        return json.loads(summary.read_bytes()).get("privacy", {}).get(name)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise RunUnreadableError(f"{summary} is damaged: {error}; how far the ledger must go is not known") from error


def _head(stated: Any) -> Head:
    """Return how far a summary says that a ledger goes."""
    from fedlearn.privacy.ledger import Head

    try:
        return Head(count=int(stated["lines"]), sha256=str(stated["sha256"]))
    except (ValueError, TypeError, KeyError) as error:
        raise RunUnreadableError(f"summary.json is damaged: {error}; how far a ledger must go is not known") from error
