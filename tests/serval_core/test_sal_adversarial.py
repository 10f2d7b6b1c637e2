"""What can somebody do who sends whatever they like? Broken packets, spoofed ones, and a peer gone mad."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serval_core.dataplane.memory_network import Faults, MemoryNetwork
from serval_core.effects import (
    CloseTransport,
    Effect,
    ForgetExpected,
    OpenTransport,
    ResetTransport,
)
from serval_core.names import FlowID
from serval_core.sal import SalSettings
from serval_core.wire import ipv4, sal
from serval_core.wire.sal import ACK, FIN, RST, RSYN, SYN, Control, SalPacket
from tests.serval_core.exchanges import Exchange, leftovers, two_hosts
from tests.serval_core.lone_host import (
    LOCAL,
    OTHER,
    OUR_OPTIONS,
    REMOTE,
    SERVICE_ID,
    LoneHost,
    Peer,
    Sent,
    accepted_host,
    connected_host,
    drops,
)
from tests.serval_core.mad_conversations import REQUEST_QUEUE_LIMIT, EffectOrder, converse
from tests.serval_core.wire.strategies import keys, proofs

numbers = st.integers(0, 0xFFFFFFFF)
flag_bytes = st.integers(0, 0xFF)


def listening_host() -> LoneHost:
    host = LoneHost()
    host.listen()
    return host


def test_no_single_bit_of_a_syn_may_be_wrong() -> None:
    host = listening_host()
    packet = Peer(options=OUR_OPTIONS).syn()
    for bit in range(len(packet) * 8):
        broken = bytearray(packet)
        broken[bit // 8] ^= 128 >> bit % 8
        host.receive(bytes(broken))
    assert host.effects() == []
    assert host.sal.flows() == []
    assert drops(host) == len(packet) * 8


def test_no_byte_of_a_syn_may_be_missing() -> None:
    host = listening_host()
    packet = Peer(options=OUR_OPTIONS).syn()
    for length in range(len(packet)):
        host.receive(packet[:length])
    assert host.effects() == []
    assert host.sal.flows() == []
    assert drops(host) == len(packet)


def test_a_shortened_syn_with_right_ip_and_sal_checksums_makes_no_flow() -> None:
    host = listening_host()
    payload = ipv4.parse(Peer(options=OUR_OPTIONS).syn()).payload
    for length in range(68, len(payload)):
        host.receive(ipv4.emit(REMOTE, LOCAL, sal.PROTOCOL_SAL, payload[:length]))
    assert host.sal.flows() == []
    assert drops(host) == len(payload) - 68


def test_a_fragment_is_not_taken_for_a_packet() -> None:
    host = listening_host()
    payload = ipv4.parse(Peer().syn()).payload
    for field in (0x2000, 0x0001, 0x2001):
        host.receive(ipv4.emit(REMOTE, LOCAL, sal.PROTOCOL_SAL, payload, flags_fragment=field))
    assert host.dropped("fragment") == 3
    assert host.effects() == []


@given(st.binary(max_size=200))
def test_noise_is_counted(noise: bytes) -> None:
    host = listening_host()
    host.receive(noise)
    host.receive(ipv4.emit(REMOTE, LOCAL, sal.PROTOCOL_SAL, noise))
    assert drops(host) == 2
    assert host.effects() == []


well_formed = st.builds(
    SalPacket,
    numbers,
    numbers,
    st.sampled_from((sal.PROTOCOL_TCP, sal.PROTOCOL_UDP, 0, 255)),
    st.none() | st.builds(Control, flag_bytes, numbers, numbers, st.binary(min_size=8, max_size=8)),
    st.lists(st.just(SERVICE_ID), max_size=2).map(tuple),
    st.just(()) | st.lists(numbers, min_size=2, max_size=20).map(tuple),
    st.binary(max_size=40),
    keys,
    proofs,
)


@given(st.lists(st.tuples(well_formed, numbers, st.booleans()), max_size=10))
def test_well_formed_nonsense_opens_nothing(packets: list[tuple[SalPacket, int, bool]]) -> None:
    host = listening_host()
    for packet, source, broadcast in packets:
        host.receive(ipv4.emit(source, LOCAL, sal.PROTOCOL_SAL, sal.emit(packet)), broadcast)
    assert host.sal.flows() == []
    assert host.news(OpenTransport) == []
    assert drops(host) == len(packets)


def requesting() -> tuple[LoneHost, Peer, FlowID]:
    host, peer = LoneHost(), Peer()
    host.forward(REMOTE)
    flow_id = host.connect()
    peer.learn(host.only_packet())
    return host, peer, flow_id


def responding() -> tuple[LoneHost, Peer, FlowID]:
    host, peer = listening_host(), Peer()
    host.receive(peer.syn())
    peer.learn(host.only_packet())
    return host, peer, FlowID(peer.host_flow_id)


def closing_after(*steps: str) -> Callable[[], tuple[LoneHost, Peer, FlowID]]:
    def reach() -> tuple[LoneHost, Peer, FlowID]:
        host, peer, flow_id = connected_host()
        for step in steps:
            if step == "our FIN":
                host.sal.fin_acknowledged(flow_id, host.now)
            elif step == "ACK":
                host.receive(peer.control(ACK, ackno=peer.ackno + 1))
            else:
                host.receive(peer.control(FIN))
        host.effects()
        return host, peer, flow_id

    return reach


EVERY_STATE = {
    "REQUEST": requesting,
    "RESPOND": responding,
    "CONNECTED": connected_host,
    "CONNECTED, passive": accepted_host,
    "FINWAIT1": closing_after("our FIN"),
    "FINWAIT2": closing_after("our FIN", "ACK"),
    "CLOSEWAIT": closing_after("FIN"),
    "CLOSING": closing_after("our FIN", "FIN"),
    "LASTACK": closing_after("FIN", "our FIN"),
    "TIMEWAIT": closing_after("our FIN", "ACK", "FIN"),
}


@pytest.mark.parametrize("state", EVERY_STATE)
def test_whoever_lacks_the_nonce_changes_nothing(state: str) -> None:
    """The attacker knows both flowIDs and addresses, and may guess everything else but the nonces right."""
    host, peer, _ = EVERY_STATE[state]()
    assert host.states() == [state.partition(",")[0]]
    random = Random(state)
    for _ in range(2000):
        flags = random.choice((ACK, FIN, FIN | ACK, RST, RST | ACK, RSYN, RSYN | ACK, SYN | ACK, 0))
        verno = peer.verno + random.choice((-1, 0, 1, 2, 300))
        ackno = peer.ackno + random.choice((-1, 1, 2, 300))
        nonce = random.choice((random.randbytes(8), bytes(7) + b"\1"))
        packet = Control(flags, verno & 0xFFFFFFFF, ackno & 0xFFFFFFFF, nonce)
        host.receive(peer.packet(packet, random.choice((b"", peer.segment()))))
    assert host.effects() == []
    assert host.states() == [state.partition(",")[0]]
    assert drops(host) == 2000


@pytest.mark.parametrize("state", ["RESPOND", "CONNECTED", "CONNECTED, passive", "FINWAIT2"])
def test_data_needs_both_flow_ids(state: str) -> None:
    """Whoever guessed only the host's must not put bytes into the stream, not even with the right TCP numbers."""
    host, peer, _ = EVERY_STATE[state]()
    peer.flow_id ^= 1
    host.receive(peer.data())
    host.receive(peer.packet(None, peer.segment(b"named"), services=(SERVICE_ID,)))
    assert host.effects() == []
    assert host.states() == [state.partition(",")[0]]
    assert host.dropped("wrong_peer_flow") == 2


class Order(EffectOrder):
    """The effects of streams."""

    def check_transport(self, effect: Effect) -> None:
        if isinstance(effect, ForgetExpected):
            self.expected.remove(effect.flow_id)
        elif isinstance(effect, OpenTransport):
            assert effect.flow_id not in self.open | self.ended
            self.expected.discard(effect.flow_id)
            self.open.add(effect.flow_id)
        elif isinstance(effect, CloseTransport | ResetTransport):
            self.open.remove(effect.flow_id)


def mad_conversation(seed: int) -> None:
    """A peer that knows all numbers uses them at random, while our application does the same."""
    random = Random(seed)
    host = LoneHost(SalSettings(request_queue_limit=REQUEST_QUEUE_LIMIT), seed=seed)
    order = Order()
    host.listen(backlog=2)
    peers = [Peer(options=random.choice((OUR_OPTIONS, Peer().options)), flow_id=n) for n in (1, 2, 3)]
    flow_ids: list[FlowID] = []

    def near(number: int) -> int:
        return number + random.choice((-1, 0, 0, 0, 1, 2, 400)) & 0xFFFFFFFF

    def say() -> None:
        peer = random.choice(peers)
        flags = random.choice((ACK, FIN, FIN | ACK, RST, RST | ACK, RSYN, SYN | ACK, 0x10, 0))
        nonce = random.choice((peer.nonce, peer.nonce, peer.host_nonce or bytes(8), bytes(8)))
        control = peer.control(flags, near(peer.verno), near(peer.ackno), nonce)
        host.receive(
            random.choice(
                (
                    control,
                    control,
                    peer.syn(),
                    peer.syn_ack(),
                    peer.handshake_ack(),
                    peer.handshake_ack(bare=True),
                    peer.data(),
                )
            )
        )

    def act() -> None:
        if random.random() < 0.3:
            flow_ids.append(host.sal.connect(SERVICE_ID, host.now, random.choice((REMOTE, OTHER))))
            return
        if not order.reported:
            return
        flow_id = random.choice(sorted(order.reported))
        call = random.choice((host.sal.release, host.sal.abort, host.sal.fin_acknowledged))
        call(flow_id, host.now)

    def learn(sent: Sent) -> None:
        if sent.segment is not None:
            random.choice(peers).learn(sent)

    converse(host, random, order, say, act, learn, flow_ids)


@pytest.mark.parametrize("first_seed", range(0, 1000, 100))
def test_a_mad_peer_and_a_mad_application_break_nothing(first_seed: int) -> None:
    for seed in range(first_seed, first_seed + 100):
        mad_conversation(seed)


class Attacker:
    """Sees every packet, knows flowIDs, addresses and version numbers, and sends with nonces of its own.

    Only a forged SYN-ACK that overtakes the real one is beyond it: nothing could tell those two apart.
    """

    def __init__(self, network: MemoryNetwork, random: Random) -> None:
        self._network = network
        self._random = random
        network.captured = []

    def strike(self) -> None:
        captured = self._network.captured
        assert captured is not None
        if not captured:
            return
        ip = ipv4.parse(self._random.choice(captured))
        packet = sal.parse(ip.payload)
        target = self._network.hosts.get(ip.destination)
        if packet.control is None or target is None or packet.control.flags == SYN:
            return
        flags = self._random.choice((RST, RST | ACK, FIN, FIN | ACK, ACK, RSYN, SYN | ACK))
        if packet.control.flags == flags == SYN | ACK:
            return
        spoofed = packet._replace(
            control=packet.control._replace(flags=flags, nonce=self._random.randbytes(8)),
            services=(),
        )
        forged = ipv4.emit(ip.source, ip.destination, sal.PROTOCOL_SAL, sal.emit(spoofed))
        self._network.inject(target, forged)


@pytest.mark.parametrize("first_seed", range(0, 200, 50))
def test_connections_live_through_spoofed_control_packets(first_seed: int) -> None:
    for seed in range(first_seed, first_seed + 50):
        network, client, server = two_hosts(seed, Faults(loss=0.05, reordering=0.1))
        attacker = Attacker(network, Random(seed))
        exchange = Exchange(network, client, server)
        exchange.start()
        until = network.now
        for _ in range(200):
            attacker.strike()
            until += 0.005
            network.run(until)
        network.run()
        assert exchange.complete(), f"seed {seed}"
        assert set(client.ended.values()) == set(server.ended.values()) == {0}
        assert not any(leftovers(client).values())
        assert not any(leftovers(server).values())
