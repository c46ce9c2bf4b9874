"""What correlated noise gains over independent noise at the same epsilon, when nothing is claimed of who takes part.

Same clients, rounds, clipping norm and learning rates in every run; only the noise and the draw differ. Epsilon is each
run's own, computed from its ledger.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from fedlearn.config import RunConfig
from fedlearn.privacy import matrix, mechanisms, plan
from fedlearn.scenario import read_scenario
from simulations.runs import Answer, arguments, finish, progress, run, stated

SEEDS = 3
SCENARIO = Path(__file__).with_name("scenario.toml")

_INDEPENDENT = ("privacy.mechanism=gaussian", "federation.sampling=fixed-size")
_SECRET = ("privacy.mechanism=gaussian", "federation.sampling=poisson")


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to spend an epsilon.

    Attributes:
        name: what is said of it.
        overrides: what makes the scenario it.
        one_band: whether noise is independent though participations are kept apart.
    """

    name: str
    overrides: tuple[str, ...] = ()
    one_band: bool = False


DP_FTRL = Way(name="correlated (dp-ftrl)")
SEPARATED = Way(name="independent, apart", one_band=True)
EVERY_ROUND = Way(name="independent", overrides=_INDEPENDENT)
SECRET = Way(name="independent, secret cohort", overrides=_SECRET)
NONE = Way(name="none", overrides=("privacy.unit=none", "federation.sampling=fixed-size", *_INDEPENDENT[:1]))
WAYS = (EVERY_ROUND, SEPARATED, DP_FTRL, SECRET, NONE)


def experiment(overrides: Sequence[str], seeds: Sequence[int] = range(SEEDS)) -> Answer:
    """Return the accuracy of every way, and what the formula says of their noise."""
    config = read_scenario(str(SCENARIO), overrides)
    target = config.privacy.target_epsilon
    if target is None:
        raise ValueError("the scenario sets privacy.target-epsilon")
    noise = predicted(config)
    found = [_measure(way, overrides, seeds, noise.get(way.name)) for way in WAYS]
    by_name = {each["way"]: each["accuracy"] for each in found}
    kept = all(each["epsilon"] <= target for each in found if each["epsilon"] is not None)
    gain = by_name[DP_FTRL.name] - by_name[SEPARATED.name]
    ordered = by_name[EVERY_ROUND.name] < by_name[SEPARATED.name] < by_name[DP_FTRL.name]
    return Answer(
        columns=("noise", "spent", "in the model", "accuracy", "least", "most"),
        rows=[_row(each) for each in found],
        verdict=f"Correlated noise gains {gain:+.4f} over independent noise that knows of the separation too, and "
        f"{by_name[DP_FTRL.name] - by_name[EVERY_ROUND.name]:+.4f} over noise that does not. No ledger above "
        f"{target:g}, and each better than the one before: {stated(kept and ordered)}.",
        met=kept and ordered,
        body={"target": target, "ways": found, "gain": gain, "seeds": list(seeds)},
    )


def predicted(config: RunConfig) -> dict[str, float]:
    """Return the noise in the model, root-mean-square over the rounds, with dp-ftrl's as 1, for the same epsilon.

    It is sensitivity × error of the matrix; independent noise has one band, and a client that may take part in any
    round is one whose participations are one round apart.
    """
    rounds, separation = config.federation.rounds, config.privacy.min_separation or 1
    bands = matrix.square_root_coefficients(matrix.choose_bands(rounds, separation))
    noise = {
        DP_FTRL.name: matrix.sensitivity(bands, rows=rounds, min_separation=separation) * matrix.error(bands, rounds),
        SEPARATED.name: matrix.sensitivity((1.0,), rows=rounds, min_separation=separation)
        * matrix.error((1.0,), rounds),
        EVERY_ROUND.name: matrix.sensitivity((1.0,), rows=rounds, min_separation=1) * matrix.error((1.0,), rounds),
    }
    return {name: value / noise[DP_FTRL.name] for name, value in noise.items()}


@contextmanager
def one_band() -> Iterator[None]:
    """Let dp-ftrl's matrix be the identity: noise is independent, and a client's participations are counted apart.

    The plan, the mechanism and the ledger are the product's; nothing in the configuration asks for this, because more
    bands are never worse.
    """
    with ExitStack() as stack:
        for module in (plan, mechanisms):
            stack.enter_context(mock.patch.object(module, "choose_bands", lambda _rows, _separation: 1))
        yield


def _measure(way: Way, overrides: Sequence[str], seeds: Sequence[int], noise: float | None) -> dict[str, Any]:
    """Run one way under every seed."""
    accuracies, privacy = [], dict[str, Any]()
    for seed in seeds:
        progress(f"{way.name}, seed {seed}")
        with one_band() if way.one_band else nullcontext():
            summary = run(SCENARIO, [*overrides, *way.overrides, f"seed={seed}"]).summary
        accuracies.append(float(summary["metrics"]["accuracy"]))
        privacy = summary["privacy"]  # by the ledger; it depends on no seed
    return {
        "way": way.name,
        "epsilon": None if privacy["unit"] == "none" else float(privacy["epsilon"]),
        "noise": noise,
        "accuracy": statistics.median(accuracies),
        "accuracies": accuracies,
    }


def _row(measured: dict[str, Any]) -> list[str]:
    """Return the cells of one way."""
    accuracies = measured["accuracies"]
    return [
        measured["way"],
        "infinite" if measured["epsilon"] is None else f"{measured['epsilon']:.3f}",
        "" if measured["noise"] is None else f"{measured['noise']:.2f}",
        f"{measured['accuracy']:.4f}",
        f"{min(accuracies):.4f}",
        f"{max(accuracies):.4f}",
    ]


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--seeds", type=int, default=SEEDS, metavar="N", help=f"how many (default: {SEEDS})")
    given = parser.parse_args()
    finish(lambda: experiment(given.set, range(given.seeds)), as_json=given.json)
