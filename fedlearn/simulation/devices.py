"""How fast clients train and how fast their links are, on a simulated clock.

A client takes download / downlink + examples · passes / speed + upload / uplink seconds, and a delay if one is drawn.
Each device is drawn for itself from the run's seed, the same in every round; nothing is kept for those nobody asks.

Where the figures come from. Links of phones and of homes: the world's averages in Ookla's Speedtest Global Index of
September 2020, 35.96 down and 11.22 up over mobile networks, 85.73 and 45.74 over fixed ones, in Mbit/s. That devices
differ by an order of magnitude, in speed and in link: Lai et al., "Oort", OSDI 2021, of phones; here nine
in ten phones lie within a factor of ten (log-normal). The rest is assumed: what speed a phone has depends on the model
and is ``faults.examples-per-s``; a home computer is five times and a server fifty times as fast; a silo's link has 1
Gbit/s; evaluating an example takes a third of training on it, which is a forward pass to a forward and a backward one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

from fedlearn.config import FaultsConfig, TrainingConfig
from fedlearn.flower.faults import SimulatedClock
from fedlearn.simulation.availability import Nightly
from fedlearn.sources import SeedTree

__all__ = ["PROFILES", "Device", "SeededDevices", "Tier", "uniform", "worked_examples"]

_MBIT = 1e6 / 8
_TENFOLD = 0.7
"""ln(10) / (2 · 1.645): with this standard deviation of its logarithm, nine in ten lie within a factor of ten."""

_TRAINS = ("train", "train.mask", "train.ideal")
_REMEMBERED = 1 << 16
_FORWARD = 1 / 3


@dataclass(frozen=True, kw_only=True)
class Tier:
    """One kind of device: medians, and how much single ones differ.

    Attributes:
        share: how many of all devices are of this kind.
        speed: its median speed, in those of a median phone.
        downlink_bytes_per_s: its median link to the client.
        uplink_bytes_per_s: its median link to the server.
        spread: the standard deviation of the logarithm of its speed and, drawn for itself, of its link.
    """

    share: float
    speed: float
    downlink_bytes_per_s: float
    uplink_bytes_per_s: float
    spread: float


def _phones(share: float) -> Tier:
    """Return phones on mobile networks."""
    link = (35.96 * _MBIT, 11.22 * _MBIT)
    return Tier(share=share, speed=1.0, downlink_bytes_per_s=link[0], uplink_bytes_per_s=link[1], spread=_TENFOLD)


def _homes(share: float) -> Tier:
    """Return computers on fixed lines."""
    link = (85.73 * _MBIT, 45.74 * _MBIT)
    return Tier(share=share, speed=5.0, downlink_bytes_per_s=link[0], uplink_bytes_per_s=link[1], spread=_TENFOLD / 2)


def _silos(share: float) -> Tier:
    """Return servers of organisations, all alike."""
    gigabit = 1000 * _MBIT
    return Tier(share=share, speed=50.0, downlink_bytes_per_s=gigabit, uplink_bytes_per_s=gigabit, spread=0.0)


PROFILES: Mapping[str, Sequence[Tier]] = {
    "phones": (_phones(1.0),),
    "mixed": (_phones(0.6), _homes(0.3), _silos(0.1)),
    "silos": (_silos(1.0),),
}
"""What ``faults.devices`` may be, besides ``none``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """One client's device: examples trained on in a second, and bytes a second to it and from it."""

    examples_per_s: float
    downlink_bytes_per_s: float
    uplink_bytes_per_s: float


def uniform(seeds: SeedTree, *path: str | int) -> float:
    """Return a number in [0, 1) of one node of the tree: for a single draw, a generator would take ten times as long.

    >>> 0.0 <= uniform(SeedTree.root(0), "drop", 3) < 1.0
    True
    """
    return (seeds.child(*path).integer() >> 10) / 2**53


def worked_examples(size: int, training: TrainingConfig) -> int:
    """Return how many examples a client with ``size`` of them works through in a round, each pass counted.

    >>> worked_examples(25, TrainingConfig(local_epochs=2)), worked_examples(25, TrainingConfig(local_steps=3))
    (50, 48)
    """
    if training.local_steps is not None:
        return training.local_steps * min(training.batch_size or size, size)
    return (training.local_epochs or 1) * size


class SeededDevices:
    """The devices of a simulation, who of them is there, and its clock.

    Args:
        config: which devices, how often replies are delayed, and when clients are there.
        seeds: where every draw comes from.
        training: how many examples a client works through.
        model_bytes: how long the model is, and an update, in bytes.
        deadline_s: how long a client has to answer.
        size_of: how many examples a client trains on (``train``) or tests on (``test``).
        clients: how many there are.
        cohort: how many have to be there before any is asked.
    """

    def __init__(
        self,
        config: FaultsConfig,
        seeds: SeedTree,
        *,
        training: TrainingConfig,
        model_bytes: int,
        deadline_s: float,
        size_of: Callable[[int, str], int],
        clients: int,
        cohort: int,
    ) -> None:
        self._config, self._training = config, training
        self._model_bytes, self._deadline_s, self._clients = model_bytes, deadline_s, clients
        self._clock = SimulatedClock()
        self._tiers = PROFILES.get(config.devices, ())
        self._seeds, self._delays = seeds.child("device"), seeds.child("delay")
        self._size_of = lru_cache(maxsize=_REMEMBERED)(size_of)
        self.device = lru_cache(maxsize=_REMEMBERED)(self._draw)
        """Return the device of a client, or ``None`` where devices take no time."""
        self._rhythm = None
        if config.availability == "nightly":
            self._rhythm = Nightly(
                seeds.child("available"),
                self._clock,
                clients=clients,
                cohort=cohort,
                time_zones=config.time_zones,
                start_hour=config.start_hour,
            )

    @property
    def clock(self) -> SimulatedClock:
        """The simulated clock."""
        return self._clock

    def duration_s(self, group: str, client: int, kind: str, *, download_bytes: int, upload_bytes: int) -> float:
        """Return how long a client takes from when a message is sent until its reply is there, in simulated seconds.

        Args:
            group: ``round.attempt``; a delay is drawn for each.
            client: whose device it is.
            kind: the message's type: on ``train`` it trains, on ``evaluate`` it tests; who it is it says at once.
            download_bytes: the model, and what else makes the message long.
            upload_bytes: the same of the reply.
        """
        if not kind.startswith(("train", "evaluate")):  # a client says who it is in no time
            return 0.0
        took_s, device = self._delay_s(group, client, kind), self.device(client)
        if device is None:
            return took_s
        if kind in _TRAINS:
            took_s += worked_examples(self._size_of(client, "train"), self._training) / device.examples_per_s
        elif kind == "evaluate":
            took_s += _FORWARD * self._size_of(client, "test") / device.examples_per_s
        return took_s + download_bytes / device.downlink_bytes_per_s + upload_bytes / device.uplink_bytes_per_s

    def is_late(self, group: str, client: int, kind: str) -> bool:
        """Return whether a client would answer ``train`` later than it may: known before it trains."""
        if kind != "train":
            return False
        size = self._model_bytes
        return self.duration_s(group, client, kind, download_bytes=size, upload_bytes=size) > self._deadline_s

    def present(self) -> Sequence[int]:
        """Return the clients that are there, ascending; where they are too few, the clock moves on until they are not.

        Who is there is asked when a cohort is drawn: whoever has begun a round stays to its end.

        Raises:
            TooFewClientsError: there are too few at every hour of a week.
        """
        return range(self._clients) if self._rhythm is None else self._rhythm.present()

    def _delay_s(self, group: str, client: int, kind: str) -> float:
        """Return how much later than its device would have it a reply is."""
        config = self._config
        delayed = config.delay > 0 and uniform(self._delays, group, client, kind) < config.delay
        return config.delay_s if delayed else 0.0

    def _draw(self, client: int) -> Device | None:
        """Draw one client's device."""
        if not self._tiers:
            return None
        seeds, last = self._seeds.child(client), self._tiers[-1]
        drawn, tier = uniform(seeds, "tier"), last
        for each in self._tiers:
            if drawn < each.share:
                tier = each
                break
            drawn -= each.share
        link = _lognormal(tier.spread, uniform(seeds, "link"))
        return Device(
            examples_per_s=self._config.examples_per_s * tier.speed * _lognormal(tier.spread, uniform(seeds, "speed")),
            downlink_bytes_per_s=tier.downlink_bytes_per_s * link,
            uplink_bytes_per_s=tier.uplink_bytes_per_s * link,
        )


def _lognormal(spread: float, drawn: float) -> float:
    """Return a log-normal number of median 1 at a quantile."""
    return math.exp(NormalDist().inv_cdf(min(max(drawn, 1e-12), 1 - 1e-12)) * spread)
