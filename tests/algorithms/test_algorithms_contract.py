"""What every algorithm has to keep, whatever its rule."""

from __future__ import annotations

import pickle
from dataclasses import FrozenInstanceError, fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import fedlearn.algorithms as package
from fedlearn.algorithms import ALGORITHMS, Algorithm, FedAvg, FedAvgM, FedProx, ServerState, check_update
from fedlearn.errors import ConfigError, RunFailedError

ALL = pytest.mark.parametrize("algorithm", [kind() for kind in ALGORITHMS.values()], ids=list(ALGORITHMS))

_FLOAT32_MAX = float(np.finfo(np.float32).max)
_VALUES = st.floats(-_FLOAT32_MAX, _FLOAT32_MAX)


@st.composite
def _runs(draw):
    """Initial parameters of some size, and the mean updates of up to four rounds."""
    size = draw(st.integers(0, 6))
    vectors = st.lists(arrays(np.float64, size, elements=_VALUES), min_size=1, max_size=4)
    return draw(arrays(np.float64, size, elements=_VALUES)), draw(vectors)


def _bytes(state: ServerState) -> tuple[object, ...]:
    slots = tuple((name, slot.tobytes()) for name, slot in sorted(state.slots.items()))
    return state.params.tobytes(), slots, state.round_number


@ALL
def test_init_keeps_the_parameters(algorithm):
    params = np.array([1.5, -0.25, 3.0])
    state = algorithm.init(params)
    assert state.params.tolist() == params.tolist()
    assert state.round_number == 0
    assert all(slot.shape == params.shape for slot in state.slots.values())


@ALL
def test_init_copies_and_widens(algorithm):
    params = np.array([1.0, 2.0], dtype=np.float32)
    state = algorithm.init(params)
    params[:] = 9.0
    assert state.params.dtype == np.float64
    assert state.params.tolist() == [1.0, 2.0]


@ALL
@settings(max_examples=30, deadline=None)
@given(run=_runs())
def test_rounds_are_deterministic_finite_and_change_no_argument(algorithm, run):
    params, updates = run
    kept = params.tobytes()
    state = algorithm.init(params)
    for number, update in enumerate(updates, start=1):
        before, update_bytes = _bytes(state), update.tobytes()
        result = algorithm.aggregate(state, update)
        assert _bytes(result) == _bytes(algorithm.aggregate(state, update))
        assert (_bytes(state), update.tobytes()) == (before, update_bytes)
        assert result.round_number == number
        assert all(np.isfinite(each).all() for each in (result.params, *result.slots.values()))
        state = result
    assert params.tobytes() == kept


@ALL
def test_a_result_shares_no_memory_with_the_arguments(algorithm):
    params, update = np.array([1.0, 2.0]), np.array([0.5, -0.5])
    state = algorithm.init(params)
    result = algorithm.aggregate(state, update)
    for produced in (result.params, *result.slots.values()):
        assert not any(np.shares_memory(produced, each) for each in (params, update, state.params))
        with pytest.raises(ValueError, match="read-only"):
            produced[0] = 7.0


@ALL
def test_a_zero_update_leaves_the_parameters_alone(algorithm):
    state = algorithm.init(np.array([1.5, -0.25, 0.0]))
    assert algorithm.aggregate(state, np.zeros(3)).params.tolist() == [1.5, -0.25, 0.0]


@ALL
@pytest.mark.parametrize("size", [0, 1])
def test_the_smallest_models_work(algorithm, size):
    state = algorithm.init(np.zeros(size))
    for _ in range(3):
        state = algorithm.aggregate(state, np.full(size, 0.5))
    assert state.params.shape == (size,)
    assert (state.params > 0).all()


@ALL
def test_a_round_resumes_from_a_pickled_state(algorithm):
    state = algorithm.aggregate(algorithm.init(np.array([1.0, 2.0])), np.array([0.5, -0.5]))
    again = pickle.loads(pickle.dumps(state))  # noqa: S301
    update = np.array([-0.25, 1.0])
    assert _bytes(algorithm.aggregate(again, update)) == _bytes(algorithm.aggregate(state, update))


@ALL
@pytest.mark.parametrize("update", [np.zeros(3), np.zeros((2, 1)), np.float64(0.0)])
def test_an_update_of_another_shape_is_refused(algorithm, update):
    with pytest.raises(ValueError, match="shape"):
        algorithm.aggregate(algorithm.init(np.zeros(2)), update)


@ALL
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(algorithm, value):
    with pytest.raises(ValueError, match="not finite"):
        algorithm.aggregate(algorithm.init(np.zeros(2)), np.array([0.0, value]))
    with pytest.raises(ValueError, match="not finite"):
        algorithm.init(np.array([0.0, value]))


@ALL
def test_an_overflow_is_a_failed_run_and_not_a_stuck_one(algorithm):
    state = algorithm.init(np.array([1.7e308]))
    with pytest.raises(RunFailedError, match="round 1"):
        algorithm.aggregate(state, np.array([1.7e308]))


@ALL
def test_hyper_parameters_are_frozen(algorithm):
    with pytest.raises(FrozenInstanceError):
        algorithm.server_learning_rate = 2.0


@ALL
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), "1.0", True, None, 10**400])
def test_an_impossible_server_learning_rate_is_refused(algorithm, value):
    with pytest.raises(ConfigError) as caught:
        replace(algorithm, server_learning_rate=value)
    assert caught.value.key == "training.server-learning-rate"


@ALL
def test_every_option_refuses_nonsense(algorithm):
    for option in [each.name for each in fields(algorithm) if each.name != "server_learning_rate"]:
        for value in (-0.1, float("nan"), float("inf"), "much", False):
            with pytest.raises(ConfigError) as caught:
                replace(algorithm, **{option: value})
            assert caught.value.key == f"training.options.{option.replace('_', '-')}"


@ALL
def test_only_fedprox_adds_to_the_clients_loss(algorithm):
    assert algorithm.proximal_mu == (0.01 if isinstance(algorithm, FedProx) else 0.0)


def test_an_integer_does_for_a_number():
    assert repr(FedAvgM(server_learning_rate=2, server_momentum=0)) == (
        "FedAvgM(server_learning_rate=2.0, server_momentum=0.0)"
    )


def test_a_momentum_of_one_is_refused():
    with pytest.raises(ConfigError, match=r"training\.options\.server-momentum: must be below 1, got 1"):
        FedAvgM(server_momentum=1)


def test_fedprox_aggregates_as_fedavg_does():
    params, update = np.array([1.0, 2.0]), np.array([0.1, -0.3])
    ours, plain = FedProx(), FedAvg()
    assert _bytes(ours.aggregate(ours.init(params), update)) == _bytes(plain.aggregate(plain.init(params), update))


def test_an_algorithm_needs_aggregate():
    with pytest.raises(TypeError, match="aggregate"):
        Algorithm()  # type: ignore[abstract]


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"params": np.zeros((2, 1))}, "params needs shape"),
        ({"params": np.zeros(2, dtype=np.float32)}, "params needs to be a float64 array, got float32"),
        ({"params": [0.0, 1.0]}, "params needs to be a float64 array, got list"),
        ({"params": np.zeros(2), "slots": {"v": np.zeros(3)}}, "slot 'v' needs shape"),
        ({"params": np.zeros(2), "round_number": -1}, "round_number"),
    ],
)
def test_a_state_is_checked(numbers, message):
    with pytest.raises(ValueError, match=message):
        ServerState(**numbers)


def test_a_state_cannot_be_changed():
    state = ServerState(params=np.zeros(2), slots={"v": np.zeros(2)})
    with pytest.raises(ValueError, match="read-only"):
        state.params[0] = 1.0
    with pytest.raises(TypeError):
        state.slots["v"] = np.ones(2)  # type: ignore[index]


def test_advance_refuses_another_shape():
    state = ServerState(params=np.zeros(2))
    with pytest.raises(ValueError, match="v needs shape"):
        state.advance(params=np.zeros(2), v=np.zeros(3))


def test_a_checked_update_is_nobody_elses():
    update = np.array([1.0, 2.0])
    delta = check_update(ServerState(params=np.zeros(2)), update)
    update[0] = 9.0
    assert delta.tolist() == [1.0, 2.0]


def test_the_public_list_is_sorted():
    assert package.__all__ == sorted(package.__all__)
    assert list(ALGORITHMS) == sorted(ALGORITHMS)
