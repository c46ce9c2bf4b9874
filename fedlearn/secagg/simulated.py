"""The keys of a simulation: those of every virtual client, of a server and of a registry, all from one secret.

They are as random as real ones, and one machine has them all: what a simulation masks, it hides from nobody. A device
never looks here.
"""

from __future__ import annotations

import fcntl
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from fedlearn.errors import MissingError
from fedlearn.secagg.allow_list import AllowList
from fedlearn.secagg.keys import KEY_BYTES, SigningKey, derive
from fedlearn.secagg.vault import FileVault
from fedlearn.sources import SecureRandom

__all__ = ["SimulatedIdentities"]

_PREFIX = "fedlearn-keys-"
_SEED, _RUNNING = "seed", "running"
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
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
        (folder / _SEED).write_bytes(random.token_bytes(KEY_BYTES))
        (folder / _SEED).chmod(0o600)
        return cls(folder)

    @classmethod
    @contextmanager
    def for_a_run(cls, random: SecureRandom) -> Iterator[SimulatedIdentities]:
        """Make the folder for a run, and remove it at its end.

        The folder is locked meanwhile, by a file that has its name only once it is locked. Those of processes that were
        killed are not, and are removed first.
        """
        identities = cls.create(random)
        folder = identities.folder
        try:
            with (folder / f".{_RUNNING}").open("w") as held:
                fcntl.flock(held, fcntl.LOCK_EX)
                (folder / f".{_RUNNING}").rename(folder / _RUNNING)
                for other in folder.parent.glob(f"{_PREFIX}*"):
                    if other != folder:
                        _remove_left(other)
                yield identities
        finally:
            identities.remove()

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


def _remove_left(folder: Path) -> None:
    """Delete a simulation's keys if nobody holds its lock; the folder of somebody else's is left to them."""
    try:
        with (folder / _RUNNING).open("r+") as held:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
    except OSError:
        return


@lru_cache(maxsize=2)
def _allow_list(identities: SimulatedIdentities, clients: int) -> AllowList:
    """Return the list of all virtual clients, made once a process."""
    return AllowList.of(identities.device(client).public for client in range(clients))
