"""A round's ``Network`` on any Flower ``Grid``: SuperLink, Flower's simulation runtime, or ``LocalGrid``."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence

from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.serverapp import Grid

from fedlearn.arrays import ParamSpec, Vector
from fedlearn.errors import ConfigError, TooFewClientsError
from fedlearn.federation.groups import group_size
from fedlearn.federation.messages import Failure, FailureCode, GroupReply, LegReply, LegRequest, Reply, Request
from fedlearn.flower.faults import GROUP_KIND
from fedlearn.flower.grid import LocalGrid
from fedlearn.flower.records import (
    group_records,
    leg_records,
    read_group_reply,
    read_leg_reply,
    read_reply,
    request_records,
    single_bytes,
    size_bytes,
    vector_record,
)
from fedlearn.learning.vectorized import Vectorised
from fedlearn.sources import Clock

__all__ = ["GridNetwork", "is_simulation_runtime"]

log = logging.getLogger("fedlearn.server")

_FIRST_WAIT_S = 0.05
_LONGEST_WAIT_S = 2.0
_IDENTIFY_TIMEOUT_S = 30.0
_IDENTIFY_TRIES = 3
_STARTUP_TIMEOUT_S = 120.0


_SIMULATION_GRIDS = ("InMemoryGrid", "RuntimeGrid")
"""The grid of Flower's simulation runtime and ours around it, by name: their modules take a second to import."""


def is_simulation_runtime(grid: Grid) -> bool:
    """Return whether ``grid`` is that of Flower's own simulation runtime."""
    return type(grid).__name__ in _SIMULATION_GRIDS


class GridNetwork:
    """Speaks of clients to the round and of nodes to Flower.

    Flower's node ids are random; which client a node is, it says itself in answer to ``query.identify``, once.
    Cohorts are then drawn over clients, so that the same seed draws the same ones on every runtime. (On devices
    that say-so proves nothing; identity there is a signature.)

    Args:
        grid: what carries the messages.
        clock: what deadlines are measured with.
        clients: how many clients the federation has. Flower's simulation runtime must have as many nodes, and all
            of them are waited for before the first cohort is drawn; on devices some may be missing.
        local: the grid again, where it knows which client each of its nodes is and none need be asked: a population of
            100,000 costs nothing then.
        trainer: how clients are trained many at once, on a ``local`` grid; ``None``: one by one.
    """

    def __init__(
        self,
        grid: Grid,
        clock: Clock,
        *,
        clients: int,
        local: LocalGrid | None = None,
        trainer: Vectorised | None = None,
    ) -> None:
        self._grid, self._clock = grid, clock
        self._local, self._trainer = local, trainer
        self._simulated = clients if is_simulation_runtime(grid) else None
        self._client_of: dict[int, int] = {}
        self._node_of: dict[int, int] = {}
        self._silent: dict[int, int] = {}  # how often a node did not say which client it is

    def clients(self, at_least: int, timeout_s: float) -> Sequence[int]:
        """Return the connected clients in ascending order, waiting for ``at_least`` of them.

        Raises:
            TooFewClientsError: they were not there in ``timeout_s`` seconds.
            ConfigError: Flower's simulation runtime has another number of nodes than the federation has clients.
        """
        if self._local is not None:
            return self._local.present()
        if self._simulated is not None:  # its processes start with the first message, and all nodes are there or none
            at_least, timeout_s = self._simulated, max(timeout_s, _STARTUP_TIMEOUT_S)
        deadline, wait_s = self._clock.monotonic() + timeout_s, _FIRST_WAIT_S
        while True:
            nodes = set(self._grid.get_node_ids())
            needed = len(self._present(nodes)) < at_least
            left_s = deadline - self._clock.monotonic()
            self._identify(self._unknown(nodes, needed), nodes, min(left_s, _IDENTIFY_TIMEOUT_S))
            present = self._present(nodes)
            self._check_simulated(len(present))
            if len(present) >= at_least:
                return present
            left_s = deadline - self._clock.monotonic()
            if left_s <= 0:
                raise TooFewClientsError(
                    f"{len(present)} clients are connected after {timeout_s:g} s; a cohort of {at_least} is needed. "
                    "Connect more clients (on Flower's simulation runtime: num-supernodes must equal "
                    "federation.clients), lower federation.cohort, or raise federation.round-timeout-s"
                )
            log.info("%d of %d clients connected, waiting", len(present), at_least)
            self._clock.sleep(min(wait_s, left_s))
            wait_s = min(2 * wait_s, _LONGEST_WAIT_S)

    def exchange(self, requests: Sequence[Request], spec: ParamSpec, timeout_s: float) -> Iterator[Reply]:
        """Send the requests now and return one reply for each; a message lives no longer than the deadline.

        Where clients are trained many at once (``trainer``), groups are asked first; who is in none, or in one that
        came to nothing within one client's time, is asked by itself afterwards, so that what one client does costs no
        other its place. Else the replies are in the requests' order. Where the grid answers as a stream
        (``LocalGrid``), one reply is held at a time.
        """
        vectors = _vector_records(request.vector for request in requests)
        groups, alone = self._grouped(requests)
        if not groups:
            return self._exchange_each(alone, vectors, spec, timeout_s)
        return self._then_alone(
            self._exchange_groups(groups, vectors, spec, timeout_s), requests, alone, vectors, spec, timeout_s
        )

    def _then_alone(
        self,
        grouped: Iterator[tuple[list[Request], GroupReply | None]],
        requests: Sequence[Request],
        alone: list[Request],
        vectors: Mapping[int, ArrayRecord],
        spec: ParamSpec,
        timeout_s: float,
    ) -> Iterator[Reply]:
        """Yield the answers of groups, then of each client that is in none or in one that came to nothing."""
        for group, reply in grouped:
            if reply is None:
                alone += group
            else:
                yield reply
        places = {id(request): place for place, request in enumerate(requests)}
        alone.sort(key=lambda request: places[id(request)])
        if alone:
            yield from self._exchange_each(alone, vectors, spec, timeout_s)

    def _grouped(self, requests: Sequence[Request]) -> tuple[list[list[Request]], list[Request]]:
        """Return groups of clients to be trained at once, by their place in the cohort alone; and who is in none."""
        grid = self._local
        if self._trainer is None or grid is None or any(request.kind != "train" for request in requests):
            return [], list(requests)
        ordinary, alone = list[Request](), list[Request]()
        for request in requests:
            touched = grid.touches(request.plan.group, request.client, request.kind)
            (alone if touched else ordinary).append(request)
        size = group_size(len(requests))
        return [ordinary[start : start + size] for start in range(0, len(ordinary), size)], alone

    def _exchange_groups(
        self, groups: Sequence[list[Request]], vectors: Mapping[int, ArrayRecord], spec: ParamSpec, timeout_s: float
    ) -> Iterator[tuple[list[Request], GroupReply | None]]:
        """Send one message for each group and return the group with its answer, ``None`` where it is of no use."""
        messages = [
            Message(
                group_records(group[0], vectors[id(group[0].vector)], [r.client for r in group], self._trainer or ""),
                self._node(group[0].client),
                GROUP_KIND,
                ttl=timeout_s,
                group_id=group[0].plan.group,
            )
            for group in groups
        ]
        begun, first = self._ordered(messages, timeout_s), groups[0][0]
        sizes = single_bytes(first, vectors[id(first.vector)], spec)

        def read(index: int, reply: Message | None) -> tuple[list[Request], GroupReply | None]:
            members = [request.client for request in groups[index]]
            answer = None if reply is None else read_group_reply(reply, members, first.plan, spec, sizes)
            return groups[index], answer

        return (read(index, reply) for index, reply in begun)

    def _exchange_each(
        self, requests: Sequence[Request], vectors: Mapping[int, ArrayRecord], spec: ParamSpec, timeout_s: float
    ) -> Iterator[Reply]:
        """Send one message for each request and return the replies in order."""
        messages = [
            Message(
                request_records(vectors[id(request.vector)], request.plan),
                self._node(request.client),
                request.kind,
                ttl=timeout_s,
                group_id=request.plan.group,
            )
            for request in requests
        ]

        def read(index: int, reply: Message | None, download_bytes: int) -> Reply:
            request = requests[index]
            if reply is None:
                return Failure(client=request.client, code=FailureCode.NO_REPLY, download_bytes=download_bytes)
            return read_reply(reply, request, spec, download_bytes)

        return (read(*answered) for answered in self._in_order(messages, timeout_s))

    def exchange_leg(self, requests: Sequence[LegRequest], timeout_s: float) -> Iterator[LegReply | Failure]:
        """Send one leg of secure aggregation as ``train.<leg>`` messages and yield one answer for each, in order."""
        vectors = _vector_records(request.vector for request in requests)
        messages = [
            Message(
                leg_records(request, vectors.get(id(request.vector))),
                self._node(request.client),
                f"train.{request.leg}",
                ttl=timeout_s,
                group_id=request.plan.group,
            )
            for request in requests
        ]
        for index, reply, download_bytes in self._in_order(messages, timeout_s):
            client = requests[index].client
            if reply is None:
                yield Failure(client=client, code=FailureCode.NO_REPLY, download_bytes=download_bytes)
            else:
                yield read_leg_reply(reply, client, download_bytes)

    def _in_order(self, messages: Sequence[Message], timeout_s: float) -> Iterator[tuple[int, Message | None, int]]:
        """Send the messages; return each one's index, its reply or ``None``, and its bytes, in the order of asking."""
        download_bytes = [size_bytes(message.content) for message in messages]
        return ((index, reply, download_bytes[index]) for index, reply in self._ordered(messages, timeout_s))

    def _ordered(self, messages: Sequence[Message], timeout_s: float) -> Iterator[tuple[int, Message | None]]:
        """Send the messages; return each one's index and its reply or ``None``, in the order of asking."""
        return self._put_in_order(messages, self._grid.send_and_receive(messages, timeout=timeout_s))

    def _put_in_order(
        self, messages: Sequence[Message], replies: Iterable[Message]
    ) -> Iterator[tuple[int, Message | None]]:
        """Yield each message's index and its reply or ``None``, in the order of asking, as they come."""
        waiting: dict[int, Message] = {}
        following = 0
        for index, reply in self._matched(messages, replies):
            waiting[index] = reply
            while following in waiting:
                yield following, waiting.pop(following)
                following += 1
        for index in range(following, len(messages)):
            yield index, waiting.pop(index, None)

    def _matched(self, messages: Sequence[Message], replies: Iterable[Message]) -> Iterator[tuple[int, Message]]:
        """Yield each reply with the index of its message: the first only, and only from the node that was asked."""
        index_of: dict[str, int] = {}
        answered: set[int] = set()
        for reply in replies:
            if not index_of:  # the grid gives messages their ids when it sends them
                index_of = {message.metadata.message_id: index for index, message in enumerate(messages)}
            index = index_of.get(reply.metadata.reply_to_message_id)
            if index is not None and index in answered:
                log.debug("left out a reply that came twice, from node %s", reply.metadata.src_node_id)
                continue
            if index is None:
                log.warning("left out a reply that nobody asked for, from node %s", reply.metadata.src_node_id)
                continue
            senders = {messages[index].metadata.dst_node_id}
            if reply.has_error():
                senders.add(SUPERLINK_NODE_ID)  # says that a node is gone or a message has expired
            if reply.metadata.src_node_id not in senders:
                log.warning("left out a reply from node %s to another node's message", reply.metadata.src_node_id)
                continue
            answered.add(index)
            yield index, reply

    def _node(self, client: int) -> int:
        """Return a client's node."""
        return self._node_of[client] if self._local is None else self._local.node_of(client)

    def _present(self, nodes: set[int]) -> list[int]:
        """Return the clients whose nodes are among ``nodes``, in ascending order."""
        return sorted(client for client, node in self._node_of.items() if node in nodes)

    def _unknown(self, nodes: set[int], needed: bool) -> list[int]:
        """Return the nodes to ask who they are; those that never say are left alone unless more are needed."""
        unknown = sorted(nodes - self._client_of.keys())
        return [node for node in unknown if needed or self._silent.get(node, 0) < _IDENTIFY_TRIES]

    def _check_simulated(self, present: int) -> None:
        """Raise if Flower's simulation runtime has too few or too many nodes; it has all once the first answers."""
        if self._simulated is None or not present:
            return
        nodes = len(list(self._grid.get_node_ids()))
        if nodes != self._simulated:
            reason = (
                f"is {self._simulated}, but Flower's simulation runtime has {nodes} nodes; start it with "
                f'--federation-config "num-supernodes={self._simulated}", or set federation.clients={nodes}'
            )
            raise ConfigError("federation.clients", reason)

    def _identify(self, unknown: Sequence[int], nodes: set[int], timeout_s: float) -> None:
        """Ask nodes that are not known yet which clients they are."""
        if not unknown or timeout_s <= 0:
            return
        messages = [Message(RecordDict(), n, "query.identify", ttl=timeout_s, group_id="identify") for n in unknown]
        silent = set(unknown)
        for index, reply in self._matched(messages, self._grid.send_and_receive(messages, timeout=timeout_s)):
            client, node = _read_client_id(reply), unknown[index]
            if client is None:
                continue
            first = self._node_of.get(client, node)
            if first != node and first in nodes:
                log.warning("nodes %s and %s both say they are client %s; the first stays", first, node, client)
                continue
            silent.discard(node)
            self._client_of[node] = client
            self._node_of[client] = node
        for node in sorted(silent):
            self._silent[node] = self._silent.get(node, 0) + 1
            log.warning("node %s did not say which client it is", node)


def _vector_records(vectors: Iterable[Vector | None]) -> dict[int, ArrayRecord]:
    """Return each vector as a record, by its ``id``: made once, however many requests share it."""
    distinct = {id(vector): vector for vector in vectors if vector is not None}
    return {name: vector_record("vector", vector) for name, vector in distinct.items()}


def _read_client_id(reply: Message) -> int | None:
    """Return the client that a node says it is, or ``None`` where it says nothing usable."""
    record = None if reply.has_error() else reply.content.get("client")
    if not isinstance(record, MetricRecord):
        return None
    value = record.get("id")
    return value if isinstance(value, int) and value >= 0 else None
