"""Epsilon of DP-SGD from what a client's ledger holds, and the noise for an epsilon: Opacus' accountants.

PRV, or RDP where PRV cannot be computed or epsilon is above 64. The GDP accountant reports too little and is not used.
``dp_accounting`` is a dependency of servers, not of clients.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np

from fedlearn.learning.opacus_import import importing_opacus
from fedlearn.privacy.releases import Release

__all__ = ["History", "calibrated", "composed_epsilon", "history_of", "merged"]

History: TypeAlias = tuple[tuple[float, float, int], ...]
"""Steps of DP-SGD as (noise multiplier, sample rate, how many), in ascending order, each pair once."""

_MOST_NOISE = 1e4
_ORDERS = (*range(2, 13), 14, 16, 20, 24, 28, 32, 40, 48, 64, 96, 128, 256)
_MOST_PRV = 64.0  # above, PRV takes minutes and gigabytes


def history_of(releases: Iterable[Release]) -> History | None:
    """Return the releases as steps of DP-SGD; ``None`` where one is anything else: its ε is infinite."""
    steps = []
    for each in releases:
        drawn = each.sampling
        rate = drawn.rate if drawn.method == "poisson" else 1.0
        known = (each.what, each.unit, each.adjacency, each.mechanism) == (
            "update",
            "example",
            "add-remove",
            "gaussian",
        )
        known = known and not each.unknown and each.matrix is None and drawn.method in ("poisson", "everyone")
        if not (known and 0 < rate <= 1 and 0 < (noise := _multiplier(each)) < math.inf):
            return None
        steps.append((noise, rate, each.steps))
    return merged(steps)


def _multiplier(release: Release) -> float:
    """Return σ/Δ; of one query as it was divided, without another rounding."""
    if len(release.queries) == 1 and release.queries[0].sensitivity_l2 > 0:
        return release.queries[0].stddev / release.queries[0].sensitivity_l2
    return release.noise_multiplier if all(query.sensitivity_l2 > 0 for query in release.queries) else 0.0


def merged(steps: Iterable[tuple[float, float, int]]) -> History:
    """Return steps with equal numbers as one; what is composed has no order."""
    counts: dict[tuple[float, float], int] = {}
    for noise, rate, count in steps:
        key = (float(f"{noise:.12g}"), rate)  # a quotient that rounds back is the same noise
        counts[key] = counts.get(key, 0) + count
    return tuple((noise, rate, count) for (noise, rate), count in sorted(counts.items()) if count)


@lru_cache(maxsize=4096)
def composed_epsilon(history: History, delta: float) -> float:
    """Return ε at ``delta`` of the steps together, an upper bound under adding or removing an example.

    Raises:
        DependencyError: Opacus is not installed.

    >>> composed_epsilon((), 1e-5)
    0.0
    """
    if not history:
        return 0.0
    bound = _rdp(history, delta, _ORDERS)
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of logarithms of zero at the ends of PRV's domain, and of RDP's last order
        found = math.inf
        if bound < _MOST_PRV:
            try:
                found = _prv(history, delta)
            except (ArithmeticError, MemoryError, RuntimeError, ValueError):
                found = math.inf
    if not math.isfinite(found):
        found = min(bound, _rdp(history, delta, None))
    return math.inf if math.isnan(found) else max(found, 0.0)


def _prv(history: History, delta: float) -> float:
    """Return Opacus' PRV figure, its domain from RDP at whole orders: the same ε in a fifth of the time."""
    with importing_opacus('privacy.unit = "example"'):
        from opacus.accountants import PRVAccountant
        from opacus.accountants.analysis.prv import Domain

    class Accountant(PRVAccountant):  # type: ignore[misc]
        def _get_domain(
            self, *, prvs: Any, num_self_compositions: list[int], eps_error: float, delta_error: float
        ) -> Any:
            del prvs
            total = sum(num_self_compositions)
            once = max(_rdp(((z, q, 1),), delta_error / (8 * total), _ORDERS) for z, q, _ in self.history)
            size = max(_rdp(tuple(self.history), delta_error / 4, _ORDERS), once, eps_error) + 3
            mesh = eps_error / math.sqrt(total * math.log(12 / delta_error) / 2)
            return Domain.create_aligned(-size, size, mesh)

    accountant = Accountant()
    accountant.history = list(history)
    return float(accountant.get_epsilon(delta))


def _rdp(history: History, delta: float, orders: tuple[int, ...] | None) -> float:
    """Return Opacus' RDP figure at these orders; ``None``: at its own, fractional ones included, which is slow."""
    with importing_opacus('privacy.unit = "example"'):
        from opacus.accountants import RDPAccountant
    accountant = RDPAccountant()
    accountant.history = list(history)
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # it warns where the best order is the last one; the figure is a bound all the same
        found = float(accountant.get_epsilon(delta, alphas=None if orders is None else list(orders)))
    return math.inf if math.isnan(found) else found


@lru_cache(maxsize=4096)
def calibrated(before: History, rate: float, steps: int, delta: float, target: float) -> float | None:
    """Return a noise multiplier with which ``steps`` on top of ``before`` cost between 99 % and all of ``target``.

    ``None`` where no noise is enough. Bisection by RDP, which is quick and above PRV; then secants on PRV, since log ε
    is nearly straight in log noise.
    """

    def spent(logarithm: float) -> float:
        return composed_epsilon(merged((*before, (math.exp(logarithm), rate, steps))), delta)

    low, high = math.log(1e-3), math.log(_MOST_NOISE)
    while high - low > 0.05:
        middle = (low + high) / 2
        if _rdp(merged((*before, (math.exp(middle), rate, steps))), delta, _ORDERS) <= target:
            high = middle
        else:
            low = middle
    good, cost = high, spent(high)
    if cost > target:  # RDP found nothing: what was spent before may leave too little
        good, cost = math.log(_MOST_NOISE), spent(math.log(_MOST_NOISE))
        if cost > target:
            return None
    bad, slope = -math.inf, -1.2
    for _ in range(16):
        if cost >= 0.99 * target or good - bad < 1e-3:
            break
        tried = good + math.log(0.995 * target / max(cost, 1e-9)) / slope
        if not tried > bad:
            tried = (good + bad) / 2
        if (found := spent(tried)) <= target:
            slope = min(-0.5, math.log(max(found, 1e-9) / max(cost, 1e-9)) / (tried - good))
            good, cost = tried, found
        else:
            bad = tried
    return math.exp(good)
