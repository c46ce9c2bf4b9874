"""A whole session without a network and without a disk: every client and the server, and what each takes for it.

What is timed is the package's own code between bytes in and bytes out. Updates are made from a seed when they are due,
a masked vector is added and forgotten before the next one is made, and a message that was sent is let go of: what is
left in memory is what clients keep between two legs, and what the server keeps.
"""

from __future__ import annotations

import multiprocessing
import time
import tracemalloc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

import numpy as np
from numpy.typing import NDArray

from fedlearn.privacy.clipping import ClippedUpdate, Update, clip
from fedlearn.privacy.noise import Keystream
from fedlearn.secagg import graph, topology
from fedlearn.secagg.allow_list import AllowList
from fedlearn.secagg.client import ClientSession
from fedlearn.secagg.encoding import DecodedSum, Encoding, plain_encoding
from fedlearn.secagg.keys import SigningKey
from fedlearn.secagg.messages import Offer
from fedlearn.secagg.policy import ClientPolicy
from fedlearn.secagg.prg import Words
from fedlearn.secagg.server import PHASES, ServerSession, UnmaskedSum
from fedlearn.secagg.vault import MemoryVault
from fedlearn.sources import SecureRandom, SeedTree

__all__ = ["BITS", "Devices", "Memory", "Round", "Setting", "Stopwatch", "random_losses", "run_round", "server_memory"]

BITS = 21
BOUND_L2 = 1.0
MODEL = bytes(32)
NOW_S = 1_800_000_000.0

Clock = Callable[[], float]

Reply = Callable[[str, int, bytes], bytes]
"""Given a phase, a client and what it was sent: what it answers."""

_RANDOM = SecureRandom()


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One session, active mode, without noise.

    Attributes:
        clients: n, how many are invited.
        parameters: d.
        colluding, dropping: γ and δ that a sparse graph is made for.
        lost: from which phase on a client no longer answers.
        seed: where the updates come from. Keys, shares and masks are the operating system's.
    """

    clients: int
    parameters: int
    colluding: float = 0.1
    dropping: float = 0.15
    lost: Mapping[int, str] = field(default_factory=dict)
    seed: int = 0

    @property
    def least(self) -> int:
        """How many must survive: the complete graph's threshold; a sparse one asks for more by itself."""
        return 2 * self.clients // 3 + 1

    def offer(self) -> Offer:
        """Return the offer, unsigned."""
        return Offer(
            suite=1,
            task="benchmark",
            round_number=1,
            attempt=1,
            session=_RANDOM.token_bytes(32),
            mode="active",
            colluding=self.colluding,
            dropping=self.dropping,
            cohort=self.clients,
            least_cohort=self.least,
            least_survivors=self.least,
            encoding=plain_encoding(size=self.parameters, bits=BITS, bound_l2=BOUND_L2, clients=self.clients),
            model_sha256=MODEL,
            plan_sha256=bytes(32),
            deadline_s=int(NOW_S) + 600,
        )

    def answers(self, phase: str, client: int) -> bool:
        """Return whether a client is still there."""
        return client not in self.lost or PHASES.index(phase) < PHASES.index(self.lost[client])


@dataclass(frozen=True, kw_only=True)
class Round:
    """What a session took.

    Attributes:
        degree, threshold: k and t of its graph.
        survivors: how many vectors are in the sum.
        client_s: seconds of each client that stayed to the end, in all legs.
        server_s: seconds of the server, from the offer to the decoded sum.
        uploaded, downloaded: bytes of all messages of each client that stayed to the end.
        masked_bytes: those of the message with the masked vector, the largest of them.
        exact: whether the sum is that of the survivors' integers, word by word, and decodes to that of their updates
            but for the rounding.
    """

    degree: int
    threshold: int
    survivors: int
    client_s: Mapping[int, float]
    server_s: float
    uploaded: Mapping[int, int]
    downloaded: Mapping[int, int]
    masked_bytes: int
    exact: bool


@dataclass(frozen=True, kw_only=True)
class Memory:
    """The most that a server held at a time, in bytes.

    Attributes:
        summed: up to the sum, as integers in lanes.
        decoded: with the decoding, in which the sum becomes a vector of float64.
    """

    summed: int
    decoded: int


def random_losses(clients: int, share: float, seed: int) -> dict[int, str]:
    """Return a share of the clients, each with the phase from which on it does not answer, all phases alike."""
    chance = SeedTree.root(seed).child("lost").generator()
    chosen = chance.choice(clients, size=round(share * clients), replace=False)
    return {int(client): PHASES[int(chance.integers(len(PHASES)))] for client in chosen}


class Stopwatch:
    """Adds up the time of its ``with`` blocks."""

    def __init__(self, clock: Clock) -> None:
        self._clock, self._begun = clock, 0.0
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._begun = self._clock()

    def __exit__(self, *_: object) -> None:
        self.seconds += self._clock() - self._begun


# -- clients -------------------------------------------------------------------------------------------------------


class Devices:
    """Every client of one session.

    Attributes:
        allow_list: who they are.
        watches: what each has taken so far.
        masked: whose vectors have left.

    Args:
        setting: the session.
        server_key: the server's public key.
        clock: what they are timed with.
        checked: whether the sum is kept that the server should find.
    """

    def __init__(
        self,
        setting: Setting,
        server_key: bytes,
        *,
        clock: Clock = time.perf_counter,
        checked: bool = True,
    ) -> None:
        self._setting, self._server_key, self._checked = setting, server_key, checked
        self._keys = [SigningKey.generate(_RANDOM) for _ in range(setting.clients)]
        self._sessions: dict[int, ClientSession] = {}
        self._words: Words = np.zeros(0, np.uint64)
        self._vector: NDArray[np.float64] = np.zeros(0)
        self.allow_list = AllowList.of(key.public for key in self._keys)
        self.watches = [Stopwatch(clock) for _ in self._keys]
        self.masked: set[int] = set()

    def answer(self, phase: str, client: int, message: bytes) -> bytes:
        """Let one client answer one message; the time goes to its account."""
        watch = self.watches[client]
        if phase == "advertise":
            with watch:
                return self._begin(client, message)
        session = self._sessions[client]
        if phase == "mask":
            return self._mask(client, session, message)
        if phase == "share":
            _forget_graphs()
            with watch:
                return session.share_keys(message, allow_list=self.allow_list)
        with watch:
            return session.confirm(message) if phase == "consistent" else session.unmask(message)

    def agrees(self, total: UnmaskedSum, decoded: DecodedSum, scale: float) -> bool:
        """Return whether this is the sum of those whose vectors have left, and of nobody else."""
        if set(total.survivors) != self.masked or not np.array_equal(total.words, self._words):
            return False
        apart = np.abs(decoded.vector - self._vector).max() * scale
        return bool(apart <= len(self.masked))  # of every vector, rounding moves a coordinate by less than a unit

    def _begin(self, client: int, message: bytes) -> bytes:
        """Answer the offer."""
        self._sessions[client], answer = ClientSession.begin(
            message,
            identity=self._keys[client],
            allow_list=self.allow_list,
            server_key=self._server_key,
            policy=ClientPolicy(),
            vault=MemoryVault(),
            now_s=NOW_S,
        )
        return answer

    def _mask(self, client: int, session: ClientSession, message: bytes) -> bytes:
        """Open the shares, encode the update and mask it; the update is there when the clock starts."""
        update, encoding = _update(self._setting, client), session.offer.encoding
        with self.watches[client]:
            session.accept_shares(message)
            session.check_model(MODEL)
            rounding, noise = (Keystream(_RANDOM.token_bytes(32)) for _ in range(2))
            encoded = encoding.encode(update, weight=1, rounding=rounding, noise=noise)
            answer = session.mask(encoded)
        if self._checked:
            self._note(client, encoding, encoded.words, update)
        return answer

    def _note(self, client: int, encoding: Encoding, words: Words, update: ClippedUpdate) -> None:
        """Add to the sum that the server should find."""
        if not self.masked:
            self._words, self._vector = np.zeros(encoding.words, np.uint64), np.zeros(encoding.size)
        self._words += words
        self._vector += update.vector
        self.masked.add(client)


def _update(setting: Setting, client: int) -> ClippedUpdate:
    """Return what a client has learned."""
    chance = SeedTree.root(setting.seed).child("update", client).generator()
    return clip(Update(chance.standard_normal(setting.parameters, dtype=np.float32)), BOUND_L2)


def _forget_graphs() -> None:
    """Empty what clients of one process share and devices cannot: each works the graph out by itself."""
    topology._topology.cache_clear()
    graph._search.cache_clear()


# -- the server ----------------------------------------------------------------------------------------------------


def _unmasked(session: ServerSession, setting: Setting, reply: Reply, watch: Stopwatch) -> UnmaskedSum:
    """Take a session through all its phases, one answer at a time."""
    with watch:
        outgoing = session.begin(range(setting.clients))
    while True:
        for client in list(outgoing):
            message = outgoing.pop(client)
            if setting.answers(session.phase, client):
                _exchange(session, client, message, reply, watch)
        if session.phase == session.phases[-1]:
            with watch:
                return session.finish()
        with watch:
            outgoing = session.advance()


def _exchange(session: ServerSession, client: int, message: bytes, reply: Reply, watch: Stopwatch) -> None:
    """Take one answer, of which nothing is left here."""
    answer = reply(session.phase, client, message)
    with watch:
        session.receive(client, answer)


def run_round(
    setting: Setting,
    *,
    clock: Clock = time.perf_counter,
    progress: Callable[[], None] = lambda: None,
) -> Round:
    """Run one session to its end in this process.

    Args:
        setting: the session.
        clock: what both sides are timed with: the wall's, or this process's processor time.
        progress: called after each answer.

    Raises:
        SecaggError: the session fails; it is not meant to.
    """
    _forget_graphs()
    key, offered = SigningKey.generate(_RANDOM), setting.offer()
    devices = Devices(setting, key.public, clock=clock)
    uploaded, downloaded = (dict.fromkeys(range(setting.clients), 0) for _ in range(2))
    masked: list[int] = []
    session, watch = ServerSession(offered, key=key, allow_list=devices.allow_list), Stopwatch(clock)

    def reply(phase: str, client: int, message: bytes) -> bytes:
        answer = devices.answer(phase, client, message)
        downloaded[client] += len(message)
        uploaded[client] += len(answer)
        if phase == "mask":
            masked.append(len(answer))
        progress()
        return answer

    total = _unmasked(session, setting, reply, watch)
    with watch:
        decoded = session.offer.encoding.decode(total.words)
    stayed = [client for client in range(setting.clients) if client not in setting.lost]
    return Round(
        degree=session.topology.degree,
        threshold=session.topology.threshold,
        survivors=len(total.survivors),
        client_s={client: devices.watches[client].seconds for client in stayed},
        server_s=watch.seconds,
        uploaded={client: uploaded[client] for client in stayed},
        downloaded={client: downloaded[client] for client in stayed},
        masked_bytes=max(masked),
        exact=devices.agrees(total, decoded, offered.encoding.scale),
    )


# -- memory --------------------------------------------------------------------------------------------------------


def server_memory(setting: Setting) -> Memory:
    """Return the most that the server holds in a session, by Python's own account (``tracemalloc``).

    The clients are in another process, so that nothing of theirs is counted but the message that is just being taken.
    What libraries in C allocate for themselves is not counted; it does not grow with anything here. The process's
    resident memory says the same with more noise: it depends on what was freed and not given back.
    """
    key = SigningKey.generate(_RANDOM)
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    clients = context.Process(target=_answer_all, args=(there, setting, key.public), daemon=True)
    clients.start()
    there.close()  # so that their end is noticed

    def reply(phase: str, client: int, message: bytes) -> bytes:
        here.send((phase, client))
        here.send_bytes(message)
        return here.recv_bytes()

    with here:
        allow_list = AllowList(here.recv())
        tracemalloc.start()
        try:
            session = ServerSession(setting.offer(), key=key, allow_list=allow_list)
            total = _unmasked(session, setting, reply, Stopwatch(time.perf_counter))
            _, summed = tracemalloc.get_traced_memory()
            session.offer.encoding.decode(total.words)
            _, decoded = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    clients.join()
    return Memory(summed=summed, decoded=decoded)


def _answer_all(server: Connection, setting: Setting, server_key: bytes) -> None:
    """Be the clients, until the server hangs up."""
    devices = Devices(setting, server_key, checked=False)
    server.send(devices.allow_list.devices)
    while True:
        try:
            phase, client = server.recv()
        except EOFError:
            return
        server.send_bytes(devices.answer(phase, client, server.recv_bytes()))
