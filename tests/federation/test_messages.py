"""Every way in which a reply can be wrong is refused, with a word and without a number of the reply getting through."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlearn.arrays import ParamEntry, ParamSpec
from fedlearn.config import RunConfig
from fedlearn.errors import ReplyError
from fedlearn.federation.messages import (
    FailureCode,
    RoundPlan,
    check_evaluate_reply,
    check_train_reply,
)

SPEC = ParamSpec((ParamEntry(name="w", shape=(3,), dtype="float32", trainable=True),))
WIDE = ParamSpec((ParamEntry(name="w", shape=(3,), dtype="float64", trainable=True),))
GOOD = np.array([1.0, -2.0, 0.0], np.float32)


def plan_of(weighting="examples", max_examples=100, **training):
    tables = {"training": {"weighting": weighting, "max-examples": max_examples, **training}}
    config = RunConfig.from_mapping(tables)
    return RoundPlan(config=config, round_number=3, attempt=2, proximal_mu=0.5, spec_sha256=SPEC.sha256)


PLAN = plan_of()


def train_reply(vectors=None, numbers=None, plan=PLAN, spec=SPEC):
    return check_train_reply(
        7,
        {"update": GOOD} if vectors is None else vectors,
        {"num-examples": 10, "loss": 0.5} if numbers is None else numbers,
        plan=plan,
        spec=spec,
        upload_bytes=5,
        download_bytes=6,
    )


def evaluate_reply(numbers, plan=PLAN):
    return check_evaluate_reply(7, numbers, plan=plan, upload_bytes=5, download_bytes=6)


def refusal_of(call, *args, **kwargs):
    with pytest.raises(ReplyError) as refused:
        call(*args, **kwargs)
    return refused.value.code


def test_a_good_reply_passes_as_it_is():
    reply = train_reply()
    assert np.shares_memory(reply.update.vector, GOOD)
    assert (reply.client, reply.weight, reply.mean_loss) == (7, 10, 0.5)
    assert (reply.upload_bytes, reply.download_bytes) == (5, 6)
    evaluated = evaluate_reply({"num-examples": 4, "loss": 2, "accuracy": 3.0})
    assert evaluated.num_examples == 4
    assert evaluated.sums == {"loss": 2.0, "accuracy": 3.0}


@pytest.mark.parametrize(
    ("vectors", "numbers"),
    [
        ({}, {"num-examples": 1, "loss": 0.0}),
        ({"Update": GOOD}, {"num-examples": 1, "loss": 0.0}),
        ({"update": GOOD, "more": GOOD}, {"num-examples": 1, "loss": 0.0}),
        ({"update": GOOD}, {}),
        ({"update": GOOD}, {"loss": 0.0}),
        ({"update": GOOD}, {"num-examples": 1}),
        ({"update": GOOD}, {"num-examples": 1, "loss": 0.0, "accuracy": 1.0}),
    ],
)
def test_missing_and_extra_keys_are_refused(vectors, numbers):
    assert refusal_of(train_reply, vectors, numbers) == FailureCode.BAD_REPLY


@pytest.mark.parametrize(
    "vector",
    [
        np.zeros(2, np.float32),
        np.zeros(4, np.float32),
        np.zeros((), np.float32),
        np.zeros((3, 1), np.float32),
        np.zeros((1, 3), np.float32),
        np.zeros(3, np.float64),
        np.zeros(3, np.float16),
        np.zeros(3, np.int64),
        np.zeros(3, object),
    ],
    ids=lambda v: f"{v.dtype}{v.shape}",
)
def test_another_shape_or_type_is_refused(vector):
    assert refusal_of(train_reply, {"update": vector}) == FailureCode.BAD_REPLY


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_wherever_it_stands(value):
    for place in range(3):
        vector = GOOD.copy()
        vector[place] = value
        assert refusal_of(train_reply, {"update": vector}) == FailureCode.NOT_FINITE
    assert refusal_of(train_reply, None, {"num-examples": 1, "loss": value}) == FailureCode.NOT_FINITE
    assert refusal_of(evaluate_reply, {"num-examples": 1, "loss": value}) == FailureCode.NOT_FINITE
    assert refusal_of(evaluate_reply, {"num-examples": 1, "loss": 0.0, "m": value}) == FailureCode.NOT_FINITE


BAD_COUNTS = [0, -1, 101, 10**12, 10**400, True, False, 1.0, 10.5, math.nan, "10", None, [10], b"10"]


@pytest.mark.parametrize("count", BAD_COUNTS, ids=lambda c: repr(c)[:12])
def test_a_count_is_an_integer_from_one_to_the_cap(count):
    assert refusal_of(train_reply, None, {"num-examples": count, "loss": 0.0}) == FailureCode.BAD_REPLY
    assert refusal_of(evaluate_reply, {"num-examples": count, "loss": 0.0}) == FailureCode.BAD_REPLY


def test_under_uniform_weighting_a_client_counts_once():
    uniform = plan_of("uniform")
    assert train_reply(None, {"num-examples": 1, "loss": 0.0}, uniform).weight == 1
    assert refusal_of(train_reply, None, {"num-examples": 2, "loss": 0.0}, uniform) == FailureCode.BAD_REPLY


@pytest.mark.parametrize("number", [True, "0.5", None, [0.5], b"", 1j], ids=repr)
def test_a_number_is_a_number(number):
    assert refusal_of(train_reply, None, {"num-examples": 1, "loss": number}) == FailureCode.BAD_REPLY
    assert refusal_of(evaluate_reply, {"num-examples": 1, "loss": 0.0, "m": number}) == FailureCode.BAD_REPLY


@pytest.mark.parametrize("number", [1.7e308, -1.7e308, 10**400], ids=["huge", "-huge", "huge integer"])
def test_a_finite_number_that_would_overflow_the_sum_is_refused(number):
    assert refusal_of(train_reply, None, {"num-examples": 1, "loss": number}) == FailureCode.NOT_FINITE
    assert refusal_of(evaluate_reply, {"num-examples": 1, "loss": number}) == FailureCode.NOT_FINITE


def test_a_finite_update_that_would_overflow_the_sum_is_refused():
    vector = np.array([0.0, 1.7e308, 0.0])
    assert refusal_of(train_reply, {"update": vector}, spec=WIDE) == FailureCode.NOT_FINITE


def test_an_evaluation_is_a_loss_and_a_few_metrics():
    assert refusal_of(evaluate_reply, {"num-examples": 1}) == FailureCode.BAD_REPLY
    assert refusal_of(evaluate_reply, {"loss": 1.0}) == FailureCode.BAD_REPLY
    assert refusal_of(evaluate_reply, {}) == FailureCode.BAD_REPLY
    many = {"num-examples": 1, "loss": 1.0, **{f"m{n}": 0.0 for n in range(63)}}
    assert len(evaluate_reply(many).sums) == 64
    assert refusal_of(evaluate_reply, {**many, "one-more": 0.0}) == FailureCode.BAD_REPLY


@pytest.mark.parametrize("name", ["x" * 65, "\x1b[2J\x1b[31mhacked", "two\nlines", "\x00", "\u202egnp.exe"], ids=ascii)
def test_a_metrics_name_is_short_and_safe_to_show(name):
    assert refusal_of(evaluate_reply, {"num-examples": 1, "loss": 1.0, name: 0.0}) == FailureCode.BAD_REPLY
    assert evaluate_reply({"num-examples": 1, "loss": 1.0, "F1 (µ) [%]": 0.5}).sums["F1 (µ) [%]"] == 0.5


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=12), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(["num-examples", "loss", "accuracy"]), JSON))
def test_whatever_the_numbers_are_the_result_is_a_checked_reply_or_a_refusal(numbers):
    for check in (lambda: train_reply(None, numbers), lambda: evaluate_reply(numbers)):
        try:
            reply = check()
        except ReplyError as error:
            assert error.code in {FailureCode.BAD_REPLY, FailureCode.NOT_FINITE}
        else:
            assert 1 <= getattr(reply, "weight", 1) <= 100
            assert 1 <= getattr(reply, "num_examples", 1) <= 100


def test_the_plan_travels_whole_and_without_what_is_only_the_servers_business():
    text = PLAN.to_json()
    read = RoundPlan.from_json(text)
    assert read.to_json() == text
    assert (read.round_number, read.attempt, read.proximal_mu, read.group) == (3, 2, 0.5, "3.2")
    assert read.spec_sha256 == SPEC.sha256
    config = RunConfig.from_mapping({"faults": {"drop": 0.5}, "simulation": {"workers": 2}})
    told = RoundPlan(config=config, round_number=1, attempt=1, proximal_mu=0.0, spec_sha256="")
    assert RoundPlan.from_json(told.to_json()).config == RunConfig()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "[]",
        "{}",
        "[" * 100_000,
        json.dumps({"config": {"federation": {"clients": -1}}, "round": 1, "attempt": 1, "proximal-mu": 0, "spec": ""}),
        json.dumps({"config": {}, "round": "x", "attempt": 1, "proximal-mu": 0, "spec": ""}),
        json.dumps({"config": {"rm": "-rf"}, "round": 1, "attempt": 1, "proximal-mu": 0, "spec": ""}),
        json.dumps({"config": {}, "round": 1e999, "attempt": 1, "proximal-mu": 0, "spec": ""}),
        json.dumps({"config": [], "round": 1, "attempt": 1, "proximal-mu": 0, "spec": ""}),
    ],
    ids=lambda t: t[:40],
)
def test_a_plan_that_is_not_readable_is_refused(text):
    assert refusal_of(RoundPlan.from_json, text) == FailureCode.BAD_REQUEST


@given(JSON)
def test_no_json_whatever_raises_anything_but_a_refusal(body):
    full = {"config": {}, "round": 1, "attempt": 1, "proximal-mu": 0.0, "spec": ""}
    for key in full:
        try:
            RoundPlan.from_json(json.dumps({**full, key: body}))
        except ReplyError as error:
            assert error.code == FailureCode.BAD_REQUEST
