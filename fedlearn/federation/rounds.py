"""The round loop: parameter-server training in seven steps, each a function of that name.

initialise → distribute_data → distribute_model → train → communicate → update → validate.
``distribute_data`` is ``fedlearn.data.distribute_data`` (on devices the data is already distributed), ``train``
is ``fedlearn.learning.train`` at each client; the other five are methods of ``Federation``, in this order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlearn.algorithms import Algorithm, ServerState, build_algorithm
from fedlearn.arrays import vector_sha256
from fedlearn.config import RunConfig
from fedlearn.errors import RoundFailedError, RunFailedError, RunUnreadableError, TaskError, UsageError
from fedlearn.federation.checkpoint import RunState, Totals
from fedlearn.federation.estimation import PrivateMean, Realised, Tally, check_metric_names
from fedlearn.federation.journal import RunJournal
from fedlearn.federation.masked import MaskedEstimator, MaskedTally
from fedlearn.federation.messages import (
    EvaluateReply,
    Failure,
    FailureCode,
    GroupReply,
    Network,
    Reply,
    Request,
    RoundPlan,
)
from fedlearn.federation.observer import Observer
from fedlearn.federation.run_folder import RunFolder
from fedlearn.federation.session import SecureAggregation, ServerIdentity
from fedlearn.federation.validation import Validation, asks_clients, central_test, client_means, is_measured
from fedlearn.learning import FlatModel, Task, build_flat_model, check_prepare, evaluate
from fedlearn.learning.task import task_code
from fedlearn.learning.validators import check_private
from fedlearn.privacy.noise import Noise
from fedlearn.privacy.sampling import Draw
from fedlearn.profiling import span, spanned
from fedlearn.sources import Clock, ManualClock, SeedTree

__all__ = ["Federation"]


class Federation:
    """One run on the server's side: owns θ, never sees data.

    Args:
        config: the run.
        task: the learning problem.
        network: whatever carries messages to clients.
        folder: where the run is kept.
        clock: what time is measured with.
        observer: who watches.
        noise: where a privacy mechanism's noise and secret draws come from.
        identity: who the server is under secure aggregation, and whom it may ask.
        simulated_clock: the clock of a simulation in which clients take simulated time; whoever carries messages moves
            it on, and a run that is resumed goes on at the time it had come to.
        keeps_late: in a simulation that promises no privacy, keep a round after the first while the clients of the next
            one work, unless the observer reads the folder: killed in between, a run does its last round again.
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
        noise: Noise,
        identity: ServerIdentity | None = None,
        simulated_clock: ManualClock | None = None,
        keeps_late: bool = False,
    ) -> None:
        self.config, self.task, self.network, self.folder = config, task, network, folder
        self.clock, self.observer, self.simulated_clock = clock, observer, simulated_clock
        self.seeds = SeedTree.root(config.seed)
        self.algorithm: Algorithm = build_algorithm(
            config.training.algorithm,
            server_learning_rate=config.training.server_learning_rate,
            options=config.training.options,
        )
        self.model: FlatModel = build_flat_model(task, self.seeds.child("initialise"))
        self.test = central_test(task, config)
        if config.privacy.unit != "none":
            if config.privacy.unit == "example":
                check_prepare(task)
            check_private(self.model.module, unit=config.privacy.unit, mode=config.privacy.grad_sample_mode)
        if config.privacy.unit == "client" and self._asks_clients:
            check_metric_names(task.metric_names)
        self.journal = RunJournal(folder.path, config, self.model.spec, noise=noise, evaluated=self._evaluated_rounds())
        self.estimator = self.journal.estimator
        self.identity = identity
        self.secagg = self._secure_aggregation()
        self._silent_rounds = 0
        promised = config.privacy.unit != "none" or config.secagg.mode != "off"
        self._keeps_late = keeps_late and not promised and not getattr(observer, "reads_folder", True)
        self._unkept: tuple[Mapping[str, Any], RunState] | None = None

    def run(self) -> RunState:
        """Go from the last kept round to the end, or to where the privacy budget ends, and return the final state.

        Raises:
            RoundFailedError: a round stayed below ``min-respondents``; earlier rounds are kept.
            TooFewClientsError: not enough clients were connected in time.
            RunFailedError: the model diverged, or the folder cannot be written.
            RunUnreadableError: what was kept is damaged, or of another model than the task's.
        """
        kept = self.folder.load_state()
        state = self.initialise() if kept is None else kept
        if state.spec_sha256 != self.model.spec.sha256:
            raise RunUnreadableError(
                f"{self.folder.path} was begun with another model than the task builds now (of "
                f"{state.server.params.size:,} and {self.model.spec.size:,} numbers). Put the task back as it was, or "
                "start a new run"
            )
        if self.simulated_clock is not None:
            self.simulated_clock.advance(state.totals.simulated_s - self.simulated_clock.monotonic())
        self.journal.open(kept)
        try:
            state = self._rounds_from(state)
        finally:
            self._keep_up()  # whatever ends the run: what was finished is kept
        self.journal.close(state)
        return state

    def _rounds_from(self, state: RunState) -> RunState:
        """Go through the rounds that are left."""
        while state.round_number < self.config.federation.rounds or state.unmeasured is not None:
            if state.unmeasured is None:
                if self.journal.is_spent(state):
                    break
                try:
                    state = self._train_round(state)
                except _BudgetSpentError as spent:
                    return spent.state
            state = self._measure_round(state)
        return state

    # -- the steps ---------------------------------------------------------------------------------------------

    def initialise(self) -> RunState:
        """Set θ to the task's own initial parameters, under the run's seed."""
        server = self.algorithm.init(self.model.vector().astype(np.float64))
        return RunState(
            server=server, totals=Totals(), spec_sha256=self.model.spec.sha256, mechanism=self.estimator.init()
        )

    def distribute_model(self, kind: Any, draw: Draw, plan: RoundPlan, parameters: NDArray[Any]) -> list[Request]:
        """Address one request with the model to every client of the cohort."""
        return [Request(kind=kind, client=client, plan=plan, vector=parameters) for client in draw.cohort]

    def communicate(self, requests: Sequence[Request], plan: RoundPlan) -> Iterator[Reply]:
        """Send the requests and yield the replies as they come, in an order that is always the same."""
        timeout_s = self.config.federation.round_timeout_s
        replies, done = iter(self.network.exchange(requests, self.model.spec, timeout_s)), 0
        self._keep_up()  # while clients work
        while True:
            with span("messages"):
                reply = next(replies, None)
            if reply is None:
                return
            yield reply
            done += reply.count if isinstance(reply, GroupReply) else 1
            with span("watch"):
                self.observer.replied(plan.round_number, done, len(requests))

    @spanned("update")
    def update(self, state: RunState, mean: NDArray[np.float64]) -> RunState:
        """Let the algorithm move θ by the mean update.

        Places that no gradient trains (BatchNorm's running mean, a frozen layer) take the plain mean whatever the
        algorithm: an adaptive step could make a variance negative.
        """
        old = state.server.params
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

    @spanned("validate")
    def validate(self, state: RunState) -> Validation:
        """Measure the model: on the central test set, at the clients, or both, as the scenario says."""
        parameters = self._parameters(state)
        central: dict[str, float] = {}
        if self.test is not None:
            seeds = self.seeds.child("validate")
            with task_code(self.task, "loss or metrics"):
                central = evaluate(self.model, self.task, parameters, self.test, seeds=seeds).means()
            self._check_finite(central, state.round_number)
        if not self._asks_clients:
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

    @spanned("rounds")
    def _train_round(self, state: RunState) -> RunState:
        """Take the first half of a round: invite, train, sum, update, and note in the ledger what will leave."""
        started, before = self.clock.monotonic(), state.totals
        number = state.round_number + 1
        tries, state = self._train_until_enough(number, state)
        tally, parameters = tries[-1], self._parameters(state)
        with span("update"):
            estimate = self.estimator.estimate(tally, state)
        try:
            state = self.update(replace(state, mechanism=estimate.mechanism), estimate.mean)
        except RunFailedError:
            if not self._has_released_sum:
                self.journal.admit(state, estimate.release)  # that it diverged says something of the sum
            raise
        state = replace(state, totals=self._timed(state.totals.plus(wall_s=self.clock.monotonic() - started)))
        realised = Realised.of(tally)
        line = {
            "round": number,
            "attempt": len(tries),
            "cohort": tally.cohort,
            "respondents": tally.respondents,
            "realised_salt": realised.salt,
            "failures": _codes(tally.failures),
            "train_loss": tally.loss / tally.weight if tally.weight and self.config.privacy.unit == "none" else None,
            "wall_s": round(state.totals.wall_s - before.wall_s, 6),
            "upload_bytes": state.totals.upload_bytes - before.upload_bytes,
            "download_bytes": state.totals.download_bytes - before.download_bytes,
        }
        if self.simulated_clock is not None:
            line["simulated_s"] = round(state.totals.simulated_s - before.simulated_s, 6)
        if isinstance(tally, MaskedTally) and tally.clipped is not None:
            line["clipped"] = tally.clipped
        if len(tries) > 1:
            line["earlier_failures"] = [_codes(each.failures) for each in tries[:-1]]
        evidence = {
            "model-before": vector_sha256(parameters).hex(),
            "model-after": vector_sha256(self._parameters(state)).hex(),
            "realised": realised.commitment,
            "date": self.clock.utc()[:10],  # the hour would tell how long clients took
        }
        if isinstance(tally, MaskedTally):
            evidence |= tally.evidence
        state = replace(state, unmeasured=line)
        if self._has_released_sum:  # the ledger has had the release since before the sum was unmasked
            state = self.journal.noted(state, "round.model", {"round": number, "evidence": evidence})
        else:
            body = replace(estimate.release, evidence=evidence).to_body()
            state = self.journal.noted(state, "round.release", body)
        if is_measured(self.config, number) and self._asks_clients:  # the new model leaves to be measured
            with span("keep"):
                self.folder.save_state(state)
                self.journal.commit(state)
        return state

    @spanned("rounds")
    def _measure_round(self, state: RunState) -> RunState:
        """Take the second half of a round: validate, and keep it."""
        started, number = self.clock.monotonic(), state.round_number
        measured = Validation(metrics={}, totals=state.totals)
        if is_measured(self.config, number):
            try:
                measured = self.validate(state)
            except RunFailedError:
                self.journal.commit(state)
                raise
        elapsed_s = self.clock.monotonic() - started
        totals, before = self._timed(measured.totals.plus(wall_s=elapsed_s)), state.totals
        trained = state.unmeasured or {}
        line = {
            **trained,
            "metrics": measured.metrics,
            "wall_s": round(trained["wall_s"] + elapsed_s, 6),
            "upload_bytes": trained["upload_bytes"] + totals.upload_bytes - before.upload_bytes,
            "download_bytes": trained["download_bytes"] + totals.download_bytes - before.download_bytes,
        }
        if self.simulated_clock is not None:
            line["simulated_s"] = round(trained["simulated_s"] + totals.simulated_s - before.simulated_s, 6)
        if measured.federated_metrics:
            line["federated_metrics"] = measured.federated_metrics
        if measured.failures:
            line["evaluation_failures"] = _codes(measured.failures)
        state = replace(state, totals=totals, unmeasured=None)
        if measured.release is not None:
            release = replace(measured.release, evidence={"date": self.clock.utc()[:10]})
            state = self.journal.noted(state, "eval.release", release.to_body())
        self._unkept = (line, state)
        if not self._keeps_late or number == 1:  # from the first on there is something to go on with
            self._keep_up()
        with span("watch"):
            self.observer.finished_round(line)
        return state

    def _keep_up(self) -> None:
        """Keep the last round, if it is not kept yet."""
        if self._unkept is None:
            return
        (line, state), self._unkept = self._unkept, None
        with span("keep"):
            self.folder.save_round(line, state)
            self.journal.commit(state)

    def _train_until_enough(self, number: int, state: RunState) -> tuple[list[Tally], RunState]:
        """Try the round with fresh cohorts until enough clients answered; return every try, and what all cost."""
        federation, tries = self.config.federation, list[Tally]()
        for attempt in range(1, federation.round_tries + 1):
            draw = self._draw("cohort", number, attempt, state)
            plan = self._plan(number, attempt, state, watched=min(draw.cohort, default=-1))
            tally = self.estimator.tally(draw, state)
            if isinstance(tally, MaskedTally):
                self._communicate_masked(tally, plan, state)
            else:
                requests = self.distribute_model("train", draw, plan, self._parameters(state))
                for reply in self.communicate(requests, plan):
                    with span("sum"):
                        tally.add(reply)
            totals = state.totals.plus(
                client_updates=tally.respondents,
                upload_bytes=tally.upload_bytes,
                download_bytes=tally.download_bytes,
            )
            state = replace(state, totals=totals, last_round=self._last_round(state, draw, number))
            tries.append(tally)
            if not self.estimator.retries:
                self._check_somebody(number, tally)
                return tries, state
            if tally.respondents >= federation.min_respondents:
                return tries, state
            tally.forget()
            if self._has_released_sum and self.journal.is_spent(state):
                raise _BudgetSpentError(state)  # what was given up may have been seen, and leaves nothing for another
        last = tries[-1]
        cause = last.aborted if isinstance(last, MaskedTally) else None
        raise RoundFailedError(self._too_few(number, tries), number, _codes(last.failures)) from cause

    @spanned("secagg")
    def _communicate_masked(self, tally: MaskedTally, plan: RoundPlan, state: RunState) -> None:
        """Distribute the model and take back the sum of what clients learned, and nothing of a single one."""
        estimator, secagg = self.estimator, self.secagg
        if secagg is None or not isinstance(estimator, MaskedEstimator):
            raise TypeError("a masked tally is for a run under secure aggregation")

        def before_unmask(survivors: int) -> None:
            if estimator.releases_sum:
                release = estimator.release(tally, survivors, plan.round_number)
                evidence = {
                    "model-before": vector_sha256(self._parameters(state)).hex(),
                    "secagg": self.config.secagg.mode,
                    "attempt": str(plan.attempt),
                    "date": self.clock.utc()[:10],
                }
                self.journal.admit(state, replace(release, evidence=evidence))

        secagg.collect(tally, plan, self._parameters(state), before_unmask=before_unmask)

    def _secure_aggregation(self) -> SecureAggregation | None:
        """Return what drives the sessions of a run whose server sees the sum alone."""
        if not isinstance(self.estimator, MaskedEstimator):
            return None
        return SecureAggregation(
            self.config,
            self.network,
            self.estimator,
            identity=self.identity,
            folder=self.folder.path,
            clock=self.clock,
            observer=self.observer,
        )

    @property
    def _has_released_sum(self) -> bool:
        """Whether the unmasked sum is itself a release, which the ledger had before."""
        return isinstance(self.estimator, MaskedEstimator) and self.estimator.releases_sum

    def _last_round(self, state: RunState, draw: Draw, number: int) -> Mapping[int, int]:
        """Return in which round each client was last invited, where the draw depends on it."""
        if draw.method != "separated":
            return state.last_round
        return {**state.last_round, **dict.fromkeys(draw.cohort, number)}

    def _check_somebody(self, number: int, tally: Tally) -> None:
        """Count rounds in which clients were invited and none answered; a few in a row mean that none ever will.

        No single round is judged by who answered: that would tell something of a secret cohort.
        """
        self._silent_rounds = 0 if tally.respondents or not tally.cohort else self._silent_rounds + 1
        if self._silent_rounds >= self.config.federation.round_tries:
            raise RoundFailedError(self._too_few(number, [tally]), number, _codes(tally.failures))

    def _too_few(self, number: int, tries: Sequence[Tally]) -> str:
        """Say why a round failed and what to do."""
        tally = tries[-1]
        counts: dict[str, int] = {}
        for failure in tally.failures.values():
            counts[str(failure.code)] = counts.get(str(failure.code), 0) + 1
        reasons = ", ".join(f"{count} {code}" for code, count in sorted(counts.items()))
        federation = self.config.federation
        if not self.estimator.retries:
            return (
                f"round {number}: no client answered in {federation.round_tries} rounds in a row (last round: "
                f"{reasons}). {self._kept(number)} Look into the clients' logs"
            )
        if isinstance(tally, MaskedTally) and tally.aborted is not None:
            return (
                f"round {number}: secure aggregation was given up in each of {len(tries)} tries; the last one "
                f"{tally.aborted}. {reasons or 'No client said why'}. {self._kept(number)} Look into the clients' "
                "logs, or invite a larger cohort"
            )
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
        """Measure at the clients; where they are hidden, the result is noised and is a release."""
        plan = self._plan(state.round_number, 1, state)
        draw = self._draw("evaluate", state.round_number, 1, state)
        answers: list[EvaluateReply] = []
        failures: dict[int, Failure] = {}
        totals = state.totals
        for reply in self.communicate(self.distribute_model("evaluate", draw, plan, parameters), plan):
            totals = totals.plus(upload_bytes=reply.upload_bytes, download_bytes=reply.download_bytes)
            if isinstance(reply, Failure):
                failures[reply.client] = reply
            elif isinstance(reply, EvaluateReply):
                answers.append(reply)
        if not isinstance(self.estimator, PrivateMean):
            return Validation(metrics=client_means(answers), totals=totals, failures=failures)
        names = tuple(self.task.metric_names)
        strangers = [each for each in answers if set(each.sums) != set(names)]
        failures.update({each.client: Failure(client=each.client, code=FailureCode.BAD_REPLY) for each in strangers})
        known = [each for each in answers if each.client not in failures]
        metrics, release = self.estimator.evaluation(known, draw, names, state.round_number)
        return Validation(metrics=metrics, totals=totals, failures=failures, release=release)

    @spanned("draw")
    def _draw(self, purpose: str, number: int, attempt: int, state: RunState) -> Draw:
        """Draw a cohort from the clients that are there."""
        federation = self.config.federation
        there = self.network.clients(federation.cohort, federation.round_timeout_s)
        return self.estimator.draw(there, purpose, number, attempt, state)

    @property
    def _asks_clients(self) -> bool:
        """Whether clients measure the model."""
        return asks_clients(self.config, self.test)

    def _evaluated_rounds(self) -> list[int]:
        """Return the rounds after which clients measure the model."""
        rounds = range(1, self.config.federation.rounds + 1)
        return [number for number in rounds if is_measured(self.config, number)] if self._asks_clients else []

    def _plan(self, number: int, attempt: int, state: RunState, watched: int = -1) -> RoundPlan:
        """Return what the clients of this try are told."""
        simulated = None if self.identity is None else self.identity.simulated
        return RoundPlan(
            config=self.config,
            round_number=number,
            attempt=attempt,
            proximal_mu=self.algorithm.proximal_mu,
            spec_sha256=self.model.spec.sha256,
            bound_l2=self.estimator.bound_l2(state),
            run=self.journal.instance,
            identities="" if simulated is None else str(simulated.folder),
            watched=-1 if simulated is None else watched,
        )

    def _timed(self, totals: Totals) -> Totals:
        """Return the totals with the simulated time that it is now."""
        clock = self.simulated_clock
        return totals if clock is None else replace(totals, simulated_s=clock.monotonic())

    def _parameters(self, state: RunState) -> NDArray[Any]:
        """Return θ as it is sent, in the model's own type."""
        return state.server.params.astype(self.model.spec.dtype)


class _BudgetSpentError(Exception):
    """A round that was given up cannot be tried again within the budget; the model of the round before is the last.

    Attributes:
        state: that model, with what the round has cost.
    """

    def __init__(self, state: RunState) -> None:
        self.state = state
        super().__init__()


def _codes(failures: Mapping[int, Failure]) -> dict[str, str]:
    """Return client to failure code, in the clients' order, as it is written down."""
    return {str(client): str(failure.code) for client, failure in sorted(failures.items())}
