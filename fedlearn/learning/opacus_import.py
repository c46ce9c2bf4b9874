"""Opacus, imported where it is used: with the command that installs it, and without what its import does to logging."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from fedlearn.errors import DependencyError

__all__ = ["importing_opacus"]


@contextmanager
def importing_opacus(purpose: str) -> Iterator[None]:
    """Import Opacus inside; ``purpose`` is what needs it.

    Opacus sets the root logger up when it is imported (``logging.basicConfig``), so that what other libraries log would
    suddenly appear on standard error; that is undone.

    Raises:
        DependencyError: it is not installed.
    """
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        yield
    except ModuleNotFoundError as error:
        raise DependencyError("opacus", "example-privacy", purpose) from error
    finally:
        for handler in [each for each in root.handlers if each not in handlers]:
            root.removeHandler(handler)
        root.setLevel(level)
