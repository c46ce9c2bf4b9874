"""From what a user names, a scenario file or a task, and ``--set`` overrides, to a run's configuration."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fedlearn.config import RunConfig
from fedlearn.config_reading import described
from fedlearn.errors import ConfigError, MissingError

__all__ = ["apply_overrides", "load_config", "read_scenario"]

_ASKS_FOR_PRIVACY = ("privacy.target-epsilon", "privacy.noise-multiplier", "privacy.max-epsilon")

_EXCLUSIVE = {
    "privacy.noise-multiplier": "target-epsilon",
    "privacy.target-epsilon": "noise-multiplier",
    "training.local-epochs": "local-steps",
    "training.local-steps": "local-epochs",
}


def read_scenario(source: str | None, overrides: Iterable[str] = ()) -> RunConfig:
    """Return the config that ``source`` names, after ``overrides``.

    Paths of tasks, algorithms and data are made absolute, so that a run can be resumed from anywhere: those in a
    scenario file are relative to that file, those in an override or given as ``source`` to the working folder.

    Args:
        source: a scenario file (``….toml``), a task, or ``None`` for the defaults.
        overrides: ``section.key=value``, the later the stronger.

    Raises:
        MissingError: the scenario file does not exist or cannot be read.
        ConfigError: a key is unknown, of the wrong type, or has an impossible value.
    """
    mapping: dict[str, Any] = {}
    if source is not None and source.endswith(".toml"):
        mapping = _anchored(_read_toml(Path(source)), Path(source).resolve().parent)
    elif source is not None:
        mapping = {"task": source}
    wanted = list(overrides)
    config = RunConfig.from_mapping(_anchored(apply_overrides(mapping, wanted), Path.cwd()))
    names = [each.partition("=")[0].strip() for each in wanted]
    asked = [name for name in names if name in _ASKS_FOR_PRIVACY]
    if asked and config.privacy.unit == "none" and "privacy.unit" not in names:
        reason = f'is "none", so that {asked[0]} promises nothing; set privacy.unit=client or privacy.unit=example too'
        raise ConfigError("privacy.unit", reason)
    return config


def load_config(path: Path) -> RunConfig:
    """Return the config in the TOML file at ``path``, paths as they stand.

    Raises:
        MissingError: the file does not exist or cannot be read.
        ConfigError: its content is wrong.
    """
    return RunConfig.from_mapping(_read_toml(path))


def _read_toml(path: Path) -> dict[str, Any]:
    """Return the tables of a TOML file."""
    try:
        content = path.read_text(encoding="utf-8-sig")  # some editors put a byte order mark first
        return tomllib.loads(content)
    except FileNotFoundError as error:
        raise MissingError(f"There is no scenario file {path}.") from error
    except OSError as error:
        raise MissingError(f"The scenario file {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(str(path), f"is not valid TOML: byte {error.start} is not UTF-8 text") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(str(path), f"is not valid TOML: {error}") from error


def _anchored(mapping: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the tables with relative paths made absolute from ``folder``."""
    anchored = _copied(mapping)
    training, data, privacy = (anchored.get(section) for section in ("training", "data", "privacy"))
    for table, key in ((anchored, "task"), (training, "algorithm")):
        if isinstance(table, dict) and isinstance(name := table.get(key), str):
            path, colon, attribute = name.partition(".py:")
            if colon or name.endswith(".py"):
                file = f"{path}.py" if colon else name
                table[key] = str(_absolute(file, folder)) + (f":{attribute}" if colon else "")
    if isinstance(data, dict) and isinstance(name := data.get("path"), str):
        data["path"] = str(_absolute(name, folder))
    if isinstance(privacy, dict) and isinstance(names := privacy.get("earlier-ledgers"), str):
        found = [name.strip() for name in names.split(",") if name.strip()]
        privacy["earlier-ledgers"] = ",".join(str(_absolute(name, folder)) for name in found)
    return anchored


def _absolute(name: str, folder: Path) -> Path:
    """Return ``name`` from ``folder``, with ``~`` for the user's home."""
    return (folder / Path(name).expanduser()).resolve()


def apply_overrides(mapping: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Return a copy of ``mapping`` with each ``section.key=value`` set, the later the stronger.

    A value is read as TOML, and where it is not TOML, taken as a bare string. Whether the key exists and the
    value suits it is for ``RunConfig.from_mapping`` to say, once everything is merged. Of two keys
    of which only one may stand, such as local epochs and local steps, the one set last takes the other's place.

    Raises:
        ConfigError: an override has no ``=``, an empty key, or goes through a value as if it were a table.

    >>> apply_overrides({"seed": 1}, ["federation.clients=4", "data.partition=iid"])
    {'seed': 1, 'federation': {'clients': 4}, 'data': {'partition': 'iid'}}
    """
    merged, named = _copied(mapping), set[str]()
    for override in overrides:
        name, equals, value = override.partition("=")
        parts = [part.strip() for part in name.split(".")]
        if not equals:
            raise ConfigError(override, 'expected section.key=value, but there is no "="')
        if not all(parts):
            raise ConfigError(override, "expected section.key=value, but part of the key is empty")
        table = merged
        for depth, part in enumerate(parts[:-1], start=1):
            inner = table.setdefault(part, {})
            if not isinstance(inner, dict):
                reason = f"expected a table, got {described(inner)}, so {'.'.join(parts)} cannot be set"
                raise ConfigError(".".join(parts[:depth]), reason)
            table = inner
        key = parts[-1]
        named.add(".".join(parts))
        if other := _EXCLUSIVE.get(".".join(parts)):
            if parts[0] == "privacy" and f"privacy.{other}" in named:
                reason = f"only one of it and privacy.{other} may be set; privacy.max-epsilon is a budget beside either"
                raise ConfigError(".".join(parts), reason)
            table.pop(other, None)  # a scenario that spells out one of the two can still be overridden
        table[key] = _override_value(value.strip())
    return merged


def _copied(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested dicts that share none with ``mapping``."""
    return {key: _copied(each) if isinstance(each, Mapping) else each for key, each in mapping.items()}


def _override_value(written: str) -> object:
    """Return the TOML value that was written, or the text itself where it is none."""
    try:
        parsed = tomllib.loads(f"x = {written}")
    except (ValueError, RecursionError):
        return written
    return parsed["x"] if parsed.keys() == {"x"} else written  # a line break could smuggle in more keys
