"""``fedlearn predict``: use a run's model on data."""

from __future__ import annotations

import csv
import io
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedlearn.cli.arguments import AsJson
from fedlearn.errors import DataError, MissingError, RunUnreadableError, TaskError, UsageError

if TYPE_CHECKING:
    from fedlearn.federation.run_folder import RunFolder
    from fedlearn.learning import Examples, FlatModel, Task
    from fedlearn.learning.inference import Answers, Question

__all__ = ["FinishedRun", "RunArgument", "check_out", "open_finished", "run", "say"]

_SHOWN = 20

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finished run.", show_default=False)]


def run(
    run: RunArgument,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="An .npz (arrays inputs and, for metrics, targets), .npy or .csv file; a column called target in a "
            ".csv holds the targets. Left out: the task's own central test set.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE.csv", help="Write every prediction to this file.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Use a run's model on data; where the right answers are known, say how good it is.

    Inputs are what the model sees: where the task scales each client's data (Task.prepare), scale them alike.
    """
    if out is not None:
        check_out(out, ".csv", keep=(data,))
    finished = open_finished(run)
    warnings = finished.warnings()
    if data is not None and finished.prepares:
        warnings.append(
            f"the model was trained on prepared data, and --data is used as it is: scale it as "
            f"{type(finished.task).__name__}.prepare does"
        )
    say(warnings)
    from fedlearn.learning.inference import answer, score

    question = _question(finished, data)
    try:
        answers = answer(finished.model, finished.task, question.inputs)
        metrics = score(finished.model, finished.task, question, seed=finished.folder.config.seed)
    except (DataError, UsageError) as error:
        if data is None or isinstance(error, TaskError):  # then it is not the file's fault
            raise
        raise DataError(f"{data}: {error}") from error
    rows = _Rows(finished.task, answers, question)
    if out is not None:
        from fedlearn.files import write_atomic

        write_atomic(out, rows.csv().encode())
    if as_json:
        from fedlearn.cli.rendering import echo_json

        echo_json({**rows.body(finished.folder, metrics, out), "warnings": warnings})
    else:
        _show(finished.folder, rows, metrics, data, out)


# -- the run, for every verb that uses a model ---------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """A finished run: its folder, its task, and its model with the trained parameters."""

    folder: RunFolder
    task: Task
    model: FlatModel

    @property
    def data_path(self) -> Path | None:
        """Where the task reads its data, or ``None``."""
        path = self.folder.config.data.path
        return Path(path) if path is not None else None

    @property
    def prepares(self) -> bool:
        """Whether the task prepares each client's data, so that the model knows no other."""
        from fedlearn.learning import prepares

        return prepares(self.task)

    def warnings(self) -> list[str]:
        """Return what whoever uses the model should know of the run."""
        summary = self.folder.summary()
        if summary.get("finished", True):
            return []
        return [f"this run ended early, after round {summary.get('rounds')} of {self.folder.config.federation.rounds}"]


def say(warnings: Sequence[str]) -> None:
    """Write warnings on standard error, a line each."""
    for warning in warnings:
        typer.echo(f"{typer.style('Note', fg='yellow', bold=True)}  {warning}", err=True)


def open_finished(path: Path) -> FinishedRun:
    """Return what the folder of a run holds that is finished, or ended early with a model.

    Raises:
        RunUnreadableError: there is no run, it has no model yet, or its model is missing, damaged, or does not
            fit the task.
        TaskNotFoundError: the task is not where it was.
    """
    from fedlearn.federation.run_folder import RunFolder

    try:
        folder = RunFolder.open(path)
        summary = folder.summary()
    except OSError as error:
        raise RunUnreadableError(f"{path} cannot be read: {error.strerror}") from error
    digest = summary.get("model_sha256")
    if not isinstance(digest, str):
        raise RunUnreadableError(f"{path}/summary.json is damaged: it does not say which model it is about")
    from fedlearn.learning.inference import load_model
    from fedlearn.tasks import load_task

    task = load_task(folder.config.task)
    model = load_model(task, folder.model_path, sha256=digest, seed=folder.config.seed)
    return FinishedRun(folder=folder, task=task, model=model)


def check_out(out: Path, suffix: str, *, keep: tuple[Path | None, ...] = ()) -> None:
    """Refuse, before any work, a file that cannot or must not be written.

    Raises:
        UsageError: it has another suffix, is a folder, or is one of the files to ``keep``.
        MissingError: its folder does not exist.
    """
    if out.suffix.lower() != suffix:
        raise UsageError(f"--out {out}: this writes a {suffix} file, so name it {out.with_suffix(suffix).name}")
    if out.is_dir():
        raise UsageError(f"--out {out} is a folder; name a file in it")
    if any(each is not None and each.resolve() == out.resolve() for each in keep):
        raise UsageError(f"--out {out} is a file to read from; choose another name")
    if not out.parent.is_dir():
        raise MissingError(f"there is no folder {out.parent}; make it first: mkdir -p {shlex.quote(str(out.parent))}")


# -- what is asked and what is answered ----------------------------------------------------------------------------


def _question(finished: FinishedRun, data: Path | None) -> Question:
    """Return what the model is asked: the file's examples, or the task's central test set."""
    from fedlearn.learning.inference import Question, read_question

    if data is not None:
        return read_question(data, _like(finished))
    test = finished.task.load_test(finished.data_path)
    if test is None or not len(test):
        raise UsageError("the task has no central test set; say what to predict: --data FILE")
    return Question(inputs=test.inputs, targets=test.targets)


def _like(finished: FinishedRun) -> Examples | None:
    """Return examples of the task to compare with, or ``None`` where its data is not on this machine."""
    from fedlearn.learning.inference import example_of

    try:
        return example_of(finished.task, finished.data_path)
    except Exception:  # a task of one's own may raise anything where its data is not
        return None


class _Rows:
    """One row a prediction: number, prediction, and what else is known of it."""

    def __init__(self, task: Task, answers: Answers, question: Question) -> None:
        self._names = task.label_names
        self.answers: list[Any] = answers.decoded.tolist()
        self.probabilities: list[float] | None = (
            answers.probabilities.tolist() if answers.probabilities is not None else None
        )
        self.targets: list[Any] | None = question.targets.tolist() if question.targets is not None else None

    def __len__(self) -> int:
        return len(self.answers)

    @property
    def named(self) -> bool:
        """Whether every answer has a name of its own."""
        return bool(self._names) and all(self.name(answer) is not None for answer in self.answers)

    def name(self, answer: object) -> str | None:
        """Return what people call an answer, or ``None``."""
        known = isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(self._names)
        return self._names[answer] if known else None  # type: ignore[call-overload]

    def text(self, answer: object) -> str:
        """Return an answer for people."""
        from fedlearn.cli.rendering import number_text

        if (name := self.name(answer)) is not None:
            return name
        if isinstance(answer, list):
            shown = " ".join(self.text(each) for each in answer[:6])
            return shown + (" …" if len(answer) > 6 else "")
        return number_text(answer) if isinstance(answer, float) else str(answer)

    def body(self, folder: RunFolder, metrics: dict[str, float], out: Path | None) -> dict[str, Any]:
        """Return the predictions as one JSON object; what is no finite number becomes ``null``."""
        body: dict[str, Any] = {
            "run": str(folder.path.resolve()),
            "count": len(self),
            "predictions": _finite(self.answers),
            "metrics": _finite(metrics),
        }
        if self.named:
            body["labels"] = [self.name(answer) for answer in self.answers]
        if self.probabilities is not None:
            body["probabilities"] = _finite(self.probabilities)
        if out is not None:
            body["out"] = str(out.resolve())
        return body

    def csv(self) -> str:
        """Return every prediction as a table with a header, a column for each number of an answer."""
        first = _flat(self.answers[0])
        several = [f"prediction_{place}" for place in range(len(first))]
        columns = ["row", *(["prediction"] if len(first) == 1 else several)]
        columns += ["label"] * self.named + ["probability"] * (self.probabilities is not None)
        single_target = self.targets is not None and len(_flat(self.targets[0])) == 1
        columns += ["target"] * single_target
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(columns)
        for index, each in enumerate(self.answers):
            row = [index, *_flat(each)]
            row += [self.name(each)] if self.named else []
            row += [self.probabilities[index]] if self.probabilities is not None else []
            row += _flat(self.targets[index]) if self.targets is not None and single_target else []
            writer.writerow(row)
        return text.getvalue()


def _flat(answer: object) -> list[Any]:
    """Return the numbers of an answer, however deeply they are nested."""
    return [number for each in answer for number in _flat(each)] if isinstance(answer, list) else [answer]


def _finite(value: Any) -> Any:
    """Return ``value`` with ``None`` in the place of every number that JSON does not know."""
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# -- for people ----------------------------------------------------------------------------------------------------


def _show(folder: RunFolder, rows: _Rows, metrics: dict[str, float], data: Path | None, out: Path | None) -> None:
    """Write the first predictions, the metrics, and where the rest is."""
    from fedlearn.cli.rendering import console, count_text, facts, number_text, table, task_text

    targets, probabilities = rows.targets, rows.probabilities
    columns = ["#", "prediction"] + ["probability"] * (probabilities is not None)
    columns += ["target", ""] if targets is not None else []
    exact = targets is not None and all(isinstance(each, int) for each in (*rows.answers, *targets))
    shown = []
    for index, each in enumerate(rows.answers[:_SHOWN]):
        row = [str(index), rows.text(each)]
        row += [f"{probabilities[index]:.3f}"] if probabilities is not None else []
        if targets is not None:
            row += [rows.text(targets[index]), "✗" if exact and targets[index] != each else ""]
        shown.append(row)
    stdout = console()
    stdout.print()
    stdout.print(table(columns, shown))
    left = len(rows) - len(shown)
    if left:
        where = "they are in the file below" if out is not None else "--out FILE.csv writes them all"
        stdout.print(f"… and {left:,} more; {where}.\n", style="dim")
    told = [(name.replace("_", " "), number_text(value)) for name, value in _headline_first(metrics)]
    about = [
        (
            "examples",
            f"{len(rows):,}, {data if data is not None else 'the task' + chr(39) + 's central test set'}",
        ),
        *([("predictions", str(out))] if out is not None else []),
        ("run", str(folder.path)),
    ]
    stdout.print(facts([*told, *about], title=task_text(folder.config.task), headline=min(1, len(told))))
    if not told:
        stdout.print(f"\nNo metrics: {count_text(len(rows), 'example')} without targets.", style="dim")


def _headline_first(metrics: dict[str, float]) -> list[tuple[str, float]]:
    """Return the metrics with the loss, which every task has, last."""
    return sorted(metrics.items(), key=lambda item: item[0] == "loss")
