"""Made-up images of 28 × 28 and their random labels: what a round costs does not depend on what is learned.

There is no file; ``data.path`` says how many examples there are, as its last part. A client's examples can also be made
when it is asked for (``data.partition = "natural"``), so that a population costs nothing until it is drawn.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedlearn.errors import DataError
from fedlearn.learning.task import ClientData, Examples, Pool, Task

__all__ = ["Mlp", "Mlp1m", "Mlp10k", "Mlp10m", "SmallCnn"]

PIXELS, CLASSES = 784, 10


class _Noise(Task):
    """Noise with random labels."""

    shape: tuple[int, ...] = (PIXELS,)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the cross-entropy of every example."""
        return functional.cross_entropy(output, target, reduction="none")

    def load_pool(self, path: Path | None) -> Pool:
        """Return as many examples as the last part of ``path`` says."""
        return Pool(train=self._made(_count(path)))

    def load_client(self, client: int, clients: int, path: Path | None) -> ClientData:
        """Return one client's examples, as many as the last part of ``path`` says."""
        return ClientData(self._made(_count(path)))

    def load_test(self, path: Path | None) -> Examples | None:
        """Return nothing: nobody measures."""
        return None

    def load_local(self, path: Path) -> ClientData:
        """Refuse: no device has such data."""
        raise DataError("this task is for a benchmark; no device has its data")

    def _made(self, count: int) -> Examples:
        """Return noise, from the generator that the engine has seeded."""
        return Examples(torch.randn(count, *self.shape), torch.randint(0, CLASSES, (count,)))


class _Perceptron(_Noise):
    """One hidden layer; 795 parameters for each of its units, and 10."""

    hidden: int

    def build_model(self) -> nn.Module:
        """Return one hidden layer."""
        return nn.Sequential(nn.Linear(PIXELS, self.hidden), nn.ReLU(), nn.Linear(self.hidden, CLASSES))


class Mlp(_Perceptron):
    """784–128–10, 101,770 parameters."""

    hidden = 128


class Mlp10k(_Perceptron):
    """784–13–10, 10,345 parameters."""

    hidden = 13


class Mlp1m(_Perceptron):
    """784–1258–10, 1,000,120 parameters."""

    hidden = 1258


class Mlp10m(_Perceptron):
    """784–12579–10, 10,000,315 parameters."""

    hidden = 12579


class SmallCnn(_Noise):
    """Two convolutions of 5 × 5 and a linear layer, 28,938 parameters; 5.7 million multiply-adds and additions forward.

    1×28×28 → conv 16, ReLU, max-pool 2 → 16×14×14 → conv 32, ReLU, max-pool 2 → 32×7×7 → linear 10.
    """

    shape = (1, 28, 28)

    def build_model(self) -> nn.Module:
        """Return the layers."""
        return nn.Sequential(
            nn.Conv2d(1, 16, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * 7 * 7, CLASSES),
        )


def _count(path: Path | None) -> int:
    """Return how many examples a path asks for."""
    if path is None or not path.name.isdecimal():
        raise DataError(f"data.path must end in the number of examples, such as data.path=made/2000, not {path}")
    return int(path.name)
