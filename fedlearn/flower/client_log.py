"""The clients' own log in a simulation: a file in the run's folder, written by every process that trains."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["client_log"]


@contextmanager
def client_log(path: Path) -> Iterator[None]:
    """Send the clients' log to a file while the block lasts: on devices, too, it stays with the client."""
    log = logging.getLogger("fedlearn.client")
    handler = logging.FileHandler(path, delay=True, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    propagate, log.propagate = log.propagate, False
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.propagate = propagate
        handler.close()
