"""What a server saw of one client: its vector's integers, counted, masked and not."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from fedlearn.charts.canvas import FAINT, INK, empty_figure, plain, style, svg, whole_ticks

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes
    from numpy.typing import NDArray

__all__ = ["draw_masked"]

_COLOURS = ("#0072b2", "#d55e00")
_WITHIN = 1.96  # standard deviations, between which 19 of 20 lie


def draw_masked(histograms: Mapping[str, Sequence[int]], *, bits: int, title: str) -> str:
    """Draw histograms of ``bits``-bit integers above each other, over one axis of values.

    Each has its own axis of counts, and the height that all of its bins would have if it were perfectly even,
    with the band that holds 19 of 20 bins of even noise.

    Guarantees: as the package's.

    Args:
        histograms: by name, how many integers lie in each of equal bins over [-2^(bits-1), 2^(bits-1)); one or two.
        bits: the width of an integer.
        title: drawn on top, and read out by screen readers.

    Returns:
        An SVG element, text.

    Raises:
        ValueError: there are no histograms or more than two, one has no bins, or a count is negative.
        DependencyError: matplotlib is not installed.

    >>> svg = draw_masked({"masked": [5, 6, 5, 4], "plain": [0, 9, 11, 0]}, bits=21, title="round 3")
    >>> svg.startswith("<svg ") and "perfectly even" in svg
    True
    """
    if not 1 <= len(histograms) <= len(_COLOURS):
        raise ValueError(f"{len(histograms)} histograms; one or two can be drawn")
    counts = {name: np.array(each, dtype=np.int64) for name, each in histograms.items()}
    for name, each in counts.items():
        if each.size == 0 or int(each.min()) < 0:
            raise ValueError(f"histogram {name!r} has no bins, or a negative count")
    with style():
        figure = empty_figure((7.2, 1.1 + 2.1 * len(counts)), title)
        panels: list[Axes] = list(figure.subplots(len(counts), 1, sharex=True, squeeze=False)[:, 0])
        for axes, (name, each), colour in zip(panels, counts.items(), _COLOURS, strict=False):
            _panel(axes, each, bits, plain(name, 72), colour)
        panels[-1].set_xlabel(f"value of an integer of {bits} bits")
        return svg(figure, title)


def _panel(axes: Axes, counts: NDArray[np.int64], bits: int, name: str, colour: str) -> None:
    """Draw one histogram, and how high it would be if it were even."""
    half = float(2 ** (bits - 1))
    edges = np.linspace(-half, half, counts.size + 1)
    even = float(counts.sum()) / counts.size
    spread = _WITHIN * math.sqrt(even * (1 - 1 / counts.size))
    axes.axhspan(max(0.0, even - spread), even + spread, color=FAINT, linewidth=0)
    axes.stairs(counts, edges, fill=True, color=colour, linewidth=0)
    axes.axhline(even, color=INK, linewidth=1.2, linestyle="--")
    highest = max(float(counts.max()), even + spread, 1.0)
    axes.set_ylim(0, 1.25 * highest)
    look: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8, "color": INK, "ha": "right"}
    words = f"perfectly even: {even:,.3g} a bin; grey: where 19 of 20 bins of even noise lie"
    place: dict[str, Any] = {"xycoords": "axes fraction", "va": "top"}
    axes.annotate(words, (1.0, 1.0), xytext=(-4, -3), **place, **look)
    axes.set_xlim(-half, half)
    ticks = (-half, -half / 2, 0.0, half / 2, half)
    axes.set_xticks(ticks, [f"{value:,.0f}".replace("-", "\N{MINUS SIGN}") for value in ticks])
    whole_ticks(axes.yaxis, 4)
    axes.set_ylabel("integers a bin")
    axes.set_title(name, loc="left", fontsize=10)
