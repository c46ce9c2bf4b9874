"""What hiding every example of a client costs in accuracy, and whether each client's epsilon is what Opacus says.

Heart disease by hospital and digits, without privacy and at epsilon 8, 4 and 1, under the same seeds; a figure is the
median over them.
"""

from __future__ import annotations

import functools
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlearn.cli.predict import open_finished
from fedlearn.data.loaders import distribute_data
from fedlearn.federation.run_folder import RunFolder
from fedlearn.learning import evaluate
from fedlearn.scenario import read_scenario
from fedlearn.simulation.engine import simulate
from fedlearn.sources import SeedTree
from simulations.runs import Answer, arguments, finish, progress, stated

from .accounts import Account, accounts_of

SEEDS = 3
COST = 0.05  # of accuracy, at epsilon 8 in the hospitals: more would not be as expected
LEAST = 0.85  # accuracy at epsilon 8 on digits

_HERE = Path(__file__).parent
_HOSPITALS = _HERE / "scenario.toml"
_FLAMBY = _HERE.parent / "heart-disease" / "scenario.toml"
_DIGITS = _HERE / "digits.toml"
_PLAIN = ("privacy.unit=none",)
_FLAMBYS_TRAINING = ("training.learning-rate=0.001", "federation.rounds=15", "training.local-steps=100")
_FIVE = ("federation.clients=5", "data.partition=dirichlet", "training.batch-size=128")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One row.

    Attributes:
        question: which data, and at how many clients if not at four hospitals.
        name: what is done with it.
        scenario: the file.
        overrides: what makes the scenario this row.
        target: epsilon; ``None``: no privacy.
    """

    question: str
    name: str
    scenario: Path
    overrides: tuple[str, ...] = ()
    target: float | None = None


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What came of one row: the accuracy under each seed, and the account of each client under each seed."""

    setting: Setting
    accuracies: tuple[float, ...]
    accounts: tuple[Account, ...]

    @property
    def median(self) -> float:
        """The median accuracy."""
        return statistics.median(self.accuracies)


def _hidden(question: str, scenario: Path, rates: dict[float, float], *overrides: str) -> tuple[Setting, ...]:
    """Return a row for every epsilon, with the learning rate that goes with it."""
    return tuple(
        Setting(
            question=question,
            name=f"ε = {target:g}",
            scenario=scenario,
            overrides=(*overrides, f"privacy.target-epsilon={target:g}", f"training.learning-rate={rate:g}"),
            target=target,
        )
        for target, rate in rates.items()
    )


HOSPITALS = (
    Setting(
        question="hospitals",
        name="published",
        scenario=_FLAMBY,
        overrides=_FLAMBYS_TRAINING,
    ),
    Setting(
        question="hospitals",
        name="published, scaled alike",
        scenario=_HOSPITALS,
        overrides=(*_PLAIN, *_FLAMBYS_TRAINING, "training.batch-size=4"),
    ),
    Setting(question="hospitals", name="no privacy", scenario=_HOSPITALS, overrides=_PLAIN),
    *_hidden("hospitals", _HOSPITALS, {8: 0.5, 4: 0.5, 1: 0.5}),
)
DIGITS = (
    Setting(
        question="digits, 20",
        name="no privacy",
        scenario=_DIGITS,
        overrides=(*_PLAIN, "training.learning-rate=0.5"),
    ),
    *_hidden("digits, 20", _DIGITS, {8: 2, 4: 1, 1: 0.5}),
    Setting(
        question="digits, 5",
        name="no privacy",
        scenario=_DIGITS,
        overrides=(*_PLAIN, "training.learning-rate=0.5", *_FIVE),
    ),
    *_hidden("digits, 5", _DIGITS, {8: 2, 4: 2, 1: 1}, *_FIVE),
)


def experiment(
    overrides: Sequence[str], seeds: Sequence[int] = range(SEEDS), settings: Sequence[Setting] = (*HOSPITALS, *DIGITS)
) -> Answer:
    """Return the accuracy and the accounts of every row; ``data.path`` among the overrides is the hospitals'."""
    found = [_measure(setting, overrides, seeds) for setting in settings]
    accounts = [account for each in found for account in each.accounts]
    faults = [each for each in accounts if not (each.agrees and each.kept)]
    useful = all(_useful(each, found) for each in found if each.setting.target == 8)
    apart = max((abs(each.ledger - each.prv) for each in accounts), default=0.0)
    met = not faults and useful
    return Answer(
        columns=("data, clients", "setting", "accuracy", "ledgers", "PRV", "RDP"),
        rows=[_row(each) for each in found],
        verdict=f"Of {len(accounts)} clients' ledgers, {len(accounts) - len(faults)} give Opacus' PRV epsilon (at most "
        f"{apart:.4f} apart) and keep to the target; accuracy at epsilon 8: "
        f"{stated(useful)}.",
        met=met,
        body={"settings": [_body(each) for each in found], "clients": len(accounts), "apart": apart},
    )


def _useful(hidden: Measured, found: Sequence[Measured]) -> bool:
    """Return whether a model at epsilon 8 is worth what it should be."""
    if hidden.setting.scenario == _DIGITS:
        return hidden.median >= LEAST
    plain = [each.median for each in found if each.setting.name == "no privacy" and each.setting.scenario == _HOSPITALS]
    return all(hidden.median >= median - COST for median in plain)


def _measure(setting: Setting, overrides: Sequence[str], seeds: Sequence[int]) -> Measured:
    """Return what comes of one row."""
    if setting.scenario == _DIGITS:  # they come with the package
        overrides = [each for each in overrides if not each.startswith("data.path=")]
    accuracies, accounts = [], []
    for seed in seeds:
        progress(f"{setting.question}, {setting.name}, seed {seed}")
        with tempfile.TemporaryDirectory(prefix="fedlearn-") as place:
            config = read_scenario(str(setting.scenario), [*setting.overrides, *overrides, f"seed={seed}"])
            folder = RunFolder.create(Path(place) / "run", config)
            summary = simulate(folder)
            central = summary["metrics"].get("accuracy") if setting.scenario == _DIGITS else None
            accuracies.append(float(central) if central is not None else _by_client(folder))
            if setting.target is not None:
                accounts += accounts_of(folder)
    return Measured(setting=setting, accuracies=tuple(accuracies), accounts=tuple(accounts))


def _by_client(folder: RunFolder) -> float:
    """Return the mean over the clients of the accuracy on each one's own test examples.

    Only whoever has all the data, as here, can measure it: under example-level privacy the clients tell nobody.
    """
    finished, seeds = open_finished(folder.path), SeedTree.root(folder.config.seed)
    task, model, parameters = finished.task, finished.model, finished.model.vector()
    dealt = distribute_data(task, folder.config)
    accuracies = []
    for client in range(folder.config.federation.clients):
        test = task.prepare(dealt.client(client)).test
        if test is None:
            raise ValueError(f"client {client} has nothing to test on")
        accuracies.append(evaluate(model, task, parameters, test, seeds=seeds).means()["accuracy"])
    return statistics.fmean(accuracies)


def _row(measured: Measured) -> list[str]:
    """Return one row of the table; epsilons are the largest of the clients under any seed."""
    shown = f"{measured.median:.3f} ({min(measured.accuracies):.3f}–{max(measured.accuracies):.3f})"
    accounts = measured.accounts
    spent = [f"{max(getattr(each, name) for each in accounts):.3f}" for name in ("ledger", "prv", "rdp") if accounts]
    return [measured.setting.question, measured.setting.name, shown, *(spent or 3 * ["–"])]


def _body(measured: Measured) -> dict[str, Any]:
    """Return the same for machines, with every client's account."""
    return {
        "data": measured.setting.question,
        "setting": measured.setting.name,
        "target": measured.setting.target,
        "accuracies": list(measured.accuracies),
        "median": measured.median,
        "accounts": [
            {
                "client": each.client,
                "examples": each.size,
                "rate": each.rate,
                "noise_multiplier": each.noise_multiplier,
                "ledger": each.ledger,
                "prv": each.prv,
                "rdp": each.rdp,
            }
            for each in measured.accounts
        ],
    }


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--seeds", type=int, default=SEEDS, metavar="N", help=f"how many (default: {SEEDS})")
    given = parser.parse_args()
    finish(functools.partial(experiment, given.set, range(given.seeds)), as_json=given.json)
