"""What do our hosts add to a registration, and how is it written?

The prototype's message says who registers what, in 48 bytes. Ours may go on behind it: an `Offer` (how much of
the service's load this instance takes, and for how long) and a `Proof` (an Ed25519 signature, and what keeps it
from being used elsewhere or again). The length field still says 48, and a prototype, which trusts that field
(SPEC 7.1), reads the message as a plain one. All integers are big endian:

    0  "SvRo"          4  version, 1        5  parts: 1 = with proof      6  bytes of all this (2)
    8  priority (4)   12  weight (4)       16  lifetime in seconds (4)
    20 IPv4 address of the host (4)        24  its clock, µs since 1970 (8)          32  counter (4)
    36 public key (32)                     68  signature (64)

The signature covers a text that says what it is for, the 48 bytes, and everything of this up to itself.
"""

from __future__ import annotations

from struct import Struct
from typing import NamedTuple

from serval_core.errors import TheirMistake

UNKNOWN_EXTENSION = "offer_unknown"
EXTENSION_LENGTH = "offer_length"
REASONS = frozenset({UNKNOWN_EXTENSION, EXTENSION_LENGTH})
"""Every reason that the parser gives with TheirMistake."""

REGISTRATION_BYTES = 48
SIGNATURE_BYTES = 64

_MAGIC = b"SvRo"
_VERSION = 1
_PLAIN, _SIGNED = 0, 1
_OFFER = Struct("!4sBBHIII")
_PROOF = Struct("!IQI32s64s")
_PURPOSE = b"serval registration, version 1\0"


class Offer(NamedTuple):
    """Which part of the service's load this instance takes. Larger `priority` wins, `weight` is its share."""

    priority: int
    weight: int
    lifetime_s: int


class Proof(NamedTuple):
    """Who says so, from where and when. `timestamp_us` and `counter` grow from one message to the next."""

    address: int
    timestamp_us: int
    counter: int
    public_key: bytes
    signature: bytes

    @property
    def sequence(self) -> tuple[int, int]:
        """What grows."""
        return self.timestamp_us, self.counter


class Extension(NamedTuple):
    """What stands behind the 48 bytes; both None for a message of the prototype."""

    offer: Offer | None = None
    proof: Proof | None = None


def parse_extension(payload: bytes) -> Extension:
    """Read what stands behind the 48 bytes of a registration. Raises TheirMistake."""
    data = payload[REGISTRATION_BYTES:]
    if not data:
        return Extension()
    if len(data) < _OFFER.size:
        raise TheirMistake(EXTENSION_LENGTH)
    magic, version, parts, length, priority, weight, lifetime_s = _OFFER.unpack_from(data)
    if magic != _MAGIC or version != _VERSION or parts not in (_PLAIN, _SIGNED):
        raise TheirMistake(UNKNOWN_EXTENSION)
    if length != len(data) or length != _OFFER.size + (_PROOF.size if parts == _SIGNED else 0):
        raise TheirMistake(EXTENSION_LENGTH)
    offer = Offer(priority, weight, lifetime_s)
    return Extension(offer, Proof._make(_PROOF.unpack_from(data, _OFFER.size)) if parts == _SIGNED else None)


def emit_extension(offer: Offer, proof: Proof | None = None) -> bytes:
    """Write what stands behind the 48 bytes."""
    parts, length = (_PLAIN, _OFFER.size) if proof is None else (_SIGNED, _OFFER.size + _PROOF.size)
    written = _OFFER.pack(_MAGIC, _VERSION, parts, length, *offer)
    return written if proof is None else written + _PROOF.pack(*proof)


def signed_part(payload: bytes) -> bytes:
    """What the signature at the end of a signed registration is about."""
    return _PURPOSE + payload[:-SIGNATURE_BYTES]
