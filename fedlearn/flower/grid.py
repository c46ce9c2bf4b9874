"""``LocalGrid``: Flower's ``Grid`` in this process, the twin of the network that ships.

It runs the unmodified ServerApp and ClientApp, as Flower's simulation runtime does, without Ray and without a
message store. Replies stream in the order of the messages, one at a time, so that memory does not grow with the
cohort and a sum over them has the same bytes on every run and for any number of workers.
"""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import FrameType
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict, UserConfig
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedlearn.flower.faults import GROUP_KIND, NEVER_ARRIVES, Devices, Fate, Faults, NoFaults, SimulatedClock
from fedlearn.flower.tampering import payload_bytes, tampered
from fedlearn.flower.workers import Answer, Job, Outcome, WorkerPool
from fedlearn.profiling import span
from fedlearn.sources import Clock, SystemClock

__all__ = ["Faults", "LocalGrid", "NoFaults"]

_RUN_ID = 1

_AGAIN_S = 1.0
"""How long after its deadline a client in this process that went on all the same is interrupted again."""

_LONGEST_S = 1e6
"""The longest deadline, eleven days: the system's timers take no more than 24."""


class LocalGrid(Grid):
    """A grid of virtual nodes 1 … n; node i holds partition i − 1.

    Args:
        client_app: what answers the messages.
        clients: how many nodes.
        workers: 0 to answer in this process, N for as many forked processes (never more than there are clients).
        faults: what goes wrong with messages and replies, on purpose.
        clock: what deadlines are measured with.
        node_config: what every node is configured with, beside its partition.
        devices: how long clients take on a simulated clock, and who is there; left out: all are, and take no time.

    Memory does not grow with the number of clients: all that is kept of one is what it keeps itself, if anything.

    A client that raises becomes an error reply of Flower's own kind, with the type of the exception and not its
    text.

    Time is each client's own, as on devices, which all work at once: a message's deadline is counted from when
    its client starts to work on it, however long it queued here for others. So a client that hangs costs itself
    alone: it is stopped, its message gets Flower's "no reply" error, as does an answer that comes too late, and
    who is left out does not depend on the order or on the number of workers. (A second is one of this machine's:
    where more workers than cores share it, every client takes longer.) In the worst case, when every client hangs,
    n messages take ``n * timeout / max(workers, 1)`` seconds, rounded up to whole clients and with a fraction of a
    second each for replacing the worker.

    With workers the stop is hard: the process is killed. In this process it is an exception, raised by a signal:
    one long call into C (a torch operation) is interrupted only when it returns, a client that swallows
    ``BaseException`` again and again is not stopped, and outside the main thread no client is. What does not trust
    its clients takes ``workers=1``.

    Simulated time is another one: it passes by what ``devices`` says, and nobody waits for it. The messages of one kind
    and group are sent at one instant of it, and it moves on to when the slowest reply is there, or to the deadline
    where a reply is missing. A reply that would be there later than the deadline gets Flower's "no reply" error, and
    its client, which trained in vain, keeps what it kept. That a process died is known at once.
    """

    def __init__(
        self,
        client_app: ClientApp,
        *,
        clients: int,
        workers: int = 0,
        faults: Faults | None = None,
        clock: Clock | None = None,
        node_config: Mapping[str, str | float] | None = None,
        devices: Devices | None = None,
    ) -> None:
        self._client_app = client_app
        self._node_config = dict(node_config or {})
        self._clients = clients
        self._faults: Faults = faults or NoFaults()
        self._devices = devices
        self._phase, self._begun_s = ("", ""), 0.0  # which messages are on their way, and since when, in simulated time
        self._process = os.getpid()
        self._clock = clock or SystemClock()
        self._run = Run.create_empty(_RUN_ID)
        self._ids = itertools.count(1)
        self._pushed: dict[str, Message] = {}
        self._states: dict[int, RecordDict] = {}
        count = min(workers, clients)
        self._pool = WorkerPool(self._work, count, self._clock) if count else None
        self._identify_server()

    def close(self) -> None:
        """Stop the workers."""
        if self._pool is not None:
            self._pool.close()

    def __enter__(self) -> LocalGrid:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def serve(self, server_app: ServerApp, run_config: UserConfig) -> None:
        """Run a ServerApp on this grid to its end, as ``flwr run`` would with that run config."""
        state = RecordDict()
        context = Context(run_id=self._run.run_id, node_id=0, node_config={}, state=state, run_config=run_config)
        server_app(self, context)

    # -- beside Flower's grid: what the server may know of a simulation without asking every client ----------------

    @property
    def simulated_clock(self) -> SimulatedClock | None:
        """The simulated clock, where clients take simulated time."""
        return None if self._devices is None else self._devices.clock

    def node_of(self, client: int) -> int:
        """Return the node that a client is.

        Raises:
            ValueError: there is no such client.
        """
        self._check(client + 1)
        return client + 1

    def present(self) -> Sequence[int]:
        """Return the clients that are there, ascending: a range where all are, however many.

        Raises:
            TooFewClientsError: by the devices' daily rhythm there are too few at every hour.
        """
        return range(self._clients) if self._devices is None else self._devices.present()

    def touches(self, group: str, client: int, kind: str) -> bool:
        """Return whether anything but the ordinary happens to a message, so that it has to be one client's own."""
        return self._faults.touches(group, client, kind)

    def node_config_of(self, client: int) -> dict[str, str | float]:
        """Return the node configuration of a client."""
        return {
            **self._node_config,
            **self._faults.told(client),
            "partition-id": client,
            "num-partitions": self._clients,
        }

    # -- flwr.serverapp.Grid -----------------------------------------------------------------------------------

    def set_run(self, run: Run) -> None:
        """Set the run that messages belong to."""
        self._run = run
        self._identify_server()

    @property
    def run(self) -> Run:
        """The run that messages belong to."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Return a new message of this run."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return 1 … n, or those that are there at this simulated hour.

        Raises:
            TooFewClientsError: as ``present``.
        """
        if self._devices is None:
            return range(1, self._clients + 1)
        return [client + 1 for client in self._devices.present()]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Keep the messages; they are answered when they are pulled."""
        posted = self._post(messages)
        self._pushed.update((message.metadata.message_id, message) for message in posted)
        return [message.metadata.message_id for message in posted]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Answer the messages of these ids that were not answered before."""
        pulled = [self._pushed.pop(name) for name in message_ids if name in self._pushed]
        return list(self._answers(pulled, None))

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Send the messages and return one reply, or one error reply, for each, in order (a duplicated one, twice).

        Each client has ``timeout`` seconds from when it starts to work; with ``None`` all the time it takes. All
        together take at most ``len(messages) * timeout / max(workers, 1)`` seconds, as the class says.
        """
        return self._answers(self._post(messages), timeout)

    # -- how -----------------------------------------------------------------------------------------------------

    def _identify_server(self) -> None:
        """Tell Flower who makes messages in this process: the server of this run."""
        TaskIdentity.run_id, TaskIdentity.task_id = self._run.run_id, 1
        TaskIdentity.node_id = SUPERLINK_NODE_ID

    def _post(self, messages: Iterable[Message]) -> list[Message]:
        """Give each message its id."""
        posted = list(messages)
        for message in posted:
            self._check(message.metadata.dst_node_id)
            message.metadata.__dict__["_message_id"] = f"local-{next(self._ids)}"
        return posted

    def _answers(self, messages: list[Message], timeout_s: float | None) -> Iterator[Message]:
        """Let workers begin, if there are any, and return the reply to each message, in order."""
        if timeout_s is not None:
            timeout_s = min(timeout_s, _LONGEST_S)
        over = timeout_s is not None and timeout_s <= 0
        fates = [NEVER_ARRIVES if over else self._fate(message) for message in messages]
        jobs = [(m, self._context(m)) for m, fate in zip(messages, fates, strict=True) if self._is_worked_on(fate)]
        return self._replies(messages, fates, self._outcomes(jobs, timeout_s), timeout_s)

    def _replies(
        self,
        messages: list[Message],
        fates: list[Fate],
        outcomes: Iterator[Answer | Outcome],
        timeout_s: float | None,
    ) -> Iterator[Message]:
        """Yield the reply to each message, in order, as it fares on its way."""
        for message, fate in zip(messages, fates, strict=True):
            with span("wait"):
                outcome = next(outcomes) if self._is_worked_on(fate) else _outcome_of(fate)
            if isinstance(outcome, Answer) and timeout_s is not None and outcome.took_s > timeout_s:
                outcome = Outcome.NO_REPLY  # nothing could stop it in time
            if isinstance(outcome, Answer):
                self._keep(message.metadata.dst_node_id, outcome.state)
            if self._devices is not None:
                outcome = self._timed(message, outcome, fate, timeout_s, self._devices)
            if isinstance(outcome, Answer) and fate.lost:
                outcome = Outcome.NO_REPLY
            if isinstance(outcome, Outcome):
                code = ErrorCode.CLIENT_APP_CRASHED if outcome is Outcome.LOST else ErrorCode.REPLY_MESSAGE_UNAVAILABLE
                reply = Message(Error(code=code, reason=outcome.value), reply_to=message)
            else:
                reply = tampered(outcome.reply, fate)
            reply.metadata.__dict__["_message_id"] = f"{message.metadata.message_id}-reply"
            yield reply
            if fate.duplicated and not reply.has_error():
                yield reply

    def _check(self, node: int) -> None:
        """Raise unless there is such a node."""
        if not 1 <= node <= self._clients:
            raise ValueError(f"there is no node {node}; this grid has 1 … {self._clients}")

    def _fate(self, message: Message) -> Fate:
        """Return what becomes of a message."""
        about = message.metadata
        return self._faults.fate(about.group_id, about.dst_node_id - 1, about.message_type)

    def _is_worked_on(self, fate: Fate) -> bool:
        """Return whether a message reaches a worker: one that crashes takes its process with it, if that is another."""
        return fate.lost != "before" and not (fate.crashes and self._pool is None)

    def _keep(self, node: int, state: RecordDict) -> None:
        """Keep what a client keeps; for one that keeps nothing there is nothing to find."""
        if state:
            self._states[node] = state
        else:
            self._states.pop(node, None)

    def _timed(
        self, message: Message, outcome: Answer | Outcome, fate: Fate, timeout_s: float | None, devices: Devices
    ) -> Answer | Outcome:
        """Let simulated time pass until a reply is there; one that would come too late is none."""
        about, sent_bytes = message.metadata, payload_bytes(message.content)
        group = about.message_type == GROUP_KIND
        if outcome is Outcome.LOST or (group and outcome is Outcome.NO_REPLY):
            return outcome  # a death is known at once; a group's clients are asked one by one, and take their time then
        kind = "train" if group else about.message_type
        if self._phase != (about.group_id, kind):
            self._phase, self._begun_s = (about.group_id, kind), devices.clock.monotonic()
        missing = outcome is Outcome.NO_REPLY or (fate.lost != "" and isinstance(outcome, Answer))
        if not missing:
            members = _members(message) if group else (about.dst_node_id - 1,)
            reply_bytes = sent_bytes if group else _reply_bytes(outcome)
            took_s = max(
                devices.duration_s(about.group_id, client, kind, download_bytes=sent_bytes, upload_bytes=reply_bytes)
                for client in members
            )
            missing = timeout_s is not None and took_s > timeout_s
        if missing:
            took_s = timeout_s or 0.0
        devices.clock.reach(self._begun_s + took_s)
        return Outcome.NO_REPLY if missing else outcome

    def _outcomes(self, jobs: list[Job], timeout_s: float | None) -> Iterator[Answer | Outcome]:
        """Yield what became of each job, in order: in the workers, or one after the other here."""
        if self._pool is not None:
            return self._pool.map(jobs, timeout_s)
        return (_interrupted_after(timeout_s, self._work, job) for job in jobs)

    def _work(self, job: Job) -> Answer:
        """Let the ClientApp answer one message, on copies of the records that messages share and of what it kept."""
        with span("client"):
            return self._answer(job)

    def _answer(self, job: Job) -> Answer:
        """Do the same, whoever looks at how long it takes."""
        begun = self._clock.monotonic()
        if os.getpid() != self._process and self._fate(job[0]).crashes:  # this process is a worker, and dies as asked
            os.kill(os.getpid(), signal.SIGKILL)
        message, context = job[0], replace(job[1], state=_copied(job[1].state))
        own = Message(_copied(message.content), metadata=message.metadata)  # type: ignore[call-overload]
        try:
            reply = self._client_app(own, context)
        except (Exception, SystemExit) as error:  # a client that calls sys.exit() ends itself and not the run
            reason = type(error).__name__
            reply = Message(Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=reason), reply_to=message)
        return Answer(reply, context.state, self._clock.monotonic() - begun)

    def _context(self, message: Message) -> Context:
        """Return the context of a node: which partition it holds, and what it kept from earlier messages."""
        node = message.metadata.dst_node_id
        node_config: UserConfig = {**self.node_config_of(node - 1)}
        state = self._states.get(node) or RecordDict()
        return Context(run_id=self._run.run_id, node_id=node, node_config=node_config, state=state, run_config={})


def _outcome_of(fate: Fate) -> Outcome:
    """Return why a message that reached no worker has no answer."""
    return Outcome.NO_REPLY if fate.lost == "before" else Outcome.LOST


def _reply_bytes(outcome: Answer | Outcome) -> int:
    """Return what makes a reply long, as its client sent it."""
    if isinstance(outcome, Outcome) or outcome.reply.has_error():
        return 0
    return payload_bytes(outcome.reply.content)


def _members(message: Message) -> Sequence[int]:
    """Return the clients that a message to many is for."""
    members: Any = message.content.config_records["group"]["members"]
    return [int(client) for client in members]


def _copied(content: RecordDict) -> RecordDict:
    """Return records of its own for one client; array bytes are immutable and are shared."""
    copies = RecordDict()
    for name, record in content.items():
        kind: Any = next(k for k in (ArrayRecord, MetricRecord, ConfigRecord) if isinstance(record, k))
        copies[name] = kind(dict(record))
    return copies


class _DeadlineReachedError(BaseException):
    """Not an ``Exception``, so that a client's own ``except Exception`` does not swallow it."""


def _interrupted_after(timeout_s: float | None, work: Callable[[Job], Answer], job: Job) -> Answer | Outcome:
    """Return the answer of ``work``, or no reply if it was interrupted; only the main thread can be."""
    if timeout_s is None or threading.current_thread() is not threading.main_thread():
        return work(job)
    begun = time.monotonic()
    timer_s, interval_s = signal.setitimer(signal.ITIMER_REAL, 0)
    handler = signal.signal(signal.SIGALRM, _ring)
    try:
        signal.setitimer(signal.ITIMER_REAL, timeout_s, _AGAIN_S)
        return work(job)
    except _DeadlineReachedError:
        return Outcome.NO_REPLY
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if timer_s:  # somebody else's alarm was set: it rings when it would have
            signal.setitimer(signal.ITIMER_REAL, max(timer_s - (time.monotonic() - begun), 1e-6), interval_s)


def _ring(_signum: int, frame: FrameType | None) -> None:
    """Interrupt the work, and nothing but the work: an alarm that comes while it is set or put away does nothing."""
    code = _interrupted_after.__code__
    caller = frame.f_back if frame is not None and frame.f_code is not code else None
    while caller is not None and caller.f_code is not code:
        caller = caller.f_back
    if caller is not None:
        raise _DeadlineReachedError
