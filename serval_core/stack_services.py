"""What does the running stack do about services, beside carrying packets? It tells events and passes news on.

From the service table, the SAL and the network to whoever subscribed (`service_events`), from ICMP errors to
the SAL, and from verdicts to what DELAY rules hold. `ServalStack` owns one of these.
"""

from __future__ import annotations

import asyncio
import errno
import time
from collections.abc import Callable

from serval_core.connection import Connection
from serval_core.datagram_flows import DatagramFlow
from serval_core.dataplane.icmp_errors import IcmpErrors
from serval_core.effects import Happened
from serval_core.names import ServicePrefix, format_address
from serval_core.rules import Rule, RuleType
from serval_core.sal import ServiceAccessLayer
from serval_core.selection import Target
from serval_core.service_events import ServiceEvents
from serval_core.service_table import ServiceTable

RULE_HIT_INTERVAL_S = 1.0
RULE_HIT_RULES = 4096


class StackServices:
    """Made when the SAL is there; `close` ends it. `run_effects` carries out what the SAL wants done."""

    def __init__(
        self,
        events: ServiceEvents,
        table: ServiceTable,
        sal: ServiceAccessLayer,
        icmp_errors: IcmpErrors,
        run_effects: Callable[[], None],
    ) -> None:
        self.events = events
        self.table = table
        self._sal = sal
        self._icmp_errors = icmp_errors
        self._run_effects = run_effects
        self._loop = asyncio.get_running_loop()
        self._closed = False
        self._forget_table = table.on_change(self._table_changed)
        table.on_hit = RuleHits(events, time.monotonic)
        self._loop.add_reader(icmp_errors.fileno(), self._icmp_errors_wait)

    def close(self) -> None:
        """No more events."""
        self._closed = True
        self._loop.remove_reader(self._icmp_errors.fileno())
        self._forget_table()
        self.table.on_hit = None

    def happened(self, effect: Happened) -> None:
        """Effect of the SAL."""
        self.events.publish(effect.kind, **effect.fields)

    def release_delayed(self, prefix: ServicePrefix) -> int:
        """Resolve anew all that DELAY rules hold for services under `prefix`; returns how many those were."""
        released = self._sal.release_delayed(prefix, time.monotonic())
        self._soon()
        return released

    def drop_delayed(self, prefix: ServicePrefix, reason: str) -> int:
        """Give it up; returns how many those were. `reason` is told to programs and operators."""
        dropped = self._sal.drop_delayed(prefix, time.monotonic(), reason)
        self._soon()
        return dropped

    def delayed_services(self) -> dict[str, int]:
        """The services that DELAY rules hold something for, and how much."""
        return {service_id.text: count for service_id, count in self._sal.delayed.services().items()}

    def delay_counters(self) -> dict[str, int]:
        """What became of all that DELAY rules have held."""
        return self._sal.delayed.counters

    def flow_opened(self, connection: Connection | DatagramFlow, role: str) -> None:
        """A connection stands; `role` is active or passive."""
        if self.events.wanted("flow_opened"):
            service = connection.service_id
            self.events.publish(
                "flow_opened",
                flow_id=connection.flow_id,
                role=role,
                service=None if service is None else service.text,
                peer_address=format_address(connection.peer_address),
            )

    def flow_ended(self, connection: Connection | DatagramFlow, code: int) -> None:
        """A connection ended; `code` is the errno that its application sees, 0 after an orderly close."""
        if self.events.wanted("flow_ended"):
            service = connection.service_id
            self.events.publish(
                "flow_ended",
                flow_id=connection.flow_id,
                service=None if service is None else service.text,
                error=errno.errorcode.get(code, str(code)) if code else None,
            )

    def send_failed(self, packet: bytes, code: int) -> None:
        """The kernel refused to send a packet, which says something about where it should have gone."""
        if code not in (errno.ENOBUFS, errno.EAGAIN, errno.ENOMEM):
            self._sal.send_failed(packet, code, time.monotonic())

    def _soon(self) -> None:
        """Effects are carried out after whatever is going on."""
        self._loop.call_soon(lambda: None if self._closed else self._run_effects())

    def _icmp_errors_wait(self) -> None:
        now = time.monotonic()
        for quoted, code in self._icmp_errors.take():
            self._sal.send_failed(quoted, code, now)
        self._run_effects()

    def _table_changed(self, kind: str, rule: Rule) -> None:
        events = self.events
        if rule.type is RuleType.DEMUX and not rule.broadcast:
            bound = "service_bound" if kind == "rule_added" else "service_unbound"
            events.publish(bound, **_prefix_fields(rule.prefix))
        if events.wanted(kind):
            events.publish(kind, **_rule_fields(rule))
        if rule.idle_timeout_s or rule.hard_timeout_s or kind == "target_down":
            self._soon()  # something new has an end: the stack's timer has to know


def report_defect(error: Exception) -> None:
    """For subscribers of events that raise: said in the log, and nobody else suffers."""
    asyncio.get_running_loop().call_exception_handler(
        {"message": "a subscriber of events failed", "exception": error}
    )


class RuleHits:
    """Publishes `rule_hit`, for each rule at most once per RULE_HIT_INTERVAL_S, with the counters so far."""

    __slots__ = ("_clock", "_events", "_next")

    def __init__(self, events: ServiceEvents, clock: Callable[[], float]) -> None:
        self._events = events
        self._clock = clock
        self._next: dict[tuple[ServicePrefix, RuleType, int, int], float] = {}

    def __call__(self, prefix: ServicePrefix, target: Target) -> None:
        """A packet was resolved by this rule."""
        if not self._events.wanted("rule_hit"):
            return
        now = self._clock()
        key = prefix, target.type, target.address, target.interface_index
        if self._next.get(key, now) > now:
            return
        if key not in self._next and len(self._next) >= RULE_HIT_RULES:
            del self._next[next(iter(self._next))]
        self._next[key] = now + RULE_HIT_INTERVAL_S
        self._events.publish(
            "rule_hit",
            **_rule_fields(target.rule(prefix)),
            packets_resolved=target.packets_resolved,
            packets_dropped=target.packets_dropped,
        )


def _prefix_fields(prefix: ServicePrefix) -> dict[str, object]:
    return {"prefix": str(prefix), "service_id": prefix.service_id.hex_text, "bits": prefix.bits}


def _rule_fields(rule: Rule) -> dict[str, object]:
    return {
        **_prefix_fields(rule.prefix),
        "type": rule.type.name,
        "address": format_address(rule.address) if rule.address else None,
        "priority": rule.priority,
        "weight": rule.weight,
        "origin": rule.origin,
    }
