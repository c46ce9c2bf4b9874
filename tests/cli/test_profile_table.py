"""``simulate --profile``: every second has a name, in this process and in the workers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedlearn import profiling
from fedlearn.cli.profile_table import CLIENTS, SERVER, ProfiledRun, recorded
from fedlearn.profiling import Profile, Spent, span

Result = tuple[int, str, str]
TINY = ("digits-mlp", "--set", "federation.clients=4", "--set", "federation.rounds=2", "-q", "--out", "mine")


def phases(body: dict[str, Any], where: str) -> dict[str, dict[str, Any]]:
    return {each["phase"]: each for each in body["phases"] if each["where"] == where}


def test_every_second_of_this_process_has_a_name(fedlearn: Callable[..., Result]) -> None:
    code, out, _ = fedlearn("simulate", *TINY, "--profile", "--json")
    assert code == 0
    body = json.loads(out)["profile"]
    assert (body["rounds"], body["client_updates"], body["workers"]) == (2, 8, [])
    server, clients = phases(body, "server"), phases(body, "clients")
    assert {"start", "draw", "messages", "wait", "sum", "update", "validate", "keep", "rounds", "other"} <= set(server)
    assert {"client"} <= set(clients) <= set(CLIENTS)
    seconds = [each["seconds"] for each in body["phases"]]
    assert sum(seconds) == pytest.approx(body["wall_s"], abs=1e-4)
    assert sum(each["share"] for each in body["phases"]) == pytest.approx(1.0, abs=1e-3)
    assert server["other"]["seconds"] < 0.1 * body["wall_s"]
    assert server["keep"]["times"] == 2
    assert server["sum"]["us_per_client"] == pytest.approx(1e6 * server["sum"]["seconds"] / 8, abs=0.2)
    assert not profiling.is_on()


def test_workers_say_where_their_time_went(fedlearn: Callable[..., Result]) -> None:
    code, out, _ = fedlearn("simulate", *TINY, "--profile", "--json", "--set", "simulation.workers=2")
    assert code == 0
    body = json.loads(out)["profile"]
    assert "client" not in phases(body, "clients"), "nobody answers in this process"
    assert {"client", "decode", "encode"} <= set(phases(body, "workers"))
    assert len(body["workers"]) == 2
    assert all(0 < each["busy"] <= 1 for each in body["workers"])
    worked = sum(each["seconds"] for name, each in phases(body, "workers").items() if name != "send")
    assert worked == pytest.approx(sum(each["busy_s"] for each in body["workers"]), abs=1e-3)


def test_people_get_a_table(fedlearn: Callable[..., Result]) -> None:
    code, out, _ = fedlearn("simulate", *TINY, "--profile", "--set", "simulation.workers=1")
    assert code == 0
    assert "Where the time went: " in out
    assert "2 rounds, 8 client updates" in out
    for name in ("waiting for clients", "in the workers", "the rest of the clients", "µs a client"):
        assert name in out, name
    assert re.search(r"workers busy while rounds ran: \d+ %\n", out)


def test_without_it_nothing_is_recorded_and_nothing_is_said(fedlearn: Callable[..., Result]) -> None:
    _, out, _ = fedlearn("simulate", *TINY, "--json")
    assert "profile" not in json.loads(out)


def test_it_is_refused_where_the_work_is_elsewhere(fedlearn: Callable[..., Result], tmp_path: Path) -> None:
    code, _, err = fedlearn("simulate", *TINY, "--profile", "--set", "simulation.engine=flower")
    assert code == 2
    assert "--profile sees this process and the workers it forks" in err
    assert not (tmp_path / "mine").exists()


def test_recording_ends_with_a_run_that_fails() -> None:
    with pytest.raises(ZeroDivisionError), recorded() as run, span("train"):
        raise ZeroDivisionError
    assert not profiling.is_on()
    assert run.profile.here["train"].times == 1


def test_a_span_that_the_table_does_not_know_is_shown_all_the_same() -> None:
    run = ProfiledRun()
    run.profile = Profile(
        wall_s=10.0, here={"start": Spent(2.0, 1), "magic": Spent(3.0, 1)}, workers=({}, {"train": Spent(4.0, 2)})
    )
    body = run.to_json()
    assert phases(body, "server")["magic"]["share"] == 0.3
    assert phases(body, "server")["other"]["seconds"] == 5.0
    assert phases(body, "server")["magic"]["us_per_client"] is None, "no update was taken"
    assert phases(body, "workers")["train"]["share"] == 0.25, "of two workers' eight seconds"
    assert [each["busy"] for each in body["workers"]] == [0.0, 0.5]


def test_every_span_in_the_source_has_words() -> None:
    root = Path(profiling.__file__).parent
    used = set()
    for path in root.rglob("*.py"):
        if path.name not in ("profiling.py",):
            used |= set(re.findall(r"\bspan(?:ned)?\(\"([^\"]+)\"\)", path.read_text()))
    assert {"train", "keep", "wait"} <= used
    assert used <= {*SERVER, *CLIENTS}
