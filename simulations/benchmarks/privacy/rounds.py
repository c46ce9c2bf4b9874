"""What privacy costs in time: a round with it over a round without, as a ratio of medians.

All runs take turns in this one process and thread, A B C A B C …, so that whatever else the machine does meets every
one of them. A round is timed from the end of the one before to its own: drawing, messages, training, clipping, noise,
the ledger and the check of the budget. Nobody measures the model.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fedlearn.errors import FedlearnError
from fedlearn.federation.observer import SilentObserver
from simulations.runs import Answer, arguments, finish, progress, run, stated

TURNS = 5
ROUNDS = 4
"""Rounds of a turn; the first is left out, since it pays for what is done once."""

LEAST_S = 1e-4
"""A round below this was not timed, but missed."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A task and a size at which ways of privacy are compared; 100 clients a round in all.

    Attributes:
        name: what it is called.
        task: what is learned.
        overrides: the federation.
    """

    name: str
    task: str
    overrides: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Way:
    """One promise, or none.

    Attributes:
        name: what it is called.
        overrides: what asks for it.
    """

    name: str
    overrides: tuple[str, ...]


_COMMON = (
    "federation.cohort=100",
    "federation.evaluation=off",
    "data.partition=iid",
    "training.local-epochs=1",
    "training.batch-size=10",
)
# The noise is given, so that no time goes into finding it, and a budget that nothing reaches is checked every round.
_NOISE = ("privacy.noise-multiplier=1.0", "privacy.max-epsilon=1e6")
_CLIENT = ("privacy.unit=client", *_NOISE)
_EXAMPLE = ("privacy.unit=example", *_NOISE)

CASES = (
    Case(name="digits-mlp", task="digits-mlp", overrides=("federation.clients=100",)),
    Case(name="digits", task="digits", overrides=("federation.clients=100",)),
    Case(
        name="784-128-10",
        task=str(Path(__file__).with_name("task.py")),
        overrides=("federation.clients=1000",),
    ),
)

PLAIN = Way(name="none", overrides=("privacy.unit=none",))
WAYS = (
    PLAIN,
    Way(name="client", overrides=(*_CLIENT, "federation.sampling=fixed-size")),
    Way(name="client, Poisson cohort", overrides=_CLIENT),
    Way(name="client, adaptive", overrides=(*_CLIENT, "privacy.adaptive-clipping=true")),
    Way(name="client, dp-ftrl", overrides=(*_CLIENT, "privacy.mechanism=dp-ftrl")),
    Way(name="example, hooks", overrides=(*_EXAMPLE, "privacy.grad-sample-mode=hooks")),
    Way(name="example, functorch", overrides=(*_EXAMPLE, "privacy.grad-sample-mode=functorch")),
    Way(name="example, ghost", overrides=(*_EXAMPLE, "privacy.grad-sample-mode=ghost")),
)


@dataclass
class Stopwatch(SilentObserver):
    """Times the rounds of a run, each divided by those that answered: a Poisson cohort is not always of one size.

    Attributes:
        wall_s: seconds for each respondent of a round, without the first round.
        cpu_s: the same in seconds of this process's processor time.
    """

    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    _last: tuple[float, float] | None = None

    def restart(self) -> None:
        """Forget when the last round ended: another run begins."""
        self._last = None

    def finished_round(self, line: Mapping[str, Any]) -> None:
        """Take the time."""
        now = (time.perf_counter(), time.process_time())
        if self._last is not None and line["respondents"]:
            self.wall_s.append((now[0] - self._last[0]) / line["respondents"])
            self.cpu_s.append((now[1] - self._last[1]) / line["respondents"])
        self._last = now


def experiment(
    overrides: Sequence[str], *, cases: Sequence[Case] = CASES, ways: Sequence[Way] = WAYS, turns: int = TURNS
) -> Answer:
    """Return the ratio of every way to none, case by case."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = [each for case in cases for each in compare(case, ways, overrides, turns)]
    finally:
        torch.set_num_threads(threads)
    timed = all(each["cpu_s"] >= LEAST_S / 100 for each in found if each["refused"] is None)
    return Answer(
        columns=("federation", "privacy", "a round", "ratio", "processor", "ratio"),
        rows=[_row(each) for each in found],
        verdict=f"Medians over {turns * (ROUNDS - 1)} rounds of 100 clients, in turns; every round was timed: "
        f"{stated(timed)}.",
        met=timed,
        body={"rounds": found, "turns": turns},
    )


def compare(case: Case, ways: Sequence[Way], overrides: Sequence[str], turns: int) -> list[dict[str, Any]]:
    """Run every way in turn, over and over, and return their medians beside the first way's."""
    watches = {way.name: Stopwatch() for way in ways}
    refused: dict[str, str] = {}
    for turn in range(turns):
        progress(f"{case.name}, turn {turn + 1} of {turns}")
        for way in ways:
            if way.name not in refused:
                try:
                    _run(case, way, overrides, watches[way.name])
                except FedlearnError as error:  # said in the table; the others can still be compared
                    refused[way.name] = str(error)
    plain = watches[ways[0].name]
    return [
        {
            "federation": case.name,
            "privacy": way.name,
            "refused": refused.get(way.name),
            **_medians(watches[way.name], plain, way.name in refused),
        }
        for way in ways
    ]


def _run(case: Case, way: Way, overrides: Sequence[str], watch: Stopwatch) -> None:
    """Run one way for one turn."""
    watch.restart()
    chosen = [*_COMMON, *case.overrides, f"federation.rounds={ROUNDS}", *way.overrides, *overrides]
    run(Path(case.task), chosen, observe=lambda _: watch)


def _medians(watch: Stopwatch, plain: Stopwatch, refused: bool) -> dict[str, float]:
    """Return a way's medians, and their ratio to those of no privacy."""
    if refused:
        return {}
    wall_s, cpu_s = statistics.median(watch.wall_s), statistics.median(watch.cpu_s)
    return {
        "wall_s": wall_s,
        "cpu_s": cpu_s,
        "ratio_wall": wall_s / statistics.median(plain.wall_s),
        "ratio_cpu": cpu_s / statistics.median(plain.cpu_s),
    }


def _row(each: dict[str, Any]) -> list[str]:
    """Return the cells of one way; times are those of 100 clients."""
    if each["refused"] is not None:
        return [each["federation"], each["privacy"], each["refused"][:60], "", "", ""]
    return [
        each["federation"],
        each["privacy"],
        f"{each['wall_s'] * 100:.2f} s",
        f"{each['ratio_wall']:.2f}",
        f"{each['cpu_s'] * 100:.2f} s",
        f"{each['ratio_cpu']:.2f}",
    ]


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--turns", type=int, default=TURNS, metavar="N", help=f"how many (default: {TURNS})")
    parser.add_argument("--only", default="", metavar="UNIT", help="client or example: these ways, beside none")
    given = parser.parse_args()
    chosen = [way for way in WAYS if way == PLAIN or way.name.startswith(given.only)]
    finish(lambda: experiment(given.set, ways=chosen, turns=given.turns), as_json=given.json)
