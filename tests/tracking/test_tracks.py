"""Every number once, however often a run is interrupted; and errors with a way out."""

from __future__ import annotations

import importlib.util
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from fedlearn.errors import DependencyError, RunFailedError, UsageError
from fedlearn.federation.run_folder import RunFolder
from fedlearn.tracking.epsilon import SpentSoFar
from fedlearn.tracking.trackers import TRACKERS, check_trackers
from fedlearn.tracking.tracks import Tracks, numbers_of


def line(number: int) -> dict[str, Any]:
    return {"round": number, "respondents": 2, "failures": {}, "train_loss": 0.5, "metrics": {"accuracy": 0.5}}


class Notes:
    """A tracker that keeps what is written in a list, over as many sessions as there are."""

    def __init__(self, rows: Rows) -> None:
        self.rows, self.closed = rows, False

    def written(self) -> set[tuple[str, int]]:
        return {(name, number) for name, number, _ in self.rows}

    def write(self, round_number: int, numbers: Mapping[str, float]) -> None:
        self.rows += [(name, round_number, value) for name, value in numbers.items()]

    def close(self) -> None:
        self.closed = True


class Reckoned(SpentSoFar):
    """Says an epsilon of its own after every other round, or when it must."""

    def __init__(self) -> None:
        self.last: tuple[int, float] | None = None

    def after(self, round_number: int, *, at_any_price: bool = False) -> tuple[int, float] | None:
        if round_number % 2 == 0 or at_any_price:
            self.last = (round_number, round_number / 4)
        return self.last


Keep = Callable[..., list[dict[str, Any]]]
Session = Callable[..., Tracks]
Rows = list[tuple[str, int, float]]


@pytest.fixture
def rows() -> Rows:
    return []


@pytest.fixture
def session(folder: RunFolder, rows: Rows) -> Session:
    def begin() -> Tracks:
        return Tracks(folder, [lambda _: Notes(rows)], Reckoned())

    return begin


def test_each_number_of_each_round_is_written_once(keep: Keep, folder: RunFolder, session: Session, rows: Rows) -> None:
    with session() as tracks:
        for number in (1, 2, 3):
            (kept,) = keep(folder, number)
            tracks.replied(number, 3, 3)
            tracks.finished_round(kept)
    assert len(rows) == len({row[:2] for row in rows})
    assert {row[1] for row in rows if row[0] == "metrics/accuracy"} == {1, 2, 3}
    assert [row[1:] for row in rows if row[0] == "privacy/epsilon"] == [(2, 0.5), (3, 0.75)]


def test_a_run_that_goes_on_writes_what_is_missing_and_nothing_twice(
    keep: Keep, folder: RunFolder, session: Session, rows: Rows
) -> None:
    first = session()
    first.finished_round(*keep(folder, 1))
    keep(folder, 2)  # and killed before anybody was told
    rows.remove(("round/respondents", 1, 3.0))  # in the middle of a round's numbers
    with session() as second:
        second.finished_round(*keep(folder, 3))
    assert len(rows) == len({row[:2] for row in rows})
    for name in ("metrics/accuracy", "round/respondents", "round/upload_bytes", "round/failures", "round/wall_s"):
        assert sorted(row[1] for row in rows if row[0] == name) == [1, 2, 3], name


def test_a_finished_run_is_tracked_when_it_is_gone_on_with(
    keep: Keep, folder: RunFolder, session: Session, rows: Rows
) -> None:
    keep(folder, 1, 2)
    session().close()
    assert {row[1] for row in rows} == {1, 2}


def test_a_run_that_never_began_is_not_tracked(folder: RunFolder) -> None:
    def opener(_: RunFolder) -> Notes:
        raise AssertionError("opened")

    with Tracks(folder, [opener], Reckoned()):
        pass


def test_what_is_no_number_is_left_out_and_names_are_such_as_every_tracker_takes() -> None:
    table = {**line(4), "train_loss": None, "salt": "ab", "federated_metrics": {"f1 (macro)": 0.25}, "simulated_s": 9}
    assert numbers_of(table) == {
        "metrics/accuracy": 0.5,
        "federated-metrics/f1 _macro_": 0.25,
        "round/failures": 0.0,
        "round/respondents": 2.0,
        "round/simulated_s": 9.0,
    }


class Full(Notes):
    """A tracker on a full disk."""

    def write(self, round_number: int, numbers: Mapping[str, float]) -> None:
        raise OSError(28, "No space left on device")


def test_a_tracker_that_fails_says_how_to_go_on(keep: Keep, folder: RunFolder) -> None:
    tracks = Tracks(folder, [lambda _: Full([])], Reckoned())
    (kept,) = keep(folder, 1)
    with pytest.raises(RunFailedError, match=r"No space left on device.*without it, it goes on untracked"):
        tracks.finished_round(kept)


def test_what_ended_the_run_is_said_and_not_what_its_tracker_did_then(keep: Keep, folder: RunFolder) -> None:
    keep(folder, 1)
    with pytest.raises(KeyboardInterrupt), Tracks(folder, [lambda _: Full([])], Reckoned()):
        raise KeyboardInterrupt
    with pytest.raises(RunFailedError, match="No space left"), Tracks(folder, [lambda _: Full([])], Reckoned()):
        pass


def test_a_tracker_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="Did you mean 'tensorboard'"):
        check_trackers(["tensorbord"])
    monkeypatch.setattr("fedlearn.tracking.trackers.find_spec", lambda _: None)
    for name in TRACKERS:
        with pytest.raises(DependencyError, match=rf"\.\[{name}\]"):
            check_trackers([name])


def test_every_tracker_has_its_module_and_its_extra() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    for name in TRACKERS:
        assert importlib.util.find_spec(f"fedlearn.tracking.{name}") is not None
        assert name in project["optional-dependencies"]
