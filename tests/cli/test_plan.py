"""``fedlearn plan``: its bytes are the run's own, and nothing is run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedlearn.cli import main

THREE = ("--set", "federation.clients=3", "--set", "federation.rounds=2")

TASK = """
from fedlearn.learning import Pool
from fedlearn.tasks.digits import DigitsMlp

class Tested(DigitsMlp):
    '''Digits of which every client has test images too.'''

    def load_pool(self, path):
        return Pool(train=super().load_pool(path).train, test=super().load_test(path))
"""


@pytest.fixture
def fedlearn(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Return a function that runs a command line in an empty folder and returns its standard output."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    (tmp_path / "tested.py").write_text(TASK)

    def call(*words: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main(list(words))
        assert stopped.value.code == 0
        return capsys.readouterr().out

    return call


def last_json(out: str) -> dict[str, Any]:
    """Return the object on the last line."""
    return dict(json.loads(out.splitlines()[-1]))


@pytest.mark.parametrize("task", ["digits-mlp", "regression", "tested.py"])
@pytest.mark.parametrize("evaluation", ["off", "both"])
def test_planned_bytes_are_the_bytes_of_the_run(fedlearn: Callable[..., str], task: str, evaluation: str) -> None:
    words = (task, *THREE, "--set", f"federation.evaluation={evaluation}", "--set", "data.partition=iid", "--json")
    plan, summary = last_json(fedlearn("plan", *words)), last_json(fedlearn("simulate", *words))
    for name in ("upload_bytes_per_client", "download_bytes_per_client", "config_sha256", "clients", "rounds"):
        assert plan[name] == summary[name], name


def test_rounds_of_two_digits_and_sparse_evaluation_are_counted(fedlearn: Callable[..., str]) -> None:
    """The number of the round is part of the message, and a partial cohort is an average a client."""
    words = ("tested.py", "--set", "federation.clients=5", "--set", "federation.cohort=2", "--json", "--set")
    rest = ("federation.rounds=11", "--set", "federation.evaluation=federated", "--set", "federation.evaluate-every=4")
    few = ("--set", "training.local-steps=1")
    plan = last_json(fedlearn("plan", *words, *rest, *few))
    summary = last_json(fedlearn("simulate", *words, *rest, *few))
    for name in ("upload_bytes_per_client", "download_bytes_per_client"):
        assert plan[name] == summary[name], name
    assert plan["evaluation"] == "clients"


def test_nothing_is_written(fedlearn: Callable[..., str], tmp_path: Path) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())
    fedlearn("plan", "digits-mlp", *THREE)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_the_plan_in_words(fedlearn: Callable[..., str]) -> None:
    out = fedlearn("plan", "digits-mlp", "--set", "federation.cohort=4")
    for words in ("4,810 parameters", "4 of 20 clients a round", "infinite", "estimate", "kB a round"):
        assert words in out


def test_work_is_counted_from_the_partition(fedlearn: Callable[..., str]) -> None:
    words = ("--set", "data.partition=iid", "--set", "training.batch-size=100", "--set", "training.local-epochs=3")
    plan = last_json(fedlearn("plan", "digits-mlp", *THREE, *words, "--json"))
    assert plan["examples_per_client"] == {"min": 479, "median": 479, "max": 479}
    assert plan["local_steps_per_round"] == {"min": 15, "median": 15, "max": 15}, "three passes of five batches"
    assert plan["client_updates"] == 6
    assert 0 < plan["estimated_minutes"] < 1
    assert plan["privacy"] == {"unit": "none", "epsilon": "inf"}


def test_faults_lower_what_is_expected_back(fedlearn: Callable[..., str]) -> None:
    whole = last_json(fedlearn("plan", "digits-mlp", *THREE, "--json"))
    half = last_json(fedlearn("plan", "digits-mlp", *THREE, "--set", "faults.drop=0.5", "--json"))
    assert half["server_received_bytes"] == whole["server_received_bytes"] // 2
    assert half["server_sent_bytes"] == whole["server_sent_bytes"]


def test_a_test_set_that_cannot_be_read_is_said_as_a_run_says_it(tmp_path, capsys) -> None:
    task = tmp_path / "mine.py"
    body = "    def load_test(self, path):\n        return open('/nowhere.csv').read()\n"
    task.write_text(f"from fedlearn.tasks.digits import DigitsMlp\n\n\nclass Mine(DigitsMlp):\n{body}")
    with pytest.raises(SystemExit) as stopped:
        main(["plan", f"{task}:Mine"])
    assert stopped.value.code == 3
    assert "Mine.load_test: [Errno 2] No such file or directory: '/nowhere.csv'" in capsys.readouterr().err
