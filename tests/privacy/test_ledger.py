"""The ledger: whatever is done to a line shows, with its number; what was written is there after a crash."""

from __future__ import annotations

import errno
import json
import math
import os
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlearn.errors import LedgerError, LedgerMissingError, RunFailedError
from fedlearn.privacy.ledger import GENESIS, Head, Ledger, read_events, releases_of
from fedlearn.privacy.releases import Lattice, Matrix, Query, Release, Sampling, read_number, written_number

LINES = 6
EVERY_LINE = range(1, LINES + 1)


def release(number: int = 1, **changes) -> Release:
    return replace(
        Release(
            what="model",
            round_number=number,
            unit="client",
            adjacency="add-remove",
            mechanism="gaussian",
            queries=(Query(name="update", sensitivity_l2=1.0, stddev=2.0),),
            sampling=Sampling(method="poisson", rate=0.1, population=100),
            simulated=True,
        ),
        **changes,
    )


@pytest.fixture
def path(tmp_path):
    """A ledger of six lines."""
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.append("run.policy", {"unit": "client", "delta": "1e-05"})
    for number in range(1, LINES - 1):
        ledger.append("round.release", release(number).to_body())
    ledger.append("run.close", {"reason": "finished"})
    return ledger.path


def lines_of(path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def refused(path, head=None) -> LedgerError:
    with pytest.raises(LedgerError) as error:
        read_events(path, head)
    assert f"line {error.value.line}" in str(error.value)
    return error.value


# -- tampering ------------------------------------------------------------------------------------------------------


def test_a_ledger_that_nobody_touched_is_read(path):
    events = read_events(path, Head.of(read_events(path)))
    assert [event.seq for event in events] == list(EVERY_LINE)
    assert events[0].prev == GENESIS
    assert len(releases_of(events)) == LINES - 2


@pytest.mark.parametrize("number", EVERY_LINE)
def test_deleting_a_line_is_found(path, number):
    head, lines = Head.of(read_events(path)), lines_of(path)
    del lines[number - 1]
    path.write_bytes(b"".join(lines))
    assert refused(path, head).line == number
    if number < LINES:  # that lines are missing at the end only who knows the head can tell
        assert refused(path).line == number
    else:
        assert read_events(path)[-1].kind != "run.close", "it then says itself that it is open"


EDITS = (("gaussian", "none"), ("2.0", "9.0"), ('"seq":', '"seq": '), ("client", "clients"), ("run", "rum"))


@pytest.mark.parametrize("number", EVERY_LINE)
def test_editing_a_line_is_found(path, number):
    head, lines = Head.of(read_events(path)), lines_of(path)
    edited = {lines[number - 1].replace(old.encode(), new.encode(), 1) for old, new in EDITS} - {lines[number - 1]}
    assert len(edited) >= 2
    for line in edited:
        path.write_bytes(b"".join([*lines[: number - 1], line, *lines[number:]]))
        assert refused(path, head).line in (number, number + 1)
        if number < LINES:  # the last line is what no later one vouches for
            assert refused(path).line in (number, number + 1)


@pytest.mark.parametrize("number", EVERY_LINE[:-1])
def test_reordering_two_lines_is_found(path, number):
    lines = lines_of(path)
    lines[number - 1], lines[number] = lines[number], lines[number - 1]
    path.write_bytes(b"".join(lines))
    assert refused(path).line == number


@pytest.mark.parametrize("number", EVERY_LINE)
def test_writing_a_line_twice_is_found(path, number):
    lines = lines_of(path)
    lines.insert(number, lines[number - 1])
    path.write_bytes(b"".join(lines))
    assert refused(path).line == number + 1


@given(st.integers(0, 10**6), st.integers(1, 255))
def test_any_byte_that_is_changed_is_found(tmp_path_factory, position, change):
    folder = tmp_path_factory.mktemp("ledger")
    ledger = Ledger(folder / "ledger.jsonl")
    for number in (1, 2, 3):
        ledger.append("round.release", release(number).to_body())
    data = bytearray(ledger.path.read_bytes())
    data[position % len(data)] ^= change
    ledger.path.write_bytes(bytes(data))
    with pytest.raises(LedgerError):
        read_events(ledger.path, ledger.head)


def test_a_chain_that_was_made_anew_from_an_edit_on_is_found_by_the_head(path):
    head, events = Head.of(read_events(path)), read_events(path)
    path.unlink()
    forged = Ledger(path)
    for event in events:
        body = dict(event.body)
        if event.seq == 3:
            body["queries"] = []
        forged.append(event.kind, body)
    read_events(path)
    assert refused(path, head).line == LINES


@pytest.mark.parametrize("text", [b"\n", b"{}\n", b"[1]\n", b"\xff\n", b'{"v":1}\n', b"[" * 100_000 + b"\n"])
def test_what_is_no_ledger_is_refused_at_its_first_line(tmp_path, text):
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(text)
    assert refused(path).line == 1


def test_another_version_and_a_missing_file_say_so(path, tmp_path):
    lines = lines_of(path)
    path.write_bytes(lines[0].replace(b'"v":1', b'"v":2'))
    assert "edited" in str(refused(path)) or "version" in str(refused(path))
    with pytest.raises(LedgerMissingError, match="nowhere"):
        read_events(tmp_path / "nowhere")


# -- writing --------------------------------------------------------------------------------------------------------


def test_a_torn_last_line_counts_as_not_written_and_is_written_again(path):
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    ledger = Ledger(path)
    assert ledger.head.count == LINES - 1
    ledger.append("run.close", {"reason": "finished"})
    assert path.read_bytes() == whole


def test_an_event_is_committed_once_however_often_it_is_tried(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    event = ledger.next_event("round.release", release().to_body())
    assert not ledger.path.exists(), "making an event writes nothing"
    ledger.commit(event)
    ledger.commit(event)
    Ledger(ledger.path).commit(event)
    assert len(read_events(ledger.path)) == 1
    with pytest.raises(LedgerError, match="would not follow"):
        ledger.commit(replace(event, seq=5))


def test_a_full_disk_stops_the_release_and_keeps_the_ledger(path, monkeypatch):
    before = path.read_bytes()

    def full(_descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    ledger = Ledger(path)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunFailedError, match="Nothing was released"):
        ledger.append("round.release", release().to_body())
    monkeypatch.undo()
    assert ledger.head.count == LINES
    ledger.append("run.resume", {})
    assert path.read_bytes().startswith(before)
    assert len(read_events(path)) == LINES + 1


def test_a_missing_file_that_should_reach_a_head_is_an_error(tmp_path):
    with pytest.raises(LedgerMissingError):
        Ledger(tmp_path / "ledger.jsonl", Head(count=1, sha256="a" * 64))


# -- releases as JSON -----------------------------------------------------------------------------------------------

NUMBERS = st.floats(0, allow_infinity=True, allow_nan=False)
TEXTS = st.text(max_size=8)
LATTICES = st.builds(
    Lattice, sensitivity_l1=NUMBERS, sensitivity_l2=NUMBERS, variance=NUMBERS, slack=NUMBERS, slack_delta=NUMBERS
)
RELEASES = st.builds(
    Release,
    what=TEXTS,
    round_number=st.integers(0, 10**9),
    unit=st.sampled_from(["none", "example", "client"]),
    adjacency=TEXTS,
    mechanism=TEXTS,
    queries=st.lists(st.builds(Query, name=TEXTS, sensitivity_l2=NUMBERS, stddev=NUMBERS), max_size=3).map(tuple),
    sampling=st.builds(Sampling, method=TEXTS, rate=NUMBERS, population=st.integers(0, 10**9)),
    steps=st.integers(0, 10**6),
    matrix=st.none()
    | st.builds(
        Matrix,
        instance=TEXTS,
        row=st.integers(0, 10**6),
        coefficients=st.lists(NUMBERS, max_size=4).map(tuple),
        min_separation=st.integers(0, 100),
    ),
    lattice=st.none() | LATTICES,
    simulated=st.booleans(),
    evidence=st.dictionaries(TEXTS, TEXTS, max_size=3),
)


@given(RELEASES)
def test_a_release_reads_back_as_it_was_written_and_holds_no_float(made):
    body = json.loads(json.dumps(made.to_body()), parse_float=lambda text: pytest.fail(f"a float: {text}"))
    assert Release.from_body(body) == made


@given(RELEASES, st.sampled_from(["", "queries", "sampling", "matrix", "lattice"]), st.text("later-field", max_size=8))
def test_a_field_of_a_later_version_is_named_as_unknown(made, where, name):
    body = json.loads(json.dumps(made.to_body()))
    places = {"": body, "sampling": body["sampling"], "matrix": body.get("matrix"), "lattice": body.get("lattice")}
    places["queries"] = body["queries"][0] if body["queries"] else None
    if places[where] is None:
        return
    places[where][f"x-{name}"] = "later"
    assert any(f"x-{name}" in each for each in Release.from_body(body).unknown)


@pytest.mark.parametrize(
    "change",
    [{"steps": "1"}, {"steps": -1}, {"queries": None}, {"sampling": {}}, {"simulated": "no"}, {"round-number": 1.5},
     {"evidence": {"a": 1}}, {"queries": [{"name": "u", "sensitivity-l2": "nan", "stddev": "1"}]}],
    ids=str,
)  # fmt: skip
def test_a_release_that_cannot_be_read_is_an_error_with_its_line(tmp_path, change):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.append("run.policy", {})
    ledger.append("round.release", {**release().to_body(), **change})
    with pytest.raises(LedgerError) as error:
        releases_of(read_events(ledger.path))
    assert error.value.line == 2


LATTICE = Lattice(sensitivity_l1=12.0, sensitivity_l2=4.0, variance=256.0, slack=1e-6, slack_delta=0.0)


def test_a_release_without_a_lattice_has_the_bytes_it_always_had(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.append("round.release", release().to_body())
    assert ledger.head.sha256 == "544c6293758a1691885000e8158e95c3bb85f76dd99229568f46ae9247d2f3cb"
    assert "lattice" not in release().to_body()


def test_a_lattice_is_written_as_a_table_of_decimal_strings():
    body = release(lattice=LATTICE).to_body()["lattice"]
    assert body == {
        "sensitivity-l1": "12.0",
        "sensitivity-l2": "4.0",
        "variance": "256.0",
        "slack": "1e-06",
        "slack-delta": "0.0",
    }


@pytest.mark.parametrize("name", ["sensitivity-l1", "sensitivity-l2", "variance", "slack", "slack-delta"])
@pytest.mark.parametrize("value", ["nan", True, 1.0, 5, None, "many"])
def test_a_lattice_with_a_number_that_is_none_cannot_be_read(name, value):
    body = release(lattice=LATTICE).to_body()
    with pytest.raises(ValueError, match=r"expected|convert|not a release"):
        Release.from_body({**body, "lattice": {**body["lattice"], name: value}})
    del body["lattice"][name]
    with pytest.raises(ValueError, match=name):
        Release.from_body(body)


def test_an_event_that_is_not_known_counts_as_a_release_that_is_not_known(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.append("model.publish", {})
    assert [each.unknown for each in releases_of(ledger.events)] == [("model.publish",)]


@given(st.floats(allow_nan=False))
def test_numbers_are_written_as_the_shortest_text_that_reads_back(value):
    assert read_number(written_number(value)) == value


@pytest.mark.parametrize("text", ["nan", "", "one", 1.0, None, True])
def test_what_is_no_written_number_is_refused(text):
    with pytest.raises((ValueError, TypeError)):
        read_number(text)


def test_the_noise_multiplier_of_several_queries_is_that_of_all_jointly():
    two = release(
        queries=(
            Query(name="update", sensitivity_l2=0.5, stddev=1.0),
            Query(name="clip-count", sensitivity_l2=0.5, stddev=2.0),
        )
    )
    assert two.noise_multiplier == pytest.approx((2.0**-2 + 4.0**-2) ** -0.5)
    assert release(queries=()).noise_multiplier == 0.0
    assert release(queries=(Query(name="update", sensitivity_l2=1.0, stddev=0.0),)).noise_multiplier == 0.0
    for sensitivity, stddev in ((0.0, 1.0), (math.inf, 1.0), (1.0, math.inf), (-1.0, 1.0)):
        impossible = (Query(name="update", sensitivity_l2=sensitivity, stddev=stddev),)
        assert release(queries=impossible).noise_multiplier == 0.0
