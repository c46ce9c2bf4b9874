"""Local training is torch's own SGD, a function of its arguments alone; evaluation is a sum over examples."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedlearn.config import TrainingConfig
from fedlearn.errors import DataError, TaskError
from fedlearn.learning import Evaluation, Examples, FlatModel, Task, build_flat_model, evaluate, train
from fedlearn.learning.model import computing
from fedlearn.learning.trainer import batches_of
from fedlearn.sources import SeedTree

seeds = SeedTree.root(3)


class Classify(Task):
    """Three classes, on the model that is given."""

    def __init__(self, build) -> None:
        self.build = build

    def build_model(self) -> nn.Module:
        return self.build()

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(output, target, reduction="none")

    def metrics(self, output: Tensor, target: Tensor) -> dict[str, Tensor]:
        return {"accuracy": (output.argmax(dim=1) == target).float()}


class Recurrent(nn.Module):
    """An LSTM and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.lstm(inputs.reshape(-1, 6, 6))[0][:, -1])


class To(nn.Module):
    """A change of type."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.to(self.dtype)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.ReLU(), nn.Linear(16, 3))


def cnn() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3))


def batchnorm() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))


def frozen() -> nn.Module:
    model = mlp()
    model[1].requires_grad_(False)
    return model


def scaled() -> nn.Module:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.temperature = mlp(), nn.Parameter(torch.tensor(1.5))

        def forward(self, inputs: Tensor) -> Tensor:
            return self.inner(inputs) / self.temperature

    return Scaled()


def wide_then_single() -> nn.Module:
    double = nn.Linear(36, 16).double()
    return nn.Sequential(
        nn.Flatten(), To(torch.float64), double, To(torch.float32), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3)
    )


def half_inside() -> nn.Module:
    half = nn.Linear(36, 16).bfloat16()
    return nn.Sequential(nn.Flatten(), To(torch.bfloat16), half, To(torch.float32), nn.ReLU(), nn.Linear(16, 3))


def dropout() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.5, inplace=True), nn.Linear(36, 16), nn.ReLU(), nn.Linear(16, 3))


EXACT = {"mlp": mlp, "cnn": cnn, "batchnorm": batchnorm, "lstm": Recurrent, "frozen": frozen, "scalar": scaled}
EVERY = {**EXACT, "float64+float32": wide_then_single, "bfloat16": half_inside}


def some_examples(count: int = 21, seed: int = 0) -> Examples:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 1, 6, 6, generator=generator)
    return Examples(inputs, torch.randint(0, 3, (count,), generator=generator))


def setting(**changes) -> TrainingConfig:
    return TrainingConfig(**{"batch_size": 8, "learning_rate": 0.1, **changes})


def by_torch(build, received, examples, training, *, proximal_mu=0.0, own_seeds=seeds) -> tuple[np.ndarray, float, int]:
    """Return (update, mean loss, steps) of torch.optim.SGD on the same batches, in an ordinary module."""
    task = Classify(build)
    module = FlatModelFree(build, received)
    anchors = [parameter.detach().clone() for parameter in module.parameters()]
    options = {"lr": training.learning_rate, "momentum": training.momentum}
    optimiser = torch.optim.SGD([each for each in module.parameters() if each.requires_grad], **options)
    losses, seen, steps = 0.0, 0, 0
    with computing(own_seeds.child("torch")):
        module.train()
        for rows in batches_of(len(examples), training, own_seeds.child("batches")):
            batch = examples if rows is None else examples.take(rows)
            optimiser.zero_grad()
            each = task.loss(module(batch.inputs.clone()), batch.targets)
            objective = each.mean()
            if proximal_mu:
                pairs = zip(module.parameters(), anchors, strict=True)
                objective = objective + proximal_mu / 2 * sum((now - then).square().sum() for now, then in pairs)
            objective.backward()
            optimiser.step()
            losses += float(each.detach().sum())
            seen += len(batch)
            steps += 1
    spec = FlatModel(module).spec
    state = {entry.name: module.state_dict()[entry.name].double().numpy() for entry in spec.entries}
    return spec.flatten(state) - received, losses / seen, steps


def FlatModelFree(build, received) -> nn.Module:
    """Return an ordinary module, no view of anything, with the received state."""
    module = build()
    spec = FlatModel(build()).spec
    arrays = {name: torch.from_numpy(array) for name, array in spec.unflatten(received).items()}
    module.load_state_dict(arrays, strict=False)
    return module


def by_fedlearn(build, received, examples, training, *, proximal_mu=0.0, model=None, own_seeds=seeds):
    task = Classify(build)
    model = model or build_flat_model(task, SeedTree.root(0))
    return train(model, task, received, examples, training, proximal_mu=proximal_mu, seeds=own_seeds)


def first_vector(build) -> np.ndarray:
    return build_flat_model(Classify(build), SeedTree.root(0)).vector()


# -- the same as torch ---------------------------------------------------------------------------------------------


SCHEDULES = {
    "one full step": {"local_steps": 1, "batch_size": 0},
    "full epochs": {"local_epochs": 3, "batch_size": 0},
    "epochs with a partial last batch": {"local_epochs": 2},
    "epochs that divide": {"local_epochs": 2, "batch_size": 7},
    "fewer steps than an epoch": {"local_steps": 2},
    "steps across epochs": {"local_steps": 7},
    "batches larger than the data": {"local_epochs": 2, "batch_size": 1000},
    "momentum": {"local_epochs": 3, "momentum": 0.9},
    "full with momentum": {"local_steps": 5, "batch_size": 0, "momentum": 0.5},
}
every_schedule = pytest.mark.parametrize("changes", SCHEDULES.values(), ids=SCHEDULES)


@every_schedule
@pytest.mark.parametrize("build", EXACT.values(), ids=EXACT)
def test_training_is_torchs_sgd(build, changes) -> None:
    received, examples, training = first_vector(build), some_examples(), setting(**changes)
    expected, mean_loss, steps = by_torch(build, received, examples, training)
    trained = by_fedlearn(build, received, examples, training)
    assert trained.update.vector.dtype == received.dtype
    np.testing.assert_allclose(trained.update.vector, expected, rtol=1e-5, atol=1e-6)
    if training.momentum == 0.0:
        assert np.array_equal(trained.update.vector, expected), "the same operations in the same order, to the last bit"
    assert trained.mean_loss == pytest.approx(mean_loss, rel=1e-6)
    assert (trained.steps, trained.num_examples) == (steps, len(examples))
    assert trained.update.vector.any()


@pytest.mark.parametrize("mu", [0.01, 1.0])
@pytest.mark.parametrize("build", [mlp, batchnorm, Recurrent, frozen])
def test_fedprox_is_torchs_sgd_on_the_loss_with_its_proximal_term(build, mu) -> None:
    received, examples = first_vector(build), some_examples()
    training = setting(local_epochs=3, momentum=0.5)
    expected, mean_loss, _ = by_torch(build, received, examples, training, proximal_mu=mu)
    trained = by_fedlearn(build, received, examples, training, proximal_mu=mu)
    np.testing.assert_allclose(trained.update.vector, expected, rtol=1e-4, atol=1e-6)
    assert trained.mean_loss == pytest.approx(mean_loss, rel=1e-5), "the loss is reported without the term"
    plain = by_fedlearn(build, received, examples, training)
    assert not np.allclose(trained.update.vector, plain.update.vector, rtol=1e-3)


def test_a_second_fedprox_step_has_autograds_gradient() -> None:
    received, examples, rate, mu = first_vector(mlp), some_examples(), 0.1, 0.3
    one, two = (
        received
        + by_fedlearn(mlp, received, examples, setting(local_steps=n, batch_size=0), proximal_mu=mu).update.vector
        for n in (1, 2)
    )
    module = FlatModelFree(mlp, one)
    start = [torch.from_numpy(array) for array in FlatModel(mlp()).spec.unflatten(received).values()]
    objective = functional.cross_entropy(module(examples.inputs), examples.targets)
    away = sum((now - then).square().sum() for now, then in zip(module.parameters(), start, strict=True))
    gradient = torch.autograd.grad(objective + mu / 2 * away, list(module.parameters()))
    expected = torch.cat([each.reshape(-1) for each in gradient]).numpy()
    np.testing.assert_allclose((one - two) / rate, expected, rtol=1e-3, atol=1e-5)


def test_no_proximal_term_is_no_proximal_term() -> None:
    received, examples, training = first_vector(mlp), some_examples(), setting()
    updates = [by_fedlearn(mlp, received, examples, training, proximal_mu=mu).update.vector for mu in (0.0, 1e-12)]
    np.testing.assert_allclose(*updates, atol=1e-7)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_float64_model_with_float32_layers_is_torchs_sgd_to_single_precision(momentum) -> None:
    received, examples = first_vector(wide_then_single), some_examples()
    training = setting(local_epochs=2, momentum=momentum)
    expected, mean_loss, _ = by_torch(wide_then_single, received, examples, training)
    trained = by_fedlearn(wide_then_single, received, examples, training)
    assert trained.update.vector.dtype == np.float64
    np.testing.assert_allclose(trained.update.vector, expected, rtol=1e-4, atol=1e-6)
    assert trained.mean_loss == pytest.approx(mean_loss, rel=1e-5)
    statistics = FlatModel(wide_then_single()).spec.slices["4.running_mean"]
    assert np.abs(trained.update.vector[statistics]).min() > 0.0, "BatchNorm's running mean was learned"


def test_steps_too_small_for_half_precision_still_add_up() -> None:
    received, examples = first_vector(half_inside), some_examples()
    place = slice(*((lambda s: (s.start, s.stop))(FlatModel(half_inside()).spec.slices["2.weight"])))
    small = setting(local_steps=20, batch_size=0, learning_rate=1e-5)
    one, twenty = (
        by_fedlearn(half_inside, received, examples, replace(small, local_steps=n)).update.vector[place]
        for n in (1, 20)
    )
    assert np.count_nonzero(one) > 0.9 * np.count_nonzero(twenty) > 0
    np.testing.assert_allclose(twenty, 20 * one, rtol=0.1, atol=1e-6)


# -- a function of its arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [*EVERY.values(), dropout], ids=[*EVERY, "dropout"])
def test_the_same_seeds_give_the_same_bytes_whatever_was_trained_before(build) -> None:
    received, examples, training = first_vector(build), some_examples(), setting(momentum=0.5)
    task = Classify(build)
    resident = build_flat_model(task, SeedTree.root(9))
    torch.manual_seed(1)
    fresh = by_fedlearn(build, received, examples, training)
    for other in range(2):
        moved = received + np.float32(0.1)
        by_fedlearn(build, moved, some_examples(11, other + 1), training, model=resident, own_seeds=seeds.child(other))
        evaluate(resident, task, moved, examples, seeds=seeds)
    torch.manual_seed(2)
    again = by_fedlearn(build, received, examples, training, model=resident)
    assert again.update.vector.tobytes() == fresh.update.vector.tobytes()
    assert again.mean_loss == fresh.mean_loss


@pytest.mark.parametrize("build", [mlp, dropout])
def test_other_seeds_give_another_order_of_batches(build) -> None:
    received, examples = first_vector(build), some_examples()
    updates = {
        by_fedlearn(build, received, examples, setting(), own_seeds=seeds.child(n)).update.vector.tobytes()
        for n in "ab"
    }
    assert len(updates) == 2


def test_dropout_follows_the_seeds_even_in_full_batches() -> None:
    received, examples, full = first_vector(dropout), some_examples(), setting(batch_size=0, local_steps=2)
    one, same, other = (
        by_fedlearn(dropout, received, examples, full, own_seeds=each).update.vector
        for each in (seeds, seeds, seeds.child(1))
    )
    assert one.tobytes() == same.tobytes() != other.tobytes()


def test_no_argument_is_changed_even_by_a_model_that_works_in_place() -> None:
    received, examples = first_vector(dropout), some_examples()
    kept, inputs, targets = received.copy(), examples.inputs.clone(), examples.targets.clone()
    task, model = Classify(lambda: InPlace()), build_flat_model(Classify(lambda: InPlace()), SeedTree.root(0))
    for batch_size in (0, 8, 100):
        by_fedlearn(dropout, received, examples, setting(batch_size=batch_size))
        train(model, task, model.vector(), examples, setting(batch_size=batch_size), proximal_mu=0.0, seeds=seeds)
    evaluate(model, task, model.vector(), examples, seeds=seeds)
    assert np.array_equal(received, kept)
    assert torch.equal(examples.inputs, inputs)
    assert torch.equal(examples.targets, targets)


class InPlace(nn.Module):
    """A model that centres its inputs where they lie."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(36, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.linear(inputs.sub_(1.0).flatten(1))


def test_torchs_generator_and_threads_are_as_before() -> None:
    torch.manual_seed(5)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        seen = []
        task = Classify(lambda: Noting(seen))
        model = build_flat_model(task, SeedTree.root(0))
        train(model, task, model.vector(), some_examples(), setting(), proximal_mu=0.0, seeds=seeds)
        evaluate(model, task, model.vector(), some_examples(), seeds=seeds)
        assert set(seen) == {1}, "one thread while computing"
        assert torch.get_num_threads() == 2
        assert torch.equal(torch.get_rng_state(), before)
    finally:
        torch.set_num_threads(threads)


class Noting(nn.Module):
    """Notes how many threads it computes on."""

    def __init__(self, seen: list[int]) -> None:
        super().__init__()
        self.seen, self.linear = seen, nn.Linear(36, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        self.seen.append(torch.get_num_threads())
        return functional.dropout(self.linear(inputs.flatten(1)), training=True)


class Failing(Classify):
    """Raises in the step that is named."""

    def __init__(self, where: str) -> None:
        super().__init__(mlp)
        self.where = where

    def build_model(self) -> nn.Module:
        torch.rand(3)
        if self.where == "build_model":
            raise RuntimeError("boom")
        return mlp()

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        if self.where == "loss":
            raise RuntimeError("boom")
        return super().loss(output, target)

    def metrics(self, output: Tensor, target: Tensor) -> dict[str, Tensor]:
        raise RuntimeError("boom")


@pytest.mark.parametrize("where", ["build_model", "loss", "metrics"])
def test_torchs_generator_and_threads_are_restored_when_the_task_raises(where) -> None:
    torch.manual_seed(6)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(TaskError if where == "build_model" else RuntimeError, match="boom"):
            run_into(where)
        assert torch.get_num_threads() == 2
        assert torch.equal(torch.get_rng_state(), before)
    finally:
        torch.set_num_threads(threads)


def run_into(where: str) -> None:
    task = Failing(where)
    model = build_flat_model(task, SeedTree.root(0))
    if where == "loss":
        train(model, task, model.vector(), some_examples(), setting(), proximal_mu=0.0, seeds=seeds)
    evaluate(model, task, model.vector(), some_examples(), seeds=seeds)


def test_a_model_is_as_good_as_new_after_its_task_raised() -> None:
    received, examples = first_vector(batchnorm), some_examples()
    resident = build_flat_model(Classify(batchnorm), SeedTree.root(0))
    failing = Classify(batchnorm)
    failing.loss = lambda output, target: (_ for _ in ()).throw(RuntimeError("boom"))
    with pytest.raises(RuntimeError, match="boom"):
        train(resident, failing, received, examples, setting(), proximal_mu=0.0, seeds=seeds)
    after, fresh = (by_fedlearn(batchnorm, received, examples, setting(), model=model) for model in (resident, None))
    assert after.update.vector.tobytes() == fresh.update.vector.tobytes()


# -- batches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 8, 9, 24])
@pytest.mark.parametrize("batch_size", [1, 8, 100])
def test_an_epoch_shows_every_example_once_in_batches_of_the_size_asked_for(size, batch_size) -> None:
    training = setting(batch_size=batch_size, local_epochs=3)
    batches = list(batches_of(size, training, seeds))
    per_epoch = -(-size // batch_size)
    assert len(batches) == 3 * per_epoch
    for epoch in range(3):
        own = batches[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert np.array_equal(np.sort(np.concatenate(own)), np.arange(size))
        assert all(len(rows) == min(batch_size, size) for rows in own[:-1])
    if size > 8:
        assert not np.array_equal(
            np.concatenate(batches[:per_epoch]), np.concatenate(batches[per_epoch : 2 * per_epoch])
        )


@pytest.mark.parametrize("steps", [1, 2, 3, 10])
def test_as_many_steps_as_asked_for(steps) -> None:
    for batch_size in (0, 8, 100):
        training = setting(batch_size=batch_size, local_steps=steps)
        assert len(list(batches_of(21, training, seeds))) == steps


# -- what a task may not do ----------------------------------------------------------------------------------------


LOSSES = {
    "mean-reduced": lambda output, target: functional.cross_entropy(output, target),
    "summed": lambda output, target: functional.cross_entropy(output, target, reduction="sum"),
    "per output": lambda output, target: (output - target[:, None]) ** 2,
    "broadcast": lambda output, target: (output[:, :1] - target) ** 2,
    "too few": lambda output, target: functional.cross_entropy(output, target, reduction="none")[1:],
    "a number": lambda output, target: 0.5,
    "nothing": lambda output, target: None,
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_a_loss_that_is_not_one_an_example_is_refused_with_the_fix(loss) -> None:
    task = Classify(mlp)
    task.loss = loss
    model = build_flat_model(task, SeedTree.root(0))
    with pytest.raises(TaskError, match=r"Classify\.loss.*one loss an example.*reduction='none'"):
        train(model, task, model.vector(), some_examples(), setting(), proximal_mu=0.0, seeds=seeds)
    with pytest.raises(TaskError, match=r"reduction='none'"):
        evaluate(model, task, model.vector(), some_examples(), seeds=seeds)


METRICS = {
    "mean": lambda output, target: {"accuracy": (output.argmax(1) == target).float().mean()},
    "matrix": lambda output, target: {"accuracy": output},
    "a number": lambda output, target: {"accuracy": 0.5},
    "a numpy array": lambda output, target: {"accuracy": np.zeros(len(target))},
}


@pytest.mark.parametrize("metrics", METRICS.values(), ids=METRICS)
def test_a_metric_that_is_not_one_an_example_is_refused_with_the_fix(metrics) -> None:
    task = Classify(mlp)
    task.metrics = metrics
    model = build_flat_model(task, SeedTree.root(0))
    with pytest.raises(TaskError, match=r"'accuracy'.*one value an example"):
        evaluate(model, task, model.vector(), some_examples(), seeds=seeds)


@pytest.mark.parametrize("name", ["loss", "num-examples"])
def test_a_metric_may_not_take_a_name_that_fedlearn_reports(name) -> None:
    task = Classify(mlp)
    task.metrics = lambda output, target: {name: torch.zeros(len(target))}
    model = build_flat_model(task, SeedTree.root(0))
    with pytest.raises(TaskError, match=f"may not be called '{name}'"):
        evaluate(model, task, model.vector(), some_examples(), seeds=seeds)


# -- evaluation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [mlp, cnn, batchnorm, dropout])
def test_sums_are_means_times_examples_and_in_evaluation_mode(build) -> None:
    examples, task = some_examples(33), Classify(build)
    model = build_flat_model(task, SeedTree.root(0))
    found = evaluate(model, task, model.vector(), examples, seeds=seeds)
    module = FlatModelFree(build, model.vector()).eval()
    with torch.no_grad():
        output = module(examples.inputs.clone())
    assert found.num_examples == 33
    assert list(found.sums) == ["accuracy", "loss"], "the task's metrics in its order, then the loss"
    expected = float(functional.cross_entropy(output.double(), examples.targets))
    assert found.sums["loss"] == pytest.approx(33 * expected, rel=1e-5)
    assert found.sums["accuracy"] == int((output.argmax(dim=1) == examples.targets).sum())
    assert found.means() == {name: total / 33 for name, total in found.sums.items()}


@pytest.mark.parametrize("batch", [1, 7, 10, 29, 30, 31, 4096])
def test_sums_do_not_depend_on_the_batches(batch, monkeypatch) -> None:
    examples, task = some_examples(30), Classify(cnn)
    model = build_flat_model(task, SeedTree.root(0))
    whole = evaluate(model, task, model.vector(), examples, seeds=seeds)
    monkeypatch.setattr("fedlearn.learning.trainer._EVALUATION_BATCH", batch)
    parts = evaluate(model, task, model.vector(), examples, seeds=seeds)
    assert parts.num_examples == whole.num_examples
    assert parts.sums == pytest.approx(dict(whole.sums), rel=1e-6)


def test_the_sums_of_two_halves_are_the_sum_of_the_whole() -> None:
    examples, task = some_examples(30), Classify(cnn)
    model = build_flat_model(task, SeedTree.root(0))
    whole, *halves = (
        evaluate(model, task, model.vector(), examples.take(rows), seeds=seeds)
        for rows in (np.arange(30), np.arange(13), np.arange(13, 30))
    )
    for name, total in whole.sums.items():
        assert sum(half.sums[name] for half in halves) == pytest.approx(total, rel=1e-6)


def test_evaluating_changes_nothing() -> None:
    examples, task = some_examples(), Classify(batchnorm)
    model = build_flat_model(task, SeedTree.root(0))
    vector = model.vector()
    first = evaluate(model, task, vector, examples, seeds=seeds)
    assert evaluate(model, task, vector, examples, seeds=seeds) == first
    assert model.vector().tobytes() == vector.tobytes()


def test_a_task_without_metrics_reports_its_loss() -> None:
    class Bare(Classify):
        metrics = Task.metrics

    task = Bare(mlp)
    model = build_flat_model(task, SeedTree.root(0))
    assert list(evaluate(model, task, model.vector(), some_examples(), seeds=seeds).sums) == ["loss"]


def test_nothing_to_evaluate_on_is_said() -> None:
    task = Classify(mlp)
    model = build_flat_model(task, SeedTree.root(0))
    with pytest.raises(DataError, match="no example"):
        evaluate(model, task, model.vector(), some_examples(0), seeds=seeds)


def test_nothing_to_train_on_is_said() -> None:
    task = Classify(mlp)
    model = build_flat_model(task, SeedTree.root(0))
    for batch_size in (0, 8):
        with pytest.raises(DataError, match="no example"):
            train(
                model,
                task,
                model.vector(),
                some_examples(0),
                setting(batch_size=batch_size),
                proximal_mu=0.0,
                seeds=seeds,
            )


def test_means_are_over_examples() -> None:
    assert Evaluation(num_examples=4, sums={"accuracy": 3.0, "loss": 1.0}).means() == {"accuracy": 0.75, "loss": 0.25}
