"""How much of a run's privacy is spent, said while it runs: from its ledger, now and then, as reckoning takes time."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path

from fedlearn.config import RunConfig
from fedlearn.federation.journal import earlier_releases
from fedlearn.privacy.accounting import QUICK, epsilon
from fedlearn.privacy.ledger import Event, releases_of
from fedlearn.privacy.releases import Release, read_number

__all__ = ["SpentSoFar"]

_SHARE = 0.05
"""How much of the time may go into reckoning."""


class SpentSoFar:
    """What hiding clients has cost after each round, by the quick accountant: an upper bound, as ``summary.json``'s is.

    It reads what was added to the ledger, decides nothing and writes nothing: what a run may spend, its journal asks.
    Where clients are not hidden, or every client accounts for itself, there is nothing to say.

    Args:
        folder: the run's folder, which may still be empty.
        config: the run.
        now: what time is measured with, in seconds.
    """

    def __init__(self, folder: Path, config: RunConfig, *, now: Callable[[], float] = time.monotonic) -> None:
        self._path, self._config, self._now = folder / "ledger.jsonl", config, now
        self._hides = config.privacy.unit == "client"
        self._releases: list[Release] | None = None
        self._delta = math.nan
        self._read = 0
        self._due_s = -math.inf
        self._said: tuple[int, float] | None = None

    @property
    def budget(self) -> float | None:
        """What may be spent at most, where the scenario says."""
        return self._config.privacy.budget

    def after(self, round_number: int, *, at_any_price: bool = False) -> tuple[int, float] | None:
        """Return a round and epsilon after it: ``round_number``'s, or an earlier one's where reckoning is not due.

        Reckoning (some hundredths of a second) is due when it took at most a twentieth of the time since it last began.

        Args:
            round_number: the round that was just kept.
            at_any_price: reckon whether or not it is due.

        Returns:
            Nothing, where there is no such promise.
        """
        begun_s = self._now()
        if not self._hides or (self._said is not None and self._said[0] == round_number):
            return self._said
        if begun_s < self._due_s and not at_any_price:
            return self._said
        releases = self._so_far()
        spent = epsilon(releases, self._delta, unit="client", interval=QUICK)
        self._said = (round_number, spent)
        self._due_s = begun_s + (self._now() - begun_s) / _SHARE
        return self._said

    def _so_far(self) -> list[Release]:
        """Return every release to date; of the ledger only what was added is read.

        Its chain is not checked: the run does that, and whoever verifies it.
        """
        if self._releases is None:
            self._releases = earlier_releases(self._config)
        with self._path.open("rb") as handle:
            handle.seek(self._read)
            whole = handle.read().rpartition(b"\n")[0]
        if whole:
            self._read += len(whole) + 1
            tables = [json.loads(line) for line in whole.split(b"\n")]
            events = [Event(**{name: each[name] for name in ("seq", "prev", "kind", "body")}) for each in tables]
            for event in events:
                if event.kind == "run.policy":
                    self._delta = read_number(event.body["delta"])
            self._releases += releases_of(events)
        return self._releases
