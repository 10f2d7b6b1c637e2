"""How do datagrams without a connection leave this host, and who gets those that arrive? (SPEC 4.6; capture 07)

Each datagram carries two SERVICE extensions, destination and source, and is resolved by itself, replies too.
Nothing is repeated, ordered or acknowledged, and none is larger than what one IPv4 packet holds; one that is
larger than the MTU of its path goes in IP fragments, which the receiver's kernel puts together.

A datagram that meets a DELAY rule waits in the delay queue and is sent when the service has been resolved.

A prototype that does not know the destination service answers with an RST. It ends nothing here: the
endpoint is told that it was refused, and goes on. Refusals and ICMP errors count against the instance that the
service table had chosen, as with SYNs (`liveness`), so the next datagram goes to another one.
"""

from __future__ import annotations

from errno import EADDRNOTAVAIL, EHOSTUNREACH, EINVAL, EMSGSIZE, ENOSPC

from serval_core.core import Core
from serval_core.delay_queue import Parked
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
# How many chosen instances an endpoint remembers, to know what a refusal or an answer is about.
_CHOSEN_LIMIT = 64
_DESTINATION, _FLOW_ID = slice(16, 20), slice(20, 24)


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
    """A serviceID or prefix that datagrams come to and leave from. `flow_id` only tells refusals apart.

    `chosen` are the instances that the service table chose last, by address; `waiting` the datagrams that a
    DELAY rule holds.
    """

    __slots__ = ("chosen", "endpoint_id", "flow_id", "prefix", "received", "refused", "sent", "waiting")

    def __init__(self, endpoint_id: int, prefix: ServicePrefix, flow_id: FlowID) -> None:
        self.endpoint_id = endpoint_id
        self.prefix = prefix
        self.flow_id = flow_id
        self.sent = 0
        self.received = 0
        self.refused = 0
        self.chosen: dict[int, ServiceID] = {}
        self.waiting: set[_Waiting] = set()


class _Waiting:
    """A datagram that a DELAY rule holds."""

    __slots__ = ("endpoint", "parked", "payload", "services")

    def __init__(self, endpoint: Endpoint, payload: bytes, services: tuple[ServiceID, ServiceID]) -> None:
        self.endpoint = endpoint
        self.payload = payload
        self.services = services
        self.parked: Parked | None = None


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
        core = self._core
        for waiting in endpoint.waiting:
            if waiting.parked is not None:
                core.delayed.withdraw(waiting.parked)
        core.table.remove_listener(endpoint_id)
        del self._by_id[endpoint_id], self._by_flow[endpoint.flow_id]

    def send(
        self,
        endpoint_id: int,
        payload: bytes,
        destination: ServiceID,
        address: int,
        source: ServiceID | None,
        now: float,
    ) -> int:
        """Send one datagram to `destination`, at `address` unless that is 0.

        It comes from `source`, by default the endpoint's serviceID. Returns 0, or the errno that says why it
        goes nowhere: EADDRNOTAVAIL (no rule), EHOSTUNREACH (DROP rule, or no path), ENOSPC (a DELAY rule, and
        the queue is full). OurMistake for payloads of a wrong size (PayloadSize), unknown endpoints, and a
        source that the endpoint does not cover, or another one covers more closely.
        """
        endpoint = self._endpoint(endpoint_id)
        check_payload(payload, PAYLOAD_BYTES_MAX)
        if source is None:
            source = endpoint.prefix.service_id
        elif not endpoint.prefix.covers(source):
            raise OurMistake(f"{source.text} is not covered by {endpoint.prefix}, which the endpoint is bound to")
        elif self._core.table.listener_of(source) != endpoint_id:
            raise OurMistake(f"{source.text} is bound by another, who would get the answers")
        services = destination, source
        if address:
            return self._transmit(endpoint, payload, services, ways_to(self._core.paths, address), EHOSTUNREACH)
        return self._resolve(endpoint, payload, services, now)

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
        payload = udp.parse(packet.transport, ip.source, ip.destination, ip.outer_ports is None).payload
        if not payload:
            raise TheirMistake("datagram_empty")
        destination, source = packet.services
        if endpoint.chosen.get(ip.source) == source:
            self._core.liveness.answered(source, ip.source)
        endpoint.received += 1
        self._core.counters["datagrams_received"] += 1
        self._core.effects.append(
            DeliverDatagram(
                endpoint.endpoint_id, Datagram(payload, source, destination, ip.source, interface_index)
            )
        )
        return True

    def refused(self, ip: IPv4Packet, packet: SalPacket, now: float) -> bool:
        """Whether a packet of no flow was an RST that answers a datagram of ours (SPEC 3.9)."""
        control = packet.control
        endpoint = self._by_flow.get(packet.dst_flow_id)
        if endpoint is None or control is None or not control.flags & RST or control.nonce != _NO_NONCE:
            return False
        endpoint.refused += 1
        service_id = endpoint.chosen.get(ip.source)
        if service_id is not None:
            self._core.liveness.refused(service_id, ip.source, now)
        self._core.counters["datagrams_refused"] += 1
        self._core.effects.append(DatagramRefused(endpoint.endpoint_id, ip.source))
        return True

    def undeliverable(self, packet: bytes, now: float) -> bool:
        """Whether an IPv4 packet that could not be delivered, or its beginning, was a datagram of ours."""
        endpoint = self._by_flow.get(int.from_bytes(packet[_FLOW_ID], "big"))
        if endpoint is None:
            return False
        self._core.counters["datagrams_undeliverable"] += 1
        address = int.from_bytes(packet[_DESTINATION], "big")
        service_id = endpoint.chosen.get(address)
        if service_id is not None:
            self._core.liveness.unreachable(service_id, address, now)
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

    def _resolve(
        self, endpoint: Endpoint, payload: bytes, services: tuple[ServiceID, ServiceID], now: float
    ) -> int:
        """Send to the instance that the service table chooses now; returns 0 or an errno."""
        core = self._core
        destination = services[0]
        unreachable: set[int] = set()
        while True:
            rule_type, targets = core.table.resolve(
                destination, core.random.random, unreachable, udp.HEADER_BYTES + len(payload)
            )
            if not targets:
                if rule_type is RuleType.DELAY:
                    return self._park(_Waiting(endpoint, payload, services), now)
                errno = EADDRNOTAVAIL if rule_type is None else EHOSTUNREACH
                return self._transmit(endpoint, payload, services, (), errno)
            ways = ways_of(core.paths, targets)
            if ways or targets[0].type is RuleType.DEMUX:
                break
            unreachable |= {target.address for target in targets}
        target = targets[0]
        if target.address and not target.broadcast and endpoint.chosen.get(target.address) != destination:
            if len(endpoint.chosen) >= _CHOSEN_LIMIT:
                del endpoint.chosen[next(iter(endpoint.chosen))]
            endpoint.chosen[target.address] = destination
        return self._transmit(endpoint, payload, services, ways, EHOSTUNREACH)

    def _park(self, waiting: _Waiting, now: float) -> int:
        def resume(now: float) -> None:
            waiting.endpoint.waiting.discard(waiting)
            self._resolve(waiting.endpoint, waiting.payload, waiting.services, now)

        def end(reason: str, now: float) -> None:
            waiting.endpoint.waiting.discard(waiting)

        waiting.parked = self._core.delayed.park(waiting.services[0], "datagram", resume, end, now)
        if waiting.parked is None:
            return ENOSPC
        waiting.endpoint.waiting.add(waiting)
        return 0

    def _transmit(
        self,
        endpoint: Endpoint,
        payload: bytes,
        services: tuple[ServiceID, ServiceID],
        ways: tuple[Way, ...],
        errno: int,
    ) -> int:
        """Send a copy along each way; returns 0, or `errno` if there is none."""
        core = self._core
        if not ways:
            core.counters["datagrams_without_way"] += 1
            return errno
        for destination, path in ways:
            source = path.source_address
            transport = udp.emit(UdpDatagram(0, 0, payload), source, destination)
            packet = SalPacket(endpoint.flow_id, 0, PROTOCOL_UDP, None, services, (), transport)
            whole = ipv4.emit(source, destination, PROTOCOL_SAL, sal.emit(packet))
            for each in ipv4.fragments(whole, path.mtu_bytes):
                core.effects.append(SendPacket(each, destination, path.interface_index))
        endpoint.sent += 1
        core.counters["datagrams_sent"] += 1
        return 0
