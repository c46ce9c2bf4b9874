"""Hold four algorithms on Fed-Heart-Disease against the figures that FLamby published.

Every algorithm runs with FLamby's numbers under five seeds; the figure is the mean accuracy of the four hospitals,
each on its own test patients, and its standard deviation (n − 1) over the seeds.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from simulations.runs import Answer, arguments, finish, progress, run, stated

SEEDS = 5
FIRST_SEED = 42  # FLamby's seeds are 42 to 46; the streams behind them are other ones here

_FEDOPT = (
    "training.server-learning-rate=0.01",
    "training.options.beta1=0.9",
    "training.options.beta2=0.999",
    "training.options.tau=1e-8",
)


@dataclass(frozen=True, kw_only=True)
class Published:
    """One row of the published table.

    Attributes:
        algorithm: its name.
        overrides: FLamby's numbers.
        mean: the published mean over the seeds.
        deviation: the published standard deviation over the seeds.
    """

    algorithm: str
    overrides: tuple[str, ...]
    mean: float
    deviation: float


TABLE = (
    Published(algorithm="fedavg", overrides=("training.learning-rate=0.001",), mean=0.685, deviation=0.028),
    Published(
        algorithm="fedprox",
        overrides=("training.learning-rate=0.001", "training.options.proximal-mu=0.01"),
        mean=0.685,
        deviation=0.028,
    ),
    Published(algorithm="fedadam", overrides=("training.learning-rate=0.01", *_FEDOPT), mean=0.726, deviation=0.014),
    Published(algorithm="fedyogi", overrides=("training.learning-rate=0.00316", *_FEDOPT), mean=0.731, deviation=0.013),
)


def experiment(overrides: Sequence[str], count: int = SEEDS) -> Answer:
    """Return the measured figures beside the published ones."""
    rows, found, met = [], [], True
    for published in TABLE:
        accuracies = [_accuracy(published, overrides, seed) for seed in range(FIRST_SEED, FIRST_SEED + count)]
        mean = statistics.fmean(accuracies)
        deviation = statistics.stdev(accuracies) if count > 1 else 0.0
        away = (mean - published.mean) / published.deviation
        met = met and abs(away) <= 2
        rows.append(
            [
                published.algorithm,
                f"{mean:.3f} ± {deviation:.3f}",
                f"{published.mean:.3f} ± {published.deviation:.3f}",
                f"{away:+.1f}",
            ]
        )
        found.append(
            {
                "algorithm": published.algorithm,
                "accuracies": accuracies,
                "mean": mean,
                "deviation": deviation,
                "published_mean": published.mean,
                "published_deviation": published.deviation,
            }
        )
    return Answer(
        columns=("algorithm", "measured", "published", "published deviations away"),
        rows=rows,
        verdict=f"Mean accuracy of the four hospitals, {count} seeds from {FIRST_SEED}; each within two published "
        f"standard deviations: {stated(met)}.",
        met=met,
        body={"algorithms": found, "seeds": list(range(FIRST_SEED, FIRST_SEED + count))},
    )


def _accuracy(published: Published, overrides: Sequence[str], seed: int) -> float:
    """Return the mean accuracy of the hospitals under one seed."""
    progress(f"{published.algorithm}, seed {seed}")
    chosen = (f"training.algorithm={published.algorithm}", *published.overrides, f"seed={seed}")
    summary = run(Path(__file__).with_name("scenario.toml"), [*overrides, *chosen]).summary
    return float(summary["metrics"]["accuracy_client_mean"])


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--seeds", type=int, default=SEEDS, metavar="N", help=f"how many (default: {SEEDS})")
    given = parser.parse_args()
    finish(functools.partial(experiment, given.set, given.seeds), as_json=given.json)
