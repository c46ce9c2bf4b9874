"""The ``[faults]`` section: what a simulation breaks on purpose, on which devices it runs, and who is there when."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from fedlearn.config_reading import check_fields, choice, derive, integer, kebab, number
from fedlearn.errors import ConfigError

__all__ = ["Attack", "Availability", "DeviceKind", "DropMoment", "FaultsConfig", "FaultyLeg"]

Attack = Literal["sign-flip", "scale", "label-flip"]
Availability = Literal["always", "nightly"]
DeviceKind = Literal["none", "phones", "mixed", "silos"]
DropMoment = Literal["before", "after", "any"]
FaultyLeg = Literal["any", "advertise", "share", "mask", "consistent", "unmask"]

_FACTORS = {"sign-flip": 1.0, "scale": 10.0, "label-flip": 1.0}

# The default of a field that ``__post_init__`` fills in: such a field is never None once constructed, which
# is why its type does not say so.
_DERIVED: Any = None


@dataclass(frozen=True, kw_only=True, slots=True)
class FaultsConfig:
    """What a simulation breaks on purpose, and the devices it pretends to run on. Every draw is seeded.

    Probabilities are in [0, 1), each for an invited client in a try of a round, and drawn for themselves. Seconds here
    are those of a simulated clock: nobody waits for them. There is such a clock wherever ``delay``, ``devices`` or
    ``availability`` asks for one; a client that is later on it than ``federation.round-timeout-s`` is left out.

    Attributes:
        drop: the probability that a client does not answer.
        moment: when such a client is lost: ``before`` it does anything; ``after`` it has trained and noted in its own
            ledger what leaves, so that only the reply is lost; ``any``: drawn for each of them.
        leg: from which leg of secure aggregation on such a client is gone; ``any``: drawn for each of them.
        crash: the probability that a client's process dies, before it has done anything.
        delay: the probability that a reply is ``delay_s`` seconds late.
        delay_s: that many seconds.
        duplicate: the probability that a reply arrives twice.
        nan: the probability that a number of an update arrives as NaN.
        wrong_shape: the probability that an update arrives in another shape.
        byzantine: the share of the clients that attack, rounded up to whole ones: the same in every round.
        attack: what they do: send ``−factor`` times their update, send ``factor`` times their update, or train on
            labels turned round (class k of K becomes K − 1 − k).
        factor: see ``attack``; left out: 1 for ``sign-flip``, 10 for ``scale``.
        devices: how fast clients train and how fast their links are: ``none``: in no time; else a profile of
            ``fedlearn.simulation.devices``.
        examples_per_s: how many examples a median phone trains on in a second; it depends on the model, so measure it.
        availability: who is there at which hour: everybody ``always``, or ``nightly`` most at two o'clock local time.
        time_zones: over how many neighbouring time zones the clients are spread.
        start_hour: the hour, in the first of them, at which the run begins.

    Raises:
        ConfigError: with the key's path.
    """

    drop: float = field(default=0.0, metadata=number(minimum=0, below=1))
    moment: DropMoment = field(default="before", metadata=choice(get_args(DropMoment)))
    leg: FaultyLeg = field(default="any", metadata=choice(get_args(FaultyLeg)))
    crash: float = field(default=0.0, metadata=number(minimum=0, below=1))
    delay: float = field(default=0.0, metadata=number(minimum=0, below=1))
    delay_s: float = field(default=60.0, metadata=number(minimum=0))
    duplicate: float = field(default=0.0, metadata=number(minimum=0, below=1))
    nan: float = field(default=0.0, metadata=number(minimum=0, below=1))
    wrong_shape: float = field(default=0.0, metadata=number(minimum=0, below=1))
    byzantine: float = field(default=0.0, metadata=number(minimum=0, below=1))
    attack: Attack = field(default="sign-flip", metadata=choice(get_args(Attack)))
    factor: float = field(default=_DERIVED, metadata=number(above=0))
    devices: DeviceKind = field(default="none", metadata=choice(get_args(DeviceKind)))
    examples_per_s: float = field(default=100.0, metadata=number(above=0))
    availability: Availability = field(default="always", metadata=choice(get_args(Availability)))
    time_zones: int = field(default=4, metadata=integer(minimum=1))
    start_hour: float = field(default=0.0, metadata=number(minimum=0, below=24))

    def __post_init__(self) -> None:
        check_fields(self, "faults")
        derive(self, "factor", _FACTORS[self.attack])
        if self.attack == "label-flip" and self.factor != 1.0:
            raise ConfigError("faults.factor", 'is of "sign-flip" and "scale"; labels are turned round or not')
        if self.time_zones > 24:
            raise ConfigError("faults.time-zones", f"must be at most 24, got {self.time_zones}")
        self._check_useful()

    def _check_useful(self) -> None:
        """Refuse an attack that nobody makes: the model would seem to withstand it."""
        if self.byzantine:
            return
        for key, ordinary in (("attack", "sign-flip"), ("factor", _FACTORS[self.attack])):
            if getattr(self, key) != ordinary:
                reason = "does nothing without faults.byzantine, the share of clients that attack; set that too"
                raise ConfigError(f"faults.{key}", f"{reason}, or leave it out")

    @property
    def asked(self) -> tuple[str, ...]:
        """The keys that are not at their defaults: nothing of what they say happens outside a simulation."""
        ordinary = FaultsConfig()
        return tuple(
            kebab(each.name) for each in fields(self) if getattr(self, each.name) != getattr(ordinary, each.name)
        )

    @property
    def answered(self) -> float:
        """The expected share of requests to which a reply is sent and not lost, of clients that are not late."""
        return (1.0 - self.drop) * (1.0 - self.crash)

    def attackers(self, clients: int) -> int:
        """Return how many of so many clients are Byzantine: the share of them, rounded up to whole ones.

        >>> FaultsConfig(byzantine=0.1).attackers(20), FaultsConfig(byzantine=0.01).attackers(20)
        (2, 1)
        """
        return min(math.ceil(self.byzantine * clients - 1e-9), clients)

    @property
    def timed(self) -> bool:
        """Whether there is a simulated clock."""
        return self.delay > 0 or self.devices != "none" or self.availability != "always"

    @property
    def unmasked(self) -> str | None:
        """The first key that changes a single update on the way, which under secure aggregation nobody can see."""
        tampers = {
            "nan": self.nan > 0,
            "wrong-shape": self.wrong_shape > 0,
            "byzantine": self.byzantine > 0 and self.attack != "label-flip",
        }
        return next((key for key, on in tampers.items() if on), None)
