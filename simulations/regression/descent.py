"""Hold a real federation against the same gradient descent written down once more in one process, round by round.

The federation is the engine with its apps, messages and checkpoints. The descent beside it knows nothing of clients:
it is NumPy in float64 on all the data at once, with gradients written out by hand.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlearn.config import RunConfig
from fedlearn.data.loaders import distribute_data
from fedlearn.federation.checkpoint import load_checkpoint
from fedlearn.federation.run_folder import RunFolder
from fedlearn.learning import Examples, build_flat_model
from fedlearn.scenario import read_scenario
from fedlearn.sources import SeedTree
from fedlearn.tasks import load_task
from simulations.runs import Answer, arguments, finish, progress, run, stated

BAR = 1e-5
"""The largest ‖θ_fed − θ_gd‖ / ‖θ_gd‖ allowed after any round."""

SOLUTION_BAR = 1e-5
"""The largest ‖θ − θ*‖ / ‖θ*‖ allowed at the end, θ* being the least-squares solution."""

SCENARIO = Path(__file__).with_name("scenario.toml")
MLP = ("task=digits-mlp", "federation.rounds=50", "federation.evaluate-every=50", "training.learning-rate=0.1")

Array = NDArray[np.float64]
Gradient = Callable[[Array, Array, Array], Array]


@dataclass(eq=False)
class Descent:
    """One process: θ ← θ − η ∇J(θ) on all the data. It goes one step whenever the federation ends a round."""

    theta: Array
    inputs: Array
    targets: Array
    gradient: Gradient
    learning_rate: float
    folder: RunFolder
    rounds: int = 0
    largest: float = 0.0
    federated: Array = field(default_factory=lambda: np.zeros(0))

    def replied(self, round_number: int, done: int, total: int) -> None:
        """Do nothing."""

    def finished_round(self, line: Mapping[str, Any]) -> None:
        """Go one step, read the federation's θ of this round from its checkpoint, and compare."""
        self.theta = self.theta - self.learning_rate * self.gradient(self.theta, self.inputs, self.targets)
        self.rounds += 1
        state = load_checkpoint(self.folder.path / "checkpoint" / "state.safetensors", self.folder.config.sha256())
        if state is None or state.round_number != self.rounds or line["round"] != self.rounds:
            raise RuntimeError(f"the checkpoint is not that of round {self.rounds}")
        self.federated = np.array(state.server.params)
        self.largest = max(self.largest, relative_distance(self.federated, self.theta))


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What came of one run beside its descent.

    Attributes:
        task: the learning problem.
        rounds: how many rounds were compared.
        sizes: the examples of each client.
        largest: the largest relative difference of the parameters over all rounds.
        federated: the federation's parameters at the end.
    """

    task: str
    rounds: int
    sizes: tuple[int, ...]
    largest: float
    federated: Array


def compare(overrides: Sequence[str]) -> Comparison:
    """Run the federation and the descent beside it."""
    config = read_scenario(str(SCENARIO), overrides)
    made: list[Descent] = []

    def observe(folder: RunFolder) -> Descent:
        made.append(_descent(config, folder))
        return made[0]

    run(SCENARIO, overrides, observe=observe)
    sizes = tuple(len(part) for part in distribute_data(load_task(config.task), config).train)
    descent = made[0]
    return Comparison(
        task=config.task,
        rounds=descent.rounds,
        sizes=sizes,
        largest=descent.largest,
        federated=descent.federated,
    )


def relative_distance(theta: Array, reference: Array) -> float:
    """Return ‖θ − reference‖ / ‖reference‖."""
    return float(np.linalg.norm(theta - reference) / np.linalg.norm(reference))


def least_squares() -> Array:
    """Return the weights and the bias that minimise the squared error on all the training data, in closed form."""
    inputs, targets = _arrays(load_task("regression").load_pool(None).train)
    with_ones = np.column_stack([inputs, np.ones(len(inputs))])
    return np.asarray(np.linalg.lstsq(with_ones, targets, rcond=None)[0])


def experiment(overrides: Sequence[str]) -> Answer:
    """Return both comparisons, and how far the regression ends from its closed-form solution."""
    progress("regression")
    regression = compare(overrides)
    progress("digits-mlp")
    mlp = compare([*overrides, *MLP])
    distance = relative_distance(regression.federated, least_squares())
    both = (regression, mlp)
    largest = max(each.largest for each in both)
    met = largest <= BAR and distance <= SOLUTION_BAR
    return Answer(
        columns=("task", "rounds", "clients", "examples each", "parameters", "largest difference"),
        rows=[_row(each) for each in both],
        verdict=f"Largest relative difference {largest:.1e} (at most {BAR:.0e}); regression after "
        f"{regression.rounds:,} rounds from the least-squares solution: {distance:.1e} (at most {SOLUTION_BAR:.0e}): "
        f"{stated(met)}.",
        met=met,
        body={
            "largest_relative_difference": {each.task: each.largest for each in both},
            "rounds": {each.task: each.rounds for each in both},
            "examples": {each.task: each.sizes for each in both},
            "bar": BAR,
            "distance_to_least_squares": distance,
            "solution_bar": SOLUTION_BAR,
        },
    )


def _row(each: Comparison) -> list[str]:
    """Return a comparison as a row of the table."""
    span = f"{min(each.sizes)} to {max(each.sizes)}"
    return [
        each.task,
        f"{each.rounds:,}",
        str(len(each.sizes)),
        span,
        f"{each.federated.size:,}",
        f"{each.largest:.1e}",
    ]


def _descent(config: RunConfig, folder: RunFolder) -> Descent:
    """Return the descent from the run's own initial parameters on everything its clients hold together."""
    task = load_task(config.task)
    model = build_flat_model(task, SeedTree.root(config.seed).child("initialise"))
    inputs, targets = _arrays(task.load_pool(None).train)
    return Descent(
        theta=model.vector().astype(np.float64),
        inputs=inputs,
        targets=targets,
        gradient=_GRADIENTS[config.task],
        learning_rate=config.training.learning_rate,
        folder=folder,
    )


def _arrays(examples: Examples) -> tuple[Array, Array]:
    """Return inputs, shape (m, features), and targets, shape (m,), in float64."""
    inputs = examples.inputs.numpy().astype(np.float64)
    return inputs.reshape(len(inputs), -1), examples.targets.numpy().astype(np.float64)


def _regression_gradient(theta: Array, inputs: Array, targets: Array) -> Array:
    """Return ∇J for J(θ) = 1/(2m) Σ (yᵢ − w·xᵢ − b)², θ = (w, b)."""
    error = inputs @ theta[:-1] + theta[-1] - targets
    return np.append(inputs.T @ error, error.sum()) / len(targets)


def _mlp_gradient(theta: Array, pixels: Array, targets: Array) -> Array:
    """Return the gradient of the mean cross-entropy of a 64–64–10 perceptron, back-propagated by hand."""
    w1, b1 = theta[:4096].reshape(64, 64), theta[4096:4160]
    w2, b2 = theta[4160:4800].reshape(10, 64), theta[4800:]
    inputs = (pixels - 4.9) / 6.0
    before = inputs @ w1.T + b1
    hidden = np.maximum(before, 0.0)
    scores = hidden @ w2.T + b2
    exponentials = np.exp(scores - scores.max(axis=1, keepdims=True))
    error = exponentials / exponentials.sum(axis=1, keepdims=True)
    error[np.arange(len(targets)), targets.astype(np.int64)] -= 1.0
    error /= len(targets)
    inner = (error @ w2) * (before > 0.0)
    parts = (inner.T @ inputs, inner.sum(axis=0), error.T @ hidden, error.sum(axis=0))
    return np.concatenate([part.reshape(-1) for part in parts])


_GRADIENTS: Mapping[str, Gradient] = {"regression": _regression_gradient, "digits-mlp": _mlp_gradient}


if __name__ == "__main__":
    given = arguments(__doc__).parse_args()
    finish(functools.partial(experiment, given.set), as_json=given.json)
