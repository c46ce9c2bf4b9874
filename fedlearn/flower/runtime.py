"""Flower's own simulation runtime: the unmodified ServerApp and ClientApp on Ray, on this machine or several.

Flower runs a ServerApp in a thread of its own, where Ctrl-C does not reach it, and hands back the replies of a round
when the last of them is there. Here the ServerApp runs in the caller's thread, on Flower's grid, and replies stream:
errors, interrupts and progress are those of the local engine.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import queue
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from flwr.app import Context, Error, Message, RecordDict, UserConfig
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run

from fedlearn.errors import ConfigError, DependencyError, MissingError, RunFailedError
from fedlearn.flower.client import build_client_app
from fedlearn.flower.client_log import client_log

__all__ = ["FlowerRuntime", "RuntimeGrid"]

_ADDRESS = "RAY_ADDRESS"
_MARK = "FEDLEARN_RAY"
"""In the environment of every process of a cluster of ours, however detached: the cluster's folder."""

_SETTINGS = {
    "RAY_ENABLE_AUTO_CONNECT": "0",  # or what Flower's threads still ask of Ray after its end would start it anew
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # actors are the simulation, not something beside it
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # or it warns of what it will do one day
}
"""What Ray is told by the environment, if its user has not said otherwise; put back when it has ended."""

_ALONE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Where this is 0, Ray uses the loopback interface and no other, whatever the system."""

_ACTOR = b"ray::"
"""How the command of an actor's process begins."""

_START_S = 300.0
_POLL_S = 0.02
_REACH_S = 10.0
_AHEAD = 8
"""How many messages are under way for each actor; Flower looks for new ones every 0.1 s."""

_TIMES_THEIR_TIME = _AHEAD + 2.0
"""A message lives so many times as long as a client may work: it waits for the others that are under way."""

_GRACE_S = 3.0
"""How long Flower's threads may take to end once the ServerApp did; a client that they still wait for is stopped."""

_STOP_S = 30.0

_LONGEST_S = 1e6
"""The longest deadline, eleven days: the system's timers take no more than 24."""

_ACTORS_LOG = ExitStack()
"""In one of Ray's processes: the clients' log, open as long as it lives."""


class FlowerRuntime:
    """Ray with Flower's actors on it, for as long as the ``with`` block lasts.

    Without ``RAY_ADDRESS`` in the environment a cluster of this machine alone is started, on the loopback interface,
    and ended with everything in it. With it, the cluster at that address is joined, and every CPU it has is an actor.
    Task files, the data's path and this package must then be on all of its machines, under the same paths.

    Guarantees: nothing of it is left running, whatever ends the block; only what was joined goes on.

    Args:
        clients: how many virtual nodes.
        workers: how many actors on this machine; 0: one for each CPU.
        node_config: what every node is configured with, beside its partition.
        log_file: where the clients' log goes, on machines that have its folder.

    Attributes:
        machines: how many machines there are.

    Raises:
        DependencyError: Ray is not installed.
        ConfigError: ``workers`` is given for a cluster that has its own number of CPUs.
        MissingError: nobody answers at ``RAY_ADDRESS``.
        RunFailedError: Ray did not start, or could not be joined.
    """

    def __init__(self, *, clients: int, workers: int, node_config: Mapping[str, str | float], log_file: Path) -> None:
        if find_spec("ray") is None:
            raise DependencyError("ray", "ray", 'simulation.engine = "flower"')
        joined = os.environ.get(_ADDRESS, "") not in ("", "local")
        if joined and workers:
            reason = f"must be 0 on the Ray cluster of {_ADDRESS}, whose every CPU is an actor"
            raise ConfigError("simulation.workers", f"{reason}; limit it with `ray start --num-cpus`")
        self._clients = clients
        self._app = _ResidentApp(node_config, log_file)
        self._folder = None if joined else Path(tempfile.mkdtemp(prefix="fl-ray-"))
        self._log = _FlowersLog(log_file)
        self._set: list[str] = []
        handler = signal.getsignal(signal.SIGTERM)
        try:
            self.machines, self._actors = self._start(workers or os.cpu_count() or 1)
        except BaseException:
            self.close()
            raise
        finally:
            if threading.current_thread() is threading.main_thread() and handler is not None:
                signal.signal(signal.SIGTERM, handler)  # Ray's own would say a page before it lets this process end

    def _start(self, actors: int) -> tuple[int, int]:
        """Start Ray with so many actors' CPUs, or join it; return how many machines and CPUs it has."""
        own_cluster = {} if self._folder is None else {_MARK: str(self._folder), _ALONE: "0"}
        for name, value in {**_SETTINGS, **own_cluster}.items():
            if name not in os.environ or name == _MARK:
                self._set.append(name)
                os.environ[name] = value
        if self._folder is None:
            _check_reachable(os.environ[_ADDRESS])
        import ray

        own: dict[str, Any] = {"address": os.environ.get(_ADDRESS)}
        if self._folder is not None:
            own = {"address": "local", "num_cpus": actors, "include_dashboard": False}
            own["_temp_dir"] = str(self._folder)
        try:
            ray.init(
                logging_level=logging.ERROR,
                log_to_driver=False,
                runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}},
                **own,
            )
        except Exception as error:
            failed = "could not be started" if self._folder is not None else f"could not be joined at {_ADDRESS}"
            raise RunFailedError(f"Ray {failed}: {error}") from error
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        return len(nodes), sum(int(each.get("CPU", 0)) for each in nodes)

    def close(self) -> None:
        """End Ray, or leave it; once it is done, doing it again does nothing."""
        if "ray" in sys.modules:
            sys.modules["ray"].shutdown()
        self._log.close()
        while self._set:
            os.environ.pop(self._set.pop(), None)
        if self._folder is not None:
            _end_marked(self._folder)
            shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> FlowerRuntime:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def serve(self, server_app: ServerApp, run_config: UserConfig) -> None:
        """Run a ServerApp on this runtime to its end, as ``flwr run`` would with that run config.

        Raises:
            RunFailedError: the runtime ended before the ServerApp did.
        """
        handed: queue.Queue[tuple[Grid, Context]] = queue.Queue()
        over, failed = threading.Event(), list[BaseException]()
        runtime = threading.Thread(target=self._run, args=(handed, over, failed), name="flower", daemon=True)
        runtime.start()

        def check() -> None:
            if not runtime.is_alive():
                raise RunFailedError("Flower's simulation runtime ended by itself") from next(iter(failed), None)

        try:
            inner, context = _awaited(handed, check)
            context.run_config = run_config
            grid = RuntimeGrid(inner, self._actors, check)
            grid.wait_for(self._clients)
            server_app(grid, context)
        finally:
            over.set()
            runtime.join(_GRACE_S)
            if runtime.is_alive() and self._folder is not None:  # Flower's threads wait for whoever still works
                _end_marked(self._folder, only=_ACTOR)
            runtime.join(_STOP_S)

    def _run(
        self, handed: queue.Queue[tuple[Grid, Context]], over: threading.Event, failed: list[BaseException]
    ) -> None:
        """Run Flower's side: a ServerApp that hands its grid over, and waits until it is not needed any more."""
        from flwr.simulation.run_simulation import _run_simulation
        from flwr.supercore.telemetry import EventType

        stand_in = ServerApp()

        @stand_in.main()
        def main(grid: Grid, context: Context) -> None:
            handed.put((grid, context))
            over.wait()

        resources: dict[str, int | float] = {"num_cpus": 1, "num_gpus": 0.0}
        try:
            _run_simulation(
                num_supernodes=self._clients,
                exit_event=EventType.PING,
                client_app=self._app,
                server_app=stand_in,
                backend_config={"client_resources": resources},  # type: ignore[dict-item]
            )
        except BaseException as error:
            failed.append(error)


class RuntimeGrid(Grid):
    """Flower's grid, with replies that stream as they come, and that notices when the runtime is gone.

    Args:
        inner: the grid of Flower's simulation runtime.
        actors: how many clients work at a time.
        check: raises when nobody will ever answer.
    """

    def __init__(self, inner: Grid, actors: int, check: Callable[[], None]) -> None:
        self._inner, self._actors, self._check = inner, actors, check
        self._most, self._ids = _AHEAD * actors, itertools.count(1)

    def wait_for(self, nodes: int) -> None:
        """Wait until all nodes are registered and every actor has answered something, which takes seconds each.

        Raises:
            RunFailedError: that did not happen in five minutes, or the runtime has ended.
        """
        deadline_s = time.monotonic() + _START_S
        while len(there := list(self.get_node_ids())) < nodes and time.monotonic() < deadline_s:
            self._check()
            time.sleep(_POLL_S)
        asked = there[: self._actors]
        messages = [Message(RecordDict(), each, "query.identify", ttl=_START_S, group_id="identify") for each in asked]
        answers = list(self.send_and_receive(messages, timeout=(deadline_s - time.monotonic()) / _TIMES_THEIR_TIME))
        if len(there) < nodes or len(answers) < len(asked):
            raise RunFailedError(
                f"of {len(asked)} actors {len(answers)} were ready in {_START_S:g} s. Is Ray's cluster busy?"
            )

    def set_run(self, run: Run) -> None:
        """Set the run that messages belong to."""
        self._inner.set_run(run)

    @property
    def run(self) -> Run:
        """The run that messages belong to."""
        return self._inner.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Return a new message of this run."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes that are registered by now."""
        return self._inner.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Hand messages to Flower."""
        return self._inner.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that are there."""
        return self._inner.pull_messages(message_ids)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Yield replies as they come; messages are sent a few for each actor at a time.

        As on ``LocalGrid`` a client has ``timeout`` seconds from when it starts to work: the actor sees to that. Here a
        message is given up only where the actor cannot, because it hangs in one long call into C or has died.

        Raises:
            RunFailedError: the runtime has ended.
        """
        asked = list(messages)
        for message in asked:
            message.metadata.__dict__["_message_id"] = f"runtime-{next(self._ids)}"
        following, sent = iter(asked), dict[str, _Sent]()
        while True:
            for message in itertools.islice(following, self._most - len(sent)):
                sent |= self._send(message, timeout)
            if not sent:
                return
            replies = list(self.pull_messages(sent))
            for reply in replies:
                answered = sent.pop(reply.metadata.reply_to_message_id)
                reply.metadata.__dict__["_reply_to_message_id"] = answered.message_id
                yield reply
            sent = {name: each for name, each in sent.items() if each.deadline_s > time.monotonic()}
            if not replies:
                self._check()
                time.sleep(_POLL_S)

    def _send(self, message: Message, timeout_s: float | None) -> dict[str, _Sent]:
        """Send a message now that its turn has come: as a new one, whose life begins now and under Flower's own id."""
        about, ttl_s = message.metadata, None if timeout_s is None else timeout_s * _TIMES_THEIR_TIME
        now = Message(message.content, about.dst_node_id, about.message_type, ttl=ttl_s, group_id=about.group_id)
        deadline_s = math.inf if ttl_s is None else time.monotonic() + ttl_s
        waiting = _Sent(about.message_id, deadline_s)
        return dict.fromkeys(self.push_messages([now]), waiting)


class _Sent(NamedTuple):
    """A message that is under way: what its sender calls it, and when it is given up."""

    message_id: str
    deadline_s: float


class _ResidentApp(ClientApp):
    """Our ClientApp, built once in each of Ray's processes: only what it is told travels with a message.

    Flower's runtime knows no node configuration but the partition; this one adds what a simulated device is told.
    """

    def __init__(self, told: Mapping[str, str | float], log_file: Path) -> None:
        super().__init__()
        self._told, self._log_file = dict(told), log_file
        self._inner = build_client_app()

    def __reduce__(self) -> tuple[Callable[..., _ResidentApp], tuple[object, ...]]:
        return _resident_app, (tuple(self._told.items()), self._log_file)

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer a message."""
        context.node_config = {**self._told, **context.node_config}
        try:
            return _within(message.metadata.ttl / _TIMES_THEIR_TIME, lambda: self._inner(message, context))
        except TimeoutError:
            late = Error(code=ErrorCode.REPLY_MESSAGE_UNAVAILABLE, reason="no reply before the deadline")
            return Message(late, reply_to=message)


class _TooLateError(BaseException):
    """Not an ``Exception``, so that a client's own ``except Exception`` does not swallow it."""


def _within(limit_s: float, work: Callable[[], Message]) -> Message:
    """Return what ``work`` returns; interrupt it when its time is over, so that a client that hangs costs no actor.

    Raises:
        TimeoutError: its time was over.
    """
    if threading.current_thread() is not threading.main_thread():
        return work()

    def ring(_signum: int, _frame: FrameType | None) -> None:
        raise _TooLateError

    handler = signal.signal(signal.SIGALRM, ring)
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, min(limit_s, _LONGEST_S))
            return work()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except _TooLateError:
        raise TimeoutError("interrupted at the message's deadline") from None
    finally:
        signal.signal(signal.SIGALRM, handler)


@lru_cache(maxsize=1)
def _resident_app(told: tuple[tuple[str, str | float], ...], log_file: Path) -> _ResidentApp:
    """Return this process's app, which logs where the run's other processes do, if it can."""
    if log_file.parent.is_dir():
        _ACTORS_LOG.enter_context(client_log(log_file))
    return _ResidentApp(dict(told), log_file)


class _FlowersLog:
    """What Flower's runtime says of clients it lost goes into their log, a line each; nothing goes to the terminal."""

    def __init__(self, path: Path) -> None:
        self._logger = logging.getLogger("flwr")
        self._before = (self._logger.propagate, self._logger.handlers[:])
        handler = logging.FileHandler(path, delay=True, encoding="utf-8")
        handler.setLevel(logging.ERROR)
        handler.setFormatter(_FirstLine("%(asctime)s %(levelname)s Flower: %(message)s"))
        self._logger.propagate, self._logger.handlers = False, [handler]

    def close(self) -> None:
        """Let Flower speak as before."""
        for handler in self._logger.handlers:
            if handler not in self._before[1]:
                handler.close()
        self._logger.propagate, self._logger.handlers = self._before


class _FirstLine(logging.Formatter):
    """Without what Flower logs once more: every exception, with its traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the first line."""
        return next(iter(super().format(record).splitlines()))


def _awaited(handed: queue.Queue[tuple[Grid, Context]], check: Callable[[], None]) -> tuple[Grid, Context]:
    """Return Flower's grid as soon as it is there."""
    while True:
        with suppress(queue.Empty):
            return handed.get(timeout=0.1)
        check()


def _check_reachable(address: str) -> None:
    """Raise if an address with a host and a port is nobody's: Ray would look for minutes."""
    host, _, port = address.rpartition(":")
    if not port.isdigit() or "/" in host:
        return  # another kind of address, which Ray knows
    try:
        socket.create_connection((host, int(port)), timeout=_REACH_S).close()
    except OSError as error:
        reason = "start it with `ray start --head`, or unset RAY_ADDRESS to simulate on this machine alone"
        raise MissingError(f"no Ray cluster answers at {address} ({_ADDRESS}): {reason}") from error


def _end_marked(folder: Path, only: bytes = b"") -> None:
    """Kill the processes of a cluster of ours whose command begins as given: who hangs, or what outlived its end."""
    mark, deadline_s = f"{_MARK}={folder}".encode(), time.monotonic() + _STOP_S
    while marked := [pid for pid in _processes() if mark in _told(pid, "environ") and _command(pid).startswith(only)]:
        for pid in marked:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline_s:
            return
        time.sleep(_POLL_S)


def _processes() -> list[int]:
    """Return the processes of this machine but this one; none where the system does not list them."""
    return [int(each.name) for each in Path("/proc").glob("[0-9]*") if int(each.name) != os.getpid()]


def _command(pid: int) -> bytes:
    """Return the command of a process."""
    return next(iter(_told(pid, "cmdline")))


def _told(pid: int, what: str) -> list[bytes]:
    """Return the environment or the words of a process; one empty word where it has ended, or is somebody else's."""
    try:
        return Path(f"/proc/{pid}/{what}").read_bytes().split(b"\0")
    except OSError:
        return [b""]
