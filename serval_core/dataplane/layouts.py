"""What do user space and the BPF programs agree on? The values of the maps, as `bpf/structs.h` and `bpf/consts.h` lay them out."""

from __future__ import annotations

import struct
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

from serval_core.names import FlowID

OBJECT_FILE = Path(__file__).parent / "bpf" / "serval.bpf.o"
DROP_REASONS = (
    "out_not_a_flow",
    "out_headroom",
    "in_wrong_header",
    "in_strip_failed",
    "in_virtual_address",
    "in_truncated",
    "lost_event",
    "out_late_reset",
    "in_unknown_flow",
    "in_native_unknown",
    "in_native_reset",
)
MAX_FLOWS = 65536
FLOW_EXPECTED = 1
FLOW_COMPLETE_CHECKSUM = 2
FLOW_NEIGHBOUR_KNOWN = 4
FLOW_NATIVE = 8
FLOW_TELL_PROOF = 16
FLOW_COMPLETE_THROUGH_NAT = 32
FLOW_CHECKSUMS = FLOW_COMPLETE_CHECKSUM | FLOW_COMPLETE_THROUGH_NAT

CONFIGURATION = struct.Struct("!IIHxx4s4s4s4s")
FLOW = struct.Struct("!III4s4s4s12s12s6s6sHHHHIII")
FLOW_ADDRESSES = struct.Struct("!III4s")  # what a flow's entry begins with: local, peer, next hop, interface
FLOW_FLAGS = slice(20, 24)
FLOW_MACS = slice(48, 60)
FLOW_OUTER_PORTS = slice(64, 68)
OUTER_PORTS = struct.Struct("!HH")
FLOW_PATH_NUMBER = slice(68, 72)
FLOW_LOCAL, FLOW_PEER = slice(0, 4), slice(4, 8)
FLOW_OTHER_LOCAL, FLOW_OTHER_PEER = slice(72, 76), slice(76, 80)
EVENT = struct.Struct("!I4sIH2x")
FLOW_KEY = struct.Struct("!I")
NATIVE_DOUBTS = NATIVE_FOLLOW = 2  # as in bpf/native.h
_FLOW_STATE = struct.Struct("=QQIBBBBIIIIIIIIIBB2xQQBBBB4s2s2xI32x")


class FlowEvent(IntEnum):
    """What a BPF program can notice about a flow."""

    FIN_ACKNOWLEDGED = 1
    RESET_SENT = 2
    NATIVE_DOUBTED = 3
    NATIVE_PROVED = 4
    PEER_SEEN = 5


class Noticed(NamedTuple):
    """An event. Address and port are those of PEER_SEEN."""

    flow_id: FlowID
    event: FlowEvent
    address: int
    port: int


class FlowState(NamedTuple):
    """What the programs have noted about a flow: `struct flow_state`, in its order."""

    packets_out: int
    bytes_out: int
    fin_end: int
    fin_sent: int
    reset_sent: int
    native_doubts: int
    native_repeats: int
    sent_end: int
    sal_sent_end: int
    native_repeated: int
    path_number: int
    native_began: int
    sent_before: int
    probe_began: int = 0
    probe_end: int = 0
    native_retry_s: int = 0
    native_probing: int = 0
    native_retries: int = 0
    packets_in: int = 0
    bytes_in: int = 0
    fin_acknowledged: int = 0
    fin_received: int = 0
    native_proved: int = 0
    peer_in_sal: int = 0
    seen_address: bytes = bytes(4)
    seen_port: bytes = bytes(2)
    untranslated: int = 0

    @classmethod
    def parse(cls, value: bytes) -> FlowState:
        """From a value of `flow_states`."""
        return cls(*_FLOW_STATE.unpack(value))

    def emit(self) -> bytes:
        """A value of `flow_states`."""
        return _FLOW_STATE.pack(*self)


def fresh_state(send_next: int, native_doubts: int = 0) -> bytes:
    """What the programs have noted about a flow that has sent nothing since its handshake.

    With NATIVE_DOUBTS it begins in framing sal.
    """
    return FlowState(
        packets_out=0,
        bytes_out=0,
        fin_end=0,
        fin_sent=0,
        reset_sent=0,
        native_doubts=native_doubts,
        native_repeats=0,
        sent_end=send_next,
        sal_sent_end=send_next,
        native_repeated=0,
        path_number=0,
        native_began=send_next,
        sent_before=send_next,
    ).emit()
