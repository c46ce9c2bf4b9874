"""The run's own record: written before anything leaves, whatever fails when, and the budget it is held to."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from fedlearn.errors import ConfigError, LedgerError, MissingError, RunFailedError, RunUnreadableError
from fedlearn.federation.estimation import PlainMean, PrivateMean
from fedlearn.federation.journal import earlier_releases
from fedlearn.federation.observer import SilentObserver
from fedlearn.federation.run_folder import RunFolder
from fedlearn.federation.summary import finish
from fedlearn.privacy.accounting import epsilon
from fedlearn.privacy.ledger import Ledger, read_events, releases_of
from fedlearn.privacy.noise import SecureNoise
from fedlearn.sources import SecureRandom

SECURE = SecureNoise(SecureRandom())
SETTINGS = {
    "gaussian": {"privacy": {}},
    "evaluated": {"privacy": {}, "evaluation": "federated"},
    "adaptive": {"privacy": {"adaptive-clipping": True, "noise-multiplier": 0.3}},
    "dp-ftrl": {"privacy": {"mechanism": "dp-ftrl"}, "cohort": 2},
}
EACH = pytest.mark.parametrize("setting", SETTINGS)


def sha256(vector) -> str:
    return hashlib.sha256(vector.tobytes()).hexdigest()


class Killed(BaseException):
    """What a kill looks like from inside."""


@pytest.fixture
def countdown(monkeypatch):
    """Kills at the n-th write to the disk, or fails it as a full disk does."""

    class Countdown:
        left: float = math.inf
        calls = 0
        error: type[BaseException] = Killed

        def counting(self, original):
            def call(*args, **kwargs):
                self.calls += 1
                if self.left <= 0:
                    raise self.error
                self.left -= 1
                return original(*args, **kwargs)

            return call

    found = Countdown()
    for owner, name in ((os, "fsync"), (Path, "replace")):
        monkeypatch.setattr(owner, name, found.counting(getattr(owner, name)))
    return found


# -- what is written, and when -------------------------------------------------------------------------------------


@EACH
def test_a_ledger_begins_with_the_promise_has_each_round_once_and_ends_with_why(begin, setting):
    run = begin(**SETTINGS[setting])
    run.federation.run()
    first, *middle, last = run.events()
    assert first.kind == "run.policy"
    assert (first.body["unit"], first.body["trust"], first.body["population"]) == ("client", "central", 6)
    assert first.body["config-sha256"] == run.folder.config.sha256()
    assert first.body["simulated"] is True
    assert (last.kind, last.body) == ("run.close", {"reason": "finished", "rounds": 3})
    kinds = ["round.release", "eval.release"] if setting == "evaluated" else ["round.release"]
    assert [(event.kind, event.release().round_number) for event in middle] == [
        (kind, number) for number in (1, 2, 3) for kind in kinds
    ]
    models = [each.evidence for each in run.releases()]
    assert [each["model-before"] for each in models[1:]] == [each["model-after"] for each in models[:-1]]
    assert models[-1]["model-after"] == sha256(run.params().astype("float32"))


@EACH
def test_no_model_leaves_before_the_ledger_on_the_disk_has_it(begin, setting):
    run = begin(**SETTINGS[setting], rounds=5)
    left = []

    def watch(requests):
        written = [each.evidence["model-after"] for each in run.releases()]
        for request in requests:
            model = sha256(request.vector)
            left.append(request.kind)
            if request.plan.round_number > 1 or request.kind == "evaluate":
                assert model == written[-1]

    run.twin.watch = watch
    run.federation.run()
    assert set(left) == ({"train", "evaluate"} if setting == "evaluated" else {"train"})


@EACH
@pytest.mark.parametrize("noise", [None, SECURE], ids=["simulated", "secure"])
def test_killed_at_every_write_whatever_left_is_in_the_ledger_and_each_round_once(begin, countdown, setting, noise):
    """With noise that cannot be drawn again, too: either nothing had left of a round that is redone, or it is there."""
    begin("whole", **SETTINGS[setting], noise=noise, rounds=2).federation.run()
    calls, ends = countdown.calls, set()
    assert calls > 12
    for number in range(calls):
        left: list[tuple[str, str]] = []

        def go(name=str(number), left=left):
            run = begin(name, **SETTINGS[setting], noise=noise, rounds=2)
            run.twin.watch = lambda requests: left.extend((r.kind, sha256(r.vector)) for r in requests)
            run.federation.run()
            return run

        countdown.left = number
        with pytest.raises(Killed):
            go()
        countdown.left = math.inf
        run = go()
        released = {each.evidence["model-after"] for each in run.releases()}
        begun = run.releases()[0].evidence["model-before"]
        assert {model for _, model in left} <= released | {begun}, f"killed at write {number}"
        for kind in ("round.release", "eval.release"):
            numbers = [each.round_number for each in run.releases(kind)]
            assert numbers == ([1, 2] if kind == "round.release" or setting == "evaluated" else [])
        assert [line["round"] for line in run.folder.metrics()] == [1, 2]
        assert set(Counter(event.kind for event in run.events())) <= {
            "run.policy", "run.resume", "round.release", "eval.release", "run.close",
        }  # fmt: skip
        ends.add(sha256(run.params()))
    assert len(ends) == (1 if noise is None else calls)


@EACH
def test_on_a_full_disk_the_journal_knows_whether_it_holds_a_state(begin, countdown, setting):
    """So that of a run that fails no model is written whose line is still missing."""
    begin("whole", **SETTINGS[setting], rounds=2).federation.run()
    calls, missing = countdown.calls, 0
    countdown.error = OSError
    for number in range(calls):
        countdown.left = math.inf
        try:
            run = begin(str(number), **SETTINGS[setting], rounds=2)
            countdown.left = number
            run.federation.run()
        except RunFailedError:
            countdown.left = math.inf
            kept = run.folder.load_state()
            if kept is None:
                continue
            written = {each.evidence["model-after"] for each in run.releases()}
            model = sha256(kept.server.params.astype("float32"))
            holds = run.federation.journal.holds(kept)
            missing += not holds
            assert not holds or model in written
    assert missing >= 2


# -- going on ------------------------------------------------------------------------------------------------------


class Stopping(SilentObserver):
    """Stops the run after a round, once it is kept."""

    def __init__(self, *rounds: int) -> None:
        self.rounds = set(rounds)

    def finished_round(self, line):
        if line["round"] in self.rounds:
            raise Killed


def stopped(begin, *rounds: int, name="run", **options):
    run = begin(name, observer=Stopping(*rounds), **options)
    with pytest.raises(Killed):
        run.federation.run()
    return run


@EACH
def test_a_run_that_went_on_has_the_model_and_the_epsilon_of_one_that_was_never_stopped(begin, setting):
    whole = begin("whole", **SETTINGS[setting], rounds=5)
    whole.federation.run()
    for number in (1, 3):
        stopped(begin, number, **SETTINGS[setting], rounds=5)
    again = begin(**SETTINGS[setting], rounds=5)
    again.federation.run()
    assert again.params().tobytes() == whole.params().tobytes()
    spent = [epsilon(releases_of(run.events()), 1e-2) for run in (whole, again)]
    assert spent[0] == spent[1] < math.inf
    assert [event.kind for event in again.events()].count("run.resume") == 2


@EACH
def test_without_its_ledger_a_run_does_not_go_on_and_none_is_made_in_its_place(begin, setting):
    run = stopped(begin, 1, **SETTINGS[setting])
    path = run.folder.path / "ledger.jsonl"
    kept = path.read_bytes()
    path.unlink()
    for _ in range(2):
        with pytest.raises(RunUnreadableError, match="Put the ledger back"):
            begin(**SETTINGS[setting]).federation.run()
        assert not path.exists()
    path.write_bytes(kept)
    begin(**SETTINGS[setting]).federation.run()


def lines_of(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


@EACH
def test_a_ledger_that_lost_a_line_or_was_edited_stops_the_run(begin, setting):
    run = stopped(begin, 2, **SETTINGS[setting])
    path = run.folder.path / "ledger.jsonl"
    whole = lines_of(path)
    for number in range(len(whole)):
        for damage in (whole[:number] + whole[number + 1 :], [*whole[:number], *whole[number:][::-1]]):
            if damage == whole:
                continue
            path.write_bytes(b"".join(damage))
            try:
                begin(**SETTINGS[setting]).federation.run()
            except (LedgerError, RunUnreadableError):
                continue
            assert number == len(whole) - 1, "only the last line can be completed, from the state that has it"
            assert lines_of(path)[: len(whole)] == whole
    path.write_bytes(b"".join(whole))


def test_the_ledger_of_another_run_is_refused(begin):
    stopped(begin, 1)
    other = begin("other", seed=1)
    other.federation.run()
    shutil.copy(other.folder.path / "ledger.jsonl", other.folder.path.parent / "run" / "ledger.jsonl")
    with pytest.raises(RunUnreadableError, match="of another run"):
        begin().federation.run()


def test_a_ledger_of_the_same_settings_but_another_run_is_refused(begin):
    one, _ = stopped(begin, 1, name="one"), stopped(begin, 1, name="other")
    shutil.copy(one.folder.path.parent / "other" / "ledger.jsonl", one.folder.path / "ledger.jsonl")
    with pytest.raises(LedgerError):
        begin("one").federation.run()


def test_under_dp_ftrl_an_older_state_does_not_go_on_whatever_the_noise(begin):
    """Correlated noise that is drawn twice for one row is no longer the noise of the matrix."""
    options = SETTINGS["dp-ftrl"]
    run = stopped(begin, 1, **options)
    checkpoint = run.folder.path / "checkpoint" / "state.safetensors"
    older = checkpoint.read_bytes()
    stopped(begin, 2, **options)
    checkpoint.write_bytes(older)
    with pytest.raises(RunUnreadableError, match="under dp-ftrl a round"):
        begin(**options).federation.run()
    checkpoint.unlink()
    with pytest.raises(RunUnreadableError, match="under dp-ftrl a round"):
        begin(**options).federation.run()


def test_with_independent_noise_an_older_state_goes_on_and_what_is_released_again_counts_again(begin):
    options = {"noise": SECURE, "rounds": 3}
    run = stopped(begin, 1, **options)
    checkpoint = run.folder.path / "checkpoint" / "state.safetensors"
    older = checkpoint.read_bytes()
    stopped(begin, 2, **options)
    checkpoint.write_bytes(older)
    again = begin(**options)
    again.federation.run()
    assert [each.round_number for each in again.releases()] == [1, 2, 2, 3]
    four = epsilon(releases_of(again.events()), 1e-2)
    whole = begin("whole", **options, seed=3)
    whole.federation.run()
    assert four > epsilon(releases_of(whole.events()), 1e-2)


@pytest.mark.parametrize("first", [None, SECURE], ids=["simulated first", "secure first"])
def test_a_run_goes_on_only_with_noise_of_the_kind_it_was_begun_with(begin, first):
    """A folder of a real run, resumed in a simulation, would get noise that whoever knows its seed can subtract."""
    stopped(begin, 1, noise=first)
    with pytest.raises(RunUnreadableError, match="simulat"):
        begin(noise=SECURE if first is None else None).federation.run()
    begin(noise=first).federation.run()


def test_a_run_goes_on_with_the_noise_that_its_ledger_promised(begin, monkeypatch):
    """Calibrated once: another accountant, or earlier ledgers that grew, must not change a run's noise half-way."""
    private = {"target-epsilon": 6.0, "mechanism": "dp-ftrl", "noise-multiplier": None}
    options = {"privacy": private, "cohort": 2}
    run = stopped(begin, 1, **options)
    promised = run.events()[0].body["noise-multiplier"]
    monkeypatch.setattr("fedlearn.privacy.plan.calibrate", lambda *_, **__: 12.0)
    again = begin(**options)
    again.federation.run()
    assert again.federation.journal.plan.noise_multiplier == float(promised) < 12.0
    assert len({each.queries for each in again.releases()}) == 1
    assert again.folder.load_state().round_number == 3
    assert epsilon(releases_of(again.events()), again.federation.journal.plan.delta) <= 6.0


@EACH
def test_a_run_with_a_target_goes_on_to_its_end_wherever_it_was_stopped(begin, setting):
    """What is left to be released is compared with the target as the rows that follow, not as another mechanism's."""
    options = json.loads(json.dumps(SETTINGS[setting]))
    options["privacy"] |= {"amplification": "none", "delta": 0.01, "target-epsilon": 6.0, "noise-multiplier": None}
    if setting == "adaptive":
        options |= {"clients": 60}
    for number in (1, 2, 4):
        stopped(begin, number, **options, rounds=5)
    again = begin(**options, rounds=5)
    assert again.federation.run().round_number == 5
    assert again.events()[-1].body["reason"] == "finished"
    assert 5.9 < epsilon(releases_of(again.events()), 0.01) <= 6.0


# -- the budget ----------------------------------------------------------------------------------------------------


@EACH
def test_a_run_stops_before_its_budget_would_be_exceeded_and_stays_stopped(begin, setting):
    options = json.loads(json.dumps(SETTINGS[setting]))
    options["privacy"] |= {"amplification": "none", "max-epsilon": 6.0, "delta": 0.01}
    if setting == "adaptive":
        options |= {"clients": 30}
        options["privacy"]["noise-multiplier"] = 1.5
    if setting == "dp-ftrl":
        options["privacy"]["noise-multiplier"] = 0.4
    run = begin(**options, rounds=30)
    run.federation.run()
    spent = epsilon(releases_of(run.events()), 0.01)
    rounds = run.folder.load_state().round_number
    assert 0 < rounds < 30
    assert spent <= 6.0
    following = run.federation.journal.plan.releases_of_round(rounds + 1, releases_of(run.events()))
    assert 6.0 < epsilon([*releases_of(run.events()), *following], 0.01) < 12.0  # not for want of a bound
    assert rounds > 1
    last = run.events()[-1]
    assert (last.kind, last.body) == ("run.close", {"reason": "budget", "rounds": rounds})
    before = (run.folder.path / "ledger.jsonl").read_bytes()
    again = begin(**options, rounds=30)
    again.federation.run()
    assert (run.folder.path / "ledger.jsonl").read_bytes() == before
    assert again.twin.asked == []


def test_a_budget_that_permits_no_round_ends_the_run_before_anybody_is_asked(begin):
    run = begin(privacy={"noise-multiplier": 0.2, "max-epsilon": 0.5, "amplification": "none"})
    state = run.federation.run()
    assert state.round_number == 0
    assert run.twin.asked == []
    summary = finish(run.folder, run.federation.model, state)
    assert (summary["rounds"], summary["finished"]) == (0, False)
    assert summary["privacy"]["stopped"] == "budget"
    assert summary["privacy"]["epsilon"] == 0.0


def test_the_budget_is_asked_before_anything_is_sent(begin):
    """At no moment does what was asked exceed what the budget permits."""
    run = begin(privacy={"noise-multiplier": 1.0, "max-epsilon": 9.0, "amplification": "none"}, rounds=30)
    seen = []
    run.twin.watch = lambda requests: seen.append((requests[0].plan.round_number, len(run.releases())))
    run.federation.run()
    assert seen == [(number, number - 1) for number in range(1, len(seen) + 1)]
    assert len(seen) == len(run.releases())


# -- earlier runs --------------------------------------------------------------------------------------------------


def test_two_runs_on_the_same_clients_keep_to_one_budget_together(begin):
    private = {"noise-multiplier": 1.0, "amplification": "none", "delta": 0.01}
    first = begin("first", rounds=3, privacy=private)
    first.federation.run()
    spent = epsilon(releases_of(first.events()), 0.01)
    target = spent + 2.0
    privacy = {
        "noise-multiplier": None,
        "target-epsilon": target,
        "amplification": "none",
        "delta": 0.01,
        "earlier-ledgers": str(first.folder.path),
    }
    second = begin("second", rounds=3, privacy=privacy, seed=5)
    second.federation.run()
    together = epsilon([*releases_of(first.events()), *releases_of(second.events())], 0.01)
    assert target * 0.99 < together <= target
    summary = finish(second.folder, second.federation.model, second.folder.load_state())
    assert summary["privacy"]["epsilon"] == together
    alone = begin("alone", rounds=3, privacy={**privacy, "earlier-ledgers": None}, seed=5)
    assert alone.federation.journal.plan.noise_multiplier < second.federation.journal.plan.noise_multiplier


def test_an_earlier_run_that_spent_all_leaves_nothing_to_this_one(begin):
    private = {"noise-multiplier": 1.0, "amplification": "none", "delta": 0.01}
    first = begin("first", rounds=3, privacy=private)
    first.federation.run()
    spent = epsilon(releases_of(first.events()), 0.01)
    with pytest.raises(ConfigError, match="earlier runs have spent it"):
        begin(
            "second",
            privacy={
                "noise-multiplier": None,
                "target-epsilon": spent * 0.9,
                "delta": 0.01,
                "earlier-ledgers": str(first.folder.path),
            },
        )
    capped = {**private, "max-epsilon": spent * 1.01, "earlier-ledgers": str(first.folder.path / "ledger.jsonl")}
    third = begin("third", privacy=capped, seed=2)
    assert third.federation.run().round_number == 0
    assert third.twin.asked == []


@pytest.mark.parametrize("kind", ["round.something-new", "round.release"])
def test_an_earlier_ledger_with_a_release_that_is_not_known_is_refused(begin, tmp_path, kind):
    first = begin("first")
    first.federation.run()
    strange = Ledger(tmp_path / "strange.jsonl")
    for event in first.events():
        strange.append(event.kind, event.body)
    body = {**first.releases()[0].to_body(), "mechanism": "laplace-of-2031"}
    strange.append(kind, body)
    assert math.isinf(epsilon(releases_of(read_events(strange.path)), 0.01))
    privacy = {"noise-multiplier": None, "target-epsilon": 50.0, "earlier-ledgers": str(strange.path)}
    with pytest.raises(ConfigError, match="has no bound") as refused:
        begin("second", privacy=privacy)
    assert refused.value.key == "privacy.target-epsilon"


def test_an_earlier_run_that_hid_nobody_is_refused_too(begin):
    public = begin("public", privacy={"unit": "none", "noise-multiplier": None}, lies=plain())
    public.federation.run()
    assert isinstance(public.federation.journal.estimator, PlainMean)
    with pytest.raises(ConfigError, match="has no bound"):
        begin(
            "second",
            privacy={
                "noise-multiplier": None,
                "target-epsilon": 50.0,
                "earlier-ledgers": str(public.folder.path),
            },
        )


def plain():
    """Clients of a run without privacy."""
    said = {"num-examples": 1, "loss": 0.5}
    return dict.fromkeys(range(6), lambda request, spec: (np.zeros(spec.size, spec.dtype), said))


def test_an_earlier_ledger_that_is_missing_damaged_or_cut_off_is_refused(begin, tmp_path):
    first = begin("first")
    state = first.federation.run()
    finish(first.folder, first.federation.model, state)
    path = first.folder.path / "ledger.jsonl"
    privacy = {"earlier-ledgers": f"{first.folder.path}"}
    whole = lines_of(path)
    path.write_bytes(b"".join(whole[:2] + whole[3:]))
    with pytest.raises(LedgerError):
        begin("second", privacy=privacy)
    path.write_bytes(b"".join(whole[:-2]))  # its summary.json knows how far it went
    with pytest.raises(LedgerError, match="is missing"):
        begin("second", privacy=privacy)
    path.unlink()
    with pytest.raises(MissingError, match="there is no ledger"):
        begin("second", privacy=privacy)


def test_several_earlier_ledgers_are_separated_by_commas(begin):
    paths = []
    for name in ("a", "b"):
        run = begin(name, seed=len(paths))
        run.federation.run()
        paths.append(str(run.folder.path))
    third = begin("c", privacy={"earlier-ledgers": ",".join(paths)})
    assert len(earlier_releases(third.folder.config)) == 6
    assert len(third.federation.journal.plan.earlier) == 6


def test_only_a_run_that_hides_clients_has_a_plan(begin, tmp_path):
    assert isinstance(begin("a").federation.estimator, PrivateMean)
    public = begin("b", privacy={"unit": "none", "noise-multiplier": None})
    assert public.federation.journal.plan is None
    assert not public.federation.journal.is_spent(public.federation.initialise())
    assert isinstance(RunFolder.open(tmp_path / "a"), RunFolder)
