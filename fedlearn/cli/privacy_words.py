"""What the verbs of ``fedlearn privacy`` have in common: their options, and how they say what an epsilon is worth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import click
import typer

if TYPE_CHECKING:
    from fedlearn.cli.ledgers import CheckedLedger
    from fedlearn.privacy.releases import Release, Unit

__all__ = [
    "DeltaOption",
    "UnitOption",
    "epsilon_shown",
    "epsilon_told",
    "promised",
    "say_facts",
    "say_files",
    "unit_named",
    "warn_of_seeds",
]

_SIMULATED = "SIMULATED: the noise came from a seed: nobody is protected; this is what a real run would have spent"
_HIDDEN = {
    "client": "each client, with all that it holds",
    "example": "each example of a client",
    "none": "nobody: there is no noise to hide anybody",
}

DeltaOption = Annotated[
    float | None,
    typer.Option(help="Probability with which the promise may fail. Left out: the ledger's.", show_default=False),
]
UnitOption = Annotated[
    str | None,
    typer.Option(
        click_type=click.Choice(["client", "example"]),
        help="Whose presence is hidden. Left out: what the ledgers promise.",
        show_default=False,
    ),
]


def unit_named(name: str | None) -> Unit:
    """Return a unit by its name; left out, the client."""
    units: dict[str | None, Unit] = {None: "client", "client": "client", "example": "example", "none": "none"}
    return units[name]


def promised(delta: float, unit: Unit) -> list[tuple[str, str]]:
    """Return what an epsilon means nothing without."""
    if unit == "none":
        return [("hides", _HIDDEN[unit])]
    return [("delta", f"{delta:.3g}"), ("hides", f"{_HIDDEN[unit]} (unit {unit})")]


def say_files(ledgers: Sequence[CheckedLedger]) -> None:
    """Write a line on each ledger: that its chain holds, how far, and whether it ends there."""
    from fedlearn.cli.rendering import console

    for each in ledgers:
        head = each.head
        console().print(
            f"{each.path}: the chain holds, {head.count:,} lines, head {head.sha256[:16]}…, {each.state}",
            soft_wrap=True,
        )


def say_facts(rows: Sequence[tuple[str, str]], *, title: str, headline: int) -> None:
    """Write names and values."""
    from fedlearn.cli.rendering import console, facts

    console().print(facts(rows, title=f"\n{title}", headline=headline))


def warn_of_seeds(releases: Sequence[Release]) -> None:
    """Say what makes the figures no promise to anybody."""
    from fedlearn.cli.rendering import console

    if any(each.simulated for each in releases):
        console().print(f"\n{_SIMULATED}", style="bold red", soft_wrap=True)


def epsilon_shown(value: float) -> str:
    """Return an epsilon for people."""
    if math.isinf(value):
        return "infinite"
    return f"{value:.4g}" if value < 1000 else f"{value:,.0f}"


def epsilon_told(value: float) -> float | str:
    """Return an epsilon for machines: JSON has no infinity."""
    return value if math.isfinite(value) else "inf"
