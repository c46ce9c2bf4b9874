"""Pictures of a run, as SVG text: how it learned, and who held what.

Guarantees, for every picture: the same arguments give the same bytes; nothing outside the file is
referred to, so it may be put into a page as it is; names are drawn as they are spelled, never as markup
or mathematics; pyplot and its global state are left alone; the background is white.
"""

from __future__ import annotations

import io
import math
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unicodedata import category
from xml.sax.saxutils import escape

import numpy as np

from fedlearn.errors import DependencyError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.path import Path
    from numpy.typing import NDArray

__all__ = ["draw_history", "draw_partition"]

# Okabe and Ito's eight, black last and the yellow darkened to be seen on white.
# "Color Universal Design", 2008, https://jfly.uni-koeln.de/color/
_LINE_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#b5a600", "#000000")
_LINE_STYLES = ("-", "--", ":", "-.")

# Paul Tol's "muted" set and its grey, reordered so that neighbours differ in lightness too.
# "Colour Schemes", SRON/EPS/TN/09-002, 2021.
_FILL_COLOURS = (
    "#332288",
    "#88ccee",
    "#117733",
    "#ddcc77",
    "#cc6677",
    "#882255",
    "#44aa99",
    "#999933",
    "#aa4499",
    "#cccccc",
)
_MAP_COLOURS = ("#ffffff", "#b3d4ea", "#0072b2", "#062a4d")  # one hue, evenly darker
_HATCHES = ("", "////", "xxxx")  # one more for every ten labels; dots would weigh a megabyte of SVG

_MOST_BARS = 60  # clients drawn one by one
_MOST_FILLS = len(_FILL_COLOURS) * len(_HATCHES)
_MOST_COLUMNS = 240  # of the heat map; more clients share a column
_MOST_LABEL_TICKS = 40
_LOSS_WORDS = ("loss", "error", "mse", "mae", "nll", "entropy", "perplexity", "deviance")
_INK = "#222222"
_FAINT = "#d9d9d9"

_STYLE: Any = {  # a dict; matplotlib types each key, and not the same ones in every version
    "axes.axisbelow": True,
    "axes.edgecolor": "#888888",
    "axes.facecolor": "white",
    "axes.grid": False,
    "axes.labelcolor": _INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": _INK,
    "figure.facecolor": "white",
    "font.family": ["sans-serif"],
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Helvetica", "Arial"],
    "font.size": 10.0,
    "grid.color": _FAINT,
    "hatch.linewidth": 0.8,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "fedlearn",
    "text.color": _INK,
    "text.parse_math": False,
    "xtick.color": "#888888",
    "xtick.labelcolor": _INK,
    "ytick.color": "#888888",
    "ytick.labelcolor": _INK,
}


@dataclass(frozen=True)
class _Line:
    """One series: its name, its values with NaN for gaps, and how it is drawn."""

    name: str
    values: NDArray[np.float64]
    colour: str
    style: str

    @property
    def is_loss(self) -> bool:
        """Whether it belongs with the losses: by its name, or because it leaves [0, 1]."""
        words = self.name.lower()
        known = self.values[np.isfinite(self.values)]
        return any(word in words for word in _LOSS_WORDS) or bool(np.any((known < 0) | (known > 1)))


def draw_history(rounds: Sequence[int], series: Mapping[str, Sequence[float | None]], *, title: str) -> str:
    """Draw what was measured, round by round.

    Losses (by name, or any series that leaves [0, 1]) share one panel and scores in [0, 1] the other; a
    panel without series is left out. ``None``, NaN and infinity are gaps; a series that is ``None``
    throughout is left out, and one without any finite value is named in the legend as not finite. Losses
    that span more than three orders of magnitude are drawn on a logarithmic axis.

    Guarantees: as the module's.

    Args:
        rounds: round numbers, shape (n,).
        series: by name, one value a round, shape (n,).
        title: drawn on top, and read out by screen readers.

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
    with _style():
        return _svg(_history_figure(rounds, lines, title), title)


def draw_partition(counts: NDArray[np.int64], label_names: Sequence[str], *, title: str) -> str:
    """Draw how many examples of each label each client holds.

    Up to 60 clients and 30 labels: one bar a client, cut by label. Beyond that: a heat map of every
    client's mix of labels, clients ordered by the label they hold most of, over a picture of the sizes in
    descending order; above 240 clients, neighbours share a column, which shows their mean.

    Guarantees: as the module's.

    Args:
        counts: shape (clients, labels), not negative.
        label_names: one name a label.
        title: drawn on top, and read out by screen readers.

    Returns:
        An SVG element, text.

    Raises:
        ValueError: ``counts`` is not a table of at least one client and one label, holds a negative
            number, or there are not as many names as labels.
        DependencyError: matplotlib is not installed.

    >>> svg = draw_partition(np.array([[3, 1], [0, 2]]), ["cat", "dog"], title="who holds what")
    >>> svg.startswith("<svg ") and "cat" in svg
    True
    """
    if counts.ndim != 2 or counts.size == 0:
        raise ValueError(f"counts has shape {counts.shape}; (clients, labels) is needed")
    if counts.shape[1] != len(label_names):
        raise ValueError(f"{counts.shape[1]} labels but {len(label_names)} names")
    if int(counts.min()) < 0:
        raise ValueError("counts holds a negative number")
    names = [_plain(name, 24) for name in label_names]
    with _style():
        few = counts.shape[0] <= _MOST_BARS and counts.shape[1] <= _MOST_FILLS
        return _svg((_bars_figure if few else _map_figure)(counts, names, title), title)


@contextmanager
def _style() -> Iterator[None]:
    """Draw with this module's settings alone, whatever the user's matplotlibrc says."""
    try:
        import matplotlib
    except ImportError as error:
        raise DependencyError("matplotlib", "simulation", "drawing a picture of the run") from error
    with matplotlib.rc_context(), warnings.catch_warnings():
        # The viewer's fonts draw what DejaVu Sans, which only measures here, has no glyph for.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def _svg(figure: Figure, title: str) -> str:
    """Return the figure as an SVG element with an accessible title, without prolog or metadata."""
    out = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(out, format="svg", metadata=nothing)
    text = out.getvalue()
    start = text.index("<svg ")
    end = text.index(">", start)
    name = escape(_plain(title, 500))
    return f'{text[start:end]} role="img">\n <title>{name}</title>{text[end + 1 :]}'


def _plain(text: str, most: int) -> str:
    """Return ``text`` on one line, without characters that XML forbids, at most ``most`` characters."""
    line = " ".join(str(text).split())
    kept = "".join("\ufffd" if c in "\ufffe\uffff" or category(c) in {"Cc", "Cs"} else c for c in line)
    return kept if len(kept) <= most else kept[: most - 1] + "…"


def _figure(size_in: tuple[float, float], title: str) -> Figure:
    """Return an empty figure of ``size_in`` inches with its title on top, flush left."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1, wspace=0.04, hspace=0.04)
    figure = Figure(figsize=size_in, layout=layout)
    most = int(size_in[0] * 9)
    figure.suptitle(_plain(title, most), x=0.012, ha="left", fontsize=13, fontweight="bold")
    return figure


def _legend(owner: Figure | Axes, handles: Sequence[Any], names: Sequence[str], **where: Any) -> None:
    """Add a legend whose names are literal: matplotlib would hide one that starts with an underscore."""
    legend = owner.legend(handles, [str(i) for i in range(len(names))], **where)
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_text(name)


def _whole_ticks(axis: Axis, most: int) -> None:
    """Put at most about ``most`` ticks at round whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=most, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    axis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def _lines(rounds: Sequence[int], series: Mapping[str, Sequence[float | None]]) -> list[_Line]:
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
        lines.append(_Line(_plain(name, 28), gaps, _LINE_COLOURS[colour], style))
    return lines


def _history_figure(rounds: Sequence[int], lines: Sequence[_Line], title: str) -> Figure:
    """Return the panels side by side, losses left and scores right."""
    losses = [line for line in lines if line.is_loss]
    scores = [line for line in lines if not line.is_loss]
    panels = [(noun, some) for noun, some in (("loss", losses), ("score", scores)) if some]
    figure = _figure((10.0 if len(panels) == 2 else 6.4, 4.2), title)
    for place, (noun, some) in enumerate(panels, start=1):
        _history_panel(figure.add_subplot(1, len(panels), place), rounds, some, noun)
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
    _whole_ticks(axes.xaxis, 10)
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
    _legend(axes, handles, names, ncols=max(1, min(3, 48 // (longest + 6))), fontsize=9, **where)
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
        value = f"{point[1]:.3f}" if 0.01 <= abs(point[1]) < 10 or not line.is_loss else f"{point[1]:.4g}"
        look: dict[str, Any] = {"color": line.colour, "fontsize": 9, "fontweight": "bold", "va": "center"}
        axes.text(place[0] + 0.018, height, value, transform=axes.transAxes, **look)


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


def _bars_figure(counts: NDArray[np.int64], names: Sequence[str], title: str) -> Figure:
    """Return one bar a client, cut by label, with the client's total at its end."""
    from matplotlib.patches import Patch, PathPatch

    clients, labels = counts.shape
    height = max(2.2, 1.3 + 0.21 * max(clients, labels + 2))
    figure = _figure((9.0, height), title)
    axes = figure.add_subplot()
    left = np.cumsum(counts, axis=1) - counts
    patches = []
    for label in range(labels):
        cycle, colour = divmod(label, len(_FILL_COLOURS))
        look: dict[str, Any] = {
            "facecolor": _FILL_COLOURS[colour],
            "edgecolor": "white",
            "hatch": _HATCHES[cycle],
        }
        # One path a label, not one a bar: half as much SVG.
        axes.add_patch(PathPatch(_bars(left[:, label], counts[:, label]), linewidth=0.4, **look))
        patches.append(Patch(linewidth=0.4, **look))
    totals = counts.sum(axis=1)
    for row, total in enumerate(totals.tolist()):
        place: dict[str, Any] = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(f"{total:,}", (total, row), fontsize=8, color="#555555", **place)
    axes.set_xlim(0, max(1.0, 1.09 * float(totals.max())))
    axes.set_ylim(clients - 0.4, -0.6)
    _whole_ticks(axes.xaxis, 8)
    axes.set_yticks(range(clients), [str(client) for client in range(clients)], fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("examples")
    axes.set_ylabel("client")
    axes.grid(axis="x")
    where: dict[str, Any] = {
        "loc": "outside right upper",
        "title": "label",
        "alignment": "left",
        "handleheight": 1.0,
    }
    _legend(figure, patches, names, fontsize=9, **where)
    return figure


def _bars(left: NDArray[np.int64], length: NDArray[np.int64]) -> Path:
    """Return horizontal bars, the i-th from ``left[i]`` at height i, as one path; empty ones left out."""
    from matplotlib.path import Path

    row = np.flatnonzero(length)
    x0, x1 = left[row], left[row] + length[row]
    y0, y1 = row - 0.41, row + 0.41
    corners = np.stack([(x0, y0), (x1, y0), (x1, y1), (x0, y1), (x0, y0)], axis=0)
    codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY]
    return Path(corners.transpose(2, 0, 1).reshape(-1, 2), codes * row.size)


def _map_figure(counts: NDArray[np.int64], names: Sequence[str], title: str) -> Figure:
    """Return every client's mix of labels as a heat map, over the sizes in descending order."""
    from matplotlib.colors import LinearSegmentedColormap

    clients, labels = counts.shape
    top = min(7.0, max(2.4, 0.24 * labels))
    figure = _figure((9.0, top + 3.3), title)
    mix, sizes = figure.subplots(2, 1, height_ratios=[top, 1.6])
    image = mix.imshow(
        _columns(_shares(counts)).T,
        aspect="auto",
        cmap=LinearSegmentedColormap.from_list("share", _MAP_COLOURS),
        extent=(0.0, float(clients), labels - 0.5, -0.5),
        interpolation="none",
        vmin=0.0,
        vmax=1.0,
    )
    bar = figure.colorbar(image, ax=mix, pad=0.015, fraction=0.04, aspect=18, ticks=[0, 0.25, 0.5, 0.75, 1])
    bar.set_label("share of the client's examples")
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    step = math.ceil(labels / _MOST_LABEL_TICKS)
    mix.set_yticks(range(0, labels, step), names[::step], fontsize=8 if labels > 20 else 9)
    shared = math.ceil(clients / _MOST_COLUMNS)
    note = f"; about {shared:,} clients a column, their mean" if shared > 1 else ""
    mix.set_xlabel(f"clients, ordered by the label they hold most of{note}")
    mix.set_ylabel("label")
    mix.spines[["top", "right"]].set_visible(True)
    totals = np.sort(counts.sum(axis=1))[::-1]
    at = np.unique(np.linspace(0, clients - 1, num=min(clients, 600)).astype(np.int64))
    x = np.concatenate([[0.0], at + 0.5, [float(clients)]])
    y = totals[np.concatenate([[0], at, [clients - 1]])]
    sizes.fill_between(x, y, step="mid", color=_LINE_COLOURS[0], linewidth=0)
    sizes.set_ylim(0, 1.08 * max(1.0, float(totals[0])))
    _whole_ticks(sizes.yaxis, 5)
    sizes.set_xlabel("clients, ordered by size")
    sizes.set_ylabel("examples")
    sizes.grid(axis="y")
    middle = f"largest {totals[0]:,}   median {np.median(totals):,.0f}   smallest {totals[-1]:,}"
    sizes.set_title(middle, loc="right", fontsize=9)
    for axes in (mix, sizes):
        axes.set_xlim(0, clients)
        _whole_ticks(axes.xaxis, 8)
    return figure


def _shares(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return each client's mix of labels, ordered by the label it holds most of, purest first."""
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    most = counts.argmax(axis=1)
    order = np.lexsort((-share.max(axis=1), most))
    ordered: NDArray[np.float64] = share[order]
    return ordered


def _columns(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return at most ``_MOST_COLUMNS`` rows, each the mean of as many neighbours as the next, or one more."""
    if len(rows) <= _MOST_COLUMNS:
        return rows
    starts = np.arange(_MOST_COLUMNS) * len(rows) // _MOST_COLUMNS
    widths = np.diff(starts, append=len(rows))
    means: NDArray[np.float64] = np.add.reduceat(rows, starts, axis=0) / widths[:, None]
    return means
