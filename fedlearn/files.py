"""Files that are either wholly there or not there at all, whatever dies in between."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

from fedlearn.errors import RunFailedError

__all__ = ["TEMPORARY", "data_home", "write_atomic"]

TEMPORARY = ".tmp"
"""How a file ends that a crash left half written; its name begins with a dot."""


def write_atomic(path: Path, data: bytes, *, secret: bool = False) -> None:
    """Replace ``path`` by ``data``: write beside it, flush to the disk, rename, flush the folder.

    Guarantees: after a crash at any instant ``path`` holds the old bytes or the new ones, never a mix. What is
    ``secret`` only its owner can read.

    Raises:
        RunFailedError: the disk is full or the folder cannot be written; what was there before is kept.
    """
    temporary: str | None = None
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=TEMPORARY)
        with os.fdopen(descriptor, "wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        Path(temporary).chmod(0o600 if secret else 0o644)
        Path(temporary).replace(path)
        temporary = None
        _sync_folder(path.parent)
    except OSError as error:
        hint = "free some space" if error.errno == errno.ENOSPC else "check that the folder exists and is writable"
        raise RunFailedError(f"cannot write {path}: {error.strerror}; {hint}") from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def data_home() -> Path:
    """Return the user's folder for what fedlearn keeps where nobody named a place."""
    base = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(base) / "fedlearn"


def _sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
