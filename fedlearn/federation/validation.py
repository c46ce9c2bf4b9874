"""Who measures the model, on what, and what was found: at the server, at the clients, or both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedlearn.config import RunConfig
from fedlearn.errors import ConfigError
from fedlearn.federation.checkpoint import Totals
from fedlearn.federation.messages import EvaluateReply, Failure
from fedlearn.learning import Examples, Task, computing
from fedlearn.learning.task import task_code
from fedlearn.privacy.releases import Release
from fedlearn.sources import SeedTree

__all__ = ["Validation", "asks_clients", "central_test", "client_means", "is_measured"]


@dataclass(frozen=True, kw_only=True)
class Validation:
    """What was measured of a model.

    Attributes:
        metrics: the headline: central where there is a test set, else the clients'.
        totals: the run's totals with what measuring cost.
        federated_metrics: the clients', where both were asked for.
        failures: the clients that could not say.
        release: what the ledger says of it, where clients are hidden and measured it.
    """

    metrics: Mapping[str, float]
    totals: Totals
    federated_metrics: Mapping[str, float] = field(default_factory=dict)
    failures: Mapping[int, Failure] = field(default_factory=dict)
    release: Release | None = None


def central_test(task: Task, config: RunConfig) -> Examples | None:
    """Return the central test set, or ``None`` where it is not wanted or does not exist.

    Raises:
        ConfigError: it is asked for and the task has none.
        DataError: it cannot be read.
        TaskError: the task's ``load_test`` raised.
    """
    wanted, path = config.federation.evaluation, config.data.path
    if wanted in ("off", "federated"):
        return None
    with task_code(task, "load_test"), computing(SeedTree.root(config.seed).child("load_test")):
        test = task.load_test(Path(path) if path is not None else None)
    if test is None and wanted in ("central", "both"):
        raise ConfigError("federation.evaluation", f'"{wanted}" needs a central test set; this task has none')
    return test


def asks_clients(config: RunConfig, test: Examples | None) -> bool:
    """Return whether clients validate: where they are asked to, or where nobody else could.

    Where privacy is promised they are not asked unless the scenario says so: what they measure is a release.
    """
    wanted = config.federation.evaluation
    if config.privacy.unit != "none":
        return wanted in ("federated", "both")
    seen = config.secagg.mode == "off"  # else the server sees sums alone, and what one client measures is none
    return wanted in ("federated", "both") or (wanted == "auto" and test is None and seen)


def client_means(replies: Sequence[EvaluateReply]) -> dict[str, float]:
    """Return each metric's mean over all examples, and over each client's mean (``…_client_mean``)."""
    sums: dict[str, list[tuple[float, int]]] = {}
    for reply in replies:
        for name, value in reply.sums.items():
            sums.setdefault(name, []).append((value, reply.num_examples))
    means = {name: sum(v for v, _ in each) / sum(n for _, n in each) for name, each in sums.items()}
    means.update((f"{name}_client_mean", sum(v / n for v, n in each) / len(each)) for name, each in sums.items())
    return means


def is_measured(config: RunConfig, number: int) -> bool:
    """Return whether the model is measured after round ``number``: after every so many, and after the last."""
    federation = config.federation
    return number % federation.evaluate_every == 0 or number == federation.rounds
