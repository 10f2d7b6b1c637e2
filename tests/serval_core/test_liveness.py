"""Which targets are marked down, on what evidence, for how long, and what makes up for it?"""

from __future__ import annotations

import pytest

from serval_core.names import ServiceID, ServicePrefix, parse_address
from serval_core.rules import Rule
from serval_core.sal import SalSettings
from tests.serval_core.instances import answer, down, refusal
from tests.serval_core.lone_host import LOCAL, OTHER, REMOTE, SERVICE, SERVICE_ID, LoneHost

THIRD = OTHER + 1
ROUTER = parse_address("10.0.0.99")


def test_a_refusing_instance_is_passed_over_for_a_while() -> None:
    host = LoneHost()
    host.forward(REMOTE, OTHER)
    host.table.modify(SERVICE, REMOTE, Rule.forward(SERVICE, REMOTE, weight=1_000_000))
    host.connect()
    refusal(host, host.only_packet())
    answer(host, host.only_packet())
    assert down(host) == {"10.0.0.2": "refused"}
    for _ in range(20):
        host.connect()
        syn = host.only_packet()
        assert syn.destination == OTHER
        answer(host, syn)
    host.advance(2.1)
    assert "10.0.0.2" not in down(host)


def test_one_lost_packet_does_not_mark_an_instance_and_two_do() -> None:
    host = LoneHost()
    host.table.add(Rule.forward(SERVICE, REMOTE, priority=2))
    host.table.add(Rule.forward(SERVICE, OTHER, priority=1))
    for expected in ({}, {"10.0.0.2": "silent"}):
        host.connect()
        assert host.only_packet().destination == REMOTE
        answer(host, host.advance(0.21)[-1][1])
        assert down(host) == expected
    host.connect()
    assert host.only_packet().destination == OTHER


def test_an_answer_ends_a_mark_and_its_history() -> None:
    host = LoneHost()
    host.forward(REMOTE)
    host.connect()
    late = host.only_packet()
    host.advance(1.0)
    assert down(host) == {"10.0.0.2": "silent"}
    answer(host, late)
    assert down(host) == {}
    host.connect()
    host.advance(0.25)
    assert down(host) == {}


def test_marks_last_longer_each_time() -> None:
    host = LoneHost()
    host.forward(REMOTE)
    lasted = []
    for _ in range(6):
        host.connect()
        refusal(host, host.only_packet())
        before, until = host.now, host.table.next_expiry()
        assert until is not None
        lasted.append(until - before)
        host.advance(until - before + 0.01)
        assert down(host) == {}
    assert lasted == pytest.approx([2, 4, 8, 16, 30, 30])


def test_what_is_down_is_used_when_nothing_else_is_left() -> None:
    host = LoneHost()
    host.forward(REMOTE, OTHER)
    host.connect()
    for _ in range(2):
        refusal(host, host.only_packet())
    assert set(down(host)) == {"10.0.0.2", "10.0.0.3"}
    host.connect()
    syn = host.only_packet()
    answer(host, syn)
    assert "CONNECTED" in host.states()
    assert f"10.0.0.{syn.destination & 255}" not in down(host)


def test_a_refused_service_does_not_speak_against_a_rule_for_many() -> None:
    host = LoneHost()
    host.table.add(Rule.forward(ServicePrefix.of(SERVICE_ID, 16), REMOTE))
    host.connect()
    refusal(host, host.only_packet())
    assert down(host) == {}


def test_a_service_that_does_not_exist_does_not_bring_a_router_down() -> None:
    """Under a rule for many services one silent service may be at fault itself; two speak against the target."""
    host = LoneHost(SalSettings(connect_timeout_s=1.0))
    host.table.add(Rule.forward(ServicePrefix.of(SERVICE_ID, 16), ROUTER))
    for _ in range(3):
        host.connect()
        host.advance(1.1)
    assert down(host) == {}
    host.sal.connect(ServiceID(SERVICE_ID[:31] + b"\7"), host.now)
    host.advance(1.1)
    assert down(host) == {"10.0.0.99": "silent"}


def test_the_router_and_not_the_instance_behind_it_gets_credit_for_an_answer() -> None:
    host = LoneHost()
    host.forward(ROUTER)
    host.connect()
    syn = host.only_packet()
    host.advance(1.0)
    assert down(host) == {"10.0.0.99": "silent"}
    answer(host, syn, (LOCAL, ROUTER, THIRD), THIRD)
    assert down(host) == {}


def test_the_timeout_follows_what_is_known_of_each_instance() -> None:
    host = LoneHost()
    host.table.add(Rule.forward(SERVICE, REMOTE, priority=2))
    host.table.add(Rule.forward(SERVICE, OTHER, priority=1))
    host.connect()
    first = host.only_packet()
    host.now += 0.002
    answer(host, first)
    host.connect()
    host.only_packet()
    ((at, _),) = host.advance(0.21)
    assert at == pytest.approx(0.202)  # 2 ms and the margin


def test_the_instance_that_answers_after_others_were_silent_is_measured_too() -> None:
    host = LoneHost()
    host.table.add(Rule.forward(SERVICE, REMOTE, priority=2))
    host.table.add(Rule.forward(SERVICE, OTHER, priority=1))
    host.connect()
    second = host.advance(0.2)[-1][1]
    host.now += 0.05
    answer(host, second)
    assert [flow["round_trip_s"] for flow in host.sal.flows()] == pytest.approx([0.05])
