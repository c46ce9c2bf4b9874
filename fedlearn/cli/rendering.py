"""How results look: numbers for people, tables of two columns, one line of JSON for machines."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import PurePath
from typing import IO, TYPE_CHECKING, Any, Literal, cast

if TYPE_CHECKING:
    from rich.console import Console, Group
    from rich.table import Table

__all__ = [
    "bytes_text",
    "console",
    "count_text",
    "duration_text",
    "echo_json",
    "facts",
    "number_text",
    "table",
    "task_text",
]

_UNITS = ("B", "kB", "MB", "GB", "TB")


def echo_json(body: Mapping[str, Any]) -> None:
    """Write one JSON object on a line of its own on standard output."""
    sys.stdout.write(json.dumps(body, allow_nan=False) + "\n")
    sys.stdout.flush()


def bytes_text(count: float) -> str:
    """Return a number of bytes in the largest unit that leaves at least one before the point.

    >>> bytes_text(38812), bytes_text(812), bytes_text(5_250_000_000)
    ('38.8 kB', '812 B', '5.25 GB')
    """
    size, unit = float(count), 0
    while size >= 999.5 and unit < len(_UNITS) - 1:
        size, unit = size / 1000, unit + 1
    digits = 0 if unit == 0 or size >= 99.95 else 1 if size >= 9.995 else 2
    return f"{size:.{digits}f} {_UNITS[unit]}"


def duration_text(seconds: float) -> str:
    """Return a duration in the two largest units that matter.

    >>> duration_text(0.0421), duration_text(12.34), duration_text(75), duration_text(7260)
    ('0.04 s', '12.3 s', '1 min 15 s', '2 h 1 min')
    """
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours:,} h {minutes} min"


def count_text(number: int, noun: str) -> str:
    """Return a number with its noun.

    >>> count_text(1, "client"), count_text(1200, "client")
    ('1 client', '1,200 clients')
    """
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def number_text(value: float) -> str:
    """Return a metric to four significant places.

    >>> number_text(0.96667), number_text(1234.5678), number_text(0.0000123)
    ('0.9667', '1,235', '1.23e-05')
    """
    if value == 0 or 0.001 <= abs(value) < 10:
        return f"{value:.4f}"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"


def task_text(task: str) -> str:
    """Return a task's name for a title: of a task given by its path only the file's name.

    >>> task_text("digits"), task_text("/home/me/heart-disease/task.py:Heart")
    ('digits', 'task.py:Heart')
    """
    path, colon, attribute = task.rpartition(":") if not task.endswith(".py") else (task, "", "")
    return f"{PurePath(path).name}{colon}{attribute}" if path.endswith(".py") else task


class _Trimmed:
    """A stream on which no line ends in blanks: rich fills its columns up with them."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write whole lines."""
        return self._stream.write(re.sub(r" +(?=\n)", "", text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def console(*, err: bool = False) -> Console:
    """Return a console on standard output, or for progress and chatter on standard error."""
    from rich.console import Console

    stream = sys.stderr if err else sys.stdout
    with suppress(AttributeError, ValueError):  # a terminal without Unicode shows ? instead of failing
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    piped = not err and not stream.isatty()
    file = cast("IO[str]", _Trimmed(stream)) if piped else None
    return Console(stderr=err, file=file, highlight=False, markup=False, emoji=False)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, totals: Sequence[str] = ()) -> Table:
    """Return a table: its first column to the left, numbers to the right, totals below a line."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(
        box=box.SIMPLE if totals else box.SIMPLE_HEAD,
        pad_edge=False,
        header_style="dim",
        padding=(0, 1),
        show_footer=bool(totals),
    )
    for index, name in enumerate(columns):
        footer = Text(totals[index]) if totals else ""
        justify: Literal["left", "right"] = "left" if index == 0 else "right"
        made.add_column(Text(name), justify=justify, no_wrap=index == 0, footer=footer)
    for row in rows:
        made.add_row(*(Text(cell, style="dim" if cell == "·" else "") for cell in row))
    return made


def facts(rows: Sequence[tuple[str, str]], *, title: str, headline: int = 0) -> Group:
    """Return names and values side by side under a title; the first ``headline`` values stand out."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, show_header=False, pad_edge=False, padding=(0, 3, 0, 0))
    made.add_column(style="dim", no_wrap=True)
    made.add_column(overflow="fold")
    for index, (name, value) in enumerate(rows):
        made.add_row(Text(name), Text(value, style="bold green" if index < headline else ""))
    return Group(Text(title, style="bold"), made)  # a title of the table's own would be as narrow as the table
