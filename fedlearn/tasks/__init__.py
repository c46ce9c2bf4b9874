"""The built-in learning problems, each one a file worth copying, and how any task is found by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedlearn.errors import FedlearnError, TaskError, TaskNotFoundError, nearest
from fedlearn.plugins import load_class

if TYPE_CHECKING:
    from fedlearn.learning.task import Task

__all__ = ["BUILT_IN", "load_task"]

BUILT_IN = {
    "digits": ("fedlearn.tasks.digits:Digits", "Handwritten digits, 8×8 pixels, 10 classes; a small CNN"),
    "digits-mlp": ("fedlearn.tasks.digits:DigitsMlp", "The same digits; a perceptron with one hidden layer"),
    "regression": ("fedlearn.tasks.regression:Regression", "Diabetes progression from 10 measurements; linear"),
}
"""Name → (where it is, what it is)."""


def load_task(name: str) -> Task:
    """Return the task of a built-in name, ``package.module:Class``, or ``path/to/my_task.py[:Class]``.

    Raises:
        TaskNotFoundError: there is no such name, module, file or class.
        TaskError: there is one, but it is no task, or it cannot be created without arguments.
    """
    if name in BUILT_IN:
        name = BUILT_IN[name][0]
    elif ":" not in name and not name.endswith(".py"):
        hint = nearest(name, BUILT_IN)
        raise TaskNotFoundError(
            f"there is no task {name!r}."
            + (f" Did you mean {hint!r}?" if hint else "")
            + f" Built in: {', '.join(BUILT_IN)}. Your own: path/to/my_task.py, or package.module:Class."
        )
    from fedlearn.learning.task import Task  # torch: only once the name can be one

    found = load_class(name, Task, kind="task")  # type: ignore[type-abstract]
    try:
        return found()
    except FedlearnError:
        raise
    except Exception as error:
        raise TaskError(f"{found.__name__}() raised {type(error).__name__}: {error}") from error
