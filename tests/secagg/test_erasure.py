"""Nothing is left: no key once it was used, no secret after the last leg or an error, in a state or on a disk."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cohort import NOW_S, Cohort, offer

from fedlearn.errors import RunFailedError
from fedlearn.secagg import vault as vaults
from fedlearn.secagg.client import ClientSession
from fedlearn.secagg.errors import (
    OfferSignatureError,
    ParticipationLimitError,
    ReplayError,
    SecaggError,
    StageError,
)
from fedlearn.secagg.keys import SigningKey, open_sealed, seal
from fedlearn.secagg.vault import FileVault, MemoryVault, Vault

SESSION, OTHER = bytes(range(32)), bytes(32)
VICTIM = 2

# -- vaults, all alike -----------------------------------------------------------------------------------------------


@pytest.fixture(params=["memory", "file"])
def vault(request: pytest.FixtureRequest, tmp_path: Path) -> Vault:
    """A vault of each kind."""
    return MemoryVault() if request.param == "memory" else FileVault(tmp_path / "deep" / "vault")


def test_a_blob_is_opened_once(vault):
    blob = vault.seal(SESSION, b"state")
    assert b"state" not in blob
    assert vault.open(SESSION, blob) == b"state"
    with pytest.raises(StageError):
        vault.open(SESSION, blob)


def test_a_session_is_sealed_again_and_again_under_new_keys(vault):
    first = vault.seal(SESSION, b"state")
    vault.open(SESSION, first)
    second = vault.seal(SESSION, b"state")
    assert first != second
    with pytest.raises(StageError):  # an old blob; the attempt costs the session its key
        vault.open(SESSION, first)
    with pytest.raises(StageError):
        vault.open(SESSION, second)


@pytest.mark.parametrize("spoil", [lambda blob: blob[:-1], lambda blob: b"", lambda blob: bytes(len(blob))])
def test_a_damaged_blob_is_refused_and_its_key_is_gone(vault, spoil):
    blob = vault.seal(SESSION, b"state")
    with pytest.raises(StageError):
        vault.open(SESSION, spoil(blob))
    with pytest.raises(StageError):
        vault.open(SESSION, blob)


def test_what_was_never_sealed_cannot_be_opened(vault):
    with pytest.raises(StageError):
        vault.open(SESSION, b"blob")


def test_a_blob_of_another_session(vault):
    one, two = vault.seal(SESSION, b"one"), vault.seal(OTHER, b"two")
    with pytest.raises(StageError):
        vault.open(SESSION, two)
    assert vault.open(OTHER, two) == b"two"
    with pytest.raises(StageError):
        vault.open(SESSION, one)


def test_a_forgotten_session_cannot_be_opened(vault):
    blob = vault.seal(SESSION, b"state")
    vault.forget(SESSION)
    vault.forget(SESSION)  # there is none any more, and nothing to complain of
    with pytest.raises(StageError):
        vault.open(SESSION, blob)


def test_a_session_is_admitted_once(vault):
    vault.admit(SESSION)
    vault.admit(OTHER)
    with pytest.raises(ReplayError):
        vault.admit(SESSION)
    vault.forget(SESSION)
    with pytest.raises(ReplayError):  # also after it is over
        vault.admit(SESSION)


def test_a_device_takes_part_as_often_as_its_owner_permits(vault):
    vault.admit(SESSION, most=2)
    vault.admit(OTHER, most=2)
    with pytest.raises(ParticipationLimitError):
        vault.admit(bytes([1]) * 32, most=2)
    with pytest.raises(ReplayError):
        vault.admit(SESSION, most=2)
    vault.admit(bytes([1]) * 32, most=3)
    with pytest.raises(ParticipationLimitError):
        vault.admit(bytes([2]) * 32, most=0)


def test_what_was_refused_does_not_count(vault):
    for _ in range(3):
        with pytest.raises(ParticipationLimitError):
            vault.admit(SESSION, most=0)
    vault.admit(SESSION, most=1)


def test_of_many_that_race_for_a_key_one_gets_it(vault):
    for _ in range(10):
        blob = vault.seal(SESSION, b"state")

        def attempt(_: int, blob: bytes = blob) -> bytes:
            try:
                return vault.open(SESSION, blob)
            except StageError:
                return b""

        with ThreadPoolExecutor(8) as pool:
            assert sorted(pool.map(attempt, range(8))) == [b""] * 7 + [b"state"]


def test_of_many_that_race_for_a_session_one_is_admitted(vault):
    def attempt(_: int) -> bool:
        try:
            vault.admit(SESSION)
        except ReplayError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(attempt, range(16))) == 1


# -- what a vault of files leaves on the disk ------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_only_the_devices_own_user_can_read_it(tmp_path):
    folder = tmp_path / "vault"
    vault = FileVault(folder)
    vault.admit(SESSION)
    vault.seal(SESSION, b"state")
    for path in (folder, *folder.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)
    sealed_first = FileVault(tmp_path / "other")
    sealed_first.seal(SESSION, b"state")
    assert stat.S_IMODE((tmp_path / "other").stat().st_mode) == 0o700


@pytest.mark.parametrize("how", ["open", "forget", "damaged"])
def test_a_used_key_is_not_on_the_disk(tmp_path, how):
    vault = FileVault(tmp_path)
    vault.admit(SESSION)
    blob = vault.seal(SESSION, b"state")
    (name,) = [name for name in contents(tmp_path) if name.endswith(".key")]
    key = contents(tmp_path)[name]
    assert open_sealed(key, blob, SESSION) == b"state"
    if how == "open":
        vault.open(SESSION, blob)
    elif how == "forget":
        vault.forget(SESSION)
    else:
        with pytest.raises(StageError):
            vault.open(SESSION, blob[1:])
    assert contents(tmp_path) == {f"seen/{SESSION.hex()}": b""}


def test_a_key_is_overwritten_before_it_is_removed(tmp_path, monkeypatch):
    """Where a file is only unlinked, its bytes stay on the disk."""
    vault = FileVault(tmp_path)
    blob = vault.seal(SESSION, b"state")
    left = []
    unlink = Path.unlink

    def watched(path: Path, missing_ok: bool = False) -> None:
        left.append(path.read_bytes())
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", watched)
    vault.open(SESSION, blob)
    assert left == [bytes(32)]


def test_two_vaults_in_one_folder_are_one(tmp_path):
    one, two = FileVault(tmp_path), FileVault(tmp_path)
    one.admit(SESSION)
    with pytest.raises(ReplayError):
        two.admit(SESSION)
    assert two.open(SESSION, one.seal(SESSION, b"state")) == b"state"


RACER = """
import sys, time
from pathlib import Path
from fedlearn.secagg.errors import SecaggError
from fedlearn.secagg.vault import FileVault
folder, session, blob = Path(sys.argv[1]), bytes(32), bytes.fromhex(sys.argv[2])
vault = FileVault(folder)
print("ready", flush=True)
while not (folder / "go").exists():
    time.sleep(0.0005)
try:
    print(vault.open(session, blob).decode())
except SecaggError as error:
    print(type(error).__name__)
"""


def test_of_two_processes_one_gets_the_key(tmp_path):
    blob = FileVault(tmp_path).seal(bytes(32), b"state")
    command = [sys.executable, "-c", RACER, str(tmp_path), blob.hex()]
    racers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        for racer in racers:
            assert racer.stdout is not None
            assert racer.stdout.readline() == "ready\n"
        (tmp_path / "go").touch()
        found = sorted(racer.communicate(timeout=60)[0].strip() for racer in racers)
    finally:
        for racer in racers:
            racer.kill()
            racer.wait()
    assert found == ["StageError", "state"]


def test_a_folder_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").write_text("in the way")
    vault = FileVault(tmp_path / "file")
    for act in (lambda: vault.admit(SESSION), lambda: vault.seal(SESSION, b"state")):
        with pytest.raises(RunFailedError, match="cannot write"):
            act()
    with pytest.raises(StageError):
        vault.open(SESSION, b"blob")


def test_there_are_two_vaults_and_this_file_knows_both():
    assert set(vaults.__all__) == {"FileVault", "MemoryVault", "Vault"}


# -- a session between its legs --------------------------------------------------------------------------------------


class Device:
    """A client that keeps its session in a vault between two legs, as one on a network does."""

    def __init__(self, cohort: Cohort, client: int, folder: Path) -> None:
        self.cohort, self.client, self.vault = cohort, client, FileVault(folder)
        self.folder = folder
        self.blob = b""
        self.secrets: set[bytes] = set()

    def begin(self, message: bytes) -> bytes:
        """Answer the offer."""
        session, answer = ClientSession.begin(
            message,
            identity=self.cohort.keys[self.client],
            allow_list=self.cohort.allow_list,
            server_key=self.cohort.server_key.public,
            policy=self.cohort.policy,
            vault=self.vault,
            now_s=NOW_S,
        )
        self._keep(session)
        return answer

    def answer(self, phase: str, message: bytes) -> bytes:
        """Answer one message of another phase; whatever goes wrong, nothing is kept."""
        session_id = self.cohort.offered.session
        state = self.vault.open(session_id, self.blob)
        session = ClientSession.from_bytes(state, identity=self.cohort.keys[self.client])
        self.cohort.sessions[self.client] = session
        try:
            answer = self.cohort.answer(phase, self.client, message)
        except SecaggError:
            self.vault.forget(session_id)
            raise
        if session.stage != "spent":
            self._keep(session)
        return answer

    def _keep(self, session: ClientSession) -> None:
        """Seal a session, and note what must never be seen."""
        secrets = session._secrets
        self.secrets |= {secrets.encryption, secrets.mask, secrets.seed} - {b""}
        for pair in secrets.held.values():
            self.secrets |= set(pair)
        self.blob = self.vault.seal(session.offer.session, session.to_bytes())
        self.session = session

    def traces(self) -> Iterator[bytes]:
        """Yield whatever a thief of the device would find: the vault's files and the blob."""
        yield from contents(self.folder).values()
        yield from (name.encode() for name in contents(self.folder))
        yield self.blob


def assert_no_secret_in(data: bytes, secrets: set[bytes]) -> None:
    """No secret is in these bytes, raw or written in hexadecimal."""
    assert secrets
    for secret in secrets:
        assert secret not in data
        assert secret.hex().encode() not in data


def kept_secrets(session: ClientSession) -> object:
    """Return what of a session's state is secret."""
    table = json.loads(session.to_bytes())
    return table["secrets"], table["held"]


EMPTY = (["", "", ""], {})


@pytest.fixture
def device(tmp_path: Path) -> tuple[Cohort, Device, Callable[[str], bytes]]:
    """A cohort of which one client lives in a vault of files, and a function that brings it up to a phase."""
    cohort = Cohort(offer())
    device = Device(cohort, VICTIM, tmp_path / "vault")
    usual = Cohort.answer

    def answer(phase: str, client: int, message: bytes) -> bytes:
        if client != VICTIM:
            return usual(cohort, phase, client, message)
        if phase == "advertise":
            return device.begin(message)
        cohort.answer = lambda phase, client, message: usual(cohort, phase, client, message)  # type: ignore[method-assign]
        try:
            return device.answer(phase, message)
        finally:
            cohort.answer = answer  # type: ignore[method-assign]

    cohort.answer = answer  # type: ignore[method-assign]
    return cohort, device, lambda phase: cohort.until(phase)[VICTIM]


def test_a_whole_session_over_a_vault_of_files_leaves_no_secret(device):
    cohort, client, _ = device
    total = cohort.run()
    assert (total.words == cohort.expected(range(5))).all()
    assert len(client.secrets) == 3 + 2 * 5
    assert cohort.sessions[VICTIM].stage == "spent"
    assert kept_secrets(cohort.sessions[VICTIM]) == EMPTY
    assert contents(client.folder) == {f"seen/{cohort.offered.session.hex()}": b""}
    for trace in client.traces():
        assert_no_secret_in(trace, client.secrets)
    assert_no_secret_in(cohort.sessions[VICTIM].to_bytes(), client.secrets)
    with pytest.raises(StageError):  # the last blob is still there, and opens no more
        client.vault.open(cohort.offered.session, client.blob)


@pytest.mark.parametrize("phase", ["share", "mask", "consistent", "unmask"])
def test_a_session_in_waiting_is_useless_without_its_key(device, phase):
    cohort, client, until = device
    until(phase)
    assert kept_secrets(client.session) != EMPTY
    for trace in client.traces():
        assert_no_secret_in(trace, client.secrets)
    assert b"advertised" not in client.blob  # nor is anything else of it readable
    assert open_sealed(bytes(32), client.blob, cohort.offered.session) is None
    assert open_sealed(bytes(32), client.blob, b"") is None
    with pytest.raises(StageError):
        FileVault(client.folder.parent / "another").open(cohort.offered.session, client.blob)
    with pytest.raises(StageError):
        MemoryVault().open(cohort.offered.session, client.blob)


@pytest.mark.parametrize("phase", ["share", "mask", "consistent", "unmask"])
def test_after_any_abort_no_secret_is_left(device, phase):
    cohort, client, until = device
    until(phase)
    with pytest.raises(SecaggError):
        cohort.answer(phase, VICTIM, b"rubbish")
    session = cohort.sessions[VICTIM]
    assert session.stage == "ended"
    assert kept_secrets(session) == EMPTY
    assert_no_secret_in(session.to_bytes(), client.secrets)
    for trace in client.traces():
        assert_no_secret_in(trace, client.secrets)
    assert contents(client.folder) == {f"seen/{cohort.offered.session.hex()}": b""}
    with pytest.raises(StageError):  # a second try finds nothing
        cohort.answer(phase, VICTIM, b"rubbish")


@pytest.mark.parametrize("phase", ["share", "mask", "consistent", "unmask"])
def test_a_leg_that_comes_twice_finds_no_key(device, phase):
    """Even where a copy of the blob was put back."""
    cohort, client, until = device
    message = until(phase)
    before = client.blob
    cohort.answer(phase, VICTIM, message)
    client.blob = before
    with pytest.raises(StageError):
        cohort.answer(phase, VICTIM, message)
    assert not [name for name in contents(client.folder) if name.endswith(".key")]


def test_secrets_are_let_go_of_as_soon_as_they_are_not_needed():
    """The masks' secrets go with the vector; the shares of others go with the last answer, before it is returned."""
    cohort = Cohort(offer())
    message = cohort.until("mask")[VICTIM]
    session = cohort.sessions[VICTIM]
    before = json.loads(session.to_bytes())
    assert [bool(each) for each in before["secrets"]] == [False, True, True]  # keys of pairs took the first one's place
    assert len(before["receiving"]) == 4
    cohort.answer("mask", VICTIM, message)
    kept = json.loads(session.to_bytes())
    assert kept["secrets"] == ["", "", ""]
    assert kept["receiving"] == {}
    assert len(kept["held"]) == 5
    cohort = Cohort(offer())
    cohort.run()
    for session in cohort.sessions.values():
        assert session.stage == "spent"
        assert kept_secrets(session) == EMPTY


def test_an_offer_that_is_refused_leaves_no_trace(tmp_path):
    cohort = Cohort(offer())
    client = Device(cohort, VICTIM, tmp_path / "vault")
    with pytest.raises(OfferSignatureError):
        client.begin(cohort.offered.signed(SigningKey(bytes(32))).message())
    assert not (tmp_path / "vault").exists()


def test_an_error_that_is_none_of_the_protocols_ends_the_session_too():
    cohort = Cohort(offer())
    message = cohort.until("share")[VICTIM]
    session = cohort.sessions[VICTIM]
    with pytest.raises(TypeError):
        session.share_keys(message, allow_list=None)
    assert session.stage == "ended"
    assert kept_secrets(session) == EMPTY


def test_a_session_ends_when_its_owner_says_so():
    cohort = Cohort(offer())
    message = cohort.until("unmask")[VICTIM]
    session = cohort.sessions[VICTIM]
    session.end()
    assert kept_secrets(session) == EMPTY
    with pytest.raises(StageError):
        session.unmask(message)


@pytest.mark.parametrize("phase", ["share", "mask", "consistent", "unmask"])
def test_a_state_is_kept_and_restored_whole(phase):
    cohort = Cohort(offer(), lost={0: "mask"})
    outgoing = cohort.until(phase)
    state = cohort.sessions[VICTIM].to_bytes()
    cohort.sessions[VICTIM] = ClientSession.from_bytes(state, identity=cohort.keys[VICTIM])
    assert cohort.sessions[VICTIM].to_bytes() == state
    cohort.exchange(outgoing)
    while cohort.server.phase != cohort.server.phases[-1]:
        cohort.exchange(cohort.server.advance())
    total = cohort.server.finish()
    assert (total.words == cohort.expected(total.survivors)).all()
    assert len(total.survivors) == 4


def test_the_server_forgets_shares_and_the_sum():
    cohort = Cohort(offer(), lost={0: "mask"})
    cohort.run()
    assert not cohort.server._total.size
    assert all(member.shares is None and not member.ciphertexts for member in cohort.server._members)
    assert json.loads(cohort.server.to_bytes()[8:])["phase"] == "done"


def test_the_server_keeps_no_ciphertext_longer_than_it_takes_to_deliver_it():
    cohort = Cohort(offer())
    cohort.until("mask")
    assert all(not member.ciphertexts for member in cohort.server._members)


def test_what_is_sealed_is_bound_to_its_session():
    key = bytes(range(32))
    assert open_sealed(key, seal(key, b"state", SESSION), OTHER) is None
