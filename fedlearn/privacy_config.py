"""The ``[privacy]`` section: what a run promises about the people in the data, and what of it can be kept."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from fedlearn.config_reading import boolean, check_fields, choice, derive, integer, number, number_or_word, text
from fedlearn.errors import ConfigError

__all__ = ["Amplification", "GradSampleMode", "Mechanism", "PrivacyConfig", "PrivacyUnit", "Trust"]

Amplification = Literal["auto", "poisson", "none"]
GradSampleMode = Literal["hooks", "functorch", "ghost"]
Mechanism = Literal["gaussian", "dp-ftrl", "skellam"]
PrivacyUnit = Literal["none", "example", "client"]
Trust = Literal["local", "central", "distributed"]

_DERIVED: Any = None
_TRUST: dict[PrivacyUnit, Trust] = {"none": "central", "example": "local", "client": "central"}


@dataclass(frozen=True, kw_only=True, slots=True)
class PrivacyConfig:
    """What the run promises about the people in the data.

    One number is enough beside ``unit``: ``target_epsilon``, from which the noise follows, or ``noise_multiplier``.

    Attributes:
        unit: whose presence is hidden: nobody's, each example's of a client, or each client's with all it holds.
        trust: who may see an update before noise is added; left out: ``local`` for ``example`` (nobody but the client),
            ``central`` for ``client`` (the server). ``distributed``: nobody; each client adds a share of the noise, and
            secure aggregation lets the server see the sum alone.
        target_epsilon: what the whole run may cost; the noise follows.
        noise_multiplier: σ/bound, instead of ``target_epsilon``.
        max_epsilon: a budget that no release may exceed, whatever was planned; the run (under ``client``) or the client
            (under ``example``) stops before. Left out: ``target_epsilon``.
        delta: in (0, 1/N), or ``auto``: N^(-1.1) for N clients, or N examples of one client.
        bound_l2: the clipping norm of an update, or under ``example`` of an example's gradient.
        adaptive_clipping: whether the clipping norm follows the median of the updates' norms; its count is accounted.
        mechanism: what noise is added: ``gaussian``, fresh in every round, ``dp-ftrl``, correlated over rounds, or
            ``skellam``, whole numbers whose shares add up: that of ``distributed`` trust, and of no other.
        amplification: whether the secrecy of a Poisson draw is claimed; ``auto``: where the cohort is drawn that way.
        min_separation: rounds from one participation of a client to its next, at least, under ``dp-ftrl``; left out:
            as many as the clients allow.
        grad_sample_mode: how the gradient of each example is computed: by ``torch.func`` (``functorch``, for most
            models), or by Opacus' hooks or ghost clipping.
        earlier_ledgers: ledgers (or run folders) of earlier runs on the same clients, separated by commas; what they
            spent counts.

    Raises:
        ConfigError: with the key's path.
    """

    unit: PrivacyUnit = field(default="none", metadata=choice(get_args(PrivacyUnit)))
    trust: Trust = field(default=_DERIVED, metadata=choice(get_args(Trust)))
    target_epsilon: float | None = field(default=None, metadata=number(above=0))
    noise_multiplier: float | None = field(default=None, metadata=number(above=0))
    max_epsilon: float | None = field(default=None, metadata=number(above=0))
    delta: float | Literal["auto"] = field(default="auto", metadata=number_or_word("auto", above=0, below=1))
    bound_l2: float = field(default=1.0, metadata=number(minimum=1e-20, below=1e20))
    adaptive_clipping: bool = field(default=False, metadata=boolean())
    mechanism: Mechanism = field(default=_DERIVED, metadata=choice(get_args(Mechanism)))
    amplification: Amplification = field(default="auto", metadata=choice(get_args(Amplification)))
    min_separation: int | None = field(default=None, metadata=integer(minimum=1))
    grad_sample_mode: GradSampleMode = field(default="functorch", metadata=choice(get_args(GradSampleMode)))
    earlier_ledgers: str | None = field(default=None, metadata=text())

    def __post_init__(self) -> None:
        check_fields(self, "privacy")
        derive(self, "trust", _TRUST[self.unit])
        derive(self, "mechanism", "skellam" if self.trust == "distributed" else "gaussian")
        if self.target_epsilon is not None and self.noise_multiplier is not None:
            reason = "only one of target-epsilon and noise-multiplier may be set; max-epsilon is a budget beside either"
            raise ConfigError("privacy.noise-multiplier", reason)
        if self.max_epsilon is not None and self.target_epsilon is not None and self.target_epsilon > self.max_epsilon:
            reason = f"is above max-epsilon ({self.max_epsilon:g}), so the run would end before it is done; lower it"
            raise ConfigError("privacy.target-epsilon", reason)
        if self.unit != "none":
            self._check_promise()

    @property
    def budget(self) -> float | None:
        """The epsilon that no release may bring the total above, or ``None``: no limit."""
        return self.max_epsilon if self.max_epsilon is not None else self.target_epsilon

    def _check_promise(self) -> None:
        """Raise where what is asked for cannot be kept."""
        if self.target_epsilon is None and self.noise_multiplier is None:
            reason = "set the epsilon you can live with, such as privacy.target-epsilon=8 (or privacy.noise-multiplier)"
            raise ConfigError("privacy.target-epsilon", reason)
        distributed = self.unit == "client" and self.trust == "distributed"
        if self.trust != _TRUST[self.unit] and not distributed:
            reason = f'"{self.trust}" does not go with unit "{self.unit}", whose noise comes from '
            reason += "each client" if self.unit == "example" else "the server"
            raise ConfigError("privacy.trust", f'{reason}: set "{_TRUST[self.unit]}", or leave it out')
        if distributed:
            self._check_distributed()
        elif self.mechanism == "skellam":
            reason = '"skellam" is the noise that clients add themselves: set privacy.unit = "client" and trust = '
            raise ConfigError("privacy.mechanism", f'{reason}"distributed", or leave the mechanism out')
        if self.min_separation is not None and self.mechanism != "dp-ftrl":
            raise ConfigError("privacy.min-separation", 'is for mechanism "dp-ftrl"; leave it out')
        if self.unit == "example":
            self._check_example()
        elif self.adaptive_clipping and self.mechanism == "dp-ftrl":
            reason = "does not go with dp-ftrl, whose rounds are one mechanism with one clipping norm"
            raise ConfigError("privacy.adaptive-clipping", f"{reason}; set one of the two")

    def _check_distributed(self) -> None:
        """Raise for what clients that add their own noise cannot do."""
        if self.mechanism != "skellam":
            reason = f'must be "skellam" under trust "distributed", not "{self.mechanism}"; leave it out'
            raise ConfigError("privacy.mechanism", reason)
        if self.adaptive_clipping:
            reason = 'needs a server that adds noise to a count; under trust "distributed" the bound is fixed'
            raise ConfigError("privacy.adaptive-clipping", reason)
        if self.amplification == "poisson":
            reason = (
                'cannot be claimed under trust "distributed": the server, against which it protects, knows the draw'
            )
            raise ConfigError("privacy.amplification", f"{reason}; leave it out")

    def _check_example(self) -> None:
        """Raise for keys that have no meaning where each client adds its own noise."""
        if self.earlier_ledgers is not None:
            reason = 'is for unit "client"; under "example" every client\'s own ledger holds its earlier runs'
            raise ConfigError("privacy.earlier-ledgers", f"{reason}; leave it out")
        if self.mechanism != "gaussian":
            raise ConfigError("privacy.mechanism", 'is for unit "client"; under "example" only "gaussian" runs')
        if self.adaptive_clipping:
            raise ConfigError("privacy.adaptive-clipping", 'is for unit "client"; under "example" the bound is fixed')
        if self.amplification == "poisson":
            reason = 'is about cohorts, for unit "client"; under "example" every client draws Poisson batches anyway'
            raise ConfigError("privacy.amplification", f"{reason}; leave it out")
