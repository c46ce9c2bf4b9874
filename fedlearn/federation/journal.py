"""A run's own record of what it releases: the ledger, written before anything leaves, and the budget it is held to."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedlearn.arrays import ParamSpec
from fedlearn.config import RunConfig
from fedlearn.errors import LedgerError, MissingError, RunUnreadableError
from fedlearn.federation.checkpoint import RunState
from fedlearn.federation.estimation import Estimator, PlainMean, PrivateMean
from fedlearn.federation.masked import MaskedEstimator, MaskedMean, SkellamMean
from fedlearn.privacy.ledger import GENESIS, Event, Head, Ledger, read_events, releases_of
from fedlearn.privacy.noise import Noise
from fedlearn.privacy.plan import PrivacyPlan, plan_privacy
from fedlearn.privacy.releases import Release, read_number, written_number
from fedlearn.secagg.terms import Terms

__all__ = ["RunJournal", "earlier_ledgers", "earlier_releases"]


class RunJournal:
    """The ledger of one run and what may still be added to it.

    The order in which a round is kept is what makes the record sound: the new state goes to the disk *with* its line of
    the ledger, then the line goes into the ledger, and only then does anything of the state leave. A crash in between
    either leaves a state of which nothing was released, or a line that is completed from the state.

    Args:
        folder: the run's folder.
        config: the run.
        spec: the description of its model.
        noise: where noise and secret draws come from.
        evaluated: the rounds after which clients measure the model.

    Raises:
        RunUnreadableError: the ledger is missing, or of another run.
        LedgerError: its chain does not hold.
        ConfigError: the privacy that is asked for cannot be had.
    """

    def __init__(
        self, folder: Path, config: RunConfig, spec: ParamSpec, *, noise: Noise, evaluated: Sequence[int]
    ) -> None:
        self._config, self._noise = config, noise
        self._resumed = False
        self._fits: bool | None = None
        self.plan: PrivacyPlan | None = None
        self._earlier: list[str] = []
        self.ledger = Ledger(folder / "ledger.jsonl")
        if config.privacy.unit == "client":
            ledgers = earlier_ledgers(config)
            self._earlier = self._check_earlier(ledgers)
            earlier = [each for events in ledgers for each in releases_of(events)]
            self.plan = plan_privacy(
                config,
                evaluated=evaluated,
                earlier=earlier,
                promised=self._promised_noise(),
                summed=Terms.of(config).summed(spec.trainable_size) if config.privacy.trust == "distributed" else None,
            )
        self.instance = self._name()
        self.estimator = self._estimator(spec)

    def open(self, kept: RunState | None) -> None:
        """Begin the ledger, or check it against the state that is gone on with, and complete it.

        Raises:
            RunUnreadableError: the ledger does not go with the state.
        """
        if kept is None:
            if not self.ledger.events:
                self.ledger.append("run.policy", self._policy())
            self._check_rows(0)
            return
        before = kept.pending[0] if kept.pending else None
        least = Head(count=before.seq - 1, sha256=before.prev) if before is not None else kept.ledger
        if self.ledger.head.count < least.count:
            raise RunUnreadableError(
                f"{self.ledger.path} has {self.ledger.head.count} lines and the run had written {least.count}: without "
                "its ledger a run cannot go on. Put the ledger back, or start a new run with privacy.earlier-ledgers"
            )
        read_events(self.ledger.path, least)
        self.commit(kept)
        self._resumed = True
        self._check_rows(kept.round_number)

    def noted(self, state: RunState, kind: str, body: Mapping[str, Any]) -> RunState:
        """Return ``state`` with the ledger's next line, which is not written yet."""
        self._say_resumed(state)
        event = self.ledger.next_event(kind, body)
        return replace(state, pending=(event,), ledger=Head(count=event.seq, sha256=event.sha256))

    def commit(self, state: RunState) -> None:
        """Write the state's lines to the ledger; from here on its model may leave."""
        for event in state.pending:
            self.ledger.commit(event)

    def admit(self, state: RunState, release: Release) -> None:
        """Write a release now: whether or not a model comes of it, what came of it is seen all the same."""
        if self.plan is not None:
            self._say_resumed(state)
            self.ledger.append("round.release", release.to_body())
            self._fits = None  # it may be one more than was planned: whether the rest still fits is asked anew

    def holds(self, state: RunState) -> bool:
        """Return whether the ledger has all of the state's lines: only then may anything of it leave."""
        events, head = self.ledger.events, state.ledger
        return Head.of(events[: head.count]) == head

    def is_spent(self, state: RunState) -> bool:
        """Return whether the next round would bring epsilon above the budget; asked before anything is sent."""
        if self.plan is None or self.plan.config.privacy.budget is None:
            return False
        released = releases_of(self.ledger.events)
        if self._fits is None:  # what fits as a whole fits at every round
            self._fits = not self.plan.would_exceed(released, self.plan.releases(released, state.round_number))
        if self._fits:
            return False
        following = self.plan.releases_of_round(state.round_number + 1, released)
        return self.plan.would_exceed(released, following)

    def close(self, state: RunState) -> None:
        """Write that the run ended, and why."""
        if self.ledger.events[-1].kind == "run.close":
            return
        rounds = self._config.federation.rounds
        reason = "finished" if state.round_number == rounds else "budget"
        self.ledger.append("run.close", {"reason": reason, "rounds": state.round_number})

    def _estimator(self, spec: ParamSpec) -> Estimator:
        """Return what the run estimates its mean by."""
        config, plan = self._config, self.plan
        if config.secagg.mode != "off":
            return MaskedMean(config, spec) if plan is None else SkellamMean(plan, spec, noise=self._noise)
        return (
            PlainMean(config, spec)
            if plan is None
            else PrivateMean(plan, spec, instance=self.instance, noise=self._noise)
        )

    def _say_resumed(self, state: RunState) -> None:
        """Write, before the first line of a run that goes on, that it does."""
        if self._resumed:
            self.ledger.append("run.resume", {"round": state.round_number})
            self._resumed = False

    def _name(self) -> str:
        """Return the run's own name: the ledger's, or a new one; refuse a ledger that is not this run's."""
        if not self.ledger.events:
            return secrets.token_hex(16)
        first = self.ledger.events[0]
        if first.kind != "run.policy" or first.body.get("config-sha256") != self._config.sha256():
            raise RunUnreadableError(f"{self.ledger.path} is the ledger of another run; put the run's own back")
        if self._config.privacy.unit == "client" and first.body.get("simulated") is not self._noise.simulated:
            begun, now = ("simulated", "real") if self._noise.simulated is False else ("real", "simulated")
            raise RunUnreadableError(
                f"{self.ledger.path} is of a run with {begun} noise, and would go on with {now} noise; go on with it "
                "where it was begun"
            )
        return str(first.body["run"])

    def _check_earlier(self, ledgers: Sequence[Sequence[Event]]) -> list[str]:
        """Return the last hash of each earlier ledger; a run that goes on must find them where it left them."""
        begun = self.ledger.events[0].body.get("earlier", []) if self.ledger.events else []
        for head, events in zip(begun, [*ledgers, *[()] * len(begun)], strict=False):
            if head != GENESIS and head not in {event.sha256 for event in events}:
                raise RunUnreadableError(
                    "privacy.earlier-ledgers: a ledger is not the one that the run was begun with, or was cut; what it "
                    "spent counts, so put it back"
                )
        return [Head.of(events).sha256 for events in ledgers]

    def _promised_noise(self) -> float | None:
        """Return the noise multiplier that the run was begun with: what came after changes no noise half-way."""
        if not self.ledger.events or "noise-multiplier" not in self.ledger.events[0].body:
            return None
        return read_number(self.ledger.events[0].body["noise-multiplier"])

    def _policy(self) -> dict[str, Any]:
        """Return what is promised, before the first round."""
        config, privacy = self._config, self._config.privacy
        numbers: Mapping[str, float | None] = {
            "target-epsilon": privacy.target_epsilon,
            "max-epsilon": privacy.max_epsilon,
            "bound-l2": privacy.bound_l2,
            "delta": None if self.plan is None else self.plan.delta,
            "noise-multiplier": None if self.plan is None else self.plan.noise_multiplier,
            "rate": config.federation.cohort / config.federation.clients,
        }
        promised = privacy.unit != "none"
        return {
            "run": self.instance,
            "task": config.task,
            "config-sha256": config.sha256(),
            "unit": privacy.unit,
            "trust": privacy.trust,
            "mechanism": privacy.mechanism,
            "population": config.federation.clients,
            "rounds": config.federation.rounds,
            "sampling": config.federation.sampling,
            "amplification": privacy.amplification,
            "secagg": self._secagg(),
            "simulated": self._noise.simulated,
            "earlier": self._earlier,
            **{name: written_number(value) for name, value in numbers.items() if promised and value is not None},
        }

    def _secagg(self) -> dict[str, Any]:
        """Return what the server sees of a client, and what every sum holds at least."""
        secagg = self._config.secagg
        if not isinstance(self.estimator, MaskedEstimator):
            return {"mode": secagg.mode}
        return {
            "mode": secagg.mode,
            "bits": secagg.bits,
            "least-survivors": self.estimator.terms.least_survivors,
            "colluding": self.estimator.terms.colluding,
        }

    def _check_rows(self, done: int) -> None:
        """Refuse to draw correlated noise a second time for a round that the ledger says was released."""
        if self._config.privacy.unit != "client" or self._config.privacy.mechanism != "dp-ftrl":
            return
        released = [each for each in releases_of(self.ledger.events) if each.what == "model"]
        if len(released) > done:
            raise RunUnreadableError(
                f"{self.ledger.path} reports {len(released)} rounds and the run's state {done}: under dp-ftrl a round "
                "cannot be released twice. Put the state back, or start a new run with privacy.earlier-ledgers"
            )


def earlier_releases(config: RunConfig) -> list[Release]:
    """Return what earlier runs on the same clients released, as their ledgers say; see ``earlier_ledgers``."""
    return [each for events in earlier_ledgers(config) for each in releases_of(events)]


def earlier_ledgers(config: RunConfig) -> list[list[Event]]:
    """Return the ledgers of earlier runs on the same clients.

    Raises:
        MissingError: a ledger is not there.
        LedgerError: a ledger's chain does not hold, or it ends before the ``summary.json`` beside it says.
    """
    found: list[list[Event]] = []
    for name in (config.privacy.earlier_ledgers or "").split(","):
        if not name:
            continue
        path = Path(name)
        path = path / "ledger.jsonl" if path.is_dir() else path
        if not path.exists():
            raise MissingError(f"privacy.earlier-ledgers: there is no ledger {path}")
        try:
            found.append(read_events(path, _stated_head(path.with_name("summary.json"))))
        except LedgerError as error:
            error.add_note(f"That is {path}, of privacy.earlier-ledgers; restore it from a copy")
            raise
    return found


def _stated_head(summary: Path) -> Head | None:
    """Return how far a run's summary says that its ledger goes, or ``None`` where there is none."""
    if not summary.exists():
        return None
    try:
        stated = json.loads(summary.read_bytes())["privacy"]["ledger"]
        return Head(count=int(stated["lines"]), sha256=str(stated["sha256"]))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise RunUnreadableError(f"{summary} is damaged: how far the ledger must go is not known") from error
