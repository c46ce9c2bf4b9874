"""DP-SGD on one client: every example's gradient is clipped, their sum is noised, and nothing else is learned from.

Of Opacus come the gradients (``example_gradients.py``) and the accountants (``example_epsilon.py``). Batches, noise and
the descent are done here: Opacus' noise comes from torch's generator, which a seed repeats on every client and in every
round; its q is 1/len(loader), and it accounts Poisson batches that nobody drew.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlearn.arrays import Vector
from fedlearn.config import GradSampleMode, TrainingConfig
from fedlearn.errors import DataError
from fedlearn.learning.example_gradients import check_once, summing
from fedlearn.learning.model import FlatModel, computing
from fedlearn.learning.task import Examples, Task
from fedlearn.learning.trainer import Trained, local_steps, pick
from fedlearn.privacy.clipping import Update
from fedlearn.privacy.gaussian import bernoulli, power_of_two, to_grid
from fedlearn.privacy.noise import Noise
from fedlearn.privacy.releases import Query, Release, Sampling
from fedlearn.sources import SeedTree

__all__ = [
    "DpSgd",
    "PrivateTraining",
    "expected_batch",
    "momentum_before",
    "noised_step",
    "planned_release",
    "poisson_rows",
    "sample_rate",
    "train_private",
]

_MOST_NUMBERS = 2**27  # gradients held at a time, in numbers: 512 MiB
_GRID = 2.0**-20  # of the noise's standard deviation


@dataclass(frozen=True, kw_only=True)
class DpSgd:
    """What is done to every gradient; privacy only.

    Attributes:
        noise_multiplier: σ of the noise on the clipped sum, divided by ``bound_l2``.
        bound_l2: the clipping norm of one example's gradient, over all trained parameters together.
        mode: how the gradient of each example is computed.
    """

    noise_multiplier: float
    bound_l2: float
    mode: GradSampleMode

    def __post_init__(self) -> None:
        for name in ("noise_multiplier", "bound_l2"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, got {getattr(self, name)}")

    @property
    def stddev(self) -> float:
        """The σ of the noise on every coordinate of a step's sum."""
        return self.noise_multiplier * self.bound_l2


@dataclass(frozen=True, eq=False, kw_only=True)
class PrivateTraining:
    """What came of it.

    Attributes:
        trained: as of plain training; of ``update`` what is not trained is zero. Only ``update`` may leave: there is no
            noise on ``mean_loss``.
        velocity: the momentum after the last step, shape (trained parameters,), computed from noised gradients alone;
            ``None`` without momentum.
    """

    trained: Trained
    velocity: NDArray[np.floating[Any]] | None


def sample_rate(size: int, training: TrainingConfig) -> float:
    """Return q, the probability with which each of ``size`` examples is in a batch: B/n, or 1 for whole batches."""
    return expected_batch(size, training) / size


def planned_release(
    *, round_number: int, size: int, training: TrainingConfig, dp: DpSgd, simulated: bool, evidence: Mapping[str, str]
) -> Release:
    """Return what a round of training will release, before it is trained; ``evidence`` names the run at least."""
    rate = sample_rate(size, training)
    return Release(
        what="update",
        round_number=round_number,
        unit="example",
        adjacency="add-remove",
        mechanism="gaussian",
        queries=(Query(name="gradient", sensitivity_l2=dp.bound_l2, stddev=dp.stddev),),
        sampling=Sampling(method="everyone" if rate == 1 else "poisson", rate=rate, population=size),
        steps=local_steps(size, training),
        simulated=simulated,
        evidence=evidence,
    )


def train_private(
    model: FlatModel,
    task: Task,
    received: Vector,
    examples: Examples,
    training: TrainingConfig,
    *,
    proximal_mu: float,
    dp: DpSgd,
    seeds: SeedTree,
    noise: Noise,
    velocity: NDArray[np.floating[Any]] | None = None,
) -> PrivateTraining:
    """Descend from ``received`` on noised sums of clipped gradients and return the difference.

    A step takes each example with probability q, clips its gradient to ``bound_l2``, adds Gaussian noise of deviation
    ``noise_multiplier · bound_l2`` to the sum, rounds it to a grid and divides by the expected batch size q·n. An empty
    batch is a step of noise alone; no batch is cut to a size. FedProx's pull and momentum see only the result.

    Guarantees: the update is a function of the noised sums. It is what ``planned_release`` says, against whoever does
    not know ``noise``: (ε, δ) follows from σ/bound, q and the steps. The batches and what the model draws itself
    (dropout) come from ``noise`` too, since masks that are known would tie an example's gradient to who else is there.
    Each example's share of a sum has norm at most ``bound_l2`` in float64, for bounds from 1e-20 to 1e20; one whose
    gradient is not finite, or longer than 1e30, adds zero. What is compared before training is made up; a batch that
    a mode cannot treat is computed one example at a time. Entries that are not trained stay as received. The module is
    left without a trace of hooks.

    What is not covered: an example's gradient is computed in the model's own type, together with its batch, and what
    it is rounded to may depend on the others there. On the layers measured, in float32, that is about 1e-6 of the bound
    for each example; where a model's gradient is a small difference of large terms there is no such figure. Nor is an
    exception of the task's own on an example (a class out of range): the caller records the release before it trains.

    Args:
        model: a model of the task; its state is overwritten.
        task: the learning problem.
        received: the server's parameters, shape (d,).
        examples: the client's training examples, at least one.
        training: local epochs or steps, batch size, learning rate, momentum.
        proximal_mu: weight of FedProx's ½μ‖θ − received‖², 0 for none.
        dp: what is done to every gradient.
        seeds: this client's in this round, for the comparison with autograd only.
        noise: this client's in this round: secret on a device.
        velocity: the momentum to begin with, shape (trained parameters,); ``None``: at rest.

    Raises:
        DataError: there are no examples.
        DependencyError: the mode needs Opacus.
        TaskError: the model has a layer that cannot be trained so, by name; or the loss is not one value an example.

    Reference: Abadi et al., arXiv:1607.00133, Algorithm 1.
    """
    if (size := len(examples)) == 0:
        raise DataError("there is no example to train on")
    rate, momentum, steps = sample_rate(size, training), training.momentum, local_steps(size, training)
    check_once(model, task, received, examples, dp.mode, seeds)
    length = model.spec.trainable_size
    trained = slice(0, length)
    losses, seen = 0.0, 0
    with computing(_secret(noise)):
        model.load(received)
        model.module.train()
        anchor = model.flat[trained].clone()
        pace = momentum_before(velocity, model.flat[trained]) if momentum else None
        with summing(model, task, dp.mode) as clipped_sum:
            for number in range(steps):
                total = torch.zeros(length, dtype=torch.float64)
                for rows in _portions(torch.from_numpy(poisson_rows(noise, number, rate, size)), length):
                    part, values = clipped_sum(*pick(examples, rows), dp.bound_l2)
                    total += part
                    losses += float(values.nan_to_num().sum())
                    seen += len(rows)
                noised = noised_step(total.numpy(), dp, noise, number) / expected_batch(size, training)
                step = torch.from_numpy(noised).to(model.flat.dtype)
                with torch.no_grad():
                    if proximal_mu:
                        step += proximal_mu * (model.flat[trained] - anchor)
                    if pace is not None:
                        step = pace.mul_(momentum).add_(step)
                    model.flat[trained].add_(step, alpha=-training.learning_rate)
                model.push()
        vector = model.vector() - received
    vector[length:] = 0.0  # what is not trained has no noise on it, so it does not leave
    result = Trained(update=Update(vector), num_examples=size, mean_loss=losses / max(seen, 1), steps=steps)
    return PrivateTraining(trained=result, velocity=None if pace is None else pace.numpy().copy())


def noised_step(total: NDArray[np.float64], dp: DpSgd, noise: Noise, number: int) -> NDArray[np.float64]:
    """Return step ``number``'s sum of clipped gradients with its noise, on the noise's grid; shape (trained,)."""
    drawn = noise.gaussian(dp.stddev, len(total), "dp-sgd", number)
    drawn += total
    return to_grid(drawn, power_of_two(dp.stddev * _GRID))


def expected_batch(size: int, training: TrainingConfig) -> int:
    """Return q·n, which is a whole number."""
    return min(training.batch_size or size, size)


def _secret(noise: Noise) -> SeedTree:
    """Return seeds for what the model draws itself; nobody else knows them where the noise is secret."""
    return SeedTree(noise.stream("torch").words(4).tobytes())


def poisson_rows(noise: Noise, number: int, rate: float, size: int) -> NDArray[np.int64]:
    """Return the rows of one batch, each in it with probability ``rate``."""
    return np.flatnonzero(bernoulli(noise.stream("batch", number), rate, size)).astype(np.int64)


def momentum_before(velocity: NDArray[np.floating[Any]] | None, like: Tensor) -> Tensor:
    """Return the momentum to begin with, as a tensor of its own."""
    if velocity is None:
        return torch.zeros_like(like)
    if velocity.shape != tuple(like.shape):
        raise ValueError(f"the velocity has shape {velocity.shape}, not {tuple(like.shape)}")
    return torch.from_numpy(velocity.astype(like.numpy().dtype))


def _portions(rows: Tensor, length: int) -> Iterator[Tensor]:
    """Yield a batch in parts whose gradients fit into memory together; an empty batch has none."""
    most = max(1, _MOST_NUMBERS // length)
    for start in range(0, len(rows), most):
        yield rows[start : start + most]
