"""The same two apps on Flower's own simulation runtime: ``flwr run .``, a SuperLink, Ray, and what is left behind."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedlearn.errors import ConfigError
from fedlearn.federation.run_folder import RunFolder
from fedlearn.flower.client import build_client_app
from fedlearn.flower.grid import LocalGrid
from fedlearn.flower.server import build_server_app
from fedlearn.scenario import read_scenario
from fedlearn.simulation.engine import simulate

# isort: split
from flwr.app import Context, Message, RecordDict, UserConfig
from flwr.cli.build import build_fab_from_disk
from flwr.clientapp import ClientApp
from flwr.simulation.run_simulation import _run_simulation
from flwr.supercore.telemetry import EventType

HAS_RAY = importlib.util.find_spec("ray") is not None

ROOT = Path(__file__).resolve().parents[2]
FINISHED_S = 150.0


class Runtime:
    """A ``flwr`` with a home and ports of its own; every process it starts, however detached, is found by its home."""

    def __init__(self, home: Path) -> None:
        self.home = home
        http, control = _free_ports(2)
        self.env = {
            **os.environ,
            "FLWR_HOME": str(home),
            "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(http),
            "FLWR_LOCAL_CONTROL_API_PORT": str(control),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            # flwr starts the SuperLink by name
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "RAY_TMPDIR": str(home),  # short: sockets lie below it
        }

    def flwr(self, *words: str) -> str:
        """Run one command of Flower's, away from the checkout, so that what runs is what the bundle carries."""
        done = subprocess.run(
            ["flwr", *words], env=self.env, cwd=self.home, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def run(self, nodes: int, **options: str) -> dict[str, Any]:
        """Run the app at the root of the repository to its end and return what ``flwr list`` says about it."""
        config = " ".join(f'{name}="{value}"' for name, value in options.items())
        federation = f"num-supernodes={nodes} client-resources-num-cpus=1"
        words = ["run", str(ROOT), "local", "--run-config", config, "--federation-config", federation]
        self.flwr(*words)
        deadline_s = time.monotonic() + FINISHED_S
        while time.monotonic() < deadline_s:
            newest: dict[str, Any] = json.loads(self.flwr("list", "--format", "json"))["runs"][0]
            if newest["status"].startswith("finished"):
                return newest
            time.sleep(1)
        raise TimeoutError(f"the run did not end in {FINISHED_S:g} s")

    def processes(self) -> list[int]:
        """Return the processes that live in this home."""
        mark, found = f"FLWR_HOME={self.home}".encode(), []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
            except OSError:  # it ended, or it is not ours to read
                continue
        return found

    def stop(self) -> bool:
        """End the SuperLink as the README says, by SIGTERM; return whether that ended everything else, too."""
        for pid in self.processes():
            if b"flower-superlink" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGTERM)
        deadline_s = time.monotonic() + 20
        while self.processes() and time.monotonic() < deadline_s:
            time.sleep(0.1)
        left = self.processes()
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        return not left


def _free_ports(count: int) -> list[int]:
    """Return ports that nobody uses now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]
    finally:
        for each in sockets:
            each.close()


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    home = Path(tempfile.mkdtemp(prefix="flwr-", dir="/tmp"))
    started = Runtime(home)
    try:
        yield started
    finally:
        clean = started.stop()
        shutil.rmtree(home, ignore_errors=True)
    assert clean, "processes were left behind"


def _without_chance(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the lines without what no two runs share: the time, and the salt of what the ledger commits to."""
    return [{name: value for name, value in line.items() if name not in ("wall_s", "realised_salt")} for line in lines]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(not HAS_RAY, reason="needs fedlearn[ray]")
def test_three_rounds_end_in_the_model_of_the_local_engine(runtime: Runtime, tmp_path: Path) -> None:
    """To the last bit: clients are named by their partition, summed in their order, and compute on one thread."""
    overrides = ["federation.rounds=3", "federation.clients=4", "federation.cohort=3", "simulation.trainer=sequential"]
    out = tmp_path / "flower"
    ended = runtime.run(4, set="; ".join(overrides), out=str(out))
    assert ended["status"] == "finished:completed", ended["status-details"]

    local = RunFolder.create(tmp_path / "local", read_scenario(None, overrides))
    expected = simulate(local)
    folder = RunFolder.open(out)
    summary = folder.summary()
    assert summary["rounds"] == 3
    assert summary["model_sha256"] == expected["model_sha256"]
    assert summary["config_sha256"] == expected["config_sha256"]
    assert summary["metrics"] == expected["metrics"]
    assert _without_chance(folder.metrics()) == _without_chance(local.metrics())
    left = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file() and path.name != ".lock"}
    assert left == {
        "config.toml",
        "ledger.jsonl",
        "metrics.jsonl",
        "model.safetensors",
        "summary.json",
        "history.svg",
        "checkpoint/state.safetensors",
    }

    resumed = runtime.run(4, resume=str(out))
    assert resumed["status"] == "finished:completed", resumed["status-details"]
    assert RunFolder.open(out).summary()["model_sha256"] == expected["model_sha256"]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(not HAS_RAY, reason="needs fedlearn[ray]")
@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ("federation.roundz=3", "federation.roundz: unknown key"),
        ("federation.clients=4", "federation.clients: is 4, but Flower's simulation runtime has 3 nodes"),
    ],
)
def test_a_run_that_cannot_be_says_why(runtime: Runtime, tmp_path: Path, overrides: str, said: str) -> None:
    ended = runtime.run(3, set=overrides, out=str(tmp_path / "run"))
    assert ended["status"] == "finished:failed"
    assert said in ended["status-details"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"out": "here"}, "out: must be an absolute path"),
        ({"set": "faults.drop=0.5"}, "faults.drop: only `fedlearn simulate`"),
        ({"set": "federation.cohort"}, "section.key=value"),
    ],
)
def test_run_configs_that_are_refused(tmp_path: Path, options: dict[str, str], said: str) -> None:
    with LocalGrid(build_client_app(), clients=1) as grid, pytest.raises(ConfigError, match=said):
        grid.serve(build_server_app(), {"out": str(tmp_path / "run"), **options})
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # flwr calls pathspec by an old name
def test_the_bundle_is_small_and_carries_no_tests() -> None:
    data = build_fab_from_disk(ROOT)
    names = zipfile.ZipFile(io.BytesIO(data)).namelist()
    assert len(data) < 2_000_000  # Flower refuses 10 MB
    assert {"pyproject.toml", "server/app.py", "clients/app.py", "fedlearn/flower/client.py"} <= set(names)
    assert {name.partition("/")[0] for name in names} == {
        ".info",
        "pyproject.toml",
        "server",
        "clients",
        "fedlearn",
        "simulations",
    }


# -- Flower's message store without Ray ----------------------------------------------------------------------------


class _Threads:
    """What takes Ray's place in Flower's simulation runtime: its worker threads call the ClientApp themselves."""

    num_workers = 1

    def __init__(self, _config: object) -> None:
        pass

    def build(self, app_fn: Callable[[], ClientApp]) -> None:
        self.app = app_fn()

    def process_message(self, message: Message, context: Context) -> tuple[Message, Context]:
        return self.app(message, context), context

    def terminate(self) -> None:
        pass


MOODY = """
from fedlearn.tasks.regression import Regression

class Moody(Regression):
    def prepare(self, data):
        if len(data.train) % 2:
            raise RuntimeError("nobody may read this")
        return super().prepare(data)
"""


def _on_flowers_store(monkeypatch: pytest.MonkeyPatch, nodes: int, run_config: UserConfig) -> None:
    """Run the two apps on Flower's simulation runtime, with threads in Ray's place."""
    module = types.ModuleType("raybackend")
    module.RayBackend = _Threads  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flwr.server.superlink.fleet.vce.backend.raybackend", module)
    context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=run_config)
    _run_simulation(
        num_supernodes=nodes,
        exit_event=EventType.PING,
        client_app=build_client_app(),
        server_app=build_server_app(),
        server_app_context=context,
        backend_name="threads",
    )


@pytest.mark.slow
def test_refusals_travel_through_flowers_store_as_codes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An error reply keeps its code and its client, and its text stays in the client's log."""
    (tmp_path / "moody.py").write_text(MOODY)
    overrides = [f"task={tmp_path}/moody.py", "federation.clients=5", "federation.rounds=2", "data.partition=iid"]
    overrides += ["federation.min-respondents=1", "simulation.trainer=sequential"]
    _on_flowers_store(monkeypatch, 5, {"set": "; ".join(overrides), "out": str(tmp_path / "flower")})
    local = RunFolder.create(tmp_path / "local", read_scenario(None, overrides))
    expected = simulate(local)
    folder = RunFolder.open(tmp_path / "flower")
    assert set(folder.metrics()[0]["failures"].values()) == {"training-failed"}
    assert _without_chance(folder.metrics()) == _without_chance(local.metrics())
    assert folder.summary()["model_sha256"] == expected["model_sha256"]


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [2, 5])
def test_another_number_of_nodes_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, nodes: int
) -> None:
    with pytest.raises(ConfigError, match=f"has {nodes} nodes"):
        _on_flowers_store(
            monkeypatch, nodes, {"set": "task=regression; federation.clients=3", "out": str(tmp_path / "run")}
        )
