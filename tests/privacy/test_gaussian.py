"""What is drawn has the distribution that is stated: fixed keys, so that a test passes always or never.

The exception are the operating system's streams, which are held to bounds that chance exceeds once in 10^9 runs.
"""

from __future__ import annotations

import math
from decimal import Decimal, localcontext
from fractions import Fraction
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlearn.privacy import gaussian as module
from fedlearn.privacy.gaussian import (
    LEAST_STDDEV,
    MOST_STDDEV,
    bernoulli,
    discrete_gaussian,
    gaussian,
    power_of_two,
    to_grid,
)
from fedlearn.privacy.noise import Keystream, SecureNoise, SimulatedNoise
from fedlearn.sources import SecureRandom, SeedTree

MILLION = 1_000_000
KEY = bytes(range(32))
WIDE = [2.0**24 * 1.37, 2.0**40, MOST_STDDEV]
SOURCES = {  # name: noise, and the probability with which a right sampler may fail one bound
    "simulated": (SimulatedNoise(SeedTree.root(3)), 1e-3),
    "secure": (SecureNoise(SecureRandom()), 1e-10),
}


def chi_squared(drawn: np.ndarray, stddev: float) -> tuple[float, int]:
    """The χ² of the counts of 0, ±1, ±2, … and all beyond against the exact probabilities, and its freedom."""
    ys = np.arange(200.0)
    expected = np.exp(-(ys**2) / (2 * stddev**2)) * np.where(ys == 0, 1, 2)
    expected *= drawn.size / expected.sum()
    last = int(np.flatnonzero(np.cumsum(expected[::-1])[::-1] > 50)[-1])  # no cell with few expected
    expected = np.append(expected[:last], expected[last:].sum())
    counts = np.bincount(np.minimum(np.abs(drawn), last), minlength=last + 1)
    return float(((counts - expected) ** 2 / expected).sum()), last


def chi_squared_bound(freedom: int, chance: float) -> float:
    """What a χ² exceeds with probability ``chance`` (Wilson and Hilferty's approximation)."""
    z, spread = NormalDist().inv_cdf(1 - chance), 2 / (9 * freedom)
    return freedom * (1 - spread + z * math.sqrt(spread)) ** 3


def is_rare(count: int, mean: float, chance: float) -> bool:
    """Whether a Poisson count of that mean is as far out, on either side, with less than ``chance``."""

    def term(at: int) -> float:
        return math.exp(at * math.log(mean) - mean - math.lgamma(at + 1))

    most = int(mean + 20 * math.sqrt(mean) + 60)
    below = math.fsum(term(at) for at in range(count + 1))
    above = math.fsum(term(at) for at in range(count, max(count, most) + 1))
    return min(below, above) < chance / 2


def faults(samples: np.ndarray, stddev: float, chance: float = 1e-3) -> list[str]:
    """What of ``samples`` is not a Gaussian's of that standard deviation; each bound fails by chance at ``chance``."""
    scaled = samples / stddev
    n, z, found = scaled.size, NormalDist().inv_cdf(1 - chance / 2), []
    if abs(scaled.mean()) > z / math.sqrt(n):
        found.append("mean")
    if abs((scaled**2).mean() - 1) > z * math.sqrt(2 / n):
        found.append("standard deviation")
    if abs((scaled**3).mean()) > z * math.sqrt(15 / n):
        found.append("skewness")
    if abs((scaled**4).mean() - 3) > z * math.sqrt(96 / n):
        found.append("fourth moment")
    if abs((np.abs(scaled) < 1).mean() - math.erf(math.sqrt(0.5))) > z * math.sqrt(0.2167 / n):
        found.append("within 1 standard deviation")
    for sigmas in (3, 4, 5):
        if is_rare(int((np.abs(scaled) > sigmas).sum()), n * math.erfc(sigmas / math.sqrt(2)), chance):
            found.append(f"beyond {sigmas} standard deviations")
    if np.abs(np.corrcoef(scaled[1:], scaled[:-1])[0, 1]) > z / math.sqrt(n):
        found.append("correlation of neighbours")
    return found


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("stddev", WIDE)
def test_a_million_wide_numbers_are_gaussian(stddev, source):
    noise, chance = SOURCES[source]
    assert faults(discrete_gaussian(noise.stream("wide"), stddev, MILLION), stddev, chance) == []


@pytest.mark.parametrize("source", SOURCES)
def test_a_million_real_numbers_are_gaussian(source):
    noise, chance = SOURCES[source]
    assert faults(gaussian(noise.stream("real"), 0.37, MILLION), 0.37, chance) == []


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("stddev", [0.5, 1.0, 3.0])
def test_a_million_small_numbers_have_the_exact_probabilities(stddev, source):
    noise, chance = SOURCES[source]
    drawn = discrete_gaussian(noise.stream("small"), stddev, MILLION)
    found, freedom = chi_squared(drawn, stddev)
    assert freedom >= 2
    assert found < chi_squared_bound(freedom, chance)
    positive, signed = int((drawn > 0).sum()), int((drawn != 0).sum())
    assert abs(2 * positive - signed) < NormalDist().inv_cdf(1 - chance / 2) * math.sqrt(signed)


@pytest.mark.parametrize("factor", [0.99, 1.01])
def test_the_tests_notice_a_standard_deviation_that_is_one_percent_off(factor):
    assert "standard deviation" in faults(discrete_gaussian(Keystream(KEY), factor * 2.0**24, MILLION), 2.0**24)
    found, freedom = chi_squared(discrete_gaussian(Keystream(KEY), factor * 3.0, MILLION), 3.0)
    assert found > chi_squared_bound(freedom, 1e-9)


def test_the_tests_notice_tails_that_are_cut_or_fat_and_neighbours_that_are_alike():
    drawn = gaussian(Keystream(KEY), 1.0, MILLION)
    assert faults(drawn, 1.0) == []
    assert "beyond 4 standard deviations" in faults(np.clip(drawn, -4, 4), 1.0)
    fat = drawn.copy()
    fat[:20] *= 6 / np.abs(fat[:20])
    assert "beyond 5 standard deviations" in faults(fat, 1.0)
    assert "correlation of neighbours" in faults(np.repeat(drawn[::2], 2), 1.0)


def test_the_tests_notice_a_laplace_distribution():
    drawn = np.random.default_rng(0).laplace(scale=math.sqrt(0.5), size=MILLION)
    assert {"fourth moment", "beyond 3 standard deviations"} <= set(faults(drawn, 1.0))


def implemented_weight(stddev: float, y: int) -> Fraction:
    """The probability that a candidate is y and accepted, from the very thresholds that are compared with, exactly."""
    scale, variance, all_words = module._laplace_scale(stddev), stddev * stddev, Fraction(2**64)

    def threshold(exponent: float) -> Fraction:
        return int(module._threshold(np.array([exponent]))[0]) / all_words

    whole, low = divmod(abs(y), scale)
    at_least = [Fraction(1), *(int(each) / all_words for each in module._GEOMETRIC)]
    steps, rest = divmod(whole, 8)
    weight = threshold(low / scale) * at_least[8] ** steps * (at_least[rest] - at_least[rest + 1])
    distance = float(abs(y)) - variance / scale
    exponent = distance * distance / (2 * variance)
    steps = math.floor(exponent / 8)
    return weight * at_least[8] ** steps * threshold(exponent - 8 * steps)


def relative_errors(stddev: float, ys: list[int]) -> list[float]:
    """How far the weights of ``ys`` are from exp(-y²/2σ²), relative to each other; their mean is 0."""
    with localcontext() as context:
        context.prec = 60
        variance = Decimal(stddev * stddev)
        ratios = []
        for y in ys:
            weight = implemented_weight(stddev, y)
            ratio = Decimal(weight.numerator) / Decimal(weight.denominator)
            ratios.append(ratio * (Decimal(y * y) / (2 * variance)).exp())
        middle = ratios[0]
        return [float(ratio / middle - 1) for ratio in ratios]


@pytest.mark.parametrize("stddev", [0.1, 0.5, 0.9, 1.0, 3.0, 20.7, 2.0**24 * 1.37, 2.0**40, 2.0**45])
def test_every_probability_is_right_to_what_the_docstring_states(stddev):
    far = np.random.default_rng(1).uniform(0, 40 * stddev, size=150)
    near = np.random.default_rng(2).uniform(0, 4 * stddev, size=150)
    ys = [0, 1, 2, 3, *range(4, 60), *(int(y) for y in (*near, *far))]
    ys = [y for y in dict.fromkeys(ys) if y <= max(40 * stddev, 1)]
    errors = relative_errors(stddev, ys)
    bounds = [2.0**-47 * (1 + (y / stddev) ** 2 / 16) for y in ys]
    assert all(abs(found) <= bound + bounds[0] for found, bound in zip(errors, bounds, strict=True))
    assert len(ys) < 5 or max(map(abs, errors)) > 2.0**-60  # float64 was used: the comparison compares something


@pytest.mark.parametrize("exponent", [0.0, 0.3, 8.0, 9.0, 13.5])
def test_survival_has_the_probability_of_an_exponential(exponent):
    tries = 2 * MILLION
    survived = int(module._survives(Keystream(KEY), np.full(tries, exponent)).sum())
    if exponent == 0:
        assert survived == tries
    elif exponent < 1:
        p = math.exp(-exponent)
        assert abs(survived - tries * p) < 3.29 * math.sqrt(tries * p * (1 - p))
    else:
        assert not is_rare(survived, tries * math.exp(-exponent), 1e-3)


def test_the_geometric_part_has_no_memory():
    drawn = module._geometric(Keystream(KEY), 2 * MILLION)
    for least in range(13):  # beyond 8 a second word was needed
        expected = drawn.size * math.exp(-least)
        assert abs(int((drawn >= least).sum()) - expected) <= 3.3 * math.sqrt(expected)
    assert drawn.min() == 0
    assert drawn.max() >= 12


@given(st.binary(min_size=32, max_size=32), st.floats(0.1, 2.0**45), st.integers(0, 300))
def test_the_same_stream_gives_the_same_integers_and_as_many_as_were_asked_for(key, stddev, size):
    drawn = discrete_gaussian(Keystream(key), stddev, size)
    assert drawn.dtype == np.int64
    assert drawn.shape == (size,)
    np.testing.assert_array_equal(drawn, discrete_gaussian(Keystream(key), stddev, size))
    assert (np.abs(drawn) <= 40 * stddev).all()


@pytest.mark.parametrize("stddev", [0.0, -1.0, math.nan, math.inf, MOST_STDDEV * 1.01, LEAST_STDDEV / 2])
def test_a_discrete_gaussian_that_cannot_be_drawn_is_refused(stddev):
    with pytest.raises(ValueError, match="stddev"):
        discrete_gaussian(Keystream(KEY), stddev, 1)


@pytest.mark.parametrize("stddev", [0.0, -1.0, math.nan, math.inf])
def test_a_gaussian_without_noise_is_refused(stddev):
    with pytest.raises(ValueError, match="stddev"):
        gaussian(Keystream(KEY), stddev, 1)


def test_a_negative_size_is_refused():
    with pytest.raises(ValueError, match="size"):
        discrete_gaussian(Keystream(KEY), 1.0, -1)


def test_real_numbers_lie_on_their_own_fine_grid():
    drawn = gaussian(Keystream(KEY), 4.0, 1000)
    assert (drawn * 2.0**38 == np.rint(drawn * 2.0**38)).all()
    assert (drawn * 2.0**35 != np.rint(drawn * 2.0**35)).any()


@pytest.mark.parametrize("probability", [0.5, 0.1, 1e-4, 1 / 3, 1 - 1e-4])
def test_booleans_are_true_as_often_as_they_should_be(probability):
    count = int(bernoulli(Keystream(KEY), probability, MILLION).sum())
    assert abs(count - MILLION * probability) < 3.3 * math.sqrt(MILLION * probability * (1 - probability))


@given(st.floats(0, 1), st.binary(min_size=32, max_size=32))
def test_a_boolean_is_a_word_below_its_threshold(probability, key):
    words = Keystream(key).words(20)
    drawn = bernoulli(Keystream(key), probability, 20)
    assert drawn.tolist() == [Fraction(int(word)) < math.floor(Fraction(probability) * 2**64) for word in words]


def test_certain_and_impossible_are_exact_and_use_up_as_many_words():
    for probability in (0.0, 5e-324, 0.5, 1.0):
        stream, other = Keystream(KEY), Keystream(KEY)
        drawn = bernoulli(stream, probability, 1000)
        if probability != 0.5:
            assert drawn.all() if probability == 1 else not drawn.any()
        other.words(1000)
        assert stream.words(1) == other.words(1)


@pytest.mark.parametrize("probability", [-1e-9, 1.0000001, math.nan, math.inf])
def test_a_probability_is_between_0_and_1(probability):
    with pytest.raises(ValueError, match="probability"):
        bernoulli(Keystream(KEY), probability, 1)


@given(st.floats(min_value=5e-324, allow_infinity=False))
def test_a_power_of_two_is_the_largest_not_above(value):
    power = power_of_two(value)
    assert power <= value < 2 * Fraction(power)
    assert math.frexp(power)[0] == 0.5


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_no_power_of_two_is_below_what_is_not_above_zero(value):
    with pytest.raises(ValueError, match="power of two"):
        power_of_two(value)


@given(st.lists(st.floats(-1e9, 1e9), max_size=9), st.integers(-20, 20))
def test_what_is_on_a_grid_is_a_multiple_of_it_and_near(values, exponent):
    grid, vector = 2.0**exponent, np.array(values)
    rounded = to_grid(vector, grid)
    assert ((rounded / grid) % 1 == 0).all()
    assert (np.abs(rounded - vector) <= grid / 2).all()
    np.testing.assert_array_equal(to_grid(rounded, grid), rounded)


def test_no_grid_for_what_is_not_finite_and_no_grid_that_is_no_power_of_two():
    with pytest.raises(ValueError, match="NaN"):
        to_grid(np.array([1.0, math.nan]), 0.5)
    with pytest.raises(ValueError, match="power of two"):
        to_grid(np.array([1.0]), 0.3)
