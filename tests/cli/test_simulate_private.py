"""``fedlearn simulate`` with hidden clients: one number is enough, it is never exceeded, and what is said is true."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedlearn.privacy.accounting import epsilon
from fedlearn.privacy.ledger import Ledger, read_events, releases_of

Said = tuple[int, str, str]
Fedlearn = Callable[..., Said]

TINY = ("digits-mlp", "--set", "federation.clients=6", "--set", "training.local-steps=1")
CLIENT = ("--set", "privacy.unit=client", "--set", "privacy.amplification=none", "--set", "privacy.delta=0.01")


def settings(*names: str) -> list[str]:
    """Return ``--set`` before each."""
    return [word for name in names for word in ("--set", name)]


def spent(folder: Path, delta: float = 0.01) -> float:
    """The epsilon of a run, from its ledger's releases alone."""
    return epsilon(releases_of(read_events(folder / "ledger.jsonl")), delta)


@pytest.fixture(autouse=True)
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedlearn.federation.summary.draw_history", lambda *_, **__: "<svg/>")


def test_a_budget_stops_the_run_before_it_would_be_exceeded(fedlearn: Fedlearn, tmp_path: Path) -> None:
    more = settings("federation.rounds=9", "privacy.noise-multiplier=1", "privacy.max-epsilon=6")
    code, out, _ = fedlearn("simulate", *TINY, *CLIENT, *more, "--out", "run")
    assert code == 0
    said = " ".join(out.split())
    folder = tmp_path / "run"
    summary = json.loads((folder / "summary.json").read_bytes())
    rounds = summary["rounds"]
    assert 0 < rounds < 9
    assert f"after round {rounds}: round {rounds + 1} would bring epsilon above the budget" in said
    assert f"the model of round {rounds} is kept" in said
    assert (summary["finished"], summary["privacy"]["stopped"]) == (False, "budget")
    assert summary["privacy"]["epsilon"] == spent(folder) <= 6.0
    one_more = [*releases_of(read_events(folder / "ledger.jsonl"))]
    assert epsilon([*one_more, one_more[-1]], 0.01) > 6.0
    assert (folder / "model.safetensors").exists()
    assert "nobody is protected" in said

    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".jsonl", ".safetensors")}
    code, out, _ = fedlearn("simulate", "--resume", "run", "--json", "-q")
    assert code == 0
    assert json.loads(out)["privacy"]["stopped"] == "budget"
    assert {name: (folder / name).read_bytes() for name in before} == before


def test_a_target_is_all_that_is_needed_and_is_kept(fedlearn: Fedlearn, tmp_path: Path) -> None:
    more = settings("federation.rounds=3", "privacy.target-epsilon=5", "federation.evaluation=both")
    code, out, _ = fedlearn("simulate", *TINY, *CLIENT, *more, "--out", "run", "--json", "-q")
    assert code == 0
    summary = json.loads(out)
    assert summary["finished"]
    assert "stopped" not in summary["privacy"]
    assert 4.9 < summary["privacy"]["epsilon"] == spent(tmp_path / "run") <= 5.0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["train_loss"] for line in lines] == [None] * 3
    kinds = [event.kind for event in read_events(tmp_path / "run" / "ledger.jsonl")]
    assert kinds == ["run.policy", *["round.release", "eval.release"] * 3, "run.close"]
    code, out, _ = fedlearn("privacy", "epsilon", "run", "--json")
    assert code == 0
    assert json.loads(out)["epsilon"] == summary["privacy"]["epsilon"]


def test_two_runs_on_the_same_clients_keep_to_the_target_together(fedlearn: Fedlearn, tmp_path: Path) -> None:
    first = settings("federation.rounds=2", "privacy.target-epsilon=3")
    assert fedlearn("simulate", *TINY, *CLIENT, *first, "--out", "a", "-q")[0] == 0
    second = settings("federation.rounds=2", "privacy.target-epsilon=5", "privacy.earlier-ledgers=a")
    code, out, _ = fedlearn("simulate", *TINY, *CLIENT, *second, "--out", "b", "--json", "-q")
    assert code == 0
    told = json.loads(out)["privacy"]["epsilon"]
    both = [each for name in "ab" for each in releases_of(read_events(tmp_path / name / "ledger.jsonl"))]
    assert 4.9 < told == epsilon(both, 0.01) <= 5.0
    assert spent(tmp_path / "b") < 5.0 - 0.5


def test_nothing_is_left_after_an_earlier_run_that_spent_it(fedlearn: Fedlearn, tmp_path: Path) -> None:
    first = settings("federation.rounds=2", "privacy.target-epsilon=3")
    assert fedlearn("simulate", *TINY, *CLIENT, *first, "--out", "a", "-q")[0] == 0
    second = settings("privacy.target-epsilon=2", "privacy.earlier-ledgers=a")
    code, _, err = fedlearn("simulate", *TINY, *CLIENT, *second, "--out", "b", "-q")
    assert code == 2
    assert "privacy.target-epsilon" in err
    assert "earlier runs have spent it" in err
    assert not (tmp_path / "b").exists()  # the same command can be corrected and repeated
    third = settings("privacy.noise-multiplier=1", "privacy.max-epsilon=3.1", "privacy.earlier-ledgers=a")
    code, out, _ = fedlearn("simulate", *TINY, *CLIENT, *third, "--out", "c", "-q")
    assert code == 0
    assert "before round 1, which alone would bring epsilon above the budget" in " ".join(out.split())


def test_an_earlier_ledger_that_is_missing_damaged_or_not_known_is_refused(fedlearn: Fedlearn, tmp_path: Path) -> None:
    first = settings("federation.rounds=2", "privacy.noise-multiplier=1")
    assert fedlearn("simulate", *TINY, *CLIENT, *first, "--out", "a", "-q")[0] == 0

    def refused(name: str) -> tuple[int, str]:
        second = settings("privacy.target-epsilon=50", f"privacy.earlier-ledgers={name}")
        code, _, err = fedlearn("simulate", *TINY, *CLIENT, *second, "--out", f"after-{name}", "-q")
        assert not (tmp_path / f"after-{name}" / "ledger.jsonl").exists()
        return code, " ".join(err.split())

    code, err = refused("nowhere")
    assert (code, "there is no ledger" in err) == (3, True)
    lines = (tmp_path / "a" / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "damaged.jsonl").write_bytes(lines[0] + b"".join(lines[2:]))
    code, err = refused("damaged.jsonl")
    assert (code, "line 2" in err, "damaged.jsonl" in err) == (1, True, True)
    strange = Ledger(tmp_path / "strange.jsonl")
    for event in read_events(tmp_path / "a" / "ledger.jsonl"):
        strange.append(event.kind, event.body)
    strange.append("round.of-2031", {"epsilon": "0.0"})
    code, err = refused("strange.jsonl")
    assert code == 2
    assert "has no bound" in err


def test_a_task_whose_clients_may_release_no_metric_is_refused_before_a_round(
    fedlearn: Fedlearn, tmp_path: Path
) -> None:
    more = settings("privacy.noise-multiplier=1", "federation.evaluation=federated", "federation.clients=6")
    code, _, err = fedlearn("simulate", "regression", *CLIENT, *more, "--out", "run", "-q")
    assert code == 2
    assert "metric_names" in err
    assert not (tmp_path / "run").exists()


def test_a_task_that_fails_in_its_first_round_leaves_no_folder_behind(fedlearn: Fedlearn, tmp_path: Path) -> None:
    """The same command can be corrected and repeated."""
    source = Path(__file__).parents[2] / "fedlearn" / "tasks" / "digits.py"
    own = source.read_text().replace("def load_test", "def load_test_not").replace("class DigitsMlp", "class Mine")
    (tmp_path / "mine.py").write_text(f"{own}\n\nclass Broken(Mine):\n    def load_test(self, path):\n        1 / 0\n")
    more = settings("privacy.noise-multiplier=1", "federation.clients=6")
    code, _, err = fedlearn("simulate", "mine.py:Broken", *CLIENT, *more, "--out", "run", "-q")
    assert code == 2, err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("wrong", "key"),
    [
        (("privacy.delta=0.5", "privacy.noise-multiplier=1"), "privacy.delta"),
        ((), "privacy.target-epsilon"),
        (("privacy.target-epsilon=3", "federation.sampling=fixed-size", "privacy.amplification=poisson"), "privacy"),
        (("privacy.target-epsilon=3", "privacy.trust=distributed"), "privacy.trust"),
    ],
)
def test_what_cannot_be_promised_is_refused(fedlearn: Fedlearn, tmp_path: Path, wrong: Any, key: str) -> None:
    code, _, err = fedlearn("simulate", *TINY, *settings("privacy.unit=client", *wrong), "--out", "run", "-q")
    assert code == 2
    assert key in err
    assert not (tmp_path / "run").exists()
