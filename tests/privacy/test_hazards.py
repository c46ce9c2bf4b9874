"""The hazards that a review of privacy must find handled, one test each, named after the hazard."""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fedlearn.algorithms import Algorithm
from fedlearn.arrays import ParamSpec
from fedlearn.config import RunConfig, TrainingConfig
from fedlearn.errors import RunUnreadableError
from fedlearn.federation.messages import RoundPlan
from fedlearn.federation.policy import clipped_update
from fedlearn.federation.run_folder import RunFolder
from fedlearn.flower.grid import LocalGrid
from fedlearn.flower.network import GridNetwork
from fedlearn.learning import Examples, FlatModel, Task, build_flat_model, train
from fedlearn.privacy.clipping import ClippedUpdate, Update, clip
from fedlearn.privacy.ledger import read_events
from fedlearn.privacy.mechanisms import AdaptiveGaussian, DpFtrl, Gaussian
from fedlearn.privacy.noise import SecureNoise
from fedlearn.privacy.sampling import Draw, draw_poisson
from fedlearn.simulation.engine import simulate
from fedlearn.sources import SecureRandom, SeedTree

ROOT = Path(__file__).parents[2]


class Odd(nn.Module):
    """A learnable temperature without dimensions, a counter, a frozen layer, a running mean, and tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3, bias=False)
        self.second = nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight
        self.temperature = nn.Parameter(torch.tensor(1.0))
        self.short = nn.Parameter(torch.ones(2, dtype=torch.float16))
        self.labels = nn.Parameter(torch.tensor([1, 2, 3]), requires_grad=False)
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("secret", torch.zeros(3), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.mean += x.mean(dim=0)  # such a statistic would tell of the data
        self.secret += x.sum(dim=0)
        scale = self.temperature * 1e3 * self.short.float().sum()
        return self.second(self.first(x)).sum(dim=1) * scale + self.secret.sum()


class OddTask(Task):
    def build_model(self) -> nn.Module:
        return Odd()

    def loss(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (output - target) ** 2


def model_of(task: Task) -> FlatModel:
    return build_flat_model(task, SeedTree.root(0))


def examples_of(client: int, size: int = 6) -> Examples:
    inputs = torch.from_numpy(np.random.default_rng(client).normal(size=(size, 3)).astype(np.float32))
    return Examples(inputs, inputs.sum(dim=1) * (client + 1))


def trained_on(model: FlatModel, client: int, **training):
    received = model_of(OddTask()).vector()
    settings = TrainingConfig(**{"local_steps": 3, "batch_size": 2, "learning_rate": 1e-6, **training})
    return train(
        model, OddTask(), received, examples_of(client), settings, proximal_mu=0.0, seeds=SeedTree.root(client)
    )


def plan_of(spec: ParamSpec, bound: float) -> RoundPlan:
    config = RunConfig.from_mapping({"privacy": {"unit": "client", "noise-multiplier": 1.0}})
    return RoundPlan(config=config, round_number=1, attempt=1, proximal_mu=0.0, spec_sha256=spec.sha256, bound_l2=bound)


# -- parameters and updates ----------------------------------------------------------------------------------------


def test_0_d_integer_and_tied_parameters():
    """All that is trained is within one clip, tied weights once; nothing else moves, and no integer leaves."""
    model = model_of(OddTask())
    names = [entry.name for entry in model.spec.entries]
    assert sorted(names) == ["first.weight", "frozen", "mean", "short", "temperature"]
    trained = trained_on(model, 1, local_steps=1, learning_rate=1e-4)
    assert 5 < trained.update.norm < math.inf
    clipped = clipped_update(plan_of(model.spec, 0.5), trained, model.spec)
    assert clipped.norm <= 0.5
    entries = model.spec.unflatten(clipped.vector)
    moved = {name for name, array in entries.items() if array.any()}
    assert moved <= {"first.weight", "temperature", "short"}
    assert entries["temperature"].shape == ()
    assert "temperature" in moved


def test_zero_and_non_finite_updates():
    """A zero update is zero, not a division by it; NaN and infinity become zero and say so; both can be summed."""
    for value, finite in ((0.0, True), (math.nan, False), (math.inf, False), (-math.inf, False)):
        for mechanism in (
            Gaussian(noise_multiplier=1.0, bound_l2=1.0),
            AdaptiveGaussian(noise_multiplier=1.0, bound_l2=1.0, expected_cohort=100),
            DpFtrl(noise_multiplier=1.0, bound_l2=1.0, rounds=3, min_separation=1, instance="run"),
        ):
            clipped = clip(Update.of([value, 0.0, 0.0]), 1.0)
            assert (clipped.norm, clipped.finite) == (0.0, finite)
            state = mechanism.init()
            total = mechanism.begin(state, 3)
            total.add(clipped)
            _, noised = mechanism.release(state, total, SecureNoise(SecureRandom()))
            assert np.isfinite(noised.vector).all()
    with pytest.raises(ValueError, match="norm is nan"):
        ClippedUpdate(vector=np.array([math.nan]), bound_l2=1.0)


def test_momentum_buffers_that_remember_a_client():
    """One resident model trains one client after the other: the second's update is as if there had been no first."""
    for momentum in (0.0, 0.9):
        resident = model_of(OddTask())
        for client in (1, 2, 3):
            trained_on(resident, client, momentum=momentum)
        again = trained_on(resident, 4, momentum=momentum).update.vector
        alone = trained_on(model_of(OddTask()), 4, momentum=momentum).update.vector
        assert again.tobytes() == alone.tobytes()
        assert again.any()


@pytest.mark.parametrize("algorithm", ["fedavgm", "fedadam", "fedyogi", "fedadagrad"])
def test_momentum_buffers_of_the_server_are_made_of_what_was_released(tmp_path, monkeypatch, algorithm):
    """The server's optimiser sees the noised mean and nothing else: what it remembers is post-processing."""
    given = []
    from fedlearn.federation.rounds import Federation

    update, estimator = Federation.update, []

    def watching(self, state, mean):
        given.append(mean.copy())
        estimator.append(self.estimator)
        return update(self, state, mean)

    monkeypatch.setattr(Federation, "update", watching)
    folder = run(tmp_path / "run", monkeypatch, training={"algorithm": algorithm, "server-learning-rate": 0.1})
    state = folder.load_state()
    algorithm = rebuilt(folder)
    replayed = algorithm.init(model_of_folder(folder))
    for mean in given:
        replayed = algorithm.aggregate(replayed, mean)
    assert set(replayed.slots) == set(state.server.slots) != set()
    for name, slot in state.server.slots.items():
        np.testing.assert_array_equal(slot, replayed.slots[name])


def rebuilt(folder: RunFolder) -> Algorithm:
    from fedlearn.algorithms import build_algorithm

    training = folder.config.training
    return build_algorithm(
        training.algorithm, server_learning_rate=training.server_learning_rate, options=training.options
    )


def model_of_folder(folder: RunFolder) -> np.ndarray:
    from fedlearn.tasks import load_task

    seeds = SeedTree.root(folder.config.seed).child("initialise")
    return build_flat_model(load_task(folder.config.task), seeds).vector().astype(np.float64)


# -- a run ---------------------------------------------------------------------------------------------------------

TASK = """
import torch
from torch import nn
from fedlearn.learning import Examples, Pool, Task


class Tiny(Task):
    metric_names = ("accuracy",)

    def build_model(self):
        return nn.Linear(2, 1)

    def loss(self, output, target):
        return (output[:, 0] - target) ** 2

    def metrics(self, output, target):
        return {"accuracy": torch.ones_like(target) * SCORE}

    def load_test(self, path):
        return Examples(torch.ones(4, 2), torch.zeros(4))

    def load_pool(self, path):
        torch.manual_seed(0)
        train = Examples(torch.randn(40, 2), torch.randn(40))
        return Pool(train, train)


SCORE = 1.0
"""


def run(path: Path, monkeypatch, *, score: float = 1.0, training=None, privacy=None, resume=False, **federation):
    """Simulate five rounds of six clients and return the folder."""
    monkeypatch.setattr("fedlearn.federation.summary.draw_history", lambda *_, **__: "<svg/>")
    task = path.parent / "tiny.py"
    task.write_text(TASK.replace("SCORE = 1.0", f"SCORE = {score}"))
    federation = {key.replace("_", "-"): value for key, value in federation.items()}
    tables = {
        "task": str(task),
        "federation": {"clients": 6, "rounds": 5, "evaluation": "off", **federation},
        "training": training or {"local-steps": 1},
        "data": {"partition": "iid"},
        "privacy": {"unit": "client", "noise-multiplier": 1.0, "amplification": "none", **(privacy or {})},
    }
    folder = RunFolder.open(path) if resume else RunFolder.create(path, RunConfig.from_mapping(tables))
    simulate(folder)
    return folder


@pytest.mark.parametrize("evaluation", ["central", "both", "federated"])
def test_learning_rate_schedules_or_early_stopping_steered_by_un_noised_metrics(tmp_path, monkeypatch, evaluation):
    """Whatever is measured, by the server or by clients, model, rounds and noise are the same."""
    models, stated, measured = set(), set(), set()
    for number, score in enumerate((1.0, 0.0, 0.5)):
        home = tmp_path / str(number)
        home.mkdir()
        folder = run(home / "run", monkeypatch, score=score, evaluation=evaluation, rounds=3)
        models.add((folder.load_state().server.params.tobytes(), folder.summary()["rounds"]))
        measured.add(str(folder.summary()["metrics"]))
        releases = [e.release() for e in read_events(folder.path / "ledger.jsonl") if e.kind == "round.release"]
        stated.add(tuple(each.queries for each in releases))
    assert len(models) == len(stated) == 1
    assert len(measured) == 3 or evaluation == "federated"  # of so few clients the noise tells nothing


def test_a_client_sampled_twice_in_a_round(tmp_path, monkeypatch):
    """No draw has a client twice; and a node that answers twice counts once."""
    with pytest.raises(ValueError, match="in it twice"):
        Draw(cohort=(3, 3), population=5, method="poisson", rate=0.5)
    stream = SecureNoise(SecureRandom()).stream()
    assert draw_poisson([3, 3, 3, 1, 1], 1.0, stream).cohort == (1, 3)
    once = run(tmp_path / "once", monkeypatch)

    class Echo(LocalGrid):
        def send_and_receive(self, messages, *, timeout=None):
            for reply in super().send_and_receive(messages, timeout=timeout):
                yield reply
                yield reply

    monkeypatch.setattr("fedlearn.simulation.engine.LocalGrid", Echo)
    twice = run(tmp_path / "twice", monkeypatch)
    assert twice.summary()["model_sha256"] == once.summary()["model_sha256"]
    assert [line["respondents"] for line in twice.metrics()] == [6] * 5


def test_the_same_client_enrolled_twice(tmp_path, monkeypatch):
    """Two nodes that say they are one client are asked as one."""
    asked = []

    class Twins(LocalGrid):
        """Nodes 7 to 12 say that they are the clients of nodes 1 to 6."""

        def __init__(self, *args, clients, **options):
            super().__init__(*args, clients=2 * clients, **options)

        def _context(self, message):
            context = super()._context(message)
            context.node_config["partition-id"] = (message.metadata.dst_node_id - 1) % 6
            return context

        def send_and_receive(self, messages, *, timeout=None):
            sent = list(messages)
            asked.append([m.metadata.dst_node_id for m in sent if m.metadata.message_type == "train"])
            return super().send_and_receive(sent, timeout=timeout)

    def asking(*args, local, trainer, **options):  # as on devices, where nobody knows the nodes
        return GridNetwork(*args, **options)

    monkeypatch.setattr("fedlearn.flower.server.GridNetwork", asking)
    alone = run(tmp_path / "alone", monkeypatch)
    monkeypatch.setattr("fedlearn.simulation.engine.LocalGrid", Twins)
    doubled = run(tmp_path / "doubled", monkeypatch)
    trained = [nodes for nodes in asked if nodes]
    assert len(trained) == 5
    assert all(len({(node - 1) % 6 for node in nodes}) == len(nodes) == 6 for nodes in trained)
    assert doubled.summary()["model_sha256"] == alone.summary()["model_sha256"]


@pytest.mark.parametrize("finished", [True, False])
def test_resuming_a_run_without_its_ledger(tmp_path, monkeypatch, finished):
    """It does not go on, says what to do, and makes no new ledger that would pass for the old one."""
    folder = run(tmp_path / "run", monkeypatch)
    ledger = folder.path / "ledger.jsonl"
    kept = ledger.read_bytes()
    if not finished:
        lines = kept.splitlines(keepends=True)
        ledger.write_bytes(b"".join(lines[:-1]))
    whole = ledger.read_bytes()
    ledger.unlink()
    with pytest.raises(RunUnreadableError, match="without its ledger a run cannot go on"):
        run(tmp_path / "run", monkeypatch, resume=True)
    assert not ledger.exists()
    ledger.write_bytes(whole)
    run(tmp_path / "run", monkeypatch, resume=True)
    assert ledger.read_bytes()[: len(whole)] == whole


def test_hyper_parameter_search_that_is_not_accounted():
    """It cannot be seen by a program, so the product says it, where people read what is promised."""
    said = " ".join((ROOT / "SECURITY.md").read_text().split())
    assert "Trying settings costs privacy, and is not accounted." in said
    assert "Every run on the same clients adds up" in said
    assert "privacy.earlier-ledgers" in said


def test_seeds_reach_no_noise_of_a_real_run():
    """The generators that a seed can set, all three, say nothing of what is drawn."""
    drawn = []
    mechanism = Gaussian(noise_multiplier=1.0, bound_l2=1.0)
    for _ in range(2):
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        state = mechanism.init()
        _, noised = mechanism.release(state, mechanism.begin(state, 100), SecureNoise(SecureRandom()))
        drawn.append(noised.vector)
    assert not (drawn[0] == drawn[1]).any()
