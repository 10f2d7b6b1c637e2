"""What do a native program and the stack say to each other? The messages on the native socket.

An AF_UNIX SEQPACKET socket with the abstract name `serval-sockets`, one connection per Serval socket of a program. A message is one
JSON object, or, on a datagram socket, one datagram behind its addresses. A stream connection is handed over as a descriptor of a
kernel TCP socket (SCM_RIGHTS) with the message that tells of it.

What `select` sees of the program's end is what it would see of a BSD socket: it is readable when a connection can be accepted or a
datagram waits. To be not writable while a connect is under way, the program sends a HOLD message, which the stack leaves unread
until it has the outcome.
"""

from __future__ import annotations

import struct
from typing import Literal

import msgspec

from serval_core.names import SERVICE_ID_BITS, ServiceID, ServicePrefix

NATIVE_SOCKET_ADDRESS = "\0serval-sockets"
# More than an AF_UNIX socket with the smallest send buffer may have unread and still be writable.
HOLD = b"\0" * 3000
HOLD_SEND_BUFFER_BYTES = 2304
MESSAGE_LIMIT_BYTES = 1024  # of JSON

# A datagram: marker, IPv4 address of the other end in host order (0: none), interface index, serviceIDs of the other end and of
# ours (all zero: does not matter); the payload follows.
DATAGRAM = struct.Struct("=cII32s32s")
DATAGRAM_MARK = b"D"
JSON_MARK = ord("{")
DATAGRAM_LIMIT_BYTES = 65535 - 20 - 12 - 72 - 8  # IPv4, SAL with two SERVICE extensions, UDP
FLOW_DATAGRAM_LIMIT_BYTES = 65535 - 20 - 12 - 8  # IPv4, SAL, UDP


class Request(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """What a program asks. `service` has 64 hex digits; empty: the stack chooses a random one."""

    request: Literal["bind", "listen", "connect"]
    service: str = ""
    bits: int = SERVICE_ID_BITS
    backlog: int = 0
    destination: int = 0  # IPv4 address in host order that skips resolution; 0: none
    datagrams: bool = False
    hold: bool = False  # a HOLD message follows

    def prefix(self) -> ServicePrefix:
        """ValueError or OurMistake when there is none in it."""
        return ServicePrefix.of(ServiceID(bytes.fromhex(self.service)), self.bits)


class Reply(msgspec.Struct, omit_defaults=True):
    """What the stack answers, and what it says of a connection that comes with this message. Addresses in host order."""

    datagram: bool = False  # no answer: this is what has become of a datagram
    errno: int = 0
    error: str = ""
    service: str = ""
    bits: int = SERVICE_ID_BITS
    local_address: int = 0
    peer_address: int = 0
    flow_id: int = 0


encode = msgspec.json.Encoder().encode
decode_request = msgspec.json.Decoder(Request).decode
decode_reply = msgspec.json.Decoder(Reply).decode
