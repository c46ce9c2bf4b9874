"""TensorBoard reads what was written: every number once, over any number of sessions."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedlearn.federation.run_folder import RunFolder
from fedlearn.sources import ManualClock
from fedlearn.tracking.epsilon import SpentSoFar
from fedlearn.tracking.tensorboard import TensorBoardTracker
from fedlearn.tracking.tracks import open_tracks


def scalars(folder: RunFolder) -> dict[str, list[tuple[int, float]]]:
    """Return what TensorBoard itself finds."""
    found = EventAccumulator(str(folder.path / "tensorboard")).Reload()
    return {tag: [(each.step, each.value) for each in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_tensorboard_finds_every_round_once(keep: Callable[..., list[dict[str, Any]]], folder: RunFolder) -> None:
    threads = threading.active_count()
    for numbers in ((1, 2), (3,), (4,)):
        with open_tracks(folder, ["tensorboard", "tensorboard"], SpentSoFar(folder.path, folder.config)) as tracks:
            for kept in keep(folder, *numbers):
                tracks.finished_round(kept)
            assert threading.active_count() == threads, "the engine may fork at any time"
    found = scalars(folder)
    assert found["round/respondents"] == [(number, 3.0) for number in (1, 2, 3, 4)]
    assert [round(value, 6) for _, value in found["metrics/accuracy"]] == [0.1, 0.2, 0.3, 0.4]
    assert "round/train_loss" not in found, "it was not known"
    assert len(list((folder.path / "tensorboard").iterdir())) == 3


def test_a_number_is_on_the_disk_when_a_run_is_killed(folder: RunFolder) -> None:
    tracker = TensorBoardTracker(folder.path / "tensorboard", ManualClock())
    tracker.write(1, {"round/respondents": 3.0})
    assert scalars(folder) == {"round/respondents": [(1, 3.0)]}, "before it is closed"
    tracker.close()


def test_a_record_that_a_crash_tore_is_written_again(folder: RunFolder) -> None:
    place, clock = folder.path / "tensorboard", ManualClock()
    first = TensorBoardTracker(place, clock)
    first.write(1, {"a": 1.0})
    first.write(2, {"a": 2.0})
    first.close()
    (path,) = place.iterdir()
    path.write_bytes(path.read_bytes()[:-3])
    second = TensorBoardTracker(place, clock)
    assert second.written() == {("a", 1)}
    second.write(2, {"a": 2.0})
    second.close()
    assert scalars(folder)["a"] == [(1, 1.0), (2, 2.0)]
