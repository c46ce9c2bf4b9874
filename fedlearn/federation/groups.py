"""Many clients of a simulation in one answer: what they learned as one sum, and what is counted of each.

Only a simulation asks so, of clients to whom nothing but the ordinary happens in a round; on devices every client has a
message of its own, and refuses this one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedlearn.arrays import Vector, vector_sha256
from fedlearn.errors import ReplyError
from fedlearn.federation.messages import Failure, FailureCode, GroupReply, RoundPlan
from fedlearn.federation.policy import hide_examples
from fedlearn.learning import Examples, FlatModel, Task
from fedlearn.learning.account import ClientAccount
from fedlearn.learning.example_gradients import clip_factors
from fedlearn.learning.vectorized import GroupTrained, Member, Vectorised, train_group
from fedlearn.privacy.clipping import ClippedGroup
from fedlearn.privacy.noise import Noise
from fedlearn.sources import SeedTree

__all__ = ["Asked", "check_group_reply", "group_size", "learn_group"]

_MOST_GROUPED = 64


def group_size(cohort: int) -> int:
    """Return how many clients of a cohort are trained at once: what two workers share, and 64 at most.

    A message costs a few milliseconds, so that many clients share one; and how a cohort is cut must not depend on how
    many workers there are, since the sum of a group is rounded as one.

    >>> [group_size(cohort) for cohort in (0, 1, 20, 100, 1000, 10_000)]
    [1, 1, 10, 50, 63, 64]
    """
    pairs = max(1, -(-cohort // (2 * _MOST_GROUPED)))
    return max(1, -(-cohort // (2 * pairs)))


@dataclass(frozen=True, kw_only=True, eq=False)
class Asked:
    """One client of a group, as the process that trains it sees it.

    Attributes:
        client: its number.
        load: gives its training examples.
        seeds: its own in this round.
        noise: its own in this round.
        account: gives its own ledger, of so many examples; asked only where its examples are hidden.
    """

    client: int
    load: Callable[[], Examples]
    seeds: SeedTree
    noise: Noise
    account: Callable[[int], ClientAccount]


def learn_group(
    plan: RoundPlan,
    trainer: Vectorised,
    model: FlatModel,
    task: Task,
    received: Vector,
    asked: Sequence[Asked],
    log: Callable[[int, BaseException], str],
) -> tuple[NDArray[Any], dict[str, Any]]:
    """Train many clients at once; return their sum and what is counted of each.

    A client that cannot load its data, or whose owner permits no more, is left out with its code; one whose training
    diverged is left out too, or counts as a zero update where that must not be told.

    Args:
        plan: what the round asks for.
        trainer: which kernel.
        model: a model of the task; its state is overwritten.
        task: the learning problem.
        received: the server's parameters, shape (d,).
        asked: the clients.
        log: what a client's own log is told of an exception; returns the incident's number.

    Returns:
        The sum, shape (d,), in the model's own type, or of clipped updates, shape (trained,), float64; and lists by
        name: ``respondents``, ``weights``, ``losses``, ``within``, ``failed``, ``codes``, ``incidents``.
    """
    hidden, failures = plan.config.privacy.unit, list[tuple[int, str, str]]()
    present: list[tuple[Asked, Member, ClientAccount | None]] = []
    model_sha256 = vector_sha256(received).hex() if hidden == "example" else ""
    for each in asked:
        try:
            present.append((each, *_member(plan, task, model_sha256, each)))
        except ReplyError as error:
            failures.append((each.client, str(error.code), log(each.client, error)))
        except (Exception, SystemExit) as error:
            failures.append((each.client, str(FailureCode.TRAINING_FAILED), log(each.client, error)))
    length = model.spec.trainable_size if plan.bound_l2 is not None else model.spec.size
    if not present:
        dtype = np.float64 if plan.bound_l2 is not None else model.spec.dtype
        return np.zeros(length, dtype=dtype), _counted([], [], [], 0, failures)
    members = [member for _, member, _ in present]
    trained = train_group(trainer, model, task, received, members, plan.config.training, proximal_mu=plan.proximal_mu)
    clipped = hidden == "client"
    weights = np.array([_weight(plan, len(member.examples)) for member in members], dtype=np.int64)
    diverged, within = np.zeros(len(members), dtype=np.bool_), 0
    if clipped:
        diverged = ~trained.finite()
        factors, within = _clipped(plan, trained, members, diverged)
        total = trained.weighted(factors, exact=True)[:length]
    else:
        total = trained.weighted(weights.astype(np.float64))
        if not (np.isfinite(total).all() and np.isfinite(trained.mean_losses).all()):  # it takes one to spoil it
            diverged = ~trained.finite()
            total = trained.weighted(np.where(diverged, 0.0, weights))
    left_out = diverged & (not clipped)
    for (_, _, account), velocity in zip(present, trained.velocities, strict=True):
        if account is not None and velocity is not None:
            account.keep_velocity(plan.run, plan.round_number, velocity)
    for place in np.flatnonzero(diverged):
        client = present[place][0].client
        said = ReplyError(FailureCode.NOT_FINITE, "local training diverged; a lower learning rate may help")
        incident = log(client, said)
        if left_out[place]:
            failures.append((client, str(FailureCode.NOT_FINITE), incident))
    kept = [place for place in range(len(members)) if not left_out[place]]
    return total, _counted(
        [present[place][0].client for place in kept],
        [int(weights[place]) for place in kept],
        [float(trained.mean_losses[place]) for place in kept] if hidden == "none" else [],
        within,
        failures,
    )


def _member(plan: RoundPlan, task: Task, model_sha256: str, each: Asked) -> tuple[Member, ClientAccount | None]:
    """Return one client, with its examples and, where they are hidden, what its own ledger has admitted."""
    examples = each.load()
    if len(examples) == 0:
        raise ReplyError(FailureCode.NO_DATA, "no training examples")
    if plan.config.privacy.unit != "example":
        return Member(examples=examples, seeds=each.seeds), None
    account = each.account(len(examples))
    dp = hide_examples(plan, task, model_sha256, len(examples), account=account, simulated=each.noise.simulated)
    velocity = account.velocity_before(plan.run, plan.round_number)
    return Member(examples=examples, seeds=each.seeds, dp=dp, noise=each.noise, velocity=velocity), account


def _weight(plan: RoundPlan, examples: int) -> int:
    """Return what a client counts in the mean."""
    if plan.config.privacy.unit != "none":
        return 1
    return max(1, min(examples, plan.weight_cap()))


def _clipped(
    plan: RoundPlan, trained: GroupTrained, members: Sequence[Member], diverged: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], int]:
    """Return what brings each update within the round's bound, and how many were; one that diverged becomes zero."""
    if plan.bound_l2 is None or not plan.bound_l2 > 0:
        raise ReplyError(FailureCode.BAD_REQUEST, "a round that hides clients needs a clipping norm")
    norms = trained.norms()
    factors: NDArray[np.float64] = clip_factors(torch.from_numpy(norms), plan.bound_l2).numpy()
    factors = np.where(diverged, 0.0, factors)
    training = plan.config.training
    if training.weighting == "examples":
        held = np.array([min(len(member.examples), training.max_examples) for member in members])
        factors = factors * (held / training.max_examples)
    return factors, int((norms <= plan.bound_l2).sum())


def _counted(
    respondents: list[int],
    weights: list[int],
    losses: list[float],
    within: int,
    failures: Sequence[tuple[int, str, str]],
) -> dict[str, Any]:
    """Return what is said beside the sum."""
    return {
        "respondents": respondents,
        "weights": weights,
        "losses": losses,
        "within": within,
        "failed": [client for client, _, _ in failures],
        "codes": [code for _, code, _ in failures],
        "incidents": [incident for _, _, incident in failures],
    }


def check_group_reply(
    members: Sequence[int],
    total: NDArray[Any],
    counted: Mapping[str, Any],
    *,
    plan: RoundPlan,
    upload_bytes: int,
    download_bytes: int,
) -> GroupReply:
    """Return a group's answer if every part of it is as the round asked.

    Args:
        members: who was asked.
        total: the sum, of the right length.
        counted: what ``learn_group`` said beside it.
        plan: what was asked for.
        upload_bytes: the length of one client's own answer.
        download_bytes: the length of one client's own message.

    Raises:
        ReplyError: with the code ``bad-reply`` or ``not-finite``.
    """
    respondents, failed = list(counted["respondents"]), list(counted["failed"])
    if sorted([*respondents, *failed]) != sorted(members):
        raise ReplyError(FailureCode.BAD_REPLY, "a group's answer speaks for each of its members once")
    weights, losses, cap = list(counted["weights"]), list(counted["losses"]), plan.weight_cap()
    told = plan.config.privacy.unit == "none"
    if len(weights) != len(respondents) or len(losses) != (len(respondents) if told else 0):
        raise ReplyError(FailureCode.BAD_REPLY, "a group's answer has a weight, and where it may a loss, of each")
    if not all(1 <= weight <= cap for weight in weights):
        raise ReplyError(FailureCode.BAD_REPLY, f"a weight must be an integer in [1, {cap}]")
    if not np.isfinite(total).all() or not np.isfinite(losses).all():
        raise ReplyError(FailureCode.NOT_FINITE, "the sum of a group is not finite")
    clipped = None
    if plan.bound_l2 is not None:
        try:
            count, within = len(respondents), int(counted["within"])
            clipped = ClippedGroup(total=total, bound_l2=plan.bound_l2, count=count, within=within)
        except ValueError as error:
            raise ReplyError(FailureCode.NOT_CLIPPED, str(error)) from error
    failures = [
        Failure(client=client, code=FailureCode(code), incident=incident)
        for client, code, incident in zip(failed, counted["codes"], counted["incidents"], strict=True)
    ]
    return GroupReply(
        respondents=respondents,
        weights=weights,
        mean_losses=losses,
        total=None if clipped is not None else total,
        clipped=clipped,
        failures=failures,
        upload_bytes=upload_bytes * len(respondents),
        download_bytes=download_bytes * len(members),
    )
