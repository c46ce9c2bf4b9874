"""MNIST with a model small enough to be noised: every parameter takes the same noise, whatever it is good for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from fedlearn.learning.task import ClientData, Examples, Pool, Task
from fedlearn.tasks import load_task

__all__ = ["SmallMnist"]

_MNIST = str(Path(__file__).resolve().parents[1] / "mnist" / "task.py")


class SmallMnist(Task):
    """Tell the digit on a 28×28 image, seen at 14×14, with a perceptron: 196–32–10 (6,634 parameters).

    Data, loss and metric are those of ``simulations/mnist/task.py``; only the model is another.
    """

    label_names = tuple("0123456789")
    metric_names = ("accuracy",)

    def __init__(self) -> None:
        self._mnist = load_task(_MNIST)

    def build_model(self) -> nn.Module:
        """Return one hidden layer on means over 2×2 pixels; bytes come in, as everywhere with MNIST."""
        return nn.Sequential(
            _Standardise(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(196, 32), nn.ReLU(), nn.Linear(32, 10)
        )

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the cross-entropy of every image."""
        return self._mnist.loss(output, target)

    def metrics(self, output: Tensor, target: Tensor) -> Mapping[str, Tensor]:
        """Return 1 for every digit told rightly, else 0."""
        return self._mnist.metrics(output, target)

    def load_pool(self, path: Path | None) -> Pool:
        """Return the 60,000 training images."""
        return self._mnist.load_pool(path)

    def load_test(self, path: Path | None) -> Examples | None:
        """Return the 10,000 test images."""
        return self._mnist.load_test(path)

    def load_local(self, path: Path) -> ClientData:
        """Return a device's own images, from a folder with two files named and built like MNIST's training set."""
        return self._mnist.load_local(path)


class _Standardise(nn.Module):
    """Bring bytes to about mean 0 and deviation 1, as ``simulations/mnist`` does."""

    def forward(self, pixels: Tensor) -> Tensor:
        return (pixels.float() - 33.0) / 79.0
