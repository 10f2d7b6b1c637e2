"""Which registrations are in force, and what follows from them?

A record per (prefix, address); for each a FORWARD rule while it lasts, and an entry in the directory
(`directory_writer` says when it is written). A host that is silent for a registration's lifetime is gone. Whether
a registration is believed was decided before (`router`).

`now` is monotonic and decides about expiry; `wall` is seconds since 1970, for the directory.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable
from typing import Protocol

from serval_core.controller.authentication import Moment, Signed
from serval_core.controller.directory import Directory, Instance, StoredRegistration
from serval_core.controller.directory_writer import DirectoryWriter
from serval_core.errors import OurMistake
from serval_core.names import ServicePrefix, format_address
from serval_core.rules import Rule, RuleType
from serval_core.service_table import ServiceTable
from serval_core.wire.registration_offer import Offer

STALE_EXPIRIES_MAX = 1024


class Publish(Protocol):
    """Where news go: `service_events.ServiceEvents.publish`."""

    def __call__(self, kind: str, /, **fields: object) -> None:
        """Tell everybody who wants to know."""


class Record:
    """A registration that is in force."""

    __slots__ = (
        "address",
        "expires_at",
        "has_rule",
        "lifetime_s",
        "prefix",
        "priority",
        "public_key",
        "refreshes",
        "registered_at_wall",
        "scheduled_at",
        "weight",
    )

    def __init__(self, instance: Instance, offer: Offer, public_key: bytes, wall: float) -> None:
        self.prefix, self.address = instance
        self.priority = offer.priority
        self.weight = offer.weight
        self.lifetime_s = offer.lifetime_s
        self.public_key = public_key
        self.registered_at_wall = wall
        self.expires_at = 0.0
        self.has_rule = True  # unless an operator removed it
        self.scheduled_at = 0.0  # of its entry among the expiries, which is not moved at every refresh
        self.refreshes = 0

    @property
    def instance(self) -> Instance:
        """What identifies it."""
        return Instance(self.prefix, self.address)

    def stored(self, now: float, wall: float) -> StoredRegistration:
        """What the directory keeps of it."""
        return StoredRegistration(
            self.prefix,
            self.address,
            self.priority,
            self.weight,
            self.lifetime_s,
            self.registered_at_wall,
            wall + self.expires_at - now,
            self.public_key,
        )

    def rule(self) -> Rule:
        """What the service table says because of it."""
        return Rule.forward(
            self.prefix, self.address, priority=self.priority, weight=self.weight, origin="registered"
        )


class _Prefix:
    """The registrations of one prefix. `weights`: their sum, per priority."""

    __slots__ = ("hosts", "weights")

    def __init__(self) -> None:
        self.hosts = 0
        self.weights: dict[int, int] = {}

    def add(self, record: Record, sign: int) -> None:
        """Count a record, or with -1 no longer."""
        self.hosts += sign
        weight = self.weights.get(record.priority, 0) + sign * record.weight
        if weight:
            self.weights[record.priority] = weight
        else:
            del self.weights[record.priority]

    def weight(self) -> int:
        """The weights of the instances that are used: those of the highest priority."""
        return self.weights[max(self.weights)]


class Registrations:
    """The registrations of one router, the service table's rules that they make, and the directory that has
    them. `publish` gets news; `prefix_changed` is called with a prefix and the sum of its instances' weights
    (0: none left). `moments_s`: for how long the times of signed messages are kept.
    """

    def __init__(
        self,
        table: ServiceTable,
        directory: Directory,
        publish: Publish,
        prefix_changed: Callable[[ServicePrefix, int], None],
        moments_s: float,
        now: float,
    ) -> None:
        self.counters: Counter[str] = Counter()
        self._table = table
        self._publish = publish
        self._prefix_changed = prefix_changed
        self._records: dict[Instance, Record] = {}
        self._prefixes: dict[ServicePrefix, _Prefix] = {}
        self._per_host: Counter[int] = Counter()
        self._expiries: list[tuple[float, Instance]] = []
        self._writer = DirectoryWriter(directory, moments_s, self._directory_failed, now)
        self._changing = False  # the table, by ourselves
        self._unsubscribe = table.on_change(self._table_changed)

    def __len__(self) -> int:
        return len(self._records)

    def get(self, prefix: ServicePrefix, address: int) -> Record | None:
        """The registration of a prefix by the host at that address."""
        return self._records.get(Instance(prefix, address))

    def of_host(self, address: int) -> int:
        """How many registrations a host has."""
        return self._per_host.get(address, 0)

    def of_prefix(self, prefix: ServicePrefix) -> int:
        """How many hosts have registered exactly this prefix."""
        of_prefix = self._prefixes.get(prefix)
        return 0 if of_prefix is None else of_prefix.hosts

    def restore(self, stored: StoredRegistration, now: float, wall: float) -> bool:
        """Put a registration from the directory in force again. False when another rule is in the way."""
        offer = Offer(stored.priority, stored.weight, int(stored.lifetime_s))
        instance = Instance(stored.prefix, stored.address)
        record = Record(instance, offer, stored.public_key, stored.registered_at)
        if not self._install(record):
            return False
        # The clock may have been set meanwhile: nothing lasts longer than it was to last at the beginning.
        self._set_expiry(record, now + min(stored.expires_at - wall, stored.lifetime_s))
        return True

    def discard(self, stored: StoredRegistration, now: float) -> None:
        """Take a registration that is not in force out of the directory."""
        self._writer.changed(Instance(stored.prefix, stored.address))
        self._writer.hurry(now)

    def stop(self, now: float, wall: float) -> None:
        """Save everything and take the rules back; the registrations stay in the directory."""
        for instance in self._records:
            self._writer.changed(instance)
        self._writer.write_all(self._records, now, wall)
        self._unsubscribe()
        for record in list(self._records.values()):
            self._take_out(record)

    def snapshot(self, now: float) -> list[dict[str, object]]:
        """One dict per registration, for `serval registrations`."""
        return [
            {
                "prefix": str(record.prefix),
                "service_id": record.prefix.service_id.hex_text,
                "bits": record.prefix.bits,
                "address": format_address(record.address),
                "priority": record.priority,
                "weight": record.weight,
                "signed_by": record.public_key.hex() or None,
                "registered_at": record.registered_at_wall,
                "refreshes": record.refreshes,
                "in_use": record.has_rule,
                "expires_in_s": round(record.expires_at - now, 3),
            }
            for record in self._records.values()
        ]

    # -- changes --------------------------------------------------------------------------------------------

    def put(
        self,
        instance: Instance,
        offer: Offer,
        public_key: bytes,
        moved: Record | None,
        now: float,
        wall: float,
    ) -> bool:
        """Make the table say what a registration says, which may be a refresh, and that one has `moved` here.

        False when another rule is in the way.
        """
        record = self._records.get(instance)
        unchanged = record is not None and (record.priority, record.weight) == offer[:2]
        if record is not None and unchanged and moved is None:
            record.refreshes += 1
            record.lifetime_s = offer.lifetime_s
            record.public_key = public_key
            self.counters["refreshed"] += 1
            self._set_expiry(record, now + record.lifetime_s)
            self._writer.changed(instance)
            self._writer.in_time(now)
            return True
        successor = Record(instance, offer, public_key, wall)
        previous = moved or record
        if previous is not None:
            successor.registered_at_wall = previous.registered_at_wall
            successor.refreshes = previous.refreshes + 1
        if moved is not None and record is not None:
            self._take_out(record)
        if not self._install(successor, previous):
            if previous is not None:
                self.forget(previous, "displaced", now)
            return False
        self._set_expiry(successor, now + successor.lifetime_s)
        self._writer.hurry(now)
        self.counters["registered" if previous is None else "changed"] += 1
        self._publish(
            "registered",
            prefix=str(instance.prefix),
            address=format_address(instance.address),
            previous_address=format_address(moved.address) if moved is not None else None,
            priority=offer.priority,
            weight=offer.weight,
            signed=bool(public_key),
        )
        return True

    def refuse(self, refusal: Callable[[Record], str | None], now: float) -> None:
        """End every registration that is refused now."""
        for record in [record for record in self._records.values() if refusal(record)]:
            self.forget(record, "refused_by_policy", now)

    def tell_weights(self) -> None:
        """Tell `prefix_changed` of every prefix."""
        for prefix in self._prefixes:
            self._tell_weight(prefix)

    def forget(self, record: Record, why: str, now: float) -> None:
        """The registration is over."""
        self._take_out(record)
        self.counters[why] += 1
        self._publish(
            "unregistered", prefix=str(record.prefix), address=format_address(record.address), why=why
        )
        self._tell_weight(record.prefix)
        self._writer.hurry(now)

    def note_moment(self, signed: Signed, moment: Moment, now: float) -> None:
        """A signed message was accepted, which the directory is to know too."""
        self._writer.signed(signed, moment)
        self._writer.in_time(now)

    def _tell_weight(self, prefix: ServicePrefix) -> None:
        of_prefix = self._prefixes.get(prefix)
        self._prefix_changed(prefix, 0 if of_prefix is None else of_prefix.weight())

    def _install(self, record: Record, previous: Record | None = None) -> bool:
        """Put the record and its rule in force, in place of the previous one's. False, and no change, when
        another rule is in the way: the operator's own are not ours to touch.
        """
        rule = record.rule()
        self._changing = True
        try:
            if previous is None:
                self._table.add(rule)
            elif previous.has_rule:
                self._table.modify(record.prefix, previous.address, rule)
            else:
                record.has_rule = False
        except OurMistake:
            return False
        finally:
            self._changing = False
        if previous is not None:
            self._strike(previous)
        instance = record.instance
        self._records[instance] = record
        self._prefixes.setdefault(record.prefix, _Prefix()).add(record, 1)
        self._per_host[record.address] += 1
        self._writer.changed(instance)
        self._tell_weight(record.prefix)
        return True

    def _take_out(self, record: Record) -> None:
        """Remove the record and its rule, and tell nobody yet."""
        self._strike(record)
        if record.has_rule:
            self._changing = True
            try:
                self._table.remove(record.prefix, RuleType.FORWARD, record.address)
            finally:
                self._changing = False

    def _strike(self, record: Record) -> None:
        """Remove the record from the books."""
        instance = record.instance
        del self._records[instance]
        of_prefix = self._prefixes[record.prefix]
        of_prefix.add(record, -1)
        if not of_prefix.hosts:
            del self._prefixes[record.prefix]
        self._per_host[record.address] -= 1
        if not self._per_host[record.address]:
            del self._per_host[record.address]
        self._writer.changed(instance)

    def _table_changed(self, kind: str, rule: Rule) -> None:
        """A rule that an operator removes by hand stays away for as long as the registration lasts."""
        if kind == "rule_removed" and rule.origin == "registered" and not self._changing:
            record = self._records.get(Instance(rule.prefix, rule.address))
            if record is not None:
                record.has_rule = False

    # -- time ------------------------------------------------------------------------------------------------

    def next_timeout(self) -> float | None:
        """When `handle_timeouts` has something to do, None if never."""
        due = [self._expiries[0][0]] if self._expiries else []
        if self._writer.due is not None:
            due.append(self._writer.due)
        return min(due, default=None)

    def handle_timeouts(self, now: float, wall: float) -> None:
        """Let go of hosts that have been silent for too long, and save what is due."""
        while self._expiries and self._expiries[0][0] <= now:
            due, instance = heapq.heappop(self._expiries)
            record = self._records.get(instance)
            if record is None or record.scheduled_at != due:
                continue
            if record.expires_at > due:
                self._schedule(record)
                continue
            self.forget(record, "expired", now)
        if self._writer.due is not None and self._writer.due <= now:
            self.save(now, wall)

    def _set_expiry(self, record: Record, expires_at: float) -> None:
        record.expires_at = expires_at
        if not record.scheduled_at or expires_at < record.scheduled_at:
            self._schedule(record)

    def _schedule(self, record: Record) -> None:
        record.scheduled_at = record.expires_at
        heapq.heappush(self._expiries, (record.expires_at, record.instance))
        if len(self._expiries) > 2 * len(self._records) + STALE_EXPIRIES_MAX:
            self._expiries = [(each.scheduled_at, each.instance) for each in self._records.values()]
            heapq.heapify(self._expiries)

    def save(self, now: float, wall: float) -> None:
        """Write what the directory does not know yet, or a batch of it."""
        self._writer.write(self._records, now, wall)

    def _directory_failed(self, why: str) -> None:
        self.counters["directory_failures"] += 1
        self._publish("directory_failed", why=why)
