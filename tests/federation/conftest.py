"""A federation that hides its clients, on an in-memory twin of the network that sees all and may lie."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedlearn.arrays import ParamSpec
from fedlearn.config import RunConfig
from fedlearn.errors import ReplyError, RunUnreadableError
from fedlearn.federation.messages import (
    Failure,
    FailureCode,
    Reply,
    Request,
    check_evaluate_reply,
    check_train_reply,
    reply_numbers,
)
from fedlearn.federation.observer import SilentObserver
from fedlearn.federation.policy import Learned, clipped_update, training_numbers
from fedlearn.federation.rounds import Federation
from fedlearn.federation.run_folder import RunFolder
from fedlearn.learning import Examples, Task, Trained
from fedlearn.privacy.clipping import Update
from fedlearn.privacy.ledger import Event, read_events
from fedlearn.privacy.noise import SimulatedNoise
from fedlearn.privacy.releases import Release
from fedlearn.sources import ManualClock, SeedTree

Vector = NDArray[Any]


class Scored(Task):
    """Three weights, a frozen one and a buffer, without any data: the clients of the twin invent what they learn."""

    metric_names = ("accuracy",)

    def build_model(self) -> nn.Module:
        model = nn.Linear(2, 1)
        model.register_parameter("frozen", nn.Parameter(torch.ones(()), requires_grad=False))
        model.register_buffer("seen", torch.zeros(2))
        return model

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return (output[:, 0] - target) ** 2


class Unscored(Scored):
    """The same without a metric that clients may release."""

    metric_names = ()


class Tested(Scored):
    """The same with a central test set."""

    def load_test(self, path: Path | None) -> Examples:
        return Examples(torch.ones(4, 2), torch.zeros(4))


def small(client: int, spec: ParamSpec) -> Vector:
    """What an honest client learns: the same in every round, within a norm of 1."""
    return np.full(spec.size, (client + 1) / 1000, spec.dtype)


@dataclass
class Twin:
    """A ``Network`` in memory.

    Attributes:
        learned: what a client learns, before its own side clips it.
        lies: clients that send what they like, past their own side's clip: vector and numbers.
        silent: whether a client does not answer in a round.
        scores: what a client measures.
        watch: is told before messages leave.
    """

    count: int
    clock: ManualClock
    learned: Callable[[int, ParamSpec], Vector] = small
    lies: dict[int, Callable[[Request, ParamSpec], tuple[Vector, dict[str, Any]]]] = field(default_factory=dict)
    silent: Callable[[int, int], bool] = lambda client, number: False
    scores: Callable[[int], dict[str, Any]] = lambda client: {"accuracy": 0.75}
    watch: Callable[[Sequence[Request]], None] = lambda requests: None
    asked: list[Request] = field(default_factory=list)

    def clients(self, at_least: int, timeout_s: float) -> Sequence[int]:
        return range(self.count)

    def exchange(self, requests: Sequence[Request], spec: ParamSpec, timeout_s: float) -> Iterator[Reply]:
        self.watch(requests)
        for request in requests:
            self.asked.append(request)
            yield self._reply(request, spec)

    def _reply(self, request: Request, spec: ParamSpec) -> Reply:
        sizes = {"upload_bytes": 100, "download_bytes": 1000}
        client, plan = request.client, request.plan
        if self.silent(client, plan.round_number):
            return Failure(client=client, code=FailureCode.NO_REPLY)
        try:
            if request.kind == "evaluate":
                return check_evaluate_reply(client, self.scores(client), plan=plan, **sizes)
            if client in self.lies:
                vector, numbers = self.lies[client](request, spec)
            else:
                update = Update(self.learned(client, spec))
                trained = Trained(update=update, num_examples=client + 1, mean_loss=0.5, steps=1)
                clipped = clipped_update(plan, trained, spec)
                vector, numbers = (
                    clipped.vector,
                    training_numbers(
                        plan, Learned(update=clipped, num_examples=trained.num_examples, mean_loss=trained.mean_loss)
                    ),
                )
                assert set(numbers) == reply_numbers(plan.config)
            return check_train_reply(client, {"update": vector}, numbers, plan=plan, spec=spec, **sizes)
        except ReplyError as error:
            return Failure(client=client, code=FailureCode(error.code), **sizes)


@dataclass
class PrivateRun:
    """A federation and all that a test looks at."""

    federation: Federation
    twin: Twin
    folder: RunFolder

    def params(self) -> Vector:
        """The last state's θ."""
        return self.folder.load_state().server.params

    def events(self) -> list[Event]:
        """The ledger's lines, their chain checked."""
        return read_events(self.folder.path / "ledger.jsonl")

    def releases(self, kind: str = "round.release") -> list[Release]:
        """The releases of one kind."""
        return [event.release() for event in self.events() if event.kind == kind]


@pytest.fixture
def unscored() -> Task:
    """A task without a metric that clients may release."""
    return Unscored()


@pytest.fixture
def tested() -> Task:
    """A task with a central test set."""
    return Tested()


@pytest.fixture
def begin(tmp_path):
    """Return a function that sets up a run with hidden clients; with the name of one that exists it goes on with it."""

    def call(
        name="run", *, clients=6, task=None, privacy=None, training=None, noise=None, observer=None, seed=0, **options
    ):
        federation = {key: options.pop(key) for key in list(options) if key not in Twin.__dataclass_fields__}
        tables = {
            "task": "scored",
            "seed": seed,
            "federation": {
                "clients": clients,
                "rounds": 3,
                "evaluation": "off",
                **{key.replace("_", "-"): value for key, value in federation.items()},
            },
            "training": training or {},
            "privacy": {"unit": "client", "noise-multiplier": 1.0, **(privacy or {})},
        }
        tables["privacy"] = {key: value for key, value in tables["privacy"].items() if value is not None}
        config = RunConfig.from_mapping(tables)
        try:
            folder = RunFolder.open(tmp_path / name)
        except RunUnreadableError:
            folder = RunFolder.create(tmp_path / name, config)
        clock = ManualClock()
        twin = Twin(clients, clock, **options)
        federation = Federation(
            config,
            task or Scored(),
            twin,
            folder,
            clock=clock,
            observer=observer or SilentObserver(),
            noise=noise or SimulatedNoise(SeedTree.root(seed).child("privacy")),
        )
        return PrivateRun(federation, twin, folder)

    return call
