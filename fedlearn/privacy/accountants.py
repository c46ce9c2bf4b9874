"""Epsilon of what was spent, by two accountants of ``dp_accounting``: PLD and RDP. Both give upper bounds.

Where the numbers leave what an accountant's floating-point arithmetic can carry, a coarser but sound
bound takes its place: a wider grid, Rényi instead of PLD, or infinity. Skellam noise PLD has no bound for: Rényi alone.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlearn.errors import DependencyError
from fedlearn.privacy.skellam import rdp as skellam_rdp
from fedlearn.privacy.spending import Draws, Spending

__all__ = ["pld_epsilon", "rdp_epsilon"]

_NOISE_OF_ONE_STEP = 1e-15
"""How much of δ the rounding of one composed step may take up: 300 times what was measured against the closed form."""

_LEAST_LOSS = 1e-5
"""Below this loss of one step, dp_accounting's Rényi divergences drown in rounding; negative ones it takes for zero."""

_MOST_STEPS = 1_000_000
"""Above it, dp_accounting takes minutes to multiply out how large a composed distribution could become."""

_FINEST = 1e-6
"""A grid below it would divide differences of probabilities that are mostly rounding."""

_LARGE = 1000.0
"""An epsilon above which it no longer matters that the grid has become coarse, and Rényi's bound may be the better."""

_ORDERS = np.unique(
    [*(1 + 0.02 * 1.05**k for k in range(140)), *range(2, 128), *(round(128 * 1.05**k) for k in range(128))]
)
"""Rényi's orders where there is Skellam noise, up to 63,000: dense enough to cost next to nothing."""

_FEWER_ORDERS = np.array([*(1 + k / 10 for k in range(1, 100)), *range(11, 64), 128, 256, 512, 1024])
"""The same with amplified releases beside it, whose large orders take long; those that dp_accounting has by default."""

_SHARES = (2.0**-20, 0.5)
"""What of δ may go to noise that is not ideal: next to nothing, or else half."""


def pld_epsilon(spending: Spending, delta: float, interval: float) -> float:
    """Return epsilon by privacy loss distributions: the tightest there is.

    Guarantees: an upper bound whatever ``interval`` is. Without amplification it is the closed form to which every grid
    converges (Balle and Wang, arXiv:1805.06530). The rounding of the Fourier transforms is taken off ``delta`` first;
    where it would take more than half, or there are more than a million amplified steps, or Skellam noise, the answer
    is ``rdp_epsilon``'s.

    Args:
        spending: what was released.
        delta: in (0, 1).
        interval: of the grid of losses; one that is far too coarse for them, or too fine for the machine's memory, is
            replaced by a better one.

    Raises:
        DependencyError: dp-accounting is not installed.

    Reference: Doroshenko et al., arXiv:2207.04380 (connect the dots); Koskela et al., arXiv:2102.12412.
    """
    if spending.nothing:
        return 0.0
    if spending.discrete:
        return rdp_epsilon(spending, delta)
    dp = _dp_accounting()
    if not spending.sampled:
        return _closed_form(spending.noise_multiplier, delta)
    certain = delta - _NOISE_OF_ONE_STEP * (spending.steps + len(spending.sampled))
    if certain < delta / 2 or spending.steps > _MOST_STEPS:
        return rdp_epsilon(spending, delta)
    grid = _grid(spending, interval)
    try:
        whole = dp.pld.privacy_loss_distribution.identity(grid)
        for draws, steps in sorted(spending.sampled.items()):
            whole = whole.compose(_one_step(draws, grid).self_compose(steps))
        if spending.gaussian:
            whole = whole.compose(_gaussian(spending.noise_multiplier, grid))
        with np.errstate(over="ignore"):  # a loss whose exponential is no float; it gives infinity, and so RDP's answer
            found = float(whole.get_epsilon_for_delta(certain))
    except (ArithmeticError, MemoryError):
        found = math.inf
    return found if found < _LARGE else min(found, rdp_epsilon(spending, delta))


def rdp_epsilon(spending: Spending, delta: float) -> float:
    """Return epsilon by Rényi differential privacy: never below PLD's, and good for every delta.

    Skellam noise has the divergences of ``fedlearn.privacy.skellam.rdp``. Where the logarithms of its probabilities are
    off by up to η in both of two distributions, a divergence of order α grows by at most η·(2α-1)/(α-1); and where it
    is off by τ in total variation, (ε, δ) becomes (ε, δ + (1 + exp ε)·τ).

    Raises:
        DependencyError: dp-accounting is not installed.

    Reference: Mironov et al., arXiv:1908.10530; Canonne et al., arXiv:2004.00010, Proposition 12.
    """
    if spending.nothing:
        return 0.0
    dp = _dp_accounting()
    accountant = dp.rdp.RdpAccountant(neighboring_relation=dp.NeighboringRelation.ADD_OR_REMOVE_ONE)
    try:
        if spending.discrete:
            return _discrete_epsilon(spending, delta)
        with _without_orders_that_diverge():
            for draws, steps in sorted(spending.sampled.items()):
                accountant.compose(_event(draws, dp), steps)
            if spending.gaussian:
                accountant.compose(dp.GaussianDpEvent(spending.noise_multiplier))
            found = float(accountant.get_epsilon(delta))
    except (ArithmeticError, ValueError):
        return math.inf
    return math.inf if math.isnan(found) else found


def _dp_accounting() -> Any:
    """Return the package, imported when epsilon is computed and not before."""
    try:
        import dp_accounting
        import dp_accounting.pld
        import dp_accounting.rdp
    except ImportError as error:
        raise DependencyError("dp_accounting", "privacy", "computing epsilon") from error
    return dp_accounting


# -- privacy loss distributions ------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def _one_step(draws: Draws, grid: float) -> Any:
    """Return the distribution of the loss of one amplified step."""
    module = _dp_accounting().pld.privacy_loss_distribution
    if draws.replaced:
        # Whoever is told, besides the noisy sum, if the unit was drawn, can compute the sum's loss from it: no loss at
        # all with probability 1 - rate, that of the plain mechanism else. What is really seen can only lose less.
        plain = _gaussian(draws.noise_multiplier, grid)
        return plain.compute_mixture(module.identity(grid), draws.rate)
    return module.from_gaussian_mechanism(
        draws.noise_multiplier, value_discretization_interval=grid, sampling_prob=draws.rate
    )


def _gaussian(noise_multiplier: float, grid: float) -> Any:
    """Return the distribution of the loss of one release without amplification."""
    module = _dp_accounting().pld.privacy_loss_distribution
    return module.from_gaussian_mechanism(noise_multiplier, value_discretization_interval=grid)


def _grid(spending: Spending, interval: float) -> float:
    """Return ``interval`` times a power of two, so that the losses fit it.

    Finer where one step's typical loss is below ten intervals, since composing many steps would then pile up what the
    grid adds to each; coarser where one step would have more than 20/interval points, or all together 400/interval.
    """
    steps = spending.steps
    mean = sum(_mean_loss(draws) * count for draws, count in spending.sampled.items())
    typical = math.sqrt(2 * mean / steps)
    single = max(_largest_loss(draws) for draws in spending.sampled)
    if spending.gaussian:
        single = max(single, _largest_loss(Draws(1.0, spending.noise_multiplier)))
    mean += spending.gaussian / 2
    span = single + 2 * mean + 16 * math.sqrt(2 * mean)
    wanted = max(min(interval, typical / 10), interval * single / 20, interval * span / 400, _FINEST)
    return math.ldexp(interval, math.ceil(math.log2(wanted / interval)))


def _mean_loss(draws: Draws) -> float:
    """Return an upper bound of the mean loss of one step (its Kullback-Leibler divergence), and about that."""
    square = draws.noise_multiplier**-2
    plain = draws.rate * square / 2
    if draws.replaced or square > 50:
        return plain
    return min(plain, draws.rate**2 * math.expm1(square))


def _largest_loss(draws: Draws) -> float:
    """Return the loss of one step at ten standard deviations, beyond which dp_accounting cuts the tail off."""
    plain = 0.5 * draws.noise_multiplier**-2 + 10 / draws.noise_multiplier
    if draws.replaced or draws.rate == 1 or plain > 700:
        return plain
    return math.log1p(draws.rate * math.expm1(plain))


def _closed_form(noise_multiplier: float, delta: float) -> float:
    """Return the epsilon of one Gaussian release."""
    from dp_accounting import get_epsilon_gaussian

    found = float(get_epsilon_gaussian(noise_multiplier, delta))
    return found if math.isfinite(found) else math.inf


# -- Rényi ---------------------------------------------------------------------------------------------------------


def _discrete_epsilon(spending: Spending, delta: float) -> float:
    """Return the epsilon of releases with Skellam noise among them; infinity where noise that is not ideal takes δ."""
    off = math.fsum(each.slack_delta * steps for each, steps in spending.discrete.items())
    least = _sampled_with_others(spending) if spending.sampled else _unsampled(spending)
    if not off:
        return least(delta)
    for share in _SHARES:
        found = least(delta * (1 - share))
        if found < 700 and (1 + math.exp(found)) * off <= delta * share:
            return found
    return math.inf


def _unsampled(spending: Spending) -> Callable[[float], float]:
    """Return epsilon as a function of delta, where nothing is amplified."""
    dp, divergences = _dp_accounting(), _divergences(spending, _ORDERS)
    return lambda delta: float(dp.rdp.compute_epsilon(_ORDERS, divergences, delta)[0])


def _sampled_with_others(spending: Spending) -> Callable[[float], float]:
    """Return epsilon as a function of delta, where amplified releases and Skellam noise come together.

    At a single order a divergence is a number, and concentrated differential privacy has an event for that.
    """
    dp = _dp_accounting()
    accountants = []
    with _without_orders_that_diverge():
        for order, divergence in zip(_FEWER_ORDERS, _divergences(spending, _FEWER_ORDERS), strict=True):
            accountant = dp.rdp.RdpAccountant([order], dp.NeighboringRelation.ADD_OR_REMOVE_ONE)
            for draws, steps in sorted(spending.sampled.items()):
                accountant.compose(_event(draws, dp), steps)
            accountants.append(accountant.compose(dp.ZCDpEvent(0.0, float(divergence))))
    return lambda delta: min(float(each.get_epsilon(delta)) for each in accountants)


def _divergences(spending: Spending, orders: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the Rényi divergences of all that is not amplified, one for each order."""
    found = orders * (spending.gaussian / 2)
    for each, steps in sorted(spending.discrete.items()):
        bound = skellam_rdp(
            orders,
            sensitivity_l1=each.sensitivity_l1,
            sensitivity_l2=each.sensitivity_l2,
            variance=each.variance,
        )
        found = found + steps * (bound + each.slack * (2 * orders - 1) / (orders - 1))
    return found


def _event(draws: Draws, dp: Any) -> Any:
    """Return one amplified step as an event; one that the Rényi accountant cannot carry, as one that spends more."""
    plain = dp.GaussianDpEvent(draws.noise_multiplier)
    if draws.replaced:  # no Rényi bound of it is in dp_accounting: without amplification
        return plain
    square = min(draws.noise_multiplier**-2, 700.0)
    rate = max(draws.rate, min(1.0, _LEAST_LOSS / math.sqrt(math.expm1(square))))
    return dp.PoissonSampledDpEvent(rate, plain)


@contextmanager
def _without_orders_that_diverge() -> Iterator[None]:
    """Silence what dp_accounting logs of each Rényi order that does not converge; it does without that order."""

    def other(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("_compute_log_a_frac failed to converge")

    logger = logging.getLogger("absl")
    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)
