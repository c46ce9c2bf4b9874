"""Using a trained model: load it, read what people bring, answer."""

from __future__ import annotations

import csv
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from fedlearn.errors import DataError, FedlearnError, RunUnreadableError, TaskError, UsageError
from fedlearn.learning.model import FlatModel, build_flat_model, computing
from fedlearn.learning.task import Examples, Task
from fedlearn.learning.trainer import evaluate
from fedlearn.sources import SeedTree

__all__ = ["Answers", "Question", "answer", "example_of", "load_model", "read_question", "score"]

_BATCH = 1024
_TARGETS = ("target", "targets")


@dataclass(frozen=True, eq=False, kw_only=True)
class Question:
    """What a model is asked.

    Attributes:
        inputs: tensor of shape (n, …), as the model takes it.
        targets: what it should answer, shape (n,) or (n, …), or ``None`` where nobody knows.
    """

    inputs: Tensor
    targets: Tensor | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Answers:
    """What a model answers.

    Attributes:
        decoded: the task's reading of every output, shape (n, …).
        probabilities: the softmax of the answered class, shape (n,), or ``None`` where answers are not classes.
    """

    decoded: Tensor
    probabilities: Tensor | None


# -- the model -----------------------------------------------------------------------------------------------------


def load_model(task: Task, path: Path, *, sha256: str | None, seed: int) -> FlatModel:
    """Build the task's model and fill it with the state in the safetensors file at ``path``.

    Guarantees: every tensor of the model is in the file with its own shape, and nothing else is; with
    ``sha256`` given, the file is byte for byte the one that was written.

    Args:
        task: the task that the state was trained for.
        path: the file.
        sha256: the hexadecimal SHA-256 that the file should have, or ``None`` where nobody noted it.
        seed: the run's; what a model draws at construction and does not save comes out as it was then.

    Raises:
        RunUnreadableError: the file is missing or damaged, or does not fit the task's model.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RunUnreadableError(f"{path} cannot be read: {error.strerror}; copy it there, or train again") from error
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise RunUnreadableError(
            f"{path} is damaged: it is not the file that the run wrote "
            f"(its SHA-256 should begin with {sha256[:12]}); copy it again, or train again"
        )
    try:
        state = load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise RunUnreadableError(f"{path} is damaged: {_first_line(error)}; copy it again, or train again") from error
    model = build_flat_model(task, SeedTree.root(seed).child("initialise"))
    try:
        model.module.load_state_dict(state)
    except RuntimeError as error:
        detail = str(error).strip().splitlines()[-1].strip()
        raise RunUnreadableError(
            f"{path} does not fit the model of {type(task).__name__}: {detail} "
            "Was the task changed since? Bring back the task as it was, or train again"
        ) from error
    return model


def answer(model: FlatModel, task: Task, inputs: Tensor) -> Answers:
    """Return what the model answers to ``inputs``, shape (n, …), in batches, in evaluation mode, without gradients.

    Raises:
        UsageError: the model does not accept such inputs.
        TaskError: the task's ``decode`` does not return one answer an example.
    """
    decoded, probabilities = [], []
    model.module.eval()
    with computing(SeedTree.root(0)), torch.inference_mode():
        for start in range(0, len(inputs), _BATCH):
            batch = inputs[start : start + _BATCH].clone()  # a model may work in place
            output = _forward(model, batch)
            part = task.decode(output)
            if part.dim() == 0 or len(part) != len(batch):
                raise TaskError(
                    f"{type(task).__name__}.decode returned shape {tuple(part.shape)}; "
                    f"it must return one answer an example, shape ({len(batch)}, …)"
                )
            decoded.append(part)
            probabilities.append(_probabilities(output, part))
    sure = [part for part in probabilities if part is not None]
    return Answers(
        decoded=torch.cat(decoded),
        probabilities=torch.cat(sure) if len(sure) == len(decoded) else None,
    )


def score(model: FlatModel, task: Task, question: Question, *, seed: int) -> dict[str, float]:
    """Return mean loss and metrics, exactly as a run measures them; nothing where there are no targets.

    Raises:
        DataError: the targets are not what the task's loss or metrics take.
    """
    if question.targets is None:
        return {}
    examples = Examples(question.inputs, question.targets)
    seeds = SeedTree.root(seed).child("validate")
    try:
        means = evaluate(model, task, model.vector(), examples, seeds=seeds).means()
    except FedlearnError:
        raise
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise DataError(f"the task cannot compare its answers with these targets: {_first_line(error)}") from error
    return {name: float(value) for name, value in means.items()}


def example_of(task: Task, path: Path | None, *, at_least: int = 1) -> Examples:
    """Return the task's central test set, or where it has none what a simulation deals out: what inputs look like.

    Raises:
        FedlearnError: the task has neither, or its data is missing.
    """
    examples = task.load_test(path)
    if examples is None or len(examples) < at_least:
        examples = task.load_pool(path).train
    if len(examples) < at_least:
        raise DataError(f"{type(task).__name__} has no example to go by")
    return examples


def _forward(model: FlatModel, batch: Tensor) -> Tensor:
    """Return the model's output for one batch."""
    try:
        output = model.module(batch)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        shape, reason = tuple(batch.shape[1:]), _first_line(error)
        raise UsageError(f"the model does not accept examples of shape {shape}: {reason}") from error
    if not isinstance(output, Tensor):
        raise TaskError(f"the model returned {type(output).__name__}, not a tensor")
    return output


def _probabilities(output: Tensor, decoded: Tensor) -> Tensor | None:
    """Return the softmax of the answered class where outputs are rows of class scores and answers are classes."""
    classes = output.dim() == 2 and output.shape[1] > 1 and output.is_floating_point()
    if not classes or decoded.dim() != 1 or decoded.is_floating_point() or not torch.equal(decoded, output.argmax(1)):
        return None
    return output.double().softmax(dim=1).amax(dim=1)


# -- what people bring ---------------------------------------------------------------------------------------------


def read_question(path: Path, like: Examples | None) -> Question:
    """Read inputs, and targets where there are any, from a file.

    ``.npz``: the arrays ``inputs`` and, optionally, ``targets``. ``.npy``: the inputs. ``.csv``: one row an
    example, one column a number, with or without a header; a column called ``target`` holds the targets.

    An example has the shape that the task's own examples have, or is a row of as many numbers, in C order;
    nothing else is reshaped. Where the task has no examples to compare with (``like`` is ``None``), inputs
    stay as they are in the file, and the model judges.

    Raises:
        DataError: the file is missing or unreadable, an array has another shape, a value is no finite number.
            The message names the file, in a ``.csv`` the row and column, and the shape that is expected.
    """
    readers = {".npz": _read_npz, ".npy": _read_npy, ".csv": _read_csv}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: what kind of file is this? Give an .npz, .npy or .csv file")
    try:
        inputs, targets = reader(path)
    except FileNotFoundError as error:
        raise DataError(f"{path}: there is no such file") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or _first_line(error)}") from error
    inputs = _shaped(path, inputs, like)
    _check_finite(path, "inputs", inputs)
    if targets is None:
        return Question(inputs=_typed(path, inputs, like.inputs.dtype if like else None))
    targets = _shaped_targets(path, targets, len(inputs), like)
    _check_finite(path, "targets", targets)
    return Question(
        inputs=_typed(path, inputs, like.inputs.dtype if like else None),
        targets=_typed(path, targets, like.targets.dtype if like else None),
    )


def _read_npz(path: Path) -> tuple[NDArray[np.generic], NDArray[np.generic] | None]:
    """Return the arrays ``inputs`` and ``targets``."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: np.asarray(archive[name]) for name in archive.files}
    except OSError:
        raise
    except Exception as error:  # of a damaged file, zipfile, zlib and NumPy raise nearly anything
        raise DataError(f"{path}: is not a readable .npz file with plain arrays") from error
    if "inputs" not in arrays:
        found = ", ".join(sorted(arrays)) or "none"
        raise DataError(f"{path}: holds no array 'inputs'; its arrays: {found}")
    return arrays["inputs"], arrays.get("targets")


def _read_npy(path: Path) -> tuple[NDArray[np.generic], None]:
    """Return the one array."""
    try:
        return np.asarray(np.load(path, allow_pickle=False)), None
    except (ValueError, TypeError, EOFError) as error:
        raise DataError(f"{path}: is not a readable .npy file with a plain array") from error


def _read_csv(path: Path) -> tuple[NDArray[np.generic], NDArray[np.generic] | None]:
    """Return the numbers of a table, shape (rows, columns), and those of its column ``target`` where it has one."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as handle:
            rows = [(number, row) for number, row in enumerate(csv.reader(handle), start=1) if any(map(str.strip, row))]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: is not a readable .csv file: {_first_line(error)}") from error
    header: list[str] = []
    if rows and not any(_is_number(cell) for cell in rows[0][1]):
        header = [cell.strip() for cell in rows.pop(0)[1]]
    if not rows:
        raise DataError(f"{path}: holds no row of numbers")
    width = len(header) or len(rows[0][1])
    table = np.array([_numbers(path, number, row, width, header) for number, row in rows])
    places = [index for index, name in enumerate(header) if name.lower() in _TARGETS]
    if not places:
        return table, None
    return np.delete(table, places, axis=1), table[:, places[0]]


def _numbers(path: Path, number: int, row: Sequence[str], width: int, header: Sequence[str]) -> list[float]:
    """Return one row's numbers."""
    if len(row) != width:
        raise DataError(f"{path}, row {number}: has {len(row)} columns where {width} are expected")
    numbers = []
    for index, cell in enumerate(row):
        if not (_is_number(cell) and math.isfinite(float(cell))):
            column = f"column {index + 1}" + (f" ({header[index]})" if header else "")
            raise DataError(f"{path}, row {number}, {column}: {cell.strip()[:40]!r} is not a finite number")
        numbers.append(float(cell))
    return numbers


def _is_number(cell: str) -> bool:
    """Return whether Python reads the cell as a number, ``nan`` included."""
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _shaped(path: Path, inputs: NDArray[np.generic], like: Examples | None) -> NDArray[np.generic]:
    """Return the inputs with the shape that the task's own have."""
    if like is None:
        if inputs.ndim == 0 or not len(inputs):
            raise DataError(f"{path}: holds no example; one row an example is expected")
        return inputs
    shape = tuple(like.inputs.shape[1:])
    size = math.prod(shape)
    expected = _shape_text(("n", *shape)) + (f", or {size} columns" if len(shape) != 1 else "")
    if inputs.ndim == 0 or not len(inputs):
        raise DataError(f"{path}: holds no example; inputs of shape {expected} are expected")
    if inputs.shape[1:] != shape and inputs.shape[1:] != (size,):
        raise DataError(f"{path}: inputs have shape {_shape_text(inputs.shape)}; {expected} is expected")
    return inputs.reshape(len(inputs), *shape)


def _shaped_targets(path: Path, targets: NDArray[np.generic], count: int, like: Examples | None) -> NDArray[np.generic]:
    """Return the targets with the shape that the task's own have."""
    if targets.shape[:1] != (count,):
        raise DataError(
            f"{path}: {count} inputs but targets of shape {_shape_text(targets.shape)}; one each is expected"
        )
    shape = tuple(like.targets.shape[1:]) if like is not None else targets.shape[1:]
    if targets.shape[1:] != shape and targets.shape[1:] != (math.prod(shape),):
        expected = _shape_text(("n", *shape))
        raise DataError(f"{path}: targets have shape {_shape_text(targets.shape)}; {expected} is expected")
    return targets.reshape(count, *shape)


def _shape_text(shape: Sequence[int | str]) -> str:
    """Return a shape as Python writes it."""
    return f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"


def _check_finite(path: Path, name: str, values: NDArray[np.generic]) -> None:
    """Raise unless every value is a finite number."""
    if values.dtype.kind not in "biuf":
        raise DataError(f"{path}: {name} are of type {values.dtype}; numbers are expected")
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        place = ", ".join(str(int(index)) for index in bad[0])
        raise DataError(f"{path}: {name}[{place}] is {values[tuple(bad[0])]}; finite numbers are expected")


def _typed(path: Path, values: NDArray[np.generic], dtype: torch.dtype | None) -> Tensor:
    """Return the values as a tensor of the type the task uses."""
    if dtype is None:
        dtype = torch.float32 if values.dtype.kind == "f" else torch.int64
    if not (dtype.is_floating_point or dtype.is_complex) and values.dtype.kind == "f":
        bad = np.argwhere(values != np.trunc(values))
        if len(bad):
            raise DataError(f"{path}: {values[tuple(bad[0])]} stands where whole numbers are expected")
    if values.dtype.kind == "u":
        values = values.astype(np.int64)
    native = np.ascontiguousarray(values.astype(values.dtype.newbyteorder("=")))
    return torch.from_numpy(native).to(dtype)


def _first_line(error: BaseException) -> str:
    """Return the first line of an exception's text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
