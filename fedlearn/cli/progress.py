"""What a run looks like while it runs: two bars on a terminal, a line a round elsewhere, or nothing.

All of it goes to standard error. The bars are drawn when something happens and by no thread of their own, so
that the engine can fork workers at any time.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from fedlearn.cli.rendering import console, duration_text, number_text

if TYPE_CHECKING:
    from rich.progress import Progress

    from fedlearn.tracking.epsilon import SpentSoFar

__all__ = ["Bars", "Lines", "Watcher", "headline", "rate_text", "watcher"]

Now = Callable[[], float]

_REDRAW_S = 0.1

_WINDOW_S = 10.0
"""Over how long clients a second are counted: long enough for a steady number, short enough to see a change."""


class Watcher(Protocol):
    """An observer of a run that can be closed."""

    def replied(self, round_number: int, done: int, total: int) -> None:
        """``done`` of ``total`` clients are accounted for."""

    def finished_round(self, line: Mapping[str, Any]) -> None:
        """A round is done and kept."""

    def close(self) -> None:
        """Take away what is drawn."""


def watcher(rounds: int, *, quiet: bool, spent: SpentSoFar | None = None) -> Watcher | None:
    """Return bars where standard error is a terminal, else lines; ``None`` where nothing should be said."""
    if quiet:
        return None
    drawable = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    return Bars(rounds, spent) if drawable else Lines(rounds, spent)


def headline(metrics: Mapping[str, float]) -> list[tuple[str, float]]:
    """Return what to say of a model in a few words: the first metric that is not a loss, then the loss.

    >>> headline({"loss": 0.3, "accuracy": 0.9, "recall": 0.8})
    [('accuracy', 0.9), ('loss', 0.3)]
    """
    scores = [(name, value) for name, value in metrics.items() if not name.startswith("loss")]
    return [*scores[:1], *((name, value) for name, value in metrics.items() if name == "loss")]


def _said(line: Mapping[str, Any]) -> list[str]:
    """Return what was measured in a round, in words; the training loss where nothing was and it may be known."""
    measured = headline(line["metrics"])
    if not measured and line["train_loss"] is not None:
        measured = [("train loss", float(line["train_loss"]))]
    return [f"{name} {number_text(value)}" for name, value in measured]


def _tested(line: Mapping[str, Any]) -> list[str]:
    """Return how many clients tested the model, in words; nothing where none failed to."""
    failed = len(line.get("evaluation_failures", ()))
    return [f"tested by {line['cohort'] - failed} of {line['cohort']} clients"] if failed else []


def _cost(spent: SpentSoFar | None, number: int, *, briefly: bool = False) -> list[str]:
    """Return what hiding clients has cost so far, in words; nothing where that is not promised.

    Where the last reckoning was an earlier round's, that is said: by its number, or briefly, as it is at least that.
    """
    said = None if spent is None else spent.after(number)
    if spent is None or said is None:
        return []
    budget = "" if spent.budget is None else f" of {spent.budget:g}"
    if said[0] == number or briefly:
        return [f"epsilon {'' if said[0] == number else '≥ '}{said[1]:.3g}{budget}"]
    return [f"epsilon {said[1]:.3g}{budget} after round {said[0]}"]


class _Pace:
    """How long the rest will take, from the rounds of this session."""

    def __init__(self, rounds: int, now: Now) -> None:
        self._rounds, self._now = rounds, now
        self._started_s: float | None = None
        self._seen = 0

    def begin(self) -> None:
        """Start counting at the first reply: what was loaded before comes once."""
        if self._started_s is None:
            self._started_s = self._now()

    def left(self, round_number: int) -> str:
        """Return the time left after ``round_number``, just finished."""
        self.begin()
        self._seen += 1
        each_s = (self._now() - (self._started_s or 0.0)) / self._seen
        left_s = max(1, round(each_s * (self._rounds - round_number)))
        return f"{left_s} s" if left_s < 60 else duration_text(left_s)


class _Throughput:
    """How many clients a second are accounted for, over the last seconds: training, measuring and all in between."""

    def __init__(self, now: Now) -> None:
        self._now = now
        self._count = 0
        self._seen: deque[tuple[float, int]] = deque()

    def add(self, clients: int) -> None:
        """Count so many more."""
        now_s = self._now()
        self._count += clients
        if not self._seen or now_s - self._seen[-1][0] >= _REDRAW_S:
            self._seen.append((now_s, self._count))
        while now_s - self._seen[0][0] > _WINDOW_S and len(self._seen) > 2:
            self._seen.popleft()

    def text(self) -> str:
        """Return it in words, or nothing while too little was seen."""
        if not self._seen:
            return ""
        since_s, count = self._seen[0]  # those counted then had come before
        elapsed_s = self._now() - since_s
        return rate_text((self._count - count) / elapsed_s) if elapsed_s >= _REDRAW_S and self._count > count else ""


def rate_text(per_s: float) -> str:
    """Return a number of clients a second.

    >>> rate_text(4612.3), rate_text(0.4219)
    ('4,612 clients/s', '0.42 clients/s')
    """
    return f"{per_s:,.0f} clients/s" if per_s >= 10 else f"{per_s:.2g} clients/s"


class Lines:
    """Says one plain line a round, for logs."""

    reads_folder = False

    def __init__(self, rounds: int, spent: SpentSoFar | None = None, now: Now = time.monotonic) -> None:
        self._rounds, self._spent = rounds, spent
        self._pace = _Pace(rounds, now)

    def replied(self, round_number: int, done: int, total: int) -> None:
        """Say nothing."""
        self._pace.begin()

    def finished_round(self, line: Mapping[str, Any]) -> None:
        """Say how the round went."""
        number = int(line["round"])
        parts = [*_said(line), f"{line['respondents']} of {line['cohort']} clients", *_tested(line)]
        if line["attempt"] > 1:
            parts.append(f"try {line['attempt']}")
        if line["respondents"] and line.get("wall_s"):
            parts.append(rate_text(line["respondents"] / line["wall_s"]))
        parts += _cost(self._spent, number)
        left = self._pace.left(number)
        if number < self._rounds:
            parts.append(f"{left} left")
        width = len(str(self._rounds))
        sys.stderr.write(f"round {number:>{width}}/{self._rounds}  {' · '.join(parts)}\n")
        sys.stderr.flush()

    def close(self) -> None:
        """Do nothing."""


class Bars:
    """Draws one bar over the rounds and one over the clients of the present round.

    It draws at most ten times a second, whatever happens in between, so that a run of short rounds is not slowed down.
    """

    reads_folder = False

    def __init__(self, rounds: int, spent: SpentSoFar | None = None, now: Now = time.monotonic) -> None:
        self._rounds, self._spent, self._now = rounds, spent, now
        self._progress: Progress | None = None
        self._drawn_s = -math.inf
        self._pace = _Pace(rounds, now)
        self._throughput = _Throughput(now)
        self._round = self._pass = self._done = 0
        self._overall_said: dict[str, Any] = {}
        self._clients_said: dict[str, Any] = {}

    def replied(self, round_number: int, done: int, total: int) -> None:
        """Move the bar over the clients."""
        self._pace.begin()
        if round_number != self._round:
            self._round, self._pass, self._done = round_number, 1, 0
        elif done <= self._done:  # counted up once more: another try, or the clients' own evaluation
            self._pass, self._done = self._pass + 1, 0
        self._throughput.add(done - self._done)
        self._done = done
        self._begun(round_number, total)
        self._clients_said = {"completed": done, "total": total}
        if self._is_due():
            again = [f"pass {self._pass}"] if self._pass > 1 else []
            self._draw(" · ".join([*filter(None, [self._throughput.text()]), *again]))

    def finished_round(self, line: Mapping[str, Any]) -> None:
        """Move the bar over the rounds and say what the round measured."""
        number = int(line["round"])
        self._begun(number, int(line["cohort"]))
        left = self._pace.left(number)
        parts = [
            *_said(line),
            *_cost(self._spent, number, briefly=True),
            *([f"{left} left"] if number < self._rounds else []),
        ]
        self._overall_said = {"completed": number, "note": " · ".join(parts)}
        answered = f"{line['respondents']} of {line['cohort']} answered in round {number}"
        rate = filter(None, [self._throughput.text()])
        self._clients_said["note"] = " · ".join([answered, *_tested(line), *rate])
        if self._is_due():
            self._draw()

    def close(self) -> None:
        """Take the bars away; what they said stands in the table that follows."""
        if self._progress is not None:
            self._draw()
            self._progress.stop()
            self._progress = None

    def _begun(self, round_number: int, clients: int) -> None:
        """Make the bars at the first call, a resumed run's from the round it is in."""
        if self._progress is not None:
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.table import Column

        screen = console(err=True)
        self._progress = Progress(
            TextColumn("{task.description}", style="dim"),
            BarColumn(bar_width=20 if screen.width >= 100 else 6),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False, table_column=Column(no_wrap=False)),  # not cut off
            console=screen,
            auto_refresh=False,
            transient=True,
        )
        self._overall = self._progress.add_task("rounds", total=self._rounds, completed=round_number - 1, note="")
        self._clients = self._progress.add_task("clients", total=clients, note="")
        self._progress.start()

    def _is_due(self) -> bool:
        """Return whether the last drawing is long enough ago."""
        return self._now() - self._drawn_s >= _REDRAW_S

    def _draw(self, note: str | None = None) -> None:
        """Draw what is known, the clients with a note of their own where there is something to say."""
        if self._progress is None:
            return
        said = {**self._clients_said, "note": note} if note else self._clients_said
        self._progress.update(self._overall, **self._overall_said)
        self._progress.update(self._clients, **said)
        self._progress.refresh()
        self._drawn_s = self._now()
