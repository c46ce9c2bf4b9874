"""The primitives of secure aggregation, each a thin wrapper of ``cryptography``: keys, agreement, derivation, sealing.

Every hash and every signature begins with a tag, so that no value made for one purpose is ever taken for another.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from cryptography.exceptions import InvalidSignature, InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedlearn.errors import MissingError, RunFailedError, UsageError
from fedlearn.sources import SecureRandom

__all__ = [
    "KEY_BYTES",
    "SIGNATURE_BYTES",
    "AgreementKey",
    "SigningKey",
    "derive",
    "open_sealed",
    "seal",
    "tagged_hash",
    "verify",
]

KEY_BYTES = 32
SIGNATURE_BYTES = 64

_PREFIX = b"fedlearn.secagg/1/"
_NONCE = bytes(12)


def tagged_hash(tag: str, *parts: bytes | memoryview) -> bytes:
    """Return SHA-256 over a tag and parts that cannot run into each other: each is preceded by its length.

    >>> tagged_hash("a", b"b", b"c") == tagged_hash("a", b"bc")
    False
    """
    hasher = hashlib.sha256()
    for part in (_PREFIX + tag.encode("ascii"), *parts):
        hasher.update(len(part).to_bytes(8, "big"))
        hasher.update(part)
    return hasher.digest()


class SigningKey:
    """An Ed25519 key: a device's identity, a server's, or a registry's.

    Args:
        private: the 32 bytes of the private key (RFC 8032).
    """

    def __init__(self, private: bytes) -> None:
        self._key = Ed25519PrivateKey.from_private_bytes(private)
        self.public = self._key.public_key().public_bytes_raw()

    @classmethod
    def generate(cls, random: SecureRandom) -> SigningKey:
        """Return a new key."""
        return cls(random.token_bytes(KEY_BYTES))

    @classmethod
    def read(cls, path: Path) -> SigningKey:
        """Return the key in a PEM file.

        Raises:
            MissingError: the file cannot be read, or holds no Ed25519 key.
        """
        try:
            key = serialization.load_pem_private_key(path.read_bytes(), password=None)
        except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise MissingError(f"{path}: no readable key; make one with `fedlearn secagg key {path}`") from error
        if not isinstance(key, Ed25519PrivateKey):
            raise MissingError(f"{path}: not an Ed25519 key; make one with `fedlearn secagg key {path}`")
        return cls(key.private_bytes_raw())

    def write(self, path: Path) -> None:
        """Write the key as PEM, for its owner's eyes only.

        Raises:
            UsageError: the file exists; no key is ever overwritten.
            RunFailedError: it cannot be written.
        """
        encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
        data = self._key.private_bytes(encoding, form, serialization.NoEncryption())
        try:
            with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except FileExistsError as error:
            raise UsageError(f"{path} exists; a key is never overwritten. Name another file") from error
        except OSError as error:
            raise RunFailedError(f"cannot write {path}: {error.strerror}; check the folder, and free space") from error

    def sign(self, message: bytes) -> bytes:
        """Return the signature, 64 bytes."""
        return self._key.sign(message)


def verify(public: bytes, signature: bytes, message: bytes) -> bool:
    """Return whether ``signature`` is that of the Ed25519 key ``public`` over ``message``; never raises."""
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


class AgreementKey:
    """An X25519 private key, read once: that takes as long as agreeing with it.

    Args:
        private: its 32 bytes (RFC 7748).
    """

    def __init__(self, private: bytes) -> None:
        self._key = X25519PrivateKey.from_private_bytes(private)

    @property
    def public(self) -> bytes:
        """The public key, 32 bytes."""
        return self._key.public_key().public_bytes_raw()

    def agree(self, public: bytes) -> bytes | None:
        """Return the secret shared with the owner of ``public``; ``None`` for a point of small order."""
        try:
            return self._key.exchange(X25519PublicKey.from_public_bytes(public))
        except ValueError:
            return None


def derive(secret: bytes, *, salt: bytes, info: bytes, length: int = KEY_BYTES) -> bytes:
    """Return a key by HKDF-SHA256 (RFC 5869)."""
    return HKDF(algorithm=hashes.SHA256(), length=length, salt=salt, info=info).derive(secret)


def seal(key: bytes, plaintext: bytes, associated: bytes, nonce: bytes = _NONCE) -> bytes:
    """Return the AES-256-GCM ciphertext, 16 bytes longer than the plaintext; the key may be used with a nonce once."""
    return AESGCM(key).encrypt(nonce, plaintext, associated)


def open_sealed(key: bytes, ciphertext: bytes, associated: bytes, nonce: bytes = _NONCE) -> bytes | None:
    """Return the plaintext; ``None`` where anything was altered."""
    try:
        return AESGCM(key).decrypt(nonce, ciphertext, associated)
    except (InvalidTag, ValueError):
        return None
