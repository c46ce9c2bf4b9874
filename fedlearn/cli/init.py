"""``fedlearn init``: a task of one's own to start from."""

from __future__ import annotations

import shlex
import sys
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

from fedlearn.errors import MissingError, UsageError
from fedlearn.files import write_atomic

__all__ = ["run"]

_TEMPLATE = "my_task.py"
# A task's folder comes first on sys.path while it is imported: a file of such a name would hide the package.
_TAKEN = frozenset({*sys.stdlib_module_names, "fedlearn", "flwr", "numpy", "sklearn", "torch"})


def run(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="The file to write, such as my_task.py.", show_default=False),
    ],
    force: Annotated[bool, typer.Option("--force", help="Write over the file if there is one.")] = False,
) -> None:
    """Write a task of your own to start from: one file that trains as it is."""
    if file.suffix != ".py" or not file.stem:
        raise UsageError(f"{file}: a task is a Python file; name it {file.with_suffix('.py').name or 'my_task.py'}")
    if file.stem in _TAKEN:
        raise UsageError(
            f"{file}: a file of that name would hide Python's own {file.stem!r}; call it {file.stem}_task.py"
        )
    if not file.parent.is_dir():
        raise MissingError(f"there is no folder {file.parent}; make it first: mkdir -p {shlex.quote(str(file.parent))}")
    if file.is_dir():
        raise UsageError(f"{file} is a folder; name a file in it")
    if file.exists() and not force:
        raise UsageError(f"{file} exists already; choose another name, or write over it with --force")
    text = files("fedlearn.cli").joinpath("templates", _TEMPLATE).read_text(encoding="utf-8")
    write_atomic(file, text.replace(_TEMPLATE, shlex.quote(file.name)).encode())
    _show(file)


def _show(file: Path) -> None:
    """Say what was written and what to type next."""
    from fedlearn.cli.rendering import console

    name, stdout = shlex.quote(str(file)), console()
    stdout.print(f"\nWrote {file}: a task on made-up data, every part commented.", soft_wrap=True)
    stdout.print("\nNext", style="bold")
    for command, purpose in (
        (f"fedlearn simulate {name}", "train it as it is"),
        (f"fedlearn partition {name}", "see who would hold what"),
        (
            f"fedlearn simulate {name} --set data.partition=natural --set federation.clients=8",
            "a client a hospital",
        ),
    ):
        stdout.print(f"  {command}  [dim]# {purpose}[/dim]", soft_wrap=True, markup=True)
