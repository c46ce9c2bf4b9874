"""Finding a user's class in a module or a file."""

from __future__ import annotations

import pickle
import sys
from abc import ABC, abstractmethod
from textwrap import dedent
from typing import Protocol

import pytest

from fedlearn.errors import DataError, MissingError, TaskError, TaskNotFoundError, UsageError
from fedlearn.plugins import load_class


class Shape(Protocol):
    """A protocol with an attribute, for which issubclass raises."""

    sides: int = 0

    def area(self) -> float:
        """Return its area."""
        ...


class Solid(ABC):
    """An abstract base."""

    @abstractmethod
    def volume(self) -> float:
        """Return its volume."""


@pytest.fixture(autouse=True)
def bases(monkeypatch):
    """Let the files below import this module, and forget what they imported."""
    monkeypatch.setitem(sys.modules, "plugin_bases", sys.modules[__name__])
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.fixture
def write(tmp_path):
    def _write(name, text):
        path = tmp_path / name
        path.write_text("from plugin_bases import Shape, Solid\n" + dedent(text))
        return str(path)

    return _write


SQUARE = """
    class Square(Shape):
        sides = 4
"""


def test_a_file_with_one_class(write):
    found = load_class(write("one.py", SQUARE), Shape, kind="shape")
    assert (found.__name__, found.sides) == ("Square", 4)


def test_the_same_file_is_the_same_class_however_it_is_written(write, tmp_path, monkeypatch):
    path = write("one.py", SQUARE)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.py").symlink_to(path)
    found = {load_class(spec, Shape, kind="shape") for spec in (path, "one.py", "./one.py:Square", "link.py")}
    assert len(found) == 1


def test_two_files_of_one_name_are_two_modules(write, tmp_path):
    (tmp_path / "other").mkdir()
    first = load_class(write("one.py", SQUARE), Shape, kind="shape")
    second = load_class(write("other/one.py", SQUARE), Shape, kind="shape")
    assert first is not second
    assert first.__module__ != second.__module__


def test_an_instance_can_be_pickled(write):
    found = load_class(write("with-hyphen.py", SQUARE), Shape, kind="shape")
    assert type(pickle.loads(pickle.dumps(found()))) is found  # noqa: S301


def test_a_file_imports_its_siblings(write):
    write("sibling_of_plugin.py", "SIDES = 6")
    path = write("hexagon.py", "from sibling_of_plugin import SIDES\nclass Hexagon(Shape):\n    sides = SIDES\n")
    before = list(sys.path)
    assert load_class(path, Shape, kind="shape").sides == 6
    assert sys.path == before


def test_private_abstract_imported_and_aliased_classes_do_not_count(write):
    write("more_shapes.py", "class Elsewhere(Shape): ...")
    text = """
        from typing import Protocol
        from more_shapes import Elsewhere
        class _Base(Shape): ...
        class Wider(Shape, Protocol): ...
        class Circle(_Base): ...
        Round = Circle
        class Unrelated: ...
    """
    assert load_class(write("many.py", text), Shape, kind="shape").__name__ == "Circle"


def test_an_imported_class_counts_when_named(write):
    write("more_shapes.py", "class Elsewhere(Shape): ...")
    path = write("naming.py", "from more_shapes import Elsewhere")
    assert load_class(f"{path}:Elsewhere", Shape, kind="shape").__name__ == "Elsewhere"


def test_several_classes_need_a_name(write):
    path = write("two.py", "class A(Shape): ...\nclass B(Shape): ...")
    with pytest.raises(UsageError, match=r"defines several shapes; write .*two\.py:A, or :B"):
        load_class(path, Shape, kind="shape")
    assert load_class(f"{path}:B", Shape, kind="shape").__name__ == "B"


def test_a_file_without_one(write):
    with pytest.raises(MissingError, match=r"none\.py defines no shape: no class in it subclasses .*Shape"):
        load_class(write("none.py", "class A: ..."), Shape, kind="shape")


def test_a_class_that_is_not_there(write):
    path = write("one.py", SQUARE + "\nnumber = 3\n".replace("\n", "\n    "))
    with pytest.raises(MissingError, match=r"no class 'Sqare'\. Did you mean 'Square'\? It defines these shapes"):
        load_class(f"{path}:Sqare", Shape, kind="shape")
    with pytest.raises(MissingError, match=r"'number' in .* is not a class"):
        load_class(f"{path}:number", Shape, kind="shape")


def test_a_class_of_another_kind(write):
    path = write("other.py", "class Look:\n    sides = 4\n    def area(self): return 1.0\n")
    with pytest.raises(UsageError, match=r"Look in .*other\.py is no shape: it must subclass .*\.Shape"):
        load_class(f"{path}:Look", Shape, kind="shape")


def test_an_unfinished_class(write):
    path = write("solid.py", "class Cube(Solid): ...")
    with pytest.raises(UsageError, match="unfinished: it does not define volume"):
        load_class(f"{path}:Cube", Solid, kind="solid")
    with pytest.raises(MissingError, match="defines no solid"):
        load_class(path, Solid, kind="solid")


def test_what_a_file_raises_surfaces_with_its_line(write):
    path = write("breaks.py", "\n\nimport json\njson.loads('{')\nclass A(Shape): ...")
    with pytest.raises(UsageError, match=r"breaks\.py, line 5: JSONDecodeError: Expecting") as caught:
        load_class(path, Shape, kind="shape")
    assert isinstance(caught.value.__cause__, ValueError)
    assert not any(name.startswith("fedlearn_file_breaks") for name in sys.modules)


def test_what_a_sibling_raises_surfaces_with_the_siblings_line(write):
    write("bad_sibling.py", "1 / 0")
    with pytest.raises(UsageError, match=r"bad_sibling\.py, line 2: ZeroDivisionError"):
        load_class(write("uses.py", "import bad_sibling"), Shape, kind="shape")


def test_a_syntax_error_has_its_line(write):
    with pytest.raises(UsageError, match=r"typo\.py, line 3: SyntaxError: "):
        load_class(write("typo.py", "\nclass A(Shape)\n"), Shape, kind="shape")


def test_a_script_that_exits_does_not_end_the_process(write):
    with pytest.raises(UsageError, match=r"script\.py, line 3: SystemExit: 0"):
        load_class(write("script.py", "import sys\nsys.exit(0)"), Shape, kind="shape")


def test_an_interrupt_passes_through(write):
    path = write("interrupted.py", "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        load_class(path, Shape, kind="shape")
    assert not any(name.startswith("fedlearn_file_interrupted") for name in sys.modules)


def test_our_own_errors_pass_through(write):
    path = write("own_error.py", "from fedlearn.errors import DataError\nraise DataError('no data here')")
    with pytest.raises(DataError, match=r"^no data here$"):
        load_class(path, Shape, kind="shape")


def test_a_package_that_is_missing(write):
    path = write("needs.py", "import no_such_package_for_fedlearn")
    with pytest.raises(MissingError, match=r"needs\.py, line 2: .*no_such_package_for_fedlearn.*Install"):
        load_class(path, Shape, kind="shape")


def test_a_file_that_is_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingError, match=r"there is no file gone\.py to find the shape in \(looked in "):
        load_class("gone.py:Square", Shape, kind="shape")
    (tmp_path / "folder.py").mkdir()
    with pytest.raises(MissingError, match="there is no file"):
        load_class("folder.py", Shape, kind="shape")


def test_a_module(write, tmp_path, monkeypatch):
    write("plugin_module.py", SQUARE)
    write("plugin_module_breaks.py", "raise RuntimeError('at import')")
    monkeypatch.syspath_prepend(tmp_path)
    assert load_class("plugin_module:Square", Shape, kind="shape").sides == 4
    with pytest.raises(UsageError, match=r"plugin_module_breaks\.py, line 2: RuntimeError: at import"):
        load_class("plugin_module_breaks:Square", Shape, kind="shape")
    with pytest.raises(MissingError, match="no class 'Circle'"):
        load_class("plugin_module:Circle", Shape, kind="shape")


@pytest.mark.parametrize("spec", ["no_such_module_fl:A", "fedlearn.no_such:A", "fedlearn.errors.deeper:A"])
def test_a_module_that_is_missing(spec):
    with pytest.raises(MissingError, match="there is no module"):
        load_class(spec, Shape, kind="shape")


@pytest.mark.parametrize("spec", ["", ":", "a", "a:", ":A", ".a:A", "a..b:A", "a b:A", "a/b:A", "a.py:A-B", ".py"])
def test_what_is_none_of_the_forms(spec):
    with pytest.raises(UsageError, match=r"write package\.module:Class, or path/to/file\.py"):
        load_class(spec, Shape, kind="shape")


def test_a_task_has_errors_of_its_own(write):
    with pytest.raises(TaskNotFoundError):
        load_class("/gone/task.py", Shape, kind="task")
    with pytest.raises(TaskError):
        load_class(write("broken_task.py", "1 / 0"), Shape, kind="task")
