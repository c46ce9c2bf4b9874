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


@pytest.mark.parametrize(("name", "why"), [("who.png", "SVG"), ("nowhere/who.svg", "no folder")])
def test_a_picture_that_cannot_be_written_is_refused(fedlearn: Callable[..., Result], name: str, why: str) -> None:
    code, _, err = fedlearn("partition", "--out", name)
    assert code == 2
    assert why in err


def test_an_impossible_partition_names_its_key(fedlearn: Callable[..., Result]) -> None:
    code, out, _ = fedlearn("partition", "--set", "federation.clients=2000", "--json")
    assert code == 2
    assert json.loads(out.splitlines()[-1])["error"]["message"].startswith("federation.clients")
