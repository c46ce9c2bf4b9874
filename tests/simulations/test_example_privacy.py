"""Every client's epsilon is Opacus', the hospitals' task treats each patient alone, and both can be seen to fail."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlearn.errors import LedgerMissingError, RunFailedError, TaskError
from fedlearn.federation.run_folder import RunFolder
from fedlearn.learning import build_flat_model, check_prepare
from fedlearn.learning.validators import check_private
from fedlearn.scenario import read_scenario
from fedlearn.simulation.engine import simulate
from fedlearn.sources import SeedTree
from fedlearn.tasks import load_task

Script = Callable[[str], Any]

FOLDER = Path(__file__).parents[2] / "simulations" / "example-privacy"
TASK = str(FOLDER / "task.py")
TINY = ("federation.rounds=2", "training.local-steps=2")
# age, male, pressure, cholesterol, sugar, heart rate, angina, ST depression, then the levels of two categories
PATIENT = (60.0, 1.0, 150.0, 239.0, 0.0, 120.0, 1.0, 3.0, 0.0, 0.0, 1.0, 1.0, 0.0)
SCALED = (1.0, 1.0, 1.0, 1.0, -1.0, -1.0, 1.0, 2.0, -1.0, -1.0, 1.0, 1.0, -1.0)


# -- the hospitals' task -------------------------------------------------------------------------------------------


def test_it_may_hide_a_patient_and_the_task_it_is_made_from_may_not() -> None:
    task = load_task(TASK)
    check_prepare(task)
    check_private(task.build_model(), unit="example", mode="functorch")
    with pytest.raises(TaskError, match="scaling by the client's own mean"):
        check_prepare(load_task(str(FOLDER.parent / "heart-disease" / "task.py")))


def test_features_are_steps_from_fixed_numbers_whoever_else_is_there() -> None:
    scaling = load_task(TASK).build_model()[0]  # type: ignore[index]
    others = torch.randn(5, 13) * 1000
    alone = scaling(torch.tensor([PATIENT]))
    torch.testing.assert_close(alone, torch.tensor([SCALED]))
    assert torch.equal(scaling(torch.cat([others, torch.tensor([PATIENT])]))[5:], alone)


def test_what_was_not_measured_is_at_the_centre() -> None:
    scaling = load_task(TASK).build_model()[0]  # type: ignore[index]
    scaled = scaling(torch.zeros(1, 13))[0]
    assert scaled[2] == 0 and scaled[3] == 0
    assert (scaled[[0, 1, 4, 5, 6, 7, 8]] != 0).all(), "a zero that can be measured is one"


def test_only_weights_and_a_bias_are_federated() -> None:
    model = build_flat_model(load_task(TASK), SeedTree.root(0))
    assert [entry.shape for entry in model.spec.entries] == [(1, 13), (1,)]


# -- the accounts --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished run of three clients, of which the batches of one are always whole."""
    uneven = ["federation.clients=3", "data.partition=dirichlet", "training.batch-size=400"]
    overrides = [*uneven, "privacy.target-epsilon=2", *TINY]
    config = read_scenario(str(FOLDER / "digits.toml"), overrides)
    folder = RunFolder.create(tmp_path_factory.mktemp("run"), config)
    simulate(folder)
    return folder


def test_every_ledger_gives_opacus_epsilon_and_keeps_to_the_target(script: Script, digits_run: RunFolder) -> None:
    accounts = list(script("example-privacy.accounts").accounts_of(digits_run))
    assert [each.client for each in accounts] == [0, 1, 2]
    assert sum(each.size for each in accounts) == 1437
    assert len({each.rate for each in accounts}) > 1 and max(each.rate for each in accounts) == 1.0
    for each in accounts:
        assert each.agrees and each.kept, each
        assert 1.95 < each.ledger <= each.prv <= 2.0 < each.rdp


@pytest.mark.parametrize(
    "changed",
    [{"ledger": 7.5}, {"prv": 7.5}, {"rdp": 7.9}, {"target": 7.99}, {"prv": math.inf}, {"ledger": math.nan}],
    ids=lambda changed: next(iter(changed)),
)
def test_the_comparison_sees_a_difference(script: Script, changed: dict[str, float]) -> None:
    accounts = script("example-privacy.accounts")
    good = accounts.Account(
        client=0, size=72, rate=0.4, noise_multiplier=1.0, target=8.0, ledger=7.985, prv=7.995, rdp=9.4
    )
    assert good.agrees and good.kept
    bad = replace(good, **changed)
    assert not (bad.agrees and bad.kept)


def test_a_ledger_that_is_short_or_gone_is_no_account(script: Script, digits_run: RunFolder) -> None:
    accounts_of = script("example-privacy.accounts").accounts_of
    path = digits_run.path / "clients" / "0" / "ledger.jsonl"
    whole = path.read_bytes()
    try:
        path.write_bytes(b"".join(whole.splitlines(keepends=True)[:-1]))  # its chain still holds
        with pytest.raises(RunFailedError, match="client 0 does not hold every round"):
            list(accounts_of(digits_run))
        path.unlink()
        with pytest.raises(LedgerMissingError):
            list(accounts_of(digits_run))
    finally:
        path.write_bytes(whole)


# -- the table -----------------------------------------------------------------------------------------------------


def test_a_row_of_hospitals(script: Script, heart_disease: Path) -> None:
    table = script("example-privacy.table")
    rows = [each for each in table.HOSPITALS if each.target in (None, 1)][-2:]
    answer = table.experiment([f"data.path={heart_disease}", *TINY], seeds=(0,), settings=rows)
    plain, hidden = answer.body["settings"]
    assert answer.met, answer.verdict
    assert plain["accounts"] == [] and [each["examples"] for each in hidden["accounts"]] == [199, 172, 30, 85]
    assert all(0.9 < each["ledger"] <= 1 for each in hidden["accounts"])
    assert all(0 < each["median"] < 1 for each in (plain, hidden))


def test_a_model_that_learned_nothing_is_not_as_expected(script: Script) -> None:
    table = script("example-privacy.table")
    row = next(each for each in table.DIGITS if each.target == 8 and each.question == "digits, 5")
    whole = ["federation.clients=2", "training.batch-size=0", "federation.rounds=1", "training.local-steps=1"]
    answer = table.experiment(["data.path=digits-have-none", *whole], seeds=(0,), settings=[row])
    assert not answer.met
    assert answer.body["clients"] == 2 and answer.body["apart"] <= 0.02


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_hospitals_and_five_clients_with_digits(script: Script, heart_disease: Path) -> None:
    table = script("example-privacy.table")
    rows = [*table.HOSPITALS[2:], *(each for each in table.DIGITS if each.question == "digits, 5")]
    answer = table.experiment([f"data.path={heart_disease}"], settings=rows)
    assert answer.met, answer.verdict
    medians = {(each["data"], each["setting"]): each["median"] for each in answer.body["settings"]}
    assert medians["hospitals", "no privacy"] == pytest.approx(0.81, abs=0.03)
    assert medians["hospitals", "ε = 1"] == pytest.approx(0.80, abs=0.05)
    assert medians["digits, 5", "ε = 8"] == pytest.approx(0.89, abs=0.03)
    assert medians["digits, 5", "ε = 8"] > medians["digits, 5", "ε = 1"] > 0.6
