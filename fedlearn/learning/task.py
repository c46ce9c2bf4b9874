"""The learning problem, defined once: what a user implements to train a model of their own."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedlearn.errors import DataError, FedlearnError, TaskError

__all__ = ["ClientData", "Examples", "Pool", "Task", "check_prepare", "makes_clients", "prepares", "task_code"]


@dataclass(frozen=True, eq=False)
class Examples:
    """Some examples: what a model sees and what it should answer.

    Attributes:
        inputs: tensor of shape (n, …).
        targets: tensor of shape (n,) or (n, …).
        groups: the natural id of every example (a hospital, a writer), shape (n,), or ``None``.
    """

    inputs: Tensor
    targets: Tensor
    groups: NDArray[Any] | None = None

    def __post_init__(self) -> None:
        if self.inputs.dim() == 0 or self.targets.dim() == 0:
            raise TaskError("inputs and targets need a first dimension: one row an example")
        if len(self.inputs) != len(self.targets):
            raise TaskError(f"{len(self.inputs)} inputs but {len(self.targets)} targets")
        if self.groups is not None and np.shape(self.groups) != (len(self.inputs),):
            raise TaskError(f"groups needs shape ({len(self.inputs)},), one natural id an example")

    def __len__(self) -> int:
        return self.inputs.shape[0]

    def take(self, index: NDArray[np.int64]) -> Examples:
        """Return a copy of the examples at ``index``."""
        rows = torch.from_numpy(np.array(index, order="C"))  # a copy: torch warns of read-only memory
        groups = None if self.groups is None else np.asarray(self.groups)[index]
        return Examples(self.inputs[rows], self.targets[rows], groups)

    def labels(self) -> NDArray[np.int64] | None:
        """Return the class of every example where targets are classes (integers, one each), else ``None``."""
        if self.targets.dim() != 1 or self.targets.is_floating_point() or self.targets.is_complex():
            return None
        return self.targets.numpy().astype(np.int64)

    def strata(self) -> NDArray[np.int64] | None:
        """Return what a partition by label goes by: the class, or the decile of a target that is one number."""
        if (labels := self.labels()) is not None:
            return labels
        if self.targets.dim() != 1 or self.targets.is_complex():
            return None
        values = self.targets.double().numpy()  # NumPy knows no bfloat16
        if len(values) == 0:
            return np.zeros(0, dtype=np.int64)
        edges = np.quantile(values, np.linspace(0.1, 0.9, 9))
        return np.searchsorted(edges, values, side="right").astype(np.int64)


@dataclass(frozen=True, eq=False)
class Pool:
    """What a simulation deals out to its clients.

    Attributes:
        train: the examples to train on; every one goes to exactly one client.
        test: examples on which each client tests for itself, or ``None``; dealt out too, by natural id where
            the partition is natural.
    """

    train: Examples
    test: Examples | None = None


@dataclass(frozen=True, eq=False)
class ClientData:
    """What one client holds: its training examples, and test examples of its own where it has any."""

    train: Examples
    test: Examples | None = None


@contextmanager
def task_code(task: object, method: str) -> Iterator[None]:
    """Run a user's code: whatever it raises becomes an error that names the method, the file and the line.

    Raises:
        DataError: a file could not be read.
        TaskError: anything else went wrong; the exception is the cause.
    """
    try:
        yield
    except FedlearnError:
        raise
    except OSError as error:
        raise DataError(f"{type(task).__name__}.{method}: {error}") from error
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = getattr(sys.modules.get(type(task).__module__), "__file__", None)
        where = next((frame for frame in reversed(frames) if frame.filename == own), frames[-1])
        raise TaskError(
            f"{type(task).__name__}.{method} raised {type(error).__name__}: {error} "
            f"({where.filename}, line {where.lineno})"
        ) from error


class Task(Protocol):
    """A learning problem: model, loss, metrics, data. Subclass it in one file; no argument to ``__init__``.

    Required: ``build_model``, ``loss`` and, to simulate, ``load_pool`` or ``load_client``. The rest has defaults.
    """

    label_names: Sequence[str] = ()
    """What the classes are called, for people; may be empty."""

    metric_names: Sequence[str] = ()
    """Those metrics, within [0, 1] for every example, that clients may release with noise where privacy hides them."""

    prepares_each_alone: bool = False
    """Whether ``prepare`` treats every example by itself, so that none of them shows in what became of another."""

    def build_model(self) -> nn.Module:
        """Return a fresh model. It is called under the run's seed, so plain initialisers are reproducible.

        BatchNorm cannot train on a batch of one, so a client whose last batch is one example fails; GroupNorm can.
        """
        ...

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the loss of every example, shape (b,). Training descends on its mean over a batch."""
        ...

    def metrics(self, output: Tensor, target: Tensor) -> Mapping[str, Tensor]:
        """Return per-example values, each of shape (b,), that may be summed; their means are reported.

        The first one is the headline.
        """
        del output, target
        return {}

    def decode(self, output: Tensor) -> Tensor:
        """Return the answer in an output, shape (b, …): by default the likeliest class of a row of scores."""
        return output.argmax(dim=1) if output.dim() == 2 and output.shape[1] > 1 else output

    def load_pool(self, path: Path | None) -> Pool:
        """Return the data that a simulation deals out; ``path`` is ``data.path`` of the scenario."""
        raise TaskError(f"{type(self).__name__} has no load_pool, so it cannot be simulated")

    def load_client(self, client: int, clients: int, path: Path | None) -> ClientData:
        """Return what client ``client`` of ``clients`` holds, made or read when it is asked for: no pool is dealt out.

        For populations that fit in no memory: with ``data.partition = "natural"`` a simulation asks for a client's data
        each time that client is invited, in whichever process trains it, and lets go of it afterwards.

        It must be the same data each time, whoever was asked before. It is called under seeds of the client's own, so
        that what it draws from the global generators of torch, NumPy or Python is. What all clients have in common must
        not come from them: make it from a fixed seed, once (see ``simulations/populations/task.py``). Nothing is
        copied, so what several clients share must not be changed in place.

        Args:
            client: from 0 to ``clients - 1``.
            clients: ``federation.clients``.
            path: ``data.path`` of the scenario.
        """
        raise TaskError(f"{type(self).__name__} has no load_client, so it makes no data on demand")

    def load_test(self, path: Path | None) -> Examples | None:
        """Return central test examples, or ``None`` where there are none (then clients validate)."""
        del path
        return None

    def load_local(self, path: Path) -> ClientData:
        """Return what this device holds; ``path`` is set by its owner, never by a server."""
        raise TaskError(f"{type(self).__name__} has no load_local, so it cannot run on a device")

    def prepare(self, data: ClientData) -> ClientData:
        """Return the data as one client uses it, such as scaled by its own mean; it sees only its own.

        What it draws at random is the same in every round: a split into training and test examples stays one.
        """
        return data


def makes_clients(task: Task) -> bool:
    """Return whether a task makes each client's data when it is asked for."""
    return type(task).load_client is not Task.load_client


def prepares(task: Task) -> bool:
    """Return whether a task prepares each client's data, so that the model knows no other."""
    return type(task).prepare is not Task.prepare


def check_prepare(task: Task) -> None:
    """Raise unless one example more or less changes nothing of the others: what hiding an example rests on.

    A client that scales its data by its own mean puts every example into all of them, past any clip.

    Raises:
        TaskError: the task has a ``prepare`` and does not say that it treats each example by itself.
    """
    if prepares(task) and not task.prepares_each_alone:
        name = type(task).__name__
        raise TaskError(
            f'privacy.unit = "example" hides one example, and {name}.prepare may put it into all the others (as '
            "scaling by the client's own mean does). Scale by fixed numbers in build_model instead; or, if no "
            f"example's result depends on another, set prepares_each_alone = True in {name}"
        )
