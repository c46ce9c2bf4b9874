"""Federated averaging."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedlearn.algorithms.base import Algorithm, ServerState, check_update

__all__ = ["FedAvg"]


@dataclass(frozen=True, kw_only=True)
class FedAvg(Algorithm):
    """Move θ by the mean update: θ ← θ + η · Δ.

    At η = 1, the default, the next θ is the (weighted) mean of the clients' models, as the paper has it.

    Reference: McMahan et al., arXiv:1602.05629, Algorithm 1 (FederatedAveraging), the server's last line;
    with η, Reddi et al., arXiv:2003.00295, Algorithm 1 with SGD as the server's optimiser.

    >>> algorithm = FedAvg()
    >>> algorithm.aggregate(algorithm.init(np.array([1.0, 2.0])), np.array([0.5, -1.0])).params.tolist()
    [1.5, 1.0]
    """

    @np.errstate(over="ignore", invalid="ignore")  # advance refuses what overflows
    def aggregate(self, state: ServerState, mean_update: NDArray[np.float64]) -> ServerState:
        """Return the state after one more round."""
        delta = check_update(state, mean_update)
        return state.advance(params=state.params + self.server_learning_rate * delta)
