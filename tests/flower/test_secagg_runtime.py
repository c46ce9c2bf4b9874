"""Secure aggregation on Flower's own simulation runtime, with Ray: the model of the local engine, to the last bit."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedlearn.federation.run_folder import RunFolder
from fedlearn.privacy.ledger import read_events
from fedlearn.scenario import read_scenario
from fedlearn.secagg.simulated import _IN_MEMORY
from fedlearn.simulation.engine import simulate

HAS_RAY = importlib.util.find_spec("ray") is not None

ROOT = Path(__file__).resolve().parents[2]
FINISHED_S = 240.0
CLIENTS = 5
SETTINGS = ["task=regression", f"federation.clients={CLIENTS}", "federation.rounds=2", "federation.evaluation=off"]
NOISED = ["privacy.unit=client", "privacy.trust=distributed", "privacy.noise-multiplier=1.0", "privacy.delta=0.01"]


class Runtime:
    """A ``flwr`` with a home and ports of its own; every process it starts, however detached, is found by its home."""

    def __init__(self, home: Path) -> None:
        self.home = home
        with socket.socket() as one, socket.socket() as other:
            for each in (one, other):
                each.bind(("127.0.0.1", 0))
            http, control = (str(each.getsockname()[1]) for each in (one, other))
        self.env = {
            **os.environ,
            "FLWR_HOME": str(home),
            "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": http,
            "FLWR_LOCAL_CONTROL_API_PORT": control,
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "RAY_TMPDIR": str(home),  # short: sockets lie below it
        }

    def flwr(self, *words: str) -> str:
        """Run one command of Flower's."""
        done = subprocess.run(
            ["flwr", *words], env=self.env, cwd=self.home, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def run(self, out: Path, overrides: list[str]) -> dict[str, Any]:
        """Run the app at the root of the repository to its end and return what ``flwr list`` says about it."""
        config = f'set="{"; ".join(overrides)}" out="{out}"'
        federation = f"num-supernodes={CLIENTS} client-resources-num-cpus=1"
        self.flwr("run", str(ROOT), "local", "--run-config", config, "--federation-config", federation)
        deadline_s = time.monotonic() + FINISHED_S
        while time.monotonic() < deadline_s:
            newest: dict[str, Any] = json.loads(self.flwr("list", "--format", "json"))["runs"][0]
            if newest["status"].startswith("finished"):
                return newest
            time.sleep(1)
        raise TimeoutError(f"the run did not end in {FINISHED_S:g} s")

    def stop(self) -> None:
        """Kill what lives in this home, until nothing does."""
        mark, deadline_s = f"FLWR_HOME={self.home}".encode(), time.monotonic() + 20
        while time.monotonic() < deadline_s:
            left = []
            for folder in Path("/proc").glob("[0-9]*"):
                try:
                    if mark in (folder / "environ").read_bytes().split(b"\0"):
                        left.append(int(folder.name))
                        os.kill(left[-1], signal.SIGKILL)
                except OSError:  # it ended, or it is not ours to read
                    continue
            if not left:
                return
            time.sleep(0.1)


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    home = Path(tempfile.mkdtemp(prefix="flwr-", dir="/tmp"))
    started = Runtime(home)
    try:
        yield started
    finally:
        started.stop()
        shutil.rmtree(home, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not HAS_RAY, reason="needs fedlearn[ray]")
@pytest.mark.parametrize("more", [[], NOISED], ids=["masked", "noised"])
def test_masked_rounds_end_in_the_model_of_the_local_engine(runtime: Runtime, tmp_path: Path, more: list[str]) -> None:
    """Sessions go from one Ray actor to the next; the keys of the simulation are gone at its end."""
    overrides = [*SETTINGS, "secagg.mode=active", *more]
    before = set(_IN_MEMORY.glob("fedlearn-keys-*"))
    out = tmp_path / "flower"
    ended = runtime.run(out, overrides)
    assert ended["status"] == "finished:completed", ended["status-details"]
    local = RunFolder.create(tmp_path / "local", read_scenario(None, overrides))
    expected = simulate(local)
    folder = RunFolder.open(out)
    assert folder.summary()["model_sha256"] == expected["model_sha256"]
    tries = [json.loads(line) for line in (out / "secagg.jsonl").read_text().splitlines()]
    assert [(each["mode"], each["attempt"], each["released"]) for each in tries] == [("active", 1, True)] * 2
    assert all(set(each["counts"].values()) == {CLIENTS} for each in tries)
    assert all(each["plain"] is not None for each in tries)  # a simulation may show what a device does not
    kinds = [event.kind for event in read_events(out / "ledger.jsonl")]
    assert kinds == [event.kind for event in read_events(local.path / "ledger.jsonl")]
    assert set(_IN_MEMORY.glob("fedlearn-keys-*")) <= before
