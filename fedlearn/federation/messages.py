"""What the server asks of a client and what a client may answer; every answer is checked before it is used."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property, lru_cache
from typing import Literal, Protocol, TypeAlias

import numpy as np

from fedlearn.arrays import ParamSpec, Vector
from fedlearn.config import RunConfig
from fedlearn.errors import ConfigError, ReplyError
from fedlearn.privacy.clipping import ClippedGroup, ClippedUpdate, Update

__all__ = [
    "EvaluateReply",
    "Failure",
    "FailureCode",
    "GroupReply",
    "LegReply",
    "LegRequest",
    "Network",
    "Reply",
    "Request",
    "RoundPlan",
    "TrainReply",
    "check_evaluate_reply",
    "check_train_reply",
    "reply_numbers",
]


class FailureCode(StrEnum):
    """Why a client's answer is not in the round. The code travels; the text of an exception never does."""

    BAD_DATA = "bad-data"  # the client's own data holds NaN or infinity
    BAD_REPLY = "bad-reply"  # wrong keys, shape, type or count
    BAD_REQUEST = "bad-request"  # the client could not read what it was sent
    BUDGET_SPENT = "budget-spent"  # the client's own ledger permits no further release
    LOST = "lost"  # the runtime reported that the client's process or node is gone
    MASKING_FAILED = "masking-failed"  # a check of secure aggregation did not hold; which, is in the client's own log
    MODEL_MISMATCH = "model-mismatch"  # the client's model has other entries than the server's
    NO_DATA = "no-data"  # the client holds no examples for what was asked
    NO_REPLY = "no-reply"  # nothing came before the deadline
    NOT_CLIPPED = "not-clipped"  # the update is longer than the round's clipping norm
    NOT_FINITE = "not-finite"  # NaN or infinity
    REFUSED = "refused"  # the data owner does not permit it
    TRAINING_FAILED = "training-failed"  # the client's code raised; the text is in the client's own log


@dataclass(frozen=True, kw_only=True)
class RoundPlan:
    """What every client of a round is told, besides the model.

    Attributes:
        config: the run's configuration.
        round_number: counted from 1; 0 is an evaluation before training.
        attempt: which try of this round, counted from 1.
        proximal_mu: FedProx's μ, 0 for none.
        spec_sha256: the hash of the model's ``ParamSpec``; the client compares it with its own model's.
        bound_l2: the clipping norm of this round's updates; ``None`` where they are not clipped.
        run: the run's own name, by which clients tell its releases from those of others.
        identities: in a simulation, the folder with its clients' keys; a device has its own and looks at no other.
        watched: in a simulation, the client of whom it is shown what masking makes of its update; else -1.
    """

    config: RunConfig
    round_number: int
    attempt: int
    proximal_mu: float
    spec_sha256: str
    bound_l2: float | None = None
    run: str = ""
    identities: str = ""
    watched: int = -1

    @property
    def group(self) -> str:
        """Name the try of the round, as ``round.attempt``."""
        return f"{self.round_number}.{self.attempt}"

    def weight_cap(self) -> int:
        """Return the largest number of examples a client may be weighted by."""
        return self.config.training.max_examples if self.config.training.weighting == "examples" else 1

    def to_json(self) -> str:
        """Return the canonical JSON that travels."""
        return self._json

    @cached_property
    def _json(self) -> str:
        """The JSON, made once for all the requests that carry it."""
        body = {
            "config": _told(self.config),
            "round": self.round_number,
            "attempt": self.attempt,
            "proximal-mu": self.proximal_mu,
            "spec": self.spec_sha256,
            "bound-l2": self.bound_l2,
            "run": self.run,
            "identities": self.identities,
            "watched": self.watched,
        }
        return json.dumps(body, sort_keys=True, separators=(",", ":"))

    @cached_property
    def config_json(self) -> str:
        """The configuration as canonical JSON, made once for all the clients of a round that share the plan."""
        return self.config.to_json()

    @property
    def sha256(self) -> bytes:
        """The hash of what a client is asked to do, 32 bytes; where a simulation keeps its keys is no part of that."""
        return hashlib.sha256(replace(self, identities="", watched=-1).to_json().encode()).digest()

    @classmethod
    def from_json(cls, text: str) -> RoundPlan:
        """Read what ``to_json`` wrote.

        Raises:
            ReplyError: ``bad-request`` where it is not readable; it came from outside.
        """
        try:
            body = json.loads(text)
            return cls(
                config=RunConfig.from_mapping(body["config"]),
                round_number=int(body["round"]),
                attempt=int(body["attempt"]),
                proximal_mu=float(body["proximal-mu"]),
                spec_sha256=str(body["spec"]),
                bound_l2=None if body["bound-l2"] is None else float(body["bound-l2"]),
                run=str(body["run"]),
                identities=str(body["identities"]),
                watched=int(body["watched"]),
            )
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError, ConfigError) as error:
            raise ReplyError(FailureCode.BAD_REQUEST, "the round's plan is not readable") from error


@lru_cache(maxsize=8)
def _told(config: RunConfig) -> Mapping[str, object]:
    """Return what clients are told of a configuration, as tables: the same in every round."""
    return config.for_clients().to_mapping()


@dataclass(frozen=True, eq=False, kw_only=True)
class Request:
    """One message to one client; the vector is shared between the requests of a round and never written to."""

    kind: Literal["train", "evaluate"]
    client: int
    plan: RoundPlan
    vector: Vector


@dataclass(frozen=True, eq=False, kw_only=True)
class LegRequest:
    """One message of secure aggregation to one client.

    Attributes:
        leg: which; the message's type is ``train.<leg>``.
        client: to whom.
        plan: what the round asks for.
        body: the protocol's own bytes.
        vector: the model, with the leg on which clients train.
    """

    leg: str
    client: int
    plan: RoundPlan
    body: bytes
    vector: Vector | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class LegReply:
    """A client's answer to one leg: the protocol's own bytes, not looked at yet, and nothing beside them."""

    client: int
    body: bytes
    upload_bytes: int
    download_bytes: int


@dataclass(frozen=True, eq=False, kw_only=True)
class TrainReply:
    """A checked answer to ``train``.

    Attributes:
        client: who answered.
        update: its update, shape (d,), finite, in the spec's type; clipped where the round has a clipping norm.
        weight: what it counts in the mean: 1, or its number of examples up to the cap.
        mean_loss: its mean training loss, or ``None`` where privacy is promised: un-noised, it does not leave.
        upload_bytes: size of the answer's records; ``download_bytes`` of the request's.
    """

    client: int
    update: Update | ClippedUpdate
    weight: int
    mean_loss: float | None
    upload_bytes: int
    download_bytes: int


@dataclass(frozen=True, kw_only=True)
class EvaluateReply:
    """A checked answer to ``evaluate``.

    Attributes:
        client: who answered.
        num_examples: how many test examples it has; 1 where clients are hidden, for whom a mean is all that leaves.
        sums: each metric summed over them.
    """

    client: int
    num_examples: int
    sums: Mapping[str, float]
    upload_bytes: int
    download_bytes: int


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A client that is left out of a round, with the reason as a code and the incident its own log explains."""

    client: int
    code: FailureCode
    incident: str = ""
    upload_bytes: int = 0
    download_bytes: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class GroupReply:
    """A checked answer of a group.

    Attributes:
        respondents: the clients whose updates are in the sum, in ascending order.
        weights: what each counts in the mean.
        mean_losses: of each, its mean training loss; empty where privacy is promised.
        total: Σ weight · update, shape (d,), in the model's own type.
        clipped: the same of clipped updates, shape (trained,), where the round has a clipping norm; then ``total`` is
            ``None``.
        failures: the clients that are not in it.
        upload_bytes: what all of them would have sent, each by itself; ``download_bytes`` what they would have got.
    """

    respondents: Sequence[int]
    weights: Sequence[int]
    mean_losses: Sequence[float]
    total: Vector | None
    clipped: ClippedGroup | None
    failures: Sequence[Failure]
    upload_bytes: int
    download_bytes: int

    @property
    def count(self) -> int:
        """How many clients it speaks for."""
        return len(self.respondents) + len(self.failures)


Reply: TypeAlias = GroupReply | TrainReply | EvaluateReply | Failure


class Network(Protocol):
    """The one seam between a round and whatever carries its messages."""

    def clients(self, at_least: int, timeout_s: float) -> Sequence[int]:
        """Return the clients that can be asked, waiting until there are ``at_least`` so many.

        Raises:
            TooFewClientsError: there were not, in ``timeout_s`` seconds.
        """
        ...

    def exchange(self, requests: Sequence[Request], spec: ParamSpec, timeout_s: float) -> Iterator[Reply]:
        """Send the requests and yield one reply for each, in the requests' order, within the deadline.

        A simulation may answer for many clients in one reply; then what it yields is in an order of its own, which
        depends on the requests alone.
        """
        ...

    def exchange_leg(self, requests: Sequence[LegRequest], timeout_s: float) -> Iterator[LegReply | Failure]:
        """Send one leg of secure aggregation and yield one answer for each, in order, within the deadline."""
        ...


def check_train_reply(
    client: int,
    vectors: Mapping[str, Vector],
    numbers: Mapping[str, object],
    *,
    plan: RoundPlan,
    spec: ParamSpec,
    upload_bytes: int,
    download_bytes: int,
) -> TrainReply:
    """Return the reply if every part of it is as the round asked, else refuse it.

    Raises:
        ReplyError: with the code ``bad-reply`` or ``not-finite``.
    """
    if set(vectors) != {"update"}:
        raise ReplyError(FailureCode.BAD_REPLY, "a train reply carries one array, update, nothing else")
    vector = spec.check(vectors["update"])
    if np.abs(vector).max(initial=0.0) > _LARGEST:
        raise ReplyError(FailureCode.NOT_FINITE, "the vector holds numbers of which a weighted sum may overflow")
    update, weight, loss = _counted(vector, numbers, plan, spec)
    return TrainReply(
        client=client,
        update=update,
        weight=weight,
        mean_loss=loss,
        upload_bytes=upload_bytes,
        download_bytes=download_bytes,
    )


def _counted(
    vector: Vector, numbers: Mapping[str, object], plan: RoundPlan, spec: ParamSpec
) -> tuple[Update | ClippedUpdate, int, float | None]:
    """Return the update, what it counts, and the training loss where it may be known."""
    privacy = plan.config.privacy
    if set(numbers) != reply_numbers(plan.config):
        expected = ", ".join(sorted(reply_numbers(plan.config))) or "no number"
        raise ReplyError(FailureCode.BAD_REPLY, f"beside its update, a train reply of this run carries {expected}")
    if privacy.unit == "none":
        count = _count(numbers["num-examples"], plan.weight_cap())
        return Update(vector), count, _finite("loss", numbers["loss"])
    if vector[spec.trainable_size :].any():
        reason = "only what is trained by gradient may move under privacy; a buffer or frozen entry did"
        raise ReplyError(FailureCode.BAD_REPLY, reason)
    if plan.bound_l2 is None:
        return Update(vector), 1, None
    within = numbers.get("within-bound", 1)
    if within not in (0, 1) or isinstance(within, bool):
        raise ReplyError(FailureCode.BAD_REPLY, "within-bound must be 0 or 1")
    return ClippedUpdate.received(vector, plan.bound_l2, within=within == 1), 1, None


def reply_numbers(config: RunConfig) -> set[str]:
    """Return the names of the numbers that leave a client beside its update: none where privacy is promised.

    Under adaptive clipping one bit leaves it, which the server adds up with noise and accounts for.
    """
    if config.privacy.unit == "none":
        return {"num-examples", "loss"}
    return {"within-bound"} if config.privacy.adaptive_clipping else set()


def check_evaluate_reply(
    client: int, numbers: Mapping[str, object], *, plan: RoundPlan, upload_bytes: int, download_bytes: int
) -> EvaluateReply:
    """Return the reply if it is a count and finite sums, else refuse it.

    Raises:
        ReplyError: with the code ``bad-reply`` or ``not-finite``.
    """
    if plan.config.privacy.unit != "none":
        return _check_private_evaluation(client, numbers, upload_bytes=upload_bytes, download_bytes=download_bytes)
    sums = {name: value for name, value in numbers.items() if name != "num-examples"}
    if "num-examples" not in numbers or "loss" not in sums or len(sums) > _MOST_METRICS:
        raise ReplyError(FailureCode.BAD_REPLY, "an evaluate reply carries num-examples, loss and a few metrics")
    if not all(len(name) <= _LONGEST_NAME and name.isprintable() for name in sums):  # they are shown in a terminal
        raise ReplyError(FailureCode.BAD_REPLY, f"a metric's name is up to {_LONGEST_NAME} printable characters")
    return EvaluateReply(
        client=client,
        num_examples=_count(numbers["num-examples"], plan.config.training.max_examples),
        sums={name: _finite(name, value) for name, value in sums.items()},
        upload_bytes=upload_bytes,
        download_bytes=download_bytes,
    )


def _check_private_evaluation(
    client: int, numbers: Mapping[str, object], *, upload_bytes: int, download_bytes: int
) -> EvaluateReply:
    """Return a client's mean metrics, each in [0, 1], without the number of examples they are means of."""
    means = {name: _finite(name, value) for name, value in numbers.items()}
    if not means or len(means) > _MOST_METRICS or not all(0 <= value <= 1 for value in means.values()):
        raise ReplyError(FailureCode.BAD_REPLY, "an evaluate reply carries mean metrics in [0, 1], nothing else")
    return EvaluateReply(
        client=client, num_examples=1, sums=means, upload_bytes=upload_bytes, download_bytes=download_bytes
    )


_MOST_METRICS = 64
_LONGEST_NAME = 64
_LARGEST = float(np.finfo(np.float32).max)
"""Beyond this a float64 number of one client could overflow the sum over all, and end the run for everybody."""


def _count(value: object, cap: int) -> int:
    """Return an example count within [1, cap]: one client must not own the mean by claiming 10¹² examples."""
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= cap:
        raise ReplyError(FailureCode.BAD_REPLY, f"num-examples must be an integer in [1, {cap}]")
    return value


def _finite(name: str, value: object) -> float:
    """Return a finite number."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ReplyError(FailureCode.BAD_REPLY, f"{name} must be a number")
    if not -_LARGEST <= value <= _LARGEST:  # so is NaN
        raise ReplyError(FailureCode.NOT_FINITE, f"{name} is not finite, or may overflow a sum")
    return float(value)
