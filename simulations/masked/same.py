"""Whether masking changes the model: the same federation unmasked in floats, encoded without masks, and masked.

``ideal`` and ``active`` must give the same bytes. Both may differ from the float run by rounding: after one round by at
most one unit of the lattice a client, which the script computes and compares coordinate by coordinate; after many, by
what training makes of that, which shows in the accuracy.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from fedlearn.federation.run_folder import RunFolder
from fedlearn.scenario import read_scenario
from fedlearn.secagg.terms import Terms
from fedlearn.simulation.engine import simulate
from simulations.runs import Answer, arguments, finish, progress, stated

SEEDS = 3
HALF_A_POINT = 0.005
HERE = Path(__file__).parent
MODES = ("off", "ideal", "active")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One federation.

    Attributes:
        name: what it is called.
        scenario: its file.
        data: whether it reads what ``--set data.path`` names.
    """

    name: str
    scenario: Path
    data: bool = False


SETTINGS = (
    Setting(name="digits, 20 clients", scenario=HERE.parent / "digits" / "scenario.toml"),
    Setting(name="mnist, 20 of 50 clients", scenario=HERE / "scenario.toml", data=True),
)


def experiment(
    overrides: Sequence[str], *, settings: Sequence[Setting] = SETTINGS, seeds: Sequence[int] = range(SEEDS)
) -> Answer:
    """Return, for every federation, whether the bytes agree, how far the first round is off, and the accuracies."""
    found = [_measure(setting, overrides, seeds) for setting in settings]
    same = all(each["same_bytes"] for each in found)
    rounded = all(each["off_by_units"] <= each["at_most_units"] for each in found)
    near = all(abs(each["active"] - each["off"]) <= HALF_A_POINT for each in found)
    return Answer(
        columns=("federation", "unmasked", "ideal", "active", "same bytes", "first round off by", "at most"),
        rows=[_row(each) for each in found],
        verdict=f"ideal and active are the same bytes: {stated(same)}. The first round within rounding: "
        f"{stated(rounded)}. Median accuracy within half a point of unmasked: {stated(near)}.",
        met=same and rounded and near,
        body={"settings": found, "seeds": list(seeds)},
    )


def _measure(setting: Setting, overrides: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    """Run one federation in every mode under every seed."""
    wanted = [each for each in overrides if setting.data or not each.startswith("data.path=")]
    accuracies: dict[str, list[float]] = {mode: [] for mode in MODES}
    same, off_by, at_most = True, 0.0, 0.0
    for seed in seeds:
        models = {}
        for mode in MODES:
            progress(f"{setting.name}, {mode}, seed {seed}")
            accuracy, models[mode], _ = _run(setting, [*wanted, f"seed={seed}", f"secagg.mode={mode}"])
            accuracies[mode].append(accuracy)
        same &= models["ideal"] == models["active"]
        units, most = _first_round(setting, [*wanted, f"seed={seed}"])
        off_by, at_most = max(off_by, units), max(at_most, most)
    return {
        "federation": setting.name,
        "same_bytes": same,
        "off_by_units": off_by,
        "at_most_units": at_most,
        "accuracies": accuracies,
        **{mode: statistics.median(accuracies[mode]) for mode in MODES},
    }


def _run(setting: Setting, overrides: Sequence[str]) -> tuple[float, bytes, dict[str, np.ndarray[Any, Any]]]:
    """Return a run's accuracy, its model as bytes, and its arrays."""
    with tempfile.TemporaryDirectory(prefix="fedlearn-") as place:
        config = read_scenario(str(setting.scenario), ["training.weighting=uniform", *overrides])
        folder = RunFolder.create(Path(place) / "run", config)
        summary = simulate(folder)
        accuracy = float(summary["metrics"]["accuracy"])
        return accuracy, folder.model_path.read_bytes(), load_file(folder.model_path)


def _first_round(setting: Setting, overrides: Sequence[str]) -> tuple[float, float]:
    """Return how far the model of one masked round is from the unmasked one's, and how far it may be.

    In units of the lattice of the *sum*: each client rounds by less than one, and the model's type rounds once more.
    """
    once = [*overrides, "federation.rounds=1"]
    _, _, plain = _run(setting, [*once, "secagg.mode=off"])
    _, _, masked = _run(setting, [*once, "secagg.mode=active"])
    config = read_scenario(str(setting.scenario), ["training.weighting=uniform", *once, "secagg.mode=active"])
    cohort, size = config.federation.cohort, sum(array.size for array in plain.values())
    scale = Terms.of(config).encoding(size).scale
    units = [
        float(np.abs(plain[name].astype(np.float64) - masked[name].astype(np.float64)).max()) * scale * cohort
        for name in plain
    ]
    largest = max(float(np.abs(array).max()) for array in plain.values())
    own_type = 2 * largest * float(np.finfo(np.float32).eps) * scale * cohort
    return max(units), cohort + own_type


def _row(each: dict[str, Any]) -> list[str]:
    """Return the cells of one federation."""
    return [
        each["federation"],
        *(f"{each[mode]:.4f}" for mode in MODES),
        "yes" if each["same_bytes"] else "NO",
        f"{each['off_by_units']:.2f} units",
        f"{each['at_most_units']:.2f} units",
    ]


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--seeds", type=int, default=SEEDS, metavar="N", help=f"how many (default: {SEEDS})")
    given = parser.parse_args()
    finish(lambda: experiment(given.set, seeds=range(given.seeds)), as_json=given.json)
