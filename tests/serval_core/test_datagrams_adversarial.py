"""What can somebody do to datagrams who sends whatever they like? Broken ones, spoofed ones, and a peer gone mad."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serval_core.effects import (
    DeliverDatagram,
    DeliverFlowDatagram,
    Effect,
    ForgetExpected,
    OpenDatagrams,
)
from serval_core.names import FlowID, parse_service
from serval_core.sal import SalSettings
from serval_core.wire import ipv4, sal, udp
from serval_core.wire.sal import (
    ACK,
    FIN,
    PROTOCOL_SAL,
    PROTOCOL_UDP,
    RST,
    RSYN,
    SYN,
    Control,
    SalPacket,
)
from serval_core.wire.udp import UdpDatagram
from tests.serval_core.lone_host import LOCAL, OTHER, REMOTE, SERVICE, SERVICE_ID, LoneHost, Sent, drops
from tests.serval_core.mad_conversations import REQUEST_QUEUE_LIMIT, EffectOrder, converse
from tests.serval_core.wire.strategies import keys, proofs

ENDPOINT = parse_service("700")
EMPTY = udp.emit(UdpDatagram(0, 0, b""), REMOTE, LOCAL)
numbers = st.integers(0, 0xFFFFFFFF)


def host_with_both(seed: int = 1, settings: SalSettings | None = None) -> LoneHost:
    """One that listens for flows and has an endpoint."""
    host = LoneHost(settings, seed)
    host.sal.listen(SERVICE, 2, host.now, PROTOCOL_UDP)
    host.sal.bind_datagrams(ENDPOINT)
    return host


def unconnected(payload: bytes = b"payload of it") -> bytes:
    services = ENDPOINT.service_id, SERVICE_ID
    transport = udp.emit(UdpDatagram(0, 0, payload), REMOTE, LOCAL)
    packet = SalPacket(6, 0, PROTOCOL_UDP, None, services, (), transport)
    return ipv4.emit(REMOTE, LOCAL, PROTOCOL_SAL, sal.emit(packet))


def test_no_single_bit_of_a_datagram_may_be_wrong() -> None:
    host = host_with_both()
    packet = unconnected()
    for bit in range(len(packet) * 8):
        broken = bytearray(packet)
        broken[bit // 8] ^= 1 << bit % 8
        host.receive(bytes(broken))
    assert drops(host) == len(packet) * 8
    assert host.news(DeliverDatagram) == []
    host.receive(packet)
    assert len(host.news(DeliverDatagram)) == 1


def test_no_byte_of_a_datagram_may_be_missing() -> None:
    host = host_with_both()
    packet = unconnected()
    for size in range(len(packet)):
        host.receive(packet[:size])
        if size > 20:
            host.receive(ipv4.emit(REMOTE, LOCAL, PROTOCOL_SAL, packet[20:size]))
    assert host.news(DeliverDatagram) == []


well_formed = st.builds(
    SalPacket,
    numbers,
    st.just(0) | numbers,
    st.sampled_from((sal.PROTOCOL_TCP, PROTOCOL_UDP, 0, 255)),
    st.none() | st.builds(Control, st.integers(0, 255), numbers, numbers, st.binary(min_size=8, max_size=8)),
    st.lists(st.sampled_from((SERVICE_ID, ENDPOINT.service_id)), max_size=2).map(tuple),
    st.just(()) | st.lists(numbers, min_size=2, max_size=20).map(tuple),
    st.binary(max_size=40) | st.just(EMPTY),
    keys,
    proofs,
)


@given(st.lists(st.tuples(well_formed, numbers, st.booleans()), max_size=10))
def test_well_formed_nonsense_delivers_nothing(packets: list[tuple[SalPacket, int, bool]]) -> None:
    host = host_with_both()
    for packet, source, broadcast in packets:
        host.receive(ipv4.emit(source, LOCAL, PROTOCOL_SAL, sal.emit(packet)), broadcast)
    assert host.news(DeliverFlowDatagram) == []
    assert host.news(OpenDatagrams) == []
    # A random transport part may by chance be a datagram without a checksum, and that is one.
    for each in host.news(DeliverDatagram):
        assert each.datagram.destination_service == ENDPOINT.service_id


class Order(EffectOrder):
    """The effects of UDP flows."""

    def check_transport(self, effect: Effect) -> None:
        if isinstance(effect, OpenDatagrams):
            assert effect.flow_id not in self.open | self.reported
            self.expected.add(effect.flow_id)
            self.open.add(effect.flow_id)
        elif isinstance(effect, ForgetExpected):
            self.expected.remove(effect.flow_id)
            self.open.discard(effect.flow_id)
        elif isinstance(effect, DeliverFlowDatagram):
            assert effect.flow_id in self.open & self.reported


class Knowing:
    """A peer that knows all numbers of its flow."""

    def __init__(self, flow_id: int) -> None:
        self.flow_id = flow_id
        self.nonce = b"peers.no"
        self.verno = 1000
        self.host_flow_id = 0
        self.host_nonce = bytes(8)
        self.host_verno = 0

    def learn(self, packet: SalPacket) -> None:
        assert packet.control is not None
        self.host_flow_id = packet.src_flow_id
        self.host_verno, self.host_nonce = packet.control.verno, packet.control.nonce

    def packet(self, control: Control | None, transport: bytes = b"", service: bool = False) -> bytes:
        services = (SERVICE_ID,) if service else ()
        packet = SalPacket(
            self.flow_id, self.host_flow_id, PROTOCOL_UDP, control, services, (), transport
        )
        return ipv4.emit(REMOTE, LOCAL, PROTOCOL_SAL, sal.emit(packet))


def mad_conversation(seed: int) -> None:
    """The peers use what they know at random, while our application does the same."""
    random = Random(seed)
    host, order = host_with_both(seed, SalSettings(request_queue_limit=REQUEST_QUEUE_LIMIT)), Order()
    peers = [Knowing(number) for number in (1, 2, 3)]
    flow_ids: list[FlowID] = []

    def near(number: int) -> int:
        return number + random.choice((-1, 0, 0, 0, 1, 2, 400)) & 0xFFFFFFFF

    def say() -> None:
        peer = random.choice(peers)
        flags = random.choice((ACK, FIN, FIN | ACK, RST, RST | ACK, RSYN, SYN | ACK, 0x10, 0))
        nonce = random.choice((peer.nonce, peer.nonce, peer.host_nonce, bytes(8)))
        wild = Control(flags, near(peer.verno + 1), near(peer.host_verno + 1), nonce)
        acknowledging = peer.host_verno + 1 & 0xFFFFFFFF
        data = udp.emit(UdpDatagram(0, 0, b"data"), REMOTE, LOCAL)
        host.receive(
            random.choice(
                (
                    peer.packet(wild, random.choice((b"", EMPTY, data))),
                    peer.packet(Control(SYN, peer.verno, 0, peer.nonce), EMPTY, service=True),
                    peer.packet(Control(SYN | ACK, peer.verno, acknowledging, peer.nonce), EMPTY),
                    peer.packet(Control(ACK, peer.verno + 1, acknowledging, peer.nonce), EMPTY, service=True),
                    peer.packet(Control(FIN, peer.verno + 1, acknowledging, peer.nonce)),
                    peer.packet(None, data),
                    peer.packet(None, data),
                    unconnected(),
                )
            )
        )

    def act() -> None:
        if random.random() < 0.3:
            flow_ids.append(
                host.sal.connect(SERVICE_ID, host.now, random.choice((REMOTE, OTHER)), PROTOCOL_UDP)
            )
            return
        if order.reported:
            flow_id = random.choice(sorted(order.reported))
            call = random.choice((host.sal.release, host.sal.abort, None, None))
            if call is None:
                host.sal.send_on_flow(flow_id, b"data")
            else:
                call(flow_id, host.now)

    def learn(sent: Sent) -> None:
        random.choice(peers).learn(sent.sal)

    converse(host, random, order, say, act, learn, flow_ids)


@pytest.mark.parametrize("first_seed", range(0, 500, 100))
def test_mad_peers_and_a_mad_application_break_nothing(first_seed: int) -> None:
    for seed in range(first_seed, first_seed + 100):
        mad_conversation(seed)
