"""What does the service access layer want done? Effects: the SAL returns them in order, the stack carries them out in order.

The SAL itself never touches a socket. `dataplane` effects concern the kernel's sockets and the flow map; the others are news
for the application. Addresses are 32-bit integers in host order, packets are whole IPv4 packets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from serval_core.framing import NativePath
from serval_core.names import FlowID, ServiceID
from serval_core.wire.ipv4 import OuterPorts


class TransportParameters(NamedTuple):
    """The outcome of the piggybacked TCP handshake: all a kernel socket needs to start in ESTABLISHED (DESIGN 2.5).

    Windows are in bytes, already scaled. Window scales are shift counts, -1 when not negotiated. `timestamp` is the
    TSval that our next segment may carry at the earliest, or None when timestamps are off.
    """

    send_next: int
    receive_next: int
    mss_bytes: int
    send_window_scale: int
    receive_window_scale: int
    sack: bool
    timestamp: int | None
    send_window_bytes: int
    receive_window_bytes: int


class Datagram(NamedTuple):
    """A datagram that arrived without a connection. The prototype calls `source_address` the advisory IP."""

    payload: bytes
    source_service: ServiceID
    destination_service: ServiceID
    source_address: int
    interface_index: int


@dataclass(frozen=True, slots=True)
class SendPacket:
    """Put this IPv4 packet on the wire. `interface_index` 0: let routing decide."""

    packet: bytes
    destination: int
    interface_index: int


@dataclass(frozen=True, slots=True)
class ExpectData:
    """A half-open passive flow exists: data for it must be passed up instead of being dropped (DESIGN 2.3)."""

    flow_id: FlowID


@dataclass(frozen=True, slots=True)
class ForgetExpected:
    """The half-open flow is gone without having become a connection."""

    flow_id: FlowID


@dataclass(frozen=True, slots=True)
class OpenTransport:
    """Create the kernel socket and its flow map entry. Comes before any packet or event that relies on it."""

    flow_id: FlowID
    peer_flow_id: FlowID
    local_address: int
    peer_address: int
    interface_index: int
    parameters: TransportParameters
    peer_is_ours: bool
    native: NativePath | None = None
    outer_ports: OuterPorts | None = None  # of the UDP encapsulation, if it is used


@dataclass(frozen=True, slots=True)
class MovePath:
    """An end of the flow is elsewhere: from now on its data goes this way. The socket knows nothing of it.

    Comes after the new path has been proven in both directions, and before the packet that says so to the peer.
    `mtu_bytes` is that of the IP packet.
    """

    flow_id: FlowID
    local_address: int
    peer_address: int
    interface_index: int
    mtu_bytes: int
    outer_ports: OuterPorts | None = None


@dataclass(frozen=True, slots=True)
class ExpectPeer:
    """The peer is about to move to `address`: what comes from there natively is the flow's already."""

    flow_id: FlowID
    address: int


@dataclass(frozen=True, slots=True)
class LimitSegments:
    """The path of a flow carries IP packets of `mtu_bytes`: let its socket send none that are larger.

    Unless it is `lasting`, the kernel tries larger ones again after a while (RFC 1191, 6.3).
    """

    flow_id: FlowID
    mtu_bytes: int
    lasting: bool


@dataclass(frozen=True, slots=True)
class InjectSegment:
    """A TCP segment that arrived before its socket existed; deliver it now. `segment` is the TCP part only.

    `source` and `destination` are the addresses of the packet it came in, for its checksum.
    """

    flow_id: FlowID
    segment: bytes
    source: int
    destination: int


@dataclass(frozen=True, slots=True)
class EndOfStream:
    """The peer closed its direction at the SAL (FIN). Make sure the reader sees EOF after all data in order."""

    flow_id: FlowID


@dataclass(frozen=True, slots=True)
class ResetTransport:
    """The flow is dead: the application must see `errno` (ECONNRESET, ETIMEDOUT, EPIPE); nothing may leak onto the wire."""

    flow_id: FlowID
    errno: int


@dataclass(frozen=True, slots=True)
class CloseTransport:
    """Both directions are finished: take the kernel socket and the map entry down silently."""

    flow_id: FlowID


@dataclass(frozen=True, slots=True)
class Connected:
    """An active open succeeded; the transport is open."""

    flow_id: FlowID


@dataclass(frozen=True, slots=True)
class ConnectFailed:
    """An active open failed; the flow no longer exists. `errno` as in SPEC 3.10, `why` one clause for a log line."""

    flow_id: FlowID
    errno: int
    why: str


@dataclass(frozen=True, slots=True)
class Accepted:
    """A passive open completed on listener `listener_id`; the client asked for exactly `service_id`."""

    listener_id: int
    flow_id: FlowID
    service_id: ServiceID


@dataclass(frozen=True, slots=True)
class FlowEnded:
    """The flow left the table (closed, reset or timed out). Comes once per Connected or Accepted flow. `errno` 0: cleanly."""

    flow_id: FlowID
    errno: int


@dataclass(frozen=True, slots=True)
class DeliverDatagram:
    """An unconnected datagram arrived for endpoint `endpoint_id`."""

    endpoint_id: int
    datagram: Datagram


@dataclass(frozen=True, slots=True)
class OpenDatagrams:
    """A UDP flow is open: let its datagrams through to the SAL, until ForgetExpected. It has no kernel socket.

    Comes before any news of the flow for the application.
    """

    flow_id: FlowID
    local_address: int
    peer_address: int
    interface_index: int


@dataclass(frozen=True, slots=True)
class DeliverFlowDatagram:
    """A datagram arrived in a UDP flow."""

    flow_id: FlowID
    payload: bytes


@dataclass(frozen=True, slots=True)
class DatagramRefused:
    """The host at `address` answered a datagram of endpoint `endpoint_id`: it has no such service. Just news."""

    endpoint_id: int
    address: int


@dataclass(frozen=True, slots=True)
class Happened:
    """News for whoever subscribed to events of this kind (`service_events`)."""

    kind: str
    fields: dict[str, object]


Effect = (
    SendPacket | ExpectData | ForgetExpected | OpenTransport | MovePath | InjectSegment | EndOfStream | ResetTransport
    | CloseTransport | Connected | ConnectFailed | Accepted | FlowEnded | DeliverDatagram | DatagramRefused | Happened
    | OpenDatagrams | DeliverFlowDatagram | LimitSegments | ExpectPeer
)
