"""Do unconnected datagrams find their service, and is what is wrong with them counted and nothing else?"""

from __future__ import annotations

from errno import EADDRNOTAVAIL, EHOSTUNREACH, EINVAL, EMSGSIZE, ENOSPC
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import IP, defragment

from serval_core.dataplane.memory_network import WIRE_INDEX, Faults, MemoryHost, MemoryNetwork, MemoryPaths
from serval_core.effects import Datagram, DatagramRefused, DeliverDatagram, SendPacket
from serval_core.errors import OurMistake
from serval_core.names import DEFAULT_PREFIX, ServiceID, parse_service
from serval_core.rules import Rule, RuleType
from serval_core.sal import SalSettings, ServiceAccessLayer
from serval_core.unconnected import PAYLOAD_BYTES_MAX, Endpoint, PayloadSize
from serval_core.wire import ipv4, sal, udp
from serval_core.wire.sal import ACK, PROTOCOL_SAL, PROTOCOL_TCP, PROTOCOL_UDP, RST, Control, SalPacket
from serval_core.wire.udp import UdpDatagram
from tests.serval_core.lone_host import LOCAL, OTHER, REMOTE, SERVICE, SERVICE_ID, LoneHost

CLIENT_ID = parse_service("700").service_id
NO_NONCE = bytes(8)


def bound(host: LoneHost, service: str = "700") -> Endpoint:
    return host.sal.bind_datagrams(parse_service(service))


def send(
    host: LoneHost | MemoryHost,
    endpoint: Endpoint,
    payload: bytes,
    service_id: ServiceID,
    address: int = 0,
    source: ServiceID | None = None,
) -> int:
    now = host.now if isinstance(host, LoneHost) else host.network.now
    return host.sal.send_datagram(endpoint.endpoint_id, payload, service_id, now, address, source)


def datagram(
    payload: bytes = b"payload",
    services: tuple[ServiceID, ...] = (SERVICE_ID, CLIENT_ID),
    flow_id: int = 6,
    checksummed: bool = True,
    protocol: int = PROTOCOL_UDP,
    source_addresses: tuple[int, ...] = (),
) -> bytes:
    """A datagram from REMOTE to LOCAL."""
    transport = udp.emit(UdpDatagram(0, 0, payload, checksummed), REMOTE, LOCAL)
    packet = SalPacket(flow_id, 0, protocol, None, services, source_addresses, transport)
    return ipv4.emit(REMOTE, LOCAL, PROTOCOL_SAL, sal.emit(packet))


def delivered(host: LoneHost) -> list[DeliverDatagram]:
    return host.news(DeliverDatagram)


def test_a_refusal_is_told_and_ends_nothing() -> None:
    host = LoneHost()
    host.forward(REMOTE)
    endpoint = bound(host)
    send(host, endpoint, b"one", SERVICE_ID)
    host.effects()
    host.receive(refusal(endpoint, REMOTE))
    assert host.news(DatagramRefused) == [DatagramRefused(endpoint.endpoint_id, REMOTE)]
    assert send(host, endpoint, b"two", SERVICE_ID) == 0
    host.receive(datagram(services=(CLIENT_ID, SERVICE_ID)))
    assert len(delivered(host)) == 1


def test_an_rst_with_a_nonce_is_no_refusal() -> None:
    host = LoneHost()
    endpoint = bound(host)
    forged = SalPacket(0, endpoint.flow_id, PROTOCOL_UDP, Control(RST | ACK, 0, 0, b"a nonce."), (), (), b"")
    host.receive(ipv4.emit(REMOTE, LOCAL, PROTOCOL_SAL, sal.emit(forged)))
    assert host.news(DatagramRefused) == []
    assert host.dropped("unknown_flow") == 1


def test_delivery_says_all_that_is_known() -> None:
    host = LoneHost()
    endpoint = host.sal.bind_datagrams(parse_service("0x0001:16"))
    host.receive(datagram())
    assert delivered(host) == [
        DeliverDatagram(endpoint.endpoint_id, Datagram(b"payload", CLIENT_ID, SERVICE_ID, REMOTE, WIRE_INDEX))
    ]
    assert host.packets() == []


def test_what_a_service_router_passed_on_comes_from_the_originator() -> None:
    host = LoneHost()
    bound(host, "76568")
    host.receive(datagram(source_addresses=(REMOTE, OTHER)))
    assert [each.datagram.source_address for each in delivered(host)] == [REMOTE]


def test_a_datagram_needs_no_checksum() -> None:
    host = LoneHost()
    bound(host, "76568")
    host.receive(datagram(checksummed=False))
    assert len(delivered(host)) == 1


def damaged(packet: bytes) -> bytes:
    return packet[:-1] + bytes((packet[-1] ^ 1,))


@pytest.mark.parametrize(
    ("packet", "reason"),
    [
        (datagram(b""), "datagram_empty"),
        (datagram(services=(SERVICE_ID,)), "datagram_without_source"),
        (damaged(datagram()), "udp_checksum"),
        (datagram()[:2] + (20 + 84 + 7).to_bytes(2, "big") + datagram()[4:], "ipv4_checksum"),
        (
            ipv4.emit(
                REMOTE,
                LOCAL,
                PROTOCOL_SAL,
                sal.emit(SalPacket(6, 0, PROTOCOL_UDP, None, (SERVICE_ID, CLIENT_ID), (), b"short")),
            ),
            "udp_truncated",
        ),
    ],
    ids=["empty", "one service", "damaged", "damaged header", "short"],
)
def test_bad_datagrams_are_counted_and_dropped(packet: bytes, reason: str) -> None:
    host = LoneHost()
    bound(host, "76568")
    host.receive(packet)
    assert host.dropped(reason) == 1
    assert host.effects() == []


@pytest.mark.parametrize(
    "packet", [datagram(), datagram(protocol=PROTOCOL_TCP)], ids=["datagram", "not a datagram"]
)
def test_a_listener_for_connections_gets_no_datagrams(packet: bytes) -> None:
    host = LoneHost()
    host.listen()
    host.receive(packet)
    assert host.only_packet().control.flags == RST | ACK


def test_a_syn_to_an_endpoint_is_dropped() -> None:
    host = LoneHost()
    bound(host, "76568")
    control = Control(sal.SYN, 1, 0, b"12345678")
    for protocol in (PROTOCOL_TCP, PROTOCOL_UDP):
        transport = udp.emit(UdpDatagram(0, 0, b""), REMOTE, LOCAL)
        packet = SalPacket(6, 0, protocol, control, (SERVICE_ID,), (), transport)
        host.receive(ipv4.emit(REMOTE, LOCAL, PROTOCOL_SAL, sal.emit(packet)))
    assert host.effects() == []
    assert host.sal.flows() == []


def test_each_datagram_is_resolved_anew() -> None:
    host = LoneHost()
    host.forward(REMOTE, OTHER)
    endpoint = bound(host)
    for _ in range(200):
        send(host, endpoint, b"x", SERVICE_ID)
    destinations = [packet.destination for packet in host.packets()]
    assert 60 < destinations.count(REMOTE) < 140
    assert set(destinations) == {REMOTE, OTHER}


def test_an_address_skips_resolution_and_does_not_stick() -> None:
    host = LoneHost()
    endpoint = bound(host)
    assert send(host, endpoint, b"x", SERVICE_ID, OTHER) == 0
    assert host.only_packet().destination == OTHER
    assert send(host, endpoint, b"x", SERVICE_ID) == EADDRNOTAVAIL
    assert host.packets() == []


def test_nowhere_to_go() -> None:
    host = LoneHost()
    endpoint = bound(host)
    host.table.add(Rule.drop(SERVICE))
    assert send(host, endpoint, b"x", SERVICE_ID) == EHOSTUNREACH
    host.table.add(Rule.forward(parse_service("800"), REMOTE))
    host.paths.up = False
    assert send(host, endpoint, b"x", parse_service("800").service_id) == EHOSTUNREACH
    assert send(host, endpoint, b"x", SERVICE_ID, OTHER) == EHOSTUNREACH
    assert host.sal.counters["datagrams_without_way"] == 3
    assert host.packets() == []


def test_a_prefix_speaks_for_its_services_only() -> None:
    host = LoneHost()
    host.forward(REMOTE)
    endpoint = host.sal.bind_datagrams(parse_service("0xabcd:16"))
    member = parse_service("0xabcd01").service_id
    send(host, endpoint, b"x", SERVICE_ID, source=member)
    assert host.only_packet().sal.services == (SERVICE_ID, member)
    with pytest.raises(OurMistake, match="not covered"):
        send(host, endpoint, b"x", SERVICE_ID, source=CLIENT_ID)


def test_nobody_speaks_for_a_service_that_another_has_bound() -> None:
    """Or who has a prefix could register and unregister in the name of the stack's own control service."""
    host = LoneHost()
    host.forward(REMOTE)
    wide, narrow = (host.sal.bind_datagrams(parse_service(each)) for each in ("0xabcd:16", "0xabcd01"))
    member = parse_service("0xabcd01").service_id
    with pytest.raises(OurMistake, match="bound by another"):
        send(host, wide, b"x", SERVICE_ID, source=member)
    send(host, narrow, b"x", SERVICE_ID, source=member)
    host.sal.close_datagrams(narrow.endpoint_id)
    send(host, wide, b"x", SERVICE_ID, source=member)
    assert [packet.sal.services[1] for packet in host.packets()] == [member, member]


@pytest.mark.parametrize(("size", "errno"), [(0, EINVAL), (PAYLOAD_BYTES_MAX + 1, EMSGSIZE)])
def test_sizes_that_no_datagram_has(size: int, errno: int) -> None:
    host = LoneHost()
    host.forward(REMOTE)
    endpoint = bound(host)
    with pytest.raises(PayloadSize, match="datagram") as mistake:
        send(host, endpoint, bytes(size), SERVICE_ID)
    assert mistake.value.errno == errno
    assert host.packets() == []


@given(st.integers(1, PAYLOAD_BYTES_MAX), st.sampled_from([576, 1500, 9000]))
@settings(max_examples=30, deadline=None)
def test_fragments_make_the_packet_again(size: int, mtu_bytes: int) -> None:
    """Scapy puts them together, as the receiver's kernel would."""
    host = LoneHost()
    host.paths = MemoryPaths(LOCAL, mtu_bytes)
    host.sal = ServiceAccessLayer(SalSettings(), host.table, host.paths, Random(1))
    host.forward(REMOTE)
    payload = Random(size).randbytes(size)
    send(host, bound(host), payload, SERVICE_ID)
    packets = [each.packet for each in host.effects() if isinstance(each, SendPacket)]
    assert max(map(len, packets)) <= mtu_bytes
    assert len(packets) == 1 or len(packets) >= (size + 112) // mtu_bytes
    (whole,) = defragment([IP(each) for each in packets])  # type: ignore[no-untyped-call]
    receiver = LoneHost()
    bound(receiver, "76568")
    receiver.receive(ipv4.emit(LOCAL, REMOTE, PROTOCOL_SAL, bytes(whole.payload)))
    assert [each.datagram.payload for each in delivered(receiver)] == [payload]


def test_a_delayed_datagram_waits_until_the_service_is_known() -> None:
    host = LoneHost()
    host.table.add(Rule.delay(SERVICE))
    endpoint = bound(host)
    for payload in (b"first", b"second"):
        assert send(host, endpoint, payload, SERVICE_ID) == 0
    assert host.packets() == []
    host.table.remove(SERVICE, RuleType.DELAY)
    host.forward(REMOTE)
    host.sal.release_delayed(SERVICE, host.now)
    sent = [udp.parse(each.sal.transport, LOCAL, REMOTE).payload for each in host.packets()]
    assert sent == [b"first", b"second"]
    assert endpoint.waiting == set()


def test_a_delayed_datagram_is_dropped_by_verdict_or_by_age() -> None:
    host = LoneHost(SalSettings(delay_timeout_s=1.0))
    host.table.add(Rule.delay(SERVICE))
    endpoint = bound(host)
    send(host, endpoint, b"x", SERVICE_ID)
    host.sal.drop_delayed(SERVICE, host.now, "nobody knows it")
    assert endpoint.waiting == set()
    send(host, endpoint, b"x", SERVICE_ID)
    host.advance(2.0)
    assert endpoint.waiting == set()
    assert len(host.sal.delayed) == 0
    assert host.packets() == []


def test_the_delay_queue_is_bounded_and_a_closed_endpoint_leaves_it() -> None:
    host = LoneHost(SalSettings(delay_limit=2))
    host.table.add(Rule.delay(SERVICE))
    endpoint = bound(host)
    outcomes = [send(host, endpoint, b"x", SERVICE_ID) for _ in range(3)]
    assert outcomes == [0, 0, ENOSPC]
    host.sal.close_datagrams(endpoint.endpoint_id)
    assert len(host.sal.delayed) == 0


def refusal(endpoint: Endpoint, source: int) -> bytes:
    packet = SalPacket(0, endpoint.flow_id, PROTOCOL_UDP, Control(RST | ACK, 0, 0, NO_NONCE), (), (), b"")
    return ipv4.emit(source, LOCAL, PROTOCOL_SAL, sal.emit(packet))


def destinations(host: LoneHost, endpoint: Endpoint, count: int = 40) -> set[int]:
    """Where so many datagrams go."""
    for _ in range(count):
        send(host, endpoint, b"x", SERVICE_ID)
    return {packet.destination for packet in host.packets()}


def test_an_instance_that_refused_is_passed_over_until_it_answers() -> None:
    host = LoneHost()
    host.forward(REMOTE, OTHER)
    endpoint = bound(host)
    assert destinations(host, endpoint) == {REMOTE, OTHER}
    host.receive(refusal(endpoint, REMOTE))
    assert destinations(host, endpoint) == {OTHER}
    host.receive(datagram(services=(CLIENT_ID, SERVICE_ID)))
    assert destinations(host, endpoint) == {REMOTE, OTHER}


def test_a_refusal_by_somebody_who_was_not_asked_marks_nobody() -> None:
    host = LoneHost()
    host.forward(REMOTE, OTHER)
    endpoint, bystander = bound(host), bound(host, "701")
    assert destinations(host, endpoint) == {REMOTE, OTHER}
    host.receive(refusal(bystander, REMOTE))
    assert destinations(host, endpoint) == {REMOTE, OTHER}


def test_an_instance_that_cannot_be_reached_is_passed_over() -> None:
    host = LoneHost()
    host.forward(REMOTE, OTHER)
    endpoint = bound(host)
    for _ in range(40):
        send(host, endpoint, b"x", SERVICE_ID)
    to_remote = next(each.packet for each in host.packets() if each.destination == REMOTE)
    host.sal.send_failed(to_remote[:28], EHOSTUNREACH, host.now)
    assert destinations(host, endpoint) == {OTHER}
    assert host.sal.counters["datagrams_undeliverable"] == 1


def test_random_endpoints_differ_and_nothing_is_bound_twice() -> None:
    host = LoneHost()
    first, second = host.sal.bind_datagrams(None), host.sal.bind_datagrams(None)
    assert first.prefix != second.prefix
    assert first.flow_id != second.flow_id
    for taken in (first.prefix, DEFAULT_PREFIX):
        with pytest.raises(OurMistake):
            host.sal.bind_datagrams(taken)
    host.listen()
    with pytest.raises(OurMistake, match="already being listened on"):
        bound(host, "76568")
    assert [each["service"] for each in host.sal.datagram_endpoints()] == [str(first.prefix), str(second.prefix)]


def test_a_closed_endpoint_is_gone() -> None:
    host = LoneHost()
    endpoint = bound(host, "76568")
    host.sal.close_datagrams(endpoint.endpoint_id)
    host.receive(datagram())
    assert delivered(host) == []
    for call in (
        lambda: send(host, endpoint, b"x", SERVICE_ID),
        lambda: host.sal.close_datagrams(endpoint.endpoint_id),
    ):
        with pytest.raises(OurMistake, match="no datagram endpoint"):
            call()
    bound(host, "76568")


def test_on_a_bad_network_what_arrives_is_what_was_sent() -> None:
    network = MemoryNetwork(7, Faults(loss=0.2, duplication=0.2, reordering=0.3))
    client, server = network.add_host(LOCAL), network.add_host(REMOTE)
    wire = client.paths.wire
    for host in (client, server):
        host.table.replace_broadcast_rules([Rule.broadcast_on(wire.broadcast_address, wire.index)])
    asking = client.sal.bind_datagrams(None)
    answering = server.sal.bind_datagrams(SERVICE)
    for number in range(200):
        send(client, asking, b"question %d" % number, SERVICE_ID)
        client.settle()
    network.run()
    for each in server.datagrams:
        arrived = each.datagram
        send(server, answering, b"answer to " + arrived.payload, arrived.source_service)
        server.settle()
    network.run()
    questions = {b"question %d" % number for number in range(200)}
    asked = {each.datagram.payload for each in server.datagrams}
    answered = {each.datagram.payload for each in client.datagrams}
    assert 100 < len(asked) < 200
    assert asked < questions
    assert answered < {b"answer to " + each for each in asked}
    assert {each.datagram.source_service for each in client.datagrams} == {SERVICE_ID}


def test_both_ends_on_one_host() -> None:
    network = MemoryNetwork(1)
    host = network.add_host(LOCAL)
    near, far = host.sal.bind_datagrams(None), host.sal.bind_datagrams(SERVICE)
    assert send(host, near, b"here", SERVICE_ID) == 0
    host.settle()
    network.run()
    ((endpoint_id, arrived),) = [(each.endpoint_id, each.datagram) for each in host.datagrams]
    assert (endpoint_id, arrived.payload) == (far.endpoint_id, b"here")
    assert arrived.source_service == near.prefix.service_id
