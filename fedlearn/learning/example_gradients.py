"""The sum of every example's clipped gradient, in one of three modes, all of them held against autograd.

* ``hooks``: Opacus' rules for each kind of layer;
* ``ghost``: Opacus' norms without gradients where they are exact (a linear layer on one vector an example, an
  embedding), else as ``hooks``; the clipped sum is a second backward pass;
* ``functorch``: ``torch.func`` on the whole model, each example a batch of its own. It takes most models, and examples
  cannot mix in it. (Opacus' own functorch works layer by layer: it overlooks keyword arguments, batches that are folded
  with time, and parameters that are used outside their layer.)

Before a model is trained for the first time, sums over a few examples are compared with autograd's, one example at a
time; what differs is refused, with the layer's name. ``hooks`` compares in every batch too: there its gradients have to
add up to the batch's own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fedlearn.arrays import Vector
from fedlearn.config import GradSampleMode
from fedlearn.errors import FedlearnError, TaskError
from fedlearn.learning.model import FlatModel, computing
from fedlearn.learning.opacus_import import importing_opacus
from fedlearn.learning.task import Examples, Task
from fedlearn.learning.trainer import losses_of, pick
from fedlearn.learning.validators import check_private
from fedlearn.sources import SeedTree

__all__ = ["ClippedSum", "check_once", "summing"]

_LONGEST = 1e30  # a gradient longer than this counts as not finite: float32 cannot scale it down any more
_MARGIN = 1 - 2.0**-13  # clip to a little less, for what float32 rounds up in norms, products and sums

ClippedSum: TypeAlias = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]
"""(inputs, targets, bound) → (the sum of clipped gradients, shape (trained,), float64; the losses, shape (b,))."""


@contextmanager
def summing(model: FlatModel, task: Task, mode: GradSampleMode) -> Iterator[ClippedSum]:
    """Give the function that clips and sums; afterwards the module is as it was."""
    wrapper = None if mode == "functorch" else _wrapped(model.module, mode)
    try:
        with warnings.catch_warnings():  # that the first layer's input is data; that an operation is slow in vmap
            warnings.filterwarnings("ignore", "Full backward hook is firing when gradients are computed")
            warnings.filterwarnings("ignore", "There is a performance drop because we have not yet implemented")
            if wrapper is None:
                yield _by_functorch(model, task)
            else:
                yield _by_hooks(model, task, wrapper) if mode == "hooks" else _by_ghost(model, task, wrapper)
    finally:
        if wrapper is not None:
            wrapper.cleanup()
        for layer in model.module.modules():  # what Opacus leaves behind when a pass is broken off
            for name in ("activations", "max_batch_len"):
                layer.__dict__.pop(name, None)


def _by_functorch(model: FlatModel, task: Task) -> ClippedSum:
    """Return the clipped sum by ``torch.func``: each example is a batch of its own."""

    def loss(parameters: dict[str, Tensor], example: Tensor, target: Tensor) -> Tensor:
        output = torch.func.functional_call(model.module, parameters, (example.unsqueeze(0),))
        return losses_of(task, output, target.unsqueeze(0))[0]

    per_example = torch.func.vmap(torch.func.grad_and_value(loss), in_dims=(None, 0, 0), randomness="different")

    def clipped_sum(inputs: Tensor, targets: Tensor, bound: float) -> tuple[Tensor, Tensor]:
        parameters = {name: each.detach() for name, each in _trained(model).items()}
        gradients, losses = per_example(parameters, inputs, targets)
        norms = _norms(gradients)
        return _weighted(model, gradients, _factors(norms, bound)), losses.detach()

    return clipped_sum


def _by_hooks(model: FlatModel, task: Task, wrapper: Any) -> ClippedSum:
    """Return the clipped sum by Opacus' hooks, each batch's plain sum held against autograd's."""

    def clipped_sum(inputs: Tensor, targets: Tensor, bound: float) -> tuple[Tensor, Tensor]:
        model.zero_gradient()
        wrapper.set_grad_sample_to_none()
        losses = losses_of(task, model.module(inputs), targets)
        losses.sum().backward()  # type: ignore[no-untyped-call]
        gradients = {}
        for name, each in _trained(model).items():
            found = _own(each, "grad_sample", name, model)
            if found is not None:
                gradients[name] = _of_batch(found, (len(targets), *each.shape), name, model)
        norms = _norms(gradients) if gradients else torch.zeros(len(targets), dtype=torch.float64)
        if bool((norms < _LONGEST).all()):
            _compare_sums(model, gradients)
        result = _weighted(model, gradients, _factors(norms, bound))
        wrapper.set_grad_sample_to_none()
        return result, losses.detach()

    return clipped_sum


def _by_ghost(model: FlatModel, task: Task, wrapper: Any) -> ClippedSum:
    """Return the clipped sum by norms first, and then the gradient of the weighted losses."""

    def clipped_sum(inputs: Tensor, targets: Tensor, bound: float) -> tuple[Tensor, Tensor]:
        model.zero_gradient()
        losses = losses_of(task, model.module(inputs), targets)
        losses.sum().backward(retain_graph=True)  # type: ignore[no-untyped-call]
        squares = torch.zeros(len(targets), dtype=torch.float64)
        for name, each in _trained(model).items():
            found = _own(each, "_norm_sample", name, model)
            if found is not None:
                squares += _of_batch(found, (len(targets),), name, model).double().square()
                del each._norm_sample  # type: ignore[attr-defined]
        norms = squares.sqrt()
        kept = norms < _LONGEST
        if not bool(kept.all()):  # no weight makes zero of what is not finite: leave those examples out
            if not bool(kept.any()):
                return torch.zeros(model.spec.trainable_size, dtype=torch.float64), losses.detach()
            return clipped_sum(inputs[kept], targets[kept], bound)
        model.zero_gradient()
        wrapper.disable_hooks()
        try:
            (losses * _factors(norms, bound).to(losses.dtype)).sum().backward()  # type: ignore[no-untyped-call]
        finally:
            wrapper.enable_hooks()
        return model.collect_gradient()[: model.spec.trainable_size].double(), losses.detach()

    return clipped_sum


def _norms(gradients: Mapping[str, Tensor]) -> Tensor:
    """Return each example's norm over all parameters together, shape (b,), float64."""
    rows = (each.reshape(len(each), -1) for each in gradients.values())
    each = [torch.linalg.vector_norm(row, dim=1, dtype=torch.float64) for row in rows]
    norms: Tensor = torch.linalg.vector_norm(torch.stack(each), dim=0)
    return norms


def _factors(norms: Tensor, bound: float) -> Tensor:
    """Return what brings each gradient within the bound: at most 1, and 0 for one that is not finite."""
    factors = (bound * _MARGIN / norms).clamp(max=1.0)
    return torch.where(norms < _LONGEST, factors, 0.0)


def _weighted(model: FlatModel, gradients: Mapping[str, Tensor], factors: Tensor) -> Tensor:
    """Return Σ factorᵢ · gradientᵢ, shape (trained,), float64."""
    total = torch.zeros(model.spec.trainable_size, dtype=torch.float64)
    lost = factors == 0
    for name, each in gradients.items():
        rows = each.reshape(len(each), -1)
        if bool(lost.any()):
            rows = rows.masked_fill(lost[:, None], 0.0)
        total[model.spec.slices[name]] = (factors.to(rows.dtype) @ rows).double()
    return total


def _trained(model: FlatModel) -> dict[str, nn.Parameter]:
    """Return the trained parameters by name, tied ones once."""
    return {name: each for name, each in model.module.named_parameters() if each.requires_grad}


def _own(parameter: nn.Parameter, attribute: str, name: str, model: FlatModel) -> Tensor | None:
    """Return what Opacus found for a parameter; ``None`` where the batch really has no gradient for it."""
    found: Tensor | None = getattr(parameter, attribute, None)
    if found is None and parameter.grad is not None and bool(parameter.grad.any()):
        raise _wrong(model, [name], "is used outside its own layer's forward")
    return found


def _of_batch(found: object, shape: tuple[int, ...], name: str, model: FlatModel) -> Tensor:
    """Return ``found`` if it is one gradient, or norm, for each example."""
    if not isinstance(found, Tensor) or found.shape != shape:
        raise _wrong(model, [name], "has no gradient for each example: the layer's first dimension is not the batch")
    return found.detach()


def _compare_sums(model: FlatModel, gradients: Mapping[str, Tensor]) -> None:
    """Raise unless the gradients of a batch add up to autograd's; what only some batches show is found here."""
    rows = {name: each.reshape(len(each), -1) for name, each in gradients.items()}
    lengths = {name: float(each.norm(dim=1).sum()) for name, each in rows.items()}
    rounding = 1e-4 * sum(lengths.values())  # of a parameter whose gradient is zero but for it
    for name, parameter in _trained(model).items():
        if name in rows and parameter.grad is not None:
            gap = float((rows[name].sum(dim=0) - parameter.grad.reshape(-1)).norm())
            if not gap <= 0.05 * lengths[name] + rounding:
                raise _wrong(model, [name], "has gradients of examples that do not add up to the batch's")


# -- the modes, held against autograd ------------------------------------------------------------------------------

_compared: WeakKeyDictionary[FlatModel, set[tuple[Any, ...]]] = WeakKeyDictionary()


def check_once(
    model: FlatModel, task: Task, received: Vector, examples: Examples, mode: GradSampleMode, seeds: SeedTree
) -> None:
    """Compare a model's gradients under ``mode`` with autograd's, once for each model and shape of data."""
    key = (mode, type(task), tuple(examples.inputs.shape[1:]), examples.inputs.dtype)
    done = _compared.setdefault(model, set())
    if key in done:
        return
    check_private(model.module, unit="example", mode=mode)
    dropouts = _dropouts(model.module)
    try:
        for layer, name, _ in dropouts:
            setattr(layer, name, 0.0)
        with computing(seeds.child("compare")):
            _compare(model, task, received, examples, mode)
    except FedlearnError:
        raise
    except Exception as error:
        cause = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise TaskError(f"this model cannot be trained so ({cause}). {_advice(mode)}") from error
    finally:
        for layer, name, value in dropouts:
            setattr(layer, name, value)
    done.add(key)


def _compare(model: FlatModel, task: Task, received: Vector, examples: Examples, mode: GradSampleMode) -> None:
    """Raise unless clipped sums over a few examples are those of one example at a time; nothing of them is kept.

    The parameters are the received ones, moved at random: a last layer of zeros would hide the layers below it.
    """
    inputs, targets = pick(examples, torch.arange(4) % len(examples))
    model.load(received)
    model.module.train()
    moved = model.flat[: model.spec.trainable_size]
    moved.mul_(1 + 0.1 * torch.randn(moved.shape)).add_(0.05 * torch.randn(moved.shape))
    model.push()
    before = [each.detach().clone() for each in (*model.module.parameters(), *model.module.buffers())]
    alone = [_gradient(model, task, inputs[i : i + 1], targets[i : i + 1]) for i in range(len(inputs))]
    norms = torch.stack([each.norm() for each in alone])
    if not bool(norms.isfinite().all() and norms.any()):
        raise TaskError("the model's gradients are zero or not finite, so that they cannot be checked before training")
    with summing(model, task, mode) as clipped_sum:
        for bound in (2 * float(norms.max()), 0.5 * float(norms[norms > 0].min())):
            expected = [gradient * factor for gradient, factor in zip(alone, _factors(norms, bound), strict=True)]
            _hold(model, clipped_sum(inputs.clone(), targets.clone(), bound)[0], expected)
    after = (*model.module.parameters(), *model.module.buffers())
    if not all(torch.equal(one, two) for one, two in zip(before, after, strict=True)):
        raise TaskError(
            "the model changes its buffers or weights while it computes: they would carry the data on, unnoised"
        )


def _hold(model: FlatModel, found: Tensor, expected: list[Tensor]) -> None:
    """Raise, naming the parameters, unless ``found`` is the sum of ``expected`` to single precision."""
    longest = sum(float(each.norm()) for each in expected)
    wrong = []
    for name in _trained(model):
        place = model.spec.slices[name]
        parts = [each[place] for each in expected]
        allowed = 2e-3 * sum(float(part.norm()) for part in parts) + 2e-5 * longest
        if not float((found[place] - torch.stack(parts).sum(dim=0)).norm()) <= allowed:
            wrong.append(name)
    if wrong:
        raise _wrong(model, wrong, "has a gradient that is not the example's alone")


def _gradient(model: FlatModel, task: Task, inputs: Tensor, targets: Tensor) -> Tensor:
    """Return autograd's gradient of one example, alone in its batch, shape (trained,), float64."""
    trained = _trained(model)
    loss = losses_of(task, model.module(inputs.clone()), targets.clone())[0]
    found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    gradient = torch.zeros(model.spec.trainable_size, dtype=torch.float64)
    for name, each in zip(trained, found, strict=True):
        if each is not None:
            gradient[model.spec.slices[name]] = each.to_dense().reshape(-1).double()
    return gradient


def _dropouts(module: nn.Module) -> list[tuple[nn.Module, str, float]]:
    """Return every layer's dropout: chance has to be out of the way to compare gradients."""
    found = []
    for layer in module.modules():
        name = "p" if isinstance(layer, nn.modules.dropout._DropoutNd) else "dropout"
        if isinstance(value := getattr(layer, name, None), float):
            found.append((layer, name, value))
    return found


def _wrong(model: FlatModel, names: list[str], reason: str) -> TaskError:
    """Return the error that names parameters and their layers."""
    shown = []
    for name in names[:4]:
        owner = name.rpartition(".")[0]
        shown.append(f"{name} ({type(model.module.get_submodule(owner)).__name__})")
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return TaskError(f"{', '.join(shown)}{more} {reason}. {_advice(None)}")


def _advice(mode: GradSampleMode | None) -> str:
    """Return what to do about a layer that a mode cannot treat."""
    if mode == "functorch":
        return 'Replace the layer, or set privacy.grad-sample-mode = "hooks"'
    return (
        'Set privacy.grad-sample-mode = "functorch", which takes each example by itself, or replace the layer; '
        "a layer that looks at the whole batch, or draws at random other than by torch's dropout layers, cannot be used"
    )


def _wrapped(module: nn.Module, mode: GradSampleMode) -> Any:
    """Return Opacus' hooks on ``module``.

    Its ghost norms are taken only where they are products or sums of what they are norms of. For a linear layer on a
    sequence they are differences of large numbers: in float32 a norm of 500 comes out as 0, and is not clipped.
    """
    with importing_opacus(f"privacy.grad-sample-mode = {mode!r}"):
        from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
        from opacus.grad_sample.linear import compute_linear_grad_sample, compute_linear_norm_sample
    if mode == "hooks":
        return GradSampleModule(module, loss_reduction="sum", strict=False)  # buffers are checked here, in _compare

    def linear(layer: nn.Linear, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
        if backprops.dim() == 2:
            return compute_linear_norm_sample(layer, activations, backprops)  # type: ignore[no-any-return]
        gradients = compute_linear_grad_sample(layer, activations, backprops)
        return {each: _norms({"": gradient}).to(each.dtype) for each, gradient in gradients.items()}

    wrapper = GradSampleModuleFastGradientClipping(module, loss_reduction="sum", strict=False)
    wrapper.NORM_SAMPLERS = {**wrapper.NORM_SAMPLERS, nn.Linear: linear}
    return wrapper
