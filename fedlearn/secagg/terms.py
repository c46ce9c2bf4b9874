"""What a run offers its clients in every round: counts, encoding, noise; all of it follows from the configuration."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from fedlearn.config import RunConfig
from fedlearn.errors import ConfigError
from fedlearn.privacy.releases import Lattice, Query
from fedlearn.privacy.skellam import skellam_slack
from fedlearn.secagg.encoding import Encoding, noised_encoding, plain_encoding
from fedlearn.secagg.errors import PolicyViolationError
from fedlearn.secagg.graph import choose_graph, counts
from fedlearn.secagg.keys import tagged_hash
from fedlearn.secagg.messages import Mode, Offer
from fedlearn.secagg.prg import SUITES

__all__ = ["Terms"]

_NO_ROTATION = bytes(32)
"""A seed to plan with: no length depends on it."""


@dataclass(frozen=True, kw_only=True)
class Terms:
    """The terms of a run.

    Attributes:
        config: the run, with ``secagg.mode`` other than ``off``.
        least_survivors: vectors without which no sum is unmasked: ``federation.min-respondents``, and what the graph
            needs.
        colluding: how many clients of a cohort may collude with the server.
    """

    config: RunConfig
    least_survivors: int
    colluding: int

    @classmethod
    def of(cls, config: RunConfig) -> Terms:
        """Return the terms of a run.

        Raises:
            ConfigError: no graph carries so many that collude or are lost, or nobody honest would be left.
        """
        secagg, cohort = config.secagg, config.federation.cohort
        active = secagg.mode != "semi-honest"
        try:
            graph = choose_graph(cohort, colluding=secagg.colluding, dropping=secagg.dropping, active=active)
        except ValueError as error:
            raise ConfigError("secagg.dropping", f"{error}; lower it or secagg.colluding") from error
        colluding, dropped = counts(cohort, secagg.colluding, secagg.dropping)
        needed = graph.threshold if graph.complete else cohort - dropped
        least = max(config.federation.min_respondents, needed)
        return cls(config=config, least_survivors=least, colluding=colluding)

    @property
    def mode(self) -> Mode:
        """The protocol's mode; that of ``ideal`` is the one whose result it has."""
        return "semi-honest" if self.config.secagg.mode == "semi-honest" else "active"

    @property
    def suite(self) -> int:
        """The cipher's number."""
        return next(number for number, name in SUITES.items() if name.lower() == self.config.secagg.suite)

    @property
    def honest(self) -> int:
        """How many honest clients' noise is in every sum."""
        return self.honest_of(self.least_survivors)

    def honest_of(self, survivors: int) -> int:
        """Return how many of the survivors' shares of noise can be counted on."""
        return survivors - self.colluding

    @property
    def bound_l2(self) -> float:
        """The clipping norm of an update."""
        return self.config.privacy.bound_l2 if self.hides_clients else self.config.secagg.bound_l2

    @property
    def hides_clients(self) -> bool:
        """Whether clients add the noise that hides them."""
        return self.config.privacy.unit == "client"

    @property
    def most_weight(self) -> int:
        """The largest weight of a client; 1: all count the same, and no weight is sent."""
        training = self.config.training
        weighted = training.weighting == "examples" and not self.hides_clients
        return training.max_examples if weighted else 1

    def encoding(self, size: int, *, noise_multiplier: float | None = None, rotation: bytes = _NO_ROTATION) -> Encoding:
        """Return how an update of ``size`` entries becomes integers.

        Args:
            size: d.
            noise_multiplier: σ/Δ₂ of the least noise in a sum, where clients are hidden.
            rotation: the seed of the rotation, where clients are hidden.

        Raises:
            ConfigError: so many clients, such weights or so much noise do not fit the lanes.
        """
        bits, cohort = self.config.secagg.bits, self.config.federation.cohort
        try:
            if noise_multiplier is None:
                return plain_encoding(
                    size=size, bits=bits, bound_l2=self.bound_l2, clients=cohort, most_weight=self.most_weight
                )
            return noised_encoding(
                size=size,
                bits=bits,
                bound_l2=self.bound_l2,
                clients=cohort,
                noise_multiplier=noise_multiplier,
                honest=self.honest,
                rotation=rotation,
            )
        except PolicyViolationError as error:
            key = "training.max-examples" if self.most_weight > 1 else "secagg.bits"
            raise ConfigError(key, str(error)) from error

    def offer(
        self,
        encoding: Encoding,
        *,
        round_number: int = 1,
        attempt: int = 1,
        session: bytes = bytes(32),
        model_sha256: bytes = bytes(32),
        plan_sha256: bytes = bytes(32),
        deadline_s: int = 0,
    ) -> Offer:
        """Return what a round's clients are offered, not signed yet; by default one to take the measure of."""
        config = self.config
        return Offer(
            suite=self.suite,
            task=config.task,
            round_number=round_number,
            attempt=attempt,
            session=session,
            mode=self.mode,
            colluding=config.secagg.colluding,
            dropping=config.secagg.dropping,
            cohort=config.federation.cohort,
            least_cohort=self.least_survivors,
            least_survivors=self.least_survivors,
            encoding=encoding,
            model_sha256=model_sha256,
            plan_sha256=plan_sha256,
            deadline_s=deadline_s,
        )

    def rotation(self, model_sha256: bytes, round_number: int, attempt: int) -> bytes:
        """Return the seed of one round's rotation: of public facts, so that ``ideal`` and masked rounds share it."""
        numbers = b"".join(number.to_bytes(4, "big") for number in (round_number, attempt))
        return tagged_hash("rotation", self.config.task.encode(), model_sha256, numbers)

    def lattice(self, encoding: Encoding, survivors: int) -> Lattice:
        """Return what is released of a sum of ``survivors`` vectors, in units of its lattice."""
        sensitivity_l1, sensitivity_l2 = encoding.sensitivity
        honest = self.honest_of(survivors)
        slack = skellam_slack(encoding.noise_variance, encoding.size * honest)
        return Lattice(
            sensitivity_l1=sensitivity_l1,
            sensitivity_l2=sensitivity_l2,
            variance=honest * encoding.noise_variance,
            slack=slack.log_ratio,
            slack_delta=slack.total_variation,
        )

    def query(self, encoding: Encoding, survivors: int) -> Query:
        """Return the same in the model's units, for people."""
        lattice = self.lattice(encoding, survivors)
        return Query(
            name="update",
            sensitivity_l2=lattice.sensitivity_l2 / encoding.scale,
            stddev=math.sqrt(lattice.variance) / encoding.scale,
        )

    def summed(self, size: int) -> Callable[[float], tuple[Query, Lattice]]:
        """Return what a sum of the fewest survivors releases, by noise multiplier: what a run is planned with."""

        def released(noise_multiplier: float) -> tuple[Query, Lattice]:
            encoding = self.encoding(size, noise_multiplier=noise_multiplier)
            return self.query(encoding, self.least_survivors), self.lattice(encoding, self.least_survivors)

        return released

    def check(self) -> None:
        """Raise unless somebody honest is left in every sum.

        Raises:
            ConfigError: the fewest survivors may all collude.
        """
        if self.honest < 2:
            raise ConfigError(
                "federation.min-respondents",
                f"of {self.least_survivors} survivors {self.colluding} may collude, and fewer than two honest ones are "
                "left: raise it, or lower secagg.colluding",
            )
