"""``fedlearn privacy``: epsilon from a ledger or from numbers, the noise for an epsilon, a ledger to look at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedlearn.cli.arguments import AsJson
from fedlearn.cli.ledgers import CheckedLedger, delta_of, open_ledgers, unit_of
from fedlearn.cli.privacy_ledger import show
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
from fedlearn.errors import UsageError

if TYPE_CHECKING:
    from fedlearn.privacy.releases import Release, Unit

__all__ = ["SUB_VERBS", "calibrate", "epsilon", "show"]

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
    delta: DeltaOption = None,
    unit: UnitOption = None,
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
        _answer(_planned(noise_multiplier, rate, rounds, unit_named(unit)), delta, unit_named(unit), [], as_json)
        return
    opened = open_ledgers(ledgers or [])
    if len(opened) == 1 and opened[0].clients:
        _answer_by_client(opened[0], delta, as_json)
        return
    releases = [release for each in opened for release in each.releases]
    _answer(releases, delta_of(opened, delta), unit_named(unit or unit_of(opened)), opened, as_json)


def calibrate(
    target_epsilon: Annotated[float, typer.Option(help="What everything may cost together.", show_default=False)],
    rounds: Annotated[int, typer.Option(min=1, help="How many rounds, or steps.", show_default=False)],
    rate: _Rate = 1.0,
    delta: DeltaOption = None,
    unit: UnitOption = None,
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
    whose = unit_named(unit or (unit_of(earlier) if earlier else None))
    spent = [release for each in earlier for release in each.releases]

    def planned(noise: float) -> list[Release]:
        return [*spent, *_planned(noise, rate, rounds, whose)]

    noise = least_noise(planned, target_epsilon, chosen, unit=whose)
    found = {"all": compute(planned(noise), chosen, unit=whose), "earlier": compute(spent, chosen, unit=whose)}
    if as_json:
        from fedlearn.cli.rendering import echo_json

        body = {"noise_multiplier": noise, "epsilon": epsilon_told(found["all"]), "delta": chosen, "unit": whose}
        echo_json({**body, "earlier_epsilon": epsilon_told(found["earlier"]), "rate": rate, "rounds": rounds})
        return
    rows = [("noise multiplier", f"{noise:g}"), ("epsilon", epsilon_shown(found["all"])), *promised(chosen, whose)]
    rows += [("drawn", _drawn(rate)), ("rounds", f"{rounds:,}")]
    if earlier:
        rows.append(("spent before", f"{epsilon_shown(found['earlier'])} by {len(spent):,} releases"))
    say_facts(rows, title=f"The least noise for epsilon {target_epsilon:g}", headline=1)
    warn_of_seeds(spent)


SUB_VERBS: dict[str, Callable[..., None]] = {"epsilon": epsilon, "calibrate": calibrate, "show": show}


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

        body = {"epsilon": epsilon_told(pld), "epsilon_rdp": epsilon_told(rdp), "delta": delta, "unit": unit}
        files = [each.to_json() for each in ledgers]
        echo_json({**body, "releases": len(releases), "simulated": simulated, "ledgers": files})
        return
    rows = [
        ("epsilon", epsilon_shown(pld)),
        ("by Rényi", f"{epsilon_shown(rdp)}, which is never less"),
        *promised(delta, unit),
    ]
    if ledgers:
        rows.append(("releases", _kinds(releases)))
    else:
        rows += [("drawn", _drawn(releases[0].sampling.rate)), ("rounds", f"{releases[0].steps:,}")]
    say_files(ledgers)
    say_facts(rows, title="What the releases reveal at most", headline=1)
    heads = {event.sha256 for each in ledgers for event in each.events}
    if any(head not in heads for each in ledgers for head in each.policy.get("earlier", ())):
        said = "The run counted earlier ledgers on the same clients too; give them beside this one for what all cost."
        from fedlearn.cli.rendering import console

        console().print(f"\n{said}")
    warn_of_seeds(releases)


def _answer_by_client(run: CheckedLedger, delta: float | None, as_json: bool) -> None:
    """Say what each client's own ledger costs its examples; clients hold different ones, so nothing adds up."""
    from fedlearn.cli.rendering import console, echo_json, table
    from fedlearn.privacy.accounting import QUICK
    from fedlearn.privacy.accounting import epsilon as compute

    ledgers = run.open_clients()
    deltas = [delta_of([each], delta) for each in ledgers]
    found = [
        compute(each.releases, own, unit="example", interval=QUICK) for each, own in zip(ledgers, deltas, strict=True)
    ]
    worst = max(range(len(found)), key=found.__getitem__)
    most = min(found[worst], compute(ledgers[worst].releases, deltas[worst], unit="example"))
    releases = [release for each in ledgers for release in each.releases]
    if as_json:
        body = {"epsilon": epsilon_told(most), "delta": deltas[worst], "unit": "example", "releases": len(releases)}
        clients = [
            {"epsilon": epsilon_told(value), "delta": own, "ledger": each.to_json()}
            for each, own, value in zip(ledgers, deltas, found, strict=True)
        ]
        simulated = any(each.simulated for each in releases)
        echo_json({**body, "simulated": simulated, "clients": clients, "ledgers": [run.to_json()]})
        return
    say_files([run])
    rows = [
        [each.path.parent.name, f"{len(each.releases):,}", f"{own:.3g}", epsilon_shown(value)]
        for each, own, value in zip(ledgers, deltas, found, strict=True)
    ]
    console().print(table(["client", "releases", "delta", "epsilon"], rows))
    say_facts(
        [("epsilon", f"{epsilon_shown(most)}, the largest of the clients"), *promised(deltas[worst], "example")],
        title="What the releases reveal at most",
        headline=1,
    )
    warn_of_seeds(releases)


def _kinds(releases: Sequence[Release]) -> str:
    """Return how many releases there are, and of what."""
    kinds = Counter(each.what for each in releases)
    names = ", ".join(f"{count:,} {name}" for name, count in sorted(kinds.items()))
    return f"{len(releases):,} ({names})" if releases else "0"


def _drawn(rate: float) -> str:
    """Return how the rounds from numbers are drawn."""
    return f"each with probability {rate:g}, in secret (Poisson)" if rate < 1 else "everybody, in every round"
