"""What every engine is given to do, and the chance that all of them share: data, first parameters, order of examples.

A workload is plain data, so that it can be sent to an engine in another process.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedlearn.config import RunConfig
from fedlearn.data.loaders import distribute_data
from fedlearn.learning.model import build_flat_model
from fedlearn.learning.task import Examples, Task
from fedlearn.privacy.gaussian import bernoulli
from fedlearn.privacy.noise import SimulatedNoise
from fedlearn.scenario import read_scenario
from fedlearn.sources import SeedTree
from fedlearn.tasks import load_task

__all__ = ["CHECKED_NOISE", "WORKLOADS", "Site", "Workload", "site"]

CHECKED_NOISE = 1e-9
"""The noise multiplier with which engines are compared: none, where none can be asked for."""

_NEVER_SPENT = "privacy.max-epsilon=1e6"
"""A budget that nothing reaches, so that accounting is timed with the rest."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What one round is.

    Attributes:
        name: in one word.
        title: for people.
        task: a class of ``task.py``.
        clients: those of a round.
        population: those there are; 0: as many as a round has.
        examples: those of each client.
        batch_size: examples a step; one epoch.
        learning_rate: of plain SGD.
        unit: whose presence is hidden.
        bound_l2: the clipping norm, of a client's update or of an example's gradient.
        noise_multiplier: σ of the noise over ``bound_l2``; where nothing is hidden it has no meaning.
        on_demand: whether a client's data is made when it is asked for, instead of a pool's being dealt out.
        seed: of everything.
    """

    name: str
    title: str
    task: str = "Mlp"
    clients: int = 100
    population: int = 0
    examples: int = 20
    batch_size: int = 10
    learning_rate: float = 0.1
    unit: Literal["none", "client", "example"] = "none"
    bound_l2: float = 1.0
    noise_multiplier: float = 1.0
    on_demand: bool = False
    seed: int = 0

    def config(self, *, rounds: int, workers: int = 0) -> RunConfig:
        """Return the workload as our own configuration."""
        population = self.population or self.clients
        made = self.examples if self.on_demand else self.examples * population
        hidden = [
            f"privacy.unit={self.unit}",
            f"privacy.bound-l2={self.bound_l2!r}",
            f"privacy.noise-multiplier={self.noise_multiplier!r}",
        ]
        if self.noise_multiplier != CHECKED_NOISE:
            hidden.append(_NEVER_SPENT)
        if self.unit == "client":
            hidden.append("federation.sampling=fixed-size")
        return read_scenario(
            f"{Path(__file__).with_name('task.py')}:{self.task}",
            [
                f"seed={self.seed}",
                f"federation.clients={population}",
                f"federation.cohort={self.clients}",
                f"federation.rounds={rounds}",
                "federation.evaluation=off",
                f"data.partition={'natural' if self.on_demand else 'iid'}",
                f"data.path={Path(__file__).with_name('made')}/{made}",
                "training.algorithm=fedavg",
                "training.local-epochs=1",
                f"training.batch-size={self.batch_size}",
                f"training.learning-rate={self.learning_rate!r}",
                *(hidden if self.unit != "none" else []),
                f"simulation.workers={workers}",
            ],
        )

    def to_json(self) -> str:
        """Return the workload as text."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Workload:
        """Return the workload of a text."""
        return cls(**json.loads(text))


# The clipping norms are the medians of what is clipped: some is, and some is not.
WORKLOADS = (
    Workload(name="mlp", title="MLP 784-128-10, 100 clients × 20 examples, batch 10"),
    Workload(
        name="cnn",
        title="CNN 28,938 parameters, 20 clients × 50 examples, batch 10",
        task="SmallCnn",
        clients=20,
        examples=50,
        learning_rate=0.02,
    ),
    Workload(
        name="mlp-client-dp", title="the MLP, clients hidden (clip, Gaussian noise)", unit="client", bound_l2=0.53
    ),
    Workload(name="mlp-example-dp", title="the MLP, examples hidden (DP-SGD)", unit="example", bound_l2=11.9),
)


class Site:
    """The task, the model and the data of a workload, the same for every engine.

    Attributes:
        task: its task.
        spec: of its parameters.
        first: the parameters before the first round, shape (d,).
    """

    def __init__(self, workload: Workload) -> None:
        config = workload.config(rounds=1)
        self.task: Task = load_task(config.task)
        self._seeds = SeedTree.root(config.seed)
        self._workload = workload
        model = build_flat_model(self.task, self._seeds.child("initialise"))
        self.spec = model.spec
        self.first: NDArray[np.float32] = model.vector().astype(np.float32)
        self._held = distribute_data(self.task, config)

    def module(self) -> nn.Module:
        """Return a plain module with the first parameters."""
        module = self.task.build_model()
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(torch.from_numpy(self.first[self.spec.slices[name]]).view(parameter.shape))
        return module

    def vector(self, parameters: Mapping[str, Tensor]) -> NDArray[np.float32]:
        """Return named parameters as one vector, shape (d,)."""
        vector = np.empty_like(self.first)
        for name, place in self.spec.slices.items():
            vector[place] = parameters[name].detach().numpy().reshape(-1)
        return vector

    def examples(self, client: int) -> Examples:
        """Return what a client holds.

        Raises:
            RuntimeError: it is not as many examples as the workload says.
        """
        held = self._held.client(client).train
        if len(held) != self._workload.examples:
            raise RuntimeError(f"client {client} holds {len(held)} examples, not {self._workload.examples}")
        return held

    def order(self, round_number: int, client: int) -> NDArray[np.int64]:
        """Return the order of a client's examples in a round, shape (examples,): that of our own trainer."""
        generator = self._of(round_number, client).child("batches").generator()
        return generator.permutation(self._workload.examples).astype(np.int64)

    def poisson_batches(self, round_number: int, client: int) -> list[NDArray[np.int64]]:
        """Return the rows of each step of DP-SGD: each example in it with probability B/n, as our own draws them."""
        noise = SimulatedNoise(self._of(round_number, client).child("privacy"))
        size, batch = self._workload.examples, self._workload.batch_size
        steps = range(-(-size // batch))
        return [np.flatnonzero(bernoulli(noise.stream("batch", step), batch / size, size)) for step in steps]

    def _of(self, round_number: int, client: int) -> SeedTree:
        """Return a client's seeds in a round."""
        return self._seeds.child("round", round_number, "client", client)


@lru_cache(maxsize=2)
def site(workload: Workload) -> Site:
    """Return the site of a workload, built once a process."""
    return Site(workload)
