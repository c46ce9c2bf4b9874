"""Importing Opacus changes nothing else, and says how to get it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fedlearn.errors import DependencyError
from fedlearn.learning.opacus_import import importing_opacus

SCRIPT = """
import logging
from fedlearn.learning.opacus_import import importing_opacus
before = (list(logging.getLogger().handlers), logging.getLogger().level)
with importing_opacus("this"):
    import opacus
assert (list(logging.getLogger().handlers), logging.getLogger().level) == before
"""


def test_the_root_logger_is_as_it_was() -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-c", SCRIPT], check=True, timeout=60)


def test_without_it_the_error_names_the_extra() -> None:
    refused = pytest.raises(DependencyError, match=r"needs the package 'opacus'.*example-privacy")
    with refused, importing_opacus("privacy"):
        raise ModuleNotFoundError("No module named 'opacus'")
