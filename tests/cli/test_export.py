"""``fedlearn export``: what is written answers as the model does, or is not written."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedlearn.cli import export
from fedlearn.cli.export import Format
from fedlearn.cli.predict import FinishedRun, open_finished
from fedlearn.errors import DependencyError, RunFailedError
from fedlearn.learning import FlatModel

Cli = Callable[..., Any]

BEGINNINGS = {"pt2": b"PK", "onnx": b"\x08"}


@pytest.mark.slow
@pytest.mark.parametrize("to", ["pt2", "onnx"])
def test_round_trip(cli: Cli, trained: Path, tmp_path: Path, to: str) -> None:
    out = tmp_path / f"model.{to}"
    said = cli("export", trained, "--to", to, "--out", out, "--json")
    assert said.code == 0, said.err
    assert said.json["file"] == str(out.resolve())
    assert said.json["compared"] is True
    assert said.json["relative_difference"] <= 1e-4
    assert out.read_bytes().startswith(BEGINNINGS[to])
    finished = open_finished(trained)
    images = torch.rand(11, 1, 8, 8)
    with torch.no_grad():
        expected = finished.model.module.eval()(images)
        if to == "pt2":
            got = torch.export.load(io.BytesIO(out.read_bytes())).module()(images)
        else:
            onnxruntime = pytest.importorskip("onnxruntime")
            got = torch.from_numpy(onnxruntime.InferenceSession(out).run(["outputs"], {"inputs": images.numpy()})[0])
    torch.testing.assert_close(got, expected)


@pytest.mark.slow
@pytest.mark.parametrize("to", ["pt2", "onnx"])
def test_round_trip_in_float64_into_the_run(cli: Cli, trained_regression: Path, to: str) -> None:
    said = cli("export", trained_regression, "--to", to)
    assert said.code == 0, said.err
    assert (trained_regression / f"model.{to}").is_file()
    assert "largest difference" in said.out
    assert said.err == ""


def test_safetensors_is_a_copy(cli: Cli, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine.safetensors"
    said = cli("export", trained, "--to", "safetensors", "--out", out)
    assert said.code == 0
    assert out.read_bytes() == (trained / "model.safetensors").read_bytes()


def test_safetensors_in_the_run_is_there_already(cli: Cli, trained: Path) -> None:
    before = (trained / "model.safetensors").stat()
    said = cli("export", trained, "--to", "safetensors", "--json")
    assert said.code == 0
    assert said.json["bytes"] == before.st_size
    assert (trained / "model.safetensors").stat() == before


def test_what_to_know_of_the_run_is_said(cli: Cli, run_copy: Path, tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text(
        "from fedlearn.tasks.digits import DigitsMlp\n"
        "class Scaled(DigitsMlp):\n"
        "    def prepare(self, data):\n"
        "        return data\n"
    )
    config = (run_copy / "config.toml").read_text().replace('"digits-mlp"', f'"{tmp_path}/task.py"')
    (run_copy / "config.toml").write_text(config)
    summary = json.loads((run_copy / "summary.json").read_text())
    (run_copy / "summary.json").write_text(json.dumps({**summary, "finished": False, "rounds": 1}))
    for more in ((), ("--out", tmp_path / "copy.safetensors")):
        said = cli("export", run_copy, "--to", "safetensors", *more)
        assert said.code == 0
        early, prepared = said.err.splitlines()
        assert "this run ended early, after round 1 of 2" in early
        assert "Scaled.prepare" in prepared
        assert "\ntask.py as safetensors\n" in said.out


# -- what cannot be ------------------------------------------------------------------------------------------------


def test_wrong_arguments(cli: Cli, trained: Path, tmp_path: Path) -> None:
    assert cli("export", trained).code == 2
    assert cli("export", trained, "--to", "tensorflow").code == 2
    assert cli("export", trained, "--to", "pt2", "--out", tmp_path / "model.onnx").code == 2
    assert cli("export", trained, "--to", "pt2", "--out", tmp_path / "no" / "model.pt2").code == 3
    assert "holds no run" in cli("export", tmp_path / "none", "--to", "pt2").err


def test_an_unfinished_run(cli: Cli, run_copy: Path) -> None:
    (run_copy / "summary.json").unlink()
    said = cli("export", run_copy, "--to", "safetensors", "--json")
    assert said.code == 3
    assert said.json["error"]["kind"] == "RunUnreadableError"


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_a_missing_package_is_named(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == package else object())
    with pytest.raises(DependencyError, match=r"\.\[onnx\]") as raised:
        export._export(open_finished(trained), Format.onnx, tmp_path / "m.onnx")
    assert raised.value.package == package


class _Fickle(nn.Module):
    """Does one thing or another, as its input says: torch.export cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 10)

    def forward(self, inputs: Tensor) -> Tensor:
        flat = inputs.flatten(1)
        return self.layer(flat if flat.sum() > 0 else -flat)


class _Fixed(_Fickle):
    """Takes batches of two and no others."""

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs.reshape(2, 64))


def _with(trained: Path, module: nn.Module) -> FinishedRun:
    finished = open_finished(trained)
    return FinishedRun(folder=finished.folder, task=finished.task, model=FlatModel(module))


@pytest.mark.slow
@pytest.mark.parametrize("module", [_Fickle, _Fixed])
def test_a_model_that_cannot_be_traced(trained: Path, tmp_path: Path, module: type[nn.Module]) -> None:
    out = tmp_path / "m.pt2"
    with pytest.raises(RunFailedError, match=r"torch\.export cannot treat this model") as raised:
        export._export(_with(trained, module()), Format.pt2, out)
    assert "\n" not in str(raised.value)
    assert not out.exists()


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda outputs: outputs + 0.1, "relative difference"),
        (lambda outputs: outputs * float("nan"), "relative difference nan"),
        (lambda outputs: outputs[:, :5], "with shape"),
    ],
)
def test_a_file_that_answers_otherwise_is_not_kept(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: object, words: str
) -> None:
    def broken(module: nn.Module, _: Tensor) -> tuple[bytes, object]:
        return b"file", lambda inputs: wrong(module(inputs))  # type: ignore[operator]

    monkeypatch.setattr(export, "_as_pt2", broken)
    out = tmp_path / "m.pt2"
    with pytest.raises(RunFailedError, match=words):
        export._export(open_finished(trained), Format.pt2, out)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_fails_on_another_batch_is_not_kept(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(module: nn.Module, _: Tensor) -> tuple[bytes, object]:
        def answer(inputs: Tensor) -> Tensor:
            if len(inputs) == 1:
                raise RuntimeError("expected 2, got 1\nmore")
            return module(inputs)

        return b"file", answer

    monkeypatch.setattr(export, "_as_pt2", broken)
    with pytest.raises(RunFailedError, match=r"batch of 1: expected 2, got 1$"):
        export._export(open_finished(trained), Format.pt2, tmp_path / "m.pt2")


@pytest.mark.slow
def test_onnx_without_a_runtime_says_that_outputs_were_not_compared(
    cli: Cli, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxruntime" else object())
    said = cli("export", trained, "--to", "onnx", "--out", tmp_path / "m.onnx", "--json")
    assert said.code == 0
    assert said.json["compared"] is False
    assert json.loads((trained / "summary.json").read_text())["task"] == "digits-mlp"
