"""The benchmark times what it says; how fast anything is is not asserted here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

Script = Callable[[str], Any]


@pytest.fixture
def rounds(script: Script) -> Any:
    """Return the script."""
    return script("benchmarks.privacy.rounds")


def _tiny(rounds: Any) -> Any:
    return rounds.Case(name="tiny", task="digits-mlp", overrides=("federation.clients=20", "federation.cohort=5"))


def test_every_way_of_hiding_clients_is_timed(rounds: Any) -> None:
    ways = [each for each in rounds.WAYS if not each.name.startswith("example")]
    big = "federation.cohort=20"  # adaptive clipping counts: its noise needs a cohort
    answer = rounds.experiment((big,), cases=(_tiny(rounds),), ways=ways, turns=1)
    assert answer.met, answer.verdict
    found = answer.body["rounds"]
    assert [each["privacy"] for each in found] == [each.name for each in ways]
    assert all(each["refused"] is None for each in found), found
    assert found[0]["ratio_wall"] == found[0]["ratio_cpu"] == 1
    assert all(each["cpu_s"] > 0 for each in found)


def test_the_first_round_is_left_out_and_runs_take_turns(rounds: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def run(case: Any, way: Any, overrides: Any, watch: Any) -> None:
        del case, overrides
        order.append(way.name)
        watch.restart()
        for _ in range(rounds.ROUNDS):
            watch.finished_round({"respondents": 2})

    monkeypatch.setattr(rounds, "_run", run)
    found = rounds.compare(_tiny(rounds), rounds.WAYS[:2], (), turns=3)
    assert order == ["none", rounds.WAYS[1].name] * 3
    assert len(found) == 2


def test_a_stopwatch_counts_from_round_to_round(rounds: Any) -> None:
    watch = rounds.Stopwatch()
    for respondents in (4, 0, 4):
        watch.finished_round({"respondents": respondents})
    assert len(watch.wall_s) == len(watch.cpu_s) == 1  # no first round, and none without respondents
    watch.restart()
    watch.finished_round({"respondents": 4})
    assert len(watch.wall_s) == 1


def test_what_is_refused_is_said_and_the_others_go_on(rounds: Any) -> None:
    ways = (rounds.PLAIN, rounds.Way(name="never", overrides=("privacy.unit=client", "privacy.trust=distributed")))
    answer = rounds.experiment((), cases=(_tiny(rounds),), ways=ways, turns=1)
    assert answer.met
    assert "privacy" in answer.body["rounds"][1]["refused"]
