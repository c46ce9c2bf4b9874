"""One session of secure aggregation as the round drives it: leg after leg, each with its share of the round's time."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fedlearn.config import RunConfig
from fedlearn.errors import ConfigError, RunFailedError
from fedlearn.federation.masked import MaskedEstimator, MaskedTally
from fedlearn.federation.messages import Failure, FailureCode, LegReply, LegRequest, Network, RoundPlan
from fedlearn.federation.observer import Observer
from fedlearn.secagg.allow_list import AllowList
from fedlearn.secagg.encoding import Encoding
from fedlearn.secagg.errors import RoundAbortedError, SecaggError, VectorLengthError
from fedlearn.secagg.keys import SigningKey
from fedlearn.secagg.messages import Offer
from fedlearn.secagg.prg import Words
from fedlearn.secagg.ring import unpack
from fedlearn.secagg.server import ServerSession
from fedlearn.secagg.simulated import SimulatedIdentities
from fedlearn.sources import Clock, SecureRandom

__all__ = ["BINS", "SecureAggregation", "ServerIdentity", "histogram", "plain_path"]

BINS = 64
"""How many bins a histogram of a vector's lanes has."""

_SHARES = {"advertise": 0.1, "share": 0.1, "mask": 0.6, "consistent": 0.1, "unmask": 0.1}
"""How a round's time is divided among the legs; clients train in ``mask``."""

_ABORT_S = 5.0
_SPARE_S = 60.0
"""How much longer than the round an offer holds: clocks differ, and in a simulation clients wait for each other."""


@dataclass(frozen=True, kw_only=True)
class ServerIdentity:
    """Who the server is, and whom it may ask.

    Attributes:
        key: signs offers; devices have its public half.
        allow_list: who may take part, by the registry.
        simulated: in a simulation, where its clients find their keys.
    """

    key: SigningKey
    allow_list: AllowList
    simulated: SimulatedIdentities | None = None


@dataclass
class _Record:
    """What ``secagg.jsonl`` says of one try of a round."""

    furthest: dict[int, str] = field(default_factory=dict)
    traffic: dict[str, dict[str, int]] = field(default_factory=dict)
    seen: dict[str, Any] | None = None

    def count(self, leg: str, reply: LegReply | Failure) -> None:
        """Count one answer's bytes."""
        way = self.traffic.setdefault(leg, {"up": 0, "down": 0})
        way["up"] += reply.upload_bytes
        way["down"] += reply.download_bytes


class SecureAggregation:
    """Drives the sessions of a run.

    Args:
        config: the run.
        network: whatever carries messages to clients.
        estimator: says how updates become integers.
        identity: the server's; ``None`` in ``ideal`` mode, where nothing is signed.
        folder: where ``secagg.jsonl`` is kept.
        clock: what deadlines are told by.
        observer: who watches.
        random: where session names come from.
    """

    def __init__(
        self,
        config: RunConfig,
        network: Network,
        estimator: MaskedEstimator,
        *,
        identity: ServerIdentity | None,
        folder: Path,
        clock: Clock,
        observer: Observer,
        random: SecureRandom | None = None,
    ) -> None:
        if config.secagg.masks and identity is None:
            reason = "needs the server's key and an allow-list of devices: give server-key, allow-list and registry-key"
            raise ConfigError("secagg.mode", f"{reason} (see `fedlearn secagg --help`)")
        self.config, self.network, self.estimator = config, network, estimator
        self.clock, self.observer = clock, observer
        self.terms = estimator.terms
        self._identity, self._path = identity, folder / "secagg.jsonl"
        self._random = random or SecureRandom()

    def collect(
        self,
        tally: MaskedTally,
        plan: RoundPlan,
        parameters: np.ndarray[Any, Any],
        *,
        before_unmask: Callable[[int], None],
    ) -> None:
        """Run one session and put its sum, or why there is none, into the tally.

        Args:
            tally: of this try; its draw says who is invited.
            plan: what the clients are told.
            parameters: θ as it is sent.
            before_unmask: called with the number of survivors, before anybody is asked for what unmasks their sum.
        """
        model = hashlib.sha256(np.ascontiguousarray(parameters).tobytes()).digest()
        encoding = self.estimator.encoding(model, plan.round_number, plan.attempt)
        offer = self._offer(plan, encoding, model)
        record = _Record(furthest=dict.fromkeys(tally.draw.cohort, ""))
        try:
            if self.config.secagg.mode == "ideal":
                self._ideal(tally, plan, parameters, offer, record, before_unmask)
            else:
                self._masked(tally, plan, parameters, offer, record, before_unmask)
        except RoundAbortedError as error:
            tally.aborted = error
            self._write(tally, plan, offer, record, {**error.counts}, aborted=error)

    # -- masked ------------------------------------------------------------------------------------------------

    def _masked(
        self,
        tally: MaskedTally,
        plan: RoundPlan,
        parameters: np.ndarray[Any, Any],
        offer: Offer,
        record: _Record,
        before_unmask: Callable[[int], None],
    ) -> None:
        """Run the protocol."""
        identity = self._identity
        if identity is None:
            raise ConfigError("secagg.mode", "masking needs the server's key")

        def watch(client: int, words: Words) -> None:
            if client == plan.watched or (plan.watched < 0 and record.seen is None):
                record.seen = {"client": client, "histogram": histogram(words, offer.encoding)}

        session = ServerSession(offer, key=identity.key, allow_list=identity.allow_list, watch=watch)
        outgoing = session.begin(tally.draw.cohort)
        try:
            for leg in session.phases:
                if leg == "unmask":
                    before_unmask(session.counts["masked"])
                self._leg(leg, outgoing, session, tally, plan, parameters, record)
                if leg != session.phases[-1]:
                    outgoing = session.advance()
            total = session.finish()
        except SecaggError:
            self._abort([client for client, leg in record.furthest.items() if leg], plan, offer.session)
            raise
        tally.respondents = len(total.survivors)
        tally.total = offer.encoding.decode(total.words)
        tally.evidence = {
            "secagg": self.config.secagg.mode,
            "transcript": total.transcript.hex(),
            "transcript-signature": total.signature.hex(),
            "server-key": identity.key.public.hex(),
        }
        complaints = [str(complaint) for complaint in total.complaints]
        self._write(tally, plan, offer, record, session.counts, session=session, complaints=complaints)
        for client in total.survivors:  # who was lost later is in the sum all the same
            tally.failures.pop(client, None)

    def _leg(
        self,
        leg: str,
        outgoing: Mapping[int, bytes],
        session: ServerSession,
        tally: MaskedTally,
        plan: RoundPlan,
        parameters: np.ndarray[Any, Any],
        record: _Record,
    ) -> None:
        """Send one leg's messages and let the session take the answers."""
        vector = parameters if leg == "mask" else None
        for reply in self._exchange(leg, outgoing, plan, vector):
            record.count(leg, reply)
            tally.upload_bytes += reply.upload_bytes
            tally.download_bytes += reply.download_bytes
            if isinstance(reply, Failure):
                tally.failures[reply.client] = reply
                continue
            try:
                session.receive(reply.client, reply.body)
            except SecaggError:
                tally.failures[reply.client] = Failure(client=reply.client, code=FailureCode.BAD_REPLY)
            else:
                record.furthest[reply.client] = leg

    def _exchange(
        self, leg: str, outgoing: Mapping[int, bytes], plan: RoundPlan, vector: np.ndarray[Any, Any] | None
    ) -> Iterator[LegReply | Failure]:
        """Yield the answers to one leg within its share of the round's time."""
        requests = [
            LegRequest(leg=leg, client=client, plan=plan, body=body, vector=vector)
            for client, body in sorted(outgoing.items())
        ]
        timeout_s = self.config.federation.round_timeout_s * _SHARES.get(leg, 1.0)
        for done, reply in enumerate(self.network.exchange_leg(requests, timeout_s), start=1):
            yield reply
            if leg in ("mask", "ideal"):
                self.observer.replied(plan.round_number, done, len(requests))

    def _abort(self, clients: Sequence[int], plan: RoundPlan, session: bytes) -> None:
        """Tell the clients that took part to let go of their secrets, which they do at the next offer anyway."""
        requests = [LegRequest(leg="abort", client=client, plan=plan, body=session) for client in sorted(clients)]
        for _ in self.network.exchange_leg(requests, _ABORT_S):
            pass

    # -- ideal -------------------------------------------------------------------------------------------------

    def _ideal(
        self,
        tally: MaskedTally,
        plan: RoundPlan,
        parameters: np.ndarray[Any, Any],
        offer: Offer,
        record: _Record,
        before_unmask: Callable[[int], None],
    ) -> None:
        """Take the same sum of the same integers without masks: for simulations, which hide nothing anyway."""
        words = np.zeros(offer.encoding.words, dtype=np.uint64)
        survivors = 0
        message = offer.message()
        for reply in self._exchange("ideal", dict.fromkeys(tally.draw.cohort, message), plan, parameters):
            record.count("ideal", reply)
            tally.upload_bytes += reply.upload_bytes
            tally.download_bytes += reply.download_bytes
            if isinstance(reply, Failure):
                tally.failures[reply.client] = reply
                continue
            try:
                words += _words(reply.body, offer.encoding)
            except SecaggError:
                tally.failures[reply.client] = Failure(client=reply.client, code=FailureCode.BAD_REPLY)
                continue
            survivors += 1
            record.furthest[reply.client] = "ideal"
        counts = {"invited": tally.cohort, "masked": survivors}
        if survivors < self.terms.least_survivors:
            counts["needed"] = self.terms.least_survivors
            reason = f"{survivors} clients are left, and {self.terms.least_survivors} must send their vectors"
            raise RoundAbortedError("mask", counts, reason)
        before_unmask(survivors)
        tally.respondents = survivors
        tally.total = offer.encoding.decode(words)
        tally.evidence = {"secagg": "ideal"}
        self._write(tally, plan, offer, record, counts)

    # -- what is said of it ------------------------------------------------------------------------------------

    def _offer(self, plan: RoundPlan, encoding: Encoding, model: bytes) -> Offer:
        """Return what the clients of this try are offered, not signed yet."""
        lasts_s = self.config.federation.round_timeout_s + _SPARE_S
        return self.terms.offer(
            encoding,
            round_number=plan.round_number,
            attempt=plan.attempt,
            session=self._random.token_bytes(32),
            model_sha256=model,
            plan_sha256=plan.sha256,
            deadline_s=math.ceil(self.clock.unix_s() + lasts_s),
        )

    def _write(
        self,
        tally: MaskedTally,
        plan: RoundPlan,
        offer: Offer,
        record: _Record,
        counts: Mapping[str, int],
        *,
        session: ServerSession | None = None,
        aborted: RoundAbortedError | None = None,
        complaints: Sequence[str] = (),
    ) -> None:
        """Append what the server saw of this try to ``secagg.jsonl``."""
        topology = None if session is None else session.topology
        line = {
            "round": plan.round_number,
            "attempt": plan.attempt,
            "mode": self.config.secagg.mode,
            "clients": counts.get("advertised", counts["invited"]),
            "degree": None if topology is None else topology.degree,
            "threshold": None if topology is None else topology.threshold,
            "least_survivors": self.terms.least_survivors,
            "bits": offer.encoding.bits,
            "dimension": offer.encoding.dimension,
            "counts": dict(counts),
            "clipped": tally.clipped,
            "furthest": {str(client): leg for client, leg in sorted(record.furthest.items())},
            "bytes": record.traffic,
            "failures": {str(client): str(each.code) for client, each in sorted(tally.failures.items())},
            "complaints": list(complaints),
            "aborted": None
            if aborted is None
            else {"phase": aborted.phase, "reason": aborted.reason, "counts": aborted.counts},
            "seen": record.seen,
            "plain": self._plain(plan),
            "transcript": tally.evidence.get("transcript"),
            "released": tally.total is not None,
        }
        try:
            with self._path.open("a") as handle:
                handle.write(json.dumps(line) + "\n")
                handle.flush()
                os.fsync(handle.fileno())
        except OSError as error:
            raise RunFailedError(f"cannot write {self._path}: {error.strerror}; make room or give access") from error

    def _plain(self, plan: RoundPlan) -> dict[str, Any] | None:
        """Return what the watched client of a simulation had before masking, where it got as far as that."""
        if not plan.identities:
            return None
        path = plain_path(plan)
        if not path.exists():
            return None
        found: dict[str, Any] = json.loads(path.read_bytes())
        path.unlink()
        return found


def plain_path(plan: RoundPlan) -> Path:
    """Return where the watched client of a simulation leaves the histogram of its update before masking."""
    return Path(plan.identities) / f"plain-{plan.group}.json"


def histogram(words: Words, encoding: Encoding) -> list[int]:
    """Return how many lanes of a packed vector lie in each of ``BINS`` equal parts of their range."""
    values = unpack(words, encoding.dimension, encoding.bits) + (1 << (encoding.bits - 1))
    found: list[int] = np.bincount(values >> (encoding.bits - BINS.bit_length() + 1), minlength=BINS).tolist()
    return found


def _words(body: bytes, encoding: Encoding) -> Words:
    """Return the words of an unmasked vector.

    Raises:
        VectorLengthError: it has another length.
    """
    if len(body) != encoding.upload_bytes:
        raise VectorLengthError(f"expected {encoding.upload_bytes} bytes, got {len(body)}")
    return np.frombuffer(body, dtype="<u8").astype(np.uint64)
