"""One run's configuration: frozen, complete, and checked before anything runs.

::

    RunConfig
    ├── task, seed
    ├── federation: FederationConfig     who takes part, how often, how long to wait
    ├── data: DataConfig                 how a simulation splits the data
    ├── training: TrainingConfig         the algorithm and its numbers
    ├── privacy: PrivacyConfig           what is promised, to whom, against whom (privacy_config.py)
    ├── secagg: SecaggConfig             what the server sees of a client (secagg_config.py)
    ├── simulation: SimulationConfig     speed; of the result, the rounding alone
    └── faults: FaultsConfig             what a simulation breaks on purpose (faults_config.py)

TOML keys are the field names in kebab-case. A configuration that exists is valid: each class checks itself
on construction and fills in what follows from the rest (``cohort``, ``min_respondents``, ``local_epochs``).
What this version cannot do is refused, never ignored.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal, Self, get_args

from fedlearn.config_reading import (
    Options,
    Scalar,
    check_fields,
    choice,
    derive,
    integer,
    number,
    option_table,
    read_table,
    section,
    text,
    write_table,
)
from fedlearn.errors import ConfigError
from fedlearn.faults_config import Attack, Availability, DeviceKind, DropMoment, FaultsConfig, FaultyLeg
from fedlearn.privacy_config import Amplification, GradSampleMode, Mechanism, PrivacyConfig, PrivacyUnit, Trust
from fedlearn.secagg_config import LEAST_COHORT, MOST_ROUND_S, SecaggConfig, SecaggMode, SecaggSuite

__all__ = [
    "Amplification",
    "Attack",
    "Availability",
    "DataConfig",
    "DeviceKind",
    "DropMoment",
    "Engine",
    "Evaluation",
    "FaultsConfig",
    "FaultyLeg",
    "FederationConfig",
    "GradSampleMode",
    "Mechanism",
    "Partition",
    "PrivacyConfig",
    "PrivacyUnit",
    "RunConfig",
    "Sampling",
    "SecaggConfig",
    "SecaggMode",
    "SecaggSuite",
    "SimulationConfig",
    "Trainer",
    "TrainingConfig",
    "Trust",
    "Weighting",
]

Engine = Literal["local", "flower"]
Trainer = Literal["auto", "sequential", "vmap", "stacked"]
Evaluation = Literal["auto", "central", "federated", "both", "off"]
Partition = Literal["iid", "dirichlet", "shards", "natural", "quantity"]
Sampling = Literal["auto", "fixed-size", "poisson", "separated"]
Weighting = Literal["auto", "uniform", "examples"]

_UNCAPPED = 10_000
"""The default of ``training.max_examples``: far above what most clients hold."""

# The default of a field that ``__post_init__`` fills in: such a field is never None once constructed, which
# is why its type does not say so.
_DERIVED: Any = None


@dataclass(frozen=True, kw_only=True, slots=True)
class FederationConfig:
    """Who takes part, how often, and how long the server waits.

    Attributes:
        clients: parties that hold data.
        cohort: clients invited to a round, at most ``clients``, under ``poisson`` on average; left out: all of them.
        rounds: rounds to run.
        sampling: how a cohort is drawn: so many without replacement (``fixed-size``), or where clients are hidden each
            for itself with probability cohort/clients (``poisson``), or from those that have not taken part for
            ``privacy.min-separation`` rounds (``separated``). ``auto``: as the promised privacy needs it.
        min_respondents: answers without which a round is tried again; left out: half the cohort, rounded up. Under
            ``privacy.unit = "client"`` no round is tried again or thrown away, however few answer.
        round_timeout_s: seconds a client has to answer; the round then goes on without it. In a simulation, where
            clients wait for each other, they count from when the client begins.
        round_tries: how often a round is tried before the run fails.
        evaluation: who measures the model; ``auto``: wherever there is something to measure it on.
        evaluate_every: rounds from one evaluation to the next.

    Raises:
        ConfigError: with the key's path, such as ``federation.cohort``.

    >>> FederationConfig(clients=5).min_respondents
    3
    """

    clients: int = field(default=20, metadata=integer(minimum=1))
    cohort: int = field(default=_DERIVED, metadata=integer(minimum=1))
    rounds: int = field(default=20, metadata=integer(minimum=1))
    sampling: Sampling = field(default="auto", metadata=choice(get_args(Sampling)))
    min_respondents: int = field(default=_DERIVED, metadata=integer(minimum=1))
    round_timeout_s: float = field(default=600.0, metadata=number(above=0))
    round_tries: int = field(default=3, metadata=integer(minimum=1))
    evaluation: Evaluation = field(default="auto", metadata=choice(get_args(Evaluation)))
    evaluate_every: int = field(default=1, metadata=integer(minimum=1))

    def __post_init__(self) -> None:
        check_fields(self, "federation")
        derive(self, "cohort", self.clients)
        derive(self, "min_respondents", (self.cohort + 1) // 2)
        if self.cohort > self.clients:
            reason = f"must be at most clients ({self.clients}), got {self.cohort}"
            raise ConfigError("federation.cohort", reason)
        if self.min_respondents > self.cohort:
            reason = f"must be at most the cohort ({self.cohort}), got {self.min_respondents}"
            raise ConfigError("federation.min-respondents", reason)


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """How a simulation splits the data among its clients.

    Attributes:
        partition: the rule of the split.
        alpha: the Dirichlet concentration; the smaller, the more the clients differ.
        labels_per_client: how many labels a client sees under ``shards``.
        path: where the data lies, for tasks that read files.
    """

    partition: Partition = field(default="dirichlet", metadata=choice(get_args(Partition)))
    alpha: float = field(default=0.5, metadata=number(above=0))
    labels_per_client: int = field(default=2, metadata=integer(minimum=1))
    path: str | None = field(default=None, metadata=text())

    def __post_init__(self) -> None:
        check_fields(self, "data")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """The algorithm and its numbers.

    Exactly one of ``local_epochs`` and ``local_steps`` is set; with neither given it is two epochs. To go
    from one to the other: ``dataclasses.replace(training, local_epochs=None, local_steps=5)``.

    Attributes:
        algorithm: a name that ``fedlearn.algorithms`` resolves.
        local_epochs: passes over its own data a client makes in a round.
        local_steps: optimiser steps a client makes in a round instead.
        batch_size: examples a step; 0: the whole local data set.
        learning_rate: the client's.
        server_learning_rate: the server's; ``None``: the algorithm's own default.
        momentum: the client optimiser's, in [0, 1).
        weighting: whether a client counts once or by its examples; ``auto``: by its examples, but once where privacy is
            promised, since the number of examples is the client's own.
        max_examples: the most examples a client counts for under ``examples``.
        options: the algorithm's own hyper-parameters, read-only, by snake_case name.
    """

    algorithm: str = field(default="fedavg", metadata=text())
    local_epochs: int | None = field(default=None, metadata=integer(minimum=1))
    local_steps: int | None = field(default=None, metadata=integer(minimum=1))
    batch_size: int = field(default=16, metadata=integer(minimum=0))
    learning_rate: float = field(default=0.1, metadata=number(above=0))
    server_learning_rate: float | None = field(default=None, metadata=number(above=0))
    momentum: float = field(default=0.0, metadata=number(minimum=0, below=1))
    weighting: Weighting = field(default="auto", metadata=choice(get_args(Weighting)))
    max_examples: int = field(default=_UNCAPPED, metadata=integer(minimum=1))
    options: Mapping[str, Scalar] = field(default_factory=Options, metadata=option_table())

    def __post_init__(self) -> None:
        check_fields(self, "training")
        if self.local_steps is None:
            derive(self, "local_epochs", 2)
        elif self.local_epochs is not None:
            reason = f"only one of local-steps and local-epochs may be set; local-epochs is {self.local_epochs}"
            raise ConfigError("training.local-steps", reason)


@dataclass(frozen=True, kw_only=True, slots=True)
class SimulationConfig:
    """What changes the speed of a simulation, and of its result no more than the rounding.

    For one ``trainer`` the result is the same to the last bit, whatever ``workers`` is; another trainer adds up the
    same numbers in another order.

    Attributes:
        workers: processes beside this one; 0: none. Under ``flower`` as many of Ray's actors; 0: one for each CPU.
        engine: what runs the clients: ``local``, or ``flower`` for Flower's own simulation runtime, on Ray, which can
            span several machines.
        trainer: whether clients are trained one by one (``sequential``) or many in one computation (``stacked`` where
            all that is trained lies in linear layers, ``vmap`` for other models); ``auto``: the fastest that the
            model allows.
    """

    workers: int = field(default=0, metadata=integer(minimum=0))
    engine: Engine = field(default="local", metadata=choice(get_args(Engine)))
    trainer: Trainer = field(default="auto", metadata=choice(get_args(Trainer)))

    def __post_init__(self) -> None:
        check_fields(self, "simulation")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    r"""Everything that defines a run.

    Attributes:
        task: a built-in name, ``package.module:Class``, or ``path/to/my_task.py[:Class]``.
        seed: the root of the run's ``SeedTree``.

    Guarantees: ``RunConfig.from_toml(config.to_toml()) == config`` for every config.

    >>> RunConfig.from_toml("[federation]\nclients = 4").federation.cohort
    4
    """

    task: str = field(default="digits", metadata=text())
    seed: int = field(default=0, metadata=integer(minimum=0))
    federation: FederationConfig = field(default_factory=FederationConfig, metadata=section(FederationConfig))
    data: DataConfig = field(default_factory=DataConfig, metadata=section(DataConfig))
    training: TrainingConfig = field(default_factory=TrainingConfig, metadata=section(TrainingConfig))
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig, metadata=section(PrivacyConfig))
    secagg: SecaggConfig = field(default_factory=SecaggConfig, metadata=section(SecaggConfig))
    simulation: SimulationConfig = field(default_factory=SimulationConfig, metadata=section(SimulationConfig))
    faults: FaultsConfig = field(default_factory=FaultsConfig, metadata=section(FaultsConfig))

    def __post_init__(self) -> None:
        check_fields(self)
        self._settle_secagg()
        self._settle_weighting()
        self._settle_sampling()
        self._check_engine()
        if self.privacy.unit == "client":
            self._settle_client_privacy()
        if self.privacy.unit == "example" and self.federation.evaluation in ("federated", "both"):
            reason = "what clients measure would leave un-noised"
            raise ConfigError("federation.evaluation", f'must be "central" or "off" under "example": {reason}')

    def _settle_secagg(self) -> None:
        """Refuse what does not go with a server that sees the sum alone."""
        privacy, mode = self.privacy, self.secagg.mode
        distributed = privacy.unit == "client" and privacy.trust == "distributed"
        if mode == "off":
            if distributed:
                reason = 'must be "active" (or "semi-honest", or "ideal" in a simulation) under privacy.trust = '
                raise ConfigError("secagg.mode", f'{reason}"distributed": unmasked, the server sees every update')
            if self.faults.leg != "any":
                raise ConfigError("faults.leg", "is a leg of secure aggregation, and secagg.mode is off")
            return
        if tampering := self.faults.unmasked:
            reason = "changes a single update on its way, and under secagg none travels by itself"
            raise ConfigError(f"faults.{tampering}", f'{reason}; drop, delay, duplicate, crash and "label-flip" remain')
        if self.federation.cohort < LEAST_COHORT:
            reason = (
                f"must be at least {LEAST_COHORT} under secagg: of two, each learns the other's update from the sum"
            )
            raise ConfigError("federation.cohort", reason)
        if self.federation.round_timeout_s > MOST_ROUND_S:
            reason = (
                f"must be at most {MOST_ROUND_S:,} under secagg: devices refuse an offer that holds for more than a day"
            )
            raise ConfigError("federation.round-timeout-s", reason)
        if privacy.unit == "client" and not distributed:
            reason = 'does not go with secagg, whose clients add the noise themselves: set "distributed"'
            raise ConfigError("privacy.trust", f'{reason}, or secagg.mode = "off"')
        if self.federation.evaluation in ("federated", "both"):
            reason = 'must be "central" or "off" under secagg: what one client measures would be seen'
            raise ConfigError("federation.evaluation", reason)

    def _settle_weighting(self) -> None:
        """Say what ``auto`` means, and refuse to send a number of examples that privacy covers."""
        hidden = self.privacy.unit != "none" or (self.secagg.mode != "off" and self.training.max_examples == _UNCAPPED)
        if self.training.weighting == "auto":
            _set(self, "training", weighting="uniform" if hidden else "examples")
        if self.training.weighting == "uniform":
            return
        if self.privacy.unit == "example":
            reason = 'must be "uniform" under privacy.unit = "example": the number of examples would leave the client'
            raise ConfigError("training.weighting", reason)
        if (self.privacy.unit == "client" or self.secagg.mode != "off") and self.training.max_examples == _UNCAPPED:
            lost = "noise" if self.privacy.unit == "client" else "rounding"
            reason = f"hidden clients count for their share of it, of which {_UNCAPPED:,} leaves nothing but {lost}; "
            reason += 'set it near what a client holds, without looking, or training.weighting = "uniform"'
            raise ConfigError("training.max-examples", reason)

    def _settle_sampling(self) -> None:
        """Say what ``auto`` means, and refuse a claim that the draw does not justify."""
        client = self.privacy.unit == "client"
        correlated = client and self.privacy.mechanism == "dp-ftrl"
        distributed = client and self.privacy.trust == "distributed"
        if self.federation.sampling == "auto":
            drawn = "separated" if correlated else "poisson" if client and not distributed else "fixed-size"
            _set(self, "federation", sampling=drawn)
        sampling = self.federation.sampling
        if correlated != (sampling == "separated"):
            reason = 'and privacy.mechanism = "dp-ftrl" under privacy.unit = "client" need each other'
            raise ConfigError("federation.sampling", f'"separated" {reason}; leave federation.sampling out')
        if self.secagg.mode != "off" and sampling != "fixed-size":
            reason = (
                f'must be "fixed-size" under secagg, not "{sampling}": lanes, noise and thresholds are for one size'
            )
            raise ConfigError(
                "federation.sampling", f"{reason}; and the server, which knows the draw, amplifies nothing"
            )
        if self.privacy.amplification == "poisson" and sampling != "poisson":
            reason = f'"poisson" is not drawn (federation.sampling = "{sampling}"): an accountant must not claim it'
            raise ConfigError("privacy.amplification", f"{reason}; draw it that way, or leave this out")
        if self.privacy.amplification == "auto":
            _set(self, "privacy", amplification="poisson" if client and sampling == "poisson" else "none")

    def _check_engine(self) -> None:
        """Refuse what only the local engine can do, or break."""
        if self.simulation.engine == "local":
            return
        if self.simulation.trainer not in ("auto", "sequential"):
            reason = f'"{self.simulation.trainer}" trains many clients at once, which Flower\'s runtime does not'
            raise ConfigError("simulation.trainer", f'{reason}; leave it out, or simulation.engine = "local"')
        if self.faults.asked:
            reason = 'Flower\'s runtime breaks nothing on purpose; leave it out, or simulation.engine = "local"'
            raise ConfigError(f"faults.{self.faults.asked[0]}", reason)

    def _settle_client_privacy(self) -> None:
        """Say how far apart participations are, and refuse a delta that promises nothing."""
        clients, cohort, delta = self.federation.clients, self.federation.cohort, self.privacy.delta
        if clients < 2:
            raise ConfigError("federation.clients", "must be at least 2 for a client to be hidden among them")
        if delta != "auto" and delta >= 1 / clients:
            reason = f"must be below 1/clients ({1 / clients:.3g}), got {delta:g}: else one client may be given away"
            raise ConfigError("privacy.delta", f"{reason}; leave it out for clients^-1.1")
        if self.privacy.mechanism == "dp-ftrl":
            most = clients // cohort
            if self.privacy.min_separation is None:
                _set(self, "privacy", min_separation=most)
            elif self.privacy.min_separation > most:
                reason = f"must be at most clients/cohort ({most}): else too few clients are left to invite"
                raise ConfigError("privacy.min-separation", f"{reason}; lower it or federation.cohort")

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> Self:
        """Return the config of nested tables with kebab-case keys; absent keys take their defaults.

        Raises:
            ConfigError: a key is unknown, of the wrong type, or has an impossible value.
        """
        return read_table(cls, mapping)

    @classmethod
    def from_toml(cls, text: str, *, origin: str = "scenario") -> Self:
        """Return the config of a TOML document.

        Args:
            text: the document.
            origin: what to call it where it is not TOML at all, such as a file's name.

        Raises:
            ConfigError: the text is not TOML (with line and column), or see ``from_mapping``.
        """
        try:
            mapping = tomllib.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(origin, f"is not valid TOML: {error}") from error
        return cls.from_mapping(mapping)

    def for_clients(self) -> Self:
        """Return the config as clients are told it: without what is neither their business nor the result's."""
        privacy = replace(self.privacy, earlier_ledgers=None)
        return replace(self, privacy=privacy, simulation=SimulationConfig(), faults=FaultsConfig())

    def to_mapping(self) -> dict[str, Any]:
        """Return nested tables with kebab-case keys, derived values included, ``None`` left out."""
        return write_table(self)

    def to_toml(self) -> str:
        """Return the config as a TOML document, derived values included."""
        import tomli_w  # only a run that is written down needs it

        return tomli_w.dumps(self.to_mapping())

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Return the config that ``to_json`` wrote."""
        return cls.from_mapping(json.loads(text))

    def to_json(self) -> str:
        """Return the config as canonical JSON: sorted keys, no white space, ASCII."""
        return _canonical(self.to_mapping())

    def sha256(self) -> str:
        """Return the hexadecimal SHA-256 of the canonical JSON without the ``simulation`` section.

        That section changes the speed and no more of a result than its rounding. Defaults count as if they had been
        written out, so that a scenario and the ``config.toml`` of its run have the same hash.
        """
        return _sha256(self)


def _set(config: RunConfig, name: str, **values: object) -> None:
    """Fill in keys of one section of a frozen config."""
    object.__setattr__(config, name, replace(getattr(config, name), **values))


@lru_cache(maxsize=8)
def _sha256(config: RunConfig) -> str:
    """Return ``config.sha256()``: asked for in every round."""
    table = config.to_mapping()
    del table["simulation"]
    return hashlib.sha256(_canonical(table).encode("ascii")).hexdigest()


def _canonical(table: Mapping[str, Any]) -> str:
    """Return the one JSON text of a table."""
    return json.dumps(table, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
