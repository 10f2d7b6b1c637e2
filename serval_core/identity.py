"""Who says so? Ed25519 keys (RFC 8032), their files, and serviceIDs that certify themselves.

A self-certifying serviceID has a provider prefix of 4 bytes, 8 bytes that are the provider's business, and
the first 20 bytes of the SHA-256 hash of a public key (SPEC 1.2: 4 + 4 + 4 + 20). Whoever holds the private
key can prove to be entitled to the name, and no registry has to be asked. Behind `serval keygen` and
`serval id`.
"""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from serval_core.errors import OurMistake
from serval_core.names import SERVICE_ID_BITS, ServiceID, ServicePrefix

PUBLIC_KEY_BYTES = 32
CERTIFYING_BYTES = 20
PROVIDER_BITS = SERVICE_ID_BITS - 8 * CERTIFYING_BYTES
_READABLE_BY_OTHERS = stat.S_IRWXG | stat.S_IRWXO


class Identity:
    """A private key. Made by `create_identity` or `load_identity`."""

    __slots__ = ("_key", "public_key")

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public_key = key.public_key().public_bytes_raw()

    def __eq__(self, other: object) -> bool:
        """Whether it is the same key."""
        return isinstance(other, Identity) and self.public_key == other.public_key

    def __hash__(self) -> int:
        return hash(self.public_key)

    def sign(self, data: bytes) -> bytes:
        """The 64 bytes that prove that the owner of this key has said `data`."""
        return self._key.sign(data)

    def service_id(self, provider: ServicePrefix) -> ServiceID:
        """The self-certifying serviceID of this key that begins with `provider`."""
        return self_certifying_id(provider, self.public_key)


def create_identity(path: Path) -> Identity:
    """Make a key and store it in a new file that only its owner can read.

    OurMistake when the file exists or cannot be written.
    """
    key = Ed25519PrivateKey.generate()
    text = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    try:
        # Linked into place when complete: a crash leaves no half a key, and no other key is overwritten.
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.link(draft, path)
        finally:
            draft.unlink()
    except FileExistsError:
        raise OurMistake(f"{path} exists and is not overwritten: remove it or choose another file") from None
    except OSError as error:
        raise OurMistake(f"{path} cannot be written: {error.strerror}") from None
    return Identity(key)


def load_identity(path: Path) -> Identity:
    """Read a key file. OurMistake when that fails, or when anyone but its owner could read it."""
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            text = file.read(1 << 16)
    except OSError as error:
        raise OurMistake(f"the key file {path} cannot be read: {error.strerror}") from None
    if mode & _READABLE_BY_OTHERS:
        raise OurMistake(
            f"the key file {path} has mode {stat.S_IMODE(mode):04o}, which lets others at it: chmod 600 {path}"
        )
    try:
        key = serialization.load_pem_private_key(text, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise OurMistake(f"{path} is no key file of ours: make one with `serval keygen {path}`") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise OurMistake(f"{path} holds another kind of key than Ed25519: make one with `serval keygen`")
    return Identity(key)


def parse_public_key(text: str) -> bytes:
    """Read a public key as `serval keygen` prints it: 64 hex digits. Raises OurMistake."""
    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if len(key) != PUBLIC_KEY_BYTES or len(text) != 2 * PUBLIC_KEY_BYTES:
        raise OurMistake(f'"{text}" is no public key: write the 64 hex digits that `serval keygen` printed')
    return key


def verify(public_key: bytes, signature: bytes, data: bytes) -> bool:
    """Whether the owner of `public_key` (32 bytes) has signed `data`."""
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, data)
    except (InvalidSignature, ValueError):
        return False
    return True


def self_certifying_id(provider: ServicePrefix, public_key: bytes) -> ServiceID:
    """The serviceID of a key within a provider's prefix of at most 96 bits. Raises OurMistake."""
    if provider.bits > PROVIDER_BITS and any(provider.service_id[PROVIDER_BITS // 8 :]):
        raise OurMistake(
            f"{provider} says something about the last {CERTIFYING_BYTES} bytes, which are the key's: give a "
            f"prefix of at most {PROVIDER_BITS} bits"
        )
    return ServiceID(provider.service_id[: PROVIDER_BITS // 8] + _fingerprint(public_key))


def certifies(public_key: bytes, service_id: ServiceID) -> bool:
    """Whether `service_id` belongs to this key."""
    return service_id[PROVIDER_BITS // 8 :] == _fingerprint(public_key)


def _fingerprint(public_key: bytes) -> bytes:
    return hashlib.sha256(public_key).digest()[:CERTIFYING_BYTES]
