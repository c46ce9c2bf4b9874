"""``simulate --profile``: where the time of a run went, as a table for people and an object for machines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fedlearn import profiling
from fedlearn.cli.rendering import count_text, duration_text, table
from fedlearn.profiling import Profile, Spent

if TYPE_CHECKING:
    from rich.console import Group

__all__ = ["CLIENTS", "SERVER", "ProfiledRun", "recorded"]

SERVER = {
    "start": "start and end: imports, data, what is left",
    "draw": "drawing cohorts",
    "messages": "making, carrying and reading messages",
    "wait": "waiting for clients",
    "sum": "summing updates",
    "secagg": "secure aggregation",
    "update": "mean, noise and step",
    "validate": "validating",
    "keep": "keeping: checkpoint, ledger, metrics",
    "watch": "display and trackers",
    "rounds": "the rest of the rounds",
}
"""What the server's spans are called."""

CLIENTS = {
    "decode": "reading messages",
    "load data": "loading data",
    "train": "training",
    "encode": "writing answers",
    "send": "handing answers over",
    "evaluate": "testing the model",
    "client": "the rest of the clients",
}
"""What the clients' spans are called."""

_OTHER = "other"


class ProfiledRun:
    """An observer that counts what ran while the time was recorded, and then says where it went."""

    def __init__(self) -> None:
        self.profile = Profile(wall_s=0.0, here={})
        self.rounds = self.updates = 0

    def replied(self, round_number: int, done: int, total: int) -> None:
        """Do nothing."""

    def finished_round(self, line: Mapping[str, Any]) -> None:
        """Count the round and the clients that trained in it."""
        self.rounds += 1
        self.updates += int(line["respondents"])

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON has it.

        ``share`` is of ``wall_s``, for phases in workers of what ``workers`` had together: ``wall_s`` less ``start``,
        each. ``us_per_client`` is for each update that was taken, of all workers together; ``null`` for ``start``.
        """
        return {
            "wall_s": round(self.profile.wall_s, 6),
            "rounds": self.rounds,
            "client_updates": self.updates,
            "phases": [
                {
                    "where": where,
                    "phase": name,
                    "seconds": round(spent.seconds, 6),
                    "share": round(self._share(where, spent), 6),
                    "us_per_client": self._each_us(name, spent),
                    "times": spent.times,
                }
                for where, name, spent in self._rows()
            ],
            "workers": [
                {"busy_s": round(_worked_s(each), 6), "busy": round(_worked_s(each) / self._rounds_s, 6)}
                for each in self.profile.workers
            ],
        }

    def tables(self) -> Group:
        """Return it as tables: this process, then the workers where there are any."""
        from rich.console import Group
        from rich.text import Text

        about = f"{count_text(self.rounds, 'round')}, {count_text(self.updates, 'client update')}"
        parts: list[Any] = [Text(f"Where the time went: {duration_text(self.profile.wall_s)}, {about}", style="bold")]
        for where, noun in (("server", "this process"), ("workers", "in the workers")):
            rows = [
                (_called(name), f"{spent.seconds:.3f}", *self._shares(place, name, spent))
                for place, name, spent in self._rows()
                if (place == "workers") == (where == "workers")
            ]
            if rows:
                parts.append(table((noun, "seconds", "share", "µs a client"), rows))
        busy = [f"{100 * _worked_s(each) / self._rounds_s:.0f} %" for each in self.profile.workers]
        if busy:
            parts.append(Text(f"workers busy while rounds ran: {', '.join(busy)}"))
        return Group(*parts)

    @property
    def _rounds_s(self) -> float:
        """How long there was something to do for workers."""
        start = self.profile.here.get("start", Spent(0.0, 0))
        return max(self.profile.wall_s - start.seconds, 1e-9)

    def _rows(self) -> Iterator[tuple[str, str, Spent]]:
        """Yield where (``server``, ``clients`` in this process, ``workers``), what and how long, in a fixed order."""
        here = self.profile.here
        for name in _ordered(here):
            yield ("clients" if name in CLIENTS else "server"), name, here[name]
        yield "server", _OTHER, Spent(max(self.profile.wall_s - _together_s(here), 0.0), 1)
        together: dict[str, Spent] = {}
        for each in self.profile.workers:
            for name, spent in each.items():
                before = together.get(name, Spent(0.0, 0))
                together[name] = Spent(before.seconds + spent.seconds, before.times + spent.times)
        for name in _ordered(together):
            yield "workers", name, together[name]

    def _share(self, where: str, spent: Spent) -> float:
        """Return the share of the time that there was."""
        whole_s = self.profile.wall_s if where != "workers" else self._rounds_s * len(self.profile.workers)
        return spent.seconds / whole_s if whole_s else 0.0

    def _each_us(self, name: str, spent: Spent) -> float | None:
        """Return microseconds for each update, where there was one; nothing of what does not grow with them."""
        return round(1e6 * spent.seconds / self.updates, 3) if self.updates and name != "start" else None

    def _shares(self, where: str, name: str, spent: Spent) -> tuple[str, str]:
        """Return the share of the time and the microseconds for each update, in words."""
        each = self._each_us(name, spent)
        return f"{100 * self._share(where, spent):.1f} %", "·" if each is None else f"{each:,.1f}"


@contextmanager
def recorded() -> Iterator[ProfiledRun]:
    """Record where the time goes within; the run that is yielded says it afterwards."""
    run = ProfiledRun()
    profiling.start()
    try:
        yield run
    finally:
        run.profile = profiling.stop()


def _together_s(spent: Mapping[str, Spent]) -> float:
    """Return how long all spans of one process took."""
    return sum(each.seconds for each in spent.values())


def _worked_s(spent: Mapping[str, Spent]) -> float:
    """Return how long a worker worked: it may wait for room while it hands an answer over."""
    return _together_s(spent) - spent.get("send", Spent(0.0, 0)).seconds


def _ordered(names: Mapping[str, Spent]) -> list[str]:
    """Return names in the order of the tables above, then those that stand in neither."""
    known = [name for name in (*SERVER, *CLIENTS) if name in names]
    return [*known, *sorted(set(names) - set(known))]


def _called(name: str) -> str:
    """Return what a span is called."""
    return SERVER.get(name) or CLIENTS.get(name) or name
