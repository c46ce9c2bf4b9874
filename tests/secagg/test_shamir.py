"""Shamir's sharing: any t of n shares give the secret, t - 1 say nothing, one wrong share shows."""

from __future__ import annotations

from collections import Counter
from itertools import combinations, product

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fedlearn.secagg import shamir
from fedlearn.secagg.errors import MalformedMessageError
from fedlearn.secagg.shamir import (
    PRIME,
    SHARE_BYTES,
    combine,
    lagrange_at_zero,
    share_from_bytes,
    share_to_bytes,
    split,
)
from fedlearn.sources import SecureRandom

SECRETS = st.binary(min_size=32, max_size=32)
ELEMENTS = st.one_of(st.integers(0, PRIME - 1), st.sampled_from([0, 1, PRIME - 1, 2**256 - 1, 2**256]))


class ScriptedRandom(SecureRandom):
    """Gives out the coefficients it was made with, and remembers what was asked for."""

    def __init__(self, values: list[int]) -> None:
        self.values = list(values)
        self.bounds: list[int] = []

    def below(self, bound: int) -> int:
        self.bounds.append(bound)
        return self.values.pop(0)


@st.composite
def sharings(draw):
    """A secret, a threshold, distinct points, and those of the points that answer: as many as the threshold."""
    points = draw(
        st.lists(st.one_of(st.integers(1, 200), st.integers(1, PRIME - 1)), min_size=1, max_size=40, unique=True)
    )
    threshold = draw(st.integers(1, len(points)))
    answering = draw(st.permutations(range(len(points))))[:threshold]
    return draw(SECRETS), threshold, points, answering


# -- the field -----------------------------------------------------------------------------------------------------


def probably_prime(number: int) -> bool:
    """Miller-Rabin for the bases below 180, 41 primes among them."""
    odd, twos = number - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in range(2, 180):
        value = pow(base, odd, number)
        if value in (1, number - 1):
            continue
        for _ in range(twos - 1):
            value = value * value % number
            if value == number - 1:
                break
        else:
            return False
    return True


def test_the_modulus_is_the_smallest_prime_above_every_secret():
    assert PRIME == 2**256 + 297
    assert probably_prime(PRIME)
    assert not any(probably_prime(number) for number in range(2**256 + 1, PRIME, 2))


# -- sharing -------------------------------------------------------------------------------------------------------


@given(sharings())
def test_any_threshold_of_the_shares_give_the_secret_in_any_order(sharing):
    secret, threshold, points, answering = sharing
    shares = split(secret, threshold, points, SecureRandom())
    weights = lagrange_at_zero([points[i] for i in answering])
    assert combine([shares[i] for i in answering], weights) == secret


@given(SECRETS, st.integers(1, 20), st.integers(0, 20))
def test_more_shares_than_the_threshold_give_the_same(secret, threshold, more):
    points = range(1, threshold + more + 1)
    shares = split(secret, threshold, points, SecureRandom())
    assert combine(shares, lagrange_at_zero(points)) == secret


@given(SECRETS, st.integers(2, 12), st.data())
def test_one_share_less_than_the_threshold_does_not_give_the_secret(secret, threshold, data):
    points = range(1, 2 * threshold)
    shares = split(secret, threshold, points, SecureRandom())
    few = data.draw(st.permutations(range(len(points))))[: threshold - 1]
    assert combine([shares[i] for i in few], lagrange_at_zero([points[i] for i in few])) != secret


@given(sharings(), st.integers(1, PRIME - 1), st.data())
def test_a_wrong_share_always_changes_the_result(sharing, error, data):
    secret, threshold, points, answering = sharing
    shares = split(secret, threshold, points, SecureRandom())
    wrong = data.draw(st.sampled_from(answering))
    shares[wrong] = (shares[wrong] + error) % PRIME
    assert combine([shares[i] for i in answering], lagrange_at_zero([points[i] for i in answering])) != secret


@given(st.integers(1, 50), st.data())
def test_shares_are_the_polynomials_values(threshold, data):
    secret = data.draw(SECRETS)
    coefficients = data.draw(st.lists(ELEMENTS, min_size=threshold - 1, max_size=threshold - 1))
    points = data.draw(st.lists(st.integers(1, PRIME - 1), min_size=threshold, max_size=threshold + 3, unique=True))
    random = ScriptedRandom(coefficients)
    polynomial = [int.from_bytes(secret, "big"), *coefficients]
    assert split(secret, threshold, points, random) == [
        sum(coefficient * pow(x, power, PRIME) for power, coefficient in enumerate(polynomial)) % PRIME for x in points
    ]
    assert random.bounds == [PRIME] * (threshold - 1)  # uniform on the whole field, zero included


def test_a_secret_is_shared_anew_each_time():
    sharings = {tuple(split(bytes(32), 2, [1, 2], SecureRandom())) for _ in range(20)}
    assert len(sharings) == 20


# -- secrecy -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("prime", "threshold", "count"), [(5, 2, 4), (7, 3, 6), (5, 4, 4), (11, 3, 5)])
def test_fewer_shares_than_the_threshold_say_nothing_at_all(prime, threshold, count):
    """Every choice of coefficients once: each value of any t - 1 shares comes equally often, whatever the secret."""
    points = range(1, count + 1)
    for secret in range(prime):
        sharings = [
            shamir._evaluate([secret, *others], points, prime) for others in product(range(prime), repeat=threshold - 1)
        ]
        for few in combinations(range(count), threshold - 1):
            seen = Counter(tuple(shares[i] for i in few) for shares in sharings)
            assert len(seen) == prime ** (threshold - 1)
            assert set(seen.values()) == {1}


@pytest.mark.parametrize(("prime", "threshold", "count"), [(5, 2, 4), (7, 3, 6)])
def test_as_many_as_the_threshold_say_everything_over_a_small_prime_too(prime, threshold, count):
    points = range(1, count + 1)
    for polynomial in product(range(prime), repeat=threshold):
        shares = shamir._evaluate(polynomial, points, prime)
        for enough in combinations(range(count), threshold):
            weights = shamir._lagrange([points[i] for i in enough], prime)
            assert sum(shares[i] * weight for i, weight in zip(enough, weights, strict=True)) % prime == polynomial[0]


# -- coefficients --------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, PRIME - 1), min_size=1, max_size=20, unique=True))
def test_lagrange_coefficients_are_the_textbook_ones(points):
    expected = []
    for x in points:
        weight = 1
        for other in points:
            if other != x:
                weight = weight * other * pow(other - x, -1, PRIME) % PRIME
        expected.append(weight)
    assert lagrange_at_zero(points) == tuple(expected)
    assert sum(expected) % PRIME == 1  # the constant polynomial


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=100, unique=True))
def test_lagrange_coefficients_take_one_inversion(points):
    with pytest.MonkeyPatch.context() as patch:
        calls = []
        patch.setattr(shamir, "pow", lambda *args: calls.append(args) or pow(*args), raising=False)
        lagrange_at_zero(points)
    assert len(calls) == 1


# -- bytes ---------------------------------------------------------------------------------------------------------


@given(ELEMENTS)
def test_a_share_survives_its_bytes(value):
    data = share_to_bytes(value)
    assert len(data) == SHARE_BYTES == 33
    assert share_from_bytes(data) == value


@given(st.one_of(st.binary(max_size=70), st.binary(min_size=33, max_size=33)))
def test_bytes_are_a_share_in_their_only_form_or_refused(data):
    try:
        value = share_from_bytes(data)
    except MalformedMessageError:
        assert len(data) != 33 or int.from_bytes(data, "big") >= PRIME
    else:
        assert share_to_bytes(value) == data


@pytest.mark.parametrize("data", [b"", bytes(32), bytes(34), PRIME.to_bytes(33, "big"), b"\xff" * 33])
def test_bytes_that_are_no_share_are_refused(data):
    with pytest.raises(MalformedMessageError):
        share_from_bytes(data)


def test_the_largest_share_is_taken():
    assert share_from_bytes((PRIME - 1).to_bytes(33, "big")) == PRIME - 1


@pytest.mark.parametrize("value", [-1, PRIME])
def test_what_is_no_share_has_no_bytes(value):
    with pytest.raises(ValueError, match="share must be in"):
        share_to_bytes(value)


# -- what is refused -----------------------------------------------------------------------------------------------


@given(st.integers(2**256, PRIME - 1), st.integers(0, PRIME - 1))
def test_a_value_that_no_secret_has_is_none(value, slope):
    shares = shamir._evaluate([value, slope], [1, 2], PRIME)
    assert combine(shares, lagrange_at_zero([1, 2])) is None


@given(SECRETS, st.integers(-3, 9))
def test_a_threshold_out_of_range_is_refused(secret, threshold):
    assume(not 1 <= threshold <= 4)
    with pytest.raises(ValueError, match="threshold must be in"):
        split(secret, threshold, [1, 2, 3, 4], SecureRandom())


@pytest.mark.parametrize(
    ("points", "reason"),
    [
        ([0, 1], "point must be in"),
        ([1, -2], "point must be in"),
        ([1, PRIME], "point must be in"),
        ([3, 3], "distinct"),
    ],
)
def test_points_that_give_the_secret_away_or_coincide_are_refused(points, reason):
    with pytest.raises(ValueError, match=reason):
        split(bytes(32), 2, points, SecureRandom())
    with pytest.raises(ValueError, match=reason):
        lagrange_at_zero(points)


def test_no_points_have_no_coefficients():
    with pytest.raises(ValueError, match="point at least"):
        lagrange_at_zero([])


@pytest.mark.parametrize("length", [0, 31, 33])
def test_secrets_of_another_length_are_refused(length):
    with pytest.raises(ValueError, match="32 bytes"):
        split(bytes(length), 1, [1], SecureRandom())


def test_as_many_coefficients_as_shares_are_needed():
    with pytest.raises(ValueError, match="shorter"):
        combine([1, 2], lagrange_at_zero([1]))
