"""Train the default federation under five seeds, and hold every one of them against the expected accuracy.

A seed decides the initial model, who holds which digits and the order of the batches; the test images stay the same.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from simulations.runs import Answer, arguments, finish, progress, run, stated

EXPECTED = 0.95
SEEDS = range(5)


def experiment(overrides: Sequence[str], seeds: Sequence[int] = SEEDS) -> Answer:
    """Return the accuracy and the wall time of every seed."""
    rows, found = [], []
    for seed in seeds:
        progress(f"seed {seed}")
        started = time.monotonic()
        summary = run(Path(__file__).with_name("scenario.toml"), [*overrides, f"seed={seed}"]).summary
        wall_s = time.monotonic() - started
        accuracy, loss = summary["metrics"]["accuracy"], summary["metrics"]["loss"]
        found.append({"seed": seed, "accuracy": accuracy, "loss": loss, "wall_s": round(wall_s, 1)})
        rows.append([str(seed), f"{accuracy:.4f}", f"{loss:.4f}", f"{wall_s:.1f} s"])
    accuracies = [float(each["accuracy"]) for each in found]
    least, met = min(accuracies), min(accuracies) >= EXPECTED
    return Answer(
        columns=("seed", "accuracy", "loss", "wall time"),
        rows=rows,
        verdict=f"Least {least:.4f}, mean {statistics.fmean(accuracies):.4f}; every seed at least {EXPECTED}: "
        f"{stated(met)}.",
        met=met,
        body={"seeds": found, "least": least, "mean": statistics.fmean(accuracies), "expected": EXPECTED},
    )


if __name__ == "__main__":
    given = arguments(__doc__).parse_args()
    finish(functools.partial(experiment, given.set), as_json=given.json)
