"""``simulate --track``: what a run measures is where people compare runs, once, also after it was stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedlearn.cli.progress import Lines

Result = tuple[int, str, str]
TINY = ("digits-mlp", "--set", "federation.clients=6", "--set", "federation.rounds=3")
HIDING = ("--set", "privacy.unit=client", "--set", "privacy.noise-multiplier=1.0", "--set", "federation.cohort=3")


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return what TensorBoard finds."""
    found = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {tag: [(each.step, each.value) for each in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def rounds_of(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics, without what differs between any two runs."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in ("wall_s", "realised_salt")} for line in lines]


def test_tracked_numbers_are_the_runs_own(fedlearn: Callable[..., Result], tmp_path: Path) -> None:
    code, out, _ = fedlearn("simulate", *TINY, *HIDING, "--track", "tensorboard", "-q", "--out", "mine")
    assert code == 0
    assert "tensorboard --logdir mine/tensorboard" in out
    found, lines = scalars(tmp_path / "mine"), rounds_of(tmp_path / "mine")
    for name in ("accuracy", "loss"):
        assert found[f"metrics/{name}"] == [
            (line["round"], pytest.approx(line["metrics"][name], rel=1e-6)) for line in lines
        ]
    assert found["round/respondents"] == [(line["round"], line["respondents"]) for line in lines]
    (*_, (last, epsilon)) = found["privacy/epsilon"]
    summary = json.loads((tmp_path / "mine" / "summary.json").read_bytes())
    assert last == 3
    assert epsilon == pytest.approx(summary["privacy"]["epsilon"], rel=0.01)
    assert epsilon >= summary["privacy"]["epsilon"] * (1 - 1e-6), "an upper bound"


def test_a_stopped_run_is_tracked_once_and_stays_the_same(
    fedlearn: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fedlearn("simulate", *TINY, "--out", "whole", "-q")[0] == 0

    def stop(self: Lines, line: dict[str, Any]) -> None:
        raise KeyboardInterrupt  # before its tracker, which comes after it, is told of the round

    with monkeypatch.context() as patch:
        patch.setattr(Lines, "finished_round", stop)
        assert fedlearn("simulate", *TINY, "--track", "tensorboard", "--out", "mine")[0] == 130
    for _ in range(2):  # the second finds everything there
        assert fedlearn("simulate", "--resume", "mine", "--track", "tensorboard", "-q")[0] == 0
        found = scalars(tmp_path / "mine")
        assert {tuple(step for step, _ in values) for values in found.values()} == {(1, 2, 3)}
    assert rounds_of(tmp_path / "mine") == rounds_of(tmp_path / "whole"), "watching changes nothing"


def test_a_missing_package_is_said_before_there_is_a_folder(
    fedlearn: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedlearn.tracking.trackers.find_spec", lambda _: None)
    code, _, err = fedlearn("simulate", *TINY, "--track", "mlflow", "--out", "mine")
    assert code == 3
    assert "'.[mlflow]'" in err
    code, _, err = fedlearn("simulate", *TINY, "--track", "mlfow", "--out", "mine")
    assert code == 2
    assert "Did you mean 'mlflow'?" in err
    assert not (tmp_path / "mine").exists()
