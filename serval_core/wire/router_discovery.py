"""How do hosts of ours ask for a service router on their network, and how does one answer?

Payloads of Serval datagrams: a host broadcasts a solicitation to the discovery service, and every router that
hears it sends an announcement to the service the solicitation came from. Where the datagram comes from is the
router's address. The prototype has nothing like it and does not serve the discovery service. All integers are
big endian:

    0  "SvRd"    4  version, 1    5  kind: 1 solicitation, 2 announcement, 3 signed announcement
    6  bytes of all this (2)      8  nonce, chosen by the host, repeated by the router (8)
    16 lifetime in seconds (4)   20  IPv4 address of the router (4)         (announcements)
    24 public key (32)           56  signature (64)                         (signed ones)
"""

from __future__ import annotations

from struct import Struct
from typing import NamedTuple

from serval_core.errors import TheirMistake
from serval_core.names import ServiceID

DISCOVERY_SERVICE = ServiceID.from_number(88889)

UNKNOWN_MESSAGE = "discovery_unknown"
MESSAGE_LENGTH = "discovery_length"
REASONS = frozenset({UNKNOWN_MESSAGE, MESSAGE_LENGTH})
"""Every reason that the parsers give with TheirMistake."""

NONCE_BYTES = 8
SIGNATURE_BYTES = 64

_MAGIC = b"SvRd"
_VERSION = 1
_SOLICITATION, _PLAIN, _SIGNED = 1, 2, 3
_HEAD = Struct("!4sBBH8s")
_ANNOUNCEMENT = Struct("!II")
_PROOF = Struct("!32s64s")
_LENGTHS = {
    _SOLICITATION: _HEAD.size,
    _PLAIN: _HEAD.size + _ANNOUNCEMENT.size,
    _SIGNED: _HEAD.size + _ANNOUNCEMENT.size + _PROOF.size,
}
_PURPOSE = b"serval router announcement, version 1\0"


class Announcement(NamedTuple):
    """A router says that it is one, for `lifetime_s` seconds. Without a key both last fields are empty."""

    nonce: bytes
    lifetime_s: int
    address: int
    public_key: bytes = b""
    signature: bytes = b""


def parse_solicitation(data: bytes) -> bytes:
    """The nonce of a solicitation. Raises TheirMistake."""
    kind, nonce = _head(data)
    if kind != _SOLICITATION:
        raise TheirMistake(UNKNOWN_MESSAGE)
    return nonce


def emit_solicitation(nonce: bytes) -> bytes:
    """Write a solicitation."""
    return _HEAD.pack(_MAGIC, _VERSION, _SOLICITATION, _HEAD.size, nonce)


def parse_announcement(data: bytes) -> Announcement:
    """Read an announcement. Raises TheirMistake."""
    kind, nonce = _head(data)
    if kind == _SOLICITATION:
        raise TheirMistake(UNKNOWN_MESSAGE)
    lifetime_s, address = _ANNOUNCEMENT.unpack_from(data, _HEAD.size)
    if kind == _PLAIN:
        return Announcement(nonce, lifetime_s, address)
    key, signature = _PROOF.unpack_from(data, _HEAD.size + _ANNOUNCEMENT.size)
    return Announcement(nonce, lifetime_s, address, key, signature)


def emit_announcement(message: Announcement) -> bytes:
    """Write an announcement, a signed one if it has a key."""
    kind = _SIGNED if message.public_key else _PLAIN
    written = _HEAD.pack(_MAGIC, _VERSION, kind, _LENGTHS[kind], message.nonce)
    written += _ANNOUNCEMENT.pack(message.lifetime_s, message.address)
    return written + (_PROOF.pack(message.public_key, message.signature) if message.public_key else b"")


def signed_part(payload: bytes) -> bytes:
    """What the signature at the end of a signed announcement is about."""
    return _PURPOSE + payload[:-SIGNATURE_BYTES]


def _head(data: bytes) -> tuple[int, bytes]:
    if len(data) < _HEAD.size:
        raise TheirMistake(MESSAGE_LENGTH)
    magic, version, kind, length, nonce = _HEAD.unpack_from(data)
    if magic != _MAGIC or version != _VERSION or kind not in _LENGTHS:
        raise TheirMistake(UNKNOWN_MESSAGE)
    if length != len(data) or length != _LENGTHS[kind]:
        raise TheirMistake(MESSAGE_LENGTH)
    return kind, nonce
