"""DP-SGD on one client: Poisson batches, a clipped sum, noise of the stated deviation, and nothing else."""

from __future__ import annotations

import math
import sys
import warnings
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedlearn.config import TrainingConfig
from fedlearn.errors import DataError, DependencyError
from fedlearn.learning import Examples, FlatModel, Task, dpsgd, local_steps, train
from fedlearn.learning.dpsgd import DpSgd, planned_release, sample_rate, train_private
from fedlearn.privacy.noise import SecureNoise, SimulatedNoise
from fedlearn.sources import SecureRandom, SeedTree

pytest.importorskip("opacus")
MODES = ("hooks", "functorch", "ghost")
every_mode = pytest.mark.parametrize("mode", MODES)
seeds = SeedTree.root(5)


class Classify(Task):
    """Three classes."""

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(output, target, reduction="none")


class Flat(Task):
    """A loss whose gradient is zero, but not where the model is compared with autograd."""

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return output.square().sum(dim=1) * 0.0


def mlp() -> FlatModel:
    torch.manual_seed(0)
    return FlatModel(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)))


def some_examples(count: int = 21) -> Examples:
    generator = torch.Generator().manual_seed(0)
    return Examples(torch.randn(count, 6, generator=generator), torch.arange(count) % 3)


def setting(**changes) -> TrainingConfig:
    return TrainingConfig(**{"batch_size": 4, "local_steps": 5, "learning_rate": 0.1, **changes})


def private(
    training=None, *, model=None, task=None, examples=None, z=1.0, bound=1.0, mode="functorch", noise=None, **more
):
    model = model or mlp()
    received = more.pop("received", None)
    return train_private(
        model,
        task or Classify(),
        model.vector() if received is None else received,
        some_examples() if examples is None else examples,
        training or setting(),
        proximal_mu=more.pop("proximal_mu", 0.0),
        dp=DpSgd(noise_multiplier=z, bound_l2=bound, mode=mode),
        seeds=seeds,
        noise=noise or SimulatedNoise(seeds),
        **more,
    )


# -- without noise and clipping it is plain training ---------------------------------------------------------------

NEARLY_NONE = {"z": 1e-9, "bound": 1e3}


@every_mode
@pytest.mark.parametrize("changes", [{}, {"momentum": 0.9}], ids=["plain", "momentum"])
@pytest.mark.parametrize("proximal_mu", [0.0, 0.5])
def test_whole_batches_without_noise_are_plain_training(mode, changes, proximal_mu) -> None:
    training = setting(batch_size=0, local_steps=4, **changes)
    model = mlp()
    received = model.vector()
    plain = train(model, Classify(), received, some_examples(), training, proximal_mu=proximal_mu, seeds=seeds)
    result = private(training, model=model, received=received, mode=mode, proximal_mu=proximal_mu, **NEARLY_NONE)
    np.testing.assert_allclose(result.trained.update.vector, plain.update.vector, rtol=1e-3, atol=2e-5)
    assert (result.trained.steps, result.trained.num_examples) == (plain.steps, plain.num_examples)
    assert result.trained.mean_loss == pytest.approx(plain.mean_loss, rel=1e-4)


def test_the_modes_train_the_same_model() -> None:
    one, two, three = (private(mode=mode, bound=0.1).trained.update.vector for mode in MODES)
    np.testing.assert_allclose(one, two, atol=2e-5)
    np.testing.assert_allclose(one, three, atol=2e-5)


@every_mode
def test_a_resident_model_trains_the_next_client_as_a_fresh_one(mode) -> None:
    model = mlp()
    received = model.vector()
    first = private(model=model, received=received, mode=mode).trained.update.vector
    private(model=model, received=received + 1, mode=mode, examples=some_examples(9))
    again = private(model=model, received=received, mode=mode).trained.update.vector
    assert np.array_equal(first, again)


# -- batches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "changes", "rate", "steps"),
    [
        (72, {"batch_size": 16, "local_steps": None, "local_epochs": 2}, 16 / 72, 10),
        (72, {"batch_size": 16}, 16 / 72, 5),
        (72, {"batch_size": 0}, 1.0, 5),
        (10, {"batch_size": 16, "local_steps": None, "local_epochs": 3}, 1.0, 3),
        (16, {"batch_size": 16}, 1.0, 5),
    ],
)
def test_q_is_the_batch_size_over_n_and_an_epoch_is_one_over_q_steps_rounded_up(size, changes, rate, steps) -> None:
    training = setting(**changes)
    assert sample_rate(size, training) == rate
    assert local_steps(size, training) == steps


def test_opacus_takes_q_for_one_over_the_loaders_length_and_not_the_batch_over_n() -> None:
    """72 examples in batches of 16: Opacus draws and accounts q = 1/5; ours is 16/72, and the steps follow from it."""
    from opacus import PrivacyEngine
    from torch.utils.data import DataLoader, TensorDataset

    loader = DataLoader(TensorDataset(torch.zeros(72, 6)), batch_size=16)
    model = nn.Linear(6, 3)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Secure RNG turned off")  # torchcsprng cannot be installed
        engine = PrivacyEngine(accountant="rdp")
    _, _, private_loader = engine.make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data_loader=loader,
        noise_multiplier=1.0, max_grad_norm=1.0,
    )  # fmt: skip
    assert private_loader.sample_rate == 1 / 5
    assert sample_rate(72, setting(batch_size=16)) == 16 / 72 > 1 / 5


def test_batches_are_poisson_and_none_is_truncated_to_a_largest_size(monkeypatch) -> None:
    count, sizes = 2000, [0]

    @contextmanager
    def counting(model, task, mode):
        def clipped_sum(inputs, targets, bound):
            sizes.append(len(targets))
            return torch.zeros(model.spec.trainable_size, dtype=torch.float64), torch.zeros(len(targets))

        yield clipped_sum

    monkeypatch.setattr(dpsgd, "summing", counting)
    monkeypatch.setattr(dpsgd, "noised_step", lambda total, dp, noise, number: total)
    private(setting(batch_size=5, local_steps=count), examples=some_examples(50))
    sizes += [0] * (count + 1 - len(sizes))  # an empty batch computes nothing
    drawn = np.array(sizes[1:])
    assert drawn.max() > 10, "a cut at twice the expected size would change the distribution that is accounted"
    assert drawn.min() == 0
    assert drawn.mean() == pytest.approx(5, abs=5 * math.sqrt(4.5 / count))
    assert drawn.var() == pytest.approx(50 * 0.1 * 0.9, rel=0.2), "shuffled batches would have no variance at all"


def test_an_empty_batch_is_a_step_of_noise_alone(monkeypatch) -> None:
    monkeypatch.setattr(dpsgd, "bernoulli", lambda stream, probability, size: np.zeros(size, dtype=bool))
    result = private(setting(local_steps=3))
    assert result.trained.steps == 3
    assert np.all(result.trained.update.vector != 0.0)


def test_a_part_of_a_batch_at_a_time_adds_up_to_the_batch(monkeypatch) -> None:
    whole = private(setting(batch_size=0)).trained.update.vector
    monkeypatch.setattr(dpsgd, "_MOST_NUMBERS", 4 * mlp().spec.size)
    assert [len(each) for each in dpsgd._portions(torch.arange(10), mlp().spec.size)] == [4, 4, 2]
    np.testing.assert_allclose(private(setting(batch_size=0)).trained.update.vector, whole, atol=1e-6)


# -- noise ---------------------------------------------------------------------------------------------------------


@every_mode
def test_a_model_without_gradient_moves_by_noise_of_the_stated_deviation_whatever_the_realised_batch(
    mode, monkeypatch
) -> None:
    monkeypatch.setattr(dpsgd, "check_once", lambda *each: None)  # there is no gradient to compare
    torch.manual_seed(0)
    model = FlatModel(nn.Sequential(nn.Linear(6, 2000), nn.Linear(2000, 20)))
    training = setting(batch_size=4, local_steps=9, learning_rate=0.05)
    moved = private(training, model=model, task=Flat(), examples=some_examples(21), z=1.7, bound=0.3, mode=mode)
    expected = 1.7 * 0.3 / 4 * 0.05 * math.sqrt(9)
    vector = moved.trained.update.vector
    assert len(vector) > 50_000
    assert np.std(vector) == pytest.approx(expected, rel=5 / math.sqrt(2 * len(vector)))
    assert abs(np.mean(vector)) < 5 * expected / math.sqrt(len(vector))


def test_the_noise_does_not_shrink_with_a_large_batch_nor_grow_with_a_small_one(monkeypatch) -> None:
    moved = []
    for taken in (0, 21):
        monkeypatch.setattr(dpsgd, "bernoulli", lambda stream, p, size, taken=taken: np.arange(size) < taken)
        monkeypatch.setattr(dpsgd, "check_once", lambda *each: None)
        moved.append(private(setting(local_steps=1), task=Flat()).trained.update.vector)
    assert np.array_equal(*moved)


def test_one_example_changes_a_step_by_no_more_than_the_bound(monkeypatch) -> None:
    """The same noise with and without an example: what remains is that example's share, at most bound · lr / (q n)."""
    examples = some_examples(21)
    training = setting(local_steps=1, batch_size=4)
    monkeypatch.setattr(dpsgd, "bernoulli", lambda stream, probability, size: np.ones(size, dtype=bool))
    for mode in MODES:
        model = mlp()
        received = 5 * model.vector()
        one = private(training, model=model, received=received, examples=examples, mode=mode, bound=0.5)
        less = examples.take(np.arange(20))
        two = private(training, model=model, received=received, examples=less, mode=mode, bound=0.5)
        gap = np.linalg.norm(one.trained.update.vector.astype(float) - two.trained.update.vector)
        assert 0.01 < gap <= 0.5 * 0.1 / 4 * 1.0001


def test_the_same_torch_manual_seed_on_two_clients_or_rounds_gives_identical_noise_with_opacus_and_not_here() -> None:
    from opacus.optimizers.optimizer import _generate_noise

    drawn = []
    for _ in ("client 1", "client 2"):
        torch.manual_seed(0)
        drawn.append(_generate_noise(1.0, torch.zeros(100)))
    assert torch.equal(*drawn), "the fault: it can be subtracted"
    vectors = []
    for where in (("round", 1, "client", 1), ("round", 1, "client", 2), ("round", 2, "client", 1)):
        torch.manual_seed(0)
        vectors.append(private(noise=SimulatedNoise(seeds.child(*where))).trained.update.vector)
    torch.manual_seed(0)
    secure = [private(noise=SecureNoise(SecureRandom())).trained.update.vector for _ in range(2)]
    for i, one in enumerate([*vectors, *secure]):
        for two in [*vectors, *secure][:i]:
            assert np.mean(one == two) < 0.1
    again = private(noise=SimulatedNoise(seeds.child("round", 1, "client", 1))).trained.update.vector
    assert np.array_equal(again, vectors[0]), "a simulation can be repeated"


def test_what_the_model_draws_itself_is_as_secret_as_the_noise() -> None:
    """With masks that a server could draw again, taking an example out would change the masks of all others."""
    torch.manual_seed(0)
    model = FlatModel(nn.Sequential(nn.Linear(6, 50), nn.Dropout(0.5), nn.Linear(50, 3)))
    received = model.vector()
    one, two = (
        private(
            setting(batch_size=0, local_steps=1),
            model=model,
            received=received,
            noise=SecureNoise(SecureRandom()),
            z=1e-9,
        )
        for _ in range(2)
    )
    assert np.linalg.norm(one.trained.update.vector - two.trained.update.vector) > 1e-3


# -- what else leaves ----------------------------------------------------------------------------------------------


@every_mode
def test_what_is_not_trained_does_not_move_and_does_not_leave(mode) -> None:
    module = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    module[0].requires_grad_(False)
    module.register_buffer("note", torch.ones(4))
    model = FlatModel(module)
    vector = private(model=model, mode=mode).trained.update.vector
    assert not vector[model.spec.trainable_size :].any()
    assert vector[: model.spec.trainable_size].all()


def test_momentum_goes_on_where_the_round_before_ended() -> None:
    training = setting(batch_size=0, local_steps=4, momentum=0.9)
    model = mlp()
    received = model.vector()
    whole = private(training, model=model, received=received, **NEARLY_NONE)
    half = replace(training, local_steps=2)
    one = private(half, model=model, received=received, **NEARLY_NONE)
    middle = received + one.trained.update.vector
    two = private(half, model=model, received=middle, velocity=one.velocity, **NEARLY_NONE)
    np.testing.assert_allclose(two.velocity, whole.velocity, rtol=1e-3, atol=1e-5)
    assert one.velocity.shape == (model.spec.trainable_size,)
    assert private().velocity is None
    with pytest.raises(ValueError, match="velocity"):
        private(training, velocity=np.zeros(3, dtype=np.float32))


def test_the_planned_release_says_what_is_done() -> None:
    dp = DpSgd(noise_multiplier=1.5, bound_l2=0.2, mode="hooks")
    release = planned_release(
        round_number=3, size=72, training=setting(batch_size=16), dp=dp, simulated=True, evidence={"run": "x"}
    )
    assert (release.what, release.unit, release.mechanism, release.adjacency) == (
        "update",
        "example",
        "gaussian",
        "add-remove",
    )
    assert (release.sampling.method, release.sampling.rate, release.sampling.population) == ("poisson", 16 / 72, 72)
    assert release.steps == 5
    assert release.noise_multiplier == pytest.approx(1.5)
    whole = planned_release(round_number=3, size=72, training=setting(batch_size=0), dp=dp, simulated=True, evidence={})
    assert (whole.sampling.method, whole.sampling.rate) == ("everyone", 1.0)


# -- refusals ------------------------------------------------------------------------------------------------------


def test_no_example_is_no_training() -> None:
    with pytest.raises(DataError):
        private(examples=Examples(torch.zeros(0, 6), torch.zeros(0, dtype=torch.long)))


@pytest.mark.parametrize("changes", [{"noise_multiplier": 0.0}, {"noise_multiplier": math.nan}, {"bound_l2": math.inf}])
def test_no_noise_and_no_bound_are_refused(changes) -> None:
    with pytest.raises(ValueError, match="above 0"):
        DpSgd(**{"noise_multiplier": 1.0, "bound_l2": 1.0, "mode": "hooks", **changes})


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_without_opacus_the_error_names_the_extra(mode, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "opacus.grad_sample", None)
    with pytest.raises(DependencyError, match="example-privacy"):
        private(mode=mode)


def test_an_example_whose_loss_is_not_finite_does_not_end_the_training() -> None:
    examples = some_examples(9)
    examples.inputs[8] = math.inf
    result = private(setting(batch_size=0), examples=examples)
    assert np.isfinite(result.trained.update.vector).all()


@every_mode
@pytest.mark.parametrize("value", [0.0, math.nan])
def test_data_without_a_gradient_do_not_end_the_training(mode, value) -> None:
    """Whether training fails is seen by the server: it may not depend on what the examples are."""
    torch.manual_seed(0)
    model = FlatModel(nn.Sequential(nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 3, bias=False)))
    examples = Examples(torch.full((9, 6), value), torch.zeros(9, dtype=torch.long))
    result = private(model=model, examples=examples, mode=mode)
    assert np.isfinite(result.trained.update.vector).all()
    assert result.trained.update.vector.any()
