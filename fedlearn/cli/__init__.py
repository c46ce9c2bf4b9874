"""The command line: one verb a file, each imported when it is typed and not before.

Exit codes: 0 done · 1 the run failed or a check says no · 2 the arguments or the configuration are wrong ·
3 something needed is missing or unreadable · 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from importlib import import_module
from typing import Any

import click
import typer
from typer.core import TyperGroup

from fedlearn import __version__
from fedlearn.errors import FedlearnError, nearest

__all__ = ["VERBS", "StoppedError", "main"]

VERBS = {
    "simulate": "Train on many simulated clients on this machine.",
    "plan": "Say what a run will cost, without running it.",
    "partition": "Show who would hold what.",
    "predict": "Use a run's model on data.",
    "export": "Write a run's model as ONNX, PT2 or safetensors.",
    "privacy": "Compute epsilon from a ledger or from numbers; find the noise for an epsilon; show a ledger.",
    "secagg": "Show what the server saw under secure aggregation; make keys, and the list of who may take part.",
    "tasks": "List the built-in learning problems.",
    "init": "Write a task of your own to start from.",
    "doctor": "Check this machine, with the next step for whatever is amiss.",
}
"""Verb → what it does. Its module, ``fedlearn.cli.<verb>``, has a function ``run``, or several in ``SUB_VERBS``."""


class StoppedError(FedlearnError):
    """Someone pressed Ctrl-C; the message says how to go on."""

    exit_code = 130


class _LazyGroup(TyperGroup):
    """Lists every verb from the table above and imports only the one that is called."""

    _listing = False

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the verbs in the table's order."""
        del ctx
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return one verb; while help is written, a stub with its line of help."""
        del ctx
        if cmd_name not in VERBS:
            return None
        if self._listing:
            return click.Command(cmd_name, help=VERBS[cmd_name])
        module = import_module(f"fedlearn.cli.{cmd_name}")
        parts = getattr(module, "SUB_VERBS", None)
        verb = typer.Typer(add_completion=False, help=VERBS[cmd_name], no_args_is_help=parts is not None)
        for name, function in (parts or {cmd_name: module.run}).items():
            verb.command(name)(function)
        return typer.main.get_command(verb)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the verb that is called; one that does not exist is refused with the nearest that does."""
        if args and args[0] not in VERBS and not args[0].startswith("-"):
            hint = nearest(args[0], VERBS)
            suggestion = f" Did you mean {hint!r}?" if hint else ""
            ctx.fail(f"there is no verb {args[0]!r}.{suggestion} The verbs are: {', '.join(VERBS)}")
        return super().resolve_command(ctx, args)

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of verbs without importing one."""
        self._listing = True
        super().format_help(ctx, formatter)


_app = typer.Typer(cls=_LazyGroup, add_completion=False, no_args_is_help=True)


def _show_version(wanted: bool) -> None:
    """Print the version, before a verb is asked for."""
    if wanted:
        typer.echo(f"fedlearn {__version__}")
        raise typer.Exit


@_app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", help="Print the version and stop.", is_eager=True, callback=_show_version
    ),
) -> None:
    """Train one model on data that stays where it is: simulate it, deploy it, show what it revealed."""
    del version


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit; every error becomes a sentence and an exit code, never a traceback of ours."""
    _open_streams()
    words = sys.argv[1:] if arguments is None else arguments
    as_json = "--json" in words
    code = 0
    try:
        code = int(typer.main.get_command(_app).main(words, prog_name="fedlearn", standalone_mode=False) or 0)
        sys.stdout.flush()  # a full disk shows here, while it can still be said
    except FedlearnError as error:
        message = ". ".join(str(part).rstrip(".") for part in (error, *getattr(error, "__notes__", ())))
        _report(type(error).__name__, message, as_json)
        code = error.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        code = 2
    except click.UsageError as error:
        _report("UsageError", error.format_message(), as_json)
        code = 2
    except (click.Abort, KeyboardInterrupt):
        _report("StoppedError", "stopped; what was finished is kept (simulate --resume goes on)", as_json)
        code = 130
    except OSError as error:  # mostly of standard output: closed, or on a full disk
        with suppress(OSError):
            if not isinstance(error, BrokenPipeError):  # else the reader left, and knows
                _report(type(error).__name__, str(error), as_json)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # flushing at the end must not fail again
        code = 1
    sys.exit(code)


def _open_streams() -> None:
    """Give a program started with a closed standard stream somewhere to write to."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115, PTH123
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115, PTH123


def _report(kind: str, message: str, as_json: bool) -> None:
    """Say what went wrong: a sentence on standard error, and for machines one JSON object on standard output."""
    label = click.style("Error", fg="red", bold=True)
    click.echo(f"{label}  {message}", err=True)
    if as_json:
        body: dict[str, Any] = {"error": {"kind": kind, "message": message}}
        click.echo(json.dumps(body))
