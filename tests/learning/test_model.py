"""The flat model: every floating number of a module has one place in the vector, and nothing else survives a load."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from fedlearn.errors import TaskError
from fedlearn.learning import FlatModel, Task, build_flat_model
from fedlearn.learning.model import computing
from fedlearn.sources import SeedTree


class Temperature(nn.Module):
    """A linear layer with a learnable temperature of shape ()."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.temperature = nn.Parameter(torch.tensor(2.0))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.linear(inputs) / self.temperature


class Tied(nn.Module):
    """An embedding and a decoder that are one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.decoder = nn.Linear(4, 7, bias=False)
        self.decoder.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.decoder(self.embedding(tokens).mean(dim=1))


class Frozen(nn.Module):
    """A layer that is not trained before one that is."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(3, 3)
        self.backbone.requires_grad_(False)
        self.head = nn.Linear(3, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.backbone(inputs))


class Norm(nn.Module):
    """BatchNorm: running statistics that are saved, and an integer counter."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.norm(self.linear(inputs))


class Scratch(nn.Module):
    """Buffers that are not saved: one written in place, one assigned anew, one that is None at first."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1)
        self.register_buffer("in_place", torch.full((2,), 5.0), persistent=False)
        self.register_buffer("anew", torch.zeros(1), persistent=False)
        self.register_buffer("cache", None, persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        self.in_place += 1.0
        self.anew = self.anew + 1.0
        self.cache = inputs.detach().clone()
        return self.linear(inputs) + self.anew.sum()


class Mixed(nn.Module):
    """Parameters of four floating types."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            self.register_parameter(f"of_{name}", nn.Parameter(torch.randn(3, dtype=getattr(torch, name))))

    def forward(self, inputs: Tensor) -> Tensor:
        return sum(inputs @ each.to(inputs.dtype) for each in self.parameters())


class Reassigning(nn.Module):
    """A running mean that is assigned anew in forward, as many hand-written layers do, and an integer counter."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1)
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.5 * self.mean + 0.5 * inputs.detach().mean(dim=0)
            self.calls = self.calls + 1
        return self.linear(inputs - self.mean)


class Recurrent(nn.Module):
    """Two LSTM layers and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 5, num_layers=2, batch_first=True)
        self.head = nn.Linear(5, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.lstm(inputs)[0][:, -1])


def weight_norm() -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 1))


rows = torch.linspace(-1.0, 1.0, 18).reshape(6, 3)
MODULES = {
    "temperature": (Temperature, rows),
    "tied": (Tied, torch.arange(12).reshape(4, 3) % 7),
    "frozen": (Frozen, rows),
    "batchnorm": (Norm, rows),
    "non-persistent": (Scratch, rows),
    "float32+float64": (lambda: Mixed("float32", "float64"), rows.double()),
    "float32+halves": (lambda: Mixed("float32", "float16", "bfloat16"), rows),
    "halves": (lambda: Mixed("float16", "bfloat16"), rows),
    "reassigning": (Reassigning, rows),
    "lstm": (Recurrent, rows.reshape(2, 3, 3)),
    "weight_norm": (weight_norm, rows),
}
every_module = pytest.mark.parametrize(("build", "inputs"), MODULES.values(), ids=MODULES)


def flat(build) -> FlatModel:
    with computing(SeedTree.root(0)):
        return FlatModel(build())


def some_vector(model: FlatModel, seed: int = 1) -> np.ndarray:
    """Return positive values (a running variance is one) that half precision cannot represent."""
    return np.random.default_rng(seed).uniform(0.5, 1.5, model.spec.size).astype(model.spec.dtype)


def places(model: FlatModel) -> dict[str, slice]:
    return model.spec.slices


# -- what every module keeps ---------------------------------------------------------------------------------------


@every_module
def test_the_first_vector_is_the_modules_own_state(build, inputs) -> None:
    with computing(SeedTree.root(0)):
        module = build()
    saved = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    vector = FlatModel(module).vector()
    model = flat(build)
    assert model.vector().tobytes() == vector.tobytes()
    for entry in model.spec.entries:
        expected = saved[entry.name].to(torch.float64).numpy()
        found = vector[places(model)[entry.name]].astype(np.float64).reshape(entry.shape)
        assert np.array_equal(found, expected), entry.name


@every_module
def test_load_then_vector_is_the_identity_to_the_last_bit(build, inputs) -> None:
    model = flat(build)
    vector = some_vector(model)
    model.load(vector)
    assert model.vector().dtype == model.spec.dtype
    assert model.vector().tobytes() == vector.tobytes()


@every_module
def test_load_forgets_whatever_was_computed_before(build, inputs) -> None:
    fresh, used = flat(build), flat(build)
    for seed in (2, 3):
        used.load(some_vector(used, seed))
        used.module.train()
        used.module(inputs).sum().backward()
    vector = some_vector(used)
    for model in (fresh, used):
        model.load(vector)
        model.zero_gradient()
    assert used.vector().tobytes() == vector.tobytes()
    assert not used.collect_gradient().any()
    buffers = {name: tensor.clone() for name, tensor in fresh.module.named_buffers()}
    assert {name for name, _ in used.module.named_buffers()} == set(buffers)
    for name, tensor in used.module.named_buffers():
        assert torch.equal(tensor, buffers[name]), name
    for mode in (True, False):
        outputs = []
        for model in (fresh, used):
            model.load(vector)
            model.module.train(mode)
            outputs.append(model.module(inputs).detach())
        assert torch.equal(*outputs)


@every_module
def test_the_vector_is_what_the_module_computes_with(build, inputs) -> None:
    with computing(SeedTree.root(5)):
        plain = build()
    model = flat(build)
    model.load(FlatModel(build_like(plain, build)).vector())
    for module in (plain, model.module):
        module.eval()
    with torch.no_grad():
        assert torch.equal(plain(inputs), model.module(inputs))


def build_like(plain: nn.Module, build) -> nn.Module:
    """Return another module with the same state."""
    other = build()
    other.load_state_dict(plain.state_dict())
    return other


@every_module
def test_the_gradient_is_autograds_and_zero_where_nothing_is_trained(build, inputs) -> None:
    with computing(SeedTree.root(0)):
        plain, model = build(), flat(build)
    for module in (plain, model.module):
        module.train()
    model.zero_gradient()
    for module in (plain, model.module):
        module(inputs).square().sum().backward()
    gradient = model.collect_gradient().clone()
    assert gradient.shape == (model.spec.size,)
    assert not gradient[model.spec.trainable_size :].any()
    for name, parameter in plain.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert torch.equal(gradient[places(model)[name]], expected.reshape(-1).to(gradient.dtype)), name
    model.zero_gradient()
    assert not model.collect_gradient().any()


@every_module
def test_state_dict_is_the_modules_in_copies(build, inputs) -> None:
    model = flat(build)
    vector = some_vector(model)
    model.load(vector)
    saved = model.state_dict()
    assert set(saved) == set(model.module.state_dict())
    storages = {tensor.untyped_storage().data_ptr() for tensor in saved.values() if tensor.numel()}
    assert len(storages) == sum(tensor.numel() > 0 for tensor in saved.values()), "two share memory"
    assert all(tensor.is_contiguous() and not tensor.requires_grad for tensor in saved.values())
    for tensor in saved.values():
        tensor.zero_()
    assert model.vector().tobytes() == vector.tobytes()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    after = model.state_dict()
    model.load(some_vector(model, 9))
    assert all(torch.equal(after[name], before[name]) for name in before)
    fresh = build()
    fresh.load_state_dict(before)
    assert FlatModel(fresh).spec == model.spec


@every_module
def test_vector_is_a_copy(build, inputs) -> None:
    model = flat(build)
    vector = model.vector()
    kept = vector.copy()
    vector += 1.0
    assert model.vector().tobytes() == kept.tobytes()
    model.load(some_vector(model))
    assert np.array_equal(vector, kept + 1.0)


@every_module
def test_load_takes_read_only_memory_and_does_not_keep_it(build, inputs) -> None:
    model = flat(build)
    vector = some_vector(model)
    source = vector.copy()
    source.flags.writeable = False
    model.load(source)
    with torch.no_grad():
        model.flat += 1.0
    assert source.tobytes() == vector.tobytes()


@pytest.mark.parametrize("shape", [(), (1,), (2, 1), "long", "short"])
def test_load_broadcasts_nothing(shape) -> None:
    model = flat(Temperature)
    shape = {"long": (model.spec.size + 1,), "short": (model.spec.size - 1,)}.get(shape, shape)
    before = model.vector()
    with pytest.raises(ValueError, match="shape"):
        model.load(np.zeros(shape, dtype=np.float32))
    assert model.vector().tobytes() == before.tobytes()


# -- what each of them is here for ---------------------------------------------------------------------------------


def test_a_scalar_parameter_takes_one_place_and_is_trained() -> None:
    model = flat(Temperature)
    place = places(model)["temperature"]
    assert place.stop - place.start == 1
    assert model.vector()[place] == [2.0]
    vector = model.vector()
    vector[place] = 4.0
    model.load(vector)
    assert model.module.temperature.shape == ()
    assert model.module.temperature.item() == 4.0
    model.module(rows).sum().backward()
    assert float(model.collect_gradient()[place]) != 0.0


def test_tied_weights_are_one_entry_and_stay_tied() -> None:
    model = flat(Tied)
    assert [entry.name for entry in model.spec.entries] == ["embedding.weight"]
    model.load(some_vector(model))
    assert model.module.decoder.weight is model.module.embedding.weight
    assert set(model.state_dict()) == {"embedding.weight", "decoder.weight"}


def test_frozen_parameters_follow_the_trained_ones() -> None:
    model = flat(Frozen)
    assert [(entry.name, entry.trainable) for entry in model.spec.entries] == [
        ("head.weight", True),
        ("head.bias", True),
        ("backbone.weight", False),
        ("backbone.bias", False),
    ]
    assert model.spec.trainable_size == 4
    model.load(some_vector(model))
    assert not model.module.backbone.weight.requires_grad


def test_batchnorm_has_its_statistics_in_the_vector_and_its_counter_reset() -> None:
    model = flat(Norm)
    names = [entry.name for entry in model.spec.entries]
    assert names[-2:] == ["norm.running_mean", "norm.running_var"]
    assert "norm.num_batches_tracked" not in names
    start = model.vector()
    model.module.train()
    model.module(rows)
    assert int(model.module.norm.num_batches_tracked) == 1
    moved = model.vector()
    assert np.array_equal(moved[: model.spec.trainable_size], start[: model.spec.trainable_size])
    assert not np.array_equal(moved[places(model)["norm.running_mean"]], start[places(model)["norm.running_mean"]])
    model.load(moved)
    assert int(model.module.norm.num_batches_tracked) == 0
    assert model.vector().tobytes() == moved.tobytes()


def test_buffers_that_are_not_saved_are_not_federated() -> None:
    model = flat(Scratch)
    assert {entry.name for entry in model.spec.entries} == {"linear.weight", "linear.bias"}
    model.module(rows)
    assert model.module.cache is not None
    model.load(model.vector())
    assert model.module.in_place.tolist() == [5.0, 5.0]
    assert model.module.anew.tolist() == [0.0]
    assert model.module.cache is None


def test_a_buffer_assigned_anew_is_in_the_vector_and_set_by_load() -> None:
    model = flat(Reassigning)
    place = places(model)["mean"]
    model.module.train()
    model.module(rows)
    expected = 0.5 * rows.mean(dim=0).numpy()
    assert np.allclose(model.vector()[place], expected)
    vector = model.vector()
    vector[place] = [1.0, 2.0, 3.0]
    model.load(vector)
    assert model.module.mean.tolist() == [1.0, 2.0, 3.0]
    assert int(model.module.calls) == 0
    assert model.state_dict()["mean"].tolist() == [1.0, 2.0, 3.0]


def test_the_vector_has_the_widest_type() -> None:
    assert flat(lambda: Mixed("float32", "float64")).spec.dtype == np.float64
    assert flat(lambda: Mixed("float32", "float16", "bfloat16")).spec.dtype == np.float32
    assert flat(lambda: Mixed("float16")).spec.dtype == np.float32


def test_half_precision_is_computed_in_half_and_kept_in_full() -> None:
    model = flat(lambda: Mixed("float16"))
    vector = np.array([1.0001, 2.0001, 0.30001], dtype=np.float32)
    model.load(vector)
    assert model.module.of_float16.dtype == torch.float16
    assert np.array_equal(model.module.of_float16.detach().numpy(), vector.astype(np.float16))
    assert model.vector().tobytes() == vector.tobytes()
    assert model.state_dict()["of_float16"].dtype == torch.float16


def test_what_a_module_writes_into_a_narrower_entry_itself_is_kept() -> None:
    model = flat(lambda: nn.Sequential(nn.Linear(3, 4).double(), ToSingle(), nn.BatchNorm1d(4)))
    place = places(model)["2.running_mean"]
    assert model.spec.dtype == np.float64
    model.load(some_vector(model))
    before = model.vector()[place]
    model.module.train()
    model.module(rows.double())
    assert not np.array_equal(model.vector()[place], before)
    assert np.array_equal(model.vector()[place], model.module[2].running_mean.double().numpy())


class ToSingle(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.float()


def test_weight_norm_federates_what_it_is_made_of() -> None:
    model = flat(weight_norm)
    names = {entry.name for entry in model.spec.entries}
    assert {"0.parametrizations.weight.original0", "0.parametrizations.weight.original1"} <= names
    assert "0.weight" not in names


# -- what is refused -----------------------------------------------------------------------------------------------


def test_a_buffer_that_changes_its_shape_is_refused() -> None:
    model = flat(Reassigning)
    model.module.mean = torch.zeros(1)
    with pytest.raises(TaskError, match=r"mean from \(3,\) to \(1,\)"):
        model.vector()


class Builds(Task):
    """A task whose model is given."""

    def __init__(self, build) -> None:
        self.build = build

    def build_model(self) -> nn.Module:
        return self.build()


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (nn.Identity, "no trainable parameter"),
        (lambda: nn.Linear(2, 2).requires_grad_(False), "no trainable parameter"),
        (lambda: nn.BatchNorm1d(2, affine=False), "no trainable parameter"),
        (lambda: None, "NoneType"),
        (lambda: nn.Linear, "torch.nn.Module"),
        (lambda: nn.Linear(2, 2, device="meta"), "CPU"),
        (lambda: nn.Linear(2, 2, dtype=torch.complex64), "complex64"),
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, dtype=torch.complex64)), "complex64"),
        (lambda: nn.LazyLinear(2), "input"),
    ],
    ids=["empty", "all frozen", "buffers only", "nothing", "class", "meta", "complex", "partly complex", "lazy"],
)
def test_a_model_that_cannot_be_federated_is_the_tasks_fault(build, told) -> None:
    with pytest.raises(TaskError, match=told):
        build_flat_model(Builds(build), SeedTree.root(0))


def test_the_same_seed_builds_the_same_model_and_another_another() -> None:
    task = Builds(Norm)
    torch.manual_seed(77)
    before = torch.get_rng_state()
    vectors = [build_flat_model(task, SeedTree.root(seed)).vector().tobytes() for seed in (0, 0, 1)]
    assert vectors[0] == vectors[1] != vectors[2]
    assert torch.equal(torch.get_rng_state(), before)
