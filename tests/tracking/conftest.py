"""A run's folder with rounds in it, without a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedlearn.config import RunConfig
from fedlearn.federation.run_folder import RunFolder


def _line(number: int, **more: Any) -> dict[str, Any]:
    """Return a line of ``metrics.jsonl``."""
    return {
        "round": number,
        "attempt": 1,
        "cohort": 4,
        "respondents": 3,
        "realised_salt": "00",
        "failures": {"2": "no-reply"},
        "train_loss": None,
        "wall_s": 0.5,
        "upload_bytes": 1000,
        "download_bytes": 2000,
        "metrics": {"accuracy": number / 10, "f1 (macro)": 0.5},
        **more,
    }


def _keep(folder: RunFolder, *numbers: int) -> list[dict[str, Any]]:
    """Add rounds to a folder's metrics, as a run does before it tells who watches; return them."""
    lines = [_line(number) for number in numbers]
    with (folder.path / "metrics.jsonl").open("a") as handle:
        handle.writelines(json.dumps(each) + "\n" for each in lines)
    return lines


@pytest.fixture
def keep() -> Callable[..., list[dict[str, Any]]]:
    """A function that adds rounds to a folder's metrics, as a run does before it tells who watches."""
    return _keep


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """The folder of a run of which nothing was run."""
    return RunFolder.create(tmp_path / "my run", RunConfig())
