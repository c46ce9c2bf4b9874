"""From a masked sum to the mean update: the estimators of runs whose server sees the sum alone."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field

import numpy as np

from fedlearn.arrays import ParamSpec
from fedlearn.config import RunConfig
from fedlearn.federation.checkpoint import RunState
from fedlearn.federation.estimation import Estimate, Estimator, Tally
from fedlearn.federation.messages import TrainReply
from fedlearn.privacy.noise import Noise
from fedlearn.privacy.plan import PrivacyPlan
from fedlearn.privacy.releases import Release
from fedlearn.privacy.sampling import Draw
from fedlearn.secagg.encoding import DecodedSum, Encoding
from fedlearn.secagg.errors import RoundAbortedError
from fedlearn.secagg.terms import Terms

__all__ = ["MaskedEstimator", "MaskedMean", "MaskedTally", "SkellamMean"]


@dataclass(kw_only=True)
class MaskedTally(Tally):
    """What came of one try of a round: one sum, and nothing of a single client.

    Attributes:
        total: the decoded sum; ``None`` while there is none.
        aborted: why there is none.
        evidence: what the ledger is told of the session.
        clipped: how many updates were clipped; ``None`` where that is not counted.
    """

    total: DecodedSum | None = None
    aborted: RoundAbortedError | None = None
    evidence: dict[str, str] = field(default_factory=dict)

    @property
    def clipped(self) -> int | None:
        """How many updates were clipped; ``None`` where that is not counted."""
        return None if self.total is None else self.total.clipped

    def _sum(self, reply: TrainReply) -> None:
        """Refuse a single update: under secure aggregation none is ever seen."""
        raise TypeError(f"client {reply.client} sent an update of its own; only a masked sum is taken")

    def forget(self) -> None:
        """Let go of the sum."""
        self.total = None


class MaskedEstimator(Estimator):
    """How a run under secure aggregation estimates the mean update.

    Args:
        config: the run.
        spec: the model's description.
    """

    retries = True

    def __init__(self, config: RunConfig, spec: ParamSpec) -> None:
        super().__init__(config, spec)
        self.terms = Terms.of(config)
        self.terms.check()

    def bound_l2(self, state: RunState) -> float:
        """Return the clipping norm that clients are told."""
        return self.terms.bound_l2

    def tally(self, draw: Draw, state: RunState) -> MaskedTally:
        """Return an empty tally."""
        return MaskedTally(draw=draw)

    @abstractmethod
    def encoding(self, model_sha256: bytes, round_number: int, attempt: int) -> Encoding:
        """Return how updates become integers in one try of a round."""

    @abstractmethod
    def release(self, tally: MaskedTally, survivors: int, number: int) -> Release:
        """Return what is released when a sum of ``survivors`` vectors is unmasked."""

    @property
    @abstractmethod
    def releases_sum(self) -> bool:
        """Whether the unmasked sum is itself a release, to be in the ledger before anybody unmasks it."""


class MaskedMean(MaskedEstimator):
    """The weighted mean of those that answered: the server sees it, and no single update."""

    releases_sum = False

    def encoding(self, model_sha256: bytes, round_number: int, attempt: int) -> Encoding:
        """Return how updates become integers: all that the model has."""
        del model_sha256, round_number, attempt
        return self.terms.encoding(self.spec.size)

    def release(self, tally: MaskedTally, survivors: int, number: int) -> Release:
        """Return what is released: a sum without noise of the server's, or of the clients together."""
        del survivors
        return self._unhidden(tally.draw, number)

    def estimate(self, tally: Tally, state: RunState) -> Estimate:
        """Return the mean over the weights of those that answered."""
        total = _total(tally)
        weight = tally.respondents if total.weight is None else total.weight
        if weight < 1:  # a client may lie about its weight; the sum then is none
            weight = tally.respondents
        release = self.release(_masked(tally), tally.respondents, state.round_number + 1)
        return Estimate(mean=total.vector / weight, release=release)


class SkellamMean(MaskedEstimator):
    """The sum of clipped updates with the noise that clients added themselves, over the cohort's size.

    Guarantees: the noise of the fewest honest survivors is in every sum that is unmasked; the ledger has the release,
    with the noise that was certainly in it, before anybody is asked to unmask.

    Args:
        plan: what is to be released.
        spec: the model's description.
        noise: where the clients' noise comes from, as far as the ledger is concerned: a seed, or their systems.
    """

    releases_sum = True

    def __init__(self, plan: PrivacyPlan, spec: ParamSpec, *, noise: Noise) -> None:
        super().__init__(plan.config, spec)
        self.plan, self._simulated = plan, noise.simulated

    def encoding(self, model_sha256: bytes, round_number: int, attempt: int) -> Encoding:
        """Return how updates become integers: what is trained by gradient, rotated, with noise."""
        rotation = self.terms.rotation(model_sha256, round_number, attempt)
        return self.terms.encoding(
            self.spec.trainable_size, noise_multiplier=self.plan.noise_multiplier, rotation=rotation
        )

    def release(self, tally: MaskedTally, survivors: int, number: int) -> Release:
        """Return what is released, with the noise of as many honest clients as there certainly are."""
        encoding = self.encoding(b"", 0, 0)  # no length depends on the rotation
        return Release(
            what="model",
            round_number=number,
            unit="client",
            adjacency=self.plan.adjacency,
            mechanism="skellam",
            queries=(self.terms.query(encoding, survivors),),
            lattice=self.terms.lattice(encoding, survivors),
            sampling=self._sampling(tally.draw),
            simulated=self._simulated,
        )

    def estimate(self, tally: Tally, state: RunState) -> Estimate:
        """Return the noised sum over the cohort's size; what no gradient trains does not move."""
        mean = np.zeros(self.spec.size)
        mean[: self.spec.trainable_size] = _total(tally).vector / self.config.federation.cohort
        return Estimate(mean=mean, release=self.release(_masked(tally), tally.respondents, state.round_number + 1))


def _masked(tally: Tally) -> MaskedTally:
    """Return a tally as that of a masked sum."""
    if not isinstance(tally, MaskedTally):
        raise TypeError(f"expected the tally of a masked sum, got {type(tally).__name__}")
    return tally


def _total(tally: Tally) -> DecodedSum:
    """Return a tally's sum."""
    total = _masked(tally).total
    if total is None:
        raise ValueError("the session has no sum")
    return total
