"""What goes wrong on purpose, the same way every time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from fedlearn.config import FaultsConfig
from fedlearn.flower.faults import GROUP_KIND, NEVER_ARRIVES, ORDINARY, Fate
from fedlearn.secagg.server import PHASES
from fedlearn.simulation.devices import SeededDevices, uniform
from fedlearn.sources import SeedTree

__all__ = ["SeededFaults"]

_IDEAL = "ideal"
"""Without masks there is one message, on which clients train: who is lost up to ``mask`` does not answer it."""

_REPLY_LOST = Fate(lost="after")
_CRASHES = Fate(crashes=True)


class SeededFaults:
    """Faults drawn from the run's seed, each for itself, whatever the order of asking.

    Args:
        config: what goes wrong, and how often.
        seeds: where every draw comes from.
        clients: how many clients there are, among whom the Byzantine ones are drawn.
        classes: how many classes the task has, for labels that are turned round; 0: none.
        devices: what says who comes too late, where time is simulated.

    Raises:
        ValueError: some clients are to be Byzantine, and it is not said among how many.
    """

    def __init__(
        self,
        config: FaultsConfig,
        seeds: SeedTree,
        *,
        clients: int = 0,
        classes: int = 0,
        devices: SeededDevices | None = None,
    ) -> None:
        if config.byzantine and clients < 1:
            raise ValueError("say how many clients there are: a share of them is Byzantine")
        self._config, self._seeds, self._classes, self._devices = config, seeds, classes, devices
        self.byzantine = _drawn(config.attackers(clients), clients, seeds)
        """The clients that attack."""
        flips = config.attack == "label-flip"
        self._flipping = self.byzantine if flips else frozenset()
        self._falsifying = frozenset() if flips else self.byzantine
        self._falsified = Fate(attack="scale", factor=-config.factor if config.attack == "sign-flip" else config.factor)
        self._quiet = not any((config.drop, config.crash, config.duplicate, config.nan, config.wrong_shape))
        self._seeds_of = {name: seeds.child(name) for name in ("crash", "duplicate", "nan", "wrong-shape", "moment")}

    def drops(self, group: str, client: int, kind: str) -> bool:
        """Return whether this client never answers a message of this group (``round.attempt``).

        Under secure aggregation a client is lost from one leg on: its messages are ``train.<leg>``.
        """
        return self._lost(group, client, kind) != ""

    def fate(self, group: str, client: int, kind: str) -> Fate:
        """Return what becomes of a message; who says which client it is, is never touched."""
        falsifies = client in self._falsifying and kind == "train"
        if (self._quiet and not falsifies) or not kind.startswith(("train", "evaluate")) or kind == GROUP_KIND:
            return ORDINARY
        if (lost := self._lost(group, client, kind)) == "before":
            return NEVER_ARRIVES
        if self._crashes(group, client, kind):
            return _CRASHES
        if lost:
            return _REPLY_LOST
        found = self._falsified if falsifies else ORDINARY
        for attack, chance in (("wrong-shape", self._config.wrong_shape), ("nan", self._config.nan)):
            if chance and kind == "train" and (drawn := self._uniform(attack, group, client)) < chance:
                found = Fate(attack=attack, where=drawn / chance)  # type: ignore[arg-type]
        if self._config.duplicate and self._uniform("duplicate", group, client, kind) < self._config.duplicate:
            found = replace(found, duplicated=True)
        return found

    def touches(self, group: str, client: int, kind: str) -> bool:
        """Return whether anything but the ordinary happens to a message, or its reply comes too late."""
        if kind == GROUP_KIND:
            return False
        if client in self._flipping or self.fate(group, client, kind) is not ORDINARY:
            return True
        return self._devices is not None and self._devices.is_late(group, client, kind)

    def told(self, client: int) -> Mapping[str, str | float]:
        """Return how many classes there are, to a client that turns its labels round."""
        return {"label-flip": self._classes} if client in self._flipping else {}

    def _uniform(self, purpose: str, *path: str | int) -> float:
        """Return a number in [0, 1) of a purpose, a group, a client."""
        return uniform(self._seeds_of[purpose], *path)

    def _lost(self, group: str, client: int, kind: str) -> str:
        """Return whether a message is lost before it is worked on, its reply after that, or neither."""
        drop = self._config.drop
        if drop == 0.0 or group == "identify":
            return ""
        if not self._seeds.child("drop", group, client).generator().random() < drop:
            return ""
        verb, _, leg = kind.partition(".")
        if verb != "train" or not leg:
            return self._moment(group, client)
        if leg not in (*PHASES, _IDEAL):
            return ""
        gone, now = PHASES.index(self._lost_from(group, client)), PHASES.index("mask" if leg == _IDEAL else leg)
        if gone > now:
            return ""
        return self._moment(group, client) if gone == now else "before"

    def _moment(self, group: str, client: int) -> str:
        """Return when a client that is lost is lost."""
        if self._config.moment != "any":
            return self._config.moment
        return "before" if self._uniform("moment", group, client) < 0.5 else "after"

    def _crashes(self, group: str, client: int, kind: str) -> bool:
        """Return whether a client's process dies of a message: under secure aggregation in one leg."""
        if not self._config.crash:
            return False
        verb, _, leg = kind.partition(".")
        if self._uniform("crash", group, client, verb) >= self._config.crash:
            return False
        if not leg:
            return True
        lost = PHASES.index(self._lost_from(group, client))
        return lost <= PHASES.index("mask") if leg == _IDEAL else leg in PHASES and lost == PHASES.index(leg)

    def _lost_from(self, group: str, client: int) -> str:
        """Return the leg from which on a lost client is silent."""
        if self._config.leg != "any":
            return self._config.leg
        return PHASES[int(self._seeds.child("leg", group, client).generator().integers(len(PHASES)))]


def _drawn(count: int, clients: int, seeds: SeedTree) -> frozenset[int]:
    """Draw so many of the clients."""
    if count == 0:
        return frozenset()
    return frozenset(seeds.child("byzantine").generator().choice(clients, size=count, replace=False).tolist())
