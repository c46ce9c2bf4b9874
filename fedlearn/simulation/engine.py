"""The simulation engine: the unmodified ServerApp and ClientApp on a ``LocalGrid``, or on Flower's own runtime."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

from fedlearn.config import RunConfig
from fedlearn.data.loaders import Dealt
from fedlearn.errors import ConfigError, RunUnreadableError
from fedlearn.federation.observer import Observer
from fedlearn.federation.run_folder import RunFolder
from fedlearn.files import write_atomic
from fedlearn.flower.client import build_client_app, prepare_clients
from fedlearn.flower.client_log import client_log
from fedlearn.flower.grid import LocalGrid
from fedlearn.flower.server import build_server_app
from fedlearn.flower.site import Site
from fedlearn.learning.vectorized import Choice
from fedlearn.simulation.devices import SeededDevices
from fedlearn.simulation.faults import SeededFaults
from fedlearn.sources import SeedTree

__all__ = ["simulate"]


log = logging.getLogger("fedlearn.simulation")


def simulate(
    folder: RunFolder, observer: Observer | None = None, say: Callable[[str], None] = log.warning
) -> dict[str, Any]:
    """Run the federation that ``folder`` describes, from its last kept round to the end; return its summary.

    Guarantees: the same configuration gives the same model to the last bit, on every run, after every crash, and
    for any number of workers, as long as no deadline strikes: who is left out by one, and which group is asked client
    by client because it took longer than one client may, is this machine's to say. What the clients log goes to
    ``clients.log`` in the folder.

    Args:
        folder: the run.
        observer: who watches.
        say: is told, before the first round, what a person should know: why clients are not trained many at once.

    Raises:
        FedlearnError: as ``fedlearn.federation.rounds.Federation`` says; rounds that were finished are kept.
    """
    config = folder.config
    if config.simulation.engine == "flower":
        from fedlearn.simulation.flower_engine import simulate_on_flower

        return simulate_on_flower(folder, observer, _node_config(folder))
    site = prepare_clients(config)
    choice = _choice(folder, site)
    if choice.reason:
        say(f"clients are trained one by one: {choice.reason}")
    seeds = SeedTree.root(config.seed).child("faults")
    devices = _devices(config, site, seeds) if config.faults.timed else None
    faults = SeededFaults(
        config.faults,
        seeds,
        clients=config.federation.clients,
        classes=_classes(config, site),
        devices=devices,
    )
    with (
        client_log(folder.path / "clients.log"),
        LocalGrid(
            build_client_app(),
            clients=config.federation.clients,
            workers=config.simulation.workers,
            faults=faults,
            devices=devices,
            node_config=_node_config(folder),
        ) as grid,
    ):
        grid.serve(build_server_app(observer, simulated=True, choice=choice), {"resume": str(folder.path)})
    return folder.summary()


def _choice(folder: RunFolder, site: Site) -> Choice:
    """Return how clients are trained: as the run was begun, whatever this machine would say today."""
    wanted, path = folder.config.simulation.trainer, folder.path / "checkpoint" / "trainer.json"
    if wanted == "sequential":
        return Choice(trainer=None)
    if path.exists():
        try:
            return Choice(trainer=json.loads(path.read_bytes())["trainer"])
        except (ValueError, TypeError, KeyError) as error:
            raise RunUnreadableError(f"{path} is damaged; start a new run") from error
    choice = site.trainer(wanted)
    path.parent.mkdir(exist_ok=True)
    write_atomic(path, (json.dumps({"trainer": choice.trainer}) + "\n").encode())
    return choice


def _devices(config: RunConfig, site: Site, seeds: SeedTree) -> SeededDevices:
    """Return the devices that a run is simulated on."""
    held, spec = site.distribution(), site.model.spec

    def size_of(client: int, purpose: str) -> int:
        if isinstance(held, Dealt):
            parts = held.train if purpose == "train" else held.test
            return len(parts[client]) if parts else 0
        try:
            data = held.client(client)
        except Exception:
            return 0
        return len(data.train) if purpose == "train" else 0 if data.test is None else len(data.test)

    return SeededDevices(
        config.faults,
        seeds.child("devices"),
        training=config.training,
        model_bytes=spec.size * spec.dtype.itemsize,
        deadline_s=config.federation.round_timeout_s,
        size_of=size_of,
        clients=config.federation.clients,
        cohort=config.federation.cohort,
    )


def _classes(config: RunConfig, site: Site) -> int:
    """Return how many classes there are where labels are turned round; 0 where they are not.

    Raises:
        ConfigError: the targets are no classes, so that there is nothing to turn round.
    """
    if not config.faults.byzantine or config.faults.attack != "label-flip":
        return 0
    held = site.distribution()
    labels = (held.pool.train if isinstance(held, Dealt) else held.client(0).train).labels()
    named = len(site.task.label_names)
    if labels is None:
        reason = '"label-flip" needs targets that are classes, one integer an example, and this task has others'
        raise ConfigError("faults.attack", f'{reason}; "sign-flip" and "scale" go with any')
    if not named and not isinstance(held, Dealt):
        reason = '"label-flip" needs to know all classes, and no pool is dealt out here: set label_names in the task'
        raise ConfigError("faults.attack", f'{reason}; "sign-flip" and "scale" go with any')
    return max(named, int(labels.max(initial=0)) + 1)


def _node_config(folder: RunFolder) -> dict[str, str | float]:
    """Return what every simulated device is told by its owner: where its own ledgers are, and what it may spend."""
    privacy = folder.config.privacy
    if privacy.unit != "example":
        return {}
    told: dict[str, str | float] = {"ledger-folder": str(folder.path / "clients")}
    return told if privacy.budget is None else {**told, "max-epsilon": privacy.budget}
