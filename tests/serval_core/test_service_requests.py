"""Requests about services: what they change, what they answer, and how senseless ones are refused."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import msgspec
import pytest

from lab.hosts import Host
from lab.waiting import wait_for
from serval_core.errors import OurMistake
from serval_core.names import ServicePrefix
from serval_core.rules import Rule
from serval_core.service_events import QUEUE_LIMIT, ServiceEvents
from serval_core.service_requests import ServiceRequests, follow
from serval_core.stack_socket import RequestFailed, StackSocketClient
from tests.serval_core.lone_host import REMOTE, SERVICE, LoneHost
from tests.serval_core.stack_thread import StackThread


def first_event(stack: StackThread, stream: Iterator[Any]) -> Any:
    """Open the stream, and have something happen once it stands."""
    opened = threading.Event()

    def listen() -> None:
        wait_for(lambda: stack.call(lambda: stack.stack.events.wanted("service_bound")), "the stream stands")
        stack.listen("77")
        opened.set()

    threading.Thread(target=listen).start()
    event = next(stream)
    assert opened.wait(10)
    return event


def raise_it(error: Exception) -> None:
    raise error


class Asked:
    """The requests of a SAL without a stack around it, asked as over the stack socket."""

    def __init__(self) -> None:
        self.host = LoneHost()
        self.table = self.host.table
        self.events = ServiceEvents(lambda: 0.0, raise_it)
        self.handlers = ServiceRequests(self, lambda: self.host.now).handlers()

    def release_delayed(self, prefix: ServicePrefix) -> int:
        return self.host.sal.release_delayed(prefix, self.host.now)

    def drop_delayed(self, prefix: ServicePrefix, reason: str) -> int:
        return self.host.sal.drop_delayed(prefix, self.host.now, reason)

    def delayed_services(self) -> dict[str, int]:
        return {service_id.text: count for service_id, count in self.host.sal.delayed.services().items()}

    def delay_counters(self) -> dict[str, int]:
        return self.host.sal.delayed.counters

    def ask(self, name: str, /, **arguments: object) -> Any:
        return json.loads(msgspec.json.encode(self.handlers[name](json.loads(json.dumps(arguments)))))

    def targets(self) -> list[dict[str, Any]]:
        return [target for entry in self.ask("services") for target in entry["targets"]]


def test_rules_are_added_changed_and_deleted() -> None:
    asked = Asked()
    said = asked.ask(
        "service_add", service="76568", address="10.0.0.2", priority=4, weight=7, hard_timeout_s=60
    )
    assert said == {"prefix": "76568", "released": 0}
    asked.ask("service_modify", service="76568", old_address="10.0.0.2", address="10.0.0.3", weight=9)
    (target,) = asked.targets()
    assert (target["address"], target["priority"], target["weight"]) == ("10.0.0.3", 4, 9)
    assert (target["origin"], target["hard_timeout_s"]) == ("manual", 60)
    asked.ask("service_modify", service="76568", old_address="10.0.0.3", priority=5, hard_timeout_s=0)
    (target,) = asked.targets()
    assert (target["address"], target["priority"], target["hard_timeout_s"]) == ("10.0.0.3", 5, None)
    asked.ask("service_add", service="0x0001:16", type="drop")
    asked.ask("service_add", service="default", type="delay", idle_timeout_s=5)
    assert [target["type"] for target in asked.targets()] == ["FORWARD", "DROP", "DELAY"]
    asked.ask("service_delete", service="76568", address="10.0.0.3")
    asked.ask("service_delete", service="0x0001:16", type="drop")
    asked.ask("service_delete", service="default", type="delay")
    assert asked.ask("services") == []


def test_a_rule_that_an_operator_modified_is_the_operators() -> None:
    asked = Asked()
    asked.table.add(Rule.forward(SERVICE, REMOTE, origin="registered"))
    asked.ask("service_modify", service="76568", old_address="10.0.0.2", weight=2)
    assert [target["origin"] for target in asked.targets()] == ["manual"]


@pytest.mark.parametrize(
    ("request_name", "arguments", "words"),
    [
        ("service_add", {"service": "76568"}, "say where 76568 is: give the address"),
        ("service_add", {"service": "7656x", "address": "10.0.0.2"}, '"7656x" is neither a serviceID'),
        ("service_add", {"service": "76568", "address": "nowhere"}, '"nowhere" is no IPv4 address'),
        ("service_add", {"address": "10.0.0.2"}, "missing required field `service`"),
        ("service_add", {"service": "1", "address": "10.0.0.2", "weigth": 2}, "unknown field `weigth`"),
        ("service_add", {"service": "1", "address": "10.0.0.2", "weight": "two"}, "Expected `int`, got `str`"),
        ("service_add", {"service": "1", "address": "10.0.0.2", "weight": 0}, "only 1 to 4294967295 are possible"),
        ("service_add", {"service": "1", "type": "demux"}, "Invalid enum value 'demux'"),
        ("service_add", {"service": "1", "type": "drop", "address": "10.0.0.2"}, "no address, interface or weight"),
        ("service_add", {"service": "1", "type": "delay", "hard_timeout_s": -1}, "has hard_timeout_s -1"),
        ("service_modify", {"service": "1", "old_address": "10.0.0.2"}, "there is no rule for exactly 1"),
        ("service_delete", {"service": "1"}, "give its address, or the type drop or delay"),
        ("service_delete", {"service": "1", "type": "drop"}, "there is no rule for exactly 1"),
        ("services", {"all": True}, "unknown field `all`"),
        ("resolve", {"service": "0x0001:16"}, "is a prefix, and packets have a whole serviceID"),
        ("events", {"kinds": ["dealyed"]}, '"dealyed" is no kind of event'),
        ("delay_verdict", {"service": "1", "verdict": "maybe"}, "Invalid enum value 'maybe'"),
    ],
)
def test_senseless_requests_are_refused(request_name: str, arguments: dict[str, object], words: str) -> None:
    asked = Asked()
    with pytest.raises(OurMistake) as caught:
        asked.ask(request_name, **arguments)
    assert words in str(caught.value)
    assert asked.ask("services") == []


def test_resolve_explains() -> None:
    asked = Asked()
    asked.ask("service_add", service="76568", address="10.0.0.2")
    said = asked.ask("resolve", service="76568")
    assert (said["verdict"], said["targets"]) == ("FORWARD", ["10.0.0.2"])
    assert asked.ask("resolve", service="5")["verdict"] is None


def test_an_added_rule_releases_what_waits_for_it() -> None:
    asked = Asked()
    asked.ask("service_add", service="0x00012b18:32", type="delay")
    asked.host.connect()
    assert asked.ask("stats")["delay_queue"]["services"] == {"76568": 1}
    assert asked.ask("service_add", service="76568", address="10.0.0.2") == {"prefix": "76568", "released": 1}
    assert asked.host.only_packet().destination == REMOTE
    stats = asked.ask("stats")
    assert (stats["prefixes"], stats["delayed"]) == (2, 1)
    assert stats["delay_queue"]["waiting"] == 0
    assert stats["delay_queue"]["released"] == 1


def test_a_verdict_can_be_given_by_hand() -> None:
    asked = Asked()
    asked.ask("service_add", service="76568", type="delay")
    asked.host.connect()
    assert asked.ask("delay_verdict", service="5", verdict="drop") == {"dropped": 0}
    assert asked.ask("delay_verdict", service="default", verdict="drop") == {"dropped": 1}
    asked.host.connect()
    assert asked.ask("delay_verdict", service="76568", verdict="release") == {"released": 1}
    assert asked.host.sal.flows() == []


def test_a_follower_that_does_not_read_is_told_what_it_lost() -> None:
    async def scenario() -> list[Any]:
        asked = Asked()
        stream = follow(asked.events, ["registered"])
        first = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        for number in range(QUEUE_LIMIT + 5):
            asked.events.publish("registered", number=number)
        said = [await first] + [await anext(stream) for _ in range(QUEUE_LIMIT)]
        await stream.aclose()
        assert not asked.events.wanted("registered")
        return said

    said = asyncio.run(scenario())
    assert [each["number"] for each in said[:-1]] == list(range(QUEUE_LIMIT))
    assert (said[-1]["event"], said[-1]["count"]) == ("events_lost", 5)


def test_events_is_a_stream() -> None:
    asked = Asked()
    assert isinstance(asked.handlers["events"]({}), AsyncGenerator)


def test_a_running_stack_is_managed_over_its_socket(host: Host) -> None:
    """Rules with timeouts end by the stack's own timer, and whoever follows the events sees all of it."""
    with StackThread(host) as stack:
        client = StackSocketClient()
        stream = client.stream("events", kinds=["service_bound", "service_unbound", "rule_added", "rule_expired"])
        began = host.call(lambda: first_event(stack, stream))
        assert began["event"] == "service_bound"
        host.call(client.request, "service_add", service="5", address="10.9.9.9", hard_timeout_s=0.05)
        seen = [next(stream) for _ in range(3)]
        assert [(each["event"], each["prefix"], each.get("address")) for each in seen] == [
            ("rule_added", "77", None),
            ("rule_added", "5", "10.9.9.9"),
            ("rule_expired", "5", "10.9.9.9"),
        ]
        assert [str(prefix) for prefix in stack.call(stack.stack.bound_services)] == ["77"]
        with pytest.raises(RequestFailed, match="there is no rule for exactly 5"):
            host.call(client.request, "service_delete", service="5", address="10.9.9.9")
        assert host.call(client.request, "resolve", service="77")["verdict"] == "DEMUX"
