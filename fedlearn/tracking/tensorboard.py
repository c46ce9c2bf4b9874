"""TensorBoard: event files in ``RUN/tensorboard``, one for each session of the run.

Written with TensorBoard's own records but without the ``SummaryWriter`` that comes with torch: that one has a thread
and a queue, which neither live on where the engine forks a worker nor are on the disk when a run is killed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedlearn.federation.run_folder import RunFolder
from fedlearn.sources import Clock, SystemClock

__all__ = ["TensorBoardTracker", "open_tracker"]


def open_tracker(folder: RunFolder) -> TensorBoardTracker:
    """Return a tracker into a run's folder."""
    return TensorBoardTracker(folder.path / "tensorboard", SystemClock())


class TensorBoardTracker:
    """One event file, added to after every round.

    Args:
        folder: where this run's event files are.
        clock: what the events are dated by.
    """

    def __init__(self, folder: Path, clock: Clock) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(exist_ok=True)
        self._clock = clock
        self._earlier = sorted(folder.glob("*tfevents*"))
        # Read in the order of their names. The machine's name, usual here, says nothing of a run.
        name = f"events.out.tfevents.{int(clock.unix_s()):010d}.{len(self._earlier):04d}.fedlearn"
        self._records = RecordWriter((folder / name).open("xb"))
        self._put(file_version="brain.Event:2")

    def written(self) -> set[tuple[str, int]]:
        """Return which numbers the files of earlier sessions have; a record that a crash tore was not written."""
        return {(value.tag, event.step) for event in self._events() for value in event.summary.value}

    def write(self, round_number: int, numbers: Mapping[str, float]) -> None:
        """Write one event."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        self._put(step=round_number, summary=Summary(value=values))

    def close(self) -> None:
        """Close the file."""
        self._records.close()

    def _put(self, **fields: Any) -> None:
        """Add one event to the file."""
        from tensorboard.compat.proto.event_pb2 import Event

        self._records.write(Event(wall_time=self._clock.unix_s(), **fields).SerializeToString())
        self._records.flush()

    def _events(self) -> Iterator[Any]:
        """Yield the events of earlier sessions."""
        from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

        for path in self._earlier:
            yield from LegacyEventFileLoader(str(path)).Load()
