"""``fedlearn predict``: the run's own figures again, and a sentence for whatever people bring."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fedlearn.cli.predict import open_finished
from fedlearn.errors import RunUnreadableError
from fedlearn.learning.inference import answer
from fedlearn.tasks import load_task

Cli = Callable[..., Any]


@pytest.fixture(scope="module")
def images() -> tuple[np.ndarray, np.ndarray]:
    test = load_task("digits-mlp").load_test(None)
    assert test is not None
    return test.inputs.numpy(), test.targets.numpy()


# -- the task's own test set ---------------------------------------------------------------------------------------


def test_metrics_are_those_of_the_summary(cli: Cli, trained: Path) -> None:
    said = cli("predict", trained, "--json")
    assert said.code == 0
    assert said.json["metrics"] == json.loads((trained / "summary.json").read_text())["metrics"]
    assert said.json["count"] == len(said.json["predictions"]) == 360
    assert said.json["run"] == str(trained.resolve())
    assert all(0.1 <= each <= 1 for each in said.json["probabilities"])


def test_metrics_are_those_of_the_summary_in_float64(cli: Cli, trained_regression: Path) -> None:
    said = cli("predict", trained_regression, "--json")
    assert said.json["metrics"] == json.loads((trained_regression / "summary.json").read_text())["metrics"]
    assert "probabilities" not in said.json
    assert "labels" not in said.json
    assert all(isinstance(each, float) for each in said.json["predictions"])


def test_table_shows_twenty_and_where_the_rest_is(cli: Cli, trained: Path) -> None:
    said = cli("predict", trained)
    assert said.code == 0
    assert "accuracy" in said.out
    assert "340 more" in said.out
    assert "--out" in said.out


def test_out_holds_every_prediction(cli: Cli, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "answers.csv"
    said = cli("predict", trained, "--out", out, "--json")
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert list(rows[0]) == ["row", "prediction", "label", "probability", "target"]
    assert [int(row["prediction"]) for row in rows] == said.json["predictions"]
    right = sum(row["prediction"] == row["target"] for row in rows) / len(rows)
    assert right == pytest.approx(said.json["metrics"]["accuracy"])
    assert said.json["out"] == str(out.resolve())


def test_batches_change_nothing(trained: Path) -> None:
    finished = open_finished(trained)
    inputs = torch.rand(2500, 1, 8, 8)
    together = answer(finished.model, finished.task, inputs)
    alone = [answer(finished.model, finished.task, inputs[i : i + 1]).decoded for i in (0, 1023, 1024, 2499)]
    assert torch.equal(together.decoded[[0, 1023, 1024, 2499]], torch.cat(alone))
    assert not finished.model.module.training


# -- files ---------------------------------------------------------------------------------------------------------


def test_every_kind_of_file_gives_the_same(
    cli: Cli, trained: Path, tmp_path: Path, images: tuple[np.ndarray, np.ndarray]
) -> None:
    inputs, targets = images[0][:30], images[1][:30]
    flat = inputs.reshape(30, 64)
    names = ",".join(f"p{i}" for i in range(64))
    np.savez(tmp_path / "with.npz", inputs=inputs, targets=targets)
    np.savez(tmp_path / "without.npz", inputs=flat.astype(">f8"))
    np.save(tmp_path / "array.npy", inputs)
    np.savetxt(tmp_path / "bare.csv", flat, delimiter=",", fmt="%.9g")
    np.savetxt(tmp_path / "header.csv", flat, delimiter=",", fmt="%.9g", header=names, comments="")
    with_target = np.column_stack([flat, targets])
    np.savetxt(tmp_path / "target.csv", with_target, delimiter=",", fmt="%.9g", header=f"{names},target", comments="")
    expected = cli("predict", trained, "--json").json["predictions"][:30]
    for name in ("with.npz", "without.npz", "array.npy", "bare.csv", "header.csv", "target.csv"):
        said = cli("predict", trained, "--data", tmp_path / name, "--json")
        assert said.json["predictions"] == expected, name
        assert bool(said.json["metrics"]) == (name in ("with.npz", "target.csv")), name
    assert "without targets" in cli("predict", trained, "--data", tmp_path / "bare.csv").out


def _csv(text: str) -> bytes:
    return text.encode()


ROW = ",".join(["0.5"] * 64)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", _csv(f"{ROW}\n0.5,0.5\n"), ["row 2", "2 columns", "64"]),
        ("a.csv", _csv("0.5,0.5\n"), ["(1, 2)", "(n, 1, 8, 8)", "64 columns"]),
        ("a.csv", _csv(f"{ROW}\n\n{ROW.replace('0.5', 'x', 1)}\n"), ["row 3", "column 1", "'x'"]),
        ("a.csv", _csv(f"a{',b' * 63}\n{ROW[:-3]}nan\n"), ["row 2", "column 64 (b)", "nan", "finite"]),
        ("a.csv", _csv(f"{ROW[:-3]}\n"), ["row 1", "column 64", "''"]),
        ("a.csv", b"", ["no row"]),
        ("a.csv", b"a,b\n", ["no row"]),
        ("a.csv", b"\xff\xfe\x00", ["not a readable .csv"]),
        ("a.npz", b"PK nonsense", ["not a readable .npz"]),
        ("a.npz", b"", ["not a readable .npz"]),
        ("a.npy", b"\x93NUMPY nonsense", ["not a readable .npy"]),
        ("a.parquet", b"", [".npz, .npy or .csv"]),
    ],
)
def test_bad_text_is_named(
    cli: Cli, trained: Path, tmp_path: Path, name: str, content: bytes, words: list[str]
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    said = cli("predict", trained, "--data", path, "--json")
    assert said.code == 3
    assert said.json["error"]["kind"] == "DataError"
    for word in (str(path), *words):
        assert word in said.json["error"]["message"]


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"inputs": np.zeros((2, 8, 8))}, ["(2, 8, 8)", "(n, 1, 8, 8)"]),
        ({"inputs": np.zeros((0, 64))}, ["no example"]),
        ({"inputs": np.float64(1)}, ["no example"]),
        ({"inputs": np.full((1, 64), np.nan)}, ["inputs[0, 0, 0, 0] is nan"]),
        ({"inputs": np.full((1, 64), "a")}, ["numbers are expected"]),
        ({"inputs": np.zeros((1, 64)), "targets": np.zeros(2)}, ["1 inputs but targets of shape (2,)"]),
        ({"inputs": np.zeros((1, 64)), "targets": np.array([0.5])}, ["0.5", "whole numbers"]),
        ({"inputs": np.zeros((1, 64)), "targets": np.array([10])}, ["targets", "10"]),
        ({"inputs": np.zeros((1, 64)), "targets": np.array([[1, 2]])}, ["targets"]),
        ({"inputs": np.zeros((2, 64)), "targets": np.zeros((2, 2))}, ["targets have shape (2, 2)", "(n,)"]),
        ({"x": np.zeros((1, 64))}, ["'inputs'", "x"]),
        ({"inputs": np.array([{}])}, ["plain arrays"]),
    ],
)
def test_bad_arrays_are_named(
    cli: Cli, trained: Path, tmp_path: Path, arrays: dict[str, np.ndarray], words: list[str]
) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, **arrays)
    said = cli("predict", trained, "--data", path, "--json")
    assert said.code == 3, said
    for word in (str(path), *words):
        assert word in said.json["error"]["message"]


def test_a_missing_file_and_a_folder(cli: Cli, trained: Path, tmp_path: Path) -> None:
    assert "no such file" in cli("predict", trained, "--data", tmp_path / "none.csv").err
    (tmp_path / "folder.csv").mkdir()
    said = cli("predict", trained, "--data", tmp_path / "folder.csv")
    assert said.code == 3
    assert "cannot be read" in said.err


def test_numbers_beyond_the_model_are_null_in_json(cli: Cli, trained_regression: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "huge.npy", np.full((1, 10), 1.7e308) * np.sign(np.arange(10) - 4.5))
    said = cli("predict", trained_regression, "--data", tmp_path / "huge.npy", "--json")
    assert said.code == 0
    assert said.json["predictions"][0] is None or isinstance(said.json["predictions"][0], float)


# -- the run -------------------------------------------------------------------------------------------------------


def test_no_run_and_an_unfinished_run(cli: Cli, run_copy: Path, tmp_path: Path) -> None:
    said = cli("predict", tmp_path / "nothing", "--json")
    assert (said.code, said.json["error"]["kind"]) == (3, "RunUnreadableError")
    (run_copy / "summary.json").unlink()
    said = cli("predict", run_copy)
    assert said.code == 3
    assert "--resume" in said.err


def test_a_run_that_ended_early_can_be_used_and_says_so(cli: Cli, run_copy: Path) -> None:
    summary = json.loads((run_copy / "summary.json").read_text())
    assert cli("predict", run_copy, "--json").json["warnings"] == []
    (run_copy / "summary.json").write_text(json.dumps({**summary, "finished": False, "rounds": 1}))
    said = cli("predict", run_copy, "--json")
    assert said.code == 0
    assert said.json["warnings"] == ["this run ended early, after round 1 of 2"]
    assert "this run ended early, after round 1 of 2" in said.err
    del summary["finished"]
    (run_copy / "summary.json").write_text(json.dumps(summary))
    assert cli("predict", run_copy).err == "", "a run of an earlier version is finished"


def _prepared(run: Path) -> None:
    """Give the run a task that scales each client's data, in a folder of a long name."""
    path = run / ("a-long-name-" * 8) / "task.py"
    path.parent.mkdir()
    path.write_text(
        "from fedlearn.tasks.digits import DigitsMlp\n"
        "class Scaled(DigitsMlp):\n"
        "    def prepare(self, data):\n"
        "        return data\n"
    )
    config = (run / "config.toml").read_text().replace('"digits-mlp"', f'"{path}"')
    (run / "config.toml").write_text(config)


def test_data_for_a_task_that_prepares_its_own_is_used_as_it_is_and_that_is_said(
    cli: Cli, run_copy: Path, tmp_path: Path
) -> None:
    _prepared(run_copy)
    (tmp_path / "a.csv").write_text(ROW)
    said = cli("predict", run_copy, "--data", tmp_path / "a.csv", "--json")
    (warning,) = said.json["warnings"]
    assert "trained on prepared data" in warning
    assert "Scaled.prepare" in warning
    assert said.err.count("\n") == 1
    assert warning in said.err
    assert cli("predict", run_copy, "--json").json["warnings"] == [], "the task's own test set is its own affair"


def test_a_task_given_by_path_is_named_by_its_file(cli: Cli, run_copy: Path) -> None:
    _prepared(run_copy)
    said = cli("predict", run_copy)
    assert "\ntask.py\n" in said.out
    assert "a-long-name" not in said.out
    assert all(line == line.rstrip() for line in said.out.splitlines())


@pytest.mark.parametrize("damage", ["gone", "short", "flipped", "empty"])
def test_a_damaged_model_is_refused(cli: Cli, run_copy: Path, damage: str) -> None:
    path = run_copy / "model.safetensors"
    data = path.read_bytes()
    changed = {"short": data[:-1], "flipped": data[:-1] + bytes([data[-1] ^ 1]), "empty": b""}
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(changed[damage])
    said = cli("predict", run_copy, "--json")
    assert said.code == 3
    assert said.json["error"]["kind"] == "RunUnreadableError"
    assert "train again" in said.json["error"]["message"]


def _vouch(run: Path) -> None:
    """Note the model's present hash in the summary, as if the run had written it."""
    summary = json.loads((run / "summary.json").read_text())
    summary["model_sha256"] = hashlib.sha256((run / "model.safetensors").read_bytes()).hexdigest()
    (run / "summary.json").write_text(json.dumps(summary))


def test_a_model_that_does_not_fit_is_refused(cli: Cli, run_copy: Path) -> None:
    state = load_file(run_copy / "model.safetensors")
    state["3.bias"] = torch.zeros(9)
    save_file(state, run_copy / "model.safetensors")
    _vouch(run_copy)
    said = cli("predict", run_copy)
    assert said.code == 3
    assert "does not fit" in said.err
    assert "3.bias" in said.err


def test_what_is_no_safetensors_file_is_refused(run_copy: Path) -> None:
    (run_copy / "model.safetensors").write_bytes(b"not a model")
    _vouch(run_copy)
    with pytest.raises(RunUnreadableError, match="damaged"):
        open_finished(run_copy)


@pytest.mark.parametrize("text", ["{}", "[1", '{"model_sha256": 3}', "[]", "3"])
def test_a_damaged_summary_is_refused(cli: Cli, run_copy: Path, text: str) -> None:
    (run_copy / "summary.json").write_text(text)
    assert cli("predict", run_copy).code == 3


def test_a_task_that_is_gone(cli: Cli, run_copy: Path) -> None:
    config = (run_copy / "config.toml").read_text().replace('"digits-mlp"', '"/nowhere/my_task.py"')
    (run_copy / "config.toml").write_text(config)
    said = cli("predict", run_copy)
    assert said.code == 3
    assert "/nowhere/my_task.py" in said.err


# -- where it goes -------------------------------------------------------------------------------------------------


def test_a_place_that_cannot_be_written(cli: Cli, trained: Path, tmp_path: Path) -> None:
    assert cli("predict", trained, "--out", tmp_path / "a.txt").code == 2
    said = cli("predict", trained, "--out", tmp_path / "no" / "a.csv")
    assert said.code == 3
    assert "mkdir" in said.err
    (tmp_path / "d.csv").mkdir()
    assert cli("predict", trained, "--out", tmp_path / "d.csv").code == 2


def test_the_data_are_not_written_over(cli: Cli, trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(ROW)
    os.link(path, tmp_path / "same.csv")
    said = cli("predict", trained, "--data", path, "--out", tmp_path / "." / "a.csv")
    assert said.code == 2
    assert path.read_text() == ROW


def test_a_run_that_cannot_be_written_to_can_be_used(cli: Cli, run_copy: Path) -> None:
    run_copy.chmod(0o555)
    try:
        assert cli("predict", run_copy, "--json").code == 0
    finally:
        run_copy.chmod(0o755)
