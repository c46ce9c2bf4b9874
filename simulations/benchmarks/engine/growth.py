"""How our engine's time and memory grow with the cohort, the population and the parameters: a table and exponents.

Every point is an engine of its own in a process of its own; its first round, in which it starts, is left out. Clients
make their data when they are asked for it. An exponent is the slope of log(time) or log(memory) over log(size).
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedlearn.charts.canvas import FAINT, INK, empty_figure, style, svg
from fedlearn.cli.rendering import bytes_text
from fedlearn.files import write_atomic
from simulations.benchmarks.engine.conditions import conditions
from simulations.benchmarks.engine.gate import Process
from simulations.benchmarks.engine.workloads import Workload, site
from simulations.runs import Answer, finish, progress, stated

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["SERIES", "Point", "Series", "experiment", "exponents", "picture"]

ROUNDS = 3
"""The most timed rounds of a point."""

ENOUGH_S = 20.0
"""A point has no further round after so much time."""

LEAST_BYTES = 4 << 20
"""Memory above an idle engine's below this is that of the allocator, and not of what grows."""

POPULATION_GROWTH = 1.1
"""How many times the memory of the smallest population's the largest one's may be."""

_BASE = Workload(name="growth", title="", on_demand=True)


@dataclass(frozen=True, kw_only=True)
class Series:
    """One size that grows, and what stays as it is.

    Attributes:
        name: what grows.
        rest: what does not.
        workloads: one a point, the smallest first.
        sizes: the size of each.
    """

    name: str
    rest: str
    workloads: tuple[Workload, ...]
    sizes: tuple[int, ...] = ()

    def size(self, index: int) -> int:
        """Return a point's size: a model's is read from the model."""
        return self.sizes[index] if self.sizes else site(self.workloads[index]).spec.size


@dataclass(frozen=True, kw_only=True)
class Point:
    """One size's time and memory.

    Attributes:
        series: what grows.
        size: how large it is.
        clients: those of a round.
        seconds: of each timed round.
        peak_bytes: the most memory of all processes in one more round.
        idle_bytes: the same of an engine with next to nothing to do.
    """

    series: str
    size: int
    clients: int
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int
    idle_bytes: int

    @property
    def median_s(self) -> float:
        """The median round."""
        return statistics.median(self.seconds)

    @property
    def own_bytes(self) -> int:
        """What it holds above an idle engine, at least what can be told from nothing."""
        return max(self.peak_bytes - self.idle_bytes, LEAST_BYTES)


def _cohorts(sizes: Sequence[int]) -> Series:
    """Return cohorts of a population as large as the largest of them."""
    population = max(sizes)
    workloads = tuple(replace(_BASE, clients=each, population=population) for each in sizes)
    return Series(
        name="cohort", rest=f"population {population:,}, 101,770 parameters", workloads=workloads, sizes=tuple(sizes)
    )


def _populations(sizes: Sequence[int], clients: int = 100) -> Series:
    """Return populations of which a cohort is drawn."""
    workloads = tuple(replace(_BASE, clients=clients, population=each) for each in sizes)
    return Series(
        name="population", rest=f"cohort {clients}, 101,770 parameters", workloads=workloads, sizes=tuple(sizes)
    )


def _parameters(tasks: Sequence[str], clients: int = 20) -> Series:
    """Return models of several sizes."""
    workloads = tuple(replace(_BASE, task=each, clients=clients, population=1000) for each in tasks)
    return Series(name="parameters", rest=f"cohort {clients}, population 1,000", workloads=workloads)


SERIES = (
    _cohorts((10, 100, 1_000, 10_000)),
    _populations((1_000, 10_000, 100_000)),
    _parameters(("Mlp10k", "Mlp", "Mlp1m", "Mlp10m")),
)
QUICK = (_cohorts((2, 4)), _populations((10, 20), clients=2), _parameters(("Mlp10k", "Mlp"), clients=2))


def experiment(
    *, series: Sequence[Series] = SERIES, workers: int = 2, rounds: int = ROUNDS, target: Path | None = None
) -> Answer:
    """Measure every point, and draw them into ``target`` if that is given.

    Raises:
        RunFailedError: a round failed.
    """
    idle_bytes = _idle_bytes(workers)
    points = [
        _measure(each, index, workers, rounds, idle_bytes) for each in series for index in range(len(each.workloads))
    ]
    slopes = {each.name: exponents([point for point in points if point.series == each.name]) for each in series}
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(target, picture(points, {each.name: each.rest for each in series}, slopes).encode())
        progress(f"drawn: {target}")
    constant = _is_constant([point for point in points if point.series == "population"])
    said = "; ".join(
        f"{name}: time {slope['time']:.2f}, memory {slope['memory']:.2f}" for name, slope in slopes.items()
    )
    return Answer(
        columns=("grows", "to", "a round", "updates/s", "memory", "above idle"),
        rows=[_cells(each) for each in points],
        verdict=f"Exponents: {said}. Memory does not grow with the population: {stated(constant)}.",
        met=constant,
        body={
            "workers": workers,
            "after": conditions(),
            "idle_bytes": idle_bytes,
            "exponents": slopes,
            "points": [
                {
                    "series": each.series,
                    "size": each.size,
                    "clients": each.clients,
                    "median_s": each.median_s,
                    "all_s": each.seconds,
                    "peak_bytes": each.peak_bytes,
                    "own_bytes": each.own_bytes,
                }
                for each in points
            ],
        },
    )


def exponents(points: Sequence[Point]) -> dict[str, float]:
    """Return the slopes of log(time) and log(memory above idle) over log(size), of all points and of the last two.

    >>> points = [Point(series="", size=n, clients=1, seconds=[n**2], peak_bytes=n << 30, idle_bytes=0) for n in (1, 8)]
    >>> [round(slope, 6) for slope in exponents(points).values()]
    [2.0, 1.0, 2.0, 1.0]
    """
    size = np.log([each.size for each in points])
    found = {}
    for last, chosen in (("", slice(None)), ("_at_the_end", slice(-2, None))):
        for name, values in (("time", [p.median_s for p in points]), ("memory", [p.own_bytes for p in points])):
            found[f"{name}{last}"] = float(np.polyfit(size[chosen], np.log(values[chosen]), 1)[0])
    return found


def picture(points: Sequence[Point], rest: dict[str, str], slopes: dict[str, dict[str, float]]) -> str:
    """Return the points as an SVG element: time above, memory below, one column for what grows.

    Raises:
        DependencyError: matplotlib is not installed.
    """
    title = "How a round's time and memory grow"
    with style():
        figure = empty_figure((3.4 * len(rest), 5.6), title)
        axes = figure.subplots(2, len(rest), squeeze=False)
        for column, (name, stays) in enumerate(rest.items()):
            own = [each for each in points if each.series == name]
            size, idle = [each.size for each in own], own[0].idle_bytes / 1e6
            panels = [
                ("time", "seconds", [each.median_s for each in own]),
                ("memory", "MB", [each.peak_bytes / 1e6 for each in own]),
            ]
            for row, (what, unit, values) in enumerate(panels):
                panel = axes[row][column]
                if what == "time":
                    panel.loglog(size, values, color=INK, marker="o", markersize=4)
                    panel.set_ylim(min(values) / 3, max(values) * 3)
                else:  # from zero: most of it is there whatever grows
                    panel.semilogx(size, values, color=INK, marker="o", markersize=4)
                    panel.set_ylim(0, max(values) * 1.2)
                above = " above idle" if what == "memory" else ""
                panel.set_title(f"{what}{above}: exponent {slopes[name][what]:.2f}", fontsize=10, loc="left")
                _plain_ticks(panel)
                if column == 0:
                    panel.set_ylabel(f"{what} of a round, {unit}")
            axes[1][column].axhline(idle, color="#888888", linewidth=1, linestyle="--")
            axes[1][column].set_xlabel(f"{name}\n({stays})")
        return svg(figure, title)


def _plain_ticks(panel: Axes) -> None:
    """Name powers of ten by plain text, and nothing between them."""
    from matplotlib.ticker import LogLocator, NullFormatter

    logarithmic = [axis for axis in (panel.xaxis, panel.yaxis) if axis.get_scale() == "log"]
    for axis in logarithmic:
        axis.set_major_locator(LogLocator(numticks=8))
        axis.set_major_formatter(lambda value, _: _short(value))
        axis.set_minor_formatter(NullFormatter())
    panel.grid(True, which="major", color=FAINT)


def _short(value: float) -> str:
    """Return a number as a tick shows it: 0.01, 10, 100k, 10M.

    >>> [_short(value) for value in (0.01, 10, 100_000, 1e7)]
    ['0.01', '10', '100k', '10M']
    """
    for least, letter in ((1e6, "M"), (1e3, "k")):
        if value >= least:
            return f"{value / least:g}{letter}"
    return f"{value:g}"


def _idle_bytes(workers: int) -> int:
    """Return the memory of an engine that has next to nothing to do."""
    progress("an engine with two clients and 10,345 parameters: what the rest is held against")
    tiny = replace(_BASE, task="Mlp10k", clients=2, population=2)
    with Process("ours", tiny, 3, {"workers": workers}) as process:
        process.round()
        return process.peak_bytes(2)


def _measure(series: Series, index: int, workers: int, rounds: int, idle_bytes: int) -> Point:
    """Measure one point."""
    workload, size = series.workloads[index], series.size(index)
    with Process("ours", workload, rounds + 2, {"workers": workers}) as process:
        process.round()
        seconds: list[float] = []
        while len(seconds) < rounds and math.fsum(seconds) < ENOUGH_S:
            seconds.append(process.round())
        peak_bytes = process.peak_bytes(1)
    progress(f"{series.name} {size:,}: {statistics.median(seconds):.3f} s a round, {bytes_text(peak_bytes)}")
    return Point(
        series=series.name,
        size=size,
        clients=workload.clients,
        seconds=seconds,
        peak_bytes=peak_bytes,
        idle_bytes=idle_bytes,
    )


def _is_constant(points: Sequence[Point]) -> bool:
    """Return whether the largest population's memory is that of the smallest one's."""
    return bool(points) and points[-1].peak_bytes <= POPULATION_GROWTH * points[0].peak_bytes


def _cells(point: Point) -> list[str]:
    """Return the cells of a point."""
    own = bytes_text(point.own_bytes) if point.own_bytes > LEAST_BYTES else f"< {bytes_text(LEAST_BYTES)}"
    return [
        point.series,
        f"{point.size:,}",
        f"{point.median_s:.3f} s",
        f"{point.clients / point.median_s:,.0f}",
        bytes_text(point.peak_bytes),
        own,
    ]


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--json", action="store_true", help="end with one JSON object on a line of its own")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="(default: 2)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N", help=f"timed, at most (default: {ROUNDS})")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the points into this SVG file")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does everything run?")
    given = parser.parse_args()
    series = QUICK if given.quick else SERIES
    finish(
        lambda: experiment(series=series, workers=given.workers, rounds=given.rounds, target=given.picture),
        as_json=given.json,
    )


if __name__ == "__main__":
    main()
