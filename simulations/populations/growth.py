"""Hold populations of 1,000 to 100,000 clients against each other: time and memory of a round of 1,000 or 10,000."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedlearn.errors import RunFailedError
from simulations.runs import Answer, arguments, finish, progress, stated

POPULATIONS = (1_000, 10_000, 100_000)
COHORT, ROUNDS = 1_000, 10
COHORTS = (10_000,)
"""Rounds of so many, drawn from the largest population."""

MOST_MB = 100.0
"""How much more memory the largest population may take than the smallest."""

_MEASURE = """
import json, pathlib, resource, sys, time
from simulations.runs import run

class Watch:
    def __init__(self):
        self.ends_s = []
    def replied(self, round_number, done, total):
        pass
    def finished_round(self, line):
        self.ends_s.append(time.monotonic())

watch, begun_s = Watch(), time.monotonic()
finished = run(pathlib.Path(sys.argv[1]), sys.argv[2:], observe=lambda _folder: watch)
ends_s = watch.ends_s
peak_kb = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
print(json.dumps({
    "accuracy": finished.summary["metrics"]["accuracy"],
    "respondents": sum(line["respondents"] for line in finished.lines),
    "asked": sum(line["cohort"] for line in finished.lines),
    "start_s": ends_s[0] - begun_s,
    "round_s": (ends_s[-1] - ends_s[0]) / (len(ends_s) - 1) if len(ends_s) > 1 else ends_s[0] - begun_s,
    "server_mb": peak_kb[0] / 1024,
    "worker_mb": peak_kb[1] / 1024,
}))
"""


def measured(overrides: Sequence[str]) -> dict[str, Any]:
    """Run the scenario in a process of its own, whose memory is nobody else's; return what it took."""
    scenario = str(Path(__file__).with_name("scenario.toml"))
    done = subprocess.run(  # noqa: S603 - ourselves
        [sys.executable, "-c", _MEASURE, scenario, *overrides], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RunFailedError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "the run failed")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def experiment(
    overrides: Sequence[str],
    *,
    populations: Sequence[int] = POPULATIONS,
    cohorts: Sequence[int] = COHORTS,
    rounds: int = ROUNDS,
) -> Answer:
    """Return time and memory by population at one cohort, and by cohort at the largest population."""
    settings = [(clients, COHORT, rounds) for clients in populations]
    settings += [(populations[-1], cohort, 2) for cohort in cohorts]
    found = []
    for clients, cohort, count in settings:
        progress(f"{cohort:,} of {clients:,} clients a round, {count} rounds")
        wanted = [f"federation.clients={clients}", f"federation.cohort={cohort}", f"federation.rounds={count}"]
        found.append({"clients": clients, "cohort": cohort, **measured([*wanted, *overrides])})
    smallest, largest = found[0], found[len(populations) - 1]
    more_mb = max(largest[name] - smallest[name] for name in ("server_mb", "worker_mb"))
    whole = all(each["respondents"] == each["asked"] for each in found)
    met = more_mb < MOST_MB and whole
    return Answer(
        columns=("clients", "a round", "seconds a round", "clients/s", "server MB", "worker MB", "accuracy"),
        rows=[
            [
                f"{each['clients']:,}",
                f"{each['cohort']:,}",
                f"{each['round_s']:.2f}",
                f"{each['cohort'] / each['round_s']:,.0f}",
                f"{each['server_mb']:.0f}",
                f"{each['worker_mb']:.0f}",
                f"{each['accuracy']:.4f}",
            ]
            for each in found
        ],
        verdict=f"{largest['clients'] // smallest['clients']} times the population takes {more_mb:+.1f} MB "
        f"(below {MOST_MB:g}), and every client that was asked answered: {stated(met)}.",
        met=met,
        body={"measured": found, "more_mb": round(more_mb, 1)},
    )


if __name__ == "__main__":
    given = arguments(__doc__).parse_args()
    finish(functools.partial(experiment, given.set), as_json=given.json)
