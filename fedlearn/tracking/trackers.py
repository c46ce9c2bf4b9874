"""Which trackers there are, and whether what they need is installed; asked before anything slow is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec

from fedlearn.errors import DependencyError, UsageError, nearest

__all__ = ["TRACKERS", "check_trackers"]

TRACKERS = {"tensorboard": ("tensorboard",), "mlflow": ("mlflow", "sqlalchemy")}
"""Tracker → the packages it needs; the extra of its name brings them.

Its module, ``fedlearn.tracking.<tracker>``, has a function ``open_tracker``.
"""


def check_trackers(names: Iterable[str]) -> None:
    """Raise unless every tracker is known and its packages are installed.

    Raises:
        UsageError: there is no such tracker.
        DependencyError: a package is missing.
    """
    for name in names:
        if name not in TRACKERS:
            hint = nearest(name, TRACKERS)
            suggestion = f" Did you mean {hint!r}?" if hint else ""
            raise UsageError(f"--track {name}: there is no such tracker.{suggestion} There are {', '.join(TRACKERS)}")
        for package in TRACKERS[name]:
            if find_spec(package) is None:
                raise DependencyError(package, name, f"--track {name}")
