"""The ClientApp: what a device refuses, and that chance and bad data in a task have no say in the result."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedlearn.config import RunConfig
from fedlearn.federation.messages import RoundPlan
from fedlearn.federation.run_folder import RunFolder
from fedlearn.flower.client import build_client_app
from fedlearn.flower.records import request_records, vector_record
from fedlearn.learning import build_flat_model
from fedlearn.scenario import read_scenario
from fedlearn.simulation.engine import simulate
from fedlearn.sources import SeedTree
from fedlearn.tasks import load_task

LEAVES_A_MARK = """
from pathlib import Path
from fedlearn.tasks.digits import DigitsMlp

Path({mark!r}).touch()


class T(DigitsMlp): ...
"""

SPLITS_BY_CHANCE = """
import random
import numpy as np
import torch
from fedlearn.learning.task import ClientData
from fedlearn.tasks.digits import DigitsMlp


class Splits(DigitsMlp):
    def build_model(self):
        model = super().build_model()
        model[2].bias.data += torch.from_numpy(np.random.rand(64).astype("float32")) + random.random()
        return model

    def prepare(self, data):
        order = torch.randperm(len(data.train)).numpy()
        np.random.shuffle(order)
        random.shuffle(order)
        cut = len(order) // 2
        return ClientData(data.train.take(order[:cut]), data.train.take(order[cut:]))
"""

ONE_NAN = """
from fedlearn.tasks.digits import DigitsMlp


class Spoilt(DigitsMlp):
    def prepare(self, data):
        if len(data.train) == {size}:
            data.train.inputs[3, 0, 0, 0] = float("nan")
        return data
"""


def ask_device(config: RunConfig, node_config: dict[str, str], task: str = "digits-mlp") -> Message:
    """Return what a device with this node config answers to a train message of ``config``."""
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
    model = build_flat_model(load_task(task), SeedTree.root(config.seed).child("initialise"))
    plan = RoundPlan(config=config, round_number=1, attempt=1, proximal_mu=0.0, spec_sha256=model.spec.sha256)
    content = request_records(vector_record("vector", model.vector()), plan)
    message = Message(content, 5, "train", ttl=60.0, group_id="1.1")
    context = Context(run_id=1, node_id=5, node_config=node_config, state=RecordDict(), run_config={})
    return build_client_app()(message, context)


@pytest.fixture
def own_data(tmp_path: Path) -> str:
    rng = np.random.default_rng(0)
    path = tmp_path / "own.npz"
    np.savez(path, inputs=rng.random((20, 1, 8, 8), dtype=np.float32), targets=rng.integers(0, 10, 20))
    return str(path)


def test_a_device_trains_its_owners_task_on_its_owners_data(own_data):
    reply = ask_device(RunConfig(task="digits-mlp"), {"data-path": own_data, "task": "digits-mlp"})
    assert not reply.has_error()
    assert reply.content["metrics"]["num-examples"] == 20


@pytest.mark.parametrize("own", ["digits-mlp", ""])
def test_a_device_refuses_another_task_before_anything_of_it_is_imported(own, own_data, tmp_path):
    mark, evil = tmp_path / "mark", tmp_path / "evil.py"
    evil.write_text(LEAVES_A_MARK.format(mark=str(mark)))
    reply = ask_device(RunConfig(task=str(evil)), {"data-path": own_data, "task": own})
    assert reply.has_error()
    assert reply.error.reason.startswith("refused:")
    assert not mark.exists()


def test_a_task_file_may_lie_elsewhere_on_the_device_and_only_the_devices_is_imported(own_data, tmp_path):
    marks = [tmp_path / "server-mark", tmp_path / "device-mark"]
    files = [tmp_path / "server" / "my_task.py", tmp_path / "device" / "my_task.py"]
    for mark, file in zip(marks, files, strict=True):
        file.parent.mkdir()
        file.write_text(LEAVES_A_MARK.format(mark=str(mark)))
    reply = ask_device(RunConfig(task=str(files[0])), {"data-path": own_data, "task": str(files[1])})
    assert not reply.has_error()
    assert [mark.exists() for mark in marks] == [False, True]


def run(folder: Path, task: Path, *overrides: str) -> RunFolder:
    settings = ["federation.clients=4", "federation.rounds=2", "data.partition=iid", *overrides]
    return RunFolder.create(folder, read_scenario(str(task), settings))


def test_chance_in_a_users_task_is_the_runs_own_for_any_number_of_workers(tmp_path):
    task = tmp_path / "splits.py"
    task.write_text(SPLITS_BY_CHANCE)
    hashes = set()
    for name, workers in (("a", 0), ("b", 0), ("c", 1), ("d", 2)):
        folder = run(tmp_path / name, task, f"simulation.workers={workers}", "federation.evaluation=both")
        np.random.seed(len(hashes) + ord(name))
        hashes.add(simulate(folder)["model_sha256"])
    assert len(hashes) == 1


def test_nan_in_a_clients_data_is_said_to_be_that(tmp_path):
    task = tmp_path / "spoilt.py"
    task.write_text(ONE_NAN.format(size=360))  # 1,437 over four: one client has 360
    folder = run(tmp_path / "run", task, "federation.min-respondents=1")
    simulate(folder)
    assert [line["failures"] for line in folder.metrics()] == [{"0": "bad-data"}] * 2
    assert "the inputs of training example 3 are not finite" in (folder.path / "clients.log").read_text()
