"""Does connected Serval UDP open, carry datagrams, and end however it has to?"""

from __future__ import annotations

from collections.abc import Sequence
from errno import ECONNABORTED, ECONNREFUSED, ECONNRESET, EINVAL, EMSGSIZE, EPIPE, ETIMEDOUT

import pytest

from serval_core.connected_datagrams import FLOW_PAYLOAD_BYTES_MAX
from serval_core.dataplane.memory_network import Faults, MemoryHost, MemoryNetwork
from serval_core.effects import (
    Accepted,
    ConnectFailed,
    DeliverFlowDatagram,
    EndOfStream,
    FlowEnded,
    ForgetExpected,
    OpenDatagrams,
    OpenTransport,
    SendPacket,
)
from serval_core.names import FlowID
from serval_core.rules import Rule
from serval_core.sal import SalSettings
from serval_core.unconnected import PayloadSize
from serval_core.wire import ipv4, sal, udp
from serval_core.wire.sal import (
    ACK,
    FIN,
    PROTOCOL_SAL,
    PROTOCOL_TCP,
    PROTOCOL_UDP,
    RST,
    SYN,
    Control,
    SalPacket,
    emit_control,
)
from serval_core.wire.udp import UdpDatagram
from tests.serval_core.exchanges import leftovers
from tests.serval_core.lone_host import LOCAL, REMOTE, SERVICE, SERVICE_ID, LoneHost


class UdpPeer:
    """The other end of one UDP flow, at REMOTE."""

    def __init__(self) -> None:
        self.flow_id, self.nonce, self.verno = 3, b"udpnonce", 0xFFFFFFFF
        self.host_flow_id = 0
        self.host_verno = 0

    def learn(self, packet: SalPacket) -> None:
        assert packet.control is not None
        self.host_flow_id, self.host_verno = packet.src_flow_id, packet.control.verno

    def control(self, flags: int, after_syn: int = 1, transport: bytes = b"", service: bool = False) -> bytes:
        verno = self.verno + after_syn & 0xFFFFFFFF
        acknowledges = 0 if flags == SYN else self.host_verno + 1 & 0xFFFFFFFF
        payload = emit_control(
            self.flow_id,
            self.host_flow_id,
            PROTOCOL_UDP,
            flags,
            verno,
            acknowledges,
            self.nonce,
            SERVICE_ID if service else None,
            (),
            transport,
        )
        return ipv4.emit(REMOTE, LOCAL, PROTOCOL_SAL, payload)

    def datagram(
        self, payload: bytes = b"data", protocol: int = PROTOCOL_UDP, flow_id: int = 0, damage: int = 0
    ) -> bytes:
        transport = udp.emit(UdpDatagram(0, 0, payload), REMOTE, LOCAL)
        transport = transport[:6] + bytes((transport[6] ^ damage,)) + transport[7:]
        packet = SalPacket(flow_id or self.flow_id, self.host_flow_id, protocol, None, (), (), transport)
        return ipv4.emit(REMOTE, LOCAL, PROTOCOL_SAL, sal.emit(packet))


EMPTY = udp.emit(UdpDatagram(0, 0, b""), REMOTE, LOCAL)


def half_open(settings: SalSettings | None = None) -> tuple[LoneHost, UdpPeer]:
    host, peer = LoneHost(settings), UdpPeer()
    host.sal.listen(SERVICE, 16, host.now, PROTOCOL_UDP)
    host.receive(peer.control(SYN, 0, EMPTY, service=True))
    peer.learn(host.only_packet().sal)
    return host, peer


def accepted(settings: SalSettings | None = None) -> tuple[LoneHost, UdpPeer, FlowID]:
    host, peer = half_open(settings)
    host.receive(peer.control(ACK, transport=EMPTY, service=True))
    assert host.states() == ["CONNECTED"]
    host.effects()
    return host, peer, FlowID(peer.host_flow_id)


def connected() -> tuple[LoneHost, UdpPeer, FlowID]:
    host, peer = LoneHost(), UdpPeer()
    host.forward(REMOTE)
    flow_id = host.sal.connect(SERVICE_ID, host.now, protocol=PROTOCOL_UDP)
    peer.learn(host.only_packet().sal)
    host.receive(peer.control(SYN | ACK, 0, EMPTY))
    assert host.states() == ["CONNECTED"]
    host.effects()
    return host, peer, flow_id


def payloads(host: LoneHost) -> list[bytes]:
    return [each.payload for each in host.news(DeliverFlowDatagram)]


@pytest.mark.parametrize("open_flow", [accepted, connected], ids=["accepted", "connected"])
class TestOpenFlow:
    """What holds for both ends."""

    def test_no_kernel_socket_is_opened(self, open_flow: object) -> None:
        host, _, flow_id = _opened(open_flow)
        assert [each.flow_id for each in host.news(OpenDatagrams)] == [flow_id]
        assert host.news(OpenTransport) == []

    def test_the_fin_goes_at_once(self, open_flow: object) -> None:
        host, peer, flow_id = _opened(open_flow)
        host.sal.release(flow_id, host.now)
        assert host.only_packet().control.flags == FIN
        assert host.sal.send_on_flow(flow_id, b"late") == EPIPE
        host.receive(peer.datagram())
        assert host.dropped("datagram_after_close") == 1
        assert payloads(host) == []

    def test_the_peers_fin_leaves_our_direction_open(self, open_flow: object) -> None:
        host, peer, flow_id = _opened(open_flow)
        host.receive(peer.control(FIN))
        assert host.only_packet().control.flags == ACK
        assert host.news(EndOfStream) == [EndOfStream(flow_id)]
        assert host.sal.send_on_flow(flow_id, b"last words") == 0
        host.effects()
        host.sal.release(flow_id, host.now)
        assert host.only_packet().control.flags == FIN
        assert host.states() == ["LASTACK"]

    def test_an_rst_ends_it(self, open_flow: object) -> None:
        host, peer, flow_id = _opened(open_flow)
        host.receive(peer.control(RST | ACK))
        assert host.news(FlowEnded) == [FlowEnded(flow_id, ECONNRESET)]
        assert host.news(ForgetExpected) == [ForgetExpected(flow_id)]
        assert host.sal.send_on_flow(flow_id, b"x") == EPIPE

    def test_abort_sends_an_rst(self, open_flow: object) -> None:
        host, _, flow_id = _opened(open_flow)
        host.sal.abort(flow_id, host.now)
        assert host.only_packet().control.flags == RST | ACK
        assert host.news(FlowEnded) == [FlowEnded(flow_id, ECONNABORTED)]
        assert host.news(ForgetExpected) == [ForgetExpected(flow_id)]

    def test_bad_datagrams_are_counted_and_dropped(self, open_flow: object) -> None:
        host, peer, _ = _opened(open_flow)
        for packet, reason in (
            (peer.datagram(b""), "datagram_empty"),
            (peer.datagram(protocol=PROTOCOL_TCP), "wrong_protocol"),
            (peer.datagram(flow_id=99), "wrong_peer_flow"),
            (peer.datagram(damage=1), "udp_checksum"),
        ):
            host.receive(packet)
            assert host.dropped(reason) == 1
        assert payloads(host) == []
        assert host.packets() == []

    def test_sizes_that_no_datagram_has(self, open_flow: object) -> None:
        host, _, flow_id = _opened(open_flow)
        for size, errno in ((0, EINVAL), (FLOW_PAYLOAD_BYTES_MAX + 1, EMSGSIZE)):
            with pytest.raises(PayloadSize) as mistake:
                host.sal.send_on_flow(flow_id, bytes(size))
            assert mistake.value.errno == errno
        assert host.sal.send_on_flow(flow_id, bytes(FLOW_PAYLOAD_BYTES_MAX)) == 0
        packets = [each.packet for each in host.effects() if isinstance(each, SendPacket)]
        assert len(packets) > 40
        assert max(map(len, packets)) <= 1500

    def test_flows_are_listed_with_their_counters(self, open_flow: object) -> None:
        host, peer, flow_id = _opened(open_flow)
        host.sal.send_on_flow(flow_id, b"1234")
        host.receive(peer.datagram(b"12345678"))
        (listed,) = host.sal.flows()
        overhead = 20 + 12 + 8
        assert listed["protocol"] == "UDP"
        assert (listed["packets_out"], listed["bytes_out"]) == (1, overhead + 4)
        assert (listed["packets_in"], listed["bytes_in"]) == (1, overhead + 8)


def _opened(open_flow: object) -> tuple[LoneHost, UdpPeer, FlowID]:
    assert callable(open_flow)
    host, peer, flow_id = open_flow()
    return host, peer, flow_id


def test_data_completes_the_handshake() -> None:
    host, peer = half_open()
    host.receive(peer.datagram(b"overtakes the ACK"))
    kinds = [type(each) for each in host.effects()]
    assert kinds == [OpenDatagrams, Accepted, DeliverFlowDatagram]
    host.receive(peer.control(ACK, transport=EMPTY, service=True))
    assert payloads(host) == [b"overtakes the ACK"]


def test_damaged_data_completes_no_handshake() -> None:
    host, peer = half_open()
    host.receive(peer.datagram(damage=1))
    host.receive(peer.datagram(b""))
    assert host.states() == ["RESPOND"]


def test_a_bare_ack_completes_the_handshake() -> None:
    host, peer = half_open()
    host.receive(peer.control(ACK))
    assert host.states() == ["CONNECTED"]


def test_half_open_flows_expire() -> None:
    """In the prototype, UDP listeners keep them for ever (SPEC 11.1, quirk 13)."""
    host, _ = half_open()
    host.advance(10.0)
    assert host.states() == []
    assert host.sal._core.flows.half_open == 0


def test_the_handshake_ack_is_repeated_until_the_peer_answers() -> None:
    host, peer, _ = connected()
    (again,) = host.advance(0.3)
    assert again[1].control.flags == ACK
    assert again[1].sal.services == (SERVICE_ID,)
    host.receive(peer.datagram())
    assert host.advance(5.0) == []


@pytest.mark.parametrize(("listening", "asking"), [(PROTOCOL_TCP, PROTOCOL_UDP), (PROTOCOL_UDP, PROTOCOL_TCP)])
def test_a_listener_of_the_other_protocol_does_not_answer(listening: int, asking: int) -> None:
    network = MemoryNetwork(3)
    client, server = network.add_host(LOCAL, SalSettings(connect_timeout_s=2.0)), network.add_host(REMOTE)
    client.table.add(Rule.forward(SERVICE, REMOTE))
    server.sal.listen(SERVICE, 16, network.now, listening)
    flow_id = client.sal.connect(SERVICE_ID, network.now, protocol=asking)
    client.settle()
    network.run()
    assert client.failed[flow_id].errno == ETIMEDOUT
    assert server.sal.counters["dropped_wrong_protocol"] > 1


def test_a_tcp_syn_ack_does_not_open_a_udp_flow() -> None:
    host, peer = LoneHost(), UdpPeer()
    host.forward(REMOTE)
    host.sal.connect(SERVICE_ID, host.now, protocol=PROTOCOL_UDP)
    peer.learn(host.only_packet().sal)
    packet = ipv4.parse(peer.control(SYN | ACK, 0, EMPTY))
    changed = sal.parse(packet.payload)._replace(protocol=PROTOCOL_TCP)
    host.receive(ipv4.emit(REMOTE, LOCAL, PROTOCOL_SAL, sal.emit(changed)))
    assert host.dropped("wrong_protocol") == 1
    assert host.states() == ["REQUEST"]


def test_a_refused_connect_fails() -> None:
    host, peer = LoneHost(), UdpPeer()
    host.forward(REMOTE)
    flow_id = host.sal.connect(SERVICE_ID, host.now, protocol=PROTOCOL_UDP)
    sent = host.only_packet()
    refusal = Control(RST | ACK, 0, sent.control.verno + 1 & 0xFFFFFFFF, sent.control.nonce)
    packet = SalPacket(0, sent.sal.src_flow_id, PROTOCOL_UDP, refusal, (), (), b"")
    host.receive(ipv4.emit(REMOTE, LOCAL, PROTOCOL_SAL, sal.emit(packet)))
    assert [(each.flow_id, each.errno) for each in host.news(ConnectFailed)] == [(flow_id, ECONNREFUSED)]
    assert peer.host_flow_id == 0


def test_closing_a_listener_leaves_its_flows_alone() -> None:
    host, peer, flow_id = accepted()
    host.sal.accepted_taken(flow_id)
    host.sal.close_listener(1, host.now)
    host.receive(peer.datagram())
    assert payloads(host) == [b"data"]


def conversation(faults: Faults, seed: int) -> tuple[MemoryNetwork, MemoryHost, MemoryHost, list[bytes]]:
    """A client sends until it has seen an answer to everything; both close."""
    network = MemoryNetwork(seed, faults)
    client, server = network.add_host(LOCAL), network.add_host(REMOTE)
    client.table.add(Rule.forward(SERVICE, REMOTE))
    server.sal.listen(SERVICE, 16, network.now, PROTOCOL_UDP)
    flow_id = client.sal.connect(SERVICE_ID, network.now, protocol=PROTOCOL_UDP)
    client.settle()
    network.run(network.now + 30, lambda: bool(client.connected))
    sent = [b"%d" % number for number in range(20)]
    for payload in sent * 10:
        client.sal.send_on_flow(flow_id, payload)
        client.settle()
        network.run(network.now + 0.05)
    client.sal.release(flow_id, network.now)
    client.settle()
    network.run(network.now + 30, lambda: bool(server.closed_by_peer))
    for answering in server.closed_by_peer:
        server.sal.release(answering, network.now)
    server.settle()
    network.run()
    return network, client, server, sent


def nothing_is_left(hosts: Sequence[MemoryHost]) -> None:
    for host in hosts:
        assert not any(leftovers(host).values()), leftovers(host)


@pytest.mark.parametrize("seed", range(8))
def test_on_a_bad_network_flows_open_carry_and_close(seed: int) -> None:
    _, client, server, sent = conversation(Faults(loss=0.2, duplication=0.1, reordering=0.2), seed)
    (received,) = server.flow_datagrams.values()
    assert set(received) == set(sent)
    assert list(client.ended.values()) == [0]
    assert list(server.ended.values()) == [0]
    nothing_is_left((client, server))


def test_on_a_good_network_everything_arrives_in_order() -> None:
    _, client, server, sent = conversation(Faults(jitter_s=0.0), 1)
    assert list(server.flow_datagrams.values()) == [sent * 10]
    nothing_is_left((client, server))


def test_both_ends_on_one_host() -> None:
    network = MemoryNetwork(1)
    host = network.add_host(LOCAL)
    host.sal.listen(SERVICE, 16, network.now, PROTOCOL_UDP)
    near = host.sal.connect(SERVICE_ID, network.now, protocol=PROTOCOL_UDP)
    host.settle()
    network.run(network.now + 1)
    (far,) = host.accepted
    for flow_id in (near, far):
        host.sal.send_on_flow(flow_id, b"from %d" % flow_id)
    host.settle()
    network.run(network.now + 1)
    assert host.flow_datagrams == {near: [b"from %d" % far], far: [b"from %d" % near]}
    for flow_id in (near, far):
        host.sal.release(flow_id, network.now)
    host.settle()
    network.run()
    nothing_is_left((host,))


def test_no_flipped_bit_gets_through() -> None:
    host, peer, _ = accepted()
    whole = peer.datagram(b"a datagram of some length")
    for bit in range(20 * 8, len(whole) * 8):
        packet = bytearray(whole)
        packet[bit // 8] ^= 1 << bit % 8
        host.receive(ipv4.emit(REMOTE, LOCAL, PROTOCOL_SAL, bytes(packet[20:])))
    assert payloads(host) == []
    assert host.states() == ["CONNECTED"]
    host.receive(whole)
    assert payloads(host) == [b"a datagram of some length"]
