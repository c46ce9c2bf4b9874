"""What the scripts of several experiments share: run a scenario, say what came out, answer the expectation.

The scripts are run from the root of the repository, as ``python -m simulations.digits.seeds``. ``fedlearn`` never
imports this folder.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlearn.cli.rendering import console, echo_json, table
from fedlearn.errors import FedlearnError
from fedlearn.federation.observer import Observer
from fedlearn.federation.run_folder import RunFolder
from fedlearn.scenario import read_scenario
from fedlearn.simulation.engine import simulate

__all__ = ["Answer", "Finished", "arguments", "finish", "progress", "run", "stated"]


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A run that is over, and whose folder is gone.

    Attributes:
        summary: its ``summary.json``.
        lines: its ``metrics.jsonl``, a mapping a round.
    """

    summary: dict[str, Any]
    lines: list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What an experiment found.

    Attributes:
        columns: the table's head.
        rows: its cells.
        verdict: one sentence on the expectation.
        met: whether it was met.
        body: the same for machines.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    verdict: str
    met: bool
    body: dict[str, Any]


def run(
    scenario: Path, overrides: Sequence[str] = (), *, observe: Callable[[RunFolder], Observer] | None = None
) -> Finished:
    """Run a scenario, with ``section.key=value`` overrides, in a folder that is removed afterwards.

    Args:
        scenario: the file.
        overrides: as after ``--set``, the later the stronger.
        observe: makes who watches the run, given its folder.

    Raises:
        FedlearnError: as ``fedlearn simulate`` does.
    """
    with tempfile.TemporaryDirectory(prefix="fedlearn-") as place:
        folder = RunFolder.create(Path(place) / "run", read_scenario(str(scenario), overrides))
        summary = simulate(folder, observe(folder) if observe else None)
        return Finished(summary=summary, lines=folder.metrics())


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Return the options that every script has."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n\n")[0])
    parser.add_argument("--json", action="store_true", help="end with one JSON object on a line of its own")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="override the scenario, as in fedlearn simulate; may be repeated",
    )
    return parser


def progress(text: str) -> None:
    """Say on standard error what is being run now."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def stated(met: bool) -> str:
    """Return the word of a verdict."""
    return "as expected" if met else "NOT as expected"


def finish(experiment: Callable[[], Answer], *, as_json: bool) -> None:
    """Run the experiment, show its answer and exit: 0 met, 1 not met, else what the error says."""
    try:
        answer = experiment()
    except FedlearnError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(error.exit_code) from error
    stdout = console()
    stdout.print(table(answer.columns, answer.rows))
    stdout.print(answer.verdict)
    if as_json:
        echo_json({**answer.body, "met": answer.met})
    raise SystemExit(0 if answer.met else 1)
