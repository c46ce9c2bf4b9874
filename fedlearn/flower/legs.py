"""What a client does when a leg of secure aggregation comes: the session is opened, takes one step, is sealed again.

Between two legs it lies in Flower's ``Context`` as one blob, whose key is on the device and is used once. So whatever
comes twice, or after the end, finds nothing; and a client that was killed in between is lost to the round.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from flwr.app import ConfigRecord, Context

from fedlearn.arrays import ParamSpec, Vector, vector_sha256
from fedlearn.errors import ConfigError, ReplyError
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
from fedlearn.secagg.terms import Terms

__all__ = ["Maskable", "advertise", "answer", "encoded", "forget", "ideal", "mask", "refuse_unmasked"]

_STATE = "secagg"

_OF_THE_PLAN = (
    *("task", "round_number", "attempt", "mode", "colluding", "dropping"),
    *("cohort", "least_cohort", "least_survivors"),
)
"""The fields of an offer that follow from the plan; a client computes them itself."""

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
    session.check_model(vector_sha256(received))
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
    try:
        terms = Terms.of(plan.config)
    except ConfigError as error:
        raise PolicyViolationError(f"no offer can be made of the plan: {error}") from error
    hides, encoding = terms.hides_clients, offer.encoding
    planned = terms.offer(
        encoding,
        round_number=plan.round_number,
        attempt=plan.attempt,
        session=offer.session,
        model_sha256=offer.model_sha256,
        deadline_s=offer.deadline_s,
    )
    rotation = terms.rotation(offer.model_sha256, plan.round_number, plan.attempt) if hides else b""
    agreed = {
        "vector's length": (encoding.size, spec.trainable_size if hides else spec.size),
        "clipping norm": (encoding.bound_l2, plan.bound_l2),
        "noise": (encoding.noise_variance > 0, hides),
        "largest weight": (encoding.most_weight, terms.most_weight),  # a smaller one would ask who has more examples
        "bits": (encoding.bits, plan.config.secagg.bits),
        "lanes' clients": (encoding.clients, plan.config.federation.cohort),
        "count of the clipped": (encoding.counts_clipped, not hides),
        "rotation": (encoding.rotation.hex(), rotation.hex()),
        **{name: (getattr(offer, name), getattr(planned, name)) for name in _OF_THE_PLAN},
        "plan": (offer.plan_sha256.hex(), plan.sha256.hex()),  # the same for every client under this offer
    }
    for name, (offered, asked) in agreed.items():
        if offered != asked:
            raise PolicyViolationError(f"the offer's {name} is {offered!r}, and the plan's is {asked!r}")


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
