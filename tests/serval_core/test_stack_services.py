"""What the running stack tells about services: flows that open and end, rules that are hit, connects that wait."""

from __future__ import annotations

import queue

from lab.hosts import Lab
from serval_core.names import ServicePrefix, parse_address, parse_service
from serval_core.rules import Rule, RuleType
from serval_core.service_events import Event, ServiceEvents
from serval_core.service_table import ServiceTable
from serval_core.stack_services import RuleHits
from tests.serval_core.stack_thread import StackThread, Stream

SERVICE = "76568"
PREFIX = parse_service(SERVICE)


class Heard:
    """The events of a running stack, as they come."""

    def __init__(self, stack: StackThread, *kinds: str) -> None:
        self._events: queue.Queue[Event] = queue.Queue()
        stack.call(lambda: stack.stack.events.subscribe(self._events.put, kinds or None))

    def next(self) -> dict[str, object]:
        event = self._events.get(timeout=20)
        return {"event": event.kind, **event.fields}


def test_a_connection_is_told_of_at_both_ends(lab: Lab) -> None:
    near_host, far_host = lab.host("client"), lab.host("server")
    lab.connect(near_host, "10.1.0.1/24", far_host, "10.1.0.2/24")
    with StackThread(near_host, broadcast=False) as near, StackThread(far_host) as far:
        listener = far.listen(SERVICE)
        near.forward(SERVICE, "10.1.0.2")
        kinds = ("rule_hit", "flow_opened", "flow_ended")
        near_heard, far_heard = Heard(near, *kinds), Heard(far, *kinds)
        stream = near.connect(SERVICE)
        hit = near_heard.next()
        assert (hit["event"], hit["prefix"], hit["address"], hit["packets_resolved"]) == (
            "rule_hit",
            SERVICE,
            "10.1.0.2",
            1,
        )
        opened = near_heard.next()
        assert opened == {
            "event": "flow_opened",
            "flow_id": stream.connection.flow_id,
            "role": "active",
            "service": SERVICE,
            "peer_address": "10.1.0.2",
        }
        accepted = listener.accept()
        assert far_heard.next()["type"] == "DEMUX"
        passive = far_heard.next()
        assert (passive["event"], passive["role"], passive["service"]) == ("flow_opened", "passive", SERVICE)
        stream.abort()
        ended = near_heard.next()
        assert (ended["event"], ended["service"], ended["error"]) == ("flow_ended", SERVICE, "ECONNABORTED")
        ended = far_heard.next()
        assert (ended["event"], ended["flow_id"], ended["error"]) == (
            "flow_ended",
            accepted.connection.flow_id,
            "ECONNRESET",
        )
        accepted.release()


def test_a_subscriber_resolves_what_a_connect_waits_for(lab: Lab) -> None:
    """Late binding, as a controller does it: told by an event, it installs a rule and releases."""
    near_host, far_host = lab.host("client"), lab.host("server")
    lab.connect(near_host, "10.1.0.1/24", far_host, "10.1.0.2/24")
    with StackThread(near_host, broadcast=False) as near, StackThread(far_host) as far:
        listener = far.listen(SERVICE)

        def resolve(event: Event) -> None:
            prefix = parse_service(str(event.fields["service"]))
            near.stack.table.add(Rule.forward(prefix, parse_address("10.1.0.2"), origin="resolved"))
            near.stack.release_delayed(prefix)

        near.call(lambda: near.stack.table.add(Rule.delay(ServicePrefix.of(PREFIX.service_id, 16))))
        near.call(lambda: near.stack.events.subscribe(resolve, ["delayed"]))
        heard = Heard(near, "delayed", "delay_released", "delay_dropped")
        outcome = near.begin_connect(SERVICE).get(timeout=20)
        assert isinstance(outcome, Stream)
        outcome.socket.sendall(b"late")
        far_stream = listener.accept()
        assert far_stream.socket.recv(4) == b"late"
        assert [heard.next()["event"] for _ in range(2)] == ["delayed", "delay_released"]
        assert near.counters()["delay_released"] == 1
        outcome.release()
        far_stream.release()


def test_a_drop_verdict_from_within_the_event_is_fine(lab: Lab) -> None:
    with StackThread(lab.host("client"), broadcast=False) as near:
        near.call(lambda: near.stack.table.add(Rule.delay(PREFIX)))

        def refuse(event: Event) -> None:
            near.stack.drop_delayed(PREFIX, "not in my zone")

        near.call(lambda: near.stack.events.subscribe(refuse, ["delayed"]))
        outcome = near.begin_connect(SERVICE).get(timeout=20)
        assert isinstance(outcome, OSError)
        assert "not in my zone" in str(outcome)


def test_hits_of_one_rule_are_told_once_per_second() -> None:
    now = 100.0
    table = ServiceTable()
    events = ServiceEvents(lambda: now, lambda error: None)
    table.on_hit = RuleHits(events, lambda: now)
    other = ServicePrefix.of(PREFIX.service_id, 16)
    table.add(Rule.forward(PREFIX, 1))
    table.add(Rule.drop(other))
    seen: list[tuple[object, object, object]] = []
    table.resolve(PREFIX.service_id, lambda: 0.0)
    end = events.subscribe(
        lambda event: seen.append(
            (event.fields["prefix"], event.fields["packets_resolved"], event.fields["packets_dropped"])
        ),
        ["rule_hit"],
    )
    for _ in range(100):
        table.resolve(PREFIX.service_id, lambda: 0.0)
        table.resolve(other.service_id, lambda: 0.0)
    assert seen == [(SERVICE, 2, 0), (str(other), 0, 1)]
    now += 1.0
    table.resolve(PREFIX.service_id, lambda: 0.0)
    assert seen[2:] == [(SERVICE, 102, 0)]
    end()
    now += 1.0
    table.resolve(PREFIX.service_id, lambda: 0.0)
    assert len(seen) == 3
    assert table.rule(PREFIX, RuleType.FORWARD, 1) == Rule.forward(PREFIX, 1)
