"""What a client accepts whatever the server says: floors, and the numbers they are compared with."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedlearn.secagg.errors import DeadlineError, PolicyViolationError, UnsupportedSuiteError
from fedlearn.secagg.messages import MODES, Mode, Offer
from fedlearn.secagg.prg import SUITES

__all__ = ["MOST_CLIENTS", "ClientPolicy"]

MOST_CLIENTS = 1 << 16
"""The largest cohort: every client is told of all the others, in 224 bytes each."""

_LEAST_COHORT = 3
"""Of two clients, each learns the other's vector from the sum, whatever masks it."""

_MOST_COLLUDING = 1 / 3
"""From a third on, the threshold on the complete graph no longer keeps colluders from both of a client's secrets."""


@dataclass(frozen=True, kw_only=True)
class ClientPolicy:
    """A data owner's own floors, checked against every offer.

    Attributes:
        modes: what may be offered; without ``active`` a lying server can show clients different lists of survivors.
        suites: which ciphers.
        least_cohort: clients that must take part, at least 3.
        least_survivors: vectors that must be in a sum.
        least_honest: survivors that are left when all that may collude did: at least 2, or the sum is one's own.
        least_colluding: γ that must be provided for at least: below it, a sparse graph keeps nobody's colluders out.
        least_noise_multiplier: σ/Δ₂ of the noise in the sum that honest survivors' shares make up at least.
        longest_s: how far away a deadline may lie, in seconds.
        most_sessions: how often the device takes part at all; ``None``: as often as it is asked.
    """

    modes: tuple[Mode, ...] = MODES
    suites: tuple[int, ...] = tuple(SUITES)
    least_cohort: int = _LEAST_COHORT
    least_survivors: int = _LEAST_COHORT
    least_honest: int = 2
    least_colluding: float = 0.1
    least_noise_multiplier: float = 0.0
    longest_s: float = 86_400.0
    most_sessions: int | None = None

    def __post_init__(self) -> None:
        if self.least_cohort < _LEAST_COHORT or self.least_survivors < _LEAST_COHORT or self.least_honest < 1:
            raise ValueError(f"a cohort, and its survivors, are at least {_LEAST_COHORT}, one of them honest")

    def check(self, offer: Offer, *, now_s: float) -> None:
        """Raise unless the offer is within the floors.

        Raises:
            UnsupportedSuiteError: a cipher or mode that is not there, or not permitted.
            PolicyViolationError: below a floor, or a lane could overflow.
            DeadlineError: the deadline has passed, or is too far away, by this device's clock.
        """
        if offer.suite not in SUITES or offer.suite not in self.suites:
            raise UnsupportedSuiteError(f"suite {offer.suite} is not among {self.suites}")
        if offer.mode not in self.modes:
            raise UnsupportedSuiteError(f"mode {offer.mode!r} is not among {self.modes}")
        left_s = offer.deadline_s - now_s
        if not 0 < left_s <= self.longest_s:
            raise DeadlineError(
                f"the offer ends in {left_s:.0f} s by this device's clock; 0 to {self.longest_s:g} s is permitted. "
                "Check the device's clock"
            )
        self._check_counts(offer)
        offer.encoding.check()
        multiplier = _noise_multiplier(offer)
        if multiplier < self.least_noise_multiplier:
            raise PolicyViolationError(
                f"the noise is {multiplier:.4g} times the sensitivity; this device's owner asks for "
                f"{self.least_noise_multiplier:g}"
            )

    def _check_counts(self, offer: Offer) -> None:
        """Raise unless enough clients take part, stay, and are honest."""
        if not self.least_colluding <= offer.colluding <= _MOST_COLLUDING or not 0 <= offer.dropping < 0.5:
            raise PolicyViolationError(
                f"the offer holds for shares of {offer.colluding:g} colluding and {offer.dropping:g} lost clients; "
                f"{self.least_colluding:g} to 1/3, and less than half, are permitted"
            )
        if offer.cohort > MOST_CLIENTS:
            raise PolicyViolationError(f"a roster holds {MOST_CLIENTS:,} clients, not {offer.cohort:,}")
        cohort = max(self.least_cohort, offer.least_cohort)
        _at_least("cohort", offer.cohort, cohort)
        _at_least("least cohort", offer.least_cohort, self.least_cohort)
        _at_least("least survivors", offer.least_survivors, self.least_survivors)
        _at_least("least honest survivors", offer.assured, self.least_honest)
        if offer.encoding.clients < offer.cohort:
            raise PolicyViolationError(
                f"lanes are made for {offer.encoding.clients} clients, and {offer.cohort} were invited"
            )


def _at_least(name: str, value: int, floor: int) -> None:
    """Raise where a number of the offer is below a floor."""
    if value < floor:
        raise PolicyViolationError(f"the {name} is {value}; this device's owner asks for {floor}")


def _noise_multiplier(offer: Offer) -> float:
    """Return σ/Δ₂ of the noise that honest survivors certainly add together."""
    if not offer.encoding.noise_variance:
        return 0.0
    _, sensitivity_l2 = offer.encoding.sensitivity
    return math.sqrt(max(offer.assured, 0) * offer.encoding.noise_variance) / sensitivity_l2
