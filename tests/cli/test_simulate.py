"""``fedlearn simulate``: folders, output, and how a run ends early."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedlearn.cli.progress import Bars, Lines, headline, watcher
from fedlearn.cli.simulate import _causes, _left_out, _not_tested, _stem
from fedlearn.config import RunConfig
from fedlearn.federation.run_folder import RunFolder

TINY = ("digits-mlp", "--set", "federation.clients=3", "--set", "federation.rounds=2")

Result = tuple[int, str, str]


def test_a_run_leaves_its_files_and_says_what_it_cost(fedlearn: Callable[..., Result], tmp_path: Path) -> None:
    code, out, err = fedlearn("simulate", *TINY)
    assert code == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"digits-mlp-\d{8}-\d{6}", folder.name)
    names = {"config.toml", "metrics.jsonl", "model.safetensors", "summary.json", "history.svg", "checkpoint"}
    assert names <= {entry.name for entry in folder.iterdir()}
    for word in ("accuracy", "loss", "rounds", "wall time", "client updates/s", "upload per client", "epsilon"):
        assert word in out
    assert "no client" in out, "nobody was left out"
    assert f"fedlearn predict runs/{folder.name}\n" in out
    assert err.splitlines()[0].startswith("Training digits-mlp: 2 rounds, 3 clients")
    assert [line[:9] for line in err.splitlines()[1:]] == ["round 1/2", "round 2/2"]


def test_json_is_the_summary_and_the_folder(fedlearn: Callable[..., Result], tmp_path: Path) -> None:
    code, out, err = fedlearn("simulate", *TINY, "--out", "mine", "--json", "-q")
    assert code == 0
    assert err == ""
    (line,) = out.splitlines()
    body = json.loads(line)
    assert Path(body.pop("run")) == tmp_path / "mine"
    assert body == json.loads((tmp_path / "mine" / "summary.json").read_bytes())


def test_a_folder_is_never_used_twice(fedlearn: Callable[..., Result], tmp_path: Path) -> None:
    code, _, _ = fedlearn("simulate", *TINY, "--out", "mine", "-q")
    assert code == 0
    before = (tmp_path / "mine" / "summary.json").read_bytes()
    code, _, err = fedlearn("simulate", *TINY, "--out", "mine", "-q")
    assert code == 2
    assert "--resume mine" in err
    assert (tmp_path / "mine" / "summary.json").read_bytes() == before


def test_a_taken_name_gets_a_number(
    fedlearn: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedlearn.simulation.engine.simulate", _stopping)
    monkeypatch.setattr("fedlearn.cli.simulate.datetime", _Noon)
    for _ in range(2):
        fedlearn("simulate", *TINY)
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["digits-mlp-noon", "digits-mlp-noon-2"]


class _Noon:
    """A clock that stands still."""

    @staticmethod
    def now() -> _Noon:
        return _Noon()

    def __format__(self, spec: str) -> str:
        return "noon"


def _stopping(folder: object, observer: object, **_) -> dict[str, Any]:
    """Stand in for an engine in which Ctrl-C is pressed."""
    raise KeyboardInterrupt


def test_ctrl_c_names_the_command_that_goes_on(
    fedlearn: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedlearn.simulation.engine.simulate", _stopping)
    code, out, err = fedlearn("simulate", *TINY, "--out", "my run", "--json")
    assert code == 130
    assert "fedlearn simulate --resume 'my run'" in err
    assert json.loads(out.splitlines()[-1])["error"]["kind"] == "StoppedError"


def test_a_stopped_run_goes_on_to_the_same_model(
    fedlearn: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, out, _ = fedlearn("simulate", *TINY, "--out", "whole", "--json")
    whole = json.loads(out.splitlines()[-1])

    def stop(self: Lines, line: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Lines, "finished_round", stop)
        code, _, _ = fedlearn("simulate", *TINY, "--out", "stopped")
        assert code == 130
    code, out, err = fedlearn("simulate", "--resume", "stopped", "--json")
    assert code == 0
    assert err.splitlines()[0].startswith("Going on with digits-mlp")
    assert [line[:9] for line in err.splitlines()[1:]] == ["round 2/2"]
    assert json.loads(out.splitlines()[-1])["model_sha256"] == whole["model_sha256"]


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_real_ctrl_c(tmp_path: Path, workers: str) -> None:
    """SIGINT in a process with workers: it ends at once, says how to go on, and going on ends with the same model."""
    stopped = tmp_path / "stopped"
    command = [sys.executable, "-c", "from fedlearn.cli import main; main()", "simulate"]
    words = ["digits", "--set", "federation.rounds=6", "--set", f"simulation.workers={workers}", "--json", "-q"]
    whole = subprocess.run(
        [*command, *words, "--out", str(tmp_path / "whole")], capture_output=True, timeout=90, check=True
    )
    process = subprocess.Popen(
        [*command, *words, "--out", str(stopped)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    kept = stopped / "checkpoint" / "state.safetensors"
    deadline_s = time.monotonic() + 60
    while not kept.exists() and time.monotonic() < deadline_s:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert f"fedlearn simulate --resume {stopped}" in err
    resumed = subprocess.run(
        [*command, "--resume", str(stopped), "--json"], capture_output=True, timeout=90, check=True
    )
    first, second = (json.loads(done.stdout.splitlines()[-1])["model_sha256"] for done in (whole, resumed))
    assert first == second


@pytest.mark.parametrize(
    ("words", "named"),
    [(["digits"], "a scenario or task"), (["--set", "seed=1"], "--set"), (["--out", "other"], "--out")],
)
def test_resume_stands_alone(fedlearn: Callable[..., Result], words: list[str], named: str) -> None:
    code, out, err = fedlearn("simulate", "--resume", "somewhere", *words, "--json")
    assert code == 2
    assert f"so {named} cannot be given" in err
    assert json.loads(out.splitlines()[-1])["error"]["kind"] == "UsageError"


def test_resume_needs_a_run(fedlearn: Callable[..., Result], tmp_path: Path) -> None:
    code, _, err = fedlearn("simulate", "--resume", str(tmp_path))
    assert code == 3
    assert "holds no run" in err


def test_a_run_that_fails_says_where_it_is_and_where_the_clients_log(
    fedlearn: Callable[..., Result], tmp_path: Path
) -> None:
    (tmp_path / "broken.py").write_text(
        "from fedlearn.tasks.digits import DigitsMlp\n"
        "class Broken(DigitsMlp):\n"
        "    def loss(self, output, target):\n"
        "        raise RuntimeError('patient 17')\n"
    )
    words = ("broken.py", "--set", "federation.clients=3", "--set", "federation.evaluation=off")
    code, out, err = fedlearn("simulate", *words, "--out", "failed", "--json")
    assert code == 1
    assert "failed/clients.log" in err
    assert "First cause: client 0: RuntimeError: patient 17" in err, "in a simulation the log is the user's own"
    assert "Second cause" not in err, "three clients, one cause"
    assert "patient 17" in (tmp_path / "failed" / "clients.log").read_text()
    error = json.loads(out.splitlines()[-1])["error"]
    assert error["kind"] == "RoundFailedError"
    assert "failed/clients.log" in error["message"]


def test_a_run_that_cannot_begin_leaves_no_folder(fedlearn: Callable[..., Result], tmp_path: Path) -> None:
    code, _, err = fedlearn("simulate", *TINY, "--set", "training.algorithm=fedavgg", "--out", "mine")
    assert code == 2
    assert "'fedavg'" in err
    assert not (tmp_path / "mine").exists()


def test_clients_left_out_are_counted_by_reason(fedlearn: Callable[..., Result], tmp_path: Path) -> None:
    words = ("--set", "faults.drop=0.4", "--set", "federation.clients=6", "--set", "federation.min-respondents=1")
    code, out, _ = fedlearn("simulate", *TINY, *words, "--out", "mine")
    assert code == 0
    lines = [json.loads(line) for line in (tmp_path / "mine" / "metrics.jsonl").read_text().splitlines()]
    lost = sum(len(line["failures"]) for line in lines)
    assert lost > 0, "the seed drops somebody"
    assert f"{lost} answers of 12: {lost} no-reply" in out


UNTESTABLE = """
from fedlearn.learning import Pool
from fedlearn.tasks.digits import DigitsMlp

class Mine(DigitsMlp):
    def load_test(self, path):
        return None

    def load_pool(self, path):
        train = super().load_pool(path).train
        return Pool(train=train, test=train)

    def metrics(self, output, target):
        {body}
"""


def test_clients_that_cannot_test_are_counted_and_the_cause_is_shown(
    fedlearn: Callable[..., Result], tmp_path: Path
) -> None:
    (tmp_path / "task.py").write_text(UNTESTABLE.format(body="raise ValueError('column 3\\x1b[2J is empty')"))
    words = ("--set", "federation.clients=2", "--set", "federation.rounds=2", "--out", "mine")
    code, out, err = fedlearn("simulate", "task.py", *words)
    assert code == 0
    assert "client 0: training-failed in 2 rounds; client 1: training-failed in 2 rounds" in " ".join(out.split())
    assert re.search(r"first cause +client 0: ValueError: column 3 \[2J is empty", out)
    assert "second cause" not in out
    assert re.search(r"clients' log +mine/clients.log", out)
    assert re.search(r"left out +no client\n", out)
    assert "\ntask.py, seed 0\n" in out, "the title of a task given by path"
    assert "fedlearn predict mine --data FILE\n" in out, "there is no central test set"
    assert err.count("2 of 2 clients · tested by 0 of 2 clients") == 2
    assert all(line == line.rstrip() for line in out.splitlines())


def test_where_clients_test_the_next_step_names_a_file(fedlearn: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text(UNTESTABLE.format(body="return super().metrics(output, target)"))
    code, out, _ = fedlearn("simulate", "task.py", "--set", "federation.rounds=1", "--out", "mine")
    assert code == 0
    assert "fedlearn predict mine --data FILE\n" in out
    assert "not tested" not in out
    assert "cause" not in out


def _line(failures: dict[str, str], untested: dict[str, str] | None = None) -> dict[str, Any]:
    line = {"cohort": 10, "attempt": 1, "failures": failures, "metrics": {"loss_client_mean": 1.0}}
    return {**line, "evaluation_failures": untested} if untested else line


def test_who_was_left_out_of_every_round_is_named() -> None:
    lines = [_line({"1": "no-reply", "3": "not-finite"}), _line({"1": "no-reply"})]
    assert _left_out(lines) == "3 answers of 20: 2 no-reply, 1 not-finite; client 1 in every round"
    assert _left_out([*lines[:1], _line({})]) == "2 answers of 20: 1 no-reply, 1 not-finite"
    assert _left_out([_line({}), _line({})]) == "no client"


def test_who_could_not_test_is_named_where_few_and_counted_where_many() -> None:
    lines = [_line({}, {"1": "not-finite"}), _line({}), _line({}, {"1": "not-finite", "2": "no-data"})]
    assert _not_tested(lines) == "client 1: not-finite in 2 rounds; client 2: no-data in 1 round"
    many = [_line({}, {str(client): "no-data" for client in range(5)}), _line({})]
    assert _not_tested(many) == "5 answers of 20: 5 no-data"
    assert _not_tested([_line({})]) == ""


def test_causes_are_distinct_short_and_of_this_session(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", RunConfig())
    assert _causes(folder) == [], "no log"
    stamp = "2026-11-23 20:31:00,123"
    before = f"{stamp} ERROR incident 1a2b3c4d, client 3: TaskError: old\nTraceback\n  boom\n"
    after = (
        f"{stamp} ERROR incident 00000001, client 3: TaskError: new\r\x07 one\nTraceback\n"
        f"{stamp} ERROR incident 00000002, client 4: TaskError: new\r\x07 one\n"
        f"{stamp} WARNING incident 00000003, client 5: not-finite: {'x' * 300}\n"
        f"{stamp} WARNING incident 00000004, client 6: no-data: third\n"
    )
    (folder.path / "clients.log").write_bytes((before + after).encode() + b"\xff\n")
    first, second = _causes(folder, len(before))
    assert first == ("first cause", "client 3: TaskError: new one")
    assert second[0] == "second cause"
    assert second[1].startswith("client 5: not-finite: xxx")
    assert second[1].endswith("x…")
    assert len(second[1]) <= 220
    assert _causes(folder)[0] == ("first cause", "client 3: TaskError: old")


def test_a_task_of_a_generic_name_is_called_by_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "heart disease"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for task in ("task.py", "my_task.py:Mine", str(folder / "task.py"), "../heart disease/task.py"):
        assert _stem(task) == "heart-disease"
    assert _stem("flowers.py") == "flowers"


def test_a_run_without_evaluation_shows_its_training_loss(fedlearn: Callable[..., Result]) -> None:
    code, out, err = fedlearn("simulate", *TINY, "--set", "federation.evaluation=off")
    assert code == 0
    assert "the model was not tested" in out
    assert "train loss" in err


LINE = {"round": 1, "attempt": 1, "cohort": 3, "respondents": 2, "train_loss": 0.5}


def test_bars_begin_at_the_round_a_resumed_run_is_in(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")
    bars = Bars(9)
    assert capsys.readouterr().err == "", "nothing is drawn before the engine has forked its workers"
    for done in (1, 2, 3):
        bars.replied(7, done, 3)
    bars.finished_round({**LINE, "round": 7, "metrics": {"loss": 0.25, "accuracy": 0.875}})
    bars.close()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
    assert "6/9" in shown
    assert "7/9" in shown
    assert "accuracy 0.8750 · loss 0.2500" in shown
    assert "2 of 3 answered in round 7" in shown
    assert "tested by" not in shown


def test_bars_say_how_many_tested(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setenv("TERM", "xterm")
    bars = Bars(9)
    bars.finished_round({**LINE, "metrics": {"loss": 0.25}, "evaluation_failures": {"1": "not-finite"}})
    bars.close()
    assert "2 of 3 answered in round 1 · tested by 2 of 3 clients" in capsys.readouterr().err


def test_lines_say_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    lines = Lines(10)
    lines.finished_round({**LINE, "metrics": {}, "attempt": 2})
    said = capsys.readouterr().err
    assert said.startswith("round  1/10  train loss 0.5000 · 2 of 3 clients · try 2 · ")


def test_quiet_watches_nothing() -> None:
    assert watcher(3, quiet=True) is None
    assert isinstance(watcher(3, quiet=False), Lines), "standard error is no terminal here"


def test_the_headline_is_the_first_metric_that_is_no_loss() -> None:
    assert headline({"loss": 1.0, "loss_client_mean": 1.1, "f1": 0.5, "accuracy": 0.6}) == [("f1", 0.5), ("loss", 1.0)]
    assert headline({}) == []
