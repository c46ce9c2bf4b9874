"""Correlated noise against independent noise: the formula and a tiny federation here, accuracies with ``-m slow``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedlearn.privacy import matrix
from fedlearn.privacy.plan import plan_privacy
from fedlearn.scenario import read_scenario

Script = Callable[[str], Any]

TINY = (
    "data.partition=iid",
    "federation.clients=40",
    "federation.cohort=10",
    "federation.rounds=8",
    "federation.evaluate-every=8",
    "simulation.workers=0",
)


@pytest.fixture
def gain(script: Script) -> Any:
    """Return the script."""
    return script("dp-ftrl.gain")


@pytest.fixture
def tiny(gain: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let the script train on digits, which lie in no folder."""
    lines = gain.SCENARIO.read_text(encoding="utf-8").splitlines()
    kept = ["task = 'digits-mlp'" if each.startswith("task") else each for each in lines if not each.startswith("path")]
    scenario = tmp_path / "scenario.toml"
    scenario.write_text("\n".join(kept), encoding="utf-8")
    monkeypatch.setattr(gain, "SCENARIO", scenario)


@pytest.mark.usefixtures("tiny")
def test_every_way_keeps_to_the_same_epsilon(gain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # Without secret cohorts, whose noise alone takes seconds to find.
    monkeypatch.setattr(gain, "WAYS", [each for each in gain.WAYS if each != gain.SECRET])
    answer = gain.experiment(TINY, range(1))
    private = [each for each in answer.body["ways"] if each["epsilon"] is not None]
    assert len(private) == 3
    for each in private:
        assert 1.97 < each["epsilon"] <= 2.0, each["way"]
    assert len(answer.rows) == len(gain.WAYS)


def test_one_band_is_independent_noise_for_participations_that_are_apart(gain: Any) -> None:
    config = read_scenario(str(gain.SCENARIO), TINY)
    together = plan_privacy(config)
    with gain.one_band():
        plan = plan_privacy(config)
        assert plan.releases()[0].matrix.coefficients == (1.0,)
        mechanism = plan.mechanism("test")
        assert (mechanism.coefficients, mechanism.sensitivity) == ((1.0,), 2**0.5)  # 8 rounds, 4 apart: twice at most
    assert plan.noise_multiplier == pytest.approx(together.noise_multiplier, rel=2e-3)  # of all rounds together
    assert plan_privacy(config).releases()[0].matrix.coefficients != (1.0,)


def test_the_predicted_noise_is_that_of_the_formula(gain: Any) -> None:
    config = read_scenario(str(gain.SCENARIO))
    noise = gain.predicted(config)
    bands = matrix.square_root_coefficients(10)
    correlated = matrix.sensitivity(bands, rows=60, min_separation=10) * matrix.error(bands, 60)
    independent = (sum(range(1, 61)) / 60) ** 0.5
    assert noise[gain.DP_FTRL.name] == 1
    assert noise[gain.SEPARATED.name] == pytest.approx(6**0.5 * independent / correlated)
    assert noise[gain.EVERY_ROUND.name] == pytest.approx(60**0.5 * independent / correlated)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_correlated_noise_gains_accuracy(gain: Any, mnist: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gain, "WAYS", (gain.EVERY_ROUND, gain.SEPARATED, gain.DP_FTRL))
    answer = gain.experiment([f"data.path={mnist}"], range(1))
    assert answer.met, answer.verdict
    assert answer.body["gain"] > 0.01
