"""Rounds that hide clients, end to end: whoever fails, lies or is missing, the noise and the record are the same."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import numpy as np
import pytest

from fedlearn.config import RunConfig
from fedlearn.errors import RoundFailedError, TaskError
from fedlearn.federation.estimation import Realised
from fedlearn.federation.messages import reply_numbers
from fedlearn.federation.observer import SilentObserver
from fedlearn.federation.run_folder import RunFolder
from fedlearn.flower.client import build_client_app
from fedlearn.flower.grid import LocalGrid
from fedlearn.flower.server import build_server_app
from fedlearn.privacy.accounting import epsilon
from fedlearn.privacy.ledger import read_events, releases_of
from fedlearn.simulation.engine import simulate

KINDS = {
    "gaussian": {},
    "adaptive": {"adaptive-clipping": True, "noise-multiplier": 0.3},
    "dp-ftrl": {"mechanism": "dp-ftrl"},
}
EACH = pytest.mark.parametrize("kind", KINDS)


def everywhere(value: float):
    return lambda client, spec: np.full(spec.size, value, spec.dtype)


# -- clients that fail, and clients that lie -----------------------------------------------------------------------


def unclipped(request, spec):
    vector = np.zeros(spec.size, spec.dtype)
    vector[0] = 1000.0
    return vector, {}


def moves_a_buffer(request, spec):
    vector = np.zeros(spec.size, spec.dtype)
    vector[spec.slices["seen"]] = 1e-3
    return vector, {}


def moves_a_frozen_place(request, spec):
    vector = np.zeros(spec.size, spec.dtype)
    vector[spec.slices["frozen"]] = 1e-3
    return vector, {}


def not_a_number(request, spec):
    return np.full(spec.size, np.nan, spec.dtype), {}


def tells_its_loss(request, spec):
    return np.zeros(spec.size, spec.dtype), {"loss": 0.5}


def tells_its_count(request, spec):
    return np.zeros(spec.size, spec.dtype), {"num-examples": 12}


LIES = [
    (unclipped, "not-clipped"),
    (moves_a_buffer, "bad-reply"),
    (moves_a_frozen_place, "bad-reply"),
    (not_a_number, "not-finite"),
    (tells_its_loss, "bad-reply"),
    (tells_its_count, "bad-reply"),
]


@pytest.mark.parametrize(("lie", "code"), LIES, ids=[lie.__name__ for lie, _ in LIES])
def test_a_client_that_lies_is_named_and_counts_like_one_that_is_silent(begin, lie, code):
    lying = begin("lying", lies={2: lie})
    silent = begin("silent", silent=lambda client, number: client == 2)
    assert lying.federation.run().server.params.tobytes() == silent.federation.run().server.params.tobytes()
    assert [line["failures"] for line in lying.folder.metrics()] == [{"2": code}] * 3
    assert [each.queries for each in lying.releases()] == [each.queries for each in silent.releases()]


@EACH
@pytest.mark.parametrize("value", [3e38, math.nan, math.inf, 1e-45, 0.0])
def test_a_client_whose_training_went_wrong_moves_the_model_by_at_most_the_clip(begin, kind, value):
    """One of six, clipped to 1 and divided by the cohort; the others and the noise are the same."""
    wrong = begin("wrong", privacy=KINDS[kind], rounds=1, learned=everywhere(value))
    nobody = begin("nobody", privacy=KINDS[kind], rounds=1, silent=lambda client, number: number < 9 and client > 0)
    moved = wrong.federation.run().server.params - nobody.federation.run().server.params
    assert np.linalg.norm(moved) <= 6 * 1.0 / 6 + 0.01
    assert [line["failures"] for line in wrong.folder.metrics()] == [{}]


@EACH
def test_dropouts_discard_no_round_and_change_neither_noise_nor_denominator(begin, kind):
    """Every other client is gone in odd rounds: the sum is smaller, and nothing else."""
    options = {"privacy": KINDS[kind], "rounds": 1 if kind == "adaptive" else 4}  # the next bound follows who answers
    whole = begin("whole", learned=everywhere(0.125), **options)
    broken = begin(
        "broken", learned=everywhere(0.125), silent=lambda client, n: client % 2 == 0 and n % 2 == 1, **options
    )
    moved = whole.federation.run().server.params - broken.federation.run().server.params
    gone = sum(len(line["failures"]) for line in broken.folder.metrics())
    assert gone > 0
    assert {line["attempt"] for line in broken.folder.metrics()} == {1}
    np.testing.assert_allclose(moved[:3], gone * 0.125 / 6, rtol=1e-5)
    np.testing.assert_array_equal(moved[3:], 0)  # what is frozen, and a buffer

    def said(run):
        return [(each.queries, each.sampling, each.matrix and each.matrix.row) for each in run.releases()]

    assert said(whole) == said(broken)


@pytest.mark.parametrize("respondents", [0, 1, 3])
def test_no_round_is_tried_again_however_few_answer(begin, respondents):
    run = begin(silent=lambda client, number: client >= respondents and number == 2, min_respondents=6)
    run.federation.run()
    assert [(line["respondents"], line["attempt"]) for line in run.folder.metrics()][1] == (respondents, 1)
    assert len(run.releases()) == 3


def test_clients_that_never_answer_end_the_run_after_a_few_rounds_each_of_them_recorded(begin):
    run = begin(rounds=9, round_tries=3, silent=lambda client, number: number >= 3)
    with pytest.raises(RoundFailedError, match="no client answered in 3 rounds in a row"):
        run.federation.run()
    assert [each.round_number for each in run.releases()] == [1, 2, 3, 4]
    assert run.folder.load_state().round_number == 4


# -- an empty cohort -----------------------------------------------------------------------------------------------


def test_an_empty_poisson_cohort_is_a_round_like_any_other_and_nobody_is_asked(begin):
    run = begin(clients=4, cohort=1, rounds=12, round_tries=1)
    run.federation.run()
    lines, asked = run.folder.metrics(), [request.plan.round_number for request in run.twin.asked]
    empty = [line["round"] for line in lines if line["cohort"] == 0]
    assert 0 < len(empty) < 12
    assert not set(empty) & set(asked)
    releases = run.releases()
    assert [each.round_number for each in releases] == list(range(1, 13))
    assert len({json.dumps({**each.to_body(), "round-number": 0, "evidence": 0}) for each in releases}) == 1
    assert [each.evidence["model-before"] != each.evidence["model-after"] for each in releases] == [True] * 12


def test_the_ledger_commits_to_the_cohort_without_telling_it(begin):
    run = begin(clients=4, cohort=1, rounds=6)
    run.federation.run()
    for line, release in zip(run.folder.metrics(), run.releases(), strict=True):
        realised = Realised(cohort=line["cohort"], respondents=line["respondents"], salt=line["realised_salt"])
        assert release.evidence["realised"] == realised.commitment
    assert "salt" not in (run.folder.path / "ledger.jsonl").read_text()


# -- separation ----------------------------------------------------------------------------------------------------


class StoppedHereError(Exception):
    """Ends a run between two rounds."""


class Stopping(SilentObserver):
    """Stops after these rounds, once each."""

    def __init__(self, *rounds: int) -> None:
        self.rounds = set(rounds)

    def finished_round(self, line):
        if line["round"] in self.rounds:
            self.rounds.remove(line["round"])
            raise StoppedHereError


def test_under_dp_ftrl_a_client_rests_as_long_as_promised_over_stops_and_absences(begin):
    """Asked for again in too few rounds, a client would move the sum of the rounds by more than their sensitivity."""
    options = {"clients": 13, "cohort": 3, "rounds": 40, "privacy": {"mechanism": "dp-ftrl"}}
    stopping, asked, stops = Stopping(7, 8, 23), [], 0

    def go_on():
        run = begin(observer=stopping, silent=lambda client, number: (client * number) % 3 == 0, **options)
        run.twin.watch = lambda requests: setattr(run.twin, "count", 9 + (len(run.twin.asked) % 5))
        try:
            run.federation.run()
        finally:
            asked.extend((request.client, request.plan.round_number) for request in run.twin.asked)
        return run

    while True:
        try:
            run = go_on()
        except StoppedHereError:
            stops += 1
        else:
            break
    assert stops == 3
    assert {each.matrix.min_separation for each in run.releases()} == {4}
    rounds: dict[int, list[int]] = {}
    for client, number in asked:
        rounds.setdefault(client, []).append(number)
    gaps = [later - earlier for each in rounds.values() for earlier, later in pairwise(each)]
    assert min(gaps) == 4
    assert len(asked) > 80
    assert math.isfinite(epsilon(releases_of(run.events()), 1e-3))


# -- what leaves a client ------------------------------------------------------------------------------------------


def test_no_training_loss_is_known_anywhere(begin):
    run = begin()
    run.federation.run()
    assert [line["train_loss"] for line in run.folder.metrics()] == [None] * 3


COUNTED = """
import torch
from torch import nn
from fedlearn.learning import Examples, Pool, Task


class Counted(Task):
    metric_names = ("accuracy",)

    def build_model(self):
        return nn.Linear(2, 1)

    def loss(self, output, target):
        return (output[:, 0] - target) ** 2 * 0.4321

    def metrics(self, output, target):
        return {"accuracy": (output[:, 0] > target).float()}

    def load_pool(self, path):
        torch.manual_seed(0)
        groups = torch.arange(6).repeat_interleave(11)
        train = Examples(torch.randn(66, 2), torch.randn(66), groups=groups.numpy())
        return Pool(train, train)
"""


@pytest.fixture
def replies(tmp_path, monkeypatch):
    """Return a function that simulates and returns every record that any client sent, with its whole bytes."""
    monkeypatch.setattr("fedlearn.federation.summary.draw_history", lambda *_, **__: "<svg/>")
    path = tmp_path / "counted.py"
    path.write_text(COUNTED)
    names = iter(range(9))

    def call(privacy, *, training=None, workers=0, **federation):
        sent = []
        original = LocalGrid.send_and_receive

        def send_and_receive(self, messages, *, timeout=None):
            for reply in original(self, messages, timeout=timeout):
                if not reply.has_error() and "client" not in reply.content:
                    sent.append(reply)
                yield reply

        tables = {
            "task": str(path),
            "federation": {"clients": 6, "rounds": 2, "sampling": "fixed-size", **federation},
            "training": training or {},
            "data": {"partition": "natural"},
            "privacy": {"unit": "client", "noise-multiplier": 1.0, **privacy},
            "simulation": {"workers": workers, "trainer": "sequential"},
        }
        tables["federation"] = {key.replace("_", "-"): value for key, value in tables["federation"].items()}
        folder = RunFolder.create(tmp_path / str(next(names)), RunConfig.from_mapping(tables))
        with monkeypatch.context() as patch:
            patch.setattr(LocalGrid, "send_and_receive", send_and_receive)
            simulate(folder)
        return sent, folder

    return call


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("adaptive", [False, True])
def test_of_a_client_only_its_clipped_update_crosses_the_grid(replies, adaptive, workers):
    privacy = {"adaptive-clipping": True, "noise-multiplier": 0.3} if adaptive else {}
    sent, folder = replies(privacy, workers=workers)
    assert len(sent) == 12
    expected = reply_numbers(folder.config)
    assert expected == ({"within-bound"} if adaptive else set())
    for reply in sent:
        assert set(reply.content) == {"update", *(["metrics"] if adaptive else [])}
        assert set(reply.content["update"]) == {"update"}
        assert set(dict(reply.content.get("metrics", {}))) == expected
        assert np.linalg.norm(reply.content["update"]["update"].numpy()) <= 1.0 + 1e-6
    assert len({sum(record.count_bytes() for record in reply.content.values()) for reply in sent}) == 1


def test_weighted_by_examples_the_number_itself_is_in_no_byte_of_any_reply(replies, monkeypatch):
    """11 examples under a cap of 44: the update is a quarter of its clip, and 11 is nowhere."""
    training = {"weighting": "examples", "max-examples": 44, "learning-rate": 5.0}
    sent, _ = replies({}, training=training)
    uniform, _ = replies({}, training={"learning-rate": 5.0})
    for mine, other in zip(sent[:6], uniform[:6], strict=True):
        vector, unweighted = (each.content["update"]["update"].numpy() for each in (mine, other))
        np.testing.assert_allclose(vector, unweighted / 4, rtol=1e-6)
        assert np.linalg.norm(vector) == pytest.approx(0.25, rel=1e-6)
        assert list(mine.content) == ["update"]
        array = mine.content["update"]["update"]
        header = array.data[: len(array.data) - vector.nbytes]
        assert header == other.content["update"]["update"].data[: len(header)]
        assert (array.dtype, array.shape, array.stype) == ("float32", (3,), "numpy.ndarray")


def test_federated_evaluation_is_off_unless_asked_for(begin, replies):
    run = begin(evaluation="auto")
    run.federation.run()
    assert {request.kind for request in run.twin.asked} == {"train"}
    assert {event.kind for event in run.events()} == {"run.policy", "round.release", "run.close"}
    sent, _ = replies({}, evaluation="auto")
    assert all("update" in reply.content for reply in sent)


def test_a_federated_evaluation_is_clipped_noised_and_accounted(replies):
    """Two metrics of the task: only the one in ``metric_names`` leaves, as a mean; the ledger has each evaluation."""
    sent, folder = replies({}, evaluation="federated")
    measured = [reply for reply in sent if "update" not in reply.content]
    assert len(measured) == 12
    for reply in measured:
        assert set(reply.content) == {"metrics"}
        assert set(dict(reply.content["metrics"])) == {"accuracy"}
        assert 0 <= reply.content["metrics"]["accuracy"] <= 1
    events = read_events(folder.path / "ledger.jsonl")
    kinds = [event.kind for event in events]
    assert kinds == ["run.policy", *["round.release", "eval.release"] * 2, "run.close"]
    delta = float(events[0].body["delta"])
    stated = folder.summary()["privacy"]["epsilon"]
    without = [event.release() for event in events if event.kind == "round.release"]
    assert stated == epsilon(releases_of(events), delta)
    assert stated > epsilon(without, delta) * 1.01


def test_a_client_that_claims_a_metric_beyond_its_range_is_left_out_of_the_evaluation(begin):
    def claims(client):
        return {"accuracy": 1e6 if client == 1 else 0.5}

    run = begin(clients=600, cohort=600, rounds=1, evaluation="federated", scores=claims, sampling="fixed-size")
    run.federation.run()
    (line,) = run.folder.metrics()
    assert line["evaluation_failures"] == {"1": "bad-reply"}
    assert line["metrics"]["accuracy"] == pytest.approx(0.5, abs=0.05)


def test_a_client_that_measures_something_else_is_left_out(begin):
    def claims(client):
        return {"accuracy": 0.5, **({"loss": 0.1} if client == 1 else {})}

    run = begin(rounds=1, evaluation="federated", scores=claims)
    run.federation.run()
    assert run.folder.metrics()[0]["evaluation_failures"] == {"1": "bad-reply"}


def test_a_task_without_metric_names_is_refused_before_anything_is_spent(begin, tmp_path, unscored):
    with pytest.raises(TaskError, match="metric_names"):
        begin(task=unscored, evaluation="federated").federation.run()
    assert not (tmp_path / "run" / "ledger.jsonl").exists()


# -- the noise that is really drawn --------------------------------------------------------------------------------

FLAT = """
import torch
from torch import nn
from fedlearn.learning import Examples, Pool, Task


class Flat(Task):
    def build_model(self):
        return nn.Linear(1000, 50)

    def loss(self, output, target):
        return output.sum(dim=1) * 0

    def load_pool(self, path):
        return Pool(Examples(torch.zeros(16, 1000), torch.zeros(16)))
"""

ROUNDS = 21
Z = 4.892  # a two-sided chance of 10^-6


class Watching(SilentObserver):
    """Keeps θ after every round, in float64."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder, self.seen = folder, []

    def finished_round(self, line):
        self.seen.append(self.folder.load_state().server.params)


@pytest.mark.parametrize("kind", KINDS)
def test_over_a_million_numbers_a_whole_run_draws_the_noise_that_its_ledger_states(tmp_path, monkeypatch, kind):
    """Clients with a zero gradient: what moves θ is noise, whitened by the ledger's own matrix."""
    monkeypatch.setattr("fedlearn.federation.summary.draw_history", lambda *_, **__: "<svg/>")
    (tmp_path / "flat.py").write_text(FLAT)
    cohort = 4
    tables = {
        "task": str(tmp_path / "flat.py"),
        "federation": {"clients": 16, "cohort": cohort, "rounds": ROUNDS, "evaluation": "off"},
        "training": {"local-steps": 1},
        "data": {"partition": "iid"},
        "privacy": {"unit": "client", "bound-l2": 0.3, "amplification": "none", "noise-multiplier": 1.5, **KINDS[kind]},
    }
    folder = RunFolder.create(tmp_path / "run", RunConfig.from_mapping(tables))
    watching = Watching(folder)
    simulate(folder, watching)
    releases = [e.release() for e in read_events(folder.path / "ledger.jsonl") if e.kind == "round.release"]
    seen = np.array(watching.seen)
    noise = np.diff(seen, axis=0) * cohort  # of rounds 2 to the end
    coefficients = releases[0].matrix.coefficients if releases[0].matrix else (1.0,)
    assert (len(coefficients) > 1) == (kind == "dp-ftrl")
    drawn = []
    for row in range(len(coefficients) - 1, len(noise)):
        whitened = sum(c * noise[row - age] for age, c in enumerate(coefficients))
        drawn.append(whitened / releases[row + 1].queries[0].stddev)
    samples = np.array(drawn)
    count = samples.size
    assert count >= (1_000_000 if kind != "dp-ftrl" else 850_000)
    assert abs(float((samples**2).sum()) - count) < Z * math.sqrt(2 * count)
    assert abs(float(samples.sum())) < Z * math.sqrt(count)
    for row in range(len(samples)):  # every round by itself, whatever its clipping norm
        assert abs(float((samples[row] ** 2).mean()) - 1) < 6 * math.sqrt(2 / samples.shape[1])
    covariance = samples @ samples.T / samples.shape[1]
    off = covariance[~np.eye(len(samples), dtype=bool)]
    assert np.abs(off).max() < 6 / math.sqrt(samples.shape[1])  # rounds are independent
    if kind == "dp-ftrl":  # and before whitening they are not
        raw = noise / releases[0].queries[0].stddev
        between = (raw[5:] * raw[4:-1]).mean()
        assert between < -0.1
    if kind == "adaptive":
        assert len({each.queries[0].sensitivity_l2 for each in releases}) > 10


# -- nothing else steers the model ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_workers_change_nothing(tmp_path, monkeypatch, kind):
    monkeypatch.setattr("fedlearn.federation.summary.draw_history", lambda *_, **__: "<svg/>")
    models = set()
    for workers in (0, 1, 2):
        tables = {
            "task": "digits-mlp",
            "federation": {"clients": 8, "cohort": 4, "rounds": 3, "evaluation": "both"},
            "privacy": {"unit": "client", "amplification": "none", "noise-multiplier": 1.0, **KINDS[kind]},
            "training": {"local-steps": 2},
            "simulation": {"workers": workers},
            "faults": {"drop": 0.2},
        }
        folder = RunFolder.create(tmp_path / str(workers), RunConfig.from_mapping(tables))
        summary = simulate(folder)
        cohorts = [(line["cohort"], line["respondents"]) for line in folder.metrics()]
        models.add((summary["model_sha256"], summary["privacy"]["epsilon"], json.dumps(cohorts)))
    assert len(models) == 1


# -- real and simulated --------------------------------------------------------------------------------------------


def test_a_simulations_ledger_says_so_and_a_real_runs_noise_is_nobodys_to_draw_again(tmp_path, monkeypatch):
    """The same scenario and seed: on a grid that is no simulation the noise is the operating system's."""
    monkeypatch.setattr("fedlearn.federation.summary.draw_history", lambda *_, **__: "<svg/>")
    tables = {
        "task": "digits-mlp",
        "federation": {"clients": 6, "cohort": 3, "rounds": 2, "evaluation": "off"},
        "training": {"local-steps": 1},
        "privacy": {"unit": "client", "noise-multiplier": 1.0, "amplification": "none"},
    }

    def go(name, *, real):
        folder = RunFolder.create(tmp_path / name, RunConfig.from_mapping(tables))
        if real:
            with LocalGrid(build_client_app(), clients=6) as grid:
                grid.serve(build_server_app(), {"resume": str(folder.path)})
        else:
            simulate(folder)
        events = read_events(folder.path / "ledger.jsonl")
        said = {events[0].body["simulated"], *(each.simulated for each in releases_of(events))}
        assert said == {not real} == {folder.summary()["privacy"]["simulated"]}
        return folder.summary()["model_sha256"]

    assert go("a", real=False) == go("b", real=False)
    assert len({go("c", real=True), go("d", real=True), go("e", real=False)}) == 3
