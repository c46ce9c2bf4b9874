"""The arguments that ``simulate``, ``plan`` and ``partition`` share."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["AsJson", "Overrides", "Source"]

Source = Annotated[
    str | None,
    typer.Argument(
        metavar="[SCENARIO.toml | TASK]",
        help="A scenario file, or a task: a built-in name, package.module:Class, or path/to/my_task.py. "
        "Left out: the digits, 20 clients.",
        show_default=False,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="SECTION.KEY=VALUE",
        help="Change one key of the scenario; may be given again and again.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Write one JSON object as the last line of standard output.")]
