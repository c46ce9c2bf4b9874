"""A client that hangs is left out of its round, and costs nothing else: neither the others nor the run."""

from __future__ import annotations

import time

import pytest

from fedlearn.config import FederationConfig, RunConfig
from fedlearn.federation.run_folder import RunFolder
from fedlearn.flower.client import prepare_clients
from fedlearn.simulation.engine import simulate

CLIENTS = 6
TIMEOUT_S = 1.0

HANGING = """
import time
import torch
from torch import nn
from fedlearn.learning import Examples, Pool, Task


class Hanging(Task):
    def build_model(self):
        return nn.Linear(2, 1)

    def loss(self, output, target):
        if (target == IN_LOSS).any():
            time.sleep(600)
        return (output[:, 0] - target) ** 2

    def prepare(self, data):
        if (data.train.targets == IN_PREPARE).any():
            time.sleep(600)
        return data

    def load_pool(self, path):
        targets = torch.arange(6.0).repeat_interleave(5)
        return Pool(Examples(torch.ones(30, 2), targets, groups=targets.numpy()))
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Return a function that simulates a federation of which some clients hang; it returns folder and summary."""
    monkeypatch.setattr("fedlearn.federation.summary.draw_history", lambda *_, **__: "<svg/>")  # the slowest part
    numbers = iter(range(100))

    def call(workers, *, in_loss=-1, in_prepare=-1, **federation):
        task = tmp_path / "hanging.py"
        task.write_text(f"IN_LOSS, IN_PREPARE = {in_loss}, {in_prepare}\n{HANGING}")
        config = {
            "task": str(task),
            "federation": {
                "clients": CLIENTS,
                "rounds": 1,
                "evaluation": "off",
                "round-timeout-s": TIMEOUT_S,
                "min-respondents": 4,
                "round-tries": 1,
                **federation,
            },
            "data": {"partition": "natural"},
            "simulation": {"workers": workers, "trainer": "sequential"},
        }
        folder = RunFolder.create(tmp_path / str(next(numbers)), RunConfig.from_mapping(config))
        return folder, simulate(folder)

    return call


@pytest.mark.parametrize("client", [0, CLIENTS - 1])
def test_a_hanging_client_costs_only_itself_whatever_the_number_of_workers(run, client):
    models = set()
    for workers in (0, 2):
        begun = time.monotonic()
        folder, summary = run(workers, in_loss=client)
        assert TIMEOUT_S <= time.monotonic() - begun < TIMEOUT_S + 3.0
        (line,) = folder.metrics()
        assert line["failures"] == {str(client): "no-reply"}
        assert line["respondents"] == CLIENTS - 1
        models.add(summary["model_sha256"])
    assert len(models) == 1


def test_two_that_hang_in_different_places_are_both_left_out(run):
    models = set()
    for workers in (0, 2):
        begun = time.monotonic()
        folder, summary = run(workers, in_prepare=0, in_loss=3)
        assert time.monotonic() - begun < 2 * TIMEOUT_S + 3.0
        assert [line["failures"] for line in folder.metrics()] == [{"0": "no-reply", "3": "no-reply"}]
        models.add(summary["model_sha256"])
    assert len(models) == 1


def test_a_client_that_hangs_in_every_round_leaves_nothing_behind_for_the_next(run):
    models = set()
    for workers in (0, 2):
        folder, summary = run(workers, in_loss=1, rounds=3, **{"round-timeout-s": 0.5})
        assert [line["failures"] for line in folder.metrics()] == [{"1": "no-reply"}] * 3
        models.add(summary["model_sha256"])
    assert len(models) == 1


def test_what_hangs_on_trial_is_trained_one_by_one(tmp_path, monkeypatch):
    """Whether clients can be trained many at once is tried before the first round, aside and for so long only."""
    monkeypatch.setattr("fedlearn.flower.site._TRIAL_S", 0.3)
    task = tmp_path / "hanging.py"
    task.write_text(f"IN_LOSS, IN_PREPARE = 0, -1\n{HANGING}")
    site = prepare_clients(RunConfig(task=str(task), federation=FederationConfig(clients=CLIENTS)))
    choice = site.trainer("auto")
    assert choice.trainer is None
    assert "it took longer than 0.3 s" in choice.reason


def test_what_ends_its_process_on_trial_is_trained_one_by_one(tmp_path):
    task = tmp_path / "ending.py"
    task.write_text(f"IN_LOSS, IN_PREPARE = 0, -1\n{HANGING}".replace("time.sleep(600)", "import os; os._exit(1)"))
    site = prepare_clients(RunConfig(task=str(task), federation=FederationConfig(clients=CLIENTS)))
    assert "its process ended" in site.trainer("auto").reason
