"""What a client does when a leg of secure aggregation comes: the session is opened, takes one step, is sealed again.

Between two legs it lies in Flower's ``Context`` as one blob, whose key is on the device and is used once. So whatever
comes twice, or after the end, finds nothing; and a client that was killed in between is lost to the round.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable

import numpy as np
from flwr.app import ConfigRecord, Context

from fedlearn.arrays import ParamSpec, Vector
from fedlearn.errors import ReplyError
from fedlearn.federation.messages import FailureCode, RoundPlan
from fedlearn.federation.session import histogram, plain_path
from fedlearn.files import write_atomic
from fedlearn.flower.device import SecaggDevice
from fedlearn.privacy.clipping import ClippedUpdate
from fedlearn.privacy.noise import Noise
from fedlearn.secagg.client import ClientSession
from fedlearn.secagg.encoding import EncodedUpdate
from fedlearn.secagg.errors import DeadlineError, PolicyViolationError, StageError
from fedlearn.secagg.messages import Offer

__all__ = ["Maskable", "advertise", "answer", "encoded", "forget", "ideal", "mask", "refuse_unmasked"]

_STATE = "secagg"

Maskable = tuple[ClippedUpdate, int]
"""A clipped update and its weight."""


def advertise(body: bytes, plan: RoundPlan, spec: ParamSpec, device: SecaggDevice, context: Context) -> bytes:
    """Answer an offer; a session that was begun before and not ended is let go of."""
    _check_offer(Offer.read(body), plan, spec)
    session, reply = ClientSession.begin(
        body,
        identity=device.identity,
        allow_list=device.allow_list,
        server_key=device.server_key,
        policy=device.policy,
        vault=device.vault,
        now_s=device.now_s(Offer.read(body).deadline_s),
    )
    forget(device, context)
    _keep(session, device, context)
    return reply


def answer(leg: str, body: bytes, plan: RoundPlan, spec: ParamSpec, device: SecaggDevice, context: Context) -> bytes:
    """Answer a leg that needs no model."""
    session = _resume(device, context)
    _check_offer(session.offer, plan, spec)
    if leg == "share":
        reply = session.share_keys(body, allow_list=device.allow_list)
    elif leg == "consistent":
        reply = session.confirm(body)
    else:
        reply = session.unmask(body)
    _keep(session, device, context)
    return reply


def mask(
    body: bytes,
    plan: RoundPlan,
    received: Vector,
    spec: ParamSpec,
    device: SecaggDevice,
    context: Context,
    *,
    learn: Callable[[], Maskable],
    noise: Noise,
    client: int,
) -> bytes:
    """Take the neighbours' shares, train on the model that was offered and no other, and mask what was learned."""
    session = _resume(device, context)
    _check_offer(session.offer, plan, spec)
    session.accept_shares(body)
    session.check_model(hashlib.sha256(np.ascontiguousarray(received).tobytes()).digest())
    update = encoded(session.offer, learn(), plan, noise)
    if device.simulated and client == plan.watched:
        _show(update, plan, client)
    reply = session.mask(update)
    _keep(session, device, context)
    return reply


def ideal(body: bytes, plan: RoundPlan, spec: ParamSpec, *, learn: Callable[[], Maskable], noise: Noise) -> bytes:
    """Encode what was learned, and mask nothing: for a simulation."""
    offer = Offer.read(body)
    _check_offer(offer, plan, spec)
    return encoded(offer, learn(), plan, noise).words.astype("<u8", copy=False).tobytes()


def encoded(offer: Offer, learned: Maskable, plan: RoundPlan, noise: Noise) -> EncodedUpdate:
    """Return an update as integers, with this client's share of the noise."""
    update, weight = learned
    return offer.encoding.encode(
        update,
        weight=weight,
        rounding=noise.stream("rounding", plan.attempt),
        noise=noise.stream("skellam", plan.attempt),
    )


def forget(device: SecaggDevice, context: Context, session: bytes | None = None) -> None:
    """Let go of a session: of ``session``, or of whichever there is."""
    record = context.state.get(_STATE)
    if not isinstance(record, ConfigRecord):
        return
    held = record.get("session")
    if isinstance(held, bytes) and session in (None, held):
        device.vault.forget(held)
        del context.state[_STATE]


def _resume(device: SecaggDevice, context: Context) -> ClientSession:
    """Open the session; its key is gone from here on, whatever happens."""
    record = context.state.get(_STATE)
    held = dict(record) if isinstance(record, ConfigRecord) else {}
    session, blob = held.get("session"), held.get("blob")
    if not isinstance(session, bytes) or not isinstance(blob, bytes):
        raise StageError("this client is in no session")
    del context.state[_STATE]
    opened = ClientSession.from_bytes(device.vault.open(session, blob), identity=device.identity)
    deadline_s = opened.offer.deadline_s
    if device.now_s(deadline_s) >= deadline_s:
        opened.end()
        raise DeadlineError("the round's deadline has passed by this device's clock")
    return opened


def _keep(session: ClientSession, device: SecaggDevice, context: Context) -> None:
    """Seal the session, unless it is over."""
    if session.stage in ("spent", "ended"):
        return
    name = session.offer.session
    blob = device.vault.seal(name, session.to_bytes())
    context.state[_STATE] = ConfigRecord({"session": name, "blob": blob})


def _check_offer(offer: Offer, plan: RoundPlan, spec: ParamSpec) -> None:
    """Raise unless the offer is for what the plan asks.

    Raises:
        PolicyViolationError: it is for another round, task, length, bound or promise.
    """
    hides = plan.config.privacy.unit == "client"
    encoding = offer.encoding
    agreed = {
        "task": (offer.task, plan.config.task),
        "round": (offer.round_number, plan.round_number),
        "attempt": (offer.attempt, plan.attempt),
        "mode": (offer.mode, "semi-honest" if plan.config.secagg.mode == "semi-honest" else "active"),
        "vector's length": (encoding.size, spec.trainable_size if hides else spec.size),
        "clipping norm": (encoding.bound_l2, plan.bound_l2),
        "noise": (encoding.noise_variance > 0, hides),
        "plan": (offer.plan_sha256.hex(), plan.sha256.hex()),  # the same for every client under this offer
    }
    for name, (offered, planned) in agreed.items():
        if offered != planned:
            raise PolicyViolationError(f"the offer's {name} is {offered}, and the plan's is {planned}")


def _show(update: EncodedUpdate, plan: RoundPlan, client: int) -> None:
    """Leave, in a simulation, what the server does not see: the histogram of an update before it is masked."""
    shown = {"client": client, "histogram": histogram(update.words, update.encoding)}
    write_atomic(plain_path(plan), json.dumps(shown).encode())


def refuse_unmasked(plan: RoundPlan) -> None:
    """Raise where a device whose owner wants masks is asked for something without.

    Raises:
        ReplyError: ``refused``.
    """
    if not plan.config.secagg.masks:
        reason = (
            f"this device's owner gave it a key for secure aggregation, and secagg.mode is {plan.config.secagg.mode}"
        )
        raise ReplyError(FailureCode.REFUSED, reason)
