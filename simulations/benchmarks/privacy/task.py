"""A perceptron of 101,770 parameters on made-up images: what a round costs does not depend on what is learned."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedlearn.errors import DataError
from fedlearn.learning.task import ClientData, Examples, Pool, Task

__all__ = ["Noise784"]

_EXAMPLES = 20_000


class Noise784(Task):
    """784–128–10 on 20,000 examples of noise with random labels; 20 each for 1,000 clients."""

    metric_names = ("accuracy",)

    def build_model(self) -> nn.Module:
        """Return one hidden layer."""
        return nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the cross-entropy of every example."""
        return functional.cross_entropy(output, target, reduction="none")

    def metrics(self, output: Tensor, target: Tensor) -> Mapping[str, Tensor]:
        """Return 1 for every label told rightly, else 0."""
        return {"accuracy": (output.argmax(dim=1) == target).float()}

    def load_pool(self, path: Path | None) -> Pool:
        """Return the noise."""
        return Pool(train=Examples(torch.randn(_EXAMPLES, 784), torch.randint(0, 10, (_EXAMPLES,))))

    def load_test(self, path: Path | None) -> Examples | None:
        """Return nothing: nobody measures."""
        return None

    def load_local(self, path: Path) -> ClientData:
        """Refuse: no device has such data."""
        raise DataError("this task is for a benchmark; no device has its data")
