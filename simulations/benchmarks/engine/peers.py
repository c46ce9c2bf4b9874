"""Ours beside the plain PyTorch loop, Flower's Ray runtime and Apple's pfl: client updates a second, in turns.

Every engine is a process of its own, started once; they take turns, a few rounds each, so that whatever else the
machine does meets all of them. No ratio is printed before their parameters after one round have been compared.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from fedlearn.cli.rendering import bytes_text
from fedlearn.errors import RunFailedError
from simulations.benchmarks.engine.conditions import conditions
from simulations.benchmarks.engine.gate import Parameters, Process
from simulations.benchmarks.engine.needs import check
from simulations.benchmarks.engine.workloads import CHECKED_NOISE, WORKLOADS, Workload, site
from simulations.runs import Answer, finish, progress

__all__ = ["BARS", "ENGINES", "Engine", "compare_models", "experiment", "noise_stddev"]

TURNS = 7
TURN_S = 0.5
"""About how long a turn of one engine is, in whole rounds."""

MOST_ROUNDS = 25
"""The most rounds of one turn."""

TOLERANCE = 1e-3
"""How far two engines' parameters may be apart after one round, over the length of the round's update (L2)."""

NOISE_TOLERANCE = 0.05
"""How far the standard deviation of an engine's noise may be from what it should be, relatively."""


@dataclass(frozen=True, kw_only=True)
class Engine:
    """One engine, or one way to run it.

    Attributes:
        name: for people.
        module: where its ``run`` is.
        peer: what ``--peers`` calls it; empty: ours.
        needs: packages that it needs beside fedlearn.
        options: of its ``run``.
        units: whose privacy it can promise.
    """

    name: str
    module: str
    peer: str = ""
    needs: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    units: tuple[str, ...] = ("none", "client", "example")


OURS = Engine(name="ours, 2 workers", module="ours", options={"workers": 2})
"""What the bars are for."""

LOOP = Engine(name="PyTorch loop", module="loop", peer="loop")
FLOWER = Engine(name="Flower-Ray", module="flower_ray", peer="ray", needs=("ray",))
PFL = Engine(name="pfl 0.6", module="apple_pfl", peer="pfl", needs=("pfl",), units=("none", "client"))
ENGINES = (
    OURS,
    Engine(name="ours, 1 worker", module="ours", options={"workers": 1}),
    Engine(name="ours, in process", module="ours", options={"workers": 0}),
    LOOP,
    PFL,
    FLOWER,
)

BARS: Mapping[tuple[str, str], float] = {
    ("mlp", "ray"): 60,
    ("mlp", "pfl"): 8,
    ("mlp", "loop"): 4,
    ("cnn", "ray"): 2.5,
    ("cnn", "pfl"): 1.4,
    ("cnn", "loop"): 1.4,
    ("mlp-client-dp", "ray"): 60,
    ("mlp-example-dp", "loop"): 10,
}
"""How many times as fast ours has to be, by workload and peer; under ``mlp-example-dp`` the loop is Opacus'."""


@dataclass
class Timed:
    """What was found of one engine on one workload.

    Attributes:
        difference: from the reference after one noise-free round, over the length of the update.
        seconds: of each round that counts.
        peak_bytes: the most memory, of all its processes.
        noise_ratio: the noise found over the noise that should be there; ``None``: none should.
    """

    difference: float
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    noise_ratio: float | None = None

    @property
    def median_s(self) -> float:
        """The median round."""
        return statistics.median(self.seconds)


def experiment(
    *,
    workloads: Sequence[Workload] = WORKLOADS,
    engines: Sequence[Engine] = ENGINES,
    turns: int = TURNS,
    turn_s: float = TURN_S,
    quick: bool = False,
) -> Answer:
    """Compare and time all engines on all workloads, and say which bars were met.

    Args:
        workloads: what is done.
        engines: who does it.
        turns: how often each engine has its turn.
        turn_s: about how long a turn is.
        quick: take four clients a round and one round a turn, and judge by no bar: to see that everything runs.

    Raises:
        MissingError: a peer is not installed.
        RunFailedError: an engine failed, or two do not compute the same.
    """
    doing = [(workload, [each for each in engines if workload.unit in each.units]) for workload in workloads]
    needed = {name for _, chosen in doing for each in chosen for name in each.needs}
    check(*sorted(needed | ({"opacus"} if any(each.unit == "example" for each in workloads) else set())))
    if quick:
        doing = [(replace(workload, clients=4), chosen) for workload, chosen in doing]
        turns, turn_s = 1, 0.0
    before = conditions()
    found = {workload.name: (workload, _measure(workload, chosen, turns, turn_s)) for workload, chosen in doing}
    lines = [line for workload, timed in found.values() for line in _lines(workload, timed, engines, judged=not quick)]
    missed = [f"{each['workload']}, {each['engine']}" for each in lines if each["verdict"] not in ("", "met")]
    bars = sum(each["verdict"] != "" for each in lines)
    furthest = max(each["difference"] for each in lines if "difference" in each)
    same = f"After one round all parameters agree to {furthest:.1e} of its update (allowed: {TOLERANCE:g})."
    if quick:
        verdict = f"{same} A quick look: judged by no bar."
    elif missed:
        verdict = f"{same} Of {bars} bars, not met: {'; '.join(missed)}."
    else:
        verdict = f"{same} All of {bars} bars met."
    return Answer(
        columns=("workload", "engine", "updates/s", "ours is", "bar", "memory"),
        rows=[_cells(each) for each in lines],
        verdict=verdict,
        met=not missed,
        body={"turns": turns, "tolerance": TOLERANCE, "before": before, "after": conditions(), "lines": lines},
    )


# -- the same mathematics ------------------------------------------------------------------------------------------


def compare_models(models: Mapping[str, Parameters], first: Parameters) -> dict[str, float]:
    """Return how far each model is from the first one's, over the length of its update.

    Raises:
        RunFailedError: further than the tolerance, or nothing was trained.
    """
    (name, reference), *_ = models.items()
    length = float(np.linalg.norm(reference - first))
    if not length > 0:
        raise RunFailedError(f"{name} did not move the model: there is nothing to compare")
    found = {each: float(np.linalg.norm(model - reference)) / length for each, model in models.items()}
    wrong = [f"{each} ({gap:.2g})" for each, gap in found.items() if not gap <= TOLERANCE]
    if wrong:
        raise RunFailedError(
            f"not the same mathematics, so no ratios: after one round the parameters of {', '.join(wrong)} are further "
            f"from those of {name} than {TOLERANCE:g} of the update's length"
        )
    return found


def noise_stddev(workload: Workload) -> float | None:
    """Return σ of the noise that is on each parameter after one round; ``None``: none is.

    Under ``example`` to first order: every client's step has its own, and the server takes the mean.
    """
    if workload.unit == "client":
        return workload.noise_multiplier * workload.bound_l2 / workload.clients
    if workload.unit == "example":
        steps = -(-workload.examples // workload.batch_size)
        of_a_step = workload.learning_rate * workload.noise_multiplier * workload.bound_l2 / workload.batch_size
        return of_a_step * float(np.sqrt(steps / workload.clients))
    return None


def _noise_ratio(model: Parameters, reference: Parameters, expected: float, name: str) -> float:
    """Return the noise on a model over what should be there, and raise where it is something else."""
    ratio = float(np.std(model - reference)) / expected
    if not abs(ratio - 1) <= NOISE_TOLERANCE:
        raise RunFailedError(
            f"not the same mathematics, so no ratios: the noise of {name} is {ratio:.3f} of what it is"
        )
    return ratio


def _models(workload: Workload, engines: Sequence[Engine]) -> dict[str, Parameters]:
    """Return every engine's parameters after one round, one engine after the other."""
    found = {}
    for engine in engines:
        progress(f"{workload.name}: {engine.name}, one round without noise")
        with Process(engine.module, workload, 1, engine.options) as process:
            found[engine.name] = process.model()
    return found


# -- time and memory -----------------------------------------------------------------------------------------------


def _measure(workload: Workload, engines: Sequence[Engine], turns: int, turn_s: float) -> dict[str, Timed]:
    """Compare all engines on a workload, then time them in turns, and look at their memory at the end."""
    first, expected = site(workload).first, noise_stddev(workload)
    quiet: dict[str, Parameters] = {}
    if expected is not None:
        quiet = _models(replace(workload, noise_multiplier=CHECKED_NOISE), engines)
        compare_models(quiet, first)  # before anything is timed
    with ExitStack() as stack:
        rounds = 2 + (turns + 1) * MOST_ROUNDS
        running: dict[str, Process] = {}
        models: dict[str, Parameters] = {}
        for engine in engines:
            progress(f"{workload.name}: {engine.name} starts")
            started = Process(engine.module, workload, rounds, engine.options)
            running[engine.name] = stack.enter_context(started)
            models[engine.name] = started.model()
        found = {name: Timed(gap) for name, gap in compare_models(quiet or models, first).items()}
        if expected is not None:
            for name, timed in found.items():
                timed.noise_ratio = _noise_ratio(models[name], quiet[name], expected, name)
        per_turn = {name: _rounds_a_turn(process, turn_s) for name, process in running.items()}
        _take_turns(workload, running, found, per_turn, turns)
        progress(f"{workload.name}: memory")
        for name, process in running.items():
            found[name].peak_bytes = process.peak_bytes(per_turn[name])
    return found


def _rounds_a_turn(process: Process, turn_s: float) -> int:
    """Let an engine warm up by one round, and return how many of them make a turn."""
    return max(1, min(MOST_ROUNDS, round(turn_s / process.round())))


def _take_turns(
    workload: Workload,
    running: Mapping[str, Process],
    found: Mapping[str, Timed],
    per_turn: Mapping[str, int],
    turns: int,
) -> None:
    """Let engines do their rounds in turns, forwards and backwards, and note how long each round took."""
    order = list(running)
    for turn in range(turns):
        begun = time.monotonic()
        for name in order if turn % 2 == 0 else reversed(order):
            found[name].seconds += [running[name].round() for _ in range(per_turn[name])]
        progress(f"{workload.name}: turn {turn + 1} of {turns}, {time.monotonic() - begun:.1f} s")


# -- the table -----------------------------------------------------------------------------------------------------


def _lines(
    workload: Workload, found: Mapping[str, Timed], engines: Sequence[Engine], *, judged: bool
) -> list[dict[str, Any]]:
    """Return one line an engine, and one for each peer with a bar that was not run."""
    ours = found.get(OURS.name)
    lines = []
    for engine in engines:
        timed = found.get(engine.name)
        least = BARS.get((workload.name, engine.peer)) if judged else None
        if timed is None:
            continue
        ratio = timed.median_s / ours.median_s if ours is not None else None
        lines.append(
            {
                "workload": workload.name,
                "title": workload.title,
                "engine": engine.name,
                "updates_per_s": workload.clients / timed.median_s,
                "median_s": timed.median_s,
                "all_s": timed.seconds,
                "ratio": ratio,
                "least": least,
                "verdict": _verdict(ratio, least),
                "peak_bytes": timed.peak_bytes,
                "difference": timed.difference,
                "noise_ratio": timed.noise_ratio,
            }
        )
    present = {each.peer for each in engines}
    for (name, peer), least in BARS.items():
        if judged and name == workload.name and peer not in present:
            absent = {"workload": name, "engine": peer, "least": least, "verdict": "not measured"}
            lines.append(absent)
    return lines


def _verdict(ratio: float | None, least: float | None) -> str:
    """Return what is to be said of a bar."""
    if least is None:
        return ""
    if ratio is None:
        return "not measured"
    return "met" if ratio >= least else "missed"


def _cells(line: Mapping[str, Any]) -> list[str]:
    """Return the cells of a line."""
    bar = f"≥ {line['least']:g} × {line['verdict']}" if line["least"] is not None else ""
    if "median_s" not in line:
        return [line["workload"], line["engine"], "", "", bar, ""]
    return [
        line["workload"],
        line["engine"],
        f"{line['updates_per_s']:,.0f}",
        f"{line['ratio']:.2f} ×" if line["ratio"] is not None else "",
        bar,
        bytes_text(line["peak_bytes"]),
    ]


def _chosen(peers: Sequence[str]) -> list[Engine]:
    """Return ours, and the peers that were asked for."""
    return [each for each in ENGINES if not each.peer or each.peer in peers]


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--json", action="store_true", help="end with one JSON object on a line of its own")
    names = [each.name for each in WORKLOADS]
    peers = [each.peer for each in ENGINES if each.peer]
    parser.add_argument("--workloads", nargs="+", choices=names, default=names, metavar="W", help=" ".join(names))
    parser.add_argument("--peers", nargs="*", choices=peers, default=peers, metavar="P", help=" ".join(peers))
    parser.add_argument("--turns", type=int, default=TURNS, metavar="N", help=f"(default: {TURNS})")
    parser.add_argument("--quick", action="store_true", help="four clients, one turn, no bars: does everything run?")
    given = parser.parse_args()
    finish(
        lambda: experiment(
            workloads=[each for each in WORKLOADS if each.name in given.workloads],
            engines=_chosen(given.peers),
            turns=given.turns,
            quick=given.quick,
        ),
        as_json=given.json,
    )


if __name__ == "__main__":
    main()
