"""``fedlearn doctor``: check this machine, with the next step for whatever is amiss. Nothing here uses the network."""

from __future__ import annotations

import multiprocessing
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import typer

from fedlearn.cli.arguments import AsJson

__all__ = ["Check", "Status", "examine", "run"]

_GIB, _MIB = 2**30, 2**20
_REINSTALL = "reinstall: pip install --force-reinstall fedlearn"


class Status(StrEnum):
    """How a check ended."""

    ok = "ok"
    warn = "warn"
    fail = "fail"


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: what.
        status: how it is.
        found: what was found, for people.
        next: what to do about it; empty where there is nothing to do.
    """

    name: str
    status: Status
    found: str
    next: str = ""


def run(as_json: AsJson = False) -> None:
    """Check this machine, with the next step for whatever is amiss; exit 1 where a check fails."""
    checks = examine()
    ok = all(check.status is not Status.fail for check in checks)
    if as_json:
        from fedlearn.cli.rendering import echo_json

        echo_json({"checks": [asdict(check) for check in checks], "ok": ok})
    else:
        _show(checks)
    if not ok:
        raise typer.Exit(1)


def examine(folder: Path | None = None) -> list[Check]:
    """Return every check, made in ``folder`` or the working folder; one that raises is a failure with its text."""
    where = folder if folder is not None else Path.cwd()
    return [
        _guarded("python", partial(check_python, sys.version_info[:3])),
        _guarded("fedlearn", check_fedlearn),
        _guarded("flwr", partial(check_version, "flwr", (1, 41), (1, 43))),
        _guarded("torch", partial(check_version, "torch", (2, 6), None)),
        _guarded("numpy", partial(check_version, "numpy", (1, 26), (3,))),
        _guarded("torch build", check_torch_build),
        _guarded("simulation extra", check_simulation_extra),
        _guarded(
            "privacy extra",
            partial(check_optional, "privacy", ("dp-accounting",), 'privacy.unit = "client" and fedlearn privacy'),
        ),
        _guarded(
            "example-privacy extra",
            partial(check_optional, "example-privacy", ("opacus",), 'privacy.unit = "example"'),
        ),
        _guarded("onnx extra", partial(check_optional, "onnx", ("onnx", "onnxscript"), "fedlearn export --to onnx")),
        _guarded(
            "tensorboard extra",
            partial(check_optional, "tensorboard", ("tensorboard",), "fedlearn simulate --track tensorboard"),
        ),
        _guarded(
            "mlflow extra", partial(check_optional, "mlflow", ("mlflow-skinny",), "fedlearn simulate --track mlflow")
        ),
        _guarded("ray extra", partial(check_optional, "ray", ("ray",), "Flower's own simulation runtime")),
        _guarded("cores", check_cores),
        _guarded("memory", check_memory),
        _guarded("disk", partial(check_disk, where)),
        _guarded("folder", partial(check_writable, where)),
        _guarded("fork", check_fork),
        _guarded("phoning home", partial(check_phoning_home, os.environ)),
        _guarded("clock", partial(check_clock, time.time())),
        _guarded("training step", check_training_step),
    ]


def _guarded(name: str, check: Callable[[], Check]) -> Check:
    """Return the check, or a failure that says what it raised."""
    try:
        return check()
    except Exception as error:  # a broken installation raises anything
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        return Check(name, Status.fail, f"{type(error).__name__}: {text}", _REINSTALL)


# -- what is installed ---------------------------------------------------------------------------------------------


def check_python(found: tuple[int, ...]) -> Check:
    """Python is 3.11 or later."""
    text = f"{'.'.join(map(str, found))}, {platform.machine()} {platform.system()}"
    if found < (3, 11):
        return Check("python", Status.fail, text, "install Python 3.11 or later, and fedlearn in it")
    return Check("python", Status.ok, text)


def check_fedlearn() -> Check:
    """Fedlearn is installed, not only lying beside."""
    from fedlearn import __version__

    place = Path(__file__).parent.parent
    try:
        version("fedlearn")
    except PackageNotFoundError:
        return Check(
            "fedlearn",
            Status.warn,
            f"{__version__}, not installed, from {place}",
            "pip install -e . in its folder",
        )
    return Check("fedlearn", Status.ok, f"{__version__}, {place}")


def check_version(package: str, least: tuple[int, ...], below: tuple[int, ...] | None) -> Check:
    """A package is there, imports, and is of a version that is tested."""
    bounds = f">={_dotted(least)}" + (f",<{_dotted(below)}" if below else "")
    command = f"pip install '{package}{bounds}'"
    try:
        text = version(package)
    except PackageNotFoundError:
        return Check(package, Status.fail, "not installed", command)
    found = _release(text)
    if found < least:
        return Check(package, Status.fail, f"{text}, older than {_dotted(least)}", command)
    if below is not None and found >= below:
        return Check(package, Status.warn, f"{text}, newer than what is tested", command)
    return Check(package, Status.ok, text)


def _release(text: str) -> tuple[int, ...]:
    """Return the leading numbers of a version.

    >>> _release("2.13.0+cpu"), _release("1.42rc1")
    ((2, 13, 0), (1, 42))
    """
    numbers = []
    for part in text.split("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
        if digits != part:
            break
    return tuple(numbers)


def _dotted(numbers: tuple[int, ...]) -> str:
    """Return a version as people write it."""
    return ".".join(map(str, numbers))


def check_torch_build() -> Check:
    """Torch imports; which build it is and how many threads it uses."""
    import torch

    threads = f"{torch.get_num_threads()} threads"
    if torch.version.cuda is None:
        return Check("torch build", Status.ok, f"CPU, {threads}")
    smaller = "fedlearn trains on the CPU; the CPU build saves gigabytes: https://pytorch.org/get-started/locally"
    return Check("torch build", Status.ok, f"CUDA {torch.version.cuda}, {threads}", smaller)


def check_simulation_extra() -> Check:
    """The built-in tasks' data and the pictures of a run can be had."""
    missing = [name for name in ("sklearn", "matplotlib") if find_spec(name) is None]
    if not missing:
        return Check(
            "simulation extra",
            Status.ok,
            f"scikit-learn {version('scikit-learn')}, matplotlib {version('matplotlib')}",
        )
    names = " and ".join("scikit-learn" if name == "sklearn" else name for name in missing)
    need = "the built-in tasks need scikit-learn, pictures matplotlib: pip install '.[simulation]' in fedlearn's folder"
    return Check("simulation extra", Status.warn, f"no {names}", need)


def check_optional(extra: str, packages: tuple[str, ...], purpose: str) -> Check:
    """An extra that most people do without; ``packages`` as pip calls them."""
    found = {name: _version(name) for name in packages}
    missing = [name for name, known in found.items() if known is None]
    if missing:
        command = f"for {purpose}: pip install '.[{extra}]' in fedlearn's folder"
        return Check(f"{extra} extra", Status.ok, f"not installed ({', '.join(missing)})", command)
    return Check(f"{extra} extra", Status.ok, ", ".join(f"{name} {known}" for name, known in found.items()))


def _version(package: str) -> str | None:
    """Return the version of a package, or ``None`` where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


# -- the machine ---------------------------------------------------------------------------------------------------


def check_cores() -> Check:
    """Cores that this process may use."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    there = os.cpu_count() or usable
    return Check("cores", Status.ok, f"{usable}" if usable == there else f"{usable} of {there}")


def check_memory() -> Check:
    """Memory of the machine, or of the container where that is less; a run of the digits needs about 0.5 GiB."""
    amount = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    amount = min(amount, int(text)) if text.isdecimal() else amount
    found = f"{amount / _GIB:.1f} GiB"
    if amount < _GIB:
        return Check("memory", Status.warn, found, "under 1 GiB a run may be killed: keep simulation.workers at 0")
    return Check("memory", Status.ok, found)


def check_disk(folder: Path) -> Check:
    """There is room for runs."""
    free = shutil.disk_usage(folder).free
    found, advice = f"{free / _GIB:.1f} GiB free", "free some space, or work on another disk (--out)"
    if free < 100 * _MIB:
        return Check("disk", Status.fail, f"{free / _MIB:.0f} MiB free", advice)
    return Check("disk", Status.warn if free < _GIB else Status.ok, found, advice if free < _GIB else "")


def check_writable(folder: Path) -> Check:
    """Runs can be written here."""
    try:
        with tempfile.TemporaryFile(dir=folder) as handle:
            handle.write(b"fedlearn")
    except OSError as error:
        found = f"cannot write in {folder}: {error.strerror}"
        return Check("folder", Status.fail, found, "go to a folder of yours, or give --out")
    return Check("folder", Status.ok, f"can write in {folder}")


def check_fork() -> Check:
    """Worker processes can be forked."""
    if hasattr(os, "fork") and "fork" in multiprocessing.get_all_start_methods():
        return Check("fork", Status.ok, "available, so simulation.workers may be above 0")
    return Check("fork", Status.warn, "not available on this system", "keep simulation.workers at 0")


def check_phoning_home(environment: Mapping[str, str]) -> Check:
    """Flower neither reports usage nor looks for updates, unless the user's own environment has it so."""
    import fedlearn.flower  # noqa: F401 - it turns both off where nobody said otherwise

    wanted = []
    if environment.get("FLWR_TELEMETRY_ENABLED", "0") == "1":
        wanted.append(("telemetry", "FLWR_TELEMETRY_ENABLED"))
    if environment.get("FLWR_DISABLE_UPDATE_CHECK", "1") != "1":
        wanted.append(("update check", "FLWR_DISABLE_UPDATE_CHECK"))
    if not wanted:
        return Check("phoning home", Status.ok, "Flower's telemetry and update check are off")
    found = f"your environment turns on Flower's {' and '.join(name for name, _ in wanted)}"
    return Check("phoning home", Status.warn, found, f"unset {' '.join(variable for _, variable in wanted)}")


def check_clock(now_s: float) -> Check:
    """The clock is not in the past: certificates and deadlines go by it."""
    moment = time.gmtime(now_s)
    found = time.strftime("%Y-%m-%d %H:%M UTC", moment)
    if moment.tm_year < 2026:
        return Check("clock", Status.fail, found, "set the clock: sudo timedatectl set-ntp true")
    return Check("clock", Status.ok, found)


# -- the thing itself ----------------------------------------------------------------------------------------------


def check_training_step() -> Check:
    """One client trains the digits' perceptron for one step, on random images, and nothing overflows."""
    import numpy as np
    import torch

    from fedlearn.config import TrainingConfig
    from fedlearn.learning import Examples, build_flat_model, train
    from fedlearn.sources import SeedTree
    from fedlearn.tasks import load_task

    seeds = SeedTree.root(0)
    chance = seeds.child("data").generator()
    images = torch.from_numpy(chance.random((16, 1, 8, 8), dtype=np.float32))
    digits = torch.from_numpy(chance.integers(10, size=16))
    task = load_task("digits-mlp")
    model = build_flat_model(task, seeds)
    begun = time.perf_counter()
    trained = train(
        model,
        task,
        model.vector(),
        Examples(images, digits),
        TrainingConfig(local_steps=1),
        proximal_mu=0.0,
        seeds=seeds,
    )
    took_ms = (time.perf_counter() - begun) * 1000
    vector = trained.update.vector
    if not (np.isfinite(trained.mean_loss) and np.isfinite(vector).all() and vector.any()):
        found = f"the loss is {trained.mean_loss}, the update not finite or zero"
        return Check("training step", Status.fail, found, "reinstall torch: pip install --force-reinstall torch")
    return Check("training step", Status.ok, f"{len(vector):,} parameters in {took_ms:.0f} ms, finite")


# -- for people ----------------------------------------------------------------------------------------------------


def _show(checks: list[Check]) -> None:
    """Write the table, the next steps below it, and a verdict."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from fedlearn.cli.rendering import console, count_text

    stdout = console()
    fancy = (stdout.encoding or "").lower().startswith("utf")
    icons = {Status.ok: "✓" if fancy else "+", Status.warn: "!", Status.fail: "✗" if fancy else "x"}
    colours = {Status.ok: "green", Status.warn: "yellow", Status.fail: "bold red"}
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="dim", padding=(0, 1))
    for name in ("", "check", "found"):
        made.add_column(name, no_wrap=name != "found", overflow="fold")
    for check in checks:
        word = Text(f"{icons[check.status]} {check.status}", style=colours[check.status])
        found = Text(check.found)
        if check.next:
            found.append(
                f"\n{'→' if fancy else '>'} {check.next}",
                style="dim" if check.status is Status.ok else "bold",
            )
        made.add_row(word, Text(check.name), found)
    stdout.print()
    stdout.print(made)
    failed = sum(check.status is Status.fail for check in checks)
    warned = sum(check.status is Status.warn for check in checks)
    if failed:
        stdout.print(f"{count_text(failed, 'check')} failed; the next steps stand beside them.", style="bold red")
    elif warned:
        stdout.print(f"Ready, with {count_text(warned, 'warning')}.", style="bold yellow")
    else:
        stdout.print("Ready.", style="bold green")
