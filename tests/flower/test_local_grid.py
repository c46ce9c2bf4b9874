"""``LocalGrid`` keeps the contract of Flower's ``Grid``: in this process and in workers, in good order and in bad."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
import tracemalloc
from collections.abc import Iterator
from multiprocessing.connection import Connection

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.run import Run

from fedlearn.flower.faults import Fate, SimulatedClock
from fedlearn.flower.grid import LocalGrid, NoFaults, _interrupted_after
from fedlearn.flower.tampering import payload_bytes, tampered
from fedlearn.flower.workers import Answer, Outcome
from fedlearn.sources import ManualClock

NODES = 5
EVERYWHERE = pytest.mark.parametrize("workers", [0, 2])


def client_app(work) -> ClientApp:
    """Return an app that answers ``train`` by what ``work`` returns for (message, context)."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return Message(work(message, context), reply_to=message)

    return app


def echo(message: Message, context: Context) -> RecordDict:
    """Add this node's number to the vector it is sent."""
    vector = message.content.array_records["model"]["vector"].numpy()
    numbers = MetricRecord({"node": context.node_id, "partition": context.node_config["partition-id"]})
    return RecordDict({"model": ArrayRecord({"vector": Array(vector + context.node_id)}), "numbers": numbers})


def content(value=0.0) -> RecordDict:
    vector = np.full(1000, value)
    return RecordDict({"model": ArrayRecord({"vector": Array(vector)}), "config": ConfigRecord({"round": 1})})


def messages(nodes=range(1, NODES + 1), shared=None, ttl=60.0, group="1.1") -> list[Message]:
    return [Message(shared or content(node), node, "train", ttl=ttl, group_id=group) for node in nodes]


@pytest.fixture
def start() -> Iterator:
    """Return a function that starts a grid; all are closed in the end."""
    grids = []

    def call(work=echo, workers=0, clients=NODES, app=None, **more) -> LocalGrid:
        grids.append(LocalGrid(app or client_app(work), clients=clients, workers=workers, **more))
        return grids[-1]

    yield call
    for grid in grids:
        grid.close()


def node_of(reply: Message) -> int:
    return reply.content.metric_records["numbers"]["node"]


def check_answers(sent, replies):
    """Assert exactly one reply for each message, in order, that fits together with it."""
    assert len(sent) == len(replies)
    for message, reply in zip(sent, replies, strict=True):
        asked, told = message.metadata, reply.metadata
        assert told.reply_to_message_id == asked.message_id
        assert told.src_node_id == asked.dst_node_id
        assert told.dst_node_id == asked.src_node_id
        assert (told.run_id, told.group_id, told.message_type) == (asked.run_id, asked.group_id, asked.message_type)
    ids = [each.metadata.message_id for each in (*sent, *replies)]
    assert "" not in ids
    assert len(set(ids)) == len(ids)


# -- the seven members -------------------------------------------------------------------------------------------


def test_it_is_a_grid_and_has_every_member_of_one(start):
    grid = start()
    assert isinstance(grid, Grid)
    assert set(Grid.__abstractmethods__) <= {
        name for name in dir(grid) if callable(getattr(type(grid), name, None))
    } | {"run"}
    assert list(grid.get_node_ids()) == [1, 2, 3, 4, 5]
    grid.set_run(Run.create_empty(7))
    assert grid.run.run_id == 7
    message = grid.create_message(content(), "train", 3, "g", ttl=9.0)
    assert message.metadata.run_id == 7
    assert (message.metadata.dst_node_id, message.metadata.group_id, message.metadata.ttl) == (3, "g", 9.0)


@EVERYWHERE
def test_every_message_gets_one_reply_in_the_order_of_asking(start, workers):
    for order in ([1, 2, 3, 4, 5], [5, 3, 1], [2, 2, 2], []):
        sent = messages(order)
        replies = list(start(workers=workers).send_and_receive(sent, timeout=60))
        check_answers(sent, replies)
        assert [node_of(reply) for reply in replies] == order
        assert [r.content.metric_records["numbers"]["partition"] for r in replies] == [n - 1 for n in order]


@EVERYWHERE
def test_what_is_pushed_is_answered_once_when_it_is_pulled(start, workers):
    grid = start(workers=workers)
    sent = messages()
    ids = list(grid.push_messages(sent))
    assert ids == [message.metadata.message_id for message in sent]
    later, earlier = list(grid.pull_messages(ids[3:])), list(grid.pull_messages(ids[:3]))
    check_answers(sent, earlier + later)
    assert list(grid.pull_messages([*ids, "unknown"])) == []


@EVERYWHERE
def test_replies_stream_and_a_caller_may_stop_listening(start, workers):
    grid = start(workers=workers)
    first = next(iter(grid.send_and_receive(messages(), timeout=60)))
    assert node_of(first) == 1
    sent = messages()
    check_answers(sent, list(grid.send_and_receive(sent, timeout=60)))


def test_a_node_that_does_not_exist_is_refused(start):
    for node in (0, 6):
        with pytest.raises(ValueError, match="no node"):
            start().send_and_receive(messages([node]))


def slow_first(message: Message, context: Context) -> RecordDict:
    """Answer the later, the sooner."""
    time.sleep(0.05 * (NODES - context.node_id))
    return echo(message, context)


def test_the_same_bytes_on_any_number_of_workers(start):
    answers = set()
    for workers in (0, 1, 2, 3):
        replies = start(slow_first, workers=workers).send_and_receive(messages(), timeout=60)
        answers.add(b"".join(r.content.array_records["model"]["vector"].data for r in replies))
    assert len(answers) == 1


# -- clients that raise, die and hang ------------------------------------------------------------------------------


def quarrelsome(message: Message, context: Context) -> RecordDict:
    if context.node_id == 2:
        raise PermissionError("patient Jane Doe, born 1970")
    return echo(message, context)


@EVERYWHERE
def test_a_client_that_raises_becomes_flowers_error_without_its_text(start, workers, capfd):
    sent = messages()
    replies = list(start(quarrelsome, workers=workers).send_and_receive(sent, timeout=60))
    check_answers(sent, replies)
    assert [reply.has_error() for reply in replies] == [False, True, False, False, False]
    error = replies[1].error
    assert error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    assert "Jane" not in repr(replies[1])
    assert "Jane" not in "".join(capfd.readouterr())


def leaving(message: Message, context: Context) -> RecordDict:
    if context.node_id == 2:
        raise SystemExit("patient Jane Doe")
    return echo(message, context)


@EVERYWHERE
def test_a_client_that_calls_exit_is_left_out_and_ends_nobody_else(start, workers):
    sent = messages()
    replies = list(start(leaving, workers=workers).send_and_receive(sent, timeout=60))
    check_answers(sent, replies)
    assert [reply.has_error() for reply in replies] == [False, True, False, False, False]


def dying(message: Message, context: Context) -> RecordDict:
    if context.node_id == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return echo(message, context)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_a_worker_that_is_killed_costs_only_its_message(start, workers):
    grid = start(dying, workers=workers)
    for _ in range(3):
        sent = messages()
        replies = list(grid.send_and_receive(sent, timeout=60))
        check_answers(sent, replies)
        assert [reply.has_error() for reply in replies] == [False, True, False, False, False]
        assert replies[1].error.code == ErrorCode.CLIENT_APP_CRASHED


def stuttering(message: Message, context: Context) -> RecordDict:
    """Have this process killed when half of the answer is written."""
    if context.node_id == 2:

        def torn(descriptor, data):
            os.write(descriptor, bytes(data)[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)

        Connection._send.__defaults__ = (torn,)
    return echo(message, context)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_that_is_killed_in_the_middle_of_its_answer_costs_only_its_message(start, workers):
    sent = messages()
    replies = list(start(stuttering, workers=workers).send_and_receive(sent, timeout=60))
    check_answers(sent, replies)
    assert [reply.has_error() for reply in replies] == [False, True, False, False, False]
    assert replies[1].error.code == ErrorCode.CLIENT_APP_CRASHED


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_that_were_killed_while_idle_are_replaced(start, workers):
    grid = start(workers=workers)
    list(grid.send_and_receive(messages(), timeout=60))
    for worker in grid._pool._workers:
        worker.process.kill()
        worker.process.join()
    sent = messages()
    begun = time.monotonic()
    replies = list(grid.send_and_receive(sent, timeout=10))
    assert not any(reply.has_error() for reply in replies)
    assert time.monotonic() - begun < 5
    check_answers(sent, replies)


def except_for(nodes, wait):
    """Return what clients do where those of ``nodes`` wait instead."""

    def work(message: Message, context: Context) -> RecordDict:
        if context.node_id in nodes:
            wait()
        return echo(message, context)

    return work


def sleep_on():
    while True:
        time.sleep(10)


def spin():
    try:
        while True:
            pass
    except Exception:
        return


def swallow_the_first_interruption():
    try:
        sleep_on()
    except BaseException:
        sleep_on()


def check_only_these_hang(replies, nodes):
    """Assert that the clients of ``nodes``, and no others, got Flower's "no reply"."""
    assert [n for n, reply in enumerate(replies, start=1) if reply.has_error()] == sorted(nodes)
    for node in nodes:
        assert replies[node - 1].error.code == ErrorCode.REPLY_MESSAGE_UNAVAILABLE
    assert [node_of(r) for r in replies if not r.has_error()] == [n for n in range(1, NODES + 1) if n not in nodes]


@pytest.mark.parametrize("hanging", [[1], [3], [5], [1, 4], [1, 2]], ids=str)
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_client_that_hangs_costs_only_itself_wherever_it_stands(start, workers, hanging):
    grid = start(except_for(hanging, sleep_on), workers=workers)
    sent = messages()
    begun = time.monotonic()
    replies = list(grid.send_and_receive(sent, timeout=0.4))
    took_s = time.monotonic() - begun
    assert 0.35 < took_s < len(hanging) * 0.4 + 1.0
    check_answers(sent, replies)
    check_only_these_hang(replies, hanging)
    well = [node for node in range(1, NODES + 1) if node not in hanging]
    assert not any(reply.has_error() for reply in grid.send_and_receive(messages(well), timeout=60))  # it lives on


@EVERYWHERE
def test_a_client_that_never_calls_anything_is_stopped_too(start, workers):
    replies = list(start(except_for([3], spin), workers=workers).send_and_receive(messages(), timeout=0.4))
    check_only_these_hang(replies, [3])


@EVERYWHERE
def test_a_client_that_swallows_one_interruption_is_interrupted_again(start, workers):
    grid = start(except_for([2], swallow_the_first_interruption), workers=workers)
    begun = time.monotonic()
    check_only_these_hang(list(grid.send_and_receive(messages(), timeout=0.3)), [2])
    assert time.monotonic() - begun < 3


def swallow():
    """Hear of no interruption for half a second."""
    until = time.monotonic() + 0.5
    while time.monotonic() < until:
        with contextlib.suppress(BaseException):
            time.sleep(until - time.monotonic())


@EVERYWHERE
def test_an_answer_that_comes_too_late_is_no_answer(start, workers):
    replies = list(start(except_for([2], swallow), workers=workers).send_and_receive(messages(), timeout=0.3))
    check_only_these_hang(replies, [2])


def test_outside_the_main_thread_nobody_is_interrupted_but_a_late_answer_is_none_either(start):
    replies = []
    grid = start(except_for([2], lambda: time.sleep(0.4)))
    thread = threading.Thread(target=lambda: replies.extend(grid.send_and_receive(messages(), timeout=0.2)))
    thread.start()
    thread.join(10)
    check_only_these_hang(replies, [2])


@EVERYWHERE
def test_time_is_each_clients_own(start, workers):
    grid = start(except_for(range(1, NODES + 1), lambda: time.sleep(0.15)), workers=workers)
    check_only_these_hang(list(grid.send_and_receive(messages(), timeout=0.5)), [])  # together they take longer


@EVERYWHERE
def test_a_caller_that_takes_its_time_costs_no_client_its_answer(start, workers):
    stream = start(except_for([2], lambda: time.sleep(0.1)), workers=workers).send_and_receive(messages(), timeout=0.5)
    replies = [next(stream)]
    time.sleep(1.0)  # client 2 answers in this time, and nobody looks
    replies += stream
    check_only_these_hang(replies, [])


def test_while_the_first_client_hangs_the_others_work_ahead_but_not_further_than_memory_allows(start, tmp_path):
    def work(message: Message, context: Context) -> RecordDict:
        if context.node_id == 1:
            time.sleep(0.5)
            (tmp_path / "seen").write_text(str(len(list(tmp_path.glob("done-*")))))
        else:
            (tmp_path / f"done-{context.node_id}").touch()
        return echo(message, context)

    grid = start(work, workers=2, clients=12)
    replies = list(grid.send_and_receive(messages(range(1, 13)), timeout=10))
    assert [node_of(reply) for reply in replies] == list(range(1, 13))
    assert (tmp_path / "seen").read_text() == "3"  # two answers a worker, the one that is waited for among them


def test_a_hanging_worker_is_given_up_even_where_the_clock_stands_still(start):
    grid = start(except_for([2], sleep_on), workers=2, clock=ManualClock())
    check_only_these_hang(list(grid.send_and_receive(messages(), timeout=0.3)), [2])


@EVERYWHERE
def test_what_a_client_kept_before_it_hung_is_not_kept(start, workers):
    def work(message: Message, context: Context) -> RecordDict:
        record = context.state.setdefault("memory", MetricRecord({"times": 0}))
        record["times"] += 1
        answer = MetricRecord({"times": record["times"]})
        if message.content.config_records["config"]["hang"]:
            record["times"] = 99
            time.sleep(10)
        return RecordDict({"memory": answer})

    grid = start(work, workers=workers)

    def ask(hang, timeout):
        asked = messages([1], shared=RecordDict({"config": ConfigRecord({"hang": hang})}))
        return next(iter(grid.send_and_receive(asked, timeout=timeout)))

    assert ask(False, 60).content.metric_records["memory"]["times"] == 1
    assert ask(True, 0.2).has_error()
    assert ask(False, 60).content.metric_records["memory"]["times"] == 2


@EVERYWHERE
def test_a_late_answer_is_one_on_the_clock_that_was_passed_in(start, workers):
    class Late(ManualClock):
        """A minute passes whenever anybody looks."""

        def monotonic(self) -> float:
            self.advance(60)
            return super().monotonic()

    sent = messages()
    replies = list(start(workers=workers, clock=Late()).send_and_receive(sent, timeout=1))
    check_answers(sent, replies)
    check_only_these_hang(replies, range(1, NODES + 1))


@EVERYWHERE
def test_without_time_nobody_is_asked_and_with_any_amount_of_it_everybody_answers(start, workers):
    def work(message: Message, context: Context) -> RecordDict:
        raise AssertionError

    check_only_these_hang(list(start(work, workers=workers).send_and_receive(messages(), timeout=0)), [1, 2, 3, 4, 5])
    for timeout in (1e10, float("inf"), None):
        check_only_these_hang(list(start(workers=workers).send_and_receive(messages(), timeout=timeout)), [])


def test_an_alarm_that_rings_at_any_moment_stays_inside_and_leaves_nothing_behind():
    calm = Answer(Message(RecordDict(), 1, "train"), RecordDict(), 0.0)
    handler, timer = signal.getsignal(signal.SIGALRM), signal.setitimer(signal.ITIMER_REAL, 0)
    outcomes = set()
    try:
        for step in range(4000):
            outcome = _interrupted_after(1e-6 * (1 + step % 40), lambda job: sum(range(300)) and calm, None)
            outcomes.add(outcome is Outcome.NO_REPLY)
            assert signal.getsignal(signal.SIGALRM) is handler
            assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
    assert outcomes == {True, False}


def test_no_more_workers_are_forked_than_there_are_clients(start):
    for workers, clients in ((40, 2), (2, 40)):
        grid = start(workers=workers, clients=clients)
        list(grid.send_and_receive(messages([1, 2]), timeout=60))
        assert len(grid._pool._workers) == 2


def test_a_caller_that_stops_listening_leaves_no_worker_busy(start):
    grid = start(except_for([2, 3], sleep_on), workers=2)
    stream = grid.send_and_receive(messages(), timeout=60)
    assert node_of(next(stream)) == 1
    stream.close()
    assert [worker.job for worker in grid._pool._workers] == [None, None]
    assert node_of(next(grid.send_and_receive(messages([4]), timeout=60))) == 4


def test_a_grid_that_is_closed_answers_nothing(start):
    grid = start(workers=2)
    grid.close()
    with pytest.raises(ValueError, match="closed"):
        list(grid.send_and_receive(messages(), timeout=60))


@EVERYWHERE
def test_somebody_elses_alarm_still_rings_when_it_would_have(start, workers):
    def mine(*_):
        raise AssertionError

    handler, timer = signal.signal(signal.SIGALRM, mine), signal.setitimer(signal.ITIMER_REAL, 50.0)
    try:
        list(start(workers=workers).send_and_receive(messages(), timeout=60))
        assert signal.getsignal(signal.SIGALRM) is mine
        assert 40.0 < signal.getitimer(signal.ITIMER_REAL)[0] < 50.0
    finally:
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *timer)


def test_closing_ends_every_worker(start):
    grid = start(workers=3)
    list(grid.send_and_receive(messages(), timeout=60))
    processes = [worker.process.pid for worker in grid._pool._workers]
    assert len(processes) == 3
    grid.close()
    grid.close()
    for pid in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


# -- what messages and clients share -------------------------------------------------------------------------------


def vandal(message: Message, context: Context) -> RecordDict:
    """Answer, then break everything that was received."""
    answer = echo(message, context)
    answer["config"] = ConfigRecord(dict(message.content.config_records["config"]))
    message.content.array_records["model"]["vector"] = Array(np.full(1000, np.nan))
    message.content.config_records["config"]["round"] = 99
    message.content["more"] = MetricRecord({"x": 1})
    del message.content["model"]
    return answer


@EVERYWHERE
def test_a_client_that_changes_its_records_changes_nobody_elses(start, workers):
    shared = content(1.0)
    replies = list(start(vandal, workers=workers).send_and_receive(messages(shared=shared), timeout=60))
    for node, reply in enumerate(replies, start=1):
        np.testing.assert_array_equal(reply.content.array_records["model"]["vector"].numpy(), 1.0 + node)
        assert dict(reply.content.config_records["config"]) == {"round": 1}
    assert set(shared) == {"model", "config"}
    np.testing.assert_array_equal(shared.array_records["model"]["vector"].numpy(), 1.0)


def remembering(message: Message, context: Context) -> RecordDict:
    record = context.state.setdefault("memory", MetricRecord({"times": 0}))
    record["times"] += 1
    return RecordDict({"memory": MetricRecord({"times": record["times"]})})


@EVERYWHERE
def test_what_a_client_keeps_it_finds_again_and_nobody_else_does(start, workers):
    grid = start(remembering, workers=workers)

    def times(nodes):
        return [r.content.metric_records["memory"]["times"] for r in grid.send_and_receive(messages(nodes), timeout=60)]

    assert times([1, 2, 3]) == [1, 1, 1]
    assert times([1, 3]) == [2, 2]
    assert times([1, 2, 3, 4]) == [3, 2, 3, 1]


class DropsTwo(NoFaults):
    """Nodes of client 1 never answer."""

    def drops(self, group: str, client: int, kind: str) -> bool:
        assert (group, kind) == ("1.1", "train")
        return client == 1


@EVERYWHERE
def test_a_message_that_is_dropped_gets_flowers_error_and_its_client_never_works(start, workers):
    replies = list(start(dying, workers=workers, faults=DropsTwo()).send_and_receive(messages(), timeout=60))
    assert [reply.has_error() for reply in replies] == [False, True, False, False, False]
    assert replies[1].error.code == ErrorCode.REPLY_MESSAGE_UNAVAILABLE


# -- what goes wrong on purpose ------------------------------------------------------------------------------------


class Fates(NoFaults):
    """What becomes of the messages to some clients, in the first round."""

    def __init__(self, **fates: Fate) -> None:
        self.fates = {int(name.removeprefix("client")): fate for name, fate in fates.items()}

    def fate(self, group: str, client: int, kind: str) -> Fate:
        return self.fates.get(client, Fate()) if group == "1.1" else Fate()


@EVERYWHERE
def test_a_reply_that_is_lost_leaves_its_client_with_what_it_kept(start, workers):
    faults = Fates(client1=Fate(lost="after"), client2=Fate(lost="before"), client3=Fate(crashes=True))
    grid = start(remembering, workers=workers, faults=faults)
    sent = messages()
    replies = list(grid.send_and_receive(sent, timeout=60))
    check_answers(sent, replies)
    assert [reply.has_error() for reply in replies] == [False, True, True, True, False]
    codes = [reply.error.code for reply in replies[1:4]]
    assert codes == [*[ErrorCode.REPLY_MESSAGE_UNAVAILABLE] * 2, ErrorCode.CLIENT_APP_CRASHED]
    again = grid.send_and_receive(messages(group="2.1"), timeout=60)
    assert [reply.content.metric_records["memory"]["times"] for reply in again] == [2, 2, 1, 1, 2]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_client_that_crashes_takes_its_worker_with_it(start, workers):
    grid = start(workers=workers, faults=Fates(client0=Fate(crashes=True)))
    list(grid.send_and_receive(messages(group="2.1"), timeout=60))
    before = {worker.process.pid for worker in grid._pool._workers}
    list(grid.send_and_receive(messages(), timeout=60))
    assert len(before) == workers
    assert len(before - {worker.process.pid for worker in grid._pool._workers}) == 1


@EVERYWHERE
def test_a_reply_that_is_duplicated_comes_twice_and_is_the_same(start, workers):
    grid = start(
        workers=workers, faults=Fates(client1=Fate(duplicated=True), client2=Fate(duplicated=True, lost="after"))
    )
    replies = list(grid.send_and_receive(messages(), timeout=60))
    assert [0 if reply.has_error() else node_of(reply) for reply in replies] == [1, 2, 2, 0, 4, 5]
    assert replies[1].metadata.message_id == replies[2].metadata.message_id


@EVERYWHERE
@pytest.mark.parametrize("attack", ["nan", "wrong-shape", "scale"])
def test_a_reply_is_damaged_on_its_way_and_nothing_else_is(start, workers, attack):
    grid = start(workers=workers, faults=Fates(client1=Fate(attack=attack, factor=-2.0, where=0.999)))
    whole, damaged = (
        list(start().send_and_receive(messages(shared=content(0.5)), timeout=60)),
        list(grid.send_and_receive(messages(shared=content(0.5)), timeout=60)),
    )
    for node, (one, other) in enumerate(zip(whole, damaged, strict=True), start=1):
        sent, came = one.content.array_records["model"]["vector"], other.content.array_records["model"]["vector"]
        assert dict(one.content.metric_records["numbers"]) == dict(other.content.metric_records["numbers"])
        if node != 2:
            assert came.data == sent.data
        elif attack == "nan":
            assert np.flatnonzero(np.isnan(came.numpy())).tolist() == [999]
        elif attack == "scale":
            np.testing.assert_array_equal(came.numpy(), -2.0 * sent.numpy())
        else:
            assert tuple(came.shape) != tuple(sent.shape)


def test_there_are_several_wrong_shapes_and_an_error_is_not_damaged(start):
    (reply,) = start().send_and_receive(messages([1]), timeout=60)
    shapes = {
        tuple(tampered(reply, Fate(attack="wrong-shape", where=where)).content.array_records["model"]["vector"].shape)
        for where in (0.0, 0.3, 0.6, 0.9)
    }
    assert shapes == {(999,), (1001,), (1, 1000), (0,)}
    assert tuple(reply.content.array_records["model"]["vector"].shape) == (1000,)
    (error,) = start(quarrelsome).send_and_receive(messages([2]), timeout=60)
    assert tampered(error, Fate(attack="nan")) is error


# -- a population that nobody counts ---------------------------------------------------------------------------------


def test_clients_and_nodes_are_told_from_each_other_without_asking(start):
    grid = start()
    assert [grid.node_of(client) for client in grid.present()] == [1, 2, 3, 4, 5] == list(grid.get_node_ids())
    for wrong in (-1, 5):
        with pytest.raises(ValueError, match="no node"):
            grid.node_of(wrong)
    assert grid.node_config_of(3) == {"partition-id": 3, "num-partitions": 5}
    assert start(node_config={"max-epsilon": 2.0}).node_config_of(0)["max-epsilon"] == 2.0


def test_a_hundred_thousand_clients_cost_nothing_until_they_are_asked(start):
    tracemalloc.start()
    try:
        grid = start(clients=100_000)
        assert (len(grid.get_node_ids()), len(grid.present()), grid.node_of(99_999)) == (100_000, 100_000, 100_000)
        replies = list(grid.send_and_receive(messages([7, 100_000]), timeout=60))
        assert tracemalloc.get_traced_memory()[1] < 500_000
    finally:
        tracemalloc.stop()
    assert [node_of(reply) for reply in replies] == [7, 100_000]
    assert grid._states == {}  # these keep nothing


@EVERYWHERE
def test_of_a_client_that_keeps_nothing_any_more_nothing_is_kept(start, workers):
    def work(message: Message, context: Context) -> RecordDict:
        if "memory" in context.state:
            context.state.clear()
        else:
            context.state["memory"] = MetricRecord({"times": 1})
        return echo(message, context)

    grid = start(work, workers=workers)
    list(grid.send_and_receive(messages([1, 2]), timeout=60))
    assert sorted(grid._states) == [1, 2]
    list(grid.send_and_receive(messages([1]), timeout=60))
    assert sorted(grid._states) == [2]


# -- simulated time ------------------------------------------------------------------------------------------------


class Slow:
    """Client c takes 10 · c seconds, and one more for a thousand bytes each way; the first one is not there."""

    def __init__(self) -> None:
        self.clock = SimulatedClock()

    def duration_s(self, group: str, client: int, kind: str, *, download_bytes: int, upload_bytes: int) -> float:
        return 10.0 * client + (download_bytes + upload_bytes) / 1000

    def present(self) -> list[int]:
        return [1, 2, 3, 4]


LINK_S = 16.0
"""A thousand numbers of eight bytes each way."""


@EVERYWHERE
def test_simulated_time_passes_until_the_slowest_reply_is_there_and_nobody_waits_for_it(start, workers):
    grid = start(workers=workers, devices=Slow())
    assert list(grid.get_node_ids()) == [2, 3, 4, 5]
    begun = time.monotonic()
    assert not any(reply.has_error() for reply in grid.send_and_receive(messages([2, 5, 3]), timeout=60))
    assert grid.simulated_clock.monotonic() == 40.0 + LINK_S
    late = list(grid.send_and_receive(messages([3]), timeout=60))  # of the same kind and group: sent at the same time
    assert not late[0].has_error()
    assert grid.simulated_clock.monotonic() == 40.0 + LINK_S
    assert time.monotonic() - begun < 5.0
    assert start(workers=workers).simulated_clock is None


@EVERYWHERE
def test_a_reply_that_comes_too_late_in_simulated_time_is_none_and_its_client_keeps_what_it_kept(start, workers):
    grid = start(remembering, workers=workers, devices=Slow())
    asked = messages([2, 5])
    replies = list(grid.send_and_receive(asked, timeout=40.0))
    assert [reply.has_error() for reply in replies] == [False, True]  # 18 s and 48 s: this reply is short
    assert replies[1].error.code == ErrorCode.REPLY_MESSAGE_UNAVAILABLE
    assert grid.simulated_clock.monotonic() == 40.0
    (again,) = grid.send_and_receive(messages([5]), timeout=60)
    assert again.content.metric_records["memory"]["times"] == 2


def test_where_somebody_is_missing_simulated_time_goes_to_the_deadline(start):
    grid = start(devices=Slow(), faults=Fates(client1=Fate(lost="after"), client2=Fate(crashes=True)))
    list(grid.send_and_receive(messages([3]), timeout=60))
    assert grid.simulated_clock.monotonic() == 0.0  # that a process died is known at once
    list(grid.send_and_receive(messages([2, 4]), timeout=60))
    assert grid.simulated_clock.monotonic() == 60.0


def test_many_clients_of_one_message_take_as_long_as_the_slowest_of_them(start):
    app = client_app(echo)
    app.train("group")(lambda message, context: Message(echo(message, context), reply_to=message))
    grid = start(app=app, devices=Slow(), faults=Fates(client1=Fate(lost="before")))
    shared = content()
    shared["group"] = ConfigRecord({"members": [1, 3, 2]})
    asked = Message(shared, 2, "train.group", ttl=60.0, group_id="1.1")
    list(grid.send_and_receive(messages([5]), timeout=600))
    faults_do_not_matter = list(grid.send_and_receive([asked], timeout=600))
    assert len(faults_do_not_matter) == 1
    assert grid.simulated_clock.monotonic() == 40.0 + LINK_S  # of the first message: both were sent at one time


def test_what_makes_a_message_long_are_its_numbers_and_its_bodies():
    records = content()
    assert payload_bytes(records) == 8000
    records["leg"] = ConfigRecord({"body": b"12345", "plan": "a long text"})
    assert payload_bytes(records) == 8005


# -- Flower's own strategy -----------------------------------------------------------------------------------------


def half_way(message: Message, context: Context) -> RecordDict:
    """Go half the way to this client's own number."""
    weights = message.content.array_records["arrays"]["w"].numpy()
    target = float(context.node_id)
    return RecordDict(
        {
            "arrays": ArrayRecord({"w": Array((weights + target) / 2)}),
            "metrics": MetricRecord({"num-examples": 10, "distance": float(np.abs(weights - target).max())}),
        }
    )


@EVERYWHERE
def test_flowers_own_fedavg_runs_unmodified(start, workers):
    app = client_app(half_way)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return Message(RecordDict({"metrics": MetricRecord({"num-examples": 1, "node": 1.0})}), reply_to=message)

    strategy = FedAvg(fraction_train=1.0, fraction_evaluate=1.0)
    grid = start(app=app, workers=workers)
    result = strategy.start(grid, ArrayRecord({"w": Array(np.zeros(3))}), num_rounds=3)
    np.testing.assert_allclose(result.arrays["w"].numpy(), 3.0 * (1 - 0.5**3))  # the clients' mean number is 3
    assert list(result.train_metrics_clientapp) == [1, 2, 3]
    assert result.evaluate_metrics_clientapp[3]["node"] == pytest.approx(1.0)
