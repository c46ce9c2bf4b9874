"""The ledger: an append-only file of what left, each line carrying the hash of the one before.

A line is canonical JSON (RFC 8785, for which numbers that are no integers are decimal strings)
``{"body": …, "kind": …, "prev": …, "seq": …, "v": 1}``; ``prev`` is the SHA-256 of the line before, without its line
break. Whoever holds the file can check the chain and compute epsilon. It holds no update, no seed and no key.

A chain shows what was edited, reordered or taken out between two lines. That lines are missing at the *end* it shows
only to who knows the last hash (``head``): a run's checkpoint and its ``summary.json`` do, and a ledger whose last
event is not ``run.close`` says itself that it is open.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlearn.errors import LedgerError, LedgerMissingError, RunFailedError
from fedlearn.privacy.releases import Release

__all__ = ["GENESIS", "RELEASES", "Event", "Head", "Ledger", "check_chain", "read_events", "releases_of"]

GENESIS = "0" * 64
"""What the first line has for the hash of the line before."""

RELEASES = ("round.release", "eval.release", "update.release")
"""The kinds of event whose body is a ``Release``."""

_KNOWN = (*RELEASES, "run.policy", "run.resume", "run.close", "round.model")
_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Event:
    """One line.

    Attributes:
        seq: its number, counted from 1: the number of its line in the file.
        prev: the hash of the line before.
        kind: what happened.
        body: what there is to say of it: JSON without floats.
    """

    seq: int
    prev: str
    kind: str
    body: Mapping[str, Any]

    def to_line(self) -> str:
        """Return the canonical JSON, without the line break."""
        table = {"body": self.body, "kind": self.kind, "prev": self.prev, "seq": self.seq, "v": _VERSION}
        return json.dumps(table, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)

    @property
    def sha256(self) -> str:
        """The hash of this line, which the next one carries."""
        return hashlib.sha256(self.to_line().encode()).hexdigest()

    @property
    def is_known(self) -> bool:
        """Whether this version knows what such an event means; what it does not know may be a release."""
        return self.kind in _KNOWN

    def release(self) -> Release | None:
        """Return the release it reports, or ``None`` where it reports none.

        Raises:
            LedgerError: it should be a release and cannot be read.
        """
        if self.kind not in RELEASES:
            return None
        try:
            return Release.from_body(self.body)
        except ValueError as error:
            raise LedgerError(str(error), line=self.seq) from error


@dataclass(frozen=True, kw_only=True)
class Head:
    """How far a ledger goes: so many lines, the last with this hash."""

    count: int = 0
    sha256: str = GENESIS

    @classmethod
    def of(cls, events: Sequence[Event]) -> Head:
        """Return the head of these events."""
        return cls(count=len(events), sha256=events[-1].sha256) if events else cls()


def read_events(path: Path, head: Head | None = None) -> list[Event]:
    """Return the events of a ledger whose chain holds.

    A last line without its line break is one that a crash left unfinished; it counts as not written.

    Args:
        path: the file.
        head: what the ledger must reach: a line that is missing at the end is then found too.

    Raises:
        LedgerMissingError: the file does not exist or cannot be read.
        LedgerError: a line was edited, reordered, inserted or taken out; it carries the line's number.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise LedgerMissingError(
            f"{path}: {error.strerror}; a ledger is called ledger.jsonl in a run's folder"
        ) from error
    events = list(check_chain(data.split(b"\n")[:-1]))
    if head is not None:
        _check_head(events, head)
    return events


def check_chain(lines: Sequence[bytes]) -> Iterator[Event]:
    """Yield the event of each line while the chain holds.

    Raises:
        LedgerError: at the first line that does not follow from the one before.
    """
    prev = GENESIS
    for number, data in enumerate(lines, start=1):
        event = _parse(data, number)
        if event.seq != number:
            raise LedgerError(f"has the number {event.seq}: a line before it is missing, moved or added", line=number)
        if event.prev != prev:
            raise LedgerError(
                f"does not follow from line {number - 1}: one of the two was edited, moved or taken out"
                if number > 1
                else "is not the first line of a ledger: lines before it were taken out",
                line=number,
            )
        prev = hashlib.sha256(data).hexdigest()
        yield event


def _parse(data: bytes, number: int) -> Event:
    """Return the event in one line, which must be the one canonical way to write it."""
    try:
        table = json.loads(data)
        version = table["v"]
        event = Event(seq=table["seq"], prev=table["prev"], kind=table["kind"], body=table["body"])
        shaped = isinstance(event.seq, int) and isinstance(event.kind, str) and isinstance(event.body, dict)
        canonical = event.to_line().encode() == data
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise LedgerError("is not a line of a ledger: it was edited or damaged", line=number) from error
    if version != _VERSION:
        raise LedgerError(f"is of version {version}; this fedlearn reads version {_VERSION}", line=number)
    if not shaped or not canonical:
        raise LedgerError("is not written as fedlearn writes it: it was edited", line=number)
    return event


def _check_head(events: Sequence[Event], head: Head) -> None:
    """Raise unless the events reach ``head`` (they may go on after it)."""
    if len(events) < head.count:
        raise LedgerError(
            f"is missing: the run wrote {head.count} lines and {len(events)} are left", line=len(events) + 1
        )
    if head.count and events[head.count - 1].sha256 != head.sha256:
        raise LedgerError("is not the line that the run wrote there: it was edited", line=head.count)


def releases_of(events: Iterable[Event]) -> list[Release]:
    """Return every release that these events report; of an event that is not known here, one that is infinite.

    Raises:
        LedgerError: a release cannot be read.
    """
    found = []
    for event in events:
        release = event.release()
        if release is not None:
            found.append(release)
        elif not event.is_known:
            found.append(Release.not_known(event.kind))
    return found


class Ledger:
    """The ledger of one run, or of one client, open for appending.

    Args:
        path: the file; made with the first event.

    Raises:
        LedgerError, LedgerMissingError: there is a file and its chain does not hold.
    """

    def __init__(self, path: Path, head: Head | None = None) -> None:
        self.path = path
        self._events = read_events(path, head) if path.exists() or (head is not None and head.count) else []
        self._size = sum(len(each.to_line().encode()) + 1 for each in self._events)  # what of the file is whole lines

    @property
    def events(self) -> tuple[Event, ...]:
        """Every event so far."""
        return tuple(self._events)

    @property
    def head(self) -> Head:
        """How far it goes."""
        return Head.of(self._events)

    def next_event(self, kind: str, body: Mapping[str, Any]) -> Event:
        """Return the event that ``append`` would write, and write nothing."""
        head = self.head
        return Event(seq=head.count + 1, prev=head.sha256, kind=kind, body=body)

    def append(self, kind: str, body: Mapping[str, Any]) -> Event:
        """Write one event to the disk, and only then return.

        Raises:
            RunFailedError: it cannot be written; what it reports must then not be released.
        """
        return self.commit(self.next_event(kind, body))

    def commit(self, event: Event) -> Event:
        """Write an event that ``next_event`` made; one that is there already is left as it is.

        Raises:
            LedgerError: it does not follow from the last line.
            RunFailedError: it cannot be written.
        """
        if event.seq <= len(self._events) and self._events[event.seq - 1] == event:
            return event
        if event != self.next_event(event.kind, event.body):
            raise LedgerError("would not follow from the last line", line=event.seq)
        try:
            self._write(event)
        except OSError as error:
            with suppress(OSError):
                os.truncate(self.path, self._size)  # what was not kept for certain was not written
            raise RunFailedError(
                f"cannot write {self.path}: {error.strerror}; make room or give access. Nothing was released"
            ) from error
        self._events.append(event)
        self._size += len(event.to_line().encode()) + 1
        return event

    def _write(self, event: Event) -> None:
        """Append one line and wait until the disk has it; cut off a line that a crash left unfinished."""
        new = not self.path.exists()
        with self.path.open("a+b") as handle:
            if handle.tell() < self._size:
                raise RunFailedError(f"{self.path} was cut short while the run went on; put it back as it was")
            handle.seek(self._size)
            if b"\n" in handle.read():
                raise RunFailedError(f"another process wrote to {self.path} at the same time; nothing was released")
            handle.truncate(self._size)
            handle.write(event.to_line().encode() + b"\n")
            handle.flush()
            os.fsync(handle.fileno())
        if new:
            folder = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
