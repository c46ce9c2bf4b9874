"""Forked processes that answer messages, handed out and collected in the messages' order."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from flwr.app import Context, Message, RecordDict

from fedlearn.sources import Clock

__all__ = ["Outcome", "WorkerPool"]

Job = tuple[Message, Context]
Answer = tuple[Message, RecordDict]
Work = Callable[[Job], Answer]

_AHEAD = 2
"""How many answers a worker may be ahead of the one that is waited for; bounds memory."""


class Outcome(Enum):
    """Why there is no answer."""

    LOST = "the worker process died"
    NO_REPLY = "no reply before the deadline"


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    job: int | None = None


class WorkerPool:
    """``count`` forked processes. They inherit the app, so nothing of it is pickled; messages are.

    A worker ends when this process does, however it does: its pipe closes. A worker that dies costs only the
    message it worked on; another takes its place.
    """

    def __init__(self, work: Work, count: int) -> None:
        self._work = work
        self._fork = multiprocessing.get_context("fork")
        self._workers: list[_Worker] = []
        for _ in range(count):
            self._workers.append(self._start())

    def close(self) -> None:
        """End every worker."""
        for worker in self._workers:
            self._stop(worker)
        self._workers.clear()

    def map(self, jobs: list[Job], deadline: float | None, clock: Clock) -> Iterator[Answer | Outcome]:
        """Yield the outcome of each job in the jobs' order; none later than ``deadline`` on ``clock``."""
        waiting = deque(range(len(jobs)))
        done: dict[int, Answer | Outcome] = {}
        following = 0
        try:
            while following < len(jobs):
                self._hand_out(jobs, waiting, following, done)
                left_s = None if deadline is None else max(0.0, deadline - clock.monotonic())
                self._collect(done, left_s)
                if left_s == 0.0:
                    for index in range(following, len(jobs)):
                        yield done.get(index, Outcome.NO_REPLY)
                    return
                while following in done:
                    yield done.pop(following)
                    following += 1
        finally:
            for position, worker in enumerate(self._workers):
                if worker.job is not None:  # past its deadline, or nobody wants the answer any more
                    self._replace(position)

    def _hand_out(
        self, jobs: list[Job], waiting: deque[int], following: int, done: dict[int, Answer | Outcome]
    ) -> None:
        """Give the next jobs to idle workers, not too far ahead."""
        for position in range(len(self._workers)):
            idle = self._workers[position].job is None
            if idle and waiting and waiting[0] < following + _AHEAD * len(self._workers):
                index = waiting.popleft()
                if not self._give(position, index, pickle.dumps(jobs[index], pickle.HIGHEST_PROTOCOL)):
                    done[index] = Outcome.LOST

    def _give(self, position: int, index: int, job: bytes) -> bool:
        """Send a job to a worker; to its successor where it died idle. Return whether one of them took it."""
        for _ in range(2):
            worker = self._workers[position]
            try:
                worker.pipe.send_bytes(job)
            except OSError:
                self._replace(position)
            else:
                worker.job = index
                return True
        return False

    def _collect(self, done: dict[int, Answer | Outcome], left_s: float | None) -> None:
        """Wait for at least one busy worker if there is one, or until no time is left, and take what is there."""
        busy = {worker.pipe: position for position, worker in enumerate(self._workers) if worker.job is not None}
        if not busy:
            return
        for pipe in wait(list(busy), timeout=left_s):
            position = busy[pipe]  # type: ignore[index]
            worker = self._workers[position]
            index, worker.job = worker.job, None
            if index is None:
                continue
            try:
                done[index] = pickle.loads(worker.pipe.recv_bytes())  # noqa: S301 (our own fork wrote it)
            except (EOFError, OSError):  # it died: before its answer, or in the middle of it
                done[index] = Outcome.LOST
                self._replace(position)

    def _start(self) -> _Worker:
        """Fork one worker."""
        here, there = self._fork.Pipe()
        inherited = [worker.pipe for worker in self._workers] + [here]
        process = self._fork.Process(target=_serve, args=(self._work, there, inherited), daemon=True)
        process.start()
        there.close()
        return _Worker(process, here)

    def _replace(self, position: int) -> None:
        """Stop one worker and put a new one in its place."""
        self._stop(self._workers[position])
        self._workers[position] = self._start()

    def _stop(self, worker: _Worker) -> None:
        """Kill one worker and bury it."""
        worker.pipe.close()
        worker.process.kill()
        worker.process.join()
        worker.process.close()


def _serve(work: Work, pipe: Connection, inherited: list[Connection]) -> None:
    """Answer messages until the pipe closes. Runs in the worker."""
    for other in inherited:
        other.close()  # else the parent's death would close no pipe
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    if "torch" in sys.modules:
        # The threads of the parent's OpenMP pool do not live on in a fork; asking for them would wait for ever.
        sys.modules["torch"].set_num_threads(1)
    while True:
        try:
            job: Any = pickle.loads(pipe.recv_bytes())  # noqa: S301 (the parent wrote it)
        except (EOFError, OSError):
            os._exit(0)
        pipe.send_bytes(pickle.dumps(work(job), pickle.HIGHEST_PROTOCOL))
