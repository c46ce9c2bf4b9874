"""``fedlearn init``: the file it writes trains, and is as clean as ours."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedlearn.errors import DataError
from fedlearn.learning.task import Task
from fedlearn.tasks import load_task

Cli = Callable[..., Any]

ROOT = Path(__file__).parents[2]


@pytest.fixture
def written(cli: Cli, tmp_path: Path) -> Path:
    path = tmp_path / "my_task.py"
    said = cli("init", path)
    assert said.code == 0
    assert f"fedlearn simulate {path}" in said.out
    return path


def test_it_trains_as_it_is(cli: Cli, written: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ["--set", "federation.clients=4", "--set", "federation.rounds=6", "--out", out, "--json"]
    assert cli("simulate", written, "--quiet", *words).code == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["metrics"]["accuracy"] > 0.8
    said = cli("predict", out, "--json")
    assert said.json["metrics"] == summary["metrics"]
    assert set(said.json["labels"]) == {"stays well", "comes back"}


def test_every_method_of_the_protocol_is_shown(written: Path) -> None:
    task = load_task(str(written))
    own = {name for name in vars(Task) if not name.startswith("_") and callable(getattr(Task, name))}
    assert own - {"load_client"} <= vars(type(task)).keys()
    assert "load_client" in written.read_text()  # another way to have data: named, and shown in simulations/populations


def test_the_next_commands_show_the_natural_partition(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    said = cli("init", path)
    pool = load_task(str(path)).load_pool(None)
    assert pool.test is not None
    hospitals = [np.unique(np.asarray(examples.groups)).tolist() for examples in (pool.train, pool.test)]
    assert hospitals[0] == hospitals[1]
    words = f"--set data.partition=natural --set federation.clients={len(hospitals[0])}"
    assert f"fedlearn simulate {path} {words}" in said.out
    assert f"fedlearn simulate mine.py {words}" in path.read_text()
    words += " --set federation.rounds=1 --quiet"
    assert cli("simulate", path, *words.split(), "--out", tmp_path / "run").code == 0


def _table(path: Path, count: int = 240) -> Path:
    """Write the patients of two hospitals, in columns of another order and with one that is nobody's."""
    chance = np.random.default_rng(5)
    lines = ["note,target,pulse,hospital,age,pressure"]
    for place in range(count):
        age, pressure, pulse = chance.normal(size=3)
        lines.append(f"n/a,{int(pulse > 0)},{pulse},{('north', 'süd')[place % 3 == 0]},{age},{pressure}")
    path.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    return path


def test_two_hospitals_of_ones_own(cli: Cli, written: Path, tmp_path: Path) -> None:
    table, out = _table(tmp_path / "mine.csv"), tmp_path / "run"
    words = ["--set", f"data.path={table}", "--set", "data.partition=natural", "--set", "federation.clients=2"]
    said = cli("partition", written, *words, "--json")
    assert [client["examples"] for client in said.json["clients"]] == [120, 60]
    words += ["--set", "federation.rounds=10", "--out", str(out), "--json", "--quiet"]
    assert cli("simulate", written, *words).code == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["metrics"]["accuracy"] > 0.8
    ask = tmp_path / "ask.csv"
    ask.write_text("age,pressure,pulse,target\n0,0,2,1\n0,0,-2,0\n")
    said = cli("predict", out, "--data", ask, "--json")
    assert said.json["labels"] == ["comes back", "stays well"]


def test_a_device_reads_its_own_file(written: Path, tmp_path: Path) -> None:
    task = load_task(str(written))
    (tmp_path / "mine.csv").write_text("\ufefftarget, pulse,pressure,age\n1,3,2,1\n0,-1,0,0.5\n", encoding="utf-8")
    held = task.load_local(tmp_path / "mine.csv")
    assert held.test is not None
    assert held.train.groups is None
    assert held.train.inputs.tolist() == [[1, 2, 3]]
    assert held.train.targets.tolist() == [1]
    assert held.test.inputs.tolist() == [[0.5, 0, -1]]
    assert held.test.targets.tolist() == [0]
    assert (held.train.inputs.dtype, held.train.targets.dtype) == (torch.float32, torch.int64)
    everything = task.load_local(_table(tmp_path / "both.csv"))
    assert everything.train.groups is not None
    assert set(everything.train.groups) == {"north", "süd"}


HEADER = "hospital,age,pressure,pulse,target\nnorth,1,2,3,0\n"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (HEADER + "north,1,high,3,1\n", r"row 3, column 'pressure': .*'high'"),
        (HEADER + "\nnorth,nan,2,3,1\n", r"row 4, column 'age': .*'nan'"),
        (HEADER + "north,1,2,inf,1\n", r"row 3, column 'pulse': .*'inf'"),
        (HEADER + "north,1e39,2,3,1\\n", r"row 3, column 'age': .*'1e39'"),
        (HEADER + "north,1,2, ,1\n", r"row 3, column 'pulse': .*''"),
        (HEADER + "north,1,2,3,\n", r"row 3, column 'target': .*''"),
        (HEADER + "north,1,2,3,0.5\n", r"row 3, column 'target': expected 0 to 1, not '0.5'"),
        (HEADER + "north,1,2,3,2\n", r"row 3, column 'target': expected 0 to 1, not '2'"),
        (HEADER + ",1,2,3,1\n", r"row 3, column 'hospital': .*empty"),
        (HEADER + "north,1,2,3\n", r"row 3 has 4 cells, the header 5"),
        (HEADER + "north,1,2,3,1\nsouth,1,2,3,1\n", r"one row of hospital south"),
        ("age,pulse,target\n1,2,0\n", r"one column 'pressure'; row 1 has age, pulse, target"),
        ("age,age,pressure,pulse,target\n1,1,2,3,0\n", r"one column 'age'"),
        ("age,pressure,pulse\n1,2,3\n", r"one column 'target'"),
        ("age,pressure,pulse,target\n", r"no row below the header"),
        ("age,pressure,pulse,target\n1,2,3,0\n", r"one row;"),
        ("", r"row 1 has nothing"),
        ("\x80", r"utf-8"),
        (None, r"No such file"),
    ],
)
def test_a_wrong_file_is_told_by_row_and_column(
    cli: Cli, written: Path, tmp_path: Path, text: str | None, wanted: str
) -> None:
    path = tmp_path / "mine.csv"
    if text is not None:
        path.write_text(text, encoding="latin-1")
    with pytest.raises(DataError, match=rf"mine\.csv.*{wanted}"):
        load_task(str(written)).load_local(path)
    words = ["--set", f"data.path={path}", "--set", "data.partition=natural", "--set", "federation.clients=2"]
    said = cli("simulate", written, *words, "--out", tmp_path / "run", "--quiet")
    assert said.code == 3
    assert re.search(rf"mine\.csv.*{wanted}", " ".join(said.err.split()))


def test_a_file_is_not_written_over(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("precious")
    said = cli("init", path)
    assert said.code == 2
    assert "--force" in said.err
    assert path.read_text() == "precious"
    assert cli("init", path, "--force").code == 0
    assert "fedlearn simulate mine.py" in path.read_text()


@pytest.mark.parametrize(
    ("name", "code"), [("mine.txt", 2), ("mine", 2), (".py", 2), ("torch.py", 2), ("json.py", 2), ("no/mine.py", 3)]
)
def test_a_name_that_cannot_be(cli: Cli, tmp_path: Path, name: str, code: int) -> None:
    said = cli("init", tmp_path / name)
    assert said.code == code
    assert not (tmp_path / name).exists()


def test_a_folder_is_not_written_over(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "mine.py").mkdir()
    assert cli("init", tmp_path / "mine.py", "--force").code == 2


def test_the_template_is_linted_and_formatted(written: Path) -> None:
    template = str(files("fedlearn.cli").joinpath("templates", "my_task.py"))
    for words in (["check"], ["format", "--check"]):
        command = [sys.executable, "-m", "ruff", *words, "--no-cache", "--config", ROOT / "pyproject.toml"]
        for path in (template, str(written)):
            done = subprocess.run([*command, path], capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_template_is_typed(tmp_path: Path, written: Path) -> None:
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", tmp_path / "cache", written]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout
