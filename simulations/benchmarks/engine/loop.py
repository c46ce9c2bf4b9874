"""The plain sequential PyTorch loop that needs no framework; with Opacus where examples are hidden."""

from __future__ import annotations

import torch
from torch import Tensor

from simulations.benchmarks.engine.gate import Gate
from simulations.benchmarks.engine.local import LocalTraining
from simulations.benchmarks.engine.workloads import CHECKED_NOISE, Workload, site

__all__ = ["run"]


def run(workload: Workload, rounds: int, gate: Gate) -> None:
    """Train every client, one after the other, and take the mean of what they learned."""
    of = site(workload)
    training = LocalTraining(workload, of)
    held = [of.examples(client) for client in range(workload.clients)]
    names = [name for name, _ in training.model.named_parameters()]
    world = [parameter.detach().clone() for parameter in training.parameters]
    for number in range(1, rounds + 1):
        gate.begin()
        total = [torch.zeros_like(each) for each in world]
        for client, examples in enumerate(held):
            training.receive(world)
            training.train(number, client, examples.inputs, examples.targets)
            _add(total, world, training.parameters, workload)
        _move(world, total, workload)
        gate.end(lambda: of.vector(dict(zip(names, world, strict=True))))


@torch.no_grad()
def _add(total: list[Tensor], world: list[Tensor], trained: list[torch.nn.Parameter], workload: Workload) -> None:
    """Add a client's update to the sum, clipped where clients are hidden."""
    updates = [own - sent for own, sent in zip(trained, world, strict=True)]
    scale = 1.0
    if workload.unit == "client":
        norm = float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(each) for each in updates])))
        scale = min(1.0, workload.bound_l2 / max(norm, 1e-12))
    for each, update in zip(total, updates, strict=True):
        each.add_(update, alpha=scale)


@torch.no_grad()
def _move(world: list[Tensor], total: list[Tensor], workload: Workload) -> None:
    """Move the model by the mean update, noised where clients are hidden."""
    for each, summed in zip(world, total, strict=True):
        if workload.unit == "client" and workload.noise_multiplier != CHECKED_NOISE:
            summed.add_(torch.randn_like(summed), alpha=workload.noise_multiplier * workload.bound_l2)
        each.add_(summed, alpha=1 / workload.clients)
