"""Every round's numbers, written where people compare runs; each number once, however often the run was interrupted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any, Protocol

from fedlearn.errors import FedlearnError, RunFailedError
from fedlearn.federation.run_folder import RunFolder
from fedlearn.tracking.epsilon import SpentSoFar
from fedlearn.tracking.trackers import check_trackers

__all__ = ["Tracker", "Tracks", "numbers_of", "open_tracks"]


class Tracker(Protocol):
    """Where numbers go."""

    def written(self) -> set[tuple[str, int]]:
        """Return which numbers are there already, by name and round."""

    def write(self, round_number: int, numbers: Mapping[str, float]) -> None:
        """Write numbers of one round, and return when a crash no longer loses them."""

    def close(self) -> None:
        """Let go of whatever is open."""


def numbers_of(line: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers in a line of ``metrics.jsonl``, by the names they are tracked under.

    >>> line = {"round": 1, "metrics": {"accuracy": 0.5}, "train_loss": None, "respondents": 3, "failures": {"7": "x"}}
    >>> numbers_of(line)
    {'metrics/accuracy': 0.5, 'round/failures': 1.0, 'round/respondents': 3.0}
    >>> list(numbers_of({"metrics": {"f1 (macro)": 0.5}}))
    ['metrics/f1 _macro_', 'round/failures']
    """
    found = {f"metrics/{name}": value for name, value in line.get("metrics", {}).items()}
    found |= {f"federated-metrics/{name}": value for name, value in line.get("federated_metrics", {}).items()}
    found["round/failures"] = len(line.get("failures", ()))
    for name, value in line.items():
        if name != "round" and isinstance(value, int | float) and not isinstance(value, bool):
            found[f"round/{name}"] = value
    return {_taken_by_all(name): float(value) for name, value in found.items()}


def _taken_by_all(name: str) -> str:
    """Return a name with what some tracker does not take replaced."""
    return "".join(each if each.isalnum() or each in " ._-:/" else "_" for each in name)


class Tracks:
    """An observer that hands every round to its trackers.

    Guarantees: a tracker gets every number of every kept round once: what it has already is not written again, and what
    a crash kept from it is written when the run goes on, from ``metrics.jsonl``. Epsilon is no line's: it is tracked
    after the rounds for which it was reckoned (see ``SpentSoFar``), and after the last one of each session.

    Raises, while it is told of a round:
        RunFailedError: a tracker's files cannot be written; the round is kept.

    Args:
        folder: the run's folder.
        openers: what opens the trackers; called after the first round, when the engine has forked its workers and it is
            clear that the run could begin.
        spent: what says epsilon.
    """

    def __init__(self, folder: RunFolder, openers: Sequence[Callable[[RunFolder], Tracker]], spent: SpentSoFar) -> None:
        self._folder, self._openers, self._spent = folder, openers, spent
        self._trackers: list[tuple[Tracker, set[tuple[str, int]]]] = []
        self._last = 0

    def replied(self, round_number: int, done: int, total: int) -> None:
        """Do nothing."""

    def finished_round(self, line: Mapping[str, Any]) -> None:
        """Write the round; first all rounds before it that are not there yet."""
        if self._openers:
            self._open()
        else:
            self._write(line["round"], numbers_of(line))
        self._last = int(line["round"])
        self._write_epsilon(at_any_price=False)

    def __enter__(self) -> Tracks:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except RunFailedError:
            if kind is None:  # else what ended the run is what to say
                raise

    def close(self) -> None:
        """Write what is still missing, and let go of everything; also after a run that failed.

        Raises:
            RunFailedError: a tracker's files cannot be written.
        """
        with _failing_clearly(), ExitStack() as closing:
            if self._openers and self._folder.metrics():
                self._open()
            for tracker, _ in self._trackers:
                closing.callback(tracker.close)
            if self._last:
                self._write_epsilon(at_any_price=True)

    def _open(self) -> None:
        """Open the trackers and write every kept round."""
        openers, self._openers = self._openers, ()
        for opener in openers:
            with _failing_clearly():
                tracker = opener(self._folder)
                self._trackers.append((tracker, tracker.written()))
        for line in self._folder.metrics():
            self._write(line["round"], numbers_of(line))

    def _write_epsilon(self, *, at_any_price: bool) -> None:
        """Write what was spent after the last round, where that was reckoned."""
        spent = self._spent.after(self._last, at_any_price=at_any_price)
        if spent is not None and spent[0] == self._last:
            self._write(self._last, {"privacy/epsilon": spent[1]})

    def _write(self, round_number: int, numbers: Mapping[str, float]) -> None:
        """Write what each tracker does not have yet."""
        for tracker, written in self._trackers:
            missing = {name: value for name, value in numbers.items() if (name, round_number) not in written}
            if missing:
                with _failing_clearly():
                    tracker.write(round_number, missing)
                written |= {(name, round_number) for name in missing}


def open_tracks(folder: RunFolder, names: Sequence[str], spent: SpentSoFar) -> Tracks:
    """Return the tracks of a run into these trackers, each named once or more.

    Raises:
        As ``check_trackers`` does.
    """
    check_trackers(names)
    modules = [import_module(f"fedlearn.tracking.{name}") for name in dict.fromkeys(names)]
    return Tracks(folder, [module.open_tracker for module in modules], spent)


@contextmanager
def _failing_clearly() -> Iterator[None]:
    """Raise what a tracker raises, of whatever type, as an error with a way out."""
    try:
        yield
    except FedlearnError:
        raise
    except Exception as error:
        raise RunFailedError(
            f"--track: {type(error).__name__}: {error}. Finished rounds are kept, and are tracked when the run goes on "
            "with --track; without it, it goes on untracked"
        ) from error
