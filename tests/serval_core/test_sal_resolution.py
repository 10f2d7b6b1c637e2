"""Where does each SYN go, whatever the table says and the paths are? (SPEC 6.3, 6.4)"""

from __future__ import annotations

from errno import EADDRNOTAVAIL, EHOSTUNREACH, ETIMEDOUT

import pytest

from serval_core.addresses import LOOPBACK
from serval_core.dataplane.memory_network import LOOPBACK_INDEX, WIRE_INDEX
from serval_core.effects import (
    Connected,
)
from serval_core.names import DEFAULT_SERVICE, ServicePrefix
from serval_core.rules import Rule, RuleType
from tests.serval_core.lone_host import (
    BROADCAST,
    LOCAL,
    OTHER,
    REMOTE,
    SERVICE,
    LoneHost,
    failure,
    requesting_host,
    times,
)


def test_without_a_rule_connect_fails_at_once() -> None:
    host = LoneHost()
    flow_id = host.connect()
    failed = failure(host)
    assert (failed.flow_id, failed.errno) == (flow_id, EADDRNOTAVAIL)


def test_a_drop_rule_refuses_at_once() -> None:
    host = LoneHost()
    host.table.add(Rule.drop(SERVICE))
    host.connect()
    assert failure(host).errno == EHOSTUNREACH


def test_without_a_path_connect_waits_for_an_interface() -> None:
    host = LoneHost()
    host.forward(REMOTE)
    host.paths.up = False
    host.connect()
    assert host.advance(5.0) == []
    host.paths.up = True
    host.sal.paths_changed(host.now)
    assert times(host.advance(0.65)) == pytest.approx([0, 0.2, 0.6])


def test_without_a_path_connect_fails_with_ehostunreach_in_the_end() -> None:
    host = LoneHost()
    host.forward(REMOTE)
    host.paths.up = False
    host.connect()
    host.advance(10.1)
    assert failure(host).errno == EHOSTUNREACH


def test_paths_changed_repeats_no_syn_that_is_on_its_way() -> None:
    host, _, _ = requesting_host()
    host.sal.paths_changed(host.now)
    assert host.packets() == []


def test_a_rule_that_goes_away_meanwhile_does_not_hurry_the_failure() -> None:
    host, _, _ = requesting_host()
    host.table.remove(SERVICE, RuleType.FORWARD, REMOTE)
    host.advance(1.0)
    host.forward(OTHER)
    assert {packet.destination for _, packet in host.advance(5.0)} == {OTHER}
    host.advance(5.0)
    assert failure(host).errno == ETIMEDOUT


def test_a_rule_that_goes_away_for_good_fails_like_silence() -> None:
    host, _, _ = requesting_host()
    host.table.remove(SERVICE, RuleType.FORWARD, REMOTE)
    host.advance(11.0)
    assert failure(host).errno == ETIMEDOUT


def test_the_advisory_address_overrides_the_table() -> None:
    host = LoneHost()
    host.table.add(Rule.drop(SERVICE))
    host.connect(destination=OTHER)
    assert {packet.destination for _, packet in host.advance(5.0)} == {OTHER}


def test_each_repetition_asks_an_instance_that_was_not_silent_yet() -> None:
    host = LoneHost()
    addresses = [REMOTE, OTHER, OTHER + 1]
    host.forward(*addresses)
    host.connect()
    sent = host.advance(3.0)
    asked = [packet.destination for _, packet in sent]
    assert sorted(asked[:3]) == addresses
    assert sorted(asked[3:6]) == addresses
    # Each instance has the whole timeout to answer, and all of them longer ones in each further round.
    assert times(sent[:9]) == pytest.approx([0, 0.2, 0.4, 0.6, 1.0, 1.4, 1.8, 2.6])


def test_an_instance_without_path_is_passed_over() -> None:
    host = LoneHost()
    unreachable = OTHER
    original = host.paths.path_to
    host.paths.path_to = (  # type: ignore[method-assign]
        lambda address, index=0: None if address == unreachable else original(address, index)
    )
    host.forward(unreachable, REMOTE)
    for _ in range(20):
        host.connect()
        assert host.only_packet().destination == REMOTE


def test_lower_priorities_are_asked_when_the_higher_ones_are_silent() -> None:
    host = LoneHost()
    host.table.add(Rule.forward(SERVICE, REMOTE, priority=10))
    host.table.add(Rule.forward(SERVICE, OTHER, priority=5))
    host.connect()
    assert [packet.destination for _, packet in host.advance(1.1)] == [REMOTE, OTHER, REMOTE, OTHER]


def test_copies_to_different_instances_carry_the_same_names_and_numbers() -> None:
    host = LoneHost()
    host.forward(REMOTE, OTHER)
    host.connect()
    (_, first), (_, second) = host.advance(0.3)
    assert first.destination != second.destination
    assert first.sal._replace(transport=b"") == second.sal._replace(transport=b"")
    assert first.segment == second.segment


def test_broadcast_rules_send_one_copy_per_interface() -> None:
    host = LoneHost()
    host.table.replace_broadcast_rules([Rule.broadcast_on(BROADCAST, WIRE_INDEX), Rule.broadcast_on(9, 99)])
    host.connect()
    syn = host.only_packet()
    assert (syn.source, syn.destination, syn.interface_index) == (LOCAL, BROADCAST, WIRE_INDEX)
    assert [packet.destination for _, packet in host.advance(1.5)] == [BROADCAST] * 3


def test_a_local_service_is_reached_over_loopback() -> None:
    host = LoneHost()
    host.listen()
    flow_id = host.connect()
    syn = host.only_packet()
    assert (syn.source, syn.destination, syn.interface_index) == (LOOPBACK, LOOPBACK, LOOPBACK_INDEX)
    assert syn.segment is not None
    assert syn.segment.options.mss == 32767
    sent = [syn]
    while sent:
        for each in sent:
            host.receive(each.packet, interface_index=LOOPBACK_INDEX)
        sent = host.packets()
    assert host.states() == ["CONNECTED", "CONNECTED"]
    assert [each.flow_id for each in host.news(Connected)] == [flow_id]


def test_the_default_service_can_be_connected_to_by_rule_only() -> None:
    host = LoneHost()
    host.table.add(Rule.forward(ServicePrefix.of(DEFAULT_SERVICE, 0), REMOTE))
    host.connect()
    assert host.only_packet().destination == REMOTE
