"""Two steps of every rule, worked out by hand."""

from __future__ import annotations

from math import sqrt

import numpy as np
import pytest

from fedlearn.algorithms import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedYogi

# One coordinate from 1.0, mean updates +2 and then -4, eta 2, tau 1, beta1 1/2, beta2 3/4:
#   m1 = 1/2 * 2 = 1             m2 = 1/2 * 1 + 1/2 * (-4) = -3/2
#   FedAdam    v1 = 1/4 * 4 = 1  v2 = 3/4 * 1 + 1/4 * 16 = 19/4
#   FedYogi    v1 = 0 - 1/4 * 4 * sign(0 - 4) = 1    v2 = 1 - 1/4 * 16 * sign(1 - 16) = 5
#   FedAdagrad v1 = 4            v2 = 4 + 16 = 20
ADAPTIVE = [
    (FedAdam(server_learning_rate=2, beta1=0.5, beta2=0.75, tau=1), 1.0, 4.75),
    (FedYogi(server_learning_rate=2, beta1=0.5, beta2=0.75, tau=1), 1.0, 5.0),
    (FedAdagrad(server_learning_rate=2, beta1=0.5, tau=1), 4.0, 20.0),
]


@pytest.mark.parametrize(("algorithm", "v1", "v2"), ADAPTIVE, ids=["fedadam", "fedyogi", "fedadagrad"])
def test_two_adaptive_steps(algorithm, v1, v2):
    first = algorithm.aggregate(algorithm.init(np.array([1.0])), np.array([2.0]))
    theta1 = 1.0 + 2.0 * 1.0 / (sqrt(v1) + 1.0)
    assert (first.slots["m"].item(), first.slots["v"].item()) == (1.0, v1)
    assert first.params.item() == pytest.approx(theta1, rel=1e-15)

    second = algorithm.aggregate(first, np.array([-4.0]))
    assert (second.slots["m"].item(), second.slots["v"].item()) == (-1.5, v2)
    assert second.params.item() == pytest.approx(theta1 - 3.0 / (sqrt(v2) + 1.0), rel=1e-15)


def test_yogi_lets_v_fall_where_the_square_is_smaller():
    algorithm = FedYogi(beta2=0.75)
    state = algorithm.aggregate(algorithm.init(np.array([0.0])), np.array([4.0]))  # v = 4
    assert algorithm.aggregate(state, np.array([1.0])).slots["v"].item() == 3.75  # 4 - 1/4 * 1


def test_adagrad_has_no_momentum_unless_asked():
    algorithm = FedAdagrad(server_learning_rate=3, tau=1)
    state = algorithm.aggregate(algorithm.init(np.array([1.0])), np.array([2.0]))
    assert state.params.item() == 3.0
    assert algorithm.aggregate(state, np.array([0.0])).params.item() == 3.0


def test_fedavg_steps():
    algorithm = FedAvg(server_learning_rate=0.5)
    first = algorithm.aggregate(algorithm.init(np.array([1.0])), np.array([2.0]))
    assert algorithm.aggregate(first, np.array([-4.0])).params.item() == 0.0


def test_fedavgm_steps():
    algorithm = FedAvgM(server_momentum=0.5, server_learning_rate=2)
    first = algorithm.aggregate(algorithm.init(np.array([1.0])), np.array([2.0]))
    assert first.params.item() == 5.0
    second = algorithm.aggregate(first, np.array([-4.0]))  # v = 1 - 4 = -3
    assert (second.slots["momentum"].item(), second.params.item()) == (-3.0, -1.0)
