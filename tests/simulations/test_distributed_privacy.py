"""What hiding clients from the server, too, costs: a tiny federation here, the measured figures with ``-m slow``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Script = Callable[[str], Any]

FOLDER = Path(__file__).parents[2] / "simulations" / "distributed-privacy"
TINY = (
    "federation.clients=20",
    "federation.cohort=20",
    "federation.min-respondents=18",
    "federation.rounds=2",
    "data.partition=iid",
)


@pytest.fixture
def table(script: Script) -> Any:
    """Return the script."""
    return script("distributed-privacy.table")


def _tiny(table: Any, least: float) -> Any:
    return table.Setting(name="tiny", scenario=FOLDER / "digits.toml", least=least)


def test_a_tiny_federation_is_run_three_ways(table: Any) -> None:
    answer = table.experiment(TINY, settings=(_tiny(table, 0.0),), seeds=range(1))
    assert answer.met, answer.verdict
    none, central, distributed = answer.body["runs"]
    assert none["epsilon"] == "inf"
    assert 7.9 < central["epsilon"] <= 8.0
    assert 0 < distributed["epsilon"] <= 8.0  # all answered, and so there was more noise than the fewest give
    assert abs(distributed["over_gaussian"]) < 0.003
    assert distributed["gaussian_pld"] < distributed["gaussian_rdp"]
    assert len(answer.rows) == 3 and all(len(row) == len(answer.columns) for row in answer.rows)


def test_an_accuracy_below_the_expected_one_is_told(table: Any) -> None:
    assert not table.experiment(TINY, settings=(_tiny(table, 1.0),), seeds=range(1)).met


def test_lanes_too_narrow_for_a_gaussian_s_epsilon_are_told(table: Any) -> None:
    coarse = (*TINY, "secagg.bits=16", "privacy.bound-l2=1.0", "secagg.colluding=0.3", "federation.min-respondents=14")
    answer = table.experiment(coarse, settings=(_tiny(table, 0.0),), seeds=range(1), target=0.2)
    assert answer.body["runs"][2]["over_gaussian"] > 0.003
    assert not answer.met


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_measured_figures(table: Any) -> None:
    answer = table.experiment((), seeds=range(1))
    assert answer.met, answer.verdict
