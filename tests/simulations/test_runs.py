"""What the scripts share: the answer shown, the exit code that follows from it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from fedlearn.errors import DataError

Script = Callable[[str], Any]


def _finish(runs: Any, capsys: pytest.CaptureFixture[str], experiment: Callable[[], Any]) -> tuple[Any, list[str]]:
    with pytest.raises(SystemExit) as stopped:
        runs.finish(experiment, as_json=True)
    captured = capsys.readouterr()
    return stopped.value.code, captured.out.splitlines() or captured.err.splitlines()


@pytest.mark.parametrize(("met", "code"), [(True, 0), (False, 1)])
def test_the_exit_code_says_whether_it_was_as_expected(
    script: Script, capsys: pytest.CaptureFixture[str], met: bool, code: int
) -> None:
    runs = script("runs")
    answer = runs.Answer(columns=("a", "b"), rows=[["x", "1"]], verdict=runs.stated(met), met=met, body={"b": 1})
    exit_code, lines = _finish(runs, capsys, lambda: answer)
    assert exit_code == code
    assert json.loads(lines[-1]) == {"b": 1, "met": met}
    assert runs.stated(met) in lines


def test_an_error_keeps_its_own_exit_code(script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    def experiment() -> Any:
        raise DataError("no such folder")

    exit_code, lines = _finish(script("runs"), capsys, experiment)
    assert exit_code == 3
    assert lines == ["error: no such folder"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_default_reaches_its_accuracy_under_five_seeds(script: Script) -> None:
    answer = script("digits.seeds").experiment(())
    assert answer.met, answer.verdict


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_label_skew_costs_accuracy(script: Script, tmp_path: Any) -> None:
    answer = script("noniid.skew").experiment((), seeds=1, out=tmp_path / "skew.svg")
    assert answer.met, answer.verdict
    assert (tmp_path / "skew.svg").stat().st_size > 1000
