"""Measure what label skew (Dirichlet's alpha) does to FedAvg, and whether FedProx helps.

Only 5 of 20 clients are asked each round and each trains for ten epochs, so that clients that differ drift apart.
The last rounds still swing, so the figure is the mean accuracy over the last five of them, over three seeds.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from simulations.runs import Answer, arguments, finish, progress, run, stated

ALPHAS = (0.05, 0.1, 0.5, 100.0)
ALGORITHMS: Mapping[str, tuple[str, ...]] = {
    "FedAvg": ("training.algorithm=fedavg",),
    "FedProx 0.1": ("training.algorithm=fedprox", "training.options.proximal-mu=0.1"),
    "FedProx 1": ("training.algorithm=fedprox", "training.options.proximal-mu=1"),
}
SEEDS = 3
LAST = 5

EVEN_AT_LEAST = 0.94
"""What FedAvg should reach where all clients see the same mix (alpha 100)."""

SKEW_COSTS_AT_LEAST = 0.10
"""How much less it should reach where each label sits with one or two clients (alpha 0.05)."""

Found: TypeAlias = dict[str, dict[float, list[float]]]


def experiment(overrides: Sequence[str], seeds: int = SEEDS, out: Path | None = None) -> Answer:
    """Return the accuracy of each algorithm at each alpha, and draw it where ``out`` is given."""
    found = {name: {alpha: _accuracies(name, alpha, overrides, seeds) for alpha in ALPHAS} for name in ALGORITHMS}
    means = {name: {alpha: statistics.fmean(row[alpha]) for alpha in ALPHAS} for name, row in found.items()}
    even, skewed = means["FedAvg"][ALPHAS[-1]], means["FedAvg"][ALPHAS[0]]
    gains = {name: max(means[name][alpha] - means["FedAvg"][alpha] for alpha in ALPHAS) for name in list(found)[1:]}
    met = even >= EVEN_AT_LEAST and even - skewed >= SKEW_COSTS_AT_LEAST
    verdict = (
        f"FedAvg at alpha {ALPHAS[-1]:g}: {even:.3f} (at least {EVEN_AT_LEAST}); at alpha {ALPHAS[0]:g} it is "
        f"{even - skewed:.3f} less (at least {SKEW_COSTS_AT_LEAST}): {stated(met)}. Most that FedProx gains on it: "
        + ", ".join(f"{gain:+.3f} ({name})" for name, gain in gains.items())
        + "."
    )
    if out is not None:
        _draw(found, out)
        verdict += f" The picture is in {out}."
    return Answer(
        columns=("algorithm", *(f"alpha {alpha:g}" for alpha in ALPHAS)),
        rows=[[name, *(_cell(row[alpha]) for alpha in ALPHAS)] for name, row in found.items()],
        verdict=verdict,
        met=met,
        body={"accuracies": {name: {f"{alpha:g}": row[alpha] for alpha in ALPHAS} for name, row in found.items()}},
    )


def _accuracies(name: str, alpha: float, overrides: Sequence[str], seeds: int) -> list[float]:
    """Return one figure a seed; a seed deals the same data to every algorithm."""
    figures = []
    for seed in range(seeds):
        progress(f"{name}, alpha {alpha:g}, seed {seed}")
        chosen = (*ALGORITHMS[name], f"data.alpha={alpha}", f"seed={seed}")
        lines = run(Path(__file__).with_name("scenario.toml"), [*overrides, *chosen]).lines
        figures.append(statistics.fmean(line["metrics"]["accuracy"] for line in lines[-LAST:]))
    return figures


def _cell(figures: Sequence[float]) -> str:
    """Return mean ± standard deviation over the seeds."""
    deviation = statistics.stdev(figures) if len(figures) > 1 else 0.0
    return f"{statistics.fmean(figures):.3f} ± {deviation:.3f}"


def _draw(found: Found, out: Path) -> None:
    """Draw accuracy over alpha, a line an algorithm and a dot a seed; the file's ending decides the format."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    for name, row in found.items():
        (line,) = axes.plot(ALPHAS, [statistics.fmean(row[alpha]) for alpha in ALPHAS], label=name)
        for alpha in ALPHAS:
            axes.plot([alpha] * len(row[alpha]), row[alpha], ".", color=line.get_color(), alpha=0.5)
    axes.set_xscale("log")
    axes.set_xticks(ALPHAS, [f"{alpha:g}" for alpha in ALPHAS])
    axes.minorticks_off()
    axes.set_xlabel("Dirichlet alpha: the smaller, the more the clients differ")
    axes.set_ylabel(f"accuracy, mean of the last {LAST} rounds")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--seeds", type=int, default=SEEDS, metavar="N", help=f"how many (default: {SEEDS})")
    parser.add_argument("--out", type=Path, metavar="FILE", help="draw a picture there: .svg, .png or .pdf")
    given = parser.parse_args()
    finish(functools.partial(experiment, given.set, given.seeds, given.out), as_json=given.json)
