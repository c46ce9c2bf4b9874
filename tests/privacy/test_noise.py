"""Keystreams: AES-256-CTR as published; the system's never repeat, a seed's always do, and neither passes for the other
(their sources are of different types).
"""

from __future__ import annotations

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given
from hypothesis import strategies as st

from fedlearn.privacy.noise import Keystream, SecureNoise, SimulatedNoise
from fedlearn.sources import SecureRandom, SeedTree

KEY = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
PATHS = st.lists(st.one_of(st.integers(0, 99), st.text(max_size=4)), max_size=3)


def encrypted_counters(key: bytes, start: int, blocks: int) -> bytes:
    """Counter mode, written out: every block is the encrypted counter."""
    encryptor = Cipher(algorithms.AES256(key), modes.ECB()).encryptor()  # noqa: S305
    return b"".join(encryptor.update((start + block).to_bytes(16, "big")) for block in range(blocks))


def test_counter_mode_written_out_gives_the_published_blocks():
    """NIST SP 800-38A, F.5.5, CTR-AES256.Encrypt: the output blocks 1 and 2."""
    start = int.from_bytes(bytes.fromhex("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff"), "big")
    published = "0bdf7df1591716335e9a8b15c860c502" + "5a6e699d536119065433863c8f657b94"
    assert encrypted_counters(KEY, start, 2).hex() == published


@given(st.binary(min_size=32, max_size=32), st.lists(st.integers(0, 9), max_size=4))
def test_a_keystream_is_counter_mode_from_zero_however_it_is_asked_for(key, counts):
    stream = Keystream(key)
    words = np.concatenate([np.zeros(0, dtype=np.uint64), *(stream.words(count) for count in counts)])
    assert words.astype("<u8").tobytes() == encrypted_counters(key, 0, 18)[: 8 * sum(counts)]


def test_the_keystream_of_the_zero_key_begins_with_the_published_block():
    """The GCM specification (McGrew and Viega), test case 13: H is the encrypted zero block."""
    assert Keystream(bytes(32)).words(2).astype("<u8").tobytes().hex() == "dc95c078a2408989ad48a21492842087"


@pytest.mark.parametrize("length", [0, 16, 24, 31, 33])
def test_a_key_of_another_length_is_refused(length):
    with pytest.raises(ValueError, match="key size"):
        Keystream(bytes(length))


def test_secure_streams_differ_even_at_the_same_path():
    noise = SecureNoise(SecureRandom())
    streams = [noise.stream("round", 1), noise.stream("round", 1), noise.child("x").stream("round", 1)]
    assert len({int(stream.words(1)[0]) for stream in streams}) == 3
    assert not noise.simulated
    assert not noise.child("x").simulated


@given(st.integers(0, 2**40), PATHS)
def test_simulated_streams_repeat_at_the_same_path(seed, path):
    one, two = (SimulatedNoise(SeedTree.root(seed)) for _ in range(2))
    one.stream("other").words(5)
    assert one.stream(*path).words(3).tolist() == two.stream(*path).words(3).tolist()
    assert one.child(*path).stream("a").words(3).tolist() == two.child(*path).stream("a").words(3).tolist()
    assert one.simulated
    assert one.child(*path).simulated


@given(PATHS, PATHS)
def test_different_paths_never_share_a_simulated_stream(one, other):
    noise = SimulatedNoise(SeedTree.root(0))
    same = [(type(part), part) for part in one] == [(type(part), part) for part in other]
    assert (noise.stream(*one).words(2).tolist() == noise.stream(*other).words(2).tolist()) == same
    assert noise.child(*one).stream(*other).words(2).tolist() != noise.stream(*other).words(2).tolist()


def test_neither_kind_gives_a_stream_from_the_others_source():
    with pytest.raises(AttributeError):
        SecureNoise(SeedTree.root(0)).stream("round", 1)
    with pytest.raises(AttributeError):
        SimulatedNoise(SecureRandom()).stream("round", 1)
    with pytest.raises(AttributeError):
        SimulatedNoise(SecureRandom()).child("round", 1)
