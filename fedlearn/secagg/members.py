"""What a server knows of each client of its roster, and how it keeps that over a crash."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fedlearn.secagg.messages import Advertisement, ShareHeader
from fedlearn.secagg.wire import Reader, Writer

__all__ = ["Member", "kept_member", "restored_member"]


@dataclass
class Member:
    """One client.

    Attributes:
        address: where it is reached.
        advertisement: who it is, and its keys.
        header: what it signed about its shares, once it has shared.
        ciphertexts: its encrypted shares by holder, until they are delivered.
        vector_hash: of its masked vector, once that is in the sum.
        confirmation: its signature under the list of survivors.
        shares: the shares of others that it gave, once it has.
    """

    address: int
    advertisement: Advertisement
    header: ShareHeader | None = None
    ciphertexts: dict[int, bytes] = field(default_factory=dict)
    vector_hash: bytes = b""
    confirmation: bytes = b""
    shares: dict[int, bytes] | None = None


def kept_member(member: Member) -> dict[str, Any]:
    """Return one client as it is kept over a crash."""
    header = Writer(0)
    if member.header is not None:
        member.header.write(header)
    return {
        "address": member.address,
        "entry": member.advertisement.entry.hex(),
        "header": "" if member.header is None else header.done().hex(),
        "ciphertexts": {str(index): each.hex() for index, each in member.ciphertexts.items()},
        "vector": member.vector_hash.hex(),
        "confirmation": member.confirmation.hex(),
        "shares": None if member.shares is None else {str(at): each.hex() for at, each in member.shares.items()},
    }


def restored_member(table: dict[str, Any]) -> Member:
    """Return the client that ``kept_member`` wrote."""
    shares, header = table["shares"], bytes.fromhex(table["header"])
    return Member(
        address=table["address"],
        advertisement=Advertisement.of_entry(bytes.fromhex(table["entry"])),
        header=ShareHeader.from_reader(Reader(header, 0, longest=len(header))) if header else None,
        ciphertexts={int(index): bytes.fromhex(each) for index, each in table["ciphertexts"].items()},
        vector_hash=bytes.fromhex(table["vector"]),
        confirmation=bytes.fromhex(table["confirmation"]),
        shares=None if shares is None else {int(at): bytes.fromhex(each) for at, each in shares.items()},
    )
