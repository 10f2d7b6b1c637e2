"""Two SALs with a wire between them, which may stop protocol 144, and a NAT in front of the client. No kernel, no sleep."""

from __future__ import annotations

from random import Random
from struct import Struct

from serval_core.dataplane.memory_network import WIRE_INDEX, MemoryPaths
from serval_core.effects import Connected, FlowEnded, SendPacket
from serval_core.names import FlowID, format_address, parse_address
from serval_core.rules import Rule
from serval_core.sal import SalSettings, ServiceAccessLayer
from serval_core.service_table import ServiceTable
from serval_core.wire import encapsulation, ipv4, sal
from serval_core.wire.ipv4 import OuterPorts
from serval_core.wire.sal import SalPacket
from tests.serval_core.exchanges import CLIENT_ADDRESS, SERVER_ADDRESS, SERVICE

ELSEWHERE = parse_address("10.0.0.11")
NAT_ADDRESS = parse_address("10.0.0.99")
_PORTS = Struct("!HH")


class End:
    """One host. The client has two interfaces."""

    def __init__(self, settings: SalSettings, address: int, *more: int) -> None:
        self.table = ServiceTable()
        self.paths = MemoryPaths(address, 1500, more)
        self.sal = ServiceAccessLayer(settings, self.table, self.paths, Random(address))
        self.sal.can_encapsulate()
        self.connected: list[FlowID] = []
        self.ended: list[int] = []

    @property
    def flow_id(self) -> FlowID:
        """That of the only flow."""
        (flow_id,) = self.sal.flow_ids()
        return flow_id

    @property
    def flow(self) -> dict[str, object]:
        """The only flow."""
        (flow,) = self.sal.flows()
        return flow

    def dropped(self) -> set[str]:
        """Why packets were dropped."""
        return {name for name, count in self.sal.counters.items() if name.startswith("dropped_") and count}


class NatWire:
    """The client's packets leave it as they are, or inside UDP from NAT_ADDRESS and `nat_port`.

    `passes_plain`: whether protocol 144 gets through.
    """

    def __init__(self, settings: SalSettings, passes_plain: bool) -> None:
        self.now = 1000.0
        self.client = End(settings, CLIENT_ADDRESS, ELSEWHERE)
        self.server = End(settings, SERVER_ADDRESS)
        self.client.table.add(Rule.forward(SERVICE, SERVER_ADDRESS))
        self.server.sal.listen(SERVICE, 16, self.now)
        self.passes_plain = passes_plain
        self.nat_port = 40000
        self.said: list[tuple[bool, SalPacket]] = []
        """Whether it was encapsulated, and what, of all that has arrived."""

    def open(self) -> None:
        """Open a flow."""
        self.client.sal.connect(SERVICE.service_id, self.now)
        self.run(5.0)
        assert [end.flow["state"] for end in (self.client, self.server)] == ["CONNECTED"] * 2

    def run(self, seconds: float) -> None:
        """Let time pass. Packets take none."""
        until = self.now + seconds
        self._carry()
        while True:
            due = [end.sal.next_timeout() for end in (self.client, self.server)]
            first = min((each for each in due if each is not None), default=until)
            if first >= until:
                break
            self.now = max(self.now, first)
            for end in (self.client, self.server):
                end.sal.handle_timeouts(self.now)
            self._carry()
        self.now = until

    def deliver_to_the_server_only(self) -> None:
        """Carry what the client has just said; nothing that is said in return arrives."""
        for effect in self.client.sal.take_effects():
            if isinstance(effect, SendPacket):
                self._deliver(self.client, self.server, effect.packet)
        for effect in self.server.sal.take_effects():
            if isinstance(effect, FlowEnded):
                self.server.ended.append(effect.errno)

    def _carry(self) -> None:
        moved = True
        while moved:
            moved = False
            for end, other in ((self.client, self.server), (self.server, self.client)):
                for effect in end.sal.take_effects():
                    moved = True
                    match effect:
                        case SendPacket(packet):
                            self._deliver(end, other, packet)
                        case Connected(flow_id):
                            end.connected.append(flow_id)
                        case FlowEnded(_, errno):
                            end.ended.append(errno)

    def _deliver(self, sender: End, receiver: End, packet: bytes) -> None:
        encapsulated = packet[9] == encapsulation.PROTOCOL_UDP
        if not encapsulated and not self.passes_plain:
            return
        ip = ipv4.parse(packet)
        self.said.append((encapsulated, sal.parse(encapsulation.payload_of(packet))))
        if not encapsulated:
            if receiver.paths.has_address(ip.destination):
                receiver.sal.packet_received(packet, WIRE_INDEX, False, self.now)
            return
        source, destination = ip.source, ip.destination
        source_port, destination_port = _PORTS.unpack_from(packet, ipv4.HEADER_BYTES)
        if sender is self.client:
            source, source_port = NAT_ADDRESS, self.nat_port
        elif (destination, destination_port) != (NAT_ADDRESS, self.nat_port):
            return  # the NAT knows nobody there
        else:
            destination, destination_port = self.client.paths.wire.address, encapsulation.CLIENT_PORT
        ports = OuterPorts(destination_port, source_port)
        payload = encapsulation.payload_of(packet)
        receiver.sal.encapsulated_received(payload, source, destination, ports, WIRE_INDEX, False, self.now)


def at_nat(end: End) -> bool:
    """Whether the server's flow goes to the NAT."""
    return end.flow["peer_address"] == format_address(NAT_ADDRESS)
