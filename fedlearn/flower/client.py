"""The ClientApp: what a client does when a message comes. The same in a simulation and on a device."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedlearn.arrays import Vector
from fedlearn.config import RunConfig
from fedlearn.data.loaders import Distribution, distribute_data
from fedlearn.errors import ReplyError
from fedlearn.federation.messages import FailureCode, RoundPlan
from fedlearn.flower.records import evaluate_reply_records, read_vector, refusal, train_reply_records
from fedlearn.learning import ClientData, build_flat_model, evaluate, train
from fedlearn.sources import SeedTree
from fedlearn.tasks import load_task

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
    app.evaluate()(_answering(_evaluate))
    app.query("identify")(_answering(_identify))
    return app


def prepare_clients(config: RunConfig) -> None:
    """Build the task, its model and its data for a simulation now, in this process and for all it forks.

    Raises:
        FedlearnError: the task is not there or the data cannot be dealt out as asked, before any round is tried.
    """
    _site(config.for_clients().to_json()).distribution()


class _Site:
    """The task, the model and the data of one run, built once a process and used for every client in it."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.task = load_task(config.task)
        self.seeds = SeedTree.root(config.seed)
        self.model = build_flat_model(self.task, self.seeds.child("initialise"))
        self._distribution: Distribution | None = None

    def data(self, context: Context) -> ClientData:
        """Return what this node's client holds, prepared by the task."""
        path = context.node_config.get("data-path")
        if path is not None:
            if context.node_config.get("task") != self.config.task:
                raise ReplyError(FailureCode.REFUSED, f"this device trains no task {self.config.task!r}")
            return self.task.prepare(self.task.load_local(Path(str(path))))
        client = _client_id(context)
        if client >= len(self.distribution().train):
            raise ReplyError(FailureCode.BAD_REQUEST, f"partition-id {client}, but the run has fewer clients")
        return self.task.prepare(self.distribution().client(client))

    def distribution(self) -> Distribution:
        """Return who holds what in a simulation; dealt out once."""
        if self._distribution is None:
            self._distribution = distribute_data(self.task, self.config)
        return self._distribution


@lru_cache(maxsize=2)
def _site(config: str) -> _Site:
    """Return the site of a configuration, given as canonical JSON."""
    return _Site(RunConfig.from_json(config))


@lru_cache(maxsize=4)
def _plan(text: str) -> RoundPlan:
    """Return the plan in a message; every client of a round in this process gets the same text."""
    return RoundPlan.from_json(text)


def _train(message: Message, context: Context) -> RecordDict:
    """Train the received model on this client's data and answer with the difference."""
    plan, site, received = _open(message)
    examples = site.data(context).train
    if len(examples) == 0:
        raise ReplyError(FailureCode.NO_DATA, "no training examples")
    update = train(
        site.model,
        site.task,
        received,
        examples,
        plan.config.training,
        proximal_mu=plan.proximal_mu,
        seeds=site.seeds.child("round", plan.round_number, "client", _client_id(context)),
    )
    if not np.isfinite(update.vector).all() or not np.isfinite(update.mean_loss):
        raise ReplyError(FailureCode.NOT_FINITE, "local training diverged; a lower learning rate may help")
    return train_reply_records(update.vector, min(update.num_examples, plan.weight_cap()), update.mean_loss)


def _evaluate(message: Message, context: Context) -> RecordDict:
    """Test the received model on this client's own test examples and answer with sums."""
    plan, site, parameters = _open(message)
    examples = site.data(context).test
    if examples is None or len(examples) == 0:
        raise ReplyError(FailureCode.NO_DATA, "no test examples")
    seeds = site.seeds.child("evaluate", plan.round_number, "client", _client_id(context))
    evaluation = evaluate(site.model, site.task, parameters, examples, seeds=seeds)
    count = min(evaluation.num_examples, plan.config.training.max_examples)
    return evaluate_reply_records(count, {name: mean * count for name, mean in evaluation.means().items()})


def _identify(message: Message, context: Context) -> RecordDict:
    """Say which client this node is, so that cohorts are drawn over clients and not over Flower's random ids."""
    del message
    return RecordDict({"client": MetricRecord({"id": _client_id(context)})})


def _client_id(context: Context) -> int:
    """Return the number of this node's client: its partition in a simulation, else Flower's node id."""
    return int(context.node_config.get("partition-id", context.node_id))


def _open(message: Message) -> tuple[RoundPlan, _Site, Vector]:
    """Return the plan, the site and the received parameters, after checking that both sides mean the same model."""
    content = message.content
    if set(content) != {"model", "round"}:
        raise ReplyError(FailureCode.BAD_REQUEST, "expected the records model and round")
    arrays, plan = content["model"], _plan(str(content.config_records["round"]["plan"]))
    if not isinstance(arrays, ArrayRecord) or "vector" not in arrays:
        raise ReplyError(FailureCode.BAD_REQUEST, "expected an array, vector")
    site = _site(plan.config.to_json())
    if site.model.spec.sha256 != plan.spec_sha256:
        raise ReplyError(FailureCode.MODEL_MISMATCH, "this client's task builds another model than the server's")
    return plan, site, read_vector(arrays["vector"], site.model.spec)


def _answering(work: Callable[[Message, Context], RecordDict]) -> Callable[[Message, Context], Message]:
    """Turn ``work`` into a handler that answers every message, and lets no exception's text leave the client."""

    def handler(message: Message, context: Context) -> Message:
        incident = secrets.token_hex(4)
        try:
            return Message(work(message, context), reply_to=message)
        except ReplyError as error:
            log.warning("incident %s, client %s: %s", incident, _client_id(context), error)
            return refusal(error.code, incident, message)
        except (Exception, SystemExit):  # a task that calls sys.exit() ends its answer and not the device
            log.exception("incident %s, client %s", incident, _client_id(context))
            return refusal(FailureCode.TRAINING_FAILED, incident, message)

    return handler
