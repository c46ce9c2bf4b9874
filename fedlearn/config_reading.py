"""Tables to frozen dataclasses and back, with errors that name the key.

A field says what it accepts in its metadata: ``field(default=20, metadata=integer(minimum=1))``.
``check_fields`` applies those rules in ``__post_init__``, so that a configuration built in Python is
held to the same rules as one read from TOML. ``read_table`` and ``write_table`` are the TOML and JSON edge:
kebab-case outside, snake_case inside. Nothing here knows which sections exist.
"""

from __future__ import annotations

import datetime
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from fedlearn.errors import ConfigError, nearest

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = [
    "Options",
    "Scalar",
    "boolean",
    "check_fields",
    "choice",
    "derive",
    "described",
    "integer",
    "kebab",
    "number",
    "number_or_word",
    "option_table",
    "read_table",
    "section",
    "shown",
    "snake",
    "text",
    "write_table",
]

Scalar = bool | int | float | str
Rule = Callable[[str, Any], Any]
T = TypeVar("T", bound="DataclassInstance")

_INT64_MAX = 2**63 - 1  # what TOML and Flower's messages hold
_UNSAFE = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")
_SNAKE = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
_KEBAB = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


class Options(Mapping[str, Scalar]):
    """A read-only, hashable, picklable mapping of names to scalars (``MappingProxyType`` is neither).

    >>> Options({"proximal_mu": 0.1})["proximal_mu"]
    0.1
    """

    __slots__ = ("_items",)

    def __init__(self, items: Mapping[str, Scalar] | None = None) -> None:
        self._items = dict(items or {})

    def __getitem__(self, name: str) -> Scalar:
        return self._items[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(frozenset(self._items.items()))

    def __repr__(self) -> str:
        return f"Options({self._items!r})"


def kebab(name: str) -> str:
    """Return a field's name as TOML writes it.

    >>> kebab("batch_size")
    'batch-size'
    """
    return name.replace("_", "-")


def snake(name: str) -> str:
    """Return a TOML key as Python writes it."""
    return name.replace("-", "_")


def shown(value: object) -> str:
    """Return a scalar as a message quotes it: strings in double quotes."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str | bool) else str(value)


def described(value: object) -> str:
    """Return what kind of TOML value this is, in words.

    >>> described(True), described("3")
    ('a boolean', 'a string')
    """
    kinds: list[tuple[Any, str]] = [
        (bool, "a boolean"),  # before int, of which it is a subclass
        (int, "an integer"),
        (float, "a decimal number"),
        (str, "a string"),
        (list | tuple, "an array"),
        (Mapping, "a table"),
        (datetime.date | datetime.time, "a date or time"),
        (type(None), "nothing"),
    ]
    return next((words for kind, words in kinds if isinstance(value, kind)), f"a {type(value).__name__}")


def _as_integer(key: str, value: object) -> int:
    """Return an integer that fits in 64 bits; a bool is not an integer."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(key, f"expected an integer, got {described(value)}")
    if abs(value) > _INT64_MAX:
        raise ConfigError(key, "must fit in a signed 64-bit integer")
    return int(value)


def _as_number(key: str, value: object, expected: str = "a number") -> float:
    """Return a finite float; an integer is accepted, a bool is not."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(key, f"expected {expected}, got {described(value)}")
    finite = float(_as_integer(key, value)) if isinstance(value, int) else float(value)
    if not math.isfinite(finite):
        raise ConfigError(key, f"must be finite, got {finite}")
    return finite + 0.0  # -0.0 becomes 0.0: equal configurations have equal hashes


def _as_text(key: str, value: object) -> str:
    """Return a string that TOML, a file system and a terminal can all hold."""
    if not isinstance(value, str):
        raise ConfigError(key, f"expected a string, got {described(value)}")
    if _UNSAFE.search(value):
        raise ConfigError(key, "holds a control character or bytes that are not Unicode text")
    return value


def integer(*, minimum: int) -> dict[str, Rule]:
    """Accept an integer of at least ``minimum``."""

    def rule(key: str, value: object) -> int:
        found = _as_integer(key, value)
        if found < minimum:
            raise ConfigError(key, f"must be at least {minimum}, got {found}")
        return found

    return {"rule": rule}


def number(*, above: float | None = None, minimum: float | None = None, below: float | None = None) -> dict[str, Rule]:
    """Accept a finite number with ``above < x`` or ``minimum <= x``, and ``x < below``."""

    def rule(key: str, value: object) -> float:
        found = _as_number(key, value)
        if above is not None and not found > above:
            raise ConfigError(key, f"must be above {above:g}, got {found:g}")
        if minimum is not None and not found >= minimum:
            raise ConfigError(key, f"must be at least {minimum:g}, got {found:g}")
        if below is not None and not found < below:
            raise ConfigError(key, f"must be below {below:g}, got {found:g}")
        return found

    return {"rule": rule}


def number_or_word(word: str, *, above: float, below: float) -> dict[str, Rule]:
    """Accept ``word``, or a finite number strictly between ``above`` and ``below``."""
    in_range = number(above=above, below=below)["rule"]
    expected = f"a number or {shown(word)}"

    def rule(key: str, value: object) -> object:
        if isinstance(value, str) and value != word:
            raise ConfigError(key, f"expected {expected}, got {shown(value)}", nearest(value.lower(), [word]))
        return value if isinstance(value, str) else in_range(key, _as_number(key, value, expected))

    return {"rule": rule}


def boolean() -> dict[str, Rule]:
    """Accept true or false."""

    def rule(key: str, value: object) -> bool:
        if not isinstance(value, bool):
            raise ConfigError(key, f"expected a boolean, got {described(value)}")
        return value

    return {"rule": rule}


def text() -> dict[str, Rule]:
    """Accept a string that is not empty."""

    def rule(key: str, value: object) -> str:
        found = _as_text(key, value)
        if not found.strip():
            raise ConfigError(key, "must not be empty")
        return found

    return {"rule": rule}


def choice(choices: tuple[str, ...] | tuple[int, ...]) -> dict[str, Rule]:
    """Accept one of ``choices``, which are all strings or all integers."""
    valid = ", ".join(shown(each) for each in choices)

    def rule(key: str, value: object) -> str | int:
        wants_text = isinstance(choices[0], str)
        found = _as_text(key, value) if wants_text else _as_integer(key, value)
        if found not in choices:
            near = nearest(kebab(str(found).lower()), map(str, choices)) if wants_text else None
            raise ConfigError(key, f"must be one of {valid}, got {shown(found)}", near)
        return found

    return {"rule": rule}


def option_table() -> dict[str, Rule]:
    """Accept a table of snake_case names to scalars, whatever the names are."""

    def rule(key: str, value: object) -> Options:
        if not isinstance(value, Mapping):
            raise ConfigError(key, f"expected a table, got {described(value)}")
        for name in value:
            if not (isinstance(name, str) and _SNAKE.fullmatch(name)):
                near = snake(str(name).lower())
                reason = "in Python an option is named in lower-case words joined by underscores"
                raise ConfigError(f"{key}.{name}", reason, near if _SNAKE.fullmatch(near) else None)
        return Options({name: _as_scalar(f"{key}.{kebab(name)}", each) for name, each in value.items()})

    return {"rule": rule, "read": _read_option_table}


def _as_scalar(key: str, value: object) -> Scalar:
    """Return a boolean, an integer, a finite number or a string."""
    if isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _as_text(key, value)
    if isinstance(value, int):
        return _as_integer(key, value)
    return _as_number(key, value, "a boolean, a number or a string")


def _read_option_table(key: str, table: object) -> object:
    """Return a TOML table of options with its keys in snake_case."""
    if not isinstance(table, Mapping):
        return table  # the rule refuses it
    for name in table:
        if not _KEBAB.fullmatch(str(name)):
            near = kebab(str(name).lower())
            reason = "an option is named in lower-case words joined by hyphens"
            raise ConfigError(f"{key}.{name}", reason, near if _KEBAB.fullmatch(near) else None)
    return {snake(name): value for name, value in table.items()}


def section(kind: type[DataclassInstance]) -> dict[str, Any]:
    """Accept a nested dataclass of type ``kind``, which TOML writes as a section."""

    def rule(key: str, value: object) -> object:
        if not isinstance(value, kind):
            raise ConfigError(key, f"expected a {kind.__name__}, got {described(value)}")
        return value

    return {"rule": rule, "section": kind}


def check_fields(config: DataclassInstance, path: str = "") -> None:
    """Hold every field of ``config`` to its rule and store what the rule returns; for ``__post_init__``.

    ``None`` is left alone where it is the field's default.

    Raises:
        ConfigError: a field has the wrong type or an impossible value.
    """
    for each in fields(config):
        value = getattr(config, each.name)
        if value is None and each.default is None:
            continue
        key = _joined(path, kebab(each.name))
        object.__setattr__(config, each.name, each.metadata["rule"](key, value))


def derive(config: object, name: str, value: object) -> None:
    """Fill in a field of a frozen config that was left to be derived."""
    if getattr(config, name) is None:
        object.__setattr__(config, name, value)


def read_table(kind: type[T], table: object) -> T:
    """Return the ``kind`` that a TOML or JSON table describes; absent keys take their defaults.

    Args:
        kind: a dataclass whose fields carry the rules of this module.
        table: what ``tomllib`` or ``json`` returned for it.

    Raises:
        ConfigError: a key is unknown, misplaced, of the wrong type, or its value impossible.
    """
    return _read(kind, table, "", _paths(kind))


def _read(kind: type[T], table: object, path: str, everywhere: Mapping[str, str]) -> T:
    """Read one table at ``path``; ``everywhere`` maps each known name to its full path."""
    if not isinstance(table, Mapping):
        expected = f"a section, [{path}]" if path else "a table"
        raise ConfigError(path or "scenario", f"expected {expected}, got {described(table)}")
    known = {kebab(each.name): each for each in fields(kind)}
    values: dict[str, Any] = {}
    for name, value in table.items():
        key = _joined(path, str(name))
        if name not in known:
            near = kebab(str(name).lower())
            exact = near if near in known else everywhere.get(near)
            raise ConfigError(key, "unknown key", exact or nearest(near, known))
        metadata = known[name].metadata
        if "section" in metadata:
            value = _read(metadata["section"], value, key, everywhere)
        elif "read" in metadata:
            value = metadata["read"](key, value)
        elif value is None:  # JSON's null; leaving the key out is how a default is asked for
            raise ConfigError(key, "expected a value, got nothing")
        values[known[name].name] = value
    return kind(**values)


def _paths(kind: type[DataclassInstance], path: str = "") -> dict[str, str]:
    """Return the full path of every key below ``kind``, by the key's own name."""
    found: dict[str, str] = {}
    for each in fields(kind):
        key = _joined(path, kebab(each.name))
        if "section" in each.metadata:
            found = _paths(each.metadata["section"], key) | found
        found.setdefault(kebab(each.name), key)
    return found


def _joined(path: str, name: str) -> str:
    """Return ``name`` below ``path``."""
    return f"{path}.{name}" if path else name


def write_table(config: DataclassInstance) -> dict[str, Any]:
    """Return ``config`` as plain TOML and JSON values in kebab-case; ``None`` and no options are left out."""
    table: dict[str, Any] = {}
    for each in fields(config):
        value = getattr(config, each.name)
        if is_dataclass(value) and not isinstance(value, type):
            value = write_table(value)
        elif isinstance(value, Options):
            value = {kebab(name): option for name, option in value.items()} or None
        if value is not None:
            table[kebab(each.name)] = value
    return table
