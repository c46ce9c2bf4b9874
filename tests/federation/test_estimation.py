"""From replies to a release: whoever answers, whatever they send, one client moves it by the stated sensitivity."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedlearn.algorithms import ServerState
from fedlearn.arrays import ParamEntry, ParamSpec
from fedlearn.config import RunConfig
from fedlearn.errors import ReplyError, TaskError
from fedlearn.federation.checkpoint import RunState, Totals
from fedlearn.federation.estimation import PlainMean, PrivateMean, Realised
from fedlearn.federation.messages import (
    EvaluateReply,
    Failure,
    FailureCode,
    Reply,
    RoundPlan,
    TrainReply,
    check_train_reply,
)
from fedlearn.federation.policy import Learned, clipped_update, training_numbers
from fedlearn.learning import Trained
from fedlearn.privacy.accounting import epsilon
from fedlearn.privacy.clipping import Update
from fedlearn.privacy.mechanisms import Gaussian
from fedlearn.privacy.noise import SecureNoise, SimulatedNoise
from fedlearn.privacy.plan import plan_privacy
from fedlearn.privacy.sampling import Draw
from fedlearn.sources import SecureRandom, SeedTree

SPEC = ParamSpec(
    (
        ParamEntry(name="w", shape=(2, 2), dtype="float32", trainable=True),
        ParamEntry(name="temperature", shape=(), dtype="float32", trainable=True),
        ParamEntry(name="running_mean", shape=(2,), dtype="float32", trainable=False),
    )
)
CLIENTS, COHORT = 20, 8
MECHANISMS = {
    "gaussian": {},
    "adaptive": {"adaptive-clipping": True, "noise-multiplier": 0.5},
    "dp-ftrl": {"mechanism": "dp-ftrl"},
}
EACH = pytest.mark.parametrize("mechanism", MECHANISMS)
NOISE = SimulatedNoise(SeedTree.root(3))


def configured(mechanism: str = "gaussian", weighting: str = "uniform", **sections: Mapping[str, object]) -> RunConfig:
    tables = {
        "federation": {"clients": CLIENTS, "cohort": COHORT, **sections.get("federation", {})},
        "training": {"weighting": weighting, "max-examples": 50},
        "privacy": {"unit": "client", "noise-multiplier": 1.0, "bound-l2": 0.7, **MECHANISMS[mechanism]},
    }
    tables["privacy"].update(sections.get("privacy", {}))
    return RunConfig.from_mapping(tables)


def estimator_of(config: RunConfig, noise=NOISE) -> PrivateMean:
    return PrivateMean(plan_privacy(config), SPEC, instance="run", noise=noise)


def begun(estimator) -> RunState:
    server = ServerState(params=np.zeros(SPEC.size), slots={})
    return RunState(server=server, totals=Totals(), spec_sha256=SPEC.sha256, mechanism=estimator.init())


def everyone(clients: Sequence[int] = range(CLIENTS), method: str = "poisson") -> Draw:
    return Draw(cohort=tuple(clients), population=CLIENTS, method=method, rate=COHORT / CLIENTS)


def answer(estimator, state, client: int, vector, *, examples: int = 1, honest: bool = True) -> Reply:
    """What a client's reply becomes: clipped on its own side, or sent as it is by one that lies."""
    plan = RoundPlan(
        config=estimator.config,
        round_number=1,
        attempt=1,
        proximal_mu=0.0,
        spec_sha256=SPEC.sha256,
        bound_l2=estimator.bound_l2(state),
    )
    vector = np.asarray(vector, np.float32)
    numbers = {"within-bound": 1} if estimator.config.privacy.adaptive_clipping else {}
    if honest:
        trained = Trained(update=Update(vector), num_examples=examples, mean_loss=0.0, steps=1)
        clipped = clipped_update(plan, trained, SPEC)
        vector, numbers = clipped.vector, training_numbers(plan, Learned(update=clipped))
    try:
        return check_train_reply(
            client, {"update": vector}, numbers, plan=plan, spec=SPEC, upload_bytes=0, download_bytes=0
        )
    except ReplyError as error:
        return Failure(client=client, code=FailureCode(error.code))


def released(estimator, state, replies: Sequence[Reply]):
    """The sum with noise, shape (d,), and the estimate it came in."""
    tally = estimator.tally(everyone(), state)
    for reply in replies:
        tally.add(reply)
    estimate = estimator.estimate(tally, state)
    return estimate.mean * COHORT, estimate


ANY = st.floats(width=32, allow_nan=True, allow_infinity=True)
USUAL = st.floats(-2, 2, width=32)
UPDATES = st.lists(ANY | USUAL, min_size=SPEC.size, max_size=SPEC.size)
CLIENT = st.tuples(UPDATES, st.integers(1, 10**6), st.booleans())


# -- sensitivity ---------------------------------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize("weighting", ["uniform", "examples"])
@settings(max_examples=40)
@given(others=st.lists(CLIENT, max_size=5), one=CLIENT)
def test_one_client_moves_the_released_sum_by_at_most_the_ledgers_sensitivity(mechanism, weighting, others, one):
    estimator = estimator_of(configured(mechanism, weighting))
    state = begun(estimator)
    replies = [
        answer(estimator, state, client, vector, examples=examples, honest=honest)
        for client, (vector, examples, honest) in enumerate([*others, one])
    ]
    without, estimate = released(estimator, state, replies[:-1])
    with_it, other = released(estimator, state, replies)
    assert estimate.release == other.release  # the ledger says the same of both
    stated = estimate.release.queries[0].sensitivity_l2
    assert np.linalg.norm(with_it - without) <= stated * (1 + 1e-12)
    assert 0.7 < stated < 0.7 * (1 + 1e-6)
    bounds = [math.log(each.mechanism.bound_l2) for each in (estimate, other)]
    assert abs(bounds[0] - bounds[1]) <= 0.2 * 0.5 / COHORT + 1e-12  # the count moves by a half


@EACH
def test_an_honest_client_can_reach_the_sensitivity_so_the_property_above_is_not_empty(mechanism):
    estimator = estimator_of(configured(mechanism))
    state = begun(estimator)
    without, _ = released(estimator, state, [])
    with_it, _ = released(estimator, state, [answer(estimator, state, 0, np.full(SPEC.size, 3e38))])
    assert np.linalg.norm(with_it - without) == pytest.approx(0.7, rel=1e-5)


@EACH
@pytest.mark.parametrize("longer", [1.0 + 1e-6, 1e6, 3e37])
def test_a_vector_that_was_not_clipped_is_refused(mechanism, longer):
    estimator = estimator_of(configured(mechanism))
    state = begun(estimator)
    vector = np.zeros(SPEC.size)
    vector[0] = 0.7 * longer
    assert answer(estimator, state, 0, vector, honest=False).code == "not-clipped"
    vector[0] = np.float32(0.7) * np.float32(1 - 1e-6)
    assert isinstance(answer(estimator, state, 0, vector, honest=False), TrainReply)


@pytest.mark.parametrize("value", [1e-30, 0.1, -0.1])
def test_a_vector_that_moves_what_no_gradient_trains_is_refused(value):
    estimator = estimator_of(configured())
    vector = np.zeros(SPEC.size)
    vector[-1] = value
    assert answer(estimator, begun(estimator), 0, vector, honest=False).code == "bad-reply"


def test_no_update_that_was_not_clipped_gets_into_a_sum():
    estimator = estimator_of(configured())
    tally = estimator.tally(everyone(), begun(estimator))
    unclipped = TrainReply(
        client=0,
        update=Update(np.zeros(SPEC.size, np.float32)),
        weight=1,
        mean_loss=None,
        upload_bytes=0,
        download_bytes=0,
    )
    with pytest.raises(TypeError, match="clip it first"):
        tally.add(unclipped)


@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=4))
def test_by_examples_a_client_counts_for_its_share_of_the_cap_and_at_most_once(counts):
    estimator = estimator_of(configured(weighting="examples"))
    state = begun(estimator)
    noise, _ = released(estimator, state, [])
    vector = np.zeros(SPEC.size)
    vector[0] = 0.5
    total, _ = released(estimator, state, [answer(estimator, state, 0, vector, examples=n) for n in counts])
    expected = sum(0.5 * min(n, 50) / 50 for n in counts)
    assert (total - noise)[0] == pytest.approx(expected, rel=1e-6, abs=1e-7)


# -- who answers ---------------------------------------------------------------------------------------------------


@EACH
@settings(max_examples=25)
@given(present=st.sets(st.integers(0, CLIENTS - 1)))
def test_who_answers_changes_neither_the_noise_nor_the_denominator_nor_what_the_ledger_says(mechanism, present):
    estimator = estimator_of(configured(mechanism))
    state = begun(estimator)
    noise, empty = released(estimator, state, [])
    vector = np.array([0.25, 0, -0.125, 0, 0.25, 0, 0])
    replies = [
        answer(estimator, state, client, vector)
        if client in present
        else Failure(client=client, code=FailureCode.NO_REPLY)
        for client in range(CLIENTS)
    ]
    total, full = released(estimator, state, replies)
    np.testing.assert_allclose(total - noise, len(present) * vector, atol=1e-5)
    assert full.release == empty.release


@EACH
def test_an_empty_round_is_a_round_like_any_other(mechanism):
    estimator = estimator_of(configured(mechanism))
    state = begun(estimator)
    tally = estimator.tally(everyone([], estimator.config.federation.sampling), state)
    estimate = estimator.estimate(tally, state)
    assert estimate.mean[: SPEC.trainable_size].all()  # noise, everywhere it belongs
    assert estimate.mechanism.rows == 1
    assert 0 < epsilon([estimate.release], 1e-3) < math.inf


def test_a_buffer_and_a_frozen_entry_get_no_noise_either():
    estimator = estimator_of(configured())
    total, _ = released(estimator, begun(estimator), [])
    assert not total[SPEC.trainable_size :].any()


def test_a_secret_cohort_size_is_in_no_release():
    estimator = estimator_of(configured())
    state = begun(estimator)
    texts = set()
    for cohort in ([], [1, 2], range(CLIENTS)):
        estimate = estimator.estimate(estimator.tally(everyone(cohort), state), state)
        texts.add(repr(estimate.release.to_body()))
    assert len(texts) == 1


def test_what_was_realised_can_be_checked_by_who_has_the_salt_and_guessed_by_nobody():
    tally = estimator_of(configured()).tally(everyone([1, 2]), begun(estimator_of(configured())))
    one, other = Realised.of(tally), Realised.of(tally)
    assert one.commitment == Realised(cohort=2, respondents=0, salt=one.salt).commitment
    assert one.commitment != other.commitment  # of the same counts
    assert one.commitment != replace(one, cohort=3).commitment != replace(one, respondents=1).commitment


def test_a_mean_that_hides_nobody_is_infinite_and_says_so():
    config = RunConfig.from_mapping({"federation": {"clients": CLIENTS}})
    plain = PlainMean(config, SPEC)
    state = begun(plain)
    tally = plain.tally(Draw(cohort=(0,), population=CLIENTS, method="everyone"), state)
    reply = TrainReply(
        client=0, update=Update(np.ones(SPEC.size)), weight=3, mean_loss=0.5, upload_bytes=0, download_bytes=0
    )
    tally.add(reply)
    estimate = plain.estimate(tally, state)
    np.testing.assert_array_equal(estimate.mean, np.ones(SPEC.size))
    assert (estimate.release.unit, estimate.release.simulated) == ("none", False)
    assert math.isinf(epsilon([estimate.release], 1e-3))


# -- who is invited ------------------------------------------------------------------------------------------------


def test_a_poisson_draw_comes_from_the_noise_and_not_from_the_seed():
    config = configured()
    one, other = (estimator_of(config, SecureNoise(SecureRandom())) for _ in range(2))
    state = begun(one)

    def cohorts(estimator) -> list[tuple[int, ...]]:
        return [estimator.draw(range(CLIENTS), "cohort", n, 1, state).cohort for n in range(20)]

    assert cohorts(one) != cohorts(other)
    assert cohorts(one) != cohorts(one)
    assert cohorts(estimator_of(config)) == cohorts(estimator_of(config))


def test_the_ledger_has_the_draw_that_was_made_and_claims_it_only_where_it_is_claimed():
    claimed, observed = configured(), configured(privacy={"amplification": "none"})
    fixed = configured(federation={"sampling": "fixed-size"})
    methods = {}
    for name, config in (("claimed", claimed), ("observed", observed), ("fixed", fixed)):
        estimator = estimator_of(config)
        state = begun(estimator)
        draw = estimator.draw(range(CLIENTS), "cohort", 1, 1, state)
        release = estimator.estimate(estimator.tally(draw, state), state).release
        methods[name] = (release.sampling.method, release.adjacency, release.sampling.rate, epsilon([release], 1e-3))
    assert methods["claimed"][:3] == ("poisson", "add-remove", COHORT / CLIENTS)
    assert methods["observed"][:3] == ("poisson-observed", "zero-out", COHORT / CLIENTS)
    assert methods["fixed"][:2] == ("fixed-size", "zero-out")
    assert methods["claimed"][3] < methods["observed"][3] == methods["fixed"][3] < math.inf


# -- evaluation ----------------------------------------------------------------------------------------------------


def measured(client: int, *values: float, names: Sequence[str] = ("accuracy",)) -> EvaluateReply:
    sums = dict(zip(names, values, strict=True))
    return EvaluateReply(client=client, num_examples=1, sums=sums, upload_bytes=0, download_bytes=0)


@pytest.fixture
def noised(monkeypatch):
    """Every vector that was released with Gaussian noise, before anything is made of it."""
    found, original = [], Gaussian.release

    def release(self, state, total, noise):
        following, result = original(self, state, total, noise)
        found.append(result)
        return following, result

    monkeypatch.setattr(Gaussian, "release", release)
    return found


def test_federated_evaluation_is_noised_by_the_stated_standard_deviation(noised):
    """Evaluations of nobody: what is left is noise, and it has the ledger's deviation."""
    estimator = estimator_of(configured())
    names = tuple(f"m{i}" for i in range(2000))
    stated = {estimator.evaluation([], everyone(), names, n)[1].queries[0].stddev for n in range(25)}
    (stddev,) = stated
    assert stddev == pytest.approx(3 * 1.0 * math.sqrt(len(names) + 1), rel=1e-5)
    drawn = np.concatenate([each.vector for each in noised])
    assert abs(float(drawn @ drawn) / stddev**2 / drawn.size - 1) < 4.9 * math.sqrt(2 / drawn.size)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # the list only grows
@given(
    others=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), max_size=6),
    one=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_one_client_moves_an_evaluation_by_at_most_its_sensitivity(noised, others, one):
    """Two metrics within [0, 1], and that it answered at all: √3."""
    estimator, names = estimator_of(configured()), ("a", "b")
    for replies in (others, [*others, one]):
        answers = [measured(client, *values, names=names) for client, values in enumerate(replies)]
        estimator.evaluation(answers, everyone(), names, 1)
    without, with_it = noised[-2:]
    stated = with_it.queries[0].sensitivity_l2
    assert np.linalg.norm(with_it.vector - without.vector) <= stated
    assert math.sqrt(3) <= stated < math.sqrt(3) * (1 + 1e-6)


def test_a_mean_over_many_clients_is_near_the_truth_and_of_few_it_is_not_told():
    config = configured(privacy={"noise-multiplier": 0.5}, federation={"clients": 2000, "cohort": 1000})
    estimator = estimator_of(config)
    draw = Draw(cohort=tuple(range(1000)), population=2000, method="poisson", rate=0.5)
    means, _ = estimator.evaluation([measured(c, 0.75) for c in range(1000)], draw, ("accuracy",), 1)
    assert means["accuracy"] == pytest.approx(0.75, abs=0.02)
    told, release = estimator.evaluation([measured(c, 0.75) for c in range(3)], draw, ("accuracy",), 2)
    assert told == {}
    assert 0 < epsilon([release], 1e-4) < math.inf  # it is accounted all the same


def test_the_noise_of_an_evaluation_is_not_that_of_the_model():
    estimator = estimator_of(configured())
    streams: list[bytes] = []

    class Noting(SimulatedNoise):
        def stream(self, *path):
            stream = super().stream(*path)
            streams.append(self._seeds.child(*path).digest)
            return stream

        def child(self, *path):
            return Noting(self._seeds.child("child", *path))

    noting = Noting(SeedTree.root(0))
    estimator = PrivateMean(plan_privacy(configured("adaptive")), SPEC, instance="run", noise=noting)
    state = begun(estimator)
    for number in range(3):
        for purpose in ("cohort", "evaluate"):
            estimator.draw(range(CLIENTS), purpose, number, 1, state)
        estimate = estimator.estimate(estimator.tally(everyone(), state), state)
        estimator.evaluation([], everyone(), ("accuracy",), number)
        server = replace(state.server, round_number=number + 1)
        state = replace(state, server=server, mechanism=estimate.mechanism)
    assert len(streams) == 3 * 5
    assert len(set(streams)) == len(streams)


def test_metrics_without_a_name_are_refused_with_the_way_out():
    estimator = estimator_of(configured())
    with pytest.raises(TaskError, match=r'metric_names = \("accuracy",\)'):
        estimator.evaluation([], everyone(), (), 1)
