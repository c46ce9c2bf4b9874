"""Where one machine ends: the same federation on Flower's own simulation runtime, on Ray."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedlearn.config import RunConfig
from fedlearn.errors import ConfigError
from fedlearn.federation.observer import Observer
from fedlearn.federation.run_folder import RunFolder
from fedlearn.flower.client import prepare_clients
from fedlearn.flower.runtime import FlowerRuntime
from fedlearn.flower.server import build_server_app

__all__ = ["simulate_on_flower"]


def simulate_on_flower(
    folder: RunFolder, observer: Observer | None, node_config: Mapping[str, str | float]
) -> dict[str, Any]:
    """Run the federation that ``folder`` describes on Flower's simulation runtime; return its summary.

    Guarantees: clients answer one by one here, with the same bytes as on the local engine one by one
    (``simulation.trainer = "sequential"``); where that trains clients in groups, to the tolerance of its trainers.
    As there, ``federation.round-timeout-s`` counts from when a client starts to work, and a client that hangs in Python
    code is interrupted. One that hangs in a single long call into C keeps its actor until the run ends, and its message
    is given up after ten times as long.

    Args:
        folder: the run.
        observer: who watches.
        node_config: what every client is told by its owner.

    Raises:
        DependencyError: Ray is not installed.
        ConfigError: the run needs what several machines do not share.
        FedlearnError: as on the local engine.
    """
    config = folder.config
    prepare_clients(config)
    with FlowerRuntime(
        clients=config.federation.clients,
        workers=config.simulation.workers,
        node_config=node_config,
        log_file=folder.path.absolute() / "clients.log",
    ) as runtime:
        if runtime.machines > 1:
            _check_spread(config)
        runtime.serve(build_server_app(observer, simulated=True), {"resume": str(folder.path)})
    return folder.summary()


def _check_spread(config: RunConfig) -> None:
    """Refuse what clients keep in files of one machine: on another, the next round would not find it."""
    kept = "is simulated on one machine: every client keeps"
    if config.privacy.unit == "example":
        reason = f'"example" {kept} a ledger of its own in a file. Unset RAY_ADDRESS'
        raise ConfigError("privacy.unit", reason)
    if config.secagg.masks:
        raise ConfigError("secagg.mode", f'"{config.secagg.mode}" {kept} its keys in a file. Unset RAY_ADDRESS')
