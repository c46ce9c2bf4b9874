"""The sum of every example's clipped gradient, in one of three modes, all of them held against autograd.

* ``hooks``: Opacus' rules for each kind of layer;
* ``ghost``: as ``hooks``, but where a gradient is an outer product or a few rows of a table (a linear layer on one
  vector an example, an embedding) it is never written out: its norm and its share of the sum come from the factors;
* ``functorch``: ``torch.func`` on the whole model, each example a batch of its own. It takes most models, and examples
  cannot mix in it. (Opacus' own functorch works layer by layer: it overlooks keyword arguments, batches that are folded
  with time, and parameters that are used outside their layer.)

Before a model is trained for the first time, sums over a few made-up examples are compared with autograd's, one example
at a time; what differs is refused, with the layer's name. ``hooks`` compares in every batch too: there its gradients
have to add up to the batch's own.

No real example decides whether training fails: what a server sees of a failure would be told without noise. A batch on
which a mode fails is therefore computed by autograd, one example at a time, and only this client's log says so.

Each share of a sum is exactly ``factor · gradient``, weighted and added in float64: a second backward pass of weighted
losses rounds anew, and a gradient that is what is left of large terms may come out longer than it was measured.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fedlearn.arrays import Vector
from fedlearn.config import GradSampleMode
from fedlearn.errors import FedlearnError, TaskError
from fedlearn.learning.gradient_shares import Gradients, Lookup, Outer, Rows
from fedlearn.learning.model import FlatModel, computing
from fedlearn.learning.opacus_import import importing_opacus
from fedlearn.learning.task import Examples, Task
from fedlearn.learning.trainer import losses_of
from fedlearn.learning.validators import check_private
from fedlearn.sources import SeedTree

__all__ = ["LONGEST", "ClippedSum", "check_once", "clip_factors", "summing"]

LONGEST = 1e30  # a gradient longer than this counts as not finite: in float32 it is about to overflow
_MARGIN = 1 - 2.0**-20  # clip to a little less, for what float64 rounds up in norms, products and sums

log = logging.getLogger("fedlearn.client")

ClippedSum: TypeAlias = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]
"""(inputs, targets, bound) → (the sum of clipped gradients, shape (trained,), float64; the losses, shape (b,))."""


@contextmanager
def summing(model: FlatModel, task: Task, mode: GradSampleMode) -> Iterator[ClippedSum]:
    """Give the function that clips and sums; afterwards the module is as it was.

    Guarantees: each example's share of the sum, in float64, has norm at most the bound, for bounds from 1e-20 to 1e20;
    one whose gradient is not finite, or longer than 1e30, has none. The function raises only where autograd does on
    one example alone.
    """
    alone = _by_autograd(model, task)
    with _summing(model, task, mode) as (quick, wrapper):

        def clipped_sum(inputs: Tensor, targets: Tensor, bound: float) -> tuple[Tensor, Tensor]:
            try:
                return quick(inputs.clone(), targets.clone(), bound)  # copies: a model may work in place
            except Exception as error:
                log.warning("one example at a time, since on this batch %s failed: %s", mode, error)
            with _without_hooks(model, wrapper):
                return alone(inputs, targets, bound)

        yield clipped_sum


@contextmanager
def _summing(model: FlatModel, task: Task, mode: GradSampleMode) -> Iterator[tuple[ClippedSum, Any]]:
    """Give the function that clips and sums, and raises where it is not sure; and Opacus' wrapper."""
    factored: dict[Tensor, list[Gradients]] = {}
    wrapper = None if mode == "functorch" else _wrapped(model.module, mode, factored)
    try:
        with warnings.catch_warnings():  # that the first layer's input is data; that an operation is slow in vmap
            warnings.filterwarnings("ignore", "Full backward hook is firing when gradients are computed")
            warnings.filterwarnings("ignore", "There is a performance drop because we have not yet implemented")
            if wrapper is None:
                yield _by_functorch(model, task), None
            else:
                yield _by_hooks(model, task, wrapper, factored), wrapper
    finally:
        if wrapper is not None:
            _forget(model.module)
            wrapper.cleanup()


@contextmanager
def _without_hooks(model: FlatModel, wrapper: Any) -> Iterator[None]:
    """Forget what a pass that was broken off left behind, and keep Opacus' hooks out of the way."""
    if wrapper is None:
        yield
        return
    _forget(model.module)
    wrapper.disable_hooks()
    try:
        yield
    finally:
        wrapper.enable_hooks()


def _forget(module: nn.Module) -> None:
    """Remove what Opacus leaves behind when a pass is broken off."""
    for layer in module.modules():
        for name in ("activations", "max_batch_len"):
            layer.__dict__.pop(name, None)
    for each in module.parameters():
        each.__dict__.pop("_current_grad_sample", None)
        for name, value in (("_forward_counter", 0), ("grad_sample", None)):
            if name in each.__dict__:
                setattr(each, name, value)


def _by_autograd(model: FlatModel, task: Task) -> ClippedSum:
    """Return the clipped sum by autograd, one example at a time: slow, and what the modes are held against."""

    def clipped_sum(inputs: Tensor, targets: Tensor, bound: float) -> tuple[Tensor, Tensor]:
        total, losses = torch.zeros(model.spec.trainable_size, dtype=torch.float64), torch.zeros(len(inputs))
        for i in range(len(inputs)):
            gradient, losses[i] = _gradient(model, task, inputs[i : i + 1], targets[i : i + 1])
            rows = Rows(gradient[None])
            total += rows.weighted(clip_factors(rows.norms(), bound))
        return total, losses

    return clipped_sum


def _by_functorch(model: FlatModel, task: Task) -> ClippedSum:
    """Return the clipped sum by ``torch.func``: each example is a batch of its own."""

    def loss(parameters: dict[str, Tensor], example: Tensor, target: Tensor) -> Tensor:
        output = torch.func.functional_call(model.module, parameters, (example.unsqueeze(0),))
        return losses_of(task, output, target.unsqueeze(0))[0]

    per_example = torch.func.vmap(torch.func.grad_and_value(loss), in_dims=(None, 0, 0), randomness="different")

    def clipped_sum(inputs: Tensor, targets: Tensor, bound: float) -> tuple[Tensor, Tensor]:
        parameters = {name: each.detach() for name, each in _trained(model).items()}
        gradients, losses = per_example(parameters, inputs, targets)
        rows = {name: Rows(each.reshape(len(targets), -1)) for name, each in gradients.items()}
        return _clipped(model, rows, len(targets), bound), losses.detach()

    return clipped_sum


def _by_hooks(model: FlatModel, task: Task, wrapper: Any, factored: Mapping[Tensor, list[Gradients]]) -> ClippedSum:
    """Return the clipped sum by Opacus' hooks, each batch's plain sum held against autograd's."""

    def clipped_sum(inputs: Tensor, targets: Tensor, bound: float) -> tuple[Tensor, Tensor]:
        model.zero_gradient()
        wrapper.set_grad_sample_to_none()
        for each in factored.values():
            each.clear()
        losses = losses_of(task, model.module(inputs), targets)
        losses.sum().backward()  # type: ignore[no-untyped-call]
        gradients: dict[str, Gradients] = {}
        for name, parameter in _trained(model).items():
            found = _own(parameter, name, model)
            if found is None:
                continue
            if kept := factored.get(parameter):
                if len(kept) > 1 or found.shape != (len(targets), 0):
                    raise _wrong(model, [name], 'is used more than once, which "ghost" has no norm for')
                gradients[name] = kept[0]
            else:
                shape = (len(targets), *parameter.shape)
                gradients[name] = Rows(_of_batch(found, shape, name, model).reshape(len(targets), -1))
        result = _clipped(model, gradients, len(targets), bound, hold=True)
        wrapper.set_grad_sample_to_none()
        return result, losses.detach()

    return clipped_sum


def _clipped(
    model: FlatModel, gradients: Mapping[str, Gradients], count: int, bound: float, *, hold: bool = False
) -> Tensor:
    """Return the sum of clipped gradients, shape (trained,), float64; with ``hold`` the plain sum is compared first."""
    norms = torch.zeros(count, dtype=torch.float64)
    if gradients:
        norms = torch.linalg.vector_norm(torch.stack([each.norms() for each in gradients.values()]), dim=0)
    if hold and bool((norms < LONGEST).all()):
        _compare_sums(model, gradients)
    factors = clip_factors(norms, bound)
    total = torch.zeros(model.spec.trainable_size, dtype=torch.float64)
    for name, each in gradients.items():
        total[model.spec.slices[name]] = each.weighted(factors)
    return total


def clip_factors(norms: Tensor, bound: float) -> Tensor:
    """Return what brings each gradient within the bound: at most 1, and 0 for one that is not finite."""
    factors = (bound * _MARGIN / norms).clamp(max=1.0)
    return torch.where(norms < LONGEST, factors, 0.0)


def _trained(model: FlatModel) -> dict[str, nn.Parameter]:
    """Return the trained parameters by name, tied ones once."""
    return {name: each for name, each in model.module.named_parameters() if each.requires_grad}


def _own(parameter: nn.Parameter, name: str, model: FlatModel) -> Tensor | None:
    """Return what Opacus found for a parameter; ``None`` where the batch really has no gradient for it."""
    found: Tensor | None = getattr(parameter, "grad_sample", None)
    if found is None and parameter.grad is not None and bool(parameter.grad.any()):
        raise _wrong(model, [name], "is used outside its own layer's forward")
    return found


def _of_batch(found: object, shape: tuple[int, ...], name: str, model: FlatModel) -> Tensor:
    """Return ``found`` if it is one gradient for each example."""
    if not isinstance(found, Tensor) or found.shape != shape:
        raise _wrong(model, [name], "has no gradient for each example: the layer's first dimension is not the batch")
    return found.detach()


def _compare_sums(model: FlatModel, gradients: Mapping[str, Gradients]) -> None:
    """Raise unless the gradients of a batch add up to autograd's; what only some batches show is found here."""
    rows = {name: each.rows for name, each in gradients.items() if isinstance(each, Rows)}
    lengths = {name: float(each.norms().sum()) for name, each in gradients.items()}
    rounding = 1e-4 * sum(lengths.values())  # of a parameter whose gradient is zero but for it
    for name, parameter in _trained(model).items():
        if name in rows and parameter.grad is not None:
            gap = float((rows[name].sum(dim=0) - parameter.grad.reshape(-1)).norm())
            if not gap <= 0.05 * lengths[name] + rounding:
                raise _wrong(model, [name], "has gradients of examples that do not add up to the batch's")


# -- the modes, held against autograd ------------------------------------------------------------------------------

_Kind: TypeAlias = tuple[tuple[int, ...], torch.dtype]  # of one example's inputs or targets
_compared: WeakKeyDictionary[FlatModel, set[tuple[Any, ...]]] = WeakKeyDictionary()


def check_once(
    model: FlatModel, task: Task, received: Vector, examples: Examples, mode: GradSampleMode, seeds: SeedTree
) -> None:
    """Compare a model's gradients under ``mode`` with autograd's, once for each model and shape of data.

    Guarantees: whether and with what it raises depends on the model, the task, ``received``, the mode, ``seeds`` and
    the shape and type of one example; on no value in ``examples``, and not on how many there are.
    """
    data = tuple((tuple(each.shape[1:]), each.dtype) for each in (examples.inputs, examples.targets))
    key = (mode, type(task), data)
    done = _compared.setdefault(model, set())
    if key in done:
        return
    check_private(model.module, unit="example", mode=mode)
    dropouts = _dropouts(model.module)
    try:
        for layer, name, _ in dropouts:
            setattr(layer, name, 0.0)
        with computing(seeds.child("compare")):
            _compare(model, task, received, data, mode)
    except FedlearnError:
        raise
    except Exception as error:
        cause = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise TaskError(f"this model cannot be trained so ({cause}). {_advice(mode)}") from error
    finally:
        for layer, name, value in dropouts:
            setattr(layer, name, value)
    done.add(key)


def _compare(model: FlatModel, task: Task, received: Vector, data: tuple[_Kind, ...], mode: GradSampleMode) -> None:
    """Raise unless clipped sums over made-up examples are those of one example at a time; nothing of them is kept.

    The parameters are the received ones, moved at random: a last layer of zeros would hide the layers below it.
    """
    model.load(received)
    model.module.train()
    moved = model.flat[: model.spec.trainable_size]
    moved.mul_(1 + 0.1 * torch.randn(moved.shape)).add_(0.05 * torch.randn(moved.shape))
    model.push()
    before = [each.detach().clone() for each in (*model.module.parameters(), *model.module.buffers())]
    inputs, targets, alone = _made_up(model, task, data)
    norms = torch.stack([each.norm() for each in alone])
    with _summing(model, task, mode) as (clipped_sum, _):
        for bound in (2 * float(norms.max()), 0.5 * float(norms[norms > 0].min())):
            expected = [gradient * factor for gradient, factor in zip(alone, clip_factors(norms, bound), strict=True)]
            _hold(model, clipped_sum(inputs.clone(), targets.clone(), bound)[0], expected)
    after = (*model.module.parameters(), *model.module.buffers())
    if not all(torch.equal(one, two) for one, two in zip(before, after, strict=True)):
        raise TaskError(
            "the model changes its buffers or weights while it computes: they would carry the data on, unnoised"
        )


def _made_up(model: FlatModel, task: Task, data: tuple[_Kind, ...]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return inputs, targets and gradients of four examples that nobody has.

    Numbers are drawn from a normal distribution; where the model cannot take those, from [0, 1), as targets always are.
    Integers are 0 or 1, which every table and every choice of classes has.
    """
    (shape, dtype), of_targets = data
    for draw in (torch.randn, torch.rand):
        inputs, targets = _drawn(draw, shape, dtype), _drawn(torch.rand, *of_targets)
        with suppress(Exception):  # the same on real examples is found in training
            alone = [_gradient(model, task, inputs[i : i + 1], targets[i : i + 1])[0] for i in range(len(inputs))]
            norms = torch.stack([each.norm() for each in alone])
            if bool(norms.isfinite().all() and norms.any()):
                return inputs, targets, alone
    _gradient(model, task, inputs[:1], targets[:1])  # raises what the model says, where it is that
    raise TaskError(
        "the model's gradients are zero or not finite on made-up examples (numbers from a normal distribution or from "
        "[0, 1), integers 0 and 1), so that they cannot be checked before training"
    )


def _drawn(draw: Callable[..., Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return four made-up rows of a shape and type."""
    if dtype.is_floating_point or dtype.is_complex:
        return draw(4, *shape, dtype=torch.complex64 if dtype.is_complex else torch.float32).to(dtype)
    return torch.randint(0, 2, (4, *shape)).to(dtype)


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


def _gradient(model: FlatModel, task: Task, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return autograd's gradient of one example, alone in its batch, shape (trained,), float64; and its loss."""
    trained = _trained(model)
    loss = losses_of(task, model.module(inputs.clone()), targets.clone())[0]
    found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    gradient = torch.zeros(model.spec.trainable_size, dtype=torch.float64)
    for name, each in zip(trained, found, strict=True):
        if each is not None:
            gradient[model.spec.slices[name]] = each.to_dense().reshape(-1).double()
    return gradient, loss.detach()


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


def _wrapped(module: nn.Module, mode: GradSampleMode, factored: dict[Tensor, list[Gradients]]) -> Any:
    """Return Opacus' hooks on ``module``; under ``ghost``, what need not be written out goes into ``factored``.

    Opacus' own ghost norms are not used. They are computed in the model's type: what is squared may vanish, and for a
    linear layer on a sequence they are differences of large numbers (in float32 a norm of 500 comes out as 0).
    """
    with importing_opacus(f"privacy.grad-sample-mode = {mode!r}"):
        from opacus.grad_sample import GradSampleModule
        from opacus.grad_sample.linear import compute_linear_grad_sample
    wrapper = GradSampleModule(module, loss_reduction="sum", strict=False)  # buffers are checked here, in _compare
    if mode == "hooks":
        return wrapper

    def keep(parameter: Tensor, gradients: Gradients, count: int) -> dict[Tensor, Tensor]:
        factored.setdefault(parameter, []).append(gradients)
        return {parameter: torch.zeros(count, 0)}  # Opacus is to hold something

    def linear(layer: nn.Linear, activations: list[Tensor], backprops: Tensor) -> dict[Tensor, Tensor]:
        if backprops.dim() != 2 or not layer.weight.requires_grad:
            return compute_linear_grad_sample(layer, activations, backprops)  # type: ignore[no-any-return]
        found = keep(layer.weight, Outer.of(backprops, activations[0]), len(backprops))
        if layer.bias is not None and layer.bias.requires_grad:
            found[layer.bias] = backprops
        return found

    def embedding(layer: nn.Embedding, activations: list[Tensor], backprops: Tensor) -> dict[Tensor, Tensor]:
        rows = Lookup.of(activations[0], backprops, layer.num_embeddings)
        return keep(layer.weight, rows, len(backprops))

    wrapper.GRAD_SAMPLERS = {**wrapper.GRAD_SAMPLERS, nn.Linear: linear, nn.Embedding: embedding}
    return wrapper
