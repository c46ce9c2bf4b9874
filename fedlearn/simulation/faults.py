"""What goes wrong on purpose, the same way every time."""

from __future__ import annotations

from fedlearn.config import FaultsConfig
from fedlearn.sources import SeedTree

__all__ = ["SeededFaults"]


class SeededFaults:
    """Faults drawn from the run's seed, each for itself, whatever the order of asking."""

    def __init__(self, config: FaultsConfig, seeds: SeedTree) -> None:
        self._drop = config.drop
        self._seeds = seeds

    def drops(self, group: str, client: int) -> bool:
        """Return whether this client never answers a message of this group (``round.attempt``)."""
        if self._drop == 0.0 or group == "identify":
            return False
        return bool(self._seeds.child("drop", group, client).generator().random() < self._drop)
