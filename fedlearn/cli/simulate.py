"""``fedlearn simulate``: a whole federation on this machine."""

from __future__ import annotations

import re
import shlex
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedlearn.cli import StoppedError
from fedlearn.cli.arguments import AsJson, Overrides, Source
from fedlearn.cli.profile_table import ProfiledRun, recorded
from fedlearn.errors import FedlearnError, LedgerError, MissingError, RunFailedError, UsageError
from fedlearn.profiling import span
from fedlearn.tracking.trackers import check_trackers

if TYPE_CHECKING:
    from fedlearn.config import RunConfig
    from fedlearn.federation.observer import Observers
    from fedlearn.federation.run_folder import RunFolder

__all__ = ["run"]

_GENERIC = ("task", "my_task")  # files so called say nothing; their folders do
_FEW = 3
_CAUSES = 2
_CAUSE_LENGTH = 200
_LOG_BYTES = 4_000_000
_INCIDENT = re.compile(r"\S+ \S+ (?:ERROR|WARNING) incident [0-9a-f]+, client (\S+): (.*)")


def run(
    source: Source = None,
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The run's folder; left out: runs/TASK-DATE-TIME here.", show_default=False),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Go on with the run in this folder.", show_default=False),
    ] = None,
    track: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TRACKER",
            help="Write every round's numbers for tensorboard or mlflow, too, in the run's folder. Can be repeated.",
            show_default=False,
        ),
    ] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Say where the time went.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing while it runs.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train on many simulated clients on this machine, and keep the run in a folder.

    Stopped or killed at any instant, it goes on with --resume and ends with the same model.
    """
    check_trackers(track or ())
    if resume is not None:
        folder = _existing(resume, source=source, overrides=overrides, out=out)
        _check_profile(folder.config, wanted=profile)
    else:
        from fedlearn.scenario import read_scenario

        config = read_scenario(source, overrides or ())
        _check_profile(config, wanted=profile)
        folder = _new(config, out)
    if not quiet:
        _announce(folder, resumed=resume is not None)
    with recorded() if profile else nullcontext() as profiled:
        summary = _train(folder, new=resume is None, quiet=quiet, trackers=track or (), profiled=profiled)
    if as_json:
        from fedlearn.cli.rendering import echo_json

        where = {} if profiled is None else {"profile": profiled.to_json()}
        echo_json({**summary, "run": str(folder.path.resolve()), **where})
    else:
        _show(folder, summary, track or ())
        if profiled is not None:
            _show_profile(profiled)


# -- the folder --------------------------------------------------------------------------------------------------


def _existing(path: Path, *, source: str | None, overrides: Sequence[str] | None, out: Path | None) -> RunFolder:
    """Open the run to go on with; nothing may be given beside it."""
    given = {"a scenario or task": source, "--set": overrides, "--out": out}
    for name, value in given.items():
        if value:
            raise UsageError(
                f"--resume goes on with a run exactly as it was begun, in its own folder, so {name} cannot be given "
                "with it. Leave it out, or start a new run without --resume"
            )
    from fedlearn.federation.run_folder import RunFolder

    return RunFolder.open(path)


def _new(config: RunConfig, out: Path | None) -> RunFolder:
    """Make the folder of a new run, before anything slow: from here on a run that is killed can go on."""
    from fedlearn.federation.run_folder import RunFolder
    from fedlearn.tasks import BUILT_IN, load_task

    if config.task not in BUILT_IN and ":" not in config.task and not config.task.endswith(".py"):
        load_task(config.task)  # no such name: say so before there is a folder
    return RunFolder.create(out if out is not None else _free_folder(config.task), config)


def _check_profile(config: RunConfig, *, wanted: bool) -> None:
    """Refuse to say where the time went of a run whose work is in processes that nobody here sees."""
    if wanted and config.simulation.engine == "flower":
        raise UsageError(
            "--profile sees this process and the workers it forks; with simulation.engine = flower the work is done "
            "elsewhere. Leave one of the two out"
        )


def _free_folder(task: str) -> Path:
    """Make an empty folder named by the task and the time, numbered where that name is taken."""
    name = f"{_stem(task)}-{datetime.now():%Y%m%d-%H%M%S}"
    for number in range(1, 1000):
        path = Path("runs") / (name if number == 1 else f"{name}-{number}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise RunFailedError(
                f"cannot make the run's folder {path}: {error.strerror}; choose one by --out"
            ) from error
        return path
    raise RunFailedError(f"a thousand runs are called runs/{name}; choose another folder by --out")


def _stem(task: str) -> str:
    """Return a task's name as part of a file's name.

    >>> _stem("digits"), _stem("/home/me/flowers.py:Mine"), _stem("package.module:Mine")
    ('digits', 'flowers', 'Mine')
    >>> _stem("/home/me/heart-disease/task.py"), _stem("/task.py")
    ('heart-disease', 'task')
    """
    path, colon, attribute = task.rpartition(":")
    file = Path(path or task)
    if file.suffix != ".py":
        return _plain(attribute if colon else task) or "run"
    folder = _plain(file.resolve().parent.name) if file.stem in _GENERIC else ""
    return folder or _plain(file.stem) or "run"


def _plain(name: str) -> str:
    """Return a name without what is awkward in a file's name."""
    return re.sub(r"[^0-9A-Za-z_-]+", "-", name).strip("-")


def _is_unspent(folder: RunFolder) -> bool:
    """Return whether the run has released nothing yet, so that nothing is lost with its folder."""
    from fedlearn.privacy.ledger import read_events, releases_of

    path = folder.path / "ledger.jsonl"
    return not path.exists() or not releases_of(read_events(path))


def _discard(folder: RunFolder) -> None:
    """Take away the folder of a run that could not begin, so that the same command can be corrected and repeated."""
    for name in ("config.toml", "ledger.jsonl", "metrics.jsonl", ".lock", "checkpoint/trainer.json"):
        (folder.path / name).unlink(missing_ok=True)
    with suppress(OSError):  # whatever else is in it is not ours
        (folder.path / "checkpoint").rmdir()
        folder.path.rmdir()


# -- the run -----------------------------------------------------------------------------------------------------


def _announce(folder: RunFolder, *, resumed: bool) -> None:
    """Say what begins, before the seconds that loading torch and flwr takes."""
    from fedlearn.cli.rendering import count_text

    config = folder.config
    federation, verb = config.federation, "Going on with" if resumed else "Training"
    who = count_text(federation.clients, "client")
    if federation.cohort < federation.clients:
        who = f"{federation.cohort:,} of {who} a round"
    sys.stderr.write(
        f"{verb} {config.task}: {count_text(federation.rounds, 'round')}, {who}, {config.training.algorithm}, "
        f"seed {config.seed} → {folder.path}\n"
    )
    sys.stderr.flush()


def _train(
    folder: RunFolder, *, new: bool, quiet: bool, trackers: Sequence[str], profiled: ProfiledRun | None
) -> dict[str, Any]:
    """Run the engine; whatever ends it early leaves with the way to go on."""
    logged = _log_size(folder)
    try:
        with span("start"), _watched(folder, quiet, trackers, profiled) as observer:
            from fedlearn.simulation.engine import simulate

            return simulate(folder, observer, say=_unsaid if quiet else _say)
    except KeyboardInterrupt:
        raise StoppedError(
            f"stopped; finished rounds are kept. Go on: {_command('simulate --resume', folder)}"
        ) from None
    except FedlearnError as error:
        begun = (folder.path / "checkpoint" / "state.safetensors").exists()
        if new and not begun and isinstance(error, UsageError | MissingError | LedgerError) and _is_unspent(folder):
            _discard(folder)
        else:
            _add_whereabouts(error, folder, logged)
        raise


def _say(text: str) -> None:
    """Say on standard error what is to be known before the first round."""
    sys.stderr.write(f"{text[:1].upper()}{text[1:]}\n")
    sys.stderr.flush()


def _unsaid(text: str) -> None:
    """Say nothing."""


@contextmanager
def _watched(
    folder: RunFolder, quiet: bool, trackers: Sequence[str], profiled: ProfiledRun | None
) -> Iterator[Observers]:
    """Yield all who watch the run, and close them when it ends."""
    from fedlearn.cli.progress import watcher
    from fedlearn.federation.observer import Observer, Observers
    from fedlearn.tracking.epsilon import SpentSoFar
    from fedlearn.tracking.tracks import open_tracks

    spent = SpentSoFar(folder.path, folder.config)
    watch = watcher(folder.config.federation.rounds, quiet=quiet, spent=spent)
    with ExitStack() as closing:
        observers: list[Observer] = []
        if watch is not None:
            observers.append(watch)
            closing.callback(watch.close)
        if trackers:
            observers.append(closing.enter_context(open_tracks(folder, trackers, spent)))
        if profiled is not None:
            observers.append(profiled)
        yield Observers(*observers)


def _add_whereabouts(error: FedlearnError, folder: RunFolder, logged: int) -> None:
    """Note why clients failed since the log had ``logged`` bytes, and where the run and the log are.

    ``main`` says notes after the message.
    """
    for name, cause in _causes(folder, logged):
        error.add_note(f"{name.capitalize()}: {cause}")
    if str(folder.path) not in str(error):
        error.add_note(f"The run is in {folder.path}.")
    log = folder.path / "clients.log"
    if log.exists():
        error.add_note(f"The clients' own errors are in {log}.")


def _log_size(folder: RunFolder) -> int:
    """Return how much the clients have logged so far, in bytes."""
    try:
        return (folder.path / "clients.log").stat().st_size
    except OSError:
        return 0


def _causes(folder: RunFolder, start: int = 0) -> list[tuple[str, str]]:
    """Return the first distinct reasons in the clients' log from byte ``start`` on, each with a name.

    In a simulation the clients' log is the user's own, so its text may be shown.
    """
    try:
        with (folder.path / "clients.log").open("rb") as handle:
            handle.seek(start)
            lines = handle.read(_LOG_BYTES).decode(errors="replace").split("\n")
    except OSError:
        return []
    found: dict[str, str] = {}
    for client, reason in (match.groups() for line in lines if (match := _INCIDENT.match(line))):
        found.setdefault(reason, f"client {client}: {_shown(reason)}")
        if len(found) == _CAUSES:
            break
    return list(zip(("first cause", "second cause"), found.values(), strict=False))


def _shown(text: str) -> str:
    r"""Return a text of anyone's without what could move a terminal's cursor, cut to a readable length.

    >>> _shown("ValueError:\x1b[2J gone")
    'ValueError: [2J gone'
    """
    clean = " ".join("".join(each if each.isprintable() else " " for each in text).split())
    return clean if len(clean) <= _CAUSE_LENGTH else clean[: _CAUSE_LENGTH - 1].rstrip() + "…"


def _command(verb: str, folder: RunFolder) -> str:
    """Return a command on a run that can be pasted into a shell."""
    return f"fedlearn {verb} {shlex.quote(str(folder.path))}"


# -- the result --------------------------------------------------------------------------------------------------


def _show(folder: RunFolder, summary: Mapping[str, Any], trackers: Sequence[str]) -> None:
    """Write the table of a finished run, and what to do next."""
    from fedlearn.cli.promise import SERVER_SEES, promise_rows
    from fedlearn.cli.rendering import console, facts, task_text

    measured, lines = _measured(folder, summary), folder.metrics()
    rows = [*measured, *_costs(folder, summary), *_simulated(folder, lines), *_failed(folder, lines)]
    rows.append(("server saw", SERVER_SEES[folder.config.secagg.mode]))
    rows += promise_rows(summary["privacy"], summary["rounds"], masked=folder.config.secagg.masks)
    rows.append(("files", f"{folder.path}{'/' if str(folder.path)[-1:] != '/' else ''}"))
    stdout = console()
    title = f"{task_text(summary['task'])}, seed {summary['seed']}"
    stdout.print()
    stdout.print(facts(rows, title=title, headline=min(1, len(measured))))
    stdout.print("\nNext", style="bold")
    opener = "open" if sys.platform == "darwin" else "xdg-open"
    predict = _command("predict", folder) + ("" if _tested_centrally(summary, lines) else " --data FILE")
    commands = [predict, f"{opener} {shlex.quote(str(folder.path / 'history.svg'))}"]
    if summary["privacy"]["unit"] != "none":
        verb = "privacy epsilon" if summary["privacy"]["unit"] == "example" else "privacy show"
        commands.append(_command(verb, folder))
    if folder.config.secagg.mode != "off":
        commands.append(_command("secagg inspect", folder))
    for tracker in dict.fromkeys(trackers):
        commands.append(_viewing(tracker, folder))
    for command in commands:
        stdout.print(f"  {command}", soft_wrap=True)


def _viewing(tracker: str, folder: RunFolder) -> str:
    """Return the command that shows what was tracked."""
    if tracker == "mlflow":
        return f"mlflow ui --backend-store-uri {shlex.quote(f'sqlite:///{folder.path.resolve()}/mlruns/mlflow.db')}"
    return f"tensorboard --logdir {shlex.quote(str(folder.path / 'tensorboard'))}"


def _show_profile(profiled: ProfiledRun) -> None:
    """Write where the time went."""
    from fedlearn.cli.rendering import console

    stdout = console()
    stdout.print()
    stdout.print(profiled.tables())


def _measured(folder: RunFolder, summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the metrics, the headline first."""
    from fedlearn.cli.progress import headline
    from fedlearn.cli.rendering import number_text

    metrics: dict[str, float] = summary["metrics"]
    first = dict(headline(metrics))
    ordered = {**first, **metrics}
    rows = [(name.replace("_", " "), number_text(value)) for name, value in ordered.items()]
    if not rows:
        losses = [line["train_loss"] for line in folder.metrics()[-1:] if line["train_loss"] is not None]
        rows = [("train loss", f"{number_text(loss)} (the model was not tested)") for loss in losses]
    return rows


def _costs(folder: RunFolder, summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what the run took."""
    from fedlearn.cli.rendering import bytes_text, duration_text

    federation = folder.config.federation
    cohort = "" if federation.cohort == federation.clients else f", {federation.cohort:,} a round"
    return [
        ("rounds", f"{summary['rounds']:,}"),
        ("clients", f"{summary['clients']:,}{cohort}"),
        ("wall time", f"{duration_text(summary['wall_s'])}, {summary['client_updates_per_s']:,.1f} client updates/s"),
        *_trained(summary),
        ("upload per client", bytes_text(summary["upload_bytes_per_client"])),
        ("download per client", bytes_text(summary["download_bytes_per_client"])),
    ]


def _simulated(folder: RunFolder, lines: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Return what the run would have taken on the devices it was simulated on, and how many of them attacked."""
    from fedlearn.cli.rendering import count_text, duration_text

    faults, rows = folder.config.faults, list[tuple[str, str]]()
    times = [line["simulated_s"] for line in lines if "simulated_s" in line]
    if times:
        rows.append(("simulated time", f"{duration_text(sum(times))}, the longest round {duration_text(max(times))}"))
    if attackers := faults.attackers(folder.config.federation.clients):
        rows.append(("byzantine", f"{count_text(attackers, 'client')}, {faults.attack}"))
    return rows


def _trained(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return how clients were trained."""
    trainer = summary.get("trainer")
    if trainer is None:
        return []
    return [("clients trained", "one by one" if trainer == "sequential" else f"many at once ({trainer})")]


def _tested_centrally(summary: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether the task may have a central test set: not where only clients tested, or tried to."""
    if summary["metrics"]:
        return not any(name.endswith("_client_mean") for name in summary["metrics"])
    return not any(line.get("evaluation_failures") for line in lines)


def _failed(folder: RunFolder, lines: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Return which clients did not train or not test, and why."""
    rows = [("left out", _left_out(lines))]
    if untested := _not_tested(lines):
        rows.append(("not tested", untested))
    if untested or any(line["failures"] or any(line.get("earlier_failures", ())) for line in lines):
        rows += _causes(folder)
        if _log_size(folder):
            rows.append(("clients' log", str(folder.path / "clients.log")))
    return rows


def _left_out(lines: Sequence[Mapping[str, Any]]) -> str:
    """Return how often clients were left out of a round, by reason, and who was left out of every one."""
    reasons = Counter(
        code
        for line in lines
        for failures in (line["failures"], *line.get("earlier_failures", ()))
        for code in failures.values()
    )
    if not reasons:
        return "no client"
    said = _counted(reasons, sum(line["cohort"] * line["attempt"] for line in lines))
    always = [client for client in lines[0]["failures"] if all(client in line["failures"] for line in lines)]
    return f"{said}; {_named(always)} in every round" if always else said


def _not_tested(lines: Sequence[Mapping[str, Any]]) -> str:
    """Return which clients could not test the model, by reason; nothing where all could."""
    from fedlearn.cli.rendering import count_text

    failures = [line.get("evaluation_failures", {}) for line in lines]
    who = Counter(item for each in failures for item in each.items())
    if len({client for client, _ in who}) <= _FEW:
        return "; ".join(f"client {client}: {code} in {count_text(n, 'round')}" for (client, code), n in who.items())
    asked = sum(
        line["cohort"]
        for line, failed in zip(lines, failures, strict=True)
        if failed
        or any(name.endswith("_client_mean") for name in (*line["metrics"], *line.get("federated_metrics", ())))
    )
    return _counted(Counter(code for each in failures for code in each.values()), asked)


def _counted(reasons: Counter[str], asked: int) -> str:
    """Return how many answers are missing of those asked for, by reason."""
    from fedlearn.cli.rendering import count_text

    parts = ", ".join(f"{count:,} {code}" for code, count in reasons.most_common())
    return f"{count_text(reasons.total(), 'answer')} of {asked:,}: {parts}"


def _named(clients: Iterable[str]) -> str:
    """Return clients by their numbers, the first few of many.

    >>> _named(["1"]), _named(["4", "7", "9", "12", "15"])
    ('client 1', 'clients 4, 7, 9 and 2 more')
    """
    numbers = list(clients)
    more = f" and {len(numbers) - _FEW:,} more" if len(numbers) > _FEW else ""
    return f"client{'s' * (len(numbers) > 1)} {', '.join(numbers[:_FEW])}{more}"
