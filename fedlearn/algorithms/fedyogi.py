"""Yogi on the server."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedlearn.algorithms.adaptive import Adaptive

__all__ = ["FedYogi"]


@dataclass(frozen=True, kw_only=True)
class FedYogi(Adaptive):
    """As FedAdam, but v moves towards Δ² by no more than Δ² allows: v ← v - (1 - β₂)·Δ²·sign(v - Δ²).

    Attributes:
        beta2: β₂, one minus how fast v moves, in [0, 1).

    Reference: Reddi et al., arXiv:2003.00295, Algorithm 2, the line for v marked FedYogi.

    >>> algorithm = FedYogi(server_learning_rate=2.0, beta1=0.5, beta2=0.75, tau=1.0)
    >>> algorithm.aggregate(algorithm.init(np.array([1.0])), np.array([2.0])).params.tolist()
    [2.0]
    """

    beta2: float = 0.99

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_range("beta2", minimum=0.0, below=1.0)

    def second_moment(self, v: NDArray[np.float64], delta: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return v, moved by a fixed fraction of Δ² towards it."""
        square = delta**2
        return v - (1.0 - self.beta2) * square * np.sign(v - square)
