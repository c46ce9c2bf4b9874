"""Who of a group takes which batch at which step, when many clients descend at once.

Clients hold different numbers of examples, so they take different numbers of steps and their last batch of a pass may
be smaller. They are ordered by their steps, so that those still at work are a prefix of the group that shrinks; and a
batch is padded to the longest of its step only, with weight 0. (Padding every client to the longest would waste most of
the work.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlearn.config import TrainingConfig
from fedlearn.learning.dpsgd import poisson_rows
from fedlearn.learning.task import Examples
from fedlearn.learning.trainer import batches_of, local_steps
from fedlearn.privacy.noise import Noise
from fedlearn.sources import SeedTree

__all__ = ["Batch", "Schedule", "buckets"]


@dataclass(frozen=True, eq=False)
class Batch:
    """One step of the clients that are still at work.

    Attributes:
        rows: where each example stands among all of the group's, shape (active, b).
        lengths: how many of a row's ``b`` are examples of its client, shape (active,); the rest is padding.
    """

    rows: Tensor
    lengths: NDArray[np.int64]

    @property
    def active(self) -> int:
        """How many clients are still at work."""
        return len(self.lengths)

    @cached_property
    def valid(self) -> Tensor:
        """1 for an example, 0 for padding, shape (active, b)."""
        return torch.arange(self.rows.shape[1])[None, :] < torch.from_numpy(self.lengths)[:, None]

    def mean_weights(self, dtype: torch.dtype) -> Tensor:
        """Return what each example counts in its client's mean loss, shape (active, b)."""
        shares = torch.from_numpy(1.0 / np.maximum(self.lengths, 1)).to(dtype)
        return self.valid.to(dtype) * shares[:, None]


class Schedule:
    """The batches of a group of clients, in the clients' order by steps; ties stay in the order given.

    Args:
        batches: the rows of every batch of every client, counted within its own examples.
        sizes: how many examples each client holds.

    Attributes:
        order: which client of those given stands at which place.
        steps: how many steps each takes, in that order.
        batches: one for every step.
    """

    def __init__(self, batches: Sequence[Sequence[NDArray[np.int64]]], sizes: Sequence[int]) -> None:
        self.order = sorted(range(len(batches)), key=lambda client: -len(batches[client]))
        starts = np.concatenate([[0], np.cumsum(sizes)])
        ordered = [(starts[client], batches[client]) for client in self.order]
        self.steps = np.array([len(own) for _, own in ordered], dtype=np.int64)
        self.batches = [_batch(ordered, number) for number in range(int(self.steps[0]) if ordered else 0)]

    @classmethod
    def shuffled(cls, sizes: Sequence[int], training: TrainingConfig, seeds: Sequence[SeedTree]) -> Schedule:
        """Return the shuffled passes that the sequential trainer takes, for the same seeds."""
        whole = [np.arange(size, dtype=np.int64) for size in sizes]
        return cls(
            [
                [
                    whole[client] if rows is None else rows
                    for rows in batches_of(size, training, seeds[client].child("batches"))
                ]
                for client, size in enumerate(sizes)
            ],
            sizes,
        )

    @classmethod
    def poisson(
        cls, sizes: Sequence[int], training: TrainingConfig, rates: Sequence[float], noises: Sequence[Noise]
    ) -> Schedule:
        """Return batches that every example is in with its client's rate, as DP-SGD takes them from the same noise."""
        return cls(
            [
                [poisson_rows(noise, number, rate, size) for number in range(local_steps(size, training))]
                for size, rate, noise in zip(sizes, rates, noises, strict=True)
            ],
            sizes,
        )

    @property
    def most_rows(self) -> int:
        """How many rows, padding included, the client with the most steps goes through."""
        return sum(batch.rows.shape[1] for batch in self.batches)


def _batch(ordered: Sequence[tuple[int, Sequence[NDArray[np.int64]]]], number: int) -> Batch:
    """Return one step of those that take so many."""
    at_work = [start + own[number] for start, own in ordered if len(own) > number]
    lengths = np.array([len(rows) for rows in at_work], dtype=np.int64)
    longest = int(lengths.max(initial=0))
    if lengths.min(initial=longest) == longest:
        return Batch(torch.from_numpy(np.stack(at_work)), lengths)
    padded = np.empty((len(at_work), longest), dtype=np.int64)
    for row, (own, length) in enumerate(zip(at_work, lengths, strict=True)):
        padded[row, :length] = own
        padded[row, length:] = ordered[row][0]  # an example of the client's own: what it computes there counts 0
    return Batch(torch.from_numpy(padded), lengths)


def buckets(examples: Sequence[Examples], most: int) -> list[list[int]]:
    """Return groups of at most ``most`` clients that hold about as many examples as each other.

    Within a group the longest batch of a step sets the work of all; what is alike goes together, by size and the shape
    of its inputs, in an order that depends on nothing else.
    """
    order = sorted(range(len(examples)), key=lambda client: (-len(examples[client]), client))
    groups: list[list[int]] = []
    for client in order:
        if groups and len(groups[-1]) < most and _alike(examples[groups[-1][0]], examples[client]):
            groups[-1].append(client)
        else:
            groups.append([client])
    return groups


def _alike(one: Examples, other: Examples) -> bool:
    """Return whether two clients' examples can stand in one tensor, the second not much smaller than the first."""
    return (
        2 * len(other) >= len(one)
        and one.inputs.shape[1:] == other.inputs.shape[1:]
        and one.targets.shape[1:] == other.targets.shape[1:]
        and one.inputs.dtype == other.inputs.dtype
        and one.targets.dtype == other.targets.dtype
    )
