"""Data on demand: the same clients for the same seed, and a round among a hundred thousand that holds none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedlearn.data.loaders import OnDemand, distribute_data
from fedlearn.errors import ConfigError
from fedlearn.scenario import read_scenario
from fedlearn.tasks import load_task

Script = Callable[[str], Any]

SCENARIO = Path(__file__).parents[2] / "simulations" / "populations" / "scenario.toml"
TASK = str(SCENARIO.with_name("task.py"))


def held(*overrides: str) -> OnDemand:
    found = distribute_data(load_task(TASK), read_scenario(str(SCENARIO), overrides))
    assert isinstance(found, OnDemand)
    return found


def test_clients_differ_and_are_the_same_each_time() -> None:
    clients = [held().client(index).train for index in range(60)]
    again = held().client(59).train
    assert torch.equal(again.inputs, clients[59].inputs)
    sizes = [len(each) for each in clients]
    assert 10 == min(sizes) < max(sizes) <= 60
    means = np.array([each.inputs[:, 0].mean() for each in clients])
    assert np.std(means) > 0.3, "each sees its own part of the world"
    assert not torch.equal(held("seed=1").client(59).train.inputs[:5], again.inputs[:5])


def test_what_is_common_and_the_test_are_the_same_for_every_seed() -> None:
    one = load_task(TASK).load_test(None)
    torch.manual_seed(5)
    same = load_task(TASK).load_test(None)
    assert one is not None and same is not None
    assert len(one) == 10_000
    assert torch.equal(one.inputs, same.inputs)


def test_a_path_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.path"):
        held("data.path=here")


def test_it_learns_in_a_small_federation(script: Script) -> None:
    sizes = ["federation.clients=500", "federation.cohort=20", "federation.rounds=3", "simulation.workers=0"]
    summary = script("runs").run(SCENARIO, sizes).summary
    assert summary["metrics"]["accuracy"] > 0.3, "of ten classes"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_round_of_a_hundred_thousand_clients(script: Script) -> None:
    answer = script("populations.growth").experiment([], populations=(1_000, 100_000), cohorts=(), rounds=2)
    assert answer.met, answer.verdict
