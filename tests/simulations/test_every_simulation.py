"""What every folder of ``simulations/`` owes its reader."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedlearn.config import RunConfig
from fedlearn.scenario import read_scenario

ROOT = Path(__file__).parents[2] / "simulations"
FOLDERS = sorted(path for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(("_", ".")))
# A folder without a scenario of its own measures the package, not a federation.
QUESTIONS = [folder for folder in FOLDERS if folder.name not in ("accountants", "benchmarks")]
SECTIONS = ("Question", "Command", "Minutes", "Expected", "Measured")

every_question = pytest.mark.parametrize("folder", QUESTIONS, ids=lambda folder: folder.name)


def test_the_experiments_are_there() -> None:
    names = {folder.name for folder in QUESTIONS}
    assert {"digits", "heart-disease", "mnist", "noniid", "regression"} <= names


@every_question
def test_the_scenario_parses(folder: Path) -> None:
    config = read_scenario(str(folder / "scenario.toml"))
    assert isinstance(config, RunConfig)
    if config.task.endswith(".py"):
        assert Path(config.task).is_file()


@every_question
def test_the_readme_has_its_sections_in_order(folder: Path) -> None:
    lines = (folder / "README.md").read_text(encoding="utf-8").splitlines()
    headings = [line.removeprefix("## ") for line in lines if line.startswith("## ")]
    assert tuple(heading for heading in headings if heading in SECTIONS) == SECTIONS


@every_question
def test_the_readme_names_a_command_that_exists(folder: Path) -> None:
    text = (folder / "README.md").read_text(encoding="utf-8")
    scripts = [path for path in folder.glob("*.py") if "__main__" in path.read_text(encoding="utf-8")]
    for path in scripts:
        assert f"python -m simulations.{folder.name}.{path.stem}" in text
    assert scripts or f"fedlearn simulate simulations/{folder.name}/scenario.toml" in text


@every_question
def test_data_from_outside_is_named_relative_to_the_scenario(folder: Path) -> None:
    text = (folder / "scenario.toml").read_text(encoding="utf-8")
    path = read_scenario(str(folder / "scenario.toml")).data.path
    if path is not None:
        assert 'path = "../../../shared/data/' in text
        assert Path(path).parent == (ROOT.parents[1] / "shared" / "data").resolve()


def test_the_index_names_every_folder() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for folder in QUESTIONS:
        assert f"({folder.name}/README.md)" in text


def test_the_digits_scenario_is_the_default() -> None:
    assert read_scenario(str(ROOT / "digits" / "scenario.toml")) == RunConfig()


@every_question
def test_no_data_lies_in_the_folder(folder: Path) -> None:
    kept = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert {path.suffix for path in kept} <= {".md", ".py", ".toml"}
