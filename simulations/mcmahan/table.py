"""Count the rounds that FedAvg needs to 97 % on MNIST, as McMahan et al. did: IID, and with two shards a client."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedlearn.federation.run_folder import RunFolder
from simulations.runs import Answer, arguments, finish, progress, run, stated

TARGET = 0.97
PUBLISHED = {"iid": 87, "shards": 664}
"""Table 1 of the paper: 2NN, E = 1, B = 10, C = 0.1."""

_WORDS = {"iid": "IID", "shards": "two shards a client"}
_SAID_EVERY = 50


class _ReachedError(Exception):
    """The target is reached: the rest of the rounds is not needed. (An observer cannot end a run otherwise.)"""


@dataclass
class Curve:
    """Watches a run, and ends it once the best accuracy so far is at the target.

    Attributes:
        best: the best accuracy after each round: the paper makes its curves monotonic in this way.
        wall_s: when each round was done, in seconds since the first began: loading the data is not counted.
    """

    target: float
    begun_s: float = 0.0
    best: list[float] = field(default_factory=list)
    wall_s: list[float] = field(default_factory=list)

    def replied(self, round_number: int, done: int, total: int) -> None:
        """Do nothing."""

    def finished_round(self, line: Mapping[str, Any]) -> None:
        """Note the accuracy of a round."""
        if not self.wall_s:
            self.begun_s = time.monotonic() - float(line["wall_s"])
        accuracy = float(line["metrics"]["accuracy"])
        self.best.append(max([accuracy, *self.best[-1:]]))
        self.wall_s.append(time.monotonic() - self.begun_s)
        if len(self.best) % _SAID_EVERY == 0:
            progress(f"  round {len(self.best)}: {self.best[-1]:.4f} at best")
        if self.best[-1] >= self.target:
            raise _ReachedError

    @property
    def rounds(self) -> int | None:
        """The round that reached the target, or ``None``."""
        return len(self.best) if self.best and self.best[-1] >= self.target else None


def measured(partition: str, overrides: Sequence[str], *, target: float = TARGET) -> Curve:
    """Run the scenario until the target is reached, or for as many rounds as the paper needed."""
    curve = Curve(target)

    def observe(_folder: RunFolder) -> Curve:
        return curve

    settings = [f"data.partition={partition}", f"federation.rounds={PUBLISHED[partition]}", *overrides]
    with contextlib.suppress(_ReachedError):
        run(Path(__file__).with_name("scenario.toml"), settings, observe=observe)
    return curve


def experiment(overrides: Sequence[str]) -> Answer:
    """Return rounds and seconds to 97 %, beside the paper's."""
    rows, body, met = [], {}, True
    for partition, published in PUBLISHED.items():
        progress(f"{_WORDS[partition]}, at most {published} rounds")
        curve = measured(partition, overrides)
        met &= curve.rounds is not None
        reached = f"{curve.rounds}" if curve.rounds else f"not in {len(curve.best)}"
        wall_s = curve.wall_s[-1]
        rows.append(
            [_WORDS[partition], reached, str(published), f"{curve.best[-1]:.4f}", f"{wall_s:.1f}", _each(curve)]
        )
        body[partition] = {
            "rounds": curve.rounds,
            "published": published,
            "best_accuracy": curve.best[-1],
            "wall_s": round(wall_s, 2),
            "rounds_run": len(curve.best),
        }
    return Answer(
        columns=("data", "rounds to 97 %", "paper", "best accuracy", "seconds", "a round"),
        rows=rows,
        verdict=f"97 % within the paper's number of rounds, on both: {stated(met)}.",
        met=met,
        body=body,
    )


def _each(curve: Curve) -> str:
    """Return the mean time of a round, validation on 10,000 images included."""
    return f"{1000 * curve.wall_s[-1] / len(curve.wall_s):.0f} ms"


if __name__ == "__main__":
    given = arguments(__doc__).parse_args()
    finish(functools.partial(experiment, given.set), as_json=given.json)
