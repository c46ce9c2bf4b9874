"""One round of the secure aggregation of Flower 1.41 on the complete graph, timed by Flower's own code, unmodified.

Neither the network nor training is in it: what the mod's four functions take at a client, and the workflow's four
stages at the server. An update is one float32 array.
"""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.client.mod import secaggplus_mod
from flwr.client.mod.secure_aggregation.secaggplus_mod import (
    SecAggPlusState,
    _collect_masked_vectors,
    _setup,
    _share_keys,
    _unmask,
)
from flwr.clientapp import ClientApp
from flwr.common import FitRes, Parameters, Scalar, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.common.secure_aggregation.crypto.symmetric_encryption import encrypt, generate_shared_key
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage
from flwr.common.secure_aggregation.secaggplus_utils import share_keys_plaintext_concat
from flwr.compat.client.numpy_client import NumPyClient
from flwr.compat.common import recorddict_compat as compat
from flwr.server.client_manager import SimpleClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.compat.grid_client_proxy import GridClientProxy
from flwr.server.compat.legacy_context import LegacyContext
from flwr.server.strategy import FedAvg
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD
from flwr.server.workflow.constant import Key as WorkflowKey
from flwr.supercore.primitives.asymmetric import (
    bytes_to_public_key,
    generate_key_pairs,
    public_key_to_bytes,
)
from numpy.typing import NDArray

from fedlearn.flower.grid import LocalGrid, NoFaults

__all__ = ["flower_client", "flower_server", "flower_upload_bytes"]

# Flower's defaults; every client has one example of at most one: a weight of one
CLIP, TARGET, MODULUS, WEIGHT = 8.0, 1 << 22, 1 << 32, 1

MOST_CLIENTS = MODULUS // TARGET - 1
"""With more, Flower's sum overflows."""


def flower_client(n: int, d: int, *, threshold: int | None = None) -> float:
    """Return the seconds that one client works in a round.

    They are those of the mod's own four functions: two key pairs; the shares of two secrets for n clients and their
    encryption for n − 1; decryption of n − 1, quantisation, one mask of its own and one for each of the others, and
    the bytes that are sent; the shares that are told at the end. What the others send is made in between, and not
    counted: their keys and messages are real, the shares inside are random bytes of the right length, which a client
    stores and cannot read. Restoring and saving the state between the stages, done by the mod too, is not counted.

    Args:
        n: clients.
        d: parameters.
        threshold: shares that reconstruct a secret; by default ⌊2n/3⌋ + 1.
    """
    return _client_round(n, d, threshold)[0]


def flower_upload_bytes(d: int) -> int:
    """Return the bytes of a client's masked vector of ``d`` parameters, by making one."""
    return _client_round(3, d, None)[1]


def flower_server(n: int, d: int, *, dropped: int = 0) -> float:
    """Return the seconds that the server works in a round.

    They are those of ``SecAggPlusWorkflow`` with Flower's mod at the clients, less the time that it waits for them.
    The mean is checked. The last step, the strategy's mean of n equal results, does not belong to secure aggregation
    and is replaced by taking the first.

    Reconstruction takes most of it; it grows with nearly n³, and not with d: 0.8 of 0.95 seconds for n = 20 and a
    million parameters, 67 seconds for n = 100 and a thousand, 112 when 33 of them drop out (a key is longer than a
    seed).

    Clients make their shares with a threshold of 2, which takes them little time and the server the same as any other:
    it interpolates through every share that it gets, however many are needed.

    The replies are all in memory, as they are in Flower: 16 bytes times n times d.

    Args:
        n: clients, at most 1,023.
        d: parameters.
        dropped: how many of them have shared their secrets and do not send a vector.

    Raises:
        RuntimeError: Flower's mean is wrong, or it has given the round up: what was timed is no round.
    """
    if not 3 <= n <= MOST_CLIENTS or not 0 <= dropped <= n - 2:
        raise ValueError(f"{n} clients of which {dropped} drop out; Flower can have 3 to {MOST_CLIENTS}, 2 must stay")
    update = _update(d)
    grid = _Waiting(_app(update), clients=n, dropped=dropped)
    with _quiet(), grid:
        context = _context(grid, n, d)
        workflow = SecAggPlusWorkflow(1.0, 2, max_weight=WEIGHT, clipping_range=CLIP)
        begun = time.perf_counter()
        workflow(grid, context)
        took_s = time.perf_counter() - begun - grid.waited_s
    after = context.state.array_records[MAIN_PARAMS_RECORD]
    (mean,) = parameters_to_ndarrays(compat.arrayrecord_to_parameters(after, True))
    if not np.allclose(mean, update, rtol=0, atol=2 * CLIP / TARGET):
        raise RuntimeError(f"Flower's round of {n} clients, {dropped} dropped, did not end with their mean")
    return took_s


# -- a client ------------------------------------------------------------------------------------------------------


def _client_round(n: int, d: int, threshold: int | None) -> tuple[float, int]:
    """Return the seconds of a client in the middle of n, and the bytes of its vector."""
    me = n // 2 + 1  # it adds the masks of those before, and subtracts those of the others
    state = SecAggPlusState(nid=me)
    parameters = ndarrays_to_parameters([_update(d)])
    watch = _Stopwatch()

    with _quiet(), watch:
        keys = _setup(state, _setup_configs(n, threshold))
    roster = {node: [pk1, pk2] for node, (pk1, _, pk2) in _peers(n).items()}
    roster[me] = [_bytes(keys[Key.PUBLIC_KEY_1]), _bytes(keys[Key.PUBLIC_KEY_2])]
    told = ConfigRecord({str(node): roster[node] for node in range(1, n + 1)})

    with _quiet(), watch:
        _share_keys(state, told)
    shares = {name: len(kept[me]) for name, kept in (("b", state.rd_seed_share_dict), ("sk", state.sk1_share_dict))}
    sources = [node for node in range(1, n + 1) if node != me]
    texts = [_text(n, node, me, roster[me][1], shares) for node in sources]
    delivered = ConfigRecord({Key.CIPHERTEXT_LIST: texts, Key.SOURCE_LIST: sources})

    with _quiet(), watch:
        sent = _collect_masked_vectors(state, delivered, WEIGHT, parameters)

    everybody = ConfigRecord({Key.ACTIVE_NODE_ID_LIST: list(range(1, n + 1)), Key.DEAD_NODE_ID_LIST: []})
    with _quiet(), watch:
        _unmask(state, everybody)
    vector: Any = sent[Key.MASKED_PARAMETERS]
    return watch.seconds, sum(len(data) for data in vector)


class _Stopwatch:
    """Adds up the time of its ``with`` blocks."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._begun = 0.0

    def __enter__(self) -> None:
        self._begun = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._begun


def _setup_configs(n: int, threshold: int | None) -> ConfigRecord:
    """Return what the workflow sends first."""
    return ConfigRecord(
        {
            Key.SAMPLE_NUMBER: n,
            Key.SHARE_NUMBER: n,
            Key.THRESHOLD: 2 * n // 3 + 1 if threshold is None else threshold,
            Key.CLIPPING_RANGE: CLIP,
            Key.TARGET_RANGE: TARGET,
            Key.MOD_RANGE: MODULUS,
            Key.MAX_WEIGHT: float(WEIGHT),
        }
    )


@functools.lru_cache(maxsize=4)
def _peers(n: int) -> dict[int, tuple[bytes, Any, bytes]]:
    """Return each client's public mask key, and both keys for shares."""
    found = {}
    for node in range(1, n + 1):
        (_, public_1), (private_2, public_2) = generate_key_pairs(), generate_key_pairs()
        found[node] = (public_key_to_bytes(public_1), private_2, public_key_to_bytes(public_2))
    return found


def _text(n: int, node: int, me: int, my_key: bytes, lengths: dict[str, int]) -> bytes:
    """Return what ``node`` has encrypted for me."""
    shared = generate_shared_key(_peers(n)[node][1], bytes_to_public_key(my_key))
    plain = share_keys_plaintext_concat(node, me, os.urandom(lengths["b"]), os.urandom(lengths["sk"]))
    return encrypt(shared, plain)


def _bytes(value: object) -> bytes:
    """Return the value of a record that is bytes."""
    if not isinstance(value, bytes):
        raise TypeError(f"a key is {type(value).__name__}")
    return value


# -- the server ----------------------------------------------------------------------------------------------------


class _Dropouts(NoFaults):
    """The first nodes do not send their vectors."""

    def __init__(self, dropped: int) -> None:
        self._dropped = dropped
        self.stage = ""

    def drops(self, group: str, client: int, kind: str = "") -> bool:
        """Return whether this client never answers in the stage that is on."""
        return self.stage == Stage.COLLECT_MASKED_VECTORS and client < self._dropped


class _Waiting(LocalGrid):
    """The clients, and how long the server has waited for them."""

    def __init__(self, app: ClientApp, *, clients: int, dropped: int) -> None:
        self.waited_s = 0.0
        self._dropouts = _Dropouts(dropped)
        super().__init__(app, clients=clients, faults=self._dropouts)

    def send_and_receive(  # type: ignore[override]  # the workflow goes through the replies twice
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Let every client answer."""
        begun = time.perf_counter()
        sent = list(messages)
        self._dropouts.stage = str(sent[0].content.config_records[RECORD_KEY_CONFIGS][Key.STAGE])
        replies = list(super().send_and_receive(sent, timeout=timeout))
        self._raise_if_unexpected([reply.error for reply in replies if reply.has_error()])
        self.waited_s += time.perf_counter() - begun
        return replies

    def _raise_if_unexpected(self, errors: list[Error]) -> None:
        """Refuse a round in which a client failed that was not meant to."""
        expected = sum(self._dropouts.drops("", node - 1) for node in self.get_node_ids())
        if len(errors) != expected:
            raise RuntimeError(f"{len(errors)} clients failed in {self._dropouts.stage}: {errors[0].reason}")


class _FirstResult(FedAvg):
    """The results are all equal: the workflow has put the mean into each."""

    def aggregate_fit(
        self, server_round: int, results: list[tuple[ClientProxy, FitRes]], failures: Any
    ) -> tuple[Parameters | None, dict[str, Scalar]]:
        """Return the first."""
        return results[0][1].parameters, {}


def _app(update: NDArray[np.float32]) -> ClientApp:
    """Return clients that all have learned the same, under Flower's mod."""

    class Client(NumPyClient):
        """Trains in no time."""

        def fit(self, parameters: list[NDArray[Any]], config: dict[str, Scalar]) -> Any:
            """Return the update."""
            return [update], WEIGHT, {}

    def client_fn(context: Context) -> Any:
        """Return any client."""
        del context
        return Client().to_client()

    return ClientApp(client_fn=client_fn, mods=[secaggplus_mod])


def _context(grid: LocalGrid, n: int, d: int) -> LegacyContext:
    """Return the context of the first round, of all clients."""
    manager = SimpleClientManager()
    for node in range(1, n + 1):
        manager.register(GridClientProxy(node, grid, 1))
    state = RecordDict()
    state[MAIN_CONFIGS_RECORD] = ConfigRecord({WorkflowKey.CURRENT_ROUND: 1})
    start = ndarrays_to_parameters([np.zeros(d, np.float32)])
    state[MAIN_PARAMS_RECORD] = compat.parameters_to_arrayrecord(start, True)
    context = Context(run_id=1, node_id=0, node_config={}, state=state, run_config={})
    strategy = _FirstResult(fraction_fit=1.0, min_fit_clients=n, min_available_clients=n)
    return LegacyContext(context, strategy=strategy, client_manager=manager)


# -- both ----------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4)
def _update(d: int) -> NDArray[np.float32]:
    """Return what a client has learned."""
    return np.random.default_rng(0).normal(0.0, 0.1, d).astype(np.float32)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Flower's log to itself."""
    logger = logging.getLogger("flwr")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
