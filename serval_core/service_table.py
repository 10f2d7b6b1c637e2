"""What happens to a packet for this serviceID?

The service table of SPEC section 6: longest prefix match to an entry, then the entry's target sets by
descending priority, then the choice within a set (`selection`). Does no forwarding and knows no packets: it
is asked and answers.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import NamedTuple

from serval_core.errors import OurMistake
from serval_core.names import ServiceID, ServicePrefix, format_address
from serval_core.prefix_trie import PrefixTrie
from serval_core.rules import Rule, RuleType, check_rule
from serval_core.selection import Target, TargetSet


class Resolution(NamedTuple):
    """The table's answer.

    `rule_type` None: no entry covers the serviceID. FORWARD or DEMUX: use every one of `targets`, which are
    several only for broadcast rules; FORWARD without targets: the entry's are all excluded. DROP has no
    targets.
    """

    rule_type: RuleType | None
    targets: tuple[Target, ...]


_NO_ENTRY = Resolution(None, ())
_DROP = Resolution(RuleType.DROP, ())
_ALL_EXCLUDED = Resolution(RuleType.FORWARD, ())


class _Entry:
    """All rules of one prefix."""

    __slots__ = (
        "bytes_resolved",
        "demux",
        "forward",
        "packets_dropped",
        "packets_resolved",
        "prefix",
        "sets",
    )

    def __init__(self, prefix: ServicePrefix) -> None:
        self.prefix = prefix
        self.sets: list[TargetSet] = []
        self.forward: dict[int, Target] = {}
        self.demux: Target | None = None
        self.packets_resolved = 0
        self.bytes_resolved = 0
        self.packets_dropped = 0

    def targets(self) -> Iterator[Target]:
        for target_set in self.sets:
            yield from target_set.targets

    def set_at(self, priority: int, broadcast: bool) -> TargetSet | None:
        for target_set in self.sets:
            if target_set.priority == priority and target_set.broadcast == broadcast:
                return target_set
        return None

    def insert(self, target: Target) -> None:
        target_set = self.set_at(target.priority, target.broadcast)
        if target_set is None:
            target_set = TargetSet(target.priority, target.broadcast)
            insort(self.sets, target_set, key=lambda each: each.rank)
        target_set.add(target)
        if target.type is RuleType.DEMUX:
            self.demux = target
        elif target.type is RuleType.FORWARD and not target.broadcast:
            self.forward[target.address] = target

    def take_out(self, target: Target) -> None:
        target_set = self.set_at(target.priority, target.broadcast)
        assert target_set is not None
        target_set.remove(target)
        if not target_set.targets:
            self.sets.remove(target_set)
        if target is self.demux:
            self.demux = None
        elif self.forward.get(target.address) is target:
            del self.forward[target.address]


class ServiceTable:
    """The service table of one stack. Not thread-safe: belongs to the thread that runs the stack."""

    def __init__(self) -> None:
        self._entries: PrefixTrie[_Entry] = PrefixTrie()
        self._local: PrefixTrie[_Entry] = PrefixTrie()
        self._listeners: dict[int, list[_Entry]] = {}
        self._broadcast: dict[Rule, Target] = {}
        self.counters: dict[str, int] = {
            "packets_resolved": 0,
            "bytes_resolved": 0,
            "dropped_no_entry": 0,
            "dropped_by_rule": 0,
            "all_excluded": 0,
        }

    def add(self, rule: Rule) -> None:
        """Install a rule. OurMistake, saying why in one sentence, if it is invalid or contradicts another.

        A prefix has at most one DEMUX rule, at most one FORWARD rule per address, and DROP shares its
        priority with nothing.
        """
        check_rule(rule)
        if rule.broadcast:
            raise OurMistake("broadcast rules are set together, with replace_broadcast_rules")
        entry = self._entries.get(rule.prefix)
        if entry is not None:
            _check_conflict(entry, rule)
        self._insert(rule)

    def remove(self, prefix: ServicePrefix, rule_type: RuleType, address: int = 0) -> None:
        """Remove the rule with exactly this prefix, type and (for FORWARD) address. OurMistake if there is
        none.
        """
        entry = self._entries.get(prefix)
        if entry is None:
            raise OurMistake(f"there is no rule for exactly {prefix}")
        target = _find(entry, rule_type, address)
        if target is None:
            goal = f" to {format_address(address)}" if rule_type is RuleType.FORWARD else ""
            there = ", ".join(_describe(each) for each in entry.targets())
            raise OurMistake(f"{prefix} has no {rule_type.name} rule{goal}; it has: {there}")
        self._take_out(entry, target)

    def remove_listener(self, listener_id: int) -> None:
        """Remove every DEMUX rule that leads to this listener. A listener without rules is no error."""
        for entry in list(self._listeners.get(listener_id, ())):
            assert entry.demux is not None
            self._take_out(entry, entry.demux)

    def replace_broadcast_rules(self, rules: Iterable[Rule]) -> None:
        """Make these the only broadcast rules; those that stay keep their counters.

        OurMistake, and no change, if one of them is invalid.
        """
        wanted = dict.fromkeys(rules)
        for rule in wanted:
            check_rule(rule)
            if not rule.broadcast:
                raise OurMistake(f"the rule for {rule.prefix} among the broadcast rules is none")
        for rule in [each for each in self._broadcast if each not in wanted]:
            entry = self._entries.get(rule.prefix)
            assert entry is not None
            self._take_out(entry, self._broadcast.pop(rule))
        for rule in wanted:
            if rule not in self._broadcast:
                self._broadcast[rule] = self._insert(rule)

    def resolve(
        self,
        service_id: ServiceID,
        random: Callable[[], float],
        exclude: Collection[int] = (),
        packet_bytes: int = 0,
    ) -> Resolution:
        """Where a packet for `service_id` goes (SPEC 6.3 "any" lookup, mode ANYCAST), and count it.

        The longest matching prefix decides, however good its targets are. Within it the set of highest
        priority decides that still has a target whose address is not in `exclude`. `random` returns a number
        in [0, 1). When all are excluded nothing counts as dropped: the caller may ask again with fewer.
        """
        entry = self._entries.longest_match(service_id)
        if entry is None:
            self.counters["dropped_no_entry"] += 1
            return _NO_ENTRY
        for target_set in entry.sets:
            targets = target_set.select(random, exclude)
            if targets:
                if targets[0].type is RuleType.DROP:
                    return self._dropped(entry, targets[0])
                for target in targets:
                    self._count(entry, target, packet_bytes)
                return Resolution(targets[0].type, targets)
        self.counters["all_excluded"] += 1
        return _ALL_EXCLUDED

    def resolve_local(self, service_id: ServiceID, packet_bytes: int = 0) -> Target | None:
        """Which listener gets a packet that arrived for `service_id` (SPEC 6.3 "local" lookup), and count it.

        None if nothing listens. Only entries with a DEMUX target take part in the match: FORWARD and DROP
        rules do not keep packets from a listener.
        """
        entry = self._local.longest_match(service_id)
        if entry is None:
            self.counters["dropped_no_entry"] += 1
            return None
        target = entry.demux
        assert target is not None
        self._count(entry, target, packet_bytes)
        return target

    def snapshot(self) -> list[dict[str, object]]:
        """One dict per entry with its "targets", for `show services`. Absent addresses and numbers are
        None.
        """
        return [_entry_snapshot(entry) for entry in self._entries.values()]

    def _insert(self, rule: Rule) -> Target:
        entry = self._entries.get(rule.prefix)
        if entry is None:
            entry = _Entry(rule.prefix)
            self._entries.set(rule.prefix, entry)
        target = Target(rule)
        entry.insert(target)
        if rule.type is RuleType.DEMUX:
            self._local.set(rule.prefix, entry)
            self._listeners.setdefault(rule.listener_id, []).append(entry)
        return target

    def _take_out(self, entry: _Entry, target: Target) -> None:
        entry.take_out(target)
        if target.type is RuleType.DEMUX:
            self._local.remove(entry.prefix)
            served = self._listeners[target.listener_id]
            served.remove(entry)
            if not served:
                del self._listeners[target.listener_id]
        if not entry.sets:
            self._entries.remove(entry.prefix)

    def _count(self, entry: _Entry, target: Target, packet_bytes: int) -> None:
        target.packets_resolved += 1
        target.bytes_resolved += packet_bytes
        entry.packets_resolved += 1
        entry.bytes_resolved += packet_bytes
        self.counters["packets_resolved"] += 1
        self.counters["bytes_resolved"] += packet_bytes

    def _dropped(self, entry: _Entry, target: Target) -> Resolution:
        target.packets_dropped += 1
        entry.packets_dropped += 1
        self.counters["dropped_by_rule"] += 1
        return _DROP


def _check_conflict(entry: _Entry, rule: Rule) -> None:
    if rule.type is RuleType.FORWARD and rule.address in entry.forward:
        there = entry.forward[rule.address]
        raise OurMistake(
            f"{rule.prefix} already has a FORWARD rule to {format_address(rule.address)} "
            f"(priority {there.priority}, weight {there.weight}): remove it first to change it"
        )
    if rule.type is RuleType.DEMUX and entry.demux is not None:
        raise OurMistake(f"{rule.prefix} is already being listened on (listener {entry.demux.listener_id})")
    same_priority = entry.set_at(rule.priority, broadcast=False)
    if same_priority is None:
        return
    there = same_priority.targets[0]
    if RuleType.DROP in (rule.type, there.type):
        raise OurMistake(
            f"{rule.prefix} already has a {_describe(there)} at priority {rule.priority}, and a DROP rule "
            "shares its priority with no other: give another priority or remove that one"
        )


def _find(entry: _Entry, rule_type: RuleType, address: int) -> Target | None:
    if rule_type is RuleType.FORWARD:
        return entry.forward.get(address)
    if rule_type is RuleType.DEMUX:
        return entry.demux
    return next((each for each in entry.targets() if each.type is rule_type), None)


def _describe(target: Target) -> str:
    if target.type is RuleType.FORWARD:
        return f"{'broadcast' if target.broadcast else 'FORWARD'} rule to {format_address(target.address)}"
    if target.type is RuleType.DEMUX:
        return f"DEMUX rule of listener {target.listener_id}"
    return f"{target.type.name} rule"


def _entry_snapshot(entry: _Entry) -> dict[str, object]:
    return {
        "prefix": str(entry.prefix),
        "service_id": entry.prefix.service_id.hex_text,
        "bits": entry.prefix.bits,
        "packets_resolved": entry.packets_resolved,
        "bytes_resolved": entry.bytes_resolved,
        "packets_dropped": entry.packets_dropped,
        "targets": [_target_snapshot(target) for target in entry.targets()],
    }


def _target_snapshot(target: Target) -> dict[str, object]:
    return {
        "type": target.type.name,
        "priority": target.priority,
        "weight": target.weight,
        "address": format_address(target.address) if target.address else None,
        "interface_index": target.interface_index or None,
        "listener_id": target.listener_id or None,
        "broadcast": target.broadcast,
        "packets_resolved": target.packets_resolved,
        "bytes_resolved": target.bytes_resolved,
        "packets_dropped": target.packets_dropped,
    }
