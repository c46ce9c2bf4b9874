"""One public list a module, sorted and complete; a docstring on all of it; and a start that loads nothing heavy."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import fedlearn

PACKAGE = Path(fedlearn.__file__).parent
HEAVY = ("torch", "flwr", "scipy", "numpy", "matplotlib")


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "__main__.py"}
every_module = pytest.mark.parametrize("name", FILES)


def tree_of(name: str) -> ast.Module:
    return ast.parse(FILES[name].read_text(encoding="utf-8"))


def listed(name: str) -> list[str] | None:
    """Return a module's ``__all__`` as it stands in the source, or ``None``."""
    for node in tree_of(name).body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]:
            return list(ast.literal_eval(node.value))
    return None


def order(name: str) -> tuple[int, list[tuple[int, int, str]]]:
    """Return ruff's order of ``__all__``: CONSTANTS, Classes, functions; numbers in a name by their value."""
    rank = 0 if name.isupper() and len(name) > 1 else 1 if name[:1].isupper() else 2
    parts = [part for part in re.split(r"(\d+)", name) if part]
    return rank, [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts]


def defined(tree: ast.Module) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield the public classes and functions that a module defines."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            yield node


def undocumented(tree: ast.Module) -> Iterator[str]:
    """Yield the public names without a docstring: classes, functions, methods and properties."""
    for node in defined(tree):
        if not ast.get_docstring(node):
            yield node.name
        if isinstance(node, ast.ClassDef):
            for inner in node.body:
                named = isinstance(inner, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
                if named and not inner.name.startswith("_") and not ast.get_docstring(inner):
                    yield f"{node.name}.{inner.name}"


# -- the lists -----------------------------------------------------------------------------------------------------


@every_module
def test_what_a_module_lists_exists_and_is_sorted(name) -> None:
    names = listed(name)
    if names is None:
        assert not list(defined(tree_of(name))), "public names need an __all__"
        return
    assert names, "an empty list says nothing: leave it out"
    assert len(set(names)) == len(names)
    assert names == sorted(names, key=order)
    module = importlib.import_module(name)
    assert [each for each in names if not hasattr(module, each)] == []
    assert not [each for each in names if each.startswith("_") and each != "__version__"]


@every_module
def test_whatever_a_module_defines_in_public_it_lists(name) -> None:
    """But for the command line: what a verb's module offers is its verb."""
    if name.startswith("fedlearn.cli."):
        return
    names = set(listed(name) or ())
    assert [node.name for node in defined(tree_of(name)) if node.name not in names] == []


@every_module
def test_a_package_lists_names_under_the_modules_that_own_them(name) -> None:
    """Whatever a package offers is public in the module it comes from, too."""
    if FILES[name].name != "__init__.py" or listed(name) is None:
        return
    for node in tree_of(name).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{name}."):
            offered = {alias.name for alias in node.names} & set(listed(name) or ())
            assert offered <= set(listed(node.module or "") or ()), node.module


@every_module
def test_public_names_and_modules_have_docstrings(name) -> None:
    tree = tree_of(name)
    assert ast.get_docstring(tree), "the module itself"
    assert list(undocumented(tree)) == []


@pytest.mark.parametrize("package", ["algorithms", "learning", "data", "federation"])
def test_every_function_of_the_core_has_a_docstring(package) -> None:
    """Private ones, too: one line. A class's dunder methods and functions within functions need none."""
    bare = []
    for name in FILES:
        if name.split(".")[1:2] == [package]:
            tree = tree_of(name)
            public = [node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
            for node in [*tree.body, *(inner for each in public for inner in each.body)]:
                is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
                if is_function and not node.name.startswith("__") and not ast.get_docstring(node):
                    bare.append(f"{name}: {node.name}")
    assert bare == []


def test_the_order_is_ruffs() -> None:
    names = ["part10", "part2", "answer", "Question", "Answers", "BUILT_IN"]
    assert sorted(names, key=order) == ["BUILT_IN", "Answers", "Question", "answer", "part2", "part10"]


def test_a_missing_docstring_would_be_seen() -> None:
    tree = ast.parse(
        "class A:\n    'doc'\n    def f(self): pass\n    def _g(self): pass\ndef h(): pass\ndef _k(): pass"
    )
    assert list(undocumented(tree)) == ["A.f", "h"]


# -- the start -----------------------------------------------------------------------------------------------------


def loaded_by(program: str) -> list[str]:
    """Return the heavy modules that a program of its own has loaded at its end."""
    tail = f"import sys\nprint('loaded:', *[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", f"{program}\n{tail}"], capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout.splitlines()[-1].split()[1:]


HELP = """
import sys
from fedlearn.cli import main
sys.argv = ["fedlearn", "--help"]
try:
    main()
except SystemExit as end:
    assert not end.code
"""


@pytest.mark.parametrize("program", ["import fedlearn", HELP], ids=["import", "help"])
def test_nothing_heavy_is_loaded(program) -> None:
    assert loaded_by(program) == []


def test_a_heavy_module_would_be_seen() -> None:
    assert loaded_by("import numpy") == ["numpy"]


def test_help_comes_at_once() -> None:
    """Well under half a second on a quiet machine; held to two, for those that are not."""
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", HELP], capture_output=True, timeout=60, check=True)
        seconds.append(time.perf_counter() - started)
    print(f"fedlearn --help: {min(seconds):.2f} s, the best of {len(seconds)}")
    assert min(seconds) < 2.0
