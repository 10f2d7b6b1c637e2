"""Failover within the handshake: which instance is asked next, when, and how a connect fails in the end."""

from __future__ import annotations

from errno import ECONNREFUSED, EHOSTUNREACH, ENETUNREACH, ETIMEDOUT

import pytest

from serval_core.addresses import LOOPBACK
from serval_core.dataplane.memory_network import LOOPBACK_INDEX, WIRE_INDEX
from serval_core.effects import Connected
from serval_core.names import parse_address
from serval_core.rules import Rule
from serval_core.sal import SalSettings
from serval_core.wire.sal import ACK, RST
from tests.serval_core.instances import REFUSING, answer, down, refusal
from tests.serval_core.lone_host import (
    LOCAL,
    OTHER,
    OUR_OPTIONS,
    REMOTE,
    SERVICE,
    LoneHost,
    Peer,
    failure,
)

THIRD = OTHER + 1
ROUTER = parse_address("10.0.0.99")
BROADCAST = parse_address("10.0.0.255")


# One flow


def test_a_refusal_is_followed_by_the_next_instance_at_once() -> None:
    host = LoneHost()
    host.forward(REMOTE, OTHER, THIRD)
    host.connect()
    asked = []
    for _ in range(3):
        syn = host.only_packet()
        asked.append(syn.destination)
        if len(asked) < 3:
            refusal(host, syn)
    assert sorted(asked) == [REMOTE, OTHER, THIRD]
    answer(host, syn)
    assert host.states() == ["CONNECTED"]


def test_a_connect_is_refused_only_when_every_instance_has_refused() -> None:
    host = LoneHost()
    host.forward(REMOTE, OTHER)
    host.connect()
    refusal(host, host.only_packet())
    last = host.only_packet()
    refusal(host, last)
    failed = failure(host)
    assert failed.errno == ECONNREFUSED
    assert failed.why == f"refused by 10.0.0.{last.destination & 255}"


def test_one_silent_instance_keeps_a_connect_from_being_refused() -> None:
    host = LoneHost()
    host.forward(REMOTE, OTHER)
    host.connect()
    silent = host.only_packet()
    ((at, other),) = host.advance(0.3)
    assert at == pytest.approx(0.2)
    refusal(host, other)
    again = {packet.destination for _, packet in host.advance(0.5)}
    assert silent.destination in again
    host.advance(10)
    assert failure(host).errno == ETIMEDOUT


def test_refusing_instances_are_asked_again_in_the_next_round() -> None:
    """One may have come back meanwhile, and as long as another is silent there is time."""
    host = LoneHost()
    host.table.add(Rule.forward(SERVICE, REMOTE, priority=2))
    host.table.add(Rule.forward(SERVICE, OTHER, priority=1))
    host.connect()
    refusal(host, host.only_packet())
    assert host.only_packet().destination == OTHER
    (silent_once, back) = [packet for _, packet in host.advance(0.7)][-2:]
    assert {silent_once.destination, back.destination} == {REMOTE, OTHER}


def test_an_instance_that_cannot_be_reached_is_followed_by_the_next_at_once() -> None:
    host = LoneHost()
    host.forward(REMOTE, OTHER)
    host.connect()
    first = host.only_packet()
    host.sal.send_failed(first.packet, ENETUNREACH, host.now)
    second = host.only_packet()
    assert {first.destination, second.destination} == {REMOTE, OTHER}
    assert host.now == 1000.0
    answer(host, second)
    assert host.states() == ["CONNECTED"]


def test_an_only_instance_that_cannot_be_reached_is_tried_until_the_timeout() -> None:
    host = LoneHost(SalSettings(connect_timeout_s=2.0))
    host.forward(REMOTE)
    host.connect()
    tries = 0
    while host.sal.flows():
        for syn in host.packets():
            tries += 1
            host.sal.send_failed(syn.packet, EHOSTUNREACH, host.now)
        host.now = host.sal.next_timeout() or host.now
        host.sal.handle_timeouts(host.now)
    assert 3 <= tries <= 6
    failed = failure(host)
    assert failed.errno == EHOSTUNREACH
    assert failed.why == "10.0.0.2 cannot be reached: EHOSTUNREACH"


def test_an_icmp_error_moves_the_connect_on_like_a_send_error() -> None:
    host = LoneHost()
    host.forward(REMOTE, OTHER)
    host.connect()
    first = host.only_packet()
    host.sal.send_failed(first.packet[:28], EHOSTUNREACH, host.now)  # what RFC 792 promises
    assert host.only_packet().destination != first.destination


def test_icmp_errors_of_somebody_who_does_not_know_the_nonce_are_ignored() -> None:
    host = LoneHost()
    host.forward(REMOTE, OTHER)
    host.connect()
    syn = host.only_packet()
    forged = syn.packet[:44] + bytes(8) + syn.packet[52:]
    host.sal.send_failed(forged, EHOSTUNREACH, host.now)
    host.sal.send_failed(syn.packet[:23] + b"\0" + syn.packet[24:], EHOSTUNREACH, host.now)
    host.sal.send_failed(b"E" + bytes(5), EHOSTUNREACH, host.now)
    assert host.packets() == []
    assert host.dropped("spoofed_icmp_error") == 1
    assert down(host) == {}


def test_an_error_about_an_instance_that_was_given_up_changes_nothing() -> None:
    host = LoneHost()
    host.forward(REMOTE, OTHER)
    host.connect()
    first = host.only_packet()
    host.advance(0.3)
    host.sal.send_failed(first.packet, EHOSTUNREACH, host.now)
    assert host.packets() == []


def test_a_late_refusal_does_not_hurry_the_instance_that_is_being_asked() -> None:
    host = LoneHost()
    host.forward(REMOTE, OTHER)
    host.connect()
    first = host.only_packet()
    host.advance(0.3)
    refusal(host, first)
    assert host.packets() == []
    assert host.states() == ["REQUEST"]


def test_a_refusal_of_a_broadcast_syn_ends_nothing() -> None:
    """Another host on the network may have the service."""
    host = LoneHost()
    host.table.replace_broadcast_rules([Rule.broadcast_on(BROADCAST, WIRE_INDEX)])
    host.connect()
    syn = host.only_packet()
    refusal(host, syn, REMOTE)
    assert host.dropped("refusal_of_broadcast") == 1
    host.sal.send_failed(syn.packet, ENETUNREACH, host.now)
    answer(host, syn, address=OTHER)
    assert host.states() == ["CONNECTED"]


def test_a_drop_rule_below_a_silent_instance_refuses_nothing() -> None:
    host = LoneHost()
    host.table.add(Rule.forward(SERVICE, REMOTE, priority=3))
    host.table.add(Rule.drop(SERVICE, priority=2))
    host.connect()
    assert {packet.destination for _, packet in host.advance(5)} == {REMOTE}


def test_a_local_listener_that_refuses_is_the_only_instance() -> None:
    host = LoneHost(SalSettings(refuse_unknown_services=True))
    host.table.add(Rule.demux(SERVICE, 77))  # of something that accepts no connections
    host.connect()
    syn = host.only_packet()
    assert syn.destination == LOOPBACK
    host.receive(syn.packet, interface_index=LOOPBACK_INDEX)
    (reset,) = host.packets()
    host.receive(reset.packet, interface_index=LOOPBACK_INDEX)
    assert failure(host).errno == ECONNREFUSED


# Through a service router


def test_an_instance_behind_a_router_that_refuses_makes_us_ask_the_router_again() -> None:
    host = LoneHost()
    host.forward(ROUTER)
    host.connect()
    refusal(host, host.only_packet(), REMOTE)
    refusal(host, host.only_packet(), OTHER)
    third = host.only_packet()
    assert third.destination == ROUTER
    answer(host, third, (LOCAL, ROUTER, THIRD), THIRD)
    assert host.states() == ["CONNECTED"]
    assert down(host) == {}


def test_an_icmp_error_about_an_instance_behind_a_router_makes_us_ask_the_router_again() -> None:
    """The router leaves the IP source alone, so the error about the packet it passed on comes to us."""
    host = LoneHost()
    host.forward(ROUTER)
    host.connect()
    syn = host.only_packet()
    passed_on = syn.packet[:16] + REMOTE.to_bytes(4, "big") + syn.packet[20:]
    host.sal.send_failed(passed_on, EHOSTUNREACH, host.now)
    again = host.only_packet()
    assert again.destination == ROUTER
    host.sal.send_failed(passed_on, EHOSTUNREACH, host.now)
    assert host.packets() == []  # the same one again: not at once
    assert down(host) == {}
    answer(host, again, (LOCAL, ROUTER, THIRD), THIRD)
    assert host.states() == ["CONNECTED"]


def test_a_router_that_only_has_refusing_instances_is_asked_at_growing_intervals() -> None:
    host = LoneHost(SalSettings(connect_timeout_s=10.0))
    host.forward(ROUTER)
    host.connect()
    asked = [host.only_packet()]
    while host.sal.flows():
        refusal(host, asked[-1], REMOTE)
        asked += host.packets()
        if not host.sal.flows():
            break
        host.now = host.sal.next_timeout() or host.now
        host.sal.handle_timeouts(host.now)
        asked += host.packets()
    assert 15 < len(asked) < 40
    failed = failure(host)
    assert failed.errno == ECONNREFUSED
    assert failed.why == "refused by 10.0.0.2"


def test_a_prototype_is_never_refused() -> None:
    """It would give up, where its next SYN may reach another instance."""
    host = LoneHost(REFUSING)
    host.receive(Peer().syn())
    assert host.packets() == []
    host.receive(Peer(options=OUR_OPTIONS).syn(), broadcast=True)
    assert host.packets() == []
    host.receive(Peer(options=OUR_OPTIONS).syn())
    assert host.only_packet().control.flags == RST | ACK
    assert host.dropped("no_listener") == 3


def test_a_connect_that_succeeds_leaves_nothing_of_the_search() -> None:
    host = LoneHost()
    host.forward(REMOTE)
    flow_id = host.connect()
    answer(host, host.only_packet())
    assert host.news(Connected) == [Connected(flow_id)]
    assert host.sal._core.flows.by_id[flow_id].search is None
