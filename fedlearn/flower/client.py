"""The ClientApp: what a client does when a message comes. The same in a simulation and on a device."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import replace
from functools import lru_cache
from pathlib import Path, PurePath
from typing import cast, get_args

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedlearn.arrays import Vector
from fedlearn.config import RunConfig
from fedlearn.errors import ReplyError
from fedlearn.federation.groups import Asked, learn_group
from fedlearn.federation.messages import FailureCode, RoundPlan
from fedlearn.federation.policy import (
    Learned,
    clipped_update,
    evaluation_numbers,
    maskable,
    train_hiding_examples,
    training_numbers,
)
from fedlearn.files import data_home
from fedlearn.flower import legs
from fedlearn.flower.device import device_folder, is_device, masks_only, secagg_device
from fedlearn.flower.records import (
    evaluate_reply_records,
    group_reply_records,
    leg_reply_records,
    read_group,
    read_leg,
    read_vector,
    refusal,
    train_reply_records,
)
from fedlearn.flower.site import Site, site_of
from fedlearn.learning import Examples, evaluate, train
from fedlearn.learning.account import ClientAccount
from fedlearn.learning.vectorized import Vectorised
from fedlearn.privacy.clipping import Update
from fedlearn.privacy.noise import Noise, SecureNoise, SimulatedNoise
from fedlearn.profiling import span
from fedlearn.secagg.errors import SecaggError
from fedlearn.sources import SecureRandom, SeedTree

__all__ = ["build_client_app", "prepare_clients"]

log = logging.getLogger("fedlearn.client")
"""The client's own log: the only place where the text of an exception goes."""


def build_client_app() -> ClientApp:
    """Return the ClientApp.

    A node's ``node_config`` says whose data it holds: ``partition-id`` names a client of a simulation;
    ``data-path`` (with ``task``, the task its owner installed) makes it a device.
    """
    app = ClientApp()
    app.train()(_answering(_train))
    app.train("group")(_answering(_train_group))
    for leg in _LEGS:
        app.train(leg)(_answering(_LEGS[leg]))
    app.evaluate()(_answering(_evaluate))
    app.query("identify")(_answering(_identify))
    return app


def prepare_clients(config: RunConfig) -> Site:
    """Build the task, its model and its data for a simulation now, in this process and for all it forks.

    Returns:
        The task, the model and who holds what.

    Raises:
        FedlearnError: the task is not there or the data cannot be dealt out as asked, before any round is tried.
    """
    site = site_of(config.for_clients().to_json())
    site.distribution()
    return site


@lru_cache(maxsize=4)
def _plan(text: str) -> RoundPlan:
    """Return the plan in a message; every client of a round in this process gets the same text."""
    return RoundPlan.from_json(text)


def _train(message: Message, context: Context) -> RecordDict:
    """Train the received model on this client's data and answer with the difference."""
    plan, site, received = _open(message, context)
    if plan.config.secagg.mode != "off":
        raise ReplyError(FailureCode.REFUSED, "under secure aggregation no update is sent by itself")
    learned = _learned(plan, site, received, context)
    if isinstance(learned.update, Update) and plan.config.privacy.unit == "none":
        finite = np.isfinite(learned.update.vector).all() and np.isfinite(learned.mean_loss)
        if not finite:
            raise ReplyError(FailureCode.NOT_FINITE, "local training diverged; a lower learning rate may help")
    return train_reply_records(learned.update.vector, training_numbers(plan, learned))


def _train_group(message: Message, context: Context) -> RecordDict:
    """Train many clients of a simulation at once, and answer with their sum."""
    if _is_device(context):
        raise ReplyError(FailureCode.REFUSED, "a device trains for itself alone")
    members, trainer = read_group(message.content)
    plan, site, received = _open(message, context, more={"group"})
    if plan.config.secagg.mode != "off" or trainer not in get_args(Vectorised):
        raise ReplyError(FailureCode.REFUSED, "clients whose updates are masked are not trained many at a time")
    asked = [_asked(plan, site, context, each) for each in members]
    with span("train"):
        total, counted = learn_group(
            plan, cast(Vectorised, trainer), site.model, site.task, received, asked, _log_incident
        )
    return group_reply_records(total, counted)


def _asked(plan: RoundPlan, site: Site, context: Context, client: int) -> Asked:
    """Return one member of a group, with what is its own."""
    seeds = site.seeds.child("round", plan.round_number, "client", client)

    def account(size: int) -> ClientAccount:
        own = replace(context, node_config={**context.node_config, "partition-id": client})
        return _account(plan, size, own)

    return Asked(
        client=client,
        load=lambda: site.data(context.node_config, client).train,
        seeds=seeds,
        noise=SimulatedNoise(seeds.child("privacy")),
        account=account,
    )


def _log_incident(client: int, error: BaseException) -> str:
    """Tell a client's own log of an exception; return the incident's number."""
    incident = secrets.token_hex(4)
    if isinstance(error, ReplyError):
        log.warning("incident %s, client %s: %s", incident, client, error)
    elif isinstance(error, SecaggError):
        log.warning("incident %s, client %s: %s: %s", incident, client, type(error).__name__, error)
    else:
        cause = f"{type(error).__name__}: {error}"
        log.error("incident %s, client %s: %s", incident, client, cause, exc_info=error)
    return incident


def _examples(site: Site, context: Context) -> Examples:
    """Return this client's training examples, of which there are some."""
    examples = site.data(context.node_config, _client_id(context)).train
    if len(examples) == 0:
        raise ReplyError(FailureCode.NO_DATA, "no training examples")
    return examples


# -- secure aggregation, leg by leg ------------------------------------------------------------------------------------


def _advertise(message: Message, context: Context) -> RecordDict:
    """Take part in a session, if there is something to train on."""
    body, plan, site, _ = _open_leg(message, context)
    _examples(site, context)
    device = secagg_device(plan, context, _client_id(context))
    return leg_reply_records(legs.advertise(body, plan, site.model.spec, device, context))


def _answer(message: Message, context: Context) -> RecordDict:
    """Answer a leg that needs no model."""
    body, plan, site, _ = _open_leg(message, context)
    leg, device = message.metadata.message_type.partition(".")[2], secagg_device(plan, context, _client_id(context))
    return leg_reply_records(legs.answer(leg, body, plan, site.model.spec, device, context))


def _mask(message: Message, context: Context) -> RecordDict:
    """Train, and answer with the masked update."""
    body, plan, site, received = _open_leg(message, context, model=True)
    client = _client_id(context)
    reply = legs.mask(
        body,
        plan,
        received,
        site.model.spec,
        secagg_device(plan, context, client),
        context,
        learn=lambda: _maskable(plan, site, received, context),
        noise=_noise(_round_seeds(plan, site, context), context),
        client=client,
    )
    return leg_reply_records(reply)


def _ideal(message: Message, context: Context) -> RecordDict:
    """Train, and answer with the encoded update: in a simulation only."""
    body, plan, site, received = _open_leg(message, context, model=True)
    if _is_device(context):
        raise ReplyError(FailureCode.REFUSED, "a device sends no update that is not masked; ideal is for simulations")
    noise = _noise(_round_seeds(plan, site, context), context)
    return leg_reply_records(
        legs.ideal(
            body,
            plan,
            site.model.spec,
            learn=lambda: _maskable(plan, site, received, context),
            noise=noise,
        )
    )


def _abort(message: Message, context: Context) -> RecordDict:
    """Let go of a session that the server gave up."""
    body, plan, _, _ = _open_leg(message, context)
    legs.forget(secagg_device(plan, context, _client_id(context)), context, body)
    return leg_reply_records(b"")


_LEGS: Mapping[str, Callable[[Message, Context], RecordDict]] = {
    "advertise": _advertise,
    "share": _answer,
    "mask": _mask,
    "consistent": _answer,
    "unmask": _answer,
    "ideal": _ideal,
    "abort": _abort,
}


def _maskable(plan: RoundPlan, site: Site, received: Vector, context: Context) -> legs.Maskable:
    """Train the received model on this client's data; return what goes into the sum."""
    update, weight = maskable(plan, _learned(plan, site, received, context), site.model.spec)
    if not update.finite:
        log.warning("client %s: local training diverged; a zero update is masked", _client_id(context))
    return update, weight


def _learned(plan: RoundPlan, site: Site, received: Vector, context: Context) -> Learned:
    """Train the received model on this client's data, as the promised privacy has it."""
    examples, seeds, spec = _examples(site, context), _round_seeds(plan, site, context), site.model.spec
    if plan.config.privacy.unit == "example":
        vector = train_hiding_examples(
            plan,
            site.model,
            site.task,
            received,
            examples,
            account=_account(plan, len(examples), context),
            seeds=seeds,
            noise=_noise(seeds, context),
        )
        return Learned(update=Update(vector))
    trained = train(
        site.model,
        site.task,
        received,
        examples,
        plan.config.training,
        proximal_mu=plan.proximal_mu,
        seeds=seeds,
    )
    if plan.config.privacy.unit == "none":
        return Learned(update=trained.update, num_examples=trained.num_examples, mean_loss=trained.mean_loss)
    clipped = clipped_update(plan, trained, spec)
    if not clipped.finite:
        log.warning("client %s: local training diverged; a zero update was sent", _client_id(context))
    return Learned(update=clipped, num_examples=trained.num_examples, mean_loss=trained.mean_loss)


def _round_seeds(plan: RoundPlan, site: Site, context: Context) -> SeedTree:
    """Return this client's seeds in a round."""
    return site.seeds.child("round", plan.round_number, "client", _client_id(context))


def _open_leg(message: Message, context: Context, *, model: bool = False) -> tuple[bytes, RoundPlan, Site, Vector]:
    """Return a leg's own bytes, the plan, the site and the received parameters (none, where the leg has no model)."""
    body, text, arrays = read_leg(message.content, model=model)
    plan = _plan(text)
    site = _site_of(plan, context)
    if arrays is None:
        return body, plan, site, np.zeros(0, dtype=site.model.spec.dtype)
    if "vector" not in arrays:
        raise ReplyError(FailureCode.BAD_REQUEST, "expected an array, vector")
    return body, plan, site, read_vector(arrays["vector"], site.model.spec)


def _account(plan: RoundPlan, size: int, context: Context) -> ClientAccount:
    """Return this client's own ledger, and what its owner permits: the node's configuration says both."""
    told, client = context.node_config, str(_client_id(context))
    if "ledger-path" in told:
        path = Path(str(told["ledger-path"]))
    elif "ledger-folder" in told:  # of a simulation: a folder for every client
        path = Path(str(told["ledger-folder"])) / client / "ledger.jsonl"
    elif _is_device(context):
        path = device_folder(told) / "ledger.jsonl"
    else:
        path = data_home() / "clients" / f"{plan.run}-{client}" / "ledger.jsonl"
    limit = told.get("max-epsilon")
    if limit is None and _is_device(context):
        reason = (
            "this device's owner has set no max-epsilon, the most that may ever be spent, in its node configuration"
        )
        raise ReplyError(FailureCode.REFUSED, reason)
    delta = plan.config.privacy.delta
    if _is_device(context):  # whoever sets delta sets what epsilon means
        delta = float(told["delta"]) if "delta" in told else "auto"
    return ClientAccount(path, size=size, delta=delta, max_epsilon=None if limit is None else float(limit))


def _noise(seeds: SeedTree, context: Context) -> Noise:
    """Return this client's noise: the system's on a device, the seed's in a simulation."""
    if _is_device(context):
        return SecureNoise(SecureRandom())
    return SimulatedNoise(seeds.child("privacy"))


def _evaluate(message: Message, context: Context) -> RecordDict:
    """Test the received model on this client's own test examples and answer with sums."""
    plan, site, parameters = _open(message, context)
    if plan.config.secagg.mode != "off":
        raise ReplyError(FailureCode.REFUSED, "under secure aggregation nothing is measured by one client")
    examples = site.data(context.node_config, _client_id(context)).test
    if examples is None or len(examples) == 0:
        raise ReplyError(FailureCode.NO_DATA, "no test examples")
    seeds = site.seeds.child("evaluate", plan.round_number, "client", _client_id(context))
    evaluation = evaluate(site.model, site.task, parameters, examples, seeds=seeds)
    return evaluate_reply_records(evaluation_numbers(plan, evaluation, tuple(site.task.metric_names)))


def _identify(message: Message, context: Context) -> RecordDict:
    """Say which client this node is, so that cohorts are drawn over clients and not over Flower's random ids."""
    del message
    return RecordDict({"client": MetricRecord({"id": _client_id(context)})})


def _is_device(context: Context) -> bool:
    """Return whether this node holds data of its own, which its owner has told it the path of."""
    return is_device(context.node_config)


def _client_id(context: Context) -> int:
    """Return the number of this node's client: its partition in a simulation, else Flower's node id."""
    return int(context.node_config.get("partition-id", context.node_id))


def _open(message: Message, context: Context, more: AbstractSet[str] = frozenset()) -> tuple[RoundPlan, Site, Vector]:
    """Return the plan, the site and the received parameters, after checking that both sides mean the same model."""
    content = message.content
    if set(content) != {"model", "round", *more}:
        raise ReplyError(FailureCode.BAD_REQUEST, "expected the records model and round, nothing else")
    arrays, plan = content["model"], _plan(str(content.config_records["round"]["plan"]))
    if not isinstance(arrays, ArrayRecord) or "vector" not in arrays:
        raise ReplyError(FailureCode.BAD_REQUEST, "expected an array, vector")
    site = _site_of(plan, context)
    return plan, site, read_vector(arrays["vector"], site.model.spec)


def _site_of(plan: RoundPlan, context: Context) -> Site:
    """Return the site of a plan that this client's owner permits, where both sides mean the same model."""
    if _is_device(context) and masks_only(context.node_config):
        legs.refuse_unmasked(plan)
    site = site_of(_permitted(plan.config, context).to_json() if _is_device(context) else plan.config_json)
    if site.model.spec.sha256 != plan.spec_sha256:
        raise ReplyError(FailureCode.MODEL_MISMATCH, "this client's task builds another model than the server's")
    return site


def _permitted(config: RunConfig, context: Context) -> RunConfig:
    """Return the config to work by; on a device with its owner's task and privacy, whatever the message names.

    Nothing of a message is imported there: a task named otherwise is refused before anything is loaded. A task file
    may lie in another folder than on the server; its name has to be the same. A device with ``max-epsilon`` in its node
    configuration answers only rounds that hide its examples, unless ``privacy-unit`` there names another unit.
    """
    if not _is_device(context):
        return config
    own = str(context.node_config.get("task", ""))
    if not own or PurePath(own).name != PurePath(config.task).name:
        raise ReplyError(FailureCode.REFUSED, f"this device trains {own or 'no task'}, not {config.task}")
    unit = context.node_config.get("privacy-unit", "example" if "max-epsilon" in context.node_config else None)
    if unit is not None and config.privacy.unit != unit:
        reason = f"this device's owner permits privacy.unit = {unit!r} and nothing else, not {config.privacy.unit!r}"
        raise ReplyError(FailureCode.REFUSED, reason)
    return replace(config, task=own)


def _answering(work: Callable[[Message, Context], RecordDict]) -> Callable[[Message, Context], Message]:
    """Turn ``work`` into a handler that answers every message, and lets no exception's text leave the client."""

    def handler(message: Message, context: Context) -> Message:
        try:
            return Message(work(message, context), reply_to=message)
        except ReplyError as error:
            return refusal(error.code, _log_incident(_client_id(context), error), message)
        except SecaggError as error:
            return refusal(FailureCode.MASKING_FAILED, _log_incident(_client_id(context), error), message)
        except (Exception, SystemExit) as error:  # a task that calls sys.exit() ends its answer and not the device
            return refusal(FailureCode.TRAINING_FAILED, _log_incident(_client_id(context), error), message)

    return handler
