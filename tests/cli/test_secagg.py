"""``fedlearn secagg``: what the server saw is told as it was noted, and who is a device is what the registry signed."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedlearn.secagg.allow_list import AllowList
from fedlearn.secagg.keys import SigningKey
from fedlearn.sources import SecureRandom

Result = tuple[int, str, str]
Fedlearn = Callable[..., Result]

HALF = 2**20


def histogram(values: np.ndarray) -> list[int]:
    """Return counts in 64 equal bins over the integers of 21 bits."""
    return np.histogram(values, bins=64, range=(-HALF, HALF))[0].tolist()


CHANCE = np.random.default_rng(0)
EVEN = histogram(CHANCE.integers(-HALF, HALF, 650))
UPDATE = histogram(CHANCE.normal(0, 30_000, 650))

LINE: dict[str, Any] = {
    "round": 1,
    "attempt": 1,
    "mode": "active",
    "clients": 20,
    "degree": 19,
    "threshold": 14,
    "bits": 21,
    "dimension": 650,
    "counts": {"invited": 20, "advertised": 20, "shared": 19, "masked": 18, "confirmed": 17, "unmasked": 16},
    "furthest": {
        **{str(client): "unmask" for client in range(16)},
        "16": "consistent",
        "17": "mask",
        "18": "share",
        "19": "advertise",
    },
    "bytes": {
        "advertise": {"up": 4000, "down": 9000},
        "share": {"up": 60_000, "down": 61_000},
        "mask": {"up": 35_000, "down": 900},
        "consistent": {"up": 1200, "down": 17_000},
        "unmask": {"up": 20_000, "down": 0},
    },
    "failures": {"16": "lost", "17": "no-reply", "18": "no-reply", "19": "refused"},
    "aborted": None,
    "seen": {"client": 0, "histogram": EVEN},
    "plain": {"client": 0, "histogram": UPDATE},
    "transcript": "ab" * 32,
    "released": True,
}
COUNTS = {"invited": 20, "advertised": 20, "shared": 19, "masked": 9}
ABORTED = LINE | {
    "counts": COUNTS,
    "furthest": {str(client): "mask" if client < 9 else "share" if client < 19 else "" for client in range(20)},
    "bytes": {leg: LINE["bytes"][leg] for leg in ("advertise", "share", "mask")},
    "failures": {str(client): "no-reply" for client in range(9, 20)},
    "aborted": {
        "phase": "mask",
        "reason": "9 clients are left, and 14 must send their vectors",
        "counts": {**COUNTS, "needed": 14},
    },
    "transcript": None,
    "released": False,
}
IDEAL = LINE | {
    "mode": "ideal",
    "degree": None,
    "threshold": None,
    "counts": {"invited": 20, "masked": 18},
    "furthest": {str(client): "ideal" if client < 18 else "" for client in range(20)},
    "bytes": {"ideal": {"up": 90_000, "down": 70_000}},
    "failures": {"18": "no-reply", "19": "no-reply"},
    "seen": {"client": 0, "histogram": UPDATE},
    "transcript": None,
}


def write(folder: Path, *lines: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "secagg.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of one round, in which four of twenty clients did not get to the end."""
    return write(tmp_path / "run", LINE)


def told(result: Result) -> dict[str, Any]:
    """Return the JSON object of a command that succeeded."""
    code, out, err = result
    assert code == 0, err
    assert len(out.splitlines()) == 1
    return dict(json.loads(out))


def refused(result: Result, code: int, kind: str) -> str:
    """Return what was said of an error, which both people and machines are told."""
    assert result[0] == code, result
    error = json.loads(result[1].splitlines()[-1])["error"]
    assert error["kind"] == kind
    assert error["message"] in result[2]
    assert "Traceback" not in result[2]
    return str(error["message"])


def said(result: Result) -> str:
    """Return what people are told, as one line: how it is broken depends on the terminal."""
    code, out, err = result
    assert code == 0, err
    return " ".join(out.split())


# -- inspect -------------------------------------------------------------------------------------------------------


def test_people_are_told_what_the_server_saw(fedlearn: Fedlearn, run: Path) -> None:
    words = said(fedlearn("secagg", "inspect", str(run)))
    for part in (
        "The server saw: the sum of 18 updates. Of each single client: one vector of 217 words that looks like noise",
        "active: holds against a server that lies, too",
        "19 a client; shares of 14 take one mask off",
        "650 integers of 21 bits",
        "ab" * 32,
        "advertise: public keys 20 20 4.00 kB 9.00 kB",
        "share: sealed shares of secrets 20 19 60.0 kB 61.0 kB",
        "mask: the masked vector 19 18 35.0 kB 900 B",
        "consistent: who is in it, signed 18 17 1.20 kB 17.0 kB",
        "unmask: shares to take masks off 17 16 20.0 kB 0 B",
        "all 120 kB 87.9 kB",
        "client 16 consistent lost yes",
        "client 17 mask no-reply yes",
        "client 18 share no-reply no",
        "client 19 advertise refused no",
        "The masked vector is flat",
        f"Picture: {run / 'secagg-round-1.svg'}",
    ):
        assert part in words
    assert "client 15" not in words


def test_bars_are_as_high_as_what_they_count(fedlearn: Fedlearn, run: Path) -> None:
    code, out, _ = fedlearn("secagg", "inspect", str(run))
    assert code == 0
    lines = out.splitlines()
    bottom = next(number for number, line in enumerate(lines) if line.startswith("-2^20")) - 1
    drawn = [line.ljust(68) for line in lines[bottom - 5 : bottom + 1]]
    for start, counts in ((0, EVEN), (36, UPDATE)):
        pairs = [counts[at] + counts[at + 1] for at in range(0, 64, 2)]
        heights = [sum(" ▁▂▃▄▅▆▇█".index(line[start + column]) for line in drawn) for column in range(32)]
        assert heights == [-(-48 * count // max(pairs)) for count in pairs]
    assert f"highest: {max(UPDATE[at] + UPDATE[at + 1] for at in range(0, 64, 2))} of 650" in out


def test_machines_are_told_the_line_and_the_picture(fedlearn: Fedlearn, run: Path) -> None:
    body = told(fedlearn("secagg", "inspect", str(run), "--json"))
    assert {name: body[name] for name in LINE} == LINE
    assert set(body) - set(LINE) == {"flatness", "picture"}
    assert body["picture"] == str((run / "secagg-round-1.svg").resolve())
    root = ET.fromstring(Path(body["picture"]).read_bytes())  # noqa: S314 - our own text
    assert root.tag.endswith("svg")
    assert "Client 0, plain" in "".join(root.itertext())


@pytest.mark.parametrize(
    ("counts", "chi2", "p"),
    [  # p as scipy.stats.chi2.sf(chi2, 63) gives it
        ([10] * 64, 0.0, 1.0),
        ([12, 8] * 32, 25.6, 0.9999927),
        ([13, 7] * 32, 57.6, 0.66846),
        ([14, 6] * 32, 102.4, 0.0012518),
        ([15, 5] * 32, 160.0, 0.0),
        (UPDATE, None, 0.0),
    ],
)
def test_flat_is_told_from_not_flat(
    counts: list[int], chi2: float | None, p: float, fedlearn: Fedlearn, tmp_path: Path
) -> None:
    run = write(tmp_path / "run", LINE | {"seen": {"client": 3, "histogram": counts}, "plain": None})
    flat = told(fedlearn("secagg", "inspect", str(run), "--json"))["flatness"]
    assert flat["dof"] == 63
    assert chi2 is None or flat["chi2"] == pytest.approx(chi2)
    assert flat["p"] == pytest.approx(p, abs=2e-4)
    words = said(fedlearn("secagg", "inspect", str(run)))
    assert ("NOT FLAT" in words) == (p == 0)
    assert ("is flat" in words) == (p > 0)


def test_too_few_integers_are_no_test_of_flatness(fedlearn: Fedlearn, tmp_path: Path) -> None:
    run = write(tmp_path / "run", LINE | {"seen": {"client": 0, "histogram": [1] * 64}})
    assert told(fedlearn("secagg", "inspect", str(run), "--json"))["flatness"] is None
    assert "64 integers are too few to tell even from uneven; 320 would do" in said(
        fedlearn("secagg", "inspect", str(run))
    )


def test_rounds_and_their_tries(fedlearn: Fedlearn, tmp_path: Path) -> None:
    second = [ABORTED | {"round": 2}, LINE | {"round": 2, "attempt": 2}]
    run = write(tmp_path / "run", LINE, *second)
    assert told(fedlearn("secagg", "inspect", str(run), "--json"))["attempt"] == 2
    words = said(fedlearn("secagg", "inspect", str(run)))
    assert "Round 2, try 2" in words
    assert "Before it, try 1: given up in mask: 9 clients are left" in words
    assert told(fedlearn("secagg", "inspect", str(run), "--round", "1", "--json"))["round"] == 1
    message = refused(fedlearn("secagg", "inspect", str(run), "--round", "3", "--json"), 2, "UsageError")
    assert "--round 3" in message and "rounds 1 to 2" in message


def test_a_try_given_up_gave_no_sum(fedlearn: Fedlearn, tmp_path: Path) -> None:
    words = said(fedlearn("secagg", "inspect", str(write(tmp_path / "run", ABORTED))))
    assert "The server saw: no sum. The try was given up in mask: 9 clients are left, and 14 must" in words
    assert "Of each of 9 clients: one vector of 217 words that looks like noise, and stays so" in words
    assert "unmask: shares to take masks off · · · ·" in words
    assert "9 clients: 0, 1, 2, … mask · ·" in words
    assert "10 clients: 9, 10, 11, … share no-reply ·" in words
    assert "client 19 nothing no-reply ·" in words
    early = ABORTED | {"counts": {"invited": 20}, "bytes": {}, "seen": None, "plain": None}
    early |= {"aborted": {"phase": "advertise", "reason": "a reason", "counts": {"advertised": 2, "needed": 14}}}
    words = said(fedlearn("secagg", "inspect", str(write(tmp_path / "run", early))))
    assert "no sum. The try was given up in advertise: a reason. No vector came" in words
    assert "advertise: public keys 20 2 · ·" in words


def test_ideal_says_that_nothing_was_hidden(fedlearn: Fedlearn, tmp_path: Path) -> None:
    run = write(tmp_path / "run", IDEAL)
    words = said(fedlearn("secagg", "inspect", str(run)))
    assert "each of the 18 encoded updates by itself. NOTHING WAS HIDDEN" in words
    assert "ideal: the update, not masked 20 18 90.0 kB 70.0 kB" in words
    assert "client 18 nothing no-reply no" in words
    assert "not masked: what the server got" in words
    assert "flat" not in words.lower()
    assert "looks like noise" not in words


def test_semi_honest_has_no_leg_for_consistency(fedlearn: Fedlearn, tmp_path: Path) -> None:
    counts = {name: count for name, count in LINE["counts"].items() if name != "confirmed"}
    sent = {leg: both for leg, both in LINE["bytes"].items() if leg != "consistent"}
    furthest = {**LINE["furthest"], "16": "mask"}
    line = LINE | {"mode": "semi-honest", "counts": counts, "bytes": sent, "furthest": furthest}
    words = said(fedlearn("secagg", "inspect", str(write(tmp_path / "run", line))))
    assert "consistent" not in words
    assert "unmask: shares to take masks off 18 16 20.0 kB 0 B" in words


def test_outside_a_simulation_there_is_no_plain_vector(fedlearn: Fedlearn, tmp_path: Path) -> None:
    run = write(tmp_path / "run", LINE | {"plain": None})
    words = said(fedlearn("secagg", "inspect", str(run)))
    assert "masked: what the server got" in words and "plain" not in words
    run = write(tmp_path / "run", LINE | {"plain": None, "seen": None, "round": 2})
    assert "No vector was kept of this try" in said(fedlearn("secagg", "inspect", str(run)))
    body = told(fedlearn("secagg", "inspect", str(run), "--json"))
    assert body["picture"] is body["flatness"] is None
    assert not (run / "secagg-round-2.svg").exists()


@pytest.mark.parametrize("columns", [40, 60, 80, 200])
def test_every_width_shows_every_number(
    columns: int, fedlearn: Fedlearn, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out, _ = fedlearn("secagg", "inspect", str(run))
    assert code == 0
    if columns > 40:
        assert "…" not in out
        assert "61.0 kB" in out
    assert all(len(line) <= columns for line in out.splitlines() if not line.startswith("Picture"))


def test_without_secure_aggregation_the_next_step_is_named(fedlearn: Fedlearn, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    assert "holds no run" in refused(fedlearn("secagg", "inspect", str(bare), "--json"), 3, "RunUnreadableError")
    (bare / "config.toml").touch()
    for run in (bare, write(tmp_path / "off", {"round": 1, "mode": "off"})):
        message = refused(fedlearn("secagg", "inspect", str(run), "--json"), 3, "MissingError")
        assert "fedlearn simulate --set secagg.mode=active" in message
    message = refused(fedlearn("secagg", "inspect", str(write(bare)), "--json"), 3, "MissingError")
    assert "no round was tried yet" in message
    message = refused(fedlearn("secagg", "inspect", "nowhere", "--json"), 3, "RunUnreadableError")
    assert "nowhere" in message


def test_a_last_line_torn_by_a_crash_is_left_out(fedlearn: Fedlearn, run: Path) -> None:
    with (run / "secagg.jsonl").open("a") as handle:
        handle.write(json.dumps(LINE | {"round": 2})[:-20])
    assert told(fedlearn("secagg", "inspect", str(run), "--json"))["round"] == 1


DAMAGED: dict[str, Any] = {
    "no JSON": "{",
    "no object": "[]",
    "a number": "7",
    "not UTF-8": b"\xff",
    "too deep": "[" * 100_000,
    "a huge number": '{"round": ' + "9" * 5000 + "}",
    "round as text": LINE | {"round": "1"},
    "round zero": LINE | {"round": 0},
    "a truth for a count": LINE | {"attempt": True},
    "an unknown mode": LINE | {"mode": "trusting"},
    "an unknown leg": LINE | {"furthest": {"0": "dance"}},
    "bytes of an unknown leg": LINE | {"bytes": {"dance": {"up": 1, "down": 1}}},
    "negative bytes": LINE | {"bytes": {"mask": {"up": -1, "down": 1}}},
    "bytes one way": LINE | {"bytes": {"mask": {"up": 1}}},
    "not finite": LINE | {"degree": float("nan")},
    "a degree as text": LINE | {"degree": "many"},
    "bits there are not": LINE | {"bits": 20},
    "too few bins": LINE | {"seen": {"client": 0, "histogram": [1] * 63}},
    "a bin of text": LINE | {"seen": {"client": 0, "histogram": "x" * 64}},
    "a bin too full": LINE | {"plain": {"client": 0, "histogram": [2**63] * 64}},
    "an escape sequence": ABORTED | {"aborted": {"phase": "mask", "reason": "\x1b[2J", "counts": {}}},
    "an escape sequence for a client": LINE | {"furthest": {"\x1b[2J": ""}},
    "failures as a list": LINE | {"failures": []},
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_line_is_named(damage: str, fedlearn: Fedlearn, run: Path) -> None:
    line = DAMAGED[damage]
    text = line if isinstance(line, str | bytes) else json.dumps(line)
    with (run / "secagg.jsonl").open("ab") as handle:
        handle.write((text if isinstance(text, bytes) else text.encode()) + b"\n")
    message = refused(fedlearn("secagg", "inspect", str(run), "--json"), 3, "RunUnreadableError")
    assert "secagg.jsonl, line 2, " in message
    assert "\x1b" not in message


@pytest.mark.parametrize("field", sorted(set(LINE) - {"clients"}))
def test_a_line_without_a_field_is_damaged(field: str, fedlearn: Fedlearn, run: Path) -> None:
    write(run, LINE, {name: value for name, value in LINE.items() if name != field})
    message = refused(fedlearn("secagg", "inspect", str(run), "--json"), 3, "RunUnreadableError")
    assert f"line 2, has no '{field}'" in message


# -- key -----------------------------------------------------------------------------------------------------------


def test_a_key_is_made_once(fedlearn: Fedlearn, tmp_path: Path) -> None:
    body = told(fedlearn("secagg", "key", "device.pem", "--json"))
    path = tmp_path / "device.pem"
    assert body == {"file": str(path), "public_key": SigningKey.read(path).public.hex()}
    assert path.stat().st_mode & 0o777 == 0o600
    before = path.read_bytes()
    assert "device.pem exists" in refused(fedlearn("secagg", "key", "device.pem", "--json"), 2, "UsageError")
    assert path.read_bytes() == before


def test_the_next_command_of_a_key_works_as_it_is_printed(fedlearn: Fedlearn, tmp_path: Path) -> None:
    told(fedlearn("secagg", "key", "registry.pem", "--json"))
    first = told(fedlearn("secagg", "key", "first.pem", "--json"))["public_key"]
    told(fedlearn("secagg", "allow", "devices.json", "--registry", "registry.pem", first, "--json"))
    code, out, _ = fedlearn("secagg", "key", "second.pem")
    assert code == 0
    assert "BEGIN" not in out
    public = SigningKey.read(tmp_path / "second.pem").public.hex()
    assert f"Its public key: {public}" in out
    command = next(line for line in out.splitlines() if line.startswith("  fedlearn secagg allow")).split()
    assert "1 device may take part (1 added, 1 removed)" in said(fedlearn(*command[1:]))
    assert "2 devices may take part (1 added, 0 removed)" in said(fedlearn(*command[1:], "--add", first))


def test_a_key_needs_a_folder(fedlearn: Fedlearn) -> None:
    assert "nowhere" in refused(fedlearn("secagg", "key", "nowhere/device.pem", "--json"), 1, "RunFailedError")


# -- allow ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def registry(tmp_path: Path) -> SigningKey:
    """The registry, whose key lies in ``registry.pem``."""
    made = SigningKey.generate(SecureRandom())
    made.write(tmp_path / "registry.pem")
    return made


def keys(count: int) -> list[SigningKey]:
    return [SigningKey.generate(SecureRandom()) for _ in range(count)]


def allowing(*words: str) -> tuple[str, ...]:
    return ("secagg", "allow", "devices.json", "--registry", "registry.pem", *words, "--json")


def test_devices_are_named_in_hex_and_by_files_of_hex(fedlearn: Fedlearn, tmp_path: Path, registry: SigningKey) -> None:
    made = keys(5)
    in_hex = [each.public.hex() for each in made]
    (tmp_path / "some.txt").write_text(f"{in_hex[1].upper()}\n\n  {in_hex[2]}  \r\n{in_hex[0]}")
    body = told(fedlearn(*allowing(in_hex[0], "some.txt", in_hex[3], in_hex[4])))
    path = tmp_path / "devices.json"
    public = registry.public.hex()
    assert body == {"list": str(path), "devices": 5, "added": 5, "removed": 0, "registry": public}
    assert AllowList.read(path, registry.public) == AllowList.of(each.public for each in made)
    words = said(fedlearn(*allowing(in_hex[0])[:-1]))
    assert "devices.json: 1 device may take part (0 added, 4 removed)" in words
    assert f"for the devices to pin: {public}" in words


def test_add_keeps_who_is_there(fedlearn: Fedlearn, tmp_path: Path, registry: SigningKey) -> None:
    made = keys(3)
    told(fedlearn(*allowing(made[0].public.hex(), made[1].public.hex())))
    body = told(fedlearn(*allowing("--add", made[1].public.hex(), made[2].public.hex())))
    assert (body["devices"], body["added"], body["removed"]) == (3, 1, 0)
    read = AllowList.read(tmp_path / "devices.json", registry.public)
    assert read == AllowList.of(each.public for each in made)


def test_add_verifies_first(fedlearn: Fedlearn, tmp_path: Path, registry: SigningKey) -> None:
    other, device = keys(2)
    message = refused(fedlearn(*allowing("--add", device.public.hex())), 3, "MissingError")
    assert "leave out --add" in message
    path = tmp_path / "devices.json"
    AllowList.of([other.public]).write(path, other)
    before = path.read_bytes()
    message = refused(fedlearn(*allowing("--add", device.public.hex())), 3, "MissingError")
    assert "did not sign this list" in message
    assert path.read_bytes() == before


def test_what_is_no_list_of_the_registrys_is_not_replaced(
    fedlearn: Fedlearn, tmp_path: Path, registry: SigningKey
) -> None:
    other, device = keys(2)
    device.write(tmp_path / "device.pem")
    AllowList.of([other.public]).write(tmp_path / "others.json", other)
    for name in ("device.pem", "others.json", "registry.pem"):
        before = (tmp_path / name).read_bytes()
        words = ("secagg", "allow", name, "--registry", "registry.pem", device.public.hex(), "--json")
        assert f"{name} exists and is no list" in refused(fedlearn(*words), 2, "UsageError")
        assert (tmp_path / name).read_bytes() == before


GOOD = "ab" * 32
WRONG = {"zz": "'zz'", "ab" * 31: "64 hex digits", "0x" + "ab" * 32: "64 hex digits", "": "''", ".": "'.'"}


@pytest.mark.parametrize("wrong", WRONG)
def test_an_argument_that_names_no_device_is_named(
    wrong: str, fedlearn: Fedlearn, tmp_path: Path, registry: SigningKey
) -> None:
    message = refused(fedlearn(*allowing(GOOD, wrong)), 2, "UsageError")
    assert WRONG[wrong] in message
    assert not (tmp_path / "devices.json").exists()


@pytest.mark.parametrize(
    ("data", "place"),
    [
        (b"", "keys.txt: "),
        (b"\n \n", "keys.txt: "),
        (f"{GOOD}\nsecret".encode(), "keys.txt, line 2: "),
        (b"\xff", "1: "),
    ],
)
def test_a_file_without_keys_is_named_and_not_quoted(
    data: bytes, place: str, fedlearn: Fedlearn, tmp_path: Path, registry: SigningKey
) -> None:
    (tmp_path / "keys.txt").write_bytes(data)
    message = refused(fedlearn(*allowing("keys.txt")), 2, "UsageError")
    assert place in message
    assert "secret" not in message
    assert not (tmp_path / "devices.json").exists()


def test_key_files_that_cannot_be_read(fedlearn: Fedlearn, tmp_path: Path, registry: SigningKey) -> None:
    SigningKey(bytes(32)).write(tmp_path / "device.pem")
    assert "stays on its device" in refused(fedlearn(*allowing("device.pem")), 2, "UsageError")
    (tmp_path / "broken.pem").write_text("-----BEGIN PRIVATE KEY-----\nnothing\n-----END PRIVATE KEY-----\n")
    words = ("secagg", "allow", "devices.json", "--registry", "broken.pem", GOOD, "--json")
    assert "broken.pem" in refused(fedlearn(*words), 3, "MissingError")
    words = ("secagg", "allow", "devices.json", "--registry", "nowhere.pem", GOOD, "--json")
    assert "nowhere.pem" in refused(fedlearn(*words), 3, "MissingError")
    refused(fedlearn("secagg", "allow", "devices.json", GOOD, "--json"), 2, "UsageError")
    refused(fedlearn(*allowing()), 2, "UsageError")


# -- help ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["--help"], ["secagg", "--help"], ["secagg", "inspect", "--help"]])
def test_help_loads_nothing_heavy(words: list[str]) -> None:
    heavy = ("torch", "flwr", "scipy", "numpy", "matplotlib", "cryptography")
    program = (
        "import sys\n"
        "from fedlearn.cli import main\n"
        "try:\n"
        "    main()\n"
        "finally:\n"
        f"    print('loaded:', *[name for name in {heavy!r} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == "loaded:"
