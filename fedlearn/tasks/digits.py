"""scikit-learn's 1,797 handwritten digits: 8×8 grey pixels, ten classes, no download."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedlearn.data.loaders import load_arrays, refuse_path, require_sklearn
from fedlearn.learning.task import ClientData, Examples, Pool, Task

__all__ = ["Digits", "DigitsMlp"]


class Digits(Task):
    """Tell the digit on an 8×8 image, with a small convolutional network (9,930 parameters).

    Inputs are the raw pixels, 0 (white) to 16 (black), shape (n, 1, 8, 8): the model scales them itself, so that
    an exported model takes what a scanner gives. A fifth of the images (360, the same share of every digit) is
    held out for central testing; the split is part of the task and does not depend on the run's seed.
    """

    label_names = tuple("0123456789")
    metric_names = ("accuracy",)

    def build_model(self) -> nn.Module:
        """Return two convolutions and a linear layer, under He's initialisation (arXiv:1502.01852)."""
        return _he(
            nn.Sequential(
                _Standardise(),
                nn.Conv2d(1, 16, kernel_size=3),
                nn.ReLU(),
                nn.Conv2d(16, 32, kernel_size=3),
                nn.ReLU(),
                nn.Flatten(),
                nn.Linear(512, 10),
            )
        )

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the cross-entropy of every example."""
        return functional.cross_entropy(output, target, reduction="none")

    def metrics(self, output: Tensor, target: Tensor) -> Mapping[str, Tensor]:
        """Return 1 for every digit told rightly, else 0."""
        return {"accuracy": (output.argmax(dim=1) == target).float()}

    def load_pool(self, path: Path | None) -> Pool:
        """Return the 1,437 training images."""
        refuse_path(path)
        return Pool(train=_digits()[0])

    def load_test(self, path: Path | None) -> Examples:
        """Return the 360 held-out images."""
        return _digits()[1]

    def load_local(self, path: Path) -> ClientData:
        """Return a device's own images from an .npz file with ``inputs`` (n, 1, 8, 8) and ``targets`` (n,)."""
        return load_arrays(path)


class DigitsMlp(Digits):
    """The same digits with a perceptron: 64–64–10 (4,810 parameters)."""

    def build_model(self) -> nn.Module:
        """Return one hidden layer."""
        return _he(nn.Sequential(_Standardise(), nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)))


class _Standardise(nn.Module):
    """Bring pixels of 0 … 16 to about mean 0 and deviation 1; the two numbers are of the data set, to two digits."""

    def forward(self, pixels: Tensor) -> Tensor:
        return (pixels - 4.9) / 6.0


def _he(model: nn.Sequential) -> nn.Sequential:
    """Initialise for ReLU, so that the small local data sets of the first rounds are enough to get going."""
    for layer in model:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(cast(Tensor, layer.bias))
    return model


@lru_cache(maxsize=1)
def _digits() -> tuple[Examples, Examples]:
    """Return (train, test), raw pixels."""
    require_sklearn("the digits data")
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    inputs = torch.from_numpy(images.astype(np.float32).reshape(-1, 1, 8, 8))
    targets = torch.from_numpy(labels.astype(np.int64))
    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, random_state=0, stratify=labels)
    everything = Examples(inputs, targets)
    return everything.take(np.sort(train)), everything.take(np.sort(test))
