"""Chance and time: the same path, the same stream; another path, another stream; no waiting in tests."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
from hypothesis import assume, given
from hypothesis import strategies as st

from fedlearn.sources import ManualClock, SecureRandom, SeedTree, SystemClock

PATHS = st.lists(st.one_of(st.integers(-9, 99), st.text(max_size=4)), max_size=3)


@given(st.integers(0, 2**70), PATHS)
def test_the_same_path_gives_the_same_stream_whenever_it_is_asked(seed, path):
    node = SeedTree.root(seed).child(*path)
    first = node.generator().random(3)
    node.generator().random(100)
    node.child("other").generator().random()
    np.testing.assert_array_equal(SeedTree.root(seed).child(*path).generator().random(3), first)
    assert 0 <= node.integer() < 2**63


@given(PATHS, PATHS)
def test_different_paths_are_never_confused(one, other):
    assume([(type(p), p) for p in one] != [(type(p), p) for p in other])
    assert SeedTree.root(0).child("x", *one) != SeedTree.root(0).child("x", *other)


def test_parts_do_not_run_together_and_a_number_is_not_its_text():
    root = SeedTree.root(1)
    digests = {
        root.child(*path).digest for path in [("ab", "c"), ("a", "bc"), ("abc",), (1, 2), (12,), ("1", 2), ("12",)]
    }
    assert len(digests) == 7
    assert SeedTree.root(1) != SeedTree.root(2)


def test_streams_of_neighbours_are_not_correlated():
    streams = np.stack([SeedTree.root(0).child("client", n).generator().normal(size=2000) for n in range(8)])
    correlations = np.corrcoef(streams) - np.eye(8)
    assert np.abs(correlations).max() < 0.1


def test_another_process_draws_the_same():
    code = "from fedlearn.sources import SeedTree; print(SeedTree.root(7).child('round', 3).integer())"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert int(said.stdout) == SeedTree.root(7).child("round", 3).integer()


def test_secure_random_takes_no_seed_and_does_not_repeat():
    random = SecureRandom()
    assert len({random.token_bytes(16) for _ in range(100)}) == 100
    assert {random.below(3) for _ in range(200)} == {0, 1, 2}
    assert not isinstance(random, SeedTree)
    assert not hasattr(random, "seed")


@given(st.lists(st.floats(0, 1e6), max_size=5))
def test_on_a_manual_clock_time_passes_only_when_somebody_sleeps(naps):
    clock, passed = ManualClock(), 0.0
    for nap in naps:
        clock.sleep(nap)
        passed += nap
        assert clock.monotonic() == clock.monotonic() == passed


def test_the_system_clock_does_not_go_back():
    clock = SystemClock()
    before = clock.monotonic()
    clock.sleep(0.001)
    assert clock.monotonic() >= before + 0.001
