"""Training on one client: the task, the flat model, the trainer."""

from fedlearn.learning.model import FlatModel, build_flat_model, computing
from fedlearn.learning.task import ClientData, Examples, Pool, Task, check_prepare, makes_clients, prepares
from fedlearn.learning.trainer import Evaluation, Trained, evaluate, local_steps, train

__all__ = [
    "ClientData",
    "Evaluation",
    "Examples",
    "FlatModel",
    "Pool",
    "Task",
    "Trained",
    "build_flat_model",
    "check_prepare",
    "computing",
    "evaluate",
    "local_steps",
    "makes_clients",
    "prepares",
    "train",
]
