"""Many clients at once equal one after the other: every built-in model, every way to descend; and what is refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedlearn.config import RunConfig, TrainingConfig
from fedlearn.data.loaders import distribute_data
from fedlearn.learning import Examples, FlatModel, Task, Trained, build_flat_model, train
from fedlearn.learning.dpsgd import DpSgd, train_private
from fedlearn.learning.schedule import Schedule, buckets
from fedlearn.learning.vectorized import GroupTrained, Member, Vectorised, choose_trainer, train_group
from fedlearn.privacy.noise import SimulatedNoise
from fedlearn.sources import SeedTree
from fedlearn.tasks import load_task

SEEDS = SeedTree.root(5)
TOLERANCE = {np.dtype(np.float32): 2e-5, np.dtype(np.float64): 1e-12}

RAGGED = (23, 7, 16, 1, 40, 16)
WAYS: dict[str, dict[str, Any]] = {
    "epochs": {"local_epochs": 2, "batch_size": 8},
    "steps": {"local_epochs": None, "local_steps": 5, "batch_size": 8},
    "whole batches": {"local_epochs": 3, "batch_size": 0},
    "momentum": {"local_epochs": 2, "batch_size": 8, "momentum": 0.9},
    "fedprox": {"local_epochs": 2, "batch_size": 8, "proximal_mu": 0.5},
    "fedprox with momentum": {"local_epochs": 2, "batch_size": 8, "momentum": 0.5, "proximal_mu": 0.5},
    "one example a batch": {"local_epochs": 1, "batch_size": 1},
}
BUILT_IN = {"digits": ["stacked", "vmap"], "digits-mlp": ["stacked", "vmap"], "regression": ["stacked", "vmap"]}
CASES = [(task, kernel, way) for task, kernels in BUILT_IN.items() for kernel, way in itertools.product(kernels, WAYS)]


class Made(Task):
    """A task of a model and random examples."""

    def __init__(self, build: Callable[[], nn.Module]) -> None:
        self._build = build

    def build_model(self) -> nn.Module:
        return self._build()

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(output, target, reduction="none")


def clients_of(name: str, sizes: Sequence[int]) -> tuple[Task, list[Examples]]:
    """Return a built-in task and the examples of clients of so many."""
    task = load_task(name)
    pool = distribute_data(task, RunConfig(task=name)).pool.train  # type: ignore[attr-defined]
    ends = np.cumsum(sizes)
    return task, [pool.take(np.arange(end - size, end)) for size, end in zip(sizes, ends, strict=True)]


def random_clients(sizes: Sequence[int], shape: tuple[int, ...], classes: int = 3) -> list[Examples]:
    generator = torch.Generator().manual_seed(1)
    return [
        Examples(
            torch.randn(size, *shape, generator=generator), torch.randint(0, classes, (size,), generator=generator)
        )
        for size in sizes
    ]


def group_of(
    kernel: Vectorised, model: FlatModel, task: Task, clients: Sequence[Examples], training: TrainingConfig, mu: float
) -> tuple[GroupTrained, list[Trained]]:
    """Return what a group trained, and each of its clients alone."""
    received = model.vector()
    members = [Member(examples=each, seeds=SEEDS.child("client", n)) for n, each in enumerate(clients)]
    group = train_group(kernel, model, task, received, members, training, proximal_mu=mu)
    alone = [
        train(model, task, received, member.examples, training, proximal_mu=mu, seeds=member.seeds)
        for member in members
    ]
    return group, alone


def check_equal(group: GroupTrained, alone: Sequence[Trained]) -> None:
    """Hold every update, sum, norm and loss of a group against those of its clients alone."""
    rows = np.stack([each.update.vector for each in alone]).astype(np.float64)
    tolerance = TOLERANCE[alone[0].update.vector.dtype]
    lengths = np.linalg.norm(rows, axis=1)
    assert (lengths > 0).all()
    for place, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        for exact in (False, True):
            own = group.weighted(np.eye(len(rows))[place], exact=exact)
            assert np.linalg.norm(own - row) <= tolerance * length
    factors = np.linspace(0.5, 2.0, len(rows))
    together = group.weighted(factors)
    assert np.linalg.norm(together - factors @ rows) <= tolerance * np.linalg.norm(factors @ rows) * 3
    np.testing.assert_allclose(group.norms(), lengths, rtol=tolerance)
    np.testing.assert_allclose(group.mean_losses, [each.mean_loss for each in alone], rtol=tolerance * 10)
    assert group.finite().all()


@pytest.mark.parametrize(("name", "kernel", "way"), CASES)
def test_a_group_equals_its_clients_one_by_one(name: str, kernel: Vectorised, way: str) -> None:
    options = dict(WAYS[way])
    mu = options.pop("proximal_mu", 0.0)
    task, clients = clients_of(name, RAGGED)
    training = TrainingConfig(learning_rate=0.05, **options)
    check_equal(*group_of(kernel, build_flat_model(task, SEEDS), task, clients, training, mu))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Vectorised]] = {
    "deep and thin": (
        lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4, bias=False), nn.GELU(), nn.Linear(4, 3)),
        (6,),
        "stacked",
    ),
    "wide": (lambda: nn.Sequential(nn.Linear(300, 200), nn.ReLU(), nn.Linear(200, 3)), (300,), "stacked"),
    "several rows an example": (
        lambda: nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 30), nn.Flatten(), nn.Linear(120, 3)),
        (4, 6),
        "stacked",
    ),
    "in place": (lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 3)), (6,), "stacked"),
    "frozen": (lambda: nn.Sequential(frozen(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 3)), (6,), "stacked"),
    "double": (
        lambda: nn.Sequential(Doubled(), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double(),
        (6,),
        "stacked",
    ),
    "norms": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.GroupNorm(2, 4),
            nn.ReLU(),
            nn.Flatten(),
            nn.LayerNorm(64),
            nn.Linear(64, 3),
        ),
        (1, 4, 4),
        "vmap",
    ),
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1, stride=2, bias=False),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 3, (2, 1), dilation=(1, 2), padding=(1, 0)),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(18, 3),
        ),
        (2, 8, 7),
        "stacked",
    ),
    "a grouped convolution": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Flatten(), nn.Linear(16, 3)),
        (2, 4, 4),
        "vmap",
    ),
    "a convolution that goes round": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"), nn.Flatten(), nn.Linear(64, 3)),
        (2, 4, 4),
        "vmap",
    ),
    "tied": (lambda: Tied(), (6,), "vmap"),
    "half a layer": (lambda: nn.Sequential(half_frozen(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 3)), (6,), "vmap"),
    "a temperature": (lambda: Tempered(), (6,), "vmap"),
    "dropout of nothing": (lambda: nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.0), nn.Linear(8, 3)), (6,), "stacked"),
    "instance norm": (
        lambda: nn.Sequential(nn.Conv1d(2, 4, 3), nn.InstanceNorm1d(4, affine=True), nn.Flatten(), nn.Linear(16, 3)),
        (2, 6),
        "vmap",
    ),
}


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.double()


class Tied(nn.Module):
    """One layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(torch.relu(self.inner(torch.relu(self.inner(x)))))


class Tempered(nn.Module):
    """A parameter without dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature, self.layer = nn.Parameter(torch.tensor(1.5)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) / self.temperature


def frozen(layer: nn.Linear) -> nn.Linear:
    return layer.requires_grad_(False)


def half_frozen(layer: nn.Linear) -> nn.Linear:
    layer.bias.requires_grad_(False)
    return layer


def choice_of(
    build: Callable[[], nn.Module], shape: tuple[int, ...], sizes: Sequence[int] = (9, 5, 12), **options: Any
):
    task = Made(build)
    model = build_flat_model(task, SEEDS)
    training = TrainingConfig(batch_size=4, learning_rate=0.1)
    clients = random_clients(sizes, shape)
    return choose_trainer(model, task, clients, training, proximal_mu=0.0, seeds=SEEDS, **options)


@pytest.mark.parametrize("name", MODELS)
def test_models_of_many_kinds(name: str) -> None:
    build, shape, expected = MODELS[name]
    assert choice_of(build, shape).trainer == expected
    task = Made(build)
    training = TrainingConfig(local_epochs=2, batch_size=4, learning_rate=0.1, momentum=0.3)
    clients = random_clients((9, 5, 12, 4), shape)
    check_equal(*group_of(expected, build_flat_model(task, SEEDS), task, clients, training, 0.1))


class Drawing(nn.Module):
    """Draws at random without a layer that says so."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(functional.dropout(x, 0.5, self.training))


class Counting(nn.Module):
    """Keeps something from one batch to the next."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        return self.layer(x)


class Mixing(nn.Module):
    """Lets the examples of a batch see each other."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x - x.mean(dim=0))


class Branching(nn.Module):
    """Goes another way by the data."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(6, 3), nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.scale if x.sum().item() > 0 else -self.layer(x)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.layer = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.lstm(x)[0][:, -1])


REFUSED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "batch norm": (lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)), (6,), "BatchNorm1d"),
    "dropout": (lambda: nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3)), (6,), "at random"),
    "a dropout in disguise": (Drawing, (6,), "at random"),
    "a counter": (Counting, (6,), "buffers"),
    "recurrent": (Recurrent, (5, 3), "recurrent"),
    "data-dependent control flow": (Branching, (6,), "looks at numbers"),
}


class Patched(nn.Module):
    """A layer whose forward somebody changed."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 5), nn.Linear(5, 3)
        self.inner.forward = lambda x: functional.linear(x, self.inner.weight * 2)  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(torch.relu(self.inner(x)))


class Twice(nn.Module):
    """A weight that is used a second time, hardly, beside its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x) + 1e-5 * functional.linear(x, self.layer.weight))


class Hooked(nn.Module):
    """A gradient that is clamped, where it is large."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.layer.weight.register_hook(lambda gradient: gradient.clamp(-100, 100))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Outliers(nn.Module):
    """Goes another way for inputs that the trial does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x if x.abs().max() < 1000 else x / x.abs().max())


class TwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(x), x


REFUSED |= {
    "a hook on a gradient": (Hooked, (6,), "layer.weight has a hook"),
    "a branch that the trial does not take": (Outliers, (6,), "looks at numbers"),
    "two outputs": (TwoOutputs, (6,), "output is a tuple"),
}


class Decayed(Made):
    """A loss that looks at the parameters itself."""

    def build_model(self) -> nn.Module:
        self.model = nn.Sequential(nn.Linear(6, 3))
        return self.model

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        decay = 1e-4 * sum(each.square().sum() for each in self.model.parameters())
        return functional.cross_entropy(output, target, reduction="none") + decay


def test_a_loss_that_looks_at_the_parameters_is_found_out() -> None:
    task = Decayed(lambda: nn.Linear(6, 3))
    choice = choose_trainer(
        build_flat_model(task, SEEDS), task, random_clients((9,), (6,)), TrainingConfig(), proximal_mu=0.0, seeds=SEEDS
    )
    assert choice.trainer is None
    assert "by another way than its output" in choice.reason


@pytest.mark.parametrize("build", [Patched, Twice])
def test_a_layer_that_is_more_than_a_layer_is_left_to_torch_func(build: Callable[[], nn.Module]) -> None:
    assert choice_of(build, (6,), allowed=("stacked",)).trainer is None
    assert choice_of(build, (6,)).trainer == "vmap"


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_vectorised_says_why_and_is_trained_one_by_one(name: str) -> None:
    build, shape, reason = REFUSED[name]
    choice = choice_of(build, shape)
    assert choice.trainer is None
    assert reason in choice.reason


def test_a_narrower_type_is_refused() -> None:
    class Halved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(6, 4), nn.Linear(4, 3).half()

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x).half()).float()

    choice = choice_of(Halved, (6,))
    assert choice.trainer is None
    assert "narrower" in choice.reason


@pytest.mark.parametrize("sizes", [(9, 5, 12), (8, 8, 8), (6,), (1,) * 7])
@pytest.mark.parametrize("kernel", ["stacked", "vmap"])
def test_a_model_whose_examples_see_each_other_is_found_out(kernel: Vectorised, sizes: Sequence[int]) -> None:
    choice = choice_of(Mixing, (6,), sizes, allowed=(kernel,))
    assert choice.trainer is None
    assert "depends on the others in its batch" in choice.reason


def test_too_little_to_try_it_on_is_no_reason_to_believe() -> None:
    for sizes in ((), (2, 3)):
        choice = choice_of(lambda: nn.Linear(6, 3), (6,), sizes)
        assert choice.trainer is None
        assert "too few examples" in choice.reason


def test_the_module_is_left_as_it_was() -> None:
    task = Made(lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)))
    model = build_flat_model(task, SEEDS)
    group_of("stacked", model, task, random_clients((5, 6), (6,)), TrainingConfig(batch_size=4), 0.0)
    assert all("forward" not in layer.__dict__ for layer in model.module.modules())


@pytest.mark.parametrize("kernel", ["stacked", "vmap"])
def test_who_else_is_in_the_group_changes_nothing_but_the_rounding(kernel: Vectorised) -> None:
    task = Made(lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)))
    training, clients = TrainingConfig(batch_size=4, local_epochs=2), random_clients((9, 5, 12, 4), (6,))
    together, _ = group_of(kernel, build_flat_model(task, SEEDS), task, clients, training, 0.0)
    first, _ = group_of(kernel, build_flat_model(task, SEEDS), task, clients[:1], training, 0.0)
    alone = first.weighted(np.ones(1))
    assert np.linalg.norm(alone) > 0.1
    assert np.linalg.norm(together.weighted(np.array([1.0, 0, 0, 0])) - alone) <= 1e-5 * np.linalg.norm(alone)


@pytest.mark.parametrize("kernel", ["stacked", "vmap"])
@pytest.mark.parametrize("epochs", [1, 20])
def test_a_client_that_diverges_is_known_and_harms_no_other(kernel: Vectorised, epochs: int) -> None:
    task = Made(lambda: nn.Sequential(nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 3)))
    model, training = build_flat_model(task, SEEDS), TrainingConfig(batch_size=4, local_epochs=epochs)
    clients = random_clients((8, 8, 8), (30,))
    clients[1] = Examples(clients[1].inputs * 1e30, clients[1].targets)
    group, alone = group_of(kernel, model, task, clients, training, 0.0)
    assert not np.isfinite(alone[1].update.vector).all()
    assert group.finite().tolist() == [True, False, True]
    own = group.weighted(np.array([1.0, 0.0, 1.0]))
    expected = alone[0].update.vector.astype(np.float64) + alone[2].update.vector
    assert np.linalg.norm(own - expected) <= 2e-5 * np.linalg.norm(expected)
    assert not group.norms()[1] < 1e30


def test_a_norm_is_never_told_shorter_than_the_update_is_however_its_steps_cancel() -> None:
    task = Made(lambda: nn.Linear(40, 3, bias=False))
    model = build_flat_model(task, SEEDS)
    clients = random_clients((12, 12), (40,))
    clients = [Examples(each.inputs * 1e-3, each.targets) for each in clients]
    training = TrainingConfig(local_epochs=None, local_steps=3, batch_size=0, learning_rate=1e13, momentum=0.9)
    received = model.vector()
    members = [Member(examples=each, seeds=SEEDS.child("client", n)) for n, each in enumerate(clients)]
    group = train_group("stacked", model, task, received, members, training, proximal_mu=0.0)
    for place in range(2):
        own = group.weighted(np.eye(2)[place], exact=True)
        assert group.norms()[place] >= np.linalg.norm(own) * (1 - 1e-12)


def test_noised_steps_of_which_all_batches_are_empty() -> None:
    task = Made(lambda: nn.Sequential(nn.Linear(6, 3)))
    for kernel in ("stacked", "vmap"):
        model = build_flat_model(task, SEEDS)
        members = [
            Member(
                examples=each,
                seeds=SEEDS.child(n),
                dp=DpSgd(noise_multiplier=1.0, bound_l2=1.0, mode="hooks"),
                noise=SimulatedNoise(SEEDS.child("noise", n)),
            )
            for n, each in enumerate(random_clients((8, 9, 7), (6,)))
        ]
        training = TrainingConfig(local_epochs=None, local_steps=12, batch_size=1)
        group = train_group(kernel, model, task, model.vector(), members, training, proximal_mu=0.0)
        assert group.finite().all()


PRIVATE = [(task, kernel) for task, kernels in BUILT_IN.items() for kernel in kernels]


@pytest.mark.parametrize(("name", "kernel"), PRIVATE)
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_example_level_dp_sgd_equals_that_of_one_client(name: str, kernel: Vectorised, momentum: float) -> None:
    task, clients = clients_of(name, (23, 12, 40))
    model = build_flat_model(task, SEEDS)
    training = TrainingConfig(local_epochs=2, batch_size=8, learning_rate=0.1, momentum=momentum)
    received = model.vector()
    at_rest = np.full(model.spec.trainable_size, 1e-3, dtype=model.spec.dtype)
    members = [
        Member(
            examples=each,
            seeds=SEEDS.child("client", n),
            dp=DpSgd(noise_multiplier=0.5 + 0.1 * n, bound_l2=0.7, mode="hooks"),
            noise=SimulatedNoise(SEEDS.child("noise", n)),
            velocity=at_rest if n == 1 else None,
        )
        for n, each in enumerate(clients)
    ]
    group = train_group(kernel, model, task, received, members, training, proximal_mu=0.2)
    for place, member in enumerate(members):
        assert member.dp is not None
        assert member.noise is not None
        alone = train_private(
            model,
            task,
            received,
            member.examples,
            training,
            proximal_mu=0.2,
            dp=member.dp,
            seeds=member.seeds,
            noise=member.noise,
            velocity=member.velocity,
        )
        own = group.weighted(np.eye(3)[place])
        length = alone.trained.update.norm
        assert np.linalg.norm(own - alone.trained.update.vector) <= 2e-5 * length
        assert group.mean_losses[place] == pytest.approx(alone.trained.mean_loss, rel=1e-4)
        if momentum:
            assert alone.velocity is not None
            np.testing.assert_allclose(group.velocities[place], alone.velocity, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kernel", ["stacked", "vmap"])
@pytest.mark.parametrize("rows", [1, 4])
def test_no_example_moves_a_noised_step_by_more_than_the_bound(kernel: Vectorised, rows: int) -> None:
    task = Made(lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Flatten(), nn.Linear(5 * rows, 3)))
    model, bound = build_flat_model(task, SEEDS), 0.01
    training = TrainingConfig(local_epochs=None, local_steps=1, batch_size=0, learning_rate=1.0)
    received = model.vector()

    def update(examples: Examples) -> np.ndarray[Any, Any]:
        member = Member(
            examples=examples,
            seeds=SEEDS,
            dp=DpSgd(noise_multiplier=1e-6, bound_l2=bound, mode="hooks"),
            noise=SimulatedNoise(SEEDS),
        )
        return train_group(kernel, model, task, received, [member], training, proximal_mu=0.0).weighted(np.ones(1))

    shape = (6,) if rows == 1 else (rows, 6)
    (whole,) = random_clients((10,), shape)
    moved = Examples(whole.inputs.clone(), whole.targets)
    moved.inputs[3] *= 1e6
    difference = np.linalg.norm(update(whole) - update(moved)) * 10
    assert 0.001 * bound < difference <= 2 * bound * (1 + 1e-4)


def test_a_shrinking_prefix_and_padding_in_the_last_batch_alone() -> None:
    schedule = Schedule.shuffled([5, 12, 8], TrainingConfig(local_epochs=1, batch_size=4), [SEEDS] * 3)
    assert schedule.order == [1, 0, 2]
    assert schedule.steps.tolist() == [3, 2, 2]
    assert [batch.rows.shape for batch in schedule.batches] == [(3, 4), (3, 4), (1, 4)]
    assert schedule.batches[1].lengths.tolist() == [4, 1, 4]
    weights = schedule.batches[1].mean_weights(torch.float64)
    assert weights.tolist() == [[0.25] * 4, [1.0, 0.0, 0.0, 0.0], [0.25] * 4]
    rows = {int(row) for batch in schedule.batches for row in batch.rows[batch.valid]}
    assert rows == set(range(25))


def test_clients_of_very_different_size_do_not_wait_for_each_other() -> None:
    clients = random_clients((100, 3, 90, 2, 80), (2,))
    assert buckets(clients, 64) == [[0, 2, 4], [1, 3]]
    assert buckets(clients, 2) == [[0, 2], [4], [1, 3]]
    clients[4] = Examples(clients[4].inputs.double(), clients[4].targets)
    assert buckets(clients, 64) == [[0, 2], [4], [1, 3]]


def test_what_would_be_slower_is_taken_only_by_name() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 2, 6), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 23 * 23, 3))

    choice = choice_of(build, (1, 28, 28), together=10)
    assert choice.trainer is None
    assert choice.reason == (
        "its convolutions see 19,044 numbers an example, and are faster by themselves; "
        "torch.func gains nothing on so few clients of such a size at a time (10)"
    )
    assert choice_of(build, (1, 28, 28)).trainer == "stacked"


@pytest.mark.parametrize(("together", "expected"), [(10, None), (24, "vmap")])
def test_many_small_models_are_worth_a_step_of_milliseconds(together: int, expected: str | None) -> None:
    assert choice_of(Tempered, (6,), together=together).trainer == expected
    assert choice_of(lambda: nn.Linear(6, 3), (6,), together=together).trainer == "stacked"
