"""Published vectors through our own wrappers, and our own composite ones: whatever changes on the wire shows here."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import pytest
from cohort import offer
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from fedlearn.privacy.clipping import Update, clip
from fedlearn.privacy.noise import Keystream
from fedlearn.secagg import prg
from fedlearn.secagg.derivation import (
    associated_data,
    pair_mask_key,
    roster_hash,
    seed_commitment,
    self_mask_key,
    share_key,
    sharers_hash,
)
from fedlearn.secagg.encoding import plain_encoding
from fedlearn.secagg.keys import AgreementKey, SigningKey, derive, open_sealed, seal, tagged_hash, verify
from fedlearn.secagg.messages import Advertisement, Consistent, MaskedInput, Offer, ShareHeader, Survivors, Unmask
from fedlearn.secagg.prg import add_masks
from fedlearn.secagg.ring import pack, unpack
from fedlearn.secagg.rotation import rotate
from fedlearn.secagg.shamir import share_to_bytes, split
from fedlearn.secagg.wire import bitmap
from fedlearn.sources import SecureRandom

# -- published -----------------------------------------------------------------------------------------------------

ALICE = bytes.fromhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
BOB = bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
ALICE_PUBLIC = bytes.fromhex("8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a")
BOB_PUBLIC = bytes.fromhex("de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f")


def test_x25519_of_rfc_7748_section_6_1():
    assert AgreementKey(ALICE).public == ALICE_PUBLIC
    assert AgreementKey(BOB).public == BOB_PUBLIC
    shared = bytes.fromhex("4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742")
    assert AgreementKey(ALICE).agree(BOB_PUBLIC) == AgreementKey(BOB).agree(ALICE_PUBLIC) == shared


@pytest.mark.parametrize(
    "point",
    [
        bytes(32),
        b"\x01" + bytes(31),
        bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
        bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"),
        bytes.fromhex("ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"),
    ],
)
def test_no_secret_is_agreed_on_with_a_point_of_small_order(point):
    assert AgreementKey(ALICE).agree(point) is None


def test_hkdf_of_rfc_5869_appendix_a_1():
    found = derive(b"\x0b" * 22, salt=bytes(range(13)), info=bytes(range(0xF0, 0xFA)), length=42)
    assert found.hex() == ("3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865")


@pytest.mark.parametrize(
    ("private", "public", "message", "signature"),
    [
        (
            "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
            "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
            "",
            "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e06522490155"
            "5fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b",
        ),
        (
            "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
            "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
            "72",
            "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
            "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00",
        ),
        (
            "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
            "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
            "af82",
            "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac"
            "18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a",
        ),
    ],
)
def test_ed25519_of_rfc_8032_section_7_1(private, public, message, signature):
    key, text = SigningKey(bytes.fromhex(private)), bytes.fromhex(message)
    assert key.public.hex() == public
    assert key.sign(text).hex() == signature
    assert verify(key.public, bytes.fromhex(signature), text)
    assert not verify(key.public, bytes.fromhex(signature), text + b"!")


def test_a_signature_is_never_malleable_and_verify_never_raises():
    key = SigningKey(bytes(range(32)))
    signature = key.sign(b"text")
    order = 2**252 + 27742317777372353535851937790883648493
    larger = (int.from_bytes(signature[32:], "little") + order).to_bytes(32, "little")
    assert not verify(key.public, signature[:32] + larger, b"text")
    for public in (b"", bytes(31), b"\xff" * 32):
        assert not verify(public, signature, b"text")
    assert not verify(key.public, b"", b"text")


F_5_5_KEY = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
F_5_5_COUNTER = int("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff", 16)
F_5_5_PLAIN = bytes.fromhex(
    "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51"
    "30c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710"
)
F_5_5_CIPHER = bytes.fromhex(
    "601ec313775789a5b7a7f504bbf3d228f443e3ca4d62b59aca84e990cacaf5c5"
    "2b0930daa23de94ce87017ba2d84988ddfc9c58db67aada613c2dd08457941a6"
)


def test_aes_256_ctr_of_sp_800_38a_f_5_5():
    """The counter is a stream's position: F.5.5 begins at word 2·counter of it."""
    room = bytearray(len(F_5_5_PLAIN) + 15)
    prg._keystream(F_5_5_KEY, 2 * F_5_5_COUNTER, 1).update_into(F_5_5_PLAIN, memoryview(room))
    assert bytes(room[: len(F_5_5_PLAIN)]) == F_5_5_CIPHER


def mask(key: bytes, words: int, suite: int) -> np.ndarray:
    """A key's keystream as ``add_masks`` adds it."""
    vector = np.zeros(words, dtype=np.uint64)
    add_masks(vector, plus=[key], suite=suite)
    return vector


def test_aes_masks_begin_at_counter_0_as_in_the_gcm_specification():
    """AES-256 under the zero key of the counters 0, 1 and 2: H, the tag of test case 13 and the text of case 14."""
    blocks = "dc95c078a2408989ad48a21492842087530f8afbc74536b9a963b4f1c4cb738bcea7403d4d606b6e074ec5d3baf39d18"
    assert mask(bytes(32), 6, 1).astype("<u8").tobytes().hex() == blocks


def test_aes_masks_are_the_block_cipher_of_a_big_endian_counter():
    words = 2 * 5000
    counters = b"".join(block.to_bytes(16, "big") for block in range(words // 2))
    block_cipher = Cipher(algorithms.AES256(F_5_5_KEY), modes.ECB()).encryptor()  # noqa: S305
    assert mask(F_5_5_KEY, words, 1).astype("<u8").tobytes() == block_cipher.update(counters)


CHACHA_ZERO_KEY = [  # RFC 8439, appendix A.1, test vectors 1 and 2: the counters 0 and 1
    "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
    "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586",
    "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
    "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f",
]


def test_chacha20_masks_of_rfc_8439_appendix_a_1():
    assert mask(bytes(32), 16, 2).astype("<u8").tobytes().hex() == "".join(CHACHA_ZERO_KEY)
    third = mask(bytes(31) + b"\x01", 16, 2)[8:]
    assert third.astype("<u8").tobytes().hex() == (
        "3aeb5224ecf849929b9d828db1ced4dd832025e8018b8160b82284f3c949aa5a"
        "8eca00bbb4a73bdad192b5c42f73f2fd4e273644c8b36125a64addeb006c13a0"
    )
    fourth = mask(b"\x00\xff" + bytes(30), 24, 2)[16:]
    assert fourth.astype("<u8").tobytes().hex() == (
        "72d54dfbf12ec44b362692df94137f328fea8da73990265ec1bbbea1ae9af0ca"
        "13b25aa26cb4a648cb9b9d1be65b2c0924a66c54d545ec1b7374f4872e99f096"
    )


@pytest.mark.parametrize("suite", sorted(prg.SUITES))
@pytest.mark.parametrize("words", [1, 7, prg._TILE_WORDS + 3, 3 * prg._LEAST_RANGE + 5])
def test_tiles_and_threads_add_the_very_same_masks(suite, words):
    keys = [bytes([number]) * 32 for number in range(1, 4)]
    start = np.arange(words, dtype=np.uint64) << np.uint64(50)
    alone, together = start.copy(), start.copy()
    add_masks(alone, plus=keys[:2], minus=keys[2:], suite=suite)
    add_masks(together, plus=keys[:2], minus=keys[2:], suite=suite, threads=3)
    assert (alone == together).all()
    assert (
        alone == start + mask(keys[0], words, suite) + mask(keys[1], words, suite) - mask(keys[2], words, suite)
    ).all()
    add_masks(alone, plus=keys[2:], minus=keys[:2], suite=suite)
    assert (alone == start).all()


def test_there_is_no_other_suite():
    with pytest.raises(ValueError, match="there is no suite 3"):
        mask(bytes(32), 1, 3)


def test_aes_256_gcm_of_the_specification():
    """Test cases 13 and 14 have our own nonce, 12 zeros; case 16 has associated data."""
    assert seal(bytes(32), b"", b"").hex() == "530f8afbc74536b9a963b4f1c4cb738b"
    sealed = "cea7403d4d606b6e074ec5d3baf39d18d0d1c8a799996bf0265b98b5d48ab919"
    assert seal(bytes(32), bytes(16), b"").hex() == sealed
    key, nonce = bytes.fromhex("feffe9928665731c6d6a8f9467308308") * 2, bytes.fromhex("cafebabefacedbaddecaf888")
    plaintext = bytes.fromhex(
        "d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a72"
        "1c3c0c95956809532fcf0e2449a6b525b16aedf5aa0de657ba637b39"
    )
    associated = bytes.fromhex("feedfacedeadbeeffeedfacedeadbeefabaddad2")
    ciphertext = bytes.fromhex(
        "522dc1f099567d07f47f37a32a84427d643a8cdcbfe5c0c97598a2bd2555d1aa"
        "8cb08e48590dbb3da7b08b1056828838c5f61e6393ba7a0abcc9f662"
        "76fc6ece0f4e1768cddf8853bb2d551b"
    )
    assert seal(key, plaintext, associated, nonce) == ciphertext
    assert open_sealed(key, ciphertext, associated, nonce) == plaintext
    for altered in (ciphertext[:-1], ciphertext[:-1] + b"\x1a", b"", ciphertext[1:]):
        assert open_sealed(key, altered, associated, nonce) is None
    assert open_sealed(key, ciphertext, associated[1:], nonce) is None
    assert open_sealed(bytes(32), ciphertext, associated, nonce) is None


# -- our own, by another way -----------------------------------------------------------------------------------------


def by_hand(tag: str, *parts: bytes) -> bytes:
    """``tagged_hash`` from its description."""
    text = b""
    for part in (b"fedlearn.secagg/1/" + tag.encode(), *parts):
        text += len(part).to_bytes(8, "big") + part
    return hashlib.sha256(text).digest()


RH = bytes(range(100, 132))


def test_hashes_are_sha_256_of_a_tag_and_of_parts_with_their_lengths():
    assert tagged_hash("x", b"", b"abc") == by_hand("x", b"", b"abc")
    assert roster_hash(RH, frozen_roster(2)) == by_hand("roster", RH, b"".join(e.entry for e in frozen_roster(2)))
    assert sharers_hash(RH, 10, [0, 9]) == by_hand("sharers", RH, b"\x01\x02")
    assert seed_commitment(ALICE) == by_hand("seed", ALICE)
    assert associated_data(RH, 1, 2, BOB) == by_hand("share", RH, b"\0\0\0\1", b"\0\0\0\2", BOB)
    assert Consistent.digest(RH, 3, [0, 1], [1]) == by_hand("consistent", RH, b"\x03", b"\x02")
    assert MaskedInput.digest(7, ALICE, BOB) == by_hand("masked-input", b"\0\0\0\7", ALICE, BOB)
    header = ShareHeader(owner=1, commitment=ALICE, ciphertexts_sha256=BOB)
    assert header.digest(RH) == by_hand("shares", RH, b"\0\0\0\1", ALICE, BOB)


def test_keys_of_pairs_are_hkdf_of_the_shared_secret_bound_to_roster_and_pair():
    shared = AgreementKey(ALICE).agree(BOB_PUBLIC)
    assert shared is not None
    low_high = (2).to_bytes(4, "big") + (7).to_bytes(4, "big")
    mask_key = derive(shared, salt=RH, info=b"fedlearn.secagg/1/pair-mask" + low_high)
    assert (
        pair_mask_key(AgreementKey(ALICE), BOB_PUBLIC, RH, 7, 2)
        == pair_mask_key(AgreementKey(BOB), ALICE_PUBLIC, RH, 2, 7)
        == mask_key
    )
    there, back = (
        share_key(AgreementKey(ALICE).agree(BOB_PUBLIC), RH, 2, 7),
        share_key(AgreementKey(ALICE).agree(BOB_PUBLIC), RH, 7, 2),
    )
    assert there == derive(shared, salt=RH, info=b"fedlearn.secagg/1/share-key" + low_high)
    assert len({there, back, mask_key}) == 3
    assert self_mask_key(ALICE, RH, 3) == derive(ALICE, salt=RH, info=b"fedlearn.secagg/1/self-mask\0\0\0\3")
    assert pair_mask_key(AgreementKey(ALICE), bytes(32), RH, 0, 1) is None


# -- our own, frozen -------------------------------------------------------------------------------------------------


class Counted(SecureRandom):
    """Gives out what was written down, so that a sharing can be."""

    def __init__(self) -> None:
        self.given = 0

    def below(self, bound: int) -> int:
        self.given += 1
        return self.given * 0x0123456789ABCDEF0123456789ABCDEF0123456789ABCDEF0123456789ABCDEF % bound


def frozen_offer() -> Offer:
    """An offer in which nothing is drawn."""
    encoded_as = plain_encoding(size=7, bits=21, bound_l2=0.5, clients=5, most_weight=4)
    return offer(session=bytes(range(32)), encoding=encoded_as).signed(SigningKey(bytes(range(32, 64))))


def frozen_roster(count: int = 5) -> Sequence[Advertisement]:
    """Advertisements in which nothing is drawn."""
    entries = []
    for number in range(count):
        private = [hashlib.sha256(f"{name} {number}".encode()).digest() for name in ("encryption", "mask", "nonce")]
        key = SigningKey(hashlib.sha256(f"device {number}".encode()).digest())
        entries.append(
            Advertisement(
                device=key.public,
                offer_hash=frozen_offer().hash,
                encryption_key=AgreementKey(private[0]).public,
                mask_key=AgreementKey(private[1]).public,
                nonce=private[2],
            ).signed(key)
        )
    return sorted(entries, key=lambda entry: entry.device)


def frozen_hash() -> bytes:
    """The hash of that roster."""
    return roster_hash(frozen_offer().hash, frozen_roster())


def frozen_ciphertext() -> bytes:
    """What client 2 sends to client 4."""
    shares = [split(secret, 3, [1, 2, 3, 4, 5], Counted())[4] for secret in (ALICE, BOB)]
    key = share_key(AgreementKey(ALICE).agree(BOB_PUBLIC), frozen_hash(), 2, 4)
    assert key is not None
    text = b"".join(share_to_bytes(share) for share in shares)
    return seal(key, text, associated_data(frozen_hash(), 2, 4, seed_commitment(BOB)))


def frozen_update() -> bytes:
    """A weighted update, rounded and packed."""
    encoded_as = frozen_offer().encoding
    clipped = clip(Update.of([0.1, -0.2, 0.3, -0.05, 0.0, 0.25, -0.5]), 0.5)
    stream = Keystream(bytes(range(32)))
    return encoded_as.encode(clipped, weight=3, rounding=stream, noise=stream).words.astype("<u8").tobytes()


def frozen_masked() -> bytes:
    """Numbers under a mask of each suite."""
    words = np.arange(8, dtype=np.uint64)
    for suite, key in (
        (1, self_mask_key(BOB, frozen_hash(), 2)),
        (2, pair_mask_key(AgreementKey(ALICE), BOB_PUBLIC, RH, 2, 4)),
    ):
        assert key is not None
        add_masks(words, plus=[key], suite=suite)
    return words.astype("<u8").tobytes()


FROZEN = {
    "offer": (
        "464c5341010001000000066469676974730000000100000001000102030405060708090a0b0c0d0e0f10111213141516"
        "1718191a1b1c1d1e1f013fc999999999999a3fb999999999999a00000005000000030000000400000000000000071541"
        "19998ffffffffa3fe0000000000000000000050000000401000000000000000000000000000102030405060708090a0b"
        "0c0d0e0f101112131415161718191a1b1c1d1e1f00000000000000000000000000000000000000000000000000000000"
        "00000000000000006b49d458c2e9a6defa581ced0c3bcedbc0cb7057f39376f76a57ee05002aa6c99e5176c0855d14ee"
        "5ff86c79d928f4ec2033ff2363762af65ca5116c06f8e5b0a537c20e"
    ),
    "offer hash": "417dfed7969a179e9c8c47f03a7891855d62e07efb60d843344093ef5936ce53",
    "advertisement": (
        "464c534101015c1f51d960218b5131f1eb5895492155e750aa403c882662a7a808ec2ba173cb417dfed7969a179e9c8c"
        "47f03a7891855d62e07efb60d843344093ef5936ce53"
    ),
    "roster hash": "b7e08f511cec31cb8bfa72b91a46a666c39c32ed91b44281a7999d85311c619f",
    "pair mask key": "a39f829ac7f9b0b2b5a761c2d3103ef866490c3de3d11c64b74bc055f1e5a40f",
    "self mask key": "f89bb970cf1423702d42beb95380ce5c622d16247d0d2c6c2864ca92082b1323",
    "share ciphertext": (
        "8c4e331090133368524ad79bc651fcf4019b8a0e0fa47f9801bf5b6aca6a0b8e9c42aeed82d99a1dc7f377faf9b23b63"
        "add00faa3e10517bafe994b9236e7b5f72546af6a694eb081faff118e187f54ff2e0"
    ),
    "lanes of 16": "fffffcffff7fffff0200ff7f00000000",
    "lanes of 21": "ffff9fffffffffbf0200e0ffff010000",
    "lanes of 32": "fffffffffeffff7f0200000000000080fdffffffffffffff",
    "encoded update": "165ba04efa4fe2f8d549ffffff0b00004111c1761c040000",
    "rotated": "000000000000f0bf000000000000f83f00000000000004c0000000000000e0bf000000000000e0bf",
    "masked": (
        "dfeb7d13d1ba7ffededd081df23bc032e192d393f5974f4a8aa32c0057a9e68edcaff70d5787052018821c4a93eb12c0"
        "27b0741d4ff4099cd0999a7b69d3db41"
    ),
    "survivors": "464c534101060000000a0902",
    "unmask": (
        "464c53410109000000020000000100000000000000000000000000000000000000000000000000000000000000010200"
        "000007010000000000000000000000000000000000000000000000000000000000000128"
    ),
}


@pytest.mark.parametrize("name", FROZEN)
def test_what_was_frozen(name):
    made = {
        "offer": lambda: frozen_offer().message(),
        "offer hash": lambda: frozen_offer().hash,
        "advertisement": lambda: frozen_roster()[0].message()[:70],
        "roster hash": frozen_hash,
        "pair mask key": lambda: pair_mask_key(AgreementKey(ALICE), BOB_PUBLIC, frozen_hash(), 2, 4),
        "self mask key": lambda: self_mask_key(BOB, frozen_hash(), 2),
        "share ciphertext": frozen_ciphertext,
        "lanes of 16": lambda: pack(np.array([-1, 2, -3, 32767, -32768]), 16).astype("<u8").tobytes(),
        "lanes of 21": lambda: pack(np.array([-1, 2, -3, 1048575, -1048576]), 21).astype("<u8").tobytes(),
        "lanes of 32": lambda: pack(np.array([-1, 2, -3, 2**31 - 1, -(2**31)]), 32).astype("<u8").tobytes(),
        "encoded update": frozen_update,
        "rotated": lambda: rotate(np.arange(5.0) - 2, bytes(range(32))).astype("<f8").tobytes(),
        "masked": frozen_masked,
        "survivors": lambda: Survivors(clients=10, survivors=[0, 3, 9]).message(),
        "unmask": lambda: Unmask(shares={1: share_to_bytes(258), 7: share_to_bytes(2**256 + 296)}).message(),
    }
    assert made[name]().hex() == FROZEN[name]


def test_frozen_messages_are_read_back():
    assert Offer.read(bytes.fromhex(FROZEN["offer"])) == frozen_offer()
    for bits in (16, 21, 32):
        words = np.frombuffer(bytes.fromhex(FROZEN[f"lanes of {bits}"]), dtype="<u8").astype(np.uint64)
        top = 1 << (bits - 1)
        assert unpack(words, 5, bits).tolist() == [-1, 2, -3, top - 1, -top]
    assert Survivors.read(bytes.fromhex(FROZEN["survivors"])).survivors == (0, 3, 9)
    assert bitmap([0, 3, 9], 10).hex() in FROZEN["survivors"]
