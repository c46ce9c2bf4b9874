"""The page that every picture is drawn on: its settings, its SVG, its text."""

from __future__ import annotations

import io
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unicodedata import category
from xml.sax.saxutils import escape

from fedlearn.errors import DependencyError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

__all__ = ["FAINT", "INK", "empty_figure", "legend", "plain", "style", "svg", "whole_ticks"]

INK = "#222222"
FAINT = "#d9d9d9"

_STYLE: Any = {  # a dict; matplotlib types each key, and not the same ones in every version
    "axes.axisbelow": True,
    "axes.edgecolor": "#888888",
    "axes.facecolor": "white",
    "axes.grid": False,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "figure.facecolor": "white",
    "font.family": ["sans-serif"],
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Helvetica", "Arial"],
    "font.size": 10.0,
    "grid.color": FAINT,
    "hatch.linewidth": 0.8,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "fedlearn",
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": "#888888",
    "xtick.labelcolor": INK,
    "ytick.color": "#888888",
    "ytick.labelcolor": INK,
}


@contextmanager
def style() -> Iterator[None]:
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


def svg(figure: Figure, title: str) -> str:
    """Return the figure as an SVG element with an accessible title, without prolog or metadata."""
    out = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(out, format="svg", metadata=nothing)
    text = out.getvalue()
    start = text.index("<svg ")
    end = text.index(">", start)
    name = escape(plain(title, 500))
    return f'{text[start:end]} role="img">\n <title>{name}</title>{text[end + 1 :]}'


def plain(text: str, most: int) -> str:
    """Return ``text`` on one line, without characters that XML forbids, at most ``most`` characters."""
    line = " ".join(str(text).split())
    kept = "".join("\ufffd" if c in "\ufffe\uffff" or category(c) in {"Cc", "Cs"} else c for c in line)
    return kept if len(kept) <= most else kept[: most - 1] + "…"


def empty_figure(size_in: tuple[float, float], title: str) -> Figure:
    """Return an empty figure of ``size_in`` inches with its title on top, flush left."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1, wspace=0.04, hspace=0.04)
    figure = Figure(figsize=size_in, layout=layout)
    most = int(size_in[0] * 9)
    figure.suptitle(plain(title, most), x=0.012, ha="left", fontsize=13, fontweight="bold")
    return figure


def legend(owner: Figure | Axes, handles: Sequence[Any], names: Sequence[str], **where: Any) -> None:
    """Add a legend whose names are literal: matplotlib would hide one that starts with an underscore."""
    legend = owner.legend(handles, [str(i) for i in range(len(names))], **where)
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_text(name)


def whole_ticks(axis: Axis, most: int) -> None:
    """Put at most about ``most`` ticks at round whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=most, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    axis.set_major_formatter(lambda value, _: f"{value:,.0f}")
