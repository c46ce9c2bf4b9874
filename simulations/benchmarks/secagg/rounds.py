"""What a round costs whose server sees the sum alone: a round under secure aggregation over one of plain averaging.

As in ``simulations.benchmarks.privacy.rounds``, all runs take turns in one process and thread: every client's work and
the server's, one after the other, so that the ratio is that of all the computing in a round. On devices clients work at
the same time, and what they wait for is one client's work, the server's, and the network.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from simulations.benchmarks.privacy.rounds import TURNS, Case, Way, experiment
from simulations.runs import Answer, arguments, finish

__all__ = ["CASES", "WAYS", "masked_rounds"]

_TASK = str(Path(__file__).parents[1] / "privacy" / "task.py")
_DISTRIBUTED = ("privacy.unit=client", "privacy.trust=distributed", "privacy.noise-multiplier=1.0")
_BUDGET = ("privacy.max-epsilon=1e6",)

CASES = (
    Case(name="digits, 20 clients", task="digits", overrides=("federation.clients=20", "federation.cohort=20")),
    Case(name="digits, 100 clients", task="digits", overrides=("federation.clients=100",)),
    Case(name="784-128-10, 100 clients", task=_TASK, overrides=("federation.clients=100",)),
)
WAYS = (
    Way(name="off", overrides=("training.weighting=uniform",)),
    Way(name="ideal", overrides=("secagg.mode=ideal",)),
    Way(name="semi-honest", overrides=("secagg.mode=semi-honest",)),
    Way(name="active", overrides=("secagg.mode=active",)),
    Way(name="active, distributed", overrides=("secagg.mode=active", *_DISTRIBUTED, *_BUDGET)),
)


def masked_rounds(
    overrides: Sequence[str], *, cases: Sequence[Case] = CASES, ways: Sequence[Way] = WAYS, turns: int = TURNS
) -> Answer:
    """Return the ratio of every mode to plain averaging, case by case."""
    return experiment(overrides, cases=cases, ways=ways, turns=turns)


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--turns", type=int, default=TURNS, metavar="N", help=f"how many (default: {TURNS})")
    given = parser.parse_args()
    finish(lambda: masked_rounds(given.set, turns=given.turns), as_json=given.json)
