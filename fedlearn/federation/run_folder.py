"""A run's folder: the contract of files that other tools read, each written whole or not at all."""

from __future__ import annotations

import fcntl
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedlearn.config import RunConfig
from fedlearn.errors import ConfigError, MissingError, RunFailedError, RunUnreadableError, UsageError
from fedlearn.federation.checkpoint import RunState, load_checkpoint, save_checkpoint
from fedlearn.files import TEMPORARY, write_atomic
from fedlearn.scenario import load_config

__all__ = ["RunFolder", "panels", "series"]

_REASONS = 4
"""How many reasons for a missing answer have a line of their own in a picture."""


class RunFolder:
    """The files of one run.

    ``config.toml`` the resolved configuration · ``metrics.jsonl`` a line a round · ``model.safetensors`` the
    model · ``summary.json`` · ``history.svg`` · ``checkpoint/state.safetensors`` what ``--resume`` begins from.
    """

    def __init__(self, path: Path, config: RunConfig) -> None:
        self.path = path
        self.config = config

    @classmethod
    def create(cls, path: Path, config: RunConfig) -> RunFolder:
        """Make the folder of a new run.

        Raises:
            UsageError: the folder already holds something.
            RunFailedError: it cannot be made.
        """
        try:
            path.mkdir(parents=True, exist_ok=True)
            held = sorted(entry.name for entry in path.iterdir())
            if "config.toml" in held:
                raise UsageError(
                    f"{path} already holds a run; go on with it by --resume {path}, or choose another --out"
                )
            if [name for name in held if not name.startswith(".")]:
                raise UsageError(f"{path} is not empty; choose another --out")
            write_atomic(path / "config.toml", config.to_toml().encode())  # first: with it, the run can be resumed
            (path / "checkpoint").mkdir(exist_ok=True)
        except OSError as error:
            raise RunFailedError(
                f"cannot make the run's folder {path}: {error.strerror}; choose another --out"
            ) from error
        return cls(path, config)

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Open the folder of a run that exists.

        Raises:
            RunUnreadableError: there is no run in it, or its configuration is damaged.
        """
        if not (path / "config.toml").is_file():
            raise RunUnreadableError(f"{path} holds no run (no config.toml); start one: fedlearn simulate --out {path}")
        try:
            config = load_config(path / "config.toml")
        except (ConfigError, MissingError) as error:
            raise RunUnreadableError(f"{path}/config.toml is damaged: {error}") from error
        return cls(path, config)

    @property
    def model_path(self) -> Path:
        """Where the finished model is."""
        return self.path / "model.safetensors"

    @property
    def _checkpoint(self) -> Path:
        """Where the last state is."""
        return self.path / "checkpoint" / "state.safetensors"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder against a second process; the lock ends with the process, however it ends.

        Raises:
            RunFailedError: another process is working in it, or nothing can be written there.
        """
        try:
            lock = (self.path / ".lock").open("w")
        except OSError as error:
            raise RunFailedError(f"cannot write in {self.path}: {error.strerror}; give access, or copy it") from error
        with lock as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise RunFailedError(f"another process is working in {self.path}; wait for it or stop it") from error
            for folder in (self.path, self._checkpoint.parent):
                for litter in folder.glob(f".*{TEMPORARY}"):  # of a process that was killed in the middle of a file
                    litter.unlink(missing_ok=True)
            yield

    def load_state(self) -> RunState | None:
        """Return the last state that was saved, and forget metrics of rounds after it (they will come again)."""
        state = load_checkpoint(self._checkpoint, self.config.sha256())
        done = state.round_number if state else 0
        if state is not None and state.unmeasured is not None:
            done -= 1
        lines = [line for line in self.metrics() if line["round"] <= done]
        text = "".join(_dump(line) for line in lines)
        write_atomic(self.path / "metrics.jsonl", text.encode())
        return state

    def save_round(self, line: Mapping[str, Any], state: RunState) -> None:
        """Keep a finished round: first its line of metrics, then the state that makes it count."""
        try:
            with (self.path / "metrics.jsonl").open("a") as handle:
                handle.write(_dump(line))
                handle.flush()
                os.fsync(handle.fileno())
        except OSError as error:
            raise RunFailedError(
                f"cannot write {self.path}/metrics.jsonl: {error.strerror}; make room or give access"
            ) from error
        self.save_state(state)

    def save_state(self, state: RunState) -> None:
        """Keep the state, in the middle of a round too."""
        self._checkpoint.parent.mkdir(exist_ok=True)
        save_checkpoint(self._checkpoint, state, self.config.sha256())

    def metrics(self) -> list[dict[str, Any]]:
        """Return the lines of ``metrics.jsonl``; a last line torn by a crash is left out."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return []
        try:
            complete = path.read_bytes().split(b"\n")[:-1]  # what follows the last newline was never finished
        except OSError as error:
            raise RunUnreadableError(f"{path} cannot be read: {error.strerror}") from error
        try:
            found = [dict(json.loads(line)) for line in complete]
            if not all(isinstance(line["round"], int) for line in found):
                raise TypeError("a round is an integer")
        except (ValueError, TypeError, KeyError) as error:
            raise RunUnreadableError(f"{path} is damaged") from error
        return found

    def write(self, name: str, data: bytes) -> Path:
        """Write one of the folder's files as a whole."""
        write_atomic(self.path / name, data)
        return self.path / name

    def summary(self) -> dict[str, Any]:
        """Return ``summary.json``.

        Raises:
            RunUnreadableError: the run is not finished, or the file is damaged.
        """
        path = self.path / "summary.json"
        if not path.exists():
            raise RunUnreadableError(f"{self.path} is not finished; go on: fedlearn simulate --resume {self.path}")
        try:
            return dict(json.loads(path.read_bytes()))
        except (ValueError, TypeError) as error:
            raise RunUnreadableError(f"{path} is damaged") from error


def series(lines: Sequence[Mapping[str, Any]]) -> tuple[list[int], dict[str, list[float | None]]]:
    """Return the rounds and, by name, one value a round (``None`` where it was not measured)."""
    rounds = [int(line["round"]) for line in lines]
    names = list(dict.fromkeys(name for line in lines for name in line["metrics"]))  # in the task's order
    losses = [line.get("train_loss") for line in lines]
    hidden = bool(losses) and all(loss is None for loss in losses)  # where privacy is promised nobody tells it
    columns: dict[str, list[float | None]] = {} if hidden else {"train loss": losses}
    for name in names:
        columns[name] = [line["metrics"].get(name) for line in lines]
    return rounds, columns


def panels(
    lines: Sequence[Mapping[str, Any]], *, secret_cohorts: bool = False
) -> dict[str, dict[str, list[float | None]]]:
    """Return what else there is to see of a run, by axis and name: who answered, where not always all; simulated time.

    Of a round that was tried again, only the last try is seen. Where a cohort's size is part of what hides a client
    (``secret_cohorts``), a picture that is shown around must not tell it.
    """
    found: dict[str, dict[str, list[float | None]]] = {}
    reasons = Counter(code for line in lines for code in line["failures"].values())
    if not secret_cohorts and (reasons or len({line["cohort"] for line in lines}) > 1):
        clients: dict[str, list[float | None]] = {
            "invited": [line["cohort"] for line in lines],
            "answered": [line["respondents"] for line in lines],
        }
        counts = [Counter(line["failures"].values()) for line in lines]
        named = [code for code, _ in reasons.most_common(_REASONS)]
        for code in named:
            clients[code] = [count[code] for count in counts]
        if len(reasons) > _REASONS:
            others = [code for code in reasons if code not in named]
            clients["other reasons"] = [sum(count[code] for code in others) for count in counts]
        found["clients"] = clients
    if any("simulated_s" in line for line in lines):
        found["simulated seconds"] = {"of each round": [line.get("simulated_s") for line in lines]}
    return found


def _dump(line: Mapping[str, Any]) -> str:
    """Return one line of JSON."""
    return json.dumps(line, allow_nan=False) + "\n"
