"""One round of a thousand clients, a tenth of which drop out, beside one of a hundred: time, memory, bytes, exactness.

Every client is a session of its own, with real keys, shares and masks, in active mode. Each size runs in a process of
its own, so that the memory is that of its round: all clients and the server together.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import resource
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fedlearn.cli.rendering import bytes_text, duration_text
from fedlearn.secagg.server import PHASES
from simulations.benchmarks.secagg.cohort import Setting, random_losses, run_round
from simulations.runs import Answer, finish, progress

CLIENTS = (1000, 100)
PARAMETERS = 100_000
LOST = 0.1
"""The share of the clients that drop out, each before a leg that is drawn."""

COLLUDING, DROPPING = 0.1, 0.15
"""What the sparse graph is made for: a tenth is lost on average everywhere, but more than that of one client's
neighbours by chance. With δ = 0.15 of the *cohort* every client keeps enough of them but for 2^-20."""

SEED = 0

Measure = Callable[[int, int, float, int], dict[str, Any]]


def experiment(
    *,
    clients: Sequence[int] = CLIENTS,
    parameters: int = PARAMETERS,
    lost: float = LOST,
    seed: int = SEED,
    measure: Measure | None = None,
) -> Answer:
    """Run a round of each size; it is an error where a sum is not that of its survivors.

    Args:
        clients: the sizes.
        parameters: d.
        lost: the share of the clients that drop out.
        seed: who does, and where.
        measure: runs one round; by default ``measured`` in a process of its own.
    """
    rounds = []
    for n in clients:
        progress(f"a round of {n:,} clients")
        rounds.append((measure or _apart)(n, parameters, lost, seed))
    wrong = [each["clients"] for each in rounds if not each["exact"]]
    return Answer(
        columns=("", *(f"{n:,} clients" for n in clients)),
        rows=[[name, *(show(each) for each in rounds)] for name, show in _ROWS],
        verdict="Every sum is exactly that of its survivors."
        if not wrong
        else f"WRONG: the sum of {' and of '.join(map(str, wrong))} clients is not that of the survivors.",
        met=not wrong,
        body={"parameters": parameters, "lost": lost, "seed": seed, "rounds": rounds},
    )


def _apart(clients: int, parameters: int, lost: float, seed: int) -> dict[str, Any]:
    """Run one round in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measured, clients, parameters, lost, seed).result()


def measured(clients: int, parameters: int, lost: float, seed: int) -> dict[str, Any]:
    """Run one round in this process and return what it took."""
    losses = random_losses(clients, lost, seed)
    setting = Setting(
        clients=clients, parameters=parameters, colluding=COLLUDING, dropping=DROPPING, lost=losses, seed=seed
    )
    before, begun = _peak_bytes(), time.perf_counter()
    with _bar() as bar:
        task = bar.add_task(f"{clients:,} clients", total=_answers(setting))
        found = run_round(setting, clock=time.process_time, progress=lambda: bar.advance(task))
    return {
        "clients": clients,
        "lost": dict(Counter(losses.values())),
        "survivors": found.survivors,
        "degree": found.degree,
        "threshold": found.threshold,
        "wall_s": time.perf_counter() - begun,
        "client_cpu_s": statistics.fmean(found.client_s.values()),
        "server_cpu_s": found.server_s,
        "peak_bytes": _peak_bytes() - before,
        "masked_bytes": found.masked_bytes,
        "uploaded_bytes": round(statistics.fmean(found.uploaded.values())),
        "downloaded_bytes": round(statistics.fmean(found.downloaded.values())),
        "exact": found.exact,
    }


def _answers(setting: Setting) -> int:
    """Return how many answers there will be."""
    return sum(setting.answers(phase, client) for phase in PHASES for client in range(setting.clients))


def _bar() -> Progress:
    """Return a progress bar on standard error; there is none where nobody looks at it."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    stderr = Console(stderr=True)
    return Progress(*columns, TimeRemainingColumn(), console=stderr, transient=True, disable=not stderr.is_terminal)


def _peak_bytes() -> int:
    """Return the most memory that this process has had resident so far.

    On Linux ``ru_maxrss`` begins with that of the process which started this one; the kernel's own mark does not.
    """
    with suppress(OSError):
        marks = re.search(r"^VmHWM:\s*(\d+) kB$", Path("/proc/self/status").read_text(encoding="ascii"), re.MULTILINE)
        if marks:
            return 1024 * int(marks[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _lost(each: dict[str, Any]) -> str:
    """Return who was lost before which phase."""
    return ", ".join(f"{each['lost'].get(phase, 0)} {phase}" for phase in PHASES)


_ROWS: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
    ("lost before", _lost),
    ("survivors in the sum", lambda each: f"{each['survivors']:,}"),
    ("neighbours, threshold", lambda each: f"{each['degree']}, {each['threshold']}"),
    ("wall time of all", lambda each: duration_text(each["wall_s"])),
    ("a client's CPU time", lambda each: f"{1000 * each['client_cpu_s']:.1f} ms"),
    ("the server's CPU time", lambda each: duration_text(each["server_cpu_s"])),
    ("peak memory of all", lambda each: bytes_text(each["peak_bytes"])),
    ("a client's upload", lambda each: bytes_text(each["uploaded_bytes"])),
    ("of it the masked vector", lambda each: bytes_text(each["masked_bytes"])),
    ("a client's download", lambda each: bytes_text(each["downloaded_bytes"])),
    ("the sum is exact", lambda each: "yes" if each["exact"] else "NO"),
)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--clients", type=int, nargs="+", default=CLIENTS, metavar="N", help="(default: 1000 100)")
    parser.add_argument("--parameters", type=int, default=PARAMETERS, metavar="D", help=f"(default: {PARAMETERS:,})")
    parser.add_argument("--lost", type=float, default=LOST, metavar="SHARE", help=f"(default: {LOST})")
    parser.add_argument("--seed", type=int, default=SEED, help=f"who drops out, and where (default: {SEED})")
    parser.add_argument("--json", action="store_true", help="end with one JSON object on a line of its own")
    given = parser.parse_args()
    finish(
        lambda: experiment(clients=given.clients, parameters=given.parameters, lost=given.lost, seed=given.seed),
        as_json=given.json,
    )
