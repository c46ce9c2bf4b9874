"""Epsilon from releases alone: known answers, properties, and what must come out infinite."""

from __future__ import annotations

import logging
import math
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("dp_accounting")

from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent, get_epsilon_gaussian
from dp_accounting.pld import PLDAccountant
from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism
from dp_accounting.rdp import RdpAccountant

from fedlearn.errors import ConfigError, DependencyError, LedgerError
from fedlearn.privacy.accounting import (
    FINE,
    QUICK,
    calibrate,
    check_delta,
    default_delta,
    epsilon,
    epsilon_by_release,
    epsilon_of_ledger,
    would_exceed,
)
from fedlearn.privacy.ledger import Event
from fedlearn.privacy.matrix import sensitivity, square_root_coefficients
from fedlearn.privacy.releases import Matrix, Query, Release, Sampling, Unit

DELTA = 1e-5


def gaussian(noise: float, *, rate: float = 1.0, steps: int = 1, unit: Unit = "client", **changes: Any) -> Release:
    sampling = Sampling(method="poisson" if rate < 1 else "everyone", rate=rate, population=1000)
    release = Release(
        what="model",
        round_number=1,
        unit=unit,
        adjacency="add-remove",
        mechanism="gaussian",
        queries=(Query(name="update", sensitivity_l2=2.0, stddev=2.0 * noise),),
        sampling=sampling,
        steps=steps,
        simulated=False,
    )
    return replace(release, **changes)


def drawn(method: str, rate: float = 0.1) -> Sampling:
    return Sampling(method=method, rate=rate, population=1000)


def ftrl(rows: int, *, noise: float = 4.0, separation: int = 1, bands: int = 1, **changes: Any) -> list[Release]:
    """Return the rounds of one correlated mechanism, whose σ/Δ is ``noise`` times no sensitivity of C."""
    coefficients = square_root_coefficients(bands)
    return [
        replace(
            gaussian(noise, adjacency="zero-out", mechanism="dp-ftrl", sampling=drawn("separated")),
            round_number=row + 1,
            matrix=Matrix(instance="run", row=row, coefficients=coefficients, min_separation=separation),
            **changes,
        )
        for row in range(rows)
    ]


def exact(noise: float, delta: float = DELTA) -> float:
    return float(get_epsilon_gaussian(noise, delta))


# -- known answers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rate", "noise", "rounds", "delta", "expected"),
    [
        (256 / 60_000, 1.1, 14_062, 1e-5, 2.38),
        (0.1, 1.0, 100, 1e-3, 4.78),
        (0.01, 0.5, 1_000, 1e-5, 13.36),
        (0.05, 4.0, 2_000, 1e-6, 2.62),
        (1.0, 20.0, 100, 1e-5, 1.99),
        (0.1, 4.0, 100, 1e-4, 0.82),
        (1.0, 4.0, 10, 1e-4, 2.88),
        (1.0, 4.0, 100, 1e-4, 11.8),
    ],
)
def test_the_designs_figures(rate: float, noise: float, rounds: int, delta: float, expected: float) -> None:
    interval = QUICK if noise == 0.5 else FINE
    found = epsilon([gaussian(noise, rate=rate, steps=rounds)], delta, interval=interval)
    assert found == pytest.approx(expected, rel=2e-3, abs=5.1e-3)


@pytest.mark.parametrize("noise", [0.002, 0.05, 0.3, 1.0, 20.0, 1e5])
def test_without_amplification_it_is_the_closed_form(noise: float) -> None:
    assert epsilon([gaussian(noise)], DELTA) == pytest.approx(exact(noise), rel=1e-7, abs=1e-9)
    assert epsilon([gaussian(noise)], DELTA) >= exact(noise)


def test_several_gaussians_are_one() -> None:
    releases = [gaussian(3.0, steps=2), gaussian(4.0), gaussian(12.0)]
    combined = (2 / 9 + 1 / 16 + 1 / 144) ** -0.5
    assert epsilon(releases, DELTA) == pytest.approx(exact(combined), rel=1e-6)


def test_queries_answered_together_are_one() -> None:
    both = (
        Query(name="update", sensitivity_l2=1.0, stddev=3.0),
        Query(name="clip-count", sensitivity_l2=0.5, stddev=2.0),
    )
    noise = (1 / 9 + 1 / 16) ** -0.5
    assert epsilon([gaussian(1.0, queries=both)], DELTA) == pytest.approx(exact(noise), rel=1e-6)


def test_nothing_costs_nothing() -> None:
    assert epsilon([], DELTA) == epsilon([], DELTA, accountant="rdp") == epsilon([], DELTA, unit="none") == 0.0


# -- properties ----------------------------------------------------------------------------------------------------

NOISES = st.floats(0.9, 30.0)
RATES = st.sampled_from([0.02, 0.3, 1.0])
RELEASES = st.lists(
    st.builds(lambda z, q, t: gaussian(z, rate=q, steps=t), NOISES, RATES, st.integers(1, 50)), max_size=3
)
few = settings(max_examples=6, deadline=None)


@few
@given(RELEASES, st.randoms())
def test_the_order_does_not_matter(releases: list[Release], chance: Any) -> None:
    shuffled = list(releases)
    chance.shuffle(shuffled)
    assert epsilon(shuffled, DELTA, interval=QUICK) == epsilon(releases, DELTA, interval=QUICK)


@few
@given(RELEASES)
def test_a_coarse_grid_and_renyi_are_above(releases: list[Release]) -> None:
    # Each grid is above the truth; two of them need not be in order, but nearly are.
    fine = epsilon(releases, DELTA, interval=QUICK)
    assert epsilon(releases, DELTA, interval=1e-2) >= fine * (1 - 2e-3)
    assert epsilon(releases, DELTA, accountant="rdp") >= fine


@few
@given(RELEASES, NOISES, RATES)
def test_one_more_release_costs_more(releases: list[Release], noise: float, rate: float) -> None:
    more = [*releases, gaussian(noise, rate=rate)]
    assert epsilon(more, DELTA, interval=QUICK) >= epsilon(releases, DELTA, interval=QUICK) * (
        1 - 5e-3
    )  # the grid's own


@few
@given(st.lists(st.integers(1, 40), min_size=2, max_size=4))
def test_how_rounds_are_divided_over_lines_does_not_matter(parts: list[int]) -> None:
    apart = [gaussian(1.5, rate=0.1, steps=steps, round_number=number) for number, steps in enumerate(parts, start=1)]
    together = [gaussian(1.5, rate=0.1, steps=sum(parts))]
    assert epsilon(apart, DELTA, interval=QUICK) == epsilon(together, DELTA, interval=QUICK)


def test_the_last_bits_of_a_float_make_no_other_release() -> None:
    # A thousand rounds whose σ/Δ differs in its last bits would else be a thousand distributions.
    z = 1.1
    rounds = [gaussian(z * (1 + number * 2e-16), rate=0.1) for number in range(50)]
    assert len({each.noise_multiplier for each in rounds}) > 10
    assert epsilon(rounds, DELTA, interval=QUICK) == epsilon([gaussian(z, rate=0.1, steps=50)], DELTA, interval=QUICK)


@pytest.mark.parametrize("unit", ["client", "example"])
def test_what_is_simulated_has_the_epsilon_of_a_real_run(unit: Unit) -> None:
    assert epsilon([gaussian(2.0, unit=unit, simulated=True)], DELTA, unit=unit) == epsilon([gaussian(2.0)], DELTA)


@pytest.mark.parametrize(
    ("noise", "rate", "steps"),
    [(0.05, 0.5, 1000), (0.1, 0.5, 100_000), (0.002, 0.999, 1000), (1.0, 0.5, 100_000), (100.0, 1e-4, 1000),
     (1e5, 1e-6, 1000), (1.0, 1e-300, 10), (1.0, 0.1, 10**12)],
)  # fmt: skip
def test_extreme_numbers_are_answered_soundly_and_soon(noise: float, rate: float, steps: int) -> None:
    release = gaussian(noise, rate=rate, steps=steps)
    found = epsilon([release], 1e-6, interval=QUICK)
    renyi = epsilon([release], 1e-6, accountant="rdp")
    assert 0 <= found <= renyi * (1 + 1e-6) or found < 1
    # Drawing everybody can only cost more.
    assert found <= epsilon([gaussian(noise, steps=steps)], 1e-6) * 1.3 or found < 1


# -- what is not known is infinite ---------------------------------------------------------------------------------

GOOD = gaussian(2.0, rate=0.1)
ROWS = ftrl(3)


def matrix(**changes: Any) -> Matrix:
    return replace(Matrix(instance="run", row=0, coefficients=(1.0, 0.5), min_separation=1), **changes)


def query(**changes: Any) -> tuple[Query, ...]:
    return (replace(Query(name="update", sensitivity_l2=1.0, stddev=1.0), **changes),)


UNKNOWN = {
    "another mechanism": replace(GOOD, mechanism="skellam"),
    "no mechanism": replace(GOOD, mechanism="none"),
    "a field of a later version": replace(GOOD, unknown=("truncated",)),
    "no steps": replace(GOOD, steps=0),
    "negative steps": replace(GOOD, steps=-1),
    "no queries": replace(GOOD, queries=()),
    "no noise": replace(GOOD, queries=query(stddev=0.0)),
    "one query without noise": replace(GOOD, queries=(*GOOD.queries, *query(stddev=0.0))),
    "negative noise": replace(GOOD, queries=query(stddev=-1.0)),
    "infinite noise": replace(GOOD, queries=query(stddev=math.inf)),
    "noise that is no number": replace(GOOD, queries=query(stddev=math.nan)),
    "no sensitivity": replace(GOOD, queries=query(sensitivity_l2=0.0)),
    "negative sensitivity": replace(GOOD, queries=query(sensitivity_l2=-1.0)),
    "sensitivity that is no number": replace(GOOD, queries=query(sensitivity_l2=math.nan)),
    "a quotient that overflows": replace(GOOD, queries=query(sensitivity_l2=1e300, stddev=1e-300)),
    "a quotient that vanishes": replace(GOOD, queries=query(sensitivity_l2=1e-300, stddev=1e300)),
    "hardly any noise": replace(GOOD, queries=query(stddev=1e-4)),
    "nobody hidden": replace(GOOD, unit="none"),
    "an example hidden, a client asked for": replace(GOOD, unit="example"),
    "a rate of 0": replace(GOOD, sampling=drawn("poisson", 0.0)),
    "a rate above 1": replace(GOOD, sampling=drawn("poisson", 1.5)),
    "a negative rate": replace(GOOD, sampling=drawn("everyone", -0.5)),
    "a rate that is no number": replace(GOOD, sampling=drawn("poisson", math.nan)),
    "an unknown draw": replace(GOOD, sampling=drawn("shuffled")),
    "an unknown adjacency": replace(GOOD, adjacency="edit-one"),
    "Poisson, zero-out": replace(GOOD, adjacency="zero-out"),
    "fixed size, add-remove": replace(GOOD, sampling=drawn("fixed-size")),
    "separated, add-remove": replace(GOOD, sampling=drawn("separated")),
    "Gaussian with a matrix": replace(GOOD, matrix=matrix()),
    "dp-ftrl without a matrix": replace(GOOD, mechanism="dp-ftrl"),
    "dp-ftrl with steps": replace(ROWS[0], steps=2),
    "dp-ftrl with two queries": replace(ROWS[0], queries=(*query(), *query())),
    "rising coefficients": replace(ROWS[0], matrix=matrix(coefficients=(0.5, 1.0))),
    "negative coefficients": replace(ROWS[0], matrix=matrix(coefficients=(1.0, -0.5))),
    "no coefficients": replace(ROWS[0], matrix=matrix(coefficients=())),
    "coefficients that are no numbers": replace(ROWS[0], matrix=matrix(coefficients=(math.nan,))),
    "no separation": replace(ROWS[0], matrix=matrix(min_separation=0)),
    "a negative row": replace(ROWS[0], matrix=matrix(row=-1)),
    "a row beyond reason": replace(ROWS[0], matrix=matrix(row=10**12)),
    "a separation that the draw does not keep": replace(
        ROWS[0], sampling=drawn("everyone"), matrix=matrix(min_separation=2)
    ),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_release_is_infinite(name: str) -> None:
    for releases in ([UNKNOWN[name]], [GOOD, UNKNOWN[name], GOOD]):
        assert epsilon(releases, DELTA, interval=QUICK) == math.inf
        assert epsilon(releases, DELTA, accountant="rdp") == math.inf
        assert would_exceed([], releases, 1e9, DELTA)


def test_what_those_are_changed_from_is_finite() -> None:
    assert math.isfinite(epsilon([GOOD, *ROWS], DELTA, interval=QUICK))
    assert math.isfinite(epsilon([replace(ROWS[0], matrix=matrix())], DELTA))


def test_nobody_hidden_is_infinite() -> None:
    assert epsilon([GOOD], DELTA, unit="none") == math.inf


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan, math.inf])
def test_a_delta_that_is_no_probability_is_refused(delta: float) -> None:
    for call in (lambda: epsilon([GOOD], delta), lambda: epsilon([], delta), lambda: epsilon_by_release([GOOD], delta)):
        with pytest.raises(ConfigError, match=r"privacy\.delta"):
            call()


# -- units ---------------------------------------------------------------------------------------------------------


def test_a_record_moves_its_clients_update_by_twice_the_bound() -> None:
    # Hiding a client hides that it is there; a record of a client that stays changes the update, it does not remove it.
    found = epsilon([gaussian(4.0)], DELTA, unit="example")
    assert found == pytest.approx(exact(2.0), rel=1e-6)
    rows = ftrl(5)
    assert epsilon(rows, DELTA, unit="example") == pytest.approx(exact(2.0 / math.sqrt(5)), rel=1e-6)


def test_example_and_client_level_compose() -> None:
    own = gaussian(3.0, unit="example")
    found = epsilon([own, gaussian(8.0)], DELTA, unit="example")
    assert found == pytest.approx(exact((1 / 9 + 1 / 16) ** -0.5), rel=1e-6)
    assert epsilon([own, gaussian(8.0)], DELTA, unit="client") == math.inf


def test_a_record_of_a_client_drawn_in_secret_costs_more_than_its_client_and_less_than_of_one_always_drawn() -> None:
    release = gaussian(1.0, rate=0.1, steps=20)
    found = epsilon([release], DELTA, unit="example", interval=QUICK)
    changed = from_gaussian_mechanism(
        1.0,
        sampling_prob=0.1,
        value_discretization_interval=QUICK,
        neighboring_relation=NeighboringRelation.REPLACE_ONE,
    )
    assert epsilon([release], DELTA, interval=QUICK) < changed.self_compose(20).get_epsilon_for_delta(DELTA) <= found
    assert found < exact(0.5 / math.sqrt(20))
    assert epsilon([release], DELTA, unit="example", accountant="rdp") >= found


# -- correlated noise ----------------------------------------------------------------------------------------------


def test_independent_rounds_are_that_many_gaussians() -> None:
    assert epsilon(ftrl(9), DELTA) == pytest.approx(epsilon([gaussian(4.0, steps=9)], DELTA), rel=1e-6)


def test_who_takes_part_once_is_in_one_gaussian() -> None:
    assert epsilon(ftrl(9, separation=9), DELTA) == pytest.approx(exact(4.0), rel=1e-6)


@pytest.mark.parametrize(("rows", "separation", "bands"), [(1, 1, 1), (12, 4, 4), (12, 5, 3), (13, 1, 3)])
def test_the_sensitivity_of_the_rows_so_far_counts(rows: int, separation: int, bands: int) -> None:
    moved = sensitivity(square_root_coefficients(bands), rows=rows, min_separation=separation)
    found = epsilon(ftrl(rows, separation=separation, bands=bands), DELTA)
    assert found == pytest.approx(exact(4.0 / moved), rel=1e-6)


def test_a_row_that_is_missing_counts_all_the_same() -> None:
    rows = ftrl(6, bands=2)
    assert epsilon([rows[0], rows[5]], DELTA) == epsilon(rows, DELTA)
    assert epsilon(rows[:3], DELTA) < epsilon(rows, DELTA)


def test_two_instances_compose_and_one_does_not_with_itself() -> None:
    first = ftrl(4)
    second = [replace(each, matrix=replace(each.matrix, instance="other")) for each in first if each.matrix]
    assert epsilon([*first, *second], DELTA) == pytest.approx(epsilon(ftrl(8), DELTA), rel=1e-6)
    assert epsilon([*first, *first], DELTA) == math.inf


@pytest.mark.parametrize(
    "change",
    [
        {"matrix": Matrix(instance="run", row=1, coefficients=(1.0, 0.1), min_separation=1)},
        {"matrix": Matrix(instance="run", row=1, coefficients=(1.0,), min_separation=2)},
        {"matrix": Matrix(instance="run", row=0, coefficients=(1.0,), min_separation=1)},
        {"queries": query(stddev=9.0)},
    ],
    ids=["coefficients", "separation", "a row twice", "noise"],
)
def test_rows_that_do_not_belong_together_are_infinite(change: dict[str, Any]) -> None:
    first, second = ftrl(2)
    assert math.isfinite(epsilon([first, second], DELTA))
    assert epsilon([first, replace(second, **change)], DELTA) == math.inf


# -- hazards: faults in what others ship ---------------------------------------------------------------------------


def test_hazard_replace_one_doubles_sensitivity_in_pld_not_in_rdp() -> None:
    def theirs(accountant: Any, relation: NeighboringRelation, noise: float) -> float:
        return float(accountant(neighboring_relation=relation).compose(GaussianDpEvent(noise)).get_epsilon(DELTA))

    replace_one, add_remove = NeighboringRelation.REPLACE_ONE, NeighboringRelation.ADD_OR_REMOVE_ONE
    assert theirs(PLDAccountant, replace_one, 2.0) == pytest.approx(theirs(PLDAccountant, add_remove, 1.0), rel=1e-6)
    assert theirs(RdpAccountant, replace_one, 2.0) == pytest.approx(theirs(RdpAccountant, add_remove, 2.0), rel=1e-6)
    assert theirs(RdpAccountant, replace_one, 2.0) < theirs(PLDAccountant, replace_one, 2.0), "an upper bound, below"
    assert epsilon([gaussian(2.0, adjacency="replace-one")], DELTA) == math.inf


@pytest.mark.parametrize("method", ["fixed-size", "poisson-observed", "separated", "everyone"])
def test_hazard_a_draw_that_is_not_poisson_is_not_amplified(method: str) -> None:
    poisson = epsilon([gaussian(4.0, rate=0.1, steps=10)], DELTA, interval=QUICK)
    other = gaussian(4.0, steps=10, sampling=drawn(method), adjacency="zero-out")
    assert epsilon([other], DELTA) == pytest.approx(exact(4.0 / math.sqrt(10)), rel=1e-6)
    assert epsilon([other], DELTA) > 3 * poisson


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_hazard_opacus_gdp_accountant_under_reports() -> None:
    accountants = pytest.importorskip("opacus.accountants")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="GDP accounting is experimental")
        theirs = accountants.GaussianAccountant()
    theirs.history = [(0.7, 0.001, 10_000)]
    ours = epsilon([gaussian(0.7, rate=0.001, steps=10_000)], 1e-6, interval=QUICK)
    assert theirs.get_epsilon(1e-6) < 0.7 * ours


def test_hazard_the_rounding_of_fourier_transforms_hides_a_tiny_delta() -> None:
    # Everybody but one in 10¹² is drawn, so the closed form is the answer; dp_accounting's PLD falls below it.
    noise, steps, delta = 300.0, 100_000, 1e-12
    event = PoissonSampledDpEvent(1 - 1e-12, GaussianDpEvent(noise))
    accountant = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE, 1e-4)
    theirs = accountant.compose(event, steps).get_epsilon(delta)
    true = exact(noise / math.sqrt(steps), delta)
    assert theirs < 0.99 * true
    assert epsilon([gaussian(noise, rate=1 - 1e-12, steps=steps)], delta) >= true


def test_hazard_a_tiny_loss_is_not_taken_for_none_by_renyi() -> None:
    release = gaussian(1e5, rate=1e-6, steps=1_000_000)
    assert epsilon([release], 1e-12, accountant="rdp") >= epsilon([gaussian(1e11, steps=1_000_000)], 1e-12) > 0


# -- round by round ------------------------------------------------------------------------------------------------


def test_epsilon_by_release_is_epsilon_of_each_beginning() -> None:
    releases = [gaussian(2.0, rate=0.2), gaussian(6.0), *ftrl(2), gaussian(2.0, rate=0.2)]
    found = epsilon_by_release(releases, DELTA)
    assert found == [epsilon(releases[:count], DELTA, interval=QUICK) for count in range(1, 6)]
    assert epsilon_by_release(releases, DELTA, after=[5, 2]) == [found[1], found[4]]
    assert epsilon_by_release([], DELTA) == []


def test_from_the_first_unknown_release_on_it_is_infinite() -> None:
    found = epsilon_by_release([gaussian(2.0), UNKNOWN["no noise"], gaussian(2.0)], DELTA)
    assert math.isfinite(found[0])
    assert found[1:] == [math.inf, math.inf]


# -- ledgers -------------------------------------------------------------------------------------------------------


def event(kind: str, body: dict[str, Any]) -> Event:
    return Event(seq=1, prev="0" * 64, kind=kind, body=body)


def test_a_ledger_costs_what_it_reports() -> None:
    events = [event("run.policy", {"unit": "client"}), event("round.release", GOOD.to_body()), event("run.close", {})]
    events.insert(2, event("eval.release", gaussian(5.0).to_body()))
    found = epsilon_of_ledger(events, DELTA, interval=QUICK)
    assert found == epsilon([GOOD, gaussian(5.0)], DELTA, interval=QUICK)
    assert epsilon_of_ledger(events[:1], DELTA) == 0.0


def test_an_event_of_a_later_version_is_infinite() -> None:
    assert epsilon_of_ledger([event("round.release", GOOD.to_body()), event("round.sketch", {})], DELTA) == math.inf


def test_a_release_that_cannot_be_read_is_an_error_with_its_line() -> None:
    with pytest.raises(LedgerError, match="line 1"):
        epsilon_of_ledger([event("round.release", {"what": "model"})], DELTA)


# -- calibration and budget ----------------------------------------------------------------------------------------

PLANS: dict[str, Callable[[float], list[Release]]] = {
    "everyone": lambda z: [gaussian(z, steps=100)],
    "dp-ftrl": lambda z: ftrl(20, noise=z, separation=5, bands=4),
    "on top of what is spent": lambda z: [gaussian(9.0, steps=10), gaussian(z, steps=100)],
    "examples": lambda z: [gaussian(z, unit="example", steps=7)],
}


def is_least(planned: Callable[[float], list[Release]], noise: float, target: float, unit: Unit) -> bool:
    kept = epsilon(planned(noise), DELTA, unit=unit) <= target
    return kept and epsilon(planned(noise / 1.001), DELTA, unit=unit) > target


@pytest.mark.parametrize("target", [2.5, 8.0, 40.0])
@pytest.mark.parametrize("name", PLANS)
def test_calibrated_noise_is_the_least_that_keeps_the_target(name: str, target: float) -> None:
    unit: Unit = "example" if name == "examples" else "client"
    noise = calibrate(PLANS[name], target, DELTA, unit=unit)
    assert is_least(PLANS[name], noise, target, unit)
    assert float(f"{noise:.5g}") == noise


@pytest.mark.slow
@pytest.mark.parametrize(("rate", "rounds", "target"), [(0.1, 60, 8.0), (0.01, 1000, 8.0), (0.01, 10_000, 0.1)])
def test_calibrated_noise_under_poisson_draws(rate: float, rounds: int, target: float) -> None:
    def planned(noise: float) -> list[Release]:
        return [gaussian(noise, rate=rate, steps=rounds)]

    assert is_least(planned, calibrate(planned, target, DELTA), target, "client")


def test_more_than_enough_is_spent_already() -> None:
    spent = gaussian(1.0)
    with pytest.raises(ConfigError, match="earlier runs have spent it") as caught:
        calibrate(lambda z: [spent, gaussian(z)], 4.0, DELTA)
    assert caught.value.key == "privacy.target-epsilon"
    with pytest.raises(ConfigError, match="has no bound"):
        calibrate(lambda z: [UNKNOWN["no noise"], gaussian(z)], 4.0, DELTA)


@pytest.mark.parametrize("target", [0.0, -1.0, math.inf, math.nan])
def test_a_target_that_is_none_is_refused(target: float) -> None:
    with pytest.raises(ConfigError, match=r"privacy\.target-epsilon"):
        calibrate(PLANS["everyone"], target, DELTA)


def test_a_lax_target_gets_little_noise_at_once() -> None:
    assert 0 < calibrate(lambda z: [gaussian(z)], 1e6, DELTA) <= 1 / 32


def test_a_plan_fits_its_budget_round_by_round_and_no_round_more() -> None:
    noise = calibrate(lambda z: [gaussian(z, rate=0.2, steps=5)], 0.5, DELTA)
    rounds = [gaussian(noise, rate=0.2, round_number=number) for number in range(1, 7)]
    assert [would_exceed(rounds[:done], [rounds[done]], 0.5, DELTA) for done in range(6)] == [False] * 5 + [True]


def test_a_budget_that_is_no_number_permits_nothing() -> None:
    assert would_exceed([], [gaussian(50.0)], math.nan, DELTA)
    assert not would_exceed([], [], 0.0, DELTA)


# -- delta ---------------------------------------------------------------------------------------------------------


@given(st.integers(2, 10**12))
def test_the_default_delta_is_permitted(population: int) -> None:
    check_delta(default_delta(population), population)


@pytest.mark.parametrize("population", [2, 1000, 60_000])
def test_a_delta_of_one_over_n_is_refused(population: int) -> None:
    for delta in (1 / population, 2 / (population + 1)):
        with pytest.raises(ConfigError, match=r"privacy\.delta: .*1/N"):
            check_delta(delta, population)
    check_delta(0.99 / population, population)


def test_one_client_alone_cannot_be_hidden() -> None:
    for delta in (default_delta(1), 0.5, 1e-9):
        with pytest.raises(ConfigError, match=r"privacy\.delta"):
            check_delta(delta, 1)


# -- the package behind it -----------------------------------------------------------------------------------------


def test_without_dp_accounting_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    for release in (GOOD, gaussian(2.0)):
        with pytest.raises(DependencyError, match=r"\[privacy\]"):
            epsilon([release], DELTA)


def test_renyi_orders_that_diverge_are_not_logged_and_anything_else_is(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("absl")
    propagate, logger.propagate = logger.propagate, True
    try:
        with caplog.at_level(logging.WARNING, logger="absl"):
            RdpAccountant().compose(PoissonSampledDpEvent(0.5, GaussianDpEvent(30.0)))
            assert "failed to converge" in caplog.text, "dp_accounting no longer logs it: the filter can go"
            caplog.clear()
            epsilon([gaussian(30.0, rate=0.5)], DELTA, accountant="rdp")
            assert caplog.text == ""
            logger.warning("something else")
            assert "something else" in caplog.text
    finally:
        logger.propagate = propagate
