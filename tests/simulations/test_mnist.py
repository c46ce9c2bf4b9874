"""The MNIST task reads the idx files as they are published, and refuses what is not one."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedlearn.errors import DataError
from fedlearn.tasks import load_task

Script = Callable[[str], Any]

SCENARIO = Path(__file__).parents[2] / "simulations" / "mnist" / "scenario.toml"
TASK = str(SCENARIO.with_name("task.py"))


def _idx(path: Path, array: np.ndarray) -> None:
    head = bytes((0, 0, 8, array.ndim)) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.write_bytes(gzip.compress(head + array.astype(np.uint8).tobytes(), 1))


def _folder(path: Path, images: np.ndarray, labels: np.ndarray) -> Path:
    for part in ("train", "t10k"):
        _idx(path / f"{part}-images-idx3-ubyte.gz", images)
        _idx(path / f"{part}-labels-idx1-ubyte.gz", labels)
    return path


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A folder with 40 made-up images."""
    chance = np.random.default_rng(0)
    return _folder(tmp_path, chance.integers(0, 256, (40, 28, 28)), np.arange(40) % 10)


def test_bytes_come_back_in_order(small: Path) -> None:
    examples = load_task(TASK).load_pool(small).train
    assert examples.inputs.shape == (40, 1, 28, 28) and examples.inputs.dtype == torch.uint8
    assert examples.targets.tolist() == [row % 10 for row in range(40)]
    expected = np.random.default_rng(0).integers(0, 256, (40, 28, 28))
    assert np.array_equal(examples.inputs[:, 0].numpy(), expected)


def test_it_trains_in_a_federation(script: Script, small: Path) -> None:
    sizes = ["federation.clients=4", "federation.cohort=2", "federation.rounds=1", "simulation.workers=0"]
    summary = script("runs").run(SCENARIO, [f"data.path={small}", *sizes]).summary
    assert summary["rounds"] == 1
    assert set(summary["metrics"]) == {"accuracy", "loss"}


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("train-labels-idx1-ubyte.gz", b"no gzip", "cannot be read"),
        ("train-labels-idx1-ubyte.gz", gzip.compress(b"\0\0\x08\x03" + bytes(12)), "is no idx file"),
        ("train-images-idx3-ubyte.gz", gzip.compress(b"\0\0\x08\x03" + 3 * b"\0\0\0\x02"), "holds 0 bytes"),
    ],
)
def test_a_damaged_file_is_refused(small: Path, name: str, content: bytes, says: str) -> None:
    (small / name).write_bytes(content)
    with pytest.raises(DataError, match=says):
        load_task(TASK).load_pool(small)


def test_files_that_do_not_belong_together_are_refused(small: Path) -> None:
    _idx(small / "train-labels-idx1-ubyte.gz", np.zeros(39))
    with pytest.raises(DataError, match="40 images but 39 labels"):
        load_task(TASK).load_pool(small)
    _idx(small / "train-labels-idx1-ubyte.gz", np.full(40, 10))
    with pytest.raises(DataError, match="a label is 10"):
        load_task(TASK).load_pool(small)
    _idx(small / "train-images-idx3-ubyte.gz", np.zeros((40, 8, 8)))
    with pytest.raises(DataError, match="28×28 are expected"):
        load_task(TASK).load_pool(small)


def test_missing_data_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.path=FOLDER"):
        load_task(TASK).load_pool(None)
    with pytest.raises(DataError, match="there is no such file"):
        load_task(TASK).load_pool(tmp_path)


def test_the_published_files_hold_what_they_should(mnist: Path) -> None:
    test = load_task(TASK).load_test(mnist)
    assert test is not None
    assert test.inputs.shape == (10_000, 1, 28, 28)
    assert test.targets[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    assert int(test.inputs.max()) == 255


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_whole_experiment(script: Script, mnist: Path) -> None:
    answer = script("mnist.shards").experiment([f"data.path={mnist}"])
    assert answer.met, answer.verdict
