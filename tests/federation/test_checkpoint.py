"""What a run goes on from: all of it comes back, and anything damaged or foreign is refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedlearn.algorithms import ServerState
from fedlearn.errors import RunUnreadableError
from fedlearn.federation.checkpoint import RunState, Totals, load_checkpoint, save_checkpoint

CONFIG = "c" * 64
STATE = RunState(
    server=ServerState(params=np.arange(50.0), slots={"m": np.ones(50), "v": np.full(50, 1e-300)}, round_number=3),
    totals=Totals(wall_s=1.5, client_updates=12, upload_bytes=10**12, download_bytes=7),
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "state.safetensors", STATE, CONFIG)
    return tmp_path / "state.safetensors"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 99),
    size=st.integers(0, 20),
    slots=st.sets(st.text(min_size=1, max_size=4), max_size=3),
    number=st.integers(0, 10**6),
    wall_s=st.floats(0, 1e9),
)
def test_everything_comes_back_to_the_last_bit(tmp_path, seed, size, slots, number, wall_s):
    generator = np.random.default_rng(seed)
    server = ServerState(
        params=generator.normal(size=size), slots={s: generator.normal(size=size) for s in slots}, round_number=number
    )
    save_checkpoint(tmp_path / "s", RunState(server=server, totals=Totals(wall_s=wall_s, client_updates=seed)), CONFIG)
    back = load_checkpoint(tmp_path / "s", CONFIG)
    assert back.round_number == number
    assert back.totals == Totals(wall_s=wall_s, client_updates=seed)
    assert back.server.params.tobytes() == server.params.tobytes()
    assert {n: s.tobytes() for n, s in back.server.slots.items()} == {n: s.tobytes() for n, s in server.slots.items()}


def test_before_the_first_round_there_is_none(tmp_path):
    assert load_checkpoint(tmp_path / "state.safetensors", CONFIG) is None


def test_the_checkpoint_of_another_configuration_is_refused(path):
    with pytest.raises(RunUnreadableError, match="another configuration"):
        load_checkpoint(path, "d" * 64)


def test_a_checkpoint_cut_short_anywhere_is_refused(path):
    data = path.read_bytes()
    for length in [*range(0, 600, 7), *range(600, len(data), 101), len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(RunUnreadableError, match="damaged"):
            load_checkpoint(path, CONFIG)


@pytest.mark.parametrize("data", [b"{}", bytes(1000), b"\xff" * 1000, b"PK\x03\x04" + bytes(100)], ids=lambda d: d[:4])
def test_a_file_that_is_none_is_refused(path, data):
    path.write_bytes(data)
    with pytest.raises(RunUnreadableError, match="damaged"):
        load_checkpoint(path, CONFIG)


@given(place=st.integers(0, 10**4), value=st.integers(0, 255))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_one_damaged_byte_of_the_header_is_never_a_traceback(path, place, value):
    save_checkpoint(path, STATE, CONFIG)
    data = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    data[place % header] = value
    path.write_bytes(data)
    try:
        state = load_checkpoint(path, CONFIG)
    except RunUnreadableError:
        return
    assert state.server.params.shape == (50,)


def test_a_folder_in_its_place_is_refused(tmp_path):
    (tmp_path / "state.safetensors").mkdir()
    with pytest.raises(RunUnreadableError):
        load_checkpoint(tmp_path / "state.safetensors", CONFIG)


def test_a_flipped_bit_in_the_numbers_is_found(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    save_checkpoint(path, STATE, CONFIG)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # safetensors itself would read on
    path.write_bytes(data)
    with pytest.raises(RunUnreadableError, match="damaged"):
        load_checkpoint(path, CONFIG)
