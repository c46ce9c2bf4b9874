"""From a scenario's name and numbers to an algorithm."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from fedlearn.algorithms import ALGORITHMS, FedAdam, FedProx, build_algorithm
from fedlearn.errors import ConfigError, MissingError, UsageError

OWN = """
from dataclasses import dataclass

from fedlearn.algorithms import Algorithm, check_update


@dataclass(frozen=True, kw_only=True)
class Own(Algorithm):
    fraction: float
    twice: bool = False
    steps: int = 1
    word: str = "none"

    def aggregate(self, state, mean_update):
        factor = self.fraction * self.steps * (2 if self.twice else 1)
        return state.advance(params=state.params + factor * check_update(state, mean_update))
"""


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(OWN)
    return str(path)


def _build(name, options=None, eta=None):
    return build_algorithm(name, server_learning_rate=eta, options=options or {})


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_built_in_name_takes_its_own_defaults(name):
    assert _build(name) == ALGORITHMS[name]()
    assert _build(name).server_learning_rate == (0.01 if name in ("fedadagrad", "fedadam", "fedyogi") else 1.0)


def test_numbers_reach_the_algorithm():
    assert _build("fedadam", {"beta1": 0, "tau": 0.1}, 0.5) == FedAdam(beta1=0.0, tau=0.1, server_learning_rate=0.5)
    assert _build("fedprox", {"proximal_mu": 1}) == FedProx(proximal_mu=1.0)


@pytest.mark.parametrize("name", ["krum", "Krum", "median", "multi_krum", "multikrum", "trimmed-mean", "bulyan"])
def test_a_rule_that_compares_single_updates_is_refused_with_the_reason(name):
    with pytest.raises(ConfigError, match=r"compares single updates.*sees no single one.*fedavg") as caught:
        _build(name)
    assert caught.value.key == "training.algorithm"


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(ConfigError, match="there is no algorithm 'FedAvgg'") as caught:
        _build("FedAvgg")
    assert (caught.value.key, caught.value.suggestion) == ("training.algorithm", "fedavg")


def test_an_unknown_option_gets_the_nearest():
    with pytest.raises(ConfigError, match="fedavgm has no such option; it has server-momentum") as caught:
        _build("fedavgm", {"sever_momentum": 0.5})
    assert (caught.value.key, caught.value.suggestion) == (
        "training.options.sever-momentum",
        "server-momentum",
    )


def test_an_option_of_another_algorithm_is_unknown():
    with pytest.raises(ConfigError, match="fedavg has no such option, nor any other") as caught:
        _build("fedavg", {"proximal_mu": 0.1})
    assert caught.value.suggestion is None


def test_the_server_learning_rate_is_no_option():
    with pytest.raises(ConfigError) as caught:
        _build("fedavg", {"server_learning_rate": 0.1})
    assert caught.value.suggestion == "training.server-learning-rate"


@pytest.mark.parametrize("value", ["0.5", True])
def test_an_option_of_the_wrong_type_is_refused(value):
    with pytest.raises(ConfigError, match="expected a number") as caught:
        _build("fedavgm", {"server_momentum": value})
    assert caught.value.key == "training.options.server-momentum"


def test_a_users_file(own):
    algorithm = _build(own, {"fraction": 1, "twice": True, "steps": 3})
    result = algorithm.aggregate(algorithm.init(np.zeros(1)), np.ones(1))
    assert (result.params.item(), algorithm.proximal_mu) == (6.0, 0.0)
    assert type(_build(f"{own}:Own", {"fraction": 1})) is type(algorithm)


@pytest.mark.parametrize(
    ("options", "key", "reason"),
    [
        ({}, "fraction", "Own needs a value for it"),
        ({"fraction": 1, "twice": 1}, "twice", "expected a boolean"),
        ({"fraction": 1, "steps": 1.5}, "steps", "expected an integer"),
        ({"fraction": 1, "steps": True}, "steps", "expected an integer"),
        ({"fraction": 1, "word": 3}, "word", "expected a string"),
        ({"fraction": 1, "step": 3}, "step", "Own has no such option"),
    ],
)
def test_a_users_options_are_checked(own, options, key, reason):
    with pytest.raises(ConfigError, match=reason) as caught:
        _build(own, options)
    assert caught.value.key == f"training.options.{key}"


def test_a_module_and_its_class():
    assert _build("fedlearn.algorithms.fedprox:FedProx") == FedProx()


def test_what_is_not_there_or_no_algorithm(tmp_path):
    with pytest.raises(MissingError, match="there is no file"):
        _build(str(tmp_path / "absent.py"))
    with pytest.raises(UsageError, match="it must subclass"):
        _build("fractions:Fraction")
    with pytest.raises(UsageError, match="unfinished: it does not define second_moment"):
        _build("fedlearn.algorithms.adaptive:Adaptive")


def test_importing_needs_neither_torch_nor_flower():
    code = "import sys, fedlearn.algorithms; print([m for m in ('torch', 'flwr', 'scipy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
