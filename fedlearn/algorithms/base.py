"""What every algorithm is: ``init`` and ``aggregate`` on one flat vector, and the state between two rounds.

An algorithm of your own is one file::

    from dataclasses import dataclass

    from fedlearn.algorithms import Algorithm, ServerState, check_update


    @dataclass(frozen=True, kw_only=True)
    class HalfStep(Algorithm):
        fraction: float = 0.5  # [training.options] fraction = 0.25

        def aggregate(self, state, mean_update):
            delta = check_update(state, mean_update)
            return state.advance(params=state.params + self.fraction * delta)

and ``algorithm = "path/to/half_step.py"`` in the scenario.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedlearn.config_reading import kebab
from fedlearn.errors import ConfigError, RunFailedError

__all__ = ["Algorithm", "ServerState", "check_update"]

# How an option's annotation reads, as dataclasses keep it, and how a message names it.
_KINDS: dict[str, tuple[type, str]] = {
    "bool": (bool, "a boolean"),
    "int": (int, "an integer"),
    "float": (float, "a number"),
    "str": (str, "a string"),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class ServerState:
    """All that the server keeps from one round to the next.

    Guarantees: the arrays are read-only and the mapping cannot be changed; a state can be pickled.

    Attributes:
        params: the server's master copy of θ, shape (d,), float64 whatever the model's own type.
        slots: the optimiser's own vectors by name, each of shape (d,), float64.
        round_number: how many rounds have been aggregated.

    Raises:
        ValueError: an array has another shape or type, or the round is negative.

    >>> state = ServerState(params=np.zeros(2))
    >>> state.advance(params=state.params + 1.0).round_number
    1
    """

    params: NDArray[np.float64]
    slots: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    round_number: int = 0

    def __post_init__(self) -> None:
        if np.ndim(self.params) != 1:
            raise ValueError(f"params needs shape (d,), got {np.shape(self.params)}")
        if self.round_number < 0:
            raise ValueError(f"round_number counts from 0, got {self.round_number}")
        shape = np.shape(self.params)
        slots = {name: _read_only(f"slot {name!r}", slot, shape) for name, slot in self.slots.items()}
        object.__setattr__(self, "params", _read_only("params", self.params, shape))
        object.__setattr__(self, "slots", MappingProxyType(slots))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by value; a mapping proxy cannot be pickled itself."""
        rebuild = partial(ServerState, params=self.params, slots=dict(self.slots), round_number=self.round_number)
        return rebuild, ()

    def advance(self, *, params: NDArray[np.float64], **slots: NDArray[np.float64]) -> ServerState:
        """Return the state after one more round; a slot that is not given stays as it is.

        Raises:
            RunFailedError: a number overflowed, in θ or in a slot (from where it would stop θ for good).
            ValueError: an array has another shape than this state's.
        """
        for name, array in {"params": params, **slots}.items():
            if np.shape(array) != self.params.shape:
                raise ValueError(f"{name} needs shape {self.params.shape}, got {np.shape(array)}")
            if not np.isfinite(array).all():
                raise RunFailedError(
                    f"the server's {name} overflowed in round {self.round_number + 1}: the model diverged. "
                    "Lower training.learning-rate or training.server-learning-rate"
                )
        return ServerState(params=params, slots={**self.slots, **slots}, round_number=self.round_number + 1)


@dataclass(frozen=True, kw_only=True)
class Algorithm(ABC):
    """How the server turns the clients' updates into the next θ. Subclass it and define ``aggregate``.

    An algorithm is its hyper-parameters and nothing else: it keeps no state of its own, so that a run can be
    resumed from a ``ServerState``. Every field of a subclass, which is a frozen keyword-only dataclass too,
    is a key of ``[training.options]``; those annotated bool, int, float or str are held to it.

    Attributes:
        server_learning_rate: η, what a step of the server is multiplied by; above 0.
        slot_names: the vectors that ``init`` starts at zero for the optimiser.

    Raises:
        ConfigError: a hyper-parameter has the wrong type or an impossible value; names its key.

    Reference: Reddi et al., arXiv:2003.00295, Algorithm 1 (FedOpt), with the server's optimiser left open.
    """

    slot_names: ClassVar[tuple[str, ...]] = ()

    server_learning_rate: float = 1.0

    def __post_init__(self) -> None:
        for each in fields(self):
            kind = each.type if isinstance(each.type, str) else getattr(each.type, "__name__", "")
            if kind in _KINDS:
                value = _of_kind(_key(each.name), getattr(self, each.name), *_KINDS[kind])
                object.__setattr__(self, each.name, value)
        self._require_range("server_learning_rate", above=0.0)

    @property
    def proximal_mu(self) -> float:
        """What a client adds to its loss: ``proximal_mu / 2 · ‖w - received‖²``; 0 for all but FedProx."""
        return 0.0

    def init(self, params: NDArray[np.floating[Any]]) -> ServerState:
        """Return the state before the first round.

        Args:
            params: θ, shape (d,), finite; copied.

        Raises:
            ValueError: ``params`` has another shape or is not finite.
        """
        start = np.array(params, dtype=np.float64)
        if not np.isfinite(start).all():
            raise ValueError("the initial parameters are not finite")
        return ServerState(params=start, slots={name: np.zeros_like(start) for name in self.slot_names})

    @abstractmethod
    def aggregate(self, state: ServerState, mean_update: NDArray[np.float64]) -> ServerState:
        """Return the state after one more round.

        Guarantees, which an algorithm of your own has to keep: the result depends on the hyper-parameters and
        the arguments alone; no argument is changed, and the result shares no writable memory with one.

        Args:
            state: what ``init`` or the round before returned.
            mean_update: the (weighted) mean of the clients' updates, local minus received, shape (d,).

        Raises:
            ValueError: ``mean_update`` has another shape than θ, or is not finite.
            RunFailedError: a number overflowed: the model diverged.
        """

    def _require_range(
        self,
        name: str,
        *,
        above: float | None = None,
        minimum: float | None = None,
        below: float | None = None,
    ) -> None:
        """Raise unless the field ``name`` is finite and within the bounds given."""
        value: float = getattr(self, name)
        if not math.isfinite(value):
            raise ConfigError(_key(name), f"must be finite, got {value}")
        if above is not None and not value > above:
            raise ConfigError(_key(name), f"must be above {above:g}, got {value:g}")
        if minimum is not None and not value >= minimum:
            raise ConfigError(_key(name), f"must be at least {minimum:g}, got {value:g}")
        if below is not None and not value < below:
            raise ConfigError(_key(name), f"must be below {below:g}, got {value:g}")


def check_update(state: ServerState, mean_update: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Return ``mean_update`` as a read-only float64 copy, so that what is kept of it is nobody else's.

    Raises:
        ValueError: it has another shape than θ, or is not finite.

    >>> check_update(ServerState(params=np.zeros(2)), np.array([1.0, np.nan]))
    Traceback (most recent call last):
    ValueError: the mean update is not finite
    """
    delta = np.array(mean_update, dtype=np.float64)
    if delta.shape != state.params.shape:
        raise ValueError(f"the mean update needs shape {state.params.shape}, got {delta.shape}")
    if not np.isfinite(delta).all():
        raise ValueError("the mean update is not finite")
    delta.flags.writeable = False
    return delta


def _read_only(name: str, array: NDArray[np.float64], shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Return a read-only view of a float64 array of this shape."""
    if not isinstance(array, np.ndarray) or array.dtype != np.float64:
        raise ValueError(f"{name} needs to be a float64 array, got {getattr(array, 'dtype', type(array).__name__)}")
    if array.shape != shape:
        raise ValueError(f"{name} needs shape {shape}, got {array.shape}")
    view = array.view()
    view.flags.writeable = False
    return view


def _key(name: str) -> str:
    """Return where the scenario says a hyper-parameter."""
    return f"training.{kebab(name)}" if name == "server_learning_rate" else f"training.options.{kebab(name)}"


def _of_kind(key: str, value: object, kind: type, words: str) -> object:
    """Return ``value`` if it is of ``kind``; an integer does for a float, a bool for neither number."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise ConfigError(key, "must be finite, got a number too large") from None
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ConfigError(key, f"expected {words}, got {value!r}")
    return value
