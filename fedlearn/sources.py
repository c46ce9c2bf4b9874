"""Where chance and time come from: always an argument, never a global.

``SeedTree`` is for simulations and model initialisation: reproducible, so never secret.
``SecureRandom`` is for keys, masks and a real deployment's noise: secret, so never reproducible.
They are different types on purpose. No function takes "either".
"""

from __future__ import annotations

import hashlib
import secrets
import time
from dataclasses import dataclass
from typing import Protocol

import numpy as np

__all__ = ["Clock", "ManualClock", "SecureRandom", "SeedTree", "SystemClock"]


_ISO = "%Y-%m-%dT%H:%M:%SZ"


@dataclass(frozen=True)
class SeedTree:
    """A tree of seeds, addressed by name and number, independent of the order of asking.

    The seed of a node is SHA-256 over the path from the root, so that (round 3, client 17, "train")
    gives the same stream whether it is drawn first or last, in this process or another.

    >>> SeedTree.root(0).child("round", 3).child("client", 17).integer() == (
    ...     SeedTree.root(0).child("round", 3).child("client", 17).integer())
    True
    """

    digest: bytes

    @classmethod
    def root(cls, seed: int) -> SeedTree:
        """Return the tree of a run's ``seed``."""
        return cls(hashlib.sha256(f"fedlearn.seed/{seed:d}".encode()).digest())

    def child(self, *path: str | int) -> SeedTree:
        """Return the node below this one; the parts of ``path`` may not be confused with each other."""
        hasher = hashlib.sha256(self.digest)
        for part in path:
            data = f"{type(part).__name__}:{part}".encode()
            hasher.update(len(data).to_bytes(8, "big") + data)
        return SeedTree(hasher.digest())

    def integer(self) -> int:
        """Return this node's seed as an integer in [0, 2**63), as ``torch.manual_seed`` takes it."""
        return int.from_bytes(self.digest[:8], "big") >> 1

    def generator(self) -> np.random.Generator:
        """Return a fresh NumPy generator (PCG64) at this node; twice the same node, twice the same stream."""
        return np.random.Generator(np.random.PCG64(int.from_bytes(self.digest, "big")))


class SecureRandom:
    """The operating system's CSPRNG; it cannot be seeded."""

    def token_bytes(self, count: int) -> bytes:
        """Return ``count`` unpredictable bytes."""
        return secrets.token_bytes(count)

    def below(self, bound: int) -> int:
        """Return an unpredictable integer in [0, bound)."""
        return secrets.randbelow(bound)


class Clock(Protocol):
    """What a deadline is measured with."""

    def monotonic(self) -> float:
        """Return seconds since an arbitrary point; never goes back."""

    def sleep(self, duration_s: float) -> None:
        """Wait for ``duration_s`` seconds."""

    def utc(self) -> str:
        """Return the date and time in UTC, as ISO 8601 to the second."""

    def unix_s(self) -> float:
        """Return seconds since 1970 began, UTC: what other machines' clocks show too, more or less."""


class SystemClock:
    """The machine's own clock."""

    def monotonic(self) -> float:
        """Return seconds since an arbitrary point."""
        return time.monotonic()

    def sleep(self, duration_s: float) -> None:
        """Block this thread for ``duration_s`` seconds."""
        time.sleep(duration_s)

    def utc(self) -> str:
        """Return the system's date and time in UTC."""
        return time.strftime(_ISO, time.gmtime())

    def unix_s(self) -> float:
        """Return the system's seconds since 1970."""
        return time.time()


class ManualClock:
    """A clock for tests: time passes only when somebody sleeps or advances it.

    >>> clock = ManualClock()
    >>> clock.sleep(2.5)
    >>> clock.monotonic()
    2.5
    """

    def __init__(self) -> None:
        self._now_s = 0.0

    def monotonic(self) -> float:
        """Return the seconds slept or advanced so far."""
        return self._now_s

    def sleep(self, duration_s: float) -> None:
        """Advance the clock without waiting."""
        self.advance(duration_s)

    def utc(self) -> str:
        """Return the seconds passed, as a date after 1970 began."""
        return time.strftime(_ISO, time.gmtime(self._now_s))

    def unix_s(self) -> float:
        """Return the seconds passed, as if they had begun in 1970."""
        return self._now_s

    def advance(self, duration_s: float) -> None:
        """Let ``duration_s`` seconds pass."""
        self._now_s += duration_s
