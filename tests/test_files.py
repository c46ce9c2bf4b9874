"""A file is wholly the old one or wholly the new one, whatever fails in between, and nothing is left lying about."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from fedlearn.errors import RunFailedError
from fedlearn.files import write_atomic

OLD, NEW = b"old bytes", b"new bytes" * 1000


class Crash(BaseException):
    """What a kill looks like from inside: nothing may catch it."""


def held(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("data", [b"", b"\n", NEW, bytes(range(256)) * 4096], ids=len)
def test_the_bytes_arrive_whether_or_not_there_was_a_file(tmp_path, data):
    path = tmp_path / "model"
    for _ in range(2):
        write_atomic(path, data)
        assert held(tmp_path) == {"model": data}
    assert path.stat().st_mode & 0o777 == 0o644


def test_data_reach_the_disk_before_the_name_and_the_name_before_the_return(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(_kind(fd)), fsync(fd)))
    monkeypatch.setattr(Path, "replace", lambda self, target: (events.append("rename"), replace(self, target)))
    write_atomic(tmp_path / "model", NEW)
    assert events == ["file", "rename", "folder"]


def _kind(descriptor):
    return "folder" if Path(f"/proc/self/fd/{descriptor}").resolve().is_dir() else "file"


@pytest.mark.parametrize("failing", ["os.fsync", "pathlib.Path.replace", "pathlib.Path.chmod"])
@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), OSError(errno.ENOSPC, "full")], ids=str)
def test_an_error_of_the_disk_keeps_the_old_bytes_and_says_what_to_do(tmp_path, monkeypatch, failing, error):
    write_atomic(tmp_path / "model", OLD)
    with monkeypatch.context() as patched:
        patched.setattr(failing, _raising(error))
        with pytest.raises(RunFailedError, match="free some space" if error.errno == errno.ENOSPC else "writable"):
            write_atomic(tmp_path / "model", NEW)
    assert held(tmp_path) == {"model": OLD}


@pytest.mark.parametrize("failing", ["os.fsync", "pathlib.Path.replace", "pathlib.Path.chmod"])
def test_a_crash_keeps_the_old_bytes(tmp_path, monkeypatch, failing):
    write_atomic(tmp_path / "model", OLD)
    with monkeypatch.context() as patched:
        patched.setattr(failing, _raising(Crash()))
        with pytest.raises(Crash):
            write_atomic(tmp_path / "model", NEW)
    assert held(tmp_path) == {"model": OLD}


def test_a_crash_after_the_rename_leaves_the_new_bytes_whole(tmp_path, monkeypatch):
    write_atomic(tmp_path / "model", OLD)
    with monkeypatch.context() as patched:
        patched.setattr("fedlearn.files._sync_folder", _raising(Crash()))
        with pytest.raises(Crash):
            write_atomic(tmp_path / "model", NEW)
    assert held(tmp_path) == {"model": NEW}


def test_a_folder_that_is_not_there_is_an_error_with_its_path(tmp_path):
    with pytest.raises(RunFailedError, match="nowhere/model"):
        write_atomic(tmp_path / "nowhere" / "model", NEW)


def test_a_really_full_disk_keeps_the_old_bytes(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("a file system of one's own takes root on Linux")
    try:
        write_atomic(tmp_path / "model", OLD)
        with pytest.raises(RunFailedError, match="free some space"):
            write_atomic(tmp_path / "model", bytes(10**6))
        assert held(tmp_path) == {"model": OLD}
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def _raising(error):
    def fail(*_args, **_kwargs):
        raise error

    return fail
