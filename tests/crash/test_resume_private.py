"""Killed at any instant, a run that hides its clients ends with the same model, and with each release once."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedlearn.config import RunConfig
from fedlearn.errors import RunFailedError, RunUnreadableError
from fedlearn.federation.run_folder import RunFolder
from fedlearn.privacy.ledger import Head, Ledger, read_events
from fedlearn.simulation.engine import simulate

TASK = """
import torch
from torch import nn
from fedlearn.learning import Examples, Pool, Task


class Tiny(Task):
    metric_names = ("accuracy",)

    def build_model(self):
        return nn.Linear(2, 1)

    def loss(self, output, target):
        return (output[:, 0] - target) ** 2

    def metrics(self, output, target):
        return {"accuracy": (output[:, 0] > target).float()}

    def load_pool(self, path):
        torch.manual_seed(0)
        inputs = torch.randn(40, 2)
        train = Examples(inputs, inputs.sum(dim=1))
        return Pool(train, train)
"""

SETTINGS = {
    "gaussian": {"privacy": {}},
    "evaluated": {"privacy": {}, "federation": {"evaluation": "federated"}},
    "adaptive": {"privacy": {"adaptive-clipping": True, "noise-multiplier": 0.15}},
    "dp-ftrl": {"privacy": {"mechanism": "dp-ftrl"}, "federation": {"evaluation": "federated"}},
    "stopped": {"privacy": {"max-epsilon": 5.0, "delta": 0.01}, "federation": {"rounds": 9}},
}
SLOW = ("evaluated", "adaptive", "stopped")
EACH = pytest.mark.parametrize(
    "setting", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in SETTINGS]
)


class Killed(BaseException):
    """What a kill looks like from inside: nothing may catch it."""


class Countdown:
    """Kills at the n-th write to the disk; knows of each file how much of it a power cut would leave."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left: float = math.inf
        self.calls = 0
        self.durable: dict[str, int] = {}
        monkeypatch.setattr(os, "fsync", self._counting(os.fsync, self._synced))
        monkeypatch.setattr(Path, "replace", self._counting(Path.replace, lambda *_: None))

    def _counting(self, original, done):
        def call(*args, **kwargs):
            self.calls += 1
            if self.left <= 0:
                raise Killed
            self.left -= 1
            result = original(*args, **kwargs)
            done(*args)
            return result

        return call

    def _synced(self, descriptor: int) -> None:
        self.durable[str(Path(f"/proc/self/fd/{descriptor}").readlink())] = os.fstat(descriptor).st_size


@pytest.fixture
def countdown(monkeypatch):
    monkeypatch.setattr("fedlearn.federation.summary.draw_history", lambda *_, **__: "<svg/>")  # the slowest part
    return Countdown(monkeypatch)


@pytest.fixture
def config(tmp_path):
    """Return a function that makes the configuration of a setting."""
    (tmp_path / "tiny.py").write_text(TASK)

    def call(setting: str) -> RunConfig:
        more = SETTINGS[setting]
        tables = {
            "task": str(tmp_path / "tiny.py"),
            "federation": {"clients": 4, "cohort": 2, "rounds": 2, "evaluation": "off", **more.get("federation", {})},
            "training": {"algorithm": "fedadam", "server-learning-rate": 0.1, "local-steps": 1},
            "data": {"partition": "iid"},
            "privacy": {"unit": "client", "amplification": "none", "noise-multiplier": 1.0, **more["privacy"]},
        }
        return RunConfig.from_mapping(tables)

    return call


def begin_or_go_on(path: Path, config: RunConfig) -> dict:
    """Do what a user does: start the run, or resume it where there is one."""
    try:
        folder = RunFolder.open(path)
    except RunUnreadableError:
        folder = RunFolder.create(path, config)
    return simulate(folder)


def check_finished(path: Path, whole: dict) -> None:
    """Assert that the run ended as ``whole`` did: the model, the epsilon, each release once, the ledger's head."""
    folder, events = RunFolder.open(path), read_events(path / "ledger.jsonl")
    summary = folder.summary()
    assert hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest() == whole["model_sha256"]
    assert (summary["rounds"], summary["metrics"]) == (whole["rounds"], whole["metrics"])
    for name in ("epsilon", "noise_multiplier", "delta"):
        assert summary["privacy"][name] == whole["privacy"][name]
    assert Head(count=summary["privacy"]["ledger"]["lines"], sha256=summary["privacy"]["ledger"]["sha256"]) == Head.of(
        events
    )
    rounds = list(range(1, summary["rounds"] + 1))
    assert [event.release().round_number for event in events if event.kind == "round.release"] == rounds
    asked = rounds if folder.config.federation.evaluation == "federated" else []
    assert [event.release().round_number for event in events if event.kind == "eval.release"] == asked
    assert [line["round"] for line in folder.metrics()] == rounds
    assert [event.kind for event in events].count("run.close") == 1
    assert events[-1].kind == "run.close"


@EACH
def test_killed_at_every_write_in_turn_model_epsilon_and_releases_are_the_same(tmp_path, countdown, config, setting):
    asked = config(setting)
    whole = begin_or_go_on(tmp_path / "whole", asked)
    assert 0 < whole["rounds"] < 9
    check_finished(tmp_path / "whole", whole)
    calls = countdown.calls
    assert calls > 20
    for number in range(calls):
        path = tmp_path / str(number)
        countdown.left = number
        with pytest.raises(Killed):
            begin_or_go_on(path, asked)
        countdown.left = math.inf
        begin_or_go_on(path, asked)
        check_finished(path, whole)


def test_a_ledger_torn_anywhere_in_what_a_power_cut_may_lose_is_completed(tmp_path, countdown, config):
    """What was written but not yet synced may be there in part: cut it everywhere."""
    asked = config("dp-ftrl")
    whole = begin_or_go_on(tmp_path / "whole", asked)
    calls, torn = countdown.calls, 0
    for number in range(calls):
        path = tmp_path / str(number)
        countdown.left = number
        with pytest.raises(Killed):
            begin_or_go_on(path, asked)
        countdown.left = math.inf
        ledger = path / "ledger.jsonl"
        data = ledger.read_bytes() if ledger.exists() else b""
        durable = countdown.durable.get(str(ledger), 0)
        if len(data) <= durable:
            continue
        torn += 1
        ledger.write_bytes(data[: durable + (len(data) - durable) * (torn % 4) // 4])
        begin_or_go_on(path, asked)
        check_finished(path, whole)
    assert torn >= 6


def test_a_full_disk_at_the_ledger_lets_no_model_leave(tmp_path, countdown, config, monkeypatch):
    """The state of a round is kept, its line is not: then not even the run's last model is written."""
    asked = config("gaussian")
    whole = begin_or_go_on(tmp_path / "whole", asked)
    write = Ledger._write

    def full(self, event):
        if event.kind == "round.release":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, event)

    path = tmp_path / "full"
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "_write", full)
        for _ in range(2):  # again where the run goes on
            with pytest.raises(RunFailedError, match="Nothing was released"):
                begin_or_go_on(path, asked)
            assert (path / "checkpoint" / "state.safetensors").exists()
            assert not (path / "model.safetensors").exists()
            assert not (path / "summary.json").exists()
    begin_or_go_on(path, asked)
    check_finished(path, whole)


# -- kill -9 -----------------------------------------------------------------------------------------------------

ROUNDS = 12
SCENARIO = f"""
task = "digits-mlp"
[federation]
clients = 8
cohort = 4
rounds = {ROUNDS}
evaluation = "both"
[training]
algorithm = "fedadam"
server-learning-rate = 0.01
local-epochs = 1
[privacy]
unit = "client"
noise-multiplier = 1.0
[faults]
drop = 0.1
"""


def command(*words: object) -> subprocess.Popen[bytes]:
    """Start ``fedlearn simulate`` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", "from fedlearn.cli import main; main()", "simulate", *map(str, words), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )


def releases_written(path: Path) -> int:
    """Return how many releases the ledger has now."""
    try:
        return (path / "ledger.jsonl").read_bytes().count(b'"kind":"round.release"')
    except FileNotFoundError:
        return 0


def kill_at(process: subprocess.Popen[bytes], path: Path, releases: int, delay_s: float) -> bool:
    """Kill the process ``delay_s`` after the ledger has so many releases; return whether it was still running."""
    while process.poll() is None and not ((path / "config.toml").exists() and releases_written(path) >= releases):
        time.sleep(0.001)
    time.sleep(delay_s)
    running = process.poll() is None
    process.kill()
    process.communicate()
    return running


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("workers", "kills", "seed", "privacy"),
    [(0, 8, 1, ""), (2, 4, 2, ""), (0, 4, 3, 'mechanism = "dp-ftrl"')],
)
def test_kill_9_at_random_instants_and_resume(tmp_path, workers, kills, seed, privacy):
    chance = random.Random(seed)
    scenario = tmp_path / "scenario.toml"
    text = SCENARIO.replace("noise-multiplier", f"{privacy}\nnoise-multiplier")
    scenario.write_text(f"{text}[simulation]\nworkers = {workers}\n")
    output, _ = command(scenario, "--out", tmp_path / "whole").communicate(timeout=300)
    whole = json.loads(output)
    round_s = whole["wall_s"] / ROUNDS
    done, number = 0, 0
    while done < kills:
        number += 1
        assert number < 5 * kills
        path = tmp_path / str(number)
        killed = kill_at(command(scenario, "--out", path), path, chance.randrange(ROUNDS), chance.uniform(0, round_s))
        while killed:
            done += 1
            process = command("--resume", path)
            if done >= kills or chance.random() < 0.5:
                process.communicate(timeout=300)
                assert process.returncode == 0
                break
            more = chance.randrange(releases_written(path), ROUNDS + 1)
            killed = kill_at(process, path, more, chance.uniform(0, round_s))
        folder = RunFolder.open(path)
        summary, events = folder.summary(), read_events(path / "ledger.jsonl")
        assert summary["model_sha256"] == whole["model_sha256"]
        assert summary["privacy"]["epsilon"] == whole["privacy"]["epsilon"]
        for kind in ("round.release", "eval.release"):
            found = [event.release().round_number for event in events if event.kind == kind]
            assert found == list(range(1, ROUNDS + 1))
