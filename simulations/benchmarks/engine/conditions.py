"""Under what conditions something was measured: written beside every figure."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = ["conditions"]

_PACKAGES = ("torch", "flwr", "ray", "pfl", "opacus", "numpy")


def conditions() -> dict[str, Any]:
    """Return the processor, how many processes wanted it in the last minute, and the versions of what was measured."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load_1min": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": {name: found for name in _PACKAGES if (found := _version(name)) is not None},
    }


def _processor() -> str:
    """Return the processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _version(name: str) -> str | None:
    """Return a package's version, or ``None`` where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None
