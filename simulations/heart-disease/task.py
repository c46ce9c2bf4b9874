"""Fed-Heart-Disease (FLamby): who is ill, from 13 numbers, in four hospitals that keep their patients to themselves.

A task file outside the package: copy it, change it. It reads the four ``processed.*.data`` files of UCI's Heart
Disease data (Janosi, Steinbrunn, Pfisterer, Detrano, 1988; CC BY 4.0) and prepares them as FLamby does.

Reference: Ogier du Terrail et al., FLamby, arXiv:2210.04620, and its ``fed_heart_disease/dataset.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from fedlearn.data.loaders import require_sklearn
from fedlearn.errors import DataError
from fedlearn.learning.task import ClientData, Examples, Pool, Task

__all__ = ["HOSPITALS", "HeartDisease"]

HOSPITALS = ("cleveland", "hungarian", "switzerland", "va")

_COLUMNS = 14
_DROPPED = (10, 11, 12)  # slope, vessels, thal: hardly known outside Cleveland
_PLAIN = (0, 1, 3, 4, 5, 7, 8, 9)
# The levels of a categorical column over all hospitals. They stand here, not in the data, because a hospital that
# saw one level less must still build the same model.
_LEVELS = {2: (1.0, 2.0, 3.0, 4.0), 6: (0.0, 1.0, 2.0)}
_FEATURES = len(_PLAIN) + sum(len(levels) - 1 for levels in _LEVELS.values())


class HeartDisease(Task):
    """Tell whether a patient has a heart disease (num > 0), with logistic regression on 13 features."""

    label_names = ("healthy", "ill")

    def build_model(self) -> nn.Module:
        """Return 13 weights and a bias under torch's own initialisation, as FLamby leaves it."""
        return nn.Sequential(nn.Linear(_FEATURES, 1), nn.Flatten(0))

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the binary cross-entropy of every patient; the output is a logit."""
        return functional.binary_cross_entropy_with_logits(output, target.to(output.dtype), reduction="none")

    def metrics(self, output: Tensor, target: Tensor) -> Mapping[str, Tensor]:
        """Return 1 for every patient told rightly, else 0; the threshold is a probability of 0.5."""
        return {"accuracy": (self.decode(output) == target).float()}

    def decode(self, output: Tensor) -> Tensor:
        """Return 1 for ill, 0 for healthy."""
        return (output > 0).long()

    def load_pool(self, path: Path | None) -> Pool:
        """Return the four hospitals' patients, raw; the natural id of a patient is the hospital's number.

        Raises:
            DataError: no path is given, or a file is missing or not what it should be.
        """
        if path is None:
            raise DataError("heart-disease needs its folder: --set data.path=FOLDER, the one with processed.va.data")
        hospitals = [self.load_local(path / f"processed.{name}.data") for name in HOSPITALS]
        return Pool(
            train=_together([each.train for each in hospitals]),
            test=_together([each.test for each in hospitals if each.test is not None]),
        )

    def load_local(self, path: Path) -> ClientData:
        """Return one hospital's patients, raw, from its ``processed.*.data``; a third of them are held out to test.

        Raises:
            DataError: the file is missing or not what it should be.
        """
        require_sklearn("the split of the heart-disease data")
        from sklearn.model_selection import train_test_split

        table = _read(path)
        ill = table[:, -1] > 0
        counts = np.bincount(ill.astype(np.int64), minlength=2)
        train, test = train_test_split(
            np.arange(len(table)),
            test_size=0.34,
            train_size=0.66,
            random_state=43,
            shuffle=True,
            stratify=ill if counts.min() > 2 else None,
        )
        everything = Examples(torch.from_numpy(_features(path, table)), torch.from_numpy(ill.astype(np.int64)))
        return ClientData(everything.take(np.sort(train)), everything.take(np.sort(test)))

    def prepare(self, data: ClientData) -> ClientData:
        """Return the data normalised by this hospital's own training mean and standard deviation (n − 1)."""
        mean, deviation = data.train.inputs.mean(dim=0), data.train.inputs.std(dim=0)
        scale = torch.where(deviation > 0, deviation, 1.0)  # a feature that never varies says nothing

        def normalised(examples: Examples) -> Examples:
            return Examples((examples.inputs - mean) / scale, examples.targets, examples.groups)

        return ClientData(normalised(data.train), normalised(data.test) if data.test is not None else None)


def _read(path: Path) -> NDArray[np.float64]:
    """Return the complete rows of a file, columns 0 to 9 and the diagnosis."""
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except FileNotFoundError as error:
        raise DataError(f"{path}: there is no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        cells = line.split(",")
        if not line.strip():
            continue
        if len(cells) != _COLUMNS:
            raise DataError(f"{path}, line {number}: {len(cells)} columns where {_COLUMNS} are expected")
        kept = [cell.strip() for index, cell in enumerate(cells) if index not in _DROPPED]
        if "?" in kept:
            continue
        try:
            rows.append([float(cell) for cell in kept])
        except ValueError as error:
            raise DataError(f"{path}, line {number}: {error}") from error
    if len(rows) < 3:
        raise DataError(f"{path}: {len(rows)} complete rows, too few to train and to test on")
    return np.array(rows)


def _features(path: Path, table: NDArray[np.float64]) -> NDArray[np.float32]:
    """Return shape (n, 13): the plain columns, then one column for each level of a categorical one but its first."""
    columns = [table[:, _PLAIN]]
    for index, levels in _LEVELS.items():
        if unknown := set(table[:, index].tolist()) - set(levels):
            raise DataError(f"{path}: column {index} holds {sorted(unknown)}; {levels} are its levels")
        columns.append(table[:, [index]] == np.array(levels[1:]))
    return np.concatenate(columns, axis=1).astype(np.float32)


def _together(hospitals: list[Examples]) -> Examples:
    """Return the hospitals' examples after one another, each with the number of its hospital."""
    return Examples(
        torch.cat([each.inputs for each in hospitals]),
        torch.cat([each.targets for each in hospitals]),
        np.repeat(np.arange(len(hospitals)), [len(each) for each in hospitals]),
    )
