"""Our side of Flower's simulation runtime, without Ray: replies stream, all in their turn, and nothing hangs."""

from __future__ import annotations

import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fedlearn.errors import ConfigError, DependencyError, MissingError, RunFailedError
from fedlearn.flower.client import build_client_app
from fedlearn.flower.grid import LocalGrid
from fedlearn.flower.network import is_simulation_runtime
from fedlearn.flower.runtime import _AHEAD, FlowerRuntime, RuntimeGrid, _end_marked, _ResidentApp, _within

# isort: split
from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid


class Store:
    """Flower's message store: what is pushed is answered when the test says so."""

    def __init__(self, nodes: int = 3) -> None:
        self.nodes, self.pushed, self.replies, self.most = nodes, {}, [], 0

    def get_node_ids(self):
        return range(1, self.nodes + 1)

    def push_messages(self, messages):
        names = []
        for message in messages:
            name = f"flower-{len(self.pushed)}"
            message.metadata.__dict__["_message_id"] = name
            self.pushed[name] = message
            names.append(name)
        return names

    def answer(self, name: str) -> None:
        self.replies.append(Message(RecordDict(), reply_to=self.pushed[name]))

    def pull_messages(self, names):
        self.most = max(self.most, len(names))
        there = [reply for reply in self.replies if reply.metadata.reply_to_message_id in names]
        self.replies = [reply for reply in self.replies if reply not in there]
        return there


@pytest.fixture(autouse=True)
def _identity():
    with LocalGrid(build_client_app(), clients=1):  # messages of this process are the server's
        yield


def messages(count: int) -> list[Message]:
    return [Message(RecordDict(), 1 + number % 3, "query.identify", ttl=9.0, group_id="g") for number in range(count)]


def grid(store: Store, actors: int = 1, check=lambda: None) -> RuntimeGrid:
    return RuntimeGrid(store, actors, check)


def test_replies_stream_and_name_the_message_that_their_sender_knows() -> None:
    store, asked = Store(), messages(3)
    answers = grid(store).send_and_receive(asked, timeout=5.0)
    store_ids = ["flower-2", "flower-0", "flower-1"]
    store.replies = []
    first = None
    for name, index in zip(store_ids, (2, 0, 1), strict=True):
        if first is None:
            threading.Timer(0.05, store.answer, (name,)).start()
        else:
            store.answer(name)
        first = next(answers)
        assert first.metadata.reply_to_message_id == asked[index].metadata.message_id
    assert list(answers) == []
    assert len({message.metadata.message_id for message in asked}) == 3


def test_no_more_is_under_way_than_actors_can_soon_begin() -> None:
    store, asked = Store(), messages(5 * _AHEAD)
    store.push_messages, push = lambda each: [store.answer(name) or name for name in push(each)], store.push_messages
    assert len(list(grid(store, actors=2).send_and_receive(asked, timeout=5.0))) == len(asked)
    assert store.most <= 2 * _AHEAD
    silent = Store()
    answers = grid(silent, actors=2).send_and_receive(messages(100), timeout=0.001)
    assert list(answers) == []
    assert silent.most == 2 * _AHEAD


def test_what_nobody_answers_is_given_up_and_the_rest_is_not() -> None:
    store, asked = Store(), messages(3)
    answers = grid(store).send_and_receive(asked, timeout=0.02)
    threading.Timer(0.05, store.answer, ("flower-1",)).start()
    begun_s = time.monotonic()
    assert [reply.metadata.reply_to_message_id for reply in answers] == [asked[1].metadata.message_id]
    assert time.monotonic() - begun_s < 5


def test_a_message_lives_from_when_its_turn_comes() -> None:
    store, asked = Store(), messages(1)
    asked[0].metadata.created_at -= 3600
    list(grid(store).send_and_receive(asked, timeout=0.01))
    sent = store.pushed["flower-0"].metadata
    assert time.time() - sent.created_at < 60
    assert sent.ttl > 0.01


def test_a_runtime_that_is_gone_ends_the_wait() -> None:
    def gone() -> None:
        raise RunFailedError("gone")

    with pytest.raises(RunFailedError, match="gone"):
        list(grid(Store(), check=gone).send_and_receive(messages(1), timeout=None))


def test_all_nodes_and_an_answer_of_every_actor_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(nodes=0)
    store.push_messages, push = lambda each: [store.answer(name) or name for name in push(each)], store.push_messages
    threading.Timer(0.05, setattr, (store, "nodes", 3)).start()
    grid(store, actors=2).wait_for(3)
    assert len(store.pushed) == 2
    monkeypatch.setattr("fedlearn.flower.runtime._START_S", 0.05)
    with pytest.raises(RunFailedError, match="of 2 actors 0 were ready"):
        grid(Store(), actors=2).wait_for(3)


def test_it_counts_as_flowers_simulation_runtime() -> None:
    assert isinstance(grid(Store()), Grid)
    assert is_simulation_runtime(grid(Store()))


# -- actors --------------------------------------------------------------------------------------------------------


def test_a_client_that_hangs_is_interrupted_and_what_was_set_before_stays() -> None:
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(TimeoutError):
        _within(0.05, lambda: time.sleep(30))  # type: ignore[arg-type, func-returns-value]
    assert signal.getsignal(signal.SIGALRM) == before
    reply = object()
    assert _within(30.0, lambda: reply) is reply  # type: ignore[arg-type, return-value]
    assert signal.setitimer(signal.ITIMER_REAL, 0)[0] == 0


def test_the_app_travels_as_what_it_is_told_and_is_built_once_a_process(tmp_path: Path) -> None:
    app = _ResidentApp({"max-epsilon": 8.0}, tmp_path / "nowhere" / "clients.log")
    data = pickle.dumps(app)
    assert len(data) < 500
    there = pickle.loads(data)  # noqa: S301 - made above
    assert pickle.loads(data) is there  # noqa: S301
    context = Context(run_id=1, node_id=7, node_config={"partition-id": 3}, state=RecordDict(), run_config={})
    reply = there(messages(1)[0], context)
    assert reply.content["client"]["id"] == 3
    assert context.node_config == {"max-epsilon": 8.0, "partition-id": 3}


# -- what cannot be ------------------------------------------------------------------------------------------------


def runtime(tmp_path: Path, workers: int = 0) -> FlowerRuntime:
    return FlowerRuntime(clients=2, workers=workers, node_config={}, log_file=tmp_path / "clients.log")


def test_without_ray_the_command_that_installs_it_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("fedlearn.flower.runtime.find_spec", lambda package: None)
    with pytest.raises(DependencyError, match=r"'\.\[ray\]'"):
        runtime(tmp_path)


def test_a_cluster_has_its_own_number_of_actors_and_must_be_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("fedlearn.flower.runtime.find_spec", lambda package: object())
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(ConfigError, match=r"simulation\.workers: must be 0"):
        runtime(tmp_path, workers=2)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(MissingError, match=r"no Ray cluster answers at 127\.0\.0\.1:1"):
        runtime(tmp_path)
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="the system does not list processes")
def test_only_processes_of_the_cluster_are_ended(tmp_path: Path) -> None:
    def sleeper(folder: Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-c", "import time; time.sleep(60)"], env={"FEDLEARN_RAY": str(folder)}
        )

    ours, others = sleeper(tmp_path), sleeper(tmp_path.parent)
    try:
        while not Path(f"/proc/{ours.pid}/environ").read_bytes():
            time.sleep(0.01)
        _end_marked(tmp_path, only=b"ray::")
        assert ours.poll() is None, "it is no actor"
        _end_marked(tmp_path)
        assert ours.wait(10) == -signal.SIGKILL
        assert others.poll() is None
    finally:
        for each in (ours, others):
            each.kill()
            each.wait()
