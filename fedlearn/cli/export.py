"""``fedlearn export``: a run's model as a file that other programs read."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedlearn.cli.arguments import AsJson
from fedlearn.cli.predict import FinishedRun, RunArgument, check_out, open_finished, say
from fedlearn.errors import DependencyError, RunFailedError

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Format", "run"]

_TOLERANCE = 1e-4
_TRACED = 2  # torch.export takes a batch of one for a constant
_BATCHES = (5, 1, 3)


class Format(StrEnum):
    """What a model can be written as."""

    onnx = "onnx"
    pt2 = "pt2"
    safetensors = "safetensors"


def run(
    run: RunArgument,
    to: Annotated[
        Format,
        typer.Option("--to", help="onnx: any ONNX runtime. pt2: torch.export. safetensors: the parameters."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The file to write; left out: model.onnx or model.pt2 in RUN.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a run's model as a file that other programs read, and check that it answers alike.

    The file takes batches of any size. It is loaded again and compared with the model before it is kept.
    """
    named, out = out is not None, out or run / f"model.{to}"
    if to is Format.safetensors and out.resolve() == (run / "model.safetensors").resolve():
        finished = _opened(run)  # nothing to write; that it opens is what there is to say
        difference: _Difference | None = _Difference(0.0, 0.0, _BATCHES)
    else:
        if named:
            check_out(out, f".{to}", keep=(run / "model.safetensors",))
        finished = _opened(run)
        difference = _export(finished, to, out)
    if as_json:
        from fedlearn.cli.rendering import echo_json

        echo_json(_body(finished, to, out, difference))
    else:
        _show(finished, to, out, difference)


def _opened(run: Path) -> FinishedRun:
    """Open the run, and say what whoever uses the file should know."""
    finished = open_finished(run)
    warnings = finished.warnings()
    if finished.prepares:
        warnings.append(
            f"the model was trained on prepared data, and the exported file takes its inputs as they are: scale them "
            f"as {type(finished.task).__name__}.prepare does"
        )
    say(warnings)
    return finished


# -- writing -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Difference:
    """How far the file's outputs are from the model's: the largest distance, and that over the largest output."""

    absolute: float
    relative: float
    batches: tuple[int, ...]


def _export(finished: FinishedRun, to: Format, out: Path) -> _Difference | None:
    """Write the file and compare it; ``None`` where nothing is installed to compare with."""
    from fedlearn.files import write_atomic

    if to is Format.safetensors:
        data = finished.folder.model_path.read_bytes()
        if hashlib.sha256(data).hexdigest() != finished.folder.summary()["model_sha256"]:
            raise RunFailedError(f"{finished.folder.model_path} changed while it was read; try again")
        write_atomic(out, data)
        return _Difference(0.0, 0.0, _BATCHES)
    if to is Format.onnx:
        for package in ("onnx", "onnxscript"):
            if find_spec(package) is None:
                raise DependencyError(package, "onnx", "exporting to ONNX")
    inputs = _inputs(finished)
    data, reload = (_as_pt2 if to is Format.pt2 else _as_onnx)(finished.model.module, inputs[:_TRACED])
    difference = _compare(finished.model.module, reload, inputs) if reload is not None else None
    if difference is not None and not difference.relative <= _TOLERANCE:
        raise RunFailedError(
            f"the model exported to {to} answers otherwise than the run's: relative difference "
            f"{difference.relative:.1e}, at most {_TOLERANCE:.0e} is allowed. Nothing was written"
        )
    write_atomic(out, data)
    return difference


def _inputs(finished: FinishedRun) -> Tensor:
    """Return a handful of the task's own inputs, repeated where there are fewer."""
    import torch

    from fedlearn.learning.inference import example_of

    inputs = example_of(finished.task, finished.data_path).inputs[: max(_BATCHES)]
    repeats = -(-max(_BATCHES) // len(inputs))
    return torch.cat([inputs] * repeats)[: max(_BATCHES)].contiguous()


def _as_pt2(module: nn.Module, traced: Tensor) -> tuple[bytes, Callable[[Tensor], Tensor]]:
    """Return the model as a PT2 archive, and the archive loaded again."""
    import torch

    program = _program(module, traced)
    with _quiet():
        archive = io.BytesIO()
        torch.export.save(program, archive)
        data = archive.getvalue()
        loaded: Callable[[Tensor], Tensor] = torch.export.load(io.BytesIO(data)).module()
    return data, loaded


def _as_onnx(module: nn.Module, traced: Tensor) -> tuple[bytes, Callable[[Tensor], Tensor] | None]:
    """Return the model as ONNX, and a session on it, or ``None`` where onnxruntime is not installed."""
    import torch

    program = _program(module, traced)
    with _quiet():
        try:
            made = torch.onnx.export(
                program, dynamo=True, verbose=False, input_names=["inputs"], output_names=["outputs"]
            )
            data: bytes = made.model_proto.SerializeToString() if made is not None else b""
        except Exception as error:  # an exporter's reasons have no common type
            raise RunFailedError(f"torch.onnx cannot export this model: {_reason(error)}") from error
        if find_spec("onnxruntime") is None:
            import onnx

            onnx.checker.check_model(data)
            return data, None
        import onnxruntime

        try:
            session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions have no common type either
            raise RunFailedError(f"onnxruntime cannot load the exported model: {_reason(error)}") from error

    def answer(inputs: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["outputs"], {"inputs": inputs.numpy()})[0])

    return data, answer


def _program(module: nn.Module, traced: Tensor) -> Any:
    """Return the model as torch.export sees it, for batches of any size."""
    import torch

    module.eval()
    with _quiet():
        try:
            return torch.export.export(module, (traced,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        except Exception as error:  # torch.export raises whatever the model's own code raises, and more
            raise RunFailedError(
                f"torch.export cannot treat this model: {_reason(error)}. What a model's forward does must not depend "
                "on the values of its input, nor on one size of batch; --to safetensors always works"
            ) from error


def _reason(error: BaseException) -> str:
    """Return the first line of an exception's text; where it wraps another, that one's."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].removesuffix('For more information, run with TORCH_LOGS="+dynamic".').rstrip(" .!")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's chatter about its own internals, which nobody here can act on, from the terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


# -- comparing -----------------------------------------------------------------------------------------------------


def _compare(module: nn.Module, reloaded: Callable[[Tensor], Tensor], inputs: Tensor) -> _Difference:
    """Return the largest difference between the model's outputs and the file's, over batches of several sizes."""
    import torch

    absolute, scale = 0.0, 0.0
    module.eval()
    with torch.no_grad():
        for size in _BATCHES:
            expected = module(inputs[:size])
            try:
                got = reloaded(inputs[:size])
            except Exception as error:  # whichever runtime it is
                raise RunFailedError(f"the exported model fails on a batch of {size}: {_reason(error)}") from error
            if got.shape != expected.shape:
                shapes = f"{tuple(got.shape)} instead of {tuple(expected.shape)}"
                raise RunFailedError(f"the exported model answers a batch of {size} with shape {shapes}")
            distance = float((got.double() - expected.double()).abs().max())
            absolute = distance if distance != distance else max(absolute, distance)  # a NaN stays
            scale = max(scale, float(expected.double().abs().max()))
    return _Difference(absolute, absolute / max(scale, 1e-12), _BATCHES)


# -- saying it -----------------------------------------------------------------------------------------------------


def _body(finished: FinishedRun, to: Format, out: Path, difference: _Difference | None) -> dict[str, Any]:
    """Return the result as one JSON object."""
    return {
        "run": str(finished.folder.path.resolve()),
        "format": str(to),
        "file": str(out.resolve()),
        "bytes": out.stat().st_size,
        "parameters": finished.model.spec.size,
        "compared": difference is not None,
        "difference": difference.absolute if difference is not None else None,
        "relative_difference": difference.relative if difference is not None else None,
    }


def _show(finished: FinishedRun, to: Format, out: Path, difference: _Difference | None) -> None:
    """Write where the file is and how well it agrees."""
    from fedlearn.cli.rendering import bytes_text, console, facts, task_text

    if to is Format.safetensors:
        checked = "the run's own file, SHA-256 as noted in summary.json"
    elif difference is None:
        checked = "well formed; outputs were not compared (pip install onnxruntime, and export again)"
    else:
        sizes = ", ".join(map(str, sorted(difference.batches)))
        checked = f"loaded again; largest difference {difference.absolute:.1e} over batches of {sizes}"
    rows = [
        ("file", str(out)),
        ("size", f"{bytes_text(out.stat().st_size)}, {finished.model.spec.size:,} parameters"),
        ("checked", checked),
    ]
    if to is Format.onnx:
        rows.append(("names", "input inputs, output outputs; the first dimension is the batch"))
    stdout = console()
    stdout.print()
    stdout.print(facts(rows, title=f"{task_text(finished.folder.config.task)} as {to}"))
