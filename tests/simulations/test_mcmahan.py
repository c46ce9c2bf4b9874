"""McMahan's 2NN: the paper's model and split, and a run that ends where the target is reached."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedlearn.data.loaders import Dealt, distribute_data
from fedlearn.learning import build_flat_model
from fedlearn.scenario import read_scenario
from fedlearn.sources import SeedTree
from fedlearn.tasks import load_task

Script = Callable[[str], Any]

SCENARIO = Path(__file__).parents[2] / "simulations" / "mcmahan" / "scenario.toml"
TASK = str(SCENARIO.with_name("task.py"))


def test_the_model_has_the_papers_number_of_parameters() -> None:
    task = load_task(TASK)
    model = build_flat_model(task, SeedTree.root(0))
    assert model.spec.size == 199_210
    assert model.module(torch.zeros(3, 1, 28, 28, dtype=torch.uint8)).shape == (3, 10)


def test_the_scenario_is_the_papers() -> None:
    config = read_scenario(str(SCENARIO))
    federation, training = config.federation, config.training
    assert (federation.clients, federation.cohort) == (100, 10)
    assert (training.local_epochs, training.batch_size, training.momentum) == (1, 10, 0.0)
    assert (config.data.partition, config.data.labels_per_client) == ("shards", 2)


def test_shards_are_two_runs_of_300_images_sorted_by_digit(mnist: Path) -> None:
    """Every client has 600 images, in two shards; a digit's count is no multiple of 300, so a shard may hold two."""
    task = load_task(TASK)
    held = distribute_data(task, read_scenario(str(SCENARIO), [f"data.path={mnist}"]))
    assert isinstance(held, Dealt)
    assert {part.size for part in held.train} == {600}
    labels = held.pool.train.labels()
    assert labels is not None
    seen = np.array([np.unique(labels[part]).size for part in held.train])
    assert seen.max() <= 4
    assert (seen <= 2).sum() >= 85
    counts = np.bincount(labels)
    bounds = np.cumsum(counts)
    expected = np.zeros(10, dtype=int)  # shards that each digit fills alone: the others straddle a bound
    for shard in range(200):
        digits = np.searchsorted(bounds, [300 * shard, 300 * shard + 299], side="right")
        expected[digits[0]] += digits[0] == digits[1]
    assert expected.sum() >= 190
    alone = sum(int((np.bincount(labels[part], minlength=10) % 300 == 0).all()) for part in held.train)
    assert alone >= 80, "both of its shards are of one digit each"


def test_a_curve_is_the_best_so_far_and_ends_the_run_at_the_target(script: Script) -> None:
    table = script("mcmahan.table")
    curve = table.Curve(0.97)
    for accuracy in (0.5, 0.9, 0.8):
        curve.finished_round({"metrics": {"accuracy": accuracy}, "wall_s": 0.1})
    assert curve.best == [0.5, 0.9, 0.9]
    assert curve.rounds is None
    with pytest.raises(table._ReachedError):
        curve.finished_round({"metrics": {"accuracy": 0.97}, "wall_s": 0.1})
    assert curve.rounds == 4
    assert len(curve.wall_s) == 4 and curve.wall_s[0] >= 0.1


def test_a_run_stops_where_its_target_is_reached(script: Script, mnist: Path) -> None:
    small = [f"data.path={mnist}", "federation.cohort=1", "simulation.workers=0", "training.local-steps=5"]
    curve = script("mcmahan.table").measured("iid", [*small, "federation.rounds=5"], target=0.05)
    assert curve.rounds == 1


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_whole_experiment(script: Script, mnist: Path) -> None:
    answer = script("mcmahan.table").experiment([f"data.path={mnist}"])
    assert answer.met, answer.verdict
