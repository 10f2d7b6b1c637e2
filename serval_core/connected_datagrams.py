"""How do datagrams travel in a flow? Connected Serval UDP (SPEC 4.6; captures 06 and 11).

The flow is opened and closed like any other; in between there is no kernel socket, so its datagrams come and go
through the SAL. A datagram is a base header and a UDP header: nothing is repeated, ordered or acknowledged. One
that is longer than the MTU of its path goes in IP fragments. Since there is nothing to be acknowledged before
it, the SAL FIN goes as soon as the application closes.
"""

from __future__ import annotations

from errno import EHOSTUNREACH, EPIPE

from serval_core.core import Core
from serval_core.effects import DeliverFlowDatagram, SendPacket
from serval_core.errors import TheirMistake
from serval_core.flow import Flow, Traffic
from serval_core.states import State
from serval_core.unconnected import check_payload
from serval_core.wire import encapsulation, ipv4, sal, udp
from serval_core.wire.ipv4 import IPv4Packet
from serval_core.wire.sal import PROTOCOL_UDP, SalPacket
from serval_core.wire.udp import UdpDatagram

FLOW_PAYLOAD_BYTES_MAX = 65535 - ipv4.HEADER_BYTES - sal.BASE_BYTES - udp.HEADER_BYTES
"""The longest payload of a datagram in a flow."""

_SENDING_STATES = frozenset({State.CONNECTED, State.CLOSEWAIT})


class ConnectedDatagrams:
    """The datagrams of this host's flows."""

    __slots__ = ("_core",)

    def __init__(self, core: Core) -> None:
        self._core = core

    def send(self, flow: Flow, payload: bytes) -> int:
        """Send a datagram to the peer of a flow.

        Returns 0, or the errno that says why it goes nowhere: EPIPE (not open, or closed by the application),
        EHOSTUNREACH (no path to the peer at present). PayloadSize, an OurMistake, for a wrong size.
        """
        check_payload(payload, FLOW_PAYLOAD_BYTES_MAX)
        if flow.state not in _SENDING_STATES or flow.released:
            return EPIPE
        core = self._core
        path = core.paths.path_to(flow.peer_address, flow.interface_index) or core.paths.path_to(
            flow.peer_address
        )
        if path is None:
            core.counters["datagrams_without_way"] += 1
            return EHOSTUNREACH
        source, destination = flow.local_address, flow.peer_address
        header = sal.data_header(flow.flow_id, flow.peer_flow_id, PROTOCOL_UDP)
        transport = udp.emit(UdpDatagram(0, 0, payload), source, destination)
        packet = encapsulation.emit(source, destination, flow.outer_ports, header + transport)
        for each in ipv4.fragments(packet, path.mtu_bytes):
            core.effects.append(SendPacket(each, destination, path.interface_index))
        traffic = _traffic(flow)
        traffic.packets_out += 1
        traffic.bytes_out += len(packet)
        core.counters["datagrams_sent"] += 1
        return 0

    def receive(self, flow: Flow, ip: IPv4Packet, packet: SalPacket, now: float) -> None:
        """Take a datagram from the peer of a flow that is open. Raises TheirMistake."""
        payload = self.read(flow, ip, packet)
        if flow.state is State.CONNECTED:
            self._core.stop_retransmission(flow, now)  # the peer has our handshake ACK
        self.deliver(flow, ip, payload)

    def read(self, flow: Flow, ip: IPv4Packet, packet: SalPacket) -> bytes:
        """The payload of a flow's datagram. Raises TheirMistake."""
        if packet.src_flow_id != flow.peer_flow_id:
            raise TheirMistake("wrong_peer_flow")
        if packet.protocol != PROTOCOL_UDP:
            raise TheirMistake("wrong_protocol")
        payload = udp.parse(packet.transport, ip.source, ip.destination, ip.outer_ports is None).payload
        if not payload:
            raise TheirMistake("datagram_empty")
        return payload

    def deliver(self, flow: Flow, ip: IPv4Packet, payload: bytes) -> None:
        """Hand a payload to the application. Raises TheirMistake when it has closed the flow."""
        if flow.released:
            raise TheirMistake("datagram_after_close")
        traffic = _traffic(flow)
        traffic.packets_in += 1
        traffic.bytes_in += ipv4.HEADER_BYTES + len(ip.payload)
        self._core.counters["datagrams_received"] += 1
        self._core.effects.append(DeliverFlowDatagram(flow.flow_id, payload))


def _traffic(flow: Flow) -> Traffic:
    if flow.traffic is None:
        flow.traffic = Traffic()
    return flow.traffic
