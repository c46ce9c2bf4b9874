"""Which layers a privacy unit rules out, by name, and what to put in their place.

A rule stands here for what looks at one layer's settings. What depends on how a model uses its layers is found by
comparing gradients (``example_gradients.py``). The rules on ``hooks`` and ``ghost`` are faults that were measured in
Opacus 1.6 with torch 2.13: per-example gradients that differ from autograd's, in silence, on some batches only.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from fedlearn.config import GradSampleMode, PrivacyUnit
from fedlearn.errors import TaskError
from fedlearn.learning.opacus_import import importing_opacus

__all__ = ["check_private", "offered_fix"]

_OFFER = "fedlearn can do it: in build_model, return fedlearn.learning.validators.offered_fix(model)"
_FUNCTORCH = 'set privacy.grad-sample-mode = "functorch"'
_HOOKED = ("hooks", "ghost")
_EVERY = ("hooks", "functorch", "ghost")


@dataclass(frozen=True, kw_only=True)
class _Rule:
    """A kind of layer that is ruled out under some modes, when ``applies`` says so of one."""

    modes: tuple[str, ...]
    applies: Callable[[nn.Module], bool]
    advice: str
    trained: bool = True  # only where the layer has parameters that are trained


_GROUPNORM = f"replace it by torch.nn.GroupNorm(num_groups, channels); {_OFFER}"
_NO_STATISTICS = f"build it with track_running_stats=False; {_OFFER}"

_CLIENT = (
    _Rule(
        modes=_EVERY,
        applies=lambda layer: isinstance(layer, _BatchNorm) and layer.track_running_stats,
        advice=f"its running statistics would leave without noise: {_GROUPNORM}",
        trained=False,
    ),
    _Rule(
        modes=_EVERY,
        applies=lambda layer: isinstance(layer, _InstanceNorm) and layer.track_running_stats,
        advice=f"its running statistics would leave without noise: {_NO_STATISTICS}",
        trained=False,
    ),
)

_EXAMPLE = (
    _Rule(
        modes=_EVERY,
        applies=lambda layer: isinstance(layer, _BatchNorm),
        advice=f"it mixes the examples of a batch: {_GROUPNORM}",
        trained=False,
    ),
    _CLIENT[1],
    _Rule(
        modes=_EVERY,
        applies=lambda layer: isinstance(layer, nn.Embedding | nn.EmbeddingBag) and layer.max_norm is not None,
        advice="max_norm rewrites the rows that a batch looks up, without noise: leave it out",
        trained=False,
    ),
    _Rule(
        modes=_EVERY,
        applies=lambda layer: type(layer) in (nn.GRU, nn.RNN),
        advice=f"no mode has its gradient of each example: use DPGRU or DPRNN of opacus.layers, or an LSTM; {_OFFER}",
    ),
    _Rule(
        modes=_HOOKED,
        applies=lambda layer: type(layer) is nn.LSTM or isinstance(layer, nn.MultiheadAttention),
        advice=f"hooks do not see into it: {_FUNCTORCH}, or use the layer's twin in opacus.layers; {_OFFER}",
    ),
    _Rule(
        modes=_HOOKED,
        applies=lambda layer: isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) and layer.padding_mode != "zeros",
        advice=f"Opacus' gradient takes its padding for zeros: {_FUNCTORCH}, or padding_mode='zeros'",
    ),
    _Rule(
        modes=_HOOKED,
        applies=lambda layer: (
            isinstance(layer, nn.Embedding) and (layer.padding_idx is not None or layer.scale_grad_by_freq)
        ),
        advice=f"Opacus' gradient overlooks padding_idx and scale_grad_by_freq: {_FUNCTORCH}, or leave them out",
    ),
    _Rule(
        modes=_HOOKED,
        applies=lambda layer: isinstance(layer, nn.EmbeddingBag),
        advice=f"Opacus' gradient counts an index once that a bag holds twice: {_FUNCTORCH}",
    ),
    _Rule(
        modes=_HOOKED,
        applies=lambda layer: isinstance(layer, nn.LayerNorm) and layer.elementwise_affine and layer.bias is None,
        advice=f"Opacus fails on bias=False: {_FUNCTORCH}, or leave bias=False out",
    ),
    _Rule(
        modes=_HOOKED,
        applies=lambda layer: getattr(layer, "inplace", False) is True,
        advice=f"hooks do not bear inplace=True: {_FUNCTORCH}, or leave it out; {_OFFER}",
        trained=False,
    ),
)


def check_private(
    module: nn.Module,
    *,
    unit: PrivacyUnit,
    mode: GradSampleMode | None = None,
) -> None:
    """Raise if a layer cannot be trained under this privacy unit; every such layer is named with what to do.

    Under ``client`` those are layers that keep running statistics of the data: they would leave without noise. Under
    ``example`` also those that mix the examples of a batch, those for which the mode has no right gradient of each
    example, and trained parameters in half precision. Opacus is not needed to ask.

    Args:
        module: the task's model.
        unit: whose presence is hidden.
        mode: how the gradient of each example is computed; ``None``: only what no mode can do is refused.

    Raises:
        TaskError: with a line for every layer or parameter.

    >>> check_private(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), unit="example", mode="hooks")
    """
    rules = {"none": (), "client": _CLIENT, "example": _EXAMPLE}[unit]
    faults = list(_faults(module, rules, mode))
    if unit == "example":
        faults += _halves(module)
    if faults:
        raise TaskError(f"the model cannot be trained under privacy.unit = {unit!r}:\n  " + "\n  ".join(faults))


def offered_fix(module: nn.Module) -> nn.Module:
    """Return a copy of ``module`` in which the layers that have a private twin are replaced by it.

    BatchNorm becomes GroupNorm (of up to 32 groups), InstanceNorm forgets its running statistics, LSTM, GRU and
    MultiheadAttention become Opacus' own with the same weights, and nothing works in place any more. A task uses it in
    one line, ``return offered_fix(model)`` at the end of ``build_model``, on the server and on all clients alike.

    Raises:
        DependencyError: a layer needs Opacus, and it is not installed.

    >>> offered_fix(nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8)))[1].num_groups
    8
    """
    fixed = copy.deepcopy(module)
    for name, layer in list(fixed.named_modules()):
        twin = _twin(layer)
        if twin is layer:
            continue
        if not name:
            return twin
        parent, _, own = name.rpartition(".")
        setattr(fixed.get_submodule(parent), own, twin)
    return fixed


def _faults(module: nn.Module, rules: tuple[_Rule, ...], mode: str | None) -> Iterator[str]:
    """Yield a line for every layer that a rule applies to."""
    for name, layer in module.named_modules():
        trains = any(each.requires_grad for each in layer.parameters())
        for rule in rules:
            concerned = mode in rule.modes if mode is not None else rule.modes == _EVERY
            if concerned and (trains or not rule.trained) and rule.applies(layer):
                yield f"{name or 'the model'} ({type(layer).__name__}): {rule.advice}"
                break


def _halves(module: nn.Module) -> Iterator[str]:
    """Yield a line for every trained parameter in half precision."""
    for name, each in module.named_parameters():
        if each.requires_grad and each.dtype in (torch.float16, torch.bfloat16):
            kind = str(each.dtype).removeprefix("torch.")
            yield f"{name} ({kind}): its gradients are rounded too coarsely to be told apart; keep it in float32"


def _twin(layer: nn.Module) -> nn.Module:
    """Return what stands for a layer under privacy: the layer itself, changed or not, or another."""
    if isinstance(layer, _InstanceNorm) and layer.track_running_stats:
        layer.track_running_stats = False
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            layer.register_buffer(name, None)
    if getattr(layer, "inplace", False) is True:
        layer.inplace = False  # type: ignore[assignment]
    if not isinstance(layer, _BatchNorm | nn.LSTM | nn.GRU | nn.MultiheadAttention):
        return layer
    with importing_opacus(f"a private twin of {type(layer).__name__}"):
        from opacus.validators import ModuleValidator
    fixer = ModuleValidator.FIXERS.get(type(layer))
    return layer if fixer is None else fixer(layer)
