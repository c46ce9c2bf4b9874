"""What every built-in task keeps, and how any task is found by name."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fedlearn.config import RunConfig, TrainingConfig
from fedlearn.data.loaders import distribute_data
from fedlearn.errors import DataError, MissingError, TaskError, TaskNotFoundError, UsageError
from fedlearn.learning import Task, build_flat_model, evaluate, train
from fedlearn.sources import SeedTree
from fedlearn.tasks import BUILT_IN, load_task

SIZES = {"digits": (1437, 360), "digits-mlp": (1437, 360), "regression": (353, 89)}
PARAMETERS = {"digits": 9930, "digits-mlp": 4810, "regression": 11}

every_task = pytest.mark.parametrize("name", BUILT_IN)


def rows_of(examples) -> list[bytes]:
    """Return the bytes of every example, input and target."""
    return [
        inputs.tobytes() + target.tobytes()
        for inputs, target in zip(examples.inputs.numpy(), examples.targets.numpy(), strict=True)
    ]


# -- the contract --------------------------------------------------------------------------------------------------


def test_every_built_in_task_is_held_to_its_numbers() -> None:
    assert set(BUILT_IN) == set(SIZES) == set(PARAMETERS)
    for place, described in BUILT_IN.values():
        assert place.startswith("fedlearn.tasks.")
        assert described


@every_task
def test_its_data_is_all_there_and_the_test_set_is_apart(name) -> None:
    task = load_task(name)
    pool, test = task.load_pool(None), task.load_test(None)
    assert test is not None
    assert (len(pool.train), len(test)) == SIZES[name]
    assert not set(rows_of(pool.train)) & set(rows_of(test))
    for examples in (pool.train, test):
        assert torch.isfinite(examples.inputs).all()
        assert torch.isfinite(examples.targets).all()


@every_task
def test_its_data_is_the_same_every_time(name) -> None:
    one, other = load_task(name), load_task(name)
    assert rows_of(one.load_pool(None).train) == rows_of(other.load_pool(None).train)
    assert rows_of(one.load_test(None)) == rows_of(other.load_test(None))


@every_task
def test_labels_have_names_and_every_label_is_in_both_sets(name) -> None:
    task = load_task(name)
    for examples in (task.load_pool(None).train, task.load_test(None)):
        labels = examples.labels()
        assert (labels is None) == (len(task.label_names) == 0)
        if labels is not None:
            assert np.unique(labels).tolist() == list(range(len(task.label_names)))
        assert len(np.unique(examples.strata())) == 10


@every_task
def test_losses_and_metrics_are_finite_and_one_an_example(name) -> None:
    task = load_task(name)
    model = build_flat_model(task, SeedTree.root(0))
    examples = task.load_test(None)
    for count in (1, 2, 33):
        batch = examples.take(np.arange(count))
        output = model.module(batch.inputs)
        losses = task.loss(output, batch.targets)
        assert losses.shape == (count,)
        assert torch.isfinite(losses).all()
        assert losses.requires_grad
        metrics = task.metrics(output, batch.targets)
        assert metrics
        for metric, values in metrics.items():
            assert values.shape == (count,), metric
            assert torch.isfinite(values).all(), metric
        assert len(task.decode(output)) == count


@every_task
def test_the_loss_of_an_example_does_not_depend_on_the_others(name) -> None:
    task = load_task(name)
    module = build_flat_model(task, SeedTree.root(0)).module.eval()
    batch = task.load_test(None).take(np.arange(5))
    with torch.no_grad():
        together = task.loss(module(batch.inputs), batch.targets)
        alone = [task.loss(module(batch.inputs[[row]]), batch.targets[[row]]) for row in range(5)]
    torch.testing.assert_close(torch.cat(alone), together)


@every_task
def test_its_model_is_a_function_of_the_seed(name) -> None:
    task = load_task(name)
    one, same, other = (build_flat_model(task, SeedTree.root(seed)) for seed in (0, 0, 1))
    assert one.spec == same.spec
    assert one.spec.size == one.spec.trainable_size == PARAMETERS[name]
    assert one.vector().tobytes() == same.vector().tobytes()
    assert (one.vector().tobytes() == other.vector().tobytes()) == (name == "regression"), "that one starts at zero"
    assert np.isfinite(one.vector()).all()


@every_task
def test_training_helps(name) -> None:
    task = load_task(name)
    model = build_flat_model(task, SeedTree.root(0))
    start, examples, test = model.vector(), task.load_pool(None).train, task.load_test(None)
    training = TrainingConfig(local_steps=40, batch_size=32, learning_rate=0.05)
    trained = train(model, task, start, examples, training, proximal_mu=0.0, seeds=SeedTree.root(0))
    before, after = (
        evaluate(model, task, each, test, seeds=SeedTree.root(0)) for each in (start, start + trained.update.vector)
    )
    assert after.means()["loss"] < 0.8 * before.means()["loss"]


@every_task
def test_its_metrics_are_what_they_are_called(name) -> None:
    task = load_task(name)
    test = task.load_test(None)
    if name == "regression":
        zero = task.metrics(torch.zeros(len(test), dtype=torch.float64), test.targets)["squared_error"]
        assert zero.tolist() == pytest.approx((test.targets**2).tolist())
        assert float(task.load_pool(None).train.targets.var(correction=0)) == pytest.approx(1.0)
    else:
        right = torch.nn.functional.one_hot(test.targets, 10).float()
        assert task.metrics(right, test.targets)["accuracy"].tolist() == [1.0] * len(test)
        assert task.metrics(-right, test.targets)["accuracy"].sum() == 0.0


@every_task
def test_a_device_reads_what_a_simulation_would_have_given_it(name, tmp_path) -> None:
    task = load_task(name)
    given = task.load_pool(None).train.take(np.arange(30))
    np.savez(tmp_path / "data.npz", inputs=given.inputs.numpy(), targets=given.targets.numpy())
    found = task.load_local(tmp_path / "data.npz")
    assert found.test is None
    assert rows_of(found.train) == rows_of(given)
    assert found.train.inputs.dtype == given.inputs.dtype
    with pytest.raises(DataError, match="no such file"):
        task.load_local(tmp_path / "nothing.npz")


def test_regression_is_standardised_on_its_training_patients() -> None:
    train_set = load_task("regression").load_pool(None).train
    np.testing.assert_allclose(train_set.inputs.mean(dim=0), 0.0, atol=1e-12)
    np.testing.assert_allclose(train_set.inputs.std(dim=0, correction=0), 1.0)


def test_digits_are_held_out_in_equal_shares() -> None:
    task = load_task("digits")
    shares = np.bincount(task.load_test(None).labels()) / np.bincount(task.load_pool(None).train.labels())
    assert shares.min() > 0.23
    assert shares.max() < 0.27


@every_task
def test_without_scikit_learn_it_says_what_to_install(name, monkeypatch) -> None:
    import fedlearn.tasks.digits
    import fedlearn.tasks.regression
    from fedlearn.data import loaders

    for cached in (fedlearn.tasks.digits._digits, fedlearn.tasks.regression._diabetes):
        cached.cache_clear()
    monkeypatch.setattr(loaders, "find_spec", lambda package: None)
    with pytest.raises(MissingError, match=r"scikit-learn.*pip install -c constraints.txt '\.\[simulation\]'"):
        load_task(name).load_pool(None)


# -- by name -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "meant"), [("digit", "digits"), ("digits_mlp", "digits-mlp"), ("regresion", "regression")]
)
def test_an_unknown_name_gets_the_nearest_and_all_there_are(asked, meant) -> None:
    with pytest.raises(TaskNotFoundError) as caught:
        load_task(asked)
    assert f"Did you mean '{meant}'?" in str(caught.value)
    assert all(name in str(caught.value) for name in BUILT_IN)
    assert "my_task.py" in str(caught.value)


def test_a_name_like_none_gets_no_guess() -> None:
    with pytest.raises(TaskNotFoundError, match="there is no task 'zebra'") as caught:
        load_task("zebra")
    assert "Did you mean" not in str(caught.value)


def test_a_built_in_task_can_be_named_in_full() -> None:
    assert type(load_task("fedlearn.tasks.digits:Digits")) is type(load_task("digits"))


@pytest.mark.parametrize(
    ("name", "error", "told"),
    [
        ("nowhere/my_task.py", TaskNotFoundError, "nowhere/my_task.py"),
        ("no_such_module_at_all:Mine", TaskNotFoundError, "no_such_module_at_all"),
        ("fedlearn.tasks.digits:Digit", TaskNotFoundError, "'Digits'"),
        ("fedlearn.config:RunConfig", TaskError, "must subclass fedlearn.learning.task.Task"),
        ("a b:c", TaskError, "package.module:Class"),
    ],
)
def test_a_wrong_place_is_refused_by_what_is_wrong_with_it(name, error, told, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error) as caught:
        load_task(name)
    assert told in str(caught.value)


OWN = '''
from collections.abc import Mapping

import torch
from torch import nn

from fedlearn.learning.task import ClientData, Examples, Pool, Task


class Parity(Task):
    """Whether a number of eight bits is odd."""

    label_names = ("even", "odd")

    def build_model(self):
        return nn.Linear(8, 2)

    def loss(self, output, target):
        return nn.functional.cross_entropy(output, target, reduction="none")

    def metrics(self, output, target):
        return {"accuracy": (output.argmax(dim=1) == target).float()}

    def load_pool(self, path):
        numbers = torch.arange(256)
        bits = (numbers[:, None] >> torch.arange(8)) & 1
        return Pool(train=Examples(bits.float(), bits[:, 0]))
'''


@pytest.fixture
def own(tmp_path: Path):
    """The path of a user's own task; what it imported is forgotten after the test."""
    before = set(sys.modules)
    path = tmp_path / "parity.py"
    path.write_text(OWN)
    yield path
    for name in set(sys.modules) - before:
        if name.startswith("fedlearn_file_"):
            del sys.modules[name]


def test_a_users_own_file_is_a_task_like_any_other(own, monkeypatch) -> None:
    monkeypatch.chdir(own.parent)
    tasks = [load_task(name) for name in (str(own), f"{own}:Parity", "parity.py", "./parity.py:Parity")]
    assert len({type(task) for task in tasks}) == 1
    task = tasks[0]
    assert Task in type(task).__mro__
    config = RunConfig.from_mapping({"task": "parity.py", "federation": {"clients": 4}})
    held = distribute_data(task, config)
    assert sum(len(part) for part in held.train) == 256
    model = build_flat_model(task, SeedTree.root(0))
    theta = model.vector()
    for number in range(20):
        mean = np.zeros_like(theta)
        for client in range(4):
            examples = task.prepare(held.client(client)).train
            seeds = SeedTree.root(0).child(number, client)
            training = TrainingConfig(learning_rate=0.5)
            mean += train(model, task, theta, examples, training, proximal_mu=0.0, seeds=seeds).update.vector / 4
        theta = theta + mean
    found = evaluate(model, task, theta, task.load_pool(None).train, seeds=SeedTree.root(0))
    assert found.means()["accuracy"] > 0.95


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("    def __init__(self, width):\n        self.width = width\n", "width"),
        ("    def __init__(self):\n        raise ValueError('no luck')\n", "no luck"),
    ],
)
def test_a_task_that_cannot_be_made_is_its_authors_error(source, told, tmp_path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(f"from fedlearn.learning.task import Task\n\n\nclass Mine(Task):\n{source}")
    with pytest.raises(UsageError, match=f"Mine.*{told}"):
        load_task(str(path))


def test_a_task_that_says_itself_what_is_wrong_is_heard(tmp_path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from fedlearn.errors import DataError\nfrom fedlearn.learning.task import Task\n\n\nclass Mine(Task):\n"
        "    def __init__(self):\n        raise DataError('fetch the images first')\n"
    )
    with pytest.raises(DataError, match=r"^fetch the images first$"):
        load_task(str(path))


@pytest.mark.parametrize("missing", ["build_model", "loss"])
def test_a_task_without_a_required_part_is_refused_where_it_is_needed(missing, tmp_path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(OWN.replace(f"def {missing}(", f"def not_{missing}("))
    task = load_task(str(path))
    with pytest.raises(TaskError, match=missing):
        model = build_flat_model(task, SeedTree.root(0))
        evaluate(model, task, model.vector(), task.load_pool(None).train, seeds=SeedTree.root(0))
