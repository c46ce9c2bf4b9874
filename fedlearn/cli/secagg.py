"""``fedlearn secagg``: what the server saw of the clients, and the keys and lists that say who a client is."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from fedlearn.cli.arguments import AsJson
from fedlearn.cli.secagg_record import MODES, Try, flatness, flatness_text, read_tries
from fedlearn.errors import MissingError, UsageError

__all__ = ["SUB_VERBS", "allow", "inspect", "key"]

_MOST_ROWS = 12
_BARS = " ▁▂▃▄▅▆▇█"
_LINES = 6  # how high the bars of a histogram are
_KEY = re.compile(r"[0-9a-fA-F]{64}")


def inspect(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="The folder of a run under secure aggregation.", show_default=False)
    ],
    round_number: Annotated[
        int | None, typer.Option("--round", metavar="N", min=1, help="Left out: the last.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what the server saw in a round: who took part and how far, what it cost, and what a vector looks like."""
    tries = read_tries(run)
    chosen = round_number or tries[-1].round_number
    of_round = [each for each in tries if each.round_number == chosen]
    if not of_round:
        rounds = sorted({each.round_number for each in tries})
        raise UsageError(f"--round {chosen}: the run has rounds {rounds[0]:,} to {rounds[-1]:,} only")
    last = of_round[-1]
    if as_json:
        from fedlearn.cli.rendering import echo_json

        picture = _draw(run, last)
        flat = flatness(last.seen.counts) if last.seen else None
        told = {"chi2": flat.chi2, "dof": flat.dof, "p": flat.p} if flat else None
        echo_json({**last.line, "flatness": told, "picture": str(picture.resolve()) if picture else None})
    else:
        _show(last, of_round[:-1])
        _say(f"Picture: {picture}" if (picture := _draw(run, last)) else "No vector was kept of this try")


def key(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where the private key goes.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Make a key (Ed25519) for a device, a server or a registry. A file that exists is never overwritten."""
    from fedlearn.secagg.keys import SigningKey
    from fedlearn.sources import SecureRandom

    made = SigningKey.generate(SecureRandom())
    made.write(file)
    if as_json:
        from fedlearn.cli.rendering import echo_json

        echo_json({"file": str(file.resolve()), "public_key": made.public.hex()})
        return
    _say(f"{file}: a new private key, which only you can read. It never leaves this machine")
    _say(f"Its public key: {made.public.hex()}")
    _say("\nNext, if it is a device's: whoever keeps the registry's key puts the device on the list", style="dim")
    _say(f"  fedlearn secagg allow devices.json --registry registry.pem {made.public.hex()}")
    _say(
        "(with --add where there is a list). A registry's or a server's public key is pinned on the devices",
        style="dim",
    )


def allow(
    allow_list: Annotated[Path, typer.Argument(metavar="LIST", help="The list to write.", show_default=False)],
    devices: Annotated[
        list[str],
        typer.Argument(
            metavar="DEVICE…",
            help="A device's public key in hex, or a file of such keys, one a line.",
            show_default=False,
        ),
    ],
    registry: Annotated[
        Path, typer.Option(metavar="REGISTRY.pem", help="The registry's private key, to sign with.", show_default=False)
    ],
    add: Annotated[bool, typer.Option("--add", help="Keep the devices that are on the list already.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write the list of the devices that may take part, signed by the registry."""
    from fedlearn.secagg.allow_list import AllowList
    from fedlearn.secagg.keys import SigningKey

    signer = SigningKey.read(registry)
    named = {public for argument in devices for public in _public_keys(argument)}
    before = _list_before(allow_list, signer.public, add=add)
    made = AllowList.of(named | before if add else named)
    made.write(allow_list, signer)
    added, removed = len(made.devices - before), len(before - made.devices)
    if as_json:
        from fedlearn.cli.rendering import echo_json

        body = {"list": str(allow_list.resolve()), "devices": len(made), "added": added, "removed": removed}
        echo_json({**body, "registry": signer.public.hex()})
        return
    from fedlearn.cli.rendering import count_text

    _say(f"{allow_list}: {count_text(len(made), 'device')} may take part ({added:,} added, {removed:,} removed)")
    _say(f"The registry's public key, for the devices to pin: {signer.public.hex()}")


SUB_VERBS: dict[str, Callable[..., None]] = {"inspect": inspect, "key": key, "allow": allow}


# -- who is a device -----------------------------------------------------------------------------------------------


def _public_keys(argument: str) -> set[bytes]:
    """Return the public keys that an argument names: itself, or those in a file."""
    if _KEY.fullmatch(argument):
        return {bytes.fromhex(argument)}
    path = Path(argument)
    if not path.is_file():
        raise UsageError(f"{argument!r} is neither a public key (64 hex digits) nor a file with one")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise MissingError(f"{argument}: cannot be read: {error.strerror}") from error
    if data.lstrip().startswith(b"-----BEGIN"):
        raise UsageError(f"{argument} is a private key, which stays on its device; give the device's public key")
    lines = [(number, line.strip()) for number, line in enumerate(data.decode("ascii", "replace").splitlines(), 1)]
    keys = [(number, line) for number, line in lines if line]
    wrong = next((number for number, line in keys if not _KEY.fullmatch(line)), None)
    if wrong is not None or not keys:
        place = f", line {wrong}" if wrong is not None else ""
        raise UsageError(f"{argument}{place}: not public keys (64 hex digits a line)")
    return {bytes.fromhex(line) for _, line in keys}


def _list_before(path: Path, registry: bytes, *, add: bool) -> frozenset[bytes]:
    """Return who is on the list already; what is no list of this registry's is not replaced."""
    from fedlearn.secagg.allow_list import AllowList

    if not path.exists():
        if add:
            raise MissingError(f"{path} does not exist, so nothing can be added; leave out --add to begin it")
        return frozenset()
    try:
        return AllowList.read(path, registry).devices
    except MissingError as error:
        if add:
            raise
        raise UsageError(f"{path} exists and is no list that this registry signed; name another file") from error


# -- what is said --------------------------------------------------------------------------------------------------


def _say(text: str, *, style: str = "") -> None:
    """Write a line that can be copied as a whole, however narrow the terminal is."""
    from fedlearn.cli.rendering import console

    console().print(text, style=style, soft_wrap=True)


def _show(last: Try, earlier: Sequence[Try]) -> None:
    """Write what the server saw of a round in its last try."""
    from fedlearn.cli.rendering import console, facts

    stdout = console()
    stdout.print(f"\n{_saw(last)}\n", style="bold" if last.mode != "ideal" else "bold red")
    number = f"{last.round_number:,}" + (f", try {last.attempt}" if last.attempt > 1 else "")
    stdout.print(facts(_facts(last), title=f"Round {number}"))
    for each in earlier:
        end = f"given up in {each.aborted[0]}: {each.aborted[1]}" if each.aborted else "no sum"
        end = f"the sum of {each.in_sum:,} updates" if each.released else end
        stdout.print(f"Before it, try {each.attempt}: {end}", style="dim")
    narrow = stdout.width < 72
    stdout.print(_leg_table(last, narrow=narrow))
    lost = [client for client, leg in last.furthest.items() if leg != list(last.legs)[-1]]
    if lost:
        stdout.print(_lost_table(last, sorted(lost, key=lambda client: (len(client), client))))
    if _named(last):
        stdout.print(_histograms(last, narrow=narrow))
    if last.seen and last.mode != "ideal":
        stdout.print(f"\n{flatness_text(last.seen.counts)}")


def _saw(last: Try) -> str:
    """Say in a sentence or two what the server saw."""
    where = f". The try was given up in {last.aborted[0]}: {last.aborted[1]}" if last.aborted else ""
    if last.mode == "ideal":
        each = f"each of the {last.in_sum:,} encoded updates by itself"
        return f"The server saw: {each}. NOTHING WAS HIDDEN: mode ideal applies no masks{where}"
    noise = f"one vector of {last.words:,} words that looks like noise"
    if last.released:
        return f"The server saw: the sum of {last.in_sum:,} updates. Of each single client: {noise}"
    vectors = f"Of each of {last.in_sum:,} clients: {noise}, and stays so" if last.in_sum else "No vector came"
    return f"The server saw: no sum{where}. {vectors}"


def _facts(last: Try) -> list[tuple[str, str]]:
    """Return the round in names and values."""
    rows = [("mode", MODES[last.mode]), ("invited", f"{last.counts.get('invited', len(last.furthest)):,}")]
    rows.append(("in the sum", f"{last.in_sum:,}" if last.released else "there is no sum"))
    if last.mode != "ideal" and all(last.graph):
        rows.append(("neighbours", "{:,} a client; shares of {:,} take one mask off".format(*last.graph)))
    rows.append(("vector", f"{last.size:,} integers of {last.bits} bits, in {last.words:,} words of 64 bits"))
    if last.transcript:
        rows.append(("transcript", last.transcript))
    return rows


def _leg_table(last: Try, *, narrow: bool) -> Any:
    """Return a row a leg: who was asked, who answered, and the bytes."""
    from fedlearn.cli.rendering import bytes_text, table

    rows, asked = [], last.counts.get("invited")
    for leg, (count, carries) in last.legs.items():
        answered = last.counts.get(count)
        took_place = answered is not None or leg in last.sent_bytes
        cells = [f"{number:,}" if took_place and number is not None else "·" for number in (asked, answered)]
        sent = [bytes_text(size) for size in last.sent_bytes[leg]] if leg in last.sent_bytes else ["·", "·"]
        rows.append([leg if narrow else f"{leg}: {carries}", *cells, *sent])
        asked = answered
    totals = [bytes_text(sum(each[way] for each in last.sent_bytes.values())) for way in (0, 1)]
    return table(
        ["leg" if narrow else "leg: what a client sends", "asked", "answered", "up", "down"],
        rows,
        totals=["all", "", "", *totals],
    )


def _lost_table(last: Try, lost: Sequence[str]) -> Any:
    """Return who did not get to the end, how far, and why; many are put together."""
    from fedlearn.cli.rendering import count_text, table

    came = list(last.legs)[list(last.legs).index("mask" if "mask" in last.legs else "ideal") :]
    groups: dict[tuple[str, str], list[str]] = {}
    for client in lost:
        groups.setdefault((last.furthest[client], last.failures.get(client, "·")), []).append(client)
    rows = []
    for (leg, why), clients in groups.items():
        summed = ("yes" if leg in came else "no") if last.released else "·"
        many = len(lost) > _MOST_ROWS and len(clients) > 1
        some = ", ".join(clients[:3]) + (", …" if len(clients) > 3 else "")
        names = [f"{count_text(len(clients), 'client')}: {some}"] if many else [f"client {each}" for each in clients]
        rows += [[name, leg or "nothing", why, summed] for name in names]
    return table(["not to the end", "last answered", "why", "in the sum"], rows)


def _named(last: Try) -> dict[str, Sequence[int]]:
    """Return the histograms by what they are."""
    if last.mode == "ideal":
        known = last.seen or last.plain
        return {f"Client {known.client}, not masked: what the server got": known.counts} if known else {}
    found: dict[str, Sequence[int]] = {}
    if last.seen:
        found[f"Client {last.seen.client}, masked: what the server got"] = last.seen.counts
    if last.plain:
        found[f"Client {last.plain.client}, plain: known only because this is simulated"] = last.plain.counts
    return found


def _histograms(last: Try, *, narrow: bool) -> Any:
    """Return the histograms as bars side by side, each as high as its highest bin."""
    from rich.table import Table
    from rich.text import Text

    columns = 16 if narrow else 32
    grid = Table.grid(padding=(0, 4, 0, 0))
    cells: list[list[Text]] = [[], [], []]
    for (name, counts), style in zip(_named(last).items(), ("cyan", "yellow"), strict=False):
        grid.add_column(width=columns, overflow="fold")
        bars, highest = _bars(counts, columns)
        power = last.bits - 1
        ends = f"-2^{power}" + "0".center(columns - 2 * len(f"-2^{power}") + 1) + f"2^{power}"
        cells[0].append(Text(name))
        cells[1].append(Text(bars, style=style, no_wrap=True))
        cells[2].append(Text(f"{ends}\nhighest: {highest:,} of {sum(counts):,}", style="dim"))
    for row in cells:
        grid.add_row(*row)
    return grid


def _bars(counts: Sequence[int], columns: int) -> tuple[str, int]:
    """Return a histogram as lines of blocks, from the top down, and how much its highest column holds."""
    each = len(counts) // columns
    merged = [sum(counts[at : at + each]) for at in range(0, len(counts), each)]
    highest = max(merged)
    eighths = [-(-8 * _LINES * count // max(1, highest)) for count in merged]  # whatever is there is seen
    lines = [
        "".join(_BARS[min(8, max(0, height - 8 * line))] for height in eighths) for line in reversed(range(_LINES))
    ]
    return "\n".join(lines), highest


def _draw(run: Path, last: Try) -> Path | None:
    """Write the picture; ``None`` where there is nothing to draw."""
    if not (named := _named(last)):
        return None
    from fedlearn.charts import draw_masked
    from fedlearn.files import write_atomic

    picture = run / f"secagg-round-{last.round_number}.svg"
    title = f"Round {last.round_number:,}: what the server saw of one client"
    write_atomic(picture, draw_masked(named, bits=last.bits, title=title).encode())
    return picture
