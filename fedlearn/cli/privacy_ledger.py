"""``fedlearn privacy show``: a ledger to look at."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedlearn.cli.arguments import AsJson
from fedlearn.cli.ledgers import CheckedLedger, delta_of, open_ledgers, unit_of
from fedlearn.cli.privacy_words import (
    DeltaOption,
    UnitOption,
    epsilon_shown,
    epsilon_told,
    promised,
    say_facts,
    say_files,
    unit_named,
    warn_of_seeds,
)
from fedlearn.errors import MissingError, UsageError

if TYPE_CHECKING:
    from fedlearn.privacy.releases import Release, Unit

__all__ = ["show"]

_POINTS = 40
_BARS = "▁▂▃▄▅▆▇█"
_POLICY = (
    *("task", "trust", "mechanism", "target-epsilon", "max-epsilon", "population", "rounds", "sampling", "rate"),
    *("noise-multiplier", "bound-l2", "config-sha256"),
)


def show(
    ledger: Annotated[
        Path, typer.Argument(metavar="LEDGER", help="A ledger.jsonl or a run's folder.", show_default=False)
    ],
    picture: Annotated[
        Path | None,
        typer.Option(metavar="FILE.svg", help="Draw epsilon over the rounds into this file.", show_default=False),
    ] = None,
    delta: DeltaOption = None,
    unit: UnitOption = None,
    as_json: AsJson = False,
) -> None:
    """Check a ledger and show what it promises, what was released, and epsilon over the rounds."""
    if picture is not None:
        _check_picture(picture)
    (opened,) = open_ledgers([ledger])
    releases, whose = opened.releases, unit_named(unit or unit_of([opened]))
    chosen = delta_of([opened], delta)
    counts = _spread(len(releases))
    spent = _curve(releases, counts, chosen, whose)
    if picture is not None:
        _draw(opened, [releases[count - 1] for count in counts], spent, picture)
    if as_json:
        _tell_ledger(opened, chosen, whose, counts, spent, picture)
    else:
        _show_ledger(opened, chosen, whose, counts, spent, picture)


def _check_picture(picture: Path) -> None:
    """Refuse a picture that cannot be written, before epsilon is computed."""
    if picture.suffix.lower() != ".svg":
        raise UsageError(f"--picture {picture}: the picture is an SVG; give it a name that ends in .svg")
    if not picture.parent.is_dir():
        raise MissingError(f"--picture {picture}: there is no folder {picture.parent}")


def _spread(count: int) -> list[int]:
    """Return ``count`` and evenly spaced numbers below it, at most ``_POINTS`` in all, ascending."""
    return list(range(count, 0, -max(1, math.ceil(count / _POINTS))))[::-1]


def _curve(releases: Sequence[Release], counts: Sequence[int], delta: float, unit: Unit) -> list[float]:
    """Return epsilon after so many releases: quick bounds, and the fine figure at the end."""
    from fedlearn.privacy.accounting import epsilon as compute
    from fedlearn.privacy.accounting import epsilon_by_release

    if not counts:
        return []
    quick = epsilon_by_release(releases, delta, unit=unit, after=counts[:-1])
    last = compute(releases, delta, unit=unit)
    return [*(min(each, last) for each in quick), last]  # earlier is never more: a bound of all is one of a part


def _show_ledger(
    ledger: CheckedLedger,
    delta: float,
    unit: Unit,
    counts: Sequence[int],
    spent: Sequence[float],
    picture: Path | None,
) -> None:
    """Write the check, the policy, the releases and how epsilon grew."""
    from fedlearn.cli.rendering import console, table

    releases, stdout = ledger.releases, console()
    say_files([ledger])
    say_facts([*_policy(ledger), *promised(delta, unit)], title="What was promised", headline=0)
    columns = ["round", "what", "mechanism", "noise multiplier", "drawn", "epsilon so far"]
    stdout.print(table(columns, [_row(releases[n - 1], e) for n, e in zip(counts, spent, strict=True)]))
    if len(counts) < len(releases):
        stdout.print(f"{len(counts)} of {len(releases):,} releases", style="dim")
    stdout.print(_growth(spent, _budget(ledger)), soft_wrap=True)
    if ledger.clients:
        said = "Infinite is what the server adds: nothing. The noise is the clients' own, each in its ledger under"
        stdout.print(f"{said} {ledger.path.with_name('clients')}: fedlearn privacy epsilon {ledger.path.parent}")
        warn_of_seeds([each for client in ledger.open_clients() for each in client.releases])
    if picture is not None:
        stdout.print(f"Picture: {picture}", soft_wrap=True)
    warn_of_seeds(releases)


def _tell_ledger(
    ledger: CheckedLedger,
    delta: float,
    unit: Unit,
    counts: Sequence[int],
    spent: Sequence[float],
    picture: Path | None,
) -> None:
    """Write the same for machines."""
    from fedlearn.cli.rendering import echo_json

    releases = ledger.releases
    shown = [
        {**releases[count - 1].to_body(), "release": count, "epsilon": epsilon_told(value)}
        for count, value in zip(counts, spent, strict=True)
    ]
    body: dict[str, Any] = {"epsilon": epsilon_told(spent[-1] if spent else 0.0), "delta": delta, "unit": unit}
    body |= {"simulated": any(each.simulated for each in releases), "policy": dict(ledger.policy)}
    body |= {"ledger": ledger.to_json(), "releases": shown}
    echo_json({**body, "picture": None if picture is None else str(picture.resolve())})


def _draw(ledger: CheckedLedger, releases: Sequence[Release], spent: Sequence[float], picture: Path) -> None:
    """Write the picture."""
    from fedlearn.charts import draw_epsilon
    from fedlearn.files import write_atomic

    simulated = ", simulated" if any(each.simulated for each in releases) else ""
    title = f"{ledger.policy.get('task', ledger.path.name)}: epsilon spent{simulated}"
    rounds = [each.round_number for each in releases]
    write_atomic(picture, draw_epsilon(rounds, spent, budget=_budget(ledger), title=title).encode())


def _row(release: Release, spent: float) -> list[str]:
    """Return a release as a row of the table."""
    sampling, queries = release.sampling, release.queries
    known = all(each.sensitivity_l2 > 0 for each in queries)
    noise = f"{release.noise_multiplier:.4g}" if queries and known else "none"
    drawn = f"{sampling.method} {sampling.rate:.3g}" if sampling.rate != 1 else sampling.method
    steps = f" × {release.steps:,}" if release.steps != 1 else ""
    return [f"{release.round_number}", release.what, release.mechanism + steps, noise, drawn, epsilon_shown(spent)]


def _growth(spent: Sequence[float], budget: float | None) -> str:
    """Return how epsilon grew, as bars as high as the share of the budget, or of the last value."""
    if not spent:
        return "Nothing was released: epsilon 0"
    of_budget = f" of {budget:g}" if budget is not None else ""
    top = budget if budget is not None else max((each for each in spent if math.isfinite(each)), default=1.0)
    bars = "".join(_BARS[min(7, int(8 * each / top))] if math.isfinite(each) and top > 0 else "!" for each in spent)
    return f"epsilon {bars} {epsilon_shown(spent[-1])}{of_budget}"


def _policy(ledger: CheckedLedger) -> list[tuple[str, str]]:
    """Return what the run promised, name by name, in the policy's own words."""
    rows = [(name.replace("-", " "), str(ledger.policy[name])) for name in _POLICY if name in ledger.policy]
    from fedlearn.cli.promise import SERVER_SEES

    secagg = ledger.policy.get("secagg")
    if isinstance(secagg, dict):
        rows.append(("server sees", SERVER_SEES.get(str(secagg.get("mode")), "unknown")))
    return rows or [("policy", "none: the ledger states no run.policy")]


def _budget(ledger: CheckedLedger) -> float | None:
    """Return what the run may spend."""
    most = ledger.number("max-epsilon")
    return most if most is not None else ledger.number("target-epsilon")
