"""Local training and evaluation of one client: the sequential reference that every faster trainer must equal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fedlearn.arrays import Vector
from fedlearn.config import TrainingConfig
from fedlearn.errors import DataError, TaskError
from fedlearn.learning.model import FlatModel, computing
from fedlearn.learning.task import Examples, Task
from fedlearn.privacy.clipping import Update
from fedlearn.sources import SeedTree

__all__ = ["Evaluation", "Trained", "batches_of", "evaluate", "local_steps", "losses_of", "pick", "train"]

_EVALUATION_BATCH = 1024


@dataclass(frozen=True, eq=False, kw_only=True)
class Trained:
    """What came of training on one client.

    Attributes:
        update: its model minus the one it received, shape (d,), in the spec's type.
        num_examples: how many examples it was trained on.
        mean_loss: mean training loss over the examples seen, in the loss's own unit.
        steps: local descent steps taken.
    """

    update: Update
    num_examples: int
    mean_loss: float
    steps: int


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Sums over examples, so that those of several clients can be added.

    Attributes:
        num_examples: how many examples.
        sums: the task's metrics in its order and ``loss``, each summed over the examples.
    """

    num_examples: int
    sums: Mapping[str, float]

    def means(self) -> dict[str, float]:
        """Return each sum divided by the number of examples."""
        return {name: total / self.num_examples for name, total in self.sums.items()}


def train(
    model: FlatModel,
    task: Task,
    received: Vector,
    examples: Examples,
    training: TrainingConfig,
    *,
    proximal_mu: float,
    seeds: SeedTree,
) -> Trained:
    """Descend from ``received`` on ``examples`` and return the difference.

    Every step takes the mean loss over a batch. With ``batch_size`` 0 and one step this is one step of gradient
    descent on the client's J(θ). Batches are shuffled passes; the last of a pass may be smaller. The result is a
    function of the arguments alone.

    Args:
        model: a model of the task; its state is overwritten.
        task: the learning problem.
        received: the server's parameters, shape (d,).
        examples: the client's training examples, at least one.
        training: local epochs or steps, batch size, learning rate, momentum.
        proximal_mu: weight of FedProx's ½μ‖θ − received‖², 0 for none.
        seeds: this client's in this round; orders the batches and drives dropout.

    Raises:
        DataError: there are no examples.
        TaskError: the task's loss is not one value an example.
    """
    if len(examples) == 0:
        raise DataError("there is no example to train on")
    rate, momentum = training.learning_rate, training.momentum
    trained = slice(0, model.spec.trainable_size)
    with computing(seeds.child("torch")):
        model.load(received)
        model.module.train()
        anchor = model.flat.clone() if proximal_mu else None
        velocity = torch.zeros_like(model.flat) if momentum else None
        losses, seen, steps = 0.0, 0, 0
        for rows in batches_of(len(examples), training, seeds.child("batches")):
            inputs, targets = pick(examples, slice(None) if rows is None else torch.from_numpy(rows))
            model.zero_gradient()
            per_example = losses_of(task, model.module(inputs), targets)
            per_example.mean().backward()  # type: ignore[no-untyped-call]
            step = model.collect_gradient()
            if anchor is not None:
                step = step + proximal_mu * (model.flat - anchor)
            if velocity is not None:
                step = velocity.mul_(momentum).add_(step)
            with torch.no_grad():
                model.flat[trained].add_(step[trained], alpha=-rate)
            model.push()
            losses += float(per_example.detach().sum())
            seen += len(targets)
            steps += 1
        vector = model.vector() - received
    return Trained(update=Update(vector), num_examples=len(examples), mean_loss=losses / max(seen, 1), steps=steps)


def evaluate(model: FlatModel, task: Task, parameters: Vector, examples: Examples, *, seeds: SeedTree) -> Evaluation:
    """Return the summed loss and metrics of ``parameters``, shape (d,), on ``examples``.

    Raises:
        DataError: there are no examples.
        TaskError: the task's loss or a metric is not one value an example, or a metric has a reserved name.
    """
    if len(examples) == 0:
        raise DataError("there is no example to evaluate on")
    sums: dict[str, float] = {}
    loss = 0.0
    with computing(seeds), torch.no_grad():
        model.load(parameters)
        model.module.eval()
        for start in range(0, len(examples), _EVALUATION_BATCH):
            inputs, targets = pick(examples, slice(start, start + _EVALUATION_BATCH))
            output = model.module(inputs)
            loss += float(losses_of(task, output, targets).sum(dtype=torch.float64))
            for name, values in task.metrics(output, targets).items():
                if name in ("loss", "num-examples"):
                    raise TaskError(f"a metric may not be called {name!r}; fedlearn reports that itself")
                if (found := _shape(values)) != (len(targets),):
                    raise TaskError(
                        f"{type(task).__name__}.metrics returned {found} for {name!r}; "
                        f"it must return one value an example, shape ({len(targets)},): no mean"
                    )
                sums[name] = sums.get(name, 0.0) + float(values.sum(dtype=torch.float64))
    return Evaluation(num_examples=len(examples), sums={**sums, "loss": loss})


def losses_of(task: Task, output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the task's per-example losses, checked: a mean or a matrix would train something else in silence."""
    losses = task.loss(output, targets)
    if (found := _shape(losses)) != (len(targets),):
        raise TaskError(
            f"{type(task).__name__}.loss returned {found}; "
            f"it must return one loss an example, shape ({len(targets)},) (in torch: reduction='none')"
        )
    return losses


def _shape(values: object) -> tuple[int, ...] | str:
    """Return a tensor's shape, or what else a task returned."""
    return tuple(values.shape) if isinstance(values, torch.Tensor) else type(values).__name__


def pick(examples: Examples, rows: slice | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a copy of the inputs and targets of one batch: a model may work in place."""
    inputs, targets = examples.inputs[rows], examples.targets[rows]
    return (inputs, targets) if isinstance(rows, torch.Tensor) else (inputs.clone(), targets.clone())


def local_steps(size: int, training: TrainingConfig) -> int:
    """Return the descent steps that a client with ``size`` examples takes in a round."""
    if training.local_steps is not None:
        return training.local_steps
    return (training.local_epochs or 1) * -(-size // min(training.batch_size or size, size))


def batches_of(size: int, training: TrainingConfig, seeds: SeedTree) -> Iterator[NDArray[np.int64] | None]:
    """Yield the rows of each step's batch; ``None`` is the whole data set in its own order."""
    generator = seeds.generator()
    batch = min(training.batch_size or size, size)
    per_pass = -(-size // batch)
    remaining = local_steps(size, training)
    while remaining > 0:
        if training.batch_size == 0:
            yield None
            remaining -= 1
            continue
        order = generator.permutation(size).astype(np.int64)
        for start in range(0, size, batch)[:remaining]:
            yield order[start : start + batch]
        remaining -= per_pass
