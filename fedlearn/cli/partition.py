"""``fedlearn partition``: who would hold what, as a table and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedlearn.cli.arguments import AsJson, Overrides, Source
from fedlearn.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from fedlearn.config import RunConfig
    from fedlearn.learning import Task

__all__ = ["run"]

_MOST_ROWS = 40
_FIRST_ROWS = 20
_MOST_COLUMNS = 16


def run(
    source: Source = None,
    overrides: Overrides = None,
    out: Annotated[
        Path, typer.Option(metavar="FILE.svg", help="Where the picture goes; what is there is replaced.")
    ] = Path("partition.svg"),
    as_json: AsJson = False,
) -> None:
    """Show who would hold what: every client's labels, as a table and a picture. Nothing is trained."""
    from fedlearn.scenario import read_scenario

    config = read_scenario(source, overrides or ())
    _check_picture(out)
    holdings = _deal(config)
    picture = _draw(holdings, config, out)
    if as_json:
        from fedlearn.cli.rendering import echo_json

        echo_json({**holdings.to_json(config), "picture": str(picture.resolve())})
    else:
        _show(holdings, config, picture)


@dataclass(frozen=True, eq=False, kw_only=True)
class _Holdings:
    """What each client holds, or where data is made on demand, each of a sample.

    Attributes:
        population: how many clients there are.
        clients: those of the rows below, in ascending order.
        counts: examples by client and label, shape (clients, labels); one column where there are no labels.
        names: one name a label, none where there are no labels.
        tests: test examples of each client's own, shape (clients,), or ``None``.
    """

    population: int
    clients: Sequence[int]
    counts: NDArray[np.int64]
    names: tuple[str, ...]
    tests: NDArray[np.int64] | None

    @property
    def is_sample(self) -> bool:
        """Whether there are more clients than these."""
        return len(self.clients) < self.population

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Training examples of each client, shape (clients,)."""
        sizes: NDArray[np.int64] = self.counts.sum(axis=1)
        return sizes

    def to_json(self, config: RunConfig) -> dict[str, Any]:
        """Return what machines are told."""
        clients: list[dict[str, Any]] = []
        for index, (row, size) in enumerate(zip(self.counts.tolist(), self.sizes.tolist(), strict=True)):
            labels = dict(zip(self.names, row, strict=True)) if self.names else {}
            clients.append({"client": self.clients[index], "examples": size, "labels": labels})
            if self.tests is not None:
                clients[-1]["test_examples"] = int(self.tests[index])
        told = {"task": config.task, "seed": config.seed, "partition": config.data.partition, "clients": clients}
        return {**told, "sample_of": self.population} if self.is_sample else told


def _check_picture(out: Path) -> None:
    """Refuse a picture that cannot be written, before the data is loaded."""
    if out.suffix.lower() != ".svg":
        raise UsageError(f"--out {out}: the picture is an SVG; give it a name that ends in .svg")
    if not out.parent.is_dir():
        raise UsageError(f"--out {out}: there is no folder {out.parent}")
    if out.is_dir():
        raise UsageError(f"--out {out}: that is a folder")


def _deal(config: RunConfig) -> _Holdings:
    """Deal the data out as a run would, and count; where it is made on demand, count that of a sample."""
    import numpy as np

    from fedlearn.data.loaders import Dealt, distribute_data
    from fedlearn.tasks import load_task

    task = load_task(config.task)
    distribution = distribute_data(task, config)
    sizes = distribution.sizes()
    tests = np.array(sizes.test, dtype=np.int64) if sizes.test else None
    if isinstance(distribution, Dealt):
        counts, names = _counted(task, distribution.pool.train.labels(), distribution.train)
    else:
        held = [distribution.client(client).train.labels() for client in sizes.clients]
        known = [each for each in held if each is not None]
        labels = np.concatenate(known) if len(known) == len(held) else None
        ends = np.cumsum(sizes.train)
        parts = [np.arange(end - size, end) for size, end in zip(sizes.train, ends.tolist(), strict=True)]
        counts, names = _counted(task, labels, parts)
    return _Holdings(population=distribution.clients, clients=sizes.clients, counts=counts, names=names, tests=tests)


def _counted(
    task: Task, labels: NDArray[np.int64] | None, parts: Sequence[NDArray[np.int64]]
) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Return examples by client and label, and the labels' names: the task's own, or numbers."""
    import numpy as np

    from fedlearn.data import label_counts

    if labels is None:
        return np.array([[part.size] for part in parts], dtype=np.int64), ()
    given = tuple(str(name) for name in task.label_names)
    total = max(len(given), int(labels.max(initial=-1)) + 1)
    named = len(given) == total and len(set(given)) == total
    names = given if named else tuple(str(label) for label in range(total))
    return label_counts(parts, labels, total), names


def _draw(holdings: _Holdings, config: RunConfig, out: Path) -> Path:
    """Write the picture."""
    from fedlearn.charts import draw_partition
    from fedlearn.files import write_atomic

    svg = draw_partition(
        holdings.counts, holdings.names or ("all",), title=_title(holdings, config), clients=holdings.clients
    )
    write_atomic(out, svg.encode())
    return out


def _title(holdings: _Holdings, config: RunConfig) -> str:
    """Say what was dealt out, to how many, and how."""
    data, clients = config.data, holdings.population
    scheme = {
        "dirichlet": f"Dirichlet({data.alpha:g})",
        "quantity": f"unequal quantity, alpha {data.alpha:g}",
        "shards": f"shards, {data.labels_per_client} labels a client",
        "natural": "by natural id",
        "iid": "IID",
    }[data.partition]
    noun = "client" if clients == 1 else "clients"
    if holdings.is_sample:
        mean = holdings.sizes.mean()
        some = f"{len(holdings.clients)} of {clients:,} {noun}, each's data made on demand"
        return f"{config.task}: {some}, {mean:,.1f} examples on average, seed {config.seed}"
    return f"{config.task}: {int(holdings.counts.sum()):,} examples, {clients:,} {noun}, {scheme}, seed {config.seed}"


# -- the table ---------------------------------------------------------------------------------------------------


def _show(holdings: _Holdings, config: RunConfig, picture: Path) -> None:
    """Write the table; of many clients a summary and the first of them."""
    from fedlearn.cli.rendering import console

    stdout = console()
    stdout.print(f"\n{_title(holdings, config)}", style="bold", soft_wrap=True)
    clients = len(holdings.counts)
    if clients > _MOST_ROWS or holdings.is_sample:
        stdout.print(_summary(holdings))
    if clients > _MOST_ROWS:
        stdout.print(f"The first {_FIRST_ROWS} of {clients:,} clients", style="dim")
    stdout.print(_rows(holdings, _FIRST_ROWS if clients > _MOST_ROWS else clients))
    stdout.print(f"Picture: {picture}", soft_wrap=True)


def _rows(holdings: _Holdings, rows: int) -> Any:
    """Return a row a client: a column a label, or where those are too many, what stands out."""
    from fedlearn.cli.rendering import table

    names, sizes = holdings.names, holdings.sizes
    wide = len(names) > _MOST_COLUMNS
    columns = ["client", "examples", *(["labels", "most of"] if wide else [_short(name) for name in names])]
    everyone = rows == len(holdings.counts) and not holdings.is_sample
    body = []
    for index in range(rows):
        row = holdings.counts[index]
        cells = _outstanding(row, names) if wide else [f"{n:,}" if n else "·" for n in row.tolist()]
        body.append([str(holdings.clients[index]), f"{sizes[index]:,}", *(cells if names else [])])
    if holdings.tests is not None:
        columns.append("test")
        for cells, tests in zip(body, holdings.tests.tolist(), strict=False):
            cells.append(f"{tests:,}")
    return table(columns, body, totals=_totals(holdings, wide=wide) if everyone else ())


def _totals(holdings: _Holdings, *, wide: bool) -> list[str]:
    """Return the last row."""
    totals = holdings.counts.sum(axis=0)
    cells = [f"{int((totals > 0).sum()):,}", ""] if wide else [f"{n:,}" for n in totals.tolist()]
    tests = [f"{int(holdings.tests.sum()):,}"] if holdings.tests is not None else []
    return ["all", f"{int(totals.sum()):,}", *(cells if holdings.names else []), *tests]


def _outstanding(row: NDArray[np.int64], names: Sequence[str]) -> list[str]:
    """Return how many labels a client holds and which most of all."""
    most = int(row.argmax())
    share = float(row[most]) / max(1, int(row.sum()))
    return [f"{int((row > 0).sum()):,}", f"{_short(names[most])} ({100 * share:.0f} %)"]


def _summary(holdings: _Holdings) -> Any:
    """Return the spread of sizes and of labels a client."""
    import numpy as np

    from fedlearn.cli.rendering import table

    spread = {"examples a client": holdings.sizes}
    if holdings.names:
        spread["labels a client"] = (holdings.counts > 0).sum(axis=1)
    if holdings.tests is not None:
        spread["test examples a client"] = holdings.tests
    rows = [
        [name, *(f"{value:,g}" for value in np.quantile(values, [0, 0.25, 0.5, 0.75, 1]).tolist())]
        for name, values in spread.items()
    ]
    return table(["", "smallest", "25 %", "median", "75 %", "largest"], rows)


def _short(name: str) -> str:
    """Return a label's name as the head of a column."""
    return name if len(name) <= 10 else name[:9] + "…"
