"""Who is a device: a list of public keys, signed by a registry that the aggregator does not control."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fedlearn.errors import MissingError
from fedlearn.files import write_atomic
from fedlearn.secagg.keys import KEY_BYTES, SigningKey, tagged_hash, verify

__all__ = ["AllowList"]


@dataclass(frozen=True)
class AllowList:
    """The devices that may take part.

    Attributes:
        devices: their Ed25519 public keys.
    """

    devices: frozenset[bytes]

    @classmethod
    def of(cls, devices: Iterable[bytes]) -> AllowList:
        """Return the list of these keys."""
        return cls(frozenset(devices))

    def __contains__(self, device: object) -> bool:
        return device in self.devices

    def __len__(self) -> int:
        return len(self.devices)

    def write(self, path: Path, registry: SigningKey) -> None:
        """Write it, signed by the registry, as JSON."""
        names = sorted(device.hex() for device in self.devices)
        body = {"devices": names, "signature": registry.sign(_digest(names)).hex(), "version": 1}
        write_atomic(path, (json.dumps(body, indent=1, sort_keys=True) + "\n").encode())

    @classmethod
    def read(cls, path: Path, registry: bytes) -> AllowList:
        """Return the list in a file, if the registry whose public key this is signed it.

        Raises:
            MissingError: the file is missing, is no allow-list, or somebody else signed it.
        """
        try:
            body = json.loads(path.read_bytes())
            names, signature = [str(name) for name in body["devices"]], bytes.fromhex(body["signature"])
            devices = frozenset(bytes.fromhex(name) for name in names)
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise MissingError(f"{path}: no readable allow-list; make one with `fedlearn secagg allow`") from error
        if body.get("version") != 1 or names != sorted(set(names)) or any(len(each) != KEY_BYTES for each in devices):
            raise MissingError(f"{path}: not an allow-list of this version; make one with `fedlearn secagg allow`")
        if not verify(registry, signature, _digest(names)):
            raise MissingError(f"{path}: the registry {registry.hex()} did not sign this list; do not use it")
        return cls(devices)


def _digest(names: list[str]) -> bytes:
    """Return what the registry signs."""
    return tagged_hash("allow-list", json.dumps(names, separators=(",", ":")).encode())
