"""One session of secure aggregation as the round drives it: leg after leg, each with its share of the round's time."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlearn.arrays import vector_sha256
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

log = logging.getLogger("fedlearn.server")

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


@dataclass(kw_only=True)
class _Try:
    """One try of a round, and what ``secagg.jsonl`` will say of it."""

    tally: MaskedTally
    plan: RoundPlan
    parameters: NDArray[Any]
    offer: Offer
    before_unmask: Callable[[int], None]
    furthest: dict[int, str] = field(default_factory=dict)
    traffic: dict[str, dict[str, int]] = field(default_factory=dict)
    seen: dict[str, Any] | None = None

    def answered(self, leg: str, reply: LegReply | Failure) -> LegReply | None:
        """Count one answer's bytes, and return it if it is one."""
        way = self.traffic.setdefault(leg, {"up": 0, "down": 0})
        way["up"] += reply.upload_bytes
        way["down"] += reply.download_bytes
        self.tally.upload_bytes += reply.upload_bytes
        self.tally.download_bytes += reply.download_bytes
        if isinstance(reply, Failure):
            self.tally.failures[reply.client] = reply
            return None
        return reply

    def refused(self, client: int) -> None:
        """Leave a client out whose answer cannot be used."""
        self.tally.failures[client] = Failure(client=client, code=FailureCode.BAD_REPLY)

    def watch(self, client: int, words: Words) -> None:
        """Keep the histogram of one client's vector: of the one that a simulation watches, or the first that comes."""
        if client == self.plan.watched or (self.plan.watched < 0 and self.seen is None):
            self.seen = {"client": client, "histogram": histogram(words, self.offer.encoding)}


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
        parameters: NDArray[Any],
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
        model = vector_sha256(parameters)
        encoding = self.estimator.encoding(model, plan.round_number, plan.attempt)
        this = _Try(
            tally=tally,
            plan=plan,
            parameters=parameters,
            offer=self._offer(plan, encoding, model),
            before_unmask=before_unmask,
            furthest=dict.fromkeys(tally.draw.cohort, ""),
        )
        try:
            if self.config.secagg.mode == "ideal":
                self._ideal(this)
            else:
                self._masked(this)
        except RoundAbortedError as error:
            tally.aborted = error
            self._write(this, error.counts)

    # -- masked ------------------------------------------------------------------------------------------------

    def _masked(self, this: _Try) -> None:
        """Run the protocol."""
        identity, tally = self._identity, this.tally
        if identity is None:
            raise ConfigError("secagg.mode", "masking needs the server's key")
        session = ServerSession(this.offer, key=identity.key, allow_list=identity.allow_list, watch=this.watch)
        outgoing = session.begin(tally.draw.cohort)
        try:
            for leg in session.phases:
                if leg == "unmask":
                    this.before_unmask(session.counts["masked"])
                self._leg(leg, outgoing, session, this)
                if leg != session.phases[-1]:
                    outgoing = session.advance()
            total = session.finish()
        except Exception:  # whatever it was, nobody needs these secrets any more
            self._abort(this)
            raise
        tally.respondents = len(total.survivors)
        tally.total = this.offer.encoding.decode(total.words)
        tally.evidence = {
            "secagg": self.config.secagg.mode,
            "transcript": total.transcript.hex(),
            "transcript-signature": total.signature.hex(),
            "server-key": identity.key.public.hex(),
        }
        self._write(this, session.counts, session=session, complaints=[str(each) for each in total.complaints])
        for client in total.survivors:  # who was lost later is in the sum all the same
            tally.failures.pop(client, None)

    def _leg(self, leg: str, outgoing: Mapping[int, bytes], session: ServerSession, this: _Try) -> None:
        """Send one leg's messages and let the session take the answers."""
        for each in self._exchange(leg, outgoing, this):
            reply = this.answered(leg, each)
            if reply is None:
                continue
            try:
                session.receive(reply.client, reply.body)
            except SecaggError:
                this.refused(reply.client)
            else:
                this.furthest[reply.client] = leg

    def _exchange(self, leg: str, outgoing: Mapping[int, bytes], this: _Try) -> Iterator[LegReply | Failure]:
        """Yield the answers to one leg within its share of the round's time."""
        trains = leg in ("mask", "ideal")
        requests = [
            LegRequest(leg=leg, client=client, plan=this.plan, body=body, vector=this.parameters if trains else None)
            for client, body in sorted(outgoing.items())
        ]
        timeout_s = self.config.federation.round_timeout_s * _SHARES.get(leg, 1.0)
        for done, reply in enumerate(self.network.exchange_leg(requests, timeout_s), start=1):
            yield reply
            if trains:
                self.observer.replied(this.plan.round_number, done, len(requests))

    def _abort(self, this: _Try) -> None:
        """Tell the clients that took part to let go of their secrets, which they do at the next offer anyway."""
        took_part = [client for client, leg in sorted(this.furthest.items()) if leg]
        requests = [LegRequest(leg="abort", client=each, plan=this.plan, body=this.offer.session) for each in took_part]
        try:
            for _ in self.network.exchange_leg(requests, _ABORT_S):
                pass
        except Exception:
            log.exception("the clients could not be told that round %s was given up", this.plan.group)

    # -- ideal -------------------------------------------------------------------------------------------------

    def _ideal(self, this: _Try) -> None:
        """Take the same sum of the same integers without masks: for simulations, which hide nothing anyway."""
        encoding, tally = this.offer.encoding, this.tally
        words, survivors = np.zeros(encoding.words, dtype=np.uint64), 0
        for each in self._exchange("ideal", dict.fromkeys(tally.draw.cohort, this.offer.message()), this):
            reply = this.answered("ideal", each)
            if reply is None:
                continue
            try:
                words += _words(reply.body, encoding)
            except SecaggError:
                this.refused(reply.client)
            else:
                survivors += 1
                this.furthest[reply.client] = "ideal"
        counts = {"invited": tally.cohort, "masked": survivors}
        if survivors < self.terms.least_survivors:
            counts["needed"] = self.terms.least_survivors
            reason = f"{survivors} clients are left, and {self.terms.least_survivors} must send their vectors"
            raise RoundAbortedError("mask", counts, reason)
        this.before_unmask(survivors)
        tally.respondents = survivors
        tally.total = encoding.decode(words)
        tally.evidence = {"secagg": "ideal"}
        self._write(this, counts)

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
        this: _Try,
        counts: Mapping[str, int],
        *,
        session: ServerSession | None = None,
        complaints: Sequence[str] = (),
    ) -> None:
        """Append what the server saw of this try to ``secagg.jsonl``."""
        topology, aborted = None if session is None else session.topology, this.tally.aborted
        line = {
            "round": this.plan.round_number,
            "attempt": this.plan.attempt,
            "mode": self.config.secagg.mode,
            "clients": counts.get("advertised", counts["invited"]),
            "degree": None if topology is None else topology.degree,
            "threshold": None if topology is None else topology.threshold,
            "least_survivors": self.terms.least_survivors,
            "bits": this.offer.encoding.bits,
            "dimension": this.offer.encoding.dimension,
            "counts": dict(counts),
            "clipped": this.tally.clipped,
            "furthest": {str(client): leg for client, leg in sorted(this.furthest.items())},
            "bytes": this.traffic,
            "failures": {str(client): str(each.code) for client, each in sorted(this.tally.failures.items())},
            "complaints": list(complaints),
            "aborted": None
            if aborted is None
            else {"phase": aborted.phase, "reason": aborted.reason, "counts": aborted.counts},
            "seen": this.seen,
            "plain": self._plain(this.plan),
            "transcript": this.tally.evidence.get("transcript"),
            "released": this.tally.total is not None,
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
