"""Whoever watches a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

__all__ = ["Observer", "Observers", "SilentObserver"]


class Observer(Protocol):
    """Whoever watches a run."""

    def replied(self, round_number: int, done: int, total: int) -> None:
        """``done`` of ``total`` clients are accounted for: one more than before, or dozens, where they answer as one.

        A round may count up more than once: when it is tried again, and when clients measure the model.
        """

    def finished_round(self, line: Mapping[str, Any]) -> None:
        """A round is done and kept; ``line`` is its line of ``metrics.jsonl``.

        Of an observer that has ``reads_folder = False``, a simulation may keep the round a moment later, while the
        clients of the next one work.
        """


class SilentObserver:
    """Watches and says nothing."""

    def replied(self, round_number: int, done: int, total: int) -> None:
        """Do nothing."""

    def finished_round(self, line: Mapping[str, Any]) -> None:
        """Do nothing."""


class Observers:
    """Several observers as one; each is told in the order given."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers
        self.reads_folder = any(getattr(each, "reads_folder", True) for each in observers)

    def replied(self, round_number: int, done: int, total: int) -> None:
        """Tell each."""
        for each in self._observers:
            each.replied(round_number, done, total)

    def finished_round(self, line: Mapping[str, Any]) -> None:
        """Tell each."""
        for each in self._observers:
            each.finished_round(line)
