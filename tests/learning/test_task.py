"""The words of a learning problem: examples, pools, strata, and what a task has by default."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlearn.errors import TaskError
from fedlearn.learning import ClientData, Examples, Pool, Task


def some(count: int = 6, **changes) -> Examples:
    parts = {"inputs": torch.arange(2.0 * count).reshape(count, 2), "targets": torch.arange(count) % 3, **changes}
    return Examples(**parts)


# -- examples ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"targets": torch.zeros(5)}, "6 inputs but 5 targets"),
        ({"inputs": torch.tensor(1.0)}, "first dimension"),
        ({"targets": torch.tensor(1)}, "first dimension"),
        ({"groups": np.zeros(5)}, "groups needs shape"),
        ({"groups": np.zeros((6, 1))}, "groups needs shape"),
        ({"groups": np.array("all")}, "groups needs shape"),
    ],
)
def test_what_does_not_fit_together_is_refused(changes, told) -> None:
    with pytest.raises(TaskError, match=told):
        some(**changes)


def test_as_many_as_there_are_inputs() -> None:
    assert len(some(6)) == 6
    assert len(some(0)) == 0


@settings(max_examples=50, deadline=None)
@given(rows=st.lists(st.integers(0, 5), max_size=12), grouped=st.booleans())
def test_take_gives_the_rows_asked_for_in_copies(rows, grouped) -> None:
    groups = np.array(list("aabbcc")) if grouped else None
    examples, index = some(groups=groups), np.array(rows, dtype=np.int64)
    inputs, targets = examples.inputs.clone(), examples.targets.clone()
    taken = examples.take(index)
    assert torch.equal(taken.inputs, inputs[rows])
    assert torch.equal(taken.targets, targets[rows])
    assert (taken.groups is None) == (groups is None)
    if grouped:
        assert taken.groups.tolist() == [groups[row] for row in rows]
        taken.groups[:] = "z"
        assert examples.groups.tolist() == list("aabbcc")
    taken.inputs.zero_()
    taken.targets.zero_()
    assert torch.equal(examples.inputs, inputs)
    assert torch.equal(examples.targets, targets)


def test_take_accepts_any_memory() -> None:
    examples, index = some(), np.arange(6)
    index.flags.writeable = False
    assert examples.take(index).targets.tolist() == examples.targets.tolist()
    assert examples.take(np.arange(6)[::-2]).targets.tolist() == [2, 0, 1]


def test_take_everything_is_still_a_copy() -> None:
    examples = some()
    examples.take(np.arange(6)).inputs.zero_()
    assert examples.inputs.any()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool])
def test_integers_one_each_are_labels_and_strata(dtype) -> None:
    examples = some(targets=(torch.arange(6) % 2).to(dtype))
    assert examples.labels().tolist() == examples.strata().tolist() == [0, 1, 0, 1, 0, 1]
    assert examples.labels().dtype == np.int64


@pytest.mark.parametrize(
    "targets", [torch.zeros(6, 2), torch.zeros(6, 2, dtype=torch.int64), torch.zeros(6, dtype=torch.complex64)]
)
def test_what_is_neither_a_class_nor_one_number_has_no_strata(targets) -> None:
    assert some(targets=targets).labels() is None
    assert some(targets=targets).strata() is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_one_number_is_stratified_by_decile(dtype) -> None:
    targets = torch.from_numpy(np.random.default_rng(0).permutation(200)).to(dtype)
    examples = some(200, targets=targets)
    assert examples.labels() is None
    strata = examples.strata()
    assert strata.dtype == np.int64
    assert np.bincount(strata, minlength=10).tolist() == [20] * 10
    order = np.argsort(targets.double().numpy(), kind="stable")
    assert np.all(np.diff(strata[order]) >= 0), "a larger target is in no lower decile"


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60))
def test_equal_targets_are_in_the_same_decile(values) -> None:
    strata = some(len(values), targets=torch.tensor(values, dtype=torch.float64)).strata()
    assert strata.min() >= 0
    assert strata.max() <= 9
    by_value = dict(zip(values, strata.tolist(), strict=True))
    assert [by_value[value] for value in values] == strata.tolist()
    ordered = [by_value[value] for value in sorted(by_value)]
    assert ordered == sorted(ordered)


def test_no_examples_have_no_strata_to_fail_on() -> None:
    assert len(some(0, targets=torch.zeros(0)).strata()) == 0
    assert len(some(0).strata()) == 0


def test_a_pool_and_a_client_need_no_tests_of_their_own() -> None:
    assert Pool(some()).test is None
    assert ClientData(some()).test is None


# -- what a task has by default ------------------------------------------------------------------------------------


class Bare(Task):
    """A task with nothing of its own."""


def test_the_defaults() -> None:
    task, data = Bare(), ClientData(some())
    assert task.metrics(torch.zeros(1, 2), torch.zeros(1)) == {}
    assert task.load_test(None) is None
    assert task.prepare(data) is data
    assert tuple(task.label_names) == ()


def test_without_data_a_task_says_what_it_cannot_do() -> None:
    with pytest.raises(TaskError, match=r"Bare has no load_pool.*simulated"):
        Bare().load_pool(None)
    with pytest.raises(TaskError, match=r"Bare has no load_local.*device"):
        Bare().load_local(Path("data.npz"))


def test_answers_are_the_likeliest_class_or_the_output_itself() -> None:
    scores = torch.tensor([[0.1, 0.9], [0.8, 0.2]])
    assert Bare().decode(scores).tolist() == [1, 0]
    for output in (torch.rand(3), torch.rand(3, 1), torch.rand(3, 2, 2)):
        assert torch.equal(Bare().decode(output), output)
