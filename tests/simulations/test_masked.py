"""Whether masking changes the model: a tiny federation here, the measured figures with ``-m slow``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Script = Callable[[str], Any]

FOLDER = Path(__file__).parents[2] / "simulations"
TINY = (
    "task=digits-mlp",
    "federation.clients=5",
    "federation.cohort=5",
    "federation.min-respondents=4",
    "federation.rounds=2",
    "data.partition=iid",
)


@pytest.fixture
def same(script: Script) -> Any:
    """Return the script."""
    return script("masked.same")


def _tiny(same: Any) -> Any:
    return same.Setting(name="tiny", scenario=FOLDER / "digits" / "scenario.toml")


def test_a_tiny_federation_gives_one_model_masked_and_not(same: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(same, "HALF_A_POINT", 0.05)  # a point is two digits here
    answer = same.experiment(TINY, settings=(_tiny(same),), seeds=range(1))
    assert answer.met, answer.verdict
    (found,) = answer.body["settings"]
    assert 0 < found["off_by_units"] <= found["at_most_units"] < 7


def test_a_difference_beyond_rounding_is_told(same: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    really = same._run

    def run(setting: Any, overrides: Any) -> Any:  # as if masking had changed one number
        accuracy, data, arrays = really(setting, overrides)
        if "secagg.mode=active" in overrides:
            arrays = {name: array + 1e-2 for name, array in arrays.items()}
            data += b"x"
        return accuracy, data, arrays

    monkeypatch.setattr(same, "_run", run)
    answer = same.experiment(TINY, settings=(_tiny(same),), seeds=range(1))
    assert not answer.met
    assert answer.verdict.count("NOT as expected") >= 2


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_measured_figures(same: Any) -> None:
    answer = same.experiment((), seeds=range(1))
    assert answer.met, answer.verdict
