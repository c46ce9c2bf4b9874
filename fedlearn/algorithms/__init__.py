"""Updating θ on the parameter server: each algorithm is ``init`` and ``aggregate`` on one flat vector."""

from fedlearn.algorithms.base import Algorithm, ServerState, check_update
from fedlearn.algorithms.fedadagrad import FedAdagrad
from fedlearn.algorithms.fedadam import FedAdam
from fedlearn.algorithms.fedavg import FedAvg
from fedlearn.algorithms.fedavgm import FedAvgM
from fedlearn.algorithms.fedprox import FedProx
from fedlearn.algorithms.fedyogi import FedYogi
from fedlearn.algorithms.registry import ALGORITHMS, build_algorithm

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "FedAdagrad",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "FedProx",
    "FedYogi",
    "ServerState",
    "build_algorithm",
    "check_update",
]
