"""What a client lets leave, by the privacy of the run: decided on the client, whatever the server asks for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedlearn.arrays import ParamSpec, Vector, vector_sha256
from fedlearn.errors import ReplyError
from fedlearn.federation.messages import FailureCode, RoundPlan
from fedlearn.learning import Evaluation, Examples, FlatModel, Task, Trained, check_prepare, local_steps
from fedlearn.learning.account import ClientAccount
from fedlearn.learning.dpsgd import DpSgd, planned_release, sample_rate, train_private
from fedlearn.privacy.clipping import ClippedUpdate, Update, clip
from fedlearn.privacy.noise import Noise
from fedlearn.sources import SeedTree

__all__ = [
    "Learned",
    "clipped_update",
    "evaluation_numbers",
    "hide_examples",
    "maskable",
    "train_hiding_examples",
    "trained_part",
    "training_numbers",
]


@dataclass(frozen=True, kw_only=True, eq=False)
class Learned:
    """What a client learned in a round, before it is decided what of it leaves.

    Attributes:
        update: its update; clipped where that hides it.
        num_examples: of its training examples.
        mean_loss: its mean training loss.
    """

    update: Update | ClippedUpdate
    num_examples: int = 0
    mean_loss: float = 0.0


def clipped_update(plan: RoundPlan, trained: Trained, spec: ParamSpec) -> ClippedUpdate:
    """Return the update that hides a client among others once the server has added noise to the sum.

    Only what is trained by gradient is in it; a buffer that training changed (a running mean) stays here. Under
    ``weighting = "examples"`` the clipped update is scaled by the client's share of ``max-examples``, so that the
    number itself does not leave and no client counts for more than one.

    Raises:
        ReplyError: ``bad-request`` where the round has no clipping norm.
    """
    if plan.bound_l2 is None or not plan.bound_l2 > 0:
        raise ReplyError(FailureCode.BAD_REQUEST, "a round that hides clients needs a clipping norm")
    clipped = clip(Update(trained_part(trained.update.vector, spec)), plan.bound_l2)
    training = plan.config.training
    if training.weighting == "uniform":
        return clipped
    share = min(trained.num_examples, training.max_examples) / training.max_examples
    scaled = (clipped.vector.astype(np.float64) * share).astype(clipped.vector.dtype)
    return ClippedUpdate(vector=scaled, bound_l2=clipped.bound_l2, within=clipped.within, finite=clipped.finite)


def maskable(plan: RoundPlan, learned: Learned, spec: ParamSpec) -> tuple[ClippedUpdate, int]:
    """Return what a client gives into a masked sum: its update within the round's bound, and its weight.

    Where clients are hidden that is what is trained by gradient, clipped already; else all that the model has.

    Raises:
        ReplyError: ``bad-request`` where the round has no clipping norm.
    """
    if plan.bound_l2 is None or not plan.bound_l2 > 0:
        raise ReplyError(FailureCode.BAD_REQUEST, "a round whose updates are masked needs a clipping norm")
    training, update = plan.config.training, learned.update
    if plan.config.privacy.unit == "client":
        if not isinstance(update, ClippedUpdate):
            raise TypeError("an update that is to hide its client is clipped first")
        trained = update.vector[: spec.trainable_size]
        return ClippedUpdate(vector=trained, bound_l2=update.bound_l2, within=update.within, finite=update.finite), 1
    clipped = clip(Update(update.vector), plan.bound_l2)  # a zero where training diverged, which no server is told
    weighted = training.weighting == "examples"
    return clipped, max(1, min(learned.num_examples, training.max_examples)) if weighted else 1


def train_hiding_examples(
    plan: RoundPlan,
    model: FlatModel,
    task: Task,
    received: Vector,
    examples: Examples,
    *,
    account: ClientAccount,
    seeds: SeedTree,
    noise: Noise,
) -> Vector:
    """Return an update that hides every example of a client, once the client's own ledger has it.

    The ledger has the release before training begins: whatever becomes of it, an update, an error or a killed process,
    a server that asks again has been told something, and that is counted.

    Args:
        plan: what the round asks for.
        model: a model of the task; its state is overwritten.
        task: the learning problem.
        received: the server's parameters, shape (d,).
        examples: the client's training examples, at least two.
        account: this client's ledger and its owner's limit.
        seeds: this client's in this round.
        noise: this client's in this round: secret on a device.

    Raises:
        ReplyError: ``budget-spent`` where the limit would be exceeded, ``refused`` where the promise cannot be kept.
        TaskError: the model has a layer that cannot be trained so, or the task puts one example into others.
    """
    training, number = plan.config.training, plan.round_number
    model_sha256 = vector_sha256(received).hex()
    dp = hide_examples(plan, task, model_sha256, len(examples), account=account, simulated=noise.simulated)
    result = train_private(
        model,
        task,
        received,
        examples,
        training,
        proximal_mu=plan.proximal_mu,
        dp=dp,
        seeds=seeds,
        noise=noise,
        velocity=account.velocity_before(plan.run, number),
    )
    if result.velocity is not None:
        account.keep_velocity(plan.run, number, result.velocity)
    return result.trained.update.vector


def hide_examples(
    plan: RoundPlan, task: Task, model_sha256: str, size: int, *, account: ClientAccount, simulated: bool
) -> DpSgd:
    """Return what is done to every gradient of a client with ``size`` examples, once its own ledger has the release.

    Args:
        plan: what the round asks for.
        task: the learning problem.
        model_sha256: the hash of the parameters that were received, as ledgers have it.
        size: how many training examples the client has.
        account: this client's ledger and its owner's limit.
        simulated: whether the noise can be drawn again.

    Raises:
        ReplyError: ``budget-spent`` where the limit would be exceeded, ``refused`` where the promise cannot be kept.
        TaskError: the task puts one example into others.
    """
    check_prepare(task)
    privacy, training = plan.config.privacy, plan.config.training
    rate, steps, rounds = sample_rate(size, training), local_steps(size, training), plan.config.federation.rounds
    with account.exclusive():
        multiplier = account.noise_multiplier(privacy, run=plan.run, rounds=rounds, rate=rate, steps=steps)
        dp = DpSgd(noise_multiplier=multiplier, bound_l2=privacy.bound_l2, mode=privacy.grad_sample_mode)
        release = planned_release(
            round_number=plan.round_number,
            size=size,
            training=training,
            dp=dp,
            simulated=simulated,
            evidence={"run": plan.run, "model-before": model_sha256},
        )
        account.record(release)
    return dp


def trained_part(vector: Vector, spec: ParamSpec) -> Vector:
    """Return a copy of a vector of shape (d,) with zero for everything that no gradient trains."""
    part: Vector = vector.copy()
    part[spec.trainable_size :] = 0
    return part


def training_numbers(plan: RoundPlan, learned: Learned) -> dict[str, int | float]:
    """Return the numbers that leave beside an update: where privacy is promised, at most adaptive clipping's bit."""
    if plan.config.privacy.unit == "none":
        return {"num-examples": min(learned.num_examples, plan.weight_cap()), "loss": learned.mean_loss}
    if isinstance(learned.update, ClippedUpdate) and plan.config.privacy.adaptive_clipping:
        return {"within-bound": int(learned.update.within)}
    return {}


def evaluation_numbers(
    plan: RoundPlan, evaluation: Evaluation, metric_names: tuple[str, ...]
) -> dict[str, int | float]:
    """Return what a client says of a model: sums and a count, or where clients are hidden its bounded means alone.

    Raises:
        ReplyError: ``refused`` where nothing may leave un-noised, ``bad-data`` where a metric is not there.
    """
    unit, means = plan.config.privacy.unit, evaluation.means()
    if unit == "none":
        count = min(evaluation.num_examples, plan.config.training.max_examples)
        return {"num-examples": count, **{name: mean * count for name, mean in means.items()}}
    if unit == "example" or plan.config.federation.evaluation not in ("federated", "both"):
        raise ReplyError(FailureCode.REFUSED, "what a model is worth on this client's data does not leave it")
    if not metric_names or not set(metric_names) <= set(means):
        raise ReplyError(FailureCode.BAD_DATA, "the task's metric_names are not among its metrics")
    return {name: float(np.clip(np.nan_to_num(means[name], nan=0.0), 0.0, 1.0)) for name in metric_names}
