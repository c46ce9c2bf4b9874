"""Several who watch, as one."""

from __future__ import annotations

from fedlearn.federation.observer import Observers, SilentObserver


class Listening:
    def __init__(self, name, heard):
        self.name, self.heard = name, heard

    def replied(self, round_number, done, total):
        self.heard.append((self.name, round_number, done, total))

    def finished_round(self, line):
        self.heard.append((self.name, line["round"]))


def test_each_is_told_in_the_order_given():
    heard = []
    watching = Observers(Listening("a", heard), SilentObserver(), Listening("b", heard))
    watching.replied(1, 64, 100)
    watching.finished_round({"round": 1})
    assert heard == [("a", 1, 64, 100), ("b", 1, 64, 100), ("a", 1), ("b", 1)]


def test_nobody_may_watch():
    Observers().replied(1, 1, 1)
    Observers().finished_round({})
