"""Dealing a pool out to clients, and reading a device's own file."""

from __future__ import annotations

import io
import pickle
import random
import tracemalloc
import zipfile
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch

from fedlearn.config import RunConfig
from fedlearn.data import SCHEMES
from fedlearn.data.loaders import Dealt, OnDemand, distribute_data, load_arrays, require_sklearn
from fedlearn.errors import ConfigError, DataError, DependencyError, TaskError
from fedlearn.learning import ClientData, Examples, Pool, Task

GROUPS = np.array(["berlin", "lyon", "turin", "kyiv"])


def examples(count: int, *, groups: np.ndarray | None = None, targets: torch.Tensor | None = None) -> Examples:
    """Return examples of which every input is its own number."""
    numbers = torch.arange(count, dtype=torch.float32)[:, None]
    return Examples(numbers, torch.arange(count) % 3 if targets is None else targets, groups)


class Pooled(Task):
    """A task whose pool is given."""

    def __init__(self, pool: Pool) -> None:
        self.pool, self.paths = pool, []

    def load_pool(self, path: Path | None) -> Pool:
        self.paths.append(path)
        return self.pool


def config(partition: str, *, clients: int = 4, seed: int = 0, **data) -> RunConfig:
    tables = {"task": "digits", "seed": seed, "federation": {"clients": clients}}
    return RunConfig.from_mapping({**tables, "data": {"partition": partition, **data}})


def grouped(count: int = 41, tests: int | None = 22) -> Pool:
    """Return a pool in which everything has a natural id, local tests included."""
    train = examples(count, groups=GROUPS[np.arange(count) % 4])
    return Pool(train, None if tests is None else examples(tests, groups=GROUPS[np.arange(tests)[::-1] % 4]))


def numbers(held: Dealt, which: str) -> list[list[int]]:
    """Return the numbers of the examples that every client really gets."""
    clients = [getattr(held.client(index), which) for index in range(len(held.train))]
    return [each.inputs[:, 0].int().tolist() for each in clients]


# -- distribute_data -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("tests", [None, 22])
@pytest.mark.parametrize("seed", range(3))
def test_every_example_goes_to_exactly_one_client(scheme, tests, seed) -> None:
    held = distribute_data(Pooled(grouped(tests=tests)), config(scheme, seed=seed))
    assert len(held.train) == 4
    for which, count in (("train", 41), ("test", tests)):
        if count is None:
            assert held.test == ()
            assert all(held.client(index).test is None for index in range(4))
            continue
        dealt = numbers(held, which)
        assert sorted(chain.from_iterable(dealt)) == list(range(count))
        assert all(dealt)


@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if scheme != "natural"])
def test_the_seed_decides_and_nothing_else(scheme) -> None:
    one, same, other = (
        numbers(distribute_data(Pooled(grouped()), config(scheme, seed=seed)), "train") for seed in (0, 0, 1)
    )
    assert one == same != other


def test_the_deal_of_the_training_examples_does_not_depend_on_local_tests() -> None:
    dealt = [numbers(distribute_data(Pooled(grouped(tests=n)), config("dirichlet")), "train") for n in (None, 22)]
    assert dealt[0] == dealt[1]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_real_valued_target_is_dealt_by_its_deciles(scheme) -> None:
    targets = torch.from_numpy(np.random.default_rng(0).normal(size=40))
    pool = Pool(examples(40, groups=GROUPS[np.arange(40) % 4], targets=targets))
    held = distribute_data(Pooled(pool), config(scheme, **{"labels-per-client": 1} if scheme == "shards" else {}))
    assert sorted(chain.from_iterable(numbers(held, "train"))) == list(range(40))
    if scheme == "shards":
        strata = pool.train.strata()
        assert all(len(np.unique(strata[part])) <= 4 for part in held.train)


def test_natural_gives_everyone_its_own_with_its_own_tests() -> None:
    held = distribute_data(Pooled(grouped()), config("natural"))
    for index, name in enumerate(sorted(GROUPS)):
        data = held.client(index)
        assert set(data.train.groups) == {name}
        assert set(data.test.groups) == {name}


def test_natural_ids_that_differ_between_training_and_tests_are_refused() -> None:
    train = examples(8, groups=GROUPS[np.arange(8) % 4])
    for others in (GROUPS[:3], np.array([*GROUPS[:3], "oslo"]), np.array([*GROUPS, "oslo"])):
        pool = Pool(train, examples(10, groups=others[np.arange(10) % len(others)]))
        with pytest.raises(DataError, match="other natural ids"):
            distribute_data(Pooled(pool), config("natural"))


def test_natural_needs_ids_on_both_sides_and_as_many_clients() -> None:
    train = examples(8, groups=GROUPS[np.arange(8) % 4])
    for pool, key in (
        (Pool(examples(8)), "data.partition"),
        (Pool(examples(8), examples(8, groups=train.groups)), "data.partition"),
        (Pool(train, examples(8)), "data.partition"),
    ):
        with pytest.raises(ConfigError) as caught:
            distribute_data(Pooled(pool), config("natural"))
        assert caught.value.key == key
    with pytest.raises(ConfigError, match=r"set federation\.clients = 4"):
        distribute_data(Pooled(Pool(train)), config("natural", clients=3))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_empty_pool_is_refused(scheme) -> None:
    with pytest.raises(DataError, match="no training examples"):
        distribute_data(Pooled(Pool(examples(0))), config(scheme))


@pytest.mark.parametrize("targets", [torch.zeros(0), torch.zeros(0, dtype=torch.int64)])
def test_too_few_tests_for_the_clients_are_refused(targets) -> None:
    pool = Pool(examples(8), examples(0, targets=targets))
    with pytest.raises(ConfigError) as caught:
        distribute_data(Pooled(pool), config("iid"))
    assert caught.value.key == "federation.clients"


def test_what_a_client_gets_is_a_copy() -> None:
    pool = grouped()
    held = distribute_data(Pooled(pool), config("iid"))
    for data in (held.client(0).train, held.client(0).test):
        data.inputs.fill_(-1.0)
        data.targets.fill_(-1)
    assert pool.train.inputs.min() >= 0.0
    assert pool.test.targets.min() >= 0
    assert min(numbers(held, "train")[0]) >= 0


def test_the_tasks_data_is_read_once_from_the_path_of_the_scenario() -> None:
    task = Pooled(grouped())
    held = distribute_data(task, config("iid", path="some/where"))
    held.client(0)
    distribute_data(task, config("iid"))
    assert task.paths == [Path("some/where"), None]


def test_the_sizes_of_a_dealt_pool_are_all_clients() -> None:
    held = distribute_data(Pooled(grouped()), config("natural"))
    assert held.clients == 4
    sizes = held.sizes()
    assert list(sizes.clients) == [0, 1, 2, 3]
    assert (sum(sizes.train), sum(sizes.test)) == (41, 22)
    assert distribute_data(Pooled(grouped(tests=None)), config("natural")).sizes().test == ()


# -- data on demand ------------------------------------------------------------------------------------------------


class Made(Task):
    """A task that makes what a client holds from all three global generators."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int, Path | None]] = []

    def load_client(self, client: int, clients: int, path: Path | None) -> ClientData:
        self.asked.append((client, clients, path))
        drawn = torch.tensor([[float(torch.rand(())), np.random.random(), random.random()]])
        return ClientData(Examples(drawn.repeat(1 + client % 3, 1), torch.full((1 + client % 3,), client)))


class Both(Made):
    """A task with a pool, too."""

    def load_pool(self, path: Path | None) -> Pool:
        return grouped()


def test_a_client_is_made_when_asked_and_is_the_same_whoever_was_asked_before() -> None:
    task = Made()
    held = distribute_data(task, config("natural", clients=100_000, path="somewhere"))
    assert isinstance(held, OnDemand)
    assert held.clients == 100_000
    assert task.asked == [(0, 100_000, Path("somewhere"))], "the first, to see that it can be"
    first = [held.client(index).train for index in (99_999, 7, 0)]
    torch.rand(5), np.random.random(5), random.random()
    again = [
        distribute_data(Made(), config("natural", clients=100_000)).client(index).train for index in (0, 7, 99_999)
    ]
    for one, same in zip(first, reversed(again), strict=True):
        assert torch.equal(one.inputs, same.inputs)
        assert torch.equal(one.targets, same.targets)
    assert len({float(each.inputs[0, 0]) for each in first}) == 3
    other = distribute_data(Made(), config("natural", clients=100_000, seed=1)).client(7).train
    assert not torch.equal(other.inputs, first[1].inputs)


def test_making_a_client_leaves_the_global_generators_as_they_were() -> None:
    held = distribute_data(Made(), config("natural"))
    torch.manual_seed(3)
    expected = torch.rand(())
    torch.manual_seed(3)
    held.client(1)
    assert torch.rand(()) == expected


def test_nothing_of_the_size_of_the_population_is_held() -> None:
    tracemalloc.start()
    held = distribute_data(Made(), config("natural", clients=10**9))
    for index in range(0, 10**9, 10**7):
        held.client(index)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 2_000_000


def test_sizes_are_those_of_a_sample_from_end_to_end() -> None:
    task = Made()
    sizes = distribute_data(task, config("natural", clients=100_000)).sizes()
    assert len(sizes.clients) == 32
    assert (sizes.clients[0], sizes.clients[-1]) == (0, 99_999)
    assert list(sizes.train) == [1 + client % 3 for client in sizes.clients]
    assert sizes.test == ()
    assert list(distribute_data(Made(), config("natural", clients=3)).sizes().clients) == [0, 1, 2]


def test_a_pool_is_dealt_out_where_it_is_asked_for_and_there_is_one() -> None:
    assert isinstance(distribute_data(Both(), config("natural")), OnDemand)
    assert isinstance(distribute_data(Both(), config("iid")), Dealt)
    with pytest.raises(ConfigError, match='must be "natural", not "iid"') as caught:
        distribute_data(Made(), config("iid"))
    assert caught.value.key == "data.partition"


def test_what_goes_wrong_is_said_before_any_round() -> None:
    class Broken(Made):
        def load_client(self, client: int, clients: int, path: Path | None) -> ClientData:
            raise FileNotFoundError("no such shard")

    class Wrong(Made):
        def load_client(self, client: int, clients: int, path: Path | None) -> ClientData:
            return examples(3)  # type: ignore[return-value]

    with pytest.raises(DataError, match=r"Broken\.load_client: no such shard"):
        distribute_data(Broken(), config("natural"))
    with pytest.raises(TaskError, match=r"load_client returned Examples; it must return ClientData"):
        distribute_data(Wrong(), config("natural"))
    with pytest.raises(ValueError, match="there is no client 4"):
        distribute_data(Made(), config("natural")).client(4)


# -- load_arrays ---------------------------------------------------------------------------------------------------


INPUTS, TARGETS = np.arange(12.0, dtype=np.float32).reshape(6, 2), np.arange(6) % 2


def saved(path: Path, **changes) -> Path:
    arrays = {"inputs": INPUTS, "targets": TARGETS, **changes}
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "data.npz"


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_what_was_written_is_read(file, save) -> None:
    save(file, inputs=INPUTS, targets=TARGETS, test_inputs=INPUTS[:2], test_targets=TARGETS[:2])
    data = load_arrays(file)
    assert np.array_equal(data.train.inputs.numpy(), INPUTS)
    assert np.array_equal(data.train.targets.numpy(), TARGETS)
    assert (data.train.inputs.dtype, data.train.targets.dtype) == (torch.float32, torch.int64)
    assert len(data.test) == 2
    assert load_arrays(saved(file)).test is None


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"inputs": None}, "no array 'inputs'"),
        ({"targets": None}, "no array 'targets'"),
        ({"test_inputs": INPUTS}, "no array 'test_targets'"),
        ({"test_targets": TARGETS}, "no array 'test_inputs'"),
        ({"targets": TARGETS[:5]}, "same number of rows"),
        ({"inputs": INPUTS[:0], "targets": TARGETS[:0]}, "at least one"),
        ({"test_inputs": INPUTS, "test_targets": TARGETS[:1]}, "same number of rows"),
        ({"test_inputs": INPUTS[:0], "test_targets": TARGETS[:0]}, "at least one"),
        ({"inputs": np.array(1.0)}, "inputs"),
        ({"targets": np.array(1)}, "targets"),
        ({"inputs": np.array([["a"]] * 6)}, "inputs.*<U1"),
        ({"targets": np.array(["cat"] * 6)}, "targets.*<U3"),
        ({"targets": np.array(["2020-01-01"] * 6, dtype="datetime64[D]")}, "targets"),
        ({"inputs": INPUTS.astype(np.longdouble)}, "inputs.*torch"),
        ({"targets": np.array([None] * 6)}, "plain arrays"),
        ({"inputs": np.array([{"a": 1}] * 6)}, "plain arrays"),
    ],
)
def test_arrays_that_are_no_examples_are_refused_by_name(file, changes, told) -> None:
    with pytest.raises(DataError, match=told) as caught:
        load_arrays(saved(file, **changes))
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int8", "int64", "uint8", "bool", ">f4", ">i8"])
def test_numbers_of_any_type_are_read(file, dtype) -> None:
    data = load_arrays(saved(file, inputs=INPUTS.astype(dtype)))
    assert np.array_equal(data.train.inputs.double().numpy(), INPUTS.astype(dtype).astype(float))


def test_a_missing_file_is_named(tmp_path) -> None:
    with pytest.raises(DataError, match=r"nothing\.npz: there is no such file"):
        load_arrays(tmp_path / "nothing.npz")


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def zipped(method: int = zipfile.ZIP_STORED, **members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"hello",
        b"PK\x03\x04",
        b"inputs,targets\n1,2\n",
        npy(INPUTS),
        pickle.dumps({"inputs": INPUTS, "targets": TARGETS}),
        zipped(inputs=b"", targets=npy(TARGETS)),
        zipped(inputs=npy(INPUTS)[:-1], targets=npy(TARGETS)),
        zipped(inputs=b"not an array", targets=npy(TARGETS)),
        zipped(zipfile.ZIP_DEFLATED, inputs=npy(INPUTS)[:50], targets=npy(TARGETS)),
    ],
    ids=["empty", "text", "zip's first bytes", "csv", "npy", "pickle", "empty array", "cut", "no array", "cut header"],
)
def test_what_is_no_file_of_arrays_is_refused(file, data) -> None:
    file.write_bytes(data)
    with pytest.raises(DataError) as caught:
        load_arrays(file)
    assert str(file) in str(caught.value)


def test_a_folder_is_refused(tmp_path) -> None:
    with pytest.raises(DataError, match="not a readable"):
        load_arrays(tmp_path)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_file_cut_short_anywhere_is_refused(file, save) -> None:
    save(file, inputs=INPUTS, targets=TARGETS)
    whole = file.read_bytes()
    for length in range(0, len(whole), 7):
        file.write_bytes(whole[:length])
        with pytest.raises(DataError):
            load_arrays(file)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.filterwarnings("default")  # zipfile warns of some kinds of damage before it refuses them
def test_a_damaged_file_is_refused_or_unharmed(file, save) -> None:
    save(file, inputs=INPUTS, targets=TARGETS)
    whole = file.read_bytes()
    for place in range(0, len(whole), 2):
        damaged = bytearray(whole)
        damaged[place] ^= (0x01, 0x80, 0xFF)[place % 3]
        file.write_bytes(bytes(damaged))
        try:
            data = load_arrays(file)
        except DataError:
            continue
        assert np.array_equal(data.train.inputs.numpy(), INPUTS), place
        assert np.array_equal(data.train.targets.numpy(), TARGETS), place


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle in a data file was run",))


def test_no_pickle_is_ever_run(file) -> None:
    bomb = np.array([Bomb()] * 6, dtype=object)
    for data in (zipped(inputs=npy(bomb), targets=npy(TARGETS)), npy(bomb), pickle.dumps(Bomb())):
        file.write_bytes(data)
        with pytest.raises(DataError):
            load_arrays(file)


def test_scikit_learn_is_asked_for_by_name(monkeypatch) -> None:
    require_sklearn("this test")
    monkeypatch.setattr("fedlearn.data.loaders.find_spec", lambda package: None)
    with pytest.raises(DependencyError, match="this test needs the package 'scikit-learn'"):
        require_sklearn("this test")
