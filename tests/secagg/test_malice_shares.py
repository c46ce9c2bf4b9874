"""Lies in shares and masked vectors: each refused with an error of its own, by who would be hurt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from attacks import VICTIM, answers, finished, flipped, not_taken, place, refused
from cohort import Cohort, encoding, offer

from fedlearn.secagg import server as server_module
from fedlearn.secagg.derivation import associated_data
from fedlearn.secagg.errors import (
    BadShareSignatureError,
    MaskedInputError,
    NotANeighbourError,
    RosterInconsistentError,
    ShareDecryptError,
    StageError,
    TooFewNeighboursError,
    TooFewSurvivorsError,
    VectorLengthError,
)
from fedlearn.secagg.keys import seal, tagged_hash
from fedlearn.secagg.messages import Deliver, MaskedInput, ShareKeys
from fedlearn.secagg.shamir import PRIME, SHARE_BYTES

# -- leg 3: shares, at the server ------------------------------------------------------------------------------------


def test_shares_that_the_server_refuses():
    cohort = Cohort(offer())
    sent = {client: ShareKeys.read(message) for client, message in answers(cohort, "share").items()}
    fair, key, roster = sent[VICTIM], cohort.keys[VICTIM], cohort.server._roster_hash
    own = place(cohort, VICTIM)
    fewer = dict(list(fair.ciphertexts.items())[1:])
    for ciphertexts in (fewer, {}, {**fewer, own: bytes(82)}, {**fair.ciphertexts, 7: bytes(82)}):
        header = replace(fair.header, ciphertexts_sha256=ShareKeys.hash_of(ciphertexts)).signed(roster, key)
        lie = ShareKeys(header=header, ciphertexts=ciphertexts).message()
        not_taken(cohort, VICTIM, lie, NotANeighbourError)
    for header in (
        replace(fair.header, commitment=bytes(32)),  # not signed
        replace(fair.header, owner=place(cohort, 0)).signed(roster, key),  # signed, in another's name
        fair.header.signed(bytes(32), key),  # for another roster
        fair.header.signed(roster, cohort.keys[0]),  # by another
        replace(fair.header, ciphertexts_sha256=bytes(32)).signed(roster, key),  # of other ciphertexts
    ):
        not_taken(cohort, VICTIM, replace(fair, header=header).message(), BadShareSignatureError)
    not_taken(cohort, 0, fair.message(), NotANeighbourError)  # another client's answer
    not_taken(cohort, 9, fair.message(), StageError)
    cohort.server.receive(VICTIM, fair.message())
    not_taken(cohort, VICTIM, fair.message(), StageError)


# -- leg 4: shares, delivered ----------------------------------------------------------------------------------------


def delivered(cohort: Cohort, client: int = VICTIM) -> Deliver:
    """Run up to leg 4 and return what one client is sent."""
    return Deliver.read(cohort.until("mask")[client])


@pytest.mark.parametrize("at", [0, 65, 66, 81])
def test_a_ciphertext_with_a_flipped_bit(at):
    cohort = Cohort(offer())
    parsed = delivered(cohort)
    owner, (header, ciphertext) = next(iter(parsed.shares.items()))
    shares = {**parsed.shares, owner: (header, flipped(ciphertext, at))}
    refused(cohort, "mask", replace(parsed, shares=shares).message(), ShareDecryptError)


def test_a_ciphertext_of_another_sender():
    cohort = Cohort(offer())
    parsed = delivered(cohort)
    (one, (first, text)), (two, (second, other)) = list(parsed.shares.items())[:2]
    swapped = {**parsed.shares, one: (first, other), two: (second, text)}
    refused(cohort, "mask", replace(parsed, shares=swapped).message(), ShareDecryptError)


def test_a_ciphertext_for_another_receiver():
    cohort = Cohort(offer())
    outgoing = cohort.until("mask")
    parsed, others = Deliver.read(outgoing[VICTIM]), Deliver.read(outgoing[0])
    owner = next(at for at in parsed.shares if at in others.shares)
    shares = {**parsed.shares, owner: others.shares[owner]}
    refused(cohort, "mask", replace(parsed, shares=shares).message(), ShareDecryptError)


def test_a_swapped_sender():
    """Header and ciphertext of one client in the name of another."""
    cohort = Cohort(offer())
    parsed = delivered(cohort)
    (one, (first, text)), (two, (second, other)) = list(parsed.shares.items())[:2]
    swapped = {**parsed.shares, one: (replace(second, owner=one), other), two: (replace(first, owner=two), text)}
    refused(cohort, "mask", replace(parsed, shares=swapped).message(), BadShareSignatureError)


@pytest.mark.parametrize("field", ["commitment", "ciphertexts_sha256", "signature"])
def test_a_header_that_its_owner_did_not_sign(field):
    cohort = Cohort(offer())
    parsed = delivered(cohort)
    owner, (header, ciphertext) = next(iter(parsed.shares.items()))
    lie = replace(header, **{field: flipped(getattr(header, field))})
    shares = {**parsed.shares, owner: (lie, ciphertext)}
    refused(cohort, "mask", replace(parsed, shares=shares).message(), BadShareSignatureError)


def test_shares_of_another_session():
    cohort, before = Cohort(offer()), Cohort(offer())
    before.keys, before.allow_list = cohort.keys, cohort.allow_list  # the same devices, a day earlier
    before.server = server_module.ServerSession(before.offered, key=before.server_key, allow_list=cohort.allow_list)
    old, parsed = delivered(before), delivered(cohort)
    owner = next(iter(parsed.shares))
    shares = {**parsed.shares, owner: old.shares[owner]}
    refused(cohort, "mask", replace(parsed, shares=shares).message(), BadShareSignatureError)


def dealt(cohort: Cohort, dealer: int, plaintext: Callable[[bytes], bytes]) -> bytes:
    """Return leg 4 for the victim when one neighbour encrypts for it something else, and signs it."""
    parsed, roster = delivered(cohort), cohort.server._roster_hash
    at, own = place(cohort, dealer), place(cohort, VICTIM)
    header, _ = parsed.shares[at]
    key = cohort.sessions[VICTIM]._secrets.receiving[at]
    text = seal(key, plaintext(bytes(2 * SHARE_BYTES)), associated_data(roster, at, own, header.commitment))
    return replace(parsed, shares={**parsed.shares, at: (header, text)}).message()


@pytest.mark.parametrize("number", [PRIME, 2**264 - 1])
def test_a_dealer_that_encrypts_what_is_no_share(number):
    cohort = Cohort(offer())
    large = number.to_bytes(SHARE_BYTES, "big")
    message = dealt(cohort, 0, lambda zeros: zeros[:SHARE_BYTES] + large)
    refused(cohort, "mask", message, ShareDecryptError)


def test_neighbours_that_are_hidden():
    cohort = Cohort(offer())
    parsed = delivered(cohort)
    gone = next(iter(parsed.shares))
    kept = {owner: share for owner, share in parsed.shares.items() if owner != gone}
    refused(cohort, "mask", replace(parsed, shares=kept).message(), RosterInconsistentError)


def test_neighbours_that_are_made_up():
    cohort = Cohort(offer(), lost={0: "share"})
    parsed = delivered(cohort)
    more = sorted({*parsed.sharers, place(cohort, 0)})
    refused(cohort, "mask", replace(parsed, sharers=more).message(), RosterInconsistentError)


def test_a_list_of_sharers_of_another_length():
    cohort = Cohort(offer())
    parsed = delivered(cohort)
    refused(cohort, "mask", replace(parsed, clients=6).message(), RosterInconsistentError)


def test_a_client_that_shared_is_not_in_the_list():
    cohort = Cohort(offer())
    parsed = delivered(cohort)
    others = [each for each in parsed.sharers if each != place(cohort, VICTIM)]
    refused(cohort, "mask", replace(parsed, sharers=others).message(), RosterInconsistentError)


def test_a_share_of_ones_own():
    cohort = Cohort(offer())
    outgoing = cohort.until("mask")
    parsed, own = Deliver.read(outgoing[VICTIM]), place(cohort, VICTIM)
    shares = {**parsed.shares, own: Deliver.read(outgoing[0]).shares[own]}
    refused(cohort, "mask", replace(parsed, shares=shares).message(), NotANeighbourError)


def test_shares_of_a_stranger(sparse_from_nine):
    cohort = Cohort(offer(24, colluding=0.0, dropping=0.1, least_survivors=22, encoding=encoding(clients=24)))
    outgoing = cohort.until("mask")
    parsed, own = Deliver.read(outgoing[VICTIM]), place(cohort, VICTIM)
    stranger = next(at for at in range(24) if at not in parsed.shares and at != own)
    its = next(
        share for message in outgoing.values() for at, share in Deliver.read(message).shares.items() if at == stranger
    )
    shares = {**parsed.shares, stranger: its}
    refused(cohort, "mask", replace(parsed, shares=shares).message(), NotANeighbourError)


def hiding(parsed: Deliver, own: int, kept: int) -> bytes:
    """Return leg 4 with fewer neighbours, as if the others had not shared."""
    left = dict(list(parsed.shares.items())[:kept])
    return replace(parsed, shares=left, sharers=sorted({*left, own})).message()


def test_so_many_hidden_neighbours_that_the_sum_would_be_of_too_few():
    cohort = Cohort(offer())
    parsed = delivered(cohort)
    refused(cohort, "mask", hiding(parsed, place(cohort, VICTIM), 2), TooFewSurvivorsError)


def test_so_many_hidden_neighbours_that_no_threshold_could_be_met():
    cohort = Cohort(offer(least_survivors=3))
    parsed = delivered(cohort)
    refused(cohort, "mask", hiding(parsed, place(cohort, VICTIM), 2), TooFewNeighboursError)


# -- leg 5: the masked vector, at the server -------------------------------------------------------------------------


def masked(cohort: Cohort, client: int, sent: bytes, **changes: bytes) -> bytes:
    """Return a vector that a lying client has changed and signed."""
    parsed = replace(MaskedInput.read(sent, words=cohort.offered.encoding.words), **changes)
    digest = MaskedInput.digest(place(cohort, client), parsed.sharers_hash, parsed.vector_hash)
    return replace(parsed, signature=cohort.keys[client].sign(digest)).message()


def test_vectors_that_the_server_refuses():
    cohort = Cohort(offer())
    sent = answers(cohort, "mask")
    fair = sent[VICTIM]
    parsed = MaskedInput.read(fair, words=cohort.offered.encoding.words)
    vector = bytes(parsed.vector)
    not_taken(cohort, VICTIM, replace(parsed, vector=vector + bytes(8)).message(), VectorLengthError)
    not_taken(cohort, VICTIM, replace(parsed, vector=vector[:-8]).message(), VectorLengthError)
    not_taken(cohort, VICTIM, replace(parsed, vector=b"").message(), VectorLengthError)
    not_taken(cohort, VICTIM, replace(parsed, vector=flipped(vector)).message(), MaskedInputError)
    not_taken(cohort, VICTIM, replace(parsed, signature=flipped(parsed.signature)).message(), MaskedInputError)
    rehashed = replace(parsed, vector=flipped(vector), vector_hash=tagged_hash("vector", flipped(vector)))
    not_taken(cohort, VICTIM, rehashed.message(), MaskedInputError)  # changed on its way: not signed anew
    not_taken(cohort, VICTIM, masked(cohort, VICTIM, fair, sharers_hash=bytes(32)), RosterInconsistentError)
    not_taken(cohort, VICTIM, masked(cohort, VICTIM, fair, vector_hash=bytes(32)), MaskedInputError)
    not_taken(cohort, VICTIM, sent[0], MaskedInputError)  # another client's
    not_taken(cohort, 9, fair, StageError)
    for client, message in sent.items():
        cohort.server.receive(client, message)
    not_taken(cohort, VICTIM, fair, StageError)  # a double input
    finished(cohort, range(5))


def test_a_vector_of_a_client_that_had_not_shared():
    cohort = Cohort(offer(), lost={0: "share"})
    sent = answers(cohort, "mask")
    not_taken(cohort, 0, sent[VICTIM], StageError)


def test_a_vector_that_comes_after_the_list_of_survivors():
    """It would be added to nothing: the mask key of its client is being rebuilt, its own mask is not."""
    cohort = Cohort(offer())
    sent = answers(cohort, "mask")
    late = sent.pop(VICTIM)
    for client, message in sent.items():
        cohort.server.receive(client, message)
    outgoing = cohort.server.advance()
    not_taken(cohort, VICTIM, late, StageError)
    cohort.exchange(outgoing)
    finished(cohort, sent)
