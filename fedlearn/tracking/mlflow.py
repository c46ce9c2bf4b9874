"""MLflow: one run in a database of the run's own, ``RUN/mlruns/mlflow.db``; no server, and nothing leaves the machine.

To be looked at with ``mlflow ui --backend-store-uri sqlite:///RUN/mlruns/mlflow.db`` of the full ``mlflow`` package.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedlearn.errors import UsageError
from fedlearn.federation.run_folder import RunFolder
from fedlearn.sources import Clock, SystemClock

__all__ = ["MlflowTracker", "open_tracker"]

_SETTINGS = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
"""What keeps MLflow from calling home; whoever has set one otherwise is left alone."""

_LONGEST = 6000


def open_tracker(folder: RunFolder) -> MlflowTracker:
    """Return a tracker into a run's folder."""
    return MlflowTracker(folder, SystemClock())


class MlflowTracker:
    """The one MLflow run of a run's folder, begun or gone on with; its parameters are the configuration.

    Args:
        folder: the run's folder.
        clock: what the numbers are dated by.

    Raises:
        UsageError: the folder's name cannot be part of a database's address.
    """

    def __init__(self, folder: RunFolder, clock: Clock) -> None:
        for name, value in _SETTINGS.items():
            os.environ.setdefault(name, value)
        self._folder, self._clock = folder, clock
        place = (folder.path / "mlruns").resolve()
        if "?" in str(place):
            raise UsageError(
                f"--track mlflow: {place} cannot be a database's address; give the folder a name without ?"
            )
        place.mkdir(exist_ok=True)
        with _quietly():
            from mlflow import MlflowClient

            self._client = MlflowClient(tracking_uri=f"sqlite:///{place / 'mlflow.db'}")
            self._run = self._known_run() or self._new_run(place)
            self._client.update_run(self._run, status="RUNNING")

    def written(self) -> set[tuple[str, int]]:
        """Return which numbers the database has."""
        names = self._client.get_run(self._run).data.metrics
        return {(name, each.step) for name in names for each in self._client.get_metric_history(self._run, name)}

    def write(self, round_number: int, numbers: Mapping[str, float]) -> None:
        """Write one batch, which is one transaction."""
        from mlflow.entities import Metric

        now_ms = int(self._clock.unix_s() * 1000)
        batch = [Metric(name, value, now_ms, round_number) for name, value in numbers.items()]
        self._client.log_batch(self._run, metrics=batch)

    def close(self) -> None:
        """Say how the run ended, and close the database."""
        self._client.set_terminated(self._run, "FINISHED" if self._is_finished() else "KILLED")
        dispose = getattr(self._client._tracking_client.store, "_dispose_engine", None)  # it has no public close
        if dispose is not None:
            dispose()

    def _known_run(self) -> str | None:
        """Return the run of an earlier session, where there is one."""
        experiments = self._client.search_experiments()
        runs = self._client.search_runs([each.experiment_id for each in experiments])
        return str(runs[0].info.run_id) if runs else None

    def _new_run(self, place: Path) -> str:
        """Begin the run."""
        from mlflow.entities import Param

        config = self._folder.config
        experiment = self._client.create_experiment("fedlearn", artifact_location=(place / "artifacts").as_uri())
        run = str(self._client.create_run(experiment, run_name=self._folder.path.resolve().name).info.run_id)
        params = [Param(name, value[:_LONGEST]) for name, value in _flat(json.loads(config.to_json()))]
        self._client.log_batch(run, params=params)
        return run

    def _is_finished(self) -> bool:
        """Return whether every round was run, or all of the budget spent."""
        if not (self._folder.path / "summary.json").exists():
            return False
        summary = self._folder.summary()
        return bool(summary["finished"] or "stopped" in summary["privacy"])


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the keys of a configuration as they are written with ``--set``, and their values.

    >>> list(_flat({"seed": 0, "data": {"alpha": 0.5}}))
    [('seed', '0'), ('data.alpha', '0.5')]
    """
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", str(value)


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep what MLflow says of its own workings, while it makes tables, off the display."""
    log = logging.getLogger("mlflow")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        level = log.level
        try:
            import mlflow.store.db.utils  # noqa: F401  (it sets the level while it is imported)

            log.setLevel(logging.WARNING)
            yield
        finally:
            log.setLevel(level)
