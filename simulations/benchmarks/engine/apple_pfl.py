"""Apple's pfl 0.6 in one process: its own FederatedAveraging, PyTorchModel and, for privacy, GaussianMechanism.

pfl takes batches in the order in which a user's data lies, so a user's data is laid in the order of the round.
"""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from simulations.benchmarks.engine.gate import Gate
from simulations.benchmarks.engine.needs import check
from simulations.benchmarks.engine.workloads import CHECKED_NOISE, Site, Workload, site

__all__ = ["run"]


class _Learner(nn.Module):
    """A module as pfl wants it: with its loss and its metrics."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy of a batch."""
        return functional.cross_entropy(self.inner(inputs), targets)

    def metrics(self, inputs: Tensor, targets: Tensor) -> dict[str, Any]:
        """Return the loss, which pfl asks for before and after the first iteration of a run."""
        from pfl.metrics import Weighted

        with torch.no_grad():
            return {"loss": Weighted(float(self.loss(inputs, targets)) * len(targets), len(targets))}


def run(workload: Workload, rounds: int, gate: Gate) -> None:
    """Run so many central iterations, each when the gate opens.

    Raises:
        MissingError: pfl is not installed.
        ValueError: examples are to be hidden, which pfl has no local training for.
    """
    check("pfl")
    if workload.unit == "example":
        raise ValueError("pfl has no example-level DP-SGD")
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.hyperparam.base import NNEvalHyperParams, NNTrainHyperParams
    from pfl.metrics import Metrics
    from pfl.model.pytorch import PyTorchModel

    np.random.seed(workload.seed)
    asyncio.set_event_loop(asyncio.new_event_loop())
    of = site(workload)
    learner = _Learner(of.module())
    model = PyTorchModel(learner, torch.optim.SGD, torch.optim.SGD(learner.parameters(), lr=1.0))
    data = _Users(of, workload)

    class Turns(TrainingProcessCallback):  # type: ignore[misc]
        """Goes through the gate after each iteration, and before the next."""

        def after_central_iteration(self, aggregate_metrics: Any, model: Any, *, central_iteration: int) -> Any:
            gate.end(lambda: of.vector(dict(learner.inner.named_parameters())))
            data.round_number = central_iteration + 2
            if central_iteration + 1 < rounds:
                gate.begin()
            return False, Metrics()

    federated = data.federated()
    gate.begin()
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=rounds,
            evaluation_frequency=rounds,  # pfl evaluates in the first iteration all the same
            train_cohort_size=workload.clients,
            val_cohort_size=0,
        ),
        SimulatedBackend(training_data=federated, val_data=federated, postprocessors=_postprocessors(workload)),
        model,
        NNTrainHyperParams(
            local_num_epochs=1, local_learning_rate=workload.learning_rate, local_batch_size=workload.batch_size
        ),
        NNEvalHyperParams(local_batch_size=workload.examples),
        callbacks=[Turns()],
        send_metrics_to_platform=False,
    )


class _Users:
    """The clients as pfl's users.

    Attributes:
        round_number: the round whose order the data is laid in.
    """

    def __init__(self, of: Site, workload: Workload) -> None:
        self.round_number = 1
        self._site, self._workload = of, workload
        self._held = [of.examples(client) for client in range(workload.clients)]

    def federated(self) -> Any:
        """Return pfl's data set: everybody in turn, so that a cohort of all is everybody."""
        from pfl.data.federated_dataset import FederatedDataset
        from pfl.data.sampling import get_user_sampler

        sampler = get_user_sampler("minimize_reuse", list(range(self._workload.clients)))
        return FederatedDataset(self._user, sampler)

    def _user(self, client: int) -> Any:
        """Return one user's data."""
        from pfl.data.dataset import Dataset

        rows = torch.from_numpy(self._site.order(self.round_number, client))
        held = self._held[client]
        return Dataset((held.inputs[rows], held.targets[rows]), user_id=str(client))


def _postprocessors(workload: Workload) -> list[Any]:
    """Return how updates are weighted, and what hides clients."""
    from pfl.aggregate.weighting import WeightByDatapoints, WeightByUser
    from pfl.privacy.gaussian_mechanism import GaussianMechanism
    from pfl.privacy.privacy_mechanism import CentrallyAppliedPrivacyMechanism

    if workload.unit == "none":
        return [WeightByDatapoints()]
    noise = 0.0 if workload.noise_multiplier == CHECKED_NOISE else workload.noise_multiplier
    return [WeightByUser(), CentrallyAppliedPrivacyMechanism(GaussianMechanism(workload.bound_l2, noise))]
