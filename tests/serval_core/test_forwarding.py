"""Does a service router send packets on, to whom, and as which bytes?"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from random import Random

import pytest

from serval_core.dataplane.memory_network import WIRE_INDEX, MemoryHost, MemoryNetwork, MemoryPaths
from serval_core.effects import SendPacket
from serval_core.errors import TheirMistake
from serval_core.forwarding import rewrite
from serval_core.names import format_address, parse_address, parse_service
from serval_core.rules import Rule, RuleType
from serval_core.sal import SalSettings, ServiceAccessLayer
from serval_core.service_table import ServiceTable
from serval_core.wire import ipv4, sal, udp
from serval_core.wire.checksum import checksum_of_sum
from serval_core.wire.sal import Control, SalPacket
from tests.serval_core.exchanges import Exchange
from tests.serval_core.lone_host import LOCAL, OTHER, REMOTE, SERVICE, SERVICE_ID, LoneHost, Peer, Sent
from tests.serval_core.wire.captures import CAPTURES

CLIENT = parse_address("10.0.0.77")
FORWARDING = SalSettings(forwarding=True)
SOURCE_SERVICE = parse_service("55555").service_id


def router(*targets: int) -> LoneHost:
    host = LoneHost(FORWARDING)
    host.forward(*targets)
    return host


def datagram(payload: bytes = b"payload", destination: int = LOCAL, **ip: int) -> bytes:
    body = udp.emit(udp.UdpDatagram(0, 0, payload), CLIENT, destination)
    packet = SalPacket(5, 0, sal.PROTOCOL_UDP, None, (SERVICE_ID, SOURCE_SERVICE), (), body)
    return ipv4.emit(CLIENT, destination, sal.PROTOCOL_SAL, sal.emit(packet), **ip)


def syn(source_addresses: tuple[int, ...] = (), source: int = CLIENT) -> bytes:
    return Peer(address=source).syn(source_addresses=source_addresses)


def with_ttl(packet: bytes, ttl: int) -> bytes:
    parsed = ipv4.parse(packet)
    return ipv4.emit(parsed.source, parsed.destination, parsed.protocol, parsed.payload, ttl)


def forwarded(host: LoneHost, packet: bytes, broadcast: bool = False) -> Sent | None:
    host.receive(packet, broadcast)
    packets = host.packets()
    assert len(packets) <= 1
    return packets[0] if packets else None


def test_recorded_syns_leave_as_the_prototype_sent_them() -> None:
    """Capture 13: host C is the service router 10.77.0.3; it received and sent on three SYNs."""
    (capture,) = (each for each in CAPTURES if each.name == "13_servd_c.pcap")
    client, server, c = (parse_address(f"10.77.0.{number}") for number in (1, 2, 3))
    table = ServiceTable()
    table.add(Rule.forward(parse_service("76568"), server))
    layer = ServiceAccessLayer(FORWARDING, table, MemoryPaths(c, 1500), Random(1))
    syns = [packet for packet in capture.packets() if packet[32] >> 4 == 1 and packet[34] & 0xFC == sal.SYN]
    received = [packet for packet in syns if ipv4.parse(packet).destination == c]
    for packet in received:
        layer.packet_received(packet, WIRE_INDEX, False, 1.0)
    sent = [effect.packet.hex() for effect in layer.take_effects() if isinstance(effect, SendPacket)]
    assert len(sent) == 3
    assert sent == [packet.hex() for packet in syns if ipv4.parse(packet).destination == server]
    assert {ipv4.parse(packet).source for packet in received} == {client}


def test_second_router_extends_the_list() -> None:
    sent = forwarded(router(REMOTE), syn((CLIENT, OTHER)))
    assert sent is not None
    assert (sent.source, sent.destination) == (CLIENT, REMOTE)
    assert sent.sal.source_addresses == (CLIENT, OTHER, LOCAL)
    assert ipv4.parse(sent.packet).ttl == 63


def test_datagram_is_forwarded_with_its_checksum() -> None:
    sent = forwarded(router(REMOTE), datagram())
    assert sent is not None
    assert sent.sal.services == (SERVICE_ID, SOURCE_SERVICE)
    assert sent.sal.source_addresses == (CLIENT, LOCAL)
    assert udp.parse(sent.sal.transport, CLIENT, REMOTE).payload == b"payload"


def test_datagram_without_checksum_stays_without() -> None:
    body = udp.emit(udp.UdpDatagram(0, 0, b"x", checksummed=False), CLIENT, LOCAL)
    packet = SalPacket(5, 0, sal.PROTOCOL_UDP, None, (SERVICE_ID, SOURCE_SERVICE), (), body)
    sent = forwarded(router(REMOTE), ipv4.emit(CLIENT, LOCAL, sal.PROTOCOL_SAL, sal.emit(packet)))
    assert sent is not None
    assert not udp.parse(sent.sal.transport, CLIENT, REMOTE).checksummed


def test_wrong_transport_checksum_stays_wrong() -> None:
    damaged = bytearray(datagram())
    damaged[-1] ^= 1
    sent = forwarded(router(REMOTE), bytes(damaged))
    assert sent is not None
    with pytest.raises(TheirMistake):
        udp.parse(sent.sal.transport, CLIENT, REMOTE)


def test_datagram_that_outgrows_the_wire_is_fragmented() -> None:
    host = router(REMOTE)
    host.receive(datagram(bytes(range(256)) * 5 + bytes(1500 - 1280 - 20 - 84 - 8)))
    pieces = [
        ipv4.parse(effect.packet) for effect in host.sal.take_effects() if isinstance(effect, SendPacket)
    ]
    assert len(pieces) == 2
    assert all(20 + len(piece.payload) <= 1500 for piece in pieces)
    assert len({piece.identification for piece in pieces}) == 1
    assert [piece.flags_fragment for piece in pieces] == [0x2000, len(pieces[0].payload) // 8]
    whole = sal.parse(b"".join(piece.payload for piece in pieces))
    assert len(udp.parse(whole.transport, CLIENT, REMOTE).payload) == 1500 - 20 - 84 - 8


def test_datagram_that_outgrows_the_wire_and_forbids_fragments_is_dropped() -> None:
    host = router(REMOTE)
    assert forwarded(host, datagram(bytes(1380), flags_fragment=ipv4.DONT_FRAGMENT)) is None
    assert host.dropped("ipv4_too_big") == 1


def test_split_follows_the_weights() -> None:
    host = LoneHost(FORWARDING)
    host.table.add(Rule.forward(SERVICE, REMOTE, weight=3))
    host.table.add(Rule.forward(SERVICE, OTHER, weight=1))
    for _ in range(1000):
        host.receive(syn())
    chosen = Counter(packet.destination for packet in host.packets())
    assert sum(chosen.values()) == 1000
    assert 690 < chosen[REMOTE] < 810  # 750, within 4.4 standard deviations


@pytest.mark.parametrize(
    ("packet", "reason"),
    [
        (syn((CLIENT, LOCAL)), "forwarding_loop"),
        (with_ttl(syn(), 1), "time_to_live"),
        (with_ttl(syn(), 0), "time_to_live"),
        (syn((CLIENT, *range(0x0B000001, 0x0B000014))), "source_full"),
    ],
    ids=["loop", "ttl 1", "ttl 0", "20 addresses"],
)
def test_refused(packet: bytes, reason: str) -> None:
    host = router(REMOTE)
    assert forwarded(host, packet) is None
    assert host.dropped(reason) == 1
    assert host.sal.counters["packets_forwarded"] == 0


def test_nineteen_addresses_become_twenty() -> None:
    sent = forwarded(router(REMOTE), syn((CLIENT, *range(0x0B000001, 0x0B000013))))
    assert sent is not None
    assert len(sent.sal.source_addresses) == 20


def test_header_without_room_is_refused() -> None:
    padded = sal.emit(SalPacket(5, 0, sal.PROTOCOL_UDP, None, (SERVICE_ID, SOURCE_SERVICE), (), b""))
    header = bytearray(padded + bytes(8))  # 8 times PAD: ten extensions
    header[8] += 2
    header[10:12] = bytes(2)
    header[10:12] = checksum_of_sum(int.from_bytes(header, "big")).to_bytes(2, "big")
    host = router(REMOTE)
    assert forwarded(host, ipv4.emit(CLIENT, LOCAL, sal.PROTOCOL_SAL, bytes(header))) is None
    assert host.dropped("sal_header_full") == 1


def test_source_is_extended_where_it_stands() -> None:
    """SOURCE first, then SERVICE, then padding: any order is allowed, and reserved bits stay as they are."""
    source = b"\x4f\x0c\xaa\xbb" + CLIENT.to_bytes(4, "big") + OTHER.to_bytes(4, "big")
    rest = b"\x2c\x24\xcc\xdd" + SERVICE_ID + bytes(4)
    base = bytes(8) + bytes((3 + len(source + rest) // 4, 6, 0, 0))
    header = bytearray(base + source + rest)
    header[10:12] = checksum_of_sum(int.from_bytes(header, "big")).to_bytes(2, "big")
    longer = sal.append_source(bytes(header), CLIENT, LOCAL)
    assert longer[12:] == b"\x4f\x10" + source[2:] + LOCAL.to_bytes(4, "big") + rest
    assert sal.parse(longer).source_addresses == (CLIENT, OTHER, LOCAL)


@pytest.mark.parametrize(
    "target", [LOCAL, CLIENT, OTHER, parse_address("10.0.0.255"), parse_address("127.0.0.1")]
)
def test_target_that_cannot_be_meant_is_never_chosen(target: int) -> None:
    """This host, the client, an earlier router, a broadcast address: each loses against the only other one."""
    host = LoneHost(FORWARDING)
    host.table.add(Rule.forward(SERVICE, target, priority=9))
    assert forwarded(host, syn((CLIENT, OTHER))) is None
    assert host.sal.counters["forwarding_without_target"] == 1
    assert host.dropped("no_listener") == 1
    host.table.add(Rule.forward(SERVICE, REMOTE, priority=1))
    sent = forwarded(host, syn((CLIENT, OTHER)))
    assert sent is not None
    assert sent.destination == REMOTE


def test_unreachable_target_gives_way_to_another() -> None:
    host = LoneHost(FORWARDING)
    host.table.add(Rule.forward(SERVICE, OTHER, priority=9, interface_index=99))
    host.table.add(Rule.forward(SERVICE, REMOTE))
    sent = forwarded(host, syn())
    assert sent is not None
    assert sent.destination == REMOTE


def test_broadcast_is_never_forwarded() -> None:
    host = router(REMOTE)
    assert forwarded(host, syn(), broadcast=True) is None
    assert host.dropped("no_listener") == 1


def test_default_broadcast_rule_is_not_for_others() -> None:
    host = LoneHost(FORWARDING)
    host.table.replace_broadcast_rules([Rule.broadcast_on(parse_address("10.0.0.255"), WIRE_INDEX)])
    assert forwarded(host, syn()) is None
    assert host.dropped("no_listener") == 1


def test_off_by_default() -> None:
    host = LoneHost()
    host.forward(REMOTE)
    assert forwarded(host, syn()) is None
    host.sal.forwarding.enabled = True
    assert forwarded(host, syn()) is not None
    host.sal.forwarding.enabled = False
    assert forwarded(host, syn()) is None


def test_own_listener_comes_before_lower_priority() -> None:
    host = router(REMOTE)
    host.listen()
    sent = forwarded(host, syn())
    assert sent is not None
    assert sent.control.flags == sal.SYN | sal.ACK


def test_syn_that_is_being_answered_here_stays_here() -> None:
    """Its repetition is not sent to another instance, though rules may have changed meanwhile."""
    host = LoneHost(FORWARDING)
    host.listen()
    first = forwarded(host, syn())
    host.table.add(Rule.forward(SERVICE, REMOTE, priority=0xFFFFFFFF))
    second = forwarded(host, syn())
    assert first is not None
    assert second is not None
    assert (second.destination, second.sal) == (first.destination, first.sal)


def test_drop_rule_drops() -> None:
    host = LoneHost(FORWARDING)
    host.table.add(Rule.drop(SERVICE))
    assert forwarded(host, syn()) is None
    assert host.dropped("drop_rule") == 1


def test_nobody_knows_the_service() -> None:
    """A SYN is ignored, a datagram answered with an RST, as without forwarding (SPEC 3.9)."""
    host = LoneHost(FORWARDING)
    assert forwarded(host, syn()) is None
    reset = forwarded(host, datagram())
    assert reset is not None
    assert (reset.destination, reset.control.flags & sal.RST) == (CLIENT, sal.RST)


def test_handshake_ack_that_comes_through_the_router_goes_on() -> None:
    """A client that keeps to the router's address, where a prototype adopts the server's."""
    control = Control(sal.ACK, 8, 9, b"any nonc")
    packet = SalPacket(5, 6, sal.PROTOCOL_TCP, control, (SERVICE_ID,), (), b"")
    host = router(REMOTE)
    sent = forwarded(host, ipv4.emit(CLIENT, LOCAL, sal.PROTOCOL_SAL, sal.emit(packet)))
    assert sent is not None
    assert sent.sal == packet._replace(source_addresses=(CLIENT, LOCAL))


def test_data_of_unknown_flows_is_not_forwarded() -> None:
    host = router(REMOTE)
    packet = ipv4.emit(CLIENT, LOCAL, sal.PROTOCOL_SAL, sal.data_header(5, 6) + bytes(20))
    assert forwarded(host, packet) is None
    assert host.dropped("unknown_flow") == 1


def test_own_syn_is_not_forwarded() -> None:
    """What this host's own client sends to its own listener."""
    host = router(REMOTE)
    assert forwarded(host, syn(source=LOCAL)) is None
    assert host.dropped("no_listener") == 1


def test_full_request_queue_does_not_stop_forwarding() -> None:
    host = LoneHost(SalSettings(forwarding=True, request_queue_limit=0))
    host.forward(REMOTE)
    assert forwarded(host, syn()) is not None


def test_header_fields_survive() -> None:
    packet = datagram(ttl=7, identification=0x1234, tos=0xB8)
    ip = ipv4.parse(packet)
    onward = ipv4.parse(rewrite(ip, sal.parse(ip.payload), REMOTE))
    assert (onward.ttl, onward.identification, onward.tos) == (6, 0x1234, 0xB8)


def chain(network: MemoryNetwork, *addresses: str) -> list[MemoryHost]:
    """Hosts that each know only the next one."""
    hosts = [network.add_host(parse_address(address), FORWARDING) for address in addresses]
    for host, following in pairwise(hosts):
        host.table.add(Rule.forward(SERVICE, following.address))
    return hosts


def test_connection_through_two_routers_is_direct_after_the_syn() -> None:
    network = MemoryNetwork(seed=3)
    network.captured = []
    client, *routers, server = chain(network, "10.0.0.1", "10.0.0.11", "10.0.0.12", "10.0.0.2")
    server.sal.listen(SERVICE, 16, network.now)
    exchange = Exchange(network, client, server)
    exchange.start()
    network.run(until=network.now + 5, done=exchange.complete)
    assert exchange.complete()
    (flow,) = client.sal.flows()
    assert flow["peer_address"] == format_address(server.address)
    assert [each.sal.counters["packets_forwarded"] for each in routers] == [1, 1]
    to_routers = [
        packet
        for packet in network.captured
        if ipv4.parse(packet).destination in {each.address for each in routers}
    ]
    assert len(to_routers) == 2
    syn_ack = sal.parse(ipv4.parse(network.captured[3]).payload)
    assert syn_ack.source_addresses == (client.address, *(each.address for each in routers), server.address)


def test_routers_that_point_at_each_other_end_the_loop() -> None:
    network = MemoryNetwork(seed=4)
    client, first, second = chain(network, "10.0.0.1", "10.0.0.11", "10.0.0.12")
    second.table.add(Rule.forward(SERVICE, first.address))
    client.sal.connect(SERVICE_ID, network.now)
    client.settle()
    network.run(until=network.now + 0.1)
    assert first.sal.counters["packets_forwarded"] == 1
    assert second.sal.counters["packets_forwarded"] == 0
    assert second.sal.counters["forwarding_without_target"] == 1


def delaying() -> LoneHost:
    host = LoneHost(FORWARDING)
    host.table.add(Rule.delay(SERVICE))
    return host


def known_now(host: LoneHost) -> int:
    """Somebody has said where the service is."""
    host.table.remove_rule(SERVICE, RuleType.DELAY)
    host.forward(REMOTE)
    return host.sal.release_delayed(SERVICE, host.now)


def test_delayed_packets_go_on_when_the_service_is_known() -> None:
    """A SYN that is repeated while it waits goes on once, each datagram for itself."""
    host = delaying()
    for packet in (syn(), syn(), datagram(b"one"), datagram(b"two")):
        assert forwarded(host, packet) is None
    assert host.dropped("repeated_while_delayed") == 1
    assert known_now(host) == 3
    assert [packet.destination for packet in host.packets()] == [REMOTE] * 3
    assert host.sal.counters["packets_forwarded"] == 3


def test_delayed_syn_is_answered_here_when_a_listener_has_come() -> None:
    host = delaying()
    assert forwarded(host, syn()) is None
    host.table.remove_rule(SERVICE, RuleType.DELAY)
    host.listen()
    assert host.sal.release_delayed(SERVICE, host.now) == 1
    assert host.only_packet().control.flags == sal.SYN | sal.ACK


def test_delayed_packets_that_nobody_can_place_are_dropped() -> None:
    """By a verdict, by their age, or since the release found another DELAY rule; a SYN may wait again afterwards."""
    host = delaying()
    forwarded(host, syn())
    assert host.sal.drop_delayed(SERVICE, host.now, "nobody knows") == 1
    assert host.dropped("delayed") == 1
    forwarded(host, syn())
    host.advance(60)
    assert host.dropped("delayed") == 2
    forwarded(host, syn())
    assert host.sal.release_delayed(SERVICE, host.now) == 1
    assert host.dropped("delayed") == 3
    assert host.packets() == []
