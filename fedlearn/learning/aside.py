"""To try something in a process of its own, for so long and no longer."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import TypeVar

import torch

__all__ = ["AsideError", "aside"]

T = TypeVar("T")


class AsideError(Exception):
    """Nothing came of it; the text says why."""


def aside(work: Callable[[], T], timeout_s: float) -> T:
    """Return what ``work`` returns in a fork of this process, which is left as it was.

    For a user's code that is only tried: it may hang, end the process, or count how often it is called.

    Args:
        work: returns something that can be pickled.
        timeout_s: how long it may take.

    Raises:
        AsideError: it took longer, or the process ended.
    """
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe(duplex=False)
    process = fork.Process(target=_answer, args=(work, there, here), daemon=True)
    process.start()
    there.close()
    try:
        if not here.poll(timeout_s):
            raise AsideError(f"it took longer than {timeout_s:g} s")
        result: T = here.recv()
    except EOFError:
        raise AsideError("its process ended (with simulation.workers = 1 that costs a worker, not the run)") from None
    finally:
        here.close()
        process.kill()
        process.join()
        process.close()
    return result


def _answer(work: Callable[[], object], there: Connection, here: Connection) -> None:
    """Work, answer and end, without what Python does at its end. Runs in the fork."""
    here.close()
    torch.set_num_threads(1)  # the threads of the parent's OpenMP pool do not live on in a fork
    try:
        there.send(work())
    finally:
        os._exit(0)
