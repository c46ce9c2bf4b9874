"""One linear layer or convolution of many clients at once, with its clients' weights in one of two forms.

*Formed*, they are the rows of a matrix. But where a client goes through few rows of data, forming them costs more than
all the rest, and they are left *factored*: after s steps W_s = W₀ + Σ_{r<s} c_r δ_rᵀ x_r, the received weights and, for
every row r that the client has seen, the outer product of what went into the layer and of the loss' gradient at its
output. So the output is

    x W_sᵀ + b_s = x W₀ᵀ + b₀ + Σ_r c_r (x·x_r + 1) δ_r,

one product of matrices for all clients and two thin ones for each; and the weighted sum of all clients' updates is one
product more, whatever their number. It is exact: what plain descent, momentum and FedProx do to a gradient afterwards
is in the numbers c, which are the same for all clients.

Reference: the norm of a sum of outer products from Gram matrices is that of ghost clipping (Li et al.,
arXiv:2110.05679, section 4), here over a client's steps as well as over an example's positions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedlearn.learning.kernels import Descent, Stack, UnsuitableError
from fedlearn.learning.model import FlatModel
from fedlearn.learning.schedule import Schedule

__all__ = ["Factored", "Formed", "Forward", "Layer", "Place", "is_cheaper_formed", "places_of", "stack_of"]

_ROUNDING = 2.0**-42
"""Of the square of a sum of lengths: what float64 may lose in its Gram matrix, of hundreds of rows of thousands."""

_FORMED_COST = 10
"""How many multiplications of the thin products cost as much as one weight that is read, changed and written."""


@dataclass(frozen=True, eq=False)
class Place:
    """Where a layer stands in the model and its parameters in the flat vector."""

    name: str
    layer: nn.Linear | nn.Conv2d
    weight: slice
    bias: slice | None

    @property
    def parts(self) -> list[slice]:
        """The places of weight and bias."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in): of a convolution, how many channels go out, and how many numbers a patch has."""
        out = self.layer.weight.shape[0]
        return (out, self.layer.weight.numel() // out)

    def rows(self, x: Tensor) -> Tensor:
        """Return what goes into the layer as rows, shape (n, rows of an example, in).

        Raises:
            UnsuitableError: it is not what the layer is made for.
        """
        layer = self.layer
        if isinstance(layer, nn.Linear):
            if x.dim() < 2 or x.shape[-1] != layer.in_features:
                raise UnsuitableError(f"{self.name} sees an input without a first dimension for the batch")
            return x.reshape(x.shape[0], -1, layer.in_features)
        if x.dim() != 4:
            raise UnsuitableError(f"{self.name} sees an image without a first dimension for the batch")
        patches = functional.unfold(
            x, layer.kernel_size, dilation=layer.dilation, padding=_numbers(layer), stride=layer.stride
        )
        return patches.transpose(1, 2)

    def output(self, y: Tensor, x: Tensor) -> Tensor:
        """Return rows, shape (n, rows of an example, out), in the shape that the layer gives to the input x."""
        layer = self.layer
        if isinstance(layer, nn.Linear):
            return y.reshape(*x.shape[:-1], self.shape[0])
        height, width = (
            (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
            for size, pad, dilation, kernel, stride in zip(
                x.shape[2:], _numbers(layer), layer.dilation, layer.kernel_size, layer.stride, strict=True
            )
        )
        return y.transpose(1, 2).reshape(x.shape[0], self.shape[0], height, width)


class Forward:
    """What stands in for a layer's own ``forward`` during a pass."""

    def __init__(self, layer: Layer, anchor: Tensor) -> None:
        self._layer, self._anchor = layer, anchor

    def __call__(self, x: Tensor) -> Tensor:
        """Return the layer's output for the rows of all clients.

        Raises:
            UnsuitableError: the module uses the layer as no group of clients can be computed.
        """
        own, place = self._layer, self._layer.place
        if own.passed or x.shape[0] != own.active * own.length:
            raise UnsuitableError(f"{place.name} is used more than once, or its first dimension is not the batch")
        own.passed = True
        rows = place.rows(x)
        y: Tensor = _Apply.apply(  # type: ignore[no-untyped-call]
            rows.reshape(own.active, -1, rows.shape[-1]), self._anchor, own
        )
        return place.output(y.reshape(x.shape[0], -1, y.shape[-1]), x)


class _Apply(torch.autograd.Function):
    """Takes a layer's pass in and out of autograd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, layer: Layer) -> Tensor:  # noqa: ARG004 (it makes autograd come)
        ctx.layer = layer
        return layer.forward(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, None]:
        return ctx.layer.backward(dy, needed=ctx.needs_input_grad[0]), None, None


class Layer(ABC):
    """One layer of all clients, during one group's training."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.active = self.length = 0
        self.passed = False

    def begin(self, active: int, length: int) -> None:
        """Expect one pass of so many clients with so many examples each."""
        self.active, self.length, self.passed = active, length, False

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs, shape (active, rows, out), for inputs of shape (active, rows, in)."""

    @abstractmethod
    def backward(self, dy: Tensor, *, needed: bool) -> Tensor | None:
        """Take the gradient at the outputs, and return that at the inputs where it is needed."""

    @abstractmethod
    def finish(self) -> None:
        """End the step."""

    @abstractmethod
    def square_norms(self) -> Tensor:
        """Return each example's squared gradient norm, shape (active, b), float64."""

    @abstractmethod
    def sum_of_examples(self, factors: Tensor, total: Tensor) -> None:
        """Write each client's Σ factor · gradient to this layer's places of ``total``, shape (active, d)."""

    @abstractmethod
    def bounds(self) -> Tensor:
        """Return a bound on the norm of each client's update here, shape (count,), quickly; NaN where there is one."""

    @abstractmethod
    def update_squares(self) -> Tensor:
        """Return the squared norm of each client's update here, shape (count,), float64."""

    @abstractmethod
    def weighted(self, factors: Tensor, total: Tensor) -> None:
        """Add Σ factor · update to this layer's places of ``total``, shape (d,)."""


class Factored(Layer):
    """A layer whose updates are kept as rows that went in and gradients that came back."""

    def __init__(self, place: Place, received: Tensor, schedule: Schedule, descent: Descent) -> None:
        super().__init__(place)
        self._descent, self._steps = descent, schedule.steps
        self._weight = received[place.weight].view(place.shape)
        self._bias = None if place.bias is None else received[place.bias]
        self._one = 0.0 if place.bias is None else 1.0
        self._count, self._expected = len(schedule.steps), schedule.most_rows
        self._ragged = any(batch.active < self._count for batch in schedule.batches)
        self._x: Tensor | None = None
        self._d: Tensor | None = None
        self._filled = self._new = 0
        self._step_of_row: list[int] = []
        self._moved: list[float] = []  # c of each step: what of its gradient is in the weights now
        self._pace: list[float] = []  # the same, of the velocity
        self._history: list[list[float]] = [[]]

    def forward(self, x: Tensor) -> Tensor:
        """Return x W₀ᵀ + b₀ and, from the second step on, what the rows before add."""
        y = x.reshape(-1, x.shape[-1]) @ self._weight.T
        if self._bias is not None:
            y += self._bias
        y = y.view(*x.shape[:-1], -1)
        if self._filled:
            kept_x, kept_d = self._kept()
            y.baddbmm_(self._coefficients(x, kept_x, self._one), kept_d)
        self._keep(x)
        return y

    def backward(self, dy: Tensor, *, needed: bool) -> Tensor | None:
        """Keep dy, and return dy W_s."""
        if self._d is None:
            self._d = self._room(dy)
        dx = None
        if needed:
            dx = (dy.reshape(-1, dy.shape[-1]) @ self._weight).view(*dy.shape[:-1], -1)
            if self._filled:
                kept_x, kept_d = self._kept()
                dx.baddbmm_(self._coefficients(dy, kept_d, 0.0), kept_x)
        self._d[: self.active, self._filled : self._filled + self._new] = dy
        return dx

    def finish(self) -> None:
        """Let every gradient so far, and this step's, take its part in the velocity and the weights."""
        descent = self._descent
        self._pace = [
            descent.momentum * pace + descent.proximal_mu * moved
            for pace, moved in zip(self._pace, self._moved, strict=True)
        ]
        self._pace.append(1.0)
        self._moved.append(0.0)
        self._moved = [moved - descent.rate * pace for moved, pace in zip(self._moved, self._pace, strict=True)]
        self._step_of_row += [len(self._history) - 1] * self._new
        self._history.append(self._moved)
        self._filled += self._new
        self._new = 0

    def square_norms(self) -> Tensor:
        """Refuse: clipped gradients are summed where weights are formed."""
        raise TypeError("noised steps need parameters that are formed")

    def sum_of_examples(self, factors: Tensor, total: Tensor) -> None:
        """Refuse."""
        raise TypeError("noised steps need parameters that are formed")

    def bounds(self) -> Tensor:
        """Return Σ_r |c_r| (‖x_r‖ + 1) ‖δ_r‖."""
        x, d = self._whole()
        bounds: Tensor = (self._final().abs() * (x.norm(dim=2) + self._one) * d.norm(dim=2)).sum(dim=1)
        return bounds

    def update_squares(self) -> Tensor:
        """Return Σ_rr' c_r c_r' (x_r·x_r' + 1)(δ_r·δ_r'), in float64, and what rounding may have taken from it.

        Where a client's steps cancel, the sum is a small difference of large terms: never less than the truth.
        """
        x, d = (each.double() for each in self._whole())
        d = d * self._final()[..., None]
        gram = torch.bmm(x, x.transpose(1, 2)).add_(self._one)
        squares: Tensor = (gram * torch.bmm(d, d.transpose(1, 2))).sum(dim=(1, 2))
        lengths = ((x.norm(dim=2) + self._one) * d.norm(dim=2)).sum(dim=1)
        rounded: Tensor = squares.clamp(min=0.0) + _ROUNDING * lengths.square()
        return rounded

    def weighted(self, factors: Tensor, total: Tensor) -> None:
        """Add one product over the rows of all clients."""
        x, d = self._whole()
        dtype, place = total.dtype, self.place
        lost = factors == 0
        shares = (self._final() * factors[:, None]).to(dtype)
        scaled = (d.to(dtype) * shares[..., None]).masked_fill_(lost[:, None, None], 0.0).flatten(0, 1)
        if bool(lost.any()):
            x = x.masked_fill(lost[:, None, None], 0.0)
        total[place.weight].view(place.shape).addmm_(scaled.T, x.to(dtype).flatten(0, 1))
        if place.bias is not None:
            total[place.bias] += scaled.sum(dim=0)

    def _room(self, like: Tensor) -> Tensor:
        """Return memory for all the rows that clients go through: several of an example, where one has several."""
        shape = (self._count, self._expected * max(1, self._new // max(1, self.length)), like.shape[-1])
        return like.new_zeros(shape) if self._ragged else like.new_empty(shape)

    def _keep(self, x: Tensor) -> None:
        """Keep what goes in."""
        self._new = x.shape[1]
        if self._x is None:
            self._x = self._room(x)
        self._x[: self.active, self._filled : self._filled + self._new] = x

    def _kept(self) -> tuple[Tensor, Tensor]:
        """Return the rows before this step of the clients at work."""
        if self._x is None or self._d is None:
            raise ValueError("no step was taken yet")
        part = (slice(self.active), slice(self._filled))
        return self._x[part], self._d[part]

    def _whole(self) -> tuple[Tensor, Tensor]:
        """Return all rows of all clients; those never filled are zero."""
        if self._x is None or self._d is None:
            raise ValueError("no step was taken")
        return self._x[:, : self._filled], self._d[:, : self._filled]

    def _coefficients(self, rows: Tensor, kept: Tensor, one: float) -> Tensor:
        """Return c_r (row·kept_r + one), shape (active, rows, kept)."""
        moved = [self._moved[step] for step in self._step_of_row]
        products = torch.bmm(rows, kept.transpose(1, 2))
        if one:
            products += one
        return products.mul_(torch.tensor(moved, dtype=rows.dtype))

    def _final(self) -> Tensor:
        """Return each row's c at the end of its client's own steps, shape (count, rows), float64."""
        of_steps = np.zeros((len(self._history), len(self._history)))
        for steps, moved in enumerate(self._history):
            of_steps[steps, : len(moved)] = moved
        return torch.from_numpy(of_steps[self._steps][:, self._step_of_row])


class Formed(Layer):
    """A layer whose weights are formed for every client.

    Args:
        keeps: whether a pass leaves rows and gradients for clipping instead of moving the weights.
    """

    def __init__(self, place: Place, stack: Stack, formed: Sequence[Place], *, keeps: bool) -> None:
        super().__init__(place)
        self._stack, self._keeps = stack, keeps
        own = _within(formed)
        self._own = [(each, own[each.start]) for each in place.parts]
        self._weight = stack.view(own[place.weight.start], place.shape)
        self._bias = None if place.bias is None else stack.rows[:, own[place.bias.start]]
        self._x: Tensor | None = None
        self._d: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return x W_kᵀ + b_k."""
        self._x = x.detach()
        weight = self._weight[: self.active].transpose(1, 2)
        if self._bias is None:
            return torch.bmm(x, weight)
        return torch.baddbmm(self._bias[: self.active, None], x, weight)

    def backward(self, dy: Tensor, *, needed: bool) -> Tensor | None:
        """Return dy W_k, then move the weights unless the gradients are to be clipped first."""
        dx = torch.bmm(dy, self._weight[: self.active]) if needed else None
        self._d = dy.detach()
        if not self._keeps:
            self._move(self._x, dy)
        return dx

    def _move(self, x: Tensor | None, dy: Tensor) -> None:
        """Take a step of dyᵀ x."""
        if x is None:
            raise ValueError("a backward pass without a forward pass")
        stack, place, active = self._stack, self.place, self.active
        if stack.descent.plain:  # in place, without forming the gradient
            self._weight[:active].baddbmm_(dy.transpose(1, 2), x, alpha=-stack.descent.rate)
        else:
            stack.move(active, torch.bmm(dy.transpose(1, 2), x).flatten(1), self._own[0][1])
        if place.bias is not None:
            stack.move(active, dy.sum(dim=1), self._own[1][1])

    def finish(self) -> None:
        """Let go of the pass."""
        self._x = self._d = None

    def square_norms(self) -> Tensor:
        """Return ‖δ‖²(‖x‖² + 1) of examples that are one row each, else from Gram matrices over an example's rows."""
        x, d = self._of_examples()
        one = 0.0 if self.place.bias is None else 1.0
        if x.shape[2] == 1:
            return d.square().sum(dim=(2, 3)) * (x.square().sum(dim=(2, 3)) + one)
        products = torch.matmul(x, x.transpose(2, 3)).add_(one)
        squares = (products * torch.matmul(d, d.transpose(2, 3))).sum(dim=(2, 3)).clamp(min=0.0)
        lengths = ((x.norm(dim=3) + one) * d.norm(dim=3)).sum(dim=2)
        rounded: Tensor = squares + _ROUNDING * lengths.square()
        return rounded

    def sum_of_examples(self, factors: Tensor, total: Tensor) -> None:
        """Write Σ factor · δᵀx of every client."""
        x, d = self._of_examples()
        lost = (factors == 0)[..., None, None]
        d = (d * factors[..., None, None]).masked_fill(lost, 0.0).flatten(1, 2)
        x = x.masked_fill(lost, 0.0).flatten(1, 2)
        total[:, self.place.weight] = torch.bmm(d.transpose(1, 2), x).flatten(1)
        if self.place.bias is not None:
            total[:, self.place.bias] = d.sum(dim=1)

    def _of_examples(self) -> tuple[Tensor, Tensor]:
        """Return the last pass by example, shapes (active, b, rows of one, …), float64."""
        if self._x is None or self._d is None:
            raise ValueError("no pass was made")
        shape = (self.active, self.length, -1)
        return (each.double().view(*shape, each.shape[-1]) for each in (self._x, self._d))  # type: ignore[return-value]

    def bounds(self) -> Tensor:
        """Return the norms themselves."""
        return self.update_squares().sqrt()

    def update_squares(self) -> Tensor:
        """Return the squares of the differences, in float64."""
        rows, received = self._stack.rows, self._stack.received
        parts = [(rows[:, own] - received[own]).double() for _, own in self._own]
        return torch.stack([each.square().sum(dim=1) for each in parts]).sum(dim=0)

    def weighted(self, factors: Tensor, total: Tensor) -> None:
        """Add the weighted sum of the differences."""
        factors = factors.to(total.dtype)
        lost = (factors == 0)[:, None]
        for place, own in self._own:
            updates = (self._stack.rows[:, own] - self._stack.received[own]).masked_fill(lost, 0.0)
            total[place] += factors @ updates.to(total.dtype)


def places_of(model: FlatModel) -> list[Place]:
    """Return the layers that are trained and known, each with all of its own parameters."""
    slices = {each.name: model.spec.slices[each.name] for each in model.spec.entries if each.trainable}
    places = []
    for name, layer in model.module.named_modules():
        if not _is_known(layer) or not layer.weight.requires_grad:
            continue
        prefix = f"{name}." if name else ""
        weight, bias = slices.get(f"{prefix}weight"), slices.get(f"{prefix}bias")
        if weight is None or (layer.bias is not None and bias is None):
            continue  # tied, or half of it frozen: then not everything is covered
        places.append(Place(name or "the model", layer, weight, bias))
    return places


def _is_known(layer: nn.Module) -> TypeGuard[nn.Linear | nn.Conv2d]:
    """Return whether a layer is a plain linear one, or a plain convolution: nothing that may do anything else."""
    if "forward" in layer.__dict__:
        return False
    if type(layer) is nn.Conv2d:
        return layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return type(layer) is nn.Linear


def _numbers(layer: nn.Conv2d) -> tuple[int, int]:
    """Return a convolution's padding."""
    height, width = (int(each) for each in layer.padding)
    return height, width


def _within(formed: Sequence[Place]) -> dict[int, slice]:
    """Return where the parts of these layers stand, by their first place in the model, with nothing between them."""
    own, start = {}, 0
    for part in sorted((part for place in formed for part in place.parts), key=lambda part: part.start):
        own[part.start] = slice(start, start + part.stop - part.start)
        start = own[part.start].stop
    return own


def stack_of(formed: Sequence[Place], received: Tensor, count: int, descent: Descent) -> Stack:
    """Return the parameters of these layers alone."""
    parts = sorted((part for place in formed for part in place.parts), key=lambda part: part.start)
    return Stack(torch.cat([received[:0], *(received[part] for part in parts)]), count, descent)


def is_cheaper_formed(place: Place, schedule: Schedule) -> bool:
    """Return whether a layer's weights are cheaper to form: a function of shapes alone, so always the same."""
    if isinstance(place.layer, nn.Conv2d):
        return True  # an example has many patches
    longest = max((batch.rows.shape[1] for batch in schedule.batches), default=0)
    out, width = place.shape
    return longest * schedule.most_rows * (out + width) > _FORMED_COST * out * width
