"""The round loop: parameter-server training in seven steps, each a function of that name.

initialise → distribute_data → distribute_model → train → communicate → update → validate.
``distribute_data`` is ``fedlearn.data.distribute_data`` (on devices the data is already distributed), ``train``
is ``fedlearn.learning.train`` at each client; the other five are methods of ``Federation``, in this order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedlearn.algorithms import Algorithm, ServerState, build_algorithm
from fedlearn.config import RunConfig
from fedlearn.errors import ConfigError, RoundFailedError, RunFailedError, RunUnreadableError, TaskError, UsageError
from fedlearn.federation.checkpoint import RunState, Totals
from fedlearn.federation.messages import EvaluateReply, Failure, Network, Reply, Request, RoundPlan, TrainReply
from fedlearn.federation.run_folder import RunFolder
from fedlearn.learning import Examples, FlatModel, Task, build_flat_model, computing, evaluate
from fedlearn.learning.task import task_code
from fedlearn.privacy.sampling import Draw, draw_cohort
from fedlearn.sources import Clock, SeedTree

__all__ = ["Federation", "Observer", "SilentObserver", "Validation", "asks_clients", "central_test"]


class Observer(Protocol):
    """Whoever watches a run."""

    def replied(self, round_number: int, done: int, total: int) -> None:
        """One more of ``total`` clients is accounted for."""

    def finished_round(self, line: Mapping[str, Any]) -> None:
        """A round is done and kept; ``line`` is its line of ``metrics.jsonl``."""


class SilentObserver:
    """Watches and says nothing."""

    def replied(self, round_number: int, done: int, total: int) -> None:
        """Do nothing."""

    def finished_round(self, line: Mapping[str, Any]) -> None:
        """Do nothing."""


@dataclass
class _Tally:
    """What came back of one try of a round; holds one vector, however many clients answer."""

    total: NDArray[np.float64]
    cohort: int
    weight: int = 0
    loss: float = 0.0
    respondents: int = 0
    failures: dict[int, Failure] = field(default_factory=dict)
    upload_bytes: int = 0
    download_bytes: int = 0

    def add(self, reply: Reply) -> None:
        """Count one reply; an update goes into the sum, in float64, and is forgotten."""
        self.upload_bytes += reply.upload_bytes
        self.download_bytes += reply.download_bytes
        if isinstance(reply, Failure):
            self.failures[reply.client] = reply
        elif isinstance(reply, TrainReply):
            self.total += reply.vector.astype(np.float64) * reply.weight
            self.weight += reply.weight
            self.loss += reply.mean_loss * reply.weight
            self.respondents += 1


@dataclass(frozen=True, kw_only=True)
class Validation:
    """What was measured of a model.

    Attributes:
        metrics: the headline: central where there is a test set, else the clients'.
        totals: the run's totals with what measuring cost.
        federated_metrics: the clients', where both were asked for.
        failures: the clients that could not say.
    """

    metrics: Mapping[str, float]
    totals: Totals
    federated_metrics: Mapping[str, float] = field(default_factory=dict)
    failures: Mapping[int, Failure] = field(default_factory=dict)


class Federation:
    """One run on the server's side: owns θ, never sees data.

    Args:
        config: the run.
        task: the learning problem.
        network: whatever carries messages to clients.
        folder: where the run is kept.
        clock: what time is measured with.
        observer: who watches.
    """

    def __init__(
        self,
        config: RunConfig,
        task: Task,
        network: Network,
        folder: RunFolder,
        *,
        clock: Clock,
        observer: Observer,
    ) -> None:
        self.config, self.task, self.network, self.folder = config, task, network, folder
        self.clock, self.observer = clock, observer
        self.seeds = SeedTree.root(config.seed)
        self.algorithm: Algorithm = build_algorithm(
            config.training.algorithm,
            server_learning_rate=config.training.server_learning_rate,
            options=config.training.options,
        )
        self.model: FlatModel = build_flat_model(task, self.seeds.child("initialise"))
        self.test = central_test(task, config)

    def run(self) -> RunState:
        """Go from the last kept round to the end and return the final state.

        Raises:
            RoundFailedError: a round stayed below ``min-respondents``; earlier rounds are kept.
            TooFewClientsError: not enough clients were connected in time.
            RunFailedError: the model diverged, or the folder cannot be written.
            RunUnreadableError: what was kept is damaged, or of another model than the task's.
        """
        state = self.folder.load_state() or self.initialise()
        if state.spec_sha256 != self.model.spec.sha256:
            raise RunUnreadableError(
                f"{self.folder.path} was begun with another model than the task builds now (of "
                f"{state.server.params.size:,} and {self.model.spec.size:,} numbers). Put the task back as it was, or "
                "start a new run"
            )
        while state.round_number < self.config.federation.rounds:
            state = self._round(state)
        return state

    # -- the steps ---------------------------------------------------------------------------------------------

    def initialise(self) -> RunState:
        """Set θ to the task's own initial parameters, under the run's seed."""
        server = self.algorithm.init(self.model.vector().astype(np.float64))
        return RunState(server=server, totals=Totals(), spec_sha256=self.model.spec.sha256)

    def distribute_model(self, kind: Any, draw: Draw, plan: RoundPlan, parameters: NDArray[Any]) -> list[Request]:
        """Address one request with the model to every client of the cohort."""
        return [Request(kind=kind, client=client, plan=plan, vector=parameters) for client in draw.cohort]

    def communicate(self, requests: Sequence[Request], plan: RoundPlan) -> Iterator[Reply]:
        """Send the requests and yield the replies one by one, in the cohort's order, within the deadline."""
        timeout_s = self.config.federation.round_timeout_s
        for done, reply in enumerate(self.network.exchange(requests, self.model.spec, timeout_s), start=1):
            yield reply
            self.observer.replied(plan.round_number, done, len(requests))

    def update(self, state: RunState, tally: _Tally) -> RunState:
        """Let the algorithm move θ by the mean update.

        Places that no gradient trains (BatchNorm's running mean, a frozen layer) take the plain mean whatever the
        algorithm: an adaptive step could make a variance negative.
        """
        old, mean = state.server.params, tally.total / tally.weight
        new = self.algorithm.aggregate(state.server, mean)
        if not isinstance(new, ServerState) or new.params.shape != old.shape:
            raise UsageError(
                f"{type(self.algorithm).__name__}.aggregate must return the next ServerState, as advance does"
            )
        params = new.params.copy()
        untrained = slice(self.model.spec.trainable_size, None)
        params[untrained] = old[untrained] + mean[untrained]
        with np.errstate(over="ignore"):
            finite = np.isfinite(params.astype(self.model.spec.dtype)).all()
        if not finite:
            raise RunFailedError(
                f"the model diverged in round {state.round_number + 1}. {self._kept(state.round_number + 1)} "
                "Lower training.learning-rate or training.server-learning-rate"
            )
        return replace(state, server=replace(new, params=params))

    def validate(self, state: RunState) -> Validation:
        """Measure the model: on the central test set, at the clients, or both, as the scenario says."""
        parameters = self._parameters(state)
        central: dict[str, float] = {}
        if self.test is not None:
            seeds = self.seeds.child("validate")
            with task_code(self.task, "loss or metrics"):
                central = evaluate(self.model, self.task, parameters, self.test, seeds=seeds).means()
            self._check_finite(central, state.round_number)
        if not asks_clients(self.config, self.test):
            return Validation(metrics=central, totals=state.totals)
        at_clients = self._validate_at_clients(state, parameters)
        if not central:
            return at_clients
        return replace(at_clients, metrics=central, federated_metrics=at_clients.metrics)

    def _check_finite(self, metrics: Mapping[str, float], number: int) -> None:
        """Raise if the model's own loss or metrics are no numbers; what clients say is checked as it comes."""
        if not math.isfinite(metrics["loss"]):
            raise RunFailedError(
                f"the model's loss on the test set is not finite after round {number}: it diverged. "
                "Lower training.learning-rate or training.server-learning-rate"
            )
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise TaskError(f"{type(self.task).__name__}.metrics: {name!r} is not finite on the test set")

    # -- their composition -------------------------------------------------------------------------------------

    def _round(self, state: RunState) -> RunState:
        """Take one round: invite, train, sum, update, validate, keep."""
        started = self.clock.monotonic()
        number = state.round_number + 1
        tries, totals = self._train_until_enough(number, state)
        tally, before = tries[-1], state.totals
        state = self.update(replace(state, totals=totals), tally)
        measured = Validation(metrics={}, totals=state.totals)
        if number % self.config.federation.evaluate_every == 0 or number == self.config.federation.rounds:
            measured = self.validate(state)
        totals = measured.totals.plus(wall_s=self.clock.monotonic() - started)
        line = {
            "round": number,
            "attempt": len(tries),
            "cohort": tally.cohort,
            "respondents": tally.respondents,
            "failures": _codes(tally.failures),
            "train_loss": tally.loss / tally.weight,
            "metrics": measured.metrics,
            "wall_s": round(totals.wall_s - before.wall_s, 6),
            "upload_bytes": totals.upload_bytes - before.upload_bytes,
            "download_bytes": totals.download_bytes - before.download_bytes,
        }
        if len(tries) > 1:
            line["earlier_failures"] = [_codes(each.failures) for each in tries[:-1]]
        if measured.federated_metrics:
            line["federated_metrics"] = measured.federated_metrics
        if measured.failures:
            line["evaluation_failures"] = _codes(measured.failures)
        state = replace(state, totals=totals)
        self.folder.save_round(line, state)
        self.observer.finished_round(line)
        return state

    def _train_until_enough(self, number: int, state: RunState) -> tuple[list[_Tally], Totals]:
        """Try the round with fresh cohorts until enough clients answered; return every try, and what all cost."""
        federation, totals = self.config.federation, state.totals
        tries: list[_Tally] = []
        for attempt in range(1, federation.round_tries + 1):
            draw = self._draw("cohort", number, attempt)
            plan = self._plan(number, attempt)
            requests = self.distribute_model("train", draw, plan, self._parameters(state))
            tally = _Tally(np.zeros(self.model.spec.size), cohort=len(draw.cohort))
            for reply in self.communicate(requests, plan):
                tally.add(reply)
            totals = totals.plus(
                client_updates=tally.respondents,
                upload_bytes=tally.upload_bytes,
                download_bytes=tally.download_bytes,
            )
            tries.append(tally)
            if tally.respondents >= federation.min_respondents:
                return tries, totals
            tally.total = np.zeros(0)
        raise RoundFailedError(self._too_few(number, tries[-1]), number, _codes(tries[-1].failures))

    def _too_few(self, number: int, tally: _Tally) -> str:
        """Say why a round failed and what to do."""
        counts: dict[str, int] = {}
        for failure in tally.failures.values():
            counts[str(failure.code)] = counts.get(str(failure.code), 0) + 1
        reasons = ", ".join(f"{count} {code}" for code, count in sorted(counts.items()))
        federation = self.config.federation
        return (
            f"round {number}: {tally.respondents} clients answered, {federation.min_respondents} are needed, in each "
            f"of {federation.round_tries} tries (last try: {reasons}). {self._kept(number)} "
            f"Look into the clients' logs{', or lower federation.min-respondents' if tally.respondents else ''}"
        )

    def _kept(self, number: int) -> str:
        """Say what is left when round ``number`` fails."""
        if number == 1:
            return "No round was finished."
        return f"The model of round {number - 1} is kept in {self.folder.path}."

    def _validate_at_clients(self, state: RunState, parameters: NDArray[Any]) -> Validation:
        """Measure at the clients: the mean over all their examples, and over each client's mean (``…_client_mean``)."""
        plan = self._plan(state.round_number, 1)
        draw = self._draw("evaluate", state.round_number, 1)
        means: dict[str, list[tuple[float, int]]] = {}
        failures: dict[int, Failure] = {}
        totals = state.totals
        for reply in self.communicate(self.distribute_model("evaluate", draw, plan, parameters), plan):
            totals = totals.plus(upload_bytes=reply.upload_bytes, download_bytes=reply.download_bytes)
            if isinstance(reply, Failure):
                failures[reply.client] = reply
            elif isinstance(reply, EvaluateReply):
                for name, value in reply.sums.items():
                    means.setdefault(name, []).append((value, reply.num_examples))
        metrics = {name: sum(v for v, _ in each) / sum(n for _, n in each) for name, each in means.items()}
        metrics.update((f"{name}_client_mean", sum(v / n for v, n in each) / len(each)) for name, each in means.items())
        return Validation(metrics=metrics, totals=totals, failures=failures)

    def _draw(self, purpose: str, number: int, attempt: int) -> Draw:
        """Draw a cohort from the clients that are there."""
        federation = self.config.federation
        size = federation.cohort
        there = self.network.clients(size, federation.round_timeout_s)
        return draw_cohort(there, size, self.seeds.child(purpose, number, attempt))

    def _plan(self, number: int, attempt: int) -> RoundPlan:
        """Return what the clients of this try are told."""
        return RoundPlan(
            config=self.config,
            round_number=number,
            attempt=attempt,
            proximal_mu=self.algorithm.proximal_mu,
            spec_sha256=self.model.spec.sha256,
        )

    def _parameters(self, state: RunState) -> NDArray[Any]:
        """Return θ as it is sent, in the model's own type."""
        return state.server.params.astype(self.model.spec.dtype)


def central_test(task: Task, config: RunConfig) -> Examples | None:
    """Return the central test set, or ``None`` where it is not wanted or does not exist.

    Raises:
        ConfigError: it is asked for and the task has none.
        DataError: it cannot be read.
        TaskError: the task's ``load_test`` raised.
    """
    wanted, path = config.federation.evaluation, config.data.path
    if wanted in ("off", "federated"):
        return None
    with task_code(task, "load_test"), computing(SeedTree.root(config.seed).child("load_test")):
        test = task.load_test(Path(path) if path is not None else None)
    if test is None and wanted in ("central", "both"):
        raise ConfigError("federation.evaluation", f'"{wanted}" needs a central test set; this task has none')
    return test


def asks_clients(config: RunConfig, test: Examples | None) -> bool:
    """Return whether clients validate: where they are asked to, or where nobody else could."""
    wanted = config.federation.evaluation
    return wanted in ("federated", "both") or (wanted == "auto" and test is None)


def _codes(failures: Mapping[int, Failure]) -> dict[str, str]:
    """Return client to failure code, in the clients' order, as it is written down."""
    return {str(client): str(failure.code) for client, failure in sorted(failures.items())}
