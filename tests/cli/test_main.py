"""The command line as a whole: help, errors and exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fedlearn.cli import VERBS

HEAVY = ("torch", "flwr", "scipy", "numpy", "matplotlib")

Result = tuple[int, str, str]


def in_subprocess(*words: str) -> subprocess.CompletedProcess[str]:
    """Run a command line in a process of its own; its last line on standard error lists the heavy modules."""
    program = (
        "import sys\n"
        "from fedlearn.cli import main\n"
        "try:\n"
        "    main()\n"
        "finally:\n"
        f"    print('loaded:', *[name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)\n"
    )
    return subprocess.run(
        [sys.executable, "-c", program, *words], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("words", [["--help"], ["simulate", "--help"], ["plan", "--help"], ["partition", "--help"]])
def test_help_loads_nothing_heavy(words: list[str]) -> None:
    done = in_subprocess(*words)
    assert done.returncode == 0
    assert done.stderr.splitlines()[-1] == "loaded:"
    if words == ["--help"]:
        assert all(f" {verb} " in done.stdout for verb in VERBS)


def test_wrong_words_are_refused_before_anything_heavy_loads() -> None:
    done = in_subprocess("simulate", "--set", "federation.client=4", "--json")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "loaded:"
    assert json.loads(done.stdout.splitlines()[-1])["error"]["kind"] == "ConfigError"


def test_nothing_typed_shows_help(fedlearn: Callable[..., Result]) -> None:
    code, out, err = fedlearn()
    assert code == 2
    assert "simulate" in out + err


def test_version(fedlearn: Callable[..., Result]) -> None:
    code, out, _ = fedlearn("--version")
    assert code == 0
    assert out.startswith("fedlearn ")


def test_an_unknown_verb_is_refused_with_the_nearest(fedlearn: Callable[..., Result]) -> None:
    code, out, err = fedlearn("simulat", "--json")
    assert code == 2
    assert "'simulate'" in err
    assert json.loads(out.splitlines()[-1])["error"]["kind"] == "UsageError"


@pytest.mark.parametrize("verb", ["simulate", "plan", "partition"])
class TestRefusals:
    """What every verb that takes a scenario refuses in the same way."""

    def test_unknown_key(self, verb: str, fedlearn: Callable[..., Result]) -> None:
        code, out, err = fedlearn(verb, "--set", "federation.client=4", "--json")
        assert code == 2
        error = json.loads(out.splitlines()[-1])["error"]
        assert error["kind"] == "ConfigError"
        for told in ("federation.client", "clients"):
            assert told in error["message"]
            assert told in err

    def test_impossible_value(self, verb: str, fedlearn: Callable[..., Result]) -> None:
        code, out, _ = fedlearn(verb, "--set", "federation.rounds=0", "--json")
        assert code == 2
        assert "federation.rounds" in json.loads(out.splitlines()[-1])["error"]["message"]

    def test_unknown_task(self, verb: str, fedlearn: Callable[..., Result]) -> None:
        code, out, err = fedlearn(verb, "digit", "--json")
        assert code == 3
        error = json.loads(out.splitlines()[-1])["error"]
        assert error["kind"] == "TaskNotFoundError"
        assert "'digits'" in error["message"]
        assert "'digits'" in err

    def test_missing_scenario(self, verb: str, fedlearn: Callable[..., Result]) -> None:
        code, out, err = fedlearn(verb, "nowhere/scenario.toml")
        assert code == 3
        assert "nowhere/scenario.toml" in err
        assert out == ""

    def test_missing_task_file(self, verb: str, fedlearn: Callable[..., Result], tmp_path, monkeypatch) -> None:
        monkeypatch.chdir(tmp_path)
        code, _, err = fedlearn(verb, "my_task.py")
        assert code == 3
        assert "my_task.py" in err
        runs = tmp_path / "runs"
        assert not runs.exists() or not list(runs.iterdir()), "a run that cannot begin leaves no folder"

    def test_unknown_option(self, verb: str, fedlearn: Callable[..., Result]) -> None:
        code, out, _ = fedlearn(verb, "--colour", "--json")
        assert code == 2
        assert "--colour" in json.loads(out.splitlines()[-1])["error"]["message"]


def test_a_standard_output_that_is_full_is_a_sentence_and_exit_code_1() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "fedlearn", "--help"], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60
        )
    assert done.returncode == 1
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
