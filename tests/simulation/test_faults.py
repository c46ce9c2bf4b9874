"""What goes wrong on purpose: as often as asked, the same each time, and seen by the server's own checks."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, RecordDict

from fedlearn.config import FaultsConfig, RunConfig
from fedlearn.data.poisoning import flip_labels
from fedlearn.errors import ConfigError, TaskError
from fedlearn.federation.run_folder import RunFolder
from fedlearn.flower.faults import GROUP_KIND, ORDINARY, Fate, NoFaults
from fedlearn.flower.server import build_server_app
from fedlearn.learning import Examples
from fedlearn.secagg.server import PHASES
from fedlearn.simulation.engine import simulate
from fedlearn.simulation.faults import SeededFaults
from fedlearn.sources import SeedTree

SEEDS = SeedTree.root(0)


def faults(clients: int = 20, **keys) -> SeededFaults:
    """Return the faults of a ``[faults]`` table, by Python names."""
    return SeededFaults(FaultsConfig(**keys), SEEDS, clients=clients, classes=10)


def asked(subject: SeededFaults, kind: str = "train", rounds: int = 60, clients: int = 40) -> list[Fate]:
    return [subject.fate(f"{number}.1", client, kind) for number in range(rounds) for client in range(clients)]


# -- the draws -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "happens"),
    [
        ({"drop": 0.3}, lambda fate: fate.lost == "before"),
        ({"drop": 0.3, "moment": "after"}, lambda fate: fate.lost == "after"),
        ({"drop": 0.6, "moment": "any"}, lambda fate: fate.lost == "after"),
        ({"crash": 0.3}, lambda fate: fate.crashes),
        ({"duplicate": 0.3}, lambda fate: fate.duplicated),
        ({"nan": 0.3}, lambda fate: fate.attack == "nan"),
        ({"wrong_shape": 0.3}, lambda fate: fate.attack == "wrong-shape"),
    ],
)
def test_each_fault_happens_as_often_as_asked(keys, happens) -> None:
    assert np.mean([happens(fate) for fate in asked(faults(**keys))]) == pytest.approx(0.3, abs=0.04)


EVERYTHING = {
    **dict.fromkeys(("drop", "crash", "duplicate", "nan", "wrong_shape", "byzantine"), 0.2),
    "moment": "any",
}


def test_a_fate_depends_on_who_is_asked_about_and_not_on_when() -> None:
    places = [(f"{number}.{attempt}", client) for number in range(9) for attempt in (1, 2) for client in range(20)]
    forwards = {place: faults(**EVERYTHING).fate(*place, "train") for place in places}
    subject = faults(**EVERYTHING)
    backwards = {place: subject.fate(*place, "train") for place in reversed(places)}
    assert forwards == backwards
    assert len(set(forwards.values())) > 10
    other = SeededFaults(FaultsConfig(**EVERYTHING), SeedTree.root(1), clients=20)
    assert forwards != {place: other.fate(*place, "train") for place in places}


def test_one_fault_more_changes_nothing_of_the_others() -> None:
    alone, together = faults(nan=0.2), faults(nan=0.2, duplicate=0.3)
    for one, both in zip(asked(alone), asked(together), strict=True):
        assert (one.attack, one.where) == (both.attack, both.where)


@pytest.mark.parametrize(("share", "count"), [(0.1, 2), (0.3, 6), (0.01, 1), (0.99, 20), (0.0, 0)])
def test_byzantine_clients_are_a_share_of_all_and_the_same_in_every_round(share, count) -> None:
    subject = faults(byzantine=share)
    assert len(subject.byzantine) == count
    for number in range(5):
        falsify = {client for client in range(20) if subject.fate(f"{number}.1", client, "train").attack == "scale"}
        assert falsify == subject.byzantine
    assert FaultsConfig(byzantine=share).attackers(20) == count


@pytest.mark.parametrize(
    ("attack", "factor", "scaled"),
    [("sign-flip", None, -1), ("sign-flip", 3, -3), ("scale", None, 10), ("scale", 2, 2)],
)
def test_what_an_attacker_sends(attack, factor, scaled) -> None:
    keys = {"attack": attack} | ({} if factor is None else {"factor": factor})
    subject = faults(byzantine=0.1, **keys)
    client = min(subject.byzantine)
    assert subject.fate("1.1", client, "train") == Fate(attack="scale", factor=scaled)
    assert subject.told(client) == {}


def test_who_turns_labels_round_is_told_so_and_sends_what_it_learned() -> None:
    subject = faults(byzantine=0.1, attack="label-flip")
    told = {client: dict(subject.told(client)) for client in range(20)}
    assert {client for client, each in told.items() if each} == subject.byzantine
    assert all(each in ({}, {"label-flip": 10}) for each in told.values())
    assert set(asked(subject)) == {ORDINARY}


def test_a_share_of_nobody_knows_how_many_is_refused() -> None:
    with pytest.raises(ValueError, match="how many clients"):
        SeededFaults(FaultsConfig(byzantine=0.1), SEEDS)


@pytest.mark.parametrize("kind", ["query.identify", GROUP_KIND, "train.abort"])
def test_some_messages_nothing_ever_happens_to(kind) -> None:
    subject = faults(**{**EVERYTHING, "duplicate": 0.0})
    assert set(asked(subject, kind)) == {ORDINARY}
    assert not any(subject.touches("1.1", client, kind) for client in range(20))


def test_an_update_is_damaged_and_a_measurement_is_not() -> None:
    assert {fate.attack for fate in asked(faults(nan=0.5, wrong_shape=0.5, byzantine=0.5), "evaluate")} == {""}


def test_what_touches_a_message_is_whatever_is_not_ordinary() -> None:
    subject = faults(**EVERYTHING)
    for client in range(20):
        for group in ("1.1", "2.1", "2.2"):
            assert subject.touches(group, client, "train") == (subject.fate(group, client, "train") != ORDINARY)
    assert not any(faults().touches("1.1", client, "train") for client in range(20))
    assert not any(NoFaults().touches("1.1", client, "train") for client in range(20))


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("leg", PHASES)
def test_under_secure_aggregation_a_client_is_lost_in_one_leg_and_gone_in_the_next(leg, moment) -> None:
    subject = faults(drop=0.5, leg=leg, moment=moment)
    lost = {client for client in range(20) if subject.fate("1.1", client, f"train.{PHASES[-1]}").lost}
    assert 3 < len(lost) < 17
    for client in range(20):
        fates = [subject.fate("1.1", client, f"train.{each}").lost for each in PHASES]
        place = PHASES.index(leg)
        gone = [*[""] * place, moment, *["before"] * (len(PHASES) - place - 1)]
        assert fates == (gone if client in lost else [""] * len(PHASES))


def test_under_secure_aggregation_a_process_dies_once() -> None:
    subject = faults(crash=0.5)
    deaths = [[subject.fate("1.1", client, f"train.{leg}").crashes for leg in PHASES] for client in range(40)]
    assert {sum(each) for each in deaths} == {0, 1}
    assert {each.index(True) for each in deaths if any(each)} == set(range(len(PHASES)))


# -- the configuration ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "key"),
    [
        ({"nan": 1.0}, "faults.nan"),
        ({"wrong-shape": -0.1}, "faults.wrong-shape"),
        ({"attack": "label-flip", "factor": 2}, "faults.factor"),
        ({"factor": 0}, "faults.factor"),
        ({"time-zones": 25}, "faults.time-zones"),
        ({"start-hour": 24}, "faults.start-hour"),
        ({"devices": "phone"}, "faults.devices"),
        ({"delays": 0.5}, "faults.delays"),
    ],
)
def test_what_cannot_be_is_refused(table, key) -> None:
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_mapping({"faults": table})
    assert caught.value.key == key


@pytest.mark.parametrize(
    ("table", "key"),
    [({"nan": 0.1}, "nan"), ({"wrong-shape": 0.1}, "wrong-shape"), ({"byzantine": 0.1}, "byzantine")],
)
def test_under_secure_aggregation_no_single_update_is_there_to_be_damaged(table, key) -> None:
    with pytest.raises(ConfigError, match="none travels by itself") as caught:
        RunConfig.from_mapping({"secagg": {"mode": "active"}, "faults": table})
    assert caught.value.key == f"faults.{key}"
    RunConfig.from_mapping({"secagg": {"mode": "active"}, "faults": {"byzantine": 0.1, "attack": "label-flip"}})


def test_clients_are_told_nothing_of_the_faults_and_a_runs_hash_is() -> None:
    config = RunConfig.from_mapping({"faults": {"nan": 0.1, "devices": "phones"}})
    assert config.for_clients().faults == FaultsConfig()
    assert config.faults.asked == ("nan", "devices")
    assert config.sha256() != RunConfig().sha256()


@pytest.mark.parametrize("key", ["drop=0.1", "nan=0.1", "devices=phones", "availability=nightly"])
def test_outside_a_simulation_nothing_is_broken_on_purpose(key, tmp_path) -> None:
    def start(**options) -> None:
        state = RecordDict()
        build_server_app()(object(), Context(run_id=1, node_id=0, node_config={}, state=state, run_config=options))

    with pytest.raises(ConfigError, match="only `fedlearn simulate`") as caught:
        start(set=f"faults.{key}", out=str(tmp_path / "new"))
    assert caught.value.key == f"faults.{key.partition('=')[0]}"
    assert not (tmp_path / "new").exists()
    name, _, value = key.partition("=")
    config = RunConfig.from_mapping({"faults": {name: value if value.isalpha() else float(value)}})
    RunFolder.create(tmp_path / "old", config)
    with pytest.raises(ConfigError, match="only `fedlearn simulate`"):
        start(resume=str(tmp_path / "old"))


# -- whole runs ----------------------------------------------------------------------------------------------------

SMALL = {
    "task": "regression",
    "federation": {"clients": 6, "rounds": 2, "min-respondents": 1, "evaluation": "off"},
    "data": {"partition": "iid"},
    "training": {"local-steps": 1},
}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Return a function that simulates a small federation with faults; it returns the folder."""
    monkeypatch.setattr("fedlearn.federation.summary.draw_history", lambda *_, **__: "<svg/>")  # the slowest part
    numbers = iter(range(100))

    def call(table: dict, **sections: dict) -> RunFolder:
        merged = {
            name: {**value, **sections.pop(name, {})} if isinstance(value, dict) else value
            for name, value in SMALL.items()
        }
        config = RunConfig.from_mapping({**merged, **sections, "faults": table})
        folder = RunFolder.create(tmp_path / f"run-{next(numbers)}", config)
        simulate(folder)
        return folder

    return call


def codes(folder: RunFolder) -> Counter[str]:
    return Counter(code for line in folder.metrics() for code in line["failures"].values())


def sha(folder: RunFolder) -> str:
    return folder.summary()["model_sha256"]


@pytest.mark.parametrize(
    ("table", "code"),
    [
        ({"drop": 0.4, "moment": "after"}, "no-reply"),
        ({"crash": 0.4}, "lost"),
        ({"nan": 0.4}, "not-finite"),
        ({"wrong-shape": 0.4}, "bad-reply"),
        ({"delay": 0.4, "delay-s": 601}, "no-reply"),
    ],
)
@pytest.mark.parametrize("workers", [0, 2])
def test_every_failure_is_counted_under_its_code(run, table, code, workers) -> None:
    folder = run(table, simulation={"workers": workers})
    assert set(codes(folder)) == {code}
    for line in folder.metrics():
        assert line["respondents"] == line["cohort"] - len(line["failures"])


def test_an_attack_moves_the_model_and_one_that_overflows_is_found_out(run) -> None:
    honest, attacked = run({}), run({"byzantine": 0.5, "attack": "scale"})
    assert not codes(attacked)
    assert sha(attacked) != sha(honest)
    absurd = run({"byzantine": 0.5, "attack": "scale", "factor": 1e300})
    assert codes(absurd) == {"not-finite": 6}


def test_where_clients_are_hidden_an_update_that_is_too_long_is_no_update(run) -> None:
    private = {"unit": "client", "bound-l2": 0.01, "noise-multiplier": 1.0}
    folder = run({"byzantine": 0.5, "attack": "scale"}, privacy=private, federation={"sampling": "poisson"})
    assert set(codes(folder)) == {"not-clipped"}
    flipped = run({"byzantine": 0.5}, privacy=private, federation={"sampling": "poisson"})
    assert not codes(flipped)  # as long as it may be: only its influence is bounded


def test_a_reply_that_comes_twice_is_counted_once(run, caplog) -> None:
    with caplog.at_level(logging.DEBUG, logger="fedlearn.server"):
        twice = run({"duplicate": 0.5}, simulation={"trainer": "sequential"})
    assert sha(twice) == sha(run({}, simulation={"trainer": "sequential"}))
    assert [line["respondents"] for line in twice.metrics()] == [6, 6]


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_client_whose_reply_is_lost_has_noted_what_left_it(run, moment, workers) -> None:
    private = {"unit": "example", "noise-multiplier": 1.0, "bound-l2": 1.0}
    folder = run({"drop": 0.4, "moment": moment}, privacy=private, simulation={"workers": workers})
    released = Counter()
    for path in (folder.path / "clients").glob("*/ledger.jsonl"):
        events = [json.loads(line) for line in path.read_text().splitlines()]
        released[path.parent.name] = sum("release" in event["kind"] for event in events)
    lost = Counter(client for line in folder.metrics() for client in line["failures"])
    assert lost
    assert set(codes(folder)) == {"no-reply"}
    answered = {str(client): 2 - lost[str(client)] for client in range(6)}
    assert released == (Counter(dict.fromkeys(answered, 2)) if moment == "after" else +Counter(answered))


FLIPPED = """
import torch
from torch import nn
from fedlearn.learning import Examples, Pool, Task


class Classes(Task):
    FLIPPED = {flipped}

    def build_model(self):
        return nn.Linear(2, 3)

    def loss(self, output, target):
        return nn.functional.cross_entropy(output, target, reduction="none")

    def load_pool(self, path):
        groups = torch.arange(4).repeat_interleave(6)
        targets = torch.arange(24) % 3
        flipped = torch.isin(groups, torch.tensor(self.FLIPPED, dtype=torch.int64))
        targets = torch.where(flipped, 2 - targets, targets)
        return Pool(Examples(torch.linspace(-1, 1, 48).reshape(24, 2), targets, groups=groups.numpy()))
"""


@pytest.mark.parametrize("trainer", ["auto", "sequential"])
def test_labels_turned_round_are_as_if_the_attackers_data_had_been_so(run, tmp_path: Path, trainer) -> None:
    table = {"byzantine": 0.5, "attack": "label-flip"}
    seeds = SeedTree.root(2).child("faults")
    attackers = SeededFaults(FaultsConfig(byzantine=0.5, attack="label-flip"), seeds, clients=4, classes=3).byzantine
    assert sorted(attackers) not in ([0, 1], [2, 3]), "whole groups: one of whose members could stand for all"
    models = []
    for name, flipped, faulty in (("poisoned", sorted(attackers), {}), ("attacked", [], table), ("honest", [], {})):
        (tmp_path / f"{name}.py").write_text(FLIPPED.format(flipped=flipped))
        sections = {"federation": {"clients": 4}, "data": {"partition": "natural"}, "simulation": {"trainer": trainer}}
        models.append(run(faulty, task=str(tmp_path / f"{name}.py"), seed=2, **sections).load_state().server.params)
    np.testing.assert_allclose(models[0], models[1], rtol=1e-6)  # attackers are in no group, and summed elsewhere
    assert np.abs(models[0] - models[2]).max() > 1e-3


def test_where_targets_are_no_classes_there_are_no_labels_to_turn_round(run) -> None:
    with pytest.raises(ConfigError, match="classes") as caught:
        run({"byzantine": 0.5, "attack": "label-flip"})
    assert caught.value.key == "faults.attack"
    import torch

    with pytest.raises(TaskError, match="classes"):
        flip_labels(Examples(torch.zeros(3, 1), torch.zeros(3)), 2)
    with pytest.raises(TaskError, match="2 classes"):
        flip_labels(Examples(torch.zeros(3, 1), torch.tensor([0, 1, 2])), 2)


@pytest.mark.parametrize("mode", ["ideal", "active"])
def test_a_masked_vector_that_is_lost_is_in_no_sum(run, mode) -> None:
    table = {"drop": 0.2, "leg": "mask"}
    federation = {"clients": 8, "rounds": 1}
    hashes = {
        sha(run({**table, "moment": moment}, secagg={"mode": mode}, federation=federation))
        for moment in ("before", "after")
    }
    assert len(hashes) == 1
    assert sha(run({}, secagg={"mode": mode}, federation=federation)) not in hashes


@pytest.mark.parametrize("faults", [{"attack": "scale"}, {"factor": 3.0}, {"attack": "label-flip"}])
def test_an_attack_that_nobody_makes_is_refused(faults) -> None:
    with pytest.raises(ConfigError, match=r"does nothing without faults\.byzantine"):
        FaultsConfig(**faults)
