"""Do four accountants, each called on its own, agree with what fedlearn computes from a ledger?

Every setting becomes releases in a ledger on the disk, is read back, and its epsilon computed from the file alone.
Beside it stand ``dp_accounting``'s PLD and RDP accountants and Opacus' PRV and RDP accountants, given the numbers.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedlearn.privacy.accounting import epsilon_of_ledger
from fedlearn.privacy.ledger import Ledger, read_events
from fedlearn.privacy.releases import Query, Release, Sampling
from simulations.runs import Answer, arguments, finish, progress, stated

BAR = 0.01
"""How far apart, relatively, two accountants of the same quantity may be."""

PRV_ERROR = 0.01
"""The ``eps_error`` that Opacus' PRV accountant is asked for, and adds to the epsilon that it returns."""


@dataclass(frozen=True)
class Setting:
    """A Gaussian mechanism, released again and again.

    Attributes:
        rate: the probability of each unit to be drawn in a round; 1: everybody.
        noise_multiplier: σ/Δ.
        rounds: how often.
        delta: the probability with which the promise may fail.
    """

    rate: float
    noise_multiplier: float
    rounds: int
    delta: float


SETTINGS = (
    Setting(256 / 60_000, 1.1, 14_062, 1e-5),  # the first six: those of the design
    Setting(50 / 500, 1.0, 100, 1e-3),
    Setting(0.01, 0.5, 1_000, 1e-5),
    Setting(0.05, 4.0, 2_000, 1e-6),
    Setting(1.0, 20.0, 100, 1e-5),
    Setting(0.1, 4.0, 100, 1e-4),
    Setting(1.0, 4.0, 100, 1e-4),
    Setting(1.0, 4.0, 10, 1e-4),
    Setting(0.1, 0.72, 60, 5e-4),
    Setting(0.02, 0.8, 300, 1e-5),
    Setting(0.2, 2.0, 500, 1e-6),
    Setting(0.001, 0.7, 10_000, 1e-6),
    Setting(0.5, 3.0, 200, 1e-5),
    Setting(0.3, 1.5, 1, 1e-5),
    Setting(0.004, 1.0, 20_000, 1e-7),
    Setting(1.0, 1.0, 1, 1e-5),
)


@dataclass(frozen=True, kw_only=True)
class Found:
    """The epsilon of one setting by each accountant.

    Attributes:
        ours: from the ledger.
        ours_rdp: from the ledger, by Rényi.
        pld: dp_accounting's.
        rdp: dp_accounting's.
        prv: Opacus', its error included.
        opacus_rdp: Opacus'.
    """

    ours: float
    ours_rdp: float
    pld: float
    rdp: float
    prv: float
    opacus_rdp: float

    @property
    def apart(self) -> float:
        """The largest relative disagreement; of PRV what is left of it beyond the error that it states."""
        from_prv = max(0.0, self.prv - PRV_ERROR - self.ours, self.ours - self.prv) / self.ours
        return max(abs(self.ours / self.pld - 1), abs(self.ours_rdp / self.rdp - 1), from_prv)

    @property
    def ordered(self) -> bool:
        """Whether no Rényi epsilon is below the PLD's."""
        return min(self.ours_rdp, self.rdp, self.opacus_rdp) >= max(self.ours, self.pld)


def compare(setting: Setting) -> Found:
    """Return the epsilon of a setting by every accountant."""
    with tempfile.TemporaryDirectory(prefix="fedlearn-") as place:
        path = Path(place) / "ledger.jsonl"
        _release(setting, path)
        events = read_events(path)
    return Found(
        ours=epsilon_of_ledger(events, setting.delta),
        ours_rdp=epsilon_of_ledger(events, setting.delta, accountant="rdp"),
        pld=_dp_accounting(setting, "pld"),
        rdp=_dp_accounting(setting, "rdp"),
        prv=_opacus(setting, "prv"),
        opacus_rdp=_opacus(setting, "rdp"),
    )


def _release(setting: Setting, path: Path) -> None:
    """Write what the setting releases into a ledger: a line a round, up to a hundred lines."""
    ledger, lines = Ledger(path), min(setting.rounds, 100)
    for number in range(lines):
        steps = setting.rounds // lines + (number < setting.rounds % lines)
        drawn = Sampling(
            method="poisson" if setting.rate < 1 else "everyone", rate=setting.rate, population=int(1 / setting.delta)
        )
        release = Release(
            what="model",
            round_number=number + 1,
            unit="client",
            adjacency="add-remove",
            mechanism="gaussian",
            queries=(Query(name="update", sensitivity_l2=0.5, stddev=0.5 * setting.noise_multiplier),),
            sampling=drawn,
            steps=steps,
            simulated=False,
        )
        ledger.append("round.release", release.to_body())


def _dp_accounting(setting: Setting, kind: str) -> float:
    """Return the epsilon by one of dp_accounting's accountants."""
    from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent, SelfComposedDpEvent
    from dp_accounting.pld import PLDAccountant
    from dp_accounting.rdp import RdpAccountant

    relation = NeighboringRelation.ADD_OR_REMOVE_ONE
    accountant = {"pld": PLDAccountant, "rdp": RdpAccountant}[kind](neighboring_relation=relation)
    event = PoissonSampledDpEvent(setting.rate, GaussianDpEvent(setting.noise_multiplier))
    logger = logging.getLogger("absl")
    logger.addFilter(_converges)
    try:
        return float(accountant.compose(SelfComposedDpEvent(event, setting.rounds)).get_epsilon(setting.delta))
    finally:
        logger.removeFilter(_converges)


def _converges(record: logging.LogRecord) -> bool:
    """Return whether a record is something else than a Rényi order that dp_accounting does without."""
    return "_compute_log_a_frac failed to converge" not in record.getMessage()


def _opacus(setting: Setting, kind: str) -> float:
    """Return the epsilon by one of Opacus' accountants."""
    from opacus.accountants import PRVAccountant, RDPAccountant

    accountant = PRVAccountant() if kind == "prv" else RDPAccountant()
    rate = min(setting.rate, 1 - 1e-9)  # its PRV divides by zero where everybody is drawn
    accountant.history = [(setting.noise_multiplier, rate if kind == "prv" else setting.rate, setting.rounds)]
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Optimal order is the"
        )  # the end of its list of orders: looser, sound
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="opacus")  # log(0) far out in a tail
        if kind == "prv":
            return float(accountant.get_epsilon(setting.delta, eps_error=PRV_ERROR))
        return float(accountant.get_epsilon(setting.delta))


def experiment(settings: Sequence[Setting] = SETTINGS) -> Answer:
    """Compare the accountants on every setting."""
    found = []
    for number, setting in enumerate(settings, start=1):
        progress(f"setting {number} of {len(settings)}")
        found.append(compare(setting))
    largest, ordered = max(each.apart for each in found), all(each.ordered for each in found)
    met = largest <= BAR and ordered
    rows = [
        [
            f"{setting.rate:.4g}",
            f"{setting.noise_multiplier:g}",
            f"{setting.rounds:,}",
            f"{setting.delta:.0e}",
            *(f"{value:.4f}" for value in (each.ours, each.pld, each.prv, each.ours_rdp, each.rdp, each.opacus_rdp)),
            f"{100 * each.apart:.3f} %",
        ]
        for setting, each in zip(settings, found, strict=True)
    ]
    columns = ["rate", "noise", "rounds", "delta", "ledger", "PLD", "PRV", "ledger RDP", "RDP", "Opacus RDP", "apart"]
    never = "never below" if ordered else "BELOW"
    verdict = (
        f"{stated(met)}: {len(settings)} settings, at most {100 * largest:.3f} % apart (the bar: {100 * BAR:g} %; "
        f"of PRV beyond the {PRV_ERROR:g} that it adds to its epsilon); RDP is {never} PLD"
    )
    body = {"settings": len(settings), "largest_disagreement": largest, "bar": BAR, "rdp_never_below_pld": ordered}
    return Answer(columns=columns, rows=rows, verdict=verdict, met=met, body=body)


if __name__ == "__main__":
    parser = arguments(__doc__)
    given = parser.parse_args()
    if given.set:
        parser.error("there is no scenario to override: the settings stand in table.py")
    finish(experiment, as_json=given.json)
