"""``simulation.engine = "flower"``: the same run on Ray, to the last bit, and nothing is left of it however it ends."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedlearn.config import RunConfig
from fedlearn.errors import ConfigError
from fedlearn.federation.run_folder import RunFolder
from fedlearn.scenario import read_scenario
from fedlearn.simulation.engine import simulate
from fedlearn.simulation.flower_engine import _check_spread

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs fedlearn[ray]")

ROOT = Path(__file__).resolve().parents[2]
FINISHED_S = 240

TASK = """
import time
from fedlearn.tasks.regression import Regression

class Moody(Regression):
    '''A client raises, another hangs, and where asked to all of them take their time.'''

    def prepare(self, data):
        if len(data.train) == 70:
            raise RuntimeError("Jane Doe")
        if len(data.train) == 71:
            time.sleep(SLOW)
        return super().prepare(data)
"""


def command(*words: str) -> subprocess.Popen[str]:
    """Start ``fedlearn`` in a process group of its own, to which Ctrl-C goes as in a terminal."""
    return subprocess.Popen(
        [sys.executable, "-m", "fedlearn", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
        cwd=ROOT,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # some shells ignore it
    )


def finished(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Return the exit code and what was said."""
    out, err = process.communicate(timeout=FINISHED_S)
    return process.returncode, out, err


def sets(*overrides: str) -> list[str]:
    """Return overrides as words of a command, on Flower's runtime with two actors."""
    return [
        word for each in (*overrides, "simulation.engine=flower", "simulation.workers=2") for word in ("--set", each)
    ]


def left() -> list[int]:
    """Return the processes of clusters that fedlearn started."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if any(each.startswith(b"FEDLEARN_RAY=") for each in (folder / "environ").read_bytes().split(b"\0")):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """Fail where a process of Ray's, or its folder, is left."""
    before, folders = set(left()), _folders()
    yield
    assert set(left()) <= before
    assert _folders() <= folders


def _folders() -> set[Path]:
    """Return the folders of Ray's clusters that fedlearn started."""
    return set(Path(tempfile.gettempdir()).glob("fl-ray-*"))


def without_chance(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the lines without the time, and the salt of what the ledger commits to."""
    return [{name: value for name, value in line.items() if name not in ("wall_s", "realised_salt")} for line in lines]


@pytest.mark.slow
@pytest.mark.timeout(600)
@needs_ray
@pytest.mark.usefixtures("nothing_left")
def test_the_model_is_that_of_the_local_engine_and_so_is_who_failed(tmp_path: Path) -> None:
    """353 patients among five clients: three raise. A run that is resumed stays the same, on either engine."""
    (tmp_path / "moody.py").write_text(TASK.replace("SLOW", "0"))
    scenario = [f"task={tmp_path}/moody.py", "federation.clients=5", "federation.rounds=3", "data.partition=iid"]
    scenario += ["federation.min-respondents=1", "simulation.trainer=sequential"]
    out = tmp_path / "flower"
    overrides = sets(*scenario[1:])
    code, said, err = finished(command("simulate", f"{tmp_path}/moody.py", *overrides, "--out", str(out), "--json"))
    assert code == 0, err
    local = RunFolder.create(tmp_path / "local", read_scenario(None, scenario))
    expected, summary = simulate(local), json.loads(said.splitlines()[-1])
    assert summary["model_sha256"] == expected["model_sha256"]
    assert summary["config_sha256"] == expected["config_sha256"]
    folder = RunFolder.open(out)
    assert without_chance(folder.metrics()) == without_chance(local.metrics())
    assert [line["respondents"] for line in folder.metrics()] == [3, 3, 3]
    assert (out / "clients.log").read_text().count("RuntimeError: Jane Doe") == (
        (tmp_path / "local" / "clients.log").read_text().count("RuntimeError: Jane Doe")
    )
    assert "Jane" not in said + err.partition("First cause")[0]
    names = {path.name for path in out.rglob("*") if path.name != ".lock"}
    assert names == {path.name for path in local.path.rglob("*") if path.name != ".lock"}


@pytest.mark.slow
@pytest.mark.timeout(600)
@needs_ray
@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("to", [os.kill, os.killpg], ids=["process", "terminal"])
def test_ctrl_c_ends_it_and_it_goes_on_to_the_same_model(tmp_path: Path, to: Any) -> None:
    overrides = ["federation.clients=4", "federation.rounds=12", "simulation.trainer=sequential"]
    process = command("simulate", "digits-mlp", *sets(*overrides), "--out", str(tmp_path / "run"))
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 2):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    to(process.pid, signal.SIGINT)
    code, _, err = finished(process)
    assert code == 130, err
    assert "simulate --resume" in err
    kept = len(metrics.read_text().splitlines())
    assert 2 <= kept < 12
    assert not left()
    code, said, err = finished(command("simulate", "--resume", str(tmp_path / "run"), "--json"))
    assert code == 0, err
    expected = simulate(RunFolder.create(tmp_path / "local", read_scenario("digits-mlp", overrides)))
    assert json.loads(said.splitlines()[-1])["model_sha256"] == expected["model_sha256"]


@pytest.mark.slow
@pytest.mark.timeout(600)
@needs_ray
@pytest.mark.usefixtures("nothing_left")
def test_a_client_that_hangs_costs_itself_alone_and_a_run_that_fails_says_why(tmp_path: Path) -> None:
    (tmp_path / "moody.py").write_text(TASK.replace("SLOW", "1000"))
    words = ["federation.clients=5", "data.partition=iid", "federation.rounds=1", "federation.round-timeout-s=10"]
    out = tmp_path / "run"
    process = command("simulate", f"{tmp_path}/moody.py", *sets(*words, "federation.round-tries=1"), "--out", str(out))
    code, _, err = finished(process)
    assert code == 1, err
    assert "0 clients answered, 3 are needed" in err
    assert "3 no-reply" in err and "2 training-failed" in err


@pytest.mark.slow
@pytest.mark.timeout(600)
@needs_ray
def test_it_dies_with_the_process_that_started_it(tmp_path: Path) -> None:
    folders = _folders()
    process = command(
        "simulate",
        "digits-mlp",
        *sets("federation.clients=4", "federation.rounds=1000"),
        "--out",
        str(tmp_path / "run"),
    )
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.kill()
    process.communicate()
    deadline_s = time.monotonic() + 120
    while left() and time.monotonic() < deadline_s:
        time.sleep(0.1)
    assert not left()
    for folder in _folders() - folders:  # there was nobody to remove it
        shutil.rmtree(folder)


# -- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["drop=0.5"])
def test_what_only_the_local_engine_breaks_is_refused(fault: str) -> None:
    with pytest.raises(ConfigError, match=rf"faults\.{fault.partition('=')[0]}: Flower's runtime breaks nothing"):
        read_scenario("digits-mlp", ["simulation.engine=flower", f"faults.{fault}"])


def test_the_engine_is_no_part_of_what_a_run_is() -> None:
    one, other = (read_scenario("digits-mlp", [f"simulation.engine={each}"]) for each in ("local", "flower"))
    assert one.sha256() == other.sha256()
    assert one.for_clients() == other.for_clients()


def test_several_machines_share_no_files() -> None:
    _check_spread(RunConfig())
    with pytest.raises(ConfigError, match=r'privacy\.unit: "example" is simulated on one machine'):
        _check_spread(read_scenario("digits-mlp", ["privacy.unit=example", "privacy.noise-multiplier=1"]))
    with pytest.raises(ConfigError, match=r'secagg\.mode: "active" is simulated on one machine'):
        _check_spread(read_scenario("digits-mlp", ["secagg.mode=active"]))
