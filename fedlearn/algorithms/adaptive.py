"""The skeleton of the adaptive algorithms: all but the rule for v."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedlearn.algorithms.base import Algorithm, ServerState, check_update

__all__ = ["Adaptive"]


@dataclass(frozen=True, kw_only=True)
class Adaptive(Algorithm):
    """Move every coordinate by a step of its own: m ← β₁·m + (1 - β₁)·Δ, θ ← θ + η·m / (√v + τ).

    How v follows from Δ² is what sets FedAdagrad, FedAdam and FedYogi apart.

    m and v start at 0, as they do in Flower and FLamby; the paper starts v at some v₋₁ ≥ τ². There is no
    bias correction, as in the paper. A coordinate moves by about η a round whatever the size of Δ, so the
    default η is 0.01 here: the 1.0 that is right for averaging would diverge.

    Attributes:
        beta1: β₁, how much of m is kept, in [0, 1).
        tau: τ, the degree of adaptivity, above 0: where √v is far below it, this is FedAvg with η / τ.

    Reference: Reddi et al., arXiv:2003.00295, Algorithm 2.
    """

    slot_names: ClassVar[tuple[str, ...]] = ("m", "v")

    server_learning_rate: float = 0.01
    beta1: float = 0.9
    tau: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_range("beta1", minimum=0.0, below=1.0)
        self._require_range("tau", above=0.0)

    @abstractmethod
    def second_moment(self, v: NDArray[np.float64], delta: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the next v, at least 0, as a new array of shape (d,)."""

    @np.errstate(over="ignore", invalid="ignore")  # advance refuses what overflows
    def aggregate(self, state: ServerState, mean_update: NDArray[np.float64]) -> ServerState:
        """Return the state after one more round."""
        delta = check_update(state, mean_update)
        m = self.beta1 * state.slots["m"] + (1.0 - self.beta1) * delta
        v = self.second_moment(state.slots["v"], delta)
        params = state.params + self.server_learning_rate * m / (np.sqrt(v) + self.tau)
        return state.advance(params=params, m=m, v=v)
