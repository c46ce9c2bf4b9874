"""Local training of many clients in one computation; each gets what the sequential trainer would have given it.

Two kernels compute a step of all clients: ``stacked`` where everything that is trained lies in linear layers and
convolutions, ``vmap`` (``torch.func.vmap``) for nearly any other model. Which one a run takes is decided once, before
its first round, by ``choose_trainer``: from the model's layers, and by training a few clients both ways and comparing.
What cannot be vectorised is trained one client after the other, and the run says why.

Tolerance: the same batches, the same noise and the same formulas, in another order of summation. An update differs from
the sequential trainer's by rounding alone: tested to be below 2e-5 of its length in float32 and 1e-12 in float64.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedlearn.arrays import Vector
from fedlearn.config import TrainingConfig
from fedlearn.learning.dpsgd import DpSgd, expected_batch, noised_step, sample_rate
from fedlearn.learning.kernels import CACHE_NUMBERS, Descent, Kernel, UnsuitableError
from fedlearn.learning.model import FlatModel, computing
from fedlearn.learning.schedule import Batch, Schedule, buckets
from fedlearn.learning.stacked import StackedKernel
from fedlearn.learning.task import Examples, Task
from fedlearn.learning.trainer import losses_of, train
from fedlearn.learning.vmapped import VmapKernel, quietly
from fedlearn.privacy.clipping import Update
from fedlearn.privacy.noise import Noise
from fedlearn.sources import SeedTree

__all__ = ["Choice", "GroupTrained", "Member", "Vectorised", "choose_trainer", "train_group"]

Vectorised = Literal["stacked", "vmap"]

_KERNELS: dict[Vectorised, type[Kernel]] = {"stacked": StackedKernel, "vmap": VmapKernel}
_MOST_TOGETHER = 64
_TORCH = Path(torch.__file__).parent
_TRIED_STEPS = 4
_LEAST_TRIED, _MOST_TRIED = 6, 64
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
"""Of an update's length, in the trial: five times what rounding was ever seen to be."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Member:
    """One client of a group.

    Attributes:
        examples: what it trains on, at least one.
        seeds: its own in this round.
        dp: what is done to every gradient, where its examples are hidden.
        noise: its own in this round, where ``dp`` is given.
        velocity: the momentum it begins with under ``dp``; ``None``: at rest.
    """

    examples: Examples
    seeds: SeedTree
    dp: DpSgd | None = None
    noise: Noise | None = None
    velocity: NDArray[np.floating[Any]] | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class GroupTrained:
    """What came of training a group; the updates themselves are formed only as sums.

    Attributes:
        mean_losses: of each member, shape (k,), as of ``Trained``.
        velocities: of each member after its last step, where it trains with ``dp`` and momentum.
    """

    mean_losses: NDArray[np.float64]
    velocities: Sequence[NDArray[np.floating[Any]] | None]
    parts: Sequence[tuple[Sequence[int], Kernel]]
    size: int
    dtype: torch.dtype

    def finite(self) -> NDArray[np.bool_]:
        """Return whether each member's update and loss are finite, shape (k,)."""
        finite: NDArray[np.bool_] = np.isfinite(self.mean_losses)
        for members, kernel in self.parts:
            finite[list(members)] &= kernel.finite().numpy()
        return finite

    def norms(self) -> NDArray[np.float64]:
        """Return the norm of each member's update, shape (k,); not finite where the update is not."""
        norms = np.empty(len(self.mean_losses))
        for members, kernel in self.parts:
            norms[list(members)] = kernel.norms().numpy()
        return norms

    def weighted(self, factors: NDArray[np.float64], *, exact: bool = False) -> NDArray[np.floating[Any]]:
        """Return Σ factorᵢ · updateᵢ, shape (d,); a member with factor 0 may have diverged.

        Args:
            factors: shape (k,).
            exact: compute in float64, so that each member's share has the norm that ``norms`` says, to 1e-12 of it;
                else in the model's own type.
        """
        total = torch.zeros(self.size, dtype=torch.float64 if exact else self.dtype)
        for members, kernel in self.parts:
            kernel.weighted(torch.from_numpy(factors[list(members)]), total[: kernel.trained])
        return total.numpy()


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How a run's clients are trained, and why not faster.

    Attributes:
        trainer: the kernel; ``None``: one client after the other.
        reason: why the model is not vectorised, in words; nothing where it is.
    """

    trainer: Vectorised | None
    reason: str = ""

    @property
    def name(self) -> str:
        """What it is called in a scenario and a summary."""
        return self.trainer or "sequential"


def train_group(
    trainer: Vectorised,
    model: FlatModel,
    task: Task,
    received: Vector,
    members: Sequence[Member],
    training: TrainingConfig,
    *,
    proximal_mu: float,
) -> GroupTrained:
    """Descend from ``received`` on the examples of each member, all of them at once.

    Guarantees: each member's update is that of ``train`` (with ``dp``: of ``train_private``) with the same arguments,
    to rounding; it does not depend on who else is in the group, to rounding. The result is a function of the arguments
    alone. No draw of the model's own goes into it: ``choose_trainer`` takes no model that draws.

    Args:
        trainer: which kernel.
        model: a model of the task; its state is overwritten.
        task: the learning problem.
        received: the server's parameters, shape (d,).
        members: the clients; with ``dp`` all of them or none.
        training: local epochs or steps, batch size, learning rate, momentum.
        proximal_mu: weight of FedProx's ½μ‖θ - received‖², 0 for none.

    Raises:
        UnsuitableError: a layer is used as this kernel cannot follow.
        TaskError: the task's loss is not one value an example.
    """
    descent, hidden = Descent.of(training, proximal_mu), members[0].dp is not None
    losses = np.zeros(len(members))
    parts: list[tuple[Sequence[int], Kernel]] = []
    velocities: list[NDArray[np.floating[Any]] | None] = [None] * len(members)
    most = max(1, min(_MOST_TOGETHER, CACHE_NUMBERS // model.spec.size))
    if trainer == "stacked" and not hidden:
        most = _MOST_TOGETHER
    with computing(SeedTree.root(0)):
        model.load(received)
        model.module.train()
        model.zero_gradient()
        for bucket in buckets([member.examples for member in members], most):
            own = [members[index] for index in bucket]
            schedule = _schedule(own, training)
            kernel = _kernel(trainer, model, task, received, schedule, descent, private=hidden)
            order = [bucket[place] for place in schedule.order]
            ordered = [members[index] for index in order]
            losses[order] = _descend(kernel, own, ordered, schedule, training)
            for place, index in enumerate(order):
                velocities[index] = kernel.velocity(place) if hidden else None
            parts.append((order, kernel))
    if bool(model.gradient.any()):
        raise UnsuitableError("the loss depends on a parameter by another way than its layer")
    return GroupTrained(
        mean_losses=losses,
        velocities=velocities,
        parts=parts,
        size=model.spec.size,
        dtype=model.flat.dtype,
    )


def _kernel(
    trainer: Vectorised,
    model: FlatModel,
    task: Task,
    received: Vector,
    schedule: Schedule,
    descent: Descent,
    *,
    private: bool,
) -> Kernel:
    """Return a kernel for one bucket of clients."""
    if trainer == "stacked":
        return StackedKernel(model, task, received, schedule, descent, private=private)
    return VmapKernel(model, task, received, len(schedule.order), descent)


def _schedule(members: Sequence[Member], training: TrainingConfig) -> Schedule:
    """Return the batches that the sequential trainer would take."""
    sizes = [len(member.examples) for member in members]
    noises = [member.noise for member in members if member.noise is not None]
    if noises:
        return Schedule.poisson(sizes, training, [sample_rate(size, training) for size in sizes], noises)
    return Schedule.shuffled(sizes, training, [member.seeds for member in members])


def _descend(
    kernel: Kernel, members: Sequence[Member], ordered: Sequence[Member], schedule: Schedule, training: TrainingConfig
) -> NDArray[np.float64]:
    """Take every step of the schedule; return each client's mean loss, in the schedule's order."""
    inputs = torch.cat([member.examples.inputs for member in members])
    targets = torch.cat([member.examples.targets for member in members])
    losses, seen = np.zeros(len(ordered)), np.zeros(len(ordered), dtype=np.int64)
    for place, member in enumerate(ordered):
        if member.velocity is not None:
            kernel.begin_with(place, member.velocity)
    for number, batch in enumerate(schedule.batches):
        values = _step(kernel, inputs[batch.rows], targets[batch.rows], batch, number, ordered, training)
        losses[: batch.active] += values.double().where(batch.valid, 0.0).sum(dim=1).numpy()
        seen[: batch.active] += batch.lengths
    return losses / np.maximum(seen, 1)


def _step(
    kernel: Kernel,
    inputs: Tensor,
    targets: Tensor,
    batch: Batch,
    number: int,
    ordered: Sequence[Member],
    training: TrainingConfig,
) -> Tensor:
    """Take one step, with noise on clipped gradients where examples are hidden; return the losses."""
    first = ordered[0].dp
    if first is None:
        return kernel.step(inputs, targets, batch)
    sums, losses = kernel.clipped_sums(inputs, targets, batch, first.bound_l2)
    steps = torch.empty(sums.shape, dtype=kernel.received.dtype)
    for place, member in enumerate(ordered[: batch.active]):
        if member.dp is None or member.noise is None:
            raise ValueError("of a group either all members hide their examples, or none")
        noised = noised_step(sums[place].numpy(), member.dp, member.noise, number)
        steps[place] = torch.from_numpy(noised / expected_batch(len(member.examples), training))
    kernel.move(batch.active, steps)
    return losses.nan_to_num()


# -- which trainer -------------------------------------------------------------------------------------------------


def choose_trainer(
    model: FlatModel,
    task: Task,
    clients: Sequence[Examples],
    training: TrainingConfig,
    *,
    proximal_mu: float,
    seeds: SeedTree,
    allowed: Sequence[Vectorised] = ("stacked", "vmap"),
    together: int | None = None,
) -> Choice:
    """Return the first trainer of ``allowed`` that the model can take, else the reason why none can.

    A kernel is taken if it knows the model's layers, if nothing in the model draws at random or carries something from
    one batch to the next, and if a few steps on the examples of ``clients``, from parameters that are moved at random
    (a last layer of zeros would hide the others), end where the sequential trainer ends.

    Guarantees: a function of the arguments; the same in every process of a run.

    Args:
        model: a model of the task; its state is overwritten.
        task: the learning problem.
        clients: the examples of a few clients.
        training: as the run trains.
        proximal_mu: as the run trains.
        seeds: for what the trial draws.
        allowed: kernels, in the order of preference.
        together: how many clients are trained at once: then a kernel has to be faster, too; ``None``: it need not be.
    """
    alike = [each for each in clients if each.inputs.shape[1:] == clients[0].inputs.shape[1:]]
    if sum(map(len, alike)) < _LEAST_TRIED:
        return Choice(trainer=None, reason="the first clients have too few examples to try it on")
    reasons, tried = list[str](), _trial(alike)
    try:
        _check_plain(model, task, tried[0], seeds)
    except Exception as error:
        return Choice(trainer=None, reason=_said(error))
    for trainer in allowed:
        try:
            _KERNELS[trainer].check(model)
            if together is not None and (slower := _KERNELS[trainer].slower_because(model, tried[0], together)):
                raise UnsuitableError(slower)
            _try(trainer, model, task, tried, training, proximal_mu=proximal_mu, seeds=seeds)
        except Exception as error:
            reasons.append(_said(error))
        else:
            return Choice(trainer=trainer)
    return Choice(trainer=None, reason="; ".join(dict.fromkeys(reasons)))


def _trial(clients: Sequence[Examples]) -> list[Examples]:
    """Return three clients of different sizes, made of the examples of those given: their batches differ in length.

    A model whose examples see each other gives itself away only where a batch is padded.
    """
    inputs = torch.cat([each.inputs for each in clients])[:_MOST_TRIED]
    targets = torch.cat([each.targets for each in clients])[:_MOST_TRIED]
    size = len(inputs)
    return [Examples(inputs[:part], targets[:part]) for part in (size, size - 1, size // 2)]


def _said(error: Exception) -> str:
    """Return an exception in one line; of a task's own, which may tell of its data, the type alone."""
    if isinstance(error, UnsuitableError):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    if frames and _TORCH in Path(frames[-1].filename).parents and str(error).strip():
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return f"the task raised {type(error).__name__} when a few clients were trained on trial"


def _check_plain(model: FlatModel, task: Task, examples: Examples, seeds: SeedTree) -> None:
    """Raise unless a loss in training is a function of one example and the parameters alone, all of them in view."""
    VmapKernel.check(model)
    narrow = [each.name for each in model.spec.entries if each.dtype != str(model.spec.dtype)]
    if narrow:
        raise UnsuitableError(f"{narrow[0]} is of a narrower type than the model's vector")
    hooked = [name for name, each in model.module.named_parameters() if _has_hooks(each)]
    if hooked:
        raise UnsuitableError(f"{hooked[0]} has a hook of its own on its gradient")
    state = [each.clone() for each in (*model.module.parameters(), *model.module.buffers())]
    outputs = []
    model.module.train()
    inputs, targets = examples.inputs[:4], examples.targets[:4]
    for number in range(2):
        with computing(seeds.child("forward", number)), torch.no_grad():
            outputs.append(model.module(inputs.clone()))
    if not isinstance(outputs[0], Tensor):
        raise UnsuitableError(f"the model's output is a {type(outputs[0]).__name__} and not one tensor")
    if not torch.equal(outputs[0], outputs[1]):
        raise UnsuitableError("the model draws at random while it trains, each client from a stream of its own")
    after = (*model.module.parameters(), *model.module.buffers())
    if not all(torch.equal(one, two) for one, two in zip(state, after, strict=True)):
        raise UnsuitableError("the model changes its buffers or weights while it computes")
    _check_in_view(model, task, inputs, targets)


@contextmanager
def _in_words() -> Iterator[None]:
    """Say what torch.func means."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("vmap:"):
            raise
        reason = "its code looks at numbers (.item(), a branch on them), which differ from client to client"
        raise UnsuitableError(reason) from error


def _has_hooks(parameter: nn.Parameter) -> bool:
    """Return whether somebody changes or watches a parameter's gradient."""
    return bool(parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None))


def _check_in_view(model: FlatModel, task: Task, inputs: Tensor, targets: Tensor) -> None:
    """Raise where a gradient reaches a parameter unseen, or an example's way depends on its numbers or on others."""
    fixed = {name: each.detach().clone() for name, each in model.module.named_parameters()}

    def output_of(example: Tensor) -> Tensor:
        found: Tensor = torch.func.functional_call(model.module, fixed, (example,))
        return found

    with quietly(), _in_words():
        if losses_of(task, output_of(inputs.clone()), targets).requires_grad:
            raise UnsuitableError("the loss depends on the model's parameters by another way than its output")
        with torch.no_grad():
            # Raises where the code branches on numbers, also on those that would take the same branch here.
            each = torch.func.vmap(lambda example: output_of(example.unsqueeze(0))[0])(inputs.clone())
            whole = output_of(inputs.clone())
    if not torch.allclose(each, whole, rtol=1e-3, atol=1e-5):
        raise UnsuitableError("the model's output for an example depends on the others in its batch")


def _try(
    trainer: Vectorised,
    model: FlatModel,
    task: Task,
    clients: Sequence[Examples],
    training: TrainingConfig,
    *,
    proximal_mu: float,
    seeds: SeedTree,
) -> None:
    """Raise unless a few steps of a few clients end where the sequential trainer ends."""
    batch = -(-len(clients[0]) // 3)  # so that within the steps tried a pass ends, with a batch that is padded
    short = replace(training, local_epochs=None, local_steps=_TRIED_STEPS, batch_size=batch)
    with computing(seeds.child("moved")):
        trained = model.flat[: model.spec.trainable_size]
        trained.mul_(1 + 0.1 * torch.randn(trained.shape)).add_(0.05 * torch.randn(trained.shape))
        received = model.vector()
    members = [
        Member(examples=examples, seeds=seeds.child("client", number)) for number, examples in enumerate(clients)
    ]
    updates = [  # before the group's: whatever that might leave behind, this is the reference
        train(model, task, received, member.examples, short, proximal_mu=proximal_mu, seeds=member.seeds).update
        for member in members
    ]
    group = train_group(trainer, model, task, received, members, short, proximal_mu=proximal_mu)
    for place, alone in enumerate(updates):
        own = group.weighted(np.eye(len(members))[place])
        gap, length = Update(own - alone.vector.astype(np.float64)).norm, alone.norm
        if not gap <= _TOLERANCE[model.flat.dtype] * length + np.finfo(model.spec.dtype).eps * np.sqrt(len(own)):
            apart = gap / max(length, 1e-30)
            raise UnsuitableError(
                f"trained many at a time, a client's update would differ by {apart:.1g} of its length"
            )
