"""McMahan et al.'s "2NN" on MNIST: a perceptron with two hidden layers of 200 units each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from fedlearn.learning.task import ClientData, Examples, Pool, Task
from fedlearn.tasks import load_task

__all__ = ["TwoLayers"]

_MNIST = str(Path(__file__).resolve().parents[1] / "mnist" / "task.py")


class TwoLayers(Task):
    """Tell the digit on a 28×28 image, by 784–200–200–10 with ReLU (199,210 parameters, as the paper counts).

    Data, loss and metric are those of ``simulations/mnist/task.py``; only the model is another.
    """

    label_names = tuple("0123456789")

    def __init__(self) -> None:
        self._mnist = load_task(_MNIST)

    def build_model(self) -> nn.Module:
        """Return both hidden layers, under torch's own initialisation."""
        return nn.Sequential(
            _Unit(),
            nn.Flatten(),
            nn.Linear(784, 200),
            nn.ReLU(),
            nn.Linear(200, 200),
            nn.ReLU(),
            nn.Linear(200, 10),
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


class _Unit(nn.Module):
    """Bring bytes of 0 … 255 to 0 … 1."""

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels.float() / 255
