"""Killed in any leg of secure aggregation, a run goes on and ends with the same model; its keys do not outlive it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from fedlearn.config import RunConfig
from fedlearn.errors import RunUnreadableError
from fedlearn.federation.run_folder import RunFolder
from fedlearn.flower.network import GridNetwork
from fedlearn.privacy.ledger import Head, read_events
from fedlearn.secagg import simulated
from fedlearn.secagg.server import PHASES
from fedlearn.simulation.engine import simulate

ROUNDS = 3
CLIENTS = 5
SETTINGS = {
    "active": {"secagg": {"mode": "active"}},
    "noised": {
        "secagg": {"mode": "active"},
        "privacy": {"unit": "client", "trust": "distributed", "noise-multiplier": 1.0, "delta": 0.01},
    },
    "ideal": {"secagg": {"mode": "ideal"}},
}
FAST = [("active", "mask"), ("noised", "unmask"), ("ideal", "ideal")]
WHERE = [
    pytest.param(*where, marks=() if where in FAST else pytest.mark.slow)
    for where in [*((setting, leg) for setting in ("active", "noised") for leg in PHASES), ("ideal", "ideal")]
]


class Killed(BaseException):
    """What a kill looks like from inside: nothing may catch it."""


def config(setting: str, **changes: object) -> RunConfig:
    """Return a small run of five clients."""
    return RunConfig.from_mapping(
        {
            "task": "regression",
            "federation": {"clients": CLIENTS, "rounds": ROUNDS, "evaluation": "off"},
            "training": {"algorithm": "fedadam", "local-steps": 2},
            "data": {"partition": "iid"},
            **SETTINGS[setting],
            **changes,
        }
    )


def begin_or_go_on(path: Path, asked: RunConfig) -> dict:
    """Do what a user does: start the run, or resume it where there is one."""
    try:
        folder = RunFolder.open(path)
    except RunUnreadableError:
        folder = RunFolder.create(path, asked)
    return simulate(folder)


def check_finished(path: Path, whole: dict, killed_in: Sequence[tuple[int, str]]) -> None:
    """Assert that the run ended as ``whole`` did, and that its ledger has every sum that may have been seen."""
    folder, events = RunFolder.open(path), read_events(path / "ledger.jsonl")  # which checks the chain
    summary = folder.summary()
    assert hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest() == whole["model_sha256"]
    assert summary["rounds"] == ROUNDS
    assert [line["round"] for line in folder.metrics()] == list(range(1, ROUNDS + 1))
    assert Head.of(events).sha256 == summary["privacy"]["ledger"]["sha256"]
    seen = [number for number, leg in killed_in if leg == "unmask" and folder.config.privacy.unit == "client"]
    released = [event.release().round_number for event in events if event.kind == "round.release"]
    assert released == sorted([*range(1, ROUNDS + 1), *seen])
    assert (summary["privacy"]["epsilon"] == whole["privacy"]["epsilon"]) is not bool(seen)
    tries = [json.loads(line) for line in (path / "secagg.jsonl").read_text().splitlines()]
    assert [each["round"] for each in tries if each["released"]] == list(range(1, ROUNDS + 1))
    assert all(each["attempt"] == 1 for each in tries)


# -- in this process, at every answer ----------------------------------------------------------------------------


@pytest.fixture
def kill_at(monkeypatch, tmp_path):
    """Return a function that has the next run killed in a round's leg, after so many answers to it."""
    monkeypatch.setattr("fedlearn.federation.summary.draw_history", lambda *_, **__: "<svg/>")  # the slowest part
    monkeypatch.setattr(simulated, "_IN_MEMORY", tmp_path)
    exchange, due = GridNetwork.exchange_leg, {}

    def exchange_leg(self, requests, timeout_s) -> Iterator[object]:
        here = (requests[0].plan.round_number, requests[0].leg) if requests else None
        after = due.pop(here) if here in due else None
        for done, reply in enumerate(exchange(self, requests, timeout_s)):
            if done == after:
                raise Killed
            yield reply

    monkeypatch.setattr(GridNetwork, "exchange_leg", exchange_leg)
    return lambda number, leg, after: due.update({(number, leg): after})


@pytest.mark.parametrize(("setting", "leg"), WHERE)
def test_killed_in_a_leg_the_run_ends_with_the_same_model(tmp_path, kill_at, setting, leg):
    asked = config(setting)
    whole = begin_or_go_on(tmp_path / "whole", asked)
    check_finished(tmp_path / "whole", whole, [])
    kills = [(1, 0), (2, 3), (3, CLIENTS - 1)]
    for number, after in kills:
        kill_at(number, leg, after)
        with pytest.raises(Killed):
            begin_or_go_on(tmp_path / "killed", asked)
    assert begin_or_go_on(tmp_path / "killed", asked)["model_sha256"] == whole["model_sha256"]
    check_finished(tmp_path / "killed", whole, [(number, leg) for number, _ in kills])
    assert list(tmp_path.glob("fedlearn-keys-*")) == []


# -- kill -9 -----------------------------------------------------------------------------------------------------

KILLS_ITSELF = """
import os, signal
from pathlib import Path
from fedlearn.flower.network import GridNetwork
from fedlearn.secagg import simulated

simulated._IN_MEMORY = Path(os.environ["FEDLEARN_TEST_KEYS"])
exchange, (number, leg, after) = GridNetwork.exchange_leg, os.environ["FEDLEARN_TEST_KILL"].split(".")

def exchange_leg(self, requests, timeout_s):
    here = bool(requests) and (str(requests[0].plan.round_number), requests[0].leg) == (number, leg)
    for done, reply in enumerate(exchange(self, requests, timeout_s)):
        if here and done == int(after):
            os.kill(os.getpid(), signal.SIGKILL)
        yield reply

GridNetwork.exchange_leg = exchange_leg
from fedlearn.cli import main
main()
"""


def run(*words: object, keys: Path, kill: str = "0.never.0") -> subprocess.CompletedProcess[bytes]:
    """Run ``fedlearn simulate`` in a process of its own, to its end or to where it is killed."""
    return subprocess.run(
        [sys.executable, "-c", KILLS_ITSELF, "simulate", *map(str, words), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "FEDLEARN_TEST_KEYS": str(keys), "FEDLEARN_TEST_KILL": kill},
        timeout=120,
        check=False,
    )


def left_behind(keys: Path) -> list[int]:
    """Return the processes that still run with this folder of keys."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdigit() and f"FEDLEARN_TEST_KEYS={keys}".encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("setting", ["active", "noised"])
def test_kill_9_in_every_leg_and_resume(tmp_path, setting, workers):
    """One run, killed in each leg in turn; keys that a killed process left are gone once the next one runs."""
    keys, path = tmp_path / "keys", tmp_path / "killed"
    keys.mkdir()
    asked = config(setting, simulation={"workers": workers})
    asked_file = tmp_path / "whole" / "config.toml"
    whole = simulate(RunFolder.create(tmp_path / "whole", asked))
    kills = [(1, "advertise"), (1, "share"), (2, "mask"), (2, "consistent"), (3, "unmask")]
    for count, (number, leg) in enumerate(kills):
        words = [asked_file, "--out", path] if count == 0 else ["--resume", path]
        assert run(*words, keys=keys, kill=f"{number}.{leg}.{count % CLIENTS}").returncode == -9
        deadline_s = time.monotonic() + 10
        while left_behind(keys):  # its workers end with it
            assert time.monotonic() < deadline_s
            time.sleep(0.02)
        (left,) = keys.iterdir()  # this one's: nothing else could delete them
        assert (left / "seed").exists()
    done = run("--resume", path, keys=keys)
    assert done.returncode == 0
    assert json.loads(done.stdout)["model_sha256"] == whole["model_sha256"]
    check_finished(path, whole, kills)
    assert list(keys.iterdir()) == []


@pytest.mark.slow
def test_the_keys_of_a_run_that_goes_on_are_left_alone(tmp_path):
    """Another one that begins and ends meanwhile deletes those of the dead and no others."""
    keys = tmp_path / "keys"
    keys.mkdir()
    (keys / "fedlearn-keys-unfinished").mkdir()  # being made: not locked yet, and nobody's to judge
    asked = RunFolder.create(tmp_path / "long", config("active", simulation={"workers": 1}))
    scenario = asked.path / "config.toml"
    assert run(scenario, "--out", tmp_path / "dead", keys=keys, kill="1.mask.0").returncode == -9
    (dead,) = set(keys.iterdir()) - {keys / "fedlearn-keys-unfinished"}
    waiting = KILLS_ITSELF.replace("os.kill(os.getpid(), signal.SIGKILL)", "input()")
    process = subprocess.Popen(
        [sys.executable, "-c", waiting, "simulate", "--resume", str(asked.path), "--json"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "FEDLEARN_TEST_KEYS": str(keys), "FEDLEARN_TEST_KILL": "2.mask.0"},
    )
    try:
        deadline_s = time.monotonic() + 60
        while not (asked.path / "metrics.jsonl").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline_s
            time.sleep(0.02)
        (live,) = set(keys.iterdir()) - {keys / "fedlearn-keys-unfinished", dead}
        assert not dead.exists()
        assert run(scenario, "--out", tmp_path / "short", keys=keys).returncode == 0
        assert (live / "seed").exists()
        process.communicate(b"\n", timeout=60)
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait()
    assert list(keys.iterdir()) == [keys / "fedlearn-keys-unfinished"]
