"""The ServerApp: opens the run's folder, drives the rounds on whatever grid Flower gives it, writes what is left."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedlearn.config import RunConfig
from fedlearn.errors import ConfigError, MissingError, RunFailedError
from fedlearn.federation.observer import Observer, SilentObserver
from fedlearn.federation.rounds import Federation
from fedlearn.federation.run_folder import RunFolder
from fedlearn.federation.session import ServerIdentity
from fedlearn.federation.summary import finish
from fedlearn.files import data_home
from fedlearn.flower.grid import LocalGrid
from fedlearn.flower.network import GridNetwork, is_simulation_runtime
from fedlearn.learning.vectorized import Choice
from fedlearn.privacy.noise import Noise, SecureNoise, SimulatedNoise
from fedlearn.scenario import read_scenario
from fedlearn.secagg.allow_list import AllowList
from fedlearn.secagg.keys import SigningKey
from fedlearn.secagg.simulated import SimulatedIdentities
from fedlearn.sources import Clock, SecureRandom, SeedTree, SystemClock
from fedlearn.tasks import load_task

__all__ = ["build_server_app"]


def build_server_app(
    observer: Observer | None = None,
    clock: Clock | None = None,
    *,
    simulated: bool = False,
    choice: Choice | None = None,
) -> ServerApp:
    """Return the ServerApp.

    Noise and secret draws come from the operating system, so that nobody can draw them again; only a simulation, here
    (``simulated``) or on Flower's simulation runtime, takes them from the run's seed, and its ledger says so.
    ``choice`` says how a ``LocalGrid`` trains many clients at once; left out: one by one.

    Its run config says which run: ``resume`` (the folder of a run that exists), or ``scenario`` (a TOML file),
    ``set`` (overrides, separated by ``;``) and ``out`` (the new run's folder, as an absolute path). Under secure
    aggregation on devices it also says who the server is: ``server-key`` (its key's file), ``allow-list`` (the list of
    devices) and ``registry-key`` (the public key of who signed the list). A simulation makes all of them.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        folder = _open_folder(context)
        simulation = grid if isinstance(grid, LocalGrid) else None
        if simulation is None:
            _refuse_faults(folder.config)
        trainer = None if choice is None else choice.name
        time, seeded = clock or SystemClock(), simulated or is_simulation_runtime(grid)
        with folder.lock(), _identity(folder.config, context, simulated=seeded) as identity:
            federation = Federation(
                folder.config,
                load_task(folder.config.task),
                GridNetwork(
                    grid,
                    time,
                    clients=folder.config.federation.clients,
                    local=simulation if simulated else None,
                    trainer=None if choice is None else choice.trainer,
                ),
                folder,
                clock=time,
                observer=observer or SilentObserver(),
                noise=_noise(folder.config, seeded=seeded),
                identity=identity,
                simulated_clock=None if simulation is None else simulation.simulated_clock,
                keeps_late=simulation is not None and simulated,
            )
            try:
                state = federation.run()
            except RunFailedError:
                kept = folder.load_state()
                if kept is not None and federation.journal.holds(kept):
                    finish(folder, federation.model, kept, trainer=trainer)  # the last good model is there to be used
                raise
            finish(folder, federation.model, state, trainer=trainer)

    return app


@contextmanager
def _identity(config: RunConfig, context: Context, *, simulated: bool) -> Iterator[ServerIdentity | None]:
    """Yield who the server is, where updates are masked; the keys of a simulation are deleted at its end.

    Raises:
        ConfigError: ``ideal`` is asked for outside a simulation, or a key's name is no key.
        MissingError: a file is not there, or the registry did not sign the list.
    """
    if config.secagg.mode == "ideal" and not simulated:
        raise ConfigError("secagg.mode", '"ideal" masks nothing and is for simulations; set "active"')
    if not config.secagg.masks:
        yield None
    elif not simulated:
        yield _real_identity(context.run_config)
    else:
        with SimulatedIdentities.for_a_run(SecureRandom()) as identities:
            allow_list = identities.allow_list(config.federation.clients)
            yield ServerIdentity(key=identities.server, allow_list=allow_list, simulated=identities)


def _real_identity(options: Mapping[str, Any]) -> ServerIdentity:
    """Return who the server is, as the run config says."""
    missing = [name for name in ("server-key", "allow-list", "registry-key") if not options.get(name)]
    if missing:
        reason = f"devices that mask need {', '.join(missing)} in the run config; see `fedlearn secagg --help`"
        raise MissingError(f"secagg.mode: {reason}")
    try:
        registry = bytes.fromhex(str(options["registry-key"]))
    except ValueError as error:
        raise ConfigError("registry-key", "must be 64 hexadecimal digits") from error
    return ServerIdentity(
        key=SigningKey.read(Path(str(options["server-key"])).expanduser()),
        allow_list=AllowList.read(Path(str(options["allow-list"])).expanduser(), registry),
    )


def _noise(config: RunConfig, *, seeded: bool) -> Noise:
    """Return where the run's noise comes from."""
    if seeded:
        return SimulatedNoise(SeedTree.root(config.seed).child("privacy"))
    return SecureNoise(SecureRandom())


def _open_folder(context: Context) -> RunFolder:
    """Return the run's folder: one that exists, or a new one."""
    options: Mapping[str, Any] = context.run_config
    if options.get("resume"):
        return RunFolder.open(Path(str(options["resume"])).expanduser())
    config = _config(options)
    _refuse_faults(config)
    out = Path(str(options.get("out") or data_home() / "runs" / f"flower-{context.run_id}")).expanduser()
    if not out.is_absolute():  # what it would be relative to is where Flower's SuperLink was once started
        raise ConfigError("out", f"must be an absolute path, not {out}: Flower's runtime works in another folder")
    return RunFolder.create(out, config)


def _refuse_faults(config: RunConfig) -> None:
    """Raise where something is to break, or to take simulated time, that only a ``LocalGrid`` can break."""
    if config.faults.asked:
        reason = "only `fedlearn simulate` breaks things on purpose; leave it out here"
        raise ConfigError(f"faults.{config.faults.asked[0]}", reason)


def _config(options: Mapping[str, Any]) -> RunConfig:
    """Return the configuration that Flower's run config names."""
    scenario = str(options.get("scenario") or "")
    overrides = [part.strip() for part in str(options.get("set") or "").split(";") if part.strip()]
    return read_scenario(_scenario(scenario) if scenario else None, overrides)


def _scenario(name: str) -> str:
    """Return a scenario's path or a task; a file that is not here is looked for where Flower unpacks a bundle."""
    bundled = Path(__file__).resolve().parents[2] / name
    return str(bundled) if not Path(name).exists() and bundled.is_file() else name
