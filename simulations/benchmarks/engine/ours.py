"""Our engine, the whole of it: apps, messages, checkpoint, ledger, on one machine."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedlearn.federation.checkpoint import load_checkpoint
from fedlearn.federation.observer import SilentObserver
from fedlearn.federation.run_folder import RunFolder
from fedlearn.simulation.engine import simulate
from simulations.benchmarks.engine.gate import Gate, Parameters
from simulations.benchmarks.engine.workloads import Workload

__all__ = ["run"]


class _Watch(SilentObserver):
    """Goes through the gate after each round, and before the next."""

    def __init__(self, folder: RunFolder, workload: Workload, gate: Gate) -> None:
        self._folder, self._workload, self._gate = folder, workload, gate
        # As the command line watches; the first round, which is compared, is kept at once all the same.
        self.reads_folder = getattr(gate, "reads_every_round", False)

    def finished_round(self, line: Mapping[str, Any]) -> None:
        """Say that the round is over and wait for the next; one in which a client is missing does not count."""
        if line["respondents"] != self._workload.clients:
            raise RuntimeError(f"{line['respondents']} of {self._workload.clients} clients answered: {line}")
        self._gate.end(self._parameters)
        if line["round"] < self._folder.config.federation.rounds:
            self._gate.begin()

    def _parameters(self) -> Parameters:
        """Return the parameters that were kept."""
        state = load_checkpoint(self._folder.path / "checkpoint" / "state.safetensors", self._folder.config.sha256())
        if state is None:
            raise RuntimeError("the round left no checkpoint")
        return state.server.params.astype(np.float32)


def run(workload: Workload, rounds: int, gate: Gate, *, workers: int = 0) -> None:
    """Simulate so many rounds, each when the gate opens; what comes before the first is a part of that."""
    with tempfile.TemporaryDirectory(prefix="fedlearn-") as place:
        folder = RunFolder.create(Path(place) / "run", workload.config(rounds=rounds, workers=workers))
        gate.begin()
        simulate(folder, _Watch(folder, workload, gate))
