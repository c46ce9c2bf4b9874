"""``fedlearn tasks``: every built-in problem, with numbers that are true."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fedlearn.errors import DependencyError
from fedlearn.tasks import BUILT_IN, digits, regression

Cli = Callable[..., Any]


def test_every_task_is_listed(cli: Cli) -> None:
    said = cli("tasks", "--json")
    assert said.code == 0
    by_name = {each["name"]: each for each in said.json["tasks"]}
    assert by_name.keys() == BUILT_IN.keys()
    perceptron = by_name["digits-mlp"]
    assert (perceptron["parameters"], perceptron["examples"], perceptron["test_examples"]) == (4810, 1437, 360)
    assert perceptron["input_shape"] == [1, 8, 8]


def test_table_says_how_to_name_ones_own(cli: Cli) -> None:
    said = cli("tasks")
    assert said.code == 0
    assert "fedlearn init my_task.py" in said.out
    assert "4,810" in said.out


def test_without_scikit_learn_it_says_so(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise DependencyError("scikit-learn", "simulation", "the data")

    for module in (digits, regression):
        monkeypatch.setattr(module, "require_sklearn", missing)
    digits._digits.cache_clear()
    regression._diabetes.cache_clear()
    said = cli("tasks", "--json")
    assert said.code == 0
    assert {(each["examples"], each["needs"]) for each in said.json["tasks"]} == {(None, "scikit-learn")}
    shown = cli("tasks")
    assert ".[simulation]" in shown.out
    assert "unknown" in shown.out
