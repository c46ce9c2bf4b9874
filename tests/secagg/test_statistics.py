"""What a server sees of a masked vector is noise: no byte, no bit and no pair of vectors tells anything.

Keys come from the operating system, so that every run draws anew; all these tests together fail by chance less than
once in a million runs.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
from cohort import Cohort, offer
from linear_complexity import linear_complexity
from numpy.typing import NDArray

from fedlearn.privacy.clipping import ClippedUpdate
from fedlearn.privacy.noise import Keystream
from fedlearn.secagg.encoding import EncodedUpdate, Encoding, plain_encoding
from fedlearn.secagg.messages import MaskedInput
from fedlearn.secagg.prg import SUITES
from fedlearn.secagg.ring import unpack
from fedlearn.sources import SecureRandom

CHANCE = 2.0**-30
"""Of a fair test of bytes to fail."""

SIGMAS = 6.0
"""A normal variable is beyond this many with probability 2e-9."""

MT19937 = 19_937
SIZE = 60_000


def chi_squared(freedom: int) -> tuple[float, float]:
    """Return what a χ² variable is below, and above, with probability ``CHANCE`` each (Wilson and Hilferty)."""
    part = 2 / (9 * freedom)
    sigma = -NormalDist().inv_cdf(CHANCE)
    low, high = (freedom * (1 - part + sign * sigma * math.sqrt(part)) ** 3 for sign in (-1, 1))
    return low, high


def one_sample(data: bytes) -> float:
    """Return χ² of bytes against all being equally likely."""
    counts = np.bincount(np.frombuffer(data, np.uint8), minlength=256)
    expected = len(data) / 256
    return float(((counts - expected) ** 2 / expected).sum())


def two_samples(one: bytes, two: bytes) -> float:
    """Return χ² of two byte strings of one length against being alike."""
    first, second = (np.bincount(np.frombuffer(data, np.uint8), minlength=256) for data in (one, two))
    both = first + second
    return float(((first - second)[both > 0] ** 2 / both[both > 0]).sum())


def largest_gap(one: NDArray[np.uint64], two: NDArray[np.uint64]) -> float:
    """Return Kolmogorov and Smirnov's statistic, times √(n/2): above c with probability 2·exp(-2c²) or so."""
    merged = np.concatenate([one, two])
    steps = np.where(np.argsort(merged, kind="stable") < one.size, 1, -1)
    return float(np.abs(np.cumsum(steps)).max()) / one.size * math.sqrt(one.size / 2)


def looks_uniform(data: bytes) -> bool:
    """Return whether bytes pass for random."""
    low, high = chi_squared(255)
    return low < one_sample(data) < high


def encoded(encoded_as: Encoding, value: float) -> EncodedUpdate:
    """Return the update that is ``value`` everywhere."""
    update = ClippedUpdate(vector=np.full(encoded_as.size, value), bound_l2=encoded_as.bound_l2)
    rounding, noise = (Keystream(SecureRandom().token_bytes(32)) for _ in range(2))
    return encoded_as.encode(update, weight=1, rounding=rounding, noise=noise)


def masked_words(value: float, *, size: int = SIZE, suite: int = 1, lost: bool = False) -> NDArray[np.uint64]:
    """Return the masked vector of a client whose update is ``value`` everywhere; the others' are zero."""
    encoded_as = plain_encoding(size=size, bits=21, bound_l2=1.0, clients=3)
    cohort = Cohort(offer(3, encoding=encoded_as, suite=suite, colluding=0.0))
    cohort.updates = [encoded(encoded_as, value if client == 1 else 0.0) for client in range(3)]
    answer = cohort.answer("mask", 1, cohort.until("mask")[1])
    vector = MaskedInput.read(answer, words=encoded_as.words).vector
    return np.frombuffer(vector, dtype="<u8").astype(np.uint64)


def test_the_statistics_tell_what_is_not_random():
    """The tests below would fail for an unmasked vector, for one whose masks have a bias, and for two that differ."""
    encoded_as = plain_encoding(size=SIZE, bits=21, bound_l2=1.0, clients=3)
    plain = [encoded(encoded_as, value).words for value in (0.0, 0.004)]
    assert not any(looks_uniform(words.tobytes()) for words in plain)
    random = SecureRandom().token_bytes(8 * 20_000)
    assert looks_uniform(random)
    assert not looks_uniform(bytes(160_000))
    assert not looks_uniform(bytes(range(256)) * 625)  # too even
    biased = (np.frombuffer(random, np.uint8) | (np.arange(160_000) % 4 == 0)).astype(np.uint8).tobytes()
    assert not looks_uniform(biased)
    assert two_samples(random, biased) > chi_squared(255)[1]
    assert largest_gap(*plain) > 3.2


@pytest.mark.parametrize("suite", sorted(SUITES))
@pytest.mark.parametrize("value", [0.0, 0.004, -0.004])
def test_the_bytes_of_a_masked_vector_are_uniform(suite, value):
    words = masked_words(value, suite=suite)
    assert looks_uniform(words.tobytes())
    for at in range(8):  # each place of a word by itself
        assert looks_uniform(np.ascontiguousarray(words.view(np.uint8).reshape(-1, 8)[:, at]).tobytes())


@pytest.mark.parametrize("value", [0.0, 0.004])
def test_masked_vectors_do_not_depend_on_what_is_masked(value):
    """Zero on one side; zero, and the largest constant there is, on the other."""
    one, two = masked_words(0.0), masked_words(value)
    assert two_samples(one.tobytes(), two.tobytes()) < chi_squared(255)[1]
    assert largest_gap(one, two) < 3.2  # 2·exp(-2·3.2²) is 3e-9
    agree = int(np.bitwise_count(one ^ two).sum())
    assert abs(agree - 32 * one.size) < SIGMAS * math.sqrt(16 * one.size)


def test_no_two_vectors_of_a_session_share_a_mask():
    """Sums and differences of what the clients send look as random as each does: no mask cancels before the sum."""
    encoded_as = plain_encoding(size=SIZE, bits=21, bound_l2=1.0, clients=3)
    cohort = Cohort(offer(3, encoding=encoded_as, colluding=0.0))
    cohort.updates = [encoded(encoded_as, 0.0) for _ in range(3)]
    sent = [
        np.frombuffer(MaskedInput.read(cohort.answer("mask", at, message), words=encoded_as.words).vector, "<u8")
        for at, message in cohort.until("mask").items()
    ]
    for one, two in ((0, 1), (0, 2), (1, 2)):
        assert looks_uniform((sent[one] + sent[two]).tobytes())
        assert looks_uniform((sent[one] - sent[two]).tobytes())
    assert looks_uniform((sent[0] + sent[1] + sent[2]).tobytes())  # each one's own mask is left


def test_who_watches_a_server_sees_masked_vectors_and_nothing_of_the_sum():
    cohort, seen = Cohort(offer()), {}
    cohort.server._watch = lambda address, vector: seen.setdefault(address, vector.copy())
    total = cohort.run()
    assert set(seen) == set(range(5))
    assert all((seen[at] != cohort.updates[at].words).any() for at in seen)
    assert (sum(seen.values()) != total.words).any()


def planes(words: NDArray[np.uint64]) -> list[NDArray[np.uint64]]:
    """Return the lowest bit of each of a word's three lanes."""
    return [words >> np.uint64(shift) & np.uint64(1) for shift in (0, 21, 42)]


@pytest.mark.parametrize("suite", sorted(SUITES))
def test_the_lowest_bits_of_a_masked_vector_have_no_short_recurrence(suite):
    """Twice as far from N/2 by one has half the probability: |L - N/2| > 20 has 2^-40 or so."""
    for bits in planes(masked_words(0.0, size=11_999, suite=suite)):
        assert bits.size == 4_000
        assert abs(linear_complexity(bits) - 2_000) <= 20


@pytest.mark.slow
def test_the_lowest_bits_are_not_those_of_a_twister():
    """In a vector long enough to show MT19937, whose every bit, and sum of bits, has a recurrence of 19,937."""
    count = 45_000
    twisters = [np.random.MT19937(seed).random_raw(count) for seed in range(3)]
    assert linear_complexity(twisters[0] & 1) == MT19937
    assert linear_complexity((twisters[0] ^ twisters[1] ^ twisters[2]) & 1) == MT19937
    for bits in planes(masked_words(0.0, size=3 * count - 1)):
        assert abs(linear_complexity(bits) - count // 2) <= 20


# -- rounding and noise ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("sign", [-1, 1])
def test_rounding_is_right_on_average_and_no_wilder_than_it_must_be(fraction, sign):
    encoded_as = Encoding(size=100_000, bits=32, scale=16.0, bound_l2=1000.0, clients=10)
    exact = sign * (3 + fraction)
    values = unpack(encoded(encoded_as, exact / 16.0).words, encoded_as.size, 32)
    variance = fraction * (1 - fraction)
    assert set(np.unique(values)) <= {math.floor(exact), math.ceil(exact)}
    deviation = math.sqrt(variance / values.size)
    assert abs(values.mean() - exact) <= SIGMAS * deviation
    assert values.var() == pytest.approx(variance, abs=SIGMAS * deviation + 1e-12)


@pytest.mark.parametrize("variance", [0.5, 40.0, 3e6])
@pytest.mark.parametrize("clients", [1, 3])
def test_noise_has_the_mean_and_variance_that_were_agreed(variance, clients):
    """The sum over clients has as many variances; on every coordinate of the lattice by itself."""
    encoded_as = Encoding(
        size=100_000,
        bits=32,
        scale=1e-3,
        bound_l2=1.0,
        clients=10,
        noise_variance=variance,
        rotation=SecureRandom().token_bytes(32),
    )
    encoded_as.check()
    words = sum(encoded(encoded_as, 0.0).words for _ in range(clients))
    values = unpack(words, encoded_as.size, 32)
    total = clients * variance
    assert abs(values.mean()) <= SIGMAS * math.sqrt(total / values.size)
    spread = math.sqrt((total + 2 * total**2) / values.size)  # a Skellam variable's fourth moment is μ + 3μ²
    assert abs(values.var() - total) <= SIGMAS * spread
    following = np.mean(values[1:] * values[:-1].astype(np.float64)) / total
    assert abs(following) <= SIGMAS / math.sqrt(values.size)
