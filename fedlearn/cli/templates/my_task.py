"""A learning problem of your own, in one file. It runs as it is; change it piece by piece.

    fedlearn simulate my_task.py                        train it on simulated clients
    fedlearn simulate my_task.py --set data.partition=natural --set federation.clients=8

Made-up data stands in for yours: eight hospitals note age, blood pressure and pulse of their patients, and whether
a patient came back within the month. Every hospital's patients are a little different.

For a file of your own add --set data.path=mine.csv. It has a header and, in any order, the columns named below; in
the second command the number of clients is that of its hospitals.
"""

import csv
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedlearn.errors import DataError
from fedlearn.learning.task import ClientData, Examples, Pool, Task

__all__ = ["MyTask"]

COLUMNS = ("age", "pressure", "pulse")  # the inputs, by name; other columns of a file are not looked at
TARGET = "target"  # 0, 1, …: a place in LABELS
GROUP = "hospital"  # may be text, may be missing: the natural id, who holds a row in real life
LABELS = ("stays well", "comes back")
HOSPITALS = 8  # of the made-up data


class MyTask(Task):
    """Tell which patient will come back within the month."""

    # What the answers 0, 1, … are called. Leave it out where answers are numbers.
    label_names = LABELS

    def build_model(self) -> nn.Module:
        """Return any torch module; plain initialisers are seeded for you."""
        return nn.Sequential(nn.Linear(len(COLUMNS), 32), nn.ReLU(), nn.Linear(32, len(LABELS)))

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
        """Return what a simulation deals out to its clients; path is data.path of the scenario, or None.

        Every example carries its natural id in groups: data.partition = "natural" makes each id a client. For more
        clients than fit into memory there is load_client(client, clients, path), which makes one client's data when it
        is asked for.
        """
        if path is None:  # with data of your own: raise DataError("say where it is: --set data.path=FILE")
            train, test = _split(_made_up(2500, seed=1), "the made-up data")
        else:
            train, test = _split(_read_csv(path), path)
        return Pool(train, test)

    def load_test(self, path: Path | None) -> Examples | None:
        """Return central test examples that no client trains on, or None.

        With None clients test for themselves, on Pool.test or, on a device, on ClientData.test. Return it always
        once your data is on devices: a server without data.path would test on the made-up data.
        Nothing returned here goes through prepare. Nor does the file of fedlearn predict --data: only numbers, in the
        order of COLUMNS, and the target where it is known.
        """
        return _made_up(500, seed=2) if path is None else None

    def load_local(self, path: Path) -> ClientData:
        """Return what a real device holds: one hospital's file. fedlearn.data.loaders.load_arrays reads an .npz."""
        return ClientData(*_split(_read_csv(path), path))

    def prepare(self, data: ClientData) -> ClientData:
        """Return the data as one client uses it, such as scaled by its own mean. Leave it out where there is none.

        Only clients' data comes here: load_test and fedlearn predict --data do not, and are used as they are. A scale
        that is the same for everyone is safest as the first layer of build_model, which all of them go through.
        Under privacy.unit = "example" a client's own mean would put each example into all the others; a task with a
        prepare is refused there, unless it also says prepares_each_alone = True, next to label_names.
        """
        return data


def _read_csv(path: Path) -> Examples:
    """Return the rows of a table with a header; row 1 is the header."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = [(row, line) for row, line in enumerate(csv.reader(file), start=1) if any(line)]
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{path}: {error}") from error
    header = [name.strip() for name in lines[0][1]] if lines else []
    for name in (*COLUMNS, TARGET):
        if header.count(name) != 1:
            raise DataError(f"{path}: expected one column {name!r}; row 1 has {', '.join(header) or 'nothing'}")
    inputs, targets, groups = [], [], []
    for row, line in lines[1:]:
        if len(line) != len(header):
            raise DataError(f"{path}: row {row} has {len(line)} cells, the header {len(header)}")
        cells = dict(zip(header, map(str.strip, line), strict=True))
        where = f"{path}: row {row}, column"
        inputs.append([_number(cells[name], f"{where} {name!r}") for name in COLUMNS])
        targets.append(_number(cells[TARGET], f"{where} {TARGET!r}"))
        if targets[-1] not in range(len(LABELS)):
            raise DataError(f"{where} {TARGET!r}: expected 0 to {len(LABELS) - 1}, not {cells[TARGET]!r}")
        if GROUP in cells:
            groups.append(cells[GROUP])
            if not groups[-1]:
                raise DataError(f"{where} {GROUP!r}: the cell is empty")
    if not inputs:
        raise DataError(f"{path}: there is no row below the header")
    return Examples(torch.tensor(inputs), torch.tensor(targets).long(), np.array(groups) if groups else None)


def _number(cell: str, where: str) -> float:
    """Return the number in a cell."""
    try:
        number = float(cell)
    except ValueError:
        number = math.nan
    if not abs(number) < 1e38:  # NaN, infinite, or more than float32 holds
        raise DataError(f"{where}: expected a number, not {cell!r}")
    return number


def _split(examples: Examples, source: object) -> tuple[Examples, Examples]:
    """Return the rows to train on and the rows to test on: in each hospital the 2nd, 6th, 10th, …"""
    groups = np.zeros(len(examples)) if examples.groups is None else examples.groups
    test = np.zeros(len(examples), dtype=bool)
    for group in np.unique(groups):
        rows = np.flatnonzero(groups == group)
        if len(rows) < 2:
            name = "" if examples.groups is None else f" of {GROUP} {group}"
            raise DataError(f"{source}: there is one row{name}; one to train on and one to test on are needed")
        test[rows[1::4]] = True
    return examples.take(np.flatnonzero(~test)), examples.take(np.flatnonzero(test))


def _made_up(count: int, seed: int) -> Examples:
    """Return patients who come back when old with a high pressure, or with a pulse too high."""
    chance = np.random.default_rng(seed)
    hospital = chance.integers(HOSPITALS, size=count)
    inputs = chance.normal(size=(count, len(COLUMNS)))
    inputs[:, 0] += 0.4 * np.cos(hospital)  # each hospital is a little different
    age, pressure, pulse = inputs.T
    strain = age * pressure + 0.8 * pulse + 0.1 * chance.normal(size=count)
    return Examples(torch.from_numpy(inputs).float(), torch.from_numpy(strain > 0.3).long(), hospital)
