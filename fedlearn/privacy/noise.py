"""Where noise and secret draws come from: an AES-256-CTR keystream, keyed by the operating system or by a seed.

``SecureNoise`` is for real runs: every stream has a fresh key of the operating system's. ``SimulatedNoise`` is for
simulations: the same place in the seed tree gives the same stream, and whoever knows the seed can subtract it, so that
a ledger of such noise is marked ``simulated``. They are different types, and neither can be made of the other's source.
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from fedlearn.privacy.gaussian import gaussian
from fedlearn.sources import SecureRandom, SeedTree

__all__ = ["Keystream", "Noise", "SecureNoise", "SimulatedNoise"]


class Keystream:
    """Uniform random bits from AES-256 in counter mode; a key is used for one stream only.

    Args:
        key: 32 bytes.
    """

    def __init__(self, key: bytes) -> None:
        self._encryptor = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()

    def words(self, count: int) -> NDArray[np.uint64]:
        """Return the next ``count`` words, uniform over 64 bits, shape (count,)."""
        return np.frombuffer(self._encryptor.update(bytes(8 * count)), dtype="<u8").astype(np.uint64, copy=False)


class Noise(Protocol):
    """Where a mechanism's chance comes from."""

    @property
    def simulated(self) -> bool:
        """Whether it can be drawn again by who knows a seed; it then protects nobody."""
        ...

    def stream(self, *path: str | int) -> Keystream:
        """Return the stream for one purpose, such as ``("round", 3)``; no two purposes share one."""
        ...

    def gaussian(self, stddev: float, size: int, *path: str | int) -> NDArray[np.float64]:
        """Return Gaussian noise for one purpose, shape (size,): to be rounded to a coarse grid before it leaves.

        Real noise is exact, as ``fedlearn.privacy.gaussian`` says; a simulation's is quick.
        """
        ...

    def child(self, *path: str | int) -> Noise:
        """Return noise of the same kind that shares no stream with this one."""
        ...


class SecureNoise:
    """Noise that nobody can draw again: a fresh key of the operating system's for every stream."""

    simulated = False

    def __init__(self, random: SecureRandom) -> None:
        self._random = random

    def stream(self, *path: str | int) -> Keystream:
        """Return a stream of its own; asking twice for the same path gives two different ones."""
        del path
        return Keystream(self._random.token_bytes(32))

    def gaussian(self, stddev: float, size: int, *path: str | int) -> NDArray[np.float64]:
        """Return Gaussian noise, exact to 2^-40 of its standard deviation."""
        return gaussian(self.stream(*path), stddev, size)

    def child(self, *path: str | int) -> SecureNoise:
        """Return itself: no two of its streams are one anyway."""
        del path
        return self


class SimulatedNoise:
    """Noise of a simulation, a function of the seed: reproducible, hence no protection."""

    simulated = True

    def __init__(self, seeds: SeedTree) -> None:
        self._seeds = seeds

    def stream(self, *path: str | int) -> Keystream:
        """Return the stream at ``path`` in the seed tree; twice the same path, twice the same stream."""
        return Keystream(self._seeds.child(*path).digest)

    def gaussian(self, stddev: float, size: int, *path: str | int) -> NDArray[np.float64]:
        """Return Gaussian noise by NumPy's ziggurat, a tenth of the time of the exact sampler.

        It has the distribution to double precision, with the artefacts that Mironov (2012) used: for noise that whoever
        knows the seed can subtract anyway.

        >>> SimulatedNoise(SeedTree.root(0)).gaussian(2.0, 2, "step", 1).round(3).tolist()
        [-2.114, 3.509]
        """
        if not 0 < stddev < math.inf:
            raise ValueError(f"stddev must be above 0 and finite, got {stddev}")
        seed = int.from_bytes(self._seeds.child("gaussian", *path).digest, "big")
        drawn = np.random.Generator(np.random.SFC64(seed)).standard_normal(size)
        drawn *= stddev
        return drawn

    def child(self, *path: str | int) -> SimulatedNoise:
        """Return the noise below ``path`` in the seed tree."""
        return SimulatedNoise(self._seeds.child("child", *path))
