"""Lies about who takes part: each refused with an error of its own, after which the client keeps no secret."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest
from attacks import VICTIM, advertised, not_taken, place, refused
from cohort import RANDOM, Cohort, encoding, offer

from fedlearn.secagg.derivation import roster_hash
from fedlearn.secagg.errors import (
    BadAdvertisementError,
    CohortTooSmallError,
    DuplicateDeviceError,
    DuplicateKeyError,
    GraphError,
    ParamsMismatchError,
    RosterTamperedError,
    RoundAbortedError,
    StageError,
    UnknownDeviceError,
)
from fedlearn.secagg.graph import graph_of
from fedlearn.secagg.keys import AgreementKey, SigningKey
from fedlearn.secagg.messages import Advertisement, Roster
from fedlearn.secagg.topology import Topology

# -- leg 1: advertisements -------------------------------------------------------------------------------------------


def test_advertisements_that_the_server_refuses():
    cohort = Cohort(offer())
    cohort.server.begin(range(5))
    first = cohort.begin(0, cohort.server.offer.message())
    cohort.server.receive(0, first)
    its = Advertisement.read(first)
    one, stranger = cohort.keys[1], SigningKey.generate(RANDOM)
    fair = advertised(cohort, one)
    not_taken(cohort, 0, first, StageError)
    not_taken(cohort, 9, fair.message(), StageError)  # nobody invited that address
    not_taken(cohort, 1, advertised(cohort, stranger).message(), UnknownDeviceError)
    not_taken(cohort, 1, replace(fair, device=stranger.public).message(), UnknownDeviceError)
    not_taken(cohort, 1, replace(fair, device=cohort.keys[2].public).message(), BadAdvertisementError)
    not_taken(cohort, 1, replace(fair, nonce=bytes([1]) * 32).message(), BadAdvertisementError)
    not_taken(cohort, 1, advertised(cohort, one, offer_hash=bytes(32)).message(), ParamsMismatchError)
    for small in ({"mask_key": bytes(32)}, {"encryption_key": bytes(32)}):  # its neighbours could not go on with it
        not_taken(cohort, 1, advertised(cohort, one, **small).message(), BadAdvertisementError)
    not_taken(cohort, 1, first, DuplicateDeviceError)
    for copied in (its.encryption_key, its.mask_key):
        not_taken(cohort, 1, advertised(cohort, one, mask_key=copied).message(), DuplicateKeyError)
        not_taken(cohort, 1, advertised(cohort, one, encryption_key=copied).message(), DuplicateKeyError)
        not_taken(
            cohort, 1, advertised(cohort, one, encryption_key=copied, mask_key=copied).message(), DuplicateKeyError
        )
    cohort.server.receive(1, fair.message())


def test_a_cohort_that_is_too_small():
    cohort = Cohort(offer(least_cohort=4), lost={0: "advertise", 1: "advertise"})
    with pytest.raises(RoundAbortedError) as caught:
        cohort.run()
    assert caught.value.phase == "advertise"
    assert caught.value.counts == {"invited": 5, "advertised": 3, "needed": 4}


# -- leg 2: the roster -----------------------------------------------------------------------------------------------


def roster_of(entries: Iterable[Advertisement], degree: int | None = None, threshold: int | None = None) -> bytes:
    """Return the whole roster of these entries in the order they have, consistent in itself."""
    listed = list(entries)
    clients = len(listed)
    return Roster(
        degree=clients - 1 if degree is None else degree,
        threshold=2 * clients // 3 + 1 if threshold is None else threshold,
        entries=listed,
    ).message()


def in_order(entries: Iterable[Advertisement]) -> list[Advertisement]:
    """Return entries by device."""
    return sorted(entries, key=lambda entry: entry.device)


def entries_of(cohort: Cohort) -> list[Advertisement]:
    """Run up to the roster and return its entries."""
    return list(Roster.read(cohort.until("share")[VICTIM]).entries)


def another(cohort: Cohort, entries: list[Advertisement]) -> int:
    """Return the place of an entry that is not the victim's."""
    return next(at for at, entry in enumerate(entries) if entry.device != cohort.keys[VICTIM].public)


def colluder(cohort: Cohort, entry: Advertisement) -> SigningKey:
    """Return the key of the device of an entry."""
    return next(key for key in cohort.keys if key.public == entry.device)


@pytest.mark.parametrize("field", ["mask_key", "encryption_key", "nonce"])
def test_a_key_that_the_server_substitutes(field):
    cohort = Cohort(offer())
    entries = entries_of(cohort)
    at = another(cohort, entries)
    entries[at] = replace(entries[at], **{field: AgreementKey(RANDOM.token_bytes(32)).public})
    refused(cohort, "share", roster_of(entries), BadAdvertisementError)


def test_a_sybil():
    """The server makes devices up, whose signatures are all right."""
    cohort = Cohort(offer(cohort=6, encoding=encoding(clients=6)), lost={5: "advertise"})
    entries = entries_of(cohort)
    sybil = advertised(cohort, SigningKey.generate(RANDOM))
    refused(cohort, "share", roster_of(in_order([*entries, sybil])), UnknownDeviceError)


def test_one_device_twice():
    cohort = Cohort(offer(cohort=6, encoding=encoding(clients=6)), lost={5: "advertise"})
    entries = entries_of(cohort)
    at = another(cohort, entries)
    again = advertised(cohort, colluder(cohort, entries[at]))  # with other keys
    refused(cohort, "share", roster_of(in_order([*entries, again])), DuplicateDeviceError)
    for client in range(5):
        if client != VICTIM:
            place_of = next(i for i, entry in enumerate(entries) if entry.device != cohort.keys[client].public)
            copied = roster_of(in_order([*entries, entries[place_of]]))  # the very same entry
            refused(cohort, "share", copied, DuplicateDeviceError, client)


def test_entries_out_of_order():
    cohort = Cohort(offer())
    refused(cohort, "share", roster_of(entries_of(cohort)[::-1]), DuplicateDeviceError)


@pytest.mark.parametrize("fields", [("mask_key", "mask_key"), ("encryption_key", "mask_key")])
def test_one_key_twice(fields):
    """Two colluding devices make their masks the same, so that one cancels the other's."""
    cohort = Cohort(offer())
    entries = entries_of(cohort)
    one, two = [at for at, entry in enumerate(entries) if entry.device != cohort.keys[VICTIM].public][:2]
    copied = {fields[1]: getattr(entries[one], fields[0])}
    entries[two] = advertised(cohort, colluder(cohort, entries[two]), **copied)
    refused(cohort, "share", roster_of(entries), DuplicateKeyError)


def test_one_key_for_two_purposes():
    cohort = Cohort(offer())
    entries = entries_of(cohort)
    at = another(cohort, entries)
    copied = {"encryption_key": entries[at].mask_key, "mask_key": entries[at].mask_key}
    entries[at] = advertised(cohort, colluder(cohort, entries[at]), **copied)
    refused(cohort, "share", roster_of(entries), DuplicateKeyError)


def test_the_victims_own_key_as_anothers():
    cohort = Cohort(offer())
    entries = entries_of(cohort)
    own = next(entry for entry in entries if entry.device == cohort.keys[VICTIM].public)
    at = another(cohort, entries)
    entries[at] = advertised(cohort, colluder(cohort, entries[at]), mask_key=own.mask_key)
    refused(cohort, "share", roster_of(entries), DuplicateKeyError)


@pytest.mark.parametrize("field", ["encryption_key", "mask_key"])
def test_a_key_of_small_order(field):
    """A colluder's key with which every shared secret is zero: its neighbours notice when they agree on one."""
    cohort = Cohort(offer())
    cohort.server.begin(range(5))
    for client in range(5):
        cohort.server.receive(client, cohort.begin(client, cohort.server.offer.message()))
    lie = replace(cohort.server._advertised[0], **{field: bytes(32)}).signed(cohort.keys[0])
    cohort.server._advertised[0], cohort.sessions[0]._own = lie, lie.entry
    outgoing = cohort.server.advance()
    if field == "encryption_key":
        refused(cohort, "share", outgoing[VICTIM], BadAdvertisementError)
        return
    cohort.exchange(outgoing)
    refused(cohort, "mask", cohort.server.advance()[VICTIM], BadAdvertisementError)


@pytest.mark.parametrize("how", ["missing", "keys", "nonce", "twice"])
def test_the_clients_own_entry_is_not_what_it_sent(how):
    cohort = Cohort(offer(cohort=6, encoding=encoding(clients=6)), lost={5: "advertise"})
    entries = entries_of(cohort)
    own = place(cohort, VICTIM)
    if how == "missing":
        del entries[own]
    elif how == "keys":
        entries[own] = replace(entries[own], mask_key=entries[own].encryption_key)
    elif how == "nonce":  # signed anew by the victim's own, stolen key
        entries[own] = replace(entries[own], nonce=bytes(32)).signed(cohort.keys[VICTIM])
    else:
        entries.insert(own, entries[own])
    refused(cohort, "share", roster_of(entries), RosterTamperedError)


def test_a_roster_below_the_least_cohort_or_above_the_cohort():
    cohort = Cohort(offer(least_cohort=4))
    entries = entries_of(cohort)
    own = place(cohort, VICTIM)
    kept = [entry for at, entry in enumerate(entries) if at == own or at < 2][:3]
    refused(cohort, "share", roster_of(kept), CohortTooSmallError)
    more = in_order([*entries, advertised(cohort, SigningKey.generate(RANDOM))])
    refused(cohort, "share", roster_of(more), CohortTooSmallError, client=3)


@pytest.mark.parametrize(("degree", "threshold"), [(4, 3), (4, 1), (4, 5), (2, 4), (2, 2), (0, 4)])
def test_a_lower_threshold_or_another_graph(degree, threshold):
    cohort = Cohort(offer())
    entries = entries_of(cohort)
    refused(cohort, "share", roster_of(entries, degree=degree, threshold=threshold), GraphError)


def test_devices_with_many_seats_are_seen_by_everybody_however_they_are_placed(sparse_from_nine):
    """In blocks, each in order by itself, few clients would see it if they were told of their neighbours alone."""
    cohort = Cohort(offer(40, colluding=0.1, dropping=0.1, least_survivors=36, encoding=encoding(clients=40)))
    cohort.lost = dict.fromkeys(range(8), "advertise")
    cohort.exchange(cohort.server.begin(range(40)))
    friends = in_order(cohort.server._advertised[each] for each in range(36, 40))
    again = [advertised(cohort, colluder(cohort, each)) for each in friends]
    honest = in_order(cohort.server._advertised[each] for each in range(8, 36))
    entries = [*honest[:10], *friends, *again, *honest[10:]]
    graph = graph_of(len(entries), corrupt=4, dropped=len(entries) // 10, active=True)
    assert graph.k < len(entries) - 1
    for client in range(8, 36):
        with pytest.raises(DuplicateDeviceError):
            message = roster_of(entries, graph.k, graph.threshold)
            cohort.sessions[client].share_keys(message, allow_list=cohort.allow_list)


@pytest.mark.parametrize("how", ["offer", "device", "key"])
def test_lies_about_those_that_are_no_neighbours(how, sparse_from_nine):
    """Their keys are not used, but they count."""
    cohort = Cohort(offer(24, colluding=0.0, dropping=0.1, least_survivors=22, encoding=encoding(clients=24)))
    honest = Roster.read(cohort.until("share")[VICTIM])
    key, error = cohort.keys[5], ParamsMismatchError
    changes = {"offer_hash": bytes(32)}
    if how == "device":
        key, error, changes = SigningKey.generate(RANDOM), UnknownDeviceError, {}
    elif how == "key":
        error, changes = DuplicateKeyError, {"mask_key": honest.entries[place(cohort, 7)].mask_key}
    others = [entry for at, entry in enumerate(honest.entries) if at != place(cohort, 5)]
    while True:  # the roster makes the graph: until the liar is no neighbour in it
        entries = in_order([*others, advertised(cohort, key, **changes, nonce=RANDOM.token_bytes(32))])
        liar, own = (
            next(at for at, e in enumerate(entries) if e.device == each) for each in (key.public, device(cohort))
        )
        topology = Topology.of(cohort.offered, 24, roster_hash(cohort.server.offer.hash, entries))
        if liar not in topology.neighbours(own):
            break
    refused(cohort, "share", roster_of(entries, honest.degree, honest.threshold), error)


def device(cohort: Cohort) -> bytes:
    """Return who the victim is."""
    return cohort.keys[VICTIM].public
