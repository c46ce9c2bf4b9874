"""``fedlearn doctor``: what it says of machines good and bad."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedlearn.cli import doctor
from fedlearn.cli.doctor import Check, Status, examine

Cli = Callable[..., Any]

CALENDAR = {2025: 1_760_000_000.0, 2026: 1_790_000_000.0}


def test_this_machine_is_fine(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = cli("doctor", "--json")
    assert said.code == 0
    assert said.json["ok"] is True
    for check in said.json["checks"]:
        assert check.keys() == {"name", "status", "found", "next"}
        assert check["status"] in ("ok", "warn")
    assert len({check["name"] for check in said.json["checks"]}) == len(said.json["checks"])


def test_the_table_has_a_word_for_every_check(cli: Cli) -> None:
    said = cli("doctor")
    assert said.code == 0
    assert "training step" in said.out
    assert "Ready" in said.out


def test_no_connection_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert all(check.status is not Status.fail for check in examine(tmp_path))


def test_a_failure_is_exit_1_with_its_next_step(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: [Check("thing", Status.fail, "is broken", "mend it")])
    said = cli("doctor")
    assert said.code == 1
    assert "mend it" in said.out
    said = cli("doctor", "--json")
    assert said.code == 1
    assert said.json == {
        "checks": [{"name": "thing", "status": "fail", "found": "is broken", "next": "mend it"}],
        "ok": False,
    }


def test_a_check_that_raises_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Check:
        raise OSError("libtorch.so: cannot open\nmore")

    monkeypatch.setattr(doctor, "check_torch_build", broken)
    found = {check.name: check for check in examine(tmp_path)}["torch build"]
    assert found.status is Status.fail
    assert found.found == "OSError: libtorch.so: cannot open"
    assert found.next


def _version(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(doctor, "version", lambda _: text)


@pytest.mark.parametrize(
    ("text", "status"),
    [("1.40.9", "fail"), ("1.41.0", "ok"), ("1.42.7", "ok"), ("1.42rc1", "ok"), ("1.43.0", "warn"), ("2.0", "warn")],
)
def test_versions(monkeypatch: pytest.MonkeyPatch, text: str, status: str) -> None:
    _version(monkeypatch, text)
    check = doctor.check_version("flwr", (1, 41), (1, 43))
    assert check.status == status
    assert bool(check.next) == (status != "ok")


def test_a_package_that_is_not_there() -> None:
    check = doctor.check_version("no-such-package-at-all", (1,), None)
    assert check.status is Status.fail
    assert "pip install" in check.next


@pytest.mark.parametrize(
    ("check", "status"),
    [
        (lambda: doctor.check_python((3, 10, 4)), "fail"),
        (lambda: doctor.check_python((3, 11, 0)), "ok"),
        (lambda: doctor.check_clock(CALENDAR[2025]), "fail"),
        (lambda: doctor.check_clock(CALENDAR[2026]), "ok"),
        (lambda: doctor.check_clock(0.0), "fail"),
        (lambda: doctor.check_phoning_home({}), "ok"),
        (lambda: doctor.check_phoning_home({"FLWR_TELEMETRY_ENABLED": "1"}), "warn"),
        (lambda: doctor.check_phoning_home({"FLWR_DISABLE_UPDATE_CHECK": "0"}), "warn"),
        (lambda: doctor.check_writable(Path("/proc/nowhere")), "fail"),
        (lambda: doctor.check_training_step(), "ok"),
    ],
)
def test_what_each_check_says(check: Callable[[], Check], status: str) -> None:
    found = check()
    assert found.status == status
    assert bool(found.next) == (status != "ok")


@pytest.mark.parametrize(("free", "status"), [(50 * 2**20, "fail"), (500 * 2**20, "warn"), (2 * 2**30, "ok")])
def test_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free: int, status: str) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    assert doctor.check_disk(tmp_path).status == status


def test_missing_extras_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_spec", lambda _: None)
    assert doctor.check_simulation_extra().status is Status.warn
    assert ".[simulation]" in doctor.check_simulation_extra().next
    optional = doctor.check_optional("onnx", ("no-such-package",), "exporting")
    assert optional.status is Status.ok
    assert ".[onnx]" in optional.next


def test_extras_that_are_there_are_found_by_the_names_that_pip_has_for_them() -> None:
    found = doctor.check_optional("privacy", ("dp-accounting",), "accounting")
    assert found.found.startswith("dp-accounting 0.")
    assert not found.next


def test_no_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("os.fork")
    assert doctor.check_fork().status is Status.warn
