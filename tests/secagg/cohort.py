"""A whole session in one process, without a network: what each test bends in one place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from fedlearn.privacy.clipping import Update, clip
from fedlearn.privacy.noise import Keystream
from fedlearn.secagg.allow_list import AllowList
from fedlearn.secagg.client import ClientSession
from fedlearn.secagg.encoding import EncodedUpdate, Encoding, plain_encoding
from fedlearn.secagg.errors import SecaggError
from fedlearn.secagg.keys import SigningKey
from fedlearn.secagg.messages import Offer
from fedlearn.secagg.policy import ClientPolicy
from fedlearn.secagg.server import ServerSession, UnmaskedSum
from fedlearn.secagg.vault import MemoryVault
from fedlearn.sources import SecureRandom, SeedTree

NOW_S = 1_800_000_000.0
MODEL = bytes(range(32))
RANDOM = SecureRandom()

Tamper = Callable[[str, int, bytes], bytes]
"""Given a leg (``offer``, ``roster``, …), a client and the message, what arrives instead."""


def encoding(size: int = 8, clients: int = 5, **changes: Any) -> Encoding:
    """Return an encoding without noise."""
    return plain_encoding(**{"size": size, "bits": 21, "bound_l2": 1.0, "clients": clients, **changes})


def offer(clients: int = 5, **changes: Any) -> Offer:
    """Return an unsigned offer for ``clients`` devices, least survivors as the complete graph's threshold."""
    values: dict[str, Any] = {
        "suite": 1,
        "task": "digits",
        "round_number": 1,
        "attempt": 1,
        "session": RANDOM.token_bytes(32),
        "mode": "active",
        "colluding": 0.2,
        "dropping": 0.1,
        "cohort": clients,
        "least_cohort": min(3, clients),
        "least_survivors": 2 * clients // 3 + 1,
        "encoding": encoding(clients=clients),
        "model_sha256": MODEL,
        "plan_sha256": bytes(32),
        "deadline_s": int(NOW_S) + 600,
        **changes,
    }
    return Offer(**values)


@dataclass
class Cohort:
    """Devices, their sessions and a server; ``lost`` says from which leg on a client no longer answers."""

    offered: Offer
    lost: Mapping[int, str] = field(default_factory=dict)
    tamper: Tamper = lambda leg, client, message: message
    policy: ClientPolicy = field(default_factory=lambda: ClientPolicy(least_colluding=0.0))
    threads: int = 1

    def __post_init__(self) -> None:
        self.server_key = SigningKey.generate(RANDOM)
        self.keys = [SigningKey.generate(RANDOM) for _ in range(self.offered.cohort)]
        self.allow_list = AllowList.of(key.public for key in self.keys)
        self.vaults = [MemoryVault() for _ in self.keys]
        self.sessions: dict[int, ClientSession] = {}
        self.server_errors: dict[int, SecaggError] = {}
        self.client_errors: dict[int, SecaggError] = {}
        self.updates = updates(self.offered.encoding, self.offered.cohort)
        self.server = ServerSession(self.offered, key=self.server_key, allow_list=self.allow_list, threads=self.threads)
        self.sent: dict[str, dict[int, bytes]] = {}

    def begin(self, client: int, message: bytes) -> bytes:
        """Answer the offer."""
        self.sessions[client], answer = ClientSession.begin(
            message,
            identity=self.keys[client],
            allow_list=self.allow_list,
            server_key=self.server_key.public,
            policy=self.policy,
            vault=self.vaults[client],
            now_s=NOW_S,
        )
        return answer

    def answer(self, phase: str, client: int, message: bytes) -> bytes:
        """Let one client answer one message."""
        if phase == "advertise":
            return self.begin(client, message)
        session = self.sessions[client]
        if phase == "share":
            return session.share_keys(message, allow_list=self.allow_list)
        if phase == "mask":
            session.accept_shares(message)
            session.check_model(MODEL)
            return session.mask(self.updates[client])
        return session.confirm(message) if phase == "consistent" else session.unmask(message)

    def exchange(self, outgoing: Mapping[int, bytes]) -> None:
        """Send a phase's messages and take the answers."""
        phase = self.server.phase
        order = list(self.server.phases)
        self.sent[phase] = dict(outgoing)
        for client, message in outgoing.items():
            if client in self.lost and order.index(phase) >= order.index(self.lost[client]):
                continue
            try:
                reply = self.answer(phase, client, self.tamper(f"to-{phase}", client, message))
            except SecaggError as error:
                self.client_errors[client] = error
                continue
            try:
                self.server.receive(client, self.tamper(f"from-{phase}", client, reply))
            except SecaggError as error:
                self.server_errors[client] = error

    def until(self, phase: str) -> dict[int, bytes]:
        """Run up to a phase and return what the server would send for it."""
        outgoing = self.server.begin(range(self.offered.cohort))
        while self.server.phase != phase:
            self.exchange(outgoing)
            outgoing = self.server.advance()
        return outgoing

    def run(self) -> UnmaskedSum:
        """Run to the end."""
        self.exchange(self.until(self.server.phases[-1]))
        return self.server.finish()

    def expected(self, survivors: Sequence[int]) -> np.ndarray:
        """Return the sum of the survivors' packed vectors, as integers modulo 2^64."""
        total = np.zeros(self.offered.encoding.words, dtype=np.uint64)
        for client in survivors:
            total += self.updates[client].words
        return total


def updates(encoded_as: Encoding, clients: int, seed: int = 0) -> list[EncodedUpdate]:
    """Return an encoded random update for each client."""
    seeds, found = SeedTree.root(seed), []
    for client in range(clients):
        vector = seeds.child("update", client).generator().normal(size=encoded_as.size).astype(np.float32)
        clipped = clip(Update(vector), encoded_as.bound_l2)
        weight = 1 + client % encoded_as.most_weight
        rounding, noise = (Keystream(seeds.child(name, client).digest) for name in ("rounding", "noise"))
        found.append(encoded_as.encode(clipped, weight=weight, rounding=rounding, noise=noise))
    return found


def resigned(cohort: Cohort, /, **changes: Any) -> bytes:
    """Return another offer by the same server."""
    return replace(cohort.offered, **changes).signed(cohort.server_key).message()
