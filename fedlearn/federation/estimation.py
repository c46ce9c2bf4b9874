"""From the replies of a round to the mean update, and what a ledger says of it: plainly, or with clients hidden.

``PlainMean`` promises nothing on the server's side; ``PrivateMean`` sums clipped updates, adds noise and divides by a
number that does not depend on who answered.
"""

from __future__ import annotations

import hashlib
import json
import math
import secrets
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from fedlearn.arrays import ParamSpec
from fedlearn.config import RunConfig
from fedlearn.errors import TaskError
from fedlearn.federation.checkpoint import RunState
from fedlearn.federation.messages import EvaluateReply, Failure, GroupReply, Reply, TrainReply
from fedlearn.privacy.clipping import ClippedSum, ClippedUpdate, Update, clip
from fedlearn.privacy.mechanisms import Gaussian, MechanismState
from fedlearn.privacy.noise import Noise
from fedlearn.privacy.plan import PrivacyPlan
from fedlearn.privacy.releases import Release, Sampling
from fedlearn.privacy.sampling import Draw, draw_cohort, draw_poisson, draw_separated
from fedlearn.sources import SeedTree

__all__ = ["Estimate", "Estimator", "PlainMean", "PrivateMean", "Realised", "Tally", "check_metric_names"]


_CLEAR = 3.0
"""How many standard deviations of its noise a count must have before anything is divided by it."""


@dataclass(kw_only=True)
class Tally(ABC):
    """What came back of one try of a round; holds one vector, however many clients answer."""

    draw: Draw
    loss: float = 0.0
    weight: int = 0
    respondents: int = 0
    failures: dict[int, Failure] = field(default_factory=dict)
    upload_bytes: int = 0
    download_bytes: int = 0

    def add(self, reply: Reply) -> None:
        """Count one reply; an update goes into the sum and is forgotten."""
        self.upload_bytes += reply.upload_bytes
        self.download_bytes += reply.download_bytes
        if isinstance(reply, Failure):
            self.failures[reply.client] = reply
        elif isinstance(reply, GroupReply):
            self.failures.update((failure.client, failure) for failure in reply.failures)
            if reply.respondents:
                self._sum_group(reply)
            self.loss += sum(loss * weight for loss, weight in zip(reply.mean_losses, reply.weights, strict=False))
            self.weight += sum(reply.weights)
            self.respondents += len(reply.respondents)
        elif isinstance(reply, TrainReply):
            self._sum(reply)
            self.loss += (reply.mean_loss or 0.0) * reply.weight
            self.weight += reply.weight
            self.respondents += 1

    @property
    def cohort(self) -> int:
        """How many were invited."""
        return len(self.draw.cohort)

    @abstractmethod
    def _sum(self, reply: TrainReply) -> None:
        """Add a reply's update to the sum."""

    def _sum_group(self, reply: GroupReply) -> None:
        """Add the sum of many clients, where one can be.

        Raises:
            TypeError: it cannot.
        """
        raise TypeError(f"{type(self).__name__} takes no sum of many clients")

    @abstractmethod
    def forget(self) -> None:
        """Let go of the sum: this try is not used."""


@dataclass(kw_only=True)
class _PlainTally(Tally):
    """A weighted sum in float64."""

    total: NDArray[np.float64]

    def _sum(self, reply: TrainReply) -> None:
        """Add a reply's update times its weight."""
        self.total += reply.update.vector.astype(np.float64) * reply.weight

    def _sum_group(self, reply: GroupReply) -> None:
        """Add a group's weighted sum."""
        if reply.total is None:
            raise TypeError("a plain mean takes no sum of clipped updates")
        self.total += reply.total

    def forget(self) -> None:
        """Let go of the sum."""
        self.total = np.zeros(0)


@dataclass(kw_only=True)
class _PrivateTally(Tally):
    """A sum of clipped updates, of what is trained by gradient."""

    total: ClippedSum
    places: slice

    def _sum(self, reply: TrainReply) -> None:
        """Add a reply's clipped update."""
        update = reply.update
        if not isinstance(update, ClippedUpdate):
            raise TypeError(f"only a ClippedUpdate can be summed, got {type(update).__name__}; clip it first")
        trained = ClippedUpdate(
            vector=update.vector[self.places], bound_l2=update.bound_l2, within=update.within, finite=update.finite
        )
        self.total.add(trained)

    def _sum_group(self, reply: GroupReply) -> None:
        """Add a group's sum of clipped updates."""
        if reply.clipped is None:
            raise TypeError("only a sum of clipped updates can be noised; clip each first")
        self.total.add_group(reply.clipped)

    def forget(self) -> None:
        """Do nothing: no round is thrown away."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Estimate:
    """What the server may apply, and what it says of it.

    Attributes:
        mean: the mean update, shape (d,), float64.
        release: what leaves with the next model.
        mechanism: the mechanism's state after it.
    """

    mean: NDArray[np.float64]
    release: Release
    mechanism: MechanismState | None = None


@dataclass(frozen=True, kw_only=True)
class Realised:
    """How many were really drawn and answered: the server's own knowledge, of which a ledger holds a commitment.

    The size of a secret cohort is part of the secret, so that a ledger which is handed on must not tell it; whoever
    is given the salt can check it.
    """

    cohort: int
    respondents: int
    salt: str

    @classmethod
    def of(cls, tally: Tally) -> Realised:
        """Return it with a fresh salt."""
        return cls(cohort=tally.cohort, respondents=tally.respondents, salt=secrets.token_hex(16))

    @property
    def commitment(self) -> str:
        """SHA-256 over the salt and the counts."""
        return hashlib.sha256(json.dumps([self.salt, self.cohort, self.respondents]).encode()).hexdigest()


def check_metric_names(names: Sequence[str]) -> None:
    """Raise unless a task says which metrics clients may release.

    Raises:
        TaskError: ``names`` is empty.
    """
    if not names:
        raise TaskError(
            "a metric that clients measure is a release, so its name must be known before: set metric_names in the "
            'task, such as metric_names = ("accuracy",), for metrics within [0, 1]; or federation.evaluation = "off"'
        )


class Estimator(ABC):
    """How a run draws its cohorts and estimates the mean update.

    Args:
        config: the run.
        spec: the model's description.
    """

    retries: bool
    """Whether a round may be tried again when few answer."""

    def __init__(self, config: RunConfig, spec: ParamSpec) -> None:
        self.config, self.spec = config, spec
        self.seeds = SeedTree.root(config.seed)

    def init(self) -> MechanismState | None:
        """Return the mechanism's state before the first round."""
        return None

    def bound_l2(self, state: RunState) -> float | None:
        """Return the clipping norm that clients are told, or ``None``."""
        return None

    def draw(self, there: Sequence[int], purpose: str, number: int, attempt: int, state: RunState) -> Draw:
        """Draw a cohort of those that are there."""
        return draw_cohort(there, self.config.federation.cohort, self.seeds.child(purpose, number, attempt))

    @abstractmethod
    def tally(self, draw: Draw, state: RunState) -> Tally:
        """Return an empty tally."""

    @abstractmethod
    def estimate(self, tally: Tally, state: RunState) -> Estimate:
        """Return the mean update of a tally."""

    def _unhidden(self, draw: Draw, number: int) -> Release:
        """Return what the ledger says of a mean that no noise of the server's, or of the clients together, covers."""
        return Release(
            what="model",
            round_number=number,
            unit="none",
            adjacency="zero-out",
            mechanism="local" if self.config.privacy.unit == "example" else "none",
            queries=(),
            sampling=self._sampling(draw),
            simulated=False,
        )

    def _sampling(self, draw: Draw) -> Sampling:
        """Return what the ledger says of a draw."""
        federation = self.config.federation
        return draw.sampling(
            claimed=self.config.privacy.amplification == "poisson",
            enrolled=federation.clients,
            share=federation.cohort / federation.clients,
        )


class PlainMean(Estimator):
    """The weighted mean of those that answered. What leaves is covered by no noise of the server's."""

    retries = True

    def tally(self, draw: Draw, state: RunState) -> Tally:
        """Return an empty tally."""
        return _PlainTally(draw=draw, total=np.zeros(self.spec.size))

    def estimate(self, tally: Tally, state: RunState) -> Estimate:
        """Return the mean over the weights of those that answered."""
        if not isinstance(tally, _PlainTally):
            raise TypeError(f"expected a plain tally, got {type(tally).__name__}")
        release = self._unhidden(tally.draw, state.round_number + 1)
        return Estimate(mean=tally.total / tally.weight, release=release)


class PrivateMean(Estimator):
    """The sum of clipped updates plus noise, over a fixed denominator: the expected cohort.

    Guarantees: the release is that of the plan's mechanism whoever answers; dropouts shrink the step, never the noise
    relative to the sensitivity, and no round is thrown away (choosing which to keep would depend on who answered).

    Args:
        plan: what is to be released.
        instance: a name of this run, for noise that is correlated over its rounds.
        noise: where noise and secret draws come from.
    """

    retries = False

    def __init__(self, plan: PrivacyPlan, spec: ParamSpec, *, instance: str, noise: Noise) -> None:
        super().__init__(plan.config, spec)
        self.plan, self.noise = plan, noise
        self.mechanism = plan.mechanism(instance)

    def init(self) -> MechanismState:
        """Return the mechanism's state before the first round."""
        return self.mechanism.init()

    def bound_l2(self, state: RunState) -> float:
        """Return this round's clipping norm."""
        return self._mechanism_state(state).bound_l2

    def draw(self, there: Sequence[int], purpose: str, number: int, attempt: int, state: RunState) -> Draw:
        """Draw a cohort as the plan says; under Poisson it may be empty."""
        federation, privacy = self.config.federation, self.config.privacy
        if federation.sampling == "poisson":
            return draw_poisson(there, self.plan.rate, self.noise.stream(purpose, number, attempt))
        if federation.sampling == "separated" and purpose == "cohort":
            return draw_separated(
                there,
                federation.cohort,
                round_number=number,
                last_round=state.last_round,
                min_separation=privacy.min_separation or 1,
                seeds=self.seeds.child(purpose, number, attempt),
            )
        return super().draw(there, purpose, number, attempt, state)

    def tally(self, draw: Draw, state: RunState) -> Tally:
        """Return an empty tally with this round's clipping norm."""
        places = slice(0, self.spec.trainable_size)
        total = self.mechanism.begin(self._mechanism_state(state), self.spec.trainable_size)
        return _PrivateTally(draw=draw, total=total, places=places)

    def estimate(self, tally: Tally, state: RunState) -> Estimate:
        """Return the noised sum over the expected cohort; what no gradient trains does not move."""
        if not isinstance(tally, _PrivateTally):
            raise TypeError(f"expected a tally of clipped updates, got {type(tally).__name__}")
        following, noised = self.mechanism.release(self._mechanism_state(state), tally.total, self.noise)
        mean = np.zeros(self.spec.size)
        mean[tally.places] = noised.vector / self.config.federation.cohort
        release = Release(
            what="model",
            round_number=state.round_number + 1,
            unit="client",
            adjacency=self.plan.adjacency,
            mechanism=self.mechanism.name,
            queries=noised.queries,
            sampling=self._sampling(tally.draw),
            matrix=noised.matrix,
            simulated=self.noise.simulated,
        )
        return Estimate(mean=mean, release=release, mechanism=following)

    def evaluation(
        self, replies: Sequence[EvaluateReply], draw: Draw, names: Sequence[str], number: int
    ) -> tuple[dict[str, float], Release]:
        """Return the noised mean of each metric over the clients that answered, and what the ledger says of it.

        Every client counts once, with the mean over its own test examples, within [0, 1]. How many answered is noised
        too; no mean is told where that number is lost in its noise.

        Raises:
            TaskError: ``names`` is empty.
        """
        check_metric_names(names)
        bound = math.sqrt(len(names) + 1)
        mechanism = Gaussian(noise_multiplier=self.plan.evaluation_noise_multiplier, bound_l2=bound)
        state = MechanismState(bound_l2=bound, rows=number)
        total = mechanism.begin(state, len(names) + 1)
        for reply in replies:
            total.add(clip(Update.of([*(reply.sums[name] for name in names), 1.0]), bound))
        _, noised = mechanism.release(state, total, self.noise.child("evaluation"))
        release = Release(
            what="evaluation",
            round_number=number,
            unit="client",
            adjacency=self.plan.adjacency,
            mechanism=mechanism.name,
            queries=(replace(noised.queries[0], name="metrics"),),
            sampling=self._sampling(draw),
            simulated=self.noise.simulated,
        )
        *sums, count = noised.vector.tolist()
        if count < _CLEAR * noised.queries[0].stddev:
            return {}, release
        return {name: min(max(value / count, 0.0), 1.0) for name, value in zip(names, sums, strict=True)}, release

    def _mechanism_state(self, state: RunState) -> MechanismState:
        """Return the mechanism's state, which a run with this estimator always has."""
        if state.mechanism is None:
            raise ValueError("the run's state has no mechanism; it was not begun with privacy")
        return state.mechanism
