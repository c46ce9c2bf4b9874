"""A run's state between two rounds, as bytes: what ``--resume`` begins from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fedlearn.algorithms import ServerState
from fedlearn.errors import RunUnreadableError
from fedlearn.files import write_atomic
from fedlearn.privacy.ledger import Event, Head
from fedlearn.privacy.mechanisms import MechanismState

__all__ = ["RunState", "Totals", "load_checkpoint", "save_checkpoint"]

_VERSION = "2"


@dataclass(frozen=True, kw_only=True)
class Totals:
    """What a run has cost so far, over all its resumptions; ``simulated_s`` is what a simulated clock shows."""

    wall_s: float = 0.0
    simulated_s: float = 0.0
    client_updates: int = 0
    upload_bytes: int = 0
    download_bytes: int = 0

    def plus(
        self, *, wall_s: float = 0.0, client_updates: int = 0, upload_bytes: int = 0, download_bytes: int = 0
    ) -> Totals:
        """Return the totals with these added."""
        return replace(
            self,
            wall_s=self.wall_s + wall_s,
            client_updates=self.client_updates + client_updates,
            upload_bytes=self.upload_bytes + upload_bytes,
            download_bytes=self.download_bytes + download_bytes,
        )


@dataclass(frozen=True, kw_only=True)
class RunState:
    """Everything a run needs to go on after a round: the rest is a function of the configuration.

    Attributes:
        server: θ and the server optimiser's own vectors, in float64.
        totals: what it has cost.
        spec_sha256: the hash of the ``ParamSpec`` that θ is of.
        mechanism: what the privacy mechanism keeps between rounds, where there is one.
        last_round: the round in which each client was last invited, where that is enforced.
        ledger: how far the run's ledger goes with ``pending``.
        pending: lines of the ledger that belong to this state and may not be written yet; nothing of the state leaves
            before they are.
        unmeasured: the round's line of metrics so far, where its model is still to be measured by the clients.
    """

    server: ServerState
    totals: Totals
    spec_sha256: str = ""
    mechanism: MechanismState | None = None
    last_round: Mapping[int, int] = field(default_factory=dict)
    ledger: Head = field(default_factory=Head)
    pending: tuple[Event, ...] = ()
    unmeasured: Mapping[str, Any] | None = None

    @property
    def round_number(self) -> int:
        """How many rounds are done."""
        return self.server.round_number


def save_checkpoint(path: Path, state: RunState, config_sha256: str) -> None:
    """Write ``state`` to ``path``: one file, replaced as a whole, for the server's eyes only.

    Under dp-ftrl it holds noise: who has it and the models can subtract it.
    """
    tensors: dict[str, NDArray[Any]] = {"params": state.server.params}
    tensors.update((f"slot.{name}", slot) for name, slot in state.server.slots.items())
    if state.mechanism is not None:
        tensors.update((f"noise.{age}", each) for age, each in enumerate(state.mechanism.history))
    if state.last_round:
        tensors["last-round"] = np.array(sorted(state.last_round.items()), dtype=np.int64)
    metadata = {
        "version": _VERSION,
        "round": str(state.round_number),
        "totals": json.dumps(asdict(state.totals)),
        "config": config_sha256,
        "spec": state.spec_sha256,
        "mechanism": json.dumps(None if state.mechanism is None else [state.mechanism.bound_l2, state.mechanism.rows]),
        "ledger": json.dumps(asdict(state.ledger)),
        "pending": json.dumps([asdict(event) for event in state.pending]),
        "unmeasured": json.dumps(state.unmeasured),
        "tensors": _digest(tensors),
    }
    write_atomic(path, save(tensors, metadata), secret=True)


def _digest(tensors: Mapping[str, NDArray[np.generic]]) -> str:
    """Return a hash over the tensors by name: safetensors has none of its own."""
    hasher = hashlib.sha256()
    for name in sorted(tensors):
        hasher.update(f"{name}:{tensors[name].dtype}:{tensors[name].shape}:".encode())
        hasher.update(np.ascontiguousarray(tensors[name]).tobytes())
    return hasher.hexdigest()


def load_checkpoint(path: Path, config_sha256: str) -> RunState | None:
    """Return the state in ``path``, or ``None`` where no round was finished yet.

    Raises:
        RunUnreadableError: the file is damaged, or belongs to another configuration.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="numpy") as archive:
            metadata: Mapping[str, str] = archive.metadata() or {}
            tensors = {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118
        if metadata["version"] != _VERSION or metadata["config"] != config_sha256:
            raise RunUnreadableError(f"{path} was written by another configuration or version; start a new run")
        if metadata["tensors"] != _digest(tensors):
            raise RunUnreadableError(f"{path} is damaged (its numbers are not those that were saved); start a new run")
        return _state(tensors, metadata)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise RunUnreadableError(f"{path} is damaged ({type(error).__name__}); start a new run") from error


def _state(tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> RunState:
    """Return the state that a checkpoint's arrays and texts describe."""
    slots = {name.removeprefix("slot."): each for name, each in tensors.items() if name.startswith("slot.")}
    params = tensors["params"].astype(np.float64)
    mechanism = json.loads(metadata["mechanism"])
    if mechanism is not None:
        bound_l2, rows = mechanism
        ages = range(sum(name.startswith("noise.") for name in tensors))
        history = tuple(tensors[f"noise.{age}"] for age in ages)
        mechanism = MechanismState(bound_l2=bound_l2, rows=rows, history=history)
    last = tensors.get("last-round")
    return RunState(
        server=ServerState(params=params, slots=slots, round_number=int(metadata["round"])),
        totals=Totals(**json.loads(metadata["totals"])),
        spec_sha256=metadata["spec"],
        mechanism=mechanism,
        last_round={} if last is None else {int(client): int(number) for client, number in last},
        ledger=Head(**json.loads(metadata["ledger"])),
        pending=tuple(Event(**each) for each in json.loads(metadata["pending"])),
        unmeasured=json.loads(metadata["unmeasured"]),
    )
