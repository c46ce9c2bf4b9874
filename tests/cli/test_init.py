"""``fedlearn init``: the file it writes trains, and is as clean as ours."""

from __future__ import annotations

import json
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
    assert set(said.json["labels"]) == {"runs on", "fails"}


def test_every_method_of_the_protocol_is_shown(written: Path) -> None:
    task = load_task(str(written))
    own = {name for name in vars(Task) if not name.startswith("_") and callable(getattr(Task, name))}
    assert own <= vars(type(task)).keys()


def test_groups_make_a_natural_partition(written: Path) -> None:
    groups = load_task(str(written)).load_pool(None).train.groups
    assert groups is not None
    assert len(np.unique(groups)) == 8


def test_a_device_reads_its_own_file(written: Path, tmp_path: Path) -> None:
    task = load_task(str(written))
    (tmp_path / "mine.csv").write_text("temperature,vibration,load,failed\n1,2,3,1\n0.5,0,-1,0\n")
    np.savez(tmp_path / "mine.npz", inputs=np.array([[1.0, 2, 3], [0.5, 0, -1]]), targets=np.array([1, 0]))
    table, archive = (task.load_local(tmp_path / name).train for name in ("mine.csv", "mine.npz"))
    assert torch.equal(table.inputs, archive.inputs)
    assert torch.equal(table.targets, archive.targets)


@pytest.mark.parametrize("text", ["a,b\n1,2\n", "a,b,c,d\n1,2,3,x\n"])
def test_a_device_with_another_file_is_told(written: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "mine.csv").write_text(text)
    with pytest.raises(DataError, match="mine"):
        load_task(str(written)).load_local(tmp_path / "mine.csv")
    with pytest.raises(DataError, match="none"):
        load_task(str(written)).load_local(tmp_path / "none.csv")


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
