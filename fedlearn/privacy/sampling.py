"""Who is asked to a round, together with the assumption that the draw justifies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fedlearn.sources import SeedTree

__all__ = ["Draw", "draw_cohort"]


@dataclass(frozen=True, kw_only=True)
class Draw:
    """A cohort and how it was drawn.

    Attributes:
        cohort: the clients invited, in ascending order.
        population: how many clients it was drawn from.
        method: ``everyone``, or ``fixed-size``: uniformly without replacement. Neither justifies the amplification
            of Poisson sampling; an accountant must not claim it.
    """

    cohort: tuple[int, ...]
    population: int
    method: Literal["everyone", "fixed-size"]


def draw_cohort(population: Sequence[int], size: int, seeds: SeedTree) -> Draw:
    """Draw ``size`` clients uniformly without replacement; the order of ``population`` does not matter.

    The draw depends only on the arguments, so a run can begin again at any round and draw the same cohorts.

    >>> draw_cohort([3, 1, 2], 3, SeedTree.root(0)).cohort
    (1, 2, 3)

    Raises:
        ValueError: ``size`` is not in [1, len(population)].
    """
    clients = sorted(population)
    if not 1 <= size <= len(clients):
        raise ValueError(f"cannot draw {size} of {len(clients)} clients")
    if size == len(clients):
        return Draw(cohort=tuple(clients), population=len(clients), method="everyone")
    chosen = seeds.generator().choice(len(clients), size=size, replace=False)
    cohort = tuple(sorted(clients[int(index)] for index in chosen))
    return Draw(cohort=cohort, population=len(clients), method="fixed-size")
