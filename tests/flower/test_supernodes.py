"""Secure aggregation between processes: a SuperLink, five SuperNodes with keys and data of their own, ``flwr run``.

Every message starts a ClientApp in a process of its own; between two legs its sealed session is in the SuperNode's
memory and the key to it in a file of the device's vault.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedlearn.federation.run_folder import RunFolder
from fedlearn.privacy.ledger import read_events

ROOT = Path(__file__).resolve().parents[2]
DEVICES = 5
BEGUN_S = 60.0
FINISHED_S = 600.0
LOCALLY = ("--insecure", "--host", "127.0.0.1", "--port")

TASK = """
import time
from pathlib import Path

from fedlearn.tasks.regression import Regression


class Tiny(Regression):
    home = None

    def load_local(self, path):
        Tiny.home = Path(path).parent
        return super().load_local(path)

    def loss(self, output, target):
        if Tiny.home is not None and (Tiny.home / "hang").exists():
            (Tiny.home / "training").touch()
            time.sleep(600)
        return super().loss(output, target)
"""


class Processes:
    """A SuperLink and SuperNodes with a home of their own; all that they start is found by it."""

    def __init__(self, home: Path) -> None:
        self.home, self.keys = home, home / "keys"
        self.ports = free_ports(1 + DEVICES)
        self.public: dict[str, str] = {}
        self.started: dict[str, subprocess.Popen[bytes]] = {}
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "devices"\n[superlink.devices]\naddress = "127.0.0.1:{self.ports[0]}"\n'
            "insecure = true\n"
        )
        self.env = {
            **os.environ,
            "FLWR_HOME": str(home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "XDG_DATA_HOME": str(home / "data"),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }

    def call(self, *words: str) -> str:
        """Run one command to its end."""
        done = subprocess.run(
            words, env=self.env, cwd=self.home, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def start(self, name: str, *words: str) -> None:
        """Start a process whose output goes to a file of that name."""
        with (self.home / f"{name}.log").open("a") as log:
            self.started[name] = subprocess.Popen(
                words,
                env={**self.env, "FEDLEARN_TEST_NODE": name},
                cwd=self.home,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def enrol(self) -> None:
        """Make everybody's keys, and the registry's list, as the command line's help says."""
        self.keys.mkdir()
        for name in ("registry", "server", *(f"device-{number}" for number in range(DEVICES))):
            told = self.call("fedlearn", "secagg", "key", str(self.keys / f"{name}.pem"), "--json")
            self.public[name] = json.loads(told)["public_key"]
        devices = [self.public[f"device-{number}"] for number in range(DEVICES)]
        registry = str(self.keys / "registry.pem")
        self.call("fedlearn", "secagg", "allow", str(self.keys / "devices.json"), *devices, "--registry", registry)

    def begin(self) -> None:
        """Start the SuperLink and a SuperNode for each device."""
        chance = np.random.default_rng(0)
        (self.home / "tiny.py").write_text(TASK)
        self.start("superlink", "flower-superlink", *LOCALLY, str(self.ports[0]))
        wait_for(lambda: listening(self.ports[0]), BEGUN_S, "the SuperLink")
        for number in range(DEVICES):
            home = self.device(number)
            home.mkdir()
            np.savez(home / "own.npz", inputs=chance.normal(size=(20, 10)), targets=chance.normal(size=20))
            self.connect(number)

    def connect(self, number: int) -> None:
        """Start a device's SuperNode."""
        home = self.device(number)
        told = {
            "data-path": home / "own.npz",
            "task": self.home / "tiny.py",
            "device-key": self.keys / f"device-{number}.pem",
            "allow-list": self.keys / "devices.json",
            "registry-key": self.public["registry"],
            "server-key": self.public["server"],
            "vault": home / "vault",
        }
        config = " ".join(f'{name}="{value}"' for name, value in told.items())
        superlink = ["--superlink", f"127.0.0.1:{self.ports[0]}", "--node-config", config]
        self.start(f"device-{number}", "flower-supernode", *LOCALLY, str(self.ports[1 + number]), *superlink)

    def device(self, number: int) -> Path:
        """Return where a device's data and vault are."""
        return self.home / f"device-{number}"

    def run(self, out: Path, *overrides: str) -> None:
        """Start a run."""
        settings = [f"task={self.home}/tiny.py", f"federation.clients={DEVICES}", f"federation.cohort={DEVICES}"]
        settings += ["federation.evaluation=off", "secagg.mode=active", "federation.round-timeout-s=600", *overrides]
        options = {
            "set": "; ".join(settings),
            "out": out,
            "server-key": self.keys / "server.pem",
            "allow-list": self.keys / "devices.json",
            "registry-key": self.public["registry"],
        }
        config = " ".join(f'{name}="{value}"' for name, value in options.items())
        self.call("flwr", "run", str(ROOT), "devices", "--run-config", config)

    def ended(self) -> dict[str, Any]:
        """Wait for the last run's end and return what ``flwr list`` says of it."""

        def finished() -> dict[str, Any] | None:
            newest: dict[str, Any] = json.loads(self.call("flwr", "list", "devices", "--format", "json"))["runs"][0]
            return newest if newest["status"].startswith("finished") else None

        return wait_for(finished, FINISHED_S, "the run's end", every_s=2.0)

    def processes(self, mark: str = "") -> list[int]:
        """Return the processes that live in this home, or those of one node."""
        wanted, found = (f"FEDLEARN_TEST_NODE={mark}" if mark else f"FLWR_HOME={self.home}").encode(), []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                variables = (folder / "environ").read_bytes().split(b"\0")
                if wanted in variables and f"FLWR_HOME={self.home}".encode() in variables:
                    found.append(int(folder.name))
        return found

    def kill(self, mark: str = "") -> None:
        """Kill them, again until none is left."""
        deadline_s = time.monotonic() + 20
        while (left := self.processes(mark)) and time.monotonic() < deadline_s:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)
        assert not self.processes(mark)
        for name, process in self.started.items():
            if mark in ("", name):
                process.wait(timeout=20)

    def log(self) -> str:
        """Return what all of them wrote."""
        return "\n".join(path.read_text(errors="replace") for path in sorted(self.home.glob("*.log")))


def free_ports(count: int) -> list[int]:
    """Return ports that nobody uses now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


def listening(port: int) -> bool:
    """Return whether somebody listens."""
    with socket.socket() as found:
        found.settimeout(1.0)
        return found.connect_ex(("127.0.0.1", port)) == 0


def wait_for(what: Callable[[], Any], timeout_s: float, name: str, *, every_s: float = 0.2) -> Any:
    """Return the first answer that is one."""
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        if found := what():
            return found
        time.sleep(every_s)
    raise TimeoutError(f"waited {timeout_s:g} s for {name}")


@pytest.fixture(scope="module")
def devices() -> Iterator[Processes]:
    """Five devices that are connected, or about to be."""
    home = Path(tempfile.mkdtemp(prefix="flwr-", dir="/tmp"))
    started = Processes(home)
    try:
        started.enrol()
        started.begin()
        yield started
    finally:
        started.kill()
        shutil.rmtree(home, ignore_errors=True)


def tries(out: Path) -> list[dict[str, Any]]:
    """Return what the server noted of every try."""
    return [json.loads(line) for line in (out / "secagg.jsonl").read_text().splitlines()]


def keys_of(home: Path) -> list[str]:
    """Return the sessions' keys that a device's vault still holds."""
    return sorted(path.name for path in (home / "vault").iterdir() if path.name != "seen")


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_five_devices_and_a_server_that_sees_their_sum_alone(devices: Processes, tmp_path: Path) -> None:
    """A session lives on from process to process; a device keeps that it took part, and no key of it."""
    out = tmp_path / "run"
    devices.run(out, "federation.rounds=2")
    ended = devices.ended()
    assert ended["status"] == "finished:completed", ended["status-details"] + devices.log()
    assert [(each["mode"], each["attempt"], each["released"]) for each in tries(out)] == [("active", 1, True)] * 2
    for each in tries(out):
        assert set(each["counts"].values()) == {DEVICES}
        assert set(each["furthest"].values()) == {"unmask"}
        assert (each["failures"], each["plain"]) == ({}, None)  # no device shows what it masked
    for number in range(DEVICES):
        home = devices.device(number)
        assert keys_of(home) == []
        assert len(list((home / "vault" / "seen").iterdir())) == 2
    folder = RunFolder.open(out)
    assert folder.summary()["rounds"] == 2
    assert np.any(folder.load_state().server.params)
    policy = read_events(out / "ledger.jsonl")[0].body
    assert policy["secagg"]["mode"] == "active"
    assert policy["simulated"] is False


def kill_while_training(devices: Processes, numbers: Sequence[int]) -> None:
    """Kill devices, with all of their processes, when each of them is in the middle of its training."""
    for number in numbers:
        wait_for((devices.device(number) / "training").exists, FINISHED_S, f"device {number} to train")
    for number in numbers:
        devices.kill(f"device-{number}")
        for name in ("hang", "training"):
            (devices.device(number) / name).unlink()


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_device_that_is_killed_while_it_trains_is_one_the_round_does_without(
    devices: Processes, tmp_path: Path
) -> None:
    """Of five, four rebuild the dead one's mask key; what it had learned is not in the sum."""
    out = tmp_path / "run"
    (devices.device(3) / "hang").touch()
    devices.run(out, "federation.rounds=1")
    kill_while_training(devices, [3])
    ended = devices.ended()
    devices.connect(3)
    assert ended["status"] == "finished:completed", ended["status-details"] + devices.log()
    (found,) = tries(out)
    assert (found["mode"], found["attempt"], found["released"]) == ("active", 1, True)
    assert found["counts"] == {"invited": 5, "advertised": 5, "shared": 5, "masked": 4, "confirmed": 4, "unmasked": 4}
    assert sorted(found["furthest"].values()) == ["share", *["unmask"] * 4]
    assert len(found["failures"]) == 1
    assert all(keys_of(devices.device(number)) == [] for number in range(DEVICES))


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_two_devices_that_are_killed_cost_the_try_and_come_back_for_the_next(
    devices: Processes, tmp_path: Path
) -> None:
    """Three of five cannot rebuild a secret: the try is given up, and nobody is asked to unmask anything."""
    out = tmp_path / "run"
    for number in (0, 1):
        (devices.device(number) / "hang").touch()
    devices.run(out, "federation.rounds=1")
    kill_while_training(devices, [0, 1])
    for number in (0, 1):
        devices.connect(number)
    ended = devices.ended()
    assert ended["status"] == "finished:completed", ended["status-details"] + devices.log()
    first, second = tries(out)
    assert first["aborted"]["phase"] == "mask"
    assert first["aborted"]["counts"] == {"invited": 5, "advertised": 5, "shared": 5, "masked": 3, "needed": 4}
    assert (first["released"], second["released"], second["attempt"]) == (False, True, 2)
    assert "unmask" not in first["furthest"].values()
    assert set(second["counts"].values()) == {DEVICES}
    assert all(keys_of(devices.device(number)) == [] for number in range(DEVICES))
