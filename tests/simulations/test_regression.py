"""Federation is gradient descent: on a few rounds here, on thousands with ``-m slow``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

Script = Callable[[str], Any]

FEW = ("federation.rounds=5", "federation.evaluate-every=5")


@pytest.mark.parametrize(
    "overrides", [FEW, ("task=digits-mlp", "training.learning-rate=0.1", *FEW)], ids=["regression", "digits-mlp"]
)
def test_every_round_equals_descent_in_one_process(script: Script, overrides: tuple[str, ...]) -> None:
    descent = script("regression.descent")
    found = descent.compare(overrides)
    assert found.rounds == 5
    assert len(set(found.sizes)) > 1, "the clients should differ in size, else weighting is not tested"
    assert 0 <= found.largest <= descent.BAR
    if found.task == "regression":  # float64 all the way
        assert found.largest < 1e-12


def test_the_comparison_sees_a_difference(script: Script) -> None:
    # Averaging that forgets the sizes is another algorithm; a comparison that passes it would pass anything.
    descent = script("regression.descent")
    found = descent.compare((*FEW, "training.weighting=uniform"))
    assert found.largest > 1e-3


def test_the_gradients_are_those_of_the_objective(script: Script) -> None:
    # Against central differences of J itself, so that the reference does not lean on anything but its definition.
    descent = script("regression.descent")
    chance = np.random.default_rng(0)
    inputs, theta = chance.normal(size=(7, 10)), chance.normal(size=11)
    targets = chance.normal(size=7)

    def objective(at: np.ndarray) -> float:
        return float(((targets - inputs @ at[:-1] - at[-1]) ** 2).sum() / (2 * len(targets)))

    steps = np.eye(11) * 1e-6
    numeric = [(objective(theta + step) - objective(theta - step)) / 2e-6 for step in steps]
    np.testing.assert_allclose(descent._regression_gradient(theta, inputs, targets), numeric, rtol=1e-6, atol=1e-8)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_whole_experiment(script: Script) -> None:
    answer = script("regression.descent").experiment(())
    assert answer.met, answer.verdict
    assert answer.body["distance_to_least_squares"] <= answer.body["solution_bar"]
