"""Which SYN of ours is it that the network could not deliver?

Asked about packets that the kernel refused to send, and about the beginnings of packets that ICMP errors
quote (RFC 792: at least 8 bytes behind the IP header, RFC 1812: as much as fits). Anybody can send an ICMP
error, so a quotation has to know the flowID, and the nonce if it is long enough to tell (compare RFC 5927).
"""

from __future__ import annotations

from errno import errorcode
from typing import NamedTuple

from serval_core.wire.sal import PROTOCOL_SAL

_VERSION_AND_LENGTH = 0x45  # we send no IP options
_FLOW_ID = slice(20, 24)
_CONTROL_TYPE_AT, _CONTROL_TYPE = 32, 1
_NONCE = slice(44, 52)


class Undelivered(NamedTuple):
    """A packet that did not arrive. `nonce` None: not quoted."""

    flow_id: int
    nonce: bytes | None
    destination: int


def undelivered(packet: bytes) -> Undelivered | None:
    """What the beginning of an IPv4 packet says; None if it cannot be a SYN of ours."""
    if len(packet) < _FLOW_ID.stop or packet[0] != _VERSION_AND_LENGTH or packet[9] != PROTOCOL_SAL:
        return None
    nonce = None
    if len(packet) >= _NONCE.stop:
        if packet[_CONTROL_TYPE_AT] >> 4 != _CONTROL_TYPE:
            return None
        nonce = packet[_NONCE]
    return Undelivered(
        int.from_bytes(packet[_FLOW_ID], "big"), nonce, int.from_bytes(packet[16:20], "big")
    )


def error_name(errno: int) -> str:
    """EHOSTUNREACH and so on."""
    return errorcode.get(errno, f"error {errno}")
