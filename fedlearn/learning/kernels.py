"""What a vectorised trainer is made of: many clients' parameters moved by one computation.

A ``Kernel`` knows how to compute one step of all clients that are at work; when to step, and with which examples, is
the ``Schedule``'s; what becomes of the updates (a mean, a clipped sum) is the caller's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlearn.arrays import Vector
from fedlearn.config import TrainingConfig
from fedlearn.learning.dpsgd import momentum_before
from fedlearn.learning.model import FlatModel
from fedlearn.learning.schedule import Batch
from fedlearn.learning.task import Examples, Task

__all__ = ["CACHE_NUMBERS", "Descent", "Kernel", "Stack", "UnsuitableError"]

CACHE_NUMBERS = 1 << 20
"""Parameters formed at a time, in numbers: with their gradients they fit into most processors' second-level cache."""


class UnsuitableError(Exception):
    """A model cannot be trained many clients at a time; the text says why, and the sequential trainer can."""


@dataclass(frozen=True, kw_only=True)
class Descent:
    """How a client descends: v ← m·v + g + μ·(θ - received), θ ← θ - η·v."""

    rate: float
    momentum: float
    proximal_mu: float

    @classmethod
    def of(cls, training: TrainingConfig, proximal_mu: float) -> Descent:
        """Return a run's."""
        return cls(rate=training.learning_rate, momentum=training.momentum, proximal_mu=proximal_mu)

    @property
    def plain(self) -> bool:
        """Whether a step is the gradient alone."""
        return not self.momentum and not self.proximal_mu


class Stack:
    """The trained parameters of ``count`` clients as the rows of one matrix, and their momentum.

    Attributes:
        received: shape (d,), what all of them begin with.
        rows: shape (count, d).
        velocity: shape (count, d), or ``None`` without momentum.
    """

    def __init__(self, received: Tensor, count: int, descent: Descent) -> None:
        self.received, self.descent = received, descent
        self.rows = received.expand(count, -1).clone()
        self.velocity = torch.zeros_like(self.rows) if descent.momentum else None

    def view(self, place: slice, shape: tuple[int, ...]) -> Tensor:
        """Return one entry of all clients, shape (count, …), as a view."""
        return self.rows[:, place].view(len(self.rows), *shape)

    def move(self, active: int, steps: Tensor, place: slice = slice(None)) -> None:
        """Let the first ``active`` clients take a step of their gradients, shape (active, d) or of a part of it."""
        descent, own = self.descent, self.rows[:active, place]
        if descent.proximal_mu:
            steps = steps + descent.proximal_mu * (own - self.received[place])
        if self.velocity is not None:
            steps = self.velocity[:active, place].mul_(descent.momentum).add_(steps)
        own.sub_(steps, alpha=descent.rate)

    def velocity_of(self, client: int) -> NDArray[np.floating[Any]] | None:
        """Return a copy of one client's momentum, shape (d,)."""
        return None if self.velocity is None else self.velocity[client].numpy().copy()

    def begin_with(self, client: int, velocity: NDArray[np.floating[Any]]) -> None:
        """Let one client begin with this momentum."""
        if self.velocity is not None:
            self.velocity[client] = momentum_before(velocity, self.received)

    def updates(self) -> Tensor:
        """Return every client's update, shape (count, d)."""
        return self.rows - self.received


class Kernel(ABC):
    """Computes the steps of one group of clients; made anew for each group.

    Args:
        model: the model, with what is not trained as it was received.
        task: the learning problem.
        received: the parameters that all clients begin with, shape (d,).
        count: how many clients.
    """

    _stack: Stack
    """The parameters that are formed: all of them, where steps are given from outside."""

    def __init__(self, model: FlatModel, task: Task, received: Vector, count: int) -> None:
        self.model, self.task, self.count = model, task, count
        self.trained = model.spec.trainable_size
        self.received = torch.from_numpy(np.array(received[: self.trained]))

    @staticmethod
    @abstractmethod
    def check(model: FlatModel) -> None:
        """Raise ``UnsuitableError`` where the model's layers are not for this kernel."""

    @staticmethod
    @abstractmethod
    def slower_because(model: FlatModel, examples: Examples, together: int) -> str:
        """Return why this kernel is slower than one client after the other; nothing where it is faster.

        A rule of sizes alone, measured once (``simulations/benchmarks/engine``): a rule that looked at a clock would
        give another result on another day.

        Args:
            model: the model, whose state may be overwritten.
            examples: a few.
            together: how many clients are trained at once.
        """

    @abstractmethod
    def step(self, inputs: Tensor, targets: Tensor, batch: Batch) -> Tensor:
        """Let the first ``batch.active`` clients take one step; return the losses, shape (active, b)."""

    @abstractmethod
    def clipped_sums(self, inputs: Tensor, targets: Tensor, batch: Batch, bound_l2: float) -> tuple[Tensor, Tensor]:
        """Return each client's sum of clipped gradients, shape (active, trained), float64, and the losses."""

    def move(self, active: int, steps: Tensor) -> None:
        """Let the first ``active`` clients take a step of these gradients, shape (active, trained)."""
        self._stack.move(active, steps)

    def velocity(self, place: int) -> NDArray[np.floating[Any]] | None:
        """Return a copy of one client's momentum, shape (trained,), where there is any."""
        return self._stack.velocity_of(place)

    def begin_with(self, place: int, velocity: NDArray[np.floating[Any]]) -> None:
        """Let one client begin with this momentum."""
        self._stack.begin_with(place, velocity)

    @abstractmethod
    def finite(self) -> Tensor:
        """Return whether each client's update is finite, shape (count,)."""

    @abstractmethod
    def norms(self) -> Tensor:
        """Return the norm of each client's update, shape (count,), float64; not finite where an entry is not."""

    @abstractmethod
    def weighted(self, factors: Tensor, total: Tensor) -> None:
        """Add Σ factor · update to ``total``, shape (trained,), in its type; what has factor 0 may be anything."""
