"""Are listeners bounded in what they keep, and do their limits hold during a flood? (SPEC 3.6)"""

from __future__ import annotations

from errno import ECONNABORTED
from random import Random

import pytest

from serval_core.effects import FlowEnded
from serval_core.errors import OurMistake
from serval_core.names import DEFAULT_PREFIX, FlowID, ServicePrefix
from serval_core.sal import SalSettings
from serval_core.wire import ipv4
from serval_core.wire.sal import ACK, RST
from tests.serval_core.lone_host import OTHER, OUR_OPTIONS, SERVICE_ID, LoneHost, Peer, accepted_host


def test_the_backlog_bounds_what_the_application_has_not_taken() -> None:
    host = LoneHost()
    host.listen(backlog=2)
    flow_ids = []
    for number in range(2):
        peer = Peer(flow_id=10 + number)
        host.receive(peer.syn())
        peer.learn(host.only_packet())
        host.receive(peer.handshake_ack())
        flow_ids.append(FlowID(peer.host_flow_id))
    host.receive(Peer(flow_id=20).syn())
    assert host.dropped("backlog_full") == 1
    host.sal.accepted_taken(flow_ids[0])
    host.sal.accepted_taken(flow_ids[0])
    host.receive(Peer(flow_id=20).syn())
    assert len(host.sal.flows()) == 3
    assert host.dropped("backlog_full") == 1


def test_a_flow_that_ends_untaken_leaves_the_backlog() -> None:
    host = LoneHost()
    host.listen(backlog=1)
    peer = Peer()
    host.receive(peer.syn())
    peer.learn(host.only_packet())
    host.receive(peer.handshake_ack())
    host.receive(peer.control(RST | ACK))
    host.receive(Peer(flow_id=20).syn())
    assert host.dropped("backlog_full") == 0
    assert host.states() == ["RESPOND"]


def test_a_released_flow_leaves_the_backlog() -> None:
    host, _, flow_id = accepted_host()
    listener = host.sal._core.flows.by_id[flow_id].listener
    assert listener is not None
    assert listener.waiting == 1
    host.sal.release(flow_id, host.now)
    assert listener.waiting == 0


def test_closing_a_listener_forgets_requests_and_resets_what_nobody_took() -> None:
    host, taken, taken_id = accepted_host()
    host.sal.accepted_taken(taken_id)
    untaken = Peer(flow_id=20)
    host.receive(untaken.syn())
    untaken.learn(host.only_packet())
    host.receive(untaken.handshake_ack())
    host.receive(Peer(flow_id=30).syn())
    host.effects()
    host.sal.close_listener(1, host.now)
    assert [(each.sal.dst_flow_id, each.control.flags) for each in host.packets()] == [(20, RST | ACK)]
    assert host.news(FlowEnded) == [FlowEnded(FlowID(untaken.host_flow_id), ECONNABORTED)]
    assert [flow["peer_flow_id"] for flow in host.sal.flows()] == [taken.flow_id]
    host.receive(Peer(flow_id=40).syn())
    assert host.dropped("no_listener") == 1
    host.listen()


def test_mistakes_of_the_caller_are_named() -> None:
    host = LoneHost()
    host.listen()
    with pytest.raises(OurMistake, match="already being listened"):
        host.listen()
    with pytest.raises(OurMistake, match="default"):
        host.sal.listen(DEFAULT_PREFIX, 5, host.now)
    with pytest.raises(OurMistake, match="backlog"):
        host.sal.listen(ServicePrefix.of(SERVICE_ID, 8), 0, host.now)
    with pytest.raises(OurMistake, match="no listener 7"):
        host.sal.close_listener(7, host.now)


def flood_syn(random: Random) -> bytes:
    peer = Peer(
        address=random.randrange(0x01000000, 0xDF000000),
        flow_id=random.randrange(1, 1 << 32),
        nonce=random.randbytes(8),
        options=OUR_OPTIONS,
    )
    return peer.syn()


def test_a_syn_flood_leaves_open_flows_alone_and_memory_bounded() -> None:
    settings = SalSettings(request_queue_limit=64)
    host, peer, flow_id = accepted_host(settings)
    random = Random(3)
    packets = [flood_syn(random) for _ in range(1000)]
    for round_number in range(100):
        for packet in packets:
            host.receive(packet)
        host.sal.take_effects()
        host.now += 0.01
        host.sal.handle_timeouts(host.now)
        if round_number == 50:
            host.receive(peer.control(ACK))
    core = host.sal._core
    assert len(core.flows.by_id) == 65
    assert len(core.flows.by_syn) == 65
    assert core.flows.half_open == 64
    assert len(core.timers) == 128
    assert len(core.timers._heap) < 1000
    assert len(core.round_trips) == 1
    assert host.dropped("request_queue_full") > 99_000
    host.sal.take_effects()
    host.advance(5.0)
    assert [flow["flow_id"] for flow in host.sal.flows()] == [flow_id]
    host.receive(Peer(address=OTHER).syn())  # and honest clients are served again
    assert host.only_packet().destination == OTHER


def test_a_full_request_queue_is_noticed_with_ip_options_too() -> None:
    host = LoneHost(SalSettings(request_queue_limit=1))
    host.listen()
    host.receive(Peer().syn())
    plain = Peer(flow_id=77).syn()
    options = bytes((0x46,)) + plain[1:2] + (len(plain) + 4).to_bytes(2, "big") + plain[4:20] + bytes(4)
    header = options[:10] + b"\0\0" + options[12:]
    total = sum(int.from_bytes(header[at : at + 2], "big") for at in range(0, 24, 2))
    checksum = 0xFFFF - total % 0xFFFF
    packet = header[:10] + checksum.to_bytes(2, "big") + header[12:] + plain[20:]
    assert ipv4.parse(packet).payload == plain[20:]
    host.receive(packet)
    assert host.dropped("request_queue_full") == 1
