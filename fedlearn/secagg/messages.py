"""The ten messages of a session as frozen dataclasses, each with the bytes it travels as.

Legs with an even number go from the server to a client, the others come back. Parsing checks the form and takes no more
memory than the message has; what a message *says* is checked by the session that receives it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from fedlearn.secagg.encoding import Encoding
from fedlearn.secagg.errors import MalformedMessageError, VectorLengthError
from fedlearn.secagg.graph import counts
from fedlearn.secagg.keys import KEY_BYTES, SIGNATURE_BYTES, SigningKey, tagged_hash, verify
from fedlearn.secagg.shamir import SHARE_BYTES
from fedlearn.secagg.wire import Reader, Writer, bitmap, members

__all__ = [
    "CIPHERTEXT_BYTES",
    "MODES",
    "Advertisement",
    "Consistent",
    "Deliver",
    "MaskedInput",
    "Mode",
    "Offer",
    "Roster",
    "ShareHeader",
    "ShareKeys",
    "Signatures",
    "Survivors",
    "Unmask",
]

Mode = Literal["semi-honest", "active"]
MODES: tuple[Mode, ...] = get_args(Mode)

CIPHERTEXT_BYTES = 2 * SHARE_BYTES + 16
_HASH_BYTES = 32
_MOST_CLIENTS = 1 << 20
_MOST_SMALL = 1 << 24
_HEADER_BYTES = 4 + 2 * _HASH_BYTES + SIGNATURE_BYTES
_ADVERTISEMENT_BYTES = 5 * KEY_BYTES + SIGNATURE_BYTES

OFFER, ADVERTISE, ROSTER, SHARE_KEYS, DELIVER, MASKED_INPUT, SURVIVORS, CONSISTENT, SIGNATURES, UNMASK = range(10)


@dataclass(frozen=True, kw_only=True, slots=True)
class Offer:
    """Leg 0: what a client is asked to take part in, signed by the server.

    Attributes:
        suite: the cipher of the masks, by number.
        task: the learning problem's name.
        round_number, attempt: which round, and which try of it.
        session: 32 random bytes; no two sessions share them.
        mode: ``active``, or ``semi-honest`` without the consistency leg.
        colluding, dropping: γ and δ, the shares of the cohort that may collude with the server, or be lost, and the
            parameters of a sparse graph still hold.
        cohort: how many were invited; no more than that are summed.
        least_cohort: how many must advertise.
        least_survivors: how many vectors must be in the sum.
        encoding: how updates become integers, noise included.
        model_sha256: the hash of the model that will be sent, 32 bytes.
        plan_sha256: the hash of what clients are asked to do with it, 32 bytes: of two clients that train otherwise one
            might learn nothing, and the sum would be the other's.
        deadline_s: when the round ends, in seconds since 1970, UTC.
        signature: over all of it.
    """

    suite: int
    task: str
    round_number: int
    attempt: int
    session: bytes
    mode: Mode
    colluding: float
    dropping: float
    cohort: int
    least_cohort: int
    least_survivors: int
    encoding: Encoding
    model_sha256: bytes
    plan_sha256: bytes
    deadline_s: int
    signature: bytes = bytes(SIGNATURE_BYTES)

    @property
    def hash(self) -> bytes:
        """``ph``: SHA-256 over every field but the signature."""
        return tagged_hash("offer", self._body().done())

    def signed(self, key: SigningKey) -> Offer:
        """Return it with the server's signature."""
        return replace(self, signature=key.sign(tagged_hash("offer-signature", self.hash)))

    def message(self) -> bytes:
        """Return it as leg 0."""
        return self._body().fixed(self.signature).done()

    def is_signed_by(self, public: bytes) -> bool:
        """Return whether the server with this key signed it."""
        return verify(public, self.signature, tagged_hash("offer-signature", self.hash))

    @property
    def assured(self) -> int:
        """How many honest clients' vectors, and noise, are in every sum: the fewest survivors less the colluders."""
        return self.least_survivors - counts(self.cohort, self.colluding, 0.0)[0]

    @classmethod
    def read(cls, data: bytes) -> Offer:
        """Parse it.

        Raises:
            MalformedMessageError: it is none.
        """
        reader = Reader(data, OFFER, longest=4096)
        suite, task = reader.integer(1), _text(reader.blob(most=512))
        round_number, attempt = reader.integer(4), reader.integer(4)
        session, mode = reader.fixed(KEY_BYTES), MODES[reader.integer(1, most=len(MODES) - 1)]
        colluding, dropping = reader.number(), reader.number()
        cohort, least_cohort, least_survivors = (reader.integer(4, most=_MOST_CLIENTS) for _ in range(3))
        encoding = Encoding.read(reader)
        model, plan, deadline_s = reader.fixed(_HASH_BYTES), reader.fixed(_HASH_BYTES), reader.integer(8)
        signature = reader.fixed(SIGNATURE_BYTES)
        reader.end()
        return cls(
            suite=suite,
            task=task,
            round_number=round_number,
            attempt=attempt,
            session=session,
            mode=mode,
            colluding=colluding,
            dropping=dropping,
            cohort=cohort,
            least_cohort=least_cohort,
            least_survivors=least_survivors,
            encoding=encoding,
            model_sha256=model,
            plan_sha256=plan,
            deadline_s=deadline_s,
            signature=signature,
        )

    def _body(self) -> Writer:
        """Return everything but the signature."""
        writer = Writer(OFFER).integer(self.suite, 1).blob(self.task.encode())
        writer.integer(self.round_number, 4).integer(self.attempt, 4).fixed(self.session)
        writer.integer(MODES.index(self.mode), 1).number(self.colluding).number(self.dropping)
        for count in (self.cohort, self.least_cohort, self.least_survivors):
            writer.integer(count, 4)
        self.encoding.write(writer)
        return writer.fixed(self.model_sha256).fixed(self.plan_sha256).integer(self.deadline_s, 8)


@dataclass(frozen=True, kw_only=True, slots=True)
class Advertisement:
    """Leg 1: a device says that it takes part, and with which keys for this session.

    Attributes:
        device: its Ed25519 public key, which is who it is.
        offer_hash: the offer it answers.
        encryption_key, mask_key: X25519 public keys.
        nonce: 32 random bytes.
        signature: the device's.
    """

    device: bytes
    offer_hash: bytes
    encryption_key: bytes
    mask_key: bytes
    nonce: bytes
    signature: bytes = bytes(SIGNATURE_BYTES)

    @property
    def body(self) -> bytes:
        """Everything but the signature, 160 bytes."""
        return self.device + self.offer_hash + self.encryption_key + self.mask_key + self.nonce

    @property
    def entry(self) -> bytes:
        """Everything, 224 bytes: its place in a roster."""
        return self.body + self.signature

    def signed(self, key: SigningKey) -> Advertisement:
        """Return it with the device's signature."""
        return replace(self, signature=key.sign(tagged_hash("advertisement", self.body)))

    @property
    def is_signed(self) -> bool:
        """Whether the device it names signed it."""
        return verify(self.device, self.signature, tagged_hash("advertisement", self.body))

    def message(self) -> bytes:
        """Return it as leg 1."""
        return Writer(ADVERTISE).fixed(self.entry).done()

    @classmethod
    def read(cls, data: bytes) -> Advertisement:
        """Parse leg 1."""
        reader = Reader(data, ADVERTISE, longest=512)
        found = cls.from_reader(reader)
        reader.end()
        return found

    @classmethod
    def of_entry(cls, entry: bytes) -> Advertisement:
        """Return the advertisement of a roster's entry."""
        return cls.read(Writer(ADVERTISE).fixed(entry).done())

    @classmethod
    def from_reader(cls, reader: Reader) -> Advertisement:
        """Take an entry from a message."""
        keys = [reader.fixed(KEY_BYTES) for _ in range(5)]
        return cls(
            device=keys[0],
            offer_hash=keys[1],
            encryption_key=keys[2],
            mask_key=keys[3],
            nonce=keys[4],
            signature=reader.fixed(SIGNATURE_BYTES),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Roster:
    """Leg 2: who takes part, all of them: from a part of it no client could tell that a device has two seats.

    Attributes:
        degree: k, how many neighbours each has.
        threshold: t, how many shares a secret needs.
        entries: the advertisements in order of their devices; a client's index is its place.
    """

    degree: int
    threshold: int
    entries: Sequence[Advertisement]

    @property
    def clients(self) -> int:
        """How many take part: n."""
        return len(self.entries)

    def message(self) -> bytes:
        """Return it as leg 2."""
        writer = Writer(ROSTER).integer(self.degree, 4).integer(self.threshold, 4).integer(self.clients, 4)
        return writer.fixed(b"".join(entry.entry for entry in self.entries)).done()

    @classmethod
    def read(cls, data: bytes) -> Roster:
        """Parse it.

        Raises:
            MalformedMessageError: it is none.
        """
        reader = Reader(data, ROSTER, longest=_MOST_SMALL)
        degree, threshold = (reader.integer(4, most=_MOST_CLIENTS) for _ in range(2))
        clients = reader.integer(4, most=len(data) // _ADVERTISEMENT_BYTES)
        entries = tuple(Advertisement.from_reader(reader) for _ in range(clients))
        reader.end()
        return cls(degree=degree, threshold=threshold, entries=entries)


@dataclass(frozen=True, kw_only=True, slots=True)
class ShareHeader:
    """What a client signs about the shares it made: a commitment to b, and the hash of all its ciphertexts."""

    owner: int
    commitment: bytes
    ciphertexts_sha256: bytes
    signature: bytes = bytes(SIGNATURE_BYTES)

    def digest(self, roster_hash: bytes) -> bytes:
        """Return what is signed."""
        return tagged_hash(
            "shares", roster_hash, self.owner.to_bytes(4, "big"), self.commitment, self.ciphertexts_sha256
        )

    def signed(self, roster_hash: bytes, key: SigningKey) -> ShareHeader:
        """Return it with the owner's signature."""
        return replace(self, signature=key.sign(self.digest(roster_hash)))

    def write(self, writer: Writer) -> None:
        """Append it to a message."""
        writer.integer(self.owner, 4).fixed(self.commitment).fixed(self.ciphertexts_sha256).fixed(self.signature)

    @classmethod
    def from_reader(cls, reader: Reader) -> ShareHeader:
        """Take it from a message."""
        return cls(
            owner=reader.integer(4, most=_MOST_CLIENTS),
            commitment=reader.fixed(_HASH_BYTES),
            ciphertexts_sha256=reader.fixed(_HASH_BYTES),
            signature=reader.fixed(SIGNATURE_BYTES),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ShareKeys:
    """Leg 3: the encrypted shares of a client's two secrets, one ciphertext for each neighbour, and their header."""

    header: ShareHeader
    ciphertexts: dict[int, bytes]

    @staticmethod
    def hash_of(ciphertexts: dict[int, bytes]) -> bytes:
        """Return the hash that the header carries."""
        parts = (index.to_bytes(4, "big") + ciphertexts[index] for index in sorted(ciphertexts))
        return tagged_hash("ciphertexts", b"".join(parts))

    def message(self) -> bytes:
        """Return it as leg 3."""
        writer = Writer(SHARE_KEYS)
        self.header.write(writer)
        writer.integer(len(self.ciphertexts), 4)
        for index in sorted(self.ciphertexts):
            writer.integer(index, 4).fixed(self.ciphertexts[index])
        return writer.done()

    @classmethod
    def read(cls, data: bytes) -> ShareKeys:
        """Parse it."""
        reader = Reader(data, SHARE_KEYS, longest=_MOST_SMALL)
        header, ciphertexts, last = ShareHeader.from_reader(reader), dict[int, bytes](), -1
        for _ in range(reader.integer(4, most=len(data) // CIPHERTEXT_BYTES)):
            last = _ascending(reader, last, _MOST_CLIENTS)
            ciphertexts[last] = reader.fixed(CIPHERTEXT_BYTES)
        reader.end()
        return cls(header=header, ciphertexts=ciphertexts)


@dataclass(frozen=True, kw_only=True, slots=True)
class Deliver:
    """Leg 4: who shared (U2), and what each neighbour among them sent to this client."""

    clients: int
    sharers: Sequence[int]
    shares: dict[int, tuple[ShareHeader, bytes]]

    def message(self) -> bytes:
        """Return it as leg 4."""
        writer = Writer(DELIVER).integer(self.clients, 4).fixed(bitmap(self.sharers, self.clients))
        writer.integer(len(self.shares), 4)
        for index in sorted(self.shares):
            header, ciphertext = self.shares[index]
            header.write(writer)
            writer.fixed(ciphertext)
        return writer.done()

    @classmethod
    def read(cls, data: bytes) -> Deliver:
        """Parse it."""
        reader = Reader(data, DELIVER, longest=_MOST_SMALL)
        clients, sharers = _members(reader, len(data))
        shares: dict[int, tuple[ShareHeader, bytes]] = {}
        last = -1
        for _ in range(reader.integer(4, most=len(data) // (_HEADER_BYTES + CIPHERTEXT_BYTES))):
            header = ShareHeader.from_reader(reader)
            if not last < header.owner < clients:
                raise MalformedMessageError("the shares are not in ascending order of their owners")
            last = header.owner
            shares[last] = (header, reader.fixed(CIPHERTEXT_BYTES))
        reader.end()
        return cls(clients=clients, sharers=sharers, shares=shares)


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskedInput:
    """Leg 5: a client's masked vector, with hashes of it and of U2, signed.

    Attributes:
        vector: the packed and masked vector, little-endian words.
        sharers_hash: of (roster, U2).
        vector_hash: of ``vector``.
        signature: the client's.
    """

    vector: bytes | memoryview
    sharers_hash: bytes
    vector_hash: bytes
    signature: bytes = bytes(SIGNATURE_BYTES)

    @staticmethod
    def digest(owner: int, sharers_hash: bytes, vector_hash: bytes) -> bytes:
        """Return what is signed; the roster is in ``sharers_hash``."""
        return tagged_hash("masked-input", owner.to_bytes(4, "big"), sharers_hash, vector_hash)

    def message(self) -> bytes:
        """Return it as leg 5."""
        writer = Writer(MASKED_INPUT).fixed(self.sharers_hash).fixed(self.vector_hash).fixed(self.signature)
        return writer.integer(len(self.vector), 8).fixed(bytes(self.vector)).done()

    @classmethod
    def read(cls, data: bytes, *, words: int) -> MaskedInput:
        """Parse it.

        Raises:
            MalformedMessageError: it is none.
            VectorLengthError: the vector has not ``words`` words.
        """
        reader = Reader(data, MASKED_INPUT, longest=1 << 44)  # it is here already, and is not copied
        sharers_hash, vector_hash = reader.fixed(_HASH_BYTES), reader.fixed(_HASH_BYTES)
        signature, size = reader.fixed(SIGNATURE_BYTES), reader.integer(8)
        if size != 8 * words:
            raise VectorLengthError(f"expected a vector of {8 * words} bytes, got {size}")
        vector = reader.view(size)
        reader.end()
        return cls(vector=vector, sharers_hash=sharers_hash, vector_hash=vector_hash, signature=signature)


@dataclass(frozen=True, kw_only=True, slots=True)
class Survivors:
    """Leg 6: whose vectors are in the sum (U3): one list, so that each client gives one kind of share of each other."""

    clients: int
    survivors: Sequence[int]

    def message(self) -> bytes:
        """Return it as leg 6."""
        return Writer(SURVIVORS).integer(self.clients, 4).fixed(bitmap(self.survivors, self.clients)).done()

    @classmethod
    def read(cls, data: bytes) -> Survivors:
        """Parse it."""
        reader = Reader(data, SURVIVORS, longest=_MOST_SMALL)
        clients, survivors = _members(reader, len(data))
        reader.end()
        return cls(clients=clients, survivors=survivors)


@dataclass(frozen=True, kw_only=True, slots=True)
class Consistent:
    """Leg 7: a client's signature over the roster, U2 and U3 as it was shown them."""

    signature: bytes

    @staticmethod
    def digest(roster_hash: bytes, clients: int, sharers: Sequence[int], survivors: Sequence[int]) -> bytes:
        """Return what is signed."""
        return tagged_hash("consistent", roster_hash, bitmap(sharers, clients), bitmap(survivors, clients))

    def message(self) -> bytes:
        """Return it as leg 7."""
        return Writer(CONSISTENT).fixed(self.signature).done()

    @classmethod
    def read(cls, data: bytes) -> Consistent:
        """Parse it."""
        reader = Reader(data, CONSISTENT, longest=256)
        signature = reader.fixed(SIGNATURE_BYTES)
        reader.end()
        return cls(signature=signature)


@dataclass(frozen=True, kw_only=True, slots=True)
class Signatures:
    """Leg 8: who confirmed the list of survivors."""

    signatures: dict[int, bytes]

    def message(self) -> bytes:
        """Return it as leg 8."""
        writer = Writer(SIGNATURES).integer(len(self.signatures), 4)
        for index in sorted(self.signatures):
            writer.integer(index, 4).fixed(self.signatures[index])
        return writer.done()

    @classmethod
    def read(cls, data: bytes) -> Signatures:
        """Parse it."""
        reader = Reader(data, SIGNATURES, longest=_MOST_SMALL)
        signatures, last = dict[int, bytes](), -1
        for _ in range(reader.integer(4, most=len(data) // SIGNATURE_BYTES)):
            last = _ascending(reader, last, _MOST_CLIENTS)
            signatures[last] = reader.fixed(SIGNATURE_BYTES)
        reader.end()
        return cls(signatures=signatures)


@dataclass(frozen=True, kw_only=True, slots=True)
class Unmask:
    """Leg 9: for each client whose shares were held, one of the two: of b where it survived, of the mask key else."""

    shares: dict[int, bytes]

    def message(self) -> bytes:
        """Return it as leg 9."""
        writer = Writer(UNMASK).integer(len(self.shares), 4)
        for index in sorted(self.shares):
            writer.integer(index, 4).fixed(self.shares[index])
        return writer.done()

    @classmethod
    def read(cls, data: bytes) -> Unmask:
        """Parse it."""
        reader = Reader(data, UNMASK, longest=_MOST_SMALL)
        shares, last = dict[int, bytes](), -1
        for _ in range(reader.integer(4, most=len(data) // SHARE_BYTES)):
            last = _ascending(reader, last, _MOST_CLIENTS)
            shares[last] = reader.fixed(SHARE_BYTES)
        reader.end()
        return cls(shares=shares)


def _ascending(reader: Reader, last: int, clients: int) -> int:
    """Return the next index of a list, which is above the last and below the number of clients."""
    index = reader.integer(4)
    if not last < index < clients:
        raise MalformedMessageError(f"index {index} after {last}, of {clients} clients")
    return index


def _members(reader: Reader, length: int) -> tuple[int, Sequence[int]]:
    """Return the number of clients and those that a bitmap names."""
    clients = reader.integer(4, most=min(_MOST_CLIENTS, 8 * length))
    return clients, members(reader.fixed(-(-clients // 8)), clients)


def _text(data: bytes) -> str:
    """Return UTF-8 text."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise MalformedMessageError("a name is not UTF-8") from error
