"""What one client does in plain PyTorch: a resident model, ``torch.optim.SGD``, and Opacus where examples are hidden.

The loop and Flower's clients share it, so that what they differ in is the runtime.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from simulations.benchmarks.engine.needs import opacus
from simulations.benchmarks.engine.workloads import CHECKED_NOISE, Site, Workload

__all__ = ["LocalTraining"]


class LocalTraining:
    """A resident model and its optimiser, for one client after the other.

    Attributes:
        model: the module; its parameters are those of the last client that was trained.
    """

    def __init__(self, workload: Workload, of: Site) -> None:
        self._workload, self._site = workload, of
        self.model = of.module()
        self.parameters = list(self.model.parameters())
        sgd = torch.optim.SGD(self.model.parameters(), lr=workload.learning_rate)
        self._private = workload.unit == "example"
        self._module: nn.Module = self.model
        self._optimizer: Any = sgd
        if self._private:
            self._module = opacus("opacus.grad_sample.GradSampleModule")(self.model, loss_reduction="sum")
            self._optimizer = opacus("opacus.optimizers.DPOptimizer")(
                sgd,
                noise_multiplier=0.0 if workload.noise_multiplier == CHECKED_NOISE else workload.noise_multiplier,
                max_grad_norm=workload.bound_l2,
                expected_batch_size=workload.batch_size,
                loss_reduction="mean",  # divides the clipped sum by the expected size of a batch
            )

    def receive(self, received: Sequence[Tensor]) -> None:
        """Set the model to what the server sent."""
        with torch.no_grad():
            for own, sent in zip(self.parameters, received, strict=True):
                own.copy_(sent)

    def train(self, round_number: int, client: int, inputs: Tensor, targets: Tensor) -> None:
        """Take one pass over a client's examples."""
        for rows in self._batches(round_number, client):
            batch, wanted = inputs[rows], targets[rows]
            self._optimizer.zero_grad()
            output = self._module(batch)
            if self._private:  # a sum, which an empty batch has, too
                loss = functional.cross_entropy(output, wanted, reduction="sum")
            else:
                loss = functional.cross_entropy(output, wanted)
            loss.backward()
            self._optimizer.step()

    def _batches(self, round_number: int, client: int) -> list[Tensor]:
        """Return the rows of each step."""
        rows: list[NDArray[np.int64]]
        if self._private:
            rows = self._site.poisson_batches(round_number, client)
        else:
            order, batch = self._site.order(round_number, client), self._workload.batch_size
            rows = [order[start : start + batch] for start in range(0, len(order), batch)]
        return [torch.from_numpy(each) for each in rows]
