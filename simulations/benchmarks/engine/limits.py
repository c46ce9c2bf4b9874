"""How far our engine is from what the machine can do: arithmetic over the sgemm rate, bytes over the copy bandwidth.

The rate of one thread's matrix products and the bandwidth of one thread's copies are measured between the rounds, so
that a busy machine slows down both. A limit is what the rounds would take if nothing else had to be done.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from fedlearn.cli.rendering import bytes_text
from simulations.benchmarks.engine.conditions import conditions
from simulations.benchmarks.engine.gate import Process
from simulations.benchmarks.engine.local import LocalTraining
from simulations.benchmarks.engine.workloads import WORKLOADS, Workload, site
from simulations.runs import Answer, finish, progress, stated

__all__ = ["Work", "copy_bytes_per_s", "experiment", "sgemm_flops_per_s", "work_of"]

TURNS = 7
SIDE = 768
"""Of the square matrices: 2.25 MiB each, more than the first caches hold and less than the last."""

COPIED_BYTES = 128 << 20
"""Of one copy: more than any cache holds."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one client's training needs, by any way of computing it that forms its weights.

    Attributes:
        flops: multiplications and additions of matrix products and convolutions, forward and backward.
        weight_bytes: its own weights, read and written at every step.
        least_bytes: its examples read once: what is left where its weights are never formed.
    """

    flops: int
    weight_bytes: int
    least_bytes: int


def work_of(workload: Workload) -> Work:
    """Return what one client of a workload needs: its arithmetic as torch counts it, in plain training."""
    of = site(workload)
    plain = Workload.from_json(workload.to_json().replace(f'"unit": "{workload.unit}"', '"unit": "none"'))
    training, examples = LocalTraining(plain, of), of.examples(0)
    with FlopCounterMode(display=False) as counter:
        training.train(1, 0, examples.inputs, examples.targets)
    steps = -(-workload.examples // workload.batch_size)
    return Work(
        flops=int(counter.get_total_flops()),
        weight_bytes=2 * 4 * of.spec.size * steps,
        least_bytes=examples.inputs.numel() * examples.inputs.element_size(),
    )


def sgemm_flops_per_s(side: int = SIDE) -> float:
    """Return the rate of one product of two square float32 matrices, on one thread."""
    left, right, product = (torch.ones(side, side) for _ in range(3))
    return 2 * side**3 / _took_s(lambda: torch.mm(left, right, out=product))


def copy_bytes_per_s(size: int = COPIED_BYTES) -> float:
    """Return the bytes read and written in a second by a copy, on one thread."""
    source, target = torch.ones(size // 4), torch.zeros(size // 4)
    return 2 * size / _took_s(lambda: target.copy_(source))


def _took_s(work: Any) -> float:
    """Return how long something takes that has been done once before, the median of three."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        work()
        seconds = []
        for _ in range(3):
            begun = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - begun)
    finally:
        torch.set_num_threads(threads)
    return statistics.median(seconds)


def experiment(*, workloads: Sequence[Workload] = WORKLOADS, workers: int = 2, turns: int = TURNS) -> Answer:
    """Measure rounds, rate and bandwidth in turns, and put each round beside its limits.

    Raises:
        RunFailedError: a round failed.
        MissingError: Opacus is not installed.
    """
    lines = [_line(each, workers, turns) for each in workloads]
    timed = all(line["median_s"] > 0 for line in lines)
    rates = [statistics.median(line[name] for line in lines) for name in ("sgemm_flops_per_s", "copy_bytes_per_s")]
    return Answer(
        columns=("workload", "Mflop", "bytes", "updates/s", "flops", "weights", "inputs"),
        rows=[_cells(each) for each in lines],
        verdict=f"One thread: {rates[0] / 1e9:.1f} Gflop/s, {rates[1] / 1e9:.1f} GB/s; the limits are those of "
        f"{max(workers, 1)}. Every round was timed: {stated(timed)}.",
        met=timed,
        body={"workers": workers, "turns": turns, "after": conditions(), "lines": lines},
    )


def _line(workload: Workload, workers: int, turns: int) -> dict[str, Any]:
    """Return one workload beside its limits."""
    work, hands = work_of(workload), max(workers, 1)
    with Process("ours", workload, 2 + 4 * turns, {"workers": workers}) as process:
        process.round()
        process.round()
        seconds: list[float] = []
        rates: list[float] = []
        bandwidths: list[float] = []
        for _ in range(turns):
            seconds += [process.round() for _ in range(4)]
            rates.append(sgemm_flops_per_s())
            bandwidths.append(copy_bytes_per_s())
    round_s, rate, bandwidth = map(statistics.median, (seconds, rates, bandwidths))
    progress(f"{workload.name}: {round_s:.3f} s a round, {rate / 1e9:.1f} Gflop/s, {bandwidth / 1e9:.1f} GB/s")
    clients = workload.clients
    return {
        "workload": workload.name,
        "flops": work.flops,
        "weight_bytes": work.weight_bytes,
        "least_bytes": work.least_bytes,
        "median_s": round_s,
        "all_s": seconds,
        "updates_per_s": clients / round_s,
        "sgemm_flops_per_s": rate,
        "copy_bytes_per_s": bandwidth,
        "of_arithmetic": clients * work.flops / (rate * hands) / round_s,
        "of_weight_bytes": clients * work.weight_bytes / (bandwidth * hands) / round_s,
        "of_least_bytes": clients * work.least_bytes / (bandwidth * hands) / round_s,
    }


def _cells(line: dict[str, Any]) -> list[str]:
    """Return the cells of a line."""
    return [
        line["workload"],
        f"{line['flops'] / 1e6:.1f}",
        bytes_text(line["weight_bytes"]),
        f"{line['updates_per_s']:,.0f}",
        *(f"{100 * line[name]:.1f} %" for name in ("of_arithmetic", "of_weight_bytes", "of_least_bytes")),
    ]


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    names = [each.name for each in WORKLOADS]
    parser.add_argument("--json", action="store_true", help="end with one JSON object on a line of its own")
    parser.add_argument("--workloads", nargs="+", choices=names, default=names, metavar="W", help=" ".join(names))
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="(default: 2)")
    parser.add_argument("--turns", type=int, default=TURNS, metavar="N", help=f"of four rounds (default: {TURNS})")
    given = parser.parse_args()
    chosen = [each for each in WORKLOADS if each.name in given.workloads]
    finish(lambda: experiment(workloads=chosen, workers=given.workers, turns=given.turns), as_json=given.json)


if __name__ == "__main__":
    main()
