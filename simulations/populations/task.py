"""A population of any size: each client's data is made when it is asked for, and forgotten afterwards.

To have such a task of your own, write ``load_client``. What it draws, from NumPy's, torch's or Python's global
generators, it draws under the client's own seeds, so that a client holds the same data whenever it is invited. What all
clients have in common comes from a fixed seed instead (here ``_common``), and test data from another.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from fedlearn.data.loaders import refuse_path
from fedlearn.learning.task import ClientData, Examples, Task

__all__ = ["Devices"]

FEATURES, CLASSES = 60, 10
_COMMON_SEED, _TEST_SEED = 20_602, 20_603
_TESTERS = 200
_DRIFT, _SHIFT = 0.3, 0.5


class Devices(Task):
    """Tell one of ten classes from 60 numbers, on devices that differ in what they see and in what it means.

    As in the FedProx paper's ``Synthetic(α, β)`` (arXiv:1812.06127, section 5.1) each client labels its inputs by a
    linear model of its own and draws them around a mean of its own, with variances of j^-1.2 for feature j; and the
    sizes are log-normal. Other than there, the clients' models lie around a common one, so that there is something to
    be learned together. The model is a softmax over a linear layer, 610 parameters.
    """

    metric_names = ("accuracy",)

    def build_model(self) -> nn.Module:
        """Return a linear layer that begins at zero."""
        model = nn.Linear(FEATURES, CLASSES)
        nn.init.zeros_(model.weight)
        nn.init.zeros_(model.bias)
        return model

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the cross-entropy of every example."""
        return functional.cross_entropy(output, target, reduction="none")

    def metrics(self, output: Tensor, target: Tensor) -> Mapping[str, Tensor]:
        """Return 1 for every class told rightly, else 0."""
        return {"accuracy": (output.argmax(dim=1) == target).float()}

    def load_client(self, client: int, clients: int, path: Path | None) -> ClientData:
        """Return a client's 10 to 60 examples, made now."""
        refuse_path(path)
        chance = np.random.default_rng(np.random.randint(2**31, size=4))  # the global generator has the client's seed
        size = int(np.clip(chance.lognormal(3.0, 0.4), 10, 60))
        return ClientData(_examples(size, chance))

    def load_test(self, path: Path | None) -> Examples:
        """Return 50 examples of each of 200 further clients, which never train."""
        refuse_path(path)
        return _test()


def _examples(size: int, chance: np.random.Generator) -> Examples:
    """Return the examples of one client: its own mean, its own model near the common one."""
    weights, bias, deviation = _common()
    mean = _SHIFT * chance.standard_normal(FEATURES)
    inputs = (mean + chance.standard_normal((size, FEATURES))) * deviation
    own = weights + _DRIFT * chance.standard_normal(weights.shape)
    targets = (inputs @ own.T + bias).argmax(axis=1)
    return Examples(torch.from_numpy(inputs.astype(np.float32)), torch.from_numpy(targets))


@lru_cache(maxsize=1)
def _common() -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return what all clients have in common: a linear model, and each feature's deviation."""
    chance = np.random.default_rng(_COMMON_SEED)
    weights, bias = chance.standard_normal((CLASSES, FEATURES)), 0.1 * chance.standard_normal(CLASSES)
    return weights, bias, np.arange(1, FEATURES + 1) ** -0.6


@lru_cache(maxsize=1)
def _test() -> Examples:
    """Return the test examples."""
    chance = np.random.default_rng(_TEST_SEED)
    held = [_examples(50, chance) for _ in range(_TESTERS)]
    return Examples(torch.cat([each.inputs for each in held]), torch.cat([each.targets for each in held]))
