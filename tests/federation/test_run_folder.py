"""The folder of a run: made once, held by one process, and after a crash it knows only what counted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedlearn.algorithms import ServerState
from fedlearn.config import RunConfig
from fedlearn.errors import RunFailedError, RunUnreadableError, UsageError
from fedlearn.federation.checkpoint import RunState, Totals
from fedlearn.federation.run_folder import RunFolder, panels, series

CONFIG = RunConfig.from_mapping({"task": "digits-mlp", "federation": {"clients": 3, "rounds": 9}})


def state(number):
    return RunState(server=ServerState(params=np.full(4, float(number)), round_number=number), totals=Totals())


def line(number, **more):
    return {"round": number, "metrics": {"accuracy": number / 10}, "train_loss": 1.0, **more}


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", CONFIG)


@pytest.fixture
def begun(folder: RunFolder) -> RunFolder:
    for number in (1, 2, 3):
        folder.save_round(line(number), state(number))
    return folder


def rounds_of(folder):
    return [each["round"] for each in folder.metrics()]


def test_a_new_folder_holds_the_whole_configuration_and_no_state(folder):
    assert RunFolder.open(folder.path).config == CONFIG
    assert folder.load_state() is None
    assert folder.metrics() == []
    assert (folder.path / "checkpoint").is_dir()


def test_a_folder_that_holds_a_run_is_not_written_over_and_says_how_to_go_on(begun):
    before = (begun.path / "config.toml").read_bytes()
    with pytest.raises(UsageError, match=f"--resume {begun.path}"):
        RunFolder.create(begun.path, RunConfig())
    assert (begun.path / "config.toml").read_bytes() == before


def test_a_folder_that_holds_anything_else_is_refused_untouched(tmp_path):
    (tmp_path / "thesis.tex").write_text("ten years")
    with pytest.raises(UsageError, match="not empty"):
        RunFolder.create(tmp_path, CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_empty_folder_and_one_with_only_hidden_files_will_do(tmp_path):
    (tmp_path / ".DS_Store").touch()
    assert RunFolder.create(tmp_path, CONFIG).config == CONFIG


def test_a_file_in_the_place_of_the_folder_is_an_error_with_its_path(tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(RunFailedError, match="run"):
        RunFolder.create(tmp_path / "run", CONFIG)


class Crash(BaseException):
    """A kill."""


@pytest.mark.parametrize("failing", ["os.fsync", "pathlib.Path.replace", "fedlearn.files._sync_folder"])
def test_a_kill_while_the_folder_is_made_leaves_one_that_can_be_made_or_resumed(tmp_path, monkeypatch, failing):
    def fail(*_):
        raise Crash

    with monkeypatch.context() as patched:
        patched.setattr(failing, fail)
        with pytest.raises(Crash):
            RunFolder.create(tmp_path / "run", CONFIG)
    try:
        folder = RunFolder.open(tmp_path / "run")
    except RunUnreadableError:
        folder = RunFolder.create(tmp_path / "run", CONFIG)
    folder.save_round(line(1), state(1))
    assert folder.load_state().round_number == 1


@pytest.mark.parametrize("content", [None, b"", b"task = ", b"\xff\xfe", b"[federation]\nclients = -3", b"colour = 1"])
def test_a_folder_without_a_readable_configuration_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "config.toml").write_bytes(content)
    if content == b"":
        assert RunFolder.open(tmp_path).config == RunConfig()  # an empty scenario is a scenario
        return
    with pytest.raises(RunUnreadableError, match=r"config\.toml"):
        RunFolder.open(tmp_path)


def test_finished_rounds_come_back(begun):
    assert begun.load_state().round_number == 3
    assert rounds_of(begun) == [1, 2, 3]


@pytest.mark.parametrize("torn", ['{"round": 4, "metri', "{", "\x00\x00\x00", '{"round": 4, "metrics": {}}'])
def test_a_last_line_torn_by_a_crash_is_forgotten(begun, torn):
    with (begun.path / "metrics.jsonl").open("a") as handle:
        handle.write(torn)
    assert rounds_of(begun) == [1, 2, 3]
    assert begun.load_state().round_number == 3
    begun.save_round(line(4), state(4))
    assert rounds_of(begun) == [1, 2, 3, 4]


def test_lines_beyond_the_checkpoint_are_forgotten_and_come_again_once(begun):
    with (begun.path / "metrics.jsonl").open("a") as handle:
        handle.write(json.dumps(line(4)) + "\n" + json.dumps(line(5)) + "\n" + '{"round": 6')
    assert begun.load_state().round_number == 3
    assert rounds_of(begun) == [1, 2, 3]
    begun.save_round(line(4, again=True), state(4))
    assert [each.get("again") for each in begun.metrics()] == [None, None, None, True]


def test_a_line_without_its_checkpoint_does_not_count(folder):
    with (folder.path / "metrics.jsonl").open("a") as handle:
        handle.write(json.dumps(line(1)) + "\n")
    assert folder.load_state() is None
    assert folder.metrics() == []


@pytest.mark.parametrize(
    "damage", ["nonsense", "{", "[]", "5", "null", "{}", '{"round": "1"}', '{"round": null}', "\x00"]
)
def test_damage_before_the_last_line_is_said_and_not_guessed_at(begun, damage):
    path = begun.path / "metrics.jsonl"
    path.write_text(damage + "\n" + path.read_text())
    with pytest.raises(RunUnreadableError, match=r"metrics\.jsonl is damaged"):
        begun.load_state()


def test_a_state_of_another_configuration_is_refused(begun):
    other = RunFolder(begun.path, RunConfig.from_mapping({"seed": 9}))
    with pytest.raises(RunUnreadableError, match="another configuration"):
        other.load_state()


def test_how_many_workers_there_are_does_not_make_it_another_configuration(begun):
    config = RunConfig.from_mapping({**CONFIG.to_mapping(), "simulation": {"workers": 5}})
    assert RunFolder(begun.path, config).load_state().round_number == 3


def test_the_line_is_on_disk_before_the_state_that_makes_it_count(folder, monkeypatch):
    def fail(*_):
        raise Crash

    monkeypatch.setattr("fedlearn.federation.run_folder.save_checkpoint", fail)
    with pytest.raises(Crash):
        folder.save_round(line(1), state(1))
    assert rounds_of(folder) == [1]


def test_a_number_that_json_does_not_know_is_never_written(folder):
    with pytest.raises(ValueError, match="JSON"):
        folder.save_round(line(1, loss=float("nan")), state(1))
    assert folder.metrics() == []


LOCKING = """
import sys
from pathlib import Path
from fedlearn.federation.run_folder import RunFolder
folder = RunFolder.open(Path(sys.argv[1]))
with folder.lock():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_process_at_a_time_and_the_lock_ends_with_it_however_it_ends(folder):
    process = subprocess.Popen(
        [sys.executable, "-c", LOCKING, str(folder.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(RunFailedError, match="another process"), folder.lock():
            pass
        process.kill()
        process.wait(10)
        with folder.lock(), pytest.raises(RunFailedError, match="another process"), folder.lock():
            pass
        with folder.lock():
            pass
    finally:
        process.kill()
        process.communicate()


def test_a_run_that_is_not_finished_says_how_to_go_on(begun):
    with pytest.raises(RunUnreadableError, match=f"--resume {begun.path}"):
        begun.summary()
    for damage in (b"", b"{", b"3", b"\xff"):
        begun.write("summary.json", damage)
        with pytest.raises(RunUnreadableError, match="damaged"):
            begun.summary()
    begun.write("summary.json", b'{"seed": 1}')
    assert begun.summary() == {"seed": 1}


def test_a_series_has_one_value_a_round_even_where_nothing_was_measured():
    lines = [line(1), {"round": 2, "metrics": {}, "train_loss": 2.0}, line(3)]
    assert series(lines) == ([1, 2, 3], {"train loss": [1.0, 2.0, 1.0], "accuracy": [0.1, None, 0.3]})
    assert series([]) == ([], {"train loss": []})


def _answers(failures: dict[str, str], cohort: int = 10, **more: float) -> dict[str, object]:
    return {"cohort": cohort, "respondents": cohort - len(failures), "failures": failures, **more}


def test_a_picture_shows_who_answered_where_not_always_all_did():
    assert panels([_answers({}), _answers({})]) == {}
    assert panels([]) == {}
    assert panels([_answers({}), _answers({}, cohort=9)]) == {"clients": {"invited": [10, 9], "answered": [10, 9]}}
    found = panels([_answers({"1": "no-reply", "2": "no-reply"}), _answers({"1": "no-data"})])
    assert found == {
        "clients": {"invited": [10, 10], "answered": [8, 9], "no-reply": [2, 0], "no-data": [0, 1]},
    }
    many = panels([_answers({str(client): f"reason {client}" for client in range(6)})])["clients"]
    assert len(many) == 7
    assert many["other reasons"] == [2]


def test_a_picture_does_not_tell_the_size_of_a_secret_cohort():
    lines = [_answers({}, cohort=9), _answers({"1": "no-reply"})]
    assert panels(lines)
    assert panels(lines, secret_cohorts=True) == {}


def test_a_picture_shows_simulated_time_where_there_is_one():
    lines = [_answers({}), _answers({}, simulated_s=61.5)]
    assert panels(lines, secret_cohorts=True) == {"simulated seconds": {"of each round": [None, 61.5]}}
