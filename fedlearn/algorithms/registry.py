"""Find an algorithm by the name a scenario gives it, and build it from the scenario's numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from types import MappingProxyType
from typing import Any

from fedlearn.algorithms.base import Algorithm
from fedlearn.algorithms.fedadagrad import FedAdagrad
from fedlearn.algorithms.fedadam import FedAdam
from fedlearn.algorithms.fedavg import FedAvg
from fedlearn.algorithms.fedavgm import FedAvgM
from fedlearn.algorithms.fedprox import FedProx
from fedlearn.algorithms.fedyogi import FedYogi
from fedlearn.config_reading import kebab
from fedlearn.errors import ConfigError, nearest
from fedlearn.plugins import load_class

__all__ = ["ALGORITHMS", "build_algorithm"]

ALGORITHMS: Mapping[str, type[Algorithm]] = MappingProxyType(
    {
        "fedadagrad": FedAdagrad,
        "fedadam": FedAdam,
        "fedavg": FedAvg,
        "fedavgm": FedAvgM,
        "fedprox": FedProx,
        "fedyogi": FedYogi,
    }
)
"""The built-in algorithms, by the name a scenario gives them."""

_OF_SINGLE_UPDATES = ("bulyan", "coordinatemedian", "krum", "median", "multikrum", "trimmedmean")
"""Well-known rules that compare the clients' updates with each other."""


def build_algorithm(
    name: str, *, server_learning_rate: float | None, options: Mapping[str, bool | int | float | str]
) -> Algorithm:
    """Return the algorithm of that name with these hyper-parameters.

    Args:
        name: a built-in name, ``package.module:Class``, or ``path/to/file.py[:Class]``.
        server_learning_rate: the server's η; ``None``: the algorithm's own default.
        options: its other hyper-parameters, by snake_case name; those left out take their defaults.

    Raises:
        ConfigError: there is no such built-in name or option, an option is left out that has no default, or a
            value has the wrong type or is impossible.
        MissingError: there is no such module, file or class.
        UsageError: the user's own file cannot be imported or does not define an algorithm.

    >>> build_algorithm("fedavgm", server_learning_rate=None, options={"server_momentum": 0.5})
    FedAvgM(server_learning_rate=1.0, server_momentum=0.5)
    >>> build_algorithm("fedavg", server_learning_rate=None, options={"proximal_mu": 0.1})
    Traceback (most recent call last):
    fedlearn.errors.ConfigError: training.options.proximal-mu: fedavg has no such option, nor any other
    """
    kind = _find(name)
    shown = name if name in ALGORITHMS else kind.__name__
    known = {each.name: each for each in fields(kind) if each.init and each.name != "server_learning_rate"}
    for option in options:
        if option not in known:
            raise _unknown_option(shown, option, list(known))
    for option, each in known.items():
        if option not in options and each.default is MISSING and each.default_factory is MISSING:
            raise ConfigError(f"training.options.{kebab(option)}", f"{shown} needs a value for it.")
    numbers: dict[str, Any] = dict(options)
    if server_learning_rate is not None:
        numbers["server_learning_rate"] = server_learning_rate
    return kind(**numbers)


def _find(name: str) -> type[Algorithm]:
    """Return the class behind a name."""
    if name in ALGORITHMS:
        return ALGORITHMS[name]
    if ":" in name or name.endswith(".py"):
        return load_class(name, Algorithm, kind="algorithm")  # type: ignore[type-abstract]
    if name.lower().replace("_", "").replace("-", "") in _OF_SINGLE_UPDATES:
        reason = (
            f"{name!r} compares single updates with each other. An algorithm is only given their mean, and under "
            "secure aggregation the server sees no single one; use one that needs the mean alone"
        )
        raise ConfigError("training.algorithm", f"{reason}: {', '.join(ALGORITHMS)}")
    reason = f"there is no algorithm {name!r}. Built in: {', '.join(ALGORITHMS)}. Your own: path/to/file.py."
    raise ConfigError("training.algorithm", reason, nearest(name.lower(), ALGORITHMS))


def _unknown_option(shown: str, option: str, known: list[str]) -> ConfigError:
    """Return the error for an option that the algorithm does not have."""
    if option == "server_learning_rate":
        reason = "it is no option of one algorithm but a key of its own."
        return ConfigError("training.options.server-learning-rate", reason, "training.server-learning-rate")
    names = [kebab(each) for each in known]
    rest = f"; it has {', '.join(names)}." if names else ", nor any other."
    return ConfigError(
        f"training.options.{kebab(option)}",
        f"{shown} has no such option{rest}",
        nearest(kebab(option), names),
    )
