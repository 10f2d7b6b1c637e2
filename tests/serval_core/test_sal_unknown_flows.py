"""Who is told that there is no such flow, and who is ignored? (SPEC 3.9)"""

from __future__ import annotations

from serval_core.wire import sal
from serval_core.wire.sal import ACK, FIN, RST, SYN
from tests.serval_core.lone_host import BROADCAST, LOCAL, REMOTE, SERVICE_ID, LoneHost, Peer, Sent


def test_an_ack_for_an_expired_request_is_refused() -> None:
    host, peer = LoneHost(), Peer()
    host.listen()
    host.receive(peer.syn())
    peer.learn(host.only_packet())
    host.advance(5.0)
    host.receive(peer.handshake_ack())
    reset = host.only_packet()
    assert reset.control == (RST, peer.ackno, 0, peer.nonce)
    assert (reset.sal.src_flow_id, reset.sal.dst_flow_id) == (peer.host_flow_id, peer.flow_id)


def reply_to(packet: bytes, broadcast: bool = False) -> list[Sent]:
    host = LoneHost()
    host.receive(packet, broadcast)
    assert host.dropped("unknown_flow") == 1
    return host.packets()


def test_a_fin_with_service_for_an_unknown_flow_is_refused() -> None:
    peer = Peer()
    peer.host_flow_id = 0x12345678
    fin = sal.Control(FIN, 0xFFFFFFFF, 9, peer.nonce)
    (reset,) = reply_to(peer.packet(fin, services=(SERVICE_ID,)))
    # The prototype acknowledges 32 for the FIN, by a slip (SPEC 11.1, quirk 12); right is 1.
    assert reset.control == (RST | ACK, 0, 0, peer.nonce)
    assert (reset.source, reset.destination) == (LOCAL, REMOTE)


def test_a_datagram_for_an_unknown_service_is_refused() -> None:
    peer = Peer()
    (reset,) = reply_to(peer.packet(None, bytes(8), services=(SERVICE_ID, SERVICE_ID)))
    assert reset.control == (RST | ACK, 0, 0, bytes(8))


def test_what_must_not_be_answered_is_not() -> None:
    peer = Peer()
    peer.host_flow_id = 0x12345678
    assert reply_to(peer.data()) == []
    assert reply_to(peer.control(ACK)) == []
    reset = sal.Control(RST, 1, 2, peer.nonce)
    assert reply_to(peer.packet(reset, services=(SERVICE_ID,))) == []
    syn_ack = sal.Control(SYN | ACK, 1, 2, peer.nonce)
    assert reply_to(peer.packet(syn_ack, services=(SERVICE_ID,))) == []
    datagram = peer.packet(None, bytes(8), services=(SERVICE_ID, SERVICE_ID), destination=BROADCAST)
    assert reply_to(datagram, broadcast=True) == []
