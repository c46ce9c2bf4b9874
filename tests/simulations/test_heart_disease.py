"""The heart-disease task prepares what FLamby prepares, and learns from it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedlearn.data.loaders import distribute_data
from fedlearn.errors import DataError
from fedlearn.scenario import read_scenario
from fedlearn.tasks import load_task

Script = Callable[[str], Any]

SCENARIO = Path(__file__).parents[2] / "simulations" / "heart-disease" / "scenario.toml"
TASK = str(SCENARIO.with_name("task.py"))
SIZES = [(199, 104), (172, 89), (30, 16), (85, 45)]
POSITIVE = [0.459, 0.375, 0.978, 0.777]

# sex, age … as in the published files; the last three columns before the diagnosis are never read
LINE = "63,1,{cp},145,233,1,{restecg},150,0,2.3,?,?,?,{num}\n"


def _file(path: Path, count: int = 12, cp: int = 1, num: int = 1) -> Path:
    lines = [LINE.format(cp=cp if row % 2 else 2, restecg=row % 3, num=num * (row % 2)) for row in range(count)]
    path.write_text("".join(lines))
    return path


def test_sizes_features_and_positive_rates_are_flambys(heart_disease: Path) -> None:
    pool = load_task(TASK).load_pool(heart_disease)
    assert pool.test is not None and pool.train.groups is not None and pool.test.groups is not None
    assert pool.train.inputs.shape[1] == pool.test.inputs.shape[1] == 13
    for hospital, (train, test) in enumerate(SIZES):
        mine = [each.targets[each.groups == hospital].numpy() for each in (pool.train, pool.test)]
        assert [len(part) for part in mine] == [train, test]
        assert np.concatenate(mine).mean() == pytest.approx(POSITIVE[hospital], abs=5e-4)


def test_each_hospital_is_normalised_by_its_own_training_patients(heart_disease: Path) -> None:
    config = read_scenario(str(SCENARIO), [f"data.path={heart_disease}"])
    task = load_task(config.task)
    dealt = distribute_data(task, config)
    for hospital, (train, test) in enumerate(SIZES):
        data = task.prepare(dealt.client(hospital))
        assert data.test is not None
        assert (len(data.train), len(data.test)) == (train, test)
        raw = dealt.client(hospital)
        assert raw.test is not None
        mean, deviation = raw.train.inputs.mean(dim=0), raw.train.inputs.std(dim=0)
        varies = deviation > 0
        assert varies.sum() == (12 if hospital == 2 else 13)  # Switzerland noted 0 for every patient's cholesterol
        torch.testing.assert_close(data.train.inputs.mean(dim=0), torch.zeros(13), atol=1e-5, rtol=0)
        torch.testing.assert_close(data.train.inputs.std(dim=0), varies.float(), atol=1e-5, rtol=0)
        flamby = (raw.test.inputs - mean) / (deviation + 1e-9)
        torch.testing.assert_close(data.test.inputs, flamby)


def test_a_device_holds_what_its_hospital_holds_in_a_simulation(heart_disease: Path) -> None:
    task = load_task(TASK)
    pool = task.load_pool(heart_disease)
    local = task.load_local(heart_disease / "processed.switzerland.data")
    assert torch.equal(local.train.inputs, pool.train.inputs[pool.train.groups == 2])


def test_a_feature_that_never_varies_stays_finite(tmp_path: Path) -> None:
    task = load_task(TASK)
    data = task.prepare(task.load_local(_file(tmp_path / "own.data")))
    assert data.test is not None
    assert data.train.inputs.shape[1] == 13
    assert torch.isfinite(data.train.inputs).all() and torch.isfinite(data.test.inputs).all()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("1,2,3\n", "line 1: 3 columns where 14 are expected"),
        ("63,1,one,145,233,1,2,150,0,2.3,3,0,6,0\n", "line 1: could not convert"),
        ("63,1,?,145,233,1,2,150,0,2.3,3,0,6,0\n", "0 complete rows"),
    ],
)
def test_a_file_that_is_no_such_data_is_refused_by_line(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "own.data").write_text(text)
    with pytest.raises(DataError, match=says):
        load_task(TASK).load_local(tmp_path / "own.data")


def test_an_unknown_level_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="column 2 holds"):
        load_task(TASK).load_local(_file(tmp_path / "own.data", cp=7))


def test_missing_data_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.path=FOLDER"):
        load_task(TASK).load_pool(None)
    with pytest.raises(DataError, match="there is no such file"):
        load_task(TASK).load_pool(tmp_path)


def test_a_short_federation_measures_every_hospital(script: Script, heart_disease: Path) -> None:
    overrides = [f"data.path={heart_disease}", "federation.rounds=1", "training.local-steps=5"]
    summary = script("runs").run(SCENARIO, overrides).summary
    assert summary["clients"] == 4
    assert 0 < summary["metrics"]["accuracy_client_mean"] < 1


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_published_table(script: Script, heart_disease: Path) -> None:
    answer = script("heart-disease.table").experiment([f"data.path={heart_disease}"])
    assert answer.met, answer.verdict
