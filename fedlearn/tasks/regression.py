"""Linear regression on scikit-learn's diabetes data: small enough to check federation against a formula."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fedlearn.data.loaders import load_arrays, refuse_path, require_sklearn
from fedlearn.learning.task import ClientData, Examples, Pool, Task

__all__ = ["Regression"]


class Regression(Task):
    """Disease progression of 442 patients from ten measurements, all standardised.

    The mean of the per-example loss ½(y − ŷ)² over m examples is J(θ) = 1/(2m) Σ (yᵢ − ŷᵢ)². Everything is in
    float64, so that federated descent can be held against the same descent in one process, and against the
    closed-form least-squares solution. A fifth of the patients is held out.
    """

    def build_model(self) -> nn.Module:
        """Return ten weights and a bias, all zero."""
        model = nn.Linear(10, 1, dtype=torch.float64)
        nn.init.zeros_(model.weight)
        nn.init.zeros_(model.bias)
        return nn.Sequential(model, nn.Flatten(0))

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return ½(y − ŷ)² of every example."""
        return 0.5 * (target - output) ** 2

    def metrics(self, output: Tensor, target: Tensor) -> Mapping[str, Tensor]:
        """Return the squared error, in units of the target's variance: 1 is no better than the mean."""
        return {"squared_error": (target - output) ** 2}

    def load_pool(self, path: Path | None) -> Pool:
        """Return the 353 training patients."""
        refuse_path(path)
        return Pool(train=_diabetes()[0])

    def load_test(self, path: Path | None) -> Examples:
        """Return the 89 held-out patients."""
        return _diabetes()[1]

    def load_local(self, path: Path) -> ClientData:
        """Return a device's own patients from an .npz file: ``inputs`` (n, 10) and ``targets`` (n,), standardised."""
        return load_arrays(path)


@lru_cache(maxsize=1)
def _diabetes() -> tuple[Examples, Examples]:
    """Return (train, test); mean and deviation are those of the training patients."""
    require_sklearn("the diabetes data")
    from sklearn.datasets import load_diabetes
    from sklearn.model_selection import train_test_split

    columns, progression = load_diabetes(return_X_y=True)
    train, test = train_test_split(np.arange(len(progression)), test_size=0.2, random_state=0)
    train, test = np.sort(train), np.sort(test)
    columns = (columns - columns[train].mean(axis=0)) / columns[train].std(axis=0)
    progression = (progression - progression[train].mean()) / progression[train].std()
    everything = Examples(torch.from_numpy(columns), torch.from_numpy(progression))
    return everything.take(train), everything.take(test)
