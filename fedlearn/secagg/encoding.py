"""From a clipped update to integers in lanes, and back from their sum: ``ClippedUpdate`` → ``EncodedUpdate``.

The update is scaled, rounded at random to integers (so that the rounding is right on average), and packed. Where a
client is to be hidden by noise that the clients add themselves, the update is rotated first, so that no coordinate
stands out, its rounding is repeated until the integers' own norm is within a bound, and this client's share of the
noise is added before anything leaves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedlearn.arrays import Vector
from fedlearn.privacy.clipping import ClippedUpdate
from fedlearn.privacy.noise import Keystream
from fedlearn.privacy.skellam import LEAST_VARIANCE, sensitivity, skellam
from fedlearn.secagg.errors import PolicyViolationError, VectorLengthError
from fedlearn.secagg.prg import Words
from fedlearn.secagg.ring import BITS, Integers, pack, unpack, words_needed
from fedlearn.secagg.rotation import block_size, rotate, rotate_back
from fedlearn.secagg.wire import Reader, Writer

__all__ = ["DecodedSum", "EncodedUpdate", "Encoding", "noised_encoding", "plain_encoding"]

_OVERFLOW = 1e-9
"""With which probability any lane of a noised sum may overflow."""

_TRIES = 64
"""How often rounding is tried under the norm bound, of which each fails with 2^-20; then it is towards zero."""

_TILE = 1 << 14
_ROTATION_BYTES = 32
_MOST_SIZE = 1 << 40
_MOST_CLIENTS = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoding:
    """How an update becomes integers: part of an offer, the same for every client of a round.

    Attributes:
        size: d, the coordinates of an update.
        bits: a lane's width, 16, 21 or 32.
        scale: s, units a coordinate of 1 has.
        bound_l2: C, the clipping norm of every update.
        clients: n, how many vectors may be added.
        most_weight: W, the largest weight of a client; 1: all count the same, and no weight is sent.
        counts_clipped: whether one more coordinate counts the updates that were clipped.
        noise_variance: μ of the Skellam noise that every client adds to every coordinate; 0: none.
        rotation: the seed of the rotation, 32 bytes; empty: none.
    """

    size: int
    bits: int
    scale: float
    bound_l2: float
    clients: int
    most_weight: int = 1
    counts_clipped: bool = False
    noise_variance: float = 0.0
    rotation: bytes = b""

    @property
    def dimension(self) -> int:
        """How many integers are packed: the update's, a weight, a count."""
        return self.size + (self.most_weight > 1) + self.counts_clipped

    @property
    def words(self) -> int:
        """How many 64-bit words the packed vector has."""
        return words_needed(self.dimension, self.bits)

    @property
    def upload_bytes(self) -> int:
        """The size of the packed vector."""
        return 8 * self.words

    @property
    def sensitivity(self) -> tuple[float, float]:
        """(Δ₁, Δ₂): how far one client can move the sum, in units of the lattice; only where noise hides clients."""
        return sensitivity(self.scale, self.bound_l2, self.size)

    def check(self) -> None:
        """Raise unless no sum of ``clients`` vectors can overflow a lane (with noise: but for a probability of 1e-9).

        Raises:
            PolicyViolationError: it can, or a number is none that an encoding has.
        """
        numbers = (self.scale, self.bound_l2, self.scale * self.bound_l2)
        if not all(0 < number < math.inf for number in numbers):
            raise PolicyViolationError("the encoding's numbers must be above 0 and finite")
        if self.noise_variance and not LEAST_VARIANCE <= self.noise_variance < math.inf:
            raise PolicyViolationError(f"noise of variance {self.noise_variance:g} cannot be drawn")
        if self.bits not in BITS or not 1 <= self.size <= _MOST_SIZE or not 1 <= self.clients <= _MOST_CLIENTS:
            raise PolicyViolationError(f"no encoding has {self.bits} bits, {self.size} entries, {self.clients} clients")
        if self.most_weight < 1:
            raise PolicyViolationError("the largest weight is 1 at least")
        if len(self.rotation) not in (0, _ROTATION_BYTES):
            raise PolicyViolationError("the seed of a rotation has 32 bytes")
        if bool(self.rotation) != bool(self.noise_variance):
            raise PolicyViolationError("a vector is rotated where noise is added to it, and nowhere else")
        if self.noise_variance and (self.most_weight > 1 or self.counts_clipped):
            raise PolicyViolationError("where noise hides a client, no weight and no count leaves beside it")
        if not self.largest < 1 << (self.bits - 1):
            raise PolicyViolationError(
                f"a sum of {self.clients} clients can reach {self.largest:.4g} units, and a lane of {self.bits} bits "
                f"holds {(1 << (self.bits - 1)) - 1}: it could overflow"
            )

    @property
    def largest(self) -> float:
        """The largest magnitude a lane of the sum can reach, in units (with noise: but for a probability of 1e-9)."""
        n, reach = self.clients, self.scale * self.bound_l2
        if not self.noise_variance:
            return max(n * (math.ceil(reach) + 1.0), n * float(self.most_weight))
        return _noised_reach(n, self.size, reach, self.noise_variance)

    def encode(self, update: ClippedUpdate, *, weight: int, rounding: Keystream, noise: Keystream) -> EncodedUpdate:
        """Return the integers of one client's update, in lanes.

        Args:
            update: of shape (d,), clipped to ``bound_l2`` or less.
            weight: the client's weight, in [1, ``most_weight``].
            rounding: where the chance of rounding comes from.
            noise: where this client's share of the noise comes from: a device's own secret.

        Raises:
            TypeError: ``update`` is no ``ClippedUpdate``.
            VectorLengthError: it has another length.
            PolicyViolationError: it was clipped to a larger bound, or the weight is out of range.
        """
        if not isinstance(update, ClippedUpdate):
            raise TypeError(f"only a ClippedUpdate can be encoded, got {type(update).__name__}; clip it first")
        if update.vector.shape != (self.size,):
            raise VectorLengthError(f"the update has shape {update.vector.shape}, not ({self.size},)")
        if update.bound_l2 > self.bound_l2 or not 1 <= weight <= self.most_weight:
            raise PolicyViolationError(
                f"an update of bound {update.bound_l2:g} and weight {weight} does not fit an encoding of "
                f"{self.bound_l2:g} and {self.most_weight}"
            )
        vector = rotate(update.vector, self.rotation) if self.rotation else update.vector
        factor = self.scale * weight / self.most_weight
        values = np.empty(self.dimension, dtype=np.int64)
        if self.noise_variance:
            values[:] = _rounded_within(vector, factor, self.sensitivity[1], rounding)
            values += skellam(noise, self.noise_variance, self.size)
        else:
            values[: self.size] = _rounded(vector, factor, rounding)
            extra = [weight] * (self.most_weight > 1) + [int(not update.within)] * self.counts_clipped
            values[self.size :] = extra
        return EncodedUpdate(words=pack(values, self.bits), encoding=self)

    def decode(self, words: Words) -> DecodedSum:
        """Return the sum of the updates from the sum of their packed vectors."""
        values = unpack(words, self.dimension, self.bits)
        vector = values[: self.size] / self.scale
        if self.rotation:
            vector = rotate_back(vector, self.rotation)
        extra = values[self.size :].tolist()
        weight = extra.pop(0) if self.most_weight > 1 else None
        clipped = extra.pop(0) if self.counts_clipped else None
        return DecodedSum(vector=vector * self.most_weight, weight=weight, clipped=clipped)

    def write(self, writer: Writer) -> None:
        """Append it to a message."""
        writer.integer(self.size, 8).integer(self.bits, 1).number(self.scale).number(self.bound_l2)
        writer.integer(self.clients, 4).integer(self.most_weight, 4).integer(self.counts_clipped, 1)
        writer.number(self.noise_variance).blob(self.rotation)

    @classmethod
    def read(cls, reader: Reader) -> Encoding:
        """Take it from a message."""
        return cls(
            size=reader.integer(8),
            bits=reader.integer(1),
            scale=reader.number(),
            bound_l2=reader.number(),
            clients=reader.integer(4),
            most_weight=reader.integer(4),
            counts_clipped=bool(reader.integer(1, most=1)),
            noise_variance=reader.number(),
            rotation=reader.blob(most=_ROTATION_BYTES),
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class EncodedUpdate:
    """A clipped update as integers in lanes, noise included where there is any; only ``Encoding.encode`` makes it.

    Attributes:
        words: shape (w,), never written to.
        encoding: how it was made.
    """

    words: Words
    encoding: Encoding

    def __post_init__(self) -> None:
        self.words.flags.writeable = False


@dataclass(frozen=True, eq=False, kw_only=True)
class DecodedSum:
    """What the integers say.

    Attributes:
        vector: Σ weight·update, shape (d,), in the model's own units.
        weight: Σ weight; ``None`` where all count the same, and their number is the weight.
        clipped: how many updates were clipped; ``None`` where that is not counted.
    """

    vector: NDArray[np.float64]
    weight: int | None
    clipped: int | None


def plain_encoding(*, size: int, bits: int, bound_l2: float, clients: int, most_weight: int = 1) -> Encoding:
    """Return the finest encoding without noise in which no lane can overflow: n(⌈sC⌉ + 1) ≤ 2^(b-1) - 1.

    Raises:
        PolicyViolationError: there is none: too many clients, or too large a weight, for so few bits.
    """
    share = ((1 << (bits - 1)) - 1) // clients
    if share < 3 or most_weight > share:
        raise PolicyViolationError(
            f"{clients} clients of weight up to {most_weight} do not fit lanes of {bits} bits: "
            f"each may reach {share} units"
        )
    scale = (share - 1) / bound_l2 * (1 - 2.0**-50)
    return Encoding(
        size=size,
        bits=bits,
        scale=scale,
        bound_l2=bound_l2,
        clients=clients,
        most_weight=most_weight,
        counts_clipped=True,
    )


def noised_encoding(
    *, size: int, bits: int, bound_l2: float, clients: int, noise_multiplier: float, honest: int, rotation: bytes
) -> Encoding:
    """Return the finest encoding whose noise has ``noise_multiplier`` in the sum of the fewest honest survivors.

    The scale and the noise depend on each other: the sensitivity of the rounded vector is Δ₂(s), the noise of
    ``honest`` clients together has variance (noise_multiplier·Δ₂)², and all of it must fit the lanes.

    Args:
        size: d.
        bits: a lane's width.
        bound_l2: C, the clipping norm.
        clients: n, how many may be added.
        noise_multiplier: σ/Δ₂ that ``honest`` clients' noise reaches.
        honest: how many survivors' noise can be counted on.
        rotation: 32 bytes.

    Raises:
        PolicyViolationError: the noise does not fit lanes so narrow.
    """

    def at(scale: float) -> Encoding:
        _, sensitivity_l2 = sensitivity(scale, bound_l2, size)
        variance = (noise_multiplier * sensitivity_l2) ** 2 / honest
        return Encoding(
            size=size,
            bits=bits,
            scale=scale,
            bound_l2=bound_l2,
            clients=clients,
            noise_variance=math.nextafter(variance, math.inf),
            rotation=rotation,
        )

    limit = float(1 << (bits - 1))
    low, high = 0.0, limit / bound_l2
    for _ in range(200):
        middle = (low + high) / 2
        if at(middle).largest < limit:
            low = middle
        else:
            high = middle
    if low * bound_l2 < 1:
        wider = "use secagg.bits = 32" if bits < BITS[-1] else "invite fewer clients"
        raise PolicyViolationError(
            f"noise of {noise_multiplier:g} times the sensitivity for {clients} clients and {size} parameters leaves "
            f"no room for the updates in lanes of {bits} bits; {wider}"
        )
    scale = float(f"{low * (1 - 1e-9):.12g}")
    return at(scale if at(scale).largest < limit else low)


def _noised_reach(clients: int, size: int, reach: float, noise_variance: float) -> float:
    """Return k·√(n²s²C²/p + n/4 + nμ) + 1, where p coordinates share a block of the rotation."""
    k = math.sqrt(2 * math.log(2 * size / _OVERFLOW))
    moved = clients * reach
    spread = moved * moved / block_size(size)  # infinite where it is too large: a power would raise
    return k * math.sqrt(spread + clients / 4 + clients * noise_variance) + 1


def _rounded(vector: Vector, factor: float, stream: Keystream) -> Integers:
    """Return each entry times ``factor``, rounded down or up, up with the probability of its fraction (to 2^-32)."""
    values: Integers = np.empty(vector.size, dtype=np.int64)
    for start in range(0, vector.size, _TILE):  # tiles stay in the processor's cache, and use whole words of the stream
        part = vector[start : start + _TILE].astype(np.float64)
        part *= factor
        part += stream.words(-(-part.size // 2)).view(np.uint32)[: part.size] * 2.0**-32
        values[start : start + _TILE] = np.floor(part, out=part)
    return values


def _rounded_within(vector: Vector, factor: float, bound: float, stream: Keystream) -> Integers:
    """Return the entries times ``factor``, rounded at random, given that the result's norm is at most ``bound``."""
    for _ in range(_TRIES):
        values = _rounded(vector, factor, stream)
        if _norm(values) <= bound:
            return values
    towards_zero: Integers = np.trunc(vector * factor).astype(np.int64)  # no longer than what was to be rounded
    return towards_zero


def _norm(values: Integers) -> float:
    """Return the L2 norm, never below the true one."""
    wide = values.astype(np.float64)
    return math.sqrt(float(np.dot(wide, wide))) * (1 + 1e-9)
