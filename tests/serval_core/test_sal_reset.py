"""Does an RST end a flow if, and only if, it comes from somebody who knows its nonces? (SPEC 3.9, quirk 8)"""

from __future__ import annotations

from collections.abc import Callable
from errno import ECONNRESET, EPIPE

import pytest

from serval_core.effects import FlowEnded, ResetTransport
from serval_core.names import FlowID
from serval_core.wire.sal import ACK, FIN, RST
from tests.serval_core.lone_host import LoneHost, Peer, accepted_host, connected_host

ZERO = bytes(8)


@pytest.mark.parametrize("connect", [connected_host, accepted_host])
def test_an_active_reset_ends_the_flow(connect: Callable[[], tuple[LoneHost, Peer, FlowID]]) -> None:
    host, peer, flow_id = connect()
    host.receive(peer.control(RST | ACK))
    assert host.effects() == [ResetTransport(flow_id, ECONNRESET), FlowEnded(flow_id, ECONNRESET)]
    assert host.sal.flows() == []
    assert host.sal.next_timeout() is None


def test_a_reset_after_the_peers_fin_is_a_broken_pipe() -> None:
    host, peer, flow_id = connected_host()
    host.receive(peer.control(FIN))
    host.effects()
    host.receive(peer.control(RST | ACK, verno=peer.verno + 1))
    assert host.effects() == [ResetTransport(flow_id, EPIPE), FlowEnded(flow_id, EPIPE)]


@pytest.mark.parametrize("acknowledged", [1, 32], ids=["ours", "prototype"])
def test_the_answer_to_our_fin_ends_the_flow(acknowledged: int) -> None:
    """As a stack answers a FIN that it has no flow for; the prototype's acknowledges too much."""
    host, peer, flow_id = connected_host()
    host.sal.fin_acknowledged(flow_id, host.now)
    host.effects()
    host.receive(peer.control(RST | ACK, verno=0, ackno=peer.ackno + acknowledged, nonce=peer.host_nonce))
    assert host.news(FlowEnded) == [FlowEnded(flow_id, ECONNRESET)]


def test_the_answer_to_our_handshake_ack_ends_the_flow() -> None:
    """The server's request had expired: a prototype would leave us hanging, ours says so."""
    host, peer, flow_id = connected_host()
    host.receive(peer.control(RST, verno=peer.verno, ackno=0, nonce=peer.host_nonce))
    assert host.news(FlowEnded) == [FlowEnded(flow_id, ECONNRESET)]


def test_the_answer_to_data_needs_the_exact_version_number() -> None:
    """And comes from prototypes only."""
    host, peer, _ = connected_host()
    host.receive(peer.control(RST | ACK, verno=peer.verno, nonce=ZERO))
    assert (host.dropped("spoofed_reset"), host.states()) == (1, ["CONNECTED"])
    host, peer, flow_id = connected_host(peer=Peer())
    host.receive(peer.control(RST | ACK, verno=peer.verno + 1, nonce=ZERO))
    assert host.dropped("spoofed_reset") == 1
    host.receive(peer.control(RST | ACK, verno=peer.verno, nonce=ZERO))
    assert host.news(FlowEnded) == [FlowEnded(flow_id, ECONNRESET)]


@pytest.mark.parametrize(
    "spoofed",
    [
        lambda peer: peer.control(RST | ACK, nonce=b"guessing"),
        lambda peer: peer.control(RST, nonce=b"guessing"),
        lambda peer: peer.control(RST | ACK, verno=0, nonce=ZERO),
        lambda peer: peer.control(RST | ACK, verno=peer.verno - 1 & 0xFFFFFFFF),
        lambda peer: peer.control(RST | ACK, verno=peer.verno + 257),
        lambda peer: peer.control(RST | ACK, ackno=peer.ackno + 100, nonce=peer.host_nonce),
        lambda peer: peer.control(RST | ACK, ackno=peer.ackno - 2 & 0xFFFFFFFF, nonce=peer.host_nonce),
        lambda peer: peer.control(RST, verno=peer.verno - 1 & 0xFFFFFFFF, nonce=peer.host_nonce),
    ],
)
def test_spoofed_and_stale_resets_are_counted_and_ignored(spoofed: Callable[[Peer], bytes]) -> None:
    host, peer, _ = connected_host(peer=Peer(verno=41))
    host.receive(spoofed(peer))
    assert host.effects() == []
    assert host.dropped("spoofed_reset") == 1
    assert host.states() == ["CONNECTED"]


def test_a_reset_after_both_fins_is_ignored() -> None:
    host, peer, flow_id = connected_host()
    host.receive(peer.control(FIN))
    host.sal.fin_acknowledged(flow_id, host.now)
    host.receive(peer.control(ACK, verno=peer.verno + 1, ackno=peer.ackno + 1))
    host.effects()
    host.receive(peer.control(RST | ACK, verno=peer.verno + 1))
    assert host.effects() == []
    host.sal.release(flow_id, host.now)
    assert host.news(FlowEnded) == [FlowEnded(flow_id, 0)]


@pytest.mark.parametrize("flags", [ACK, FIN, FIN | ACK])
def test_controls_with_a_wrong_nonce_change_nothing_and_are_not_answered(flags: int) -> None:
    host, peer, flow_id = connected_host()
    host.sal.fin_acknowledged(flow_id, host.now)
    host.effects()
    for nonce in (b"guessing", ZERO, peer.host_nonce):
        for verno in (peer.verno, peer.verno - 1 & 0xFFFFFFFF, peer.verno + 1):
            host.receive(peer.control(flags, verno=verno, ackno=peer.ackno + 1, nonce=nonce))
    assert host.dropped("wrong_nonce") == 9
    assert host.effects() == []
    assert host.states() == ["FINWAIT1"]
