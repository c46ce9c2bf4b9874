"""What is planned is what a run releases: the same noise, the same epsilon, never above the target."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from fedlearn.config import RunConfig
from fedlearn.errors import ConfigError
from fedlearn.privacy.accounting import QUICK, default_delta, epsilon
from fedlearn.privacy.clipping import Update, clip
from fedlearn.privacy.mechanisms import AdaptiveGaussian, DpFtrl, Gaussian
from fedlearn.privacy.noise import SimulatedNoise
from fedlearn.privacy.plan import PrivacyPlan, plan_privacy
from fedlearn.privacy.releases import Release
from fedlearn.scenario import apply_overrides
from fedlearn.sources import SeedTree

SETTINGS = {
    "poisson": ("federation.cohort=20",),
    "observed": ("federation.cohort=20", "privacy.amplification=none"),
    "fixed-size": ("federation.cohort=20", "federation.sampling=fixed-size"),
    "everyone": (),
    "adaptive": ("federation.cohort=20", "privacy.adaptive-clipping=true"),
    "dp-ftrl": ("federation.cohort=20", "privacy.mechanism=dp-ftrl"),
}
EACH = pytest.mark.parametrize("setting", SETTINGS)
FAST = pytest.mark.parametrize(
    "setting",
    [pytest.param(name, marks=pytest.mark.slow if name in ("poisson", "adaptive") else ()) for name in SETTINGS],
)
"""Amplification takes numerical accounting, and a calibration of it half a minute."""
NOISY = ("privacy.noise-multiplier=1.0",)


def configured(setting: str, *overrides: str) -> RunConfig:
    base = ("privacy.unit=client", "federation.clients=100", "federation.rounds=12")
    return RunConfig.from_mapping(apply_overrides({}, [*base, *SETTINGS[setting], *overrides]))


def realised(plan: PrivacyPlan, planned: list[Release]) -> list[Release]:
    """What a run's mechanism really releases in the rounds of a plan."""
    mechanism, noise = plan.mechanism("planned"), SimulatedNoise(SeedTree.root(0))
    state, found = mechanism.init(), []
    for release in planned:
        if release.what == "evaluation":
            found.append(release)
            continue
        total = mechanism.begin(state, 3)
        total.add(clip(Update.of([5.0, 0.0, 1.0]), state.bound_l2))
        state, noised = mechanism.release(state, total, noise)
        found.append(replace(release, queries=noised.queries, matrix=noised.matrix))
    return found


@EACH
def test_what_a_run_releases_costs_what_was_planned(setting):
    plan = plan_privacy(configured(setting, *NOISY, "federation.rounds=7"), evaluated=(3, 7))
    planned = plan.releases()
    cost = epsilon(planned, plan.delta, interval=QUICK)
    assert 0 < cost < math.inf
    assert epsilon(realised(plan, planned), plan.delta, interval=QUICK) == pytest.approx(cost, rel=1e-6)
    assert cost == plan.epsilon()


@EACH
def test_what_follows_on_released_rounds_costs_what_the_whole_was_planned_for(setting):
    """Half of the run is released, with the sensitivity of its real sums; the rest is planned on top of it."""
    plan = plan_privacy(configured(setting, *NOISY, "federation.rounds=8"))
    half = realised(replace(plan), plan.releases()[:4])
    together = [*half, *plan.releases(half, 4)]
    whole = epsilon(plan.releases(), plan.delta, interval=QUICK)
    assert epsilon(together, plan.delta, interval=QUICK) == pytest.approx(whole, rel=1e-6)


@FAST
def test_the_noise_is_the_least_that_meets_the_target(setting):
    plan = plan_privacy(configured(setting, "privacy.target-epsilon=4"), evaluated=(12,))
    spent = epsilon(realised(plan, plan.releases()), plan.delta)
    assert spent <= 4.0
    less = replace(plan, noise_multiplier=plan.noise_multiplier * 0.99)
    assert epsilon(less.releases(), plan.delta) > 4.0
    assert not plan.would_exceed([], plan.releases())
    assert less.would_exceed([], less.releases())


@EACH
def test_round_by_round_the_plan_is_the_whole_plan(setting):
    plan = plan_privacy(configured(setting, *NOISY), evaluated=(2, 4))
    rounds = [each for number in range(1, 13) for each in plan.releases_of_round(number)]
    assert rounds == plan.releases()
    assert plan.releases(after=5) == [each for each in rounds if each.round_number > 5]
    assert [each.round_number for each in rounds if each.what == "evaluation"] == [2, 4]
    assert all(each.unit == "client" and not each.simulated for each in rounds)


def test_a_plan_makes_the_mechanism_that_was_asked_for():
    kinds = {"poisson": Gaussian, "adaptive": AdaptiveGaussian, "dp-ftrl": DpFtrl}
    for setting, kind in kinds.items():
        mechanism = plan_privacy(configured(setting, *NOISY, "privacy.bound-l2=0.3")).mechanism("me")
        assert type(mechanism) is kind
        assert (mechanism.bound_l2, mechanism.noise_multiplier) == (0.3, 1.0)
    assert (mechanism.instance, mechanism.rounds, mechanism.min_separation) == ("me", 12, 5)


def test_evaluations_cost_and_are_planned_for():
    without = plan_privacy(configured("observed", "privacy.target-epsilon=4"))
    with_them = plan_privacy(configured("observed", "privacy.target-epsilon=4"), evaluated=range(1, 13))
    assert with_them.noise_multiplier > without.noise_multiplier * 1.01
    assert with_them.evaluation_noise_multiplier == 3 * with_them.noise_multiplier


def test_amplification_that_is_not_claimed_costs_more_and_the_plan_tells_both():
    plan = plan_privacy(configured("poisson", *NOISY))
    assert plan.without_amplification().epsilon() > 2 * plan.epsilon()
    observed = plan_privacy(configured("observed", *NOISY))
    assert plan.without_amplification().epsilon() == observed.epsilon()
    assert observed.adjacency == "zero-out"
    assert plan.adjacency == "add-remove"


def test_delta_is_below_one_in_the_number_of_clients():
    assert plan_privacy(configured("everyone", *NOISY)).delta == default_delta(100) < 1 / 100
    assert plan_privacy(configured("everyone", *NOISY, "privacy.delta=1e-5")).delta == 1e-5
    with pytest.raises(ConfigError):
        configured("everyone", *NOISY, "privacy.delta=0.01")


def test_what_earlier_runs_spent_counts_and_a_release_that_is_not_known_leaves_nothing():
    first = plan_privacy(configured("observed", *NOISY))
    spent = epsilon(first.releases(), first.delta)
    config = configured("observed", f"privacy.target-epsilon={spent + 3}")
    second = plan_privacy(config, earlier=first.releases())
    both = epsilon([*first.releases(), *second.releases()], first.delta)
    assert (spent + 3) * 0.99 < both <= spent + 3
    with pytest.raises(ConfigError, match="has no bound"):
        plan_privacy(config, earlier=[Release.not_known("round.of-2031")])


@EACH
def test_a_run_goes_on_with_the_noise_that_was_promised_whatever_would_be_calibrated_now(setting, monkeypatch):
    monkeypatch.setattr("fedlearn.privacy.plan.calibrate", lambda *_, **__: 1 / 0)
    plan = plan_privacy(configured(setting, "privacy.target-epsilon=4"), promised=1.25)
    assert plan.noise_multiplier == 1.25
    assert plan_privacy(configured(setting, *NOISY), promised=1.25).noise_multiplier == 1.25


def test_a_budget_is_compared_with_all_that_was_and_will_be_released():
    plan = plan_privacy(configured("observed", *NOISY, "privacy.max-epsilon=5"))
    released: list[Release] = []
    number = 1
    while not plan.would_exceed(released, plan.releases_of_round(number)):
        released += plan.releases_of_round(number)
        number += 1
    assert epsilon(released, plan.delta) <= 5.0 < epsilon([*released, *plan.releases_of_round(number)], plan.delta)
    assert len(released) > 1
    unlimited = plan_privacy(configured("observed", *NOISY))
    assert not unlimited.would_exceed([Release.not_known("x")], [])
    assert plan.would_exceed([Release.not_known("x")], [])
