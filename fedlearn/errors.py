"""Every error fedlearn raises, named by what the reader can do next.

::

    FedlearnError
    ├── UsageError                 exit 2: what was asked for is wrong; change it
    │   ├── ConfigError            a key of the scenario (carries the key's path)
    │   └── TaskError              the task does not keep its contract
    ├── MissingError               exit 3: something needed is missing or unreadable; provide it
    │   ├── DataError              a data file
    │   ├── DependencyError        a Python package (carries the command that installs it)
    │   ├── LedgerMissingError     a ledger
    │   ├── RunUnreadableError     a run's folder
    │   └── TaskNotFoundError      no task of that name
    ├── LedgerError                exit 1: a ledger's chain does not hold (carries the line's number)
    ├── RunFailedError             exit 1: the run could not go on
    │   ├── TooFewClientsError     not enough clients were there in time
    │   └── RoundFailedError       a round was tried as often as allowed
    └── ReplyError                 one client's reply was refused; the round goes on without it

The exit codes are the contract of ``architecture.md``: 0 done, 1 the run failed, 2 usage, 3 missing.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "ConfigError",
    "DataError",
    "DependencyError",
    "FedlearnError",
    "LedgerError",
    "LedgerMissingError",
    "MissingError",
    "ReplyError",
    "RoundFailedError",
    "RunFailedError",
    "RunUnreadableError",
    "TaskError",
    "TaskNotFoundError",
    "TooFewClientsError",
    "UsageError",
    "nearest",
]


class FedlearnError(Exception):
    """The root of the tree; ``exit_code`` is what the command line returns for it."""

    exit_code = 1


class UsageError(FedlearnError):
    """What was asked for is wrong."""

    exit_code = 2


class ConfigError(UsageError):
    """A key of the configuration is unknown, of the wrong type, or has an impossible value.

    Attributes:
        key: the key's path as written in TOML, such as ``federation.clients``.
        reason: what is wrong with it.
        suggestion: the nearest valid name, or ``None``.
    """

    def __init__(self, key: str, reason: str, suggestion: str | None = None) -> None:
        self.key = key
        self.reason = reason
        self.suggestion = suggestion
        hint = f"; did you mean {suggestion!r}?" if suggestion else ""
        super().__init__(f"{key}: {reason.rstrip('.')}{hint}")


class TaskError(UsageError):
    """A task does not keep the contract of ``fedlearn.learning.task.Task``."""


class MissingError(FedlearnError):
    """Something needed is missing or unreadable."""

    exit_code = 3


class DataError(MissingError):
    """A data file is missing, unreadable or of the wrong shape."""


class DependencyError(MissingError):
    """An optional Python package is not installed.

    Attributes:
        package: the import name of what is missing.
        extra: the extra of fedlearn that brings it.
    """

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        self.package = package
        self.extra = extra
        command = f"pip install -c constraints.txt '.[{extra}]'"
        super().__init__(f"{purpose} needs the package {package!r}. In fedlearn's folder: {command}")


class LedgerMissingError(MissingError):
    """A ledger is missing or cannot be read: nothing can be said of what was released."""


class RunUnreadableError(MissingError):
    """A run's folder is missing, empty or damaged."""


class TaskNotFoundError(MissingError):
    """No task of that name, module or file exists."""


class LedgerError(FedlearnError):
    """A ledger was edited, reordered or cut: what it says is not what was written.

    Attributes:
        line: the number of the first line that does not hold, counted from 1.
        reason: what is wrong with it.
    """

    def __init__(self, reason: str, *, line: int) -> None:
        self.line = line
        self.reason = reason
        super().__init__(f"ledger, line {line}: {reason}")


class RunFailedError(FedlearnError):
    """The run could not go on; its last good model is kept."""


class TooFewClientsError(RunFailedError):
    """Fewer clients than needed were connected within the deadline."""


class RoundFailedError(RunFailedError):
    """A round stayed below ``min-respondents`` as often as it may be tried.

    Attributes:
        round_number: the round that failed, counted from 1.
        failures: client name to failure code, for the last try.
    """

    def __init__(self, message: str, round_number: int, failures: dict[str, str]) -> None:
        self.round_number = round_number
        self.failures = failures
        super().__init__(message)


class ReplyError(FedlearnError):
    """One client's reply cannot be used.

    Attributes:
        code: a word from ``fedlearn.federation.messages.FailureCode``; never the text of an exception.
    """

    def __init__(self, code: str, reason: str) -> None:
        self.code = code
        self.reason = reason
        super().__init__(f"{code}: {reason}")


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """Return the choice most like ``word``, or ``None`` where none is close.

    >>> nearest("fedavgg", ["fedavg", "fedprox"])
    'fedavg'
    """
    matches = get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return matches[0] if matches else None
