"""``fedlearn partition``: what it shows is what a run deals out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedlearn.data.loaders import distribute_data
from fedlearn.scenario import read_scenario
from fedlearn.tasks import load_task

Result = tuple[int, str, str]


def told(result: Result) -> dict[str, Any]:
    """Return the JSON object of a command that succeeded."""
    code, out, _ = result
    assert code == 0
    return dict(json.loads(out.splitlines()[-1]))


def test_json_counts_what_a_run_deals_out(fedlearn: Callable[..., Result], tmp_path: Path) -> None:
    body = told(fedlearn("partition", "digits-mlp", "--set", "federation.clients=4", "--json"))
    assert body["partition"] == "dirichlet"
    assert Path(body["picture"]) == tmp_path / "partition.svg"
    assert (tmp_path / "partition.svg").read_text().startswith("<svg ")
    config = read_scenario("digits-mlp", ["federation.clients=4"])
    dealt = distribute_data(load_task("digits-mlp"), config)
    labels = dealt.pool.train.labels()
    assert labels is not None
    for client, part in zip(body["clients"], dealt.train, strict=True):
        counts = np.bincount(labels[part], minlength=10).tolist()
        assert client["labels"] == {str(label): count for label, count in enumerate(counts)}
        assert client["examples"] == part.size


def test_a_table_of_labels_with_totals(fedlearn: Callable[..., Result]) -> None:
    code, out, _ = fedlearn("partition", "--set", "federation.clients=3", "--out", "who.svg")
    assert code == 0
    lines = [line.split() for line in out.splitlines()]
    assert ["client", "examples", *"0123456789"] in lines
    rows = [[int(cell.replace("·", "0")) for cell in line] for line in lines if line and line[0] in {"0", "1", "2"}]
    totals = next(line for line in lines if line[:1] == ["all"])
    sums = np.array(rows).sum(axis=0)[1:].tolist()
    assert [int(cell.replace(",", "")) for cell in totals[1:]] == sums
    assert "Picture: who.svg" in out


def test_many_clients_are_summed_up(fedlearn: Callable[..., Result]) -> None:
    code, out, _ = fedlearn("partition", "--set", "federation.clients=41", "--set", "data.partition=iid")
    assert code == 0
    for words in ("examples a client", "labels a client", "median", "The first 20 of 41 clients"):
        assert words in out
    assert len([line for line in out.splitlines() if line[1:3].strip().isdigit()]) == 20


def test_a_task_without_labels_has_only_sizes(fedlearn: Callable[..., Result]) -> None:
    words = ("regression", "--set", "data.partition=iid", "--set", "federation.clients=2")
    body = told(fedlearn("partition", *words, "--json"))
    assert body["clients"] == [
        {"client": 0, "examples": 177, "labels": {}},
        {"client": 1, "examples": 176, "labels": {}},
    ]
    code, out, _ = fedlearn("partition", *words)
    assert code == 0
    assert ["client", "examples"] in [line.split() for line in out.splitlines()]


TASK = """
import numpy as np
import torch
from fedlearn.learning import Examples, Pool, Task

class Many(Task):
    '''Twenty-four labels without names, and test examples at the clients.'''

    def load_pool(self, path):
        targets = torch.arange(240) % 24
        examples = Examples(torch.zeros(240, 2), targets, groups=np.arange(240) % 3)
        return Pool(train=examples, test=examples)
"""


def test_many_labels_show_what_stands_out(fedlearn: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "many.py").write_text(TASK)
    words = ("many.py", "--set", "federation.clients=3", "--set", "data.partition=natural")
    code, out, _ = fedlearn("partition", *words)
    assert code == 0
    assert ["client", "examples", "labels", "most", "of", "test"] in [line.split() for line in out.splitlines()]
    assert "by natural id" in out
    body = told(fedlearn("partition", *words, "--json"))
    assert [client["test_examples"] for client in body["clients"]] == [80, 80, 80]
    assert len(body["clients"][0]["labels"]) == 24


MADE = """
import numpy as np
import torch
from torch import nn
from torch.nn import functional
from fedlearn.learning import ClientData, Examples, Task

class Made(Task):
    '''Data on demand: client k holds 1 + k % 3 examples of label k % 2, and clients divisible by 3 one to test on.'''

    def build_model(self):
        return nn.Linear(2, 2)

    def loss(self, output, target):
        return functional.cross_entropy(output, target, reduction="none")

    def load_client(self, client, clients, path):
        size = 1 + client % 3
        train = Examples(torch.randn(size, 2), torch.full((size,), client % 2))
        return ClientData(train, train if size == 1 else None)
"""


def test_of_data_on_demand_a_sample_is_shown(fedlearn: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "made.py").write_text(MADE)
    words = ("made.py", "--set", "federation.clients=100000", "--set", "data.partition=natural")
    body = told(fedlearn("partition", *words, "--json"))
    assert body["sample_of"] == 100_000
    assert len(body["clients"]) == 32
    for each in body["clients"]:
        client, size = each["client"], each["examples"]
        assert size == 1 + client % 3
        assert each["labels"] == {"0": size * (client % 2 == 0), "1": size * (client % 2 == 1)}
        assert each["test_examples"] == (size == 1)
    assert body["clients"][-1]["client"] == 99_999
    code, out, _ = fedlearn("partition", *words)
    assert code == 0
    assert "32 of 100,000 clients, each's data made on demand" in out
    assert "examples a client" in out
    rows = [line.split() for line in out.splitlines()]
    assert ["99999", "1", "·", "1", "1"] in rows
    assert not any(row[:1] == ["all"] for row in rows), "a sample has no totals"
    assert "99999" in (tmp_path / "partition.svg").read_text()


def test_a_plan_of_data_on_demand_looks_at_a_sample(fedlearn: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "made.py").write_text(MADE)
    sizes = ("--set", "federation.clients=100000", "--set", "federation.cohort=10", "--set", "federation.rounds=1")
    words = ("made.py", *sizes, "--set", "data.partition=natural")
    plan = told(fedlearn("plan", *words, "--json"))
    assert plan["sampled_clients"] == 32
    assert plan["examples_per_client"]["max"] <= 3
    assert plan["evaluation"] == "clients"
    code, out, _ = fedlearn("plan", *words)
    assert code == 0
    assert "of 32 clients looked at" in out
    assert "the median of a sample of 32" in " ".join(out.split())


@pytest.mark.parametrize(("name", "why"), [("who.png", "SVG"), ("nowhere/who.svg", "no folder")])
def test_a_picture_that_cannot_be_written_is_refused(fedlearn: Callable[..., Result], name: str, why: str) -> None:
    code, _, err = fedlearn("partition", "--out", name)
    assert code == 2
    assert why in err


def test_an_impossible_partition_names_its_key(fedlearn: Callable[..., Result]) -> None:
    code, out, _ = fedlearn("partition", "--set", "federation.clients=2000", "--json")
    assert code == 2
    assert json.loads(out.splitlines()[-1])["error"]["message"].startswith("federation.clients")
