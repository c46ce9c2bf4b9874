"""What attacks on a session have in common: how a lie is told, and how it must be refused.

The server lies to clients by what it sends them; a client lies to the server by what it answers. Nobody has another's
keys, but colluding devices sign what the attack needs.
"""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from cohort import MODEL, RANDOM, Cohort

from fedlearn.secagg.client import ClientSession
from fedlearn.secagg.errors import SecaggError, StageError
from fedlearn.secagg.keys import AgreementKey, SigningKey
from fedlearn.secagg.messages import Advertisement

VICTIM = 2


def place(cohort: Cohort, client: int) -> int:
    """Return where a client stands in the roster."""
    return cohort.server._index_of[client]


def at_place(cohort: Cohort, index: int) -> int:
    """Return which client stands there."""
    return cohort.server._members[index].address


def assert_over(session: ClientSession) -> None:
    """The session has ended, kept nothing, and answers nothing more."""
    assert session.stage == "ended"
    assert (session._secrets.encryption, session._secrets.mask, session._secrets.seed) == (b"", b"", b"")
    assert not session._secrets.held
    for leg in (
        lambda: session.share_keys(b"", allow_list=None),
        lambda: session.accept_shares(b""),
        lambda: session.check_model(MODEL),
        lambda: session.confirm(b""),
        lambda: session.unmask(b""),
    ):
        with pytest.raises(StageError):
            leg()


def refused(cohort: Cohort, phase: str, message: bytes, error: type[SecaggError], client: int = VICTIM) -> SecaggError:
    """Send one client a message that it must refuse with just this error; the session is over then."""
    with pytest.raises(SecaggError) as caught:
        cohort.answer(phase, client, message)
    assert type(caught.value) is error, repr(caught.value)
    assert_over(cohort.sessions[client])
    return caught.value


def refused_offer(cohort: Cohort, message: bytes, error: type[SecaggError], client: int = VICTIM) -> SecaggError:
    """Send one client an offer that it must refuse; it has made no key then."""
    with pytest.raises(SecaggError) as caught:
        cohort.begin(client, message)
    assert type(caught.value) is error, repr(caught.value)
    assert client not in cohort.sessions
    assert len(cohort.vaults[client]) == 0
    return caught.value


def not_taken(cohort: Cohort, client: int, message: bytes, error: type[SecaggError]) -> None:
    """Give the server an answer that it must refuse with just this error, and that leaves no trace in it."""
    before = cohort.server.to_bytes()
    with pytest.raises(SecaggError) as caught:
        cohort.server.receive(client, message)
    assert type(caught.value) is error, repr(caught.value)
    assert cohort.server.to_bytes() == before


def answers(cohort: Cohort, phase: str) -> dict[int, bytes]:
    """Run up to a phase, and let every client answer without telling the server."""
    return {client: cohort.answer(phase, client, message) for client, message in cohort.until(phase).items()}


def finished(cohort: Cohort, survivors: Iterable[int]) -> None:
    """Run the rest: the sum is that of these clients."""
    while cohort.server.phase != cohort.server.phases[-1]:
        cohort.exchange(cohort.server.advance())
    total = cohort.server.finish()
    assert set(total.survivors) == set(survivors)
    assert (total.words == cohort.expected(total.survivors)).all()


def advertised(cohort: Cohort, key: SigningKey, **changes: bytes) -> Advertisement:
    """Return the advertisement of a device that lies as it likes."""
    values = {
        "offer_hash": cohort.server.offer.hash,
        "encryption_key": AgreementKey(RANDOM.token_bytes(32)).public,
        "mask_key": AgreementKey(RANDOM.token_bytes(32)).public,
        "nonce": bytes(32),
        **changes,
    }
    return Advertisement(device=key.public, **values).signed(key)


def flipped(data: bytes, at: int = 0) -> bytes:
    """Return bytes of which one bit is another."""
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
