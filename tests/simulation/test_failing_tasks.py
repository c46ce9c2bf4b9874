"""What a user's own task can do wrong, and what is left when a run cannot go on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fedlearn.errors import DataError, FedlearnError, RoundFailedError, RunUnreadableError, TaskError
from fedlearn.federation.run_folder import RunFolder
from fedlearn.learning.inference import load_model
from fedlearn.scenario import read_scenario
from fedlearn.simulation.engine import simulate
from fedlearn.tasks import load_task

TASK = """
import torch
from pathlib import Path
from fedlearn.tasks.digits import DigitsMlp


class Mine(DigitsMlp):
{body}
"""


@pytest.fixture
def begin(tmp_path: Path):
    """Return a maker of a run with a task whose body is given."""

    def make(body: str, *overrides: str) -> RunFolder:
        task = tmp_path / "mine.py"
        task.write_text(TASK.format(body="\n".join(f"    {line}" for line in body.splitlines())))
        settings = ["federation.clients=4", "federation.rounds=3", "data.partition=iid", *overrides]
        return RunFolder.create(tmp_path / "run", read_scenario(f"{task}:Mine", settings))

    return make


@pytest.mark.parametrize("method", ["load_pool(self, path)", "load_test(self, path)"])
def test_a_file_that_a_task_cannot_read_is_a_data_error(begin, method):
    folder = begin(f"def {method}:\n    return Path('/nowhere/at-all.csv').read_text()")
    with pytest.raises(DataError, match=r"Mine\.load_.*/nowhere/at-all\.csv"):
        simulate(folder)


@pytest.mark.parametrize("method", ["build_model(self)", "load_pool(self, path)", "load_test(self, path)"])
def test_a_task_that_raises_is_named_with_file_and_line(begin, method):
    folder = begin(f"def {method}:\n    return 1 / 0")
    with pytest.raises(TaskError, match=r"Mine\.\w+ raised ZeroDivisionError: .*mine\.py, line 9") as error:
        simulate(folder)
    assert error.value.exit_code == 2


def test_a_central_metric_that_is_no_number_names_the_metric(begin):
    folder = begin("def metrics(self, output, target):\n    return {'share': (output[:, 0] * 0) / 0}")
    with pytest.raises(TaskError, match=r"Mine\.metrics: 'share' is not finite"):
        simulate(folder)


FAILS_IN_ROUND_TWO = """def loss(self, output, target):
    self.calls = getattr(self, "calls", 0) + torch.is_grad_enabled()
    if self.calls > 4:
        raise RuntimeError("no more")
    return super().loss(output, target)"""


def test_a_run_that_fails_leaves_its_last_good_model_to_be_used(begin):
    folder = begin(FAILS_IN_ROUND_TWO, "training.local-steps=1")
    with pytest.raises(RoundFailedError, match=r"round 2: .* The model of round 1 is kept in "):
        simulate(folder)
    summary = folder.summary()
    assert (summary["finished"], summary["rounds"]) == (False, 1)
    load_model(load_task("digits-mlp"), folder.model_path, sha256=summary["model_sha256"], seed=0)


def test_a_run_that_fails_in_its_first_round_claims_no_model(begin):
    folder = begin("def loss(self, output, target):\n    return output.mean()")
    with pytest.raises(RoundFailedError, match=r"No round was finished\. Look into the clients' logs$"):
        simulate(folder)
    assert not folder.model_path.exists()
    assert "reduction='none'" in (folder.path / "clients.log").read_text()


def test_a_run_is_not_resumed_with_another_model_of_the_same_size(begin, tmp_path):
    model = "def build_model(self):\n    from torch import nn\n    return nn.Sequential(nn.Flatten(), {layers})"
    folder = begin(model.format(layers="nn.Linear(64, 10), nn.Linear(10, 10)"), "training.learning-rate=0.001")
    simulate(folder)
    changed = model.format(layers="nn.Linear(64, 10), nn.Unflatten(1, (10,)), nn.Linear(10, 10)")
    (tmp_path / "mine.py").write_text(TASK.format(body="\n".join(f"    {line}" for line in changed.splitlines())))
    resume = f"from fedlearn.cli import main; main(['simulate', '--resume', {str(folder.path)!r}])"
    done = subprocess.run([sys.executable, "-c", resume], capture_output=True, text=True, timeout=60)
    assert done.returncode == RunUnreadableError.exit_code
    assert "another model than the task builds now" in done.stderr


@pytest.mark.parametrize("name", [".lock", "metrics.jsonl"])
def test_a_folder_that_cannot_be_written_is_said_to_be_that(begin, name):
    folder = begin("...", "federation.rounds=1")
    (folder.path / name).mkdir()  # as root, no mode keeps a file from being written
    with pytest.raises(FedlearnError, match=r"cannot (write|be read)") as error:
        simulate(folder)
    assert error.value.exit_code in (1, 3)
