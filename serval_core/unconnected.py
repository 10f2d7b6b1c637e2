"""How do datagrams without a connection leave this host, and who gets those that arrive? (SPEC 4.6; capture 07)

Each datagram carries two SERVICE extensions, destination and source, and is resolved by itself, replies too.
Nothing is repeated, ordered or acknowledged, and none is larger than what one IPv4 packet holds; one that is
larger than the MTU of its path goes in IP fragments, which the receiver's kernel puts together.

A prototype that does not know the destination service answers with an RST. It ends nothing here: the
endpoint is told that it was refused, and goes on.
"""

from __future__ import annotations

from errno import EADDRNOTAVAIL, EHOSTUNREACH, EINVAL, EMSGSIZE

from serval_core.core import Core
from serval_core.effects import Datagram, DatagramRefused, DeliverDatagram, SendPacket
from serval_core.errors import OurMistake, TheirMistake
from serval_core.names import SERVICE_ID_BITS, FlowID, ServiceID, ServicePrefix
from serval_core.rules import Rule, RuleType
from serval_core.ways import Way, ways_of, ways_to
from serval_core.wire import ipv4, sal, udp
from serval_core.wire.ipv4 import IPv4Packet
from serval_core.wire.sal import PROTOCOL_SAL, PROTOCOL_UDP, RST, SalPacket
from serval_core.wire.udp import UdpDatagram

_PACKET_BYTES_MAX = 65535
_SAL_HEADER_BYTES = sal.BASE_BYTES + 2 * sal.SERVICE_BYTES
PAYLOAD_BYTES_MAX = _PACKET_BYTES_MAX - ipv4.HEADER_BYTES - _SAL_HEADER_BYTES - udp.HEADER_BYTES
"""The longest payload of an unconnected datagram."""

_NO_NONCE = bytes(8)


class PayloadSize(OurMistake):
    """A payload that no datagram can carry. `errno` is what a socket call would report (SPEC 3.10)."""

    def __init__(self, size_bytes: int, limit_bytes: int) -> None:
        if size_bytes == 0:
            super().__init__("an empty datagram cannot be sent, since receivers drop it: send at least 1 byte")
        else:
            super().__init__(
                f"a datagram of {size_bytes} bytes is too long: {limit_bytes} are the most that fit into a packet"
            )
        self.errno = EMSGSIZE if size_bytes else EINVAL


def check_payload(payload: bytes, limit_bytes: int) -> None:
    """Raise PayloadSize unless the payload has 1 to `limit_bytes` bytes."""
    if not 0 < len(payload) <= limit_bytes:
        raise PayloadSize(len(payload), limit_bytes)


class Endpoint:
    """A serviceID or prefix that datagrams come to and leave from. `flow_id` only tells refusals apart."""

    __slots__ = ("endpoint_id", "flow_id", "prefix", "received", "refused", "sent")

    def __init__(self, endpoint_id: int, prefix: ServicePrefix, flow_id: FlowID) -> None:
        self.endpoint_id = endpoint_id
        self.prefix = prefix
        self.flow_id = flow_id
        self.sent = 0
        self.received = 0
        self.refused = 0


class Unconnected:
    """The unconnected datagrams of one host."""

    __slots__ = ("_by_flow", "_by_id", "_core")

    def __init__(self, core: Core) -> None:
        self._core = core
        self._by_id: dict[int, Endpoint] = {}
        self._by_flow: dict[int, Endpoint] = {}

    def bind(self, prefix: ServicePrefix | None) -> Endpoint:
        """Receive datagrams for the services under `prefix`; None: for a random serviceID.

        OurMistake if something is bound to that prefix or nothing can be.
        """
        core = self._core
        if prefix is None:
            number = core.random.getrandbits(SERVICE_ID_BITS)
            prefix = ServicePrefix.of(ServiceID(number.to_bytes(SERVICE_ID_BITS // 8, "big")))
        endpoint_id = core.new_listener_id()
        core.table.add(Rule.demux(prefix, endpoint_id))
        endpoint = Endpoint(endpoint_id, prefix, core.flows.new_flow_id(core.random.getrandbits))
        self._by_id[endpoint_id] = self._by_flow[endpoint.flow_id] = endpoint
        return endpoint

    def close(self, endpoint_id: int) -> None:
        """Receive no more. OurMistake if there is no such endpoint."""
        endpoint = self._endpoint(endpoint_id)
        self._core.table.remove_listener(endpoint_id)
        del self._by_id[endpoint_id], self._by_flow[endpoint.flow_id]

    def send(
        self, endpoint_id: int, payload: bytes, destination: ServiceID, address: int, source: ServiceID | None
    ) -> int:
        """Send one datagram to `destination`, at `address` unless that is 0.

        It comes from `source`, by default the endpoint's serviceID. Returns 0, or the errno that says why it
        goes nowhere: EADDRNOTAVAIL (no rule), EHOSTUNREACH (DROP rule, or no path). OurMistake for payloads
        of a wrong size (PayloadSize), unknown endpoints, and a source that the endpoint does not cover.
        """
        endpoint = self._endpoint(endpoint_id)
        check_payload(payload, PAYLOAD_BYTES_MAX)
        if source is None:
            source = endpoint.prefix.service_id
        elif not endpoint.prefix.covers(source):
            raise OurMistake(f"{source.text} is not covered by {endpoint.prefix}, which the endpoint is bound to")
        core = self._core
        ways, errno = (ways_to(core.paths, address), EHOSTUNREACH) if address else self._resolve(destination, payload)
        if not ways:
            core.counters["datagrams_without_way"] += 1
            return errno
        for way in ways:
            self._transmit(endpoint, payload, (destination, source), way)
        endpoint.sent += 1
        core.counters["datagrams_sent"] += 1
        return 0

    def receive(self, ip: IPv4Packet, packet: SalPacket, interface_index: int) -> bool:
        """Whether a packet of no flow was a datagram for an endpoint here. Raises TheirMistake."""
        if packet.control is not None or packet.protocol != PROTOCOL_UDP:
            return False
        target = self._core.table.resolve_local(packet.services[0], len(packet.transport))
        endpoint = None if target is None else self._by_id.get(target.listener_id)
        if endpoint is None:
            return False
        if len(packet.services) != 2:
            raise TheirMistake("datagram_without_source")
        payload = udp.parse(packet.transport, ip.source, ip.destination).payload
        if not payload:
            raise TheirMistake("datagram_empty")
        destination, source = packet.services
        endpoint.received += 1
        self._core.counters["datagrams_received"] += 1
        self._core.effects.append(
            DeliverDatagram(
                endpoint.endpoint_id, Datagram(payload, source, destination, ip.source, interface_index)
            )
        )
        return True

    def refused(self, ip: IPv4Packet, packet: SalPacket) -> bool:
        """Whether a packet of no flow was an RST that answers a datagram of ours (SPEC 3.9)."""
        control = packet.control
        endpoint = self._by_flow.get(packet.dst_flow_id)
        if endpoint is None or control is None or not control.flags & RST or control.nonce != _NO_NONCE:
            return False
        endpoint.refused += 1
        self._core.counters["datagrams_refused"] += 1
        self._core.effects.append(DatagramRefused(endpoint.endpoint_id, ip.source))
        return True

    def snapshot(self) -> list[dict[str, object]]:
        """One dict per endpoint."""
        return [
            {
                "service": str(endpoint.prefix),
                "flow_id": endpoint.flow_id,
                "datagrams_sent": endpoint.sent,
                "datagrams_received": endpoint.received,
                "datagrams_refused": endpoint.refused,
            }
            for endpoint in self._by_id.values()
        ]

    def _endpoint(self, endpoint_id: int) -> Endpoint:
        endpoint = self._by_id.get(endpoint_id)
        if endpoint is None:
            raise OurMistake(f"there is no datagram endpoint {endpoint_id}: it may have been closed")
        return endpoint

    def _resolve(self, destination: ServiceID, payload: bytes) -> tuple[tuple[Way, ...], int]:
        """The ways of one datagram; when there is none, the errno that says why."""
        core = self._core
        unreachable: set[int] = set()
        while True:
            rule_type, targets = core.table.resolve(
                destination, core.random.random, unreachable, udp.HEADER_BYTES + len(payload)
            )
            if not targets:
                return (), EADDRNOTAVAIL if rule_type is None else EHOSTUNREACH
            ways = ways_of(core.paths, targets)
            if ways or targets[0].type is RuleType.DEMUX:
                return ways, EHOSTUNREACH
            unreachable |= {target.address for target in targets}

    def _transmit(
        self, endpoint: Endpoint, payload: bytes, services: tuple[ServiceID, ServiceID], way: Way
    ) -> None:
        source, destination = way.path.source_address, way.destination
        transport = udp.emit(UdpDatagram(0, 0, payload), source, destination)
        packet = SalPacket(endpoint.flow_id, 0, PROTOCOL_UDP, None, services, (), transport)
        whole = ipv4.emit(source, destination, PROTOCOL_SAL, sal.emit(packet))
        for each in ipv4.fragments(whole, way.path.mtu_bytes):
            self._core.effects.append(SendPacket(each, destination, way.path.interface_index))
