"""Many clients at once where all that is trained lies in linear layers and convolutions: each layer computes for all.

Forward and backward are those of the user's own module: only the layers compute otherwise, each client's rows with that
client's own weights. So anything may stand between them that treats each example by itself. A convolution is a linear
layer on the patches of an image.

What a layer does with the rows of all clients is in ``layers.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fedlearn.arrays import Vector
from fedlearn.learning.example_gradients import LONGEST, clip_factors
from fedlearn.learning.kernels import Descent, Kernel, UnsuitableError
from fedlearn.learning.layers import Factored, Formed, Forward, Layer, is_cheaper_formed, places_of, stack_of
from fedlearn.learning.model import FlatModel
from fedlearn.learning.schedule import Batch, Schedule
from fedlearn.learning.task import Examples, Task
from fedlearn.learning.trainer import losses_of

__all__ = ["StackedKernel"]

_MOST_PATCHES = 1 << 14
"""How many numbers the patches of an example may be, over all convolutions, before a cache holds them no longer."""


class StackedKernel(Kernel):
    """The clients' layers in the user's own module.

    Args:
        schedule: the batches that the clients will take.
        private: whether steps are given from outside (``move``), as noised gradients are: they have full rank.
    """

    def __init__(
        self,
        model: FlatModel,
        task: Task,
        received: Vector,
        schedule: Schedule,
        descent: Descent,
        *,
        private: bool = False,
    ) -> None:
        super().__init__(model, task, received, len(schedule.order))
        places = places_of(model)
        formed = [private or is_cheaper_formed(place, schedule) for place in places]
        whole = [place for place, is_formed in zip(places, formed, strict=True) if is_formed]
        self._stack = stack_of(whole, self.received, self.count, descent)
        self._layers: list[Layer] = [Formed(place, self._stack, whole, keeps=private) for place in whole]
        self._layers += [
            Factored(place, self.received, schedule, descent)
            for place, is_formed in zip(places, formed, strict=True)
            if not is_formed
        ]
        self._anchor = torch.zeros((), dtype=self.received.dtype, requires_grad=True)

    @staticmethod
    def check(model: FlatModel) -> None:
        """Raise unless everything that is trained is the weight or bias of a layer that is known here."""
        covered = sum(part.stop - part.start for place in places_of(model) for part in place.parts)
        if covered != model.spec.trainable_size:
            raise UnsuitableError("not everything that is trained lies in nn.Linear and nn.Conv2d, each used once")

    @staticmethod
    def slower_because(model: FlatModel, examples: Examples, together: int) -> str:
        """Return that the patches of large images are more numbers than a cache holds."""
        del together
        seen = 0

        def count(layer: nn.Conv2d, _: tuple[Tensor, ...], output: Tensor) -> None:
            nonlocal seen
            seen += output[0, 0].numel() * (layer.weight.numel() // layer.weight.shape[0])

        convolutions = [layer for layer in model.module.modules() if isinstance(layer, nn.Conv2d)]
        hooks = [layer.register_forward_hook(count) for layer in convolutions]
        try:
            with torch.no_grad():
                model.module(examples.inputs[:1].clone())
        finally:
            for hook in hooks:
                hook.remove()
        if seen <= _MOST_PATCHES:
            return ""
        return f"its convolutions see {seen:,} numbers an example, and are faster by themselves"

    def step(self, inputs: Tensor, targets: Tensor, batch: Batch) -> Tensor:
        """Take one step: the backward pass leaves each layer with what it needs, and moves what is formed."""
        losses = self._pass(inputs, targets, batch, batch.mean_weights(self.received.dtype))
        for layer in self._layers:
            layer.finish()
        return losses

    def clipped_sums(self, inputs: Tensor, targets: Tensor, batch: Batch, bound_l2: float) -> tuple[Tensor, Tensor]:
        """Return sums of clipped gradients: norms from the factors, then one product for each client and layer."""
        if not batch.rows.shape[1]:
            zeros = torch.zeros(batch.active, self.trained, dtype=torch.float64)
            return zeros, torch.zeros(batch.rows.shape, dtype=self.received.dtype)
        losses = self._pass(inputs, targets, batch, batch.valid.to(self.received.dtype))
        squares = torch.stack([layer.square_norms() for layer in self._layers]).sum(dim=0)
        factors = torch.where(batch.valid, clip_factors(squares.sqrt(), bound_l2), 0.0)
        total = torch.empty(batch.active, self.trained, dtype=torch.float64)
        for layer in self._layers:
            layer.sum_of_examples(factors, total)
        return total, losses

    def move(self, active: int, steps: Tensor) -> None:
        """Let clients take a step of these gradients."""
        if len(self._stack.received) != self.trained:
            raise TypeError("steps from outside need parameters that are formed")
        super().move(active, steps)

    def finite(self) -> Tensor:
        """Return whether a bound on each update's norm is within what float32 holds."""
        return torch.stack([layer.bounds() for layer in self._layers]).sum(dim=0) < LONGEST

    def norms(self) -> Tensor:
        """Return each update's norm, from the layers' squares."""
        return torch.stack([layer.update_squares() for layer in self._layers]).sum(dim=0).clamp(min=0.0).sqrt()

    def weighted(self, factors: Tensor, total: Tensor) -> None:
        """Add the weighted sum of the updates."""
        for layer in self._layers:
            layer.weighted(factors, total)

    def _pass(self, inputs: Tensor, targets: Tensor, batch: Batch, weights: Tensor) -> Tensor:
        """Go forward and backward through the module, once for all clients."""
        shape = batch.rows.shape
        with self._in_place(shape[0], shape[1]):
            output = self.model.module(inputs.flatten(0, 1))
            losses = losses_of(self.task, output, targets.flatten(0, 1))
            (losses * weights.flatten()).sum().backward()  # type: ignore[no-untyped-call]
        return losses.detach().view(shape)

    @contextmanager
    def _in_place(self, active: int, length: int) -> Iterator[None]:
        """Let the module's layers compute each client's own; afterwards they are what they were."""
        try:
            for each in self._layers:
                each.begin(active, length)
                each.place.layer.__dict__["forward"] = Forward(each, self._anchor)  # before the class's own
            yield
        finally:
            for each in self._layers:
                each.place.layer.__dict__.pop("forward", None)
