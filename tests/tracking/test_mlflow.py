"""MLflow's own client finds what was written: one run, every number once, and the configuration."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import json, threading
from pathlib import Path
from fedlearn.config import RunConfig
from fedlearn.federation.run_folder import RunFolder
from fedlearn.tracking.epsilon import SpentSoFar
from fedlearn.tracking.tracks import open_tracks

folder = RunFolder.create(Path("my run"), RunConfig())

def kept(number):
    line = {"round": number, "respondents": 3, "failures": {}, "train_loss": 0.5 / number, "metrics": {}}
    line["metrics"] = {"f1 (macro)": 0.25}
    with (folder.path / "metrics.jsonl").open("a") as handle:
        handle.write(json.dumps(line) + "\\n")
    return line

for numbers in ((1, 2), (3,)):
    with open_tracks(folder, ["mlflow"], SpentSoFar(folder.path, folder.config)) as tracks:
        for number in numbers:
            tracks.finished_round(kept(number))
assert threading.active_count() == 1, "the engine may fork at any time"

from mlflow import MlflowClient
client = MlflowClient(tracking_uri="sqlite:///my run/mlruns/mlflow.db")
(run,) = client.search_runs([each.experiment_id for each in client.search_experiments()])
history = {name: [(each.step, each.value) for each in client.get_metric_history(run.info.run_id, name)]
           for name in run.data.metrics}
said = {"history": history, "params": run.data.params, "status": run.info.status, "name": run.info.run_name}
Path("said.json").write_text(json.dumps(said))
"""


@pytest.mark.slow
def test_mlflow_finds_every_round_once(tmp_path: Path) -> None:
    """In a process of its own: MLflow's dependencies warn, and it leaves a database open."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout + done.stderr == "", "nothing in the middle of the progress display"
    said = json.loads((tmp_path / "said.json").read_text())
    assert said["history"] == {
        "metrics/f1 _macro_": [[1, 0.25], [2, 0.25], [3, 0.25]],
        "round/failures": [[1, 0.0], [2, 0.0], [3, 0.0]],
        "round/respondents": [[1, 3.0], [2, 3.0], [3, 3.0]],
        "round/train_loss": [[1, 0.5], [2, 0.25], [3, 0.5 / 3]],
    }
    assert said["params"]["federation.clients"] == "20"
    assert said["status"] == "KILLED", "three rounds are not all"
    assert said["name"] == "my run"
    assert {entry.name for entry in tmp_path.iterdir()} == {"my run", "said.json"}, "nothing else is left"
