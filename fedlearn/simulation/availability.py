"""Who is there at which hour: phones train at night, when they are idle, charging and on a network without a meter."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedlearn.errors import TooFewClientsError
from fedlearn.flower.faults import SimulatedClock
from fedlearn.sources import SeedTree

__all__ = ["Nightly", "share_at"]

_HOUR_S = 3600.0
_WEEK_H = 7 * 24
_PEAK_HOUR = 2.0
_PEAK = 0.8
_LOW = 0.25


def share_at(hour: float) -> float:
    """Return which share of the clients is there at an hour of their local day, in [0, 24).

    A cosine between its highest at two at night and a quarter of that at two in the afternoon. That factor of four
    between high and low is what Bonawitz et al. saw of a population in one country; that at best four in five are there
    is assumed.

    Reference: Bonawitz et al., "Towards Federated Learning at Scale", SysML 2019, arXiv:1902.01046.

    >>> share_at(2.0), share_at(14.0)
    (0.8, 0.2)
    """
    wave = (1 + np.cos(2 * np.pi * (hour - _PEAK_HOUR) / 24)) / 2
    return float(_PEAK * (_LOW + (1 - _LOW) * wave))


class Nightly:
    """Clients that come and go with the hour of their own time zone; drawn for every client and hour of the clock.

    Args:
        seeds: where every draw comes from.
        clock: the simulated clock.
        clients: how many there are.
        cohort: how many have to be there.
        time_zones: over how many neighbouring time zones they are spread evenly, each drawn for itself.
        start_hour: the hour in the first time zone when the clock shows 0.
    """

    def __init__(
        self,
        seeds: SeedTree,
        clock: SimulatedClock,
        *,
        clients: int,
        cohort: int,
        time_zones: int,
        start_hour: float,
    ) -> None:
        self._seeds, self._clock, self._clients, self._cohort = seeds, clock, clients, cohort
        self._start_hour = start_hour
        zones = seeds.child("zone").generator().integers(time_zones, size=clients)
        self._zones = zones.astype(np.int8)
        self._seen: tuple[int, Sequence[int]] = (-1, ())

    def present(self) -> Sequence[int]:
        """Return the clients that are there, ascending; the clock moves on, hour by hour, until they are enough.

        Raises:
            TooFewClientsError: they are too few at every hour of a week.
        """
        first = int(self._clock.monotonic() // _HOUR_S)
        most = 0
        for hour in range(first, first + _WEEK_H):
            there = self.at(hour)
            if len(there) >= self._cohort:
                if hour > first:
                    self._clock.reach(hour * _HOUR_S)
                return there
            most = max(most, len(there))
        raise TooFewClientsError(
            f"of {self._clients:,} clients at most {most:,} are there at any hour of a simulated week; a cohort of "
            f"{self._cohort:,} is needed. Lower federation.cohort, or leave faults.availability out"
        )

    def at(self, hour: int) -> Sequence[int]:
        """Return the clients that are there in one hour of the clock, ascending; its memory is that of this hour."""
        if self._seen[0] != hour:
            shares = np.array([share_at((self._start_hour + hour + zone) % 24) for zone in range(24)])
            drawn = self._seeds.child("hour", hour).generator().random(self._clients)
            self._seen = hour, np.flatnonzero(drawn < shares[self._zones]).tolist()
        return self._seen[1]
