"""``fedlearn tasks``: the built-in learning problems."""

from __future__ import annotations

from typing import Any

from fedlearn.cli.arguments import AsJson
from fedlearn.errors import DependencyError, MissingError
from fedlearn.tasks import BUILT_IN, load_task

__all__ = ["run"]


def run(as_json: AsJson = False) -> None:
    """List the built-in learning problems, and say how to name one of your own."""
    found = [_described(name) for name in BUILT_IN]
    if as_json:
        from fedlearn.cli.rendering import echo_json

        echo_json({"tasks": found})
        return
    _show(found)


def _described(name: str) -> dict[str, Any]:
    """Return what is known of one task; counts of data that is not on this machine are ``None``."""
    place, purpose = BUILT_IN[name]
    task = load_task(name)
    parameters = sum(each.numel() for each in task.build_model().parameters())
    described: dict[str, Any] = {"name": name, "class": place, "what": purpose, "parameters": parameters}
    try:
        train, test = task.load_pool(None).train, task.load_test(None)
    except MissingError as error:
        package = error.package if isinstance(error, DependencyError) else None
        return {**described, "examples": None, "test_examples": None, "input_shape": None, "needs": package}
    counts = {"examples": len(train), "test_examples": len(test) if test is not None else 0}
    return {**described, **counts, "input_shape": list(train.inputs.shape[1:]), "needs": None}


def _show(found: list[dict[str, Any]]) -> None:
    """Write the table, and how to name a task of one's own."""
    from fedlearn.cli.rendering import console, facts, table

    rows = [[each["name"], each["what"], f"{each['parameters']:,}", _count(each["examples"])] for each in found]
    made = table(["task", "what it is", "parameters", "examples"], rows)
    made.columns[1].justify = "left"
    stdout = console()
    stdout.print()
    stdout.print(made)
    if any(each["needs"] for each in found):
        stdout.print(
            "The examples come with scikit-learn, which is not installed. "
            "In fedlearn's folder: pip install '.[simulation]'\n",
            style="yellow",
        )
    own = [
        ("write one", "fedlearn init my_task.py"),
        ("name it", "path/to/my_task.py[:Class], or package.module:Class"),
        ("train it", "fedlearn simulate my_task.py"),
    ]
    stdout.print(facts(own, title="A task of your own"))


def _count(examples: int | None) -> str:
    """Return how many examples there are to train on."""
    return "unknown" if examples is None else f"{examples:,}"
