"""Epsilon while a run runs: what its ledger costs, reckoned now and then."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fedlearn.config import RunConfig
from fedlearn.privacy.accounting import QUICK, epsilon
from fedlearn.privacy.ledger import Ledger
from fedlearn.privacy.plan import plan_privacy
from fedlearn.tracking import epsilon as module
from fedlearn.tracking.epsilon import SpentSoFar

TABLES = {
    "task": "digits-mlp",
    "federation": {"clients": 100, "cohort": 10, "rounds": 4},
    "privacy": {"unit": "client", "noise-multiplier": 2.0, "max-epsilon": 9.0},
}


class Stopwatch:
    """Time that passes only when somebody says so."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def config() -> RunConfig:
    return RunConfig.from_mapping(TABLES)


@pytest.fixture
def rounds(config: RunConfig, tmp_path: Path) -> Iterator[float]:
    """A ledger that is written round by round: each step adds one, and returns what all cost so far."""

    def write() -> Iterator[float]:
        plan = plan_privacy(config)
        ledger, releases = Ledger(tmp_path / "ledger.jsonl"), plan.releases([], 0)
        ledger.append("run.policy", {"delta": str(plan.delta)})
        for number, release in enumerate(releases, start=1):
            ledger.append("round.release", release.to_body())
            with (tmp_path / "ledger.jsonl").open("ab") as handle:
                handle.write(b'{"torn')  # by a crash; the next line takes its place
            yield epsilon(releases[:number], plan.delta, interval=QUICK)

    return write()


def test_it_is_what_the_ledger_costs(config: RunConfig, tmp_path: Path, rounds: Iterator[float]) -> None:
    spent = SpentSoFar(tmp_path, config)
    said = [(expected, spent.after(number, at_any_price=True)) for number, expected in enumerate(rounds, start=1)]
    assert [each for _, each in said] == [(number, expected) for number, (expected, _) in enumerate(said, start=1)]
    assert len(said) == 4
    assert spent.budget == 9.0


def test_reckoning_takes_a_twentieth_of_the_time(
    config: RunConfig, tmp_path: Path, rounds: Iterator[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, reckoned = Stopwatch(), []

    def slow(*_: object, **__: object) -> float:
        clock.now_s += 1.0
        reckoned.append(clock.now_s)
        return float(len(reckoned))

    monkeypatch.setattr(module, "epsilon", slow)
    next(rounds)
    spent = SpentSoFar(tmp_path, config, now=clock)
    for number in range(1, 1001):  # a round each tenth of a second
        clock.now_s += 0.1
        said = spent.after(number)
        assert said is not None
        assert said[0] <= number
    assert 4 <= len(reckoned) <= 0.05 * clock.now_s + 1
    assert said == (said[0], len(reckoned))
    assert said[0] < 1000, "an earlier round is named as such"
    assert spent.after(1000, at_any_price=True) == (1000, len(reckoned))


def test_nothing_is_said_where_clients_are_not_hidden(tmp_path: Path) -> None:
    for privacy in ({}, {"unit": "example", "noise-multiplier": 2.0}):
        config = RunConfig.from_mapping({"task": "digits-mlp", "privacy": privacy})
        assert SpentSoFar(tmp_path, config).after(1, at_any_price=True) is None
