"""What a run looks like while it runs: two bars on a terminal, a line a round elsewhere, or nothing.

All of it goes to standard error. The bars are drawn when something happens and by no thread of their own, so
that the engine can fork workers at any time.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from fedlearn.cli.rendering import console, duration_text, number_text

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["Bars", "Lines", "Watcher", "headline", "watcher"]

_REDRAW_S = 0.1


class Watcher(Protocol):
    """An observer of a run that can be closed."""

    def replied(self, round_number: int, done: int, total: int) -> None:
        """One more of ``total`` clients is accounted for."""

    def finished_round(self, line: Mapping[str, Any]) -> None:
        """A round is done and kept."""

    def close(self) -> None:
        """Take away what is drawn."""


def watcher(rounds: int, *, quiet: bool) -> Watcher | None:
    """Return bars where standard error is a terminal, else lines; ``None`` where nothing should be said."""
    if quiet:
        return None
    drawable = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    return Bars(rounds) if drawable else Lines(rounds)


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


class _Pace:
    """How long the rest will take, from the rounds of this session."""

    def __init__(self, rounds: int) -> None:
        self._rounds = rounds
        self._started_s: float | None = None
        self._seen = 0

    def begin(self) -> None:
        """Start counting at the first reply: what was loaded before comes once."""
        if self._started_s is None:
            self._started_s = time.monotonic()

    def left(self, round_number: int) -> str:
        """Return the time left after ``round_number``, just finished."""
        self.begin()
        self._seen += 1
        each_s = (time.monotonic() - (self._started_s or 0.0)) / self._seen
        left_s = max(1, round(each_s * (self._rounds - round_number)))
        return f"{left_s} s" if left_s < 60 else duration_text(left_s)


class Lines:
    """Says one plain line a round, for logs."""

    def __init__(self, rounds: int) -> None:
        self._rounds = rounds
        self._pace = _Pace(rounds)

    def replied(self, round_number: int, done: int, total: int) -> None:
        """Say nothing."""
        self._pace.begin()

    def finished_round(self, line: Mapping[str, Any]) -> None:
        """Say how the round went."""
        number = int(line["round"])
        parts = [*_said(line), f"{line['respondents']} of {line['cohort']} clients", *_tested(line)]
        if line["attempt"] > 1:
            parts.append(f"try {line['attempt']}")
        left = self._pace.left(number)
        if number < self._rounds:
            parts.append(f"{left} left")
        width = len(str(self._rounds))
        sys.stderr.write(f"round {number:>{width}}/{self._rounds}  {' · '.join(parts)}\n")
        sys.stderr.flush()

    def close(self) -> None:
        """Do nothing."""


class Bars:
    """Draws one bar over the rounds and one over the clients of the present round."""

    def __init__(self, rounds: int) -> None:
        self._rounds = rounds
        self._progress: Progress | None = None
        self._drawn_s = 0.0
        self._pace = _Pace(rounds)
        self._pass = 0
        self._round = 0

    def replied(self, round_number: int, done: int, total: int) -> None:
        """Move the bar over the clients."""
        self._pace.begin()
        progress = self._begun(round_number, total)
        if round_number != self._round:
            self._round, self._pass = round_number, 0
        self._pass += done == 1  # a second pass is another try, or the clients' own evaluation
        if self._pass > 1:
            progress.update(self._clients, note=f"pass {self._pass}")
        progress.update(self._clients, completed=done, total=total)
        self._redraw(force=done == total)

    def finished_round(self, line: Mapping[str, Any]) -> None:
        """Move the bar over the rounds and say what the round measured."""
        number = int(line["round"])
        progress = self._begun(number, int(line["cohort"]))
        left = self._pace.left(number)
        parts = [*_said(line), *([f"{left} left"] if number < self._rounds else [])]
        progress.update(self._overall, completed=number, note=" · ".join(parts))
        answered = f"{line['respondents']} of {line['cohort']} answered in round {number}"
        progress.update(self._clients, note=" · ".join([answered, *_tested(line)]))
        self._redraw(force=True)

    def close(self) -> None:
        """Take the bars away; what they said stands in the table that follows."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _begun(self, round_number: int, clients: int) -> Progress:
        """Return the bars, drawn from the first call on, a resumed run's from the round it is in."""
        if self._progress is not None:
            return self._progress
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._progress = Progress(
            TextColumn("{task.description}", style="dim"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=console(err=True),
            auto_refresh=False,
            transient=True,
        )
        self._overall = self._progress.add_task("rounds", total=self._rounds, completed=round_number - 1, note="")
        self._clients = self._progress.add_task("clients", total=clients, note="")
        self._progress.start()
        return self._progress

    def _redraw(self, *, force: bool) -> None:
        """Draw, but not more than ten times a second."""
        now_s = time.monotonic()
        if self._progress is not None and (force or now_s - self._drawn_s >= _REDRAW_S):
            self._progress.refresh()
            self._drawn_s = now_s
