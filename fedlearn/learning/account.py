"""One client's own account: what its DP-SGD has cost so far, over rounds and runs, and what its owner permits.

Epsilon is a function of the whole ledger (``example_epsilon.py``), so that a new engine in every round cannot make
twenty rounds cost one.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedlearn.config import PrivacyConfig
from fedlearn.errors import ReplyError
from fedlearn.files import write_atomic
from fedlearn.learning.example_epsilon import History, calibrated, composed_epsilon, history_of, merged
from fedlearn.privacy.ledger import Ledger
from fedlearn.privacy.releases import Release, read_number, written_number

__all__ = ["ClientAccount"]


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What the rest of a run may cost, computed once.

    Attributes:
        history: with every round of it.
        limit: the epsilon it may not exceed, or infinity.
        fits: whether it does not.
    """

    history: History
    limit: float
    fits: bool


class ClientAccount:
    """The ledger of one client's examples, and the limit of their owner.

    Args:
        path: its ``ledger.jsonl``; momentum is kept beside it. The folder is made.
        size: n, how many examples the client trains on.
        delta: δ, or ``auto``: n^(-1.1).
        max_epsilon: what the owner permits over all runs together; ``None``: no limit of theirs.

    Raises:
        ReplyError: ``refused`` where δ ≥ 1/n: such a δ permits giving one example away. One example alone has no other.
        LedgerError: the ledger's chain does not hold.
    """

    def __init__(self, path: Path, *, size: int, delta: float | Literal["auto"], max_epsilon: float | None) -> None:
        self.size = size
        self.delta = size**-1.1 if delta == "auto" else delta
        if size < 2 or not 0 < self.delta < 1 / size:
            reason = f"delta {self.delta:g} is not below 1/n for n = {size} examples, so it protects none of them"
            raise ReplyError("refused", reason)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.max_epsilon = math.inf if max_epsilon is None else max_epsilon
        self._ledger = Ledger(path)
        self._plan: _Plan | None = None
        self._read: tuple[int, list[Release]] | None = None

    def epsilon(self) -> float:
        """Return ε at δ of everything in the ledger; infinite where a line is not known for what it is."""
        return self._epsilon_with(())

    def permit(self, release: Release) -> None:
        """Raise if ``release`` would bring ε above what is permitted; ask before anything is trained.

        A simulation that is resumed repeats a round with the same noise: what is recorded already costs nothing again.
        On a device the noise is new, and a repeated round counts again.

        Raises:
            ReplyError: ``budget-spent``.
        """
        if release.simulated and self._holds(release):
            return
        history = history_of((*self._releases(), release)) if self._is_known(release.simulated) else None
        limit = min(self.max_epsilon, self._plan.limit if self._plan else math.inf)
        if history is not None and (limit == math.inf or self._is_planned(history)):
            return
        spent = math.inf if history is None else composed_epsilon(history, self.delta)
        if not (math.isfinite(spent) and spent <= limit):
            reason = f"round {release.round_number} would bring epsilon to {spent:.4g} at delta {self.delta:.3g}"
            raise ReplyError("budget-spent", f"{reason}; {limit:g} is permitted. The ledger is {self._ledger.path}")

    @contextmanager
    def exclusive(self, timeout_s: float = 30.0) -> Iterator[None]:
        """Hold the ledger against other processes of this device, and read what they wrote before.

        Raises:
            ReplyError: ``refused`` where another process holds it for longer.
        """
        deadline = time.monotonic() + timeout_s
        with self._ledger.path.with_name(".ledger.lock").open("w") as handle:
            while True:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError as error:
                    if time.monotonic() > deadline:
                        reason = f"another process holds {self._ledger.path}; what it releases must be counted first"
                        raise ReplyError("refused", reason) from error
                    time.sleep(0.05)
            self._ledger, self._read = Ledger(self._ledger.path), None
            yield

    def record(self, release: Release) -> None:
        """Write ``release`` to the disk, and only then return: training may begin now, and not before.

        A simulated release that is there already, the same round of the same run with the same model, has the same
        noise and is not written twice.

        Raises:
            ReplyError: ``budget-spent``, as for ``permit``.
            RunFailedError: it cannot be written; nothing may be trained.
        """
        if release.simulated and self._holds(release):
            return
        self.permit(release)
        self._ledger.append("update.release", release.to_body())

    def noise_multiplier(self, privacy: PrivacyConfig, *, run: str, rounds: int, rate: float, steps: int) -> float:
        """Return σ/bound for a run: as given, or the least with which all its rounds keep ε within the target.

        What the ledger holds already counts towards the target. The run's first line in the ledger, ``run.policy``,
        fixes the number: it is the same in every round, whatever else is released in between.

        Args:
            privacy: ``target_epsilon`` or ``noise_multiplier``.
            run: what names the run, such as its configuration's hash.
            rounds: how many rounds the client takes part in, at most.
            rate: the sampling rate q.
            steps: steps a round.

        Raises:
            ReplyError: ``budget-spent`` where no noise is enough, ``refused`` where the data changed during the run.
        """
        policy = next((each for each in self._policies() if each["run"] == run), None)
        limit = math.inf if privacy.target_epsilon is None else privacy.target_epsilon
        if policy is None:
            multiplier = privacy.noise_multiplier
            before = history_of(self._releases()) if self._is_known(None) else None
            if multiplier is None and before is not None:
                multiplier = calibrated(before, rate, steps * rounds, self.delta, min(limit, self.max_epsilon))
            if multiplier is None:
                raise ReplyError("budget-spent", f"no noise keeps epsilon within {min(limit, self.max_epsilon):g}")
            policy = self._write_policy(run, multiplier, rounds=rounds, rate=rate, steps=steps)
        if (policy["examples"], policy["delta"]) != (self.size, written_number(self.delta)):
            raise ReplyError(
                "refused", f"the run began with {policy['examples']} examples and now there are {self.size}"
            )
        multiplier = read_number(policy["noise-multiplier"])
        self._plan = self._planned(policy, multiplier, rounds=rounds, rate=rate, steps=steps, limit=limit)
        return multiplier

    def velocity_before(self, run: str, round_number: int) -> NDArray[np.floating[Any]] | None:
        """Return the momentum after the last round before this one; ``None`` where there is none: at rest."""
        earlier = [(number, path) for number, path in self._velocities(run) if number < round_number]
        if not earlier:
            return None
        try:
            velocity: NDArray[np.floating[Any]] = np.load(max(earlier)[1], allow_pickle=False)
        except (OSError, ValueError):
            return None  # a damaged file costs speed, not privacy
        return velocity

    def keep_velocity(self, run: str, round_number: int, velocity: NDArray[np.floating[Any]]) -> None:
        """Keep the momentum after this round, and that before it, so that the round can be done again.

        It is computed from noised gradients alone, so it gives away no more than they did.
        """
        buffer = io.BytesIO()
        np.save(buffer, velocity, allow_pickle=False)
        folder = self._ledger.path.parent
        write_atomic(folder / f"velocity-{_short(run)}-{round_number}.npy", buffer.getvalue())
        earlier = sorted(number for number, _ in self._velocities(run) if number < round_number)
        kept = {f"velocity-{_short(run)}-{number}.npy" for number in (round_number, *earlier[-1:])}
        for path in folder.glob("velocity-*.npy"):
            if path.name not in kept:
                path.unlink(missing_ok=True)

    def _velocities(self, run: str) -> Iterable[tuple[int, Path]]:
        """Return the rounds whose momentum is kept."""
        for path in self._ledger.path.parent.glob(f"velocity-{_short(run)}-*.npy"):
            number = path.stem.rpartition("-")[2]
            if number.isdecimal():
                yield int(number), path

    def _holds(self, release: Release) -> bool:
        """Return whether the ledger has this very release already."""
        body = release.to_body()
        return any(event.body == body for event in self._ledger.events)

    def _releases(self) -> list[Release]:
        """Return every release in the ledger; each line is read once."""
        events = self._ledger.events
        if self._read is None or self._read[0] != len(events):
            found = (event.release() for event in events)
            self._read = (len(events), [release for release in found if release is not None])
        return self._read[1]

    def _policies(self) -> Iterable[Mapping[str, Any]]:
        """Return the policy of every run in the ledger."""
        return (event.body for event in self._ledger.events if event.kind == "run.policy" and "run" in event.body)

    def _is_known(self, simulated: bool | None) -> bool:
        """Return whether every line is known for what it is; simulated noise protects nobody beside real noise."""
        kinds = {release.simulated for release in self._releases()} | ({simulated} if simulated is not None else set())
        return len(kinds) < 2 and all(event.is_known for event in self._ledger.events)

    def _epsilon_with(self, more: tuple[Release, ...]) -> float:
        """Return ε of the ledger and ``more``."""
        history = history_of((*self._releases(), *more)) if self._is_known(None) else None
        return math.inf if history is None else composed_epsilon(history, self.delta)

    def _is_planned(self, history: History) -> bool:
        """Return whether these steps are among those of a plan that is within the limits: then ε is too."""
        if self._plan is None or not self._plan.fits:
            return False
        planned = {(noise, rate): steps for noise, rate, steps in self._plan.history}
        return all(steps <= planned.get((noise, rate), 0) for noise, rate, steps in history)

    def _write_policy(self, run: str, multiplier: float, *, rounds: int, rate: float, steps: int) -> Mapping[str, Any]:
        """Write a run's first line and return its body; later calls of the same run go by it."""
        before = history_of(self._releases()) if self._is_known(None) else None
        body = {
            "run": run,
            "unit": "example",
            "noise-multiplier": written_number(multiplier),
            "delta": written_number(self.delta),
            "examples": self.size,
            "rate": written_number(rate),
            "steps": steps,
            "rounds": rounds,
            "before": [[written_number(noise), written_number(q), count] for noise, q, count in before or ()],
        }
        return self._ledger.append("run.policy", body).body

    def _planned(
        self, policy: Mapping[str, Any], multiplier: float, *, rounds: int, rate: float, steps: int, limit: float
    ) -> _Plan:
        """Return what the run's rounds cost on top of what the ledger held when it began."""
        before = tuple((read_number(noise), read_number(q), int(count)) for noise, q, count in policy["before"])
        history = merged((*before, (multiplier, rate, rounds * steps)))
        least = min(limit, self.max_epsilon)
        fits = least == math.inf or composed_epsilon(history, self.delta) <= least
        return _Plan(history=history, limit=limit, fits=fits)


def _short(run: str) -> str:
    """Return a run's name as part of a file's."""
    return hashlib.sha256(run.encode()).hexdigest()[:12]
