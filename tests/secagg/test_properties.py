"""What holds whatever the numbers: sums are exact, lanes and rotations lose nothing, no bound is ever exceeded."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest
from cohort import Cohort, encoding, offer
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedlearn.privacy.clipping import ClippedUpdate, Update, clip
from fedlearn.privacy.noise import Keystream
from fedlearn.privacy.skellam import LEAST_VARIANCE
from fedlearn.secagg import graph
from fedlearn.secagg.encoding import (
    EncodedUpdate,
    Encoding,
    _rounded,
    _rounded_within,
    noised_encoding,
    plain_encoding,
)
from fedlearn.secagg.errors import MalformedMessageError, PolicyViolationError, RoundAbortedError, VectorLengthError
from fedlearn.secagg.prg import SUITES
from fedlearn.secagg.ring import BITS, lanes, pack, unpack, words_needed
from fedlearn.secagg.rotation import block_size, rotate, rotate_back
from fedlearn.secagg.wire import bitmap, members

SEEDS = st.binary(min_size=32, max_size=32)


class Ones(Keystream):
    """The unluckiest stream there is: everything is rounded up that can be."""

    def __init__(self) -> None: ...

    def words(self, count: int) -> NDArray[np.uint64]:
        return np.full(count, 2**64 - 1, dtype=np.uint64)


def stream(seed: int = 0) -> Keystream:
    """Return a stream of its own for each seed."""
    return Keystream(seed.to_bytes(32, "big"))


# -- the whole session -----------------------------------------------------------------------------------------------


@st.composite
def cohorts(draw):
    """A session of any kind, and who is lost in which phase."""
    n = draw(st.integers(3, 8))
    mode = draw(st.sampled_from(["active", "semi-honest"]))
    encoded_as = plain_encoding(
        size=draw(st.integers(1, 40)),
        bits=draw(st.sampled_from(BITS)),
        bound_l2=draw(st.floats(1e-3, 1e3)),
        clients=n + draw(st.integers(0, 3)),
        most_weight=draw(st.integers(1, 9)),
    )
    phases = ["advertise", "share", "mask", "consistent", "unmask"]
    if mode == "semi-honest":
        phases.remove("consistent")
    lost = draw(st.dictionaries(st.integers(0, n - 1), st.sampled_from(phases), max_size=draw(st.integers(0, n))))
    made = offer(
        n,
        mode=mode,
        suite=draw(st.sampled_from(sorted(SUITES))),
        encoding=encoded_as,
        least_cohort=draw(st.integers(3, n)),
        least_survivors=draw(st.integers(3, n)),
        colluding=0.0,
    )
    return Cohort(made, lost=lost, threads=draw(st.integers(1, 2)))


def fate(cohort: Cohort) -> tuple[str | None, set[int]]:
    """Return in which phase the session must be aborted, if it must, and who survives."""
    offered, lost, phases = cohort.offered, cohort.lost, list(cohort.server.phases)

    def left(phase: str) -> set[int]:
        gone = {client for client, when in lost.items() if phases.index(when) <= phases.index(phase)}
        return set(range(offered.cohort)) - gone

    threshold = 2 * len(left("advertise")) // 3 + 1
    survivors = max(threshold, offered.least_survivors)
    needed = dict.fromkeys(phases, threshold) | {
        "advertise": offered.least_cohort,
        "share": survivors,
        "mask": survivors,
    }
    for phase in phases:
        if len(left(phase)) < needed[phase]:
            return phase, left("mask")
    return None, left("mask")


@given(cohorts())
@settings(max_examples=20)
def test_the_sum_is_exact_or_the_round_ends_where_it_must(cohort):
    phase, survivors = fate(cohort)
    if phase is not None:
        with pytest.raises(RoundAbortedError) as caught:
            cohort.run()
        assert caught.value.phase == phase
        return
    total = cohort.run()
    assert set(total.survivors) == survivors
    assert (total.words == cohort.expected(total.survivors)).all()
    assert not cohort.client_errors and not cohort.server_errors and not total.complaints
    decoded = cohort.offered.encoding.decode(total.words)
    most = cohort.offered.encoding.most_weight
    assert decoded.weight == (None if most == 1 else sum(1 + client % most for client in survivors))


@given(st.data())
@settings(max_examples=4)
def test_the_sum_is_exact_on_sparse_graphs(data):
    n = data.draw(st.integers(20, 32))
    lost = data.draw(
        st.dictionaries(
            st.integers(0, n - 1), st.sampled_from(["share", "mask", "consistent", "unmask"]), max_size=n // 10
        )
    )
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(graph, "COMPLETE_UP_TO", 8)
        made = offer(n, colluding=0.0, dropping=0.1, least_survivors=n // 2, encoding=encoding(clients=n))
        cohort = Cohort(made, lost=lost)
        total = cohort.run()
        assert not cohort.server.topology.graph.complete
    assert (total.words == cohort.expected(total.survivors)).all()
    assert set(total.survivors) == {at for at in range(n) if lost.get(at) not in ("share", "mask")}


def test_the_sum_is_exact_with_noise_in_it():
    made = noised_encoding(
        size=50, bits=21, bound_l2=1.0, clients=5, noise_multiplier=1.0, honest=3, rotation=bytes(range(32))
    )
    cohort = Cohort(offer(encoding=made), lost={1: "mask"})
    total = cohort.run()
    assert (total.words == cohort.expected([0, 2, 3, 4])).all()


# -- the wire --------------------------------------------------------------------------------------------------------


@given(st.integers(0, 70), st.data())
def test_a_bitmap_names_whom_it_was_made_of(size, data):
    named = data.draw(st.sets(st.integers(0, size - 1))) if size else set()
    bits = bitmap(named, size)
    assert members(bits, size) == tuple(sorted(named))
    for wrong in (bits + b"\0", bits[:-1] if bits else b"\1"):
        with pytest.raises(MalformedMessageError):
            members(wrong, size)
    if size % 8:
        with pytest.raises(MalformedMessageError):
            members(bits[:-1] + bytes([bits[-1] | 1 << size % 8]), size)


# -- lanes -----------------------------------------------------------------------------------------------------------


@st.composite
def summands(draw):
    """Integers for each client whose sum is in its lane's range, the extremes included."""
    bits = draw(st.sampled_from(BITS))
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    count, size = draw(st.integers(1, 5)), draw(st.integers(0, 12))
    totals = draw(
        st.lists(
            st.one_of(st.integers(low, high), st.sampled_from([low, -1, 0, 1, high])), min_size=size, max_size=size
        )
    )
    parts = draw(
        st.lists(
            st.lists(st.integers(2 * low, 2 * high), min_size=size, max_size=size),
            min_size=count - 1,
            max_size=count - 1,
        )
    )
    last = [total - sum(part[at] for part in parts) for at, total in enumerate(totals)]
    return bits, [np.array(each, dtype=np.int64) for each in (*parts, last)], np.array(totals, dtype=np.int64)


@given(summands())
def test_lanes_add_up_whatever_their_signs(case):
    bits, parts, totals = case
    words = np.zeros(words_needed(totals.size, bits), dtype=np.uint64)
    for part in parts:
        packed = pack(part, bits)
        assert packed.shape == words.shape
        words += packed
    assert (unpack(words, totals.size, bits) == totals).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("extreme", ["low", "high", "alternating"])
def test_lanes_at_their_extremes(bits, extreme):
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    values = np.full(13, low if extreme == "low" else high, dtype=np.int64)
    if extreme == "alternating":
        values[::2] = low
    assert (unpack(pack(values, bits), 13, bits) == values).all()


@given(
    st.sampled_from(BITS), st.integers(1, 9), st.data(), st.sampled_from([-3, -2, -1, 1, 2, 3]), st.sampled_from([0, 1])
)
def test_an_overflow_damages_its_own_lane_and_the_next_by_one_unit_a_wrap(bits, size, data, wraps, far):
    """The lane is wrong by the wraps it made, the next one of the same word by as many units, no other at all."""
    half = 1 << (bits - 1)
    values = np.array(data.draw(st.lists(st.integers(-half // 2, half // 2), min_size=size, max_size=size)))
    at = data.draw(st.integers(0, size - 1))
    over = values.copy()
    over[at] = values[at] + wraps * 2 * half
    words = np.zeros(words_needed(size, bits), dtype=np.uint64)
    for part in (over // 2, over - over // 2):
        words += pack(part, bits)
    found = unpack(words, size, bits)
    expected = values.copy()
    following = at + words_needed(size, bits)
    if following < size:
        expected[following] += wraps
    assert (found == expected).all()


@given(st.sampled_from(BITS), st.integers(0, 40))
def test_lanes_waste_no_more_than_a_word(bits, size):
    assert (words_needed(size, bits) - 1) * lanes(bits) < max(size, 1) <= max(words_needed(size, bits), 1) * lanes(bits)


def test_there_are_three_widths():
    for bits in (0, 8, 12, 20, 24, 64):
        with pytest.raises(ValueError, match="a lane has"):
            lanes(bits)


# -- rotation --------------------------------------------------------------------------------------------------------


@given(st.integers(1, 300), SEEDS, st.integers(0, 2**32))
def test_a_rotation_keeps_lengths_and_angles_and_can_be_taken_back(size, seed, drawn):
    random = np.random.default_rng(drawn)
    one, two = random.normal(size=(2, size))
    turned = rotate(one, seed)
    assert turned.shape == one.shape
    assert np.isclose(np.linalg.norm(turned), np.linalg.norm(one), rtol=1e-12)
    assert np.isclose(turned @ rotate(two, seed), one @ two, rtol=0, atol=1e-10)
    assert np.allclose(rotate_back(turned, seed), one, rtol=0, atol=1e-12)
    assert np.allclose(rotate(rotate_back(one, seed), seed), one, rtol=0, atol=1e-12)
    assert np.allclose(rotate(one + 2 * two, seed), turned + 2 * rotate(two, seed), rtol=0, atol=1e-11)


@pytest.mark.parametrize("size", [16_383, 16_384, 16_385, 40_000, 65_536])
def test_a_rotation_of_more_than_a_block(size):
    vector = np.random.default_rng(0).normal(size=size)
    kept = vector.copy()
    turned = rotate(vector, bytes(32))
    assert (vector == kept).all()
    assert np.isclose(np.linalg.norm(turned), np.linalg.norm(vector), rtol=1e-12)
    assert np.allclose(rotate_back(turned, bytes(32)), vector, rtol=0, atol=1e-11)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 100])
def test_a_rotation_is_an_orthogonal_matrix(size):
    matrix = np.array([rotate(row, bytes(range(32))) for row in np.eye(size)])
    assert np.allclose(matrix @ matrix.T, np.eye(size), rtol=0, atol=1e-12)
    if size >= 64:
        assert not np.allclose(matrix, [rotate(row, bytes(32)) for row in np.eye(size)])


@pytest.mark.parametrize("size", [1024, 1500, 40_000])
def test_one_large_coordinate_is_spread_over_its_block(size):
    vector = np.zeros(size)
    vector[size // 3] = 1.0
    assert np.abs(rotate(vector, bytes(32))).max() <= 5 * block_size(size) ** -0.5  # some are in two blocks


def test_a_rotation_of_nothing():
    assert rotate(np.zeros(0), bytes(32)).size == rotate_back(np.zeros(0), bytes(32)).size == 0


# -- from updates to integers and back -------------------------------------------------------------------------------


@st.composite
def clipped_updates(draw):
    """An encoding without noise, and updates with weights for it."""
    clients = draw(st.integers(1, 6))
    size = draw(st.integers(1, 20))
    encoded_as = plain_encoding(
        size=size,
        bits=draw(st.sampled_from(BITS)),
        bound_l2=draw(st.floats(1e-6, 1e6)),
        clients=clients,
        most_weight=draw(st.integers(1, 100)),
    )
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    finite = st.floats(-1e6, 1e6, width=32)
    updates = [
        Update(np.array(draw(st.lists(finite, min_size=size, max_size=size)), dtype=dtype)) for _ in range(clients)
    ]
    weights = [draw(st.integers(1, encoded_as.most_weight)) for _ in range(clients)]
    return encoded_as, [clip(update, encoded_as.bound_l2) for update in updates], weights


@given(clipped_updates(), st.booleans())
def test_a_decoded_sum_is_within_one_unit_a_client(case, unlucky):
    encoded_as, updates, weights = case
    encoded_as.check()
    words = np.zeros(encoded_as.words, dtype=np.uint64)
    for number, (update, weight) in enumerate(zip(updates, weights, strict=True)):
        rounding = Ones() if unlucky else stream(number)
        words += encoded_as.encode(update, weight=weight, rounding=rounding, noise=stream()).words
    found = encoded_as.decode(words)
    exact = sum(weight * update.vector.astype(np.float64) for update, weight in zip(updates, weights, strict=True))
    unit = encoded_as.most_weight / encoded_as.scale
    assert (np.abs(found.vector - exact) <= len(updates) * unit * (1 + 1e-6)).all()
    assert found.weight == (sum(weights) if encoded_as.most_weight > 1 else None)
    assert found.clipped == sum(not update.within for update in updates)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("clients", [1, 2, 3, 100, 1000])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("most_weight", [1, 7])
def test_the_worst_updates_of_all_clients_do_not_overflow(bits, clients, sign, most_weight):
    """All at the bound in one coordinate, of the largest weight, rounded away from zero."""
    encoded_as = plain_encoding(size=4, bits=bits, bound_l2=0.7, clients=clients, most_weight=most_weight)
    encoded_as.check()
    worst = ClippedUpdate(vector=np.array([0.0, sign * 0.7, 0.0, 0.0]), bound_l2=0.7)
    words = encoded_as.encode(worst, weight=most_weight, rounding=Ones(), noise=stream()).words
    one = unpack(words, encoded_as.dimension, bits)
    many = unpack(words * np.uint64(clients), encoded_as.dimension, bits)
    assert (many == one * clients).all()
    assert abs(int(many[1])) <= encoded_as.largest <= (1 << (bits - 1)) - 1


@given(st.sampled_from(BITS), st.integers(1, 40_000), st.floats(1e-6, 1e6), st.integers(1, 5000))
def test_the_finest_encoding_is_just_within_its_lanes(bits, clients, bound, most_weight):
    try:
        encoded_as = plain_encoding(size=3, bits=bits, bound_l2=bound, clients=clients, most_weight=most_weight)
    except PolicyViolationError:
        share = ((1 << (bits - 1)) - 1) // clients
        assert share < max(3, most_weight)
        return
    encoded_as.check()
    units = math.ceil(encoded_as.scale * bound) + 1
    assert clients * units <= (1 << (bits - 1)) - 1 < clients * (units + 1) + clients


@given(st.integers(1, 60))
def test_whole_units_are_kept_exactly(size):
    """What is already on the lattice is not moved by rounding, however its dice fall."""
    plain = Encoding(size=size, bits=21, scale=8.0, bound_l2=1000.0, clients=10)
    plain.check()
    vector = np.arange(plain.size) / 8.0
    update = ClippedUpdate(vector=vector, bound_l2=1000.0)
    words = plain.encode(update, weight=1, rounding=Ones(), noise=stream()).words
    assert (plain.decode(words).vector == vector).all()


# -- noise -----------------------------------------------------------------------------------------------------------


@st.composite
def noised_encodings(draw):
    """An encoding with noise that fits."""
    return noised_encoding(
        size=draw(st.integers(1, 2000)),
        bits=draw(st.sampled_from([21, 32])),
        bound_l2=draw(st.floats(1e-3, 1e3)),
        clients=draw(st.integers(3, 100)),
        noise_multiplier=draw(st.floats(0.1, 8.0)),
        honest=draw(st.integers(2, 3)),
        rotation=draw(SEEDS),
    )


@given(noised_encodings(), st.integers(0, 2**32), st.booleans())
def test_the_norm_bound_of_rounding_is_never_exceeded(encoded_as, seed, unlucky):
    """Also for the stream that rounds everything up, where the last resort is towards zero."""
    _, bound = encoded_as.sensitivity
    vector = np.random.default_rng(seed).normal(size=encoded_as.size)
    vector *= encoded_as.scale * encoded_as.bound_l2 / np.linalg.norm(vector) * (1 - 1e-12)
    values = _rounded_within(vector, 1.0, bound, Ones() if unlucky else stream(seed))
    assert math.sqrt(sum(int(value) ** 2 for value in values)) <= bound
    assert (np.abs(values - vector) < 1).all()


def test_rounding_up_everything_is_beyond_the_bound_and_so_refused():
    """The last resort is not idle: without it the bound would be exceeded here."""
    scaled = np.full(10_000, 0.001)
    assert np.linalg.norm(_rounded(scaled, 1.0, Ones())) == 100.0
    assert not _rounded_within(scaled, 1.0, 60.0, Ones()).any()


@given(st.integers(1, 600), SEEDS, st.floats(0.25, 40.0), st.integers(0, 2**32))
def test_the_integers_that_leave_a_client_are_within_the_sensitivity_but_for_the_noise(size, seed, scale, drawn):
    encoded_as = Encoding(
        size=size, bits=21, scale=scale, bound_l2=1.0, clients=5, noise_variance=LEAST_VARIANCE, rotation=seed
    )
    encoded_as.check()
    vector = np.random.default_rng(drawn).normal(size=size)
    update = clip(Update(vector * 1e3), 1.0)
    encoded = encoded_as.encode(update, weight=1, rounding=stream(drawn), noise=stream(drawn + 1))
    values = unpack(encoded.words, size, 21).astype(np.float64)  # the noise is zero but once in 2^64 numbers
    l1, l2 = encoded_as.sensitivity
    assert np.linalg.norm(values) <= l2
    assert np.abs(values).sum() <= l1


@given(noised_encodings(), st.integers(1, 3), st.integers(0, 2**32))
@settings(max_examples=30)
def test_a_noised_sum_is_right_within_its_noise(encoded_as, clients, seed):
    encoded_as.check()
    random = np.random.default_rng(seed)
    words, exact = np.zeros(encoded_as.words, dtype=np.uint64), np.zeros(encoded_as.size)
    for client in range(clients):
        update = clip(Update(random.normal(size=encoded_as.size)), encoded_as.bound_l2)
        exact += update.vector
        keys = [stream(seed + (1 + 2 * client + which << 40)) for which in range(2)]
        words += encoded_as.encode(update, weight=1, rounding=keys[0], noise=keys[1]).words
    found = encoded_as.decode(words)
    assert found.weight is found.clipped is None
    spread = math.sqrt(clients * (encoded_as.noise_variance + 0.25)) / encoded_as.scale
    error = np.linalg.norm(found.vector - exact) / spread / math.sqrt(encoded_as.size)
    assert error <= 1 + 9 / math.sqrt(encoded_as.size)


@given(
    st.integers(1, 10**9),
    st.sampled_from(BITS),
    st.integers(3, 5000),
    st.floats(0.01, 20.0),
    st.floats(1e-6, 1e6),
    st.data(),
)
def test_a_noised_encoding_fits_and_has_the_noise_that_was_asked_for(size, bits, clients, multiplier, bound, data):
    honest = data.draw(st.integers(2, clients))
    try:
        encoded_as = noised_encoding(
            size=size,
            bits=bits,
            bound_l2=bound,
            clients=clients,
            noise_multiplier=multiplier,
            honest=honest,
            rotation=bytes(32),
        )
    except PolicyViolationError:
        assume(False)
    encoded_as.check()
    _, sensitivity_l2 = encoded_as.sensitivity
    assert math.sqrt(honest * encoded_as.noise_variance) >= multiplier * sensitivity_l2 * (1 - 1e-12)


def test_a_rotated_sum_at_its_bound_does_not_overflow():
    """All clients have the same update at the bound, in one coordinate: what a rotation spreads least evenly."""
    for size in (1, 5, 1000, 20_000):
        encoded_as = noised_encoding(
            size=size, bits=21, bound_l2=1.0, clients=20, noise_multiplier=0.1, honest=10, rotation=bytes(range(32))
        )
        update = ClippedUpdate(vector=np.eye(1, size, size // 2)[0], bound_l2=1.0)
        words = np.zeros(encoded_as.words, dtype=np.uint64)
        for client in range(20):
            keys = stream(2 * client), stream(2 * client + 1)
            words += encoded_as.encode(update, weight=1, rounding=keys[0], noise=keys[1]).words
        error = encoded_as.decode(words).vector - 20 * update.vector
        assert np.abs(error).max() < 8 * math.sqrt(20 * (encoded_as.noise_variance + 0.25)) / encoded_as.scale


# -- types -----------------------------------------------------------------------------------------------------------


def test_only_a_clipped_update_is_encoded_and_only_an_encoded_one_is_masked():
    encoded_as = encoding()
    chance = {"rounding": stream(), "noise": stream()}
    for wrong in (Update.of([0.1] * 8), np.zeros(8), [0.0] * 8, None):
        with pytest.raises(TypeError, match="only a ClippedUpdate can be encoded"):
            encoded_as.encode(wrong, weight=1, **chance)
    cohort = Cohort(offer())
    message = cohort.until("mask")[0]
    cohort.sessions[0].accept_shares(message)
    for wrong in (clip(Update.of([0.1] * 8), 1.0), cohort.updates[0].words, None):
        with pytest.raises(TypeError, match="only an EncodedUpdate can be masked"):
            cohort.sessions[0].mask(wrong)
    assert cohort.sessions[0].stage == "ready"  # nothing came from outside


def test_an_update_that_does_not_fit_its_encoding():
    encoded_as = plain_encoding(size=8, bits=21, bound_l2=1.0, clients=5, most_weight=4)
    chance = {"rounding": stream(), "noise": stream()}
    with pytest.raises(VectorLengthError):
        encoded_as.encode(clip(Update(np.ones(9)), 1.0), weight=1, **chance)
    for bound, weight in ((1.0001, 1), (1.0, 0), (1.0, 5), (1.0, -1)):
        with pytest.raises(PolicyViolationError):
            encoded_as.encode(clip(Update(np.ones(8)), bound), weight=weight, **chance)
    encoded_as.encode(clip(Update(np.ones(8)), 0.5), weight=4, **chance)  # a lower bound is within the higher


def test_an_encoded_update_is_never_written_to():
    made = encoding().encode(clip(Update(np.ones(8)), 1.0), weight=1, rounding=stream(), noise=stream())
    assert isinstance(made, EncodedUpdate)
    with pytest.raises(ValueError, match="read-only"):
        made.words[0] = 0


@given(st.dictionaries(st.integers(0, 4), st.sampled_from(["share", "mask"]), max_size=1))
@settings(max_examples=10)
def test_masking_changes_no_update_and_the_transcript_names_what_was_agreed(lost: Mapping[int, str]):
    cohort = Cohort(offer(), lost=lost)
    before = [update.words.copy() for update in cohort.updates]
    total = cohort.run()
    assert all((update.words == kept).all() for update, kept in zip(cohort.updates, before, strict=True))
    assert len(total.transcript) == 32
    assert len(total.signature) == 64
