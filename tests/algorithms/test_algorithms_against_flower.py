"""The same rounds through Flower 1.41's own strategies, with real messages, and through ours."""

from __future__ import annotations

import logging
import warnings
from dataclasses import replace
from math import sqrt
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fedlearn.algorithms import Algorithm, FedAdagrad, FedAdam, FedAvg, FedAvgM, FedProx, FedYogi

ROUNDS, CLIENTS, SHAPES = 5, 4, {"weight": (3, 2), "bias": (3,), "temperature": ()}
SIZE = 10


@pytest.fixture(scope="module")
def flower():
    """Flower, imported without its telemetry, its log and its dependencies' warnings."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setenv("FLWR_TELEMETRY_ENABLED", "0")
        warnings.simplefilter("ignore")
        app = pytest.importorskip("flwr.app")
        from flwr.serverapp import strategy
        from flwr.supercore.task_identity import TaskIdentity

        for name in ("_run_id", "_node_id", "_task_id"):
            patch.setattr(TaskIdentity, name, 1)
        logger = logging.getLogger("flwr")
        before = logger.level
        logger.setLevel(logging.CRITICAL)
        yield SimpleNamespace(app=app, strategy=strategy)
        logger.setLevel(before)


class _Grid:
    """As much of a grid as choosing the cohort needs."""

    def get_node_ids(self) -> list[int]:
        return list(range(1, CLIENTS + 1))


def _record(flower: Any, vector: np.ndarray) -> Any:
    """Return a flat vector as Flower's arrays."""
    named, start = {}, 0
    for name, shape in SHAPES.items():
        size = int(np.prod(shape))
        named[name] = flower.app.Array(vector[start : start + size].reshape(shape))
        start += size
    assert start == SIZE
    return flower.app.ArrayRecord(named)


def _vector(record: Any) -> np.ndarray:
    """Return Flower's arrays as one flat vector."""
    return np.concatenate([record[name].numpy().reshape(-1) for name in SHAPES])


def _compare(flower: Any, theirs: Any, ours: Algorithm, *, eta: Any = None) -> None:
    """Hold every round of ``theirs`` against ours; ``eta(t)`` is our server learning rate in round t."""
    rng = np.random.default_rng(7)
    start = rng.normal(size=SIZE)
    state, arrays = ours.init(start), _record(flower, start)
    for number in range(1, ROUNDS + 1):
        updates = rng.normal(scale=0.3, size=(CLIENTS, SIZE))
        examples = rng.integers(1, 200, size=CLIENTS)
        assert len(set(examples.tolist())) > 1
        messages = list(theirs.configure_train(number, arrays, flower.app.ConfigRecord(), _Grid()))
        assert len(messages) == CLIENTS
        replies = []
        for message in messages:
            client = message.metadata.dst_node_id - 1
            local = _vector(message.content["arrays"]) + updates[client]
            metrics = flower.app.MetricRecord({"num-examples": int(examples[client])})
            content = flower.app.RecordDict({"arrays": _record(flower, local), "metrics": metrics})
            replies.append(flower.app.Message(content, reply_to=message))
        arrays, _ = theirs.aggregate_train(number, replies)

        algorithm = ours if eta is None else replace(ours, server_learning_rate=eta(number))
        state = algorithm.aggregate(state, np.average(updates, axis=0, weights=examples))
        np.testing.assert_allclose(state.params, _vector(arrays), rtol=1e-10, atol=0)
    assert not np.allclose(state.params, start)


def test_fedavg(flower):
    _compare(flower, flower.strategy.FedAvg(), FedAvg())


def test_fedprox_on_the_server(flower):
    _compare(flower, flower.strategy.FedProx(proximal_mu=0.01), FedProx())


@pytest.mark.parametrize(("momentum", "eta"), [(0.9, 1.0), (0.5, 0.3), (0.0, 0.7)])
def test_fedavgm(flower, momentum, eta):
    theirs = flower.strategy.FedAvgM(server_momentum=momentum, server_learning_rate=eta)
    _compare(flower, theirs, FedAvgM(server_momentum=momentum, server_learning_rate=eta))


@pytest.mark.parametrize("numbers", [{}, {"beta1": 0.5, "beta2": 0.7, "tau": 0.1}])
def test_fedyogi(flower, numbers):
    theirs = {f"{name[:-1]}_{name[-1]}" if name != "tau" else name: each for name, each in numbers.items()}
    _compare(flower, flower.strategy.FedYogi(eta=0.01, **theirs), FedYogi(**numbers))


@pytest.mark.parametrize("numbers", [{}, {"tau": 0.1}])
def test_fedadagrad(flower, numbers):
    _compare(flower, flower.strategy.FedAdagrad(eta=0.01, **numbers), FedAdagrad(**numbers))


@pytest.mark.parametrize(("beta1", "beta2", "tau"), [(0.9, 0.99, 1e-3), (0.5, 0.7, 0.1)])
def test_fedadam_given_flowers_bias_correction(flower, beta1, beta2, tau):
    def corrected(number: int) -> float:
        return 0.1 * sqrt(1 - beta2 ** (number + 1)) / (1 - beta1 ** (number + 1))

    theirs = flower.strategy.FedAdam(eta=0.1, beta_1=beta1, beta_2=beta2, tau=tau)
    _compare(flower, theirs, FedAdam(beta1=beta1, beta2=beta2, tau=tau), eta=corrected)


def test_fedadam_differs_from_flowers_without_it(flower):
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        _compare(flower, flower.strategy.FedAdam(eta=0.1), FedAdam(server_learning_rate=0.1))
