"""What a client lets leave: clipped, without a number that nobody noised, whatever it learned and whoever asks."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlearn.arrays import ParamEntry, ParamSpec
from fedlearn.config import RunConfig
from fedlearn.errors import ReplyError
from fedlearn.federation.messages import RoundPlan, check_evaluate_reply, check_train_reply, reply_numbers
from fedlearn.federation.policy import (
    Learned,
    clipped_update,
    evaluation_numbers,
    maskable,
    trained_part,
    training_numbers,
)
from fedlearn.learning import Evaluation, Trained
from fedlearn.privacy.clipping import Update

CLIENT = {"unit": "client", "noise-multiplier": 1.0}
NONE = {"unit": "none"}
EXAMPLE = {"unit": "example", "noise-multiplier": 1.0}
SIZES = {"upload_bytes": 0, "download_bytes": 0}


def spec(dtype: str = "float32") -> ParamSpec:
    return ParamSpec(
        (
            ParamEntry(name="w", shape=(3,), dtype=dtype, trainable=True),
            ParamEntry(name="temperature", shape=(), dtype=dtype, trainable=True),
            ParamEntry(name="buffer", shape=(2,), dtype=dtype, trainable=False),
        )
    )


def plan(privacy=CLIENT, *, bound_l2: float | None = 0.5, training=None, **federation) -> RoundPlan:
    tables = {"federation": {"clients": 100, **federation}, "privacy": privacy, "training": training or {}}
    config = RunConfig.from_mapping(tables)
    sha256 = spec().sha256
    return RoundPlan(config=config, round_number=1, attempt=1, proximal_mu=0.0, spec_sha256=sha256, bound_l2=bound_l2)


def learned(vector, examples: int = 7, loss: float = 0.125) -> Trained:
    return Trained(update=Update(np.asarray(vector)), num_examples=examples, mean_loss=loss, steps=1)


ANY = st.floats(allow_nan=True, allow_infinity=True)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("weighting", ["uniform", "examples"])
@given(
    vector=st.lists(ANY, min_size=6, max_size=6),
    bound=st.floats(1e-6, 1e6),
    examples=st.integers(1, 10**12),
    cap=st.integers(1, 10**12).filter(lambda cap: cap != 10_000),  # the default, which is refused as nobody's choice
)
def test_whatever_was_learned_what_leaves_is_accepted_and_within_the_bound(
    dtype, weighting, vector, bound, examples, cap
):
    """Accepted by the very check that refuses an update that was not clipped."""
    with np.errstate(over="ignore"):
        array = np.array(vector).astype(dtype)
    training = {"weighting": weighting, "max-examples": cap}
    asked = plan({**CLIENT, "adaptive-clipping": True}, bound_l2=bound, training=training)
    trained = learned(array, examples)
    before = trained.update.vector.tobytes()
    clipped = clipped_update(asked, trained, spec(dtype))
    assert clipped.norm <= bound
    assert not clipped.vector[4:].any()
    assert clipped.finite == bool(np.isfinite(array[:4]).all())
    assert trained.update.vector.tobytes() == before
    numbers = training_numbers(asked, Learned(update=clipped))
    reply = check_train_reply(0, {"update": clipped.vector}, numbers, plan=asked, spec=spec(dtype), **SIZES)
    assert reply.weight == 1
    assert reply.mean_loss is None
    assert reply.update.within == clipped.within


def test_by_examples_more_than_the_cap_counts_as_the_cap_and_the_rest_in_proportion():
    asked = plan(training={"weighting": "examples", "max-examples": 8})
    vector = np.array([0.25, 0, 0, 0.25, 9, 9], np.float32)
    for examples, share in ((1, 1 / 8), (4, 0.5), (8, 1.0), (10**9, 1.0)):
        clipped = clipped_update(asked, learned(vector, examples), spec())
        np.testing.assert_allclose(clipped.vector, share * np.array([0.25, 0, 0, 0.25, 0, 0]), rtol=1e-6)


@pytest.mark.parametrize("bound", [None, 0.0, -1.0, math.nan])
def test_a_round_without_a_clipping_norm_is_refused(bound):
    with pytest.raises(ReplyError) as refused:
        clipped_update(plan(bound_l2=bound), learned(np.ones(6)), spec())
    assert refused.value.code == "bad-request"


def test_only_what_a_gradient_trains_leaves_and_the_argument_stays():
    vector = np.arange(1.0, 7.0)
    assert trained_part(vector, spec()).tolist() == [1, 2, 3, 4, 0, 0]
    assert vector.tolist() == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("privacy", "names"),
    [
        (NONE, {"num-examples", "loss"}),
        (CLIENT, set()),
        (EXAMPLE, set()),
        ({**CLIENT, "adaptive-clipping": True}, {"within-bound"}),
        ({**CLIENT, "mechanism": "dp-ftrl"}, set()),
    ],
)
def test_beside_an_update_no_number_leaves_where_privacy_is_promised_but_adaptive_clippings_bit(privacy, names):
    asked, trained = plan(privacy), learned(np.ones(6, np.float32))
    update = clipped_update(asked, trained, spec()) if privacy["unit"] == "client" else trained.update
    numbers = training_numbers(asked, Learned(update=update, num_examples=3, mean_loss=0.5))
    assert set(numbers) == names == reply_numbers(asked.config)
    if privacy["unit"] != "none":
        assert set(numbers.values()) <= {0, 1}


# -- evaluation ----------------------------------------------------------------------------------------------------

ASKED = {"evaluation": "federated"}


@given(st.integers(1, 10**6), st.lists(ANY, min_size=2, max_size=2), ANY)
def test_a_hidden_clients_metrics_are_means_within_0_and_1_and_nothing_else(count, sums, loss):
    evaluation = Evaluation(num_examples=count, sums={"accuracy": sums[0], "recall": sums[1], "loss": loss})
    numbers = evaluation_numbers(plan(**ASKED), evaluation, ("accuracy",))
    assert set(numbers) == {"accuracy"}
    assert 0 <= numbers["accuracy"] <= 1
    reply = check_evaluate_reply(0, numbers, plan=plan(**ASKED), **SIZES)
    assert reply.num_examples == 1


@pytest.mark.parametrize("wanted", ["auto", "off", "central"])
def test_a_client_says_nothing_of_a_model_unless_the_run_said_that_it_would_be_asked(wanted):
    """A server that asks all the same is refused: the ledger has no line for such an answer."""
    evaluation = Evaluation(num_examples=3, sums={"accuracy": 2.0, "loss": 1.0})
    with pytest.raises(ReplyError) as refused:
        evaluation_numbers(plan(evaluation=wanted), evaluation, ("accuracy",))
    assert refused.value.code == "refused"


@pytest.mark.parametrize("wanted", ["auto", "off", "central"])
def test_where_examples_are_hidden_no_metric_leaves_at_all(wanted):
    evaluation = Evaluation(num_examples=3, sums={"accuracy": 2.0, "loss": 1.0})
    with pytest.raises(ReplyError) as refused:
        evaluation_numbers(plan(EXAMPLE, evaluation=wanted), evaluation, ("accuracy",))
    assert refused.value.code == "refused"


@pytest.mark.parametrize("names", [(), ("f1",), ("accuracy", "f1")])
def test_a_metric_that_is_not_there_is_not_made_up(names):
    evaluation = Evaluation(num_examples=3, sums={"accuracy": 2.0, "loss": 1.0})
    with pytest.raises(ReplyError) as refused:
        evaluation_numbers(plan(**ASKED), evaluation, names)
    assert refused.value.code == "bad-data"


@pytest.mark.parametrize(
    "numbers",
    [
        {},
        {"accuracy": 1.0 + 1e-9},
        {"accuracy": -1e-9},
        {"accuracy": math.nan},
        {"accuracy": True},
        {"accuracy": 0.5, "num-examples": 12},
        {f"m{i}": 0.5 for i in range(65)},
    ],
)
def test_the_server_takes_no_metric_that_one_client_could_own_the_sum_with(numbers):
    with pytest.raises(ReplyError):
        check_evaluate_reply(0, numbers, plan=plan(**ASKED), **SIZES)


def test_without_privacy_sums_and_a_count_leave():
    evaluation = Evaluation(num_examples=4, sums={"accuracy": 3.0, "loss": 2.0})
    numbers = evaluation_numbers(plan(NONE), evaluation, ())
    assert numbers == {"num-examples": 4, "accuracy": 3.0, "loss": 2.0}


def test_training_that_diverged_gives_a_zero_into_a_masked_sum_of_which_no_server_is_told():
    """Else a server could ask, with a learning rate of its choice, whose data make training diverge."""
    asked = plan({"unit": "none"}, bound_l2=2.0)
    update, weight = maskable(asked, Learned(update=Update(np.array([np.nan] * 6, np.float32)), num_examples=3), spec())
    assert not update.vector.any() and not update.finite and not update.within
    fine, same = maskable(asked, Learned(update=Update(np.ones(6, np.float32)), num_examples=3), spec())
    assert fine.norm <= 2.0 and weight == same
