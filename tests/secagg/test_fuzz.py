"""Every message, mangled in every way, to both sides: what comes back is an error of the tree, or nothing at all."""

from __future__ import annotations

import contextlib
import random
import struct
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import pytest
from cohort import NOW_S, Cohort, encoding, offer
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlearn.privacy.clipping import Update, clip
from fedlearn.privacy.noise import Keystream
from fedlearn.secagg.client import ClientSession
from fedlearn.secagg.encoding import Encoding
from fedlearn.secagg.errors import MalformedMessageError, SecaggError
from fedlearn.secagg.messages import (
    Advertisement,
    Consistent,
    Deliver,
    MaskedInput,
    Offer,
    Roster,
    ShareKeys,
    Signatures,
    Survivors,
    Unmask,
)
from fedlearn.secagg.vault import MemoryVault

VICTIM = 1
CLIENTS = 4
TO_CLIENT = ["offer", "roster", "deliver", "survivors", "signatures"]
TO_SERVER = ["advertise", "share", "mask", "consistent", "unmask"]
HARMLESS = {"survivors", "unmask"}
"""Legs of which a changed bit can make another message in good form: another list, another share."""


@dataclass
class Leg:
    """A message that is due, and how to hand it, or another in its place, to who waits for it."""

    name: str
    message: bytes
    cohort: Cohort
    state: bytes = b""

    def give(self, message: bytes) -> bool:
        """Return whether it was accepted; an error of the tree is a refusal, and any other goes on."""
        try:
            if self.name in TO_SERVER:
                self._to_server(message)
            elif self.name == "offer":
                begin(self.cohort, message)
            else:
                self._to_client(message)
        except SecaggError as error:
            assert type(error) is not SecaggError
            return False
        return True

    def _to_client(self, message: bytes) -> None:
        session = ClientSession.from_bytes(self.state, identity=self.cohort.keys[VICTIM])
        try:
            if self.name == "roster":
                session.share_keys(message, allow_list=self.cohort.allow_list)
            elif self.name == "deliver":
                session.accept_shares(message)
            elif self.name == "survivors":
                session.confirm(message)
            else:
                session.unmask(message)
        except SecaggError:
            assert session.stage == "ended"
            assert not session._secrets.held
            assert session._secrets.seed == session._secrets.mask == session._secrets.encryption == b""
            raise

    def _to_server(self, message: bytes) -> None:
        server = self.cohort.server
        before = server.to_bytes()
        try:
            server.receive(VICTIM, message)
        except SecaggError:
            assert server.to_bytes() == before
            raise
        if self.name == "unmask":  # the only one that is accepted altered: let the next example come, too
            server._members[server._index_of[VICTIM]].shares = None


def begin(cohort: Cohort, message: bytes) -> None:
    """Answer an offer with a vault that has seen none."""
    ClientSession.begin(
        message,
        identity=cohort.keys[VICTIM],
        allow_list=cohort.allow_list,
        server_key=cohort.server_key.public,
        policy=cohort.policy,
        vault=MemoryVault(),
        now_s=NOW_S,
    )


@lru_cache(maxsize=1)
def legs() -> dict[str, Leg]:
    """Return every leg of a session of four, one of whom is lost on the way."""
    found = {}
    for phase, to_client, to_server in zip(
        ("advertise", "share", "mask", "consistent", "unmask"), TO_CLIENT, TO_SERVER, strict=True
    ):
        made = offer(CLIENTS, encoding=encoding(size=5, clients=CLIENTS), colluding=0.0)
        cohort = Cohort(made, lost={3: "mask"})
        outgoing = cohort.until(phase)
        state = b"" if phase == "advertise" else cohort.sessions[VICTIM].to_bytes()
        found[to_client] = Leg(to_client, outgoing[VICTIM], cohort, state)
        answer = cohort.answer(phase, VICTIM, outgoing[VICTIM])
        found[to_server] = Leg(to_server, answer, cohort)
    return found


LEGS = TO_CLIENT + TO_SERVER


@pytest.mark.parametrize("name", LEGS)
def test_a_message_that_ends_too_early_or_too_late(name):
    leg = legs()[name]
    for size in range(len(leg.message)):
        assert not leg.give(leg.message[:size])
    for more in (b"\0", b"\xff", bytes(100), leg.message):
        assert not leg.give(leg.message + more)


@pytest.mark.parametrize("name", LEGS)
def test_a_message_with_a_flipped_bit(name):
    """Every byte has one of its bits flipped, every header all of them."""
    leg, dice = legs()[name], random.Random(0)
    accepted = 0
    for at in range(len(leg.message)):
        for bit in range(8) if at < 60 else [dice.randrange(8)]:
            changed = bytearray(leg.message)
            changed[at] ^= 1 << bit
            accepted += leg.give(bytes(changed))
    assert not accepted or name in HARMLESS


@pytest.mark.parametrize("name", LEGS)
def test_the_message_of_another_leg(name):
    leg = legs()[name]
    for other in LEGS:
        if other != name:
            assert not leg.give(legs()[other].message)
            renamed = leg.message[:6] + legs()[other].message[6:]
            assert not leg.give(renamed)


@pytest.mark.parametrize("name", LEGS)
def test_what_is_no_bytes(name):
    leg = legs()[name]
    for wrong in (None, "", 0, [], bytearray(leg.message), memoryview(leg.message)):
        assert not leg.give(wrong)


@given(st.data())
@settings(max_examples=300)
def test_random_bytes_in_place_of_any_message(data):
    leg = legs()[data.draw(st.sampled_from(LEGS))]
    body = data.draw(st.binary(max_size=400))
    if data.draw(st.booleans()):
        body = leg.message[: data.draw(st.integers(6, 30))] + body
    assert body == leg.message or not leg.give(body) or leg.name in HARMLESS


@given(st.data())
@settings(max_examples=300)
def test_any_message_with_some_bytes_replaced_removed_or_put_in(data):
    leg = legs()[data.draw(st.sampled_from(LEGS))]
    start = data.draw(st.integers(0, len(leg.message)))
    end = data.draw(st.integers(start, min(len(leg.message), start + 40)))
    body = leg.message[:start] + data.draw(st.binary(max_size=40)) + leg.message[end:]
    assert body == leg.message or not leg.give(body) or leg.name in HARMLESS


LISTS = {"share": (132 + 4, 4 + 82), "deliver": (4 + 1 + 4, 132 + 82)}
LISTS |= {"signatures": (4, 4 + 64), "unmask": (4, 4 + 33)}
"""Where the entries of a leg's list begin after its magic, and how long each is."""


@pytest.mark.parametrize("name", LISTS)
def test_a_list_out_of_order_or_with_an_entry_twice(name):
    message, (before, size) = legs()[name].message, LISTS[name]
    start = 6 + before
    head, first, second = message[:start], message[start : start + size], message[start + size : start + 2 * size]
    rest = message[start + 2 * size :]
    assert first < second
    READERS[name](head + first + second + rest)
    for entries in (second + first, first + first, second + second):
        with pytest.raises(MalformedMessageError):
            READERS[name](head + entries + rest)


# -- memory ----------------------------------------------------------------------------------------------------------

READERS = {
    "offer": Offer.read,
    "advertise": Advertisement.read,
    "roster": Roster.read,
    "share": ShareKeys.read,
    "deliver": Deliver.read,
    "mask": lambda data: MaskedInput.read(data, words=2),
    "survivors": Survivors.read,
    "consistent": Consistent.read,
    "signatures": Signatures.read,
    "unmask": Unmask.read,
}


def huge_counts(message: bytes) -> Iterator[bytes]:
    """Yield a message with large numbers at every place where a number of four or eight bytes may be."""
    for at in range(6, min(len(message), 220)):
        for size in (4, 8):
            for number in (1 << 20, 1 << 24, 1 << 31, (1 << 8 * size) - 1):
                if number < 1 << 8 * size:
                    yield message[:at] + number.to_bytes(size, "big") + message[at + size :]


@pytest.mark.parametrize("name", LEGS)
def test_no_memory_is_taken_for_what_a_message_only_claims_to_have(name):
    message = legs()[name].message
    tracemalloc.start()
    try:
        for changed in huge_counts(message):
            with contextlib.suppress(SecaggError):
                READERS[name](changed)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize("name", [name for name in LEGS if name != "mask"])
def test_a_message_that_is_too_long_is_refused_unread(name):
    with pytest.raises(MalformedMessageError, match="at most"):
        READERS[name](bytes((1 << 24) + 1))


def test_a_bitmap_names_no_more_clients_than_it_has_bits_for():
    for reader, kind in ((Survivors.read, 6), (Deliver.read, 4)):
        with pytest.raises(MalformedMessageError):
            reader(b"FLSA\x01" + bytes([kind]) + (1 << 20).to_bytes(4, "big") + bytes(100))


# -- offers that a lying server signs --------------------------------------------------------------------------------

FLOATS = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False),
    st.floats(0, 2),
    st.sampled_from([0.0, -0.0, 5e-324, 1e-300, 1e-160, 1e160, 1.7e308, 1 / 3, 0.5, 1.0]),
)


def counts(size: int) -> st.SearchStrategy[int]:
    """Return numbers of so many bytes, small ones and the largest more often."""
    return st.one_of(st.integers(0, 200), st.integers(0, 256**size - 1), st.just(256**size - 1))


@st.composite
def encodings(draw):
    """Any encoding that can be written down."""
    return Encoding(
        size=draw(counts(8)),
        bits=draw(st.one_of(st.sampled_from([16, 21, 32]), counts(1))),
        scale=draw(FLOATS),
        bound_l2=draw(FLOATS),
        clients=draw(counts(4)),
        most_weight=draw(counts(4)),
        counts_clipped=draw(st.booleans()),
        noise_variance=draw(st.one_of(st.just(0.0), FLOATS)),
        rotation=draw(st.one_of(st.just(b""), st.just(bytes(32)), st.binary(max_size=32))),
    )


@given(
    encodings(),
    st.fixed_dictionaries(
        {},
        optional={
            "suite": counts(1),
            "task": st.text(max_size=20),
            "round_number": counts(4),
            "attempt": counts(4),
            "mode": st.sampled_from(["active", "semi-honest"]),
            "colluding": FLOATS,
            "dropping": FLOATS,
            "cohort": st.integers(0, 1 << 20),
            "least_cohort": st.integers(0, 1 << 20),
            "least_survivors": st.integers(0, 1 << 20),
            "deadline_s": counts(8),
        },
    ),
    st.booleans(),
)
@settings(max_examples=150)
def test_a_signed_offer_with_any_numbers_in_it(encoded_as, changes, whole):
    leg = legs()["offer"]
    made = replace(leg.cohort.offered, **changes)
    if whole:
        made = replace(made, encoding=encoded_as)
    signed = made.signed(leg.cohort.server_key)
    assert Offer.read(signed.message()) == signed
    if leg.give(signed.message()) and made.encoding.size < 500:  # what a client accepts it can also do
        vector = np.full(made.encoding.size, made.encoding.bound_l2 / made.encoding.size)
        update = clip(Update(vector), made.encoding.bound_l2)
        stream = Keystream(bytes(32))
        made.encoding.encode(update, weight=made.encoding.most_weight, rounding=stream, noise=stream)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_none(number):
    leg = legs()["offer"]
    for made in (
        replace(leg.cohort.offered, colluding=number),
        replace(leg.cohort.offered, encoding=replace(leg.cohort.offered.encoding, scale=number)),
    ):
        with pytest.raises(MalformedMessageError):
            Offer.read(made.signed(leg.cohort.server_key).message())
    assert struct.pack(">d", number)


def test_a_name_that_is_no_text():
    leg = legs()["offer"]
    at = leg.message.index(b"digits")
    with pytest.raises(MalformedMessageError):
        Offer.read(leg.message[:at] + b"\xff" + leg.message[at + 1 :])


# -- signed rosters and shares of colluders --------------------------------------------------------------------------


@given(st.integers(0, 255), st.integers(0, 255), st.booleans())
@settings(max_examples=50)
def test_a_roster_with_any_counts(degree, threshold, without_one):
    leg = legs()["roster"]
    parsed = Roster.read(leg.message)
    entries = parsed.entries[without_one:]
    changed = replace(parsed, degree=degree, threshold=threshold, entries=entries)
    same = (degree, threshold, without_one) == (parsed.degree, parsed.threshold, False)
    assert leg.give(changed.message()) == same


@given(st.sets(st.integers(0, 30), max_size=12), st.integers(0, 40))
@settings(max_examples=100)
def test_any_list_of_survivors(survivors, clients):
    leg = legs()["survivors"]
    kept = sorted(each for each in survivors if each < clients)
    accepted = leg.give(Survivors(clients=clients, survivors=kept).message())
    parsed = Survivors.read(leg.message)
    assert not accepted or (clients == CLIENTS and set(kept) <= {*parsed.survivors, *range(CLIENTS)})


@given(st.dictionaries(st.integers(0, 2**32 - 1), st.binary(min_size=33, max_size=33), max_size=6))
@settings(max_examples=60)
def test_any_shares(shares):
    legs()["unmask"].give(Unmask(shares=shares).message())


@given(st.dictionaries(st.integers(0, 2**32 - 1), st.binary(min_size=64, max_size=64), max_size=6))
@settings(max_examples=60)
def test_any_signatures(signatures):
    assert not legs()["signatures"].give(Signatures(signatures=signatures).message())


def test_what_is_fuzzed_is_what_is_due():
    """The messages themselves are accepted, or nothing above would say much."""
    assert set(READERS) == set(LEGS) == set(legs())
    for leg in legs.__wrapped__().values():
        assert leg.give(leg.message)
