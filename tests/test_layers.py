"""Who may import whom, read from the source: the table in the architecture is a test, not a wish."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LAYERS: tuple[frozenset[str], ...] = (
    frozenset(
        {
            "errors",
            "config",
            "config_reading",
            "faults_config",
            "privacy_config",
            "scenario",
            "secagg_config",
            "plugins",
            "profiling",
            "sources",
            "arrays",
            "files",
        }
    ),
    frozenset({"privacy", "secagg"}),
    frozenset({"learning", "algorithms", "charts", "data", "tasks", "audit"}),
    frozenset({"federation", "tracking"}),
    frozenset({"flower"}),
    frozenset({"cli", "report", "simulation", "edge", "__main__"}),
)
"""What stands below ``fedlearn``, by layer. A new package has to be given its own here."""

APPS = ("server", "clients", "simulations")
"""They import ``fedlearn``; it never imports them, nor do they import each other."""

THIRD_PARTY = {0: {"numpy", "tomli_w"}, 1: {"numpy", "cryptography", "dp_accounting"}}
"""All that the lowest layers may import besides the standard library."""

LAZY = {"tomli_w", "dp_accounting"}
"""What those layers import only where it is used."""

NO_TORCH = ("algorithms", "privacy", "secagg")


@dataclass(frozen=True)
class Import:
    """One import: who, what, on which line; whether it happens when the module is imported."""

    module: str
    target: str
    line: int
    at_import: bool

    def __str__(self) -> str:
        return f"{self.module}, line {self.line}, imports {self.target}"


# -- reading -------------------------------------------------------------------------------------------------------


def modules_below(root: Path) -> dict[str, Path]:
    """Return every module of the project by its full name."""
    found = {}
    for top in ("fedlearn", *APPS):
        for path in sorted((root / top).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(module: str, path: Path) -> Iterator[Import]:
    """Yield every import of a module, those in functions and under TYPE_CHECKING included."""
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    yield from _walk(tree, module, package, at_import=True)


def _walk(node: ast.AST, module: str, package: str, *, at_import: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom | ast.Call):
            for target in _targets(child, package):
                yield Import(module, target, child.lineno, at_import)
        later = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for each in child.body:
                yield from _walk(ast.Module([each], []), module, package, at_import=False)
            for each in child.orelse:
                yield from _walk(ast.Module([each], []), module, package, at_import=at_import)
            continue
        yield from _walk(child, module, package, at_import=at_import and not later)


def _targets(node: ast.Import | ast.ImportFrom | ast.Call, package: str) -> list[str]:
    """Return the names that a statement, or ``import_module("…")``, imports; ``from a import b`` gives ``a.b``."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        parents = package.split(".")
        base = parents[: len(parents) - node.level + 1] if node.level else []
        origin = ".".join([*base, *([node.module] if node.module else [])])
        return [f"{origin}.{alias.name}" for alias in node.names]
    called = ast.unparse(node.func).rpartition(".")[2]
    constant = node.args[0] if node.args else None
    if called in ("import_module", "__import__") and isinstance(constant, ast.Constant):
        return [str(constant.value)]
    return []


# -- judging -------------------------------------------------------------------------------------------------------


def layer_of(module: str) -> int | None:
    """Return the layer of a module of fedlearn; ``None`` where the table does not know it."""
    parts = module.split(".")
    if len(parts) == 1:
        return 0
    return next((layer for layer, names in enumerate(LAYERS) if parts[1] in names), None)


def violations(root: Path) -> list[str]:
    """Return every import that the architecture forbids, as a sentence."""
    modules = modules_below(root)
    found = [f"{module} has no layer: add it to LAYERS" for module in modules if _is_unknown(module)]
    for module, path in modules.items():
        for each in imports_of(module, path):
            found += [f"{each}: {reason}" for reason in _reasons(each, _module_in(each.target, modules))]
    return found


def _is_unknown(module: str) -> bool:
    return module.split(".")[0] == "fedlearn" and layer_of(module) is None


def _module_in(target: str, modules: Mapping[str, Path]) -> str:
    """Return the longest part of a name that is one of our modules, or the name itself."""
    name = target
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name or target


def _reasons(each: Import, target: str) -> Iterator[str]:
    """Yield what is wrong with an import."""
    own, top = each.module.split("."), target.split(".")[0]
    if top in APPS and top != own[0]:
        yield f"nothing imports {top}"
    if top == "flwr" and own[:2] not in (["fedlearn", "flower"], ["simulations", "benchmarks"]):  # there it is a peer
        yield "only fedlearn.flower imports flwr"
    if own[0] != "fedlearn":
        return
    layer = layer_of(each.module)
    if layer is None:
        return
    if top == "fedlearn":
        below = layer_of(target)
        if below is None or below > layer:
            yield f"layer {layer} may not import from layer {below}"
    elif top not in sys.stdlib_module_names and top not in ("flwr", "_typeshed"):  # the second is mypy's own
        if top == "torch" and (layer < 2 or own[1] in NO_TORCH):
            yield "torch is for the packages that train"
        elif layer in THIRD_PARTY and top not in THIRD_PARTY[layer]:
            yield f"layer {layer} imports only {', '.join(sorted(THIRD_PARTY[layer]))}"
        elif layer in THIRD_PARTY and top in LAZY and each.at_import:
            yield f"{top} is imported only where it is used"


def cycle(root: Path) -> list[str] | None:
    """Return modules of fedlearn that need each other while they are imported, or ``None``.

    Importing ``a.b`` runs ``a`` first, except for what stands below ``a`` itself: there it is under way already.
    """
    modules = {name: path for name, path in modules_below(root).items() if name.split(".")[0] == "fedlearn"}
    graph: dict[str, set[str]] = {module: set() for module in modules}
    for module, path in modules.items():
        for each in imports_of(module, path):
            target = _module_in(each.target, modules)
            if not each.at_import or target not in modules:
                continue
            if target != module:
                graph[module].add(target)
            parent = target.rpartition(".")[0]
            while parent:
                if not f"{module}.".startswith(f"{parent}."):
                    graph[module].add(parent)
                parent = parent.rpartition(".")[0]
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return None


# -- this project --------------------------------------------------------------------------------------------------


def test_every_import_goes_to_the_same_layer_or_a_lower_one() -> None:
    assert violations(ROOT) == []


def test_no_module_needs_itself_while_it_is_imported() -> None:
    assert cycle(ROOT) is None


def test_the_table_knows_every_package_once() -> None:
    names = [name for layer in LAYERS for name in layer]
    assert len(names) == len(set(names))
    modules = modules_below(ROOT)
    assert {"fedlearn", "fedlearn.flower.grid", "server.app", "clients.app"} <= set(modules)
    assert len(modules) > 40


def test_the_checker_sees_flower_where_it_is_allowed() -> None:
    path = ROOT / "fedlearn/flower/grid.py"
    assert any(each.target.startswith("flwr.") for each in imports_of("fedlearn.flower.grid", path))


# -- the checker itself --------------------------------------------------------------------------------------------


def plant(root: Path, files: Mapping[str, str]) -> Path:
    """Write a small project with these files besides empty packages."""
    for place, source in files.items():
        path = root / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
        for folder in path.relative_to(root).parents[:-1]:
            (root / folder / "__init__.py").touch()
    return root


@pytest.mark.parametrize(
    ("place", "source", "reason"),
    [
        ("fedlearn/errors.py", "import fedlearn.learning", "layer 0 may not import from layer 2"),
        ("fedlearn/errors.py", "from fedlearn import learning", "layer 0 may not import from layer 2"),
        ("fedlearn/errors.py", "def f():\n    from fedlearn.cli import main", "layer 0 may not import from layer 5"),
        ("fedlearn/data/x.py", "from ..federation import rounds", "layer 2 may not import from layer 3"),
        ("fedlearn/data/x.py", "from .. import flower", "layer 2 may not import from layer 4"),
        ("fedlearn/federation/x.py", "if TYPE_CHECKING:\n    from fedlearn.flower import g", "layer 3 may not"),
        ("fedlearn/federation/x.py", "import_module('fedlearn.cli')", "layer 3 may not import from layer 5"),
        ("fedlearn/cli/x.py", "from flwr.app import Message", "only fedlearn.flower imports flwr"),
        ("fedlearn/cli/x.py", "if TYPE_CHECKING:\n    import flwr", "only fedlearn.flower imports flwr"),
        ("fedlearn/cli/x.py", "importlib.import_module('flwr.app')", "only fedlearn.flower imports flwr"),
        ("server/app.py", "import flwr", "only fedlearn.flower imports flwr"),
        ("server/app.py", "from clients.app import app", "nothing imports clients"),
        ("clients/app.py", "import simulations.digits", "nothing imports simulations"),
        ("simulations/digits/x.py", "import server", "nothing imports server"),
        ("fedlearn/cli/x.py", "import server.app", "nothing imports server"),
        ("fedlearn/arrays.py", "import torch", "torch is for the packages that train"),
        ("fedlearn/privacy/x.py", "def f():\n    import torch.nn", "torch is for the packages that train"),
        ("fedlearn/algorithms/x.py", "from torch import Tensor", "torch is for the packages that train"),
        ("fedlearn/arrays.py", "import scipy", "layer 0 imports only numpy, tomli_w"),
        ("fedlearn/arrays.py", "import cryptography", "layer 0 imports only numpy, tomli_w"),
        ("fedlearn/config.py", "import tomli_w", "tomli_w is imported only where it is used"),
        ("fedlearn/privacy/x.py", "import dp_accounting", "dp_accounting is imported only where it is used"),
        ("fedlearn/secagg/x.py", "from safetensors import safe_open", "layer 1 imports only"),
        ("fedlearn/helpers/x.py", "", "fedlearn.helpers.x has no layer"),
        ("fedlearn/utils.py", "", "fedlearn.utils has no layer"),
        ("fedlearn/errors.py", "from fedlearn.helpers import x", "layer 0 may not import from layer None"),
    ],
)
def test_a_planted_violation_is_caught(place, source, reason, tmp_path) -> None:
    packages = dict.fromkeys(
        (f"fedlearn/{name}/__init__.py" for name in ("learning", "federation", "flower", "cli")), ""
    )
    helpers = {"fedlearn/helpers/__init__.py": ""} if "helpers" in source else {}
    found = violations(plant(tmp_path, {**packages, **helpers, place: source}))
    assert any(reason in each for each in found), found
    assert len(found) == 1 or "helpers" in place + source


def test_what_is_allowed_is_not_caught(tmp_path) -> None:
    sources = {
        "fedlearn/errors.py": "import json",
        "fedlearn/config.py": "import numpy as np\nfrom fedlearn.errors import E\ndef f():\n    import tomli_w",
        "fedlearn/privacy/x.py": "from fedlearn import config, errors\ndef f():\n    import dp_accounting",
        "fedlearn/secagg/x.py": "import cryptography.hazmat\nfrom fedlearn.privacy import x",
        "fedlearn/learning/x.py": "import torch\nfrom . import y\nfrom ..privacy.x import f",
        "fedlearn/learning/y.py": "import opacus",
        "fedlearn/flower/x.py": "from flwr.app import Message\nfrom fedlearn.learning.x import y",
        "fedlearn/cli/x.py": "import rich\nfrom fedlearn.flower import x\nimport_module(name)",
        "server/app.py": "from fedlearn.flower import x\nimport server.app",
    }
    assert violations(plant(tmp_path, sources)) == []
    assert cycle(tmp_path) is None


def test_a_planted_cycle_is_caught_and_a_lazy_one_is_none(tmp_path) -> None:
    sources = {
        "fedlearn/data/__init__.py": "from fedlearn.data.x import a",
        "fedlearn/data/x.py": "from fedlearn.learning.y import b",
        "fedlearn/learning/y.py": "def f():\n    from fedlearn.data import a\nif TYPE_CHECKING:\n    import fedlearn",
    }
    assert cycle(plant(tmp_path, sources)) is None
    (tmp_path / "fedlearn/learning/y.py").write_text("if TYPE_CHECKING:\n    from fedlearn.data import a")
    assert cycle(tmp_path) is None
    (tmp_path / "fedlearn/learning/y.py").write_text("from fedlearn.data import a")
    assert {"fedlearn.data", "fedlearn.data.x", "fedlearn.learning.y"} <= set(cycle(tmp_path) or ())
    (tmp_path / "fedlearn/learning/y.py").write_text("import fedlearn.data.z")
    (tmp_path / "fedlearn/data/z.py").touch()
    assert cycle(tmp_path) is not None, "the package is run before a module in it"
