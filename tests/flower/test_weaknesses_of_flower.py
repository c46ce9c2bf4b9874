"""Side by side, on the same inputs: what one client does to a model in Flower 1.41, and what it does here.

Should Flower mend one of these, its half of the test fails and can go: ours has to hold without it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import LocalDpMod
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg
from flwr.supercore.differential_privacy import add_gaussian_noise_inplace, compute_clip_model_update
from numpy.typing import NDArray
from torch import nn

from fedlearn.arrays import ParamEntry, ParamSpec
from fedlearn.config import RunConfig
from fedlearn.errors import RoundFailedError
from fedlearn.federation.observer import SilentObserver
from fedlearn.federation.rounds import Federation
from fedlearn.federation.run_folder import RunFolder
from fedlearn.flower.grid import LocalGrid
from fedlearn.flower.network import GridNetwork
from fedlearn.learning import Task, build_flat_model
from fedlearn.privacy.accounting import epsilon
from fedlearn.privacy.clipping import Update, clip
from fedlearn.privacy.ledger import read_events, releases_of
from fedlearn.privacy.mechanisms import Gaussian
from fedlearn.privacy.noise import SecureNoise, SimulatedNoise
from fedlearn.privacy.releases import Query, Release, Sampling
from fedlearn.sources import ManualClock, SecureRandom, SeedTree

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


# -- differential privacy ------------------------------------------------------------------------------------------


def flower_clips(update: list[NDArray], bound: float = 1.0) -> list[NDArray]:
    """Return how far a model moves by an update that Flower has clipped."""
    before = [np.zeros_like(array) for array in update]
    after = [array.copy() for array in update]
    compute_clip_model_update(after, before, bound)
    return after


def we_clip(update: list[NDArray], bound: float = 1.0) -> NDArray:
    """Return the same of ours: the arrays are one flat vector."""
    entries = [
        ParamEntry(name=str(number), shape=array.shape, dtype=str(array.dtype), trainable=True)
        for number, array in enumerate(update)
    ]
    vector = ParamSpec(tuple(entries)).flatten({str(number): array for number, array in enumerate(update)})
    return clip(Update(vector), bound).vector


def length(update: list[NDArray]) -> float:
    return float(np.sqrt(sum(float(np.square(array, dtype=np.float64).sum()) for array in update)))


TEMPERATURE = [np.full(3, 0.1, np.float32), np.array(500.0, np.float32)]
NOTHING = [np.zeros(3, np.float32), np.zeros((), np.float32)]
POISONED = [np.array([np.nan, 1e6, -1e6], np.float32)]
WHOLE = [np.full(3, 7.0, np.float32)]


def test_a_usual_update_is_clipped_by_both():
    assert length(flower_clips(WHOLE)) == pytest.approx(1.0, rel=1e-6)
    np.testing.assert_allclose(we_clip(WHOLE), flower_clips(WHOLE)[0], rtol=1e-6)


def test_in_flower_a_parameter_without_dimensions_escapes_the_clip_and_here_it_does_not():
    assert float(flower_clips(TEMPERATURE)[1]) == 500.0  # the claimed bound is 1
    assert np.linalg.norm(we_clip(TEMPERATURE)) == pytest.approx(1.0, rel=1e-6)


def test_in_flower_a_zero_update_ends_the_round_and_here_it_is_one():
    with pytest.raises(ZeroDivisionError):
        flower_clips(NOTHING)
    assert not we_clip(NOTHING).any()


def test_in_flower_a_nan_passes_and_takes_the_rest_along_unclipped_and_here_all_becomes_zero():
    with np.errstate(invalid="ignore"):
        (passed,) = flower_clips(POISONED)
    assert np.isnan(passed[0])
    assert np.abs(passed[1:]).min() == 1e6
    assert not we_clip(POISONED).any()


def test_in_flower_k_records_move_the_model_by_the_root_of_k_bounds_and_here_a_reply_is_one_vector(tmp_path):
    records = 9
    moved = [array for _ in range(records) for array in flower_clips(WHOLE)]  # its strategy clips record by record
    assert length(moved) == pytest.approx(3.0, rel=1e-6)
    assert np.linalg.norm(we_clip(WHOLE * records)) == pytest.approx(1.0, rel=1e-6)
    source = inspect.getsource(DifferentialPrivacyServerSideFixedClipping.aggregate_train)
    assert "for arr_name, record in reply.content.array_records.items():" in source
    one_more = {"more": ArrayRecord({"more": Array(np.zeros(SIZE, np.float32))})}
    _, failures = private(tmp_path, extra=one_more)
    assert failures == {"2": "bad-reply"}


def test_flowers_noise_repeats_with_numpys_global_seed_and_ours_does_not():
    theirs, mine = [], []
    for _ in range(2):
        np.random.seed(7)
        arrays = [np.zeros(100)]
        add_gaussian_noise_inplace(arrays, 1.0)
        theirs.append(arrays[0])
        mechanism = Gaussian(noise_multiplier=1.0, bound_l2=1.0)
        state = mechanism.init()
        _, noised = mechanism.release(state, mechanism.begin(state, 100), SecureNoise(SecureRandom()))
        mine.append(noised.vector)
    assert (theirs[0] == theirs[1]).all()
    assert not (mine[0] == mine[1]).any()


def flower_round(present: int, sampled: int, *, size: int = 20_000, failed: int = 0) -> NDArray | None:
    """Return Flower's private mean of ``present`` zero updates, of ``sampled`` clients; z = C = 1."""
    strategy = DifferentialPrivacyServerSideFixedClipping(FedAvg(), 1.0, 1.0, sampled)
    with LocalGrid(ClientApp(), clients=sampled):
        strategy.current_arrays = ArrayRecord({"w": Array(np.zeros(size, np.float32))})
        replies = []
        for client in range(present + failed):
            asked = Message(RecordDict(), client + 1, "train")
            if client >= present:
                replies.append(Message(Error(code=0), reply_to=asked))
                continue
            vector = np.zeros(size, np.float32)
            vector[0] = 1e-9  # an update of zero ends the round, see above
            content = {"arrays": ArrayRecord({"w": Array(vector)}), "metrics": MetricRecord({"num-examples": 1})}
            replies.append(Message(RecordDict(content), reply_to=asked))
        arrays, _ = strategy.aggregate_train(1, replies)
    return None if arrays is None else arrays["w"].numpy()


def test_in_flower_dropouts_take_noise_away_and_here_they_do_not(tmp_path):
    """Half of eight are missing: a client moves the mean by C/4, and the noise is still C/8: half of what was said."""
    np.random.seed(0)
    noise = flower_round(4, 8)
    stddev, moves = float(noise.std()), 1.0 / 4
    assert stddev / moves == pytest.approx(0.5, rel=0.05)
    for dropped in (0, 2):
        _, release = released(tmp_path / str(dropped), dropped)
        assert release.noise_multiplier == pytest.approx(1.0, rel=1e-12)


def test_in_flower_a_client_that_fails_costs_everybody_the_round_and_here_it_costs_itself(tmp_path):
    assert flower_round(7, 8, failed=1) is None
    moved, release = released(tmp_path, 1)
    assert release.what == "model"
    assert moved.all()


@pytest.mark.parametrize("claimed", [10.0, 20.0, 50.0])
def test_flowers_formula_for_local_noise_does_not_keep_the_epsilon_it_is_given(claimed):
    """√(2 ln(1.25/δ))/ε is a theorem for ε below 1 only; the noise it really draws costs more."""
    delta = 1e-5
    stddev = math.sqrt(2 * math.log(1.25 / delta)) / claimed
    assert local_noise(claimed, delta, sensitivity=1.0).std() == pytest.approx(stddev, rel=0.03)
    assert gaussian_epsilon(stddev=stddev, sensitivity=1.0, delta=delta) > claimed


def test_flowers_local_noise_believes_any_sensitivity():
    """Two updates of norm 1 are 2 apart; set to the clipping norm, as it is everywhere, a claim of 0.9 is false."""
    drawn = local_noise(0.9, 1e-5, sensitivity=1.0)
    assert gaussian_epsilon(stddev=float(drawn.std()) * 1.05, sensitivity=2.0, delta=1e-5) > 0.9 * 1.4
    local_noise(0.9, 1e-5, sensitivity=0.0)  # no noise at all, and no complaint


def local_noise(epsilon: float, delta: float, *, sensitivity: float) -> NDArray:
    """Return what Flower's ``LocalDpMod`` adds to an update of next to nothing."""
    np.random.seed(1)
    sent = RecordDict({"arrays": ArrayRecord({"w": Array(np.zeros(20_000, np.float32))})})
    with LocalGrid(ClientApp(), clients=1):
        message = Message(sent, 1, "train")

        def client(message: Message, context: Context) -> Message:
            vector = np.zeros(20_000, np.float32)
            vector[0] = 1e-9
            return Message(RecordDict({"arrays": ArrayRecord({"w": Array(vector)})}), reply_to=message)

        context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
        reply = LocalDpMod(1.0, sensitivity, epsilon, delta)(message, context, client)
        return reply.content["arrays"]["w"].numpy()


def gaussian_epsilon(*, stddev: float, sensitivity: float, delta: float) -> float:
    """Return what one release with this noise costs, by our accountant."""
    release = Release(
        what="update",
        round_number=1,
        unit="client",
        adjacency="zero-out",
        mechanism="gaussian",
        queries=(Query(name="update", sensitivity_l2=sensitivity, stddev=stddev),),
        sampling=Sampling(method="everyone", rate=1.0, population=100),
        simulated=False,
    )
    return epsilon([release], delta)


def private(
    folder: Path, *, dropped: int = 0, extra: dict[str, object] | None = None
) -> tuple[RunFolder, dict[str, str]]:
    """Return one round with hidden clients, some of which do not answer, or client 2 says more than it was asked."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        client = int(context.node_config["partition-id"])
        if client < dropped:
            return Message(Error(code=0), reply_to=message)
        content = {"update": ArrayRecord({"update": Array(np.full(SIZE, 0.01, np.float32))})}
        return Message(RecordDict({**content, **((extra or {}) if client == 2 else {})}), reply_to=message)

    @app.query("identify")
    def identify(message: Message, context: Context) -> Message:
        client = MetricRecord({"id": context.node_config["partition-id"]})
        return Message(RecordDict({"client": client}), reply_to=message)

    tables = {
        "task": "w",
        "federation": {"clients": CLIENTS, "rounds": 1, "evaluation": "off"},
        "privacy": {"unit": "client", "noise-multiplier": 1.0},
    }
    config, clock = RunConfig.from_mapping(tables), ManualClock()
    kept = RunFolder.create(folder / "run", config)
    with LocalGrid(app, clients=CLIENTS) as grid:
        Federation(
            config,
            Weights(),
            GridNetwork(grid, clock, clients=CLIENTS),
            kept,
            clock=clock,
            observer=SilentObserver(),
            noise=SecureNoise(SecureRandom()),
        ).run()
    (line,) = kept.metrics()
    return kept, line["failures"]


def released(folder: Path, dropped: int) -> tuple[NDArray, Release]:
    """Return how a private round moved the model, and what its ledger says of it."""
    kept, failures = private(folder, dropped=dropped)
    assert len(failures) == dropped
    (release,) = releases_of(read_events(kept.path / "ledger.jsonl"))
    start = build_flat_model(Weights(), SeedTree.root(kept.config.seed).child("initialise")).vector()
    return kept.load_state().server.params - start, release
