"""Adam on the server."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedlearn.algorithms.adaptive import Adaptive

__all__ = ["FedAdam"]


@dataclass(frozen=True, kw_only=True)
class FedAdam(Adaptive):
    """Divide the step by a decaying mean of squares: v ← β₂·v + (1 - β₂)·Δ².

    Flower 1.41's FedAdam multiplies η in round t = 1, 2, … by Adam's bias correction, which the paper's
    algorithm does not have: √(1 - β₂ᵗ⁺¹) / (1 - β₁ᵗ⁺¹). Given that η in each round, this one equals it.

    Attributes:
        beta2: β₂, how much of v is kept, in [0, 1).

    Reference: Reddi et al., arXiv:2003.00295, Algorithm 2, the line for v marked FedAdam.

    >>> algorithm = FedAdam(server_learning_rate=2.0, beta1=0.5, beta2=0.75, tau=1.0)
    >>> algorithm.aggregate(algorithm.init(np.array([1.0])), np.array([2.0])).params.tolist()
    [2.0]
    """

    beta2: float = 0.99

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_range("beta2", minimum=0.0, below=1.0)

    def second_moment(self, v: NDArray[np.float64], delta: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the decaying mean of Δ²."""
        return self.beta2 * v + (1.0 - self.beta2) * delta**2
