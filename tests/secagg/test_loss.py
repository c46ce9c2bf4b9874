"""Clients that vanish in any phase, and a server that dies between any two: the sum is exact, or there is none."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations

import numpy as np
import pytest
from cohort import Cohort, encoding, offer

from fedlearn.secagg.errors import RoundAbortedError, StageError
from fedlearn.secagg.keys import SigningKey, tagged_hash, verify
from fedlearn.secagg.server import PHASES, ServerSession, UnmaskedSum

CLIENTS = 7
TOLERATED = 2
"""Five of seven rebuild a secret."""

MODES = ("active", "semi-honest")
LEGS = [(mode, phase) for mode in MODES for phase in PHASES if mode == "active" or phase != "consistent"]


def seven(mode: str, lost: Iterable[int] = (), phase: str = "mask", **changes: object) -> Cohort:
    """Return a cohort of seven, some of whom vanish in a phase."""
    made = offer(CLIENTS, mode=mode, encoding=encoding(clients=CLIENTS), least_cohort=5, **changes)
    return Cohort(made, lost=dict.fromkeys(lost, phase))


def assert_exact(cohort: Cohort, total: UnmaskedSum, survivors: Iterable[int]) -> None:
    """The sum is that of just these clients."""
    assert set(total.survivors) == set(survivors)
    assert (total.words == cohort.expected(total.survivors)).all()
    assert not total.complaints
    assert verify(cohort.server_key.public, total.signature, tagged_hash("transcript-signature", total.transcript))


def survivors_of(cohort: Cohort) -> set[int]:
    """Return whose vectors come in."""
    early = ("advertise", "share", "mask")
    return {client for client in range(cohort.offered.cohort) if cohort.lost.get(client) not in early}


# -- clients ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "phase"), LEGS)
@pytest.mark.parametrize("lost", [(), (0,), (3,), (0, 6), (2, 4)])
def test_as_many_as_tolerated_are_lost_in_any_phase(mode, phase, lost):
    cohort = seven(mode, lost, phase)
    assert_exact(cohort, cohort.run(), survivors_of(cohort))


@pytest.mark.parametrize(("mode", "phase"), LEGS)
def test_one_more_and_there_is_no_sum(mode, phase):
    cohort = seven(mode, range(TOLERATED + 1), phase)
    with pytest.raises(RoundAbortedError) as caught:
        cohort.run()
    names = {"advertise": "advertised", "share": "shared", "mask": "masked", "consistent": "confirmed"}
    left, counts = CLIENTS - TOLERATED - 1, caught.value.counts
    assert caught.value.phase == phase
    assert counts.pop("needed") == left + 1
    assert counts.pop({**names, "unmask": "unmasked"}[phase]) == left
    assert set(counts.values()) == {CLIENTS}
    assert cohort.server.phase == "aborted"
    assert not cohort.server._total.size
    assert all(member.shares is None and not member.ciphertexts for member in cohort.server._members)
    for refused in (cohort.server.advance, cohort.server.finish):
        with pytest.raises(StageError):
            refused()
    with pytest.raises(StageError):
        cohort.server.receive(4, b"")


@pytest.mark.parametrize(
    ("mode", "first", "second"),
    [(mode, *both) for mode in MODES for both in combinations([phase for at, phase in LEGS if at == mode], 2)],
)
def test_two_are_lost_in_two_phases(mode, first, second):
    cohort = seven(mode)
    cohort.lost = {1: first, 5: second}
    assert_exact(cohort, cohort.run(), survivors_of(cohort))


def test_a_client_that_was_refused_is_lost_and_nothing_more():
    """In each phase another client sends rubbish."""
    rubbish = {"from-advertise": 0, "from-mask": 1}
    cohort = seven("active")
    cohort.tamper = lambda leg, client, message: b"rubbish" if rubbish.get(leg) == client else message
    assert_exact(cohort, cohort.run(), range(2, CLIENTS))
    assert set(cohort.server_errors) == {0, 1}


def test_least_survivors_above_the_threshold():
    cohort = seven("active", [0], "mask", least_survivors=7)
    with pytest.raises(RoundAbortedError) as caught:
        cohort.run()
    assert (caught.value.phase, caught.value.counts["needed"], caught.value.counts["masked"]) == ("mask", 7, 6)


def test_what_an_abort_says():
    cohort = seven("active", range(3), "mask")
    with pytest.raises(RoundAbortedError, match="aborted in mask: 4 clients are left, and 5 must send their vectors"):
        cohort.run()


# -- sparse graphs ---------------------------------------------------------------------------------------------------


def sparse(mode: str, lost: dict[int, str], n: int = 24, dropping: float = 0.1, **changes: object) -> Cohort:
    """Return a cohort with a sparse graph."""
    made = offer(n, mode=mode, dropping=dropping, least_survivors=n // 2, encoding=encoding(clients=n), **changes)
    return Cohort(made, lost=lost)


@pytest.mark.parametrize(("mode", "phase"), [each for each in LEGS if each[1] != "advertise"])
def test_two_of_24_on_a_sparse_graph(mode, phase, sparse_from_nine):
    cohort = sparse(mode, dict.fromkeys((3, 17), phase), colluding=0.0)
    total = cohort.run()
    assert not cohort.server.topology.graph.complete
    assert_exact(cohort, total, survivors_of(cohort))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("phase", ["share", "mask"])
def test_three_of_24_are_more_than_the_graph_was_made_for(mode, phase, sparse_from_nine):
    cohort = sparse(mode, dict.fromkeys(range(3), phase), colluding=0.0)
    with pytest.raises(RoundAbortedError) as caught:
        cohort.run()
    assert (caught.value.phase, caught.value.counts["needed"]) == (phase, 22)


def test_too_many_of_one_clients_neighbours_do_not_answer(sparse_from_nine):
    cohort = sparse("active", {}, colluding=0.0)
    outgoing = cohort.until("unmask")
    topology = cohort.server.topology
    gone = topology.neighbours(0)[: topology.degree - topology.threshold + 1]
    cohort.lost = {cohort.server._members[index].address: "unmask" for index in gone}
    cohort.exchange(outgoing)
    with pytest.raises(RoundAbortedError, match="shares came") as caught:
        cohort.server.finish()
    assert caught.value.phase == "unmask"
    assert caught.value.counts["needed"] == topology.threshold


def test_a_cohort_no_sparse_graph_holds_for(sparse_from_nine):
    cohort = sparse("active", {}, n=9, colluding=0.3, dropping=0.3)
    with pytest.raises(RoundAbortedError, match="no k < n - 1 is enough") as caught:
        cohort.run()
    assert caught.value.phase == "advertise"
    assert cohort.server.phase == "aborted"


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("phase", ["share", "unmask"])
def test_a_real_sparse_graph(mode, phase):
    cohort = sparse(mode, dict.fromkeys(range(0, 140, 20), phase), n=140, dropping=0.05, colluding=0.05)
    total = cohort.run()
    assert not cohort.server.topology.graph.complete
    assert_exact(cohort, total, survivors_of(cohort))


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_one_more_than_a_real_sparse_graph_is_made_for(mode):
    cohort = sparse(mode, dict.fromkeys(range(8), "mask"), n=140, dropping=0.05, colluding=0.05)
    with pytest.raises(RoundAbortedError) as caught:
        cohort.run()
    assert (caught.value.phase, caught.value.counts["needed"]) == ("mask", 133)


# -- the server ------------------------------------------------------------------------------------------------------


def restarted(cohort: Cohort, state: bytes) -> None:
    """Let the server die, and another process take over what was on the disk."""
    cohort.server = ServerSession.from_bytes(state, key=cohort.server_key, allow_list=cohort.allow_list)


@pytest.mark.parametrize(("mode", "phase"), [each for each in LEGS if each[1] != "mask"])
@pytest.mark.parametrize("lost", [{}, {2: "mask"}, {2: "share", 4: "unmask"}])
def test_a_server_that_dies_after_it_has_closed_a_phase(mode, phase, lost):
    """Its state is on the disk, nothing of the next phase is sent."""
    cohort = seven(mode)
    cohort.lost = lost
    outgoing = cohort.until(phase)
    state = cohort.server.to_bytes()
    restarted(cohort, state)
    assert cohort.server.to_bytes() == state
    while cohort.server.phase != cohort.server.phases[-1]:
        cohort.exchange(outgoing)
        outgoing = cohort.server.advance()
    cohort.exchange(outgoing)
    assert_exact(cohort, cohort.server.finish(), survivors_of(cohort))


def test_a_server_that_dies_in_every_phase():
    cohort = seven("active", [1], "mask")
    outgoing = cohort.server.begin(range(CLIENTS))
    while cohort.server.phase != "unmask":
        if cohort.server.phase != "mask":
            restarted(cohort, cohort.server.to_bytes())
        cohort.exchange(outgoing)
        outgoing = cohort.server.advance()
    restarted(cohort, cohort.server.to_bytes())
    cohort.exchange(outgoing)
    restarted(cohort, cohort.server.to_bytes())  # with all shares, before the sum
    assert_exact(cohort, cohort.server.finish(), survivors_of(cohort))


@pytest.mark.parametrize("mode", MODES)
def test_a_server_that_dies_while_vectors_come_in(mode):
    """Two lists of survivors would unmask a client: there must not even be a second one."""
    cohort = seven(mode)
    outgoing = cohort.until("mask")
    for state in (cohort.server.to_bytes(), (cohort.exchange(outgoing), cohort.server.to_bytes())[1]):
        with pytest.raises(RoundAbortedError, match="the server was restarted") as caught:
            restarted(cohort, state)
        assert caught.value.phase == "mask"
        assert caught.value.counts == {"invited": 7, "advertised": 7, "shared": 7}


@pytest.mark.parametrize(("mode", "phase"), [each for each in LEGS if each[1] in ("share", "consistent", "unmask")])
def test_a_server_that_dies_when_half_the_answers_are_in_asks_the_others_only(mode, phase):
    """Those that had answered answer no second time: they are lost, and their old answers are not on the disk."""
    cohort = seven(mode)
    outgoing = cohort.until(phase)
    state = cohort.server.to_bytes()
    for client in range(2):
        cohort.server.receive(client, cohort.answer(phase, client, outgoing[client]))
    restarted(cohort, state)
    cohort.exchange(outgoing)
    assert set(cohort.client_errors) == {0, 1}
    assert all(isinstance(error, StageError) for error in cohort.client_errors.values())
    while cohort.server.phase != cohort.server.phases[-1]:
        cohort.exchange(cohort.server.advance())
    gone = {0, 1} if phase == "share" else set()
    assert_exact(cohort, cohort.server.finish(), set(range(CLIENTS)) - gone)


def test_the_sum_so_far_is_kept():
    cohort = seven("active", [1], "mask")
    cohort.until("consistent")
    total = cohort.server._total.copy()
    restarted(cohort, cohort.server.to_bytes())
    assert (cohort.server._total == total).all()
    assert cohort.server._total.flags.writeable
    assert np.count_nonzero(total)


def test_another_key_makes_another_offer():
    cohort = seven("active")
    cohort.until("share")
    other = ServerSession.from_bytes(cohort.server.to_bytes(), key=SigningKey(bytes(32)), allow_list=cohort.allow_list)
    assert other.offer.hash == cohort.server.offer.hash
    assert not other.offer.is_signed_by(cohort.server_key.public)
