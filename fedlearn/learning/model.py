"""A torch module whose floating state lives in one flat tensor."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fedlearn.arrays import ParamEntry, ParamSpec, Vector
from fedlearn.errors import TaskError
from fedlearn.learning.task import Task, task_code
from fedlearn.sources import SeedTree

__all__ = ["FlatModel", "build_flat_model", "computing"]

_NAMES = {torch.float64: "float64", torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


@contextmanager
def computing(seeds: SeedTree) -> Iterator[None]:
    """Compute reproducibly: the global generators of torch, NumPy and Python seeded and restored, on one thread.

    A user's task may draw from any of them; what it draws is then a function of ``seeds`` alone.

    One thread, because a sum over more has another rounding on another machine, and because workers
    that each start many threads trample on each other.
    """
    # Not torch.manual_seed: without a GPU in use it keeps a traceback of every call for later, for ever.
    generator, threads = torch.default_generator, torch.get_num_threads()
    before, of_numpy, of_python = generator.get_state(), np.random.get_state(), random.getstate()
    seed = seeds.integer()
    generator.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        generator.set_state(before)
        np.random.set_state(of_numpy)
        random.setstate(of_python)


class FlatModel:
    """A module, its ``ParamSpec``, and its state and gradient as flat tensors of shape (d,).

    Parameters and buffers of the vector's own type are *views* into ``flat``, so that a descent step is one
    addition; entries of another type are copied back and forth. What is not federated (integers,
    non-persistent buffers) is put back to its first value by ``load``, so that a resident model carries
    nothing from one client to the next.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        _check_parameters(module)
        federated = _federated_state(module)
        if not any(tensor.requires_grad for tensor in federated.values()):
            raise TaskError("the model has no trainable parameter")
        self.spec = ParamSpec(tuple(_entry(name, tensor) for name, tensor in federated.items()))
        dtype = torch.float64 if self.spec.dtype == np.float64 else torch.float32
        self.flat = torch.empty(self.spec.size, dtype=dtype)
        self.gradient = torch.zeros(self.spec.size, dtype=dtype)
        self._tensors = {entry.name: federated[entry.name] for entry in self.spec.entries}
        self._strays: list[tuple[Tensor, Tensor, Tensor]] = []
        for name, tensor in self._tensors.items():
            self._bind(tensor, self.spec.slices[name])
        self._buffers = [(owner, dict(owner._buffers)) for owner in module.modules()]
        kept = {id(tensor) for tensor in self._tensors.values()}
        self._unfederated = [(t, t.detach().clone()) for t in _all_state(module) if id(t) not in kept]

    def _bind(self, tensor: Tensor, place: slice) -> None:
        """Make ``tensor`` a view of the flat state, or note it as a stray where its type is another."""
        view, gradient = (flat[place].view(tensor.shape) for flat in (self.flat, self.gradient))
        view.copy_(tensor.detach())
        if tensor.dtype == self.flat.dtype:
            tensor.data = view
            if tensor.requires_grad:
                tensor.grad = gradient
        else:
            self._strays.append((tensor, view, gradient))

    def load(self, vector: Vector) -> None:
        """Set the model to ``vector``, shape (d,), and everything unfederated to its first value.

        Raises:
            ValueError: ``vector`` has another shape.
        """
        if vector.shape != (self.spec.size,):
            raise ValueError(f"the vector has shape {vector.shape}, not ({self.spec.size},)")
        for owner, buffers in self._buffers:
            # Some modules assign their buffers anew instead of writing into them; put back those that are bound here.
            owner._buffers.clear()
            owner._buffers.update(buffers)
        self.flat.numpy()[:] = vector  # shares memory; torch would warn of a read-only source
        for tensor, view, _ in self._strays:
            tensor.data.copy_(view)
        for tensor, first in self._unfederated:
            tensor.data.copy_(first)

    def push(self) -> None:
        """Copy the flat state to the trained entries that are not views of it (a buffer is its module's to change)."""
        for tensor, view, _ in self._strays:
            if tensor.requires_grad:
                tensor.data.copy_(view)

    def zero_gradient(self) -> None:
        """Forget the gradient."""
        self.gradient.zero_()
        for tensor, _, _ in self._strays:
            tensor.grad = None

    def collect_gradient(self) -> Tensor:
        """Return the gradient of the last backward pass, shape (d,); zero where nothing is trained."""
        for tensor, _, gradient in self._strays:
            if tensor.grad is not None:
                gradient.copy_(tensor.grad)
        return self.gradient

    def vector(self) -> NDArray[np.floating]:
        """Return a copy of the model's present state, shape (d,).

        An entry of a narrower type than the vector's keeps the digits that it cannot hold itself.

        Raises:
            TaskError: the module gave a buffer another shape.
        """
        state = _federated_state(self.module)
        for name, bound in self._tensors.items():
            current = state.get(name, bound).detach()
            if current.shape != bound.shape:
                shapes = f"{tuple(bound.shape)} to {tuple(current.shape)}"
                raise TaskError(f"the model changed the shape of {name} from {shapes}; a federated entry keeps its own")
            if current.data_ptr() != bound.data_ptr() or current.dtype != self.flat.dtype:
                place = self.flat[self.spec.slices[name]].view(current.shape)
                same = current == place.to(current.dtype)
                place.copy_(torch.where(same, place, current.to(place.dtype)))
        return self.flat.numpy().copy()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the module's whole state, every tensor a copy of its own (tied ones twice)."""
        return {name: tensor.detach().clone().contiguous() for name, tensor in self.module.state_dict().items()}


def build_flat_model(task: Task, seeds: SeedTree) -> FlatModel:
    """Build the task's model under ``seeds``: the same seed gives the same parameters.

    Raises:
        TaskError: ``build_model`` returns something else than a module on the CPU.
    """
    with task_code(task, "build_model"), computing(seeds):
        module = task.build_model()
    if not isinstance(module, nn.Module):
        raise TaskError(f"{type(task).__name__}.build_model returned {type(module).__name__}, not torch.nn.Module")
    if any(tensor.device.type != "cpu" for tensor in _all_state(module)):
        raise TaskError(f"{type(task).__name__}.build_model must leave the model on the CPU")
    return FlatModel(module)


def _check_parameters(module: nn.Module) -> None:
    """Raise unless every parameter has a shape, and every trained one a type that can be federated."""
    for name, parameter in module.named_parameters():
        if is_lazy(parameter):
            raise TaskError(f"parameter {name} has no shape yet; give the lazy layer its input size")
        if parameter.requires_grad and parameter.dtype not in _NAMES:
            kind = str(parameter.dtype).removeprefix("torch.")
            raise TaskError(f"parameter {name} is {kind}; what is trained must be one of {', '.join(_NAMES.values())}")


def _entry(name: str, tensor: Tensor) -> ParamEntry:
    """Describe one tensor of a model."""
    shape = tuple(tensor.shape)
    return ParamEntry(name=name, shape=shape, dtype=_NAMES[tensor.dtype], trainable=tensor.requires_grad)


def _federated_state(module: nn.Module) -> dict[str, Tensor]:
    """Return the floating parameters and persistent buffers by name, tied ones once."""
    persistent = set(module.state_dict(keep_vars=True))
    state: dict[str, Tensor] = dict(module.named_parameters())
    state.update((name, buffer) for name, buffer in module.named_buffers() if name in persistent)
    return {name: tensor for name, tensor in state.items() if tensor.dtype in _NAMES}


def _all_state(module: nn.Module) -> list[Tensor]:
    """Return every parameter and buffer, persistent or not."""
    return [*module.parameters(), *module.buffers()]
