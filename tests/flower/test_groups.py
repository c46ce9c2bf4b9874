"""Many clients in one message: the same sum, the same counts and the same failures as one by one, on any worker."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message
from torch import nn

from fedlearn.config import RunConfig
from fedlearn.errors import ConfigError
from fedlearn.federation.checkpoint import load_checkpoint
from fedlearn.federation.messages import Failure, FailureCode, GroupReply, Request, RoundPlan, TrainReply
from fedlearn.federation.run_folder import RunFolder
from fedlearn.flower import site as sites
from fedlearn.flower.client import build_client_app, prepare_clients
from fedlearn.flower.faults import NoFaults
from fedlearn.flower.grid import LocalGrid
from fedlearn.flower.network import GridNetwork
from fedlearn.flower.site import Site
from fedlearn.learning import ClientData, Examples
from fedlearn.learning.kernels import UnsuitableError
from fedlearn.privacy.ledger import read_events, releases_of
from fedlearn.simulation.engine import simulate
from fedlearn.sources import SystemClock
from fedlearn.tasks.digits import DigitsMlp

CLIENTS = 18


def config_of(**tables: Any) -> RunConfig:
    base: dict[str, Any] = {
        "task": "digits-mlp",
        "federation": {"clients": CLIENTS, "rounds": 2, "evaluation": "off"},
        "training": {"batch-size": 8, "local-epochs": 1},
        "data": {"partition": "dirichlet", "alpha": 5.0},
    }
    changed = {k: {**base.get(k, {}), **v} if isinstance(v, dict) else v for k, v in tables.items()}
    return RunConfig.from_mapping({**base, **changed})


CLIENT_PRIVACY = {"unit": "client", "noise-multiplier": 1e-3, "bound-l2": 0.3}
EXAMPLE_PRIVACY = {"unit": "example", "noise-multiplier": 0.8, "bound-l2": 1.0}


@pytest.fixture(autouse=True)
def _nothing_kept() -> Iterator[None]:
    """What another test let clients hold is not kept."""
    sites.site_of.cache_clear()
    yield
    sites.site_of.cache_clear()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., RunFolder]:
    monkeypatch.setattr("fedlearn.federation.summary.draw_history", lambda *_, **__: "<svg/>")
    numbers = iter(range(100))

    def call(**tables: Any) -> RunFolder:
        folder = RunFolder.create(tmp_path / str(next(numbers)), config_of(**tables))
        simulate(folder)
        return folder

    return call


def params_of(folder: RunFolder) -> np.ndarray[Any, Any]:
    state = load_checkpoint(folder.path / "checkpoint" / "state.safetensors", folder.config.sha256())
    assert state is not None
    return state.server.params


@pytest.mark.parametrize("trainer", ["stacked", "vmap"])
@pytest.mark.parametrize(
    "tables",
    [
        {},
        {"training": {"algorithm": "fedprox", "momentum": 0.5, "weighting": "uniform"}},
        {"privacy": CLIENT_PRIVACY},
        {"privacy": {**CLIENT_PRIVACY, "adaptive-clipping": True}},
        {"privacy": CLIENT_PRIVACY, "training": {"weighting": "examples", "max-examples": 60}},
        {"privacy": EXAMPLE_PRIVACY},
        {"privacy": EXAMPLE_PRIVACY, "training": {"momentum": 0.5}},
    ],
    ids=["plain", "fedprox", "clients hidden", "adaptive", "capped", "examples hidden", "with momentum"],
)
def test_a_run_in_groups_equals_a_run_one_by_one(
    run: Callable[..., RunFolder], trainer: str, tables: dict[str, Any]
) -> None:
    alone = run(simulation={"trainer": "sequential"}, **tables)
    grouped = run(simulation={"trainer": trainer}, **tables)
    one, other = params_of(alone), params_of(grouped)
    assert np.linalg.norm(one - other) <= 1e-5 * np.linalg.norm(one)
    assert not np.array_equal(one, other), "the same bytes: were there groups at all?"
    for left, right in zip(alone.metrics(), grouped.metrics(), strict=True):
        for name in ("respondents", "cohort", "failures", "upload_bytes", "download_bytes"):
            assert left[name] == right[name]
        assert left["train_loss"] == (pytest.approx(right["train_loss"], rel=1e-4) if "privacy" not in tables else None)


@pytest.mark.parametrize("tables", [{}, {"privacy": CLIENT_PRIVACY}, {"privacy": EXAMPLE_PRIVACY}])
def test_one_two_and_three_workers_give_the_same_bytes(run: Callable[..., RunFolder], tables: dict[str, Any]) -> None:
    models = [
        (run(simulation={"workers": workers}, **tables).path / "model.safetensors").read_bytes()
        for workers in (0, 1, 2, 3)
    ]
    assert len(set(models)) == 1


def test_a_sum_that_was_rounded_as_a_whole_says_so_in_the_ledger(run: Callable[..., RunFolder]) -> None:
    def sensitivity(trainer: str) -> float:
        folder = run(simulation={"trainer": trainer}, privacy=CLIENT_PRIVACY)
        release = releases_of(read_events(folder.path / "ledger.jsonl"))[0]
        return release.queries[0].sensitivity_l2 - CLIENT_PRIVACY["bound-l2"]

    alone, grouped = sensitivity("sequential"), sensitivity("stacked")
    assert alone > 0
    neighbours = 2.0**-14 * CLIENT_PRIVACY["bound-l2"]  # who are clipped in another way if their group fails
    assert grouped == pytest.approx(2 * alone + neighbours, rel=1e-6)


# -- message by message --------------------------------------------------------------------------------------------


class Recorded(LocalGrid):
    """A grid that keeps what it was asked."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.asked: list[tuple[str, list[int]]] = []

    def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> Iterator[Message]:
        messages = list(messages)
        for message in messages:
            members = message.content.config_records.get("group", {}).get("members", [message.metadata.dst_node_id - 1])
            self.asked.append((message.metadata.message_type, list(members)))
        return super().send_and_receive(messages, timeout=timeout)


@pytest.fixture
def exchanged() -> Callable[..., tuple[list[Any], list[tuple[str, list[int]]]]]:
    def call(config: RunConfig, faults: NoFaults | None = None, timeout_s: float = 60.0) -> Any:
        site = prepare_clients(config)
        plan = RoundPlan(
            config=config,
            round_number=1,
            attempt=1,
            proximal_mu=0.0,
            spec_sha256=site.model.spec.sha256,
            bound_l2=config.privacy.bound_l2 if config.privacy.unit == "client" else None,
        )
        vector = Site(config.for_clients()).model.vector()
        requests = [Request(kind="train", client=client, plan=plan, vector=vector) for client in range(CLIENTS)]
        with Recorded(build_client_app(), clients=CLIENTS, faults=faults) as grid:
            network = GridNetwork(grid, SystemClock(), clients=CLIENTS, local=grid, trainer="stacked")
            replies = list(network.exchange(requests, site.model.spec, timeout_s))
            return replies, grid.asked

    return call


def summed(replies: list[Any]) -> tuple[np.ndarray[Any, Any], dict[int, int], dict[int, FailureCode]]:
    """Return the weighted sum, each respondent's weight, and each failure's code."""
    total, weights, failures = 0.0, dict[int, int](), dict[int, FailureCode]()
    for reply in replies:
        if isinstance(reply, Failure):
            failures[reply.client] = reply.code
        elif isinstance(reply, TrainReply):
            total = total + reply.update.vector.astype(np.float64) * reply.weight
            weights[reply.client] = reply.weight
        elif isinstance(reply, GroupReply):
            total = total + reply.total
            weights.update(zip(reply.respondents, reply.weights, strict=True))
            failures.update((failure.client, failure.code) for failure in reply.failures)
    return total, weights, failures


def test_groups_are_a_matter_of_the_place_in_the_cohort_alone(exchanged: Any) -> None:
    replies, asked = exchanged(config_of())
    assert {kind for kind, _ in asked} == {"train.group"}
    assert [members for _, members in asked] == [list(range(9)), list(range(9, CLIENTS))]
    assert all(isinstance(reply, GroupReply) for reply in replies)
    assert summed(replies)[1].keys() == set(range(CLIENTS))


class Loses(NoFaults):
    """Loses what clients 4 and 5 are sent."""

    def drops(self, group: str, client: int, kind: str) -> bool:
        return client in (4, 5)


def test_who_is_touched_by_a_fault_is_asked_alone(exchanged: Any) -> None:
    replies, asked = exchanged(config_of(), Loses())
    assert [members for kind, members in asked if kind == "train"] == [[4], [5]]
    total, weights, failures = summed(replies)
    assert failures == {4: FailureCode.NO_REPLY, 5: FailureCode.NO_REPLY}
    whole, _, _ = summed(exchanged(config_of())[0])
    assert weights.keys() == set(range(CLIENTS)) - {4, 5}
    assert np.linalg.norm(whole - total) > 0.01


def data_of(monkeypatch: pytest.MonkeyPatch, change: Callable[[int, ClientData], ClientData]) -> None:
    """Let clients hold something else than was dealt."""
    sites.site_of.cache_clear()
    original = sites.Dealt.client
    monkeypatch.setattr(sites.Dealt, "client", lambda self, index: change(index, original(self, index)))


def test_clients_that_fail_are_counted_each_with_its_own_reason(
    exchanged: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def change(client: int, data: ClientData) -> ClientData:
        if client == 2:
            raise RuntimeError("the cable is out")
        if client == 3:
            return ClientData(data.train.take(np.zeros(0, dtype=np.int64)))
        if client == 7:
            return ClientData(Examples(torch.full_like(data.train.inputs, torch.nan), data.train.targets))
        if client == 11:
            return ClientData(Examples(data.train.inputs * 1e36, data.train.targets))
        return data

    honest, _, _ = summed(exchanged(config_of())[0])
    data_of(monkeypatch, change)
    with caplog.at_level(logging.WARNING, logger="fedlearn.client"):
        replies, asked = exchanged(config_of(data={"partition": "iid"}))
    total, weights, failures = summed(replies)
    assert failures == {
        2: FailureCode.TRAINING_FAILED,
        3: FailureCode.NO_DATA,
        7: FailureCode.BAD_DATA,
        11: FailureCode.NOT_FINITE,
    }
    assert {kind for kind, _ in asked} == {"train.group"}
    assert weights.keys() == set(range(CLIENTS)) - failures.keys()
    assert np.isfinite(total).all()
    assert honest.shape == total.shape
    assert "the cable is out" in caplog.text
    assert all(reply.failures == [] or reply.failures[0].incident for reply in replies)


def test_under_client_privacy_a_client_that_diverged_is_a_zero_update(
    exchanged: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    data_of(
        monkeypatch,
        lambda client, data: ClientData(Examples(data.train.inputs * (1e36 if client == 4 else 1), data.train.targets)),
    )
    replies, _ = exchanged(config_of(privacy=CLIENT_PRIVACY))
    group = next(reply for reply in replies if 4 in reply.respondents)
    assert group.total is None
    assert group.clipped.count == 9
    assert group.clipped.within <= 8
    assert np.linalg.norm(group.clipped.total) <= 8 * CLIENT_PRIVACY["bound-l2"]


@pytest.mark.parametrize("error", [UnsuitableError("on this batch only"), RuntimeError("out of memory"), SystemExit(3)])
def test_a_group_that_comes_to_nothing_is_asked_one_by_one(
    exchanged: Any, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    whole, expected, _ = summed(exchanged(config_of())[0])
    from fedlearn.federation import groups

    original, calls = groups.train_group, iter(range(100))

    def failing(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == 1:
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(groups, "train_group", failing)
    replies, asked = exchanged(config_of())
    assert [members for kind, members in asked if kind == "train"] == [[client] for client in range(9, CLIENTS)]
    total, weights, failures = summed(replies)
    assert weights == expected
    assert failures == {}
    assert np.linalg.norm(total - whole) <= 1e-5 * np.linalg.norm(whole)


def test_a_client_that_hangs_costs_itself_alone(exchanged: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(client: int, data: ClientData) -> ClientData:
        if client == 8:
            time.sleep(60)
        return data

    data_of(monkeypatch, change)
    replies, asked = exchanged(config_of(), timeout_s=0.2)
    _, weights, failures = summed(replies)
    assert failures == {8: FailureCode.NO_REPLY}
    assert weights.keys() == set(range(CLIENTS)) - {8}
    assert [members for kind, members in asked if kind == "train"] == [[client] for client in range(9)]


@pytest.mark.parametrize(
    "change",
    [
        {"respondents": list(range(8))},
        {"respondents": [*range(9), 8]},
        {"weights": [1] * 8},
        {"weights": [1] * 8 + [0]},
        {"weights": [1] * 8 + [10**9]},
        {"losses": [0.1] * 8},
        {"losses": [0.1] * 8 + [float("nan")]},
        {"codes": ["unheard-of"], "failed": [8], "respondents": list(range(8)), "incidents": ["a"]},
        {"weights": None},
    ],
    ids=str,
)
def test_an_answer_that_does_not_add_up_is_not_used(
    exchanged: Any, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    from fedlearn.flower import client

    original = client.learn_group

    def forged(*args: Any, **kwargs: Any) -> Any:
        total, counted = original(*args, **kwargs)
        return total, ({**counted, **change} if 0 in counted["respondents"] else counted)

    monkeypatch.setattr(client, "learn_group", forged)
    replies, asked = exchanged(config_of())
    assert [members for kind, members in asked if kind == "train"] == [[client] for client in range(9)]
    assert summed(replies)[1].keys() == set(range(CLIENTS))


def test_a_device_takes_no_part_in_a_group(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = config_of()
    site = prepare_clients(config)
    with Recorded(
        build_client_app(),
        clients=CLIENTS,
        node_config={"data-path": str(tmp_path / "mine.npz"), "task": "digits-mlp"},
    ) as grid:
        network = GridNetwork(grid, SystemClock(), clients=CLIENTS, local=grid, trainer="stacked")
        plan = RoundPlan(config=config, round_number=1, attempt=1, proximal_mu=0.0, spec_sha256=site.model.spec.sha256)
        requests = [Request(kind="train", client=c, plan=plan, vector=site.model.vector()) for c in range(CLIENTS)]
        replies = list(network.exchange(requests, site.model.spec, 60.0))
    assert sum(kind == "train" for kind, _ in grid.asked) == CLIENTS
    assert all(isinstance(reply, Failure) for reply in replies)


def test_under_secure_aggregation_every_client_answers_for_itself() -> None:
    config = config_of(secagg={"mode": "ideal"})
    choice = prepare_clients(config).trainer("auto")
    assert choice.trainer is None
    assert choice.reason == ""
    with pytest.raises(ConfigError, match="masks its own"):
        prepare_clients(config).trainer("stacked")


def test_a_run_says_how_its_clients_were_trained_and_why_not_faster(run: Callable[..., RunFolder]) -> None:
    said: list[str] = []
    plain = run()
    assert plain.summary()["trainer"] == "stacked"
    tables = {"task": f"{__file__}:Normed"}
    folder = RunFolder.create(plain.path.parent / "norm", config_of(**tables))
    assert simulate(folder, say=said.append)["trainer"] == "sequential"
    reason = "layer '3' (BatchNorm1d) mixes the examples of a batch and keeps running means"
    assert said == [f"clients are trained one by one: {reason}"]
    folder = RunFolder.create(plain.path.parent / "asked", config_of(simulation={"trainer": "vmap"}, **tables))
    with pytest.raises(ConfigError, match=r"simulation\.trainer: \"vmap\" does not go with this run: layer '3'"):
        simulate(folder)


class Normed(DigitsMlp):
    """Digits with a layer that mixes the examples of a batch."""

    def build_model(self) -> nn.Module:
        model = super().build_model()
        return nn.Sequential(*model[:3], nn.BatchNorm1d(64), *model[3:])
