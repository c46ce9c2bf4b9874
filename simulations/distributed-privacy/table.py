"""What hiding every client from the server, too, costs in accuracy: beside a trusted server's noise, and beside none.

Every federation is run three ways at the same settings and seeds. Epsilon is computed from each run's ledger when it is
over. The last columns say what Skellam noise in lanes of 21 bits costs more than Gaussian noise would: epsilon of the
same rounds with Gaussian noise of the same multiplier, by the same accountant (Rényi), and by the tightest (PLD).
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedlearn.federation.run_folder import RunFolder
from fedlearn.privacy.accounting import epsilon
from fedlearn.privacy.ledger import read_events, releases_of
from fedlearn.privacy.releases import Release
from fedlearn.scenario import read_scenario
from fedlearn.simulation.engine import simulate
from simulations.runs import Answer, arguments, finish, progress, stated

SEEDS = 3
TARGET = 8.0
HERE = Path(__file__).parent

_CENTRAL = (
    "secagg.mode=off",
    "privacy.trust=central",
    "privacy.mechanism=gaussian",
    "privacy.amplification=none",
    "federation.sampling=fixed-size",
)
_NONE = ("secagg.mode=off", "privacy.unit=none", "privacy.trust=central", "privacy.mechanism=gaussian")
WAYS = {"none": _NONE, "central": _CENTRAL, "distributed": ()}
"""By trust: nobody is hidden; the server adds the noise, to the same cohorts; the clients do."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One federation.

    Attributes:
        name: what it is called.
        scenario: its file, which asks for distributed trust.
        least: the median accuracy that is expected under distributed trust.
        data: whether it reads what ``--set data.path`` names.
    """

    name: str
    scenario: Path
    least: float
    data: bool = False


SETTINGS = (
    Setting(name="mnist, 1,000 clients", scenario=HERE / "scenario.toml", least=0.89, data=True),
    Setting(name="digits, 479 clients", scenario=HERE / "digits.toml", least=0.89),
)


def experiment(
    overrides: Sequence[str],
    *,
    settings: Sequence[Setting] = SETTINGS,
    seeds: Sequence[int] = range(SEEDS),
    target: float = TARGET,
) -> Answer:
    """Return accuracy and epsilon of every federation, each way."""
    found = [_measure(setting, way, overrides, seeds, target) for setting in settings for way in WAYS]
    private = [each for each in found if each["trust"] != "none"]
    kept = all(each["epsilon"] <= target for each in private)
    reached = all(each["accuracy"] >= each["least"] for each in found)
    near = all(abs(each["over_gaussian"]) <= 0.003 for each in found if each["trust"] == "distributed")
    return Answer(
        columns=("federation", "noise by", "spent", "accuracy", "least", "most", "over Gaussian", "PLD", "a run"),
        rows=[_row(each) for each in found],
        verdict=f"No ledger above epsilon {target:g}: {stated(kept)}. Median accuracy under distributed trust: "
        f"{stated(reached)}. Epsilon within 0.3 % of a central Gaussian's: {stated(near)}.",
        met=kept and reached and near,
        body={"runs": found, "seeds": list(seeds), "target": target},
    )


def _measure(
    setting: Setting, way: str, overrides: Sequence[str], seeds: Sequence[int], target: float
) -> dict[str, Any]:
    """Run one federation one way under every seed."""
    wanted = [each for each in overrides if setting.data or not each.startswith("data.path=")]
    accuracies, seconds, told = [], [], dict[str, Any]()
    for seed in seeds:
        progress(f"{setting.name}, {way}, seed {seed}")
        asked = [] if way == "none" else [f"privacy.target-epsilon={target}"]
        with tempfile.TemporaryDirectory(prefix="fedlearn-") as place:
            config = read_scenario(str(setting.scenario), [*WAYS[way], *asked, *wanted, f"seed={seed}"])
            folder = RunFolder.create(Path(place) / "run", config)
            started = time.monotonic()
            summary = simulate(folder)
            seconds.append(time.monotonic() - started)
            accuracies.append(float(summary["metrics"]["accuracy"]))
            told = _told(folder, summary)  # by the ledger; who takes part depends on no seed
    return {
        "federation": setting.name,
        "trust": way,
        **told,
        "accuracy": statistics.median(accuracies),
        "accuracies": accuracies,
        "least": setting.least if way == "distributed" else 0.0,
        "wall_s": round(statistics.median(seconds), 1),
    }


def _told(folder: RunFolder, summary: dict[str, Any]) -> dict[str, Any]:
    """Return what a run's ledger says of privacy, and what a Gaussian would have cost."""
    privacy = summary["privacy"]
    told: dict[str, Any] = {"epsilon": privacy["epsilon"], "delta": privacy.get("delta")}
    if privacy["unit"] == "none":
        return told
    releases = releases_of(read_events(folder.path / "ledger.jsonl"))
    told["noise_multiplier"] = min(each.noise_multiplier for each in releases)
    if privacy["trust"] == "distributed":
        gaussian = [_as_gaussian(each, folder.config.privacy.bound_l2) for each in releases]
        told["gaussian_rdp"] = epsilon(gaussian, privacy["delta"], accountant="rdp")
        told["gaussian_pld"] = epsilon(gaussian, privacy["delta"])
        told["over_gaussian"] = told["epsilon"] / told["gaussian_rdp"] - 1
    return told


def _as_gaussian(release: Release, bound_l2: float) -> Release:
    """Return the release as a central Gaussian's of the same noise: nothing is rounded, the bound is all that moves."""
    (query,) = release.queries
    return replace(release, mechanism="gaussian", lattice=None, queries=(replace(query, sensitivity_l2=bound_l2),))


def _row(measured: dict[str, Any]) -> list[str]:
    """Return the cells of one federation and way."""
    spent = measured["epsilon"]
    over = measured.get("over_gaussian")
    return [
        measured["federation"],
        {"none": "nobody", "central": "the server", "distributed": "the clients"}[measured["trust"]],
        "infinite" if spent == "inf" else f"{spent:.3f}",
        f"{measured['accuracy']:.4f}",
        f"{min(measured['accuracies']):.4f}",
        f"{max(measured['accuracies']):.4f}",
        "" if over is None else f"{100 * over:+.3f} %",
        "" if over is None else f"{measured['gaussian_pld']:.3f}",
        f"{measured['wall_s']:.0f} s",
    ]


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--seeds", type=int, default=SEEDS, metavar="N", help=f"how many (default: {SEEDS})")
    given = parser.parse_args()
    finish(lambda: experiment(given.set, seeds=range(given.seeds)), as_json=given.json)
