"""Four accountants agree with the ledger: on three quick settings here, on all with ``-m slow``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("dp_accounting")
pytest.importorskip("opacus")

Script = Callable[[str], Any]

# What no file of ours can help: Opacus imports what warns.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

DESIGN = {(256 / 60_000, 1.1), (0.1, 1.0), (0.01, 0.5), (0.05, 4.0), (1.0, 20.0), (0.1, 4.0), (1.0, 4.0)}


def test_the_designs_settings_are_in_the_table(script: Script) -> None:
    settings = script("accountants.table").SETTINGS
    assert len(settings) >= 14 and len(set(settings)) == len(settings)
    assert {(each.rate, each.noise_multiplier) for each in settings} >= DESIGN


@pytest.mark.parametrize(("rate", "noise", "rounds", "delta"), [(1.0, 4.0, 10, 1e-4), (0.1, 4.0, 100, 1e-4)])
def test_quick_settings_agree(script: Script, rate: float, noise: float, rounds: int, delta: float) -> None:
    table = script("accountants.table")
    answer = table.experiment([table.Setting(rate, noise, rounds, delta)])
    assert answer.met, answer.verdict
    assert answer.body["largest_disagreement"] < 0.001


def test_a_disagreement_would_be_seen(script: Script) -> None:
    table = script("accountants.table")
    good = table.Found(ours=2.0, ours_rdp=2.2, pld=2.0, rdp=2.2, prv=2.01, opacus_rdp=2.2)
    assert good.apart == pytest.approx(0) and good.ordered
    for name, value in [("pld", 1.95), ("pld", 2.05), ("prv", 1.95), ("prv", 2.05), ("rdp", 2.3), ("ours_rdp", 2.1)]:
        assert replace(good, **{name: value}).apart > table.BAR, name
    assert not replace(good, opacus_rdp=1.99).ordered


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_whole_table(script: Script) -> None:
    answer = script("accountants.table").experiment()
    assert answer.met, answer.verdict
    assert answer.body["settings"] >= 14
