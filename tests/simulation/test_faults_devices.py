"""Devices on a simulated clock: how long they take, who of them is there, and that nobody really waits."""

from __future__ import annotations

import time

import numpy as np
import pytest

from fedlearn.cli.simulate import _simulated
from fedlearn.config import FaultsConfig, RunConfig, TrainingConfig
from fedlearn.errors import TooFewClientsError
from fedlearn.federation.run_folder import RunFolder
from fedlearn.flower.faults import SimulatedClock
from fedlearn.simulation.availability import Nightly, share_at
from fedlearn.simulation.devices import PROFILES, SeededDevices, uniform, worked_examples
from fedlearn.simulation.engine import simulate
from fedlearn.sources import SeedTree

SEEDS = SeedTree.root(0)
MANY = 4000


def devices(size: int = 20, model_bytes: int = 400_000, deadline_s: float = 600.0, **keys) -> SeededDevices:
    """Return devices of a ``[faults]`` table, by Python names."""
    return SeededDevices(
        FaultsConfig(**keys),
        SEEDS,
        training=TrainingConfig(local_epochs=2),
        model_bytes=model_bytes,
        deadline_s=deadline_s,
        size_of=lambda client, purpose: size if purpose == "train" else 3 * size,
        clients=MANY,
        cohort=MANY,
    )


def took_s(
    subject: SeededDevices, kind: str = "train", client: int = 7, up: int = 400_000, down: int = 400_000
) -> float:
    return subject.duration_s("1.1", client, kind, download_bytes=down, upload_bytes=up)


# -- how long a client takes ---------------------------------------------------------------------------------------


def test_a_client_takes_what_its_link_and_its_speed_need() -> None:
    subject = devices(devices="phones")
    device = subject.device(7)
    link_s = 400_000 / device.downlink_bytes_per_s + 400_000 / device.uplink_bytes_per_s
    assert took_s(subject) == pytest.approx(40 / device.examples_per_s + link_s)  # 20 examples, twice
    assert took_s(subject, "train.mask") == took_s(subject)
    assert took_s(subject, "train.share") == pytest.approx(link_s)
    received_s = 400_000 / device.downlink_bytes_per_s
    assert took_s(subject, "evaluate", up=0) == pytest.approx(60 / 3 / device.examples_per_s + received_s)
    assert took_s(subject, "query.identify") == 0.0
    assert took_s(devices()) == 0.0


def test_passes_over_the_data_count_as_they_are_made() -> None:
    for training, expected in (
        (TrainingConfig(local_epochs=3), 60),
        (TrainingConfig(local_steps=3, batch_size=8), 24),
        (TrainingConfig(local_steps=3, batch_size=64), 60),
        (TrainingConfig(local_steps=3, batch_size=0), 60),
    ):
        assert worked_examples(20, training) == expected


@pytest.mark.parametrize("profile", sorted(PROFILES))
def test_a_profile_has_the_medians_it_says(profile) -> None:
    assert sum(tier.share for tier in PROFILES[profile]) == pytest.approx(1.0)
    subject = devices(devices=profile, examples_per_s=50.0)
    drawn = [subject.device(client) for client in range(MANY)]
    assert drawn == [devices(devices=profile, examples_per_s=50.0).device(client) for client in range(MANY)]
    if len(PROFILES[profile]) > 1:
        return
    (tier,) = PROFILES[profile]
    for name, median in (
        ("examples_per_s", 50.0 * tier.speed),
        ("downlink_bytes_per_s", tier.downlink_bytes_per_s),
        ("uplink_bytes_per_s", tier.uplink_bytes_per_s),
    ):
        logs = np.log([getattr(each, name) for each in drawn])
        assert np.median(logs) == pytest.approx(np.log(median), abs=0.05)
        assert np.std(logs) == pytest.approx(tier.spread, abs=0.03)


def test_of_phones_nine_in_ten_are_within_a_factor_of_ten() -> None:
    subject = devices(devices="phones")
    low, high = np.quantile([subject.device(client).examples_per_s for client in range(MANY)], [0.05, 0.95])
    assert high / low == pytest.approx(10, rel=0.12)


def test_a_mixed_population_has_as_many_of_each_as_it_says() -> None:
    subject = devices(devices="mixed")
    links = [subject.device(client).uplink_bytes_per_s for client in range(MANY)]
    assert np.mean([link == 125e6 for link in links]) == pytest.approx(0.1, abs=0.02)


def test_a_delay_is_drawn_as_often_as_asked_and_who_is_late_is_known_before_it_trains() -> None:
    subject = devices(delay=0.3, delay_s=601.0)
    late = [subject.is_late(f"{number}.1", client, "train") for number in range(50) for client in range(40)]
    assert np.mean(late) == pytest.approx(0.3, abs=0.04)
    assert not any(devices(delay=0.3, delay_s=599.0).is_late("1.1", client, "train") for client in range(100))
    assert {took_s(subject, client=client) for client in range(100)} == {0.0, 601.0}
    slow = devices(devices="phones", examples_per_s=0.1, deadline_s=400.0)  # a median phone takes 400 s and its link
    assert 0.4 < np.mean([slow.is_late("1.1", client, "train") for client in range(1000)]) < 0.6


def test_a_number_is_uniform() -> None:
    drawn = [uniform(SEEDS, number) for number in range(MANY)]
    assert np.histogram(drawn, 10, (0, 1))[0] == pytest.approx(np.full(10, MANY / 10), rel=0.2)


# -- who is there --------------------------------------------------------------------------------------------------


def rhythm(clients: int = MANY, cohort: int = 1, zones: int = 1, start: float = 0.0) -> tuple[Nightly, SimulatedClock]:
    clock = SimulatedClock()
    return Nightly(SEEDS, clock, clients=clients, cohort=cohort, time_zones=zones, start_hour=start), clock


def test_clients_come_and_go_with_the_hour() -> None:
    subject, _ = rhythm()
    shares = [len(subject.at(hour)) / MANY for hour in range(48)]
    assert shares == pytest.approx([share_at(hour % 24) for hour in range(48)], abs=0.03)
    assert max(shares) / min(shares) == pytest.approx(4, rel=0.15)
    later, _ = rhythm(start=5.0)
    assert len(later.at(21)) / MANY == pytest.approx(0.8, abs=0.03)  # two o'clock


def test_over_all_time_zones_there_is_no_night() -> None:
    subject, _ = rhythm(zones=24)
    assert [len(subject.at(hour)) / MANY for hour in range(24)] == pytest.approx(np.full(24, 0.5), abs=0.03)


def test_who_is_there_is_the_same_whenever_it_is_asked() -> None:
    one, _ = rhythm()
    other, _ = rhythm()
    hours = [one.at(hour) for hour in range(6)]
    assert hours == [other.at(hour) for hour in reversed(range(6))][::-1]
    assert all(list(there) == sorted(set(there)) for there in hours)


def test_where_too_few_are_there_the_simulated_clock_waits_and_nobody_else() -> None:
    subject, clock = rhythm(cohort=int(0.7 * MANY), start=10.0)
    begun = time.monotonic()
    there = subject.present()
    assert len(there) >= 0.7 * MANY
    assert clock.monotonic() in [hour * 3600.0 for hour in range(12, 16)]  # from 22 to 2 o'clock
    assert subject.present() == there
    assert time.monotonic() - begun < 1.0


def test_where_there_are_never_enough_it_is_said_at_once() -> None:
    subject, clock = rhythm(clients=50, cohort=50)
    with pytest.raises(TooFewClientsError, match="cohort"):
        subject.present()
    assert clock.monotonic() == 0.0


def test_a_population_of_a_hundred_thousand_is_looked_through_in_no_time() -> None:
    subject, _ = rhythm(clients=100_000, cohort=1000, zones=4)
    begun = time.monotonic()
    for hour in range(10):
        assert 15_000 < len(subject.at(hour)) < 85_000
    assert time.monotonic() - begun < 1.0


# -- whole runs ----------------------------------------------------------------------------------------------------

SLOW = {
    "task": "regression",
    "federation": {"clients": 12, "cohort": 4, "rounds": 4, "min-respondents": 1, "evaluation": "federated"},
    "data": {"partition": "iid"},
    "training": {"local-steps": 1},
    "faults": {"devices": "mixed", "examples-per-s": 0.5, "availability": "nightly", "start-hour": 12, "delay": 0.2},
}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Return a function that simulates a federation on devices; it returns the folder."""
    monkeypatch.setattr("fedlearn.federation.summary.draw_history", lambda *_, **__: "<svg/>")  # the slowest part
    numbers = iter(range(100))

    def call(observer=None, **sections) -> RunFolder:
        merged = {
            name: {**value, **sections.pop(name, {})} if isinstance(value, dict) else value
            for name, value in SLOW.items()
        }
        folder = RunFolder.create(tmp_path / f"run-{next(numbers)}", RunConfig.from_mapping({**merged, **sections}))
        simulate(folder, observer)
        return folder

    return call


def timed(folder: RunFolder) -> list[tuple]:
    return [(line["simulated_s"], line["respondents"], line["failures"]) for line in folder.metrics()]


@pytest.mark.parametrize("options", [{"workers": 2}, {"trainer": "sequential"}])
def test_simulated_time_does_not_depend_on_who_does_the_work_nor_how(run, options) -> None:
    told = timed(run())
    assert told == timed(run(simulation=options))
    assert all(simulated_s > 1.0 for simulated_s, _, _ in told)


def test_a_round_takes_as_long_as_the_slowest_or_to_the_deadline_where_somebody_is_missing(run) -> None:
    faults = {"availability": "always", "delay": 0.5, "delay-s": 50, "devices": "none"}
    federation = {"clients": 4, "evaluation": "off"}
    assert {line[0] for line in timed(run(federation=federation, faults=faults))} <= {0.0, 50.0}
    late = timed(run(federation={**federation, "round-timeout-s": 40}, faults=faults))
    assert {code for _, _, failures in late for code in failures.values()} == {"no-reply"}
    assert all(simulated_s == (40.0 if failures else 0.0) for simulated_s, _, failures in late)
    lost = timed(run(federation=federation, faults={**faults, "drop": 0.3, "delay": 0.01}))
    assert {simulated_s for simulated_s, _, failures in lost if failures} == {600.0}


def test_a_run_without_simulated_time_says_nothing_of_it(run) -> None:
    folder = run(faults={"devices": "none", "availability": "always", "delay": 0, "drop": 0.1})
    assert not any("simulated_s" in line for line in folder.metrics())
    assert _simulated(folder, folder.metrics()) == []


def test_the_table_of_a_run_says_how_long_it_would_have_taken_and_who_attacked(run) -> None:
    faults = {"availability": "always", "delay": 0, "drop": 0.2, "byzantine": 0.25, "devices": "phones"}
    folder = run(faults=faults, federation={"round-timeout-s": 90, "rounds": 2, "cohort": 12, "evaluation": "off"})
    assert _simulated(folder, folder.metrics()) == [
        ("simulated time", "3 min 0 s, the longest round 1 min 30 s"),
        ("byzantine", "3 clients, sign-flip"),
    ]


class Stopping:
    """Stops a run in the round after some, when its clients have begun to train, or to measure."""

    def __init__(self, after: int, measuring: bool) -> None:
        self.after, self.answers = after, 4 + 1 if measuring else 1

    def replied(self, round_number: int, done: int, total: int) -> None:
        if round_number == self.after + 1:
            self.answers -= 1
            if not self.answers:
                raise KeyboardInterrupt

    def finished_round(self, line) -> None:
        pass


@pytest.mark.parametrize("measuring", [False, True])
@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_run_that_is_resumed_goes_on_at_the_hour_it_had_come_to(run, tmp_path, after, measuring) -> None:
    one_by_one = {"trainer": "sequential"}
    whole = run(simulation=one_by_one)
    with pytest.raises(KeyboardInterrupt):
        run(Stopping(after, measuring), simulation=one_by_one)
    folder = RunFolder.open(tmp_path / "run-1")
    assert simulate(folder)["model_sha256"] == whole.summary()["model_sha256"]
    assert timed(folder) == timed(whole)


def test_under_secure_aggregation_every_leg_takes_its_time(run) -> None:
    faults = {"availability": "always", "delay": 0, "devices": "phones"}
    federation = {"clients": 5, "cohort": 5, "rounds": 1, "evaluation": "off"}
    (plain,), (masked,) = (
        timed(run(faults=faults, federation=federation, secagg={"mode": mode})) for mode in ("off", "active")
    )
    assert masked[1:] == (5, {}) == plain[1:]
    assert masked[0] > plain[0] > 0.0


def test_all_of_a_population_that_is_never_there_at_once_ends_the_run_at_once(run) -> None:
    begun = time.monotonic()
    with pytest.raises(TooFewClientsError, match="simulated week"):
        run(federation={"clients": 60, "cohort": 60})
    assert time.monotonic() - begun < 5.0
