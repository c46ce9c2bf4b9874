"""A whole federation in one process: the same bytes every time, and a client that fails is only left out."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest

from fedlearn.config import RunConfig
from fedlearn.errors import RoundFailedError, RunFailedError
from fedlearn.federation.run_folder import RunFolder
from fedlearn.flower.grid import LocalGrid
from fedlearn.simulation.engine import simulate
from fedlearn.simulation.faults import SeededFaults
from fedlearn.sources import SeedTree

SMALL = {"task": "digits-mlp", "federation": {"clients": 6, "cohort": 4, "rounds": 2}, "data": {"partition": "iid"}}


def merged(*tables):
    """Return tables merged key by key, the later the stronger."""
    result = {}
    for table in tables:
        for key, value in table.items():
            result[key] = {**result.get(key, {}), **value} if isinstance(value, dict) else value
    return result


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Return a function that simulates a small federation and returns its folder and summary."""
    monkeypatch.setattr("fedlearn.federation.summary.draw_history", lambda *_, **__: "<svg/>")  # the slowest part
    numbers = iter(range(100))

    def call(*tables, **observing):
        folder = RunFolder.create(tmp_path / str(next(numbers)), RunConfig.from_mapping(merged(SMALL, *tables)))
        return folder, simulate(folder, **observing)

    return call


def test_the_same_seed_gives_the_same_bytes_on_every_run_and_any_number_of_workers(run):
    summaries = [run({"simulation": {"workers": workers}})[1] for workers in (0, 0, 1, 2)]
    assert len({summary["model_sha256"] for summary in summaries}) == 1
    assert len({json.dumps(summary["metrics"]) for summary in summaries}) == 1
    assert len({summary["upload_bytes_per_client"] for summary in summaries}) == 1


def test_another_seed_gives_another_model(run):
    assert len({run({"seed": seed})[1]["model_sha256"] for seed in range(3)}) == 3


def test_a_run_leaves_every_file_of_its_contract_and_no_other(run):
    folder, summary = run()
    assert {path.name for path in folder.path.iterdir() if not path.name.startswith(".")} == {
        "config.toml",
        "ledger.jsonl",
        "metrics.jsonl",
        "model.safetensors",
        "summary.json",
        "history.svg",
        "checkpoint",
    }
    assert summary == json.loads((folder.path / "summary.json").read_text())
    assert {"task", "rounds", "clients", "metrics", "wall_s", "client_updates_per_s", "seed", "versions"} <= set(
        summary
    )
    assert {"upload_bytes_per_client", "download_bytes_per_client", "model_sha256"} <= set(summary)
    assert [line["round"] for line in folder.metrics()] == [1, 2]


def test_a_finished_run_that_is_resumed_stays_the_same(run):
    folder, summary = run()
    before = (folder.path / "model.safetensors").read_bytes()
    assert simulate(folder)["model_sha256"] == summary["model_sha256"]
    assert (folder.path / "model.safetensors").read_bytes() == before


DROPPING = {"federation": {"cohort": 6, "rounds": 4, "min-respondents": 1}, "faults": {"drop": 0.4}}


def test_clients_that_are_dropped_are_the_same_ones_each_time_and_the_run_goes_on(run):
    (one, first), (two, second) = run(DROPPING), run(DROPPING, {"simulation": {"workers": 2}})
    assert first["model_sha256"] == second["model_sha256"]
    failures = [line["failures"] for line in one.metrics()]
    assert failures == [line["failures"] for line in two.metrics()]
    assert any(failures)
    assert {code for each in failures for code in each.values()} == {"no-reply"}
    assert len({json.dumps(each) for each in failures}) > 1
    for line in one.metrics():
        assert line["respondents"] == line["cohort"] - len(line["failures"])
    assert run({"federation": DROPPING["federation"]})[1]["model_sha256"] != first["model_sha256"]


def test_faults_are_drawn_as_often_as_asked_and_never_when_a_node_says_who_it_is():
    config = RunConfig.from_mapping({"faults": {"drop": 0.3}}).faults
    faults = SeededFaults(config, SeedTree.root(0))
    drawn = [faults.drops(f"{number}.1", client, "train") for number in range(50) for client in range(40)]
    assert np.mean(drawn) == pytest.approx(0.3, abs=0.04)
    assert not any(faults.drops("identify", client, "query.identify") for client in range(100))
    assert faults.drops("7.1", 3, "train") == SeededFaults(config, SeedTree.root(0)).drops("7.1", 3, "train")


RAISING = """
import torch
from torch import nn
from fedlearn.learning import Examples, Pool, Task


class Fragile(Task):
    def build_model(self):
        return nn.Linear(2, 1)

    def loss(self, output, target):
        if (target == 3).any():
            raise RuntimeError("patient Jane Doe, born 1970")
        return ((output[:, 0] - target) ** 2)

    def load_pool(self, path):
        targets = torch.arange(4.0).repeat_interleave(5)
        return Pool(Examples(torch.ones(20, 2), targets, groups=targets.numpy()))
"""


@pytest.fixture
def fragile(tmp_path):
    """The tables of a run of a user's own task, which raises for client 3 only."""
    path = tmp_path / "fragile.py"
    path.write_text(RAISING)
    federation = {"clients": 4, "cohort": 4, "rounds": 2, "evaluation": "off", "min-respondents": 3}
    return {"task": str(path), "federation": federation, "data": {"partition": "natural"}}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_client_whose_task_raises_is_left_out_and_its_text_stays_in_its_own_log(run, fragile, workers, capfd, caplog):
    with caplog.at_level(logging.DEBUG):
        folder, summary = run(fragile, {"simulation": {"workers": workers}})
    assert summary["rounds"] == 2
    assert [line["failures"] for line in folder.metrics()] == [{"3": "training-failed"}] * 2
    assert [line["respondents"] for line in folder.metrics()] == [3, 3]
    told = {path.name: path.read_text(errors="replace") for path in folder.path.rglob("*") if path.is_file()}
    assert [name for name, text in told.items() if "Jane" in text] == ["clients.log"]
    assert told["clients.log"].count("RuntimeError: patient Jane Doe, born 1970") == 2 * 2  # line and traceback
    said = capfd.readouterr()
    assert "Jane" not in said.out + said.err + caplog.text


def test_a_task_that_raises_for_too_many_ends_the_run_with_its_codes_and_without_its_text(run, fragile):
    with pytest.raises(RoundFailedError) as failed:
        run(fragile, {"federation": {"min-respondents": 4, "round-tries": 2}})
    assert failed.value.failures == {"3": "training-failed"}
    assert "Jane" not in str(failed.value)


def test_two_runs_in_one_process_do_not_disturb_each_other(run, fragile):
    alone = run()[1]["model_sha256"]
    run(fragile)
    assert run()[1]["model_sha256"] == alone


def test_the_log_of_the_clients_is_let_go_of_when_the_run_ends(run, fragile):
    log = logging.getLogger("fedlearn.client")
    before = (list(log.handlers), log.propagate)
    run(fragile)
    assert (list(log.handlers), log.propagate) == before


def test_a_folder_that_another_run_works_in_is_refused(tmp_path):
    folder = RunFolder.create(tmp_path / "run", RunConfig.from_mapping(SMALL))
    with folder.lock(), pytest.raises(RunFailedError, match="another process"):
        simulate(folder)


def test_no_worker_outlives_the_run(run, monkeypatch):
    grids = []
    start = LocalGrid.__init__

    def noting(self, *args, **kwargs):
        grids.append(self)
        start(self, *args, **kwargs)

    monkeypatch.setattr(LocalGrid, "__init__", noting)
    run({"simulation": {"workers": 2}})
    assert [grid._pool._workers for grid in grids] == [[]]
