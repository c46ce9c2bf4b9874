"""What tests of secure aggregation share: this folder's own modules, and sparse graphs small enough to be fast."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fedlearn.secagg import graph

sys.path.insert(0, str(Path(__file__).parent))  # ``cohort`` and ``linear_complexity``, which are no tests


@pytest.fixture
def sparse_from_nine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every cohort of more than eight have a sparse graph, as one of more than 128 has."""
    monkeypatch.setattr(graph, "COMPLETE_UP_TO", 8)
