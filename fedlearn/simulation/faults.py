"""What goes wrong on purpose, the same way every time."""

from __future__ import annotations

from fedlearn.config import FaultsConfig
from fedlearn.secagg.server import PHASES
from fedlearn.sources import SeedTree

__all__ = ["SeededFaults"]

_IDEAL = "ideal"
"""Without masks there is one message, on which clients train: who is lost up to ``mask`` does not answer it."""


class SeededFaults:
    """Faults drawn from the run's seed, each for itself, whatever the order of asking."""

    def __init__(self, config: FaultsConfig, seeds: SeedTree) -> None:
        self._drop, self._leg = config.drop, config.leg
        self._seeds = seeds

    def drops(self, group: str, client: int, kind: str) -> bool:
        """Return whether this client never answers a message of this group (``round.attempt``).

        Under secure aggregation a client is lost from one leg on: its messages are ``train.<leg>``.
        """
        if self._drop == 0.0 or group == "identify":
            return False
        if not self._seeds.child("drop", group, client).generator().random() < self._drop:
            return False
        verb, _, leg = kind.partition(".")
        if verb != "train" or not leg:
            return True
        if leg not in (*PHASES, _IDEAL):
            return False
        return PHASES.index(self._lost_from(group, client)) <= PHASES.index("mask" if leg == _IDEAL else leg)

    def _lost_from(self, group: str, client: int) -> str:
        """Return the leg from which on a lost client is silent."""
        if self._leg != "any":
            return self._leg
        return PHASES[int(self._seeds.child("leg", group, client).generator().integers(len(PHASES)))]
