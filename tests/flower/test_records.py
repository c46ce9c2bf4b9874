"""Bytes from outside: a vector is exactly what was agreed, or a refusal; nothing is unpickled, no memory is taken."""

from __future__ import annotations

import io
import pickle
import tracemalloc
import zipfile

import numpy as np
import pytest
from flwr.app import Array
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.lib import format as npy

from fedlearn.arrays import ParamEntry, ParamSpec
from fedlearn.config import RunConfig
from fedlearn.errors import ReplyError
from fedlearn.federation.messages import RoundPlan
from fedlearn.flower.records import (
    evaluate_reply_records,
    read_vector,
    request_records,
    train_reply_records,
    vector_record,
)

SIZE = 16
GOOD = np.arange(SIZE, dtype=np.float32)


def spec_of(size=SIZE, dtype="float32"):
    return ParamSpec((ParamEntry(name="w", shape=(size,), dtype=dtype, trainable=True),))


SPEC = spec_of()


def header(descr="'<f4'", shape=f"({SIZE},)", fortran="False", *, version=(1, 0), text=None) -> bytes:
    """Return the magic and a header that may say anything."""
    body = text if text is not None else f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}"
    raw = body.encode("latin1") if isinstance(body, str) else body
    raw += b" " * (-(len(raw) + 11) % 64) + b"\n"
    return b"\x93NUMPY" + bytes(version) + len(raw).to_bytes(2 if version[0] == 1 else 4, "little") + raw


def array_of(data: bytes, dtype="float32", shape=(SIZE,), stype="numpy.ndarray") -> Array:
    return Array(dtype, shape, stype, data)


def refused(array: Array, spec: ParamSpec = SPEC) -> bool:
    with pytest.raises(ReplyError) as error:
        read_vector(array, spec)
    return error.value.code == "bad-reply"


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@given(seed=st.integers(0, 99), size=st.integers(0, 50))
def test_what_is_sent_is_read_to_the_last_bit(dtype, seed, size):
    vector = np.random.default_rng(seed).normal(size=size).astype(dtype)
    read = read_vector(vector_record("update", vector)["update"], spec_of(size, dtype))
    assert read.tobytes() == vector.tobytes()
    assert read.dtype == vector.dtype
    assert not read.flags.writeable


def test_numbers_that_are_none_are_read_and_left_to_the_check():
    vector = GOOD.copy()
    vector[3] = np.nan
    assert np.isnan(read_vector(Array(vector), SPEC)[3])


RAW = GOOD.tobytes()
LIES = {
    "another shape in the record": array_of(header() + RAW, shape=(SIZE + 1,)),
    "a matrix in the record": array_of(header() + RAW, shape=(SIZE, 1)),
    "no shape in the record": array_of(header() + RAW, shape=()),
    "another type in the record": array_of(header() + RAW, dtype="float64"),
    "another serialisation": array_of(header() + RAW, stype="pickle"),
    "a longer shape in the header": array_of(header(shape="(17,)") + RAW),
    "a shorter shape in the header": array_of(header(shape="(15,)") + RAW),
    "a matrix in the header": array_of(header(shape="(4, 4)") + RAW),
    "a scalar in the header": array_of(header(shape="()") + RAW),
    "a huge shape in the header": array_of(header(shape="(1099511627776,)") + RAW),
    "a shape beyond all integers": array_of(header(shape="(" + "9" * 200 + ",)") + RAW),
    "a negative shape": array_of(header(shape="(-16,)") + RAW),
    "a shape of floats": array_of(header(shape="(16.0,)") + RAW),
    "a shape that is none": array_of(header(shape="16") + RAW),
    "another type in the header": array_of(header("'<f8'") + RAW),
    "another byte order": array_of(header("'>f4'") + RAW),
    "integers": array_of(header("'<i4'") + RAW),
    "objects": array_of(header("'|O'") + RAW),
    "objects with a pickle": array_of(header("'|O'") + pickle.dumps([1.0] * SIZE)),
    "a type that does not exist": array_of(header("'nonsense'") + RAW),
    "a structured type": array_of(header("[('a', '<f4')]") + RAW),
    "a structured type with titles": array_of(header("[(('t', 'a'), '<f4')]") + RAW),
    "a subarray type": array_of(header("('<f4', (1,))") + RAW),
    "a huge subarray type": array_of(header("('<f4', (1099511627776,))") + RAW),
    "an empty tuple for a type": array_of(header("()") + RAW),
    "an empty list for a type": array_of(header("[]") + RAW),
    "a list of nothing": array_of(header("[()]") + RAW),
    "a list of one": array_of(header("[('a',)]") + RAW),
    "a number for a type": array_of(header("4") + RAW),
    "none for a type": array_of(header("None") + RAW),
    "bytes for a type": array_of(header("b'<f4'") + RAW),
    "a field that overlaps": array_of(header("[('a', '<f4', -1)]") + RAW),
    "a long type": array_of(header("'" + "<f4," * 500 + "'") + RAW),
    "fortran order": array_of(header(fortran="True") + RAW),
    "fortran order that is no bool": array_of(header(fortran="'no'") + RAW),
    "no header at all": array_of(RAW),
    "nothing": array_of(b""),
    "only the magic": array_of(b"\x93NUMPY"),
    "the magic and a version": array_of(b"\x93NUMPY\x01\x00"),
    "a header cut short": array_of(header()[:40]),
    "a header without its data": array_of(header()),
    "data cut short": array_of(header() + RAW[:-1]),
    "data with something behind": array_of(header() + RAW + b"\0"),
    "version 2": array_of(header(version=(2, 0)) + RAW),
    "version 3": array_of(header(version=(3, 0)) + RAW),
    "version 255": array_of(header(version=(255, 255)) + RAW),
    "a header that is longer than the data": array_of(b"\x93NUMPY\x01\x00\xff\xff" + RAW),
    "a header of no keys": array_of(header(text="{}") + RAW),
    "a header that is no dictionary": array_of(header(text="[1, 2]") + RAW),
    "a header with another key": array_of(header(text="{'descr': '<f4', 'shape': (16,), 'x': 1, 3: 2}") + RAW),
    "a header that cannot be hashed": array_of(header(text="{[]: 1}") + RAW),
    "a header that calls": array_of(header(text="__import__('os').getcwd()") + RAW),
    "a header with an open bracket": array_of(header(text="{'descr': (((") + RAW),
    "a header with an open string": array_of(header(text="{'descr': '''") + RAW),
    "a header with brackets without end": array_of(header(text="(" * 3000) + RAW),
    "a header of minus signs": array_of(header(text="-" * 3000 + "1") + RAW),
    "a header of Python 2": array_of(header(shape="(16L,)") + RAW),
    "a header with nulls": array_of(header(text="\0" * 50) + RAW),
    "a header that is indented": array_of(header(text="  {\n\t1\n 2}") + RAW),
    "a zip archive": array_of(b"PK\x03\x04" + header() + RAW),
    "a pickle": array_of(pickle.dumps(GOOD)),
}


@pytest.mark.parametrize("array", LIES.values(), ids=LIES)
def test_an_array_that_lies_is_refused_and_takes_no_memory(array):
    tracemalloc.start()
    try:
        assert refused(array)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


def test_an_archive_of_arrays_is_refused():
    stream = io.BytesIO()
    np.savez(stream, update=GOOD)
    assert zipfile.is_zipfile(stream)
    assert refused(array_of(stream.getvalue()))


def test_more_bytes_than_a_header_and_the_vector_take_are_refused():
    assert refused(array_of(header(text=header()[10:].decode().strip() + " " * 5000) + RAW))
    assert refused(array_of(bytes(10**6)))


def test_the_header_is_the_one_that_numpy_writes():
    for size, dtype in [(1, "float32"), (16, "float32"), (123_456_789, "float64")]:
        stream = io.BytesIO()
        npy.write_array_header_1_0(
            stream, npy.header_data_from_array_1_0(np.broadcast_to(np.zeros((), dtype), (size,)))
        )
        assert stream.getvalue().rstrip() == header(f"'{np.dtype(dtype).str}'", f"({size},)").rstrip()


class Bomb:
    """What must never be unpickled."""

    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


def test_nothing_is_ever_unpickled():
    data = pickle.dumps(np.array([Bomb()] * SIZE, dtype=object))
    for descr in ("'|O'", "'<f4'"):
        assert refused(array_of(header(descr) + data))
    assert refused(array_of(data))


@given(st.binary(max_size=300))
@example(b"\x93NUMPY\x01\x00\x01\x00{")
def test_any_bytes_are_the_vector_or_a_refusal(data):
    for body in (data, b"\x93NUMPY" + data, b"\x93NUMPY\x01\x00" + len(data).to_bytes(2, "little") + data + RAW):
        try:
            assert read_vector(array_of(body), SPEC).shape == (SIZE,)
        except ReplyError as error:
            assert error.code == "bad-reply"


PYTHON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner) | st.tuples(inner, inner) | st.dictionaries(
        st.text(max_size=3), inner, max_size=2
    ),
    max_leaves=6,
)  # fmt: skip


@given(st.sampled_from(["descr", "fortran", "shape"]), PYTHON | st.text(max_size=12))
def test_any_literal_in_a_header_is_the_vector_or_a_refusal(key, value):
    written = value if isinstance(value, str) else repr(value)
    try:
        body = header(**{key: written}) + RAW
    except UnicodeEncodeError:
        return
    try:
        read_vector(array_of(body), SPEC)
    except ReplyError as error:
        assert error.code == "bad-reply"


@given(st.integers(0, 127), st.integers(0, 255))
def test_one_damaged_byte_of_a_header_is_the_vector_or_a_refusal(place, value):
    data = bytearray(header() + RAW)
    data[place] = value
    try:
        read_vector(array_of(bytes(data)), SPEC)
    except ReplyError as error:
        assert error.code == "bad-reply"


def test_what_travels_is_what_was_agreed_and_no_more():
    plan = RoundPlan(config=RunConfig(), round_number=1, attempt=1, proximal_mu=0.0, spec_sha256=SPEC.sha256)
    request = request_records(vector_record("vector", GOOD), plan)
    assert set(request) == {"model", "round"}
    assert RoundPlan.from_json(request.config_records["round"]["plan"]).spec_sha256 == SPEC.sha256
    reply = train_reply_records(GOOD, {"num-examples": 3, "loss": 0.5})
    assert set(reply) == {"update", "metrics"}
    assert dict(reply.metric_records["metrics"]) == {"num-examples": 3, "loss": 0.5}
    sums = {"num-examples": 3, "loss": 1.5}
    assert dict(evaluate_reply_records(sums).metric_records["metrics"]) == sums
