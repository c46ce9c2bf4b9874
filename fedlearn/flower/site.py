"""What every client of one run has in a process: the task, its model, and who holds what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

from fedlearn.algorithms import build_algorithm
from fedlearn.config import RunConfig, Trainer
from fedlearn.data.loaders import Dealt, Distribution, distribute_data
from fedlearn.data.poisoning import flip_labels
from fedlearn.errors import ConfigError, ReplyError
from fedlearn.federation.groups import group_size
from fedlearn.federation.messages import FailureCode
from fedlearn.learning import ClientData, Examples, build_flat_model, computing
from fedlearn.learning.aside import AsideError, aside
from fedlearn.learning.task import prepares
from fedlearn.learning.vectorized import Choice, Vectorised, choose_trainer
from fedlearn.profiling import spanned
from fedlearn.sources import SeedTree
from fedlearn.tasks import load_task

__all__ = ["Site", "site_of"]

_ALL: tuple[Vectorised, ...] = ("stacked", "vmap")
_MOST_KEPT_BYTES = 1 << 27
_TRIAL_S = 60.0
_LOOKED_AT, _TRIED = 10, 64  # clients, and examples of theirs


class Site:
    """The task, the model and the data of one run, built once a process and used for every client in it."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.task = load_task(config.task)
        self.seeds = SeedTree.root(config.seed)
        self.model = build_flat_model(self.task, self.seeds.child("initialise"))
        self._distribution: Distribution | None = None
        self._kept: dict[int, ClientData] = {}
        self._kept_bytes = 0

    @spanned("load data")
    def data(self, node_config: Mapping[str, bool | bytes | float | int | str], client: int) -> ClientData:
        """Return what a client holds, prepared by the task.

        Raises:
            ReplyError: ``bad-request`` where there is no such client, ``bad-data`` where a number is not finite.
        """
        path = node_config.get("data-path")
        if path is None and client in self._kept and "label-flip" not in node_config:
            return self._kept[client]
        if path is None and not 0 <= client < self.distribution().clients:
            raise ReplyError(FailureCode.BAD_REQUEST, f"partition-id {client}, but the run has fewer clients")
        if path is None and not prepares(self.task):
            data = self.distribution().client(client)
        else:
            # The same chance in every round, so that a task that splits its data here splits it one way.
            with computing(self.seeds.child("prepare", client)):
                held = self.distribution().client(client) if path is None else self.task.load_local(Path(str(path)))
                data = self.task.prepare(held)
        _check_numbers(data)
        if "label-flip" in node_config:
            return replace(data, train=flip_labels(data.train, int(node_config["label-flip"])))
        if path is None and isinstance(self.distribution(), Dealt) and not prepares(self.task):
            self._keep(client, data)
        return data

    def distribution(self) -> Distribution:
        """Return who holds what in a simulation; dealt out once."""
        if self._distribution is None:
            self._distribution = distribute_data(self.task, self.config)
        return self._distribution

    def _keep(self, client: int, data: ClientData) -> None:
        """Keep what a client holds of a pool for the next round: no more than a few megabytes of it, whoever comes."""
        parts = (data.train,) if data.test is None else (data.train, data.test)
        size = sum(each.nbytes for part in parts for each in (part.inputs, part.targets))
        if self._kept_bytes + size <= _MOST_KEPT_BYTES:
            self._kept[client] = data
            self._kept_bytes += size

    def trainer(self, wanted: Trainer) -> Choice:
        """Return how the clients of a simulation are trained: a function of the run, the same in every process.

        Args:
            wanted: what the scenario asks for.

        Raises:
            ConfigError: a trainer is asked for by name that the model does not go with.
        """
        if wanted == "sequential":
            return Choice(trainer=None)
        if self.config.secagg.mode != "off":
            reason = "" if wanted == "auto" else "under secure aggregation every client masks its own update"
            choice = Choice(trainer=None, reason=reason)
        else:
            self.distribution()
            try:
                choice = aside(lambda: self._choice(wanted), _TRIAL_S)
            except AsideError as error:
                choice = Choice(
                    trainer=None, reason=f"a few clients were to be trained many at once on trial, and {error}"
                )
        if choice.trainer is None and wanted != "auto":
            reason = f'"{wanted}" does not go with this run: {choice.reason}'
            raise ConfigError("simulation.trainer", f'{reason}. Leave it out, or set "sequential"')
        return choice

    def _choice(self, wanted: Vectorised | Literal["auto"]) -> Choice:
        """Try which trainer goes with the model."""
        return choose_trainer(
            self.model,
            self.task,
            self._tried(),
            self.config.training,
            proximal_mu=self._proximal_mu(),
            seeds=self.seeds.child("trial"),
            allowed=_ALL if wanted == "auto" else (wanted,),
            together=group_size(self.config.federation.cohort) if wanted == "auto" else None,
        )

    def _tried(self) -> list[Examples]:
        """Return the training examples of the first few clients that can be loaded, until there are enough."""
        found: list[Examples] = []
        for client in range(min(self.distribution().clients, _LOOKED_AT)):
            try:
                examples = self.data({}, client).train
            except Exception:  # noqa: S112 (its own round will say so, with the client's number)
                continue
            if len(examples):
                found.append(examples)
            if sum(map(len, found)) >= _TRIED:
                break
        return found

    def _proximal_mu(self) -> float:
        """Return what the run's algorithm adds to a client's loss."""
        training = self.config.training
        return build_algorithm(
            training.algorithm, server_learning_rate=training.server_learning_rate, options=training.options
        ).proximal_mu


@lru_cache(maxsize=2)
def site_of(config: str) -> Site:
    """Return the site of a configuration, given as canonical JSON."""
    return Site(RunConfig.from_json(config))


def _check_numbers(data: ClientData) -> None:
    """Refuse data with NaN or infinity in it: trained on, it would look as if the model had diverged."""
    for purpose, examples in (("training", data.train), ("test", data.test)):
        if examples is None:
            continue
        for what, tensor in (("inputs", examples.inputs), ("targets", examples.targets)):
            if tensor.is_floating_point() and not tensor.isfinite().all():
                row = int((~tensor.isfinite()).nonzero()[0, 0])
                reason = f"the {what} of {purpose} example {row} are not finite, after the task prepared them"
                raise ReplyError(FailureCode.BAD_DATA, reason)
