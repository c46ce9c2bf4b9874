"""What a run spent: epsilon over its rounds, and the budget."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from fedlearn.charts.canvas import INK, empty_figure, style, svg, whole_ticks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from numpy.typing import NDArray

__all__ = ["draw_epsilon"]

_SPENT = "#0072b2"
_BUDGET = "#d55e00"


def draw_epsilon(rounds: Sequence[int], epsilons: Sequence[float], *, budget: float | None = None, title: str) -> str:
    """Draw the epsilon spent after each round as steps, and the budget as a line above them.

    From the first round whose epsilon is infinite the picture says so in words; NaN counts as infinite.

    Guarantees: as the package's.

    Args:
        rounds: round numbers, not falling, shape (n,).
        epsilons: what was spent once the round's releases had left, shape (n,).
        budget: what may be spent, or ``None``: there is no limit.
        title: drawn on top, and read out by screen readers.

    Returns:
        An SVG element, text.

    Raises:
        ValueError: there are not as many epsilons as rounds.
        DependencyError: matplotlib is not installed.

    >>> svg = draw_epsilon([1, 2], [0.5, 0.7], budget=8.0, title="digits")
    >>> svg.startswith("<svg ") and "budget 8" in svg
    True
    """
    if len(epsilons) != len(rounds):
        raise ValueError(f"{len(epsilons)} epsilons for {len(rounds)} rounds")
    x = np.array(rounds, dtype=np.float64)
    y = np.array(epsilons, dtype=np.float64)
    with style():
        figure = empty_figure((6.4, 4.2), title)
        _panel(figure.add_subplot(), x, y, budget if budget is not None and math.isfinite(budget) else None)
        return svg(figure, title)


def _panel(axes: Axes, x: NDArray[np.float64], y: NDArray[np.float64], budget: float | None) -> None:
    """Draw the axes and what they hold."""
    known = np.isfinite(y)
    until = int(np.argmin(known)) if not known.all() else x.size  # what comes after infinity is infinite too
    if budget is not None:
        axes.axhline(budget, color=_BUDGET, linewidth=1.4, linestyle="--")
        place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
        axes.annotate(f"budget {budget:g}", (0.0, budget), xytext=(4, 4), color=_BUDGET, fontsize=9, **place)
    if until:
        line: dict[str, Any] = {"color": _SPENT, "linewidth": 1.8, "drawstyle": "steps-post"}
        axes.plot(x[:until], y[:until], marker="o", markersize=3.5 if until <= 60 else 0.0, **line)
        _name_last(axes, float(x[until - 1]), float(y[until - 1]))
    if until < x.size or not x.size:
        words = f"infinite from round {int(x[until]):,}" if x.size else "nothing was released"
        axes.text(0.5, 0.5, words, ha="center", va="center", transform=axes.transAxes, color=INK)
    if x.size:
        pad = max(0.5, 0.03 * float(np.ptp(x)))
        axes.set_xlim(x.min() - pad, x.max() + 3 * pad)
    highest = max([*y[:until].tolist(), budget or 0.0])
    axes.set_ylim(0, 1.12 * highest if highest > 0 else 1.0)
    whole_ticks(axes.xaxis, 10)
    axes.set_xlabel("round")
    axes.set_ylabel("epsilon spent")
    axes.grid(axis="y")


def _name_last(axes: Axes, x: float, y: float) -> None:
    """Write what was spent in all beside the last point."""
    look: dict[str, Any] = {"color": _SPENT, "fontsize": 9, "fontweight": "bold", "va": "top"}
    axes.annotate(f"{y:.3g}", (x, y), xytext=(6, -3), textcoords="offset points", **look)
