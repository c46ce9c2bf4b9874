"""A layer that privacy rules out is refused by name, with what to put in its place."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fedlearn.errors import DependencyError, TaskError
from fedlearn.learning import validators
from fedlearn.learning.validators import check_private, offered_fix

MODES = ("hooks", "functorch", "ghost")


def conv() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 2, 3))


@pytest.mark.parametrize("unit", ["example", "client"])
def test_every_layer_is_named_with_its_class_and_the_fix(unit) -> None:
    model = nn.ModuleDict(
        {"one": nn.BatchNorm1d(4), "two": nn.Linear(4, 4), "three": nn.InstanceNorm1d(4, track_running_stats=True)}
    )
    with pytest.raises(TaskError) as caught:
        check_private(model, unit=unit)
    text = str(caught.value)
    assert "one (BatchNorm1d)" in text
    assert "three (InstanceNorm1d)" in text
    assert "torch.nn.GroupNorm(num_groups, channels)" in text
    assert "offered_fix" in text
    assert "two (" not in text


@pytest.mark.parametrize("layer", [nn.BatchNorm2d(4), nn.BatchNorm3d(4, affine=False), nn.SyncBatchNorm(4)])
def test_batchnorm_is_refused_with_parameters_and_without(layer) -> None:
    for unit in ("example", "client"):
        with pytest.raises(TaskError, match="GroupNorm"):
            check_private(nn.Sequential(layer), unit=unit)


def test_client_units_refuse_only_running_statistics() -> None:
    fine = nn.Sequential(
        nn.BatchNorm1d(4, track_running_stats=False), nn.LSTM(4, 4), nn.Embedding(3, 4, max_norm=1.0), nn.GRU(4, 4)
    )
    check_private(fine, unit="client")
    with pytest.raises(TaskError):
        check_private(fine, unit="example")


def test_no_unit_refuses_nothing() -> None:
    check_private(conv(), unit="none")


@pytest.mark.parametrize(
    ("layer", "modes"),
    [
        (nn.LSTM(4, 4), {"hooks", "ghost"}),
        (nn.MultiheadAttention(4, 2), {"hooks", "ghost"}),
        (nn.GRU(4, 4), set(MODES)),
        (nn.EmbeddingBag(4, 2), {"hooks", "ghost"}),
        (nn.Embedding(4, 2, padding_idx=0), {"hooks", "ghost"}),
        (nn.Embedding(4, 2, padding_idx=0).requires_grad_(False), set()),
        (nn.Embedding(4, 2), set()),
        (nn.LayerNorm(4, bias=False), {"hooks", "ghost"}),
        (nn.LayerNorm(4, elementwise_affine=False), set()),
        (nn.Conv1d(1, 2, 3, padding_mode="circular", padding=1), {"hooks", "ghost"}),
        (nn.ReLU(inplace=True), {"hooks", "ghost"}),
    ],
)
def test_a_fault_of_one_mode_leaves_the_others_open(layer, modes) -> None:
    refused = set()
    for mode in MODES:
        try:
            check_private(nn.Sequential(layer), unit="example", mode=mode)
        except TaskError as error:
            assert type(layer).__name__ in str(error)
            refused.add(mode)
    assert refused == modes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_trained_parameter_in_half_precision_is_refused_by_name(dtype) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).to(dtype))
    for mode in (*MODES, None):
        with pytest.raises(TaskError, match=rf"1\.weight \({str(dtype)[6:]}\).*keep it in float32") as caught:
            check_private(model, unit="example", mode=mode)
        assert "0.weight" not in str(caught.value)
    check_private(model, unit="client")
    model[1].requires_grad_(False)
    check_private(model, unit="example", mode="hooks")


def test_the_offered_fix_is_a_copy_that_passes() -> None:
    pytest.importorskip("opacus")
    model = conv()
    fixed = offered_fix(model)
    for mode in MODES:
        check_private(fixed, unit="example", mode=mode)
    check_private(fixed, unit="client")
    assert isinstance(model[1], nn.BatchNorm2d)
    assert model[2].inplace
    assert torch.equal(fixed[0].weight, model[0].weight)
    assert fixed[0].weight is not model[0].weight


def test_the_offered_fix_computes_what_the_recurrent_layer_did() -> None:
    pytest.importorskip("opacus")
    lstm = nn.LSTM(4, 3, batch_first=True)
    fixed = offered_fix(lstm)
    inputs = torch.randn(2, 5, 4)
    assert torch.allclose(lstm(inputs)[0], fixed(inputs)[0], atol=1e-6)
    for mode in MODES:
        check_private(fixed, unit="example", mode=mode)


def test_a_fixed_instancenorm_keeps_no_statistics() -> None:
    fixed = offered_fix(nn.Sequential(nn.InstanceNorm1d(4, affine=True, track_running_stats=True)))
    assert not list(fixed.buffers())
    fixed(torch.randn(2, 4, 5))


def test_a_model_that_needs_no_fix_is_copied_as_it_is() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.GroupNorm(1, 3))
    fixed = offered_fix(model)
    assert str(fixed) == str(model)
    assert fixed is not model


def test_without_opacus_clients_are_checked_and_a_fix_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "opacus.validators", None)
    check_private(nn.Sequential(nn.Linear(3, 3)), unit="client")
    with pytest.raises(TaskError):
        check_private(conv(), unit="client")
    with pytest.raises(DependencyError, match="example-privacy"):
        offered_fix(conv())


def test_importing_fedlearns_learning_imports_no_opacus() -> None:
    for path in sorted(Path(validators.__file__).parent.glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            imports = ast.unparse(node) if isinstance(node, ast.Import | ast.ImportFrom) else ""
            assert not imports.startswith(("import opacus", "from opacus")), path
