"""Ours beside the SecAgg+ of Flower 1.41: time, upload and memory, in turns, in one process.

Flower and ours take turns, F O F O …, so that whatever else the machine does meets both. What is timed on each side
stands in ``flower_secagg.py`` and in ``cohort.py``. A mask's expansion is measured against ``openssl speed``.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedlearn.cli.rendering import bytes_text, duration_text
from fedlearn.secagg.prg import add_masks
from fedlearn.secagg.ring import words_needed
from simulations.benchmarks.secagg.cohort import BITS, Round, Setting, run_round, server_memory
from simulations.benchmarks.secagg.flower_secagg import flower_client, flower_server, flower_upload_bytes
from simulations.benchmarks.secagg.openssl_speed import openssl_aes256ctr_bytes_per_s
from simulations.runs import Answer, finish, progress

REPEATS = 5
PARAMETERS = 1_000_000
CLIENTS = (20, 100)
DROPPED = 2
"""How many have shared and do not send a vector, where some do not."""

MASKS = 20
MASKS_S = 0.3
"""Seconds of processor time for one measurement of the expansion."""

SERVER_100 = (100, 1000)
"""Clients and parameters of the round in which Flower's server takes a minute, whatever the parameters."""

CLIENT_BARS = {20: 5.0, 100: 20.0}
SERVER_BARS = {20: 50.0}
UPLOAD_BAR, MASKS_BAR = 2.7, 0.6


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of the table: two values, their ratio, and what was promised of it.

    Attributes:
        name: what was measured.
        peer, ours: medians, as text; empty: there is none.
        value: what the bar is for; ``None``: it could not be measured.
        text: the value as text.
        least, most: the bar, one of them at most.
        body: the same for machines.
    """

    name: str
    peer: str = ""
    ours: str = ""
    value: float | None = None
    text: str = ""
    least: float | None = None
    most: float | None = None
    body: dict[str, Any] = field(default_factory=dict)

    @property
    def barred(self) -> bool:
        """Whether something was promised."""
        return self.least is not None or self.most is not None

    @property
    def verdict(self) -> str:
        """``met``, ``missed`` or ``not measured``; empty where nothing was promised."""
        if not self.barred:
            return ""
        if self.value is None:
            return "not measured"
        low = self.least is not None and self.value < self.least
        return "missed" if low or (self.most is not None and self.value > self.most) else "met"

    @property
    def cells(self) -> list[str]:
        """The line of the table."""
        bar = f"≥ {self.least:g}" if self.least is not None else f"≤ {self.most:g}" if self.most is not None else ""
        return [self.name, self.peer, self.ours, self.text, bar, self.verdict]

    @property
    def table(self) -> dict[str, Any]:
        """The line for machines."""
        bar = {"least": self.least, "most": self.most, "verdict": self.verdict} if self.barred else {}
        return {"name": self.name, "value": self.value, **bar, **self.body}


def experiment(
    *,
    repeats: int = REPEATS,
    parameters: int = PARAMETERS,
    clients: Sequence[int] = CLIENTS,
    server_100: bool = False,
    masks_s: float = MASKS_S,
) -> Answer:
    """Measure everything, and say which bars were met."""
    rounds: dict[int, Round] = {}
    lines = _clients_and_servers(clients, parameters, repeats, rounds)
    if server_100:
        n, d = SERVER_100
        progress(f"the server of {n} clients: a minute and more")
        lines += [_ratio(f"server, n = {n}, d = {d:,}", _turns(*_servers(n, d, 0), 1))]
    progress("masks, memory")
    lines += [*_upload(rounds, parameters), _masks(parameters, repeats, masks_s), *_memory(clients, parameters)]
    missed = [each.name for each in lines if each.verdict not in ("", "met")]
    of_bars = f"{sum(each.barred for each in lines)} bars" + (
        "" if parameters == PARAMETERS else f", which were set for {PARAMETERS:,} parameters and not {parameters:,}"
    )
    return Answer(
        columns=("", "peer", "ours", "value", "bar", ""),
        rows=[each.cells for each in lines],
        verdict=f"All met of {of_bars}." if not missed else f"Of {of_bars}, not met: {'; '.join(missed)}.",
        met=not missed,
        body={"parameters": parameters, "repeats": repeats, "lines": [each.table for each in lines]},
    )


# -- time ----------------------------------------------------------------------------------------------------------

Seconds = Callable[[], float]


def _clients_and_servers(clients: Sequence[int], d: int, repeats: int, rounds: dict[int, Round]) -> list[Line]:
    """Return the lines of a client for each cohort, and of the server for the first; keep a round of each."""
    lines = []
    for n in clients:
        progress(f"a client of {n}, {repeats} turns")
        lines.append(_ratio(f"client, n = {n}", _turns(*_one_client(n, d, rounds), repeats), least=CLIENT_BARS.get(n)))
    n = clients[0]
    for dropped in (0, min(DROPPED, n - Setting(clients=n, parameters=d).least)):
        progress(f"the server of {n} clients, {dropped} of them dropped, {repeats} turns")
        name = f"server, n = {n}, {dropped} dropped"
        lines.append(_ratio(name, _turns(*_servers(n, d, dropped), repeats), least=SERVER_BARS.get(n)))
    return lines


def _one_client(n: int, d: int, rounds: dict[int, Round]) -> tuple[Seconds, Seconds]:
    """Return what times one client of ``n``, Flower's and ours: all of ours take the same steps, hence a median."""

    def ours() -> float:
        rounds[n] = run_checked(Setting(clients=n, parameters=d))
        return statistics.median(rounds[n].client_s.values())

    return lambda: flower_client(n, d), ours


def _servers(n: int, d: int, dropped: int) -> tuple[Seconds, Seconds]:
    """Return what times the server of ``n`` clients, Flower's and ours."""
    setting = Setting(clients=n, parameters=d, lost=dict.fromkeys(range(dropped), "mask"))
    return lambda: flower_server(n, d, dropped=dropped), lambda: run_checked(setting).server_s


def run_checked(setting: Setting) -> Round:
    """Run a session of ours.

    Raises:
        RuntimeError: its sum is wrong: what was timed is no round.
    """
    found = run_round(setting)
    if not found.exact:
        raise RuntimeError(f"the sum of {found.survivors} clients is not that of their updates")
    return found


def _turns(flower: Seconds, ours: Seconds, repeats: int) -> tuple[list[float], list[float]]:
    """Let both take turns."""
    both = [(flower(), ours()) for _ in range(repeats)]
    return [each[0] for each in both], [each[1] for each in both]


def _ratio(name: str, seconds: tuple[list[float], list[float]], *, least: float | None = None) -> Line:
    """Return the line of two series of seconds."""
    flower_s, ours_s = map(statistics.median, seconds)
    return Line(
        name=name,
        peer=_duration(flower_s),
        ours=_duration(ours_s),
        value=flower_s / ours_s,
        text=f"{flower_s / ours_s:.1f} ×",
        least=least,
        body={"flower_s": flower_s, "ours_s": ours_s, "flower_all_s": seconds[0], "ours_all_s": seconds[1]},
    )


def _duration(seconds: float) -> str:
    """Return seconds as text, short ones in milliseconds."""
    return f"{1000 * seconds:.1f} ms" if seconds < 1 else duration_text(seconds)


# -- bytes ---------------------------------------------------------------------------------------------------------


def _upload(rounds: dict[int, Round], d: int) -> list[Line]:
    """Return the lines of what a client sends: its vector, and everything else, which grows with the cohort."""
    clients = list(rounds)
    flower, ours = flower_upload_bytes(d) / d, rounds[clients[0]].masked_bytes / d
    lines = [
        Line(
            name="upload, bytes/parameter",
            peer=f"{flower:.3f}",
            ours=f"{ours:.3f}",
            value=ours,
            text=f"{ours:.3f}",
            most=UPLOAD_BAR,
            body={"flower": flower, "ours": ours},
        )
    ]
    rests = [max(each.uploaded.values()) - each.masked_bytes for each in rounds.values()]
    for n, rest, each in zip(clients, rests, rounds.values(), strict=True):
        lines.append(_bytes_line(f"upload, the rest, n = {n}", rest, n))
        lines.append(_bytes_line(f"download, n = {n}", max(each.downloaded.values()), n))
    growth, most = rests[-1] / rests[0], clients[-1] / clients[0]
    name = f"the rest, n = {clients[0]} to {clients[-1]}"
    return [*lines, Line(name=name, value=growth, text=f"{growth:.2f} ×", most=most)]


def _bytes_line(name: str, count: int, n: int) -> Line:
    """Return the line of bytes that grow with the cohort."""
    return Line(name=name, ours=bytes_text(count), value=float(count), text=f"{count / n:.0f} B × n")


# -- masks ---------------------------------------------------------------------------------------------------------


def _masks(d: int, repeats: int, seconds: float) -> Line:
    """Return the line of a mask's expansion: keystream and addition, beside the keystream alone by OpenSSL."""
    name = f"{MASKS} masks, bytes/s"
    try:
        pairs = [(openssl_aes256ctr_bytes_per_s(), masks_bytes_per_s(d, seconds)) for _ in range(repeats)]
    except (FileNotFoundError, RuntimeError) as error:
        progress(str(error))
        return Line(name=name, least=MASKS_BAR, body={"problem": str(error)})
    openssl, ours = (statistics.median(each[side] for each in pairs) for side in (0, 1))
    return Line(
        name=name,
        peer=f"{bytes_text(openssl)}/s",
        ours=f"{bytes_text(ours)}/s",
        value=ours / openssl,
        text=f"{ours / openssl:.2f}",
        least=MASKS_BAR,
        body={"openssl_bytes_per_s": openssl, "ours_bytes_per_s": ours},
    )


def masks_bytes_per_s(d: int, seconds: float = MASKS_S) -> float:
    """Return how many bytes of masks are expanded and added in a second of processor time, as ``openssl`` counts it."""
    vector = np.zeros(words_needed(d, BITS), np.uint64)
    keys = [os.urandom(32) for _ in range(MASKS)]
    add_masks(vector, plus=keys)
    begun, done, took_s = time.process_time(), 0, 0.0
    while took_s < seconds:
        add_masks(vector, plus=keys)
        done += MASKS * vector.nbytes
        took_s = time.process_time() - begun
    return done / took_s


# -- memory --------------------------------------------------------------------------------------------------------


def _memory(clients: Sequence[int], d: int) -> list[Line]:
    """Return the lines of what the server holds at most."""
    lines = []
    for n in clients:
        found = server_memory(Setting(clients=n, parameters=d))
        vectors = found.summed / (8 * words_needed(d, BITS))
        lines.append(
            Line(
                name=f"server's memory, n = {n}",
                ours=bytes_text(found.summed),
                value=float(found.summed),
                text=f"{vectors:.1f} vectors",
                body={"summed_bytes": found.summed, "decoded_bytes": found.decoded, "vectors": vectors},
            )
        )
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--repeats", type=int, default=REPEATS, metavar="N", help=f"turns (default: {REPEATS})")
    parser.add_argument("--parameters", type=int, default=PARAMETERS, metavar="D", help=f"(default: {PARAMETERS:,})")
    parser.add_argument(
        "--clients",
        type=int,
        nargs="+",
        default=CLIENTS,
        metavar="N",
        help="(default: 20 100); the server has the first",
    )
    parser.add_argument("--server-100", action="store_true", help="also Flower's server with 100 clients: minutes")
    parser.add_argument("--json", action="store_true", help="end with one JSON object on a line of its own")
    given = parser.parse_args()
    finish(
        lambda: experiment(
            repeats=given.repeats, parameters=given.parameters, clients=given.clients, server_100=given.server_100
        ),
        as_json=given.json,
    )
