"""No phoning home: a whole run tries to reach nobody, and the check that says so can fail.

Two guards watch a run in a process of its own. Python's audit events name every address that any Python code wants to
resolve, connect or send to, in the process and in all it starts. Where the machine allows it, the run also has a
network namespace without any interface, and the kernel counts what found no route, whoever asked (C code, too).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
OTHERS = ("MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK", "CI", "GITHUB_ACTIONS", "PYTEST_CURRENT_TEST")
"""What MLflow asks before it calls home."""
SIMULATE = """
from fedlearn.cli import main
main()
"""
TELEMETRY = """
import fedlearn.flower
from flwr.supercore import telemetry
print(telemetry.event(telemetry.EventType.PING).result(timeout=30))
"""
GUARD = '''
"""Note down every address outside this machine that Python code wants to reach, and where asked to, forbid it."""
import ipaddress
import os
import sys

ADDRESS = {"socket.connect": 1, "socket.sendto": 1, "socket.sendmsg": 1, "socket.getaddrinfo": 0,
           "socket.gethostbyname": 0, "socket.gethostbyaddr": 0}

def here(host):
    if host in (None, "", b"", "localhost", b"localhost"):
        return True
    try:
        return ipaddress.ip_address(host.decode() if isinstance(host, bytes) else host).is_loopback
    except (ValueError, AttributeError):
        return False

def watch(event, values):
    if event not in ADDRESS:
        return
    address = values[ADDRESS[event]]
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        if not isinstance(address, tuple):  # a path: a socket between processes
            return
        address = address[0]
    if here(address):
        return
    with open(os.environ["GUARD_LOG"], "a") as log:
        log.write(f"{event} {address}\\n")
    if os.environ["GUARD_FORBIDS"] == "1":
        raise PermissionError(f"this test forbids {event} {address}")

sys.addaudithook(watch)
'''


@dataclass(frozen=True, kw_only=True)
class Watched:
    """What a watched process printed, whom it wanted to reach, and how many packets the kernel had no route for."""

    output: str
    attempts: list[str]
    without_route: int | None


@cache
def _isolated() -> bool:
    """Return whether this machine lets a test have a network namespace of its own."""
    try:
        return subprocess.run(["unshare", "-rn", "true"], capture_output=True, timeout=10, check=False).returncode == 0
    except OSError:
        return False


def _watch(folder: Path, code: str, *words: str, **settings: str) -> Watched:
    """Run Python code under both guards."""
    (folder / "guard").mkdir()
    (folder / "guard" / "sitecustomize.py").write_text(GUARD)
    environment = {name: value for name, value in os.environ.items() if name not in (*SETTINGS, *OTHERS)}
    environment |= {
        "PYTHONPATH": f"{folder / 'guard'}{os.pathsep}{ROOT}",
        "GUARD_LOG": str(folder / "attempts"),
        "GUARD_FORBIDS": "0" if _isolated() else "1",  # without an interface nothing gets out anyway: the kernel counts
        "FLWR_HOME": str(folder / "flwr"),
        **settings,
    }
    command = [sys.executable, "-W", "ignore", "-c", code, *words]
    if _isolated():
        script = '"$@"; code=$?; cat /proc/self/net/snmp /proc/self/net/snmp6 > "$0"; exit $code'
        command = ["unshare", "-rn", "sh", "-c", script, str(folder / "counters"), *command]
    done = subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stderr
    log = folder / "attempts"
    return Watched(
        output=done.stdout.strip(),
        attempts=log.read_text().splitlines() if log.exists() else [],
        without_route=_without_route((folder / "counters").read_text()) if _isolated() else None,
    )


def _without_route(counters: str) -> int:
    """Return how many packets of IPv4 and IPv6 found no route."""
    lines = [line.split() for line in counters.splitlines()]
    names, values = [line[1:] for line in lines if line[0] == "Ip:"]
    six = {line[0]: int(line[1]) for line in lines if len(line) == 2}
    return int(dict(zip(names, values, strict=True))["OutNoRoutes"]) + six.get("Ip6OutNoRoutes", 0)


def test_a_run_wants_to_reach_nobody(tmp_path: Path) -> None:
    words = [
        "simulate",
        "--set",
        "federation.clients=3",
        "--set",
        "federation.rounds=1",
        "--set",
        "simulation.workers=1",
    ]
    seen = _watch(tmp_path, SIMULATE, *words, "--out", str(tmp_path / "run"), "--json", "-q")
    assert json.loads(seen.output.splitlines()[-1])["rounds"] == 1
    assert seen.attempts == []
    assert seen.without_route in (0, None)


TRACKED = ("simulate", "--set", "federation.clients=3", "--set", "federation.rounds=1", "--track", "tensorboard")


def test_a_run_tracked_by_tensorboard_wants_to_reach_nobody(tmp_path: Path) -> None:
    seen = _watch(tmp_path, SIMULATE, *TRACKED, "--out", str(tmp_path / "run"), "-q")
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    assert seen.attempts == []
    assert seen.without_route in (0, None)


@pytest.mark.slow
@pytest.mark.parametrize("told", [{}, {"MLFLOW_DISABLE_TELEMETRY": "false", "DO_NOT_TRACK": "false"}])
def test_a_run_tracked_by_mlflow_wants_to_reach_nobody(told: dict[str, str], tmp_path: Path) -> None:
    """Unless the user says that it may: then it tries to, which the guards see."""
    seen = _watch(tmp_path, SIMULATE, *TRACKED, "--track", "mlflow", "--out", str(tmp_path / "run"), "-q", **told)
    assert (tmp_path / "run" / "mlruns" / "mlflow.db").exists()
    assert bool(seen.attempts) == bool(told), seen.attempts
    if not told:
        assert seen.without_route in (0, None)


def test_the_check_can_fail(tmp_path: Path) -> None:
    """With Flower's telemetry turned on by the user, the guards see it."""
    seen = _watch(tmp_path, TELEMETRY, FLWR_TELEMETRY_ENABLED="1")
    assert any("telemetry.flower.ai" in attempt for attempt in seen.attempts)
    if seen.without_route is not None:
        assert seen.without_route > 0


def test_telemetry_is_off_where_nobody_turned_it_on(tmp_path: Path) -> None:
    seen = _watch(tmp_path, TELEMETRY)
    assert seen.output == "disabled"
    assert seen.attempts == []
    assert seen.without_route in (0, None)


@pytest.mark.parametrize("chosen", [{}, {name: "1" if value == "0" else "0" for name, value in SETTINGS.items()}])
def test_the_users_choice_stands(chosen: dict[str, str]) -> None:
    """Importing ``fedlearn.flower`` decides only what nobody decided, and before flwr is imported."""
    code = (
        "import os, sys, json, fedlearn.flower; assert 'flwr' not in sys.modules; "
        f"print(json.dumps({{name: os.environ[name] for name in {list(SETTINGS)}}}))"
    )
    environment = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**environment, "PYTHONPATH": str(ROOT), **chosen},
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert json.loads(done.stdout) == {**SETTINGS, **chosen}
