"""Where the time goes: every second counted once, whoever is interrupted, and next to nothing while nobody asks."""

from __future__ import annotations

import threading
import timeit
from collections.abc import Iterator

import pytest

from fedlearn import profiling
from fedlearn.profiling import Spent, span, spanned


class Still:
    """A clock that stands still until it is told."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture(autouse=True)
def _off() -> Iterator[None]:
    profiling.stop()
    yield
    profiling.stop()


def test_inner_time_is_not_counted_twice() -> None:
    clock = Still()
    profiling.start(now=clock)
    clock.now_s = 1.0  # nobody's
    with span("outer"):
        clock.now_s = 3.0
        for end in (10.0, 20.0):
            with span("inner"):
                clock.now_s = end
        with span("outer"):
            clock.now_s = 21.0
        clock.now_s = 22.5
    clock.now_s = 30.0
    profile = profiling.stop()
    assert profile.here == {"outer": Spent(4.5, 2), "inner": Spent(17.0, 2)}
    assert profile.wall_s == 30.0
    assert profile.workers == ()


def test_nothing_is_recorded_while_nobody_asks() -> None:
    with span("train"):
        assert not profiling.is_on()
    profiling.merge(0, {"train": Spent(1.0, 1)})
    assert profiling.take() is None
    assert profiling.stop().here == {}
    profiling.start()
    assert profiling.is_on()
    assert profiling.stop().here == {}


def test_an_exception_closes_its_spans_and_those_torn_within() -> None:
    clock = Still()
    profiling.start(now=clock)
    with pytest.raises(ZeroDivisionError), span("outer"):
        span("torn").__enter__()  # an alarm came before it was closed
        clock.now_s = 2.0
        raise ZeroDivisionError
    clock.now_s = 5.0
    with span("after"):
        clock.now_s = 6.0
    assert profiling.stop().here == {"outer": Spent(0.0, 1), "torn": Spent(2.0, 1), "after": Spent(1.0, 1)}


def test_a_decorated_function_is_a_span_and_keeps_its_name() -> None:
    @spanned("sum")
    def add(a: int, b: int = 1) -> int:
        """Add."""
        return a + b

    assert (add(2, b=3), add.__name__, add.__doc__) == (5, "add", "Add.")
    profiling.start()
    add(1)
    assert profiling.stop().here["sum"].times == 1


def test_only_the_thread_that_records_is_recorded() -> None:
    profiling.start()
    with span("here"):
        thread = threading.Thread(target=lambda: span("there").__enter__())
        thread.start()
        thread.join()
    assert set(profiling.stop().here) == {"here"}


def test_what_workers_send_home_is_added_up_by_worker() -> None:
    profiling.start()
    profiling.merge(1, {"train": Spent(1.0, 2), "encode": Spent(0.5, 1)})
    profiling.merge(1, {"train": Spent(2.0, 1)})
    profiling.merge(1, None)
    assert profiling.stop().workers == ({}, {"train": Spent(3.0, 3), "encode": Spent(0.5, 1)})


def test_a_worker_begins_with_nothing_and_sends_each_second_once() -> None:
    clock = Still()
    profiling.start(now=clock)
    with span("rounds"):
        clock.now_s = 1.0
        profiling.forked()  # as in the worker, forked in the middle of a span of its parent
        with span("train"):
            clock.now_s = 3.0
        assert profiling.take() == {"train": Spent(2.0, 1)}
        clock.now_s = 9.0  # waits for work
        with span("train"):
            clock.now_s = 10.0
        assert profiling.take() == {"train": Spent(1.0, 1)}
        assert profiling.take() == {}


def test_a_span_is_cheap_while_nobody_records() -> None:
    """About 0.15 µs more than nothing on a quiet machine; held to ten times that, for those that are not."""

    def spanning() -> None:
        with span("train"):
            pass

    number = 20_000
    off_us = min(timeit.repeat(spanning, number=number, repeat=5)) / number * 1e6
    print(f"{off_us:.2f} µs a span, off")
    assert off_us < 1.5
