"""``fedlearn privacy``: epsilon from a ledger or from numbers, the noise for an epsilon, a ledger to look at."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click
import typer

from fedlearn.cli.arguments import AsJson
from fedlearn.cli.ledgers import CheckedLedger, delta_of, open_ledgers, unit_of
from fedlearn.errors import MissingError, UsageError

if TYPE_CHECKING:
    from fedlearn.privacy.releases import Release, Unit

__all__ = ["SUB_VERBS", "calibrate", "epsilon", "show"]

_SIMULATED = "SIMULATED: the noise came from a seed: nobody is protected; this is what a real run would have spent"
_POINTS = 40
_BARS = "▁▂▃▄▅▆▇█"
_HIDDEN = {
    "client": "each client, with all that it holds",
    "example": "each example of a client",
    "none": "nobody: there is no noise to hide anybody",
}

_POLICY = (
    *("task", "trust", "mechanism", "target-epsilon", "max-epsilon", "population", "rounds", "sampling", "rate"),
    *("noise-multiplier", "bound-l2", "config-sha256"),
)

_Delta = Annotated[
    float | None,
    typer.Option(help="Probability with which the promise may fail. Left out: the ledger's.", show_default=False),
]
_Unit = Annotated[
    str | None,
    typer.Option(
        click_type=click.Choice(["client", "example"]),
        help="Whose presence is hidden. Left out: what the ledgers promise.",
        show_default=False,
    ),
]
_Rate = Annotated[float, typer.Option(min=0, max=1, help="Probability of each to be drawn in a round; 1: everybody.")]
_Rounds = Annotated[int, typer.Option(min=1, help="How many rounds, or steps.")]


def epsilon(
    ledgers: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[LEDGER…]",
            help="A ledger.jsonl or a run's folder; several are runs on the same population. Left out: from numbers.",
            show_default=False,
        ),
    ] = None,
    delta: _Delta = None,
    unit: _Unit = None,
    noise_multiplier: Annotated[
        float | None, typer.Option(min=0, help="σ/bound, instead of a ledger.", show_default=False)
    ] = None,
    rate: _Rate = 1.0,
    rounds: _Rounds = 1,
    as_json: AsJson = False,
) -> None:
    """Compute epsilon from ledgers alone, or from numbers. An edited ledger has none: exit code 1."""
    if bool(ledgers) == (noise_multiplier is not None):
        raise UsageError("give a ledger (or a run's folder), or --noise-multiplier with --rate and --rounds")
    if noise_multiplier is not None:
        if delta is None:
            raise UsageError("from numbers there is no delta to be read; give one, such as --delta 1e-5")
        _answer(_planned(noise_multiplier, rate, rounds, _unit(unit)), delta, _unit(unit), [], as_json)
        return
    opened = open_ledgers(ledgers or [])
    releases = [release for each in opened for release in each.releases]
    _answer(releases, delta_of(opened, delta), _unit(unit or unit_of(opened)), opened, as_json)


def calibrate(
    target_epsilon: Annotated[float, typer.Option(help="What everything may cost together.", show_default=False)],
    rounds: Annotated[int, typer.Option(min=1, help="How many rounds, or steps.", show_default=False)],
    rate: _Rate = 1.0,
    delta: _Delta = None,
    unit: _Unit = None,
    ledger: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="LEDGER",
            help="An earlier run on the same population, whose cost counts; may be given again and again.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Find the least noise with which so many rounds cost at most the target."""
    from fedlearn.privacy.accounting import calibrate as least_noise
    from fedlearn.privacy.accounting import epsilon as compute

    earlier = open_ledgers(ledger or [])
    if not earlier and delta is None:
        raise UsageError("give a delta, such as --delta 1e-5 (below 1/N for N clients), or an earlier --ledger")
    chosen = delta_of(earlier, delta) if earlier else float(delta or 0.0)
    whose = _unit(unit or (unit_of(earlier) if earlier else None))
    spent = [release for each in earlier for release in each.releases]

    def planned(noise: float) -> list[Release]:
        return [*spent, *_planned(noise, rate, rounds, whose)]

    noise = least_noise(planned, target_epsilon, chosen, unit=whose)
    found = {"all": compute(planned(noise), chosen, unit=whose), "earlier": compute(spent, chosen, unit=whose)}
    if as_json:
        from fedlearn.cli.rendering import echo_json

        body = {"noise_multiplier": noise, "epsilon": _told(found["all"]), "delta": chosen, "unit": whose}
        echo_json({**body, "earlier_epsilon": _told(found["earlier"]), "rate": rate, "rounds": rounds})
        return
    rows = [("noise multiplier", f"{noise:g}"), ("epsilon", _shown(found["all"])), *_promise(chosen, whose)]
    rows += [("drawn", _drawn(rate)), ("rounds", f"{rounds:,}")]
    if earlier:
        rows.append(("spent before", f"{_shown(found['earlier'])} by {len(spent):,} releases"))
    _say_facts(rows, title=f"The least noise for epsilon {target_epsilon:g}", headline=1)
    _warn_of(spent)


def show(
    ledger: Annotated[
        Path, typer.Argument(metavar="LEDGER", help="A ledger.jsonl or a run's folder.", show_default=False)
    ],
    picture: Annotated[
        Path | None,
        typer.Option(metavar="FILE.svg", help="Draw epsilon over the rounds into this file.", show_default=False),
    ] = None,
    delta: _Delta = None,
    unit: _Unit = None,
    as_json: AsJson = False,
) -> None:
    """Check a ledger and show what it promises, what was released, and epsilon over the rounds."""
    if picture is not None:
        _check_picture(picture)
    (opened,) = open_ledgers([ledger])
    releases, whose = opened.releases, _unit(unit or unit_of([opened]))
    chosen = delta_of([opened], delta)
    counts = _spread(len(releases))
    spent = _curve(releases, counts, chosen, whose)
    if picture is not None:
        _draw(opened, [releases[count - 1] for count in counts], spent, picture)
    if as_json:
        _tell_ledger(opened, chosen, whose, counts, spent, picture)
    else:
        _show_ledger(opened, chosen, whose, counts, spent, picture)


SUB_VERBS: dict[str, Callable[..., None]] = {"epsilon": epsilon, "calibrate": calibrate, "show": show}


def _check_picture(picture: Path) -> None:
    """Refuse a picture that cannot be written, before epsilon is computed."""
    if picture.suffix.lower() != ".svg":
        raise UsageError(f"--picture {picture}: the picture is an SVG; give it a name that ends in .svg")
    if not picture.parent.is_dir():
        raise MissingError(f"--picture {picture}: there is no folder {picture.parent}")


# -- what is computed ------------------------------------------------------------------------------------------------


def _planned(noise_multiplier: float, rate: float, rounds: int, unit: Unit) -> list[Release]:
    """Return what so many rounds will release: Gaussian noise, a Poisson draw where not everybody is drawn."""
    from fedlearn.privacy.releases import Query, Release, Sampling

    sampling = Sampling(method="poisson" if rate < 1 else "everyone", rate=rate, population=0)
    return [
        Release(
            what="model",
            round_number=1,
            unit=unit,
            adjacency="add-remove",
            mechanism="gaussian",
            queries=(Query(name="update", sensitivity_l2=1.0, stddev=noise_multiplier),),
            sampling=sampling,
            steps=rounds,
            simulated=False,
        )
    ]


def _unit(name: str | None) -> Unit:
    """Return a unit by its name; left out, the client."""
    units: dict[str | None, Unit] = {None: "client", "client": "client", "example": "example", "none": "none"}
    return units[name]


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


# -- what is said ----------------------------------------------------------------------------------------------------


def _answer(
    releases: Sequence[Release], delta: float, unit: Unit, ledgers: Sequence[CheckedLedger], as_json: bool
) -> None:
    """Compute epsilon by both accountants and say it, with all that it depends on."""
    from fedlearn.privacy.accounting import epsilon as compute

    pld = compute(releases, delta, unit=unit)
    rdp = compute(releases, delta, unit=unit, accountant="rdp")
    simulated = any(each.simulated for each in releases)
    if as_json:
        from fedlearn.cli.rendering import echo_json

        body = {"epsilon": _told(pld), "epsilon_rdp": _told(rdp), "delta": delta, "unit": unit}
        files = [each.to_json() for each in ledgers]
        echo_json({**body, "releases": len(releases), "simulated": simulated, "ledgers": files})
        return
    rows = [("epsilon", _shown(pld)), ("by Rényi", f"{_shown(rdp)}, which is never less"), *_promise(delta, unit)]
    if ledgers:
        rows.append(("releases", _kinds(releases)))
    else:
        rows += [("drawn", _drawn(releases[0].sampling.rate)), ("rounds", f"{releases[0].steps:,}")]
    _say_files(ledgers)
    _say_facts(rows, title="What the releases reveal at most", headline=1)
    _warn_of(releases)


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
    _say_files([ledger])
    _say_facts([*_policy(ledger), *_promise(delta, unit)], title="What was promised", headline=0)
    columns = ["round", "what", "mechanism", "noise multiplier", "drawn", "epsilon so far"]
    stdout.print(table(columns, [_row(releases[n - 1], e) for n, e in zip(counts, spent, strict=True)]))
    if len(counts) < len(releases):
        stdout.print(f"{len(counts)} of {len(releases):,} releases", style="dim")
    stdout.print(_growth(spent, _budget(ledger)), soft_wrap=True)
    for event in ledger.events:
        if event.kind == "run.stop":
            reason = event.body.get("reason", "no reason is given")
            stdout.print(f"Stopped (line {event.seq}): {reason}", soft_wrap=True)
    if picture is not None:
        stdout.print(f"Picture: {picture}", soft_wrap=True)
    _warn_of(releases)


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
        {**releases[count - 1].to_body(), "release": count, "epsilon": _told(value)}
        for count, value in zip(counts, spent, strict=True)
    ]
    body: dict[str, Any] = {"epsilon": _told(spent[-1] if spent else 0.0), "delta": delta, "unit": unit}
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
    return [f"{release.round_number}", release.what, release.mechanism + steps, noise, drawn, _shown(spent)]


def _growth(spent: Sequence[float], budget: float | None) -> str:
    """Return how epsilon grew, as bars as high as the share of the budget, or of the last value."""
    if not spent:
        return "Nothing was released: epsilon 0"
    of_budget = f" of {budget:g}" if budget is not None else ""
    top = budget if budget is not None else max((each for each in spent if math.isfinite(each)), default=1.0)
    bars = "".join(_BARS[min(7, int(8 * each / top))] if math.isfinite(each) and top > 0 else "!" for each in spent)
    return f"epsilon {bars} {_shown(spent[-1])}{of_budget}"


def _policy(ledger: CheckedLedger) -> list[tuple[str, str]]:
    """Return what the run promised, name by name, in the policy's own words."""
    rows = [(name.replace("-", " "), str(ledger.policy[name])) for name in _POLICY if name in ledger.policy]
    return rows or [("policy", "none: the ledger states no run.policy")]


def _promise(delta: float, unit: Unit) -> list[tuple[str, str]]:
    """Return what an epsilon means nothing without."""
    return [("delta", f"{delta:.3g}"), ("hides", f"{_HIDDEN[unit]} (unit {unit})")]


def _budget(ledger: CheckedLedger) -> float | None:
    """Return what the run may spend."""
    most = ledger.number("max-epsilon")
    return most if most is not None else ledger.number("target-epsilon")


def _kinds(releases: Sequence[Release]) -> str:
    """Return how many releases there are, and of what."""
    kinds = Counter(each.what for each in releases)
    names = ", ".join(f"{count:,} {name}" for name, count in sorted(kinds.items()))
    return f"{len(releases):,} ({names})" if releases else "0"


def _drawn(rate: float) -> str:
    """Return how the rounds from numbers are drawn."""
    return f"each with probability {rate:g}, in secret (Poisson)" if rate < 1 else "everybody, in every round"


def _say_files(ledgers: Sequence[CheckedLedger]) -> None:
    """Write a line on each ledger: that its chain holds, how far, and whether it ends there."""
    from fedlearn.cli.rendering import console

    for each in ledgers:
        head = each.head
        console().print(
            f"{each.path}: the chain holds, {head.count:,} lines, head {head.sha256[:16]}…, {each.state}",
            soft_wrap=True,
        )


def _say_facts(rows: Sequence[tuple[str, str]], *, title: str, headline: int) -> None:
    """Write names and values."""
    from fedlearn.cli.rendering import console, facts

    console().print(facts(rows, title=f"\n{title}", headline=headline))


def _warn_of(releases: Sequence[Release]) -> None:
    """Say what makes the figures no promise to anybody."""
    from fedlearn.cli.rendering import console

    if any(each.simulated for each in releases):
        console().print(f"\n{_SIMULATED}", style="bold red", soft_wrap=True)


def _shown(value: float) -> str:
    """Return an epsilon for people."""
    if math.isinf(value):
        return "infinite"
    return f"{value:.4g}" if value < 1000 else f"{value:,.0f}"


def _told(value: float) -> float | str:
    """Return an epsilon for machines: JSON has no infinity."""
    return value if math.isfinite(value) else "inf"
