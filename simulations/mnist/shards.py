"""Train a user's own task file on MNIST, where each of 100 clients holds two shards of one digit each."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from pathlib import Path

from simulations.runs import Answer, arguments, finish, run, stated

EXPECTED = 0.85


def experiment(overrides: Sequence[str]) -> Answer:
    """Return the accuracy on the 10,000 test images as the rounds go by."""
    started = time.monotonic()
    finished = run(Path(__file__).with_name("scenario.toml"), overrides)
    wall_s = time.monotonic() - started
    measured = [line for line in finished.lines if line["metrics"]]
    accuracy = float(finished.summary["metrics"]["accuracy"])
    met = accuracy >= EXPECTED
    return Answer(
        columns=("round", "accuracy", "loss"),
        rows=[
            [str(line["round"]), f"{line['metrics']['accuracy']:.4f}", f"{line['metrics']['loss']:.4f}"]
            for line in measured
        ],
        verdict=f"Accuracy {accuracy:.4f} after {finished.summary['rounds']} rounds and {wall_s:.0f} s "
        f"(at least {EXPECTED}): {stated(met)}.",
        met=met,
        body={"accuracy": accuracy, "expected": EXPECTED, "wall_s": round(wall_s, 1)},
    )


if __name__ == "__main__":
    given = arguments(__doc__).parse_args()
    finish(functools.partial(experiment, given.set), as_json=given.json)
