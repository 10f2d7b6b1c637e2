"""DELAY: who waits, for how long, what a verdict does, and what it means for a connect."""

from __future__ import annotations

from errno import EHOSTUNREACH, ENOSPC, ETIMEDOUT

import pytest

from serval_core.delay_queue import DelayQueue, Origin
from serval_core.effects import ConnectFailed, Happened
from serval_core.names import DEFAULT_PREFIX, ServiceID, ServicePrefix
from serval_core.rules import Rule, RuleType
from serval_core.sal import SalSettings
from serval_core.timers import Timers
from tests.serval_core.instances import answer
from tests.serval_core.lone_host import OTHER, REMOTE, SERVICE, SERVICE_ID, LoneHost, failure

ONE, TWO = (ServiceID.from_number(number) for number in (0x10000001, 0x20000002))


class Waiting:
    """A queue, and what became of those that waited in it."""

    def __init__(self, limit: int = 3, timeout_s: float = 5.0) -> None:
        self.timers = Timers()
        self.events: list[tuple[str, dict[str, object]]] = []
        self.outcomes: list[tuple[str, str]] = []
        self.queue = DelayQueue(
            limit, timeout_s, self.timers, lambda kind, fields: self.events.append((kind, fields))
        )

    def park(
        self, name: str, service_id: ServiceID = ONE, now: float = 0.0, origin: Origin = "datagram"
    ) -> bool:
        parked = self.queue.park(
            service_id,
            origin,
            lambda now: self.outcomes.append((name, "resumed")),
            lambda reason, now: self.outcomes.append((name, reason)),
            now,
        )
        return parked is not None

    def kinds(self) -> list[str]:
        kinds = [kind for kind, _ in self.events]
        self.events.clear()
        return kinds


def test_packets_of_others_leave_room_for_our_own() -> None:
    """Anybody can send packets through a service router; its own connects still wait for their services."""
    waiting = Waiting(limit=8)
    parked = [waiting.park(f"forwarded {number}", origin="forwarded") for number in range(10)]
    assert parked == [True] * 6 + [False] * 4
    assert waiting.queue.counters["dropped_full"] == 4
    assert [waiting.park("own", TWO) for _ in range(3)] == [True, True, False]
    waiting.queue.release(ServicePrefix.of(ONE), 1.0)
    assert [waiting.park("later", origin="forwarded") for _ in range(7)] == [True] * 6 + [False]
    waiting.timers.run(100.0)
    assert len(waiting.queue) == 0
    assert [waiting.park("at last", origin="forwarded") for _ in range(7)] == [True] * 6 + [False]


def test_only_the_first_to_wait_for_a_service_is_announced() -> None:
    waiting = Waiting()
    for name in ("a", "b"):
        assert waiting.park(name)
    assert waiting.events == [
        ("delayed", {"service": ONE.text, "service_id": ONE.hex_text, "origin": "datagram"})
    ]
    waiting.park("c", TWO)
    assert len(waiting.events) == 2
    assert len(waiting.queue) == 3
    assert waiting.queue.services() == {ONE: 2, TWO: 1}
    waiting.queue.release(DEFAULT_PREFIX, 1.0)
    waiting.events.clear()
    waiting.park("d")
    assert waiting.kinds() == ["delayed"]


def test_a_verdict_concerns_the_services_under_its_prefix() -> None:
    waiting = Waiting()
    for name, service_id in (("a", ONE), ("b", TWO), ("c", ONE)):
        waiting.park(name, service_id)
    waiting.events.clear()
    assert waiting.queue.release(ServicePrefix.of(ONE, 4), 1.0) == 2
    assert waiting.outcomes == [("a", "resumed"), ("c", "resumed")]
    assert waiting.events == [("delay_released", {"service": ONE.text, "count": 2})]
    assert waiting.queue.drop(DEFAULT_PREFIX, 1.0, "no such thing") == 1
    assert waiting.outcomes[2:] == [("b", "no such thing")]
    assert waiting.events[1:] == [
        ("delay_dropped", {"service": TWO.text, "reason": "by_verdict", "count": 1})
    ]
    assert len(waiting.queue) == len(waiting.timers) == 0
    assert waiting.queue.release(DEFAULT_PREFIX, 1.0) == waiting.queue.drop(DEFAULT_PREFIX, 1.0) == 0


def test_the_queue_is_bounded_in_number() -> None:
    waiting = Waiting(limit=2)
    assert [waiting.park(name) for name in "abc"] == [True, True, False]
    assert waiting.kinds() == ["delayed", "delay_dropped"]
    assert waiting.queue.counters["dropped_full"] == 1
    assert waiting.outcomes == []


def test_the_queue_is_bounded_in_age() -> None:
    waiting = Waiting(timeout_s=5.0)
    waiting.park("a", now=0.0)
    waiting.park("b", now=2.0)
    waiting.timers.run(4.9)
    assert waiting.outcomes == []
    waiting.timers.run(5.0)
    assert waiting.outcomes == [("a", "nobody said within 5 s where the service is")]
    waiting.timers.run(7.0)
    assert len(waiting.queue) == 0
    assert waiting.queue.counters["dropped_too_old"] == 2
    assert waiting.kinds() == ["delayed", "delay_dropped", "delay_dropped"]


def test_what_has_withdrawn_is_not_called() -> None:
    waiting = Waiting()
    parked = waiting.queue.park(ONE, "connect", lambda now: None, lambda reason, now: None, 0.0)
    assert parked is not None
    waiting.queue.withdraw(parked)
    waiting.queue.withdraw(parked)
    assert waiting.queue.release(DEFAULT_PREFIX, 1.0) == 0
    assert len(waiting.queue) == len(waiting.timers) == 0


def test_what_is_delayed_again_at_its_release_is_dropped() -> None:
    """Or a controller that releases without a rule would go round in circles with us."""
    waiting = Waiting()
    again: list[bool] = []
    waiting.queue.park(ONE, "forwarded", lambda now: again.append(waiting.park("a")), lambda reason, now: None, 0.0)
    assert waiting.queue.release(DEFAULT_PREFIX, 1.0) == 1
    assert again == [False]
    assert waiting.queue.counters["dropped_still_delayed"] == 1
    assert waiting.kinds() == ["delayed", "delay_released", "delay_dropped"]
    assert waiting.park("later")


# Connects


def delayed_host(settings: SalSettings | None = None) -> LoneHost:
    """A host with one connect that a DELAY rule holds."""
    host = LoneHost(settings)
    host.table.add(Rule.delay(SERVICE))
    host.connect()
    assert host.packets() == []
    assert host.states() == ["REQUEST"]
    assert [effect.kind for effect in host.news(Happened)] == ["delayed"]
    return host


def resolved(host: LoneHost, *addresses: int) -> None:
    """What a resolver does."""
    host.table.remove(SERVICE, RuleType.DELAY)
    host.forward(*addresses)
    assert host.sal.release_delayed(SERVICE, host.now) == 1


def test_a_delayed_connect_goes_on_when_the_service_is_resolved() -> None:
    host = delayed_host()
    assert host.advance(3.0) == []
    resolved(host, REMOTE, OTHER)
    syn = host.only_packet()
    host.now += 0.02
    answer(host, syn)
    (flow,) = host.sal.flows()
    assert (flow["state"], flow["round_trip_s"]) == ("CONNECTED", pytest.approx(0.02))
    assert host.sal.next_timeout() is None


def test_a_resolved_connect_has_its_whole_failover() -> None:
    host = delayed_host()
    resolved(host, REMOTE, OTHER)
    assert {packet.destination for _, packet in host.advance(0.3)} == {REMOTE, OTHER}


def test_a_connect_that_nobody_resolves_fails_in_time() -> None:
    host = delayed_host(SalSettings(delay_timeout_s=3.0))
    host.advance(2.9)
    assert host.news(ConnectFailed) == []
    host.advance(0.2)
    failed = failure(host)
    assert failed.errno == EHOSTUNREACH
    assert failed.why.endswith("nobody said within 3 s where the service is")


def test_the_connect_timeout_bounds_the_waiting_too() -> None:
    host = delayed_host(SalSettings(delay_timeout_s=30.0, connect_timeout_s=4.0))
    host.advance(4.1)
    assert failure(host).errno == ETIMEDOUT
    assert len(host.sal.delayed) == 0


def test_a_drop_verdict_says_its_reason() -> None:
    host = delayed_host()
    assert host.sal.drop_delayed(SERVICE, host.now, "no such service in example.org") == 1
    failed = failure(host)
    assert failed.errno == EHOSTUNREACH
    assert failed.why.endswith("no such service in example.org")


@pytest.mark.parametrize("rules", [(), (Rule.drop(SERVICE),)])
def test_a_release_that_leads_nowhere_ends_the_connect(rules: tuple[Rule, ...]) -> None:
    host = delayed_host()
    host.table.remove(SERVICE, RuleType.DELAY)
    for rule in rules:
        host.table.add(rule)
    host.sal.release_delayed(SERVICE, host.now)
    assert failure(host).errno


def test_a_release_that_meets_the_delay_rule_again_ends_the_connect() -> None:
    host = delayed_host()
    assert host.sal.release_delayed(SERVICE, host.now) == 1
    assert failure(host).errno == ENOSPC
    assert [effect.kind for effect in host.news(Happened)] == ["delayed", "delay_released", "delay_dropped"]


def test_a_cancelled_connect_waits_no_longer() -> None:
    host = LoneHost()
    host.table.add(Rule.delay(SERVICE))
    host.sal.cancel_connect(host.connect(), host.now)
    assert len(host.sal.delayed) == 0
    assert host.sal.next_timeout() is None


def test_more_connects_than_can_wait_fail_at_once() -> None:
    host = delayed_host(SalSettings(delay_limit=1))
    host.connect()
    (failed,) = host.news(ConnectFailed)
    assert failed.errno == ENOSPC


def test_new_paths_do_not_wake_a_delayed_connect() -> None:
    host = delayed_host()
    host.sal.paths_changed(host.now)
    assert host.packets() == []
    resolved(host, REMOTE)
    assert host.only_packet().destination == REMOTE


def test_a_delayed_service_does_not_hold_up_others() -> None:
    host = delayed_host()
    host.table.add(Rule.forward(ServicePrefix.of(ONE), OTHER))
    host.sal.connect(ONE, host.now)
    assert host.only_packet().destination == OTHER


def test_a_delay_rule_that_comes_in_the_middle_lets_the_next_syn_wait() -> None:
    host = LoneHost()
    host.forward(REMOTE)
    host.connect()
    host.only_packet()
    host.table.remove(SERVICE, RuleType.FORWARD, REMOTE)
    host.table.add(Rule.delay(SERVICE))
    assert host.advance(2.0) == []
    resolved(host, OTHER)
    assert host.only_packet().destination == OTHER
    assert host.table.resolve(SERVICE_ID, lambda: 0.0).targets[0].address == OTHER
