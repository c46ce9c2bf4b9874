"""Random faults, thousands of them: no hang, no crash of the run, the sum is right, and every failure is counted.

A schedule is what goes wrong in one try of a round: who is lost and when, who crashes, who is late, whose reply comes
twice, damaged or falsified. Every one of them is met in a real run through the ServerApp, the LocalGrid and the
ClientApp. What should have come of it is computed here in a few lines of NumPy: a model of three numbers, of which the
gradient is a formula, a code for every fault, and a mean.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from fedlearn.config import RunConfig
from fedlearn.data.loaders import distribute_data
from fedlearn.errors import RoundFailedError
from fedlearn.federation.checkpoint import load_checkpoint
from fedlearn.federation.run_folder import RunFolder
from fedlearn.learning import build_flat_model
from fedlearn.simulation.devices import SeededDevices
from fedlearn.simulation.engine import simulate
from fedlearn.simulation.faults import SeededFaults
from fedlearn.sources import SeedTree
from fedlearn.tasks import load_task

CLIENTS = 4
RATE = 1e-3
MODEL_BYTES = 3 * 8
DEADLINE_S = 100.0

TINY = """
import torch
from torch import nn
from fedlearn.learning import Examples, Pool, Task


class Tiny(Task):
    def build_model(self):
        return nn.Linear(2, 1, dtype=torch.float64)

    def loss(self, output, target):
        return (output[:, 0] - target) ** 2

    def load_pool(self, path):
        groups = torch.arange(4).repeat_interleave(torch.tensor([1, 2, 3, 1]))
        inputs = torch.linspace(-1, 1, 2 * len(groups), dtype=torch.float64).reshape(-1, 2)
        return Pool(Examples(inputs, inputs.sum(dim=1).sin(), groups=groups.numpy()))
"""


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    """Draw no pictures, and say nothing of replies that came twice."""
    monkeypatch.setattr("fedlearn.federation.summary.draw_history", lambda *_, **__: "<svg/>")
    monkeypatch.setattr("fedlearn.federation.summary.versions", dict)
    monkeypatch.setattr(logging.getLogger("fedlearn.server"), "disabled", True)


def schedule(number: int) -> dict:
    """Return the ``[faults]`` of one run: each fault is on or off, and seldom or often."""
    draw = np.random.default_rng([5, number])
    faults = {
        name: round(float(draw.uniform(0.02, 0.4)), 3)
        for name in ("drop", "crash", "delay", "duplicate", "nan", "wrong-shape", "byzantine")
        if draw.random() < 0.5
    }
    faults["moment"] = str(draw.choice(["before", "after", "any"]))
    faults["delay-s"] = float(draw.choice([1.0, 99.0, 101.0]))
    attack = {
        "attack": str(draw.choice(["sign-flip", "scale"])),
        "factor": float(draw.choice([1.0, 3.0, 1e300])),  # the last one overflows
    }
    if "byzantine" in faults:
        faults |= attack
    faults["devices"] = str(draw.choice(["none", "phones", "mixed"]))
    faults["examples-per-s"] = float(draw.choice([0.05, 1.0]))  # of the slow ones, some are late by themselves
    return faults


def config_of(number: int, task: Path, rounds: int, workers: int = 0) -> RunConfig:
    """Return a run with a schedule."""
    federation = {"clients": CLIENTS, "rounds": rounds, "min-respondents": 1 + number % 2, "round-tries": 4}
    return RunConfig.from_mapping(
        {
            "task": str(task),
            "seed": number,
            "federation": {**federation, "evaluation": "off", "round-timeout-s": DEADLINE_S},
            "data": {"partition": "natural"},
            "training": {
                "batch-size": 0,
                "learning-rate": RATE,
                "local-steps": 1 + number % 3,
                "weighting": ("examples", "uniform")[number % 5 == 0],
            },
            "simulation": {"workers": workers, "trainer": ("auto", "sequential")[number % 4 == 1]},
            "faults": schedule(number),
        }
    )


@dataclass
class Run:
    """What a run left behind: its model after every round, its lines, and whether it gave up."""

    config: RunConfig
    models: list[np.ndarray] = field(default_factory=list)
    lines: list[dict] = field(default_factory=list)
    failed: RoundFailedError | None = None

    def told(self) -> str:
        """Everything that has to be the same for any number of workers."""
        numbers = [{k: v for k, v in line.items() if k not in ("wall_s", "realised_salt")} for line in self.lines]
        return json.dumps(numbers) + "".join(model.tobytes().hex() for model in self.models)


class Notebook:
    """Notes the model after every round."""

    def __init__(self, folder: RunFolder, run: Run) -> None:
        self.folder, self.run = folder, run

    def replied(self, round_number: int, done: int, total: int) -> None:
        assert done <= total  # a reply that comes twice is counted once

    def finished_round(self, line) -> None:
        path = self.folder.path / "checkpoint" / "state.safetensors"
        self.run.models.append(load_checkpoint(path, self.run.config.sha256()).server.params)


def played(config: RunConfig, path: Path) -> Run:
    """Return what came of a run."""
    folder, run = RunFolder.create(path, config), Run(config)
    try:
        simulate(folder, Notebook(folder, run))
    except RoundFailedError as error:
        run.failed = error
    run.lines = folder.metrics()
    return run


@dataclass
class Expected:
    """What one try of a round has to come to."""

    failures: dict[str, str] = field(default_factory=dict)
    total: np.ndarray = field(default_factory=lambda: np.zeros(3))
    weight: int = 0
    respondents: int = 0
    simulated_s: float = 0.0


class Oracle:
    """Says what a run should come to: from its faults' draws, and from what honest clients learn, by a formula."""

    def __init__(self, config: RunConfig) -> None:
        self.config, self.task = config, load_task(config.task)
        self.seeds = SeedTree.root(config.seed)
        self.model = build_flat_model(self.task, self.seeds.child("initialise"))
        held = [distribute_data(self.task, config).client(client).train for client in range(CLIENTS)]
        self.data = [(np.c_[each.inputs.numpy(), np.ones(len(each))], each.targets.numpy()) for each in held]
        self.first = self.model.vector()  # two weights and a bias
        self.faults = SeededFaults(config.faults, self.seeds.child("faults"), clients=CLIENTS)
        self.devices = SeededDevices(
            config.faults,
            self.seeds.child("faults").child("devices"),
            training=config.training,
            model_bytes=MODEL_BYTES,
            deadline_s=DEADLINE_S,
            size_of=lambda client, _: len(self.data[client][1]),
            clients=CLIENTS,
            cohort=CLIENTS,
        )
        self.seen: Counter[str] = Counter()

    def seconds(self, group: str, client: int) -> float:
        """Return how long a client takes, by the formula."""
        late, device = self.devices._delay_s(group, client, "train"), self.devices.device(client)
        if device is None:
            return late
        examples = len(self.data[client][1]) * self.config.training.local_steps
        link = MODEL_BYTES / device.downlink_bytes_per_s + MODEL_BYTES / device.uplink_bytes_per_s
        return late + examples / device.examples_per_s + link

    def honest(self, params: np.ndarray, client: int) -> tuple[np.ndarray, int]:
        """Return what a client learns by steps of gradient descent on all it has, and what it counts."""
        x, y = self.data[client]
        theta = params
        for _ in range(self.config.training.local_steps):
            theta = theta - RATE * 2 / len(y) * x.T @ (x @ theta - y)
        return theta - params, len(y) if self.config.training.weighting == "examples" else 1

    def expect(self, params: np.ndarray, number: int, attempt: int) -> Expected:
        """Return what a try comes to."""
        group, found = f"{number}.{attempt}", Expected()
        for client in range(CLIENTS):
            fate, took_s = self.faults.fate(group, client, "train"), self.seconds(group, client)
            late = took_s > DEADLINE_S
            code = self._code(fate, late)
            self.seen.update([code or "answered", *(["duplicated"] if fate.duplicated and not code else [])])
            self.seen.update([f"lost {fate.lost}"] if fate.lost else ["late"] if code == "no-reply" else [])
            vector, weight = self.honest(params, client)
            if code is None and fate.attack == "scale":
                self.seen["falsified"] += 1
                vector = vector * fate.factor
                if np.abs(vector).max() > np.finfo(np.float32).max:
                    code = "not-finite"
            if code is None:
                found.total, found.weight = found.total + vector * weight, found.weight + weight
                found.respondents += 1
            else:
                found.failures[str(client)] = code
            heard_s = {"no-reply": DEADLINE_S, "lost": 0.0}.get(code or "", took_s)  # a death is known at once
            found.simulated_s = max(found.simulated_s, heard_s)
        return found

    def _code(self, fate, late: bool) -> str | None:
        """Return under which code a client's failure is counted."""
        if fate.lost == "before":
            return "no-reply"
        if fate.crashes:
            return "lost"
        if fate.lost or late:
            return "no-reply"
        return {"nan": "not-finite", "wrong-shape": "bad-reply"}.get(fate.attack)

    def check(self, run: Run) -> int:
        """Assert that a run came to what it should; return how many schedules it met."""
        params, tries, least = self.first, 0, self.config.federation.min_respondents
        for line, model in zip(run.lines, run.models, strict=True):
            number, expected = line["round"], []
            for attempt in range(1, line["attempt"] + 1):
                expected.append(self.expect(params, number, attempt))
            last = expected[-1]
            assert all(each.respondents < least for each in expected[:-1])
            assert last.respondents >= least
            assert line.get("earlier_failures", []) == [each.failures for each in expected[:-1]]
            assert line["failures"] == last.failures
            assert line["respondents"] == last.respondents == line["cohort"] - len(line["failures"])
            np.testing.assert_allclose(model, params + last.total / last.weight, rtol=1e-9, atol=1e-12)
            if self.config.faults.timed:
                taken_s = sum(each.simulated_s for each in expected)
                assert line["simulated_s"] == pytest.approx(taken_s, abs=1e-5)
            else:
                assert "simulated_s" not in line
            params, tries = model, tries + len(expected)
        if run.failed is None:
            assert len(run.lines) == self.config.federation.rounds
        else:
            number = len(run.lines) + 1
            expected = [self.expect(params, number, each) for each in range(1, self.config.federation.round_tries + 1)]
            assert all(each.respondents < least for each in expected)
            assert run.failed.failures == expected[-1].failures
            tries += len(expected)
        return tries


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("task") / "tiny.py"
    path.write_text(TINY)
    return path


def check_schedules(first: int, task: Path, folder: Path, *, rounds: int, schedules: int) -> Counter:
    """Play runs, and check each, until they have met so many schedules; return what happened in them."""
    seen, tries = Counter(), 0
    for number in itertools.count(first):
        config = config_of(number, task, rounds)
        oracle = Oracle(config)
        tries += oracle.check(played(config, folder / str(number)))
        seen += oracle.seen
        if tries >= schedules:
            return seen
    raise AssertionError  # counting never ends


EVERYTHING = {
    *("answered", "no-reply", "lost", "not-finite", "bad-reply", "duplicated", "falsified"),
    *("lost before", "lost after", "late"),
}


def test_some_random_faults_leave_the_sum_right_and_every_failure_counted(task, tmp_path):
    seen = check_schedules(1, task, tmp_path, rounds=3, schedules=50)
    assert set(seen) >= EVERYTHING


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("part", range(1, 11))
def test_ten_thousand_random_faults_leave_the_sum_right_and_every_failure_counted(task, tmp_path, part):
    assert set(check_schedules(1000 * part, task, tmp_path, rounds=40, schedules=1000)) >= EVERYTHING


def check_workers(numbers: range, task: Path, folder: Path, counts: tuple[int, ...], rounds: int) -> None:
    """Assert that runs come to the same, whoever does the work."""
    for number in numbers:
        config = config_of(number, task, rounds)
        told = played(config, folder / str(number)).told()
        for workers in counts:
            again = played(config_of(number, task, rounds, workers), folder / f"{number}-{workers}")
            assert again.told() == told


def test_two_workers_leave_the_same_bytes(task, tmp_path):
    check_workers(range(2), task, tmp_path, (2,), rounds=2)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_any_number_of_workers_leaves_the_same_bytes(task, tmp_path):
    check_workers(range(20, 32), task, tmp_path, (1, 2, 3), rounds=6)
