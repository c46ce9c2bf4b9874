"""Mechanisms: the noise that is drawn is the noise that is stated, and nothing but a sum of clipped updates gets it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlearn.errors import ConfigError, RunFailedError
from fedlearn.privacy.clipping import ClippedSum, ClippedUpdate, Update, clip
from fedlearn.privacy.gaussian import discrete_gaussian, power_of_two
from fedlearn.privacy.matrix import COEFFICIENT_STEP, choose_bands, error
from fedlearn.privacy.mechanisms import AdaptiveGaussian, DpFtrl, Gaussian, MechanismState
from fedlearn.privacy.noise import SecureNoise, SimulatedNoise
from fedlearn.privacy.releases import Release, Sampling
from fedlearn.sources import SecureRandom, SeedTree

SEEDED = SimulatedNoise(SeedTree.root(11))
SECURE = SecureNoise(SecureRandom())
LARGE = 1_000_000

GAUSSIAN = Gaussian(noise_multiplier=1.3, bound_l2=0.7)
ADAPTIVE = AdaptiveGaussian(noise_multiplier=1.3, bound_l2=0.7, expected_cohort=100)
FTRL = DpFtrl(noise_multiplier=1.3, bound_l2=0.7, rounds=12, min_separation=4, instance="run")
MECHANISMS = [GAUSSIAN, ADAPTIVE, FTRL]
EACH = pytest.mark.parametrize("mechanism", MECHANISMS, ids=lambda each: type(each).__name__)


def filled(mechanism, state, size: int, clients: int = 0) -> ClippedSum:
    """The sum of a round in which so many clients took part, with updates of all lengths."""
    total, random = mechanism.begin(state, size), np.random.default_rng(clients)
    for _ in range(clients):
        update = random.normal(size=size) * random.exponential() * state.bound_l2 / math.sqrt(size)
        total.add(clip(Update(update), state.bound_l2))
    return total


def released(mechanism, noise, size: int, rounds: int, clients: int = 0) -> list:
    """What the rounds release, less what was in the sum: the noise alone."""
    state, found = mechanism.init(), []
    for _ in range(rounds):
        total = filled(mechanism, state, size, clients)
        state, noised = mechanism.release(state, total, noise)
        found.append((noised.vector - total.units * total.grid, noised))
    return found


def as_release(noised) -> Release:
    """The release in a ledger, for its formulas."""
    sampling = Sampling(method="everyone", rate=1.0, population=9)
    return Release(
        what="model",
        round_number=1,
        unit="client",
        adjacency="zero-out",
        mechanism="gaussian",
        queries=noised.queries,
        sampling=sampling,
        matrix=noised.matrix,
        simulated=True,
    )


@EACH
@pytest.mark.parametrize(("noise", "z"), [(SEEDED, 3.3), (SECURE, 6.5)], ids=["simulated", "secure"])
@pytest.mark.parametrize("clients", [0, 3])
def test_a_million_numbers_have_the_stated_standard_deviation(mechanism, noise, z, clients):
    ((drawn, noised),) = released(mechanism, noise, LARGE, 1, clients)
    stddev = noised.queries[0].stddev  # of Z; the first row of C⁻¹Z is Z
    assert abs(drawn.mean()) < z * stddev / math.sqrt(LARGE)
    assert abs((drawn**2).mean() / stddev**2 - 1) < z * math.sqrt(2 / LARGE)
    assert abs((drawn**4).mean() / stddev**4 - 3) < z * math.sqrt(96 / LARGE)
    beyond = int((np.abs(drawn) > 3 * stddev).sum())
    assert abs(beyond - LARGE * math.erfc(3 / math.sqrt(2))) < z * math.sqrt(2700)


def test_the_stated_standard_deviations_are_those_of_the_formulas():
    rounding = 0.5 * math.sqrt(1000)
    for mechanism, multiplier in ((GAUSSIAN, 1.3), (ADAPTIVE, (1.3**-2 - 10.0**-2) ** -0.5), (FTRL, 1.3)):
        ((_, noised),) = released(mechanism, SEEDED, 1000, 1)
        update = noised.queries[0]
        grid = mechanism.begin(mechanism.init(), 1).grid
        assert update.name == "update"
        assert update.sensitivity_l2 == 0.7 + rounding * grid
        whole = FTRL.sensitivity if mechanism is FTRL else 1.0
        assert update.stddev == pytest.approx(multiplier * update.sensitivity_l2 * whole, rel=1e-12)
        assert grid == power_of_two(multiplier * 0.7 * whole) * 2.0**-24


@EACH
@given(clients=st.integers(0, 5), size=st.integers(1, 40))
def test_what_is_released_is_a_finite_multiple_of_the_grid(mechanism, clients, size):
    state = mechanism.init()
    for _ in range(3):
        total = filled(mechanism, state, size, clients)
        state, noised = mechanism.release(state, total, SEEDED)
        assert noised.vector.dtype == np.float64
        assert noised.vector.shape == (size,)
        assert np.isfinite(noised.vector).all()
        assert (np.ldexp(noised.vector, -math.frexp(total.grid)[1] + 1) % 1 == 0).all()


@EACH
def test_the_noise_does_not_depend_on_the_sum_not_in_the_last_bit(mechanism):
    """Two sums, one noise: what is released differs by exactly what the sums differ by."""
    pairs = [zip(released(mechanism, SEEDED, 50, 9, 0), released(mechanism, SEEDED, 50, 9, 1), strict=True)]
    if mechanism is ADAPTIVE:  # its later bounds follow the counts
        pairs = [zip(released(mechanism, SEEDED, 50, 1, 0), released(mechanism, SEEDED, 50, 1, 1), strict=True)]
    for pair in pairs:
        for (one, _), (other, _) in pair:
            np.testing.assert_array_equal(one, other)


@EACH
def test_only_a_clipped_sum_is_noised(mechanism):
    state = mechanism.init()
    update = Update.of([0.1, 0.2])
    for wrong in (np.zeros(2), [0.0, 0.0], update, clip(update, 0.7), None, 0.0):
        with pytest.raises(TypeError, match="ClippedSum"):
            mechanism.release(state, wrong, SEEDED)


@EACH
def test_only_the_sum_of_this_very_round_is_noised(mechanism):
    state = mechanism.init()
    grid = mechanism.begin(state, 2).grid
    for total in (ClippedSum(2, bound_l2=0.8, grid=grid), ClippedSum(2, bound_l2=0.7, grid=grid / 2)):
        with pytest.raises(ValueError, match="begin"):
            mechanism.release(state, total, SEEDED)


@EACH
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_nothing_that_is_not_finite_can_get_in(mechanism, wrong):
    state = mechanism.init()
    total = mechanism.begin(state, 2)
    with pytest.raises(ValueError, match="bound"):
        ClippedUpdate(vector=np.array([wrong, 0.0]), bound_l2=0.7)
    total.add(clip(Update.of([wrong, 1.0]), 0.7))  # zero now
    assert not total.units.any()
    _, noised = mechanism.release(state, total, SEEDED)
    assert np.isfinite(noised.vector).all()


@EACH
def test_neither_the_state_nor_the_sum_is_changed(mechanism):
    state = mechanism.init()
    for _ in range(3):
        total = filled(mechanism, state, 5, 2)
        before, history, units = (state.bound_l2, state.rows), [each.copy() for each in state.history], total.units
        following, _ = mechanism.release(state, total, SEEDED)
        assert (state.bound_l2, state.rows) == before
        np.testing.assert_array_equal(total.units, units)
        for one, other in zip(state.history, history, strict=True):
            np.testing.assert_array_equal(one, other)
        assert following.rows == state.rows + 1
        state = following


@EACH
def test_seeded_noise_repeats_and_differs_from_round_to_round(mechanism):
    one, two = released(mechanism, SEEDED, 20, 3), released(mechanism, SimulatedNoise(SeedTree.root(11)), 20, 3)
    for (drawn, _), (again, _) in zip(one, two, strict=True):
        np.testing.assert_array_equal(drawn, again)
    assert (one[0][0] != one[1][0]).any()
    other = released(mechanism, SimulatedNoise(SeedTree.root(12)), 20, 1)
    assert (one[0][0] != other[0][0]).any()


@EACH
def test_secure_noise_never_repeats(mechanism):
    ((one, _),), ((two, _),) = released(mechanism, SECURE, 20, 1), released(mechanism, SECURE, 20, 1)
    assert (one != two).any()


class Recording:
    """Noise that remembers for what it was asked."""

    simulated = True

    def __init__(self) -> None:
        self.paths: list[tuple] = []

    def stream(self, *path):
        self.paths.append(path)
        return SEEDED.stream(*path)


@EACH
def test_no_two_draws_share_a_stream(mechanism):
    noise = Recording()
    released(mechanism, noise, 3, 5)
    assert len(set(noise.paths)) == len(noise.paths) == (10 if mechanism is ADAPTIVE else 5)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_noise_and_bound_are_numbers_above_zero(value):
    with pytest.raises(ValueError, match="noise_multiplier"):
        Gaussian(noise_multiplier=value, bound_l2=1.0)
    with pytest.raises(ValueError, match="bound_l2"):
        Gaussian(noise_multiplier=1.0, bound_l2=value)


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")  # the sum has wrapped around: that is the point
def test_a_sum_that_may_have_wrapped_around_is_not_released():
    mechanism = Gaussian(noise_multiplier=1e-12, bound_l2=1.0)
    state = mechanism.init()
    total = mechanism.begin(state, 1)
    total.add(clip(Update.of([1.0]), 1.0))
    with pytest.raises(RunFailedError, match="noise-multiplier"):
        mechanism.release(state, total, SEEDED)


def test_very_little_noise_can_still_be_had():
    mechanism = Gaussian(noise_multiplier=1e-5, bound_l2=1.0)
    state = mechanism.init()
    total = mechanism.begin(state, 1)
    for _ in range(1000):
        total.add(clip(Update.of([1.0]), 1.0))
    _, noised = mechanism.release(state, total, SEEDED)
    assert noised.vector[0] == pytest.approx(1000, abs=1e-3)


# adaptive clipping


@given(z=st.floats(0.01, 9.9), count_stddev=st.one_of(st.none(), st.floats(5.0, 1e4)))
def test_both_queries_together_cost_what_the_noise_multiplier_says(z, count_stddev):
    mechanism = AdaptiveGaussian(noise_multiplier=z, bound_l2=0.3, expected_cohort=100, count_stddev=count_stddev)
    ((_, noised),) = released(mechanism, SEEDED, 7, 1)
    assert [query.name for query in noised.queries] == ["update", "clip-count"]
    assert as_release(noised).noise_multiplier == pytest.approx(z, rel=1e-9)
    assert noised.queries[1].sensitivity_l2 == 0.5
    assert noised.queries[1].stddev == (5.0 if count_stddev is None else count_stddev)


@pytest.mark.parametrize("z", [1.0, 1.0 + 1e-12, 3.0])
def test_a_cohort_whose_count_alone_costs_more_is_refused_with_the_next_step(z):
    with pytest.raises(ConfigError, match=r"privacy\.adaptive-clipping: .*federation\.cohort above") as caught:
        AdaptiveGaussian(noise_multiplier=z, bound_l2=1.0, expected_cohort=10)
    assert caught.value.key == "privacy.adaptive-clipping"


@pytest.mark.parametrize(
    "wrong",
    [
        {"expected_cohort": 0},
        {"expected_cohort": math.inf},
        {"quantile": 0.0},
        {"quantile": 1.0},
        {"learning_rate": 0.0},
        {"learning_rate": math.nan},
        {"count_stddev": math.nan},
        {"count_stddev": 0.0},
    ],
)
def test_what_adaptive_clipping_cannot_do_is_refused(wrong):
    with pytest.raises(ValueError, match="must be"):
        AdaptiveGaussian(**{"noise_multiplier": 1.0, "bound_l2": 1.0, "expected_cohort": 100, **wrong})


def test_the_noise_of_the_count_has_the_stated_standard_deviation():
    """It shows in the next bound: b̃ = γ - ln(C'/C)/η; the noise is b̃'s, times the cohort."""
    mechanism = AdaptiveGaussian(noise_multiplier=1.0, bound_l2=1.0, expected_cohort=100)
    first, noise = mechanism.init(), []
    for number in range(1000):
        total = filled(mechanism, first, 1)
        following, _ = mechanism.release(first, total, SimulatedNoise(SeedTree.root(number)))
        noise.append(-math.log(following.bound_l2) / 0.2 * 100)
    assert abs(np.mean(noise)) < 3.3 * 5 / math.sqrt(1000)
    assert abs(np.var(noise) / 25 - 1) < 3.3 * math.sqrt(2 / 1000)


def adapted(initial: float, quantile: float, rounds: int = 70) -> float:
    """The bound after some rounds of 50 clients, their norms lognormal around 1: the mean of the last 20 rounds."""
    mechanism = AdaptiveGaussian(noise_multiplier=1.0, bound_l2=initial, expected_cohort=50, quantile=quantile)
    state, random, bounds = mechanism.init(), np.random.default_rng(0), []
    for _ in range(rounds):
        total = mechanism.begin(state, 2)
        for norm in random.lognormal(sigma=0.5, size=50):
            total.add(clip(Update.of([norm, 0.0]), state.bound_l2))
        state, _ = mechanism.release(state, total, SEEDED)
        bounds.append(state.bound_l2)
    return float(np.mean(bounds[-20:]))


@pytest.mark.parametrize("initial", [0.05, 1.0, 20.0])
def test_the_bound_finds_the_median_of_the_updates_norms_from_either_side(initial):
    assert adapted(initial, 0.5) == pytest.approx(1.0, rel=0.15)


def test_the_bound_finds_another_quantile():
    assert adapted(0.3, 0.8) == pytest.approx(math.exp(0.5 * 0.8416), rel=0.15)


def test_the_bound_moves_by_a_limited_factor_and_stays_where_it_can_be_used():
    mechanism = AdaptiveGaussian(noise_multiplier=1.0, bound_l2=1.0, expected_cohort=20, learning_rate=5.0)
    state = mechanism.init()
    for clients, limit in ((20, 2.0**-20), (0, 2.0**-20)):
        for _ in range(12):
            total = mechanism.begin(state, 1)
            for _ in range(clients):
                total.add(clip(Update.of([0.0]), state.bound_l2))  # always within: the bound shrinks
            before = state.bound_l2
            state, _ = mechanism.release(state, total, SEEDED)
            assert abs(math.log(state.bound_l2 / before)) <= 2.5 + 1e-9
            assert state.bound_l2 >= limit
        if clients:
            assert state.bound_l2 == limit


def test_flowers_bound_runs_away_and_ours_does_not():
    """Flower 1.41 counts the updates that it *clipped*, and moves the norm as if they had been within it."""
    from flwr.serverapp.strategy import DifferentialPrivacyServerSideAdaptiveClipping, FedAvg
    from flwr.supercore.differential_privacy import adaptive_clip_inputs_inplace

    norms = np.random.default_rng(0).lognormal(sigma=0.5, size=100)
    bounds = {}
    for initial in (0.5, 2.0):
        theirs = DifferentialPrivacyServerSideAdaptiveClipping(FedAvg(), 0.0, 100, initial_clipping_norm=initial)
        for _ in range(60):
            clipped = sum(adaptive_clip_inputs_inplace([np.array([norm])], theirs.clipping_norm) for norm in norms)
            theirs._geometric_update(clipped / 100)
        bounds[initial] = theirs.clipping_norm
    assert bounds[0.5] < 0.01
    assert bounds[2.0] > 100
    assert adapted(0.5, 0.5) == pytest.approx(1.0, rel=0.15)
    assert adapted(2.0, 0.5) == pytest.approx(1.0, rel=0.15)


def test_the_noise_of_a_round_is_for_the_bound_of_that_round():
    """Flower 1.41 moves the norm first: by exp(-0.1) where all updates are within, 10 % too little noise in round 1."""
    state = ADAPTIVE.init()
    for _ in range(5):
        total = filled(ADAPTIVE, state, LARGE // 5)
        for _ in range(100):
            total.add(clip(Update(np.zeros(LARGE // 5)), state.bound_l2))
        following, noised = ADAPTIVE.release(state, total, SEEDED)
        assert following.bound_l2 < 0.95 * state.bound_l2
        assert noised.queries[0].sensitivity_l2 == pytest.approx(state.bound_l2, rel=1e-3)
        stddev = ADAPTIVE.update_noise_multiplier * state.bound_l2
        assert noised.vector.std() == pytest.approx(stddev, rel=0.01)
        state = following


# correlated noise


def test_correlated_noise_has_the_covariance_of_the_matrix():
    drawn = released(FTRL, SEEDED, 100_000, 12)
    noise, stddev = np.stack([each for each, _ in drawn]), drawn[0][1].queries[0].stddev
    coefficients = drawn[0][1].matrix.coefficients
    assert len(coefficients) == choose_bands(12, 4) == 4
    matrix = sum(coefficient * np.eye(12, k=-index) for index, coefficient in enumerate(coefficients))
    inverse = np.linalg.inv(matrix)
    expected = inverse @ inverse.T
    found = noise @ noise.T / noise.shape[1] / stddev**2
    scale = np.sqrt(np.outer(np.diag(expected), np.diag(expected)))
    assert np.abs((found - expected) / scale).max() < 4 * math.sqrt(2 / 100_000)  # 78 of them
    assert np.abs(expected - np.diag(np.diag(expected))).max() > 0.3  # so that the comparison says something
    sums = np.cumsum(noise, axis=0)
    assert math.sqrt((sums**2).mean()) / stddev == pytest.approx(error(coefficients, 12), rel=0.01)


def test_every_row_is_a_function_of_the_gaussian_mechanism_to_the_last_bit():
    """C·N is Z to half a step of the grid, Z drawn on the lattice where C·X lies; all in exact integers.

    Halves go upwards: round(X + y) = X + round(y) for every integer X, which rounding to even is not.
    """
    drawn = released(FTRL, SEEDED, 30_000, 12, clients=2)
    grid = FTRL.begin(FTRL.init(), 1).grid
    coefficients = [round(each / COEFFICIENT_STEP) for each in FTRL.coefficients]
    assert all(whole * COEFFICIENT_STEP == each for whole, each in zip(coefficients, FTRL.coefficients, strict=True))
    noise = [(each / grid).astype(np.int64) for each, _ in drawn]
    for row, (_, noised) in enumerate(drawn):
        query = noised.queries[0]
        fresh = discrete_gaussian(
            SEEDED.stream("mechanism", row, "update"), query.stddev / (grid * COEFFICIENT_STEP), 30_000
        )
        product = sum(coefficients[lag] * noise[row - lag] for lag in range(min(row + 1, len(coefficients))))
        left = product - fresh  # in steps of the lattice: what rounding to the grid has added
        assert (left > -(2**15)).all()
        assert (left <= 2**15).all()


def test_the_rows_of_one_instance_say_what_the_accountant_needs():
    for row, (_, noised) in enumerate(released(FTRL, SEEDED, 5, 12)):
        assert noised.matrix is not None
        assert (noised.matrix.instance, noised.matrix.row, noised.matrix.min_separation) == ("run", row, 4)
        (query,) = noised.queries
        assert query.stddev / (query.sensitivity_l2 * FTRL.sensitivity) == pytest.approx(1.3, rel=1e-12)


def test_a_state_holds_at_most_bands_less_one_vectors_and_goes_on_from_them():
    state = FTRL.init()
    for number in range(12):
        assert len(state.history) == min(number, 3)
        state, _ = FTRL.release(state, FTRL.begin(state, 4), SEEDED)
    with pytest.raises(RunFailedError, match="planned for 12 rounds"):
        FTRL.release(state, FTRL.begin(state, 4), SEEDED)


def test_a_state_without_its_earlier_noise_or_with_another_bound_is_refused():
    state, _ = FTRL.release(FTRL.init(), FTRL.begin(FTRL.init(), 4), SEEDED)
    for wrong in (
        MechanismState(bound_l2=0.7, rows=1),
        MechanismState(bound_l2=0.6, rows=1, history=state.history),
        MechanismState(bound_l2=0.7, rows=0, history=state.history),
    ):
        with pytest.raises(ValueError, match="take the state"):
            FTRL.release(wrong, FTRL.begin(wrong, 4), SEEDED)
    with pytest.raises(ValueError, match="shape"):
        FTRL.release(state, FTRL.begin(state, 5), SEEDED)


def test_without_separation_dp_ftrl_is_independent_noise_in_every_round():
    mechanism = DpFtrl(noise_multiplier=2.0, bound_l2=1.0, rounds=9, min_separation=1, instance="x")
    assert mechanism.coefficients == (1.0,)
    assert mechanism.sensitivity == 3.0  # nine rounds, each with a third of the noise multiplier
    ((_, noised),) = released(mechanism, SEEDED, 2, 1)
    assert noised.queries[0].stddev == pytest.approx(6.0, rel=1e-6)
    state, _ = mechanism.release(mechanism.init(), mechanism.begin(mechanism.init(), 2), SEEDED)
    assert state.history == ()


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"min_separation": 0}])
def test_dp_ftrl_needs_a_round_and_a_separation(wrong):
    with pytest.raises(ValueError, match="at least 1"):
        DpFtrl(**{"noise_multiplier": 1.0, "bound_l2": 1.0, "rounds": 3, "min_separation": 1, "instance": "x", **wrong})
