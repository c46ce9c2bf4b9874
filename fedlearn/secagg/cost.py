"""How many bytes each leg has, before anything runs: the sizes of the very messages, with nothing in them."""

from __future__ import annotations

from dataclasses import dataclass

from fedlearn.secagg.graph import choose_graph
from fedlearn.secagg.keys import KEY_BYTES, SIGNATURE_BYTES
from fedlearn.secagg.messages import (
    CIPHERTEXT_BYTES,
    Advertisement,
    Consistent,
    Deliver,
    MaskedInput,
    Offer,
    Roster,
    ShareHeader,
    ShareKeys,
    Signatures,
    Survivors,
    Unmask,
)
from fedlearn.secagg.shamir import SHARE_BYTES

__all__ = ["LegBytes", "leg_bytes"]

_HASH = bytes(32)
_KEY = bytes(KEY_BYTES)
_SIGNATURE = bytes(SIGNATURE_BYTES)
_ENTRY = Advertisement(device=_KEY, offer_hash=_HASH, encryption_key=_KEY, mask_key=_KEY, nonce=_KEY)


@dataclass(frozen=True, kw_only=True)
class LegBytes:
    """One leg: what one client is sent, and what it answers.

    Attributes:
        leg: ``advertise``, ``share``, ``mask``, ``consistent`` or ``unmask``.
        down: bytes of the protocol's own message to the client; the model of ``mask`` is not in it.
        up: bytes of the client's.
    """

    leg: str
    down: int
    up: int


def leg_bytes(offer: Offer) -> list[LegBytes]:
    """Return the legs of a session in which everybody who is invited answers, to the byte."""
    n = offer.cohort
    graph = choose_graph(n, colluding=offer.colluding, dropping=offer.dropping, active=offer.mode == "active")
    degree, threshold = graph.k, graph.threshold
    header = ShareHeader(owner=0, commitment=_HASH, ciphertexts_sha256=_HASH)
    holding = degree + graph.complete
    roster = Roster(degree=degree, threshold=threshold, entries=[_ENTRY] * n)
    everybody = tuple(range(n))
    ciphertexts = dict.fromkeys(range(degree), bytes(CIPHERTEXT_BYTES))
    delivered = {
        owner: (ShareHeader(owner=owner, commitment=_HASH, ciphertexts_sha256=_HASH), ciphertexts[owner])
        for owner in range(degree)
    }
    survivors = len(Survivors(clients=n, survivors=everybody).message())
    signatures = len(Signatures(signatures=dict.fromkeys(range(threshold), _SIGNATURE)).message())
    unmask = len(Unmask(shares=dict.fromkeys(range(holding), bytes(SHARE_BYTES))).message())
    masked = MaskedInput(vector=b"", sharers_hash=_HASH, vector_hash=_HASH)
    active = offer.mode == "active"
    legs = [
        LegBytes(leg="advertise", down=len(offer.message()), up=len(_ENTRY.message())),
        LegBytes(
            leg="share", down=len(roster.message()), up=len(ShareKeys(header=header, ciphertexts=ciphertexts).message())
        ),
        LegBytes(
            leg="mask",
            down=len(Deliver(clients=n, sharers=everybody, shares=delivered).message()),
            up=len(masked.message()) + offer.encoding.upload_bytes,
        ),
    ]
    if active:
        legs.append(LegBytes(leg="consistent", down=survivors, up=len(Consistent(signature=_SIGNATURE).message())))
    legs.append(LegBytes(leg="unmask", down=signatures if active else survivors, up=unmask))
    return legs
