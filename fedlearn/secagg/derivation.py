"""What both sides compute of the same facts: hashes of the roster and of lists, keys of pairs, commitments."""

from __future__ import annotations

from collections.abc import Sequence

from fedlearn.secagg.allow_list import AllowList
from fedlearn.secagg.errors import BadAdvertisementError, ParamsMismatchError, UnknownDeviceError
from fedlearn.secagg.keys import AgreementKey, derive, tagged_hash
from fedlearn.secagg.messages import Advertisement
from fedlearn.secagg.wire import bitmap

__all__ = [
    "associated_data",
    "check_advertisement",
    "pair_mask_key",
    "roster_hash",
    "seed_commitment",
    "self_mask_key",
    "share_key",
    "sharers_hash",
]


def roster_hash(offer_hash: bytes, entries: Sequence[Advertisement]) -> bytes:
    """Return ``rh``, over the offer and all advertisements: every later key, share and signature is bound to it."""
    return tagged_hash("roster", offer_hash, b"".join(entry.entry for entry in entries))


def sharers_hash(roster: bytes, clients: int, sharers: Sequence[int]) -> bytes:
    """Return the hash of U2 in this session."""
    return tagged_hash("sharers", roster, bitmap(sharers, clients))


def seed_commitment(seed: bytes) -> bytes:
    """Return the commitment to a self-mask seed."""
    return tagged_hash("seed", seed)


def share_key(shared: bytes, roster: bytes, sender: int, receiver: int) -> bytes:
    """Return the key under which ``sender`` encrypts shares for ``receiver``, from the secret the two agreed on."""
    info = b"fedlearn.secagg/1/share-key" + _number(sender) + _number(receiver)
    return derive(shared, salt=roster, info=info)


def pair_mask_key(key: AgreementKey, public: bytes, roster: bytes, one: int, other: int) -> bytes | None:
    """Return the key of the mask that two clients share; ``None``: a point of small order."""
    shared = key.agree(public)
    info = b"fedlearn.secagg/1/pair-mask" + _number(min(one, other)) + _number(max(one, other))
    return None if shared is None else derive(shared, salt=roster, info=info)


def self_mask_key(seed: bytes, roster: bytes, index: int) -> bytes:
    """Return the key of the mask that only one client knows."""
    return derive(seed, salt=roster, info=b"fedlearn.secagg/1/self-mask" + _number(index))


def associated_data(roster: bytes, sender: int, receiver: int, commitment: bytes) -> bytes:
    """Return what an encrypted share is bound to."""
    return tagged_hash("share", roster, _number(sender), _number(receiver), commitment)


def check_advertisement(entry: Advertisement, offer_hash: bytes, allow_list: AllowList, *, who: str) -> None:
    """Raise unless a known device signed this advertisement for this offer.

    Raises:
        ParamsMismatchError, UnknownDeviceError, BadAdvertisementError: as their docstrings say.
    """
    if entry.offer_hash != offer_hash:
        raise ParamsMismatchError(f"{who}: it advertised for another offer")
    if entry.device not in allow_list:
        raise UnknownDeviceError(f"{who}: the device {entry.device.hex()[:16]}… is not on the allow-list")
    if not entry.is_signed:
        raise BadAdvertisementError(f"{who}: the device did not sign its advertisement")


def _number(value: int) -> bytes:
    """Return four bytes."""
    return value.to_bytes(4, "big")
