"""Who is a device is what the registry signed, to the byte; a key file is its owner's alone."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedlearn.errors import MissingError, RunFailedError, UsageError
from fedlearn.secagg.allow_list import AllowList
from fedlearn.secagg.keys import SigningKey, verify
from fedlearn.sources import SecureRandom

REGISTRY = SigningKey(bytes(range(32)))
DEVICES = [SigningKey(bytes([number]) * 32).public for number in range(1, 5)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A signed list of four."""
    found = tmp_path / "devices.json"
    AllowList.of(DEVICES).write(found, REGISTRY)
    return found


def rewritten(path: Path, **changes: Any) -> None:
    """Change what is in the file, and not its signature."""
    body = {**json.loads(path.read_bytes()), **changes}
    path.write_text(json.dumps({key: value for key, value in body.items() if value is not None}))


# -- the list --------------------------------------------------------------------------------------------------------


def test_a_signed_list_comes_back(path):
    found = AllowList.read(path, REGISTRY.public)
    assert found == AllowList.of(reversed(DEVICES))
    assert len(found) == 4
    assert DEVICES[0] in found
    assert REGISTRY.public not in found
    assert None not in found
    assert stat.S_IMODE(path.stat().st_mode) == 0o644  # everybody may know


@pytest.mark.parametrize("count", [0, 1])
def test_a_list_of_few(tmp_path, count):
    AllowList.of(DEVICES[:count]).write(tmp_path / "few", REGISTRY)
    assert len(AllowList.read(tmp_path / "few", REGISTRY.public)) == count


def test_a_device_twice_is_one(tmp_path):
    assert len(AllowList.of([*DEVICES, *DEVICES])) == 4


def test_the_same_devices_make_the_same_file(path, tmp_path):
    AllowList.of(DEVICES[::-1]).write(tmp_path / "again", REGISTRY)
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_another_registry(path):
    other = SigningKey(bytes(32))
    with pytest.raises(MissingError, match="did not sign this list"):
        AllowList.read(path, other.public)
    with pytest.raises(MissingError, match="did not sign this list"):
        AllowList.read(path, b"")
    AllowList.of(DEVICES).write(path, other)
    with pytest.raises(MissingError, match="did not sign this list"):
        AllowList.read(path, REGISTRY.public)


@pytest.mark.parametrize(
    "names",
    [
        sorted([*(device.hex() for device in DEVICES), bytes(32).hex()]),  # one more
        sorted(device.hex() for device in DEVICES[1:]),  # one fewer
        [],
    ],
)
def test_a_list_that_was_changed(path, names):
    rewritten(path, devices=names)
    with pytest.raises(MissingError, match="did not sign this list"):
        AllowList.read(path, REGISTRY.public)


@pytest.mark.parametrize(
    "changes",
    [
        {"devices": sorted((device.hex() for device in DEVICES), reverse=True)},
        {"devices": [DEVICES[0].hex()] * 2},
        {"devices": [DEVICES[0].hex()[2:]]},
        {"devices": [DEVICES[0].hex() + "00"]},
        {"version": 2},
        {"version": "1"},
        {"version": None},
    ],
)
def test_a_list_of_another_form_is_none(path, changes):
    rewritten(path, **changes)
    with pytest.raises(MissingError, match="not an allow-list of this version"):
        AllowList.read(path, REGISTRY.public)


@pytest.mark.parametrize(
    "changes",
    [
        {"devices": None},
        {"devices": 4},
        {"devices": ["no hexadecimal"]},
        {"devices": [None]},
        {"signature": None},
        {"signature": 4},
        {"signature": "no hexadecimal"},
    ],
)
def test_a_list_with_something_else_in_it(path, changes):
    rewritten(path, **changes)
    with pytest.raises(MissingError, match="no readable allow-list"):
        AllowList.read(path, REGISTRY.public)


@pytest.mark.parametrize("text", [b"", b"{}", b"[]", b"null", b"3", b"\xff\xfe", b"[" * 100_000, b'{"devices": []'])
def test_a_damaged_file(path, text):
    path.write_bytes(text)
    with pytest.raises(MissingError, match="no readable allow-list"):
        AllowList.read(path, REGISTRY.public)


def test_no_file_and_a_folder(tmp_path):
    for place in (tmp_path / "nothing", tmp_path):
        with pytest.raises(MissingError, match="no readable allow-list"):
            AllowList.read(place, REGISTRY.public)


def test_every_cut_of_a_list_is_refused(path):
    whole = path.read_bytes()
    for size in range(0, len(whole) - 2, 7):
        path.write_bytes(whole[:size])
        with pytest.raises(MissingError):
            AllowList.read(path, REGISTRY.public)


# -- keys ------------------------------------------------------------------------------------------------------------


def test_a_key_comes_back(tmp_path):
    key, path = SigningKey.generate(SecureRandom()), tmp_path / "key.pem"
    key.write(path)
    again = SigningKey.read(path)
    assert again.public == key.public
    assert verify(key.public, again.sign(b"text"), b"text")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_bytes().startswith(b"-----BEGIN PRIVATE KEY-----")


def test_a_key_is_never_overwritten(tmp_path):
    path = tmp_path / "key.pem"
    REGISTRY.write(path)
    with pytest.raises(UsageError, match="never overwritten"):
        SigningKey(bytes(32)).write(path)
    assert SigningKey.read(path).public == REGISTRY.public


def test_a_key_that_cannot_be_written(tmp_path):
    with pytest.raises(RunFailedError, match="cannot write"):
        REGISTRY.write(tmp_path / "no folder" / "key.pem")


def pem(key: Any, password: bytes | None = None) -> bytes:
    """Return a private key as PEM."""
    cover = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, cover)


def test_a_key_of_another_kind(tmp_path):
    for other in (X25519PrivateKey.generate(), generate_private_key(SECP256R1())):
        (tmp_path / "key.pem").write_bytes(pem(other))
        with pytest.raises(MissingError, match="not an Ed25519 key"):
            SigningKey.read(tmp_path / "key.pem")


UNKNOWN = (
    b"-----BEGIN PRIVATE KEY-----\n"
    b"MC4CAQAwBQYDKgMEBCIEIAABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4f\n"  # of an algorithm that does not exist
    b"-----END PRIVATE KEY-----\n"
)


@pytest.mark.parametrize(
    "text", [b"", b"key", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", UNKNOWN]
)
def test_what_is_no_key(tmp_path, text):
    (tmp_path / "key.pem").write_bytes(text)
    with pytest.raises(MissingError, match="no readable key"):
        SigningKey.read(tmp_path / "key.pem")


def test_a_key_under_a_password_a_public_key_a_folder_and_nothing(tmp_path):
    protected, public = tmp_path / "protected.pem", tmp_path / "public.pem"
    protected.write_bytes(pem(REGISTRY._key, b"password"))
    public.write_bytes(
        REGISTRY._key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    for path in (protected, public, tmp_path, tmp_path / "nothing"):
        with pytest.raises(MissingError, match="no readable key"):
            SigningKey.read(path)
