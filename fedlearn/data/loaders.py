"""Who holds what: a simulation's pool dealt out, or data made client by client, and a device's own files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fedlearn.config import RunConfig
from fedlearn.data.partition import partition
from fedlearn.errors import ConfigError, DataError, DependencyError, TaskError
from fedlearn.learning.model import computing
from fedlearn.learning.task import ClientData, Examples, Pool, Task, makes_clients, task_code
from fedlearn.sources import SeedTree

__all__ = [
    "Dealt",
    "Distribution",
    "OnDemand",
    "Sizes",
    "distribute_data",
    "load_arrays",
    "refuse_path",
    "require_sklearn",
]

_SAMPLED = 32
"""How many clients are looked at where each one's data has to be made to know its size."""


class Distribution(ABC):
    """Who holds what in a simulation.

    Attributes:
        clients: how many clients there are.
    """

    def __init__(self, clients: int) -> None:
        self.clients = clients

    @abstractmethod
    def client(self, index: int) -> ClientData:
        """Return what client ``index`` holds, before the task prepares it."""

    @abstractmethod
    def sizes(self) -> Sizes:
        """Return how many examples clients hold: all of them where that is known, else of a sample."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How many examples clients hold.

    Attributes:
        clients: the clients that were looked at, in ascending order.
        train: their training examples.
        test: test examples of their own; empty where none has any.
    """

    clients: Sequence[int]
    train: Sequence[int]
    test: Sequence[int]


class Dealt(Distribution):
    """A pool dealt out.

    Attributes:
        pool: everything there is.
        train: one index array a client into ``pool.train``.
        test: one index array a client into ``pool.test``; empty where the pool has no such examples.
    """

    def __init__(self, pool: Pool, train: tuple[NDArray[np.int64], ...], test: tuple[NDArray[np.int64], ...]) -> None:
        super().__init__(len(train))
        self.pool, self.train, self.test = pool, train, test

    def client(self, index: int) -> ClientData:
        """Return a copy of what client ``index`` holds, before the task prepares it."""
        test = self.pool.test.take(self.test[index]) if self.pool.test is not None and self.test else None
        return ClientData(self.pool.train.take(self.train[index]), test)

    def sizes(self) -> Sizes:
        """Return how many examples every client holds."""
        train, test = (tuple(part.size for part in parts) for parts in (self.train, self.test))
        return Sizes(clients=range(self.clients), train=train, test=test)


class OnDemand(Distribution):
    """Data that the task makes when a client is asked for; nothing of it is kept, whatever the number of clients.

    Guarantees: a client's data is a function of the seed, the client and what the task is given; not of who was asked
    before, nor of the process.

    Args:
        task: one that has a ``load_client``.
        clients: how many clients there are.
        path: where the task's data lies, or ``None``.
        seeds: each client's own are below these.
    """

    def __init__(self, task: Task, clients: int, path: Path | None, seeds: SeedTree) -> None:
        super().__init__(clients)
        self._task, self._path, self._seeds = task, path, seeds

    def client(self, index: int) -> ClientData:
        """Return what client ``index`` holds, made now.

        Raises:
            ValueError: there is no such client.
            DataError: the task could not read it.
            TaskError: the task could not make it.
        """
        if not 0 <= index < self.clients:
            raise ValueError(f"there is no client {index}; there are 0 to {self.clients - 1}")
        with task_code(self._task, "load_client"), computing(self._seeds.child(index)):
            data = self._task.load_client(index, self.clients, self._path)
        if not isinstance(data, ClientData):
            raise TaskError(
                f"{type(self._task).__name__}.load_client returned {type(data).__name__}; it must return ClientData"
            )
        return data

    def sizes(self) -> Sizes:
        """Return how many examples a sample of clients holds, evenly spread over all of them."""
        sample = np.unique(np.linspace(0, self.clients - 1, min(self.clients, _SAMPLED)).round().astype(int)).tolist()
        held = [self.client(index) for index in sample]
        test = [0 if data.test is None else len(data.test) for data in held]
        train = tuple(len(data.train) for data in held)
        return Sizes(clients=tuple(sample), train=train, test=tuple(test) if any(test) else ())


def distribute_data(task: Task, config: RunConfig) -> Distribution:
    """Deal the task's pool out to the clients of a simulation: the second of the seven steps.

    With ``data.partition = "natural"`` a task that has a ``load_client`` makes each client's data when it is asked for:
    nothing is loaded here but the first client, to see that it can be, and nothing of the size of the population is
    held.

    Guarantees: every example of a pool goes to exactly one client, none is lost, and the same seed deals the same way.

    Raises:
        ConfigError: the data cannot be partitioned as asked.
        DataError: the task's data is missing or empty.
    """
    data, seeds = config.data, SeedTree.root(config.seed).child("partition")
    path = Path(data.path) if data.path is not None else None
    if makes_clients(task) and data.partition == "natural":
        made = OnDemand(task, config.federation.clients, path, seeds.child("load_client"))
        made.client(0)
        return made
    if makes_clients(task) and type(task).load_pool is Task.load_pool:
        reason = f'must be "natural", not "{data.partition}": the task makes each client\'s data, and there is no pool'
        raise ConfigError("data.partition", f"{reason} to deal out")
    with task_code(task, "load_pool"), computing(seeds.child("load_pool")):
        pool = task.load_pool(path)
    if len(pool.train) == 0:
        raise DataError(f"the task {config.task!r} has no training examples")

    def deal(scheme: str, examples: Examples, purpose: str) -> tuple[NDArray[np.int64], ...]:
        return partition(
            scheme,
            clients=config.federation.clients,
            size=len(examples),
            labels=examples.strata(),
            groups=examples.groups,
            alpha=data.alpha,
            labels_per_client=data.labels_per_client,
            seed=seeds.child(purpose),
        )

    train = deal(data.partition, pool.train, "train")
    if pool.test is None:
        return Dealt(pool, train, ())
    natural = data.partition == "natural"
    if natural and set(np.unique(_groups(pool.test))) != set(np.unique(_groups(pool.train))):
        raise DataError(f"the task {config.task!r} has other natural ids in its test examples than in training")
    return Dealt(pool, train, deal("natural" if natural else "iid", pool.test, "test"))


def _groups(examples: Examples) -> NDArray[np.generic]:
    """Return the natural ids, which a natural partition needs."""
    if examples.groups is None:
        raise ConfigError("data.partition", '"natural" needs a natural id for every example; this task has none')
    return np.asarray(examples.groups)


def load_arrays(path: Path) -> ClientData:
    """Read an .npz file with ``inputs`` and ``targets``, and optionally ``test_inputs`` and ``test_targets``.

    Raises:
        DataError: the file is missing, is no .npz file, or an array is missing, empty, of the wrong length, or holds
            something else than numbers.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: np.asarray(archive[name]) for name in archive.files}
    except FileNotFoundError as error:
        raise DataError(f"{path}: there is no such file") from error
    except Exception as error:  # of a damaged file, zipfile, zlib and NumPy raise nearly anything
        raise DataError(f"{path}: not a readable .npz file with plain arrays") from error

    def examples(inputs: str, targets: str) -> Examples:
        if missing := [name for name in (inputs, targets) if name not in arrays]:
            raise DataError(f"{path}: holds no array {missing[0]!r}; found {sorted(arrays)}")
        seen, wanted = (_tensor(path, name, arrays[name]) for name in (inputs, targets))
        if len(seen) != len(wanted) or not len(seen):
            raise DataError(f"{path}: {inputs!r} and {targets!r} need the same number of rows, at least one")
        return Examples(seen, wanted)

    test = examples("test_inputs", "test_targets") if arrays.keys() & {"test_inputs", "test_targets"} else None
    return ClientData(examples("inputs", "targets"), test)


def _tensor(path: Path, name: str, array: NDArray[np.generic]) -> torch.Tensor:
    """Return an array of one row an example as torch takes it, whatever machine wrote it."""
    if array.ndim == 0:
        raise DataError(f"{path}: {name!r} is a single value; one row an example is expected")
    try:
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))
    except TypeError as error:
        raise DataError(f"{path}: {name!r} is of type {array.dtype}; numbers that torch knows are expected") from error


def require_sklearn(purpose: str) -> None:
    """Raise DependencyError unless scikit-learn is installed."""
    if find_spec("sklearn") is None:
        raise DependencyError("scikit-learn", "simulation", purpose)


def refuse_path(path: Path | None) -> None:
    """Raise ConfigError where a task that brings its own data is given a path: it would be ignored."""
    if path is not None:
        raise ConfigError("data.path", "this task brings its own data and reads no file; leave it out")
