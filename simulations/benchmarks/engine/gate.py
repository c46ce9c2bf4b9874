"""An engine in a process of its own that does one round when it is told to: how several of them take turns.

An engine calls ``begin`` before each round and ``end`` after it; ``begin`` waits until it is this engine's turn. What
is timed lies between the two. An engine is started once, whatever it starts itself, and sits still between its turns.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedlearn.errors import RunFailedError
from simulations.benchmarks.engine.memory import Sampler, end_processes, started_by
from simulations.benchmarks.engine.workloads import Workload

__all__ = ["EngineError", "Gate", "Parameters", "Process", "RecordingGate", "Run"]

Parameters = NDArray[np.float32]
Run = Callable[..., None]
"""What an engine's module calls ``run(workload, rounds, gate, **options)``."""

_QUIET = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""What an engine's process finds in its environment: one thread, and nobody is told about it."""


class EngineError(RunFailedError):
    """An engine failed; the message says how."""


class Gate(Protocol):
    """What an engine goes through before and after each round."""

    def begin(self) -> None:
        """Wait until it is this engine's turn; the round's time begins."""

    def end(self, parameters: Callable[[], Parameters]) -> None:
        """Say that the round is over; ``parameters`` returns the model, shape (d,), and is asked once a run or never.

        It is called out of the round's time.
        """


class RecordingGate:
    """A gate that lets everybody through and keeps the parameters after each round: for tests.

    Attributes:
        models: the parameters after each round.
    """

    reads_every_round = True

    def __init__(self) -> None:
        self.models: list[Parameters] = []

    def begin(self) -> None:
        """Go on at once."""

    def end(self, parameters: Callable[[], Parameters]) -> None:
        """Keep the parameters."""
        self.models.append(parameters())


class _PipeGate:
    """The engine's end of the pipe."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._begun = 0.0
        self._wants_model = False

    def begin(self) -> None:
        """Wait for a word from the other end."""
        self._wants_model = self._pipe.recv()
        self._begun = time.perf_counter()

    def end(self, parameters: Callable[[], Parameters]) -> None:
        """Send how long it took."""
        took_s = time.perf_counter() - self._begun
        self._pipe.send(("round", took_s, parameters() if self._wants_model else None))


class Process:
    """An engine in a process of its own, with all the processes that it starts.

    Args:
        module: where its ``run`` is, below ``simulations.benchmarks.engine``.
        workload: what it does.
        rounds: how many rounds it will be asked for, at most.
        options: more arguments of its ``run``.

    Leave the context, and everything that it has started is gone.
    """

    def __init__(self, module: str, workload: Workload, rounds: int, options: Mapping[str, Any] | None = None) -> None:
        self.name = module
        context = multiprocessing.get_context("spawn")
        self._pipe, far = context.Pipe()
        self._place = Path(tempfile.mkdtemp(prefix="engine-"))  # short: Ray's sockets lie below it
        self._log = self._place / "log.txt"
        path = f"simulations.benchmarks.engine.{module}"
        arguments = (path, workload.to_json(), rounds, dict(options or {}), far, str(self._log))
        # pfl prepares itself in a process of that name alone; to the engine it is its main one
        self._process = context.Process(target=_serve, args=arguments, name="MainProcess")
        with _environment({**_QUIET, "RAY_TMPDIR": str(self._place), "FLWR_HOME": str(self._place)}):
            self._process.start()
        far.close()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """The number of the engine's own process."""
        return self._process.pid or 0

    def round(self) -> float:
        """Let it do one round; return how long that took, in seconds.

        Raises:
            EngineError: it failed.
        """
        return self._round(wants_model=False)[0]

    def model(self) -> Parameters:
        """Let it do one round; return the parameters after it.

        Raises:
            EngineError: it failed.
        """
        model = self._round(wants_model=True)[1]
        if model is None:
            raise EngineError(f"{self.name} sent no parameters")
        return model

    def peak_bytes(self, rounds: int) -> int:
        """Let it do some rounds; return the most memory that it and what it started held, shared pages counted once."""
        with Sampler(self.pid) as sampler:
            for _ in range(rounds):
                self.round()
        return sampler.peak_bytes

    def close(self) -> None:
        """End it and what it has started."""
        begun = {*started_by(self.pid)} if self._process.is_alive() else set()
        self._pipe.close()
        self._process.join(timeout=10)
        end_processes(begun)
        self._process.join(timeout=10)
        shutil.rmtree(self._place, ignore_errors=True)

    def _round(self, *, wants_model: bool) -> tuple[float, Parameters | None]:
        """Exchange two words with it."""
        try:
            self._pipe.send(wants_model)
            kind, *found = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise EngineError(f"{self.name} ended without a word: {self._said()}") from error
        if kind != "round":
            raise EngineError(f"{self.name}: {found[0]}\n{self._said()}")
        return found[0], found[1]

    def _said(self) -> str:
        """Return the end of what it wrote."""
        return self._log.read_text(errors="replace")[-3000:] if self._log.exists() else ""


@contextlib.contextmanager
def _environment(wanted: Mapping[str, str]) -> Any:
    """Have variables in the environment for a while."""
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _serve(path: str, workload: str, rounds: int, options: dict[str, Any], pipe: Connection, log: str) -> None:
    """Be an engine: in its own process, whose words go to a file."""
    with open(log, "ab", buffering=0) as file:  # noqa: PTH123
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import torch

    torch.set_num_threads(1)
    try:
        importlib.import_module(path).run(Workload.from_json(workload), rounds, _PipeGate(pipe), **options)
    except EOFError:  # the other end is gone: nobody wants more rounds
        return
    except BaseException as error:
        traceback.print_exc()
        with contextlib.suppress(OSError):
            pipe.send(("failed", f"{type(error).__name__}: {error}"))
        raise SystemExit(1) from error
