"""The server's side of a session: it checks what clients send, adds masked vectors up, and takes the masks off.

A driver sends what ``begin`` and ``advance`` return, one message for each address, and hands every answer to
``receive`` as it comes; an answer that is refused is that client's loss alone. After the last leg ``finish`` returns
the sum, or ``RoundAbortedError`` says in which phase too few clients were left. One vector is held, however many there
are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fedlearn.secagg.allow_list import AllowList
from fedlearn.secagg.derivation import (
    check_advertisement,
    pair_mask_key,
    roster_hash,
    self_mask_key,
    sharers_hash,
)
from fedlearn.secagg.errors import (
    BadAdvertisementError,
    BadShareSignatureError,
    DuplicateDeviceError,
    DuplicateKeyError,
    GraphError,
    MaskedInputError,
    NotANeighbourError,
    RosterInconsistentError,
    RoundAbortedError,
    ShareReconstructionError,
    StageError,
    SurvivorInconsistencyError,
)
from fedlearn.secagg.keys import KEY_BYTES, AgreementKey, SigningKey, tagged_hash, verify
from fedlearn.secagg.members import Member, kept_member, restored_member
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
from fedlearn.secagg.prg import Words, add_masks
from fedlearn.secagg.reconstruction import Reconstruction
from fedlearn.secagg.shamir import share_from_bytes
from fedlearn.secagg.topology import Topology
from fedlearn.secagg.wire import bitmap
from fedlearn.sources import SecureRandom

__all__ = ["PHASES", "ServerSession", "UnmaskedSum"]

PHASES = ("advertise", "share", "mask", "consistent", "unmask")
"""The answers a server waits for, in order; ``consistent`` in active mode only."""


@dataclass(frozen=True, kw_only=True, eq=False)
class UnmaskedSum:
    """What a session was for.

    Attributes:
        words: the sum of the survivors' packed vectors, modulo 2^64.
        survivors: the addresses whose vectors are in it.
        transcript: a hash over everything that was agreed: offer, roster, shares, vectors, survivors, signatures.
        signature: the server's, over the transcript.
        complaints: secrets that came out of some shares only, and whose share was wrong.
    """

    words: Words
    survivors: Sequence[int]
    transcript: bytes
    signature: bytes
    complaints: Sequence[ShareReconstructionError] = ()


class ServerSession:
    """One session.

    Args:
        offer: what is offered; it is signed here.
        key: the server's.
        allow_list: who may take part, by the registry.
        threads: how many work on unmasking.
        watch: called with an address and its masked vector, for those who want to see what a server sees.
    """

    def __init__(
        self,
        offer: Offer,
        *,
        key: SigningKey,
        allow_list: AllowList,
        threads: int = 1,
        watch: Callable[[int, Words], None] | None = None,
    ) -> None:
        self.offer = offer.signed(key)
        self.phase = "advertise"
        self._offer_hash = self.offer.hash
        self.counts: dict[str, int] = {}
        self._key, self._allow_list, self._threads, self._watch = key, allow_list, threads, watch
        self._invited: set[int] = set()
        self._advertised: dict[int, Advertisement] = {}
        self._probe = AgreementKey(SecureRandom().token_bytes(KEY_BYTES))
        self._taken: set[bytes] = set()  # devices and keys that are some client's
        self._members: list[Member] = []
        self._index_of: dict[int, int] = {}
        self._roster_hash = b""
        self._topology: Topology | None = None
        self._sharers: Sequence[int] = ()
        self._survivors: Sequence[int] = ()
        self._total: Words = np.zeros(offer.encoding.words, dtype=np.uint64)

    @property
    def phases(self) -> Sequence[str]:
        """The phases of this session."""
        return PHASES if self.offer.mode == "active" else tuple(phase for phase in PHASES if phase != "consistent")

    @property
    def topology(self) -> Topology:
        """Who is whose neighbour; there is none before the roster."""
        if self._topology is None:
            raise StageError("there is no roster yet")
        return self._topology

    def begin(self, addresses: Sequence[int]) -> dict[int, bytes]:
        """Return the offer for every address that is invited."""
        self._invited = set(addresses)
        self.counts["invited"] = len(self._invited)
        return dict.fromkeys(addresses, self.offer.message())

    # -- answers -----------------------------------------------------------------------------------------------

    def receive(self, address: int, data: bytes) -> None:
        """Take one client's answer to what it was last sent.

        Raises:
            SecaggError: it cannot be used, as the error's class says; the client is out of the session, which goes on.
        """
        if self.phase == "advertise":
            self._take_advertisement(address, data)
            return
        if self.phase not in PHASES or address not in self._index_of:
            raise StageError(f"no answer of address {address} is due in phase {self.phase!r}")
        index = self._index_of[address]
        take = {
            "share": self._take_shares,
            "mask": self._take_vector,
            "consistent": self._take_confirmation,
            "unmask": self._take_unmask,
        }[self.phase]
        take(index, self._members[index], data)

    def _take_advertisement(self, address: int, data: bytes) -> None:
        """Take leg 1."""
        if address not in self._invited or address in self._advertised:
            raise StageError(f"address {address} was not invited, or has advertised already")
        entry = Advertisement.read(data)
        check_advertisement(entry, self._offer_hash, self._allow_list, who=f"address {address}")
        keys = {entry.encryption_key, entry.mask_key}
        if entry.device in self._taken:
            raise DuplicateDeviceError(f"address {address}: the device takes part already, from another address")
        if keys & self._taken or len(keys) < 2:
            raise DuplicateKeyError(f"address {address}: its key is another's")
        if any(self._probe.agree(key) is None for key in keys):  # else every neighbour would give the session up
            raise BadAdvertisementError(f"address {address}: a key is a point of small order")
        self._taken |= {entry.device, *keys}
        self._advertised[address] = entry

    def _take_shares(self, index: int, member: Member, data: bytes) -> None:
        """Take leg 3."""
        if member.header is not None:
            raise StageError(f"client {index} has shared already")
        parsed = ShareKeys.read(data)
        header = parsed.header
        if set(parsed.ciphertexts) != set(self.topology.neighbours(index)):
            raise NotANeighbourError(f"client {index} shared with others than its neighbours")
        if header.owner != index or not verify(
            member.advertisement.device, header.signature, header.digest(self._roster_hash)
        ):
            raise BadShareSignatureError(f"client {index} did not sign the header of its shares")
        if header.ciphertexts_sha256 != ShareKeys.hash_of(parsed.ciphertexts):
            raise BadShareSignatureError(f"the shares of client {index} are not those it signed")
        member.header, member.ciphertexts = header, parsed.ciphertexts

    def _take_vector(self, index: int, member: Member, data: bytes) -> None:
        """Take leg 5: the vector goes into the sum and is forgotten."""
        if member.vector_hash or index not in self._sharers:
            raise StageError(f"the vector of client {index} is not due, or has come already")
        parsed = MaskedInput.read(data, words=self._total.size)
        if parsed.sharers_hash != sharers_hash(self._roster_hash, self.topology.clients, self._sharers):
            raise RosterInconsistentError(f"client {index} masked its vector for others than those that shared")
        digest = MaskedInput.digest(index, parsed.sharers_hash, parsed.vector_hash)
        if tagged_hash("vector", parsed.vector) != parsed.vector_hash:
            raise MaskedInputError(f"the vector of client {index} is not the one whose hash it sent")
        if not verify(member.advertisement.device, parsed.signature, digest):
            raise MaskedInputError(f"client {index} did not sign its vector")
        vector = np.frombuffer(parsed.vector, dtype="<u8")
        np.add(self._total, vector, out=self._total)
        member.vector_hash = parsed.vector_hash
        if self._watch is not None:
            self._watch(member.address, vector)

    def _take_confirmation(self, index: int, member: Member, data: bytes) -> None:
        """Take leg 7."""
        if member.confirmation or index not in self._survivors:
            raise StageError(f"the confirmation of client {index} is not due, or has come already")
        signature = Consistent.read(data).signature
        view = Consistent.digest(self._roster_hash, self.topology.clients, self._sharers, self._survivors)
        if not verify(member.advertisement.device, signature, view):
            raise SurvivorInconsistencyError(f"client {index} confirmed another list than it was sent")
        member.confirmation = signature

    def _take_unmask(self, index: int, member: Member, data: bytes) -> None:
        """Take leg 9."""
        if member.shares is not None or index not in self._unmasking:
            raise StageError(f"the shares of client {index} are not due, or have come already")
        shares, holding = Unmask.read(data).shares, self._held_by(index)
        if set(shares) != holding:
            raise NotANeighbourError(f"client {index} sent shares of others than it holds")
        for share in shares.values():
            share_from_bytes(share)
        member.shares = shares

    def _held_by(self, index: int) -> set[int]:
        """Return whose shares a client holds: its neighbours' that shared, and its own where it keeps one."""
        topology, sharing = self.topology, set(self._sharers)
        return sharing & {*topology.neighbours(index), *([index] if topology.graph.complete else [])}

    # -- from phase to phase -----------------------------------------------------------------------------------

    def advance(self) -> dict[int, bytes]:
        """Close the phase and return what is sent next, by address.

        Raises:
            RoundAbortedError: too few clients are left.
            StageError: the last phase is over; ``finish`` is due.
        """
        close = {
            "advertise": self._close_advertise,
            "share": self._close_share,
            "mask": self._close_mask,
            "consistent": self._close_consistent,
        }.get(self.phase)
        if close is None:
            raise StageError(f"nothing follows phase {self.phase!r} but the sum")
        outgoing = close()
        self.phase = self.phases[self.phases.index(self.phase) + 1]
        return outgoing

    def _close_advertise(self) -> dict[int, bytes]:
        """Fix who takes part; return leg 2."""
        self.counts["advertised"] = len(self._advertised)
        self._need(len(self._advertised), self.offer.least_cohort, "clients must take part")
        entries = sorted(self._advertised.items(), key=lambda item: item[1].device)
        self._members = [Member(address, entry) for address, entry in entries]
        self._index_of = {member.address: index for index, member in enumerate(self._members)}
        clients, listed = len(self._members), [member.advertisement for member in self._members]
        self._roster_hash = roster_hash(self._offer_hash, listed)
        try:
            self._topology = Topology.of(self.offer, clients, self._roster_hash)
        except GraphError as error:
            raise self._aborted(str(error)) from error
        roster = Roster(degree=self.topology.degree, threshold=self.topology.threshold, entries=listed).message()
        return {member.address: roster for member in self._members}

    def _close_share(self) -> dict[int, bytes]:
        """Fix who shared (U2); return leg 4."""
        self._sharers = tuple(index for index, member in enumerate(self._members) if member.header is not None)
        self.counts["shared"] = len(self._sharers)
        self._need(len(self._sharers), self._least_survivors, "must share their secrets")
        outgoing = {}
        for index in self._sharers:
            shares = {}
            for owner in self.topology.neighbours(index):
                header = self._members[owner].header
                if header is not None:
                    shares[owner] = (header, self._members[owner].ciphertexts[index])
            message = Deliver(clients=len(self._members), sharers=self._sharers, shares=shares)
            outgoing[self._members[index].address] = message.message()
        for member in self._members:
            member.ciphertexts = {}
        return outgoing

    def _close_mask(self) -> dict[int, bytes]:
        """Fix whose vectors are in the sum (U3); return leg 6."""
        self._survivors = tuple(index for index in self._sharers if self._members[index].vector_hash)
        self.counts["masked"] = len(self._survivors)
        self._need(len(self._survivors), self._least_survivors, "must send their vectors")
        message = Survivors(clients=len(self._members), survivors=self._survivors).message()
        return {self._members[index].address: message for index in self._survivors}

    def _close_consistent(self) -> dict[int, bytes]:
        """Return leg 8: to each client that confirmed, as many confirmations of its neighbours as it needs."""
        confirmed = [index for index in self._survivors if self._members[index].confirmation]
        self.counts["confirmed"] = len(confirmed)
        threshold = self.topology.threshold
        self._need(len(confirmed), threshold, "must confirm the list of survivors")
        if self.topology.graph.complete:
            message = self._signatures(confirmed[:threshold])
            return {self._members[index].address: message for index in confirmed}
        signed = set(confirmed)
        return {
            self._members[index].address: self._signatures(
                [each for each in (*self.topology.neighbours(index), index) if each in signed][:threshold]
            )
            for index in confirmed
        }

    def _signatures(self, indices: Sequence[int]) -> bytes:
        """Return leg 8 with the confirmations of ``indices``."""
        return Signatures(signatures={index: self._members[index].confirmation for index in indices}).message()

    @property
    def _unmasking(self) -> Sequence[int]:
        """Who is asked for shares."""
        if self.offer.mode == "active":
            return tuple(index for index in self._survivors if self._members[index].confirmation)
        return self._survivors

    @property
    def _least_survivors(self) -> int:
        """Without how many no sum will be unmasked: what was agreed, and what the graph needs."""
        topology = self.topology
        needed = topology.threshold if topology.graph.complete else topology.least_survivors
        return max(self.offer.least_survivors, needed)

    # -- over a crash ------------------------------------------------------------------------------------------

    def to_bytes(self) -> bytes:
        """Return all of the session: to be on the disk before what ``advance`` returned is sent.

        fedlearn's own round loop begins a new session instead: what Flower had under way is lost with the server.
        """
        table = {
            "offer": self.offer.message().hex(),
            "phase": self.phase,
            "counts": self.counts,
            "invited": sorted(self._invited),
            "advertised": {str(address): entry.entry.hex() for address, entry in self._advertised.items()},
            "members": [kept_member(member) for member in self._members],
            "roster": self._roster_hash.hex(),
            "sharers": list(self._sharers),
            "survivors": list(self._survivors),
        }
        head = json.dumps(table).encode()
        return len(head).to_bytes(8, "big") + head + self._total.astype("<u8").tobytes()

    @classmethod
    def from_bytes(cls, data: bytes, *, key: SigningKey, allow_list: AllowList, threads: int = 1) -> ServerSession:
        """Return the session that ``to_bytes`` kept.

        Raises:
            RoundAbortedError: it was kept while vectors came in. Which of them are in its sum is no longer known, and a
                list of survivors may have been sent already: there must be one list, so there is none.
        """
        size = int.from_bytes(data[:8], "big")
        table = json.loads(data[8 : 8 + size])
        offer = Offer.read(bytes.fromhex(table["offer"]))
        session = cls(offer, key=key, allow_list=allow_list, threads=threads)
        session.phase, session.counts = table["phase"], table["counts"]
        if session.phase == "mask":
            reason = "the server was restarted while vectors came in, before the list of survivors was kept"
            raise RoundAbortedError("mask", session.counts, reason)
        session._invited = set(table["invited"])
        session._advertised = {
            int(at): Advertisement.of_entry(bytes.fromhex(e)) for at, e in table["advertised"].items()
        }
        for entry in session._advertised.values():
            session._taken |= {entry.device, entry.encryption_key, entry.mask_key}
        session._members = [restored_member(each) for each in table["members"]]
        session._index_of = {member.address: index for index, member in enumerate(session._members)}
        session._roster_hash = bytes.fromhex(table["roster"])
        if session._members:
            session._topology = Topology.of(offer, len(session._members), session._roster_hash)
        session._sharers, session._survivors = tuple(table["sharers"]), tuple(table["survivors"])
        session._total = np.frombuffer(data[8 + size :], dtype="<u8").astype(np.uint64)
        return session

    def _need(self, found: int, needed: int, what: str) -> None:
        """Raise where too few clients are left."""
        if found < needed:
            raise self._aborted(f"{found} clients are left, and {needed} {what}", needed=needed)

    def _aborted(self, reason: str, **counts: int) -> RoundAbortedError:
        """End the session and return the error that says so."""
        error = RoundAbortedError(self.phase, {**self.counts, **counts}, reason)
        self.phase = "aborted"
        self._forget()
        return error

    def _forget(self) -> None:
        """Let go of the sum and of all shares."""
        self._total = np.zeros(0, dtype=np.uint64)
        for member in self._members:
            member.ciphertexts, member.shares = {}, None

    # -- the sum -----------------------------------------------------------------------------------------------

    def finish(self) -> UnmaskedSum:
        """Take the masks off the sum and return it.

        Raises:
            RoundAbortedError: a secret does not come out of the shares that were sent.
            StageError: the last phase has not come.
        """
        if self.phase != "unmask":
            raise StageError(f"the session is in phase {self.phase!r}; there is no sum to unmask")
        responders = [index for index in self._unmasking if self._members[index].shares is not None]
        self.counts["unmasked"] = len(responders)
        if self.topology.graph.complete:
            self._need(len(responders), self.topology.threshold, "must send their shares")
        complaints: list[ShareReconstructionError] = []
        try:
            plus, minus = self._masks(Reconstruction(self._members, self.topology, responders, complaints))
        except ShareReconstructionError as error:
            raise self._aborted(str(error), needed=self.topology.threshold) from error
        add_masks(self._total, plus=plus, minus=minus, suite=self.offer.suite, threads=self._threads)
        self.phase = "done"
        transcript = self._transcript(responders)
        survivors = tuple(self._members[index].address for index in self._survivors)
        words = self._total
        self._forget()
        return UnmaskedSum(
            words=words,
            survivors=survivors,
            transcript=transcript,
            signature=self._key.sign(tagged_hash("transcript-signature", transcript)),
            complaints=complaints,
        )

    def _masks(self, secrets: Reconstruction) -> tuple[list[bytes], list[bytes]]:
        """Return the keys of the masks to add and to take away, from the secrets that the shares give."""
        plus, minus, survived = list[bytes](), list[bytes](), set(self._survivors)
        for index in self._survivors:
            minus.append(self_mask_key(secrets.seed(index), self._roster_hash, index))
        for lost in self._sharers:
            if lost in survived:
                continue
            left = [each for each in self.topology.neighbours(lost) if each in survived]
            if not left:
                continue
            private = AgreementKey(secrets.mask_key(lost))
            for index in left:
                public = self._members[index].advertisement.mask_key
                key = pair_mask_key(private, public, self._roster_hash, index, lost)
                if key is None:
                    raise ShareReconstructionError(index, "its mask key is a point of small order")
                (minus if lost > index else plus).append(key)  # the survivor added it where the lost one comes later
        return plus, minus

    def _transcript(self, responders: Sequence[int]) -> bytes:
        """Return the hash over what was agreed."""
        clients, members = len(self._members), self._members
        shared = b"".join(m.header.digest(self._roster_hash) for m in members if m.header is not None)
        return tagged_hash(
            "transcript",
            self.offer.hash,
            self._roster_hash,
            tagged_hash("transcript-shares", shared),
            bitmap(self._sharers, clients),
            tagged_hash("transcript-vectors", b"".join(members[index].vector_hash for index in self._survivors)),
            bitmap(self._survivors, clients),
            tagged_hash("transcript-confirmations", b"".join(members[i].confirmation for i in self._survivors)),
            bitmap(responders, clients),
        )
