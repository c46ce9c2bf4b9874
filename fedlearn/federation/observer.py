"""Whoever watches a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

__all__ = ["Observer", "SilentObserver"]


class Observer(Protocol):
    """Whoever watches a run."""

    def replied(self, round_number: int, done: int, total: int) -> None:
        """One more of ``total`` clients is accounted for."""

    def finished_round(self, line: Mapping[str, Any]) -> None:
        """A round is done and kept; ``line`` is its line of ``metrics.jsonl``."""


class SilentObserver:
    """Watches and says nothing."""

    def replied(self, round_number: int, done: int, total: int) -> None:
        """Do nothing."""

    def finished_round(self, line: Mapping[str, Any]) -> None:
        """Do nothing."""
