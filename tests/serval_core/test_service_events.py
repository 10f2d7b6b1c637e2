"""Events reach who asked for them, cost nobody else anything, and never pile up."""

from __future__ import annotations

from itertools import count

import pytest

from serval_core.errors import OurMistake
from serval_core.service_events import KINDS, Event, EventQueue, ServiceEvents


def events_and_errors() -> tuple[ServiceEvents, list[Exception]]:
    """Events whose clock ticks once per reading, from 1."""
    errors: list[Exception] = []
    ticks = count(1)
    return ServiceEvents(lambda: float(next(ticks)), errors.append), errors


def test_subscribers_get_what_they_asked_for() -> None:
    events, _ = events_and_errors()
    everything: list[Event] = []
    delays: list[Event] = []
    events.subscribe(everything.append)
    events.subscribe(delays.append, ["delayed", "delay_dropped"])
    events.publish("delayed", service="76568")
    events.publish("registered", prefix="76568")
    assert [event.kind for event in everything] == ["delayed", "registered"]
    assert delays == [Event("delayed", 1.0, {"service": "76568"})]
    assert delays[0].as_dict() == {"event": "delayed", "at": 1.0, "service": "76568"}


def test_unsubscribing_ends_it_and_may_be_done_twice() -> None:
    events, _ = events_and_errors()
    seen: list[Event] = []
    end = events.subscribe(seen.append)
    assert events.wanted("flow_opened")
    end()
    end()
    events.publish("flow_opened")
    assert seen == []
    assert not events.wanted("flow_opened")


def test_two_equal_subscriptions_end_one_at_a_time() -> None:
    events, _ = events_and_errors()
    seen: list[Event] = []
    end = events.subscribe(seen.append)
    events.subscribe(seen.append)
    end()
    end()
    events.publish("delayed")
    assert len(seen) == 1


def test_a_defective_subscriber_costs_nobody_else_anything() -> None:
    events, errors = events_and_errors()
    seen: list[Event] = []

    def defective(event: Event) -> None:
        raise ZeroDivisionError(event.kind)

    events.subscribe(defective)
    events.subscribe(seen.append)
    events.publish("delayed")
    assert [str(error) for error in errors] == ["delayed"]
    assert len(seen) == 1


def test_a_subscriber_may_leave_while_it_is_told() -> None:
    events, errors = events_and_errors()
    seen: list[str] = []

    def once(event: Event) -> None:
        seen.append("once")
        end()

    end = events.subscribe(once)
    events.subscribe(lambda event: seen.append("always"))
    events.publish("delayed")
    events.publish("delayed")
    assert seen == ["once", "always", "always"]
    assert errors == []


def test_unknown_kinds_are_refused() -> None:
    events, _ = events_and_errors()
    with pytest.raises(OurMistake, match='"dealyed" is no kind of event; there are: delay_dropped, '):
        events.subscribe(lambda event: None, ["dealyed"])
    with pytest.raises(OurMistake, match='"dealyed" is no kind of event'):
        events.publish("dealyed")
    assert "delayed" in KINDS


def test_a_slow_reader_loses_the_newest_and_is_told_how_many() -> None:
    events, _ = events_and_errors()
    woken: list[bool] = []
    queue = EventQueue(lambda: woken.append(True), limit=3)
    events.subscribe(queue.put)
    for number in range(5):
        events.publish("rule_hit", number=number)
    assert woken == [True]
    taken = queue.take()
    assert [event.fields for event in taken] == [{"number": 0}, {"number": 1}, {"number": 2}, {"count": 2}]
    assert (taken[-1].kind, taken[-1].at) == ("events_lost", 5.0)
    assert queue.take() == []
    events.publish("rule_hit", number=9)
    assert woken == [True, True]
    assert [event.fields for event in queue.take()] == [{"number": 9}]
