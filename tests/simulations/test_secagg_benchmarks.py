"""The benchmarks of secure aggregation measure what they say; how fast anything is is not asserted here."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fedlearn.secagg.server as server

Script = Callable[[str], Any]


@pytest.fixture
def cohort(script: Script) -> Any:
    return script("benchmarks.secagg.cohort")


@pytest.fixture
def peers(script: Script, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the script, with an ``openssl`` that takes no second."""
    module = script("benchmarks.secagg.peers")
    monkeypatch.setattr(module, "openssl_aes256ctr_bytes_per_s", lambda: 1e9)
    return module


@pytest.fixture
def thousand(script: Script) -> Any:
    return script("benchmarks.secagg.thousand")


def _without_unmasking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the server forget to take the masks off."""
    monkeypatch.setattr(server, "add_masks", lambda *_, **__: None)


# -- the driver ----------------------------------------------------------------------------------------------------


def test_a_round_with_losses_at_every_phase_is_exact(cohort: Any) -> None:
    lost = dict(enumerate(server.PHASES))
    setting = cohort.Setting(clients=20, parameters=100, lost=lost)
    ticks: list[None] = []
    found = cohort.run_round(setting, progress=lambda: ticks.append(None))
    assert found.exact
    assert found.survivors == 17  # those lost before the last two phases have sent their vectors
    assert set(found.client_s) == set(range(5, 20)) == set(found.uploaded) == set(found.downloaded)
    assert len(ticks) == 5 * 15 + 0 + 1 + 2 + 3 + 4
    assert found.server_s > 0 and all(seconds > 0 for seconds in found.client_s.values())
    assert found.masked_bytes > setting.offer().encoding.upload_bytes


def test_a_sum_with_masks_left_on_is_not_exact(cohort: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _without_unmasking(monkeypatch)
    assert not cohort.run_round(cohort.Setting(clients=5, parameters=100)).exact


@pytest.mark.parametrize("wrong", ["words", "vector"])
def test_a_sum_or_its_decoding_off_by_little_is_not_exact(
    cohort: Any, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    setting, agrees = cohort.Setting(clients=5, parameters=100), cohort.Devices.agrees

    def nudged(devices: Any, total: Any, decoded: Any, scale: float) -> bool:
        assert agrees(devices, total, decoded, scale)
        if wrong == "words":
            total.words[0] += np.uint64(1)
        else:
            decoded.vector[0] += 10 / scale
        return bool(agrees(devices, total, decoded, scale))

    monkeypatch.setattr(cohort.Devices, "agrees", nudged)
    assert not cohort.run_round(setting).exact


def test_losses_follow_from_the_seed(cohort: Any) -> None:
    losses = cohort.random_losses(1000, 0.1, 0)
    assert len(losses) == 100 and losses == cohort.random_losses(1000, 0.1, 0) != cohort.random_losses(1000, 0.1, 1)
    assert set(losses.values()) == set(server.PHASES)


def test_every_client_works_the_graph_out_by_itself(cohort: Any) -> None:
    cohort.run_round(cohort.Setting(clients=5, parameters=100))
    assert cohort.topology._topology.cache_info().misses == 1  # since the last client forgot what was there


# -- beside Flower -------------------------------------------------------------------------------------------------


def test_everything_is_measured_in_turns(peers: Any, cohort: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[str] = []
    for name in ("flower_client", "flower_server", "run_checked"):
        real = getattr(peers, name)

        def noted(*args: Any, name: str = name, real: Any = real, **kwargs: Any) -> Any:
            turns.append(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(peers, name, noted)
    monkeypatch.setattr(peers, "server_memory", lambda _: cohort.Memory(summed=1, decoded=2))
    answer = peers.experiment(repeats=2, parameters=100, clients=(5, 6), masks_s=0.01)
    assert turns == ["flower_client", "run_checked"] * 4 + ["flower_server", "run_checked"] * 4
    body = json.loads(json.dumps(answer.body, allow_nan=False))
    lines = {each["name"]: each for each in body["lines"]}
    timed = ["client, n = 5", "client, n = 6", "server, n = 5, 0 dropped", "server, n = 5, 1 dropped"]
    for name in timed:
        line = lines[name]
        assert len(line["flower_all_s"]) == len(line["ours_all_s"]) == 2
        assert line["value"] == pytest.approx(line["flower_s"] / line["ours_s"])
        assert "verdict" not in line  # nothing was promised of so few
    assert lines["upload, bytes/parameter"]["flower"] > 8
    assert lines["upload, the rest, n = 5"]["value"] < lines["upload, the rest, n = 6"]["value"]
    assert lines["the rest, n = 5 to 6"]["verdict"] == "met"
    assert lines["20 masks, bytes/s"]["openssl_bytes_per_s"] == 1e9
    assert lines["server's memory, n = 6"]["summed_bytes"] == 1
    assert len(answer.rows) == len(lines) and all(len(row) == len(answer.columns) for row in answer.rows)


def test_the_servers_memory_is_measured(cohort: Any) -> None:
    small, large = (cohort.server_memory(cohort.Setting(clients=5, parameters=d)) for d in (100, 100_000))
    vector = 8 * 100_000 / 3
    assert small.summed < vector < large.summed < 4 * vector
    assert large.summed < large.decoded


@pytest.mark.parametrize(
    ("value", "bar", "verdict"),
    [
        (5.0, {"least": 5.0}, "met"),
        (4.99, {"least": 5.0}, "missed"),
        (2.7, {"most": 2.7}, "met"),
        (2.71, {"most": 2.7}, "missed"),
        (None, {"least": 0.6}, "not measured"),
        (1.0, {}, ""),
    ],
)
def test_a_verdict_follows_from_what_was_measured(peers: Any, value: Any, bar: Any, verdict: str) -> None:
    assert peers.Line(name="x", value=value, **bar).verdict == verdict


def test_a_missed_bar_is_said(peers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    line = peers.Line(name="slow", value=1.0, least=2.0)
    for name in ("_clients_and_servers", "_upload", "_memory"):
        monkeypatch.setattr(peers, name, lambda *_: [])
    monkeypatch.setattr(peers, "_masks", lambda *_: line)
    answer = peers.experiment()
    assert not answer.met and "slow" in answer.verdict


def test_without_openssl_the_bar_is_not_measured(peers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> float:
        raise FileNotFoundError("no program 'openssl'")

    monkeypatch.setattr(peers, "openssl_aes256ctr_bytes_per_s", missing)
    line = peers._masks(100, 1, 0.01)
    assert line.verdict == "not measured" and "openssl" in line.table["problem"]


def test_a_wrong_sum_is_no_measurement(peers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _without_unmasking(monkeypatch)
    with pytest.raises(RuntimeError, match="not that of their updates"):
        peers.experiment(repeats=1, parameters=100, clients=(5,))


# -- a thousand ----------------------------------------------------------------------------------------------------


def test_rounds_of_two_sizes_stand_beside_each_other(thousand: Any) -> None:
    answer = thousand.experiment(clients=(30, 10), parameters=100, measure=thousand.measured)
    assert answer.met, answer.verdict
    body = json.loads(json.dumps(answer.body, allow_nan=False))
    large, small = body["rounds"]
    assert (large["clients"], small["clients"]) == (30, 10)
    assert sum(large["lost"].values()) == 3
    took_part = 30 - large["lost"].get("advertise", 0)
    assert large["exact"] and large["degree"] == took_part - 1 and large["threshold"] == 2 * took_part // 3 + 1
    assert large["client_cpu_s"] > 0 and large["server_cpu_s"] > 0 and large["wall_s"] > 0
    assert large["uploaded_bytes"] > small["uploaded_bytes"] > small["masked_bytes"] > 100 * 8 / 3
    assert all(len(row) == 3 for row in answer.rows)


def test_a_wrong_sum_ends_the_script_with_1(
    thousand: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _without_unmasking(monkeypatch)
    with pytest.raises(SystemExit) as end:
        thousand.finish(
            lambda: thousand.experiment(clients=(5,), parameters=100, measure=thousand.measured), as_json=True
        )
    assert end.value.code == 1
    said = capsys.readouterr().out
    assert "WRONG" in said and json.loads(said.splitlines()[-1])["met"] is False


@pytest.mark.slow
def test_a_sparse_graph_carries_the_losses_in_a_process_of_its_own(thousand: Any) -> None:
    answer = thousand.experiment(clients=(150,), parameters=1000)
    assert answer.met, answer.verdict
    (found,) = answer.body["rounds"]
    assert found["degree"] < 100 and found["peak_bytes"] > 0
