"""Epsilon, computed from releases alone: whoever holds a ledger gets the same number.

What a release spends is decided in ``fedlearn.privacy.spending``; whatever is not known is infinite. Epsilon is an
upper bound, at the δ asked for, under the adjacency that the releases name. Nothing here looks at whether noise was
``simulated``: then epsilon is what a real run would have spent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from fedlearn.errors import ConfigError
from fedlearn.privacy.accountants import pld_epsilon, rdp_epsilon
from fedlearn.privacy.ledger import Event, releases_of
from fedlearn.privacy.releases import Release, Unit
from fedlearn.privacy.spending import Account

__all__ = [
    "FINE",
    "QUICK",
    "Accountant",
    "calibrate",
    "check_delta",
    "default_delta",
    "epsilon",
    "epsilon_by_release",
    "epsilon_of_ledger",
    "would_exceed",
]

Accountant = Literal["pld", "rdp"]

FINE = 1e-4
"""The grid of losses of every figure that is reported or promised."""

QUICK = 1e-3
"""The grid for pictures and first tries: an upper bound too, mostly within half a percent, in a tenth of the time."""


def epsilon(
    releases: Iterable[Release],
    delta: float,
    *,
    unit: Unit = "client",
    accountant: Accountant = "pld",
    interval: float = FINE,
) -> float:
    """Return the epsilon of all ``releases`` together; 0 of none, infinity where anything is not known.

    Guarantees: an upper bound, by either accountant and with any interval; it does not depend on the releases' order.

    Args:
        releases: of one run, or of several on the same clients.
        delta: the probability with which the promise may fail, in (0, 1).
        unit: whose presence is hidden. Nobody's (``none``): infinity.
        accountant: ``pld`` is the tightest; ``rdp`` is there to be compared with. Where there is Skellam noise both are
            ``rdp``.
        interval: of PLD's grid.

    Raises:
        ConfigError: ``delta`` is not in (0, 1).
        DependencyError: dp-accounting is not installed.
    """
    _check_probability(delta)
    account = Account(unit)
    for each in releases:
        account.add(each)
    return _cost(account, delta, accountant, interval)


def epsilon_by_release(
    releases: Sequence[Release],
    delta: float,
    *,
    unit: Unit = "client",
    after: Iterable[int] | None = None,
    interval: float = QUICK,
) -> list[float]:
    """Return the epsilon of the first n releases, for each n in ``after``; left out: for 1, 2, …, all.

    For pictures and metrics: on the quick grid, about a hundredth of a second each.

    Raises:
        As ``epsilon`` does.
    """
    _check_probability(delta)
    counts = set(range(1, len(releases) + 1) if after is None else after)
    account, found = Account(unit), {}
    for count, each in enumerate(releases, start=1):
        account.add(each)
        if count in counts:
            found[count] = _cost(account, delta, "pld", interval)
    return [found[count] for count in sorted(found)]


def epsilon_of_ledger(
    events: Iterable[Event],
    delta: float,
    *,
    unit: Unit = "client",
    accountant: Accountant = "pld",
    interval: float = FINE,
) -> float:
    """Return the epsilon of all that a ledger, or several one after the other, report; see ``epsilon``.

    Raises:
        LedgerError: an event should be a release and cannot be read.
    """
    return epsilon(releases_of(events), delta, unit=unit, accountant=accountant, interval=interval)


def would_exceed(
    spent: Sequence[Release],
    following: Sequence[Release],
    budget: float,
    delta: float,
    *,
    unit: Unit = "client",
) -> bool:
    """Return whether ``following``, released after ``spent``, would bring epsilon above ``budget``.

    Asked before a release. A budget that ``calibrate`` was given is not exceeded by what it was planned for.
    """
    together = [*spent, *following]
    return all(not epsilon(together, delta, unit=unit, interval=interval) <= budget for interval in (QUICK, FINE))


# -- delta ---------------------------------------------------------------------------------------------------------


def default_delta(population: int) -> float:
    """Return N^(-1.1) for ``population`` = N units.

    >>> round(default_delta(1000), 7)
    0.0005012
    """
    return math.pow(max(population, 1), -1.1)


def check_delta(delta: float, population: int) -> None:
    """Raise unless ``delta`` is a probability of failing that one of ``population`` units can live with: below 1/N.

    With δ = 1/N a mechanism that publishes everything about one unit, drawn at random, would keep the promise.

    Raises:
        ConfigError: at ``privacy.delta``.
    """
    _check_probability(delta)
    if population < 2:
        raise ConfigError("privacy.delta", "one unit alone cannot be hidden: there is no delta below 1/N for N = 1")
    if not delta < 1 / population:
        reason = (
            f"{delta:g} is not below 1/N = {1 / population:g} for N = {population:,}: such a promise may fail for one"
        )
        raise ConfigError("privacy.delta", f'{reason} altogether; "auto" is N^(-1.1) = {default_delta(population):.2g}')


def _check_probability(delta: float) -> None:
    """Raise unless delta is in (0, 1)."""
    if not 0 < delta < 1:
        raise ConfigError("privacy.delta", f"must be above 0 and below 1, got {delta}")


def _cost(account: Account, delta: float, accountant: Accountant, interval: float) -> float:
    """Return the epsilon of what an account was given."""
    spending = account.spending()
    if spending is None:
        return math.inf
    return rdp_epsilon(spending, delta) if accountant == "rdp" else pld_epsilon(spending, delta, interval)


# -- calibration ---------------------------------------------------------------------------------------------------

_NOISE_TRIED = (2.0**-6, 2.0**20)


def calibrate(
    planned: Callable[[float], Sequence[Release]], target_epsilon: float, delta: float, *, unit: Unit = "client"
) -> float:
    """Return the least noise multiplier whose planned releases cost at most ``target_epsilon``, to 0.1 %.

    Guarantees: ``epsilon(planned(result), delta, unit=unit) <= target_epsilon``. The result has five digits, so that
    writing it down loses nothing. Where even a noise multiplier of 1/64 costs no more than the target, it is that.

    Args:
        planned: from a noise multiplier to everything that will be released, and what was released before; more noise
            costs less.
        target_epsilon: above 0.
        delta: in (0, 1).
        unit: whose presence is hidden.

    Raises:
        ConfigError: at ``privacy.target-epsilon``, where no noise is enough.
        DependencyError: dp-accounting is not installed.
    """
    if not 0 < target_epsilon < math.inf:
        raise ConfigError("privacy.target-epsilon", f"must be above 0, got {target_epsilon}")

    def cost(noise: float, interval: float = QUICK) -> float:
        return epsilon(planned(noise), delta, unit=unit, interval=interval)

    noise = _rounded_up(_nearly(cost, target_epsilon))
    spent = cost(noise, FINE)
    while not spent <= target_epsilon:  # the fine grid is tighter, but it need not be everywhere
        noise = _rounded_up(noise * 1.0005)
        spent = cost(noise, FINE)
    a_little_less = cost(noise * 1.01)
    exponent = math.log(cost(noise) / a_little_less) / math.log(1.01) if a_little_less > 0 else 0.0
    while spent > 0 and exponent > 0:  # epsilon is about a power of the noise: what the quick grid added, off again
        less = _rounded_up(noise * (spent / target_epsilon) ** (1 / exponent) * 1.0001)
        if less * 1.0004 > noise or not (tried := cost(less, FINE)) <= target_epsilon:
            break
        noise, spent = less, tried
    return noise


def _nearly(cost: Callable[[float], float], target: float) -> float:
    """Return a noise multiplier that keeps to the target and is at most 0.02 % above one that does not."""
    least, most = _NOISE_TRIED
    high = 1.0
    while not cost(high) <= target:
        high *= 4
        if high > most:
            reached = cost(most)
            reason = f"{target:g} cannot be kept: however much noise is added, epsilon is {reached:.4g}"
            spent = "something released before, or planned, has no bound"
            hint = spent if math.isinf(reached) else "earlier runs have spent it; raise it, or leave them out"
            raise ConfigError("privacy.target-epsilon", f"{reason}: {hint}")
    low = high / 4
    while low >= least and cost(low) <= target:
        low, high = low / 2, low
    return _narrow(cost, target, low, high) if low >= least else high


def _narrow(cost: Callable[[float], float], target: float, low: float, high: float) -> float:
    """Return ``high``, moved down to within 0.02 % of ``low``, moved up; only ``low`` costs more than the target."""
    dear, cheap = math.log(cost(low) / target), math.log(max(cost(high), 1e-300) / target)
    nudge = 1.0
    while high / low > 1.0002:
        share = dear / (dear - cheap) if math.isfinite(dear) else 0.5  # were it a power of the noise, it is here
        aim = low * (high / low) ** min(max(share, 0.01), 0.99) * 1.00008**nudge
        middle = aim if low < aim < high else math.sqrt(low * high)
        excess = math.log(max(cost(middle), 1e-300) / target)
        if excess <= 0:
            high, cheap, nudge = middle, excess, -1.0  # next from below, so that both ends close in
        else:
            low, dear, nudge = middle, excess, 1.0
    return high


def _rounded_up(noise: float) -> float:
    """Return the next number of five digits.

    >>> _rounded_up(1.00001), _rounded_up(0.75)
    (1.0001, 0.75)
    """
    digits = 4 - math.floor(math.log10(noise))
    rounded = float(f"{noise:.5g}")
    return rounded if rounded >= noise else float(f"{noise + 10.0**-digits:.5g}")
