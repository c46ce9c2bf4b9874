"""Whatever the nodes of a grid send, each request gets one reply, in order, from the client that was asked."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from hypothesis import given
from hypothesis import strategies as st

from fedlearn.arrays import ParamEntry, ParamSpec
from fedlearn.config import RunConfig
from fedlearn.errors import TooFewClientsError
from fedlearn.federation.messages import Failure, FailureCode, Request, RoundPlan, TrainReply
from fedlearn.flower.grid import LocalGrid
from fedlearn.flower.network import GridNetwork
from fedlearn.flower.records import train_reply_records
from fedlearn.sources import ManualClock

SPEC = ParamSpec((ParamEntry(name="w", shape=(4,), dtype="float32", trainable=True),))
PLAN = RoundPlan(config=RunConfig(), round_number=1, attempt=1, proximal_mu=0.0, spec_sha256=SPEC.sha256)
Replies = list[Message]


def honest_app() -> ClientApp:
    """Clients that answer a round with their own number in every place."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        client = int(context.node_config["partition-id"])
        return Message(
            train_reply_records(np.full(4, client, np.float32), {"num-examples": 1, "loss": 0.5}), reply_to=message
        )

    @app.query("identify")
    def identify(message: Message, context: Context) -> Message:
        number = context.node_config["partition-id"]
        return Message(RecordDict({"client": MetricRecord({"id": number})}), reply_to=message)

    return app


class HostileGrid(LocalGrid):
    """A grid whose replies to ``kind`` are given to ``mangle`` before the server sees them, and whose nodes change."""

    def __init__(
        self, mangle: Callable[[Replies], Sequence[Message]] = list, *, kind: str = "train", clients: int = 4
    ) -> None:
        super().__init__(honest_app(), clients=clients)
        self.mangle, self.kind = mangle, kind
        self.nodes: Callable[[], Sequence[int]] = lambda: range(1, clients + 1)
        self.asked: list[tuple[str, int, float]] = []

    def get_node_ids(self) -> Sequence[int]:
        return self.nodes()

    def send_and_receive(self, messages, *, timeout=None) -> Iterator[Message]:
        sent = list(messages)
        self.asked += [(m.metadata.message_type, m.metadata.dst_node_id, m.metadata.ttl) for m in sent]
        replies = list(super().send_and_receive(sent, timeout=timeout))
        return iter(self.mangle(replies) if sent and sent[0].metadata.message_type == self.kind else replies)


def network(grid: HostileGrid, clock: ManualClock | None = None) -> GridNetwork:
    return GridNetwork(grid, clock or ManualClock(), clients=4)


def ask(grid: HostileGrid, clients: Sequence[int] = (0, 1, 2, 3)):
    net, vector = network(grid), np.zeros(4, np.float32)
    assert list(net.clients(4, 10.0)) == [0, 1, 2, 3]
    requests = [Request(kind="train", client=client, plan=PLAN, vector=vector) for client in clients]
    replies = list(net.exchange(requests, SPEC, 10.0))
    assert [reply.client for reply in replies] == list(clients)
    return replies


def summary(replies) -> list[object]:
    """Return the number that each client said of itself, or the code of its failure."""
    return [float(r.update.vector[0]) if isinstance(r, TrainReply) else str(r.code) for r in replies]


def forged(reply: Message, **changes: object) -> Message:
    """Return a copy of a reply with other metadata."""
    copy = Message(reply.content, reply_to=reply)
    copy.metadata.__dict__.update(reply.metadata.__dict__)
    copy.metadata.__dict__.update({f"_{name}": value for name, value in changes.items()})
    return copy


# -- a round -----------------------------------------------------------------------------------------------------


def test_honest_nodes_are_heard_in_the_order_of_asking():
    assert summary(ask(HostileGrid())) == [0.0, 1.0, 2.0, 3.0]
    assert summary(ask(HostileGrid(), [3, 1])) == [3.0, 1.0]


def test_every_message_lives_as_long_as_the_rounds_deadline():
    grid = HostileGrid()
    ask(grid)
    assert {ttl for kind, _, ttl in grid.asked if kind == "train"} == {10.0}


@given(st.permutations(range(4)))
def test_replies_that_come_in_any_order_are_put_in_order(order):
    assert summary(ask(HostileGrid(lambda r: [r[i] for i in order]))) == [0.0, 1.0, 2.0, 3.0]


def test_a_node_that_answers_anothers_message_is_not_heard_and_the_other_is():
    def steal(replies):
        stolen = replies[0].metadata.reply_to_message_id
        node = replies[1].metadata.src_node_id
        return [forged(replies[1], reply_to_message_id=stolen, src_node_id=node), *replies]

    assert summary(ask(HostileGrid(steal))) == [0.0, 1.0, 2.0, 3.0]


def test_of_two_replies_only_the_first_counts():
    def twice(replies):
        second = Message(
            train_reply_records(np.full(4, 99, np.float32), {"num-examples": 1, "loss": 0.5}), reply_to=replies[1]
        )
        second.metadata.__dict__.update(replies[1].metadata.__dict__)
        return [replies[1], second, second, replies[0], second, *replies[2:], *replies]

    assert summary(ask(HostileGrid(twice))) == [0.0, 1.0, 2.0, 3.0]


def test_replies_to_nothing_that_was_asked_are_not_heard():
    def noise(replies):
        ids = ["", "unknown", "local-0", "x" * 10_000]
        return [*(forged(replies[2], reply_to_message_id=name) for name in ids), *replies[::-1]]

    assert summary(ask(HostileGrid(noise))) == [0.0, 1.0, 2.0, 3.0]


def test_who_does_not_answer_is_a_failure_and_nobody_elses():
    assert summary(ask(HostileGrid(lambda r: r[1:3]))) == ["no-reply", 1.0, 2.0, "no-reply"]
    assert summary(ask(HostileGrid(lambda r: []))) == ["no-reply"] * 4


def _error(code: int, reason: str | None):
    def mangle(replies):
        error = Message(Error(code=code, reason=reason), reply_to=replies[0])
        error.metadata.__dict__.update(replies[0].metadata.__dict__)
        return [error, *replies[1:]]

    return mangle


@pytest.mark.parametrize(
    ("code", "reason", "expected"),
    [
        (ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "ValueError", "training-failed"),
        (ErrorCode.MESSAGE_UNAVAILABLE, "gone", "no-reply"),
        (ErrorCode.REPLY_MESSAGE_UNAVAILABLE, "late", "no-reply"),
        (ErrorCode.CLIENT_APP_CRASHED, "", "lost"),
        (ErrorCode.NODE_UNAVAILABLE, "", "lost"),
        (12345, "?", "lost"),
        (100, "refused:00ff00ff", "refused"),
        (100, "no-data:1", "no-data"),
        (100, "Jane Doe:1", "bad-reply"),
        (100, "refused:Jane Doe is ill", "bad-reply"),
        (100, "refused:" + "f" * 17, "bad-reply"),
        (100, "refused", "bad-reply"),
        (100, "", "bad-reply"),
        (100, None, "bad-reply"),
        (100, "x" * 10**6, "bad-reply"),
    ],
)
def test_an_error_reply_is_one_of_our_words_and_never_text(code, reason, expected, caplog):
    with caplog.at_level(logging.DEBUG, "fedlearn"):
        first, *others = ask(HostileGrid(_error(code, reason)))
    assert isinstance(first, Failure)
    assert str(first.code) == expected
    assert "Jane" not in repr(first) + caplog.text
    assert summary(others) == [1.0, 2.0, 3.0]


def _content(**records):
    return RecordDict(records)


ZEROS = ArrayRecord({"update": Array(np.zeros(4, np.float32))})
NUMBERS = MetricRecord({"num-examples": 1, "loss": 0.5})
BAD_CONTENT = {
    "nothing": _content(),
    "no metrics": _content(update=ZEROS),
    "no update": _content(metrics=NUMBERS),
    "an extra record": _content(update=ZEROS, metrics=NUMBERS, more=ConfigRecord({"a": 1})),
    "records of other kinds": _content(update=NUMBERS, metrics=ZEROS),
    "config for metrics": _content(update=ZEROS, metrics=ConfigRecord({"num-examples": 1, "loss": 0.5})),
    "two arrays": _content(update=ArrayRecord({"update": ZEROS["update"], "more": ZEROS["update"]}), metrics=NUMBERS),
    "another array": _content(update=ArrayRecord({"weights": ZEROS["update"]}), metrics=NUMBERS),
    "no array": _content(update=ArrayRecord(), metrics=NUMBERS),
    "a list of counts": _content(update=ZEROS, metrics=MetricRecord({"num-examples": [1, 2], "loss": 0.5})),
    "a float count": _content(update=ZEROS, metrics=MetricRecord({"num-examples": 1.0, "loss": 0.5})),
    "a greedy count": _content(update=ZEROS, metrics=MetricRecord({"num-examples": 10**12, "loss": 0.5})),
    "one place too many": _content(update=ArrayRecord({"update": Array(np.zeros(5, np.float32))}), metrics=NUMBERS),
    "a matrix": _content(update=ArrayRecord({"update": Array(np.zeros((4, 1), np.float32))}), metrics=NUMBERS),
    "a double": _content(update=ArrayRecord({"update": Array(np.zeros(4))}), metrics=NUMBERS),
}


@pytest.mark.parametrize("content", BAD_CONTENT.values(), ids=BAD_CONTENT)
def test_bad_content_is_that_clients_failure(content):
    def mangle(replies):
        replies[1].content = content
        return replies

    assert summary(ask(HostileGrid(mangle))) == [0.0, "bad-reply", 2.0, 3.0]


def test_replies_are_read_and_forgotten_one_at_a_time():
    alive: list[weakref.ref] = []

    class Watched(LocalGrid):
        def send_and_receive(self, messages, *, timeout=None):
            for reply in super().send_and_receive(messages, timeout=timeout):
                alive.append(weakref.ref(reply))
                yield reply
                del reply

    with Watched(honest_app(), clients=30) as grid:
        net = GridNetwork(grid, ManualClock(), clients=30)
        net.clients(30, 10.0)
        alive.clear()
        vector = np.zeros(4, np.float32)
        requests = [Request(kind="train", client=client, plan=PLAN, vector=vector) for client in range(30)]
        for number, _ in enumerate(net.exchange(requests, SPEC, 10.0), start=1):
            assert len(alive) == number  # nothing is asked for before its time
            assert sum(ref() is not None for ref in alive) <= 2  # and nothing is kept


# -- who is there --------------------------------------------------------------------------------------------------


def test_a_grid_that_stays_empty_ends_at_the_deadline_without_real_waiting():
    clock, grid = ManualClock(), HostileGrid()
    grid.nodes = list
    with pytest.raises(TooFewClientsError, match="0 clients are connected after 600 s"):
        network(grid, clock).clients(4, 600.0)
    assert clock.monotonic() == pytest.approx(600.0)


def test_nodes_that_never_say_who_they_are_end_at_the_deadline():
    class Slow(HostileGrid):
        def send_and_receive(self, messages, *, timeout=None):
            clock.advance(timeout)
            return iter(())

    clock = ManualClock()
    with pytest.raises(TooFewClientsError, match="0 clients"):
        network(Slow(), clock).clients(4, 100.0)
    assert clock.monotonic() == pytest.approx(100.0)


def test_nodes_that_come_late_are_waited_for():
    clock, grid = ManualClock(), HostileGrid()
    grid.nodes = lambda: range(1, 5 if clock.monotonic() > 30 else 3)
    assert list(network(grid, clock).clients(4, 600.0)) == [0, 1, 2, 3]
    assert 30 < clock.monotonic() < 35


def test_a_node_is_asked_who_it_is_once():
    net = network(grid := HostileGrid())
    for _ in range(3):
        net.clients(4, 10.0)
    assert [node for kind, node, _ in grid.asked] == [1, 2, 3, 4]


def test_a_client_that_is_gone_is_not_there():
    net = network(grid := HostileGrid())
    net.clients(4, 10.0)
    grid.nodes = lambda: [1, 2, 4]
    assert list(net.clients(3, 10.0)) == [0, 1, 3]


def claiming(**claims: object):
    """Return what makes node n say the record that ``claims`` has for it."""

    def mangle(replies):
        for reply in replies:
            if (claim := claims.get(f"n{reply.metadata.src_node_id}")) is not None:
                reply.content = (
                    RecordDict(claim)
                    if isinstance(claim, dict)
                    else RecordDict({"client": MetricRecord({"id": claim})})
                )
        return replies

    return mangle


@pytest.mark.parametrize(
    "garbage",
    [
        {},
        {"client": ConfigRecord({"id": 1})},
        {"client": MetricRecord({})},
        {"client": MetricRecord({"id": 1.0})},
        {"client": MetricRecord({"id": -1})},
        {"client": MetricRecord({"id": [1]})},
        {"client": ArrayRecord()},
        {"Client": MetricRecord({"id": 3})},
    ],
    ids=lambda g: repr(g)[:40],
)
def test_a_node_that_does_not_say_who_it_is_is_no_client(garbage):
    grid = HostileGrid(claiming(n4=garbage), kind="query.identify")
    assert list(network(grid).clients(3, 10.0)) == [0, 1, 2]
    with pytest.raises(TooFewClientsError):
        network(grid).clients(4, 10.0)


def test_of_two_nodes_that_say_the_same_client_the_first_stays():
    net = network(HostileGrid(claiming(n4=0), kind="query.identify"))
    assert list(net.clients(3, 10.0)) == [0, 1, 2]
    assert net._node_of[0] == 1


def test_a_node_that_comes_later_does_not_take_over_a_connected_client():
    grid = HostileGrid(claiming(n4=0), kind="query.identify")
    grid.nodes = lambda: [1, 2, 3]
    net = network(grid)
    net.clients(3, 10.0)
    grid.nodes = lambda: [1, 2, 3, 4]
    assert list(net.clients(3, 10.0)) == [0, 1, 2]
    assert net._node_of[0] == 1


def test_a_client_that_comes_back_as_another_node_is_found_again():
    grid = HostileGrid(claiming(n4=0), kind="query.identify")
    grid.nodes = lambda: [1, 2, 3]
    net = network(grid)
    net.clients(3, 10.0)
    grid.nodes = lambda: [2, 3, 4]
    assert list(net.clients(3, 10.0)) == [0, 1, 2]
    assert net._node_of[0] == 4


def test_the_codes_that_travel_are_words_of_our_own():
    assert all(code == code.lower() and code.replace("-", "").isalpha() for code in FailureCode)
