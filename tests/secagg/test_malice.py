"""Lies about who survived, and wrong shares at the end: one kind of share of each client leaves a device, once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from attacks import VICTIM, answers, assert_over, finished, flipped, not_taken, place, refused
from cohort import MODEL, Cohort, encoding, offer

from fedlearn.secagg import client as client_module
from fedlearn.secagg.derivation import seed_commitment
from fedlearn.secagg.errors import (
    MalformedMessageError,
    NotANeighbourError,
    PolicyViolationError,
    RoundAbortedError,
    SecaggError,
    SelfNotSurvivorError,
    ShareReconstructionError,
    StageError,
    SurvivorInconsistencyError,
    SurvivorSubsetError,
    TooFewSignaturesError,
    TooFewSurvivorsError,
    VectorLengthError,
)
from fedlearn.secagg.messages import Advertisement, Consistent, Signatures, Survivors, Unmask
from fedlearn.secagg.policy import ClientPolicy
from fedlearn.secagg.shamir import PRIME, SHARE_BYTES, share_to_bytes, split
from fedlearn.secagg.vault import MemoryVault
from fedlearn.sources import SecureRandom

# -- legs 6 to 8: the survivors --------------------------------------------------------------------------------------

ACCEPTING = {"active": "consistent", "semi-honest": "unmask"}
"""The phase in which a client is shown the list of survivors."""


def shown(mode: str, survivors: Callable[[Cohort], Iterable[int]], error: type[SecaggError], **changes: object) -> None:
    """Show the victim another list of survivors, of all the others' first, which it refuses."""
    cohort = Cohort(offer(mode=mode, **changes), lost={0: "share"})
    phase = ACCEPTING[mode]
    cohort.until(phase)
    message = Survivors(clients=5, survivors=sorted(survivors(cohort))).message()
    refused(cohort, phase, message, error)


@pytest.mark.parametrize("mode", ACCEPTING)
def test_a_survivor_that_had_not_shared(mode):
    shown(mode, lambda cohort: range(5), SurvivorSubsetError)


@pytest.mark.parametrize("mode", ACCEPTING)
def test_a_client_whose_own_vector_is_said_to_be_lost(mode):
    shown(mode, lambda cohort: [place(cohort, each) for each in (1, 3, 4)], SelfNotSurvivorError, least_survivors=3)


@pytest.mark.parametrize("mode", ACCEPTING)
def test_a_list_of_too_few_survivors(mode):
    shown(mode, lambda cohort: [place(cohort, each) for each in (1, 2, 3)], TooFewSurvivorsError)


@pytest.mark.parametrize("mode", ACCEPTING)
def test_a_list_of_survivors_of_another_length(mode):
    cohort = Cohort(offer(mode=mode))
    cohort.until(ACCEPTING[mode])
    refused(cohort, ACCEPTING[mode], Survivors(clients=6, survivors=range(5)).message(), SurvivorSubsetError)


def test_on_a_sparse_graph_no_stretch_of_the_ring_is_unmasked_alone(sparse_from_nine):
    """The offer asks for three survivors; what the graph's parameters hold for asks for 22 of 24."""
    cohort = Cohort(offer(24, colluding=0.0, dropping=0.1, least_survivors=3, encoding=encoding(clients=24)))
    cohort.until("consistent")
    topology, own = cohort.server.topology, place(cohort, VICTIM)
    assert (topology.graph.complete, topology.least_survivors) == (False, 22)
    stretch = {own, *topology.neighbours(own)}
    refused(cohort, "consistent", Survivors(clients=24, survivors=sorted(stretch)).message(), TooFewSurvivorsError)
    for kept, client in ((21, 3), (22, 4)):
        listed = [place(cohort, client), *(at for at in range(24) if at != place(cohort, client))][:kept]
        message = Survivors(clients=24, survivors=sorted(listed)).message()
        if kept < 22:
            refused(cohort, "consistent", message, TooFewSurvivorsError, client)
        else:
            cohort.answer("consistent", client, message)


def split_lists(cohort: Cohort) -> dict[int, bytes]:
    """Show half of the cohort that client 5 survived, the other half that it did not; return their signatures."""
    cohort.until("consistent")
    everybody = range(6)
    without = [at for at in everybody if at != place(cohort, 5)]
    found = {}
    for client in range(5):
        listed = everybody if client % 2 else without
        message = Survivors(clients=6, survivors=listed).message()
        found[client] = Consistent.read(cohort.answer("consistent", client, message)).signature
    return found


def six() -> Cohort:
    """A cohort of six, of which five rebuild a secret."""
    return Cohort(offer(6, least_survivors=4, encoding=encoding(clients=6)))


def test_split_lists_of_survivors_with_the_signatures_of_each_half():
    """Client 5's self-mask from one half, its mask key from the other: neither half has a threshold of signatures."""
    cohort = six()
    signed = split_lists(cohort)
    for client in range(5):
        half = {place(cohort, other): signed[other] for other in signed if other % 2 == client % 2}
        refused(cohort, "unmask", Signatures(signatures=half).message(), TooFewSignaturesError, client)


def test_split_lists_of_survivors_with_the_signatures_of_both_halves():
    cohort = six()
    signed = split_lists(cohort)
    message = Signatures(
        signatures={place(cohort, client): signature for client, signature in signed.items()}
    ).message()
    for client in range(5):
        refused(cohort, "unmask", message, SurvivorInconsistencyError, client)


def confirmed(cohort: Cohort) -> Signatures:
    """Run up to leg 8 and return what is sent."""
    return Signatures.read(cohort.until("unmask")[VICTIM])


def test_missing_signatures():
    for kept in (0, 3):
        cohort = Cohort(offer())
        parsed = confirmed(cohort)
        assert len(parsed.signatures) == 4
        fewer = Signatures(signatures=dict(list(parsed.signatures.items())[:kept])).message()
        refused(cohort, "unmask", fewer, TooFewSignaturesError)


def test_a_forged_signature():
    cohort = Cohort(offer())
    parsed = confirmed(cohort)
    index, signature = next(iter(parsed.signatures.items()))
    forged = Signatures(signatures={**parsed.signatures, index: flipped(signature)}).message()
    refused(cohort, "unmask", forged, SurvivorInconsistencyError)


def test_one_signature_in_the_names_of_many():
    cohort = Cohort(offer())
    confirmed(cohort)
    mine = Consistent(signature=cohort.keys[VICTIM].sign(cohort.sessions[VICTIM]._view())).signature
    refused(
        cohort, "unmask", Signatures(signatures=dict.fromkeys(range(5), mine)).message(), SurvivorInconsistencyError
    )


def test_signatures_of_somebody_who_did_not_survive_or_is_nobody():
    cohort = Cohort(offer(), lost={0: "mask"})
    parsed = confirmed(cohort)
    for index, client in ((place(cohort, 0), 1), (9, 3)):
        more = Signatures(signatures={**parsed.signatures, index: bytes(64)}).message()
        refused(cohort, "unmask", more, TooFewSignaturesError, client)


def test_confirmations_that_the_server_refuses():
    cohort = Cohort(offer())
    sent = answers(cohort, "consistent")
    lie = Consistent(signature=cohort.keys[VICTIM].sign(bytes(32))).message()
    not_taken(cohort, VICTIM, lie, SurvivorInconsistencyError)
    not_taken(cohort, VICTIM, sent[0], SurvivorInconsistencyError)
    not_taken(cohort, 9, sent[0], StageError)
    for client, message in sent.items():
        cohort.server.receive(client, message)
    not_taken(cohort, VICTIM, sent[VICTIM], StageError)
    cohort.exchange(cohort.server.advance())
    finished(cohort, range(5))


# -- leg 9: one kind of share of each client, once -------------------------------------------------------------------


def test_a_second_unmask():
    cohort = Cohort(offer())
    last = cohort.until("unmask")[VICTIM]
    cohort.answer("unmask", VICTIM, last)
    assert cohort.sessions[VICTIM].stage == "spent"
    refused(cohort, "unmask", last, StageError)


def test_both_lists_to_one_client():
    """The server asks for both kinds of shares of client 0: with a list it is in, then with one it is not."""
    cohort = Cohort(offer(mode="semi-honest", least_survivors=3))
    cohort.until("unmask")
    at = place(cohort, 0)
    both = [Survivors(clients=5, survivors=[i for i in range(5) if i != gone]).message() for gone in (-1, at)]
    shares = Unmask.read(cohort.answer("unmask", VICTIM, both[0])).shares
    assert len(shares) == 5
    refused(cohort, "unmask", both[1], StageError)


def test_both_lists_for_one_client_to_sign():
    cohort = Cohort(offer(least_survivors=3))
    message = cohort.until("consistent")[VICTIM]
    cohort.answer("consistent", VICTIM, message)
    refused(cohort, "consistent", message, StageError)


def test_a_client_gives_one_of_the_two_shares_of_each_other():
    cohort = Cohort(offer(), lost={0: "mask"})
    last = cohort.until("unmask")
    held = dict(cohort.sessions[VICTIM]._secrets.held)
    given = Unmask.read(cohort.answer("unmask", VICTIM, last[VICTIM])).shares
    lost = place(cohort, 0)
    assert given == {owner: pair[0] if owner == lost else pair[1] for owner, pair in held.items()}


@pytest.mark.parametrize("phase", ["share", "mask", "consistent", "unmask"])
def test_a_message_that_comes_twice(phase):
    cohort = Cohort(offer())
    message = cohort.until(phase)[VICTIM]
    cohort.answer(phase, VICTIM, message)
    refused(cohort, phase, message, StageError)


@pytest.mark.parametrize("mode", ["active", "semi-honest"])
@pytest.mark.parametrize("skipped", ["share", "mask", "consistent"])
def test_a_leg_that_is_skipped(mode, skipped):
    cohort = Cohort(offer(mode=mode))
    phases = cohort.server.phases
    if skipped not in phases:
        return
    cohort.until(skipped)
    refused(cohort, phases[phases.index(skipped) + 1], b"", StageError)


def test_nothing_is_confirmed_in_semi_honest_mode():
    cohort = Cohort(offer(mode="semi-honest"))
    refused(cohort, "consistent", cohort.until("unmask")[VICTIM], StageError)


def test_an_update_that_was_encoded_for_another_offer():
    cohort = Cohort(offer())
    message = cohort.until("mask")[VICTIM]
    cohort.sessions[VICTIM].accept_shares(message)
    cohort.sessions[VICTIM].check_model(MODEL)
    other = replace(cohort.updates[VICTIM], encoding=replace(cohort.offered.encoding, clients=4))
    with pytest.raises(PolicyViolationError):
        cohort.sessions[VICTIM].mask(other)
    assert_over(cohort.sessions[VICTIM])


def test_an_update_of_another_length():
    cohort = Cohort(offer())
    message = cohort.until("mask")[VICTIM]
    cohort.sessions[VICTIM].accept_shares(message)
    cohort.sessions[VICTIM].check_model(MODEL)
    other = replace(cohort.updates[VICTIM], words=np.zeros(1, dtype=np.uint64))
    with pytest.raises(VectorLengthError):
        cohort.sessions[VICTIM].mask(other)
    assert_over(cohort.sessions[VICTIM])


def test_a_vector_for_a_model_that_was_not_checked():
    cohort = Cohort(offer())
    message = cohort.until("mask")[VICTIM]
    cohort.sessions[VICTIM].accept_shares(message)
    with pytest.raises(StageError):
        cohort.sessions[VICTIM].mask(cohort.updates[VICTIM])
    assert_over(cohort.sessions[VICTIM])


def test_colluders_of_a_whole_cohort_that_meet_in_a_smaller_roster():
    """The server loses honest clients before the roster, and shows the others two lists, both signed by its friends."""
    colluding = 9  # a share of 0.33 of 30, whom every client's own floors permit
    cohort = Cohort(offer(30, colluding=0.33, least_cohort=21, least_survivors=21), policy=ClientPolicy())
    cohort.lost = dict.fromkeys(range(22, 30), "advertise")
    outgoing = cohort.until("mask")
    for client, message in outgoing.items():
        cohort.server.receive(client, cohort.answer("mask", client, message))
    outgoing = cohort.server.advance()
    honest, clients = range(colluding, 22), 22
    everyone = Survivors.read(outgoing[0]).survivors
    victim = place(cohort, honest[0])
    threshold = cohort.server.topology.threshold
    assert 2 * threshold > clients + colluding
    passed = []
    for group, survivors in ((honest[:7], everyone), (honest[7:], [each for each in everyone if each != victim])):
        message = Survivors(clients=clients, survivors=survivors).message()
        signed = {
            place(cohort, each): Consistent.read(cohort.sessions[each].confirm(message)).signature for each in group
        }
        view = Consistent.digest(cohort.server._roster_hash, clients, cohort.server._sharers, survivors)
        signed |= {place(cohort, each): cohort.keys[each].sign(view) for each in range(colluding)}
        given = Signatures(signatures=signed).message()
        try:
            cohort.sessions[group[-1]].unmask(given)
            passed.append(group)
        except TooFewSignaturesError:
            pass
    assert len(passed) < 2


# -- wrong shares ----------------------------------------------------------------------------------------------------


def test_unmask_answers_that_the_server_refuses():
    cohort = Cohort(offer())
    sent = answers(cohort, "unmask")
    parsed = Unmask.read(sent[VICTIM])
    fewer = dict(list(parsed.shares.items())[1:])
    not_taken(cohort, VICTIM, Unmask(shares=fewer).message(), NotANeighbourError)
    not_taken(cohort, VICTIM, Unmask(shares={**parsed.shares, 7: bytes(33)}).message(), NotANeighbourError)
    above = {**parsed.shares, 0: PRIME.to_bytes(SHARE_BYTES, "big")}
    not_taken(cohort, VICTIM, Unmask(shares=above).message(), MalformedMessageError)
    not_taken(cohort, 9, sent[VICTIM], StageError)
    for client, message in sent.items():
        cohort.server.receive(client, message)
    not_taken(cohort, VICTIM, sent[VICTIM], StageError)
    finished(cohort, range(5))
    for client, message in sent.items():
        not_taken(cohort, client, message, StageError)


def lying(cohort: Cohort, liars: Mapping[int, set[int]]) -> None:
    """Let clients send wrong shares of others; run to the end of the last phase."""
    for client, message in cohort.until("unmask").items():
        shares = Unmask.read(cohort.answer("unmask", client, message)).shares
        wrong = {place(cohort, owner) for owner in liars.get(client, ())}
        told = {at: share_to_bytes(12345 + at) if at in wrong else share for at, share in shares.items()}
        cohort.server.receive(client, Unmask(shares=told).message())


@pytest.mark.parametrize("liar", range(6))
@pytest.mark.parametrize("lost", [{}, {0: "mask"}])
def test_a_wrong_share_is_blamed_on_its_holder_and_the_sum_is_exact(liar, lost):
    cohort = Cohort(offer(7, encoding=encoding(clients=7)), lost=lost)
    liar, owners = liar + 1, {0, 3}
    lying(cohort, {liar: owners})
    total = cohort.server.finish()
    assert (total.words == cohort.expected(total.survivors)).all()
    blamed = {(each.owner, each.holder) for each in total.complaints}
    if not blamed:  # the first t shares were right, and none other was needed
        assert place(cohort, liar) >= cohort.server.topology.threshold
    else:
        assert blamed == {(place(cohort, owner), place(cohort, liar)) for owner in owners}
    assert all(isinstance(each, ShareReconstructionError) for each in total.complaints)


@pytest.mark.parametrize("liars", list(combinations(range(9), 2)))
def test_two_liars_of_nine_are_found_out(liars):
    cohort = Cohort(offer(9, encoding=encoding(clients=9)))
    lying(cohort, {liar: {4} for liar in liars})
    total = cohort.server.finish()
    assert (total.words == cohort.expected(range(9))).all()
    holders = {each.holder for each in total.complaints}
    assert holders <= {place(cohort, liar) for liar in liars}
    first = set(range(cohort.server.topology.threshold))
    assert not first & {place(cohort, liar) for liar in liars} or holders == {place(cohort, liar) for liar in liars}


def test_so_many_wrong_shares_that_no_set_is_right():
    cohort = Cohort(offer())
    lying(cohort, {0: {4}, 1: {4}})
    with pytest.raises(RoundAbortedError, match="no set of the shares") as caught:
        cohort.server.finish()
    assert caught.value.phase == "unmask"
    assert caught.value.counts["unmasked"] == 5
    assert isinstance(caught.value.__cause__, ShareReconstructionError)
    assert caught.value.__cause__.owner == place(cohort, 4)
    assert cohort.server.phase == "aborted"
    assert not cohort.server._total.size
    with pytest.raises(StageError):
        cohort.server.finish()


def with_a_bad_dealer(monkeypatch: pytest.MonkeyPatch, **replaced: object) -> Cohort:
    """Let client 0 share its secrets with some function of its own; run to the end of the last phase."""
    cohort = Cohort(offer())
    for client, message in cohort.until("share").items():
        with monkeypatch.context() as patched:
            for name, function in replaced.items() if client == 0 else ():
                patched.setattr(client_module, name, function)
            answer = cohort.answer("share", client, message)
        cohort.server.receive(client, answer)
    for _ in range(3):
        cohort.exchange(cohort.server.advance())
    assert not cohort.client_errors and not cohort.server_errors
    return cohort


@pytest.mark.parametrize(
    "replaced",
    [
        {"split": lambda secret, threshold, points, random: [each + 7 for each in points]},  # shares of other secrets
        {"split": lambda secret, threshold, points, random: [random.below(PRIME) for _ in points]},  # no polynomial
        {"seed_commitment": lambda seed: seed_commitment(bytes(32))},  # a commitment to another seed
    ],
)
def test_a_bad_dealer_ends_the_round_and_is_named(monkeypatch, replaced):
    cohort = with_a_bad_dealer(monkeypatch, **replaced)
    with pytest.raises(RoundAbortedError) as caught:
        cohort.server.finish()
    assert caught.value.phase == "unmask"
    assert isinstance(caught.value.__cause__, ShareReconstructionError)
    assert caught.value.__cause__.owner == place(cohort, 0)


def test_a_dealer_that_spoils_one_share_is_named_beside_its_holder(monkeypatch):
    """Which of the two lied nobody can tell: the share was encrypted. The sum is exact."""

    def spoiled(secret: bytes, threshold: int, points: list[int], random: SecureRandom) -> list[int]:
        shares = split(secret, threshold, points, random)
        return [shares[0], shares[1] ^ 1, *shares[2:]]

    cohort = with_a_bad_dealer(monkeypatch, split=spoiled)
    total = cohort.server.finish()
    assert (total.words == cohort.expected(range(5))).all()
    assert {(each.owner, each.holder) for each in total.complaints} == {(place(cohort, 0), 1)}


# -- at the server: order --------------------------------------------------------------------------------------------


def test_the_server_has_an_order_too():
    cohort = Cohort(offer())
    with pytest.raises(StageError):
        cohort.server.topology  # noqa: B018
    with pytest.raises(StageError):
        cohort.server.finish()
    cohort.run()
    with pytest.raises(StageError):
        cohort.server.advance()
    with pytest.raises(StageError):
        cohort.server.finish()
    with pytest.raises(StageError):
        cohort.server.receive(0, b"")


def test_a_fresh_vault_is_all_a_replay_needs_and_then_the_roster_differs():
    """A device that was reset takes part again; its keys are others, and so are all masks."""
    cohort = Cohort(offer())
    message = cohort.server.offer.message()
    first = Advertisement.read(cohort.begin(VICTIM, message))
    cohort.vaults[VICTIM] = MemoryVault()
    second = Advertisement.read(cohort.begin(VICTIM, message))
    assert {first.encryption_key, first.mask_key}.isdisjoint({second.encryption_key, second.mask_key})
