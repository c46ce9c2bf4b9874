"""The engine's benchmark compares before it counts; how fast anything is is not asserted here."""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from fedlearn.errors import DataError, MissingError, RunFailedError

Script = Callable[[str], Any]

# What Opacus' hooks say of a model whose inputs need no gradient.
quiet_opacus = pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")


def _script(name: str) -> Any:
    """Return a fixture that imports a module of the benchmark."""

    @pytest.fixture(name=name)
    def module(script: Script) -> Any:
        return script(f"benchmarks.engine.{name}")

    return module


gate, growth, limits, loop, memory, needs, ours, peers, task, workloads = map(
    _script, ("gate", "growth", "limits", "loop", "memory", "needs", "ours", "peers", "task", "workloads")
)


def _workload(workloads: Any, name: str, **changes: Any) -> Any:
    """Return a workload of three clients, without noise."""
    found = next(each for each in workloads.WORKLOADS if each.name == name)
    return replace(found, **{"clients": 3, "noise_multiplier": workloads.CHECKED_NOISE, **changes})


def _after(gate: Any, engine: Any, workload: Any, rounds: int = 2) -> list[Any]:
    """Return an engine's parameters after each round, run in this process."""
    record = gate.RecordingGate()
    engine.run(workload, rounds, record)
    return list(record.models)


# -- the same mathematics ------------------------------------------------------------------------------------------


@quiet_opacus
@pytest.mark.parametrize("name", ["mlp", "cnn", "mlp-client-dp", "mlp-example-dp"])
def test_ours_and_the_loop_compute_the_same(
    gate: Any, ours: Any, loop: Any, peers: Any, workloads: Any, name: str
) -> None:
    workload = _workload(workloads, name)
    both = [_after(gate, engine, workload) for engine in (ours, loop)]
    first = workloads.site(workload).first
    for models in zip(*both, strict=True):
        found = peers.compare_models(dict(zip(("ours", "loop"), models, strict=True)), first)
        assert 0 < found["loop"] < peers.TOLERANCE
    assert not np.array_equal(*both[0])


def test_some_updates_are_clipped_and_some_are_not(loop: Any, workloads: Any) -> None:
    """Else the workload would not show whether engines clip alike."""
    workload = next(each for each in workloads.WORKLOADS if each.name == "mlp-client-dp")
    of = workloads.site(workload)
    training = loop.LocalTraining(workload, of)
    first = [each.detach().clone() for each in training.parameters]
    norms = []
    for client in range(workload.clients):
        training.receive(first)
        examples = of.examples(client)
        training.train(1, client, examples.inputs, examples.targets)
        norms.append(float(np.linalg.norm(of.vector(dict(training.model.named_parameters())) - of.first)))
    assert 0.2 < np.mean(np.array(norms) > workload.bound_l2) < 0.8, (np.median(norms), min(norms), max(norms))


def test_some_gradients_are_clipped_and_some_are_not(workloads: Any) -> None:
    workload = next(each for each in workloads.WORKLOADS if each.name == "mlp-example-dp")
    of = workloads.site(workload)
    module, examples, norms = of.module(), of.examples(0), []
    for row in range(len(examples)):
        module.zero_grad()
        of.task.loss(module(examples.inputs[row : row + 1]), examples.targets[row : row + 1]).sum().backward()
        norms.append(torch.nn.utils.get_total_norm([each.grad for each in module.parameters()]))
    assert 0.2 < np.mean(np.array(norms) > workload.bound_l2) < 0.8, norms


def test_another_order_of_examples_is_found(
    gate: Any, ours: Any, loop: Any, peers: Any, workloads: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    workload = _workload(workloads, "mlp")
    expected = _after(gate, ours, workload, 1)[0]
    monkeypatch.setattr(workloads.Site, "order", lambda *_: np.arange(workload.examples))
    models = {"ours": expected, "loop": _after(gate, loop, workload, 1)[0]}
    with pytest.raises(RunFailedError, match=r"no ratios.*loop"):
        peers.compare_models(models, workloads.site(workload).first)


@pytest.mark.parametrize("wrong", [math.nan, 0.01])
def test_parameters_that_differ_are_refused(peers: Any, wrong: float) -> None:
    first, model = np.zeros(4, np.float32), np.ones(4, np.float32)
    assert peers.compare_models({"a": model, "b": model * (1 + 1e-5)}, first)["b"] == pytest.approx(1e-5, rel=0.1)
    other = model.copy()
    other[0] += wrong
    with pytest.raises(RunFailedError, match="no ratios"):
        peers.compare_models({"a": model, "b": other}, first)


def test_an_engine_that_trains_nothing_is_refused(peers: Any) -> None:
    model = np.ones(4, np.float32)
    with pytest.raises(RunFailedError, match="did not move"):
        peers.compare_models({"a": model, "b": model}, model)


@quiet_opacus
@pytest.mark.parametrize("name", ["mlp-client-dp", "mlp-example-dp"])
def test_the_noise_is_what_was_asked_for(
    gate: Any, ours: Any, loop: Any, peers: Any, workloads: Any, name: str
) -> None:
    still = _workload(workloads, name)
    noisy = replace(still, noise_multiplier=1.0)
    expected = peers.noise_stddev(noisy)
    for engine in (ours, loop):
        with_noise, without = (_after(gate, engine, each, 1)[0] for each in (noisy, still))
        ratio = peers._noise_ratio(with_noise, without, expected, "it")
        assert ratio == pytest.approx(1, abs=peers.NOISE_TOLERANCE)
        for wrong in (without, without + 0.9 * (with_noise - without)):
            with pytest.raises(RunFailedError, match="noise of it"):
                peers._noise_ratio(wrong, without, expected, "it")


def test_without_privacy_there_is_no_noise(peers: Any, workloads: Any) -> None:
    assert peers.noise_stddev(_workload(workloads, "mlp")) is None


def test_a_round_without_a_client_does_not_count(ours: Any, workloads: Any) -> None:
    watch = ours._Watch(SimpleNamespace(), _workload(workloads, "mlp"), SimpleNamespace())
    with pytest.raises(RuntimeError, match="2 of 3 clients answered"):
        watch.finished_round({"respondents": 2})


# -- turns, and what is made of them -------------------------------------------------------------------------------


class _Fake:
    """An engine that takes no time and says what it was asked."""

    asked: list[str]
    models: dict[str, np.ndarray]

    def __init__(self, module: str, workload: Any, rounds: int, options: Any) -> None:
        self.name = f"{module}{options.get('workers', '')}"

    def __enter__(self) -> _Fake:
        return self

    def __exit__(self, *_: object) -> None:
        _Fake.asked.append(f"{self.name} ends")

    def model(self) -> np.ndarray:
        _Fake.asked.append(f"{self.name} model")
        return _Fake.models.get(self.name, _Fake.models["every"])

    def round(self) -> float:
        _Fake.asked.append(self.name)
        return {"ours2": 0.01, "loop": 0.05}.get(self.name, 1.0)

    def peak_bytes(self, rounds: int) -> int:
        return 1000


@pytest.fixture
def fake(peers: Any, workloads: Any, monkeypatch: pytest.MonkeyPatch) -> type[_Fake]:
    monkeypatch.setattr(peers, "Process", _Fake)
    monkeypatch.setattr(peers, "check", lambda *_: None)
    _Fake.asked = []
    _Fake.models = {"every": workloads.site(workloads.WORKLOADS[0]).first + np.float32(1)}
    return _Fake


def _two(peers: Any) -> list[Any]:
    return [peers.OURS, peers.LOOP]


def test_engines_take_turns_and_are_compared_first(peers: Any, workloads: Any, fake: type[_Fake]) -> None:
    workload = workloads.WORKLOADS[0]
    answer = peers.experiment(workloads=[workload], engines=_two(peers), turns=2, turn_s=0.05)
    models, rest = fake.asked[:2], fake.asked[2:]
    assert models == ["ours2 model", "loop model"]
    a_turn = [*["ours2"] * 5, "loop"]
    assert rest == ["ours2", "loop", *a_turn, *reversed(a_turn), "loop ends", "ours2 ends"]
    lines = {each["engine"]: each for each in answer.body["lines"]}
    assert lines["ours, 2 workers"]["updates_per_s"] == pytest.approx(workload.clients / 0.01)
    assert lines["PyTorch loop"]["ratio"] == pytest.approx(5)
    assert lines["PyTorch loop"]["verdict"] == "met"
    assert len(lines["ours, 2 workers"]["all_s"]) == 10


def test_a_bar_that_nobody_measured_is_not_met(peers: Any, workloads: Any, fake: type[_Fake]) -> None:
    answer = peers.experiment(workloads=workloads.WORKLOADS[:1], engines=_two(peers), turns=1)
    assert not answer.met
    absent = {each["engine"]: each["verdict"] for each in answer.body["lines"]}
    assert absent["ray"] == absent["pfl"] == "not measured"
    assert "mlp, ray" in answer.verdict


def test_a_bar_that_is_missed_is_said(peers: Any, workloads: Any, fake: type[_Fake]) -> None:
    cnn = replace(workloads.WORKLOADS[0], name="cnn")
    slow = [replace(peers.OURS, options={"workers": 9}), *_two(peers)[1:]]  # a second a round
    answer = peers.experiment(workloads=[cnn], engines=slow, turns=1)
    line = next(each for each in answer.body["lines"] if each["engine"] == "PyTorch loop")
    assert (line["ratio"], line["verdict"]) == (pytest.approx(0.05), "missed")
    assert not answer.met


def test_no_ratio_is_given_where_parameters_differ(peers: Any, workloads: Any, fake: type[_Fake]) -> None:
    fake.models["loop"] = fake.models["every"] + np.float32(0.1)
    with pytest.raises(RunFailedError, match="no ratios"):
        peers.experiment(workloads=workloads.WORKLOADS[:1], engines=_two(peers), turns=1)
    assert "loop" not in fake.asked  # nothing was timed


def test_a_quick_look_is_judged_by_no_bar(peers: Any, workloads: Any, fake: type[_Fake]) -> None:
    answer = peers.experiment(workloads=workloads.WORKLOADS[:1], engines=_two(peers), quick=True)
    assert answer.met and "judged by no bar" in answer.verdict
    assert {each["verdict"] for each in answer.body["lines"]} == {""}


def test_every_bar_is_of_a_workload_and_a_peer(peers: Any, workloads: Any) -> None:
    names, units = {each.name: each.unit for each in workloads.WORKLOADS}, {e.peer: e.units for e in peers.ENGINES}
    for workload, peer in peers.BARS:
        assert names[workload] in units[peer]


def test_a_missing_peer_is_told_with_its_command(needs: Any, peers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needs, "find_spec", lambda name: None)
    with pytest.raises(MissingError, match=r"pfl, ray, not installed here: pip install .*pfl==0\.6\.\*'; pip install"):
        peers.experiment()


# -- processes -----------------------------------------------------------------------------------------------------


def test_memory_is_that_of_the_process_and_all_below_it(memory: Any) -> None:
    code = (
        "import subprocess, sys; subprocess.run([sys.executable, '-c', 'x = bytearray(50 << 20); print(1); input()'])"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdout.readline()
        (below,) = memory.started_by(process.pid)
        assert below in memory.started_by(os.getpid())
        assert memory.held_bytes(process.pid) > 50 << 20 > memory._pss_bytes(process.pid)
        memory.end_processes({below})
        assert not memory._lives(below)
        process.stdin.close()


@pytest.mark.slow
def test_an_engine_in_a_process_of_its_own(gate: Any, loop: Any, memory: Any, workloads: Any) -> None:
    workload = _workload(workloads, "mlp")
    expected = _after(gate, loop, workload, 1)[0]
    with gate.Process("ours", workload, 10, {"workers": 2}) as process:
        model = process.model()
        assert process.round() > 0
        assert process.peak_bytes(1) > 50 << 20
        place, below = process._place, memory.started_by(process.pid)
        assert len(below) == 2
    assert np.linalg.norm(model - expected) < 1e-3 * np.linalg.norm(expected)
    assert not any(memory._lives(each) for each in below)
    assert not place.exists()


@pytest.mark.slow
def test_an_engine_that_fails_says_why(gate: Any, workloads: Any) -> None:
    wrong = _workload(workloads, "mlp", task="NoSuchClass")
    with gate.Process("loop", wrong, 2) as process, pytest.raises(gate.EngineError, match="NoSuchClass"):
        process.model()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("peer", ["loop", "pfl", "ray"])
def test_a_quick_look_at_every_peer(peers: Any, workloads: Any, peer: str) -> None:
    engine = next(each for each in peers.ENGINES if each.peer == peer)
    if missing := [name for name in engine.needs if importlib.util.find_spec(name) is None]:
        pytest.skip(f"needs {missing[0]}")
    doing = [each for each in workloads.WORKLOADS if each.name in ("mlp", "mlp-client-dp")]
    answer = peers.experiment(workloads=doing, engines=[peers.OURS, engine], quick=True)
    assert answer.met, answer.verdict
    assert all(each["peak_bytes"] > 50 << 20 for each in answer.body["lines"])


# -- growth and limits ---------------------------------------------------------------------------------------------


def test_exponents_are_slopes(growth: Any) -> None:
    def point(size: int) -> Any:
        seconds = [1e-3 * size**0.5 if size < 100 else 1e-4 * size]
        peak = (100 << 20) + size * (8 << 20)
        return growth.Point(
            series="cohort", size=size, clients=1, seconds=seconds, peak_bytes=peak, idle_bytes=100 << 20
        )

    found = growth.exponents([point(size) for size in (1, 10, 100, 1000)])
    assert found["time_at_the_end"] == pytest.approx(1)
    assert 0.5 < found["time"] < 1
    assert found["memory"] == found["memory_at_the_end"] == pytest.approx(1)


def test_growth_measures_every_point_and_draws_them(
    growth: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Engine(_Fake):
        def round(self) -> float:
            return 0.5

    _Fake.asked = []
    monkeypatch.setattr(growth, "Process", Engine)
    target = tmp_path / "made" / "growth.svg"
    answer = growth.experiment(series=growth.QUICK, rounds=2, target=target)
    assert answer.met
    assert [(each["series"], each["size"]) for each in answer.body["points"]] == [
        ("cohort", 2),
        ("cohort", 4),
        ("population", 10),
        ("population", 20),
        ("parameters", 10_345),
        ("parameters", 101_770),
    ]
    assert answer.body["exponents"]["cohort"]["time"] == pytest.approx(0)
    text = target.read_text()
    ElementTree.fromstring(text)  # noqa: S314 – our own
    assert all(word in text for word in ("cohort", "population", "parameters", "exponent 0.00", "10k"))


def test_memory_that_grows_with_the_population_is_said(growth: Any) -> None:
    def point(peak: int) -> Any:
        return growth.Point(
            series="population", size=peak, clients=1, seconds=[1.0], peak_bytes=peak << 20, idle_bytes=0
        )

    assert growth._is_constant([point(100), point(105)])
    assert not growth._is_constant([point(100), point(120)])
    assert not growth._is_constant([])


def test_the_series_are_those_of_the_issue(growth: Any) -> None:
    sizes = {each.name: [each.size(i) for i in range(len(each.workloads))] for each in growth.SERIES[:2]}
    assert sizes == {"cohort": [10, 100, 1_000, 10_000], "population": [1_000, 10_000, 100_000]}
    assert [each.task for each in growth.SERIES[2].workloads] == ["Mlp10k", "Mlp", "Mlp1m", "Mlp10m"]


def test_a_client_that_is_made_on_demand_trains(gate: Any, ours: Any, loop: Any, peers: Any, workloads: Any) -> None:
    workload = _workload(workloads, "mlp", on_demand=True)
    models = {"ours": _after(gate, ours, workload, 1)[0], "loop": _after(gate, loop, workload, 1)[0]}
    assert peers.compare_models(models, workloads.site(workload).first)["loop"] < peers.TOLERANCE


@pytest.mark.parametrize("name", ["mlp", "mlp-example-dp"])
def test_arithmetic_is_counted_as_in_plain_training(limits: Any, workloads: Any, name: str) -> None:
    work = limits.work_of(_workload(workloads, name))
    first, second = 2 * 784 * 128, 2 * 128 * 10  # the first layer needs no gradient of its inputs
    assert work.flops == 20 * (2 * first + 3 * second)
    assert work.weight_bytes == 2 * 4 * 101_770 * 2
    assert work.least_bytes == 20 * 784 * 4


def test_the_machine_is_measured(limits: Any) -> None:
    assert limits.sgemm_flops_per_s(64) > 1e6
    assert limits.copy_bytes_per_s(1 << 20) > 1e6
    before = torch.get_num_threads()
    limits.sgemm_flops_per_s(16)
    assert torch.get_num_threads() == before


# -- the task ------------------------------------------------------------------------------------------------------


def test_models_have_the_sizes_that_they_say(task: Any) -> None:
    for name, size in {"Mlp": 101_770, "Mlp10k": 10_345, "Mlp1m": 1_000_120, "SmallCnn": 28_938}.items():
        kind = getattr(task, name)
        assert sum(each.numel() for each in kind().build_model().parameters()) == size
        assert f"{size:,}" in kind.__doc__
    assert 795 * task.Mlp10m.hidden + 10 == 10_000_315


@pytest.mark.parametrize("path", [None, Path("made/many")])
def test_how_many_examples_has_to_be_said(task: Any, path: Path | None) -> None:
    with pytest.raises(DataError, match="number of examples"):
        task.Mlp().load_pool(path)


def test_a_client_that_holds_another_number_is_refused(workloads: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    of = workloads.Site(_workload(workloads, "mlp"))
    monkeypatch.setattr(of, "_workload", replace(of._workload, examples=21))
    with pytest.raises(RuntimeError, match="holds 20 examples, not 21"):
        of.examples(0)
