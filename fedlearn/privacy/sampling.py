"""Who is asked to a round, together with the assumption that the draw justifies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fedlearn.privacy.gaussian import bernoulli
from fedlearn.privacy.noise import Keystream
from fedlearn.privacy.releases import Sampling
from fedlearn.sources import SeedTree

__all__ = ["Draw", "draw_cohort", "draw_poisson", "draw_separated"]


@dataclass(frozen=True, kw_only=True)
class Draw:
    """A cohort and how it was drawn: made by the functions of this module, each of which says what is true of it.

    Attributes:
        cohort: the clients invited, in ascending order, none twice.
        population: how many clients it was drawn from.
        method: ``everyone``; ``fixed-size``: uniformly without replacement; ``poisson``: each for itself with
            probability ``rate``; ``separated``: of those that were not invited for some rounds. Only ``poisson``
            justifies the amplification of Poisson sampling.
        rate: each client's probability, or for the other methods the share that was invited.
    """

    cohort: tuple[int, ...]
    population: int
    method: Literal["everyone", "fixed-size", "poisson", "separated"]
    rate: float = 1.0

    def __post_init__(self) -> None:
        if any(later <= earlier for earlier, later in zip(self.cohort, self.cohort[1:], strict=False)):
            raise ValueError("a cohort is in ascending order, and no client is in it twice")

    def sampling(self, *, claimed: bool, enrolled: int, share: float) -> Sampling:
        """Return what a ledger says of the draw: what was done, and whether its secrecy may be claimed.

        A Poisson draw that is not ``claimed`` (somebody may have watched it) is called ``poisson-observed``, which
        amplifies nothing. How many clients were there, or were invited, is nobody's business but the server's, so that
        the numbers are those of the configuration.

        Args:
            claimed: whether the draw's secrecy is claimed.
            enrolled: N, how many clients the federation has.
            share: the expected share of them in a cohort; of a Poisson draw its own rate is told.
        """
        observed = self.method == "poisson" and not claimed
        return Sampling(
            method="poisson-observed" if observed else self.method,
            rate=self.rate if self.method == "poisson" else share,
            population=enrolled,
        )


def draw_cohort(population: Sequence[int], size: int, seeds: SeedTree) -> Draw:
    """Draw ``size`` clients uniformly without replacement; the order of ``population`` does not matter.

    The draw depends only on the arguments, so a run can begin again at any round and draw the same cohorts.

    >>> draw_cohort([3, 1, 2], 3, SeedTree.root(0)).cohort
    (1, 2, 3)

    Raises:
        ValueError: ``size`` is not in [1, len(population)].
    """
    clients = _distinct(population)
    if not 1 <= size <= len(clients):
        raise ValueError(f"cannot draw {size} of {len(clients)} clients")
    if size == len(clients):
        return Draw(cohort=tuple(clients), population=len(clients), method="everyone")
    chosen = seeds.generator().choice(len(clients), size=size, replace=False)
    cohort = tuple(sorted(clients[int(index)] for index in chosen))
    return Draw(cohort=cohort, population=len(clients), method="fixed-size", rate=size / len(clients))


def draw_poisson(population: Sequence[int], rate: float, stream: Keystream) -> Draw:
    """Invite each client with probability ``rate``, independently; the cohort may be empty, and is never cut to a size.

    Every client uses up one word of ``stream``, in ascending order, whether it is invited or not.

    Raises:
        ValueError: ``rate`` is not in (0, 1].
    """
    if not 0 < rate <= 1:
        raise ValueError(f"the sampling rate must be in (0, 1], got {rate}")
    clients = _distinct(population)
    chosen = bernoulli(stream, rate, len(clients))
    cohort = tuple(clients[index] for index in np.flatnonzero(chosen).tolist())
    return Draw(cohort=cohort, population=len(clients), method="poisson", rate=rate)


def draw_separated(
    population: Sequence[int],
    size: int,
    *,
    round_number: int,
    last_round: Mapping[int, int],
    min_separation: int,
    seeds: SeedTree,
) -> Draw:
    """Draw up to ``size`` of the clients that did not take part in the last ``min_separation - 1`` rounds.

    Fewer where fewer are left: a client that is not due is never invited, whoever is missing.

    Args:
        population: the clients that are there.
        size: how many to draw.
        round_number: the round to draw for.
        last_round: the round in which a client was last invited, by client; those never invited are not in it.
        min_separation: rounds from one participation to the next, at least 1.
        seeds: where the order comes from; no secret, since nothing is claimed of it.
    """
    clients = _distinct(population)
    due = _due(clients, round_number=round_number, last_round=last_round, min_separation=min_separation)
    chosen = seeds.generator().permutation(len(due))[:size]
    cohort = tuple(sorted(due[int(index)] for index in chosen))
    return Draw(cohort=cohort, population=len(clients), method="separated", rate=len(cohort) / max(len(clients), 1))


def _due(
    clients: Sequence[int], *, round_number: int, last_round: Mapping[int, int], min_separation: int
) -> Sequence[int]:
    """Return the clients that rested long enough, in ascending order."""
    resting = {client for client, last in last_round.items() if round_number - last < min_separation}
    if not isinstance(clients, range):
        return [client for client in clients if client not in resting]
    rested = np.ones(len(clients), dtype=np.bool_)
    rested[[clients.index(client) for client in resting if client in clients]] = False
    due: list[int] = (np.flatnonzero(rested) + clients.start).tolist()
    return due


def _distinct(population: Sequence[int]) -> Sequence[int]:
    """Return the clients in ascending order, each once: one that is enrolled twice under one name is one client.

    A range without gaps is that already, and stays one: of a simulation's 100,000 clients no list is made.
    """
    if isinstance(population, range) and population.step == 1:
        return population
    return sorted(set(population))
