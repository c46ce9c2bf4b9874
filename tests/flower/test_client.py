"""The ClientApp: what a device refuses, and that chance and bad data in a task have no say in the result."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedlearn.config import RunConfig
from fedlearn.federation import policy
from fedlearn.federation.messages import RoundPlan
from fedlearn.federation.run_folder import RunFolder
from fedlearn.flower.client import build_client_app
from fedlearn.flower.records import request_records, vector_record
from fedlearn.learning import build_flat_model
from fedlearn.privacy.ledger import read_events, releases_of
from fedlearn.privacy.releases import read_number
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


def ask_device(
    config: RunConfig, node_config: dict[str, str | float], task: str = "digits-mlp", *, node: int = 5, number: int = 1
) -> Message:
    """Return what a device with this node config answers to a train message of ``config``."""
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
    model = build_flat_model(load_task(task), SeedTree.root(config.seed).child("initialise"))
    plan = RoundPlan(
        config=config,
        round_number=number,
        attempt=1,
        proximal_mu=0.0,
        spec_sha256=model.spec.sha256,
        bound_l2=config.privacy.bound_l2 if config.privacy.unit == "client" else None,
        run="a run",
    )
    content = request_records(vector_record("vector", model.vector()), plan)
    message = Message(content, node, "train", ttl=60.0, group_id=f"{number}.1")
    context = Context(run_id=1, node_id=node, node_config=node_config, state=RecordDict(), run_config={})
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


# -- what its owner permits ------------------------------------------------------------------------------------------


def asked_for(unit: str, **privacy: float) -> RunConfig:
    """A round that hides ``unit``; the noise is so great that one costs next to nothing."""
    promised = {"unit": unit, "noise-multiplier": 20.0, **privacy} if unit != "none" else {"unit": unit}
    return RunConfig.from_mapping({"task": "digits-mlp", "privacy": promised, "training": {"local-steps": 1}})


@pytest.fixture
def owned(own_data, tmp_path) -> dict[str, str | float]:
    """The node configuration of a device whose owner has set a limit."""
    ledger = str(tmp_path / "own" / "ledger.jsonl")
    return {"data-path": own_data, "task": "digits-mlp", "max-epsilon": 1.0, "ledger-path": ledger}


def code_of(reply: Message) -> str:
    return reply.error.reason.partition(":")[0] if reply.has_error() else "answered"


def test_with_a_limit_a_device_answers_only_rounds_that_hide_its_examples(owned):
    assert code_of(ask_device(asked_for("none"), owned)) == "refused"
    assert code_of(ask_device(asked_for("client", **{"bound-l2": 1e9}), owned)) == "refused"
    assert not Path(str(owned["ledger-path"])).exists()
    reply = ask_device(asked_for("example"), owned)
    assert set(reply.content) == {"update"}
    trusting = {**owned, "privacy-unit": "client"}
    assert code_of(ask_device(asked_for("client"), trusting)) == "answered"
    assert code_of(ask_device(asked_for("example"), trusting)) == "refused"


def test_without_a_limit_of_its_owners_a_device_hides_nothing_and_says_so(owned):
    del owned["max-epsilon"]
    assert code_of(ask_device(asked_for("example"), owned)) == "refused"


def test_a_device_stops_at_its_limit_whatever_the_server_calls_itself(owned):
    config = asked_for("example", **{"noise-multiplier": 2.0})
    answers = [code_of(ask_device(config, owned, node=number, number=number)) for number in range(1, 9)]
    assert answers[0] == "answered"
    assert answers[-1] == "budget-spent"
    assert answers == sorted(answers), "once spent, spent for ever"
    counted = releases_of(read_events(Path(str(owned["ledger-path"]))))
    assert len(counted) == answers.count("answered")
    assert not any(each.simulated for each in counted)


def test_the_ledger_of_a_device_goes_by_its_data_and_not_by_the_id_it_is_given(owned, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
    del owned["ledger-path"]
    for node in (11, 12, 13):
        assert code_of(ask_device(asked_for("example"), owned, node=node, number=node)) == "answered"
    (ledger,) = (tmp_path / "home").rglob("ledger.jsonl")
    assert len(releases_of(read_events(ledger))) == 3


def test_delta_is_the_owners_and_not_the_servers(owned):
    ask_device(asked_for("example", delta=0.04), owned)
    body = read_events(Path(str(owned["ledger-path"])))[0].body
    assert read_number(body["delta"]) == pytest.approx(20**-1.1)
    assert code_of(ask_device(asked_for("example"), {**owned, "delta": 0.06})) == "refused", "that is 1/n or more"


def test_a_round_that_fails_after_it_began_has_been_told_something_and_counts(owned, tmp_path, monkeypatch):
    def fails(*_args, **_more):
        raise ZeroDivisionError

    monkeypatch.setattr(policy, "train_private", fails)
    assert code_of(ask_device(asked_for("example"), owned)) == "training-failed"
    assert len(releases_of(read_events(Path(str(owned["ledger-path"]))))) == 1


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
