"""Skellam noise has the distribution that is stated, and its Rényi divergences are never above the bounds.

Fixed keys, so that a test passes always or never; the operating system's streams are held to bounds that chance
exceeds once in 10^9 runs.
"""

from __future__ import annotations

import hashlib
import math
from fractions import Fraction
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlearn.privacy import skellam as module
from fedlearn.privacy.gaussian import discrete_gaussian
from fedlearn.privacy.noise import Keystream, SecureNoise, SimulatedNoise
from fedlearn.privacy.skellam import LEAST_VARIANCE, MOST_VARIANCE, rdp, sensitivity, skellam, skellam_slack
from fedlearn.sources import SecureRandom, SeedTree

MILLION = 1_000_000
KEY = bytes(range(32))
SMALL = [0.01, 0.3, 1.0, 7.5, 1000.0]
LARGE = [2.0**20, math.nextafter(2.0**20, math.inf), 1e10, 2.0**60, MOST_VARIANCE]
SOURCES = {  # name: noise, and the probability with which a right sampler may fail one bound
    "simulated": (SimulatedNoise(SeedTree.root(5)), 1e-3),
    "secure": (SecureNoise(SecureRandom()), 1e-10),
}


def log_probabilities(variance: float, most: int) -> np.ndarray:
    """ln p(y) for y = 0, …, ``most``, from the ratios of neighbours in float64."""
    start = most + int(60 / math.log2(1 + 2 * most / variance)) + 10
    ratio, found = 1.0, np.zeros(most + 1)
    for n in range(start, 0, -1):
        ratio = 1 / (2 * n / variance + ratio)
        if n <= most:
            found[n] = math.log(ratio)
    found = np.cumsum(found)
    return found - np.logaddexp.reduce(np.concatenate([found, found[1:]]))


def chi_squared_bound(freedom: int, chance: float) -> float:
    """What a χ² exceeds with probability ``chance`` (Wilson and Hilferty's approximation)."""
    z, spread = NormalDist().inv_cdf(1 - chance), 2 / (9 * freedom)
    return freedom * (1 - spread + z * math.sqrt(spread)) ** 3


def chi_squared(drawn: np.ndarray, variance: float) -> tuple[float, int]:
    """The χ² of the counts of every y, the rare ones together, against the exact probabilities, and its freedom."""
    most = int(10 * math.sqrt(variance) + 30)
    side = np.exp(log_probabilities(variance, most)) * drawn.size
    cut = int(np.flatnonzero(np.cumsum(side[::-1])[::-1] > 25)[-1])  # no cell with few expected
    side = np.append(side[:cut], side[cut:].sum())
    expected = np.concatenate([side[:0:-1], side])
    counts = np.bincount(np.clip(drawn, -cut, cut) + cut, minlength=2 * cut + 1)
    return float(((counts - expected) ** 2 / expected).sum()), 2 * cut


def faults(drawn: np.ndarray, variance: float, chance: float = 1e-3) -> list[str]:
    """What of ``drawn`` is not a Skellam distribution's of that large variance."""
    scaled = drawn / math.sqrt(variance)
    n, z, found = scaled.size, NormalDist().inv_cdf(1 - chance / 2), []
    if abs(scaled.mean()) > z / math.sqrt(n):
        found.append("mean")
    if abs((scaled**2).mean() - 1) > z * math.sqrt(2 / n):
        found.append("variance")
    if abs((scaled**3).mean()) > z * math.sqrt(15 / n):
        found.append("skewness")
    if abs((scaled**4).mean() - 3 - 1 / variance) > z * math.sqrt(96 / n):
        found.append("fourth moment")
    for sigmas in (3, 4):
        mean = n * math.erfc(sigmas / math.sqrt(2))
        if abs(float((np.abs(scaled) > sigmas).sum()) - mean) > (z + 0.5) * math.sqrt(mean):
            found.append(f"beyond {sigmas} standard deviations")
    if abs(np.corrcoef(scaled[1:], scaled[:-1])[0, 1]) > z / math.sqrt(n):
        found.append("correlation of neighbours")
    return found


class Scripted(Keystream):
    """A keystream that gives out what it was told."""

    def __init__(self, words: list[int]) -> None:
        self.left = words

    def words(self, count: int) -> np.ndarray:
        given, self.left = self.left[:count], self.left[count:]
        assert len(given) == count
        return np.array(given, dtype=np.uint64)


# -- what is drawn ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("variance", SMALL)
def test_a_million_small_numbers_have_the_exact_probabilities(variance, source):
    noise, chance = SOURCES[source]
    found, freedom = chi_squared(skellam(noise.stream("small", str(variance)), variance, MILLION), variance)
    assert freedom >= 2
    assert found < chi_squared_bound(freedom, chance)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("variance", LARGE)
def test_a_million_wide_numbers_have_the_moments_and_tails(variance, source):
    noise, chance = SOURCES[source]
    assert faults(skellam(noise.stream("wide", str(variance)), variance, MILLION), variance, chance) == []


@pytest.mark.parametrize("factor", [0.99, 1.01])
def test_the_tests_notice_a_variance_that_is_one_percent_off(factor):
    assert "variance" in faults(skellam(Keystream(KEY), factor * 1e10, MILLION), 1e10)
    found, freedom = chi_squared(skellam(Keystream(KEY), factor * 7.5, MILLION), 7.5)
    assert found > chi_squared_bound(freedom, 1e-4)


def test_the_tests_notice_a_discrete_gaussian():
    found, freedom = chi_squared(discrete_gaussian(Keystream(KEY), math.sqrt(7.5), MILLION), 7.5)
    assert found > chi_squared_bound(freedom, 1e-9)


@pytest.mark.parametrize("draw", [module._from_table, module._by_rejection])
def test_both_ways_fill_a_hundred_equal_cells_alike_where_they_meet(draw):
    table = module._table(2.0**20)
    drawn = draw(Keystream(KEY), 2.0**20, MILLION)
    below = np.array([each / 2**256 for each in table.thresholds])
    edges = np.searchsorted(below, np.arange(1, 100) / 100)  # the first threshold above each hundredth
    expected = np.diff(below[edges], prepend=0.0, append=1.0) * MILLION
    counts = np.bincount(np.searchsorted(edges - table.radius, drawn, side="left"), minlength=100)
    assert float(((counts - expected) ** 2 / expected).sum()) < chi_squared_bound(99, 1e-3)


@pytest.mark.parametrize(("variance", "parts"), [(5.0, 7), (0.5, 50), (1e3, 3)])
def test_a_sum_of_shares_is_one_of_the_whole_variance(variance, parts):
    shares = [skellam(Keystream(bytes([part] * 32)), variance / parts, 200_000) for part in range(parts)]
    found, freedom = chi_squared(np.sum(shares, axis=0), variance)
    assert found < chi_squared_bound(freedom, 1e-3)


def test_a_sum_of_shares_from_tables_is_as_one_that_no_table_holds():
    shares = [skellam(Keystream(bytes([part] * 32)), 2.0**19, MILLION // 2) for part in range(4)]
    assert faults(np.sum(shares, axis=0), 2.0**21) == []


def test_the_same_key_gives_the_numbers_it_always_gave():
    first = {variance: skellam(Keystream(KEY), variance, 8).tolist() for variance in (0.5, 2.0**20, 2.0**30)}
    assert first == FROZEN
    whole = b"".join(
        skellam(Keystream(KEY), variance, 100_000).astype("<i8").tobytes() for variance in (0.01, 40.0, 2.0**20, 1e9)
    )
    assert hashlib.sha256(whole).hexdigest() == FROZEN_SHA256


FROZEN = {
    0.5: [0, 0, 1, 0, 0, 0, 0, 0],
    2.0**20: [918, 5, 1295, -726, 660, 259, -918, -430],
    2.0**30: [24071, 54276, -24985, -980, -14324, -15500, 2408, -11280],
}
FROZEN_SHA256 = "5fba59a0080bf49ad1ec794f61ccf017b7af7bb652136a5e581ced82fab34c6e"


@settings(deadline=None)
@given(st.binary(min_size=32, max_size=32), st.sampled_from([0.01, 3.0, 2.0**20, 2.0**21, 1e15]), st.integers(0, 300))
def test_the_same_stream_gives_the_same_integers_and_as_many_as_were_asked_for(key, variance, size):
    drawn = skellam(Keystream(key), variance, size)
    assert drawn.dtype == np.int64
    assert drawn.shape == (size,)
    np.testing.assert_array_equal(drawn, skellam(Keystream(key), variance, size))
    assert (np.abs(drawn) <= 17 * math.sqrt(variance) + 20).all()


@pytest.mark.parametrize("variance", [0.0, -1.0, math.nan, math.inf, LEAST_VARIANCE / 2, MOST_VARIANCE * 1.01])
def test_a_variance_that_cannot_be_drawn_is_refused(variance):
    with pytest.raises(ValueError, match="variance"):
        skellam(Keystream(KEY), variance, 1)
    with pytest.raises(ValueError, match="variance"):
        skellam_slack(variance, 1)


def test_a_negative_size_is_refused():
    with pytest.raises(ValueError, match="size"):
        skellam(Keystream(KEY), 1.0, -1)
    with pytest.raises(ValueError, match="draws"):
        skellam_slack(1.0, -1)


def test_the_least_variance_can_be_drawn():
    assert not skellam(Keystream(KEY), LEAST_VARIANCE, 1000).any()


# -- how exactly -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variance", [LEAST_VARIANCE, 0.01, 3.0, 1000.0, 30_000.5])
def test_every_probability_of_a_table_is_right_to_what_is_stated(variance):
    mpmath = pytest.importorskip("mpmath")
    table = module._table(variance)
    steps = np.diff(np.array([0, *table.thresholds, 2**256], dtype=object))
    last = table.radius
    ys = sorted({0, 1, 2, 3, last // 9, last // 4, last // 2, last - 1, last})
    with mpmath.workdps(120):
        exact = [mpmath.exp(-mpmath.mpf(variance)) * mpmath.besseli(y, mpmath.mpf(variance)) for y in ys]
        scaled = [int(mpmath.nint(each * 2**256)) for each in exact]
    for sign in (-1, 1):
        errors = [abs(int(steps[last + sign * y]) - want) for y, want in zip(ys, scaled, strict=True)]
        assert sum(errors) < 2**70, "the tail that is cut off is shared out, so that all are too likely by 2^-183"
    assert len(table.thresholds) == 2 * last < 2**15.1
    assert skellam_slack(variance, 1) == (0.0, 2.0**-180)


def test_a_table_ends_where_nothing_is_left():
    for variance in (1e-6, 0.5, 20.0, 5000.0):
        last = module._radius(variance)
        logs = log_probabilities(variance, 2 * last + 50)
        assert np.logaddexp.reduce(logs[last + 1 :]) < -183 * math.log(2) - math.log(2)
        if last > 40:  # and not much later
            assert np.logaddexp.reduce(logs[last - last // 10 :]) > -183 * math.log(2)


@pytest.mark.parametrize("variance", [2.0**20, 1.7 * 2.0**20, 2.0**23])
def test_a_candidate_is_refused_as_often_as_makes_up_for_the_gaussian(variance):
    # The exact ratios of neighbours know nothing of the saddle point that the polynomial comes from.
    last = int(16 * math.sqrt(variance))
    weights = [1 << 320]
    for ratio in module._ratios(variance, last):
        weights.append(weights[-1] * ratio >> 320)
    ys = np.unique(np.linspace(0, last, 400).astype(np.int64))
    refused = module._refused(ys, variance)
    assert (refused == module._refused(-ys, variance)).all()
    mpmath = pytest.importorskip("mpmath")
    with mpmath.workdps(60):
        most = mpmath.mpf(16) ** 4 / (24 * mpmath.mpf(variance))
        for y, word in zip(ys.tolist(), refused.tolist(), strict=True):
            exact = mpmath.log(mpmath.mpf(weights[y]) / weights[0]) + mpmath.mpf(y) ** 2 / (2 * mpmath.mpf(variance))
            found = mpmath.log(1 - mpmath.mpf(word) / 2**64) + most
            assert abs(found - exact) < 2.0**-50
    assert float(refused.max()) / 2**64 < 1 / 380


def test_the_larger_the_variance_the_less_is_refused():
    for variance in (2.0**30, 2.0**50, MOST_VARIANCE):
        ys = (np.linspace(-16, 16, 99) * math.sqrt(variance)).astype(np.int64)
        assert float(module._refused(ys, variance).max()) / 2**64 <= (16**4 / 24 + 1) / variance


def test_a_candidate_is_kept_by_its_word_and_never_beyond_sixteen_standard_deviations(monkeypatch):
    variance = 2.0**22
    given = np.array([0, 100, -3000, 32_768, 32_769, -32_769, 5], dtype=np.int64)
    refused = module._refused(given, variance).tolist()
    words = [refused[0], refused[1] - 1, refused[2], refused[3], 2**64 - 1, 2**64 - 1, 0]
    monkeypatch.setattr(module, "discrete_gaussian", lambda *_: given)
    monkeypatch.setattr(module, "_BATCH", given.size)
    drawn = module._by_rejection(Scripted(words), variance, 3)
    assert drawn.tolist() == [0, -3000, 32_768]


@pytest.mark.parametrize("variance", [0.01, 3.0])
def test_a_tie_in_the_first_word_is_decided_by_the_rest(variance):
    table = module._table(variance)

    def words(number: int) -> list[int]:
        return [number >> shift & 2**64 - 1 for shift in (192, 128, 64, 0)]

    for index, threshold in enumerate(table.thresholds):
        at, under = words(threshold), words(threshold - 1) if threshold else None
        assert module._from_table(Scripted(at), variance, 1) == [index + 1 - table.radius]
        if under is not None and index and under[0] == at[0] and table.thresholds[index - 1] < threshold:
            assert module._from_table(Scripted(under), variance, 1) == [index - table.radius]
    highest = [2**64 - 1] * 4
    assert module._from_table(Scripted([5, *highest, *highest[1:]]), variance, 2)[1] == table.radius
    lowest = module._from_table(Scripted([0] * 4), variance, 1)
    assert lowest == [int(np.searchsorted(np.array(table.thresholds) > 0, True)) - table.radius]


def test_slack_adds_up_over_draws():
    assert skellam_slack(2.0**20, 3) == (0.0, 3 * 2.0**-180)
    assert skellam_slack(2.0**21, 2**32) == (2.0**-10, 2.0**-148)
    assert skellam_slack(2.0**21, 0) == (0.0, 0.0)


# -- what it costs ---------------------------------------------------------------------------------------------------


def one(order: float, variance: float, l1: float, l2: float) -> float:
    return float(rdp([order], sensitivity_l1=l1, sensitivity_l2=l2, variance=variance)[0])


def published(order: int, variance: Fraction, l1: Fraction, l2: Fraction) -> Fraction:
    """The bound of Agarwal et al., in fractions."""
    second = min(((2 * order - 1) * l2**2 + 6 * l1) / (4 * variance**2), 3 * l1 / (2 * variance))
    return order * l2**2 / (2 * variance) + second


def divergence(order: float, variance: float, moved: int) -> float:
    """The Rényi divergence between Skellam noise and itself, moved, over all integers that matter."""
    most = int(60 * math.sqrt(variance)) + 20 * moved + 400
    logs = log_probabilities(variance, most + moved)
    ys = np.arange(-most, most + 1)
    terms = order * logs[np.abs(ys - moved)] + (1 - order) * logs[np.abs(ys)]
    assert max(terms[0], terms[-1]) < terms.max() - 50, "the sum was cut off too early"
    return float(np.logaddexp.reduce(terms)) / (order - 1)


@pytest.mark.parametrize("moved", [1, 2, 3, 7, 20])
@pytest.mark.parametrize("variance", [0.05, 0.5, 1.0, 3.0, 10.0, 50.0, 300.0, 2000.0])
def test_no_divergence_is_above_its_bound(variance, moved):
    for order in (1.001, 1.1, 1.5, 1.9, 2, 2.5, 3, 3.3, 4, 5, 7.7, 8, 16, 33):
        assert divergence(order, variance, moved) <= one(order, variance, moved, moved) * (1 + 1e-9)


@pytest.mark.parametrize("variance", [30.0, 300.0, 2000.0])
def test_the_bound_is_nearly_reached_by_a_move_of_one(variance):
    for order in (2, 3, 8):
        assert one(order, variance, 1, 1) <= divergence(order, variance, 1) * (1 + 1 / variance)


def test_both_directions_of_a_move_and_several_coordinates_are_bounded_together():
    orders, moves = (1.5, 2, 3.3, 6), (3, -1, 2, 1)
    l1, l2 = sum(map(abs, moves)), math.sqrt(sum(each * each for each in moves))
    for order in orders:
        together = sum(divergence(order, 9.0, abs(each)) for each in moves)
        assert together <= one(order, 9.0, l1, l2)


CASES = [(2, 100, 3, 3), (2, 1, 5, 3), (5, 10, 40, 9), (64, 1000, 300, 40), (1024, 50, 10, 4), (3, 2.0**30, 1e9, 1e6)]


@pytest.mark.parametrize(("order", "variance", "l1", "l2"), CASES)
def test_a_bound_is_never_above_the_published_one_and_is_that_for_large_orders(order, variance, l1, l2):
    theirs = float(published(order, *map(Fraction, (variance, l1, l2))))
    found = one(order, variance, l1, l2)
    assert found <= theirs * (1 + 1e-9)
    curvature = 2 * math.log(exact_ratio(variance))
    assert found == pytest.approx(min(theirs, curvature * order * l2 * l2 / 2), rel=4e-6)


def exact_ratio(variance: float) -> float:
    """I₀(μ)/I₁(μ)."""
    mpmath = pytest.importorskip("mpmath")
    return float(mpmath.besseli(0, variance) / mpmath.besseli(1, variance))


def test_golden_values():
    orders = [1.5, 2, 3, 10, 10.5, 256]
    found = rdp(orders, sensitivity_l1=30.0, sensitivity_l2=10.0, variance=400.0)
    assert found == pytest.approx(GOLDEN, rel=2e-6), "mpmath's, from the formulas"
    assert (found >= np.array(GOLDEN) * (1 - 1e-9)).all()
    assert published(2, Fraction(400), Fraction(30), Fraction(10)) == Fraction(1, 4) + Fraction(3, 4000)
    assert published(3000, Fraction(400), Fraction(30), Fraction(10)) == Fraction(3000, 8) + Fraction(9, 80)
    assert one(3000, 400.0, 30.0, 10.0) == pytest.approx(375.1125, rel=1e-12)


GOLDEN = [0.2065084053, 0.2503132186, 0.3754698279, 1.251566093, 1.315132476, 32.04009198]


@pytest.mark.parametrize("variance", [1e-6, 0.01, 1.0, 20.0, 256.0, math.nextafter(256.0, 300), 1000.0, 1e5])
def test_the_curvature_is_rounded_up_and_hardly(variance):
    mpmath = pytest.importorskip("mpmath")
    exact = 2 * mpmath.log(mpmath.besseli(0, variance) / mpmath.besseli(1, variance))
    assert 0 < float(module._curvature(variance) / exact - 1) < 5e-6


@given(st.floats(1e-3, 1e12))
def test_the_logarithm_of_the_probabilities_bends_most_at_zero(variance):
    # What the proof rests on; in float64, so that it can be looked at for a few moves only where the variance is large.
    steps = np.diff(log_probabilities(variance, 60)) if variance < 1e6 else np.zeros(2)
    bends = -np.diff(np.concatenate([-steps[::-1], steps]))
    assert (bends <= module._curvature(variance) + 1e-12).all()


@given(st.floats(1.001, 500), st.floats(0.1, 1e9), st.floats(1, 1e5), st.floats(1, 2), st.floats(1, 3))
def test_more_costs_more(order, variance, l2, wider, more):
    l1 = min(l2 * wider, l2 * l2)
    found = one(order, variance, l1, l2)
    assert 0 < found < math.inf
    assert one(order, variance * more, l1, l2) <= found * (1 + 4e-6)
    assert one(order, variance, l1 * more, l2) >= found
    assert one(order, variance, l1, l2 * more) >= found
    assert one(math.ceil(order), variance, l1, l2) >= found
    assert found >= order * l2 * l2 / 2 / variance * min(1, variance / (order * l2 + 10)) * 0.1  # no zero by cancelling


@pytest.mark.parametrize(
    ("orders", "l1", "l2", "variance"),
    [([1.0], 1, 1, 1), ([2, 0.5], 1, 1, 1), ([math.nan], 1, 1, 1), ([2], 0, 1, 1), ([2], 1, -1, 1), ([2], 1, 1, 0.0),
     ([2], math.inf, 1, 1), ([2], 1, math.nan, 1), ([2], 1, 1, math.inf)],
)  # fmt: skip
def test_no_bound_for_what_cannot_be(orders, l1, l2, variance):
    with pytest.raises(ValueError, match="above"):
        rdp(orders, sensitivity_l1=l1, sensitivity_l2=l2, variance=variance)


# -- sensitivity -----------------------------------------------------------------------------------------------------


@given(st.floats(1e-3, 1e9), st.floats(1e-3, 1e3), st.integers(1, 10**9), st.sampled_from([2.0**-20, 0.5, 1e-9]))
def test_sensitivity_is_the_formula_rounded_up(scale, bound, size, beta):
    l1, l2 = sensitivity(scale, bound, size, beta)
    mpmath = pytest.importorskip("mpmath")
    with mpmath.workdps(40):
        longest, root = mpmath.mpf(scale) * mpmath.mpf(bound), mpmath.sqrt(size)
        likely = (
            longest**2 + mpmath.mpf(size) / 4 + mpmath.sqrt(2 * mpmath.log(1 / mpmath.mpf(beta))) * (longest + root / 2)
        )
        exact_l2 = min(longest + root, mpmath.sqrt(likely))
        exact_l1 = min(root * exact_l2, exact_l2**2)
        assert exact_l2 <= l2 <= exact_l2 * (1 + 1e-12)
        assert exact_l1 <= l1 <= exact_l1 * (1 + 1e-12)


def test_what_rounds_to_integers_stays_within_its_sensitivity():
    chance, scale, bound, size = np.random.default_rng(0), 20.0, 1.0, 400
    l1, l2 = sensitivity(scale, bound, size)
    for _ in range(200):
        vector = chance.normal(size=size)
        vector *= scale * bound / np.linalg.norm(vector)
        rounded = np.floor(vector + chance.random(size))
        assert np.linalg.norm(rounded) <= l2
        assert np.abs(rounded).sum() <= l1
    assert l2 < scale * bound + math.sqrt(size), "of the two bounds, the likely one is the smaller here"


@pytest.mark.parametrize(
    "arguments",
    [(0.0, 1.0, 1), (1.0, 0.0, 1), (1.0, 1.0, 0), (math.inf, 1.0, 1), (1.0, math.nan, 1), (1.0, 1.0, 1, 0.0),
     (1.0, 1.0, 1, 1.0), (1e200, 1e200, 1)],
)  # fmt: skip
def test_no_sensitivity_of_what_cannot_be(arguments):
    with pytest.raises(ValueError, match=r"sensitivity|too large"):
        sensitivity(*arguments)
