"""A run that is killed at any instant goes on and ends with the same model, to the last bit."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from fedlearn.config import RunConfig
from fedlearn.errors import RunUnreadableError
from fedlearn.federation.run_folder import RunFolder
from fedlearn.simulation.engine import simulate

TINY = RunConfig.from_mapping(
    {
        "task": "regression",
        "federation": {"clients": 3, "cohort": 2, "rounds": 2},
        "training": {"algorithm": "fedadam", "local-steps": 1},
        "data": {"partition": "iid"},
    }
)


class Killed(BaseException):
    """What a kill looks like from inside: nothing may catch it."""


class Countdown:
    """Kills at the n-th of the calls that it watches; ``step`` calls pass before."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left: float = float("inf")
        self.calls = 0
        for owner, name in ((os, "fsync"), (Path, "replace")):
            monkeypatch.setattr(owner, name, self._counting(getattr(owner, name)))

    def _counting(self, original):
        def call(*args, **kwargs):
            self.calls += 1
            if self.left <= 0:
                raise Killed
            self.left -= 1
            return original(*args, **kwargs)

        return call


@pytest.fixture
def countdown(monkeypatch):
    monkeypatch.setattr("fedlearn.federation.summary.draw_history", lambda *_, **__: "<svg/>")  # the slowest part
    return Countdown(monkeypatch)


def begin_or_go_on(path: Path) -> dict:
    """Do what a user does: start the run, or resume it where there is one."""
    try:
        folder = RunFolder.open(path)
    except RunUnreadableError:
        folder = RunFolder.create(path, TINY)
    return simulate(folder)


def check_finished(path: Path, model_sha256: str) -> None:
    """Assert that the run ended with that model, with every round in its metrics once and with no litter."""
    folder = RunFolder.open(path)
    assert hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest() == model_sha256
    assert folder.summary()["model_sha256"] == model_sha256
    assert [line["round"] for line in folder.metrics()] == list(range(1, folder.config.federation.rounds + 1))


def litter(path: Path) -> list[str]:
    return [file.name for file in path.rglob(".*") if file.name != ".lock"]


def test_killed_at_every_write_in_turn_the_run_ends_with_the_same_model(tmp_path, countdown):
    model = begin_or_go_on(tmp_path / "whole")["model_sha256"]
    calls = countdown.calls
    assert calls > 20  # every file of the run is synced, renamed and synced again
    for number in range(calls):
        path = tmp_path / str(number)
        countdown.left = number
        with pytest.raises(Killed):
            begin_or_go_on(path)
        countdown.left = float("inf")
        assert begin_or_go_on(path)["model_sha256"] == model, f"killed at call {number}"
        check_finished(path, model)
        assert litter(path) == []


def test_killed_again_and_again_the_run_ends_with_the_same_model(tmp_path, countdown):
    model = begin_or_go_on(tmp_path / "whole")["model_sha256"]
    kills = 0
    for step in (12, 13, 15):  # enough for a resumption to finish, or to keep one more round
        path = tmp_path / str(step)
        while True:
            countdown.left = step
            try:
                begin_or_go_on(path)
            except Killed:
                kills += 1
                assert kills < 30
            else:
                break
        check_finished(path, model)
    assert kills >= 4


def test_a_metrics_file_torn_anywhere_in_its_last_line_does_not_change_the_model(tmp_path, countdown):
    model = begin_or_go_on(tmp_path / "whole")["model_sha256"]
    countdown.left = 14  # in the second round
    with pytest.raises(Killed):
        begin_or_go_on(tmp_path / "torn")
    countdown.left = float("inf")
    checkpoint = tmp_path / "torn" / "checkpoint" / "state.safetensors"
    state = checkpoint.read_bytes()
    first, second = (tmp_path / "whole" / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    for length in (1, 2, len(second) // 2, len(second) - 1, len(second)):
        checkpoint.write_bytes(state)
        (tmp_path / "torn" / "metrics.jsonl").write_bytes(first + second[:length])
        begin_or_go_on(tmp_path / "torn")
        check_finished(tmp_path / "torn", model)


# -- kill -9 -----------------------------------------------------------------------------------------------------

ROUNDS = 12
SCENARIO = f"""
task = "digits-mlp"
[federation]
clients = 8
cohort = 6
rounds = {ROUNDS}
[training]
algorithm = "fedadam"
server-learning-rate = 0.01
local-epochs = 1
[faults]
drop = 0.1
"""


def command(*words: object, marker: str) -> subprocess.Popen[bytes]:
    """Start ``fedlearn simulate`` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", "from fedlearn.cli import main; main()", "simulate", *map(str, words), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "FEDLEARN_TEST_MARKER": marker},
    )


def rounds_kept(path: Path) -> int:
    """Return how many lines the metrics have now."""
    try:
        return (path / "metrics.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def kill_at(process: subprocess.Popen[bytes], path: Path, lines: int, delay_s: float) -> bool:
    """Kill the process ``delay_s`` after the metrics have ``lines`` lines; return whether it was still running."""
    while process.poll() is None and not ((path / "config.toml").exists() and rounds_kept(path) >= lines):
        time.sleep(0.002)
    time.sleep(delay_s)
    running = process.poll() is None
    process.kill()
    process.communicate()
    return running


def left_behind(marker: str) -> list[int]:
    """Return the processes that carry this marker in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdigit() and f"FEDLEARN_TEST_MARKER={marker}".encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("workers", "kills", "seed"), [(0, 10, 1), (2, 5, 2)])
def test_kill_9_at_random_instants_and_resume_end_with_the_same_model(tmp_path, workers, kills, seed):
    chance = random.Random(seed)
    scenario = tmp_path / "scenario.toml"
    scenario.write_text(SCENARIO + f"[simulation]\nworkers = {workers}\n")
    begun = time.monotonic()
    output, _ = command(scenario, "--out", tmp_path / "whole", marker="whole").communicate(timeout=300)
    whole_s = time.monotonic() - begun
    model = json.loads(output)["model_sha256"]
    round_s = RunFolder.open(tmp_path / "whole").summary()["wall_s"] / ROUNDS

    done, number = 0, 0
    while done < kills:
        number += 1
        assert number < 5 * kills
        path, marker = tmp_path / str(number), f"{tmp_path.name}-{number}"
        process = command(scenario, "--out", path, marker=marker)
        killed = kill_at(process, path, chance.randrange(ROUNDS), chance.uniform(0, 2 * round_s))
        while killed:
            done += 1
            deadline = time.monotonic() + 10
            while left_behind(marker):  # its workers end with it
                assert time.monotonic() < deadline
                time.sleep(0.02)
            process = command("--resume", path, marker=marker)
            if done >= kills or chance.random() < 0.5:
                break
            killed = kill_at(process, path, 0, chance.uniform(0, whole_s))
        output, _ = process.communicate(timeout=300)
        assert process.returncode in (0, -9)
        if process.returncode == 0 and output:
            assert json.loads(output)["model_sha256"] == model
        check_finished(path, model)
