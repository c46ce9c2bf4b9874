"""The round loop on an in-memory twin of the network: failure is normal, and every wait has an end."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedlearn.arrays import ParamSpec
from fedlearn.config import RunConfig
from fedlearn.errors import (
    ConfigError,
    ReplyError,
    RoundFailedError,
    RunFailedError,
    RunUnreadableError,
    TooFewClientsError,
)
from fedlearn.federation.messages import (
    Failure,
    FailureCode,
    Reply,
    Request,
    check_evaluate_reply,
    check_train_reply,
)
from fedlearn.federation.observer import SilentObserver
from fedlearn.federation.rounds import Federation
from fedlearn.federation.run_folder import RunFolder
from fedlearn.learning import Examples, Task
from fedlearn.privacy.noise import SimulatedNoise
from fedlearn.sources import ManualClock, SeedTree

NOISE = SimulatedNoise(SeedTree.root(0))


class Line(Task):
    """Two weights and a bias, without any data: the clients of the twin invent their updates."""

    def build_model(self) -> nn.Module:
        return nn.Linear(2, 1)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return ((output[:, 0] - target) ** 2).float()


class WithTestSet(Line):
    """The same with a central test set."""

    def load_test(self, path):
        return Examples(torch.ones(4, 2), torch.zeros(4))


class Normed(Line):
    """A model with statistics that no gradient trains."""

    def build_model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))


@dataclass
class Answer:
    """What a client of the twin says."""

    vector: Any
    count: Any = 1
    loss: Any = 0.5


Client = Callable[[Request, ParamSpec], Answer]


def honest(request: Request, spec: ParamSpec) -> Answer:
    return Answer(np.full(spec.size, (request.client + 1) / 100, spec.dtype), request.client + 1)


@dataclass
class Twin:
    """A ``Network`` in memory; ``behaviour`` says who is not honest, ``arrivals`` when clients come."""

    count: int
    clock: ManualClock
    behaviour: dict[int, Client] = field(default_factory=dict)
    arrivals: Callable[[float], int] | None = None
    asked: list[Request] = field(default_factory=list)

    def clients(self, at_least: int, timeout_s: float) -> Sequence[int]:
        deadline = self.clock.monotonic() + timeout_s
        while (there := self.arrivals(self.clock.monotonic()) if self.arrivals else self.count) < at_least:
            if self.clock.monotonic() >= deadline:
                raise TooFewClientsError(f"{there} of {at_least}")
            self.clock.sleep(1.0)
        return range(there)

    def exchange(self, requests: Sequence[Request], spec: ParamSpec, timeout_s: float) -> Iterator[Reply]:
        for request in requests:
            self.asked.append(request)
            self.clock.sleep(0.25)
            yield self._reply(request, spec)

    def _reply(self, request: Request, spec: ParamSpec) -> Reply:
        sizes = {"upload_bytes": 100, "download_bytes": 1000}
        try:
            answer = self.behaviour.get(request.client, honest)(request, spec)
            numbers = {"num-examples": answer.count, "loss": answer.loss}
            if request.kind == "evaluate":
                return check_evaluate_reply(request.client, numbers, plan=request.plan, **sizes)
            return check_train_reply(
                request.client, {"update": answer.vector}, numbers, plan=request.plan, spec=spec, **sizes
            )
        except ReplyError as error:
            return Failure(client=request.client, code=FailureCode(error.code), incident="0a1b", **sizes)
        except ZeroDivisionError:
            return Failure(client=request.client, code=FailureCode.TRAINING_FAILED, incident="0a1b", **sizes)


def nan(request: Request, spec: ParamSpec) -> Answer:
    vector = honest(request, spec).vector
    vector[-1] = np.nan
    return Answer(vector)


def long(request: Request, spec: ParamSpec) -> Answer:
    return Answer(np.zeros(spec.size + 1, spec.dtype))


def raising(request: Request, spec: ParamSpec) -> Answer:
    raise ZeroDivisionError("the patient's name is in this text")


def greedy(request: Request, spec: ParamSpec) -> Answer:
    return Answer(np.full(spec.size, 1e6, spec.dtype), 10**12)


@dataclass
class Run:
    """A federation and all that a test looks at."""

    federation: Federation
    twin: Twin
    folder: RunFolder

    def vector(self) -> np.ndarray:
        return self.folder.load_state().server.params

    def asked(self, kind: str = "train") -> list[tuple[str, list[int]]]:
        """Return the cohort of every try, by group."""
        groups: dict[str, list[int]] = {}
        for request in self.twin.asked:
            if request.kind == kind:
                groups.setdefault(request.plan.group, []).append(request.client)
        return list(groups.items())


@pytest.fixture
def begin(tmp_path):
    """Return a function that sets up a run; a second call with the same name opens the folder again."""

    def call(
        name="run", *, clients=5, task=None, behaviour=None, arrivals=None, training=None, network=None, **federation
    ):
        federation = {key.replace("_", "-"): value for key, value in federation.items()}
        tables = {
            "task": "line",
            "federation": {"clients": clients, "rounds": 2, "evaluation": "off", **federation},
            "training": training or {},
        }
        config = RunConfig.from_mapping(tables)
        path = tmp_path / name
        folder = RunFolder.open(path) if path.exists() else RunFolder.create(path, config)
        clock = ManualClock()
        twin = network or Twin(clients, clock, behaviour or {}, arrivals)
        federation = Federation(
            config, task or Line(), twin, folder, clock=clock, observer=SilentObserver(), noise=NOISE
        )
        return Run(federation, twin, folder)

    return call


def mean_of_honest(clients):
    return sum((c + 1) ** 2 / 100 for c in clients) / sum(c + 1 for c in clients)


# -- clients that fail -------------------------------------------------------------------------------------------


def test_the_mean_is_weighted_by_examples_and_summed_in_float64(begin):
    run = begin(rounds=1)
    start = run.federation.model.vector().astype(np.float64)
    run.federation.run()
    updates = [np.full(3, (c + 1) / 100, np.float32).astype(np.float64) for c in range(5)]
    expected = start + sum((c + 1) * u for c, u in enumerate(updates)) / 15
    np.testing.assert_allclose(run.vector(), expected, rtol=1e-14)


@pytest.mark.parametrize(
    ("bad", "code"),
    [(nan, "not-finite"), (long, "bad-reply"), (raising, "training-failed"), (greedy, "bad-reply")],
)
def test_a_client_that_answers_badly_is_left_out_counted_and_named(begin, bad, code):
    run = begin(behaviour={2: bad})
    start = run.federation.model.vector().astype(np.float64)
    run.federation.run()
    np.testing.assert_allclose(run.vector(), start + 2 * mean_of_honest([0, 1, 3, 4]), rtol=1e-6)
    for line in run.folder.metrics():
        assert line["failures"] == {"2": code}
        assert (line["cohort"], line["respondents"], line["attempt"]) == (5, 4, 1)
        assert line["upload_bytes"] == 500
        assert line["download_bytes"] == 5000
    assert "patient" not in (run.folder.path / "metrics.jsonl").read_text()
    assert run.folder.load_state().totals.client_updates == 8


def test_a_client_that_fails_leaves_the_same_model_as_one_that_was_never_weighed(begin):
    first, second = begin("a", behaviour={2: nan}), begin("b", behaviour={2: raising})
    assert first.federation.run().server.params.tobytes() == second.federation.run().server.params.tobytes()


def test_a_huge_finite_loss_does_not_end_the_run(begin):
    run = begin(behaviour={0: lambda r, s: Answer(np.zeros(s.size, s.dtype), 10_000, 1.7e308)})
    run.federation.run()
    assert [line["failures"] for line in run.folder.metrics()] == [{"0": "not-finite"}] * 2


# -- rounds that fail --------------------------------------------------------------------------------------------


def failing_until(attempt, number=1):
    """Return a client that raises in tries of round ``number`` before ``attempt``."""

    def client(request: Request, spec: ParamSpec) -> Answer:
        if request.plan.round_number == number and request.plan.attempt < attempt:
            raise ZeroDivisionError
        return honest(request, spec)

    return client


def test_below_min_respondents_the_round_is_repeated_with_a_fresh_cohort(begin):
    everyone = dict.fromkeys(range(30), failing_until(3))
    run = begin(clients=30, cohort=4, min_respondents=3, behaviour=everyone, round_tries=3)
    run.federation.run()
    groups = dict(run.asked())
    assert list(groups) == ["1.1", "1.2", "1.3", "2.1"]
    assert len({tuple(cohort) for cohort in groups.values()}) == 4
    assert [line["attempt"] for line in run.folder.metrics()] == [3, 1]
    assert run.folder.load_state().round_number == 2


def test_what_failed_tries_cost_is_counted(begin):
    failing = {0: failing_until(2), 1: failing_until(2)}
    run = begin(clients=3, rounds=1, behaviour=failing, min_respondents=2)
    totals = run.federation.run().totals
    assert totals.client_updates == 1 + 3
    assert totals.upload_bytes == 600
    assert totals.download_bytes == 6000
    (line,) = run.folder.metrics()
    assert (line["upload_bytes"], line["download_bytes"]) == (600, 6000)
    assert (line["failures"], line["earlier_failures"]) == ({}, [{"0": "training-failed", "1": "training-failed"}])


def test_after_the_last_try_the_run_ends_and_keeps_its_last_good_model(begin):
    failing = dict.fromkeys(range(4), failing_until(99, number=3))
    run = begin(behaviour=failing, rounds=5, round_tries=2, min_respondents=2)
    with pytest.raises(RoundFailedError) as failed:
        run.federation.run()
    assert failed.value.round_number == 3
    assert failed.value.failures == dict.fromkeys("0123", "training-failed")
    for words in ("round 3", "1 clients answered", "2 are needed", "4 training-failed", str(run.folder.path)):
        assert words in str(failed.value)
    assert [group for group, _ in run.asked()] == ["1.1", "2.1", "3.1", "3.2"]
    assert run.folder.load_state().round_number == 2
    assert [line["round"] for line in run.folder.metrics()] == [1, 2]


def test_a_run_that_failed_goes_on_from_there_to_the_same_model(begin):
    whole = begin("whole", rounds=4).federation.run()
    broken = begin("broken", rounds=4, behaviour=dict.fromkeys(range(5), failing_until(99, number=3)))
    with pytest.raises(RoundFailedError):
        broken.federation.run()
    kept = (broken.folder.path / "checkpoint" / "state.safetensors").read_bytes()
    with pytest.raises(RoundFailedError):
        begin("broken", rounds=4, behaviour=dict.fromkeys(range(5), failing_until(99, number=3))).federation.run()
    assert (broken.folder.path / "checkpoint" / "state.safetensors").read_bytes() == kept
    mended = begin("broken", rounds=4)
    assert mended.federation.run().server.params.tobytes() == whole.server.params.tobytes()
    assert [group for group, _ in mended.asked()] == ["3.1", "4.1"]


def diverging_in(number):
    def client(request: Request, spec: ParamSpec) -> Answer:
        size = 3e38 if request.plan.round_number == number else 0.01
        return Answer(np.full(spec.size, size, spec.dtype))

    return client


def test_a_model_that_diverges_ends_the_run_and_the_round_before_is_kept(begin):
    run = begin(rounds=4, behaviour=dict.fromkeys(range(5), diverging_in(3)), training={"server-learning-rate": 10.0})
    with pytest.raises(RunFailedError, match="round 3") as failed:
        run.federation.run()
    assert "learning-rate" in str(failed.value)
    state = run.folder.load_state()
    assert state.round_number == 2
    assert np.isfinite(state.server.params).all()


def test_too_few_clients_end_the_run_at_the_deadline_and_not_later(begin):
    run = begin(arrivals=lambda now: 3, round_timeout_s=60)
    with pytest.raises(TooFewClientsError, match="3 of 5"):
        run.federation.run()
    assert run.twin.clock.monotonic() == 60.0
    assert run.twin.asked == []


def test_clients_that_come_late_are_waited_for(begin):
    run = begin(arrivals=lambda now: min(5, int(now // 10)), round_timeout_s=60)
    run.federation.run()
    assert run.asked() == [("1.1", [0, 1, 2, 3, 4]), ("2.1", [0, 1, 2, 3, 4])]


# -- what is averaged --------------------------------------------------------------------------------------------


def sharpening(request: Request, spec: ParamSpec) -> Answer:
    """A client whose data have hardly any variance: its running variance goes most of the way to zero."""
    entries = spec.unflatten(request.vector)
    update = {name: np.full_like(array, 0.01) for name, array in entries.items()}
    update["1.running_var"] = -0.9 * entries["1.running_var"]
    update["1.running_mean"] = np.full(3, 5.0, np.float32) - entries["1.running_mean"]
    return Answer(spec.flatten(update))


@pytest.mark.parametrize("algorithm", ["fedadam", "fedyogi", "fedadagrad", "fedavgm"])
def test_statistics_take_the_plain_mean_whatever_the_algorithm(begin, algorithm):
    training = {"algorithm": algorithm, "server-learning-rate": 1.0}
    run = begin(task=Normed(), rounds=6, behaviour=dict.fromkeys(range(5), sharpening), training=training)
    spec = run.federation.model.spec
    start = spec.unflatten(run.federation.model.vector())
    assert spec.trainable_size < spec.size
    entries = spec.unflatten(run.federation.run().server.params)
    assert (entries["1.running_var"] > 0).all()
    np.testing.assert_allclose(entries["1.running_var"], 0.1**6, rtol=1e-4)
    np.testing.assert_allclose(entries["1.running_mean"], 5.0, rtol=1e-6)
    assert not np.allclose(entries["0.bias"], start["0.bias"] + 6 * 0.01, atol=1e-4)  # that is the plain mean


def test_the_loop_holds_one_update_at_a_time(begin):
    class Counting(Twin):
        """Asserts, before each reply, that the ones before the last are gone."""

        def exchange(self, requests, spec, timeout_s):
            alive: list[weakref.ref] = []
            for reply in super().exchange(requests, spec, timeout_s):
                assert sum(ref() is not None for ref in alive) <= 1
                alive.append(weakref.ref(reply.update))
                yield reply
                del reply

    run = begin(clients=50, network=Counting(50, ManualClock()))
    run.federation.run()
    assert len(run.twin.asked) == 100


def test_the_requests_of_a_round_share_one_vector(begin):
    run = begin(clients=20, rounds=1)
    run.federation.run()
    assert len({id(request.vector) for request in run.twin.asked}) == 1


# -- validation --------------------------------------------------------------------------------------------------


def test_clients_validate_where_there_is_no_central_test_set(begin):
    behaviour = {c: lambda r, s: Answer(np.zeros(s.size, s.dtype), r.client + 1, r.client * 1.0) for c in range(5)}
    behaviour[3] = lambda r, s: Answer(np.zeros(s.size, s.dtype), 1, np.nan if r.kind == "evaluate" else 0.0)
    run = begin(evaluation="auto", behaviour=behaviour)
    run.federation.run()
    for line in run.folder.metrics():
        assert line["metrics"]["loss"] == pytest.approx((0 + 1 + 2 + 4) / (1 + 2 + 3 + 5))
        assert line["metrics"]["loss_client_mean"] == pytest.approx((0 + 1 / 2 + 2 / 3 + 4 / 5) / 4)
        assert line["evaluation_failures"] == {"3": "not-finite"}


def test_nobody_able_to_validate_is_no_metric_and_no_crash(begin):
    run = begin(
        evaluation="federated",
        behaviour=dict.fromkeys(
            range(5), lambda r, s: Answer(np.zeros(s.size, s.dtype), 1, np.nan if r.kind == "evaluate" else 0.0)
        ),
    )
    run.federation.run()
    assert [line["metrics"] for line in run.folder.metrics()] == [{}, {}]


def test_validation_happens_as_often_as_asked_and_after_the_last_round(begin):
    run = begin(task=WithTestSet(), evaluation="central", rounds=5, evaluate_every=2)
    run.federation.run()
    assert [sorted(line["metrics"]) for line in run.folder.metrics()] == [[], ["loss"], [], ["loss"], ["loss"]]
    assert run.asked("evaluate") == []


def test_both_ways_of_validating_stay_apart(begin):
    run = begin(task=WithTestSet(), evaluation="both", rounds=1)
    run.federation.run()
    (line,) = run.folder.metrics()
    assert set(line["metrics"]) == {"loss"}
    assert set(line["federated_metrics"]) == {"loss", "loss_client_mean"}


@pytest.mark.parametrize("wanted", ["central", "both"])
def test_a_central_test_set_that_does_not_exist_cannot_be_asked_for(begin, wanted):
    with pytest.raises(ConfigError) as refused:
        begin(evaluation=wanted)
    assert refused.value.key == "federation.evaluation"


# -- going on ----------------------------------------------------------------------------------------------------


def test_a_task_that_was_changed_since_is_refused_and_not_a_traceback(begin):
    begin(rounds=2).federation.run()
    with pytest.raises(RunUnreadableError, match="Put the task back"):
        begin(rounds=2, task=Normed()).federation.run()


def test_a_finished_run_asks_nobody(begin):
    first = begin().federation.run()
    again = begin()
    assert again.federation.run().server.params.tobytes() == first.server.params.tobytes()
    assert again.twin.asked == []
