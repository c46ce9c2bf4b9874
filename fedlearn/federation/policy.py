"""What a client lets leave, by the privacy of the run: decided on the client, whatever the server asks for."""

from __future__ import annotations

import numpy as np

from fedlearn.arrays import ParamSpec, Vector
from fedlearn.errors import ReplyError
from fedlearn.federation.messages import FailureCode, RoundPlan
from fedlearn.learning import Evaluation, Trained
from fedlearn.privacy.clipping import ClippedUpdate, Update, clip

__all__ = ["clipped_update", "evaluation_numbers", "trained_part", "training_numbers"]


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


def trained_part(vector: Vector, spec: ParamSpec) -> Vector:
    """Return a copy of a vector of shape (d,) with zero for everything that no gradient trains."""
    part: Vector = vector.copy()
    part[spec.trainable_size :] = 0
    return part


def training_numbers(plan: RoundPlan, trained: Trained, clipped: ClippedUpdate | None) -> dict[str, int | float]:
    """Return the numbers that leave beside an update: where privacy is promised, at most adaptive clipping's bit."""
    if plan.config.privacy.unit == "none":
        return {"num-examples": min(trained.num_examples, plan.weight_cap()), "loss": trained.mean_loss}
    if clipped is not None and plan.config.privacy.adaptive_clipping:
        return {"within-bound": int(clipped.within)}
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
