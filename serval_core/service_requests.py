"""What can other programs ask the stack about services, and have it change? Requests on the stack socket.

    service_add     service, type (forward, drop, delay), address, interface_index, priority, weight,
                    idle_timeout_s, hard_timeout_s
    service_modify  service, old_address, and of the above what shall be different
    service_delete  service, type, address
    services        {}                       all rules, by prefix
    resolve         service                  what would happen to a SYN, and why
    events          kinds (default: all)     a stream of events; `events_lost` says how many could not be kept
    stats           {}                       the service table and the delay queue in numbers
    delay_verdict   service, verdict (release, drop)

Services are texts of SPEC 1.2.1, prefixes where that makes sense; addresses are dotted. This file checks and
translates; what happens is up to the service table and the stack.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Collection
from dataclasses import replace
from typing import Any, Literal, Protocol, TypeVar

import msgspec

from serval_core.errors import OurMistake
from serval_core.names import SERVICE_ID_BITS, ServicePrefix, parse_address, parse_service
from serval_core.rules import DEMUX_PRIORITY, FORWARD_PRIORITY, FORWARD_WEIGHT, Rule, RuleType
from serval_core.service_events import EventQueue, ServiceEvents, check_kinds
from serval_core.service_table import ServiceTable
from serval_core.stack_socket_server import Handler


class Services(Protocol):
    """What the requests need of the stack (`stack_services`)."""

    table: ServiceTable
    events: ServiceEvents

    def release_delayed(self, prefix: ServicePrefix) -> int:
        """Resolve anew what waits."""

    def drop_delayed(self, prefix: ServicePrefix, reason: str) -> int:
        """Give up what waits."""

    def delayed_services(self) -> dict[str, int]:
        """Which services are waited for, and by how many."""

    def delay_counters(self) -> dict[str, int]:
        """What became of those that waited."""


class _Strict(msgspec.Struct, forbid_unknown_fields=True):
    pass


class _Add(_Strict):
    service: str
    type: Literal["forward", "drop", "delay"] = "forward"
    address: str | None = None
    interface_index: int = 0
    priority: int | None = None
    weight: int = FORWARD_WEIGHT
    idle_timeout_s: float = 0.0
    hard_timeout_s: float = 0.0


class _Modify(_Strict):
    service: str
    old_address: str
    address: str | None = None
    interface_index: int | None = None
    priority: int | None = None
    weight: int | None = None
    idle_timeout_s: float | None = None
    hard_timeout_s: float | None = None


class _Delete(_Strict):
    service: str
    type: Literal["forward", "drop", "delay"] = "forward"
    address: str | None = None


class _Nothing(_Strict):
    pass


class _Resolve(_Strict):
    service: str


class _Events(_Strict):
    kinds: list[str] | None = None


class _Verdict(_Strict):
    service: str
    verdict: Literal["release", "drop"]


A = TypeVar("A", bound=msgspec.Struct)


class ServiceRequests:
    """Answers the requests of one stack. `clock` tells the time that the service table counts in."""

    def __init__(self, services: Services, clock: Callable[[], float] = time.monotonic) -> None:
        self._services = services
        self._clock = clock

    def handlers(self) -> dict[str, Handler]:
        """By the names under which they are asked for."""
        return {
            "service_add": checked(_Add, self._add),
            "service_modify": checked(_Modify, self._modify),
            "service_delete": checked(_Delete, self._delete),
            "services": checked(_Nothing, lambda _: self._services.table.snapshot()),
            "resolve": checked(_Resolve, self._resolve),
            "events": checked(_Events, self._events),
            "stats": checked(_Nothing, self._stats),
            "delay_verdict": checked(_Verdict, self._verdict),
        }

    def _add(self, asked: _Add) -> object:
        rule = _rule(asked)
        self._services.table.add(rule, self._clock())
        released = 0 if rule.type is RuleType.DELAY else self._services.release_delayed(rule.prefix)
        return {"prefix": str(rule.prefix), "released": released}

    def _modify(self, asked: _Modify) -> object:
        prefix, old_address = parse_service(asked.service), parse_address(asked.old_address)
        old = self._services.table.rule(prefix, RuleType.FORWARD, old_address)
        given = {name: getattr(asked, name) for name in _CHANGEABLE if getattr(asked, name) is not None}
        address = old_address if asked.address is None else parse_address(asked.address)
        rule = replace(old, **given, address=address, origin="manual")
        self._services.table.modify(prefix, old_address, rule, self._clock())
        return {"prefix": str(prefix), "released": self._services.release_delayed(prefix)}

    def _delete(self, asked: _Delete) -> object:
        prefix, rule_type = parse_service(asked.service), RuleType[asked.type.upper()]
        if rule_type is RuleType.FORWARD and asked.address is None:
            raise OurMistake(f"say which rule for {asked.service}: give its address, or the type drop or delay")
        address = 0 if asked.address is None else parse_address(asked.address)
        self._services.table.remove_rule(prefix, rule_type, address)
        return {"prefix": str(prefix)}

    def _resolve(self, asked: _Resolve) -> object:
        prefix = parse_service(asked.service)
        if prefix.bits not in (0, SERVICE_ID_BITS):
            raise OurMistake(f"{asked.service} is a prefix, and packets have a whole serviceID: leave the bits out")
        return self._services.table.explain(prefix.service_id, self._clock())

    def _events(self, asked: _Events) -> AsyncGenerator[object, None]:
        check_kinds(asked.kinds or ())
        return follow(self._services.events, asked.kinds)

    def _stats(self, _: _Nothing) -> object:
        table = self._services.table
        waiting = self._services.delayed_services()
        return {
            "prefixes": len(table),
            "listening": len(table.bound()),
            **table.counters,
            "delay_queue": {
                "waiting": sum(waiting.values()),
                "services": waiting,
                **self._services.delay_counters(),
            },
        }

    def _verdict(self, asked: _Verdict) -> object:
        prefix = parse_service(asked.service)
        if asked.verdict == "release":
            return {"released": self._services.release_delayed(prefix)}
        return {"dropped": self._services.drop_delayed(prefix, "an operator's verdict")}


_CHANGEABLE = ("interface_index", "priority", "weight", "idle_timeout_s", "hard_timeout_s")


async def follow(events: ServiceEvents, kinds: Collection[str] | None) -> AsyncGenerator[object, None]:
    """The events from now on, as dicts. Slow readers lose the newest and are told how many."""
    some = asyncio.Event()
    queue = EventQueue(some.set)
    unsubscribe = events.subscribe(queue.put, kinds)
    try:
        while True:
            await some.wait()
            some.clear()
            for event in queue.take():
                yield event.as_dict()
    finally:
        unsubscribe()


def _rule(asked: _Add) -> Rule:
    prefix, rule_type = parse_service(asked.service), RuleType[asked.type.upper()]
    if rule_type is RuleType.FORWARD:
        if asked.address is None:
            raise OurMistake(f"say where {asked.service} is: give the address of an instance or service router")
    elif asked.address is not None or asked.interface_index or asked.weight != FORWARD_WEIGHT:
        raise OurMistake(f"a {asked.type} rule has no address, interface or weight: leave them out")
    priority = asked.priority
    if priority is None:
        priority = DEMUX_PRIORITY if rule_type is RuleType.DROP else FORWARD_PRIORITY
    return Rule(
        prefix,
        rule_type,
        priority,
        asked.weight,
        0 if asked.address is None else parse_address(asked.address),
        asked.interface_index,
        idle_timeout_s=asked.idle_timeout_s,
        hard_timeout_s=asked.hard_timeout_s,
    )


def checked(kind: type[A], handler: Callable[[A], object]) -> Handler:
    """A handler of plain arguments, which are checked to be of `kind`."""

    def checked(arguments: dict[str, Any]) -> object:
        try:
            asked = msgspec.convert(arguments, kind)
        except msgspec.ValidationError as error:
            raise OurMistake(f"the arguments of the request are wrong: {error}") from None
        return handler(asked)

    return checked
