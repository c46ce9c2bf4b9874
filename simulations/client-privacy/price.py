"""What hiding every client costs in accuracy: each federation with and without it, at the same settings and seeds.

Epsilon is computed from each run's ledger when it is over, and held against what was asked for.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simulations.runs import Answer, arguments, finish, progress, run, stated

SEEDS = 3
HERE = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One federation, run without privacy and at each epsilon.

    Attributes:
        name: what it is called.
        scenario: its file.
        epsilons: what is asked for, one run after the other.
        expected: the least median accuracy by epsilon; others are only reported.
        data: whether it reads what ``--set data.path`` names.
    """

    name: str
    scenario: Path
    epsilons: tuple[float, ...]
    expected: dict[float, float]
    data: bool = False


SETTINGS = (
    Setting(
        name="mnist, 1,000 clients",
        scenario=HERE / "scenario.toml",
        epsilons=(8.0, 2.0),
        expected={8.0: 0.90},
        data=True,
    ),
    Setting(name="digits, 479 clients", scenario=HERE / "digits.toml", epsilons=(8.0,), expected={8.0: 0.88}),
    Setting(
        name="digits, 20 clients",
        scenario=HERE.parent / "digits" / "scenario.toml",
        epsilons=(8.0,),
        expected={},
    ),
)


def experiment(
    overrides: Sequence[str], *, settings: Sequence[Setting] = SETTINGS, seeds: Sequence[int] = range(SEEDS)
) -> Answer:
    """Return accuracy and epsilon of every federation, without privacy and with it."""
    rows, found = [], []
    for setting in settings:
        for target in (None, *setting.epsilons):
            measured = _measure(setting, target, overrides, seeds)
            found.append(measured)
            rows.append(_row(measured))
    spent = [each for each in found if each["target"] is not None]
    kept = all(each["epsilon"] <= each["target"] for each in spent)
    reached = all(each["accuracy"] >= each["expected"] for each in found)
    return Answer(
        columns=("federation", "asked for", "spent", "accuracy", "least", "most", "a run"),
        rows=rows,
        verdict=f"No ledger above its epsilon: {stated(kept)}. Median accuracy where one is expected "
        f"({', '.join(_expectations(settings))}): {stated(reached)}.",
        met=kept and reached,
        body={"runs": found, "seeds": list(seeds)},
    )


def _measure(setting: Setting, target: float | None, overrides: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    """Run one federation at one epsilon under every seed."""
    wanted = [each for each in overrides if setting.data or not each.startswith("data.path=")]
    chosen = ["privacy.unit=none"] if target is None else ["privacy.unit=client", f"privacy.target-epsilon={target}"]
    accuracies, seconds, privacy = [], [], dict[str, Any]()
    for seed in seeds:
        progress(f"{setting.name}, epsilon {_word(target)}, seed {seed}")
        started = time.monotonic()
        summary = run(setting.scenario, [*wanted, *chosen, f"seed={seed}"]).summary
        seconds.append(time.monotonic() - started)
        accuracies.append(float(summary["metrics"]["accuracy"]))
        privacy = summary["privacy"]  # by the ledger; it depends on no seed
    return {
        "federation": setting.name,
        "target": target,
        "epsilon": privacy["epsilon"],
        "delta": privacy.get("delta"),
        "noise_multiplier": privacy.get("noise_multiplier"),
        "accuracy": statistics.median(accuracies),
        "accuracies": accuracies,
        "expected": 0.0 if target is None else setting.expected.get(target, 0.0),
        "wall_s": round(statistics.median(seconds), 1),
    }


def _row(measured: dict[str, Any]) -> list[str]:
    """Return the cells of one federation at one epsilon."""
    return [
        measured["federation"],
        _word(measured["target"]),
        "infinite" if measured["target"] is None else f"{measured['epsilon']:.3f}",
        f"{measured['accuracy']:.4f}",
        f"{min(measured['accuracies']):.4f}",
        f"{max(measured['accuracies']):.4f}",
        f"{measured['wall_s']:.0f} s",
    ]


def _word(target: float | None) -> str:
    """Return an epsilon as the table has it."""
    return "nothing" if target is None else f"{target:g}"


def _expectations(settings: Sequence[Setting]) -> list[str]:
    """Return what is expected, in words."""
    return [
        f"{setting.name} at {target:g}: {least}" for setting in settings for target, least in setting.expected.items()
    ] or ["nowhere"]


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--seeds", type=int, default=SEEDS, metavar="N", help=f"how many (default: {SEEDS})")
    given = parser.parse_args()
    finish(lambda: experiment(given.set, seeds=range(given.seeds)), as_json=given.json)
