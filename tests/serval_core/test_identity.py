"""Are keys kept from others, and do self-certifying serviceIDs certify?"""

from __future__ import annotations

import hashlib
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from serval_core.errors import OurMistake
from serval_core.identity import (
    Identity,
    certifies,
    create_identity,
    load_identity,
    parse_public_key,
    self_certifying_id,
    verify,
)
from serval_core.names import ServiceID, ServicePrefix, parse_service

# RFC 8032 7.1, test 1: an empty message.
RFC_SECRET = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
RFC_PUBLIC = bytes.fromhex("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a")
RFC_SIGNATURE = bytes.fromhex(
    "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46b"
    "d25bf5f0595bbe24655141438e7a100b"
)


def test_signatures_are_those_of_rfc_8032() -> None:
    identity = Identity(Ed25519PrivateKey.from_private_bytes(RFC_SECRET))
    assert identity.public_key == RFC_PUBLIC
    assert identity.sign(b"") == RFC_SIGNATURE
    assert verify(RFC_PUBLIC, RFC_SIGNATURE, b"")
    assert not verify(RFC_PUBLIC, RFC_SIGNATURE, b"x")
    assert not verify(bytes(32), RFC_SIGNATURE, b"")
    assert not verify(b"short", RFC_SIGNATURE, b"")


def test_a_key_file_is_for_its_owner_only_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "service.key"
    identity = create_identity(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_identity(path).public_key == identity.public_key
    assert [each.name for each in tmp_path.iterdir()] == ["service.key"]
    with pytest.raises(OurMistake, match="not overwritten"):
        create_identity(path)
    assert load_identity(path).public_key == identity.public_key
    assert [each.name for each in tmp_path.iterdir()] == ["service.key"]
    path.chmod(0o640)
    with pytest.raises(OurMistake, match=r"mode 0640.*chmod 600"):
        load_identity(path)


def test_what_is_no_key_of_ours_is_refused_in_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(OurMistake, match="cannot be read"):
        load_identity(path)
    path.write_text("hello")
    path.chmod(0o600)
    with pytest.raises(OurMistake, match="no key file"):
        load_identity(path)
    other_kind = X25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(other_kind)
    with pytest.raises(OurMistake, match="another kind"):
        load_identity(path)
    with pytest.raises(OurMistake, match="cannot be written"):
        create_identity(tmp_path / "missing" / "file")


def test_public_keys_are_64_hex_digits() -> None:
    assert parse_public_key(RFC_PUBLIC.hex()) == RFC_PUBLIC
    for text in ("", "xyz", RFC_PUBLIC.hex()[:-2], RFC_PUBLIC.hex() + "00", " " + RFC_PUBLIC.hex()):
        with pytest.raises(OurMistake, match="64 hex digits"):
            parse_public_key(text)


def test_the_last_twenty_bytes_are_the_keys_and_the_first_twelve_the_providers() -> None:
    service_id = self_certifying_id(parse_service("0xabcd:16"), RFC_PUBLIC)
    assert service_id[:12] == b"\xab\xcd" + bytes(10)
    assert service_id[12:] == hashlib.sha256(RFC_PUBLIC).digest()[:20]
    assert certifies(RFC_PUBLIC, service_id)
    assert certifies(RFC_PUBLIC, self_certifying_id(parse_service("76568"), RFC_PUBLIC))
    assert not certifies(RFC_SECRET, service_id)
    for at in range(12, 32):
        assert not certifies(
            RFC_PUBLIC, ServiceID(service_id[:at] + bytes([service_id[at] ^ 1]) + service_id[at + 1 :])
        )
    with pytest.raises(OurMistake, match="at most 96 bits"):
        self_certifying_id(ServicePrefix.of(ServiceID(b"\1" * 32)), RFC_PUBLIC)
