"""Many clients at once by ``torch.func``: for nearly any model, with every client's parameters and gradients formed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fedlearn.arrays import Vector
from fedlearn.learning.example_gradients import clip_factors
from fedlearn.learning.gradient_shares import Rows
from fedlearn.learning.kernels import CACHE_NUMBERS, Descent, Kernel, Stack, UnsuitableError
from fedlearn.learning.model import FlatModel
from fedlearn.learning.schedule import Batch
from fedlearn.learning.task import Examples, Task
from fedlearn.learning.trainer import losses_of

__all__ = ["VmapKernel", "quietly"]

_MOST_NUMBERS = 2**25  # gradients of examples held at a time, in numbers: 128 MiB

_LEAST_TOGETHER = 24

_MIXING = (nn.modules.batchnorm._BatchNorm,)
_RECURRENT = (nn.RNNBase, nn.RNNCellBase)
_RANDOM = (nn.modules.dropout._DropoutNd, nn.RReLU)


class VmapKernel(Kernel):
    """``vmap(grad(loss))`` over clients: parameters and gradients of all of them are rows of a matrix."""

    def __init__(self, model: FlatModel, task: Task, received: Vector, count: int, descent: Descent) -> None:
        super().__init__(model, task, received, count)
        self._stack = Stack(self.received, count, descent)
        spec = model.spec
        self._entries = {each.name: each for each in spec.entries if each.trainable}
        self._views = {name: self._stack.view(spec.slices[name], each.shape) for name, each in self._entries.items()}
        self._gradients = torch.func.vmap(torch.func.grad_and_value(self._loss, has_aux=True))
        self._of_examples = torch.func.vmap(
            torch.func.vmap(torch.func.grad_and_value(self._loss_of_one), in_dims=(None, 0, 0))
        )

    @staticmethod
    def check(model: FlatModel) -> None:
        """Raise where a layer is known not to go."""
        _check_layers(model.module)

    @staticmethod
    def slower_because(model: FlatModel, examples: Examples, together: int) -> str:
        """Return that each step costs milliseconds, which enough small models have to share."""
        del examples
        together = min(together, CACHE_NUMBERS // model.spec.size)
        if together >= _LEAST_TOGETHER:
            return ""
        return f"torch.func gains nothing on so few clients of such a size at a time ({max(1, together)})"

    def _loss(
        self, parameters: Mapping[str, Tensor], inputs: Tensor, targets: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return one client's mean loss over a batch, and the losses."""
        output = torch.func.functional_call(self.model.module, dict(parameters), (inputs,))
        losses = losses_of(self.task, output, targets)
        return (losses * weights).sum(), losses

    def _loss_of_one(self, parameters: Mapping[str, Tensor], example: Tensor, target: Tensor) -> Tensor:
        """Return the loss of one example."""
        output = torch.func.functional_call(self.model.module, dict(parameters), (example.unsqueeze(0),))
        return losses_of(self.task, output, target.unsqueeze(0))[0]

    def step(self, inputs: Tensor, targets: Tensor, batch: Batch) -> Tensor:
        """Take one step of plain descent."""
        active = batch.active
        own = {name: view[:active] for name, view in self._views.items()}
        with quietly():
            gradients, (_, losses) = self._gradients(own, inputs, targets, batch.mean_weights(self.received.dtype))
        for name, gradient in gradients.items():
            self._stack.move(active, gradient.reshape(active, -1), self.model.spec.slices[name])
        return losses.detach()  # type: ignore[no-any-return]

    def clipped_sums(self, inputs: Tensor, targets: Tensor, batch: Batch, bound_l2: float) -> tuple[Tensor, Tensor]:
        """Return sums of clipped gradients, some clients at a time where the gradients of all do not fit."""
        total = torch.zeros(batch.active, self.trained, dtype=torch.float64)
        if not batch.rows.shape[1]:
            return total, torch.zeros(batch.rows.shape, dtype=self.received.dtype)
        losses = torch.zeros(batch.rows.shape, dtype=self.received.dtype)
        together = max(1, _MOST_NUMBERS // max(1, batch.rows.shape[1] * self.trained))
        for start in range(0, batch.active, together):
            part = slice(start, min(start + together, batch.active))
            own = {name: view[part] for name, view in self._views.items()}
            with quietly():
                gradients, losses[part] = self._of_examples(own, inputs[part], targets[part])
            valid = batch.valid[part]
            rows = {name: each.reshape(*valid.shape, -1) for name, each in gradients.items()}
            squares = sum(each.double().square().sum(dim=2) for each in rows.values())
            factors = torch.where(valid, clip_factors(torch.as_tensor(squares).sqrt(), bound_l2), 0.0)
            for name, each in rows.items():
                safe = each.double().masked_fill((factors == 0)[..., None], 0.0)
                total[part, self.model.spec.slices[name]] = torch.einsum("kb,kbd->kd", factors, safe)
        return total, losses.detach()

    def finite(self) -> Tensor:
        """Return whether each update is finite."""
        return self._stack.updates().isfinite().all(dim=1)

    def norms(self) -> Tensor:
        """Return each update's norm."""
        return Rows(self._stack.updates()).norms()

    def weighted(self, factors: Tensor, total: Tensor) -> None:
        """Add the weighted sum of the updates."""
        updates = self._stack.updates().masked_fill((factors == 0)[:, None], 0.0)
        total += factors.to(total.dtype) @ updates.to(total.dtype)


def _check_layers(module: nn.Module) -> None:
    """Raise ``UnsuitableError`` for layers whose behaviour is known, in words a person can use."""
    for name, layer in module.named_modules():
        said = f"layer {name!r} ({type(layer).__name__})" if name else f"the model ({type(layer).__name__})"
        if isinstance(layer, _MIXING):
            raise UnsuitableError(f"{said} mixes the examples of a batch and keeps running means")
        if isinstance(layer, _RECURRENT):
            raise UnsuitableError(f"{said} is recurrent, which torch.func cannot take apart by client")
        if isinstance(layer, _RANDOM) and _is_at_random(layer):
            raise UnsuitableError(f"{said} draws at random, each client from a stream of its own")


def _is_at_random(layer: Any) -> bool:
    """Return whether a random layer really is: dropout of 0 is none."""
    return getattr(layer, "p", 1.0) > 0


@contextmanager
def quietly() -> Iterator[None]:
    """Keep torch from warning that an operation has no fast rule in vmap; slow, it is right all the same."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop because we have not yet implemented")
        yield
