"""Does an RST that got lost reach the peer all the same, and does a copy of it harm nobody else?"""

from __future__ import annotations

from collections.abc import Callable
from errno import ECONNRESET

import pytest

from serval_core.dataplane.memory_network import Faults
from serval_core.names import FlowID
from serval_core.sent_resets import LIMIT, REMEMBERED_S, REPEATS_S
from serval_core.wire.sal import ACK, FIN, RST, RSYN
from tests.serval_core.exchanges import SERVICE, two_hosts
from tests.serval_core.lone_host import (
    OUR_OPTIONS,
    PROTOTYPE_OPTIONS,
    LoneHost,
    Peer,
    Sent,
    accepted_host,
    connected_host,
)

Connect = Callable[..., tuple[LoneHost, Peer, FlowID]]
LONG_S = REMEMBERED_S + 1


def aborted(connect: Connect = connected_host, peer: Peer | None = None) -> tuple[LoneHost, Peer, Sent]:
    """A host that has just reset its flow, and the RST."""
    host, peer, flow_id = connect(peer=peer)
    host.sal.abort(flow_id, host.now)
    return host, peer, host.only_packet()


def prototype() -> Peer:
    return Peer(options=PROTOTYPE_OPTIONS)


@pytest.mark.parametrize("connect", [connected_host, accepted_host])
def test_a_peer_of_ours_is_told_again_and_then_nobody_waits_any_more(connect: Connect) -> None:
    host, _, reset = aborted(connect)
    assert host.advance(LONG_S) == [(after_s, reset) for after_s in REPEATS_S]
    assert host.sal.counters["resets_repeated"] == len(REPEATS_S)
    assert host.sal.next_timeout() is None


@pytest.mark.parametrize("connect", [connected_host, accepted_host])
def test_a_prototype_is_told_once(connect: Connect) -> None:
    """It would believe a copy that meets a new flow with an old flowID, whatever the nonce."""
    host, _, _ = aborted(connect, prototype())
    assert host.advance(LONG_S) == []
    assert host.sal.next_timeout() is None


@pytest.mark.parametrize("make_peer", [prototype, lambda: Peer(options=OUR_OPTIONS)])
@pytest.mark.parametrize("flags", [FIN, ACK, RSYN])
def test_whoever_still_speaks_of_the_flow_is_told_again(make_peer: Callable[[], Peer], flags: int) -> None:
    host, peer, reset = aborted(peer=make_peer())
    host.receive(peer.control(flags))
    assert host.packets() == [reset]
    assert host.dropped("already_reset") == 1
    host.advance(LONG_S)
    host.receive(peer.control(flags))
    assert host.packets() == []
    assert host.dropped("unknown_flow") == 1


def test_a_peer_that_resets_as_well_is_told_nothing_any_more() -> None:
    host, peer, _ = aborted()
    host.receive(peer.control(RST | ACK))
    assert host.advance(LONG_S) == []
    assert host.sal.next_timeout() is None


@pytest.mark.parametrize("flags", [RST | ACK, FIN, ACK])
def test_who_does_not_know_the_nonce_changes_nothing(flags: int) -> None:
    host, peer, reset = aborted()
    host.receive(peer.control(flags, nonce=b"guessing"))
    assert host.dropped("wrong_nonce") == 1
    assert host.advance(LONG_S) == [(after_s, reset) for after_s in REPEATS_S]


def test_data_under_way_is_not_answered() -> None:
    host, peer, _ = aborted(peer=prototype())
    host.receive(peer.data())
    assert host.dropped("already_reset") == 1
    assert host.packets() == []


def test_the_oldest_of_too_many_gives_way() -> None:
    host = LoneHost()
    host.listen(backlog=2 * LIMIT)
    for number in range(LIMIT + 3):
        peer = Peer(options=OUR_OPTIONS, flow_id=1 + number)
        host.receive(peer.syn())
        peer.learn(host.only_packet())
        host.receive(peer.handshake_ack())
        host.effects()
        host.sal.abort(FlowID(peer.host_flow_id), host.now)
        host.effects()
    repeated = [packet.sal.dst_flow_id for _, packet in host.advance(LONG_S)]
    assert sorted(repeated) == sorted([*range(4, LIMIT + 4)] * len(REPEATS_S))
    assert host.sal.next_timeout() is None


def test_three_of_four_copies_may_get_lost() -> None:
    network, client, server = two_hosts()
    flow_id = client.sal.connect(SERVICE.service_id, network.now)
    client.settle()
    network.run(network.now + 1.0)
    (accepted,) = server.accepted
    network.faults = Faults(loss=1.0)
    client.sal.abort(flow_id, network.now)
    client.settle()
    network.run(network.now + 1.0)
    assert accepted not in server.ended
    network.faults = Faults()
    network.run(network.now + 2.0)
    assert server.ended[accepted] == ECONNRESET
    network.run()
    assert len(server.ended) == 1
