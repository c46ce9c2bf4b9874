"""What turns the sum of a round into a release: a mechanism is frozen data, and noises a ``ClippedSum``, nothing else.

The noise is Gaussian on the grid on which the sum is exact: what leaves is an integer times a power of two, computed
without a rounding that could give an update away. Epsilon is computed elsewhere, from the ``Query`` that each release
carries.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedlearn.errors import ConfigError, RunFailedError
from fedlearn.privacy.clipping import ClippedSum
from fedlearn.privacy.gaussian import discrete_gaussian, power_of_two
from fedlearn.privacy.matrix import COEFFICIENT_STEP, choose_bands, correlate, sensitivity, square_root_coefficients
from fedlearn.privacy.noise import Keystream, Noise
from fedlearn.privacy.releases import Matrix, Query

__all__ = ["AdaptiveGaussian", "DpFtrl", "Gaussian", "Mechanism", "MechanismState", "NoisedSum"]

_FINE = 2.0**-24
"""The grid in relation to the noise. A lattice this fine changes δ(ε) of a Gaussian by less than a part in 10^10."""

_DERIVED: Any = None
_MOST_UNITS = 2.0**62


@dataclass(frozen=True, kw_only=True, eq=False)
class MechanismState:
    """All that a mechanism needs to go on after a round; a checkpoint keeps it.

    Attributes:
        bound_l2: the clipping norm of the next round.
        rows: how many rounds were released so far.
        history: under dp-ftrl the noise of the latest rounds, newest first, each of shape (d,); as secret as an update,
            since who has it can subtract it.
    """

    bound_l2: float
    rows: int = 0
    history: tuple[NDArray[np.float64], ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class NoisedSum:
    """A sum with its noise: the only thing that may be divided and applied to a model.

    Attributes:
        vector: shape (d,), float64, finite; every entry a multiple of the round's grid.
        queries: what was answered with noise, jointly.
        matrix: where the noise is correlated over rounds.
    """

    vector: NDArray[np.float64]
    queries: tuple[Query, ...]
    matrix: Matrix | None = None


@dataclass(frozen=True, kw_only=True)
class Mechanism(ABC):
    """How the sum of a round is noised.

    Attributes:
        noise_multiplier: z = σ/Δ: of every round alone, or for ``DpFtrl`` of all rounds together.
        bound_l2: the clipping norm of the first round.

    Raises:
        ValueError: one of them is not above 0 and finite.
    """

    name: ClassVar[str]
    noise_multiplier: float
    bound_l2: float

    def __post_init__(self) -> None:
        for name in ("noise_multiplier", "bound_l2"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, got {getattr(self, name)}")

    def init(self) -> MechanismState:
        """Return the state before the first round."""
        return MechanismState(bound_l2=self.bound_l2)

    def begin(self, state: MechanismState, size: int) -> ClippedSum:
        """Return the empty sum of the next round, of length ``size``, with that round's bound and grid."""
        return ClippedSum(size, bound_l2=state.bound_l2, grid=self._grid(state))

    @abstractmethod
    def release(self, state: MechanismState, total: ClippedSum, noise: Noise) -> tuple[MechanismState, NoisedSum]:
        """Return the state after the round, and the sum with noise.

        Args:
            state: before the round; not changed.
            total: what ``begin`` gave for this very state, with the updates added to it; not changed.
            noise: of the operating system's in a real run. Its streams are named by the number of the round and a
                purpose, so that no two draws of a run share one.

        Raises:
            TypeError: ``total`` is no ``ClippedSum``.
            ValueError: it has another bound or grid than ``begin`` gave it, or the state is not this mechanism's.
            RunFailedError: the noise is too small in relation to the sum to be added exactly.
        """

    @abstractmethod
    def _grid(self, state: MechanismState) -> float:
        """Return the step of the next round's grid: it depends on nothing that is secret."""

    def _check(self, state: MechanismState, total: ClippedSum) -> None:
        """Raise unless ``total`` is this round's, and within what an int64 holds together with its noise."""
        if not isinstance(total, ClippedSum):
            raise TypeError(f"only a ClippedSum can be noised, got {type(total).__name__}; clip each update and add it")
        if total.bound_l2 != state.bound_l2 or total.grid != self._grid(state):
            raise ValueError(
                f"a sum for the bound {total.bound_l2:g} on the grid {total.grid:g} is not this round's; "
                "use the one that begin() gave for this state"
            )
        if not total.count * (total.sensitivity_l2 / total.grid) < _MOST_UNITS / 2:  # it may have wrapped around
            raise RunFailedError(
                f"noise multiplier {self.noise_multiplier:g} is too small for a sum of {total.count} updates on its "
                "grid; set privacy.noise-multiplier higher, or privacy.unit to none for a run without noise"
            )


@dataclass(frozen=True, kw_only=True)
class Gaussian(Mechanism):
    """Fresh noise in every round: a discrete Gaussian on the sum's own grid.

    Guarantees: the stated sensitivity holds for the vector of integers to which the noise is added, its rounding to the
    grid included, and the noise is drawn in the same integers. For σ of 2^24 units and more, a discrete Gaussian has a
    continuous one's standard deviation and, to a part in 10^10, its δ(ε).

    Reference: McMahan et al., arXiv:1710.06963, Algorithm 1; Canonne, Kamath, Steinke, arXiv:2004.00010.

    >>> from fedlearn.privacy.clipping import Update, clip
    >>> from fedlearn.privacy.noise import SecureNoise
    >>> from fedlearn.sources import SecureRandom
    >>> mechanism = Gaussian(noise_multiplier=2.0, bound_l2=0.5)
    >>> state = mechanism.init()
    >>> total = mechanism.begin(state, size=2)
    >>> total.add(clip(Update.of([3.0, 4.0]), state.bound_l2))
    >>> state, noised = mechanism.release(state, total, SecureNoise(SecureRandom()))
    >>> state.rows, noised.queries[0].name, round(noised.queries[0].stddev, 6)
    (1, 'update', 1.0)
    """

    name: ClassVar[str] = "gaussian"

    def release(self, state: MechanismState, total: ClippedSum, noise: Noise) -> tuple[MechanismState, NoisedSum]:
        """Return the sum with noise of standard deviation z·Δ; see ``Mechanism.release``."""
        self._check(state, total)
        vector, query = _noised_update(state, total, noise, self.noise_multiplier)
        return replace(state, rows=state.rows + 1), NoisedSum(vector=vector, queries=(query,))

    def _grid(self, state: MechanismState) -> float:
        """Return a power of two near z·C·2^-24."""
        return power_of_two(self.noise_multiplier * state.bound_l2) * _FINE


@dataclass(frozen=True, kw_only=True)
class AdaptiveGaussian(Mechanism):
    """Fresh noise in every round, and a clipping norm that follows a quantile of the updates' norms.

    Two queries share a round's noise multiplier z: the sum, with z_Δ = (z⁻² - (2σ_b)⁻²)^(-1/2), and Σ(b - ½), where b
    says whether an update was within the bound *before* it was clipped, with σ_b; one client moves that by ½. From the
    second the next bound follows: C ← C·exp(-η·(b̃ - γ)), b̃ the noised share of a fixed cohort that was within.

    Guarantees: the two queries jointly are one Gaussian mechanism of noise multiplier z; the noise of a round is for
    the bound with which its updates were clipped, never the next one.

    The count is noised on a lattice 2^-24 of σ_b, not on the half-integers where it lies: for σ_b = 1 noise in
    half-integers has a δ up to a seventh above the continuous Gaussian's, by which it is accounted.

    Attributes:
        expected_cohort: how many are expected in a round; the fixed denominator of the share.
        quantile: γ, the share that shall be within the bound.
        learning_rate: η; a round changes the bound by a factor within exp(±η).
        count_stddev: σ_b; left out: a twentieth of the expected cohort.

    Raises:
        ConfigError: ``privacy.adaptive-clipping`` where 2σ_b ≤ z: the count alone would cost more than a round may.

    Reference: Andrew et al., arXiv:1905.03871, Algorithm 1 and Theorem 1.
    """

    name: ClassVar[str] = "gaussian"
    expected_cohort: float
    quantile: float = 0.5
    learning_rate: float = 0.2
    count_stddev: float = _DERIVED

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.count_stddev is _DERIVED:
            object.__setattr__(self, "count_stddev", self.expected_cohort / 20)
        if not (0 < self.expected_cohort < math.inf and 0 < self.learning_rate < math.inf and 0 < self.quantile < 1):
            raise ValueError("expected_cohort and learning_rate must be above 0 and finite, quantile between 0 and 1")
        if not 0 < self.count_stddev < math.inf:
            raise ValueError(f"count_stddev must be above 0 and finite, got {self.count_stddev}")
        if 2 * self.count_stddev * (1 - 1e-9) <= self.noise_multiplier:  # z_Δ has no end there
            raise ConfigError(
                "privacy.adaptive-clipping",
                f"a cohort of {self.expected_cohort:g} is too small: its noisy count (standard deviation "
                f"{self.count_stddev:g}) alone costs more than a round with noise multiplier "
                f"{self.noise_multiplier:g} may; set federation.cohort above {10 * self.noise_multiplier:.0f}, or "
                "privacy.adaptive-clipping=false and a privacy.bound-l2",
            )

    @property
    def update_noise_multiplier(self) -> float:
        """z_Δ, the noise multiplier of the sum alone, above z."""
        return math.pow(self.noise_multiplier**-2 - (2 * self.count_stddev) ** -2, -0.5)

    def release(self, state: MechanismState, total: ClippedSum, noise: Noise) -> tuple[MechanismState, NoisedSum]:
        """Return the sum with noise of standard deviation z_Δ·Δ, and the next bound; see ``Mechanism.release``."""
        self._check(state, total)
        vector, query = _noised_update(state, total, noise, self.update_noise_multiplier)
        step = min(0.5, power_of_two(self.count_stddev) * _FINE)
        centred = (2 * total.within - total.count) * round(0.5 / step)  # Σ(b - ½) in steps
        drawn = discrete_gaussian(_stream(noise, state, "clip-count"), self.count_stddev / step, 1)
        share = (centred + int(drawn[0])) * step / self.expected_cohort + 0.5
        following = MechanismState(bound_l2=self._next_bound(state.bound_l2, share), rows=state.rows + 1)
        count = Query(name="clip-count", sensitivity_l2=0.5, stddev=self.count_stddev)
        return following, NoisedSum(vector=vector, queries=(query, count))

    def _next_bound(self, bound_l2: float, share: float) -> float:
        """Return the bound after a round; a share beyond 0 or 1 is noise, a bound 2^20 from the first a mistake."""
        moved = bound_l2 * math.exp(-self.learning_rate * (min(max(share, 0.0), 1.0) - self.quantile))
        return min(max(moved, self.bound_l2 * 2.0**-20), self.bound_l2 * 2.0**20)

    def _grid(self, state: MechanismState) -> float:
        """Return a power of two near z_Δ·C·2^-24."""
        return power_of_two(self.update_noise_multiplier * state.bound_l2) * _FINE


@dataclass(frozen=True, kw_only=True)
class DpFtrl(Mechanism):
    """Noise that is correlated over rounds: less of it in the model, and nothing assumed of how clients are drawn.

    All ``rounds`` together are one Gaussian mechanism of noise multiplier z, for clients that take part at least
    ``min_separation`` rounds apart: they release C·X + Z, Z of standard deviation z·Δ·S, S the sensitivity of C. What a
    round hands out is its row of C⁻¹(C·X + Z) = X + C⁻¹Z, rounded to the grid.

    Guarantees: Z is a discrete Gaussian on the lattice where C·X lies, 2^-16 of the grid since the coefficients are
    multiples of that, and about 2^-40 of its standard deviation. The rest is post-processing, to the last bit: the
    noise N of a round is round(Z - Σ cᵢ·N of i rounds before), with the *rounded* earlier noise in it, so that
    X + N = round(C·X + Z - Σ cᵢ·(X + N of i rounds before)), a function of what C·X + Z releases. All of it is exact
    in float64: multiples of 2^-16 below 2^37. More rounds than planned are refused.

    Attributes:
        rounds: how many rounds there will be.
        min_separation: rounds from one participation of a client to its next, at least; whoever draws enforces it.
        instance: a name for this sequence of rounds in a ledger; another sequence has another.

    Raises:
        ValueError: ``rounds`` or ``min_separation`` is below 1.

    Reference: Choquette-Choo et al., arXiv:2306.08153, Algorithm 1; Kalinin and Lampert, arXiv:2405.13763.
    """

    name: ClassVar[str] = "dp-ftrl"
    rounds: int
    min_separation: int
    instance: str

    def __post_init__(self) -> None:
        super().__post_init__()
        choose_bands(self.rounds, self.min_separation)  # refuses what makes no sense

    @cached_property
    def coefficients(self) -> tuple[float, ...]:
        """The first column of C."""
        return square_root_coefficients(choose_bands(self.rounds, self.min_separation))

    @cached_property
    def sensitivity(self) -> float:
        """S: how far one client moves C·X over all rounds, if each of its updates has norm at most 1."""
        return sensitivity(self.coefficients, rows=self.rounds, min_separation=self.min_separation)

    def release(self, state: MechanismState, total: ClippedSum, noise: Noise) -> tuple[MechanismState, NoisedSum]:
        """Return the sum with this round's row of C⁻¹Z; see ``Mechanism.release``."""
        self._check(state, total)
        units, lattice = total.units, total.grid * COEFFICIENT_STEP
        stddev = self.noise_multiplier * total.sensitivity_l2 * self.sensitivity
        fresh = discrete_gaussian(_stream(noise, state, "update"), stddev / lattice, units.size)
        row = correlate(state.history, _on_grid(fresh, lattice), self.coefficients)
        rounded = np.floor(row / total.grid + 0.5).astype(
            np.int64
        )  # halves upwards, so that round(X + y) = X + round(y)
        query = Query(name="update", sensitivity_l2=total.sensitivity_l2, stddev=stddev)
        matrix = Matrix(
            instance=self.instance,
            row=state.rows,
            coefficients=self.coefficients,
            min_separation=self.min_separation,
        )
        done = state.rows + 1 == self.rounds  # nobody needs the noise any more, and who has it could subtract it
        history = () if done else (_on_grid(rounded, total.grid), *state.history)[: len(self.coefficients) - 1]
        following = replace(state, rows=state.rows + 1, history=history)
        return following, NoisedSum(vector=_on_grid(units + rounded, total.grid), queries=(query,), matrix=matrix)

    def _check(self, state: MechanismState, total: ClippedSum) -> None:
        """Raise as for every mechanism, and where this round is not the next row of the sequence."""
        super()._check(state, total)
        if state.rows >= self.rounds:
            raise RunFailedError(
                f"the noise was planned for {self.rounds} rounds, and all are released; begin a new run with its own "
                "budget (privacy.earlier-ledgers counts what this one has spent)"
            )
        kept = min(state.rows, len(self.coefficients) - 1)
        if len(state.history) != kept or state.bound_l2 != self.bound_l2:
            raise ValueError(
                f"round {state.rows + 1} goes on from {kept} rounds of noise and the bound {self.bound_l2:g}, got "
                f"{len(state.history)} and {state.bound_l2:g}; take the state that the round before returned"
            )

    def _grid(self, state: MechanismState) -> float:
        """Return a power of two near z·C·S·2^-24."""
        return power_of_two(self.noise_multiplier * state.bound_l2 * self.sensitivity) * _FINE


def _noised_update(
    state: MechanismState, total: ClippedSum, noise: Noise, noise_multiplier: float
) -> tuple[NDArray[np.float64], Query]:
    """Return the sum with a discrete Gaussian on its own grid, shape (d,), and the query."""
    units = total.units
    stddev = noise_multiplier * total.sensitivity_l2
    units += discrete_gaussian(_stream(noise, state, "update"), stddev / total.grid, units.size)
    return _on_grid(units, total.grid), Query(name="update", sensitivity_l2=total.sensitivity_l2, stddev=stddev)


def _on_grid(units: NDArray[np.int64], grid: float) -> NDArray[np.float64]:
    """Return multiples of the grid as floats; beyond 2^53 of them they lose bits, noise and sum together."""
    return units.astype(np.float64) * grid


def _stream(noise: Noise, state: MechanismState, purpose: str) -> Keystream:
    """Return the stream for one draw of the round after ``state``."""
    return noise.stream("mechanism", state.rows, purpose)
