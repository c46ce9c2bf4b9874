"""What hiding clients costs: a tiny federation here, the measured figure with ``-m slow``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedlearn.scenario import read_scenario
from fedlearn.tasks import load_task

Script = Callable[[str], Any]

FOLDER = Path(__file__).parents[2] / "simulations" / "client-privacy"
# All clients in every round: the noise is then found at once.
TINY = ("federation.clients=20", "federation.cohort=20", "federation.rounds=2", "data.partition=iid")


@pytest.fixture
def price(script: Script) -> Any:
    """Return the script."""
    return script("client-privacy.price")


def _tiny(price: Any, expected: float) -> Any:
    return price.Setting(name="tiny", scenario=FOLDER / "digits.toml", epsilons=(8.0,), expected={8.0: expected})


def test_a_tiny_federation_is_run_with_and_without_privacy(price: Any) -> None:
    answer = price.experiment(TINY, settings=(_tiny(price, 0.0),), seeds=range(1))
    assert answer.met, answer.verdict
    without, hidden = answer.body["runs"]
    assert without["epsilon"] == "inf" and without["noise_multiplier"] is None
    assert 7.9 < hidden["epsilon"] <= 8.0 and hidden["noise_multiplier"] > 0
    assert hidden["accuracy"] < without["accuracy"]
    assert len(answer.rows) == 2 and all(len(row) == len(answer.columns) for row in answer.rows)


def test_an_accuracy_below_the_expected_one_is_told(price: Any) -> None:
    assert not price.experiment(TINY, settings=(_tiny(price, 1.0),), seeds=range(1)).met


def test_an_epsilon_above_the_target_is_told(price: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    scenario = tmp_path / "scenario.toml"
    text = (FOLDER / "digits.toml").read_text(encoding="utf-8")
    scenario.write_text(text.replace("target-epsilon = 8.0", "noise-multiplier = 0.5"), encoding="utf-8")
    really = price.run

    def run(path: Path, overrides: list[str]) -> Any:  # as if less noise had been drawn than was planned
        return really(path, [each for each in overrides if "target-epsilon" not in each])

    monkeypatch.setattr(price, "run", run)
    setting = price.Setting(name="tiny", scenario=scenario, epsilons=(8.0,), expected={})
    answer = price.experiment(TINY, settings=(setting,), seeds=range(1))
    assert answer.body["runs"][1]["epsilon"] > 8
    assert not answer.met


def test_the_scenarios_promise_what_the_readme_says() -> None:
    mnist, digits = (read_scenario(str(FOLDER / name)) for name in ("scenario.toml", "digits.toml"))
    assert (mnist.federation.clients, mnist.privacy.delta, mnist.federation.sampling) == (1000, "auto", "poisson")
    assert 3 * digits.federation.clients == 1437  # three images each, to the last one


def test_the_small_model_is_small() -> None:
    model = load_task(str(FOLDER / "task.py")).build_model()
    assert sum(each.numel() for each in model.parameters()) == 6_634


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_mnist_at_epsilon_8(price: Any, mnist: Path) -> None:
    (setting,) = (each for each in price.SETTINGS if each.data)
    only = price.Setting(name=setting.name, scenario=setting.scenario, epsilons=(8.0,), expected={8.0: 0.91}, data=True)
    answer = price.experiment([f"data.path={mnist}"], settings=(only,), seeds=range(1))
    assert answer.met, answer.verdict
    without, hidden = answer.body["runs"]
    assert without["accuracy"] - hidden["accuracy"] < 0.03
    assert hidden["noise_multiplier"] == pytest.approx(0.713, rel=0.01)
    assert hidden["delta"] == pytest.approx(1000**-1.1)
