"""The ``[secagg]`` section: what the server sees of a client, and what goes with it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from fedlearn.config_reading import check_fields, choice, number
from fedlearn.errors import ConfigError

__all__ = ["SecaggConfig", "SecaggMode", "SecaggSuite"]

SecaggMode = Literal["off", "ideal", "semi-honest", "active"]
SecaggSuite = Literal["aes-256-ctr", "chacha20"]

LEAST_COHORT = 3
"""Of two clients, each learns the other's update from the sum, whatever masks it."""

MOST_ROUND_S = 86_000
"""The longest round: with some time to spare, devices take no offer for more than a day."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SecaggConfig:
    """Whether the server sees single updates, or their sum alone.

    Attributes:
        mode: ``off``: it sees every update; ``semi-honest``: masks withstand a server that keeps to the protocol;
            ``active``: one that lies, too; ``ideal``, for simulations: the same sum to the last bit, without masks. (It
            does not simulate that a round is given up because too many are lost after they sent their vectors.)
        bits: the width of a masked value: 21 (2.67 bytes), 16 for few clients or little precision, 32 for much.
        bound_l2: the norm to which an update is clipped, so that no sum of them can overflow; with noise that hides
            clients ``privacy.bound-l2`` takes its place. The clipped ones are counted: raise it if there are any.
        colluding: γ, the share of a cohort that may collude with the server; below a third.
        dropping: δ, the share of a cohort of more than 128 that may be lost; its graph is made for that. A smaller
            cohort can lose a third.
        suite: the cipher that expands a mask; the second is for processors without AES instructions.

    Raises:
        ConfigError: with the key's path.
    """

    mode: SecaggMode = field(default="off", metadata=choice(get_args(SecaggMode)))
    bits: int = field(default=21, metadata=choice((16, 21, 32)))
    bound_l2: float = field(default=10.0, metadata=number(minimum=1e-20, below=1e20))
    colluding: float = field(default=0.33, metadata=number(minimum=0, below=1))
    dropping: float = field(default=0.1, metadata=number(minimum=0, below=1))
    suite: SecaggSuite = field(default="aes-256-ctr", metadata=choice(get_args(SecaggSuite)))

    def __post_init__(self) -> None:
        check_fields(self, "secagg")
        if self.colluding > 1 / 3:
            reason = f"must be at most a third, got {self.colluding:g}: from there on no threshold keeps them out"
            raise ConfigError("secagg.colluding", reason)
        if self.dropping >= 0.5:
            raise ConfigError("secagg.dropping", f"must be below a half, got {self.dropping:g}")

    @property
    def masks(self) -> bool:
        """Whether updates are really masked."""
        return self.mode in ("semi-honest", "active")
