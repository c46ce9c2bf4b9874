"""Each client's epsilon, three times over: from its own ledger, and from Opacus' accountants stepped by hand."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from fedlearn.config import RunConfig
from fedlearn.data.loaders import distribute_data
from fedlearn.errors import RunFailedError
from fedlearn.federation.run_folder import RunFolder
from fedlearn.privacy.accounting import epsilon
from fedlearn.privacy.ledger import read_events, releases_of
from fedlearn.privacy.releases import Release
from fedlearn.tasks import load_task

__all__ = ["Account", "accounts_of"]

_PRV_ERROR = 0.01
"""Opacus' ``eps_error``: how far the bound that PRV returns may be above epsilon."""


@dataclass(frozen=True, kw_only=True)
class Account:
    """What one client has spent.

    Attributes:
        client: its number.
        size: how many examples it trains on.
        rate: the probability with which each of them is in a batch.
        noise_multiplier: σ/bound of its noise.
        target: what it may spend; infinity where no target is set.
        ledger: epsilon from its ledger's releases alone, by ``dp_accounting``'s PLD.
        prv: epsilon by Opacus' PRV accountant, after a ``step`` for every step.
        rdp: the same by Opacus' RDP accountant, a looser bound.
    """

    client: int
    size: int
    rate: float
    noise_multiplier: float
    target: float
    ledger: float
    prv: float
    rdp: float

    @property
    def agrees(self) -> bool:
        """Whether PRV is within its stated error and 1 % of the ledger's epsilon, and RDP is not below it."""
        return abs(self.ledger - self.prv) <= _PRV_ERROR + 0.01 * self.ledger and self.rdp >= self.ledger

    @property
    def kept(self) -> bool:
        """Whether neither tight accountant says more than was permitted."""
        return max(self.ledger, self.prv) <= self.target


def accounts_of(folder: RunFolder) -> Iterator[Account]:
    """Yield the account of every client of a finished run.

    The ledger gives σ and nothing else to Opacus: what was to be sampled and how often follows from the scenario and
    from how many examples the client was dealt.

    Raises:
        LedgerError: a client's ledger is damaged.
        LedgerMissingError: a client has none.
        RunFailedError: a client's ledger does not hold the rounds, steps and rate of the scenario.
    """
    config = folder.config
    dealt = distribute_data(load_task(config.task), config).train
    for client, size in enumerate(map(len, dealt)):
        releases = releases_of(read_events(folder.path / "clients" / str(client) / "ledger.jsonl"))
        rate = min(config.training.batch_size or size, size) / size
        _check_complete(releases, config, client, rate)
        delta = size**-1.1 if config.privacy.delta == "auto" else config.privacy.delta
        query = releases[0].queries[0]
        noise = query.stddev / query.sensitivity_l2
        prv, rdp = _opacus(noise, rate, _steps(config) * config.federation.rounds, delta)
        target = config.privacy.target_epsilon
        yield Account(
            client=client,
            size=size,
            rate=rate,
            noise_multiplier=noise,
            target=math.inf if target is None else target,
            ledger=epsilon(releases, delta, unit="example"),
            prv=prv,
            rdp=rdp,
        )


def _check_complete(releases: list[Release], config: RunConfig, client: int, rate: float) -> None:
    """Raise unless a ledger has every round of the scenario with its steps and rate, under one noise."""
    rounds = [each.round_number for each in releases]
    found = {(each.steps, each.sampling.rate, each.queries) for each in releases}
    expected = {(_steps(config), rate, each.queries) for each in releases[:1]}
    if rounds != list(range(1, config.federation.rounds + 1)) or found != expected:
        raise RunFailedError(f"the ledger of client {client} does not hold every round and step that the scenario says")


def _steps(config: RunConfig) -> int:
    """Return the steps of a round."""
    if config.training.local_steps is None:
        raise ValueError("the scenario sets training.local-steps")
    return config.training.local_steps


@lru_cache(maxsize=1024)  # clients of one size have one noise
def _opacus(noise: float, rate: float, steps: int, delta: float) -> tuple[float, float]:
    """Return epsilon by PRV and by RDP, the way a user of Opacus alone would get it."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # of logarithms of zero in PRV's tails, and of RDP's last order
        from opacus.accountants import PRVAccountant, RDPAccountant

        prv, rdp = PRVAccountant(), RDPAccountant()
        for _ in range(steps):
            prv.step(noise_multiplier=noise, sample_rate=rate)
            rdp.step(noise_multiplier=noise, sample_rate=rate)
        return float(prv.get_epsilon(delta, eps_error=_PRV_ERROR)), float(rdp.get_epsilon(delta))
