"""Flower 1.41 on its own simulation runtime: a ServerApp and a ClientApp as its tutorials have them, on two Ray actors.

Each actor keeps its model; no round is evaluated. Under client-level privacy the strategy is in Flower's own wrapper.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg
from flwr.simulation import run_simulation

from simulations.benchmarks.engine.gate import Gate
from simulations.benchmarks.engine.local import LocalTraining
from simulations.benchmarks.engine.needs import check
from simulations.benchmarks.engine.workloads import CHECKED_NOISE, Workload, site

__all__ = ["client_app", "run"]

client_app = ClientApp()
"""What the actors run; a module's own, so that it is not pickled with every message."""


class _Resident:
    """What an actor keeps from one client to the next."""

    def __init__(self, workload: Workload) -> None:
        torch.set_num_threads(1)
        of = site(workload)
        self.training = LocalTraining(workload, of)
        self.examples = lru_cache(maxsize=None)(of.examples)


@lru_cache(maxsize=1)
def _resident(workload: str) -> _Resident:
    """Return what this actor keeps for a workload."""
    return _Resident(Workload.from_json(workload))


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """Train the received model on this client's examples, and answer with the model."""
    told = message.content.config_records["config"]
    resident = _resident(str(told["workload"]))
    client = int(context.node_config["partition-id"])
    training, examples = resident.training, resident.examples(client)
    training.model.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
    training.train(int(str(told["server-round"])), client, examples.inputs, examples.targets)
    content = RecordDict(
        {
            "arrays": ArrayRecord(training.model.state_dict()),
            "metrics": MetricRecord({"num-examples": len(examples)}),
        }
    )
    return Message(content, reply_to=message)


def run(workload: Workload, rounds: int, gate: Gate, *, actors: int = 2) -> None:
    """Run so many rounds, each when the gate opens.

    Raises:
        MissingError: Ray is not installed.
        RuntimeError: a client failed.
    """
    check("ray")
    of = site(workload)
    failed: list[str] = []
    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, _: Context) -> None:
        def after_round(number: int, arrays: ArrayRecord) -> None:
            if number:
                gate.end(lambda: of.vector(arrays.to_torch_state_dict()))
            if number < rounds:
                gate.begin()

        try:
            _strategy(workload).start(
                grid,
                ArrayRecord(of.module().state_dict()),
                num_rounds=rounds,
                train_config=ConfigRecord({"workload": workload.to_json()}),
                evaluate_fn=after_round,
            )
        except EOFError:  # nobody wants more rounds
            raise
        except Exception as error:  # Flower's runtime would log it and return as if all were well
            failed.append(f"{type(error).__name__}: {error}")
            raise

    backend: Any = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": actors}}
    run_simulation(server_app, client_app, num_supernodes=workload.clients, backend_config=backend)
    if failed:
        raise RuntimeError(failed[0])


def _strategy(workload: Workload) -> Any:
    """Return FedAvg of everybody, in Flower's wrapper where clients are hidden."""
    plain = _Complete(fraction_evaluate=0.0, min_train_nodes=workload.clients, min_available_nodes=workload.clients)
    if workload.unit != "client":
        return plain
    noise = 0.0 if workload.noise_multiplier == CHECKED_NOISE else workload.noise_multiplier
    return DifferentialPrivacyServerSideFixedClipping(plain, noise, workload.bound_l2, workload.clients)


class _Complete(FedAvg):
    """FedAvg that refuses to go on without a client: a round of fewer would look fast."""

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        """Return the mean, of all."""
        answered = list(replies)
        lost = [each for each in answered if each.has_error()]
        if lost or len(answered) < self.min_train_nodes:
            reason = json.dumps(str(lost[0].error)) if lost else "no reply"
            raise RuntimeError(f"{len(answered) - len(lost)} of {self.min_train_nodes} clients answered: {reason}")
        return super().aggregate_train(server_round, answered)
