"""Adagrad on the server."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedlearn.algorithms.adaptive import Adaptive

__all__ = ["FedAdagrad"]


@dataclass(frozen=True, kw_only=True)
class FedAdagrad(Adaptive):
    """Divide the step by the root of all squares so far: v ← v + Δ². Without momentum unless β₁ is set.

    Reference: Reddi et al., arXiv:2003.00295, Algorithm 2, the line for v marked FedAdagrad.

    >>> algorithm = FedAdagrad(server_learning_rate=3.0, tau=1.0)
    >>> algorithm.aggregate(algorithm.init(np.array([1.0])), np.array([2.0])).params.tolist()
    [3.0]
    """

    beta1: float = 0.0

    def second_moment(self, v: NDArray[np.float64], delta: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the sum of Δ² so far."""
        return v + delta**2
