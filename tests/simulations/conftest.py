"""The scripts of ``simulations/`` as modules, the way ``python -m`` finds them from the root of the repository."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SHARED_DATA = ROOT.parent / "shared" / "data"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Return a function that imports ``simulations.<name>``."""
    monkeypatch.syspath_prepend(ROOT)

    def load(name: str) -> ModuleType:
        return importlib.import_module(f"simulations.{name}")

    return load


@pytest.fixture
def heart_disease() -> Path:
    """Return the folder of the heart-disease data."""
    return _needed("heart-disease")


@pytest.fixture
def mnist() -> Path:
    """Return the folder of MNIST."""
    return _needed("mnist")


def _needed(name: str) -> Path:
    """Return a folder of the shared data, or skip the test."""
    folder = SHARED_DATA / name
    if not folder.is_dir():
        pytest.skip(f"the data is not in the repository, and there is no folder {folder}")
    return folder
