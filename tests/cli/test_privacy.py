"""``fedlearn privacy``: epsilon of the file is that of its releases, and a file that was changed has none."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("dp_accounting")

from fedlearn.privacy.accounting import epsilon
from fedlearn.privacy.ledger import Ledger
from fedlearn.privacy.releases import Query, Release, Sampling, Unit

Result = tuple[int, str, str]
Fedlearn = Callable[..., Result]

VERBS = (("epsilon",), ("show",), ("calibrate", "--target-epsilon", "90", "--rounds", "1", "--ledger"))
every_verb = pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb[0])

POLICY: dict[str, Any] = {
    "unit": "client",
    "trust": "central",
    "mechanism": "gaussian",
    "delta": "0.0005",
    "population": 1000,
    "target-epsilon": "8.0",
    "simulated": False,
    "task": "digits",
    "rounds": 4,
}


def release(number: int, *, noise: float = 2.0, unit: Unit = "client", rate: float = 1.0, **changes: Any) -> Release:
    made = Release(
        what="model",
        round_number=number,
        unit=unit,
        adjacency="add-remove",
        mechanism="gaussian",
        queries=(Query(name="update", sensitivity_l2=1.0, stddev=noise),),
        sampling=Sampling(method="poisson" if rate < 1 else "everyone", rate=rate, population=1000),
        simulated=False,
    )
    return replace(made, **changes)


RELEASES = [release(number) for number in range(1, 5)]


def write(
    folder: Path,
    releases: list[Release],
    *,
    policy: dict[str, Any] | None = None,
    close: bool = True,
    summary: bool = True,
) -> Path:
    """Write a run's folder with a ledger of these releases, and what its summary says of it."""
    folder.mkdir(parents=True)
    ledger = Ledger(folder / "ledger.jsonl")
    ledger.append("run.policy", {**POLICY, "run": folder.name, **(policy or {})})
    for each in releases:
        ledger.append("eval.release" if each.what == "evaluation" else "round.release", each.to_body())
    if close:
        ledger.append("run.close", {"reason": "finished"})
    if summary:
        head = {"lines": ledger.head.count, "sha256": ledger.head.sha256}
        (folder / "summary.json").write_text(json.dumps({"privacy": {"ledger": head}}))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run of four rounds."""
    return write(tmp_path / "run", RELEASES)


def told(result: Result) -> dict[str, Any]:
    """Return the JSON object of a command that succeeded."""
    code, out, err = result
    assert code == 0, err
    return dict(json.loads(out.splitlines()[-1]))


# -- epsilon -------------------------------------------------------------------------------------------------------


def test_epsilon_of_the_file_is_that_of_its_releases(fedlearn: Fedlearn, run: Path) -> None:
    expected = epsilon(RELEASES, 0.0005)
    for place in (run, run / "ledger.jsonl"):
        body = told(fedlearn("privacy", "epsilon", str(place), "--json"))
        assert body["epsilon"] == expected
        assert body["epsilon_rdp"] == epsilon(RELEASES, 0.0005, accountant="rdp") > expected
        assert (body["delta"], body["unit"], body["releases"], body["simulated"]) == (0.0005, "client", 4, False)
        (file,) = body["ledgers"]
        assert (file["lines"], file["closed"], file["end_checked"]) == (6, True, True)
        assert file["sha256"] == json.loads((run / "summary.json").read_text())["privacy"]["ledger"]["sha256"]


def test_people_are_told_what_an_epsilon_means_nothing_without(fedlearn: Fedlearn, run: Path) -> None:
    code, out, _ = fedlearn("privacy", "epsilon", str(run))
    assert code == 0
    expected = epsilon(RELEASES, 0.0005)
    for words in (f"{expected:.4g}", "0.0005", "each client, with all that it holds", "4 (4 model)", "the chain holds"):
        assert words in out
    assert "6 lines" in out and "closed" in out
    assert "SIMULATED" not in out


def test_another_delta_and_one_that_promises_nothing(fedlearn: Fedlearn, run: Path) -> None:
    body = told(fedlearn("privacy", "epsilon", str(run), "--delta", "1e-6", "--json"))
    assert body["epsilon"] == epsilon(RELEASES, 1e-6) > epsilon(RELEASES, 0.0005)
    code, out, _ = fedlearn("privacy", "epsilon", str(run), "--delta", "0.001", "--json")
    assert code == 2
    assert "1/N" in json.loads(out.splitlines()[-1])["error"]["message"]


def test_several_runs_on_the_same_population_compose(fedlearn: Fedlearn, run: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other", [release(1, noise=3.0)], policy={"population": 5000, "delta": "0.0001"})
    body = told(fedlearn("privacy", "epsilon", str(run), str(other), "--json"))
    assert body["epsilon"] == epsilon([*RELEASES, release(1, noise=3.0)], 0.0001)
    assert [Path(each["path"]).parent.name for each in body["ledgers"]] == ["run", "other"]
    code, _, err = fedlearn("privacy", "epsilon", str(run), str(run / "ledger.jsonl"))
    assert code == 2 and "same run" in err


def test_example_and_client_level_compose(fedlearn: Fedlearn, run: Path, tmp_path: Path) -> None:
    own = [release(1, unit="example", noise=5.0)]
    device = write(tmp_path / "device", own, policy={"unit": "example", "population": None, "examples": 300})
    body = told(fedlearn("privacy", "epsilon", str(run), str(device), "--json"))
    assert body["unit"] == "example"
    assert body["epsilon"] == epsilon([*RELEASES, *own], 0.0005, unit="example")
    assert told(fedlearn("privacy", "epsilon", str(run), str(device), "--unit", "client", "--json"))["epsilon"] == "inf"


def test_simulated_noise_cannot_be_missed(fedlearn: Fedlearn, tmp_path: Path) -> None:
    seeded = write(tmp_path / "seeded", [*RELEASES[:3], release(4, simulated=True)])
    for verb in VERBS:
        code, out, _ = fedlearn("privacy", *verb, str(seeded))
        assert code == 0
        assert "SIMULATED: the noise came from a seed: nobody is protected" in out
    assert told(fedlearn("privacy", "epsilon", str(seeded), "--json"))["simulated"] is True


def test_a_run_without_privacy_is_infinite_and_says_so(fedlearn: Fedlearn, tmp_path: Path) -> None:
    plain = release(1, unit="none", mechanism="none", queries=())
    folder = tmp_path / "plain"
    folder.mkdir()
    ledger = Ledger(folder / "ledger.jsonl")
    ledger.append("run.policy", {"unit": "none", "population": 20})  # and no delta
    ledger.append("round.release", plain.to_body())
    body = told(fedlearn("privacy", "epsilon", str(folder), "--json"))
    assert (body["epsilon"], body["epsilon_rdp"], body["unit"]) == ("inf", "inf", "none")
    code, out, _ = fedlearn("privacy", "epsilon", str(folder))
    assert code == 0 and "infinite" in out and "nobody" in out
    code, out, _ = fedlearn("privacy", "show", str(folder))
    assert code == 0 and "infinite" in out


def test_each_client_accounts_for_its_own_examples(fedlearn: Fedlearn, tmp_path: Path) -> None:
    local = release(1, unit="none", mechanism="local", queries=())
    folder = write(tmp_path / "run", [local], policy={"unit": "example", "delta": "0.01"})
    noises = {"0": 4.0, "1": 2.0, "2": 3.0}
    for name, noise in noises.items():
        policy = {"unit": "example", "population": None, "examples": 50}
        write(folder / "clients" / name, [release(1, unit="example", noise=noise)], policy=policy, summary=False)
    body = told(fedlearn("privacy", "epsilon", str(folder), "--json"))
    assert body["epsilon"] == epsilon([release(1, unit="example", noise=2.0)], 0.0005, unit="example")
    assert len(body["clients"]) == 3
    shutil.copytree(folder / "clients" / "0", folder / "clients" / "3")  # holds as many, so its ledger is the same
    assert len(told(fedlearn("privacy", "epsilon", str(folder), "--json"))["clients"]) == 4
    code, out, _ = fedlearn("privacy", "epsilon", str(folder))
    assert code == 0 and "the largest of the clients" in out
    (folder / "clients" / "1" / "ledger.jsonl").write_text("{}\n")
    assert fedlearn("privacy", "epsilon", str(folder))[0] == 1


def test_epsilon_from_numbers(fedlearn: Fedlearn) -> None:
    words = ("--noise-multiplier", "4", "--rate", "0.1", "--rounds", "100", "--delta", "1e-4")
    body = told(fedlearn("privacy", "epsilon", *words, "--json"))
    assert body["epsilon"] == pytest.approx(0.815, abs=1e-3)
    code, out, _ = fedlearn("privacy", "epsilon", *words)
    assert code == 0 and "0.8154" in out and "Poisson" in out
    everybody = told(fedlearn("privacy", "epsilon", "--noise-multiplier", "4", "--delta", "1e-4", "--json"))
    assert everybody["epsilon"] == epsilon([release(1, noise=4.0)], 1e-4)
    assert (
        told(fedlearn("privacy", "epsilon", "--noise-multiplier", "0", "--delta", ".1", "--json"))["epsilon"] == "inf"
    )


@pytest.mark.parametrize(
    "words",
    [
        ("epsilon",),
        ("epsilon", "run", "--noise-multiplier", "1"),
        ("epsilon", "--noise-multiplier", "1"),
        ("epsilon", "--noise-multiplier", "1", "--delta", "2"),
        ("epsilon", "--noise-multiplier", "1", "--delta", "0.1", "--rate", "1.5"),
        ("epsilon", "--noise-multiplier", "1", "--delta", "0.1", "--unit", "household"),
        ("calibrate", "--rounds", "3", "--delta", "0.1"),
        ("calibrate", "--target-epsilon", "3", "--rounds", "3"),
        ("calibrate", "--target-epsilon", "0", "--rounds", "3", "--delta", "0.1"),
        ("show",),
        ("show", "run", "--picture", "picture.png"),
        ("spend", "run"),
    ],
    ids=" ".join,
)
def test_words_that_cannot_be_are_refused(fedlearn: Fedlearn, run: Path, words: tuple[str, ...]) -> None:
    code, out, err = fedlearn("privacy", *words)
    assert code == 2
    assert "Traceback" not in out + err


def test_a_ledger_that_states_no_delta_needs_one(fedlearn: Fedlearn, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "bare.jsonl")
    ledger.append("round.release", RELEASES[0].to_body())
    code, _, err = fedlearn("privacy", "epsilon", "bare.jsonl")
    assert code == 2 and "--delta" in err
    found = told(fedlearn("privacy", "epsilon", "bare.jsonl", "--delta", "1e-5", "--unit", "client", "--json"))
    assert found["epsilon"] == epsilon(RELEASES[:1], 1e-5)
    assert told(fedlearn("privacy", "epsilon", "bare.jsonl", "--delta", "1e-5", "--json"))["epsilon"] == "inf"


@every_verb
def test_a_ledger_that_is_not_there(fedlearn: Fedlearn, verb: tuple[str, ...], tmp_path: Path) -> None:
    for place in ("nowhere", str(tmp_path)):
        code, _, err = fedlearn("privacy", *verb, place)
        assert code == 3
        assert place in err


# -- what was changed has no epsilon -------------------------------------------------------------------------------


def lines_of(run: Path) -> list[bytes]:
    return (run / "ledger.jsonl").read_bytes().splitlines(keepends=True)


def edited(line: bytes) -> bytes:
    """Return a line that says something else, written as fedlearn writes it."""
    table = json.loads(line)
    table["body"]["note"] = "nothing happened"
    return json.dumps(table, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def damaged(lines: list[bytes]) -> list[tuple[str, int, list[bytes], int]]:
    """Return what was done, to which line, the lines that are left, and the first that then cannot hold."""
    found = []
    for at in range(len(lines)):
        number = at + 1
        last = number == len(lines)
        found.append(("deleted", number, [*lines[:at], *lines[at + 1 :]], number))
        # An edit shows where the next line no longer follows; of the last line, by what the summary says.
        found.append(
            ("edited", number, [*lines[:at], edited(lines[at]), *lines[number:]], number if last else number + 1)
        )
        if not last:
            found.append(("swapped", number, [*lines[:at], lines[number], lines[at], *lines[number + 1 :]], number))
    return found


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb[0])
@pytest.mark.parametrize("summary", [True, False], ids=["with summary.json", "without"])
def test_any_line_deleted_edited_or_moved_fails_with_its_number(
    fedlearn: Fedlearn, run: Path, verb: tuple[str, ...], summary: bool
) -> None:
    if not summary:
        (run / "summary.json").unlink()
    lines = lines_of(run)
    for what, number, left, reported in damaged(lines):
        if not summary and number == len(lines):
            continue  # nobody can tell: the next test
        (run / "ledger.jsonl").write_bytes(b"".join(left))
        code, out, err = fedlearn("privacy", *verb, str(run), *(["--json"] if verb[0] != "show" else []))
        assert code == 1, (what, number, out)
        assert f"line {reported}" in err, (what, number, err)
    (run / "ledger.jsonl").write_bytes(b"".join(lines))
    assert fedlearn("privacy", *verb, str(run))[0] == 0


def test_an_end_that_is_cut_off_shows_as_open_where_no_summary_tells(fedlearn: Fedlearn, run: Path) -> None:
    (run / "summary.json").unlink()
    lines = lines_of(run)
    for kept in range(1, len(lines)):
        (run / "ledger.jsonl").write_bytes(b"".join(lines[:kept]))
        code, out, _ = fedlearn("privacy", "epsilon", str(run))
        assert code == 0
        assert "open: lines may be missing at its end" in out
        (file,) = told(fedlearn("privacy", "epsilon", str(run), "--json"))["ledgers"]
        assert (file["lines"], file["closed"], file["end_checked"]) == (kept, False, False)


def test_a_ledger_may_go_on_after_what_the_summary_says(fedlearn: Fedlearn, run: Path) -> None:
    Ledger(run / "ledger.jsonl").append("run.resume", {"round": 4})
    Ledger(run / "ledger.jsonl").append("round.release", release(5).to_body())
    body = told(fedlearn("privacy", "epsilon", str(run), "--json"))
    assert body["epsilon"] == epsilon([*RELEASES, release(5)], 0.0005)
    assert body["ledgers"][0]["closed"] is False


@pytest.mark.parametrize("text", ["{", "[]", '{"privacy": {"ledger": {"lines": 3}}}', '{"privacy": {"ledger": 7}}'])
def test_a_summary_that_is_damaged_is_not_passed_over(fedlearn: Fedlearn, run: Path, text: str) -> None:
    (run / "summary.json").write_text(text)
    code, _, err = fedlearn("privacy", "epsilon", str(run))
    assert code == 3
    assert "summary.json" in err


# -- calibrate -----------------------------------------------------------------------------------------------------


def test_calibrated_noise_keeps_the_target(fedlearn: Fedlearn) -> None:
    words = ("--rate", "0.1", "--rounds", "50", "--delta", "1e-5")
    body = told(fedlearn("privacy", "calibrate", "--target-epsilon", "1", *words, "--json"))
    assert 0.99 < body["epsilon"] <= 1
    noise = str(body["noise_multiplier"])
    assert (
        told(fedlearn("privacy", "epsilon", "--noise-multiplier", noise, *words, "--json"))["epsilon"]
        == body["epsilon"]
    )
    code, out, _ = fedlearn("privacy", "calibrate", "--target-epsilon", "1", *words)
    assert code == 0 and f"{body['noise_multiplier']:g}" in out


def test_what_earlier_runs_spent_counts(fedlearn: Fedlearn, run: Path) -> None:
    spent = epsilon(RELEASES, 0.0005)
    words = ("calibrate", "--rounds", "10", "--json")
    alone = told(fedlearn("privacy", *words, "--target-epsilon", "6", "--delta", "0.0005"))
    after = told(fedlearn("privacy", *words, "--target-epsilon", "6", "--ledger", str(run)))
    assert after["noise_multiplier"] > alone["noise_multiplier"]
    assert (after["earlier_epsilon"], after["delta"], alone["earlier_epsilon"]) == (spent, 0.0005, 0.0)
    together = [*RELEASES, release(1, noise=after["noise_multiplier"], steps=10)]
    assert after["epsilon"] == epsilon(together, 0.0005) <= 6
    code, out, _ = fedlearn("privacy", *words, "--target-epsilon", str(spent / 2), "--ledger", str(run))
    assert code == 2
    assert "privacy.target-epsilon" in json.loads(out.splitlines()[-1])["error"]["message"]


# -- show ----------------------------------------------------------------------------------------------------------


def test_show_lists_every_release_with_what_was_spent_by_then(fedlearn: Fedlearn, tmp_path: Path) -> None:
    releases = [release(1, rate=0.1), replace(release(1, noise=9.0), what="evaluation"), release(2, rate=0.1)]
    run = write(tmp_path / "run", releases)
    code, out, _ = fedlearn("privacy", "show", str(run))
    assert code == 0
    for words in (
        "digits",
        "target epsilon",
        "each client",
        "evaluation",
        "poisson 0.1",
        "everyone",
        "the chain holds",
    ):
        assert words in out
    body = told(fedlearn("privacy", "show", str(run), "--json"))
    spent = [each["epsilon"] for each in body["releases"]]
    assert spent == sorted(spent)
    assert spent[-1] == body["epsilon"] == epsilon(releases, 0.0005)
    assert [each["what"] for each in body["releases"]] == ["model", "evaluation", "model"]
    assert body["policy"]["task"] == "digits"
    assert any(bar in out for bar in "▁▂▃▄▅▆▇█") and f"{body['epsilon']:.4g} of 8" in out


def test_show_draws_a_picture_where_it_is_told_to_and_nowhere_else(
    fedlearn: Fedlearn, run: Path, tmp_path: Path
) -> None:
    before = sorted(run.iterdir())
    assert fedlearn("privacy", "show", str(run))[0] == 0
    assert sorted(run.iterdir()) == before
    body = told(fedlearn("privacy", "show", str(run), "--picture", "spent.svg", "--json"))
    assert Path(body["picture"]) == tmp_path / "spent.svg"
    drawn = (tmp_path / "spent.svg").read_text()
    assert drawn.startswith("<svg ") and "budget 8" in drawn and "digits" in drawn
    assert fedlearn("privacy", "show", str(run), "--picture", "nowhere/spent.svg")[0] == 3


def test_show_of_a_long_run_shows_some_of_it_and_the_last(fedlearn: Fedlearn, tmp_path: Path) -> None:
    releases = [release(number, noise=30.0) for number in range(1, 102)]
    run = write(tmp_path / "run", releases)
    body = told(fedlearn("privacy", "show", str(run), "--json"))
    numbers = [each["release"] for each in body["releases"]]
    assert len(numbers) <= 40 and numbers[-1] == 101
    assert len({b - a for a, b in itertools.pairwise(numbers)}) == 1
    assert f"{len(numbers)} of 101 releases" in fedlearn("privacy", "show", str(run))[1]


def test_an_unknown_event_is_infinite_from_there_on(fedlearn: Fedlearn, tmp_path: Path) -> None:
    run = write(tmp_path / "run", RELEASES[:1], close=False)
    Ledger(run / "ledger.jsonl").append("round.sketch", {"bytes": 12})
    assert told(fedlearn("privacy", "epsilon", str(run), "--json"))["epsilon"] == "inf"
    body = told(fedlearn("privacy", "show", str(run), "--picture", "spent.svg", "--json"))
    assert body["releases"][0]["epsilon"] < 8
    assert body["releases"][1]["epsilon"] == "inf"


def test_a_ledger_in_which_nothing_was_released_yet(fedlearn: Fedlearn, tmp_path: Path) -> None:
    run = write(tmp_path / "run", [], close=False, summary=False)
    assert told(fedlearn("privacy", "epsilon", str(run), "--json"))["epsilon"] == 0.0
    code, out, _ = fedlearn("privacy", "show", str(run), "--picture", "spent.svg")
    assert code == 0 and "Nothing was released" in out


# -- the start -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words", [[], ["epsilon"], ["calibrate"], ["show"]], ids=lambda words: " ".join(words) or "all"
)
def test_help_loads_nothing_heavy(words: list[str]) -> None:
    heavy = ("torch", "flwr", "scipy", "numpy", "matplotlib", "dp_accounting")
    program = (
        "import sys\nfrom fedlearn.cli import main\ntry:\n    main()\nfinally:\n"
        f"    print('loaded:', *[name for name in {heavy!r} if name in sys.modules], file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "privacy", *words, "--help"],
        capture_output=True, text=True, timeout=60, check=False, env={**os.environ, "COLUMNS": "100"},
    )  # fmt: skip
    assert done.returncode == 0
    assert done.stderr.splitlines()[-1] == "loaded:"
    assert all(verb in done.stdout for verb in (words or ("epsilon", "calibrate", "show")))


@pytest.fixture
def hidden_examples(fedlearn: Fedlearn, tmp_path: Path) -> Path:
    """A run whose clients account for themselves, as ``simulate`` leaves it."""
    folder = tmp_path / "run"
    settings = ("task=digits-mlp", "federation.clients=3", "federation.rounds=2", "data.partition=iid")
    asked = ("privacy.unit=example", "privacy.noise-multiplier=2", "training.local-steps=1")
    overrides = [word for each in (*settings, *asked) for word in ("--set", each)]
    assert fedlearn("simulate", *overrides, "--out", str(folder), "--quiet", "--json")[0] == 0
    return folder


def test_a_clients_line_or_a_client_that_is_missing_at_the_end_is_found(
    fedlearn: Fedlearn, hidden_examples: Path
) -> None:
    assert fedlearn("privacy", "epsilon", str(hidden_examples))[0] == 0
    ledger = hidden_examples / "clients" / "1" / "ledger.jsonl"
    lines = ledger.read_bytes().splitlines(keepends=True)
    ledger.write_bytes(b"".join(lines[:-1]))
    code, _, err = fedlearn("privacy", "epsilon", str(hidden_examples))
    assert (code, f"line {len(lines)}" in err) == (1, True)
    ledger.unlink()
    code, _, err = fedlearn("privacy", "epsilon", str(hidden_examples))
    assert (code, "clients/1" in err) == (3, True)
    shutil.rmtree(hidden_examples / "clients")
    assert fedlearn("privacy", "epsilon", str(hidden_examples))[0] == 3


@pytest.mark.parametrize("verb", ["plan", "simulate"])
def test_an_epsilon_for_nobody_and_two_numbers_at_once_are_refused(fedlearn: Fedlearn, verb: str) -> None:
    code, _, err = fedlearn(verb, "--set", "privacy.target-epsilon=8")
    assert (code, "privacy.unit=client" in err) == (2, True)
    two = ("--set", "privacy.target-epsilon=8", "--set", "privacy.noise-multiplier=1")
    code, _, err = fedlearn(verb, "--set", "privacy.unit=client", *two)
    assert (code, "only one of" in err) == (2, True)
