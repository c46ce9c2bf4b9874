"""Forked processes that answer messages, handed out and collected in the messages' order."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import NamedTuple

from flwr.app import Context, Message, RecordDict

from fedlearn import profiling
from fedlearn.flower.shared import Inbox, Outbox, Returns, size_of_arrays
from fedlearn.profiling import Spent, span
from fedlearn.sources import Clock

__all__ = ["Answer", "Job", "Outcome", "WorkerPool"]

Job = tuple[Message, Context]


class Answer(NamedTuple):
    """A client's reply, what it keeps for its next message, and how long it worked, in seconds.

    ``spent`` is where a worker's time went since its last answer, while that is recorded (``fedlearn.profiling``).
    """

    reply: Message
    state: RecordDict
    took_s: float
    spent: Mapping[str, Spent] | None = None


Work = Callable[[Job], Answer]

_AHEAD = 2
"""How many answers a worker may be ahead of the one that is waited for; bounds memory."""

_GRACE_S = 0.25
"""How long an answer may be on its way. The worker says how long it worked; this is only until it is killed."""


_SHARED_BYTES = 1 << 26
"""Memory that is shared for one array, at least."""


class Outcome(Enum):
    """Why there is no answer."""

    LOST = "the worker process died"
    NO_REPLY = "no reply before the deadline"


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    job: int | None = None
    due: float | None = None  # when it is killed, on the pool's clock; None: never


class WorkerPool:
    """``count`` forked processes. They inherit the app, so nothing of it is pickled; of messages all but arrays is.

    They are forked when there is work for the first time: then it is known how much memory to share with them.

    A worker ends when this process does, however it does: its pipe closes. A worker that dies, or that is killed
    because it works for too long, costs only the message it worked on; another takes its place.

    Args:
        work: what makes an answer of a job; it runs in the workers.
        count: how many workers.
        clock: what the time given to a job is measured with.
    """

    def __init__(self, work: Work, count: int, clock: Clock) -> None:
        self._work = work
        self._clock = clock
        self._fork = multiprocessing.get_context("fork")
        self._workers: list[_Worker] = []
        self._count = count
        self._outbox: Outbox | None = None
        self._returns: list[Returns] = []

    def close(self) -> None:
        """End every worker."""
        for worker in self._workers:
            self._stop(worker)
        self._workers.clear()
        self._count = 0
        for memory in (self._outbox, *self._returns):
            if memory is not None:
                memory.close()

    def map(self, jobs: list[Job], timeout_s: float | None) -> Iterator[Answer | Outcome]:
        """Return the outcome of each job in the jobs' order; while one is waited for, others are worked on ahead.

        The first jobs are handed out now, before the first outcome is asked for.

        Guarantees: a job is given up ``timeout_s`` seconds (and a moment, for an answer on its way) after a worker
        was given it, whatever it does; the others are not touched. At most ``2 * count`` answers are held.

        Raises:
            ValueError: the pool is closed.
        """
        if not self._count:
            raise ValueError("the workers are closed")
        if not jobs:
            return iter(())
        outbox = self._begun(jobs[0])
        self._give_up()
        waiting = deque(range(len(jobs)))
        done: dict[int, Answer | Outcome] = {}
        self._hand_out(jobs, waiting, 0, timeout_s, done, outbox)
        return self._outcomes(jobs, waiting, timeout_s, done, outbox)

    def _outcomes(
        self,
        jobs: list[Job],
        waiting: deque[int],
        timeout_s: float | None,
        done: dict[int, Answer | Outcome],
        outbox: Outbox,
    ) -> Iterator[Answer | Outcome]:
        """Yield each outcome in order, and hand out what is left."""
        following = 0
        try:
            while following < len(jobs):
                self._hand_out(jobs, waiting, following, timeout_s, done, outbox)
                self._collect(done)
                while following in done:
                    yield done.pop(following)
                    following += 1
        finally:
            self._give_up()

    def _give_up(self) -> None:
        """Put a new worker in the place of each that still works on what nobody wants any more."""
        for position, worker in enumerate(self._workers):
            if worker.job is not None:
                self._replace(position)

    def _hand_out(
        self,
        jobs: list[Job],
        waiting: deque[int],
        following: int,
        timeout_s: float | None,
        done: dict[int, Answer | Outcome],
        outbox: Outbox,
    ) -> None:
        """Give the next jobs to idle workers, not too far ahead."""
        for position in range(len(self._workers)):
            idle = self._workers[position].job is None
            if idle and waiting and waiting[0] < following + _AHEAD * len(self._workers):
                index = waiting.popleft()
                with span("messages"):
                    given = self._give(position, jobs[index], outbox)
                if given:
                    worker = self._workers[position]
                    worker.job = index
                    worker.due = None if timeout_s is None else self._clock.monotonic() + timeout_s + _GRACE_S
                else:
                    done[index] = Outcome.LOST

    def _give(self, position: int, job: Job, outbox: Outbox) -> bool:
        """Send a job to a worker; to its successor where it died idle. Return whether one of them took it."""
        for _ in range(2):
            try:
                # Anew for a successor: what was placed for a worker that died may be overwritten.
                self._workers[position].pipe.send_bytes(outbox.dumps(job, position))
            except OSError:
                self._replace(position)
            else:
                return True
        return False

    def _collect(self, done: dict[int, Answer | Outcome]) -> None:
        """Wait until a busy worker answers or is due; take every answer that is there and kill who is due without."""
        busy = {worker.pipe: position for position, worker in enumerate(self._workers) if worker.job is not None}
        if not busy:
            return
        dues = [worker.due for worker in self._workers if worker.job is not None and worker.due is not None]
        now, first = self._clock.monotonic(), min(dues, default=None)
        ready = wait(list(busy), timeout=None if first is None else max(0.0, first - now))
        if not ready and first is not None:
            now = max(now, first)  # the time was waited for, whatever a clock of the tests says
        for pipe in ready:
            self._take(busy[pipe], done)  # type: ignore[index]
        for position, worker in enumerate(self._workers):
            # Due before the look at the pipes: an answer that came in time is never thrown away for having waited.
            if worker.job is not None and worker.due is not None and worker.due <= now:
                done[worker.job] = Outcome.NO_REPLY
                self._replace(position)

    def _take(self, position: int, done: dict[int, Answer | Outcome]) -> None:
        """Take the answer of a worker, or notice that it died: before its answer, or in the middle of it."""
        worker = self._workers[position]
        index, worker.job = worker.job, None
        if index is None:
            return
        try:
            with span("messages"):
                answer: Answer = self._returns[position].loads(worker.pipe.recv_bytes())
        except (EOFError, OSError):
            done[index] = Outcome.LOST
            self._replace(position)
        else:
            done[index] = answer
            if self._outbox is not None:
                self._outbox.read(position)
            profiling.merge(position, answer.spent)

    def _begun(self, job: Job) -> Outbox:
        """Fork the workers, if they are not there yet; return what they are sent messages by."""
        if self._outbox is None:
            size = max(_SHARED_BYTES, 2 * size_of_arrays(job))  # memory that is never touched costs nothing
            self._outbox = Outbox(size)
            self._returns = [Returns(2 * size) for _ in range(self._count)]
            for position in range(self._count):
                self._workers.append(self._start(position, self._outbox))
        return self._outbox

    def _start(self, position: int, outbox: Outbox) -> _Worker:
        """Fork one worker."""
        here, there = self._fork.Pipe()
        inherited = [worker.pipe for worker in self._workers] + [here]
        process = self._fork.Process(
            target=_serve, args=(self._work, there, inherited, outbox.inbox(), self._returns[position]), daemon=True
        )
        process.start()
        there.close()
        return _Worker(process, here)

    def _replace(self, position: int) -> None:
        """Stop one worker and put a new one in its place."""
        self._stop(self._workers[position])
        if self._outbox is not None:
            self._outbox.read(position)
            self._workers[position] = self._start(position, self._outbox)

    def _stop(self, worker: _Worker) -> None:
        """Kill one worker and bury it."""
        worker.pipe.close()
        worker.process.kill()
        worker.process.join()
        worker.process.close()


def _serve(work: Work, pipe: Connection, inherited: list[Connection], inbox: Inbox, returns: Returns) -> None:
    """Answer messages until the pipe closes. Runs in the worker."""
    for other in inherited:
        other.close()  # else the parent's death would close no pipe
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    if "torch" in sys.modules:
        # The threads of the parent's OpenMP pool do not live on in a fork; asking for them would wait for ever.
        sys.modules["torch"].set_num_threads(1)
    profiling.forked()
    while True:
        try:
            received = pipe.recv_bytes()
        except (EOFError, OSError):
            os._exit(0)
        with span("decode"):
            job: Job = inbox.loads(received)
        answer = work(job)
        if profiling.is_on():
            answer = answer._replace(spent=profiling.take())
        with span("encode"):
            answered = returns.dumps(answer)
        with span("send"):
            pipe.send_bytes(answered)
