"""What is left of a run when it is done: the model, a picture, a summary."""

from __future__ import annotations

import hashlib
import json
import math
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from safetensors.torch import save

from fedlearn.charts import draw_history
from fedlearn.federation.checkpoint import RunState
from fedlearn.federation.journal import earlier_releases
from fedlearn.federation.run_folder import RunFolder, panels, series
from fedlearn.learning import FlatModel
from fedlearn.privacy.accounting import QUICK, epsilon
from fedlearn.privacy.ledger import Head, read_events, releases_of
from fedlearn.privacy.releases import read_number

__all__ = ["finish", "versions"]

_PACKAGES = ("fedlearn", "flwr", "torch", "numpy")


def finish(folder: RunFolder, model: FlatModel, state: RunState, *, trainer: str | None = None) -> dict[str, Any]:
    """Write ``model.safetensors``, ``history.svg`` and, last, ``summary.json``; return the summary.

    Bytes per client are the sizes of the records exchanged, over the whole run, divided by the clients of the
    federation: what an average client sent and received in all. ``finished`` is false for a run that ended early:
    its last good model is there to be used, and ``--resume`` goes on from it. ``trainer`` is how a simulation trained
    its clients.
    """
    config, totals = folder.config, state.totals
    model.load(state.server.params.astype(model.spec.dtype))
    about = json.dumps({"task": config.task, "rounds": state.round_number}, sort_keys=True)
    data = save(model.state_dict(), {"fedlearn": about})  # one key only: safetensors writes several in random order
    folder.write("model.safetensors", data)
    lines = folder.metrics()
    rounds, columns = series(lines)
    more = panels(lines, secret_cohorts=config.privacy.unit == "client")
    picture = draw_history(rounds, columns, title=f"{config.task}, seed {config.seed}", more=more)
    folder.write("history.svg", picture.encode())
    measured = [line for line in lines if line["metrics"]]
    clients = config.federation.clients
    summary = {
        "task": config.task,
        "rounds": state.round_number,
        "finished": state.round_number == config.federation.rounds,
        "clients": clients,
        "metrics": measured[-1]["metrics"] if measured else {},
        "wall_s": round(totals.wall_s, 3),
        "client_updates_per_s": round(totals.client_updates / totals.wall_s, 1) if totals.wall_s else 0.0,
        "upload_bytes_per_client": totals.upload_bytes // clients,
        "download_bytes_per_client": totals.download_bytes // clients,
        "model_sha256": hashlib.sha256(data).hexdigest(),
        "config_sha256": config.sha256(),
        "seed": config.seed,
        "privacy": _privacy(folder),
        "secagg": {"mode": config.secagg.mode},
        **({} if trainer is None else {"trainer": trainer}),
        "versions": versions(),
    }
    folder.write("summary.json", (json.dumps(summary, indent=2) + "\n").encode())
    return summary


def _privacy(folder: RunFolder) -> dict[str, Any]:
    """Return what was promised and what was spent, as the run's ledger says.

    Under ``example`` every client accounts for itself; the largest epsilon of the simulated clients' own ledgers is
    given, and infinity where there are none to be read.
    """
    privacy = folder.config.privacy
    events = read_events(folder.path / "ledger.jsonl")
    head, last = Head.of(events), events[-1]
    said: dict[str, Any] = {"unit": privacy.unit, "trust": privacy.trust, "epsilon": "inf"}
    if privacy.unit == "client":
        policy = events[0].body
        delta = read_number(policy["delta"])
        releases = [*earlier_releases(folder.config), *releases_of(events)]
        said["delta"] = delta
        said["epsilon"] = _finite_or_inf(epsilon(releases, delta, unit="client"))
        said["noise_multiplier"] = read_number(policy["noise-multiplier"])
    if privacy.unit == "example":
        said.update(_of_clients(folder))
    if privacy.unit != "none":
        said["budget"] = privacy.budget
        said["simulated"] = bool(events[0].body["simulated"])
    if last.kind == "run.close" and last.body["reason"] != "finished":
        said["stopped"] = last.body["reason"]
    return {**said, "ledger": {"lines": head.count, "sha256": head.sha256}}


def _of_clients(folder: RunFolder) -> dict[str, Any]:
    """Return the largest epsilon and delta of the simulated clients' ledgers, how far each goes, their least noise."""
    spent, noises, heads = [], [], dict[str, Any]()
    for path in sorted((folder.path / "clients").glob("*/ledger.jsonl")):
        events = read_events(path)
        head = Head.of(events)
        heads[path.parent.name] = {"lines": head.count, "sha256": head.sha256}
        noises += [read_number(event.body["noise-multiplier"]) for event in events if event.kind == "run.policy"]
        delta = max(read_number(event.body["delta"]) for event in events if event.kind == "run.policy")
        spent.append((epsilon(releases_of(events), delta, unit="example", interval=QUICK), delta))
    if not spent:
        return {}
    return {
        "epsilon": _finite_or_inf(max(each for each, _ in spent)),
        "delta": max(delta for _, delta in spent),
        "noise_multiplier": min(noises),
        "client_ledgers": heads,
    }


def _finite_or_inf(value: float) -> float | str:
    """Return a number as JSON has it; JSON has no infinity."""
    return value if math.isfinite(value) else "inf"


def versions() -> dict[str, str]:
    """Return the versions that a result may depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found
