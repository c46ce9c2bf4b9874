"""Side by side, on the same bad replies: what one client does to a model in Flower 1.41, and what it does here.

Should Flower mend one of these, its half of the test fails and can go: ours has to hold without it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from numpy.typing import NDArray
from torch import nn

from fedlearn.config import RunConfig
from fedlearn.errors import RoundFailedError
from fedlearn.federation.observer import SilentObserver
from fedlearn.federation.rounds import Federation
from fedlearn.federation.run_folder import RunFolder
from fedlearn.flower.grid import LocalGrid
from fedlearn.flower.network import GridNetwork
from fedlearn.learning import Task
from fedlearn.privacy.noise import SimulatedNoise
from fedlearn.sources import ManualClock, SeedTree

CLIENTS, SIZE = 4, 6
Bad = Callable[[NDArray], tuple[NDArray, int]]  # an honest vector → what the bad client says: vector and count


class Weights(Task):
    """Six weights."""

    def build_model(self) -> nn.Module:
        return nn.Linear(SIZE, 1, bias=False)


def honest(client: int) -> tuple[NDArray, int]:
    return np.full(SIZE, 0.1 * client, np.float32), 10


def flowers(bad: Bad) -> NDArray:
    """Return what Flower's FedAvg makes of three honest clients and a bad one."""
    with LocalGrid(ClientApp(), clients=CLIENTS):  # it tells Flower who makes messages here
        replies = []
        for client in range(CLIENTS):
            vector, count = honest(client) if client != 2 else bad(honest(2)[0])
            content = {
                "arrays": ArrayRecord({"w": Array(vector)}),
                "metrics": MetricRecord({"num-examples": count, "loss": 0.5}),
            }
            asked = Message(RecordDict(), client + 1, "train")
            replies.append(Message(RecordDict(content), reply_to=asked))
        arrays, _ = FedAvg().aggregate_train(1, replies)
        return arrays["w"].numpy()


def ours(folder: Path, bad: Bad, **federation: object) -> tuple[NDArray, dict[str, str]]:
    """Return the mean update that a round makes of the same clients, and who was left out of it."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        client = int(context.node_config["partition-id"])
        vector, count = honest(client) if client != 2 else bad(honest(2)[0])
        content = {
            "update": ArrayRecord({"update": Array(vector)}),
            "metrics": MetricRecord({"num-examples": count, "loss": 0.5}),
        }
        return Message(RecordDict(content), reply_to=message)

    @app.query("identify")
    def identify(message: Message, context: Context) -> Message:
        client = MetricRecord({"id": context.node_config["partition-id"]})
        return Message(RecordDict({"client": client}), reply_to=message)

    tables = {"task": "w", "federation": {"clients": CLIENTS, "rounds": 1, "evaluation": "off", **federation}}
    config, clock = RunConfig.from_mapping(tables), ManualClock()
    with LocalGrid(app, clients=CLIENTS) as grid:
        network = GridNetwork(grid, clock, clients=CLIENTS)
        kept = RunFolder.create(folder / "run", config)
        noise = SimulatedNoise(SeedTree.root(0))
        run = Federation(config, Weights(), network, kept, clock=clock, observer=SilentObserver(), noise=noise)
        start = run.initialise().server.params
        end = run.run().server.params
    (line,) = kept.metrics()
    return end - start, line["failures"]


def nan(vector: NDArray) -> tuple[NDArray, int]:
    return np.where(np.arange(SIZE) == 0, np.float32(np.nan), vector), 10


def infinite(vector: NDArray) -> tuple[NDArray, int]:
    return np.full(SIZE, np.inf, np.float32), 10


def longer(vector: NDArray) -> tuple[NDArray, int]:
    return np.ones(SIZE + 1, np.float32), 10


def one_number(vector: NDArray) -> tuple[NDArray, int]:
    return np.full(1, 50.0, np.float32), 10


def scalar(vector: NDArray) -> tuple[NDArray, int]:
    return np.array(50.0, np.float32), 10


def greedy(vector: NDArray) -> tuple[NDArray, int]:
    return np.full(SIZE, 7.0, np.float32), 10**12


def negative(vector: NDArray) -> tuple[NDArray, int]:
    return np.full(SIZE, 7.0, np.float32), -29


WITHOUT_IT = np.full(SIZE, (0.0 + 0.1 + 0.3) / 3)


def test_on_honest_replies_both_agree(tmp_path):
    theirs = flowers(lambda vector: (vector, 10))
    mine, failures = ours(tmp_path, lambda vector: (vector, 10))
    np.testing.assert_allclose(mine, theirs, rtol=1e-6)
    np.testing.assert_allclose(mine, 0.15, rtol=1e-6)
    assert failures == {}


@pytest.mark.parametrize(
    ("bad", "code"),
    [
        (nan, "not-finite"),
        (infinite, "not-finite"),
        (longer, "bad-reply"),
        (one_number, "bad-reply"),
        (scalar, "bad-reply"),
        (greedy, "bad-reply"),
        (negative, "bad-reply"),
    ],
)
def test_here_the_bad_client_is_left_out_and_the_model_is_that_of_the_others(tmp_path, bad, code):
    mean, failures = ours(tmp_path, bad)
    np.testing.assert_allclose(mean, WITHOUT_IT, rtol=1e-6)
    assert failures == {"2": code}


def test_here_a_round_of_only_bad_clients_ends_the_run_by_name(tmp_path):
    with pytest.raises(RoundFailedError, match="1 not-finite"):
        ours(tmp_path, nan, **{"min-respondents": CLIENTS, "round-tries": 1})


def test_in_flower_a_nan_poisons_the_model():
    assert np.isnan(flowers(nan)[0])
    assert not np.isfinite(flowers(infinite)).any()


def test_in_flower_a_wrong_shape_ends_the_run():
    with pytest.raises(ValueError, match="broadcast"):
        flowers(longer)


@pytest.mark.parametrize("bad", [one_number, scalar])
def test_in_flower_one_number_is_broadcast_over_the_whole_model(bad):
    np.testing.assert_allclose(flowers(bad), (0.0 + 0.1 + 50.0 + 0.3) / 4, rtol=1e-6)


def test_in_flower_a_claim_of_a_trillion_examples_owns_the_model():
    np.testing.assert_allclose(flowers(greedy), 7.0, rtol=1e-6)


def test_in_flower_a_negative_count_turns_the_others_around():
    assert (flowers(negative) < -100).all() or (flowers(negative) > 100).all()
