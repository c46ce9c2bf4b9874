"""Who held what: labels by client."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from fedlearn.charts.canvas import empty_figure, legend, plain, style, svg, whole_ticks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.figure import Figure
    from matplotlib.path import Path
    from numpy.typing import NDArray

__all__ = ["draw_partition"]

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


def draw_partition(
    counts: NDArray[np.int64], label_names: Sequence[str], *, title: str, clients: Sequence[int] | None = None
) -> str:
    """Draw how many examples of each label each client holds.

    Up to 60 clients and 30 labels: one bar a client, cut by label. Beyond that: a heat map of every
    client's mix of labels, clients ordered by the label they hold most of, over a picture of the sizes in
    descending order; above 240 clients, neighbours share a column, which shows their mean.

    Guarantees: as the module's.

    Args:
        counts: shape (clients, labels), not negative.
        label_names: one name a label.
        title: drawn on top, and read out by screen readers.
        clients: the number of each row's client; ``None``: the rows are clients 0, 1, ….

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
    names = [plain(name, 24) for name in label_names]
    with style():
        few = counts.shape[0] <= _MOST_BARS and counts.shape[1] <= _MOST_FILLS
        if not few:
            return svg(_map_figure(counts, names, title), title)
        return svg(_bars_figure(counts, names, title, clients or range(counts.shape[0])), title)


def _bars_figure(counts: NDArray[np.int64], names: Sequence[str], title: str, shown: Sequence[int]) -> Figure:
    """Return one bar a client, cut by label, with the client's total at its end."""
    from matplotlib.patches import Patch, PathPatch

    clients, labels = counts.shape
    height = max(2.2, 1.3 + 0.21 * max(clients, labels + 2))
    figure = empty_figure((9.0, height), title)
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
    whole_ticks(axes.xaxis, 8)
    axes.set_yticks(range(clients), [str(client) for client in shown], fontsize=8)
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
    legend(figure, patches, names, fontsize=9, **where)
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
    figure = empty_figure((9.0, top + 3.3), title)
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
    sizes.fill_between(x, y, step="mid", color="#0072b2", linewidth=0)
    sizes.set_ylim(0, 1.08 * max(1.0, float(totals[0])))
    whole_ticks(sizes.yaxis, 5)
    sizes.set_xlabel("clients, ordered by size")
    sizes.set_ylabel("examples")
    sizes.grid(axis="y")
    middle = f"largest {totals[0]:,}   median {np.median(totals):,.0f}   smallest {totals[-1]:,}"
    sizes.set_title(middle, loc="right", fontsize=9)
    for axes in (mix, sizes):
        axes.set_xlim(0, clients)
        whole_ticks(axes.xaxis, 8)
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
