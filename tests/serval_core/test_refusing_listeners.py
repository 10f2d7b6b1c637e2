"""Does a listener that refuses send clients elsewhere, and does it lose none of those that have begun?"""

from __future__ import annotations

from errno import EADDRNOTAVAIL

import pytest

from serval_core.effects import Accepted
from serval_core.errors import OurMistake
from serval_core.names import DEFAULT_PREFIX
from serval_core.rules import Rule, RuleType
from serval_core.wire.sal import ACK, RST, SYN
from tests.serval_core.lone_host import (
    OTHER,
    OUR_OPTIONS,
    PROTOTYPE_OPTIONS,
    SERVICE,
    LoneHost,
    Peer,
    failure,
)


def refusing_host() -> tuple[LoneHost, int]:
    host = LoneHost()
    listener_id = host.listen()
    host.sal.set_refusing(listener_id, True)
    return host, listener_id


def test_a_client_of_ours_is_told_at_once() -> None:
    host, _ = refusing_host()
    peer = Peer(flow_id=10, options=OUR_OPTIONS)
    host.receive(peer.syn())
    reset = host.only_packet()
    assert reset.control.flags == RST | ACK
    assert reset.sal.dst_flow_id == peer.flow_id
    assert host.dropped("listener_refuses") == 1
    assert host.sal.flows() == []


@pytest.mark.parametrize("broadcast", [False, True])
def test_whoever_would_give_up_for_good_is_told_nothing(broadcast: bool) -> None:
    """A prototype ends a connect that is reset; and who broadcasts gets the answers of others."""
    host, _ = refusing_host()
    options = OUR_OPTIONS if broadcast else PROTOTYPE_OPTIONS
    host.receive(Peer(flow_id=10, options=options).syn(), broadcast=broadcast)
    assert host.packets() == []
    assert host.dropped("listener_refuses") == 1


def test_a_flow_that_has_begun_is_accepted_all_the_same() -> None:
    host = LoneHost()
    listener_id = host.listen()
    begun, late = (Peer(flow_id=each, options=OUR_OPTIONS) for each in (10, 20))
    host.receive(begun.syn())
    begun.learn(host.only_packet())
    host.sal.set_refusing(listener_id, True)
    assert host.sal.half_open == 1
    host.receive(begun.syn())
    assert host.only_packet().control.flags == SYN | ACK  # the answer that was lost
    host.receive(late.syn())
    assert host.only_packet().control.flags == RST | ACK
    host.receive(begun.handshake_ack())
    assert len(host.news(Accepted)) == 1
    assert host.sal.half_open == 0


def test_flows_are_welcome_again() -> None:
    host, listener_id = refusing_host()
    host.sal.set_refusing(listener_id, True)
    host.sal.set_refusing(listener_id, False)
    host.sal.set_refusing(listener_id, False)
    host.receive(Peer(flow_id=10, options=OUR_OPTIONS).syn())
    assert host.only_packet().control.flags == SYN | ACK


def test_own_connects_go_to_another_instance_and_come_back() -> None:
    host, listener_id = refusing_host()
    host.table.add(Rule.forward(DEFAULT_PREFIX, OTHER))
    host.connect()
    assert host.only_packet().destination == OTHER
    host.sal.set_refusing(listener_id, False)
    host.connect()
    assert host.only_packet().destination != OTHER


def test_own_connects_without_another_instance_fail_at_once() -> None:
    host, _ = refusing_host()
    host.connect()
    assert failure(host).errno == EADDRNOTAVAIL


def test_the_service_counts_as_not_bound_meanwhile() -> None:
    host = LoneHost()
    told: list[str] = []
    listener_id = host.listen()
    host.table.on_change(lambda kind, rule: told.append(kind))
    host.sal.set_refusing(listener_id, True)
    assert host.table.bound() == []
    with pytest.raises(OurMistake, match="by a listener that refuses flows just now"):
        host.listen()
    host.sal.set_refusing(listener_id, False)
    assert host.table.bound() == [SERVICE]
    assert told == ["rule_removed", "rule_added"]


def test_a_rule_may_be_in_the_way_of_its_return() -> None:
    host, listener_id = refusing_host()
    host.table.add(Rule.drop(SERVICE))
    with pytest.raises(OurMistake, match="already has a DROP rule"):
        host.sal.set_refusing(listener_id, False)
    host.receive(Peer(flow_id=10, options=OUR_OPTIONS).syn())
    assert host.only_packet().control.flags == RST | ACK
    host.table.remove_rule(SERVICE, RuleType.DROP)
    host.sal.set_refusing(listener_id, False)
    assert host.table.bound() == [SERVICE]


def test_only_listeners_can_refuse() -> None:
    host, listener_id = refusing_host()
    host.sal.close_listener(listener_id, host.now)
    with pytest.raises(OurMistake, match=f"there is no listener {listener_id}"):
        host.sal.set_refusing(listener_id, True)
    host.listen()
    host.receive(Peer(flow_id=10, options=OUR_OPTIONS).syn())
    assert host.only_packet().control.flags == SYN | ACK
