"""Federated averaging with momentum on the server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedlearn.algorithms.base import Algorithm, ServerState, check_update

__all__ = ["FedAvgM"]


@dataclass(frozen=True, kw_only=True)
class FedAvgM(Algorithm):
    """Move θ by a decaying sum of the mean updates: v ← β·v + Δ, θ ← θ + η·v, from v = 0.

    A lasting direction is amplified by up to 1 / (1 - β), ten times at the default: lower η or the clients'
    learning rate accordingly. At β = 0 this is FedAvg.

    Attributes:
        server_momentum: β, in [0, 1).

    Reference: Hsu et al., arXiv:1909.06335, FedAvgM; its Δ is received minus local, so signs are turned.

    >>> algorithm = FedAvgM(server_momentum=0.5)
    >>> state = algorithm.aggregate(algorithm.init(np.array([0.0])), np.array([1.0]))
    >>> algorithm.aggregate(state, np.array([1.0])).params.tolist()
    [2.5]
    """

    slot_names: ClassVar[tuple[str, ...]] = ("momentum",)

    server_momentum: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_range("server_momentum", minimum=0.0, below=1.0)

    @np.errstate(over="ignore", invalid="ignore")  # advance refuses what overflows
    def aggregate(self, state: ServerState, mean_update: NDArray[np.float64]) -> ServerState:
        """Return the state after one more round."""
        delta = check_update(state, mean_update)
        momentum = self.server_momentum * state.slots["momentum"] + delta
        return state.advance(params=state.params + self.server_learning_rate * momentum, momentum=momentum)
