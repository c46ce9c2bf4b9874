"""Peers are imported when they are needed, and one that is missing is told with the command that installs it."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import Any

from fedlearn.errors import MissingError
from fedlearn.learning.opacus_import import importing_opacus

__all__ = ["check", "opacus"]

_INSTALL = {
    "opacus": "pip install 'fedlearn[example-privacy]'",
    "ray": "pip install 'fedlearn[ray]'",
    # pfl 0.6 asks for dp-accounting below 0.6, and our accounting for a newer one; what runs here needs neither
    "pfl": "pip install 'multiprocess==0.70.*' 'prv-accountant==0.2.*' && pip install --no-deps 'pfl==0.6.*'",
}


def check(*names: str) -> None:
    """Raise unless these peers are there.

    Raises:
        MissingError: with the commands that install those that are not.
    """
    if missing := [name for name in names if find_spec(name) is None]:
        commands = "; ".join(_INSTALL[name] for name in missing)
        raise MissingError(f"the benchmark runs beside {', '.join(missing)}, not installed here: {commands}")


def opacus(name: str) -> Any:
    """Return one of Opacus' classes by its dotted name."""
    check("opacus")
    module, _, attribute = name.rpartition(".")
    with importing_opacus("the benchmark's loop with DP-SGD"):
        return getattr(importlib.import_module(module), attribute)
