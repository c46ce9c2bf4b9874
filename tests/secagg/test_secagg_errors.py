"""The tree that is drawn at the top of the module is the tree there is."""

from __future__ import annotations

import pytest

from fedlearn.errors import FedlearnError
from fedlearn.secagg import errors
from fedlearn.secagg.errors import RoundAbortedError, SecaggError, ShareReconstructionError


def drawn() -> dict[str, str]:
    """Return the parent of each class as the docstring draws it."""
    assert errors.__doc__ is not None
    parents, open_ = {}, {0: "SecaggError"}
    for line in errors.__doc__.splitlines():
        at = max(line.find("├── "), line.find("└── "))
        if at < 0:
            continue
        depth = (at - 4) // 4 + 1
        name = line[at + 4 :].split()[0]
        parents[name] = open_[depth - 1]
        open_[depth] = name
    return parents


def there() -> dict[str, str]:
    """Return the parent of each class that is defined."""
    found, waiting = {}, [SecaggError]
    while waiting:
        parent = waiting.pop()
        for child in parent.__subclasses__():
            found[child.__name__] = parent.__name__
            waiting.append(child)
    return found


def test_the_tree_is_the_one_that_is_drawn():
    assert drawn() == there()
    assert SecaggError.__bases__ == (FedlearnError,)


def test_all_of_it_is_public():
    assert errors.__all__ == sorted(["SecaggError", *there()])
    assert all(getattr(errors, name).__doc__ for name in errors.__all__)


def test_a_wrong_secret_says_whose_and_by_whom():
    error = ShareReconstructionError(3, "client 5 sent a wrong share", holder=5)
    assert (error.owner, error.holder, error.reason) == (3, 5, "client 5 sent a wrong share")
    assert str(error) == "client 3: client 5 sent a wrong share"
    assert ShareReconstructionError(3, "unknown").holder is None


def test_an_aborted_round_says_where_and_how_many():
    counts = {"invited": 7, "advertised": 4, "needed": 5}
    error = RoundAbortedError("advertise", counts, "too few")
    counts.clear()
    assert (error.phase, error.counts, error.reason) == (
        "advertise",
        {"invited": 7, "advertised": 4, "needed": 5},
        "too few",
    )
    assert str(error) == "aborted in advertise: too few (invited 7, advertised 4, needed 5)"


@pytest.mark.parametrize("name", errors.__all__)
def test_every_one_is_a_failed_run_to_the_command_line(name):
    assert getattr(errors, name).exit_code == 1
