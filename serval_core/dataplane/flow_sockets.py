"""What becomes of a flow's kernel socket, and what can it be told? Without its descriptor, which another process may have.

It is looked at by a BPF program, and spoken to through the device that everything for it comes through: as its TCP peer,
or a router on its way, would.
"""

from __future__ import annotations

import socket
import struct
import sys
from typing import NamedTuple

from serval_core.dataplane import after_move, tcp_repair
from serval_core.dataplane.bpf_loader import BpfObject
from serval_core.dataplane.devices import ANCHOR_MAC, ANCHOR_OUTER, OUTER_MAC
from serval_core.dataplane.layouts import FLOW_KEY
from serval_core.names import FlowID
from serval_core.wire import ipv4, sal, tcp_segment

_SOCKET_STATE = struct.Struct("=IIIIIII")
LOOK_PACKET = bytes(64)  # serval_look answers in it
_LOOK_FOUND = 0  # TC_ACT_OK
_OLD_SEQUENCE_BYTES = 1 << 30  # before any window that a socket can have: such a segment is answered by an ACK
_UNCHANGED_WINDOW = 0xFFFF  # of a segment that is handed to a socket: it must not make the socket stop sending
_ETHERNET_IPV4 = bytes.fromhex((ANCHOR_MAC + OUTER_MAC).replace(":", "")) + b"\x08\x00"


class SocketState(NamedTuple):
    """What has become of a flow's kernel socket. `state` as in linux/tcp_states.h; in TIME_WAIT the numbers are zero."""

    state: int
    receive_next: int
    send_unacknowledged: int
    timeouts: int  # of the first unacknowledged segment
    mss_bytes: int  # of what it sends, TCP options not counted
    send_next: int
    round_trip_us: int  # smoothed; 0: not known


class FlowSockets:
    """The kernel sockets of one stack's flows. Owns a packet socket."""

    def __init__(self, programs: BpfObject, address: int, port: int, network: int) -> None:
        """`address`, `port`: ours in all virtual tuples; `network`: the /16 of the remote addresses."""
        self._programs = programs
        self._address = address
        self._port = port
        self._network = network
        self._inject = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        self._inject.bind((ANCHOR_OUTER, 0))

    def close(self) -> None:
        """The sockets stay what they are."""
        self._inject.close()

    def look(self, flow_id: FlowID) -> SocketState | None:
        """The kernel socket of a flow; None when it is gone."""
        mark = int.from_bytes(FLOW_KEY.pack(flow_id), sys.byteorder)
        verdict, answer, _ = self._programs.test_run("serval_look", LOOK_PACKET, mark)
        return SocketState(*_SOCKET_STATE.unpack_from(answer)) if verdict == _LOOK_FOUND else None

    def reset(self, flow_id: FlowID, fd: int, received_from: int) -> None:
        """Let whoever uses the socket see a reset, by handing it the RST that a TCP peer would have sent (RFC 9293, 3.10.7).

        `received_from`: the sequence number that it expected first. The socket ignores it when a segment that was still on its way
        inside the kernel moves what it expects meanwhile.
        """
        self._hand(flow_id, tcp_segment.RST, received_from + tcp_repair.received(fd) & 0xFFFFFFFF, 0)

    def reset_unattended(self, flow_id: FlowID, seen: SocketState) -> None:
        """`reset` for a socket whose descriptor another process has."""
        self._hand(flow_id, tcp_segment.RST, seen.receive_next, 0)

    def finish_unattended(self, flow_id: FlowID, seen: SocketState) -> None:
        """Let whoever reads from the socket see the end of the stream, by handing it the FIN that its peer did not send."""
        self._hand(flow_id, tcp_segment.FIN | tcp_segment.ACK, seen.receive_next, seen.send_unacknowledged)

    def have_it_acknowledge(self, flow_id: FlowID, seen: SocketState) -> None:
        """Make the socket say once more what it has received, by a segment that it has had long ago."""
        old_sequence = seen.receive_next - _OLD_SEQUENCE_BYTES & 0xFFFFFFFF
        self._hand(flow_id, tcp_segment.ACK, old_sequence, seen.send_unacknowledged)

    def take_back_timeouts(self, flow_id: FlowID, seen: SocketState) -> None:
        """The path was to blame: the doublings of the socket's retransmission timeout are undone (RFC 6069)."""
        for _ in range(min(seen.timeouts, after_move.DOUBLINGS_MAX)):
            self._hand_packet(after_move.unreachable(self._ends(flow_id), seen.send_unacknowledged))

    def too_big(self, flow_id: FlowID, seen: SocketState, mtu_bytes: int) -> None:
        """What the socket has sent was too large for a path of this MTU, SAL header included."""
        # The kernel ignores errors about what is acknowledged by the time that they come: the newest has the best chance.
        self._hand_packet(after_move.too_big(self._ends(flow_id), seen.send_next, mtu_bytes))

    def inject(self, flow_id: FlowID, segment: bytes, source: int, destination: int) -> bool:
        """Deliver a TCP segment that came up to user space before its socket existed; False if its checksum is wrong."""
        if tcp_segment.checksum_state(segment, source, destination) == "wrong":
            return False
        remote = self._network | flow_id >> 16
        ports = (flow_id & 0xFFFF).to_bytes(2, "big") + self._port.to_bytes(2, "big")
        self._deliver(tcp_segment.complete_checksum(ports + segment[4:], remote, self._address), remote)
        return True

    def _ends(self, flow_id: FlowID) -> after_move.VirtualTuple:
        return after_move.VirtualTuple(self._address, self._port, self._network | flow_id >> 16, flow_id & 0xFFFF)

    def _hand(self, flow_id: FlowID, flags: int, sequence: int, acknowledgement: int) -> None:
        """Deliver a segment without data to the flow's kernel socket, as if its TCP peer had sent it."""
        segment = tcp_segment.TcpSegment(
            flow_id & 0xFFFF,
            self._port,
            sequence,
            acknowledgement,
            flags,
            _UNCHANGED_WINDOW if acknowledgement else 0,
            0,
            tcp_segment.TcpOptions(None, None, False, None, None),
            b"",
        )
        remote = self._network | flow_id >> 16
        self._deliver(tcp_segment.emit(segment, remote, self._address), remote)

    def _deliver(self, segment: bytes, remote: int) -> None:
        self._hand_packet(ipv4.emit(remote, self._address, sal.PROTOCOL_TCP, segment))

    def _hand_packet(self, packet: bytes) -> None:
        """Deliver an IPv4 packet to the virtual address, as if it had come from a network."""
        self._inject.send(_ETHERNET_IPV4 + packet)
