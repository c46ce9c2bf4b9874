"""The keys of a simulation: those of every virtual client, of a server and of a registry, all from one secret.

They are as random as real ones, and one machine has them all: what a simulation masks, it hides from nobody. A device
never looks here.
"""

from __future__ import annotations

import shutil
import tempfile
from functools import lru_cache
from pathlib import Path

from fedlearn.errors import MissingError
from fedlearn.secagg.allow_list import AllowList
from fedlearn.secagg.keys import KEY_BYTES, SigningKey, derive
from fedlearn.secagg.vault import FileVault
from fedlearn.sources import SecureRandom

__all__ = ["SimulatedIdentities"]

_SEED = "seed"
_IN_MEMORY = Path("/dev/shm")  # noqa: S108 - a folder of our own is made in it, with a name that nobody can guess


class SimulatedIdentities:
    """A folder that every process of a simulation can read.

    Args:
        folder: as ``create`` made it.

    Raises:
        MissingError: it is not there (any more).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self._secret = (folder / _SEED).read_bytes()
        except OSError as error:
            raise MissingError(f"{folder}: the simulation's keys are gone; resume the run") from error

    @classmethod
    def create(cls, random: SecureRandom) -> SimulatedIdentities:
        """Make the folder, in memory where the system has such a place."""
        base = _IN_MEMORY if _IN_MEMORY.is_dir() else None
        folder = Path(tempfile.mkdtemp(prefix="fedlearn-keys-", dir=base))
        (folder / _SEED).write_bytes(random.token_bytes(KEY_BYTES))
        (folder / _SEED).chmod(0o600)
        return cls(folder)

    @property
    def server(self) -> SigningKey:
        """The server's key."""
        return self._key(b"server")

    def device(self, client: int) -> SigningKey:
        """Return a virtual client's key."""
        return self._key(b"device" + client.to_bytes(4, "big"))

    def allow_list(self, clients: int) -> AllowList:
        """Return the list of all virtual clients. (Its registry is this machine, so that it is not signed.)"""
        return _allow_list(self, clients)

    def vault(self, client: int) -> FileVault:
        """Return a virtual client's own store."""
        return FileVault(self.folder / "vaults" / str(client))

    def remove(self) -> None:
        """Delete all keys, and what the clients' vaults hold."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _key(self, purpose: bytes) -> SigningKey:
        """Return the key for one purpose."""
        return SigningKey(derive(self._secret, salt=b"fedlearn.secagg/1/simulated", info=purpose))

    def __hash__(self) -> int:
        return hash(self._secret)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SimulatedIdentities) and other._secret == self._secret


@lru_cache(maxsize=2)
def _allow_list(identities: SimulatedIdentities, clients: int) -> AllowList:
    """Return the list of all virtual clients, made once a process."""
    return AllowList.of(identities.device(client).public for client in range(clients))
