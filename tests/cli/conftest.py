"""One small finished run for every test that uses a model, and the command line as a function."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fedlearn.cli import main
from fedlearn.config import RunConfig
from fedlearn.federation.run_folder import RunFolder
from fedlearn.simulation.engine import simulate


@dataclass(frozen=True)
class Said:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The last line of standard output, which is all of it."""
        lines = self.out.splitlines()
        assert len(lines) == 1, self.out
        return dict(json.loads(lines[0]))


Fedlearn = Callable[..., tuple[int, str, str]]


@pytest.fixture
def fedlearn(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fedlearn:
    """Return a function that runs a command line in an empty folder: exit code, standard output and error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")

    def call(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main(list(words))
        out, err = capsys.readouterr()
        code = stopped.value.code
        assert isinstance(code, int)
        return code, out, err

    return call


Cli = Callable[..., Said]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """Return a function that runs a command line."""

    def call(*words: object) -> Said:
        with pytest.raises(SystemExit) as stopped:
            main([str(word) for word in words])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err + captured.out
        return Said(int(stopped.value.code or 0), captured.out, captured.err)

    return call


def _train(path: Path, task: str) -> Path:
    tables = {"task": task, "federation": {"clients": 3, "rounds": 2}, "data": {"partition": "iid"}}
    simulate(RunFolder.create(path, RunConfig.from_mapping(tables)))
    return path


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of the digits' perceptron: three clients, two rounds. Not to be changed."""
    return _train(tmp_path_factory.mktemp("runs") / "digits", "digits-mlp")


@pytest.fixture(scope="session")
def trained_regression(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same for the regression, whose answers are no classes."""
    return _train(tmp_path_factory.mktemp("runs") / "regression", "regression")


@pytest.fixture
def run_copy(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run, to damage."""
    return Path(shutil.copytree(trained, tmp_path / "run"))
