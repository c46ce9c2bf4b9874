"""Secure aggregation on ``LocalGrid``: the same model as without masks, whoever is lost, and nothing beside the sum.

Three parts: whole runs, in this process and in workers, whose every message a grid of the test's own sees; devices,
asked leg by leg as a server would that lies; runs in which clients hide by their own noise.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.supercore.task_identity import TaskIdentity

from fedlearn.algorithms.registry import ALGORITHMS
from fedlearn.config import RunConfig
from fedlearn.data.loaders import distribute_data
from fedlearn.errors import RoundFailedError
from fedlearn.federation.messages import LegRequest, RoundPlan
from fedlearn.federation.run_folder import RunFolder
from fedlearn.flower.client import build_client_app, prepare_clients
from fedlearn.flower.grid import Faults, LocalGrid, NoFaults
from fedlearn.flower.records import leg_records, request_records, vector_record
from fedlearn.flower.server import build_server_app
from fedlearn.learning import build_flat_model
from fedlearn.privacy.ledger import read_events
from fedlearn.scenario import read_scenario
from fedlearn.secagg import simulated
from fedlearn.secagg.allow_list import AllowList
from fedlearn.secagg.encoding import Encoding
from fedlearn.secagg.errors import RoundAbortedError
from fedlearn.secagg.keys import SigningKey
from fedlearn.secagg.messages import Offer
from fedlearn.secagg.server import PHASES, ServerSession
from fedlearn.secagg.terms import Terms
from fedlearn.simulation.faults import SeededFaults
from fedlearn.sources import SecureRandom, SeedTree
from fedlearn.tasks import load_task

MODES = ("active", "semi-honest", "ideal")
COUNTS = dict(zip(PHASES, ("advertised", "shared", "masked", "confirmed", "unmasked"), strict=True))
SEVEN = ["task=regression", "data.partition=iid", "federation.clients=9", "federation.cohort=7"]
"""Of seven, five rebuild a secret: two may be lost."""

RANDOM = SecureRandom()


def slow_but(fast: Sequence[Any], values: Iterable[Any]) -> list[Any]:
    """Return parameters of which all but a few are for ``-m slow``."""
    return [pytest.param(value, marks=() if value in fast else pytest.mark.slow) for value in values]


# -- whole runs --------------------------------------------------------------------------------------------------


@dataclass
class Lost(NoFaults):
    """Loses the first ``count`` clients that are asked something in a leg, in some tries, from that leg on."""

    leg: str
    count: int
    groups: Sequence[str] = ("1.1",)
    lost: dict[str, set[int]] = field(default_factory=dict)

    def drops(self, group: str, client: int, kind: str) -> bool:
        leg, lost = kind.partition(".")[2], self.lost.setdefault(group, set())
        if group not in self.groups or leg not in (*PHASES, "ideal"):
            return False
        due = self.leg in PHASES[:3] if leg == "ideal" else PHASES.index(leg) >= PHASES.index(self.leg)
        if due and len(lost) < self.count and (leg in (self.leg, "ideal")):
            lost.add(client)
        return due and client in lost


class Watched(LocalGrid):
    """A grid that shows what it carries, and bends it on the way."""

    def __init__(self, *words: Any, bend: Callable[[Message], None], **more: Any) -> None:
        super().__init__(*words, **more)
        self.bend, self.replies = bend, list[Message]()

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        asked = list(messages)
        for message in asked:
            self.bend(message)
        for reply in super().send_and_receive(asked, timeout=timeout):
            self.replies.append(reply)
            yield reply


@dataclass
class Run:
    """A run that ended, and what was left of it."""

    folder: RunFolder
    grid: Watched

    @property
    def sha256(self) -> str:
        return hashlib.sha256((self.folder.path / "model.safetensors").read_bytes()).hexdigest()

    @property
    def params(self) -> np.ndarray:
        return self.folder.load_state().server.params

    @property
    def tries(self) -> list[dict[str, Any]]:
        path = self.folder.path / "secagg.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def releases(self) -> list[Any]:
        return [each.release() for each in read_events(self.folder.path / "ledger.jsonl") if "release" in each.kind]


@dataclass
class Runs:
    """Starts runs whose key folders lie below ``shm``, and notes what each of them held when it was deleted."""

    path: Path
    shm: Path
    deleted: list[list[str]] = field(default_factory=list)
    began: list[Run] = field(default_factory=list)

    def __call__(
        self,
        *overrides: str,
        app: ClientApp | None = None,
        faults: Faults | None = None,
        bend: Callable[[Message], None] = lambda message: None,
    ) -> Run:
        config = read_scenario(None, overrides)
        folder = RunFolder.create(self.path / f"run-{len(self.began)}", config)
        prepare_clients(config)
        seeded = SeededFaults(config.faults, SeedTree.root(config.seed).child("faults"))
        with Watched(
            app or build_client_app(),
            clients=config.federation.clients,
            workers=config.simulation.workers,
            faults=faults or seeded,
            bend=bend,
        ) as grid:
            self.began.append(Run(folder, grid))
            grid.serve(build_server_app(simulated=True), {"resume": str(folder.path)})
        return self.began[-1]


@pytest.fixture
def runs(tmp_path, monkeypatch) -> Runs:
    """Return a function that runs a configuration to its end."""
    started = Runs(tmp_path, tmp_path / "shm")
    started.shm.mkdir()
    monkeypatch.setattr(simulated, "_IN_MEMORY", started.shm)
    monkeypatch.setattr("fedlearn.federation.summary.draw_history", lambda *_, **__: "<svg/>")  # the slowest part
    remove = simulated.SimulatedIdentities.remove

    def noted(self):
        started.deleted.append([str(each.relative_to(self.folder)) for each in sorted(self.folder.rglob("*"))])
        remove(self)

    monkeypatch.setattr(simulated.SimulatedIdentities, "remove", noted)
    return started


def keys_in(names: Iterable[str]) -> list[str]:
    """Return what of a key folder's content is, or was once, the key of a session."""
    return [name for name in names if ("/seen" not in name and Path(name).suffix == ".key") or "/." in name]


def clients_lost(found: dict[str, Any]) -> set[str]:
    """Return who did not get to the end of a try."""
    last = {"ideal": "ideal"}.get(found["mode"], "unmask")
    return {client for client, leg in found["furthest"].items() if leg != last}


@pytest.mark.parametrize("leg", slow_but(["", "any"], ["", *PHASES, "any"]))
def test_masks_change_no_bit_of_the_model_whoever_is_lost(runs, leg):
    lossy = [f"faults.drop={0.2 if leg else 0}", f"faults.leg={leg or 'any'}", "federation.rounds=2", "seed=2"]
    ended = [runs(*SEVEN, *lossy, f"secagg.mode={mode}") for mode in MODES]
    ended.append(runs(*SEVEN, *lossy, "secagg.mode=active", "simulation.workers=2"))
    assert len({run.sha256 for run in ended}) == 1
    for run in ended:
        assert [(each["attempt"], each["released"]) for each in run.tries] == [(1, True), (1, True)]
        assert [each["counts"]["masked"] for each in run.tries] == [
            each["respondents"] for each in run.folder.metrics()
        ]
    active, _, ideal, by_workers = ended
    assert [each["counts"] for each in active.tries] == [each["counts"] for each in by_workers.tries]
    assert [each["counts"]["masked"] for each in active.tries] == [each["counts"]["masked"] for each in ideal.tries]
    assert bool(leg) == any(clients_lost(each) for each in active.tries)


@pytest.mark.parametrize("bits", [16, 21, 32])
@pytest.mark.parametrize("weighting", ["uniform", "examples"])
def test_the_masked_mean_is_the_mean_but_for_less_than_a_unit_of_rounding_a_client(runs, bits, weighting):
    """Each of n clients rounds W·s·x/w up or down, by less than one unit; the sum is off by less than n of them.

    So in the model's own units the mean over the weights is off by less than n·w/(s·Σ weight), where w is the largest
    weight; that is 1/s where all weigh 1. (s is what the run's own encoding says; nothing is clipped.)
    """
    overrides = [*SEVEN, "federation.rounds=1", f"training.weighting={weighting}"]
    overrides += ["training.max-examples=40"] if weighting == "examples" else []
    plain = runs(*overrides, "secagg.mode=off")
    masked = runs(*overrides, "secagg.mode=active", f"secagg.bits={bits}")
    config, (found,) = masked.folder.config, masked.tries
    assert (found["clipped"], found["counts"]["unmasked"], found["bits"]) == (0, 7, bits)
    held = distribute_data(load_task(config.task), config).train
    weights = [min(len(held[int(client)]), config.training.max_examples) for client in found["furthest"]]
    total = sum(weights) if weighting == "examples" else 7
    encoding = Terms.of(config).encoding(found["dimension"] - 1 - (weighting == "examples"))
    bound = 7 * encoding.most_weight / (encoding.scale * total)
    assert 0 < np.abs(masked.params - plain.params).max() < bound + 1e-12
    if weighting == "uniform":
        assert bound == pytest.approx(1 / encoding.scale)


@pytest.mark.parametrize("algorithm", sorted(ALGORITHMS))
def test_every_algorithm_takes_the_masked_mean(runs, algorithm):
    overrides = [*SEVEN, f"training.algorithm={algorithm}", "federation.rounds=2"]
    active, ideal = (runs(*overrides, f"secagg.mode={mode}") for mode in ("active", "ideal"))
    assert active.sha256 == ideal.sha256
    assert active.folder.metrics()[-1]["metrics"]["loss"] < 1.0


@pytest.mark.parametrize("workers", [0, 2])
def test_answers_carry_the_protocols_bytes_and_nothing_else(runs, workers):
    models, seen = set(), set()

    def bend(message: Message) -> None:
        kind = message.metadata.message_type
        seen.add(kind)
        if "model" in message.content:
            models.add(kind)

    run = runs(*SEVEN, "federation.rounds=1", "secagg.mode=active", f"simulation.workers={workers}", bend=bend)
    answers = [reply for reply in run.grid.replies if reply.metadata.message_type != "query.identify"]
    assert len(answers) == 5 * 7
    for reply in answers:
        assert set(reply.content) == {"leg"}
        assert set(reply.content["leg"]) == {"body"}
    assert seen == {f"train.{leg}" for leg in PHASES}  # "train" and "evaluate" are never sent
    assert models == {"train.mask"}


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_is_left_of_a_session_that_ended(runs, workers):
    run = runs(*SEVEN, "federation.rounds=2", "secagg.mode=active", f"simulation.workers={workers}")
    assert run.grid._states == {}
    assert [name for name in runs.deleted[0] if "/seen/" in name]  # they did have vaults
    assert keys_in(runs.deleted[0]) == []
    assert list(runs.shm.iterdir()) == []
    assert not any("identities" in text or "fedlearn-keys" in text for text in kept_texts(run.folder.path))


def kept_texts(path: Path) -> list[str]:
    """Return every file of a run that is text."""
    return [each.read_text() for each in path.iterdir() if each.suffix in (".jsonl", ".json", ".toml")]


@pytest.mark.parametrize("leg", PHASES)
def test_nothing_is_left_of_a_session_that_was_given_up(runs, leg):
    """But at the clients that are gone: theirs goes with the next offer they hear, or with the simulation's keys."""
    faults = Lost(leg, 3, groups=("1.1", "1.2"))
    with pytest.raises(RoundFailedError):
        runs(*SEVEN, "federation.round-tries=2", "secagg.mode=active", faults=faults)
    grid = runs.began[0].grid
    heard = {client for group in faults.lost.values() for client in group}
    for node, state in grid._states.items():
        assert node - 1 in heard or not state
    assert {name.split("/")[1] for name in keys_in(runs.deleted[0])} <= {str(client) for client in heard}
    assert list(runs.shm.iterdir()) == []


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("leg", PHASES)
def test_as_many_as_tolerated_are_lost_in_a_leg_and_the_round_says_so(runs, mode, leg):
    if (mode, leg) == ("semi-honest", "consistent"):
        leg = "unmask"
    faults = Lost(leg, 2)
    run = runs(*SEVEN, "federation.rounds=1", f"secagg.mode={mode}", faults=faults)
    (found,) = run.tries
    unheard = mode == "ideal" and leg in ("consistent", "unmask")
    assert (found["attempt"], found["aborted"], found["released"]) == (1, None, True)
    assert found["counts"]["masked"] == (5 if leg in PHASES[:3] else 7)
    assert found["counts"]["invited"] == 7
    if mode != "ideal":
        assert found["counts"][COUNTS[leg]] == 5
    before = "" if leg == "advertise" or mode == "ideal" else PHASES[PHASES.index(leg) - 1]
    if (mode, leg) == ("semi-honest", "unmask"):
        before = "mask"
    assert {found["furthest"][str(client)] for client in faults.lost["1.1"]} == (set() if unheard else {before})
    assert found["failures"] == ({} if unheard else {str(client): "no-reply" for client in faults.lost["1.1"]})


@pytest.mark.parametrize("leg", PHASES)
def test_one_more_ends_the_try_and_a_fresh_cohort_takes_its_place(runs, leg):
    faults = Lost(leg, 3)
    run = runs(*SEVEN, "federation.rounds=1", "secagg.mode=active", faults=faults)
    first, second = run.tries
    counts = {"invited": 7, **{COUNTS[each]: 7 for each in PHASES[: PHASES.index(leg)]}, COUNTS[leg]: 4}
    assert first["aborted"]["phase"] == leg
    assert first["aborted"]["counts"] == {**counts, "needed": 5}
    assert (first["released"], first["attempt"]) == (False, 1)
    assert (second["released"], second["attempt"], second["counts"]["unmasked"]) == (True, 2, 7)
    assert set(first["furthest"]) != set(second["furthest"])
    assert run.folder.metrics()[0]["attempt"] == 2
    assert run.folder.metrics()[0]["earlier_failures"] == [first["failures"]]


@pytest.mark.parametrize("mode", ["active", "ideal"])
def test_a_round_that_is_given_up_in_every_try_says_where_and_with_how_many(runs, mode):
    faults = Lost("mask", 4, groups=("1.1", "1.2", "1.3"))
    with pytest.raises(RoundFailedError) as caught:
        runs(*SEVEN, "federation.rounds=1", f"secagg.mode={mode}", faults=faults)
    said = str(caught.value)
    assert "given up in each of 3 tries" in said
    assert "aborted in mask: 3 clients are left, and 5 must send their vectors" in said
    assert "invited 7" in said
    assert "masked 3" in said
    assert "4 no-reply" in said
    assert isinstance(caught.value.__cause__, RoundAbortedError)
    assert caught.value.__cause__.phase == "mask"
    assert [each["aborted"]["phase"] for each in runs.began[0].tries] == ["mask"] * 3
    assert list(runs.shm.iterdir()) == []


# -- the sum is exact, whatever happens to one client ----------------------------------------------------------------


class Answering(ClientApp):
    """The app, with something of the test's own around it."""

    def __init__(self, around: Callable[[ClientApp, Message, Context], Message]) -> None:
        super().__init__()
        self._app, self._around = build_client_app(), around

    def __call__(self, message: Message, context: Context) -> Message:
        return self._around(self._app, message, context)


def killing(leg: str, node: int) -> ClientApp:
    """Return the app whose process dies when a node hears a leg."""

    def around(app: ClientApp, message: Message, context: Context) -> Message:
        if message.metadata.message_type == f"train.{leg}" and context.node_id == node:
            os.kill(os.getpid(), signal.SIGKILL)
        return app(message, context)

    return Answering(around)


class OneLost(NoFaults):
    """Loses one client of a run without masks, where its vector would not be in the masked sum."""

    def __init__(self, leg: str, client: int) -> None:
        self.client = client if leg in PHASES[:3] else -1

    def drops(self, group: str, client: int, kind: str) -> bool:
        return client == self.client and kind == "train.ideal"


ALL = ["task=regression", "data.partition=iid", "federation.clients=7", "federation.rounds=2"]


@pytest.mark.parametrize("leg", slow_but(["mask"], PHASES))
def test_a_process_that_is_killed_in_a_leg_costs_its_client_and_the_sum_is_exact(runs, leg):
    run = runs(*ALL, "secagg.mode=active", "simulation.workers=2", app=killing(leg, 3))
    assert run.sha256 == runs(*ALL, "secagg.mode=ideal", faults=OneLost(leg, 2)).sha256
    for found in run.tries:
        assert found["failures"] == {"2": "lost"}
        assert clients_lost(found) == {"2"}
        assert found["attempt"] == 1
    assert list(runs.shm.iterdir()) == []


MORTAL = """
import os, signal
from fedlearn.tasks.regression import Regression

class Mortal(Regression):
    def loss(self, output, target):
        if len(target) == 13:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().loss(output, target)
"""


def test_a_process_that_is_killed_while_it_trains_costs_its_client_and_the_sum_is_exact(runs, tmp_path):
    """Of 353 patients among eight, one has 45: the last batch of 32 has 13."""
    (tmp_path / "mortal.py").write_text(MORTAL)
    overrides = [f"task={tmp_path}/mortal.py", "data.partition=iid", "federation.clients=8", "federation.rounds=2"]
    active, ideal = (runs(*overrides, f"secagg.mode={mode}", "simulation.workers=2") for mode in ("active", "ideal"))
    assert active.sha256 == ideal.sha256
    for found in (*active.tries, *ideal.tries):
        assert list(found["failures"].values()) == ["lost"]
        assert found["counts"]["masked"] == 7


@pytest.mark.parametrize(
    ("leg", "body"),
    [*((leg, b"") for leg in PHASES), *(("mask", body) for body in (b"rubbish", "", "text", 7, [], [b""], None))],
)
def test_a_client_that_answers_rubbish_is_that_clients_loss(runs, leg, body):
    """In what Flower's records can carry: an empty value, which Flower's own count of bytes raises at, among it."""

    def around(app: ClientApp, message: Message, context: Context) -> Message:
        if message.metadata.message_type != f"train.{leg}" or context.node_id != 3:
            return app(message, context)
        return Message(RecordDict({} if body is None else {"leg": ConfigRecord({"body": body})}), reply_to=message)

    (found,) = runs(*ALL[:-1], "federation.rounds=1", "secagg.mode=active", app=Answering(around)).tries
    assert found["failures"] == {"2": "bad-reply"}
    assert found["counts"]["masked"] == 7 - (leg in PHASES[:3])


def swap_the_model_for_one(message: Message) -> None:
    """Send node 3 another model than all others, and than was offered."""
    if message.metadata.message_type == "train.mask" and message.metadata.dst_node_id == 3:
        vector = message.content.array_records["model"]["vector"].numpy()
        message.content["model"] = vector_record("vector", vector + 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_client_that_is_sent_another_model_trains_on_none(runs, workers):
    run = runs(*ALL, "secagg.mode=active", f"simulation.workers={workers}", bend=swap_the_model_for_one)
    assert [each["failures"] for each in run.tries] == [{"2": "masking-failed"}] * 2
    assert [each["furthest"]["2"] for each in run.tries] == ["share"] * 2
    assert run.sha256 == runs(*ALL, "secagg.mode=ideal", faults=OneLost("mask", 2)).sha256
    assert not any(run.grid._states.values())
    assert keys_in(runs.deleted[0]) == []


def test_why_a_client_refused_is_in_its_own_log_and_on_no_wire(runs, caplog):
    with caplog.at_level("WARNING", logger="fedlearn.client"):
        run = runs(*ALL, "secagg.mode=active", bend=swap_the_model_for_one)
    assert "client 2: ModelHashMismatchError" in caplog.text
    refused = [reply.error.reason for reply in run.grid.replies if reply.has_error()]
    assert len(refused) == 2
    assert all(reason.startswith("masking-failed:") and "Hash" not in reason for reason in refused)


def test_an_answer_that_was_bent_on_its_way_costs_its_client_alone(runs):
    """By whoever carries it: the signature does not hold."""

    def around(app: ClientApp, message: Message, context: Context) -> Message:
        reply = app(message, context)
        if message.metadata.message_type == "train.mask" and context.node_id == 3:
            body = bytearray(reply.content["leg"]["body"])
            body[40] ^= 1
            reply.content["leg"] = ConfigRecord({"body": bytes(body)})
        return reply

    run = runs(*ALL, "secagg.mode=active", app=Answering(around))
    assert [each["failures"]["2"] for each in run.tries] == ["bad-reply"] * 2
    assert run.sha256 == runs(*ALL, "secagg.mode=ideal", faults=OneLost("mask", 2)).sha256


# -- a device, leg by leg --------------------------------------------------------------------------------------------


@dataclass
class Device:
    """One device: what its owner configured, and what Flower keeps for it between two messages."""

    node: int
    key: SigningKey
    node_config: dict[str, Any]
    state: RecordDict = field(default_factory=RecordDict)

    def hears(self, kind: str, content: RecordDict) -> Message:
        """Return what it answers."""
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
        message = Message(content, self.node, kind, ttl=60.0, group_id="1.1")
        context = Context(run_id=1, node_id=self.node, node_config=self.node_config, state=self.state, run_config={})
        return build_client_app()(message, context)

    @property
    def keys(self) -> list[str]:
        """What its vault holds of a session's key."""
        vault = Path(self.node_config["vault"])
        return keys_in(str(each.relative_to(vault.parent)) for each in vault.rglob("*"))


@dataclass
class Federation:
    """Five real devices and whatever server a test wants to be."""

    config: RunConfig
    server: SigningKey
    devices: list[Device]
    allow_list: AllowList

    def __post_init__(self) -> None:
        self.model = build_flat_model(load_task("regression"), SeedTree.root(0).child("initialise"))
        self.vector = self.model.vector()
        terms = Terms.of(self.config)
        hidden = self.config.privacy.unit == "client"
        model = hashlib.sha256(self.vector.tobytes()).digest()
        noise = {"noise_multiplier": 1.0, "rotation": terms.rotation(model, 1, 1)} if hidden else {}
        self.offer = terms.offer(
            terms.encoding(11, **noise),
            session=RANDOM.token_bytes(32),
            model_sha256=model,
            plan_sha256=self.plan().sha256,
            deadline_s=_in_a_minute(),
        )

    def plan(self, **changes: Any) -> RoundPlan:
        values = {"config": self.config, "round_number": 1, "attempt": 1, "proximal_mu": 0.0, "bound_l2": 10.0}
        return RoundPlan(**{**values, "spec_sha256": self.model.spec.sha256, **changes})

    def ask(self, device: Device, leg: str, body: bytes, plan: RoundPlan | None = None, model: Any = None) -> Message:
        """Send one leg to one device."""
        record = vector_record("vector", self.vector if model is None else model) if leg in ("mask", "ideal") else None
        request = LegRequest(leg=leg, client=device.node, plan=plan or self.plan(), body=body)
        return device.hears(f"train.{leg}", leg_records(request, record))

    def session(self) -> ServerSession:
        return ServerSession(self.offer, key=self.server, allow_list=self.allow_list)

    def until(self, phase: str) -> tuple[ServerSession, dict[int, bytes]]:
        """Run an honest session up to a phase; return it, and what it would send next."""
        session = self.session()
        outgoing = session.begin(range(5))
        while session.phase != phase:
            for client, body in outgoing.items():
                session.receive(client, body_of(self.ask(self.devices[client], session.phase, body)))
            outgoing = session.advance()
        return session, outgoing


def _in_a_minute() -> int:
    return int(time.time()) + 60


def body_of(reply: Message) -> bytes:
    """Return an answer's bytes, all that there is in it."""
    assert not reply.has_error(), reply.error.reason
    assert set(reply.content) == {"leg"}
    assert set(reply.content["leg"]) == {"body"}
    return reply.content["leg"]["body"]


def code_of(reply: Message) -> str:
    """Return why a device gave no answer."""
    assert reply.has_error(), "it answered"
    return reply.error.reason.partition(":")[0]


@pytest.fixture
def enrol(tmp_path) -> Callable[..., Federation]:
    """Return a function that enrols five devices, each with a key, a file of patients and floors of its own."""

    def call(*overrides: str, **node_config: Any) -> Federation:
        registry, server = SigningKey.generate(RANDOM), SigningKey.generate(RANDOM)
        chance, devices = np.random.default_rng(0), []
        for number in range(5):
            key, home = SigningKey.generate(RANDOM), tmp_path / f"device-{number}"
            home.mkdir()
            key.write(home / "device.pem")
            np.savez(home / "own.npz", inputs=chance.normal(size=(20, 10)), targets=chance.normal(size=20))
            told = {
                "data-path": str(home / "own.npz"),
                "task": "regression",
                "device-key": str(home / "device.pem"),
                "allow-list": str(tmp_path / "devices.json"),
                "registry-key": registry.public.hex(),
                "server-key": server.public.hex(),
                "vault": str(home / "vault"),
                **node_config,
            }
            devices.append(Device(number + 1, key, {name: value for name, value in told.items() if value is not None}))
        allow_list = AllowList.of(device.key.public for device in devices)
        allow_list.write(tmp_path / "devices.json", registry)
        config = read_scenario(
            None, ["task=regression", "federation.clients=5", *(overrides or ["secagg.mode=active"])]
        )
        return Federation(config, server, devices, allow_list)

    return call


@pytest.mark.parametrize("mode", ["active", "semi-honest"])
def test_real_devices_keep_nothing_of_a_session_that_went_well(enrol, mode):
    federation = enrol(f"secagg.mode={mode}", **{"secagg-mode": mode})
    session, outgoing = federation.until("unmask")
    assert all(device.state["secagg"] and len(device.keys) == 1 for device in federation.devices)
    for client, body in outgoing.items():
        session.receive(client, body_of(federation.ask(federation.devices[client], "unmask", body)))
    assert session.finish().survivors == (*sorted(range(5), key=lambda at: federation.devices[at].key.public),)
    assert not any(device.state or device.keys for device in federation.devices)


@pytest.mark.parametrize("phase", PHASES)
def test_a_leg_that_comes_twice_is_refused_and_ends_the_session(enrol, phase, caplog):
    federation = enrol()
    _, outgoing = federation.until(phase)
    device = federation.devices[2]
    body_of(federation.ask(device, phase, outgoing[2]))
    assert code_of(federation.ask(device, phase, outgoing[2])) == "masking-failed"
    if phase == "advertise":  # who sends an offer again ends nothing
        assert "ReplayError" in caplog.text
        assert device.keys
        return
    assert "StageError" in caplog.text
    assert not device.state
    assert not device.keys


@pytest.mark.parametrize("phase", PHASES[1:])
def test_a_session_that_is_put_back_where_flower_keeps_it_does_not_open_again(enrol, phase, caplog):
    """Whoever runs Flower's store has the blob; the key that it needs was used up on the device."""
    federation = enrol()
    _, outgoing = federation.until(phase)
    device = federation.devices[2]
    kept = RecordDict({"secagg": ConfigRecord(dict(device.state["secagg"]))})
    first = body_of(federation.ask(device, phase, outgoing[2]))
    device.state = kept
    again = federation.ask(device, phase, outgoing[2])
    assert code_of(again) == "masking-failed"
    assert "StageError" in caplog.text
    assert first not in str(again).encode()


@pytest.mark.parametrize("leg", ["share", "mask", "consistent", "unmask"])
def test_a_leg_without_a_session_is_refused(enrol, leg):
    federation = enrol()
    assert code_of(federation.ask(federation.devices[0], leg, b"anything")) == "masking-failed"


@pytest.mark.parametrize("phase", PHASES[1:])
def test_abort_lets_go_of_this_session_and_of_no_other(enrol, phase):
    federation = enrol()
    federation.until(phase)
    for device in federation.devices:
        body_of(federation.ask(device, "abort", bytes(32)))
        assert device.state["secagg"]
        assert device.keys
        body_of(federation.ask(device, "abort", federation.offer.session))
        assert not device.state
        assert not device.keys
    body_of(federation.ask(federation.devices[0], "abort", federation.offer.session))  # twice does no harm


def test_a_new_offer_lets_go_of_a_session_that_was_never_ended(enrol):
    federation = enrol()
    federation.until("consistent")
    held = {device.state["secagg"]["blob"] for device in federation.devices}
    federation.offer = replace(federation.offer, session=RANDOM.token_bytes(32))
    federation.until("share")
    for device in federation.devices:
        assert len(device.keys) == 1
        assert device.state["secagg"]["blob"] not in held


def test_training_that_fails_leaves_nothing(enrol):
    federation = enrol()
    _, outgoing = federation.until("mask")
    device = federation.devices[0]
    Path(device.node_config["data-path"]).unlink()
    assert code_of(federation.ask(device, "mask", outgoing[0])) in ("training-failed", "bad-data")
    assert not device.state
    assert not device.keys


def test_another_model_than_was_offered_is_not_trained_on(enrol, caplog):
    federation = enrol()
    _, outgoing = federation.until("mask")
    device = federation.devices[0]
    assert code_of(federation.ask(device, "mask", outgoing[0], model=federation.vector + 1)) == "masking-failed"
    assert "ModelHashMismatchError" in caplog.text
    assert not device.state
    assert not device.keys


# -- what a device refuses -------------------------------------------------------------------------------------------


def plain(federation: Federation, kind: str, config: RunConfig) -> Message:
    """Ask for an update, or an evaluation, that is not masked."""
    content = request_records(vector_record("vector", federation.vector), federation.plan(config=config))
    return federation.devices[0].hears(kind, content)


@pytest.mark.parametrize("kind", ["train", "evaluate"])
@pytest.mark.parametrize("mode", ["active", "off", "ideal"])
@pytest.mark.parametrize("keyed", [True, False])
def test_a_device_sends_nothing_of_its_own_in_a_run_that_masks(enrol, kind, mode, keyed):
    """With a key it does not either where the run says that it masks nothing."""
    federation = enrol(**({} if keyed else {"device-key": None}))
    config = read_scenario(None, ["task=regression", "federation.clients=5", f"secagg.mode={mode}"])
    reply = plain(federation, kind, config)
    if mode == "off" and not keyed:
        assert not reply.has_error() or code_of(reply) == "no-data"
    else:
        assert code_of(reply) == "refused"


def test_a_virtual_client_sends_no_single_update_under_secure_aggregation(enrol):
    federation = enrol()
    federation.devices[0].node_config = {"partition-id": 0, "num-partitions": 5}
    for kind in ("train", "evaluate"):
        assert code_of(plain(federation, kind, federation.config)) == "refused"


@pytest.mark.parametrize(
    "changes", [{"training.learning-rate": "1e-30"}, {"training.local-steps": "1"}, {"training.batch-size": "0"}]
)
@pytest.mark.parametrize("leg", ["advertise", "mask"])
def test_a_client_that_is_told_to_train_otherwise_than_the_others_takes_no_part(enrol, changes, leg, caplog):
    """Of all but one that learn next to nothing, the sum would be that one's update."""
    federation = enrol()
    session, outgoing = federation.until("mask")
    told = [f"{key}={value}" for key, value in changes.items()]
    config = read_scenario(None, ["task=regression", "federation.clients=5", "secagg.mode=active", *told])
    plan = federation.plan(config=config)
    body = outgoing[3] if leg == "mask" else federation.offer.signed(federation.server).message()
    assert code_of(federation.ask(federation.devices[3], leg, body, plan)) == "masking-failed"
    assert "the offer's plan is" in caplog.text
    assert session.phase == "mask"


@pytest.mark.parametrize("keyed", [True, False])
@pytest.mark.parametrize("mode", ["ideal", "active"])
def test_a_device_is_no_part_of_an_ideal_round(enrol, keyed, mode):
    federation = enrol(**({} if keyed else {"device-key": None}))
    plan = federation.plan(
        config=read_scenario(None, ["task=regression", "federation.clients=5", f"secagg.mode={mode}"])
    )
    message = federation.offer.signed(federation.server).message()
    assert code_of(federation.ask(federation.devices[0], "ideal", message, plan)) == "refused"


@pytest.mark.parametrize(
    "missing",
    [
        {"device-key": None},
        {"device-key": "/nowhere/device.pem"},
        {"allow-list": None},
        {"registry-key": None},
        {"registry-key": "00" * 32},
        {"server-key": None},
        {"server-key": "not hexadecimal"},
        {"secagg-mode": "ideal"},
        {"least-cohort": 2},
        {"least-cohort": "many"},
    ],
    ids=str,
)
def test_a_device_that_is_not_set_up_takes_no_part(enrol, missing):
    federation = enrol(**missing)
    message = federation.offer.signed(federation.server).message()
    device = federation.devices[0]
    assert code_of(federation.ask(device, "advertise", message)) == "refused"
    assert not device.state
    assert not Path(device.node_config["vault"]).exists()


def longer(encoding: Encoding) -> Encoding:
    return replace(encoding, size=encoding.size + 1)


OTHER_OFFERS: Mapping[str, tuple[Callable[[Offer], dict[str, Any]], str]] = {
    "round": (lambda offer: {"round_number": 2}, "PolicyViolationError: the offer's round"),
    "attempt": (lambda offer: {"attempt": 2}, "PolicyViolationError: the offer's attempt"),
    "task": (lambda offer: {"task": "digits-mlp"}, "PolicyViolationError: the offer's task"),
    "mode": (lambda offer: {"mode": "semi-honest"}, "PolicyViolationError: the offer's mode"),
    "length": (lambda offer: {"encoding": longer(offer.encoding)}, "PolicyViolationError: the offer's vector's length"),
    "bound": (
        lambda offer: {"encoding": replace(offer.encoding, bound_l2=9.0)},
        "PolicyViolationError: the offer's clipping norm",
    ),
    "noise": (
        lambda offer: {
            "encoding": replace(offer.encoding, noise_variance=4.0, rotation=bytes(32), counts_clipped=False)
        },
        "PolicyViolationError: the offer's noise",
    ),
    "deadline": (lambda offer: {"deadline_s": 1}, "DeadlineError"),
    "cohort": (lambda offer: {"cohort": 2, "least_cohort": 2}, "PolicyViolationError"),
    "survivors": (lambda offer: {"least_survivors": 2}, "PolicyViolationError"),
    "suite": (lambda offer: {"suite": 9}, "UnsupportedSuiteError"),
}


@pytest.mark.parametrize("changed", OTHER_OFFERS)
def test_an_offer_that_is_not_the_plans_or_below_a_floor_is_refused(enrol, changed, caplog):
    federation, (change, error) = enrol(), OTHER_OFFERS[changed]
    offer = replace(federation.offer, **change(federation.offer)).signed(federation.server)
    device = federation.devices[0]
    assert code_of(federation.ask(device, "advertise", offer.message())) == "masking-failed"
    assert error in caplog.text
    assert not device.state
    assert not device.keys


def test_an_offer_of_another_server_is_refused(enrol, caplog):
    federation = enrol()
    message = federation.offer.signed(SigningKey.generate(RANDOM)).message()
    assert code_of(federation.ask(federation.devices[0], "advertise", message)) == "masking-failed"
    assert "OfferSignatureError" in caplog.text


def test_a_device_that_is_not_on_the_list_takes_no_part(enrol, caplog):
    federation = enrol()
    SigningKey.generate(RANDOM).write(Path(federation.devices[0].node_config["device-key"]).with_name("other.pem"))
    device = federation.devices[0]
    device.node_config["device-key"] = str(Path(device.node_config["device-key"]).with_name("other.pem"))
    message = federation.offer.signed(federation.server).message()
    assert code_of(federation.ask(device, "advertise", message)) == "masking-failed"
    assert "UnknownDeviceError" in caplog.text


def test_an_owner_limits_how_often_a_device_takes_part(enrol, caplog):
    federation = enrol(**{"most-sessions": 2})
    for _ in range(2):
        federation.offer = replace(federation.offer, session=RANDOM.token_bytes(32))
        federation.until("share")
    message = replace(federation.offer, session=RANDOM.token_bytes(32)).signed(federation.server).message()
    assert code_of(federation.ask(federation.devices[0], "advertise", message)) == "masking-failed"
    assert "ParticipationLimitError" in caplog.text


def test_a_plan_without_noise_is_refused_where_the_offer_has_it_and_the_other_way_round(enrol, caplog):
    hides = ["secagg.mode=active", "privacy.unit=client", "privacy.trust=distributed", "privacy.noise-multiplier=1.0"]
    federation = enrol(*hides, "federation.evaluation=off", **{"least-noise": 0.5})
    noisy = federation.plan(bound_l2=federation.config.privacy.bound_l2)
    federation.offer = replace(federation.offer, plan_sha256=noisy.sha256)
    message = federation.offer.signed(federation.server).message()
    silent = replace(federation.offer, encoding=replace(federation.offer.encoding, noise_variance=0.0, rotation=b""))
    device = federation.devices[0]
    assert code_of(federation.ask(device, "advertise", silent.signed(federation.server).message(), noisy)) == (
        "masking-failed"
    )
    assert "the offer's noise is False, and the plan's is True" in caplog.text
    body_of(federation.ask(device, "advertise", message, noisy))


def test_an_owner_says_how_much_noise_there_is_at_least(enrol, caplog):
    hides = ["secagg.mode=active", "privacy.unit=client", "privacy.trust=distributed", "privacy.noise-multiplier=1.0"]
    federation = enrol(*hides, "federation.evaluation=off", **{"least-noise": 1.5})
    plan = federation.plan(bound_l2=federation.config.privacy.bound_l2)
    message = replace(federation.offer, plan_sha256=plan.sha256).signed(federation.server).message()
    assert code_of(federation.ask(federation.devices[0], "advertise", message, plan)) == "masking-failed"
    assert "PolicyViolationError: the noise is" in caplog.text


def test_a_leg_that_comes_after_the_deadline_is_refused_and_nothing_is_kept(enrol, monkeypatch, caplog):
    federation = enrol()
    _, outgoing = federation.until("share")
    device = federation.devices[2]
    monkeypatch.setattr(time, "time", lambda: federation.offer.deadline_s + 1.0)
    assert code_of(federation.ask(device, "share", outgoing[2])) == "masking-failed"
    assert "DeadlineError" in caplog.text
    assert not device.state
    assert not device.keys


@pytest.mark.parametrize("leg", ["share", "consistent", "unmask"])
def test_a_later_leg_with_another_plan_than_the_offers_is_refused(enrol, leg, caplog):
    federation = enrol()
    _, outgoing = federation.until(leg)
    told = ["task=regression", "federation.clients=5", "secagg.mode=active", "training.learning-rate=1e-30"]
    plan = federation.plan(config=read_scenario(None, told))
    assert code_of(federation.ask(federation.devices[1], leg, outgoing[1], plan)) == "masking-failed"
    assert "the offer's plan is" in caplog.text


def test_an_offer_does_not_find_out_who_has_more_examples(enrol, caplog):
    """Were the largest weight another than the plan's, those above it could not answer, and the others would."""
    federation = enrol()
    smaller = replace(federation.offer.encoding, most_weight=2)
    message = replace(federation.offer, encoding=smaller).signed(federation.server).message()
    assert {code_of(federation.ask(each, "advertise", message)) for each in federation.devices} == {"masking-failed"}
    assert "the offer's largest weight is 2" in caplog.text


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ({}, "no least-noise"),
        ({"least-noise": "nan"}, "least-noise must be a number"),
        ({"least-noise": 1.0, "max-sessions": 5}, "there is no max-sessions"),
        ({"least-noise": 1.0, "least-cohort": 50.9}, "least-cohort must be a whole number"),
        ({"least-noise": 1.0, "least_cohort": 5}, "there is no least_cohort"),
        ({"least-noise": 1.0, "least-survivor": 5}, "there is no least-survivor"),
        ({"least-noise": 1.0, "secagg-mod": "active"}, "there is no secagg-mod"),
    ],
)
def test_a_floor_that_would_be_none_is_refused(enrol, told, says, caplog):
    hides = ["secagg.mode=active", "privacy.unit=client", "privacy.trust=distributed", "privacy.noise-multiplier=1.0"]
    federation = enrol(*hides, "federation.evaluation=off", **told)
    plan = federation.plan(bound_l2=federation.config.privacy.bound_l2)
    message = replace(federation.offer, plan_sha256=plan.sha256).signed(federation.server).message()
    assert code_of(federation.ask(federation.devices[0], "advertise", message, plan)) == "refused"
    assert says in caplog.text


# -- noise that clients add themselves -------------------------------------------------------------------------------

HIDDEN = [
    *SEVEN,
    "federation.evaluation=off",
    "federation.rounds=2",
    "privacy.unit=client",
    "privacy.trust=distributed",
    "privacy.noise-multiplier=1.0",
    "privacy.delta=0.01",
]


@pytest.mark.parametrize("workers", slow_but([0], [0, 2]))
def test_with_noise_too_masks_change_no_bit(runs, workers):
    masked = [runs(*HIDDEN, f"secagg.mode={mode}", f"simulation.workers={workers}") for mode in MODES]
    assert len({run.sha256 for run in masked}) == 1
    for run, mode in zip(masked, MODES, strict=True):
        policy = read_events(run.folder.path / "ledger.jsonl")[0].body
        assert policy["secagg"] == {"mode": mode, "bits": 21, "least-survivors": 5, "colluding": 2}
        assert policy["trust"] == "distributed"
    assert len({run.folder.summary()["privacy"]["epsilon"] for run in masked}) == 1


def releases_at(runs: Runs, kind: str) -> tuple[list[int], Callable[[Message], None]]:
    """Return a list to be filled with how many releases the ledger has at each message of a kind, and what fills it."""
    found: list[int] = []

    def bend(message: Message) -> None:
        if message.metadata.message_type == kind:
            (path,) = runs.path.glob("run-*/ledger.jsonl")
            found.append(path.read_text().count('"kind":"round.release"'))

    return found, bend


@pytest.mark.parametrize(("mode", "kind"), [("active", "consistent"), ("active", "unmask"), ("semi-honest", "unmask")])
def test_the_ledger_has_the_release_before_anybody_is_asked_to_unmask(runs, mode, kind):
    found, bend = releases_at(runs, f"train.{kind}")
    run = runs(*HIDDEN, f"secagg.mode={mode}", bend=bend)
    assert found == [int(kind == "unmask")] * 7 + [1 + int(kind == "unmask")] * 7
    assert [each.round_number for each in run.releases] == [1, 2]
    assert [each.mechanism for each in run.releases] == ["skellam"] * 2


@pytest.mark.parametrize("leg", slow_but(["consistent", "unmask"], PHASES))
def test_a_try_that_is_given_up_is_a_release_once_somebody_was_asked_to_unmask(runs, leg):
    whole = runs(*HIDDEN, "secagg.mode=active")
    given_up = runs(*HIDDEN, "secagg.mode=active", faults=Lost(leg, 3))
    assert given_up.tries[0]["aborted"]["phase"] == leg
    asked = leg == "unmask"
    assert [each.round_number for each in given_up.releases] == ([1, 1, 2] if asked else [1, 2])
    spent, before = (run.folder.summary()["privacy"]["epsilon"] for run in (given_up, whole))
    assert spent > before if asked else spent == before
    kinds = [each.kind for each in read_events(given_up.folder.path / "ledger.jsonl")]
    assert kinds == ["run.policy", *["round.release"] * asked, *["round.release", "round.model"] * 2, "run.close"]


def test_sums_that_may_have_been_seen_count_against_the_budget(runs):
    """Planned for are two rounds with the noise of three honest clients; each sum of seven has that of five.

    So two such sums cost 2·3/5 = 1.2 rounds of the two, and a third, which may cost a whole one, is not asked for.
    """
    planned = runs(*HIDDEN, "secagg.mode=active", faults=Lost("share", 2, groups=("1.1", "2.1")))
    budget = planned.folder.summary()["privacy"]["epsilon"] * 1.001
    asked = [*HIDDEN, f"privacy.max-epsilon={budget}", "federation.round-tries=6", "secagg.mode=active"]
    whole = runs(*asked)
    assert whole.folder.summary()["rounds"] == 2
    spent = runs(*asked, faults=Lost("unmask", 3, groups=[f"1.{attempt}" for attempt in range(1, 7)]))
    summary = spent.folder.summary()
    assert (summary["rounds"], summary["privacy"]["stopped"]) == (0, "budget")
    assert summary["privacy"]["epsilon"] <= budget
    assert [each["aborted"]["phase"] for each in spent.tries] == ["unmask"] * 2
    assert [each.round_number for each in spent.releases] == [1, 1]


def test_noise_is_that_of_honest_survivors(runs):
    """Two of seven may collude: of five survivors three add the noise that was promised, of seven five add more."""
    whole, lossy = runs(*HIDDEN, "secagg.mode=active"), runs(*HIDDEN, "secagg.mode=active", faults=Lost("share", 2))
    variances = [each.releases[0].lattice.variance for each in (whole, lossy)]
    assert variances[0] / variances[1] == pytest.approx(5 / 3)
    least = lossy.releases[0].lattice
    assert np.sqrt(least.variance) == pytest.approx(1.0 * least.sensitivity_l2)
