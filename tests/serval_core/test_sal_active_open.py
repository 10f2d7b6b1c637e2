"""Does a connect() reach an instance, whatever the table, the network and other instances do? (SPEC 3.5)"""

from __future__ import annotations

from collections.abc import Callable
from errno import ECONNABORTED, ECONNREFUSED, ETIMEDOUT

import pytest

from serval_core.dataplane.memory_network import WIRE_INDEX
from serval_core.effects import (
    CloseTransport,
    Connected,
    ConnectFailed,
    FlowEnded,
    OpenTransport,
    SendPacket,
)
from serval_core.names import FlowID, parse_address
from serval_core.sal import SalSettings
from serval_core.wire.sal import ACK, FIN, RST, SYN
from tests.serval_core.lone_host import (
    LOCAL,
    OTHER,
    OUR_OPTIONS,
    PROTOTYPE_OPTIONS,
    REMOTE,
    SERVICE_ID,
    LoneHost,
    Peer,
    connected_host,
    failure,
    requesting_host,
    times,
)


def test_a_syn_names_the_service_and_no_flow_of_the_peer() -> None:
    host = LoneHost()
    host.forward(REMOTE)
    flow_id = host.connect()
    syn = host.only_packet()
    assert (syn.source, syn.destination, syn.interface_index) == (LOCAL, REMOTE, WIRE_INDEX)
    assert (syn.sal.src_flow_id, syn.sal.dst_flow_id) == (flow_id, 0)
    assert syn.sal.services == (SERVICE_ID,)
    assert (syn.control.flags, syn.control.ackno) == (SYN, 0)
    assert any(syn.control.nonce)


def test_syn_ack_completes_and_effects_come_in_order() -> None:
    host, peer, flow_id = requesting_host()
    host.receive(peer.syn_ack())
    effects = host.effects()
    assert [type(each) for each in effects] == [OpenTransport, SendPacket, Connected]
    transport = effects[0]
    assert isinstance(transport, OpenTransport)
    assert (transport.flow_id, transport.peer_flow_id) == (flow_id, peer.flow_id)
    assert (transport.local_address, transport.peer_address) == (LOCAL, REMOTE)
    assert transport.interface_index == WIRE_INDEX
    assert effects[2] == Connected(flow_id)


def test_the_handshake_ack_is_as_a_prototype_wants_it() -> None:
    host, peer, flow_id = requesting_host()
    host.receive(peer.syn_ack())
    ack = host.only_packet()
    assert (ack.source, ack.destination) == (LOCAL, REMOTE)
    assert (ack.sal.src_flow_id, ack.sal.dst_flow_id) == (flow_id, peer.flow_id)
    assert ack.sal.services == (SERVICE_ID,)
    assert ack.control == (ACK, peer.host_verno + 1, peer.verno, peer.host_nonce)
    assert ack.segment is not None
    assert ack.segment.flags == 0x10
    assert ack.segment.sequence == peer.host_sequence + 1
    assert ack.segment.acknowledgement == peer.initial_sequence + 1


def test_an_unanswered_syn_is_repeated_with_identical_bytes() -> None:
    host = LoneHost()
    host.forward(REMOTE)
    host.connect()
    sent = host.advance(9.9)
    assert times(sent) == pytest.approx([0, 0.2, 0.6, 1.4, 3.0, 6.0, 9.0])
    assert len({packet.packet for _, packet in sent}) == 1


def test_connect_fails_with_etimedout_after_the_timeout() -> None:
    host, _, flow_id = requesting_host(SalSettings(connect_timeout_s=5.0))
    host.advance(4.99)
    assert not host.news(ConnectFailed)
    host.advance(0.02)
    failed = failure(host)
    assert (failed.flow_id, failed.errno) == (flow_id, ETIMEDOUT)
    assert "10.0.0.2" in failed.why


def test_the_first_timeout_follows_the_measured_round_trip() -> None:
    host, peer, _ = requesting_host()
    host.now += 0.15
    host.receive(peer.syn_ack())
    host.effects()
    host.connect()
    assert times(host.advance(1.5)) == pytest.approx([0, 0.45, 1.35])


def test_the_answer_to_a_repeated_syn_measures_nothing() -> None:
    host, peer, _ = requesting_host()
    host.advance(0.25)
    host.receive(peer.syn_ack())
    host.effects()
    host.connect()
    assert times(host.advance(0.3)) == pytest.approx([0, 0.2])


def test_a_reset_refuses_the_connection() -> None:
    host, peer, flow_id = requesting_host()
    host.receive(peer.control(RST | ACK, verno=0, ackno=peer.ackno, nonce=peer.host_nonce))
    failed = failure(host)
    assert (failed.flow_id, failed.errno) == (flow_id, ECONNREFUSED)
    assert host.packets() == []


@pytest.mark.parametrize("nonce", [b"\1" * 8, bytes(8)])
def test_a_reset_by_somebody_who_only_knows_the_flow_id_is_ignored(nonce: bytes) -> None:
    host, peer, _ = requesting_host()
    host.receive(peer.control(RST | ACK, verno=0, ackno=peer.ackno + 1, nonce=nonce))
    host.receive(peer.control(RST, verno=0, ackno=0, nonce=nonce))
    assert host.dropped("spoofed_reset") == 2
    assert host.states() == ["REQUEST"]


@pytest.mark.parametrize(
    ("packet", "reason"),
    [
        (lambda peer: peer.syn_ack(ackno=peer.ackno + 1), "wrong_ackno"),
        (lambda peer: peer.syn_ack(ackno=peer.ackno - 1), "wrong_ackno"),
        (lambda peer: peer.syn_ack(acknowledgement=peer.host_sequence), "handshake_segment"),
        (lambda peer: peer.control(ACK), "not_a_syn_ack"),
        (lambda peer: peer.control(FIN), "not_a_syn_ack"),
        (lambda peer: peer.data(), "data_before_handshake"),
        (lambda peer: peer.syn_ack(source_addresses=(LOCAL, 0xFFFFFFFF)), "not_unicast"),
    ],
)
def test_other_packets_leave_the_request_alone(packet: Callable[[Peer], bytes], reason: str) -> None:
    host, peer, flow_id = requesting_host()
    host.receive(packet(peer))
    assert host.dropped(reason) == 1
    assert host.states() == ["REQUEST"]
    assert host.effects() == []
    host.receive(peer.syn_ack())
    assert host.news(Connected) == [Connected(flow_id)]


def test_a_syn_ack_with_a_wrong_transport_checksum_leaves_the_request_alone() -> None:
    host, peer, _ = requesting_host()
    packet = bytearray(peer.syn_ack())
    packet[-1] ^= 1
    host.receive(bytes(packet))
    assert host.dropped("tcp_checksum") == 1
    assert len(host.advance(0.3)) == 1  # and the SYN goes on being repeated


def test_a_syn_ack_without_flow_id_or_to_everybody_leaves_the_request_alone() -> None:
    host, peer, _ = requesting_host()
    host.receive(peer.syn_ack(), broadcast=True)
    peer.flow_id = 0
    host.receive(peer.syn_ack())
    assert (host.dropped("not_unicast"), host.dropped("flow_id_zero")) == (1, 1)
    assert host.states() == ["REQUEST"]


def test_the_peer_is_at_the_last_source_address() -> None:
    host, peer, _ = requesting_host()
    peer.address = parse_address("10.0.0.99")
    host.receive(peer.syn_ack(source_addresses=(LOCAL, REMOTE, OTHER)))
    (transport,) = host.news(OpenTransport)
    assert transport.peer_address == OTHER


def test_a_repeated_syn_ack_is_answered_with_the_whole_handshake_ack() -> None:
    host, peer, _ = requesting_host()
    host.receive(peer.syn_ack())
    first = host.only_packet()
    for _ in range(3):
        host.receive(peer.syn_ack())
        again = host.only_packet()
        assert again.packet == first.packet
    assert len(host.news(OpenTransport)) == 1


def test_the_answer_of_a_second_instance_is_ignored() -> None:
    host, peer, _ = connected_host()
    second = Peer(address=OTHER, options=OUR_OPTIONS, flow_id=peer.flow_id, nonce=b"another!", verno=77)
    second.host_flow_id, second.host_verno = peer.host_flow_id, peer.host_verno
    second.host_sequence = peer.host_sequence
    host.receive(second.syn_ack())
    assert host.effects() == []
    assert host.dropped("wrong_nonce") == 1
    assert host.states() == ["CONNECTED"]


def test_the_handshake_ack_is_repeated_to_a_silent_prototype() -> None:
    host, peer, _ = connected_host(peer=Peer(options=PROTOTYPE_OPTIONS))
    sent = host.advance(60.0)
    assert times(sent) == pytest.approx([0.25, 0.75, 1.75])
    for _, ack in sent:
        assert ack.sal.services == (SERVICE_ID,)
        assert ack.control == (ACK, peer.host_verno + 1, peer.verno, peer.host_nonce)
        assert ack.segment is not None


def test_the_handshake_ack_is_not_repeated_to_our_own_stack() -> None:
    host, _, _ = connected_host(peer=Peer(options=OUR_OPTIONS))
    assert host.advance(60.0) == []


@pytest.mark.parametrize("flags", [ACK, FIN])
def test_a_prototype_that_speaks_gets_no_further_handshake_ack(flags: int) -> None:
    host, peer, _ = connected_host(peer=Peer(options=PROTOTYPE_OPTIONS))
    host.advance(0.3)
    host.receive(peer.control(flags))
    host.effects()
    assert host.advance(60.0) == []


def test_cancelling_a_request_forgets_it_silently() -> None:
    host, peer, flow_id = requesting_host()
    host.sal.cancel_connect(flow_id, host.now)
    assert host.effects() == []
    assert host.sal.flows() == []
    assert host.sal.next_timeout() is None
    host.receive(peer.syn_ack())
    assert host.effects() == []
    assert host.dropped("unknown_flow") == 1


def test_cancelling_an_open_connection_aborts_it() -> None:
    host, _, flow_id = connected_host()
    host.sal.cancel_connect(flow_id, host.now)
    reset, close, ended = host.effects()
    assert isinstance(reset, SendPacket)
    assert close == CloseTransport(flow_id)
    assert ended == FlowEnded(flow_id, ECONNABORTED)


def test_calls_about_flows_that_are_gone_do_nothing() -> None:
    host = LoneHost()
    unknown = FlowID(12345)
    for call in (host.sal.release, host.sal.abort, host.sal.fin_acknowledged, host.sal.transport_reset):
        call(unknown, host.now)
    host.sal.cancel_connect(unknown, host.now)
    host.sal.transport_failed(unknown, ETIMEDOUT, host.now)
    host.sal.accepted_taken(unknown)
    assert host.effects() == []


def test_flow_ids_are_random_and_avoid_what_ports_cannot_be() -> None:
    host = LoneHost()
    host.forward(REMOTE)
    flow_ids = {host.connect() for _ in range(2000)}
    assert len(flow_ids) == 2000
    assert all(flow_id & 0xFFFF and 0 < flow_id >> 16 < 0xFFFF for flow_id in flow_ids)


def test_no_two_flows_share_their_secrets() -> None:
    host = LoneHost()
    host.forward(REMOTE)
    for _ in range(500):
        host.connect()
    sent = host.packets()
    assert len({each.control.nonce for each in sent}) == 500
    assert len({each.control.verno for each in sent}) == 500
    assert len({each.segment.sequence for each in sent if each.segment}) == 500


def test_show_flows_describes_the_flow() -> None:
    host, peer, flow_id = connected_host()
    (flow,) = host.sal.flows()
    assert flow["flow_id"] == flow_id
    assert flow["peer_flow_id"] == peer.flow_id
    assert (flow["state"], flow["role"], flow["service"]) == ("CONNECTED", "active", "76568")
    assert (flow["local_address"], flow["peer_address"]) == ("10.0.0.1", "10.0.0.2")
