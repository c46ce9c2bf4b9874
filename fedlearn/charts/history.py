"""How a run learned: losses and scores over its rounds, who answered, how long it took."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fedlearn.charts.canvas import empty_figure, legend, plain, style, svg, whole_ticks

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

__all__ = ["draw_history"]

# Okabe and Ito's eight, black last and the yellow darkened to be seen on white.
# "Color Universal Design", 2008, https://jfly.uni-koeln.de/color/
_LINE_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#b5a600", "#000000")
_LINE_STYLES = ("-", "--", ":", "-.")
_LOSS_WORDS = ("loss", "error", "mse", "mae", "nll", "entropy", "perplexity", "deviance")


@dataclass(frozen=True)
class _Line:
    """One series: its name, its values with NaN for gaps, and how it is drawn."""

    name: str
    values: NDArray[np.float64]
    colour: str
    style: str
    counts: bool = False

    @property
    def is_loss(self) -> bool:
        """Whether it belongs with the losses: by its name, or because it leaves [0, 1]."""
        words = self.name.lower()
        known = self.values[np.isfinite(self.values)]
        return any(word in words for word in _LOSS_WORDS) or bool(np.any((known < 0) | (known > 1)))

    def text(self, value: float) -> str:
        """Return one of its values as it is written beside the line."""
        if self.counts:
            return f"{value:,.0f}" if value >= 100 else f"{value:.4g}"
        return f"{value:.3f}" if 0.01 <= abs(value) < 10 or not self.is_loss else f"{value:.4g}"


def draw_history(
    rounds: Sequence[int],
    series: Mapping[str, Sequence[float | None]],
    *,
    title: str,
    more: Mapping[str, Mapping[str, Sequence[float | None]]] | None = None,
) -> str:
    """Draw what was measured, round by round.

    Losses (by name, or any series that leaves [0, 1]) share one panel and scores in [0, 1] the other; a
    panel without series is left out. ``None``, NaN and infinity are gaps; a series that is ``None``
    throughout is left out, and one without any finite value is named in the legend as not finite. Losses
    that span more than three orders of magnitude are drawn on a logarithmic axis. What else there is to see
    (``more``) has a panel each, below, from nought up.

    Guarantees: as the module's.

    Args:
        rounds: round numbers, shape (n,).
        series: by name, one value a round, shape (n,).
        title: drawn on top, and read out by screen readers.
        more: further panels by the name of their axis, each with its series of numbers that are not negative.

    Returns:
        An SVG element, text.

    Raises:
        ValueError: a series is not as long as ``rounds``.
        DependencyError: matplotlib is not installed.

    >>> svg = draw_history([1, 2], {"loss": [0.9, 0.4], "accuracy": [None, 0.8]}, title="digits")
    >>> svg.startswith("<svg ") and "accuracy" in svg
    True
    """
    lines = _lines(rounds, series)
    panels = [
        (noun, some)
        for noun, some in (
            ("loss", [line for line in lines if line.is_loss]),
            ("score", [line for line in lines if not line.is_loss]),
            *((noun, _lines(rounds, counted, counts=True)) for noun, counted in (more or {}).items()),
        )
        if some
    ]
    with style():
        return svg(_history_figure(rounds, panels, title), title)


def _lines(rounds: Sequence[int], series: Mapping[str, Sequence[float | None]], *, counts: bool = False) -> list[_Line]:
    """Return what there is to draw, in the order given."""
    lines: list[_Line] = []
    for name, values in series.items():
        if len(values) != len(rounds):
            raise ValueError(f"series {name!r} has {len(values)} values for {len(rounds)} rounds")
        if all(value is None for value in values):
            continue
        known = np.array([math.nan if value is None else value for value in values], dtype=np.float64)
        cycle, colour = divmod(len(lines), len(_LINE_COLOURS))
        style = _LINE_STYLES[cycle % len(_LINE_STYLES)]
        gaps = np.where(np.isfinite(known), known, math.nan)
        lines.append(_Line(plain(name, 28), gaps, _LINE_COLOURS[colour], style, counts))
    return lines


def _history_figure(rounds: Sequence[int], panels: Sequence[tuple[str, Sequence[_Line]]], title: str) -> Figure:
    """Return the panels two by two, losses left and scores right, the rest below."""
    columns = min(2, max(1, len(panels)))
    rows = max(1, -(-len(panels) // columns))
    figure = empty_figure((10.0 if columns == 2 else 6.4, 4.2 * rows), title)
    for place, (noun, some) in enumerate(panels, start=1):
        _history_panel(figure.add_subplot(rows, columns, place), rounds, some, noun)
    if not panels:
        axes = figure.add_subplot()
        axes.set_axis_off()
        axes.text(0.5, 0.5, "nothing was measured", ha="center", va="center", transform=axes.transAxes)
    return figure


def _history_panel(axes: Axes, rounds: Sequence[int], lines: Sequence[_Line], noun: str) -> None:
    """Draw the lines of one panel, its axes, its legend and the last value of each line."""
    x = np.array(rounds, dtype=np.float64)
    marker_size = 4.0 if x.size <= 40 else 0.0
    handles = []
    for line in lines:
        style: dict[str, Any] = {"color": line.colour, "linestyle": line.style, "linewidth": 1.8}
        handles += axes.plot(x, line.values, marker="o", markersize=marker_size, **style)
        alone = _isolated(line.values)
        if marker_size == 0.0 and alone.any():
            dots: dict[str, Any] = {"color": line.colour, "linestyle": "", "marker": "o", "markersize": 4}
            axes.plot(x[alone], line.values[alone], zorder=3, **dots)
    _value_axis(axes, lines, noun)
    pad = max(0.5, 0.02 * float(np.ptp(x)))
    axes.set_xlim(x.min() - pad, x.max() + pad)
    whole_ticks(axes.xaxis, 10)
    axes.set_xlabel("round")
    axes.grid(axis="y")
    names = [line.name if np.isfinite(line.values).any() else f"{line.name} (not finite)" for line in lines]
    where: dict[str, Any] = {
        "loc": "lower left",
        "bbox_to_anchor": (-0.01, 1.0),
        "borderaxespad": 0.2,
        "handlelength": 1.8,
    }
    longest = max(len(name) for name in names)
    legend(axes, handles, names, ncols=max(1, min(3, 48 // (longest + 6))), fontsize=9, **where)
    _annotate_last(axes, x, lines)


def _isolated(values: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return which values have a gap on either side, so that no line would show them."""
    known = np.pad(np.isfinite(values), 1)
    alone: NDArray[np.bool_] = known[1:-1] & ~known[:-2] & ~known[2:]
    return alone


def _value_axis(axes: Axes, lines: Sequence[_Line], noun: str) -> None:
    """Scale and name the vertical axis: scores from 0 to 1, losses as they come."""
    known = np.concatenate([line.values[np.isfinite(line.values)] for line in lines])
    if noun == "score":
        axes.set_ylim(-0.02, 1.02)
    elif lines[0].counts:
        most = float(known.max(initial=1.0))
        axes.set_ylim(-0.02 * most, 1.05 * most)
    elif known.size and known.min() > 0 and known.max() / known.min() > 1e3:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda _value, _position: "")
        noun = f"{noun} (logarithmic)"
    axes.set_ylabel(noun)


def _annotate_last(axes: Axes, x: NDArray[np.float64], lines: Sequence[_Line]) -> None:
    """Write each line's last value beside its last point, moved up or down where they would overlap."""
    shown = [line for line in lines if np.isfinite(line.values).any()]
    last = [int(np.flatnonzero(np.isfinite(line.values))[-1]) for line in shown]
    points = [(float(x[at]), float(line.values[at])) for line, at in zip(shown, last, strict=True)]
    data_to_axes = axes.transData + axes.transAxes.inverted()
    places = [tuple(data_to_axes.transform(point).tolist()) for point in points]
    heights = _apart([place[1] for place in places], 0.055)
    for line, point, place, height in zip(shown, points, places, heights, strict=True):
        look: dict[str, Any] = {"color": line.colour, "fontsize": 9, "fontweight": "bold", "va": "center"}
        axes.text(place[0] + 0.018, height, line.text(point[1]), transform=axes.transAxes, **look)


def _apart(heights: Sequence[float], gap: float) -> list[float]:
    """Return ``heights`` in the order given, at least ``gap`` apart and moved as a block where they touch."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    blocks: list[tuple[float, list[int]]] = []  # centre of the block, its members from below
    for i in order:
        centre, members = heights[i], [i]
        while blocks and centre - blocks[-1][0] < gap * (len(members) + len(blocks[-1][1])) / 2:
            below, others = blocks.pop()
            total = len(members) + len(others)
            centre = (centre * len(members) + below * len(others)) / total
            members = others + members
        blocks.append((centre, members))
    moved = [0.0] * len(heights)
    for centre, members in blocks:
        for k, i in enumerate(members):
            moved[i] = centre + gap * (k - (len(members) - 1) / 2)
    return moved
