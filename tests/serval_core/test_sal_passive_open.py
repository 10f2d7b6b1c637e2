"""Does a listener accept every honest client once, and nobody else? (SPEC 3.6)"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from serval_core.dataplane.memory_network import LOOPBACK_INDEX, WIRE_INDEX
from serval_core.effects import (
    Accepted,
    ExpectData,
    ForgetExpected,
    InjectSegment,
    OpenTransport,
    SendPacket,
)
from serval_core.names import FlowID, ServiceID, parse_address, parse_service
from serval_core.wire.sal import ACK, FIN, RST, RSYN, SYN
from tests.serval_core.lone_host import (
    BROADCAST,
    LOCAL,
    OTHER,
    OUR_OPTIONS,
    PROTOTYPE_OPTIONS,
    REMOTE,
    SERVICE,
    SERVICE_ID,
    LoneHost,
    Peer,
    accepted_host,
    half_open_host,
)


def accepted(host: LoneHost) -> list[Accepted]:
    return host.news(Accepted)


def assert_all_forgotten(host: LoneHost) -> None:
    core = host.sal._core
    assert not core.flows.by_id
    assert not core.flows.by_syn
    assert core.flows.half_open == 0
    assert host.sal.next_timeout() is None
    assert len(host.news(ExpectData)) == len(host.news(ForgetExpected))


def test_a_syn_is_answered_and_data_expected_first() -> None:
    host, peer = LoneHost(), Peer()
    host.listen()
    host.receive(peer.syn())
    expect, send = host.log or host.effects()
    assert isinstance(send, SendPacket)
    assert isinstance(expect, ExpectData)
    (flow,) = host.sal.flows()
    assert expect.flow_id == flow["flow_id"]
    assert flow["state"] == "RESPOND"


def test_a_syn_ack_is_as_a_prototype_wants_it() -> None:
    host, peer = LoneHost(), Peer()
    host.listen()
    host.receive(peer.syn())
    answer = host.only_packet()
    assert (answer.source, answer.destination, answer.interface_index) == (LOCAL, REMOTE, WIRE_INDEX)
    assert answer.sal.dst_flow_id == peer.flow_id
    assert answer.sal.services == ()
    assert answer.sal.source_addresses == ()
    assert (answer.control.flags, answer.control.ackno) == (SYN | ACK, peer.verno)
    assert any(answer.control.nonce)


def test_the_handshake_ack_completes_it() -> None:
    host, peer = half_open_host()
    host.receive(peer.handshake_ack())
    effects = host.effects()
    assert [type(each) for each in effects] == [OpenTransport, Accepted]
    assert effects[1] == Accepted(1, FlowID(peer.host_flow_id), SERVICE_ID)
    assert host.sal._core.flows.half_open == 0
    assert host.sal.next_timeout() is None


def test_a_prefix_listener_learns_the_exact_service() -> None:
    host, peer = LoneHost(), Peer()
    host.sal.listen(parse_service("0x0001:16"), 5, host.now)
    asked = ServiceID(b"\0\1" + b"x" * 30)
    host.receive(peer.syn(service=asked))
    peer.learn(host.only_packet())
    host.receive(peer.handshake_ack())
    assert [each.service_id for each in accepted(host)] == [asked]


def test_a_bare_ack_completes_it() -> None:
    """What a prototype client in CONNECTED answers to a repeated SYN-ACK (SPEC 3.6)."""
    host, peer = half_open_host(peer=Peer(options=PROTOTYPE_OPTIONS))
    host.receive(peer.handshake_ack(bare=True))
    assert len(accepted(host)) == 1
    (transport,) = host.news(OpenTransport)
    assert transport.parameters.send_window_bytes == 4 * 1448  # not told: a prototype's SYN says 0


def test_a_bare_ack_takes_the_window_of_a_syn_that_has_one() -> None:
    host, peer = LoneHost(), Peer(window=30000)
    host.listen()
    host.receive(peer.syn())
    peer.learn(host.only_packet())
    host.receive(peer.handshake_ack(bare=True))
    (transport,) = host.news(OpenTransport)
    assert transport.parameters.send_window_bytes == 30000


def test_the_first_data_completes_it_and_is_delivered() -> None:
    host, peer = half_open_host()
    packet = peer.data(b"hello", window=100)
    host.receive(packet)
    effects = host.effects()
    assert [type(each) for each in effects] == [OpenTransport, Accepted, InjectSegment]
    transport, _, inject = effects
    assert isinstance(transport, OpenTransport)
    assert transport.parameters.send_window_bytes == 100 << 10
    assert inject == InjectSegment(FlowID(peer.host_flow_id), packet[32:], REMOTE, LOCAL)
    host.receive(peer.handshake_ack())  # which the data had overtaken
    assert host.effects() == []
    assert host.states() == ["CONNECTED"]


def test_later_data_that_was_on_its_way_up_is_delivered_too() -> None:
    host, peer = half_open_host()
    host.receive(peer.handshake_ack())
    host.receive(peer.data(b"hello"))
    assert len(host.news(InjectSegment)) == 1


def test_data_whose_checksum_the_kernel_left_to_offload_is_taken() -> None:
    host, peer = half_open_host()
    packet = bytearray(peer.data(b"hello"))
    pseudo_header = sum(
        int.from_bytes(part, "big")
        for part in (packet[12:14], packet[14:16], packet[16:18], packet[18:20], b"\0\6", b"\0\x19")
    )
    packet[32 + 16 : 32 + 18] = (pseudo_header % 0xFFFF).to_bytes(2, "big")
    host.receive(bytes(packet))
    assert len(accepted(host)) == 1


@pytest.mark.parametrize(
    ("packet", "reason"),
    [
        (lambda peer: peer.control(ACK, nonce=b"guessing"), "wrong_nonce"),
        (lambda peer: peer.control(ACK, nonce=bytes(8)), "wrong_nonce"),
        (lambda peer: peer.control(ACK, nonce=peer.host_nonce), "wrong_nonce"),
        (lambda peer: peer.control(ACK, verno=peer.verno + 1), "wrong_verno"),
        (lambda peer: peer.control(ACK, verno=peer.initial_verno), "wrong_verno"),
        (lambda peer: peer.control(ACK, ackno=peer.ackno + 1), "wrong_ackno"),
        (lambda peer: peer.control(ACK, ackno=peer.ackno - 1), "wrong_ackno"),
        (lambda peer: peer.control(FIN), "not_a_handshake_ack"),
        (lambda peer: peer.control(RSYN | FIN), "not_a_handshake_ack"),
        (lambda peer: peer.control(RSYN, nonce=b"guessing"), "wrong_nonce"),
        (lambda peer: peer.handshake_ack(sequence=5), "handshake_segment"),
        (lambda peer: peer.handshake_ack(acknowledgement=5), "handshake_segment"),
        (lambda peer: peer.handshake_ack(flags=0x14), "handshake_segment"),
        (lambda peer: peer.data(acknowledgement=5), "handshake_segment"),
        (lambda peer: peer.data(sequence=peer.initial_sequence), "handshake_segment"),
        (lambda peer: peer.data(sequence=peer.initial_sequence + 65536 & 0xFFFFFFFF), "handshake_segment"),
        (lambda peer: peer.packet(None, peer.segment(flags=0x14)), "handshake_segment"),
        (lambda peer: peer.packet(None, peer.segment(flags=0x12)), "handshake_segment"),
        (lambda peer: peer.packet(None, b"short"), "tcp_truncated"),
        (lambda peer: peer.control(RST | ACK, nonce=b"guessing"), "spoofed_reset"),
        (lambda peer: peer.control(RST | ACK, verno=peer.verno + 1000), "spoofed_reset"),
        (lambda peer: peer.control(RST, verno=1, nonce=bytes(8)), "spoofed_reset"),
    ],
)
def test_nothing_else_completes_it(packet: Callable[[Peer], bytes], reason: str) -> None:
    host, peer = half_open_host()
    host.receive(packet(peer))
    assert host.dropped(reason) == 1, host.sal.counters
    assert host.effects() == []
    assert host.states() == ["RESPOND"]
    host.receive(peer.handshake_ack())
    assert len(accepted(host)) == 1


def test_data_with_a_wrong_checksum_does_not_complete_it() -> None:
    host, peer = half_open_host()
    packet = bytearray(peer.data())
    packet[-1] ^= 1
    host.receive(bytes(packet))
    assert host.dropped("tcp_checksum") == 1
    assert host.states() == ["RESPOND"]


def test_the_syn_ack_is_repeated_until_the_request_expires() -> None:
    host, peer = LoneHost(), Peer(options=OUR_OPTIONS)
    host.listen()
    host.receive(peer.syn())
    sent = host.advance(10.0)
    assert [at for at, _ in sent] == pytest.approx([0, 0.3, 0.9, 2.1, 3.0])
    assert len({packet.packet for at, packet in sent if at < 3}) == 1
    # A client of ours may believe that it is connected: the last packet tells it otherwise.
    reset = sent[-1][1].control
    assert (reset.flags, reset.verno, reset.ackno) == (RST | ACK, sent[0][1].control.verno + 1, peer.verno)
    assert_all_forgotten(host)


def test_the_request_of_a_prototype_expires_silently() -> None:
    host, peer = LoneHost(), Peer(options=PROTOTYPE_OPTIONS)
    host.listen()
    host.receive(peer.syn())
    assert [packet.control.flags for _, packet in host.advance(10.0)] == [SYN | ACK] * 4
    assert_all_forgotten(host)


def test_the_first_repetition_follows_the_measured_round_trip() -> None:
    host, peer = half_open_host()
    host.now += 0.2
    host.receive(peer.handshake_ack())
    host.receive(Peer(flow_id=9).syn())
    host.effects()
    assert [at for at, _ in host.advance(2.9)] == pytest.approx([0.6, 1.8])


def test_a_repeated_syn_gets_the_same_answer() -> None:
    host, peer = LoneHost(), Peer()
    host.listen()
    host.receive(peer.syn())
    first = host.only_packet()
    host.now += 0.1
    host.receive(peer.syn())
    assert host.only_packet().packet == first.packet
    assert len(host.sal.flows()) == 1
    assert len(host.news(ExpectData)) == 1


def test_a_repeated_syn_with_another_version_number_is_ignored() -> None:
    host, peer = half_open_host()
    peer.initial_verno = 7
    host.receive(peer.syn())
    assert host.effects() == []
    assert host.dropped("wrong_verno") == 1


@pytest.mark.parametrize("change", [{"address": OTHER}, {"nonce": b"2ndpeer!"}, {"flow_id": 4}])
def test_clients_that_share_two_of_address_flow_id_and_nonce_are_two(change: dict[str, object]) -> None:
    """Prototypes number their flows from 2, so two of them often share a flowID (SPEC 11.1, quirk 9)."""
    host, _ = half_open_host()
    other = Peer(**change)  # type: ignore[arg-type]
    host.receive(other.syn())
    other.learn(host.only_packet())
    assert len(host.sal.flows()) == 2
    host.receive(other.handshake_ack())
    assert [each.flow_id for each in accepted(host)] == [other.host_flow_id]


def test_a_syn_that_comes_again_after_all_makes_no_second_connection() -> None:
    host, peer, _ = accepted_host()
    host.receive(peer.syn())
    assert host.effects() == []
    assert host.dropped("repeated_syn") == 1
    assert len(host.sal.flows()) == 1


@pytest.mark.parametrize("repeated_by", ["timer", "client"])
def test_the_answer_to_a_repeated_syn_ack_measures_nothing(repeated_by: str) -> None:
    host, peer = half_open_host()
    host.advance(0.4 if repeated_by == "timer" else 0.1)
    if repeated_by == "client":
        host.receive(peer.syn())
    host.receive(peer.handshake_ack())
    assert host.sal.flows()[0]["round_trip_s"] is None


def test_a_syn_ack_is_nothing_for_the_passive_side() -> None:
    host, peer, _ = accepted_host()
    host.receive(peer.control(SYN | ACK, verno=peer.initial_verno))
    assert host.only_packet().sal.services == ()
    assert host.dropped("repeated_control") == 1


def test_an_expired_request_begins_anew_with_the_next_syn() -> None:
    host, peer = LoneHost(), Peer()
    host.listen()
    host.receive(peer.syn())
    first = host.only_packet()
    host.advance(5.0)
    host.receive(peer.syn())
    second = host.only_packet()
    assert first.sal.src_flow_id != second.sal.src_flow_id
    assert first.control.nonce != second.control.nonce


def test_a_reset_of_the_client_removes_the_request() -> None:
    host, peer = half_open_host()
    host.receive(peer.control(RST | ACK))
    assert_all_forgotten(host)
    assert host.packets() == []


def test_a_syn_for_a_service_without_listener_is_ignored() -> None:
    host, peer = LoneHost(), Peer()
    host.listen()
    host.receive(peer.syn(service=parse_service("5").service_id))
    assert host.effects() == []
    assert host.dropped("no_listener") == 1


@pytest.mark.parametrize(
    ("packet", "reason"),
    [
        (lambda peer: peer.syn(service=None), "syn_without_service"),
        (lambda peer: peer.syn(flags=0x12), "handshake_segment"),
        (lambda peer: peer.syn(flags=0x06), "handshake_segment"),
        (lambda peer: peer.syn(source_addresses=(0xE0000001, LOCAL)), "not_unicast"),
        (lambda peer: peer.syn(source_addresses=(BROADCAST, LOCAL)), "not_unicast"),
        (lambda peer: peer.syn(source_addresses=[REMOTE] * 20), "source_full"),
    ],
)
def test_malformed_syns_make_no_flow(packet: Callable[[Peer], bytes], reason: str) -> None:
    host, peer = LoneHost(), Peer()
    host.listen()
    host.receive(packet(peer))
    assert host.dropped(reason) == 1, host.sal.counters
    assert host.effects() == []
    assert host.sal.flows() == []


def test_a_syn_without_flow_id_or_from_nowhere_makes_no_flow() -> None:
    host = LoneHost()
    host.listen()
    host.receive(Peer(flow_id=0).syn())
    host.receive(Peer(address=0).syn())
    host.receive(Peer(address=0xFFFFFFFF).syn())
    assert host.effects() == []
    assert (host.dropped("flow_id_zero"), host.dropped("not_unicast")) == (1, 2)


def test_a_syn_with_a_wrong_transport_checksum_makes_no_flow() -> None:
    host, peer = LoneHost(), Peer()
    host.listen()
    packet = bytearray(peer.syn())
    packet[-1] ^= 1
    host.receive(bytes(packet))
    assert host.dropped("tcp_checksum") == 1
    assert host.sal.flows() == []


def test_a_client_that_cannot_be_reached_makes_no_flow() -> None:
    host, peer = LoneHost(), Peer()
    host.listen()
    host.paths.up = False
    host.receive(peer.syn())
    assert host.dropped("no_path_back") == 1
    assert host.sal.flows() == []


def test_a_broadcast_syn_is_answered_from_the_interface_address() -> None:
    host, peer = LoneHost(), Peer()
    host.listen()
    host.receive(peer.syn(destination=BROADCAST), broadcast=True)
    assert host.only_packet().source == LOCAL


def test_a_forwarded_syn_is_answered_directly_and_names_this_host_last() -> None:
    host, peer = LoneHost(), Peer()
    router = parse_address("10.0.0.7")
    host.listen()
    host.receive(peer.syn(source_addresses=(OTHER, router)))
    answer = host.only_packet()
    assert (answer.source, answer.destination) == (LOCAL, OTHER)
    assert answer.sal.source_addresses == (OTHER, router, LOCAL)


def test_forwarded_copies_are_the_same_syn_whatever_router_they_came_by() -> None:
    host, peer = LoneHost(), Peer()
    host.listen()
    host.receive(peer.syn(source_addresses=(OTHER, LOCAL)))
    peer.address = parse_address("10.0.0.7")
    host.receive(peer.syn(source_addresses=(OTHER, peer.address)))
    assert len(host.sal.flows()) == 1


def test_the_address_of_the_ack_is_where_the_client_is() -> None:
    host, peer = half_open_host()
    peer.address = OTHER
    host.receive(peer.handshake_ack())
    (transport,) = host.news(OpenTransport)
    assert transport.peer_address == OTHER


def test_packets_that_came_over_loopback_are_answered_there() -> None:
    host = LoneHost()
    host.listen()
    peer = Peer(address=LOCAL)
    host.receive(peer.syn(), interface_index=LOOPBACK_INDEX)
    answer = host.only_packet()
    assert (answer.source, answer.destination, answer.interface_index) == (LOCAL, LOCAL, LOOPBACK_INDEX)


def test_the_service_is_what_was_listened_on() -> None:
    host, _, _ = accepted_host()
    assert accepted(host)[0].service_id == SERVICE.service_id
