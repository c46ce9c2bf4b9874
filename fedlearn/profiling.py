"""Where the time goes: named spans of this process, and of the workers it forks. Off unless somebody asks for it.

A second is counted once: while a span is open within another, the time is the inner one's. So all spans of one process
together take as long as the outermost ones. It is time on the wall, whatever the machine did with it.

The names, which ``fedlearn simulate --profile`` has words for:

* of the server: ``start`` (imports, data, the model and, at the end, the files that are left), ``rounds`` (of a round
  whatever has no span of its own), ``draw``, ``messages``, ``wait`` (for clients), ``sum``, ``secagg``, ``update``,
  ``validate``, ``keep`` (checkpoint, ledger, metrics), ``watch`` (the display and the trackers);
* of a client, in a worker or here: ``decode``, ``load data``, ``train``, ``encode``, ``send`` (the answer is in the
  pipe, or waits for room there), ``evaluate``, ``client`` (whatever has no span of its own).

>>> ticks = iter(range(100))
>>> start(now=lambda: float(next(ticks)))
>>> with span("rounds"):
...     with span("train"):
...         pass
>>> profile = stop()
>>> profile.here["rounds"], profile.here["train"], profile.wall_s
(Spent(seconds=2.0, times=1), Spent(seconds=1.0, times=1), 5.0)
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import wraps
from typing import NamedTuple, ParamSpec, TypeVar

__all__ = ["Profile", "Spent", "forked", "is_on", "merge", "span", "spanned", "start", "stop", "take"]

P = ParamSpec("P")
R = TypeVar("R")


class Spent(NamedTuple):
    """How long all spans of one name took, without those within them, and how many there were."""

    seconds: float
    times: int


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What was recorded between ``start`` and ``stop``.

    Attributes:
        wall_s: how long that was.
        here: by name, the spans of this process.
        workers: the same of each worker, in their order; a worker that was killed is gone with what it had not sent.
    """

    wall_s: float
    here: Mapping[str, Spent]
    workers: tuple[Mapping[str, Spent], ...] = ()


class _Recorder:
    """A clock that runs on the account of the innermost open span."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now = now
        self.began = self._since = now()
        self._owner = threading.get_ident()
        self._open: list[str] = []
        self._seconds: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self.workers: dict[int, dict[str, Spent]] = {}

    def span(self, name: str) -> AbstractContextManager[None]:
        """Return a span; of a thread that does not record, one that does nothing."""
        return _Span(self, name) if threading.get_ident() == self._owner else _NOTHING

    def enter(self, name: str) -> int:
        """Let the clock run for ``name``; return how many spans are open around it."""
        self._charge()
        self._open.append(name)
        self._counts[name] = self._counts.get(name, 0) + 1
        return len(self._open) - 1

    def leave(self, depth: int) -> None:
        """Let the clock run for what it ran for before, also where an alarm tore inner spans."""
        self._charge()
        del self._open[depth:]

    def take(self) -> dict[str, Spent]:
        """Return what was recorded since the last time, and forget it."""
        self._charge()
        taken = {name: Spent(self._seconds.get(name, 0.0), count) for name, count in self._counts.items()}
        self._seconds.clear()
        self._counts.clear()
        return taken

    def _charge(self) -> None:
        """Count the time since the last change to the innermost span."""
        now = self.now()
        if self._open:
            name = self._open[-1]
            self._seconds[name] = self._seconds.get(name, 0.0) + now - self._since
        self._since = now


class _Span(AbstractContextManager[None]):
    """One span of a recorder."""

    __slots__ = ("_depth", "_name", "_recorder")

    def __init__(self, recorder: _Recorder, name: str) -> None:
        self._recorder, self._name, self._depth = recorder, name, -1

    def __enter__(self) -> None:
        self._depth = self._recorder.enter(self._name)

    def __exit__(self, *_: object) -> None:
        if self._depth >= 0:
            self._recorder.leave(self._depth)


class _Nothing(AbstractContextManager[None]):
    """What a span is while nobody records: as cheap as a ``with`` can be."""

    __slots__ = ()

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


_NOTHING = _Nothing()
_recorder: _Recorder | None = None


def span(name: str) -> AbstractContextManager[None]:
    """Return a context in which the time counts as ``name``'s; about a tenth of a microsecond while nobody records."""
    return _NOTHING if _recorder is None else _recorder.span(name)


def spanned(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator: all of a function's calls are spans of that name. Not for generators."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def within(*args: P.args, **kwargs: P.kwargs) -> R:
            with span(name):
                return function(*args, **kwargs)

        return within

    return decorate


def is_on() -> bool:
    """Return whether somebody records."""
    return _recorder is not None


def start(*, now: Callable[[], float] = time.perf_counter) -> None:
    """Record the spans of this thread from now on; what was recorded before is forgotten."""
    global _recorder
    _recorder = _Recorder(now)


def stop() -> Profile:
    """Record no longer; return what was recorded, nothing where nobody did."""
    global _recorder
    recorder, _recorder = _recorder, None
    if recorder is None:
        return Profile(wall_s=0.0, here={})
    wall_s = recorder.now() - recorder.began
    count = max(recorder.workers, default=-1) + 1
    workers = tuple(recorder.workers.get(position, {}) for position in range(count))
    return Profile(wall_s=wall_s, here=recorder.take(), workers=workers)


# -- workers -------------------------------------------------------------------------------------------------------


def forked() -> None:
    """Forget, in a process that was just forked, what its parent recorded; go on recording where the parent does."""
    if _recorder is not None:
        start(now=_recorder.now)


def take() -> Mapping[str, Spent] | None:
    """Return, in a worker, what was recorded since the last time, to be sent home; ``None`` while nobody records."""
    return None if _recorder is None else _recorder.take()


def merge(worker: int, spent: Mapping[str, Spent] | None) -> None:
    """Count what the worker of that number, from 0, has sent home."""
    if _recorder is None or spent is None:
        return
    known = _recorder.workers.setdefault(worker, {})
    for name, more in spent.items():
        before = known.get(name, Spent(0.0, 0))
        known[name] = Spent(before.seconds + more.seconds, before.times + more.times)
