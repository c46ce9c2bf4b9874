"""Attacks on the secure aggregation of Flower 1.41, each on Flower's own workflow and mod, unmodified.

The server here is Flower's workflow on a wire that writes down what passes, which any server sees, or changes it, which
a lying one can. No attack uses a client's secrets: a test looks at them only to search a few seeds instead of all, and
one test of all is ``slow``.
"""

from __future__ import annotations

import json
import runpy
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import flwr.clientapp.mod
import flwr.serverapp
import numpy as np
import pytest
from cohort import RANDOM, Cohort, encoding, offer
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.client.mod import secaggplus_mod
from flwr.client.mod.secure_aggregation.secaggplus_mod import SecAggPlusState
from flwr.clientapp import ClientApp
from flwr.common import bytes_to_ndarray, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.common.secure_aggregation.crypto.shamir import combine_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import decrypt, encrypt, generate_shared_key
from flwr.common.secure_aggregation.ndarrays_arithmetic import (
    factor_extract,
    get_parameters_shape,
    parameters_addition,
    parameters_mod,
    parameters_subtraction,
)
from flwr.common.secure_aggregation.quantization import dequantize
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, RECORD_KEY_STATE, Key, Stage
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen, share_keys_plaintext_separate
from flwr.compat.client.numpy_client import NumPyClient
from flwr.compat.common import recorddict_compat as compat
from flwr.server.client_manager import SimpleClientManager
from flwr.server.compat.grid_client_proxy import GridClientProxy
from flwr.server.compat.legacy_context import LegacyContext
from flwr.server.strategy import FedAvg as LegacyFedAvg
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD
from flwr.server.workflow.constant import Key as WorkflowKey
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.primitives.asymmetric import (
    bytes_to_private_key,
    bytes_to_public_key,
    generate_key_pairs,
    public_key_to_bytes,
)
from numpy.typing import NDArray

from fedlearn.federation.run_folder import RunFolder
from fedlearn.flower.grid import LocalGrid
from fedlearn.scenario import read_scenario
from fedlearn.secagg.derivation import pair_mask_key
from fedlearn.secagg.errors import (
    BadAdvertisementError,
    GraphError,
    PolicyViolationError,
    RoundAbortedError,
    StageError,
)
from fedlearn.secagg.keys import AgreementKey
from fedlearn.secagg.messages import MaskedInput, Roster, Survivors, Unmask
from fedlearn.secagg.prg import add_masks
from fedlearn.simulation.engine import simulate

HELPER = runpy.run_path(str(Path(__file__).with_name("linear_complexity.py")))
linear_complexity, shortest_recurrence = HELPER["linear_complexity"], HELPER["shortest_recurrence"]


def stream_of(key: bytes, words: int = 64) -> bytes:
    """Return the beginning of our mask of a key."""
    vector = np.zeros(words, dtype=np.uint64)
    add_masks(vector, plus=[key])
    return vector.tobytes()


def flipped(key: bytes, bit: int) -> bytes:
    """Return a key with one bit changed."""
    return (int.from_bytes(key, "big") ^ 1 << bit).to_bytes(32, "big")


CLIENTS, VICTIM, THRESHOLD = 5, 3, 3
WEIGHT = 1000  # examples of each client, which is Flower's ``max_weight``: a factor of one
CLIP, TARGET, MODULUS = 8.0, 1 << 22, 1 << 32  # Flower's defaults
STEP = 2 * CLIP / TARGET
"""A multiple of this is quantised without rounding, so that a vector that was recovered is equal and not close."""

BEFORE = 7.0  # the global model, which no mean below comes near
MT19937 = 19_937
"""The order of that generator's recurrence, whatever the seed."""

Masked = list[NDArray]


def updates(size: int = 40, clients: int = CLIENTS) -> dict[int, NDArray]:
    """Return what each node has learned."""
    random = np.random.default_rng(0)
    return {node: random.integers(-(2**17), 2**17, size) * STEP for node in range(1, clients + 1)}


# -- a round of Flower, and who listens ----------------------------------------------------------------------------


class Wire(LocalGrid):
    """What the server of a round sees: what it sent to whom and what came back. The subclasses lie."""

    def __init__(self, app: ClientApp, clients: int) -> None:
        self.sent: dict[str, dict[int, ConfigRecord]] = {stage: {} for stage in Stage.all()}
        self.came: dict[str, dict[int, RecordDict]] = {stage: {} for stage in Stage.all()}
        self.errors: dict[str, dict[int, str]] = {stage: {} for stage in Stage.all()}
        super().__init__(app, clients=clients)

    def loses(self, stage: str, node: int) -> bool:
        """Return whether the reply does not come in time."""
        return False

    def on_the_way_out(self, stage: str, node: int, record: ConfigRecord) -> None:
        """Change what a node is told."""

    def on_the_way_back(self, stage: str, node: int, record: ConfigRecord) -> None:
        """Change what Flower's workflow is told of the answer."""

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Let every node answer."""
        own = []
        for message in messages:  # in the first stage they share one record
            content = RecordDict(dict(message.content))
            record = content[RECORD_KEY_CONFIGS] = ConfigRecord(dict(message.content[RECORD_KEY_CONFIGS]))
            stage, node = record[Key.STAGE], message.metadata.dst_node_id
            self.on_the_way_out(stage, node, record)
            self.sent[stage][node] = record
            own.append(Message(content, node, message.metadata.message_type, group_id=message.metadata.group_id))
        replies = []
        for message, reply in zip(own, super().send_and_receive(own), strict=True):
            node = message.metadata.dst_node_id
            if reply.has_error():
                self.errors[stage][node] = reply.error.reason
            else:
                self.came[stage][node] = reply.content
                self.on_the_way_back(stage, node, reply.content[RECORD_KEY_CONFIGS])
            replies.append(Message(Error(code=0), reply_to=message) if self.loses(stage, node) else reply)
        return replies

    # what is read from a transcript

    def masked(self, node: int) -> Masked:
        """Return the vector that a node has sent."""
        record = self.came[Stage.COLLECT_MASKED_VECTORS][node][RECORD_KEY_CONFIGS]
        return [bytes_to_ndarray(data) for data in record[Key.MASKED_PARAMETERS]]

    def public_keys(self, node: int) -> tuple[bytes, bytes]:
        """Return the keys that a node has sent: for masks, and for shares."""
        record = self.came[Stage.SETUP][node][RECORD_KEY_CONFIGS]
        return record[Key.PUBLIC_KEY_1], record[Key.PUBLIC_KEY_2]

    def secret(self, owner: int) -> bytes:
        """Return the secret of a node that the others have told shares of: its seed, or its key if it was lost."""
        found = []
        for content in self.came[Stage.UNMASK].values():
            record = content[RECORD_KEY_CONFIGS]
            told = dict(zip(record[Key.NODE_ID_LIST], record[Key.SHARE_LIST], strict=True))
            found += [told[owner]] if owner in told else []
        return combine_shares(found)

    def neighbours(self, node: int) -> list[int]:
        """Return whose keys a node was told, without its own."""
        names = [name for name in self.sent[Stage.SHARE_KEYS][node] if name != Key.STAGE]
        return sorted(int(name) for name in names if name != str(node))

    def secrets_of(self, node: int) -> SecAggPlusState:
        """Return what a node keeps to itself: no attack uses it, unless the node colludes."""
        return SecAggPlusState(**self._states[node][RECORD_KEY_STATE])


def client_app(vectors: dict[int, NDArray]) -> ClientApp:
    """Return Flower's own client with Flower's mod, as its example of secure aggregation has it."""

    class Client(NumPyClient):
        def __init__(self, node: int) -> None:
            self.node = node

        def fit(self, parameters: list[NDArray], config: dict[str, Any]) -> tuple[list[NDArray], int, dict[str, Any]]:
            return [vectors[self.node]], WEIGHT, {}

    return ClientApp(client_fn=lambda context: Client(context.node_id).to_client(), mods=[secaggplus_mod])


def legacy_context(grid: LocalGrid, size: int, clients: int) -> LegacyContext:
    """Return the context of the first round, of all clients."""
    manager = SimpleClientManager()
    for node in range(1, clients + 1):
        manager.register(GridClientProxy(node, grid, 1))
    state = RecordDict()
    state[MAIN_CONFIGS_RECORD] = ConfigRecord({WorkflowKey.CURRENT_ROUND: 1})
    start = ndarrays_to_parameters([np.full(size, BEFORE)])
    state[MAIN_PARAMS_RECORD] = compat.parameters_to_arrayrecord(start, True)
    context = Context(run_id=1, node_id=0, node_config={}, state=state, run_config={})
    strategy = LegacyFedAvg(fraction_fit=1.0, min_fit_clients=clients, min_available_clients=clients)
    return LegacyContext(context, strategy=strategy, client_manager=manager)


def flower_round(
    vectors: dict[int, NDArray],
    wire: type[Wire] = Wire,
    *,
    app: ClientApp | None = None,
    shares: float = 1.0,
    threshold: int = THRESHOLD,
) -> tuple[Any, NDArray | None]:
    """Run one round on a wire, and return the wire with the mean, or with None where the round was given up."""
    size = len(vectors[1])
    with wire(app or client_app(vectors), len(vectors)) as grid:
        context = legacy_context(grid, size, len(vectors))
        SecAggPlusWorkflow(shares, threshold, max_weight=WEIGHT)(grid, context)
    (mean,) = parameters_to_ndarrays(compat.arrayrecord_to_parameters(context.state[MAIN_PARAMS_RECORD], True))
    return grid, None if (mean == BEFORE).all() else mean


def mean_of(vectors: dict[int, NDArray], without: int | None = None) -> NDArray:
    return np.mean([vector for node, vector in vectors.items() if node != without], axis=0)


def without_own_mask(masked: Masked, seed: bytes) -> Masked:
    return parameters_subtraction(masked, pseudo_rand_gen(seed, MODULUS, get_parameters_shape(masked)))


def without_pair_mask(masked: Masked, node: int, other: int, key: bytes) -> Masked:
    """Take a mask away that ``node`` has put on, as Flower's server does for a client that was lost."""
    mask = pseudo_rand_gen(key, MODULUS, get_parameters_shape(masked))
    return (parameters_subtraction if node > other else parameters_addition)(masked, mask)


def agreed(private: bytes, public: bytes) -> bytes:
    return generate_shared_key(bytes_to_private_key(private), bytes_to_public_key(public))


def update_of(masked: Masked) -> NDArray:
    """Return the update when all masks are off."""
    weight, vector = factor_extract(parameters_mod(masked, MODULUS))
    assert weight == TARGET
    return dequantize(vector, CLIP, TARGET)[0]


def opened(wire: Wire, node: int, seed: bytes, key: bytes) -> NDArray:
    """Return a node's update, from its vector, its seed and its private mask key."""
    masked = without_own_mask(wire.masked(node), seed)
    for other in wire.neighbours(node):
        masked = without_pair_mask(masked, node, other, agreed(key, wire.public_keys(other)[0]))
    return update_of(masked)


class Late(Wire):
    """The victim's vector comes after the server's timeout; everybody is honest."""

    def loses(self, stage: str, node: int) -> bool:
        return stage == Stage.COLLECT_MASKED_VECTORS and node == VICTIM


def test_a_round_of_flower_is_right_when_nothing_goes_wrong_and_with_a_client_lost_late():
    vectors = updates()
    _, mean = flower_round(vectors)
    np.testing.assert_allclose(mean, mean_of(vectors), atol=1e-9)
    _, mean = flower_round(vectors, Late)
    np.testing.assert_allclose(mean, mean_of(vectors, without=VICTIM), atol=1e-9)


# -- the interface -------------------------------------------------------------------------------------------------


class TestInterface:
    """There is none on Flower's message API: only the API before it has secure aggregation."""

    def test_flower_has_none_in_its_packages_for_apps(self):
        assert not [name for name in flwr.clientapp.mod.__all__ if "secagg" in name]
        for package in (flwr.clientapp, flwr.serverapp):
            sources = list(Path(package.__file__).parent.rglob("*.py"))
            assert len(sources) > 3
            assert not [path for path in sources if "secagg" in path.read_text(encoding="utf-8").lower()]

    def test_flowers_workflow_refuses_the_context_of_a_server_app(self):
        context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config={})
        with LocalGrid(ClientApp(), clients=CLIENTS) as grid, pytest.raises(TypeError, match="Expect a LegacyContext"):
            SecAggPlusWorkflow(1.0, THRESHOLD)(grid, context)

    def test_flowers_workflow_gets_nothing_from_clients_that_are_message_apps(self):
        app = ClientApp()

        @app.train(mods=[secaggplus_mod])
        def train(message: Message, context: Context) -> Message:
            content = {"arrays": ArrayRecord([np.zeros(3)]), "metrics": MetricRecord({"num-examples": 1})}
            return Message(RecordDict(content), reply_to=message)

        wire, mean = flower_round(updates(), app=app)
        assert mean is None
        assert wire.errors[Stage.COLLECT_MASKED_VECTORS] == dict.fromkeys(range(1, CLIENTS + 1), "KeyError")

    def test_flowers_mod_fails_in_a_round_of_any_strategy_of_the_message_api(self):
        with LocalGrid(ClientApp(), clients=CLIENTS) as grid:
            arrays = ArrayRecord({"w": Array(np.zeros(3))})
            message = next(iter(FedAvg().configure_train(1, arrays, ConfigRecord(), grid)))
            context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
            with pytest.raises(KeyError, match=RECORD_KEY_CONFIGS):
                secaggplus_mod(message, context, lambda message, context: message)

    def test_ours_runs_on_the_message_api(self, tmp_path):
        config = read_scenario("regression", ["secagg.mode=active", "federation.clients=4", "federation.rounds=1"])
        simulate(RunFolder.create(tmp_path / "run", config))
        seen = json.loads((tmp_path / "run" / "secagg.jsonl").read_text())
        assert (seen["mode"], seen["counts"]["unmasked"], seen["released"]) == ("active", 4, True)


# -- the masks: too few seeds --------------------------------------------------------------------------------------


def folded(seed: bytes) -> int:
    """Return what is left of a seed: the exclusive or of its 32-bit words."""
    return int(np.bitwise_xor.reduce(np.frombuffer(seed, "<u4")))


def first_numbers(seeds: NDArray[np.uint32]) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Return the first two numbers of MT19937 for each seed: 398 of its 624 words of state have to be made.

    Reference: Matsumoto and Nishimura, mt19937ar.c, init_genrand and genrand_int32.
    """
    word, scratch = seeds.copy(), np.empty_like(seeds)
    state = {0: seeds}
    for index in range(1, 399):
        np.right_shift(word, np.uint32(30), out=scratch)
        np.bitwise_xor(word, scratch, out=word)
        np.multiply(word, np.uint32(1_812_433_253), out=word)
        np.add(word, np.uint32(index), out=word)
        if index in (1, 2, 397, 398):
            state[index] = word.copy()
    return _tempered(state[0], state[1], state[397]), _tempered(state[1], state[2], state[398])


def _tempered(high: NDArray[np.uint32], low: NDArray[np.uint32], far: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Return the number that three words of the state make."""
    mixed = high & np.uint32(0x80000000) | low & np.uint32(0x7FFFFFFF)
    number = far ^ mixed >> np.uint32(1) ^ (mixed & np.uint32(1)) * np.uint32(0x9908B0DF)
    number ^= number >> np.uint32(11)
    number ^= number << np.uint32(7) & np.uint32(0x9D2C5680)
    number ^= number << np.uint32(15) & np.uint32(0xEFC60000)
    return number ^ number >> np.uint32(18)


def spread(count: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Return the seeds of these numbers below 2²⁸: seven bits a byte, since the exclusive or of ASCII is ASCII."""
    parts = [(count >> np.uint32(7 * byte) & np.uint32(127)) << np.uint32(8 * byte) for byte in range(4)]
    return parts[0] | parts[1] | parts[2] | parts[3]


def gathered(seed: int) -> int:
    """Return the number below 2²⁸ of a seed of seven bits a byte."""
    return sum((seed >> 8 * byte & 127) << 7 * byte for byte in range(4))


def searched(masked: Masked, sign: int, seeds: Iterable[NDArray[np.uint32]]) -> list[int]:
    """Return the seeds of the one mask that is left: without it, every number lies in Flower's small range.

    Nothing about the update has to be known: a number is below 2²² + 1 by chance once in 1,024 times.

    Args:
        masked: the vector.
        sign: 1 where the mask was added, -1 where it was subtracted.
        seeds: which to try, in batches.
    """
    vector = np.concatenate([array.ravel() for array in masked])
    found = []
    for batch in seeds:
        fits = np.ones(len(batch), bool)
        for place, mask in enumerate(first_numbers(batch)):
            number = np.uint32(vector[place] % MODULUS)
            fits &= (number - mask if sign > 0 else number + mask) <= TARGET
        for seed in batch[fits].tolist():
            mask = pseudo_rand_gen(seed.to_bytes(4, "little"), MODULUS, [vector.shape])[0]
            found += [seed] if ((vector - sign * mask) % MODULUS <= TARGET).all() else []
    return found


BATCH = 1 << 16


def batches(first: int, count: int) -> Iterable[NDArray[np.uint32]]:
    for start in range(first, first + count, BATCH):
        yield np.arange(start, start + BATCH, dtype=np.uint32)


class OneNeighbourLost(Wire):
    """A ring in which each client has two neighbours, and one of the victim's is lost before it sends its vector."""

    def loses(self, stage: str, node: int) -> bool:
        return stage == Stage.COLLECT_MASKED_VECTORS and node == self.neighbours(VICTIM)[0]


class TestSeeds:
    """The masks come from a generator that has 2³² seeds, and for the mask of a pair 2²⁸.

    ``first_numbers`` tries 6.5 to 8 million seeds a second, in numpy on one core of a shared virtual machine: all 2²⁸
    took 41 seconds, and at that rate all 2³² take 11 minutes.
    """

    def test_flower_folds_its_seeds_to_32_bits(self):
        seed = bytes(range(100, 132))
        other = bytes(28) + folded(seed).to_bytes(4, "little")  # 28 zero bytes, and the rest
        ours, theirs = (pseudo_rand_gen(each, MODULUS, [(9,)])[0] for each in (seed, other))
        assert (ours == theirs).all()
        plain = np.random.RandomState(folded(seed)).randint(0, MODULUS - 1, 9, dtype=np.int64)
        assert (ours == plain).all()
        assert ours[:2].tolist() == [int(number[0]) for number in first_numbers(np.array([folded(seed)], np.uint32))]

    def test_flower_folds_the_seed_of_a_pair_to_28_bits(self):
        private, _ = generate_key_pairs()
        seeds = [folded(generate_shared_key(private, generate_key_pairs()[1])) for _ in range(64)]
        assert np.bitwise_or.reduce(seeds) == 0x7F7F7F7F
        assert [int(spread(np.uint32(gathered(seed)))) for seed in seeds] == seeds

    def _one_mask_left(self) -> tuple[NDArray, Masked, int, bytes]:
        """Return the victim's update, what an honest server has of it, and whose mask is left on it with its key."""
        vectors = updates()
        wire, mean = flower_round(vectors, OneNeighbourLost, shares=3, threshold=2)  # as in Flower's example
        lost, other = wire.neighbours(VICTIM)
        np.testing.assert_allclose(mean, mean_of(vectors, without=lost), atol=1e-9)
        masked = without_own_mask(wire.masked(VICTIM), wire.secret(VICTIM))
        key = agreed(wire.secret(lost), wire.public_keys(VICTIM)[0])
        masked = without_pair_mask(masked, VICTIM, lost, key)
        return vectors[VICTIM], masked, other, agreed(wire.secrets_of(VICTIM).sk1, wire.public_keys(other)[0])

    def test_flower_gives_up_the_neighbour_of_a_lost_client(self):
        """An honest server, and nothing but what Flower tells it. Here 2¹⁶ seeds are tried, below all 2²⁸."""
        secret, masked, other, key = self._one_mask_left()
        assert not np.allclose(dequantize(parameters_mod(masked, MODULUS), CLIP, TARGET)[1], secret)
        window = gathered(folded(key)) // BATCH * BATCH
        sign = 1 if other < VICTIM else -1
        (seed,) = searched(masked, sign, map(spread, batches(window, BATCH)))
        found = update_of(without_pair_mask(masked, VICTIM, other, seed.to_bytes(4, "little")))
        assert (found == secret).all()

    @pytest.mark.slow
    @pytest.mark.timeout(900)
    def test_flower_gives_it_up_when_all_seeds_are_tried(self):
        secret, masked, other, _ = self._one_mask_left()
        (seed,) = searched(masked, 1 if other < VICTIM else -1, map(spread, batches(0, 1 << 28)))
        assert (update_of(without_pair_mask(masked, VICTIM, other, seed.to_bytes(4, "little"))) == secret).all()

    def test_flower_gives_up_a_vector_that_came_late_in_a_cohort_of_any_size(self):
        """Its second mask is there for this: the server has the key of the first, and 2³² seeds to try for it."""
        vectors = updates()
        wire, _ = flower_round(vectors, Late)
        masked, key = wire.masked(VICTIM), wire.secret(VICTIM)
        for other in wire.neighbours(VICTIM):
            masked = without_pair_mask(masked, VICTIM, other, agreed(key, wire.public_keys(other)[0]))
        window = folded(wire.secrets_of(VICTIM).rd_seed) // BATCH * BATCH
        (seed,) = searched(masked, 1, batches(window, BATCH))
        assert (update_of(without_own_mask(masked, seed.to_bytes(4, "little"))) == vectors[VICTIM]).all()

    def test_ours_has_keys_of_256_bits_of_which_every_one_counts(self):
        key = RANDOM.token_bytes(32)
        streams = {stream_of(key)} | {stream_of(flipped(key, bit)) for bit in range(256)}
        assert len(streams) == 257

    def test_ours_keeps_the_vector_of_a_lost_client_that_came_late_even_when_its_mask_key_is_known(self):
        cohort = Cohort(offer(CLIENTS, encoding=encoding(size=6000, clients=CLIENTS)), lost={VICTIM: "consistent"})
        late: dict[int, bytes] = {}
        plus, minus = list[bytes](), list[bytes]()

        def keep(leg: str, client: int, message: bytes) -> bytes:
            if (leg, client) == ("to-mask", VICTIM):  # what the server rebuilds when a client is lost
                session = cohort.sessions[VICTIM]
                for peer, entry in session._peers.items():
                    pair = (
                        AgreementKey(session._secrets.mask),
                        entry.mask_key,
                        session._roster_hash,
                        session._index,
                        peer,
                    )
                    (plus if peer > session._index else minus).extend([pair_mask_key(*pair)] * (peer != session._index))
            if (leg, client) == ("from-mask", VICTIM):
                late[client] = message
                return b"lost on the way"
            return message

        cohort.tamper = keep
        total = cohort.run()
        assert VICTIM not in total.survivors
        assert np.array_equal(total.words, cohort.expected(total.survivors))
        with pytest.raises(StageError):
            cohort.server.receive(VICTIM, late[VICTIM])
        # All its masks but its own are known once its mask key was rebuilt; what is left is still even in every byte.
        left = np.frombuffer(
            MaskedInput.read(late[VICTIM], words=cohort.offered.encoding.words).vector, dtype="<u8"
        ).copy()
        add_masks(left, plus=minus, minus=plus)
        assert not np.array_equal(left, cohort.updates[VICTIM].words)
        counts = np.bincount(left.view(np.uint8), minlength=256)
        assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 420  # above with probability 1e-10


# -- the masks: linear ---------------------------------------------------------------------------------------------


class TestLowestBits:
    """The lowest bits of all masks satisfy one public linear recurrence, and so does the sum of any number of them."""

    def test_flower_masks_have_the_complexity_of_their_generator(self):
        bits = 2 * MT19937 + 2_000
        (mask,) = pseudo_rand_gen(bytes(range(32)), MODULUS, [(bits,)])
        assert linear_complexity(mask & 1) == MT19937  # a good one: about half of its 41,874 bits

    def test_flower_shows_the_lowest_bit_of_every_parameter_of_a_client_that_has_frozen_some(self):
        """An honest server, and nobody is lost; a fine-tuned model has whole layers whose update is zero."""
        frozen, trained = MT19937, 500
        vectors = updates(frozen + trained)
        for vector in vectors.values():
            vector[:frozen] = 0
        wire, mean = flower_round(vectors)
        np.testing.assert_allclose(mean, mean_of(vectors), atol=1e-9)
        own = pseudo_rand_gen(b"any!", MODULUS, [(2 * MT19937 + 2,)])[0] & 1
        public = shortest_recurrence(own)  # of any seed: it is the same for all
        for node, vector in vectors.items():
            sent = wire.masked(node)[1] & 1  # under five masks of five seeds
            assert 0.4 < sent[:frozen].mean() < 0.6
            lowest = sent[frozen:] ^ public.continued(sent[:frozen], trained)
            assert (lowest == (np.round(vector[frozen:] / STEP).astype(int) & 1)).all()

    def test_ours_have_no_generator_shorter_than_half_of_what_is_seen(self):
        lowest = np.frombuffer(stream_of(RANDOM.token_bytes(32), words=45_000), dtype="<u8") & np.uint64(1)
        assert abs(linear_complexity(lowest) - 22_500) < 40


# -- who is who ----------------------------------------------------------------------------------------------------


class KeySubstitution(Wire):
    """Everybody is told the server's keys for the others' shares; it reads the shares and encrypts them anew."""

    def __init__(self, app: ClientApp, clients: int) -> None:
        super().__init__(app, clients)
        self.pairs = {node: generate_key_pairs() for node in range(1, clients + 1)}
        self.seed_shares: dict[int, list[bytes]] = {node: [] for node in self.pairs}
        self.key_shares: dict[int, list[bytes]] = {node: [] for node in self.pairs}

    def on_the_way_out(self, stage: str, node: int, record: ConfigRecord) -> None:
        if stage == Stage.SHARE_KEYS:
            for other in set(self.pairs) - {node}:
                mask_key, _ = record[str(other)]
                record[str(other)] = [mask_key, public_key_to_bytes(self.pairs[other][1])]

    def on_the_way_back(self, stage: str, node: int, record: ConfigRecord) -> None:
        if stage == Stage.SHARE_KEYS:
            texts = zip(record[Key.DESTINATION_LIST], record[Key.CIPHERTEXT_LIST], strict=True)
            record[Key.CIPHERTEXT_LIST] = [self._read(node, other, text) for other, text in texts]

    def _read(self, node: int, other: int, text: bytes) -> bytes:
        """Keep two shares, and return them as ``other`` expects them."""
        sender, receiver = (bytes_to_public_key(self.public_keys(each)[1]) for each in (node, other))
        plain = decrypt(generate_shared_key(self.pairs[other][0], sender), text)
        _, _, seed_share, key_share = share_keys_plaintext_separate(plain)
        self.seed_shares[node].append(seed_share)
        self.key_shares[node].append(key_share)
        return encrypt(generate_shared_key(self.pairs[node][0], receiver), plain)


class TestKeySubstitution:
    """A key is whose the server says it is."""

    def test_flower_lets_the_server_read_every_share(self):
        vectors = updates()
        wire, mean = flower_round(vectors, KeySubstitution)
        np.testing.assert_allclose(mean, mean_of(vectors), atol=1e-9)  # nobody has noticed
        assert not any(wire.errors.values())
        for node, vector in vectors.items():
            seed, key = combine_shares(wire.seed_shares[node]), combine_shares(wire.key_shares[node])
            assert (opened(wire, node, seed, key) == vector).all()

    def test_ours_refuses(self):
        def substituted(leg: str, client: int, message: bytes) -> bytes:
            if leg != "to-share":
                return message
            roster = Roster.read(message)
            index = next(at for at, entry in enumerate(roster.entries) if entry.device != cohort.keys[client].public)
            fake = replace(roster.entries[index], encryption_key=AgreementKey(RANDOM.token_bytes(32)).public)
            entries = [*roster.entries[:index], fake, *roster.entries[index + 1 :]]
            return replace(roster, entries=entries).message()

        cohort = Cohort(offer(CLIENTS), tamper=substituted)
        with pytest.raises(RoundAbortedError):
            cohort.run()
        assert {type(error) for error in cohort.client_errors.values()} == {BadAdvertisementError}


class BothLists(Wire):
    """All but the victim are told that it is alive and dead; Flower's workflow is told what it expects."""

    def __init__(self, app: ClientApp, clients: int) -> None:
        super().__init__(app, clients)
        self.key_shares: list[bytes] = []

    def on_the_way_out(self, stage: str, node: int, record: ConfigRecord) -> None:
        if stage == Stage.UNMASK and node != VICTIM:
            record[Key.DEAD_NODE_ID_LIST] = [VICTIM]

    def on_the_way_back(self, stage: str, node: int, record: ConfigRecord) -> None:
        if stage == Stage.UNMASK and node != VICTIM:
            assert record[Key.NODE_ID_LIST].count(VICTIM) == 2
            self.key_shares.append(record[Key.SHARE_LIST][-1])
            record[Key.NODE_ID_LIST] = record[Key.NODE_ID_LIST][:-1]
            record[Key.SHARE_LIST] = record[Key.SHARE_LIST][:-1]


class TestBothLists:
    """Two secrets hide a client: one is told if it is alive, the other if it is not, and both are enough."""

    def test_flower_gives_both_secrets(self):
        vectors = updates()
        wire, mean = flower_round(vectors, BothLists)
        np.testing.assert_allclose(mean, mean_of(vectors), atol=1e-9)  # nobody has noticed
        assert not any(wire.errors.values())
        found = opened(wire, VICTIM, wire.secret(VICTIM), combine_shares(wire.key_shares))
        assert (found == vectors[VICTIM]).all()

    def test_ours_refuses(self):
        cohort = Cohort(offer(CLIENTS, mode="semi-honest"))
        outgoing = cohort.until("unmask")
        survivors = Survivors.read(outgoing[0])
        index = cohort.server._index_of[VICTIM]
        without = replace(survivors, survivors=[each for each in survivors.survivors if each != index]).message()
        helper = cohort.sessions[0]
        given = Unmask.read(helper.unmask(outgoing[0])).shares  # the share of its seed: the victim is alive
        with pytest.raises(StageError):
            helper.unmask(without)  # that of its mask key too, as if it were dead
        assert set(given) == set(range(CLIENTS))


class ThresholdOfOne(Wire):
    """Everybody is told that one share is enough."""

    def on_the_way_out(self, stage: str, node: int, record: ConfigRecord) -> None:
        if stage == Stage.SETUP:
            record[Key.THRESHOLD] = 1


class TestThreshold:
    """The server says how many clients have to be on its side."""

    def test_flower_lets_one_colluding_client_know_everything(self):
        vectors = updates()
        wire, mean = flower_round(vectors, ThresholdOfOne)
        np.testing.assert_allclose(mean, mean_of(vectors), atol=1e-9)
        assert not any(wire.errors.values())
        colluding = wire.secrets_of(1)
        for node in set(vectors) - {1}:
            seed = combine_shares([colluding.rd_seed_share_dict[node]])
            key = combine_shares([colluding.sk1_share_dict[node]])
            assert colluding.rd_seed_share_dict[node][4:36] == seed  # the "share" is the secret, in clear
            assert (opened(wire, node, seed, key) == vectors[node]).all()

    def test_flower_lets_the_server_choose_a_cohort_of_one(self):
        secret = updates()[1]
        stages = [
            {
                Key.STAGE: Stage.SETUP,
                Key.SAMPLE_NUMBER: 1,
                Key.SHARE_NUMBER: 1,
                Key.THRESHOLD: 1,
                Key.CLIPPING_RANGE: CLIP,
                Key.TARGET_RANGE: TARGET,
                Key.MOD_RANGE: MODULUS,
                Key.MAX_WEIGHT: float(WEIGHT),
            },
            {Key.STAGE: Stage.SHARE_KEYS},
            {Key.STAGE: Stage.COLLECT_MASKED_VECTORS, Key.CIPHERTEXT_LIST: [], Key.SOURCE_LIST: []},
            {Key.STAGE: Stage.UNMASK, Key.ACTIVE_NODE_ID_LIST: [1], Key.DEAD_NODE_ID_LIST: []},
        ]
        with Wire(client_app({1: secret}), 1) as wire:
            for stage in stages:
                if stage[Key.STAGE] == Stage.SHARE_KEYS:
                    stage["1"] = list(wire.public_keys(1))
                content = RecordDict({RECORD_KEY_CONFIGS: ConfigRecord(stage)})
                if stage[Key.STAGE] == Stage.COLLECT_MASKED_VECTORS:
                    content["fitins.parameters"] = ArrayRecord()
                    content["fitins.config"] = ConfigRecord()
                wire.send_and_receive([Message(content, 1, "train", group_id="1")])
        assert (update_of(without_own_mask(wire.masked(1), wire.secret(1))) == secret).all()

    def test_ours_refuses(self):
        cohort = Cohort(
            offer(CLIENTS),
            tamper=lambda leg, _, message: (
                replace(Roster.read(message), threshold=1).message() if leg == "to-share" else message
            ),
        )
        with pytest.raises(RoundAbortedError):
            cohort.run()
        assert {type(error) for error in cohort.client_errors.values()} == {GraphError}

    def test_ours_refuses_a_cohort_of_one(self):
        cohort = Cohort(offer(1, least_survivors=1, encoding=encoding(clients=1)))
        with pytest.raises(PolicyViolationError):
            cohort.begin(0, cohort.server.begin([0])[0])


# -- loss and cost -------------------------------------------------------------------------------------------------


class LostInSetup(Wire):
    def loses(self, stage: str, node: int) -> bool:
        return stage == Stage.SETUP and node == VICTIM


class LostInShareKeys(Wire):
    def loses(self, stage: str, node: int) -> bool:
        return stage == Stage.SHARE_KEYS and node == VICTIM


class TestEarlyLoss:
    """One client of five is lost before it has sent its shares, and everybody is asked for them all the same."""

    @pytest.mark.parametrize("wire", [LostInSetup, LostInShareKeys])
    def test_flower_gives_the_round_up(self, wire: type[Wire]):
        heard, mean = flower_round(updates(), wire)
        assert mean is None
        others = [node for node in range(1, CLIENTS + 1) if node != VICTIM]
        assert list(heard.came[Stage.COLLECT_MASKED_VECTORS]) == others  # all other vectors were there
        assert heard.errors[Stage.UNMASK] == dict.fromkeys(others, "KeyError")  # and every one of them failed

    @pytest.mark.parametrize("leg", ["advertise", "share"])
    def test_ours_goes_on_without_it(self, leg: str):
        cohort = Cohort(offer(CLIENTS), lost={VICTIM: leg})
        total = cohort.run()
        assert sorted(total.survivors) == [each for each in range(CLIENTS) if each != VICTIM]
        assert np.array_equal(total.words, cohort.expected(total.survivors))


class TestUpload:
    """What a client sends."""

    def test_flower_sends_eight_bytes_a_parameter(self):
        size = 10_000
        wire, _ = flower_round(updates(size))
        record = wire.came[Stage.COLLECT_MASKED_VECTORS][VICTIM][RECORD_KEY_CONFIGS]
        sent = sum(len(data) for data in record[Key.MASKED_PARAMETERS])
        assert sent / size == pytest.approx(8.0, rel=0.01)
        assert max(vector.max() for vector in wire.masked(VICTIM)) < 2**32  # of which four are always zero

    def test_flower_sends_the_weight_it_masks_in_clear_beside_it(self):
        wire, _ = flower_round(updates())
        sent = wire.came[Stage.COLLECT_MASKED_VECTORS][VICTIM]
        assert sent["fitres.num_examples"]["num_examples"] == WEIGHT

    def test_ours_sends_two_and_two_thirds_and_nothing_beside_it(self, tmp_path):
        cohort = Cohort(offer(CLIENTS, encoding=encoding(size=10_000, clients=CLIENTS)))
        sent: dict[str, int] = {}

        def measure(leg: str, client: int, message: bytes) -> bytes:
            if leg.startswith("from") and client == VICTIM:
                sent[leg] = len(message)
            return message

        cohort.tamper = measure
        cohort.run()
        assert sent["from-mask"] / 10_000 < 2.7
        assert sum(sent.values()) - sent["from-mask"] < 400 * CLIENTS  # shares, keys and signatures: in the clients
