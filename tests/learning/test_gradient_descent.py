"""Federation is gradient descent: full batches, one local step, means weighted by examples.

The descent in one process is written here in NumPy, with its own derivatives, and shares no code with fedlearn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fedlearn.algorithms import FedAvg, FedAvgM
from fedlearn.algorithms.base import Algorithm
from fedlearn.config import TrainingConfig
from fedlearn.learning import Examples, Task, build_flat_model, train
from fedlearn.sources import SeedTree
from fedlearn.tasks import load_task

Vector = NDArray[np.float64]
Gradient = Callable[[Vector], Vector]


def unequal_clients(examples: Examples, clients: int) -> list[Examples]:
    """Deal the examples out in very unequal numbers, in another order than the pool's."""
    order = np.random.default_rng(0).permutation(len(examples))
    shares = np.cumsum(np.arange(1, clients + 1) ** 2)
    cuts = (shares[:-1] * len(examples)) // shares[-1]
    return [examples.take(part) for part in np.split(order, cuts)]


def federated(
    task: Task, clients: list[Examples], algorithm: Algorithm, *, rate: float, rounds: int
) -> Iterator[Vector]:
    """Yield θ before the first round and after each."""
    model = build_flat_model(task, SeedTree.root(0))
    training = TrainingConfig(local_steps=1, batch_size=0, learning_rate=rate)
    state = algorithm.init(model.vector())
    yield state.params
    total = sum(len(examples) for examples in clients)
    for number in range(rounds):
        mean = np.zeros(model.spec.size)
        for index, examples in enumerate(clients):
            received = state.params.astype(model.spec.dtype)
            seeds = SeedTree.root(0).child(number, index)
            trained = train(model, task, received, examples, training, proximal_mu=0.0, seeds=seeds)
            assert (trained.num_examples, trained.steps) == (len(examples), 1)
            mean += trained.update.vector.astype(np.float64) * trained.num_examples
        state = algorithm.aggregate(state, mean / total)
        yield state.params


def regression_gradient(examples: Examples) -> Gradient:
    """Return ∇J for J(θ) = 1/(2m) Σ (yᵢ − ŷᵢ)², θ being ten weights and a bias."""
    design, targets = with_ones(examples)
    return lambda theta: design.T @ (design @ theta - targets) / len(targets)


def with_ones(examples: Examples) -> tuple[Vector, Vector]:
    inputs, targets = examples.inputs.double().numpy(), examples.targets.double().numpy()
    return np.column_stack([inputs, np.ones(len(inputs))]), targets


def mlp_gradient(examples: Examples) -> Gradient:
    """Return the gradient of the mean cross-entropy of a 64-64-10 perceptron, by hand."""
    pixels = (examples.inputs.double().numpy().reshape(-1, 64) - 4.9) / 6.0
    wanted = np.eye(10)[examples.targets.numpy()]

    def gradient(theta: Vector) -> Vector:
        first, bias, second, offset = np.split(theta, np.cumsum([64 * 64, 64, 10 * 64]))
        first, second = first.reshape(64, 64), second.reshape(10, 64)
        before = pixels @ first.T + bias
        hidden = np.maximum(before, 0.0)
        scores = hidden @ second.T + offset
        shares = np.exp(scores - scores.max(axis=1, keepdims=True))
        error = (shares / shares.sum(axis=1, keepdims=True) - wanted) / len(wanted)
        inner = (error @ second) * (before > 0.0)
        parts = inner.T @ pixels, inner.sum(axis=0), error.T @ hidden, error.sum(axis=0)
        return np.concatenate([part.reshape(-1) for part in parts])

    return gradient


@pytest.mark.parametrize(
    ("name", "gradient_of", "rate", "rounds", "clients"),
    [
        ("regression", regression_gradient, 0.1, 100, 7),
        ("regression", regression_gradient, 0.4, 40, 1),
        ("digits-mlp", mlp_gradient, 0.1, 40, 5),
        ("digits-mlp", mlp_gradient, 0.1, 10, 1),
    ],
)
def test_a_federation_takes_the_steps_of_gradient_descent(name, gradient_of, rate, rounds, clients) -> None:
    task = load_task(name)
    pool = task.load_pool(None).train
    parts = unequal_clients(pool, clients)
    sizes = [len(part) for part in parts]
    assert sum(sizes) == len(pool)
    assert clients == 1 or max(sizes) > 10 * min(sizes)
    gradient, theta, largest = gradient_of(pool), None, 0.0
    for params in federated(task, parts, FedAvg(), rate=rate, rounds=rounds):
        if theta is None:
            theta = start = params.copy()
        else:
            theta = theta - rate * gradient(theta)
            largest = max(largest, float(np.linalg.norm(params - theta) / np.linalg.norm(theta)))
    moved = np.linalg.norm(theta - start) / np.linalg.norm(theta)
    print(f"{name}, {clients} clients, {rounds} rounds: largest relative difference {largest:.1e}, moved {moved:.2f}")
    assert moved > 0.05, "a descent that goes nowhere proves nothing"
    assert largest <= 1e-5
    if name == "regression":
        assert largest <= 1e-12, "everything is in float64 here"


def test_means_that_ignore_the_numbers_of_examples_are_another_descent() -> None:
    """The test above can tell: uniform means leave its tolerance by orders of magnitude."""
    task = load_task("regression")
    pool = task.load_pool(None).train
    parts, gradient = unequal_clients(pool, 5), regression_gradient(pool)
    *_, params = federated(task, parts, FedAvg(), rate=0.1, rounds=1)
    model = build_flat_model(task, SeedTree.root(0))
    training = TrainingConfig(local_steps=1, batch_size=0, learning_rate=0.1)
    updates = [
        train(model, task, np.zeros(11), part, training, proximal_mu=0.0, seeds=SeedTree.root(0)).update.vector
        for part in parts
    ]
    expected = -0.1 * gradient(np.zeros(11))
    np.testing.assert_allclose(params, expected, rtol=1e-9, atol=1e-15)
    assert np.linalg.norm(np.mean(updates, axis=0) - expected) > 1e-3 * np.linalg.norm(expected)


def test_a_server_rate_below_one_is_descent_with_a_smaller_step() -> None:
    task = load_task("regression")
    parts = unequal_clients(task.load_pool(None).train, 4)
    *_, damped = federated(task, parts, FedAvg(server_learning_rate=0.5), rate=0.2, rounds=20)
    *_, plain = federated(task, parts, FedAvg(), rate=0.1, rounds=20)
    np.testing.assert_allclose(damped, plain, rtol=1e-10, atol=1e-14)


def test_the_order_of_the_clients_does_not_matter() -> None:
    task = load_task("digits-mlp")
    parts = unequal_clients(task.load_pool(None).train, 5)
    *_, one = federated(task, parts, FedAvg(), rate=0.1, rounds=3)
    *_, other = federated(task, parts[::-1], FedAvg(), rate=0.1, rounds=3)
    assert np.linalg.norm(one - other) <= 1e-6 * np.linalg.norm(one)


def test_with_momentum_at_the_server_regression_reaches_least_squares() -> None:
    """The same fixed point as plain averaging, sooner: the diabetes measurements are nearly collinear."""
    reaches_least_squares(FedAvgM(server_momentum=0.9), rate=0.4, rounds=500, tolerance=1e-6)


@pytest.mark.slow
def test_after_enough_rounds_regression_reaches_least_squares() -> None:
    reaches_least_squares(FedAvg(), rate=0.4, rounds=6000, tolerance=1e-6)


def reaches_least_squares(algorithm: Algorithm, *, rate: float, rounds: int, tolerance: float) -> None:
    task = load_task("regression")
    pool = task.load_pool(None).train
    *_, params = federated(task, unequal_clients(pool, 3), algorithm, rate=rate, rounds=rounds)
    design, targets = with_ones(pool)
    solution, *_ = np.linalg.lstsq(design, targets, rcond=None)
    difference = np.linalg.norm(params - solution) / np.linalg.norm(solution)
    print(f"{rounds} rounds: relative difference from least squares {difference:.1e}")
    assert difference <= tolerance
    model = build_flat_model(task, SeedTree.root(0))
    model.load(params)
    with torch.no_grad():
        residual = (model.module(pool.inputs) - pool.targets).numpy()
    assert residual @ residual == pytest.approx(np.sum((design @ solution - targets) ** 2), rel=1e-9)
