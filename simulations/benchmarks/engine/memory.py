"""How much memory a process and all that it started hold: shared pages counted once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from pathlib import Path

__all__ = ["Sampler", "end_processes", "held_bytes", "started_by"]

_EVERY_S = 0.02
_PROC = Path("/proc")


def started_by(pid: int) -> list[int]:
    """Return the processes below this one, itself left out."""
    children: dict[int, list[int]] = {}
    for folder in _PROC.iterdir():
        if folder.name.isdecimal():
            with contextlib.suppress(OSError, IndexError, ValueError):  # it may have ended
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(folder.name))
    found, waiting = [], [pid]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def held_bytes(pid: int) -> int:
    """Return the proportional set size of a process and all below it, in bytes."""
    return sum(_pss_bytes(each) for each in (pid, *started_by(pid)))


def _pss_bytes(pid: int) -> int:
    """Return the proportional set size of one process; 0 where it has ended."""
    with contextlib.suppress(OSError):
        for line in (_PROC / str(pid) / "smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


def end_processes(pids: set[int]) -> None:
    """End processes, and wait for them a moment."""
    for word in (signal.SIGTERM, signal.SIGKILL):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, word)
        deadline_s = time.monotonic() + 3
        while time.monotonic() < deadline_s and (pids := {pid for pid in pids if _lives(pid)}):
            time.sleep(0.05)


def _lives(pid: int) -> bool:
    """Return whether a process is there and no zombie."""
    try:
        return (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Sampler:
    """Looks at a process and what it started every 20 ms; a peak between two looks is missed.

    Attributes:
        peak_bytes: the most that was seen.
    """

    def __init__(self, pid: int) -> None:
        self.peak_bytes = 0
        self._pid = pid
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        """Look again and again."""
        while not self._over.wait(_EVERY_S):
            self._look()

    def _look(self) -> None:
        """Look once."""
        self.peak_bytes = max(self.peak_bytes, held_bytes(self._pid))
