"""What a run under client-level privacy will release, decided before it does: the noise, the draws, the budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from fedlearn.config import RunConfig
from fedlearn.privacy.accounting import QUICK, calibrate, check_delta, default_delta, epsilon, would_exceed
from fedlearn.privacy.matrix import choose_bands, sensitivity, square_root_coefficients
from fedlearn.privacy.mechanisms import AdaptiveGaussian, DpFtrl, Gaussian, Mechanism
from fedlearn.privacy.releases import Lattice, Matrix, Query, Release, Sampling

__all__ = ["PrivacyPlan", "Summed", "plan_privacy"]

Summed = Callable[[float], tuple[Query, Lattice]]
"""From a noise multiplier to what is released of a sum that clients added noise to."""

_EVALUATION_RATIO = 3.0
"""How much more noise an evaluation has than a round: it needs one digit, and so costs about a ninth of a round."""


@dataclass(frozen=True, kw_only=True)
class PrivacyPlan:
    """All that will be released to hide clients, as numbers.

    Attributes:
        config: the run.
        delta: the probability with which the promise may fail, below 1/population.
        noise_multiplier: σ/Δ of a round; under dp-ftrl of all rounds together.
        evaluated: the rounds after which clients measure the model, each a release of its own.
        earlier: what was released in earlier runs on the same clients.
        summed: under ``distributed`` trust, what a round releases of its sum with the noise of the fewest honest
            survivors, by noise multiplier; secure aggregation says (``fedlearn.secagg.terms.Terms.summed``).
    """

    config: RunConfig
    delta: float
    noise_multiplier: float
    evaluated: tuple[int, ...] = ()
    earlier: tuple[Release, ...] = ()
    summed: Summed | None = None

    @property
    def rate(self) -> float:
        """The probability with which a client is invited to a round; 1 for all clients."""
        return self.config.federation.cohort / self.config.federation.clients

    @property
    def evaluation_noise_multiplier(self) -> float:
        """The σ/Δ of one evaluation."""
        return _EVALUATION_RATIO * self.noise_multiplier

    def mechanism(self, instance: str) -> Mechanism:
        """Return what turns the sum of a round into a release; ``instance`` names this run."""
        privacy, federation = self.config.privacy, self.config.federation
        if privacy.mechanism == "dp-ftrl":
            return DpFtrl(
                noise_multiplier=self.noise_multiplier,
                bound_l2=privacy.bound_l2,
                rounds=federation.rounds,
                min_separation=privacy.min_separation or 1,
                instance=instance,
            )
        if privacy.adaptive_clipping:
            return AdaptiveGaussian(
                noise_multiplier=self.noise_multiplier, bound_l2=privacy.bound_l2, expected_cohort=federation.cohort
            )
        return Gaussian(noise_multiplier=self.noise_multiplier, bound_l2=privacy.bound_l2)

    def releases(self, released: Sequence[Release] = (), after: int = 0) -> list[Release]:
        """Return what the rounds after round ``after`` will release, on top of what this run has ``released``."""
        rounds = range(after + 1, self.config.federation.rounds + 1)
        return [each for number in rounds for each in self.releases_of_round(number, released)]

    def releases_of_round(self, number: int, released: Sequence[Release] = ()) -> list[Release]:
        """Return what round ``number`` will release: the model, and an evaluation where there is one.

        Under dp-ftrl the model is the next row of what this run has ``released``, by that sequence's name and units.
        """
        found = [_continuing(self._model(number), released)]
        if number in self.evaluated:
            found.append(self._evaluation(number))
        return found

    def epsilon(self, released: Sequence[Release] = (), after: int = 0) -> float:
        """Return the epsilon at the end of the run, when ``released`` has left and rounds go on after ``after``."""
        return epsilon([*self.earlier, *released, *self.releases(released, after)], self.delta, interval=QUICK)

    def without_amplification(self) -> PrivacyPlan:
        """Return the same plan for an adversary who knows who is invited to each round."""
        privacy = replace(self.config.privacy, amplification="none")
        return replace(self, config=replace(self.config, privacy=privacy))

    def would_exceed(self, released: Sequence[Release], following: Sequence[Release]) -> bool:
        """Return whether ``following``, after all that was released, would bring epsilon above the budget."""
        budget = self.config.privacy.budget
        if budget is None:
            return False
        return would_exceed([*self.earlier, *released], following, budget, self.delta)

    def _model(self, number: int) -> Release:
        """Return the release of one round's model, for a sensitivity of 1 (of the lattice, where clients add noise)."""
        privacy = self.config.privacy
        if privacy.mechanism == "skellam":
            return self._distributed(number)
        stddev, matrix = self.noise_multiplier, None
        if privacy.mechanism == "dp-ftrl":
            rounds, separation = self.config.federation.rounds, privacy.min_separation or 1
            coefficients = square_root_coefficients(choose_bands(rounds, separation))
            stddev *= sensitivity(coefficients, rows=rounds, min_separation=separation)
            matrix = Matrix(instance="planned", row=number - 1, coefficients=coefficients, min_separation=separation)
        return self._release("model", number, Query(name="update", sensitivity_l2=1.0, stddev=stddev), matrix)

    def _distributed(self, number: int) -> Release:
        """Return the release of one round's sum with the noise of the fewest honest survivors."""
        if self.summed is None:
            raise ValueError("under distributed trust a plan is told what secure aggregation releases of a sum")
        query, lattice = self.summed(self.noise_multiplier)
        return replace(self._release("model", number, query, None), lattice=lattice)

    def _evaluation(self, number: int) -> Release:
        """Return the release of one evaluation, for a sensitivity of 1."""
        query = Query(name="metrics", sensitivity_l2=1.0, stddev=self.evaluation_noise_multiplier)
        return replace(self._release("evaluation", number, query, None), mechanism="gaussian")

    def _release(self, what: str, number: int, query: Query, matrix: Matrix | None) -> Release:
        """Return a release as it is planned."""
        claimed = self.config.privacy.amplification == "poisson"
        unclaimed = "everyone" if matrix is None else "separated"
        return Release(
            what=what,
            round_number=number,
            unit="client",
            adjacency=self.adjacency,
            mechanism=self.config.privacy.mechanism,
            queries=(query,),
            sampling=Sampling(
                method="poisson" if claimed else unclaimed,
                rate=self.rate if claimed else 1.0,
                population=self.config.federation.clients,
            ),
            matrix=matrix,
            simulated=False,
        )

    @property
    def adjacency(self) -> str:
        """What neighbouring populations are: under a Poisson draw one client more or less, else one that gives zero."""
        return "add-remove" if self.config.privacy.amplification == "poisson" else "zero-out"


def _continuing(planned: Release, released: Sequence[Release]) -> Release:
    """Return a planned row of correlated noise as the next of those released, which carry the sum's own sensitivity."""
    if planned.matrix is None:
        return planned
    for each in released:
        if each.matrix is not None:
            return replace(planned, queries=each.queries, matrix=replace(planned.matrix, instance=each.matrix.instance))
    return planned


def plan_privacy(
    config: RunConfig,
    *,
    evaluated: Sequence[int] = (),
    earlier: Sequence[Release] = (),
    promised: float | None = None,
    summed: Summed | None = None,
) -> PrivacyPlan:
    """Return the plan of a run with ``privacy.unit = "client"``: its noise is the least that meets the target.

    Args:
        config: the run.
        evaluated: the rounds after which clients measure the model.
        earlier: what was released in earlier runs on the same clients.
        promised: the noise multiplier of a run that has begun; left out: it is calibrated, or the configuration's.
        summed: what a round releases of its sum, by noise multiplier: needed under ``distributed`` trust.

    Raises:
        ConfigError: the target cannot be met, or delta is at least 1/N.
        DependencyError: dp-accounting is not installed.
    """
    privacy, clients = config.privacy, config.federation.clients
    delta = default_delta(clients) if privacy.delta == "auto" else privacy.delta
    check_delta(delta, clients)
    plan = PrivacyPlan(
        config=config,
        delta=delta,
        noise_multiplier=math.inf,
        evaluated=tuple(evaluated),
        earlier=tuple(earlier),
        summed=summed,
    )
    known = promised if promised is not None else privacy.noise_multiplier
    if known is not None:
        return replace(plan, noise_multiplier=known)
    target = privacy.target_epsilon
    if target is None:
        raise ValueError("a run with privacy.unit = 'client' has a target epsilon or a noise multiplier")

    def planned(noise_multiplier: float) -> list[Release]:
        return [*plan.earlier, *replace(plan, noise_multiplier=noise_multiplier).releases()]

    return replace(plan, noise_multiplier=calibrate(planned, target, delta, unit="client"))
