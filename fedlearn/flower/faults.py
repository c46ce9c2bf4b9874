"""What a ``LocalGrid`` asks of whoever simulates faults and devices: the words that the two share.

``fedlearn.simulation`` draws them from the run's seed; a test may say them itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from fedlearn.sources import ManualClock

__all__ = ["GROUP_KIND", "NEVER_ARRIVES", "ORDINARY", "Devices", "Fate", "Faults", "NoFaults", "SimulatedClock"]

GROUP_KIND = "train.group"
"""The type of a message to many clients at once, for all of whom nothing but the ordinary happens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fate:
    """What becomes of one message, and of the reply to it.

    Attributes:
        lost: ``before``: nobody ever works on the message; ``after``: its client works, keeps what it keeps, and the
            reply is lost; empty: neither.
        crashes: the client's process dies before it has worked.
        attack: what happens to the arrays in the reply: one number becomes ``nan``, the ``wrong-shape`` arrives, or all
            numbers are multiplied by ``factor`` (``scale``); empty: nothing.
        factor: see ``attack``.
        where: in [0, 1): which number becomes NaN, or which wrong shape it is.
        duplicated: the reply arrives twice.
    """

    lost: Literal["", "before", "after"] = ""
    crashes: bool = False
    attack: Literal["", "nan", "wrong-shape", "scale"] = ""
    factor: float = 1.0
    where: float = 0.0
    duplicated: bool = False


ORDINARY = Fate()
"""The message arrives, is worked on, and its reply arrives once and as it was sent."""

NEVER_ARRIVES = Fate(lost="before")
"""Nobody ever works on the message."""


class Faults(Protocol):
    """What goes wrong, decided for each message by its group (``round.attempt``), client and type (``train``, …)."""

    def fate(self, group: str, client: int, kind: str) -> Fate:
        """Return what becomes of this message; the same however often and in whatever order it is asked."""
        ...

    def touches(self, group: str, client: int, kind: str) -> bool:
        """Return whether anything but the ordinary happens to this message, or its reply comes too late."""
        ...

    def told(self, client: int) -> Mapping[str, str | float]:
        """Return what this client's node configuration says beside the rest."""
        ...


class NoFaults:
    """Nothing goes wrong; what extends it may lose messages by ``drops`` alone."""

    def drops(self, group: str, client: int, kind: str) -> bool:
        """Return whether the client never answers this message."""
        return False

    def fate(self, group: str, client: int, kind: str) -> Fate:
        """Return that a message arrives unless it is dropped."""
        return NEVER_ARRIVES if self.drops(group, client, kind) else ORDINARY

    def touches(self, group: str, client: int, kind: str) -> bool:
        """Return whether anything but the ordinary happens to this message."""
        return kind != GROUP_KIND and self.fate(group, client, kind) is not ORDINARY

    def told(self, client: int) -> Mapping[str, str | float]:
        """Return nothing."""
        return {}


class SimulatedClock(ManualClock):
    """Seconds since a simulation began; they pass when somebody says so.

    >>> clock = SimulatedClock()
    >>> clock.reach(90.0)
    >>> clock.reach(60.0)
    >>> clock.monotonic()
    90.0
    """

    def reach(self, at_s: float) -> None:
        """Let it be ``at_s``, unless it is later already."""
        self._now_s = max(self._now_s, at_s)


class Devices(Protocol):
    """How long clients take and who of them is there, on a simulated clock."""

    @property
    def clock(self) -> SimulatedClock:
        """The simulated clock."""
        ...

    def duration_s(self, group: str, client: int, kind: str, *, download_bytes: int, upload_bytes: int) -> float:
        """Return how long a client takes from when a message is sent until its reply is there."""
        ...

    def present(self) -> Sequence[int]:
        """Return the clients that are there, ascending; where they are too few, the clock moves on until they are not.

        Raises:
            TooFewClientsError: there are too few at every hour.
        """
        ...
