"""Federated averaging of clients that are held near the model they received."""

from __future__ import annotations

from dataclasses import dataclass

from fedlearn.algorithms.fedavg import FedAvg

__all__ = ["FedProx"]


@dataclass(frozen=True, kw_only=True)
class FedProx(FedAvg):
    """FedAvg, where a client descends on its loss plus ``proximal_mu / 2 · ‖w - received‖²``.

    Attributes:
        proximal_mu: μ, at least 0; at 0 this is FedAvg.

    Reference: Li et al., arXiv:1812.06127, Algorithm 2, the devices' step; the server's is FedAvg's.

    >>> FedProx(proximal_mu=0.1).proximal_mu
    0.1
    """

    proximal_mu: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_range("proximal_mu", minimum=0.0)
