"""A client's own account: over all rounds and runs, asked before anything is trained, written before it leaves."""

from __future__ import annotations

import math
import time
import warnings
from dataclasses import replace

import numpy as np
import pytest

from fedlearn.config import PrivacyConfig, TrainingConfig
from fedlearn.errors import DependencyError, LedgerError, ReplyError, RunFailedError
from fedlearn.learning import example_epsilon as accounting
from fedlearn.learning.account import ClientAccount
from fedlearn.learning.dpsgd import DpSgd, planned_release
from fedlearn.learning.example_epsilon import composed_epsilon
from fedlearn.privacy.ledger import Ledger, read_events
from fedlearn.privacy.releases import Matrix, Query, Release, Sampling

pytest.importorskip("opacus")
SIZE, BATCH, STEPS = 72, 16, 10
TRAINING = TrainingConfig(batch_size=BATCH, local_steps=STEPS)
DELTA = SIZE**-1.1


def release(round_number=1, *, z=2.0, simulated=False, update="a", training=TRAINING, size=SIZE) -> Release:
    return planned_release(
        round_number=round_number,
        size=size,
        training=training,
        dp=DpSgd(noise_multiplier=z, bound_l2=0.5, mode="hooks"),
        simulated=simulated,
        evidence={"run": "one", "update": update},
    )


def opened(tmp_path, **changes) -> ClientAccount:
    return ClientAccount(
        tmp_path / "own" / "ledger.jsonl", **{"size": SIZE, "delta": "auto", "max_epsilon": None, **changes}
    )


def by_opacus(kind: str, steps: int, *, z=2.0, rate=BATCH / SIZE, delta=DELTA) -> float:
    from opacus.accountants import create_accountant

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Optimal order is the")
        warnings.filterwarnings("ignore", "GDP accounting is experimental")
        accountant = create_accountant(kind)
        for _ in range(steps):
            accountant.step(noise_multiplier=z, sample_rate=rate)
        return float(accountant.get_epsilon(delta))


# -- epsilon -------------------------------------------------------------------------------------------------------


def test_twenty_rounds_cost_what_one_opacus_accountant_says_and_not_a_new_engine_each_round(tmp_path) -> None:
    account = opened(tmp_path)
    for number in range(1, 21):
        account.record(release(number))
    total = account.epsilon()
    assert total == pytest.approx(by_opacus("prv", 20 * STEPS), rel=1e-5)
    assert total <= by_opacus("rdp", 20 * STEPS)
    assert total > 3 * by_opacus("prv", STEPS), "the hazard: a new PrivacyEngine each round reports this"
    assert opened(tmp_path).epsilon() == total, "another process reads the same from the file"


def test_rdp_stands_in_where_prv_fails(tmp_path, monkeypatch) -> None:
    def failing(*each):
        raise RuntimeError("the domain is too small")

    monkeypatch.setattr(accounting, "_prv", failing)
    composed_epsilon.cache_clear()
    account = opened(tmp_path)
    for number in range(1, 21):
        account.record(release(number))
    figure = account.epsilon()
    composed_epsilon.cache_clear()
    rdp = by_opacus("rdp", 20 * STEPS)
    assert rdp * 0.999 <= figure <= rdp * 1.05


def test_poisson_sampling_false_still_accounts_poisson_in_opacus_and_never_here(tmp_path) -> None:
    import torch
    from opacus import PrivacyEngine
    from torch.utils.data import DataLoader, TensorDataset

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Secure RNG turned off")
        warnings.filterwarnings("ignore", "Full backward hook")
        engine = PrivacyEngine(accountant="rdp")
        model, loader = torch.nn.Linear(6, 3), DataLoader(TensorDataset(torch.zeros(SIZE, 6)), batch_size=18)
        model, optimiser, loader = engine.make_private(
            module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data_loader=loader,
            noise_multiplier=2.0, max_grad_norm=1.0, poisson_sampling=False,
        )  # fmt: skip
        for (inputs,) in loader:
            optimiser.zero_grad()
            model(inputs).sum().backward()
            optimiser.step()
    assert engine.accountant.history == [(2.0, 18 / SIZE, 4)], "the fault: shuffled batches, accounted as Poisson"
    account = opened(tmp_path)
    shuffled = replace(release(), sampling=Sampling(method="fixed-size", rate=BATCH / SIZE, population=SIZE))
    with pytest.raises(ReplyError, match="budget-spent"):
        account.permit(shuffled)


def test_the_gdp_accountant_would_report_a_quarter_less() -> None:
    assert by_opacus("gdp", 1000, z=0.6, rate=0.01, delta=1e-5) < 0.8 * composed_epsilon(((0.6, 0.01, 1000),), 1e-5)


@pytest.mark.parametrize(
    ("z", "rate", "steps"), [(0.01, 0.5, 100), (0.1, 0.5, 100), (1e4, 0.2, 100), (0.3, 1.0, 1000), (30.0, 0.001, 1)]
)
def test_extreme_settings_are_quick_and_finite_and_not_negative(z, rate, steps) -> None:
    begin = time.monotonic()
    assert 0 <= composed_epsilon(((z, rate, steps),), 1e-3) < math.inf
    assert time.monotonic() - begin < 20, "PRV alone takes minutes"


def test_more_steps_cost_more_and_more_noise_less() -> None:
    costs = [composed_epsilon(((z, 0.2, steps),), 1e-3) for z, steps in ((4, 50), (2, 50), (2, 100), (1, 100))]
    assert costs == sorted(costs)


def test_order_does_not_matter_and_equal_steps_are_one_history(tmp_path) -> None:
    one = opened(tmp_path / "a")
    two = opened(tmp_path / "b")
    for z in (1.0, 2.0, 1.0):
        one.record(release(z=z))
    for z in (2.0, 1.0, 1.0):
        two.record(release(z=z))
    assert one.epsilon() == two.epsilon()


UNKNOWN = {
    "mechanism": {"mechanism": "laplace"},
    "adjacency": {"adjacency": "replace-one"},
    "unit": {"unit": "client"},
    "draw": {"sampling": Sampling(method="shuffled", rate=0.1, population=SIZE)},
    "correlated": {"matrix": Matrix(instance="x", row=0, coefficients=(1.0,), min_separation=1)},
    "no noise": {"queries": (Query(name="gradient", sensitivity_l2=1.0, stddev=0.0),)},
    "no query": {"queries": ()},
    "no sensitivity": {"queries": (Query(name="gradient", sensitivity_l2=0.0, stddev=1.0),)},
    "later version": {"unknown": ("leak",)},
}


@pytest.mark.parametrize("changes", UNKNOWN.values(), ids=UNKNOWN)
def test_what_is_not_known_is_infinite_and_refused(tmp_path, changes) -> None:
    account = opened(tmp_path)
    with pytest.raises(ReplyError) as caught:
        account.permit(replace(release(), **changes))
    assert caught.value.code == "budget-spent"


def test_an_unknown_event_in_the_ledger_makes_every_further_release_refused(tmp_path) -> None:
    account = opened(tmp_path)
    account.record(release())
    Ledger(tmp_path / "own" / "ledger.jsonl").append("histogram.release", {"of": "labels"})
    account = opened(tmp_path)
    assert account.epsilon() == math.inf
    with pytest.raises(ReplyError, match="budget-spent"):
        account.permit(release(2))
    with pytest.raises(ReplyError, match="budget-spent"):
        account.noise_multiplier(
            PrivacyConfig(unit="example", target_epsilon=8.0), run="r", rounds=1, rate=0.1, steps=1
        )


def test_simulated_noise_protects_nothing_in_a_real_ledger(tmp_path) -> None:
    account = opened(tmp_path)
    account.record(release(simulated=True))
    assert account.epsilon() < math.inf
    with pytest.raises(ReplyError, match="budget-spent"):
        account.permit(release(2, simulated=False))


def test_a_broken_chain_is_refused(tmp_path) -> None:
    account = opened(tmp_path)
    account.record(release(1))
    account.record(release(2))
    path = tmp_path / "own" / "ledger.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"round-number":1', b'"round-number":7'))
    with pytest.raises(LedgerError) as caught:
        opened(tmp_path)
    assert caught.value.line == 2


# -- delta ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "delta"), [(1, "auto"), (0, "auto"), (50, 1 / 50), (50, 0.5), (1, 0.5), (50, 0.0)])
def test_a_delta_of_one_over_n_protects_nobody_and_is_refused(tmp_path, size, delta) -> None:
    with pytest.raises(ReplyError) as caught:
        opened(tmp_path, size=max(size, 0) or 1, delta=delta)
    assert caught.value.code == "refused"


def test_delta_is_n_to_the_minus_one_point_one(tmp_path) -> None:
    assert opened(tmp_path).delta == DELTA < 1 / SIZE


# -- the owner's limit ---------------------------------------------------------------------------------------------


def test_a_release_is_refused_before_it_would_exceed_the_budget_and_nothing_is_written(tmp_path) -> None:
    limit = composed_epsilon(((2.0, BATCH / SIZE, 5 * STEPS),), DELTA)
    account = opened(tmp_path, max_epsilon=limit)
    for number in range(1, 6):
        account.permit(release(number))
        account.record(release(number))
    assert account.epsilon() == limit
    before = (tmp_path / "own" / "ledger.jsonl").read_bytes()
    for refused in (account.permit, account.record):
        with pytest.raises(ReplyError) as caught:
            refused(release(6))
        assert caught.value.code == "budget-spent"
    assert (tmp_path / "own" / "ledger.jsonl").read_bytes() == before


def test_the_limit_holds_over_several_runs(tmp_path) -> None:
    limit = composed_epsilon(((2.0, BATCH / SIZE, 2 * STEPS),), DELTA)
    for number in (1, 2):
        opened(tmp_path, max_epsilon=limit).record(release(number))
    with pytest.raises(ReplyError, match="budget-spent"):
        opened(tmp_path, max_epsilon=limit).permit(release(1))


def test_a_device_that_repeats_a_round_pays_again_and_a_simulation_does_not(tmp_path) -> None:
    real, simulated = opened(tmp_path / "real"), opened(tmp_path / "simulated")
    for _ in range(2):
        real.record(release(1))
        simulated.record(release(1, simulated=True))
    assert real.epsilon() == pytest.approx(by_opacus("prv", 2 * STEPS), rel=1e-5)
    assert simulated.epsilon() == pytest.approx(by_opacus("prv", STEPS), rel=1e-5)
    simulated.record(release(1, simulated=True, update="another"))
    assert simulated.epsilon() == pytest.approx(by_opacus("prv", 2 * STEPS), rel=1e-5)


def test_a_repeated_round_of_a_simulation_is_permitted_at_the_limit(tmp_path) -> None:
    limit = composed_epsilon(((2.0, BATCH / SIZE, STEPS),), DELTA)
    account = opened(tmp_path, max_epsilon=limit)
    account.record(release(1, simulated=True))
    account.permit(release(1, simulated=True))
    with pytest.raises(ReplyError):
        account.permit(release(2, simulated=True))


def test_a_release_is_on_the_disk_when_record_returns(tmp_path) -> None:
    account = opened(tmp_path)
    account.record(release())
    (event,) = read_events(tmp_path / "own" / "ledger.jsonl")
    assert event.kind == "update.release"
    assert event.release() == release()


# -- the noise of a run --------------------------------------------------------------------------------------------

TARGET = PrivacyConfig(unit="example", target_epsilon=4.0)
RUN = {"run": "one", "rounds": 20, "rate": BATCH / SIZE, "steps": STEPS}


@pytest.mark.parametrize("target", [0.5, 1.0, 4.0, 8.0])
def test_the_noise_spends_the_target_over_the_rounds_and_never_more(tmp_path, target) -> None:
    account = opened(tmp_path)
    z = account.noise_multiplier(PrivacyConfig(unit="example", target_epsilon=target), **RUN)
    for number in range(1, 21):
        account.permit(release(number, z=z))
        account.record(release(number, z=z))
    assert 0.98 * target <= account.epsilon() <= target
    assert by_opacus("prv", 20 * STEPS, z=z) <= target
    with pytest.raises(ReplyError, match="budget-spent"):
        account.permit(release(21, z=z))


def test_the_noise_is_the_same_in_every_round_and_after_a_restart(tmp_path) -> None:
    account = opened(tmp_path)
    first = account.noise_multiplier(TARGET, **RUN)
    account.record(release(1, z=first))
    assert account.noise_multiplier(TARGET, **RUN) == first
    again = opened(tmp_path)
    assert again.noise_multiplier(TARGET, **RUN) == first
    for number in range(2, 21):
        again.permit(release(number, z=first))
        again.record(release(number, z=first))
    assert [event.kind for event in read_events(tmp_path / "own" / "ledger.jsonl")].count("run.policy") == 1


def test_what_an_earlier_run_spent_counts_towards_the_target(tmp_path) -> None:
    account = opened(tmp_path)
    first = account.noise_multiplier(PrivacyConfig(unit="example", target_epsilon=2.0), **RUN)
    for number in range(1, 21):
        account.record(release(number, z=first))
    later = opened(tmp_path)
    second = later.noise_multiplier(TARGET, **{**RUN, "run": "two"})
    for number in range(1, 21):
        later.permit(release(number, z=second))
        later.record(release(number, z=second, update="b"))
    assert 0.97 * 4.0 <= later.epsilon() <= 4.0
    assert second > opened(tmp_path / "fresh").noise_multiplier(TARGET, **RUN)


def test_the_owners_limit_is_below_a_larger_target(tmp_path) -> None:
    z = opened(tmp_path, max_epsilon=1.0).noise_multiplier(TARGET, **RUN)
    assert by_opacus("prv", 20 * STEPS, z=z) <= 1.0


def test_no_noise_is_enough_where_everything_is_spent(tmp_path) -> None:
    account = opened(tmp_path)
    account.record(release(z=0.5))
    with pytest.raises(ReplyError) as caught:
        account.noise_multiplier(PrivacyConfig(unit="example", target_epsilon=0.5), **RUN)
    assert caught.value.code == "budget-spent"


def test_a_given_noise_is_taken_as_it_is(tmp_path) -> None:
    given = PrivacyConfig(unit="example", noise_multiplier=1.25)
    assert opened(tmp_path).noise_multiplier(given, **RUN) == 1.25
    body = read_events(tmp_path / "own" / "ledger.jsonl")[0].body
    assert (body["run"], body["noise-multiplier"], body["examples"]) == ("one", "1.25", SIZE)


def test_data_that_changed_during_a_run_is_refused(tmp_path) -> None:
    opened(tmp_path).noise_multiplier(TARGET, **RUN)
    with pytest.raises(ReplyError) as caught:
        opened(tmp_path, size=SIZE + 1).noise_multiplier(TARGET, **RUN)
    assert caught.value.code == "refused"


def test_calibration_is_shared_by_clients_of_one_size(tmp_path, monkeypatch) -> None:
    accounting.calibrated.cache_clear()
    one = opened(tmp_path / "a").noise_multiplier(TARGET, **RUN)
    monkeypatch.setattr(accounting, "_prv", lambda *each: pytest.fail("computed again"))
    assert opened(tmp_path / "b").noise_multiplier(TARGET, **RUN) == one


def test_without_opacus_the_error_names_the_extra(tmp_path, monkeypatch) -> None:
    import sys

    composed_epsilon.cache_clear()
    monkeypatch.setitem(sys.modules, "opacus.accountants", None)
    with pytest.raises(DependencyError, match="example-privacy"):
        opened(tmp_path, max_epsilon=1.0).permit(release())


# -- momentum ------------------------------------------------------------------------------------------------------


def test_a_round_begins_with_the_momentum_of_the_round_before_also_when_it_is_done_again(tmp_path) -> None:
    account = opened(tmp_path)
    assert account.velocity_before("run", 1) is None
    for number in (1, 2, 5):
        account.keep_velocity("run", number, np.full(3, number, dtype=np.float32))
    assert account.velocity_before("run", 6).tolist() == [5, 5, 5]
    assert opened(tmp_path).velocity_before("run", 5).tolist() == [2, 2, 2]
    assert account.velocity_before("run", 2) is None, "only the last two are kept"
    assert account.velocity_before("another", 6) is None
    assert len(list((tmp_path / "own").glob("velocity-*.npy"))) == 2
    account.keep_velocity("another", 1, np.zeros(3, dtype=np.float32))
    assert len(list((tmp_path / "own").glob("velocity-*.npy"))) == 1


def test_damaged_momentum_is_none(tmp_path) -> None:
    account = opened(tmp_path)
    account.keep_velocity("run", 1, np.zeros(3, dtype=np.float32))
    (path,) = (tmp_path / "own").glob("velocity-*.npy")
    path.write_bytes(b"\x93NUMPY broken")
    assert account.velocity_before("run", 2) is None


# -- several processes of one device --------------------------------------------------------------------------------


def test_two_processes_that_release_at_once_both_count(tmp_path) -> None:
    one, other = opened(tmp_path), opened(tmp_path)
    with one.exclusive():
        one.record(release(1))
    with other.exclusive():
        other.record(release(2))
    assert [each.release().round_number for each in read_events(tmp_path / "own" / "ledger.jsonl")] == [1, 2]


def test_without_the_lock_a_line_of_another_process_is_never_overwritten(tmp_path) -> None:
    one, other = opened(tmp_path), opened(tmp_path)
    one.record(release(1))
    with pytest.raises(RunFailedError, match="another process"):
        other.record(release(2))
    assert len(read_events(tmp_path / "own" / "ledger.jsonl")) == 1


def test_a_ledger_that_another_process_holds_is_not_waited_for_for_ever(tmp_path) -> None:
    one, other = opened(tmp_path), opened(tmp_path)
    with one.exclusive(), pytest.raises(ReplyError, match="another process"), other.exclusive(timeout_s=0.1):
        pytest.fail("two held it")
