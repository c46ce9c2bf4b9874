"""A learning problem of your own, in one file. It runs as it is; change it piece by piece.

    fedlearn simulate my_task.py                        train it on simulated clients
    fedlearn simulate my_task.py --set data.partition=natural --set federation.clients=8

Made-up data stands in for yours: eight factories note temperature, vibration and load of their machines, and
whether a machine failed within the week. Every factory's machines are a little different.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from fedlearn.errors import DataError
from fedlearn.learning.task import ClientData, Examples, Pool, Task

__all__ = ["MyTask"]

COLUMNS = ("temperature", "vibration", "load")
FACTORIES = 8


class MyTask(Task):
    """Tell which machine will fail within the week."""

    # What the answers 0, 1, … are called. Leave it out where answers are numbers.
    label_names = ("runs on", "fails")

    def build_model(self) -> nn.Module:
        """Return any torch module; plain initialisers are seeded for you."""
        return nn.Sequential(nn.Linear(len(COLUMNS), 32), nn.ReLU(), nn.Linear(32, 2))

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return one loss an example: reduction="none", never a mean."""
        return functional.cross_entropy(output, target, reduction="none")

    def metrics(self, output: Tensor, target: Tensor) -> Mapping[str, Tensor]:
        """Return one value an example for every metric; fedlearn reports their means."""
        return {"accuracy": (output.argmax(dim=1) == target).float()}

    def decode(self, output: Tensor) -> Tensor:
        """Return the answers in an output. This is the default for classes: leave it out, or change it."""
        return output.argmax(dim=1)

    def load_pool(self, path: Path | None) -> Pool:
        """Return what a simulation deals out to its clients; path is data.path of the scenario.

        To read your own file: return Pool(train=self.load_local(path).train), after a check that path is given.
        """
        # groups is the natural id of every example; data.partition = "natural" gives each client one of them.
        return Pool(train=_made_up(2000, seed=1))

    def load_test(self, path: Path | None) -> Examples | None:
        """Return central test examples that no client trains on, or None: then clients test for themselves."""
        return _made_up(500, seed=2)

    def load_local(self, path: Path) -> ClientData:
        """Return what a real device holds: a .csv with a header and the target last, or an .npz file.

        The .npz holds the arrays "inputs" (n, 3) and "targets" (n,).
        """
        try:
            if path.suffix == ".npz":
                with np.load(path, allow_pickle=False) as arrays:
                    inputs, targets = arrays["inputs"], arrays["targets"]
            else:
                table = np.loadtxt(path, delimiter=",", skiprows=1, ndmin=2)
                inputs, targets = table[:, :-1], table[:, -1]
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{path}: {error}") from error
        if inputs.ndim != 2 or inputs.shape[1] != len(COLUMNS):
            raise DataError(f"{path}: expected the columns {', '.join(COLUMNS)} and the target")
        return ClientData(_examples(inputs, targets))

    def prepare(self, data: ClientData) -> ClientData:
        """Return the data as one client uses it, such as scaled by its own mean. Leave it out where there is none."""
        return data


def _examples(inputs: NDArray[Any], targets: NDArray[Any], groups: NDArray[Any] | None = None) -> Examples:
    """Return arrays as the tensors that the model and the loss take."""
    return Examples(torch.from_numpy(inputs.astype(np.float32)), torch.from_numpy(targets.astype(np.int64)), groups)


def _made_up(count: int, seed: int) -> Examples:
    """Return machines that fail when they run hot and shake, or under a load too high. Put your data here."""
    chance = np.random.default_rng(seed)
    factory = chance.integers(FACTORIES, size=count)
    inputs = chance.normal(size=(count, len(COLUMNS)))
    inputs[:, 0] += 0.4 * np.cos(factory)  # each factory is a little different
    temperature, vibration, load = inputs.T
    strain = temperature * vibration + 0.8 * load + 0.1 * chance.normal(size=count)
    return _examples(inputs, strain > 0.3, factory)
