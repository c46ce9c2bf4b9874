"""Where a device keeps a session between two legs: one blob that is useless without a key that is used once.

The blob may lie anywhere (Flower keeps it in its ``Context``); its key stays on the device. Opening takes the key away
for good, so that a leg that comes twice finds nothing, and a session that ended leaves nothing that could be read.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from fedlearn.errors import RunFailedError
from fedlearn.secagg.errors import ParticipationLimitError, ReplayError, StageError
from fedlearn.secagg.keys import KEY_BYTES, open_sealed, seal
from fedlearn.sources import SecureRandom

__all__ = ["FileVault", "MemoryVault", "Vault"]


_TAKEN_S = 60.0
_UNUSED_S = 86_400.0


class Vault(Protocol):
    """A device's own store."""

    def admit(self, session: bytes, *, most: int | None = None) -> None:
        """Note that the device takes part in a session.

        Raises:
            ReplayError: it did before.
            ParticipationLimitError: it took part in ``most`` already.
        """

    def seal(self, session: bytes, state: bytes) -> bytes:
        """Return a blob that ``open`` gives the state of, once."""

    def open(self, session: bytes, blob: bytes) -> bytes:
        """Return the state, and forget its key.

        Raises:
            StageError: the key is gone, or is another blob's.
        """

    def forget(self, session: bytes) -> None:
        """Forget the key of a session, if there is one."""


class MemoryVault:
    """A vault for tests and for sessions that live in one process."""

    def __init__(self, random: SecureRandom | None = None) -> None:
        self._random = random or SecureRandom()
        self._seen: set[bytes] = set()
        self._keys: dict[bytes, bytes] = {}

    def admit(self, session: bytes, *, most: int | None = None) -> None:
        """Note that the device takes part in a session."""
        _check(session in self._seen, len(self._seen), most)
        self._seen.add(session)

    def seal(self, session: bytes, state: bytes) -> bytes:
        """Return a blob that ``open`` gives the state of, once."""
        key = self._keys[session] = self._random.token_bytes(KEY_BYTES)
        return seal(key, state, session)

    def open(self, session: bytes, blob: bytes) -> bytes:
        """Return the state, and forget its key."""
        return _opened(self._keys.pop(session, None), session, blob)

    def forget(self, session: bytes) -> None:
        """Forget the key of a session, if there is one."""
        self._keys.pop(session, None)

    def __len__(self) -> int:
        return len(self._keys)


class FileVault:
    """A vault in a folder that only the device's own user can read; processes may share it.

    A key is overwritten and removed when it is used; what a killed process left of one, when the device next takes part
    (after a minute, or after a day where its session was not gone on with). What a flash disk or a copying file system
    keeps of it is beyond a program's reach: put the folder on an encrypted disk, or in memory (``/run``).

    Args:
        folder: made when it is first needed.
        random: where keys come from.
    """

    def __init__(self, folder: Path, random: SecureRandom | None = None) -> None:
        self._folder, self._random = folder, random or SecureRandom()

    def admit(self, session: bytes, *, most: int | None = None) -> None:
        """Note that the device takes part in a session."""
        with self._writing():
            self._sweep()
            seen = self._folder / "seen"
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # of its parents' mode mkdir takes no care
            seen.mkdir(mode=0o700, exist_ok=True)
            if most is not None:
                _check((seen / session.hex()).exists(), sum(1 for _ in seen.iterdir()), most)
            try:
                os.close(os.open(seen / session.hex(), os.O_CREAT | os.O_EXCL, 0o600))
            except FileExistsError:
                _check(True, 0, None)

    def seal(self, session: bytes, state: bytes) -> bytes:
        """Return a blob that ``open`` gives the state of, once."""
        key = self._random.token_bytes(KEY_BYTES)
        with self._writing():
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle = os.open(self._key_file(session), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            with os.fdopen(handle, "wb") as file:
                file.write(key)
        return seal(key, state, session)

    def open(self, session: bytes, blob: bytes) -> bytes:
        """Return the state, and forget its key."""
        return _opened(self._claimed(session), session, blob)

    def forget(self, session: bytes) -> None:
        """Forget the key of a session, if there is one."""
        self._claimed(session)

    def _key_file(self, session: bytes) -> Path:
        """Return where a session's key lies."""
        return self._folder / f"{session.hex()}.key"

    def _claimed(self, session: bytes) -> bytes | None:
        """Take a key: of two that try, one gets it."""
        claimed = self._folder / f".{session.hex()}.{self._random.token_bytes(8).hex()}"
        try:
            self._key_file(session).rename(claimed)
        except OSError:
            return None
        with claimed.open("r+b") as file:
            key = file.read()
            file.seek(0)
            file.write(bytes(len(key)))
            file.flush()
            os.fsync(file.fileno())
        claimed.unlink()
        return key

    def _sweep(self) -> None:
        """Clear what a process that was killed left: a key half taken, or one of a session that nobody went on with."""
        now_s = time.time()
        for left, age_s in ((".*", _TAKEN_S), ("*.key", _UNUSED_S)):
            for path in self._folder.glob(left):
                with contextlib.suppress(OSError):  # another process was quicker
                    if path.is_file() and now_s - path.stat().st_ctime > age_s:
                        path.write_bytes(bytes(KEY_BYTES))
                        path.unlink()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn the system's error into one that says what to do."""
        try:
            yield
        except OSError as error:
            raise RunFailedError(
                f"cannot write {self._folder}: {error.strerror}; free some space or name another folder"
            ) from error


def _check(seen: bool, count: int, most: int | None) -> None:
    """Raise where a session may not be taken part in."""
    if seen:
        raise ReplayError("this device has taken part in the session before")
    if most is not None and count >= most:
        raise ParticipationLimitError(f"this device has taken part {count} times, and its owner permits {most}")


def _opened(key: bytes | None, session: bytes, blob: bytes) -> bytes:
    """Return the state in a blob."""
    state = None if key is None else open_sealed(key, blob, session)
    if state is None:
        raise StageError("the session is over, or this leg was answered before: its key is gone")
    return state
