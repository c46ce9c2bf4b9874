"""Find a class that a user wrote: by ``package.module:Class``, or in a file, ``path/to/file.py[:Class]``.

Loading runs the module or file with all the rights of this process. The name must come from the person at
this machine (a command line, a scenario of their own), never from a message.

What holds for a file:

* its module is called ``fedlearn_file_<stem>_<hash of the absolute path>`` and stands in ``sys.modules``, so
  the same path gives the same class object every time and its instances can be pickled; another process
  unpickles them once it has called ``load_class`` with the same path;
* while it is being imported its folder comes first on ``sys.path``, as if it were run with
  ``python file.py``, and is taken off again afterwards. So it can import the files beside it, at its top and
  not later inside a function;
* those siblings are ordinary modules under their own names: two folders that both have a ``helpers.py``
  share the one that was imported first. Files that are used together belong in one folder, or in a package.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from fedlearn.errors import FedlearnError, MissingError, TaskError, TaskNotFoundError, UsageError, nearest

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["load_class"]

T = TypeVar("T")

# What to raise for a kind of thing where the tree of errors has a name for it.
_MISSING: dict[str, type[MissingError]] = {"task": TaskNotFoundError}
_WRONG: dict[str, type[UsageError]] = {"task": TaskError}


def load_class(spec: str, base: type[T], *, kind: str) -> type[T]:
    """Return the subclass of ``base`` that ``spec`` names, importing its module or file.

    Guarantees: the result is not abstract and has ``base`` among its ancestors; nothing that goes wrong while
    the user's code is imported is swallowed, and what was half imported is forgotten.

    Args:
        spec: ``package.module:Class``, ``path/to/file.py:Class``, or ``path/to/file.py`` where the file
            defines one such class and no more (abstract ones and those named ``_Like_this`` do not count). A
            path is relative to the working directory; ``~`` is the user's home.
        base: the class to subclass; a ``typing.Protocol`` must be subclassed by name, not only by shape.
        kind: what is being looked for, in one word, for messages: ``task``, ``algorithm``.

    Returns:
        The class itself, not an instance.

    Raises:
        MissingError: there is no such module, file or class, or it imports a package that is not installed
            (for ``kind="task"`` the former is a ``TaskNotFoundError``).
        UsageError: ``spec`` is none of the three forms, the file leaves open which class is meant, the class
            does not subclass ``base``, or importing it raised; the message then has file and line, and the
            exception is the cause (for ``kind="task"`` a ``TaskError``).

    >>> load_class("fractions:Fraction", object, kind="number").__name__
    'Fraction'
    """
    place, name = _split(spec, kind)
    module = _import_file(place, kind) if place.endswith(".py") else _import_module(place, kind)
    found = _only_candidate(module, base, place, kind) if name is None else _named(module, name, base, place, kind)
    if base not in found.__mro__:  # not issubclass, which raises for a Protocol that has attributes
        raise _wrong(kind)(f"{name} in {place} is no {kind}: it must subclass {_full_name(base)}")
    if inspect.isabstract(found):
        left = ", ".join(sorted(getattr(found, "__abstractmethods__", ())))
        raise _wrong(kind)(f"{found.__name__} in {place} is unfinished: it does not define {left}")
    return found


def _missing(kind: str) -> type[MissingError]:
    """Return what to raise where there is no such thing."""
    return _MISSING.get(kind, MissingError)


def _wrong(kind: str) -> type[UsageError]:
    """Return what to raise where there is one, but not a usable one."""
    return _WRONG.get(kind, UsageError)


def _split(spec: str, kind: str) -> tuple[str, str | None]:
    """Return the file or module of ``spec``, and the class it names."""
    if spec.endswith(".py") and len(spec) > len(".py"):
        return spec, None
    place, colon, name = spec.rpartition(":")
    dotted = all(part.isidentifier() for part in place.split("."))
    if not colon or not name.isidentifier() or not (place.endswith(".py") or dotted):
        raise _wrong(kind)(
            f"{spec!r} does not say where the {kind} is: write package.module:Class, or path/to/file.py[:Class]"
        )
    return place, name


def _import_module(name: str, kind: str) -> ModuleType:
    """Import an installed module."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            reason = f"there is no module {error.name!r} to find the {kind} in"
            raise _missing(kind)(f"{reason}; install its package, or write path/to/file.py[:Class]") from error
        raise _failed(error, None, name, kind) from error
    except FedlearnError:
        raise
    except (Exception, SystemExit) as error:  # a script without a __main__ guard may exit
        raise _failed(error, None, name, kind) from error


def _import_file(place: str, kind: str) -> ModuleType:
    """Import a file under a name that follows from its absolute path."""
    path = _existing(place, kind)
    digest = hashlib.sha256(str(path).encode("utf-8", "surrogateescape")).hexdigest()[:12]
    name = f"fedlearn_file_{re.sub(r'[^0-9A-Za-z_]', '_', path.stem)}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise _missing(kind)(f"{path} is not a Python file")
    module, folder = importlib.util.module_from_spec(spec), str(path.parent)
    sys.modules[name] = module  # before it runs: dataclasses and pickle look it up
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, FedlearnError) or not isinstance(error, Exception | SystemExit):
            raise
        raise _failed(error, path, place, kind) from error
    finally:
        with suppress(ValueError):  # the file may have changed sys.path itself
            sys.path.remove(folder)
    return module


def _existing(place: str, kind: str) -> Path:
    """Return the absolute path of a file that is there."""
    try:
        path = Path(place).expanduser()
        if path.is_file():
            return path.resolve()
    except (OSError, RuntimeError) as error:  # no permission to look; no home folder behind ~
        raise _missing(kind)(f"{place} cannot be read: {error}") from error
    where = "" if path.is_absolute() else f" (looked in {Path.cwd()})"
    raise _missing(kind)(f"there is no file {place} to find the {kind} in{where}")


def _failed(error: BaseException, path: Path | None, place: str, kind: str) -> FedlearnError:
    """Return the error for a module that raised while it was imported, with the line that did."""
    what = f"{type(error).__name__}: {error.msg if isinstance(error, SyntaxError) else error}"
    reason = f"{_line(error, path) or place}: {what}"
    if isinstance(error, ModuleNotFoundError):
        return MissingError(f"{reason}. Install that package, or correct the import")
    if isinstance(error, OSError) and _line(error, path) is None:
        return _missing(kind)(reason)  # the file itself cannot be read
    return _wrong(kind)(f"the {kind} cannot be imported: {reason}")


def _line(error: BaseException, path: Path | None) -> str | None:
    """Return "file, line n" of the last frame in the user's folder, or of the last one that has a file."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}"
    frames = [(each.filename, each.lineno) for each in traceback.extract_tb(error.__traceback__)]
    frames = [(name, line) for name, line in frames if not name.startswith("<frozen ") and name != __file__]
    own = [(name, line) for name, line in frames if path is not None and Path(name).parent == path.parent]
    if path is None:  # import_module itself is not where the reader should look
        frames = [(name, line) for name, line in frames if name != importlib.__file__]
    for name, line in reversed(own or frames):
        return f"{name}, line {line}"
    return None


def _candidates(module: ModuleType, base: type) -> list[str]:
    """Return the names of the classes that ``module`` itself defines and that could be meant."""
    return [
        name
        for name, each in vars(module).items()
        if inspect.isclass(each)
        and each.__module__ == module.__name__
        and each.__name__ == name  # an alias is the same class again
        and base in each.__mro__
        and each is not base
        and not name.startswith("_")
        and not inspect.isabstract(each)
        and not getattr(each, "_is_protocol", False)
    ]


def _only_candidate(module: ModuleType, base: type, place: str, kind: str) -> type:
    """Return the one class that the file defines."""
    names = _candidates(module, base)
    if not names:
        raise _missing(kind)(f"{place} defines no {kind}: no class in it subclasses {_full_name(base)}")
    if len(names) > 1:
        raise _wrong(kind)(f"{place} defines several {kind}s; write {place}:{names[0]}, or :{', :'.join(names[1:])}")
    found: type = vars(module)[names[0]]
    return found


def _named(module: ModuleType, name: str, base: type, place: str, kind: str) -> type:
    """Return the class called ``name`` in ``module``."""
    found = getattr(module, name, None)
    if inspect.isclass(found):
        return found
    names = _candidates(module, base)
    hint = nearest(name, names)
    reason = f"{place} has no class {name!r}." if found is None else f"{name!r} in {place} is not a class."
    reason += f" Did you mean {hint!r}?" if hint else ""
    raise _missing(kind)(f"{reason} It defines {_listed(names, kind)}")


def _listed(names: list[str], kind: str) -> str:
    """Return the candidates as a message lists them."""
    return f"these {kind}s: {', '.join(names)}" if names else f"no {kind}"


def _full_name(base: type) -> str:
    """Return a class's name with its module."""
    return f"{base.__module__}.{base.__qualname__}"
