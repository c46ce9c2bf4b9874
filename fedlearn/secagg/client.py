"""A client's side of a session: bytes in, bytes out; it believes nothing that it did not check itself.

``advertise`` → ``share_keys`` → ``accept_shares`` and ``mask`` → ``confirm`` (active) → ``unmask``. Between two of them
the session may be kept as bytes (``to_bytes``), sealed by the device's vault. Whatever goes wrong ends it: the secrets
are let go of first, then the error is raised.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fedlearn.secagg.allow_list import AllowList
from fedlearn.secagg.derivation import (
    associated_data,
    check_advertisement,
    pair_mask_key,
    roster_hash,
    seed_commitment,
    self_mask_key,
    share_key,
    sharers_hash,
)
from fedlearn.secagg.encoding import EncodedUpdate
from fedlearn.secagg.errors import (
    BadAdvertisementError,
    BadShareSignatureError,
    CohortTooSmallError,
    DuplicateDeviceError,
    DuplicateKeyError,
    GraphError,
    MalformedMessageError,
    ModelHashMismatchError,
    NotANeighbourError,
    OfferSignatureError,
    ParamsMismatchError,
    PolicyViolationError,
    RosterInconsistentError,
    RosterTamperedError,
    SelfNotSurvivorError,
    ShareDecryptError,
    StageError,
    SurvivorInconsistencyError,
    SurvivorSubsetError,
    TooFewNeighboursError,
    TooFewSignaturesError,
    TooFewSurvivorsError,
    UnknownDeviceError,
    VectorLengthError,
)
from fedlearn.secagg.graph import SEED_BYTES, Graph, ring_permutation
from fedlearn.secagg.keys import KEY_BYTES, AgreementKey, SigningKey, open_sealed, seal, tagged_hash, verify
from fedlearn.secagg.messages import (
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
from fedlearn.secagg.policy import ClientPolicy
from fedlearn.secagg.prg import add_masks
from fedlearn.secagg.shamir import SHARE_BYTES, share_from_bytes, share_to_bytes, split
from fedlearn.secagg.topology import Topology
from fedlearn.secagg.vault import Vault
from fedlearn.sources import SecureRandom

__all__ = ["ClientSession"]


_NOWHERE = Topology(Graph(n=2, k=1, threshold=2), ring_permutation(2, bytes(SEED_BYTES)), 2)
"""Before the roster there is no graph; nothing asks for one."""


@dataclass
class _Secrets:
    """What must never leave, and is let go of when it is no longer needed."""

    encryption: bytes = b""
    mask: bytes = b""
    seed: bytes = b""
    receiving: dict[int, bytes] = field(default_factory=dict)  # neighbour to the key under which its shares come
    held: dict[int, tuple[bytes, bytes]] = field(default_factory=dict)  # owner to its shares (of the key, of the seed)

    def wipe(self) -> None:
        """Let go of everything. (Python frees the memory when it likes; the disk is the vault's to clear.)"""
        self.encryption = self.mask = self.seed = b""
        self.receiving.clear()
        self.held.clear()


class ClientSession:
    """One client in one session.

    Args:
        offer: the checked offer.
        identity: the device's key.
        random: where keys and shares come from.
    """

    def __init__(self, offer: Offer, identity: SigningKey, random: SecureRandom) -> None:
        self.offer = offer
        self._offer_hash = offer.hash
        self._identity, self._random = identity, random
        self._stage = "advertised"
        self._secrets = _Secrets()
        self._own = b""
        self._index = -1
        self._roster_hash = b""
        self._topology: Topology = _NOWHERE
        self._peers: dict[int, Advertisement] = {}
        self._sharers: Sequence[int] = ()
        self._survivors: Sequence[int] = ()

    # -- legs 0 and 1 ------------------------------------------------------------------------------------------

    @classmethod
    def begin(
        cls,
        offer: bytes,
        *,
        identity: SigningKey,
        allow_list: AllowList,
        server_key: bytes,
        policy: ClientPolicy,
        vault: Vault,
        now_s: float,
        random: SecureRandom | None = None,
    ) -> tuple[ClientSession, bytes]:
        """Check an offer and answer it; return the session and the advertisement.

        Args:
            offer: leg 0.
            identity: the device's key.
            allow_list: who may take part, by the registry.
            server_key: the public key of the server the device was enrolled with.
            policy: its owner's floors.
            vault: where the session is noted, so that it is not taken part in twice.
            now_s: the device's clock, seconds since 1970, UTC.
            random: where keys come from.

        Raises:
            MalformedMessageError, OfferSignatureError, UnsupportedSuiteError, PolicyViolationError, DeadlineError,
            ReplayError, ParticipationLimitError, UnknownDeviceError: as their docstrings say.
        """
        parsed = Offer.read(offer)
        if not parsed.is_signed_by(server_key):
            raise OfferSignatureError("the offer is not signed by the server this device was enrolled with")
        policy.check(parsed, now_s=now_s)
        if identity.public not in allow_list:
            raise UnknownDeviceError("this device is not on the allow-list")
        vault.admit(parsed.session, most=policy.most_sessions)
        session = cls(parsed, identity, random or SecureRandom())
        return session, session._advertise()

    def _advertise(self) -> bytes:
        """Make this session's keys and the message that tells of them."""
        secrets, random = self._secrets, self._random
        secrets.encryption, secrets.mask, secrets.seed = (random.token_bytes(KEY_BYTES) for _ in range(3))
        mine = Advertisement(
            device=self._identity.public,
            offer_hash=self._offer_hash,
            encryption_key=AgreementKey(secrets.encryption).public,
            mask_key=AgreementKey(secrets.mask).public,
            nonce=random.token_bytes(KEY_BYTES),
        ).signed(self._identity)
        self._own = mine.entry
        return mine.message()

    # -- legs 2 and 3 ------------------------------------------------------------------------------------------

    def share_keys(self, roster: bytes, *, allow_list: AllowList) -> bytes:
        """Check who takes part, and give each neighbour a share of this client's two secrets.

        Raises:
            RosterTamperedError, DuplicateKeyError, DuplicateDeviceError, CohortTooSmallError, BadAdvertisementError,
            UnknownDeviceError, ParamsMismatchError, GraphError: as their docstrings say.
        """
        with self._leg("advertised", "shared"):
            parsed = Roster.read(roster)
            self._accept_roster(parsed, allow_list)
            return self._share()

    def _accept_roster(self, roster: Roster, allow_list: AllowList) -> None:
        """Check a roster and keep what is needed of it."""
        offer, entries = self.offer, roster.entries
        if not offer.least_cohort <= roster.clients <= offer.cohort:
            raise CohortTooSmallError(
                f"{roster.clients} clients take part; {offer.least_cohort} to {offer.cohort} were agreed"
            )
        mine = [index for index, entry in enumerate(entries) if entry.device == self._identity.public]
        if len(mine) != 1 or entries[mine[0]].entry != self._own:
            raise RosterTamperedError("this client's own entry is missing, twice there, or not what it sent")
        self._index = mine[0]
        self._roster_hash = roster_hash(self._offer_hash, entries)
        self._topology = Topology.of(offer, roster.clients, self._roster_hash)
        if (roster.degree, roster.threshold) != (self._topology.degree, self._topology.threshold):
            raise GraphError(
                f"{roster.degree} neighbours and a threshold of {roster.threshold}, where "
                f"{self._topology.degree} and {self._topology.threshold} follow from the roster"
            )
        neighbours = self._topology.neighbours(self._index)
        self._check_devices(entries, allow_list)
        for index in neighbours:
            check_advertisement(entries[index], self._offer_hash, allow_list, who=f"client {index}")
        self._peers = {index: entries[index] for index in (*neighbours, self._index)}

    def _check_devices(self, entries: Sequence[Advertisement], allow_list: AllowList) -> None:
        """Raise unless every entry is one known device's, with keys of its own, for this offer.

        Signatures are checked of the neighbours alone: nobody else's keys are used. Devices are in ascending order, so
        that none has two seats.
        """
        last, keys = b"", set[bytes]()
        for index, entry in enumerate(entries):
            if entry.device <= last:
                same = "twice" if entry.device == last else "out of order"
                raise DuplicateDeviceError(f"client {index}: a device is in the roster {same}")
            last = entry.device
            if {entry.encryption_key, entry.mask_key} & keys or entry.encryption_key == entry.mask_key:
                raise DuplicateKeyError(f"client {index}: a key is in the roster twice")
            keys |= {entry.encryption_key, entry.mask_key}
            if entry.offer_hash != self._offer_hash:
                raise ParamsMismatchError(f"client {index}: it advertised for another offer")
            if entry.device not in allow_list:
                raise UnknownDeviceError(f"client {index}: its device is not on the allow-list")

    def _share(self) -> bytes:
        """Split this client's secrets and encrypt a share of each for every neighbour."""
        secrets, topology = self._secrets, self._topology
        holders = topology.holders(self._index)
        points = [holder + 1 for holder in holders]
        of_key = split(secrets.mask, topology.threshold, points, self._random)
        of_seed = split(secrets.seed, topology.threshold, points, self._random)
        commitment, ciphertexts = seed_commitment(secrets.seed), dict[int, bytes]()
        own = AgreementKey(secrets.encryption)
        secrets.encryption = b""  # each neighbour's key is derived now, in both directions
        for holder, key_share, seed_share in zip(holders, of_key, of_seed, strict=True):
            pair = share_to_bytes(key_share), share_to_bytes(seed_share)
            if holder == self._index:  # on the complete graph a client holds a share of its own seed
                secrets.held[holder] = pair
                continue
            shared = own.agree(self._peers[holder].encryption_key)
            if shared is None:
                raise BadAdvertisementError(f"client {holder}: its encryption key is a point of small order")
            secrets.receiving[holder] = share_key(shared, self._roster_hash, holder, self._index)
            bound = associated_data(self._roster_hash, self._index, holder, commitment)
            sending = share_key(shared, self._roster_hash, self._index, holder)
            ciphertexts[holder] = seal(sending, b"".join(pair), bound)
        header = ShareHeader(
            owner=self._index, commitment=commitment, ciphertexts_sha256=ShareKeys.hash_of(ciphertexts)
        ).signed(self._roster_hash, self._identity)
        return ShareKeys(header=header, ciphertexts=ciphertexts).message()

    # -- legs 4 and 5 ------------------------------------------------------------------------------------------

    def accept_shares(self, deliver: bytes) -> None:
        """Check and keep the neighbours' shares.

        Raises:
            NotANeighbourError, RosterInconsistentError, BadShareSignatureError, ShareDecryptError,
            TooFewNeighboursError, TooFewSurvivorsError: as their docstrings say.
        """
        with self._leg("shared", "ready"):
            parsed, topology = Deliver.read(deliver), self._topology
            neighbours = set(topology.neighbours(self._index))
            if strangers := set(parsed.shares) - neighbours:
                raise NotANeighbourError(f"shares of {sorted(strangers)}, who are no neighbours")
            sharing = set(parsed.sharers)
            if parsed.clients != topology.clients or set(parsed.shares) != sharing & neighbours:
                raise RosterInconsistentError("the list of those that shared contradicts the shares that came with it")
            if self._index not in sharing:
                raise RosterInconsistentError("this client shared, and is not in the list of those that did")
            if len(sharing) < self.offer.least_survivors:
                raise TooFewSurvivorsError(
                    f"{len(sharing)} clients shared, and {self.offer.least_survivors} must survive"
                )
            if len(sharing & set(topology.holders(self._index))) < topology.threshold:
                raise TooFewNeighboursError(
                    f"{len(parsed.shares)} neighbours shared; the threshold is {topology.threshold}"
                )
            for owner, (header, ciphertext) in parsed.shares.items():
                self._secrets.held[owner] = self._opened(header, ciphertext)
            self._secrets.receiving.clear()
            self._sharers = tuple(parsed.sharers)

    def _opened(self, header: ShareHeader, ciphertext: bytes) -> tuple[bytes, bytes]:
        """Return the two shares a neighbour sent."""
        owner = header.owner
        if not verify(self._peers[owner].device, header.signature, header.digest(self._roster_hash)):
            raise BadShareSignatureError(f"client {owner} did not sign the header of its shares")
        bound = associated_data(self._roster_hash, owner, self._index, header.commitment)
        pair = open_sealed(self._secrets.receiving[owner], ciphertext, bound)
        if pair is None:
            raise ShareDecryptError(f"the shares of client {owner} do not decrypt")
        try:
            for at in (0, SHARE_BYTES):
                share_from_bytes(pair[at : at + SHARE_BYTES])
        except MalformedMessageError as error:
            raise ShareDecryptError(f"what client {owner} encrypted are no shares") from error
        return pair[:SHARE_BYTES], pair[SHARE_BYTES:]

    def check_model(self, sha256: bytes) -> None:
        """Raise, and end the session, unless the model that came is the one the offer names.

        Raises:
            ModelHashMismatchError: it is another.
        """
        with self._leg("ready", "checked"):
            if not hmac.compare_digest(sha256, self.offer.model_sha256):
                raise ModelHashMismatchError("the model that came is not the one whose hash the server signed")

    def mask(self, update: EncodedUpdate, *, threads: int = 1) -> bytes:
        """Return the masked vector; the secrets that made the masks are let go of.

        Raises:
            TypeError: ``update`` is no ``EncodedUpdate``.
            PolicyViolationError: it was encoded otherwise than the offer says.
        """
        if not isinstance(update, EncodedUpdate):
            raise TypeError(f"only an EncodedUpdate can be masked, got {type(update).__name__}; encode it first")
        with self._leg("checked", "masked"):
            if update.encoding != self.offer.encoding:
                raise PolicyViolationError("the update was encoded otherwise than the offer says")
            if update.words.shape != (self.offer.encoding.words,):
                raise VectorLengthError(f"expected {self.offer.encoding.words} words, got {update.words.shape}")
            masked = update.words.astype("<u8", copy=True)
            plus, minus = self._mask_keys()
            add_masks(masked, plus=plus, minus=minus, suite=self.offer.suite, threads=threads)
            self._secrets.mask = self._secrets.seed = b""
            vector = masked.data.cast("B")
            shared = sharers_hash(self._roster_hash, self._topology.clients, self._sharers)
            hashed = tagged_hash("vector", vector)
            signature = self._identity.sign(MaskedInput.digest(self._index, shared, hashed))
            return MaskedInput(vector=vector, sharers_hash=shared, vector_hash=hashed, signature=signature).message()

    def _mask_keys(self) -> tuple[list[bytes], list[bytes]]:
        """Return the keys of the masks that are added, and of those that are taken away."""
        plus, minus = [self_mask_key(self._secrets.seed, self._roster_hash, self._index)], list[bytes]()
        own = AgreementKey(self._secrets.mask)
        for peer in sorted(set(self._sharers) & set(self._topology.neighbours(self._index))):
            key = pair_mask_key(own, self._peers[peer].mask_key, self._roster_hash, self._index, peer)
            if key is None:
                raise BadAdvertisementError(f"client {peer}: its mask key is a point of small order")
            (plus if peer > self._index else minus).append(key)
        return plus, minus

    # -- legs 6 to 9 -------------------------------------------------------------------------------------------

    def confirm(self, survivors: bytes) -> bytes:
        """Check the list of survivors and sign it (``active`` only).

        Raises:
            SurvivorSubsetError, SelfNotSurvivorError, TooFewSurvivorsError: as their docstrings say.
        """
        with self._leg("masked", "confirmed"):
            if self.offer.mode != "active":
                raise StageError("no list is confirmed in semi-honest mode")
            self._accept_survivors(survivors)
            return Consistent(signature=self._identity.sign(self._view())).message()

    def unmask(self, last: bytes) -> bytes:
        """Return one share of each client whose shares this one holds; the session is over before it is sent.

        Args:
            last: the signatures of others under the same list (``active``), or the list of survivors itself.

        Raises:
            SurvivorInconsistencyError, TooFewSignaturesError, and in semi-honest mode what ``confirm`` raises.
        """
        active = self.offer.mode == "active"
        with self._leg("confirmed" if active else "masked", "spent"):
            if active:
                self._check_signatures(Signatures.read(last))
            else:
                self._accept_survivors(last)
            survived = set(self._survivors)
            shares = {
                owner: of_seed if owner in survived else of_key
                for owner, (of_key, of_seed) in self._secrets.held.items()
            }
            self._secrets.wipe()
            return Unmask(shares=shares).message()

    def _accept_survivors(self, data: bytes) -> None:
        """Check and keep the list of survivors."""
        parsed, topology = Survivors.read(data), self._topology
        survivors = set(parsed.survivors)
        if parsed.clients != topology.clients or not survivors <= set(self._sharers):
            raise SurvivorSubsetError("a survivor was not among those that shared their secrets")
        if self._index not in survivors:
            raise SelfNotSurvivorError("this client sent its vector, and is not among the survivors")
        least = max(self.offer.least_survivors, topology.least_survivors)
        if len(survivors) < least:
            raise TooFewSurvivorsError(f"{len(survivors)} clients survived; {least} are needed")
        self._survivors = tuple(parsed.survivors)

    def _view(self) -> bytes:
        """Return what this client signs: the roster, who shared and who survived."""
        return Consistent.digest(self._roster_hash, self._topology.clients, self._sharers, self._survivors)

    def _check_signatures(self, signatures: Signatures) -> None:
        """Raise unless at least t neighbours (or this client itself) confirmed the very same list."""
        view, survived = self._view(), set(self._survivors)
        for index, signature in signatures.signatures.items():
            if index not in self._peers or index not in survived:
                raise TooFewSignaturesError(f"a signature of client {index}, who is no neighbour or did not survive")
            if not verify(self._peers[index].device, signature, view):
                raise SurvivorInconsistencyError(f"client {index} did not confirm the list this client was shown")
        if len(signatures.signatures) < self._topology.threshold:
            raise TooFewSignaturesError(
                f"{len(signatures.signatures)} confirmed the list; the threshold is {self._topology.threshold}"
            )

    # -- between the legs --------------------------------------------------------------------------------------

    @property
    def stage(self) -> str:
        """``advertised``, ``shared``, ``ready``, ``checked``, ``masked``, ``confirmed``, ``spent``, or ``ended``."""
        return self._stage

    def to_bytes(self) -> bytes:
        """Return all of it, secrets included: to be sealed."""
        secrets = self._secrets
        state: dict[str, Any] = {
            "stage": self._stage,
            "offer": self.offer.message().hex(),
            "own": self._own.hex(),
            "index": self._index,
            "roster": self._roster_hash.hex(),
            "clients": self._topology.clients,
            "peers": {str(index): entry.entry.hex() for index, entry in self._peers.items()},
            "sharers": list(self._sharers),
            "survivors": list(self._survivors),
            "secrets": [secrets.encryption.hex(), secrets.mask.hex(), secrets.seed.hex()],
            "receiving": {str(peer): key.hex() for peer, key in secrets.receiving.items()},
            "held": {str(owner): [share.hex() for share in pair] for owner, pair in secrets.held.items()},
        }
        return json.dumps(state).encode()

    @classmethod
    def from_bytes(cls, state: bytes, *, identity: SigningKey, random: SecureRandom | None = None) -> ClientSession:
        """Return the session that ``to_bytes`` kept."""
        table = json.loads(state)
        parsed = Offer.read(bytes.fromhex(table["offer"]))
        session = cls(parsed, identity, random or SecureRandom())
        session._stage, session._index = table["stage"], table["index"]
        session._own, session._roster_hash = bytes.fromhex(table["own"]), bytes.fromhex(table["roster"])
        if session._roster_hash:
            session._topology = Topology.of(parsed, table["clients"], session._roster_hash)
        session._peers = {int(at): Advertisement.of_entry(bytes.fromhex(e)) for at, e in table["peers"].items()}
        session._sharers, session._survivors = tuple(table["sharers"]), tuple(table["survivors"])
        encryption, mask, seed = (bytes.fromhex(each) for each in table["secrets"])
        held = {int(owner): (bytes.fromhex(a), bytes.fromhex(b)) for owner, (a, b) in table["held"].items()}
        receiving = {int(peer): bytes.fromhex(key) for peer, key in table["receiving"].items()}
        session._secrets = _Secrets(encryption=encryption, mask=mask, seed=seed, receiving=receiving, held=held)
        return session

    def end(self) -> None:
        """End the session and let go of its secrets."""
        self._secrets.wipe()
        self._stage = "ended"

    def _leg(self, due: str, following: str) -> _Leg:
        """Return what guards one leg."""
        return _Leg(self, due, following)


class _Leg:
    """Runs one leg: only when it is due, and any error ends the session."""

    def __init__(self, session: ClientSession, due: str, following: str) -> None:
        self._session, self._due, self._following = session, due, following

    def __enter__(self) -> None:
        if self._session._stage != self._due:
            stage = self._session._stage
            self._session.end()
            raise StageError(f"the session is {stage}; this message is for one that is {self._due}")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._session._stage = self._following
        else:
            self._session.end()
