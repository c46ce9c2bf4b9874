"""The simulation engine: the unmodified ServerApp and ClientApp on a ``LocalGrid``."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fedlearn.federation.observer import Observer
from fedlearn.federation.run_folder import RunFolder
from fedlearn.flower.client import build_client_app, prepare_clients
from fedlearn.flower.grid import LocalGrid
from fedlearn.flower.server import build_server_app
from fedlearn.simulation.faults import SeededFaults
from fedlearn.sources import SeedTree

__all__ = ["simulate"]


def simulate(folder: RunFolder, observer: Observer | None = None) -> dict[str, Any]:
    """Run the federation that ``folder`` describes, from its last kept round to the end; return its summary.

    Guarantees: the same configuration gives the same model to the last bit, on every run, after every crash, and
    for any number of workers. What the clients log goes to ``clients.log`` in the folder.

    Raises:
        FedlearnError: as ``fedlearn.federation.rounds.Federation`` says; rounds that were finished are kept.
    """
    config = folder.config
    faults = SeededFaults(config.faults, SeedTree.root(config.seed).child("faults"))
    prepare_clients(config)
    with (
        _client_log(folder),
        LocalGrid(
            build_client_app(),
            clients=config.federation.clients,
            workers=config.simulation.workers,
            faults=faults,
            node_config=_node_config(folder),
        ) as grid,
    ):
        grid.serve(build_server_app(observer, simulated=True), {"resume": str(folder.path)})
    return folder.summary()


def _node_config(folder: RunFolder) -> dict[str, str | float]:
    """Return what every simulated device is told by its owner: where its own ledgers are, and what it may spend."""
    privacy = folder.config.privacy
    if privacy.unit != "example":
        return {}
    told: dict[str, str | float] = {"ledger-folder": str(folder.path / "clients")}
    return told if privacy.budget is None else {**told, "max-epsilon": privacy.budget}


@contextmanager
def _client_log(folder: RunFolder) -> Iterator[None]:
    """Send the clients' log to a file: on devices, too, it stays with the client."""
    log = logging.getLogger("fedlearn.client")
    handler = logging.FileHandler(folder.path / "clients.log", delay=True, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    propagate, log.propagate = log.propagate, False
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.propagate = propagate
        handler.close()
