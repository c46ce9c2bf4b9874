"""The live display: what it says, that it copes with clients by the dozen, and that it slows nothing down."""

from __future__ import annotations

import re
from typing import Any

import pytest

from fedlearn.cli.progress import Bars, Lines
from fedlearn.tracking.epsilon import SpentSoFar

LINE = {"round": 1, "attempt": 1, "cohort": 300, "respondents": 300, "train_loss": 0.5, "wall_s": 0.25, "metrics": {}}


class Stopwatch:
    """Time that passes only when somebody says so."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Spent(SpentSoFar):
    """Says what it is told to."""

    budget = 8.0

    def __init__(self, said: tuple[int, float] | None) -> None:
        self.said = said

    def after(self, round_number: int, *, at_any_price: bool = False) -> tuple[int, float] | None:
        return self.said


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setenv("TERM", "xterm")


def shown(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Return the lines drawn since the last time, without colours and cursor movements."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
    return [line.rstrip() for line in re.split(r"[\r\n]+", text) if line.strip()]


def last(lines: list[str], word: str) -> str:
    return next(line for line in reversed(lines) if line.startswith(word))


@pytest.mark.usefixtures("terminal")
def test_bars_count_clients_that_come_by_the_dozen(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Stopwatch()
    bars = Bars(2, now=clock)
    for done in (64, 128, 300):
        clock.now_s += 0.2
        bars.replied(1, done, 300)
    lines = shown(capsys)
    assert "128/300" in "".join(lines)
    assert last(lines, "clients").endswith("300/300 590 clients/s"), "300 - 64 in the 0.4 s since they came"
    assert "pass" not in "".join(lines)
    clock.now_s += 0.2
    bars.replied(1, 300, 300)  # all at once: the clients' own evaluation, or another try
    assert last(shown(capsys), "clients").endswith("893 clients/s · pass 2")
    for each in (5, 300):
        clock.now_s += 0.2
        bars.replied(1, each, 300)
    assert "pass 3" in last(shown(capsys), "clients")
    clock.now_s += 0.2
    bars.replied(2, 300, 300)
    assert "pass" not in last(shown(capsys), "clients")
    bars.close()


@pytest.mark.usefixtures("terminal")
def test_clients_a_second_are_those_of_the_last_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Stopwatch()
    bars = Bars(99, now=clock)
    for number, each_s in ((1, 60.0), (2, 1.0)):  # the first hundred are slow
        for done in range(1, 101):
            clock.now_s += each_s
            bars.replied(number, done, 100)
    assert last(shown(capsys), "clients").endswith("1 clients/s")
    bars.close()


@pytest.mark.usefixtures("terminal")
def test_bars_say_loss_accuracy_epsilon_and_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Stopwatch()
    bars = Bars(10, Spent((1, 1.23456)), now=clock)
    bars.replied(1, 1, 300)
    clock.now_s = 3.0
    bars.finished_round({**LINE, "metrics": {"loss": 0.25, "accuracy": 0.875}})
    assert last(shown(capsys), "rounds").endswith(
        " 1/10   accuracy 0.8750 · loss 0.2500 · epsilon 1.23 of 8 · 27 s left"
    )
    bars.close()


@pytest.mark.usefixtures("terminal")
def test_nothing_is_cut_off_in_a_narrow_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    bars = Bars(1000, Spent((123, 1.23456)), now=Stopwatch())
    bars.finished_round({**LINE, "round": 124, "metrics": {"loss": 0.25, "accuracy": 0.875}})
    words = " ".join(" ".join(shown(capsys)).split())
    for each in ("accuracy 0.8750", "loss 0.2500", "epsilon ≥ 1.23 of 8", "s left", "300 of 300 answered"):
        assert each in words, words
    bars.close()


@pytest.mark.usefixtures("terminal")
def test_a_thousand_rounds_in_a_second_are_drawn_ten_times(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Stopwatch()
    bars = Bars(1000, now=clock)
    for number in range(1, 1001):
        clock.now_s += 0.001
        bars.replied(number, 300, 300)
        bars.finished_round({**LINE, "round": number})
    drawn = [line for line in shown(capsys) if line.startswith("rounds")]
    assert 9 <= len(drawn) <= 13
    bars.close()
    assert "1000/1000" in last(shown(capsys), "rounds"), "the last state is not left out"


def said(line: dict[str, Any], spent: SpentSoFar | None, capsys: pytest.CaptureFixture[str]) -> str:
    Lines(10, spent, now=Stopwatch()).finished_round(line)
    return capsys.readouterr().err


def test_lines_say_clients_a_second_and_epsilon(capsys: pytest.CaptureFixture[str]) -> None:
    begin = "round  1/10  train loss 0.5000 · 300 of 300 clients · 1,200 clients/s · "
    assert said(LINE, None, capsys) == f"{begin}1 s left\n"
    assert said(LINE, Spent(None), capsys) == f"{begin}1 s left\n"
    assert said(LINE, Spent((1, 0.5)), capsys) == f"{begin}epsilon 0.5 of 8 · 1 s left\n"
    assert said({**LINE, "round": 7}, Spent((5, 0.5)), capsys).count("epsilon 0.5 of 8 after round 5") == 1


def test_a_round_in_which_nobody_answered_has_no_speed(capsys: pytest.CaptureFixture[str]) -> None:
    assert "clients/s" not in said({**LINE, "respondents": 0}, None, capsys)
    assert "clients/s" not in said({**LINE, "wall_s": 0.0}, None, capsys)
