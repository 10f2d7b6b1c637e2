"""What stands in the service table for one prefix? Its rules, in target sets by descending priority (SPEC 6.1).

Says what may stand beside what, and how an entry is described to people. Finding the entry that matters for a
serviceID is the business of `service_table`.
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter

from serval_core.errors import OurMistake
from serval_core.names import ServicePrefix, format_address
from serval_core.rules import Rule, RuleType
from serval_core.selection import Target, TargetSet

_rank = attrgetter("rank")
_ALONE = (RuleType.DROP, RuleType.DELAY)


class Entry:
    """All rules of one prefix."""

    __slots__ = (
        "bytes_resolved",
        "demux",
        "packets_dropped",
        "packets_resolved",
        "prefix",
        "sets",
    )

    def __init__(self, prefix: ServicePrefix) -> None:
        self.prefix = prefix
        self.sets: tuple[TargetSet, ...] = ()
        self.demux: Target | None = None
        self.packets_resolved = 0
        self.bytes_resolved = 0
        self.packets_dropped = 0

    @property
    def marked(self) -> bool:
        """Whether any target has a mark."""
        return any(each.marked for each in self.sets)

    def targets(self) -> Iterator[Target]:
        """All targets, those of the highest priority first."""
        for target_set in self.sets:
            yield from target_set.targets

    def set_at(self, priority: int, broadcast: bool) -> TargetSet | None:
        """The targets that compete at one priority."""
        for target_set in self.sets:
            if target_set.priority == priority and target_set.broadcast == broadcast:
                return target_set
        return None

    def set_of(self, target: Target) -> TargetSet:
        """The set that a target of this entry is in."""
        found = self.set_at(target.priority, target.broadcast)
        assert found is not None
        return found

    def forward(self, address: int) -> Target | None:
        """The FORWARD target with this address that is no broadcast."""
        for target in self.targets():
            if target.address == address and target.type is RuleType.FORWARD and not target.broadcast:
                return target
        return None

    def find(self, rule_type: RuleType, address: int) -> Target:
        """The target of a type and, for FORWARD, address. OurMistake, saying what there is, if there is none."""
        found: Target | None
        if rule_type is RuleType.FORWARD:
            found = self.forward(address)
        elif rule_type is RuleType.DEMUX:
            found = self.demux
        else:
            found = next((each for each in self.targets() if each.type is rule_type), None)
        if found is None:
            goal = f" to {format_address(address)}" if rule_type is RuleType.FORWARD else ""
            there = ", ".join(describe(each) for each in self.targets())
            raise OurMistake(f"{self.prefix} has no {rule_type.name} rule{goal}; it has: {there}")
        return found

    def insert(self, target: Target) -> None:
        """Add a target to the set of its priority."""
        target_set = self.set_at(target.priority, target.broadcast)
        if target_set is None:
            target_set = TargetSet(target.priority, target.broadcast)
            self.sets = tuple(sorted((*self.sets, target_set), key=_rank)) if self.sets else (target_set,)
        target_set.add(target)
        if target.type is RuleType.DEMUX:
            self.demux = target

    def take_out(self, target: Target) -> None:
        """Remove a target, and its set if that was the last one."""
        target_set = self.set_of(target)
        target_set.remove(target)
        if target.mark is not None:
            target_set.marked -= 1
        if not target_set.targets:
            self.sets = tuple(each for each in self.sets if each is not target_set)
        if target is self.demux:
            self.demux = None

    def replace(self, old: Target, new: Target) -> None:
        """Put `new` in the place of `old`, which keeps its place if the priority stays."""
        if old.priority == new.priority:
            target_set = self.set_of(old)
            target_set.replace(old, new)
            if old.mark is not None:
                target_set.marked -= 1
        else:
            self.insert(new)
            self.take_out(old)

    def check_conflict(self, rule: Rule, instead_of: Target | None = None) -> None:
        """Raise OurMistake if the rule contradicts one that is here, other than `instead_of`."""
        if rule.type is RuleType.FORWARD:
            there = self.forward(rule.address)
            if there is not None and there is not instead_of:
                raise OurMistake(
                    f"{rule.prefix} already has a FORWARD rule to {format_address(rule.address)} "
                    f"(priority {there.priority}, weight {there.weight}): remove it first to change it"
                )
        if rule.type is RuleType.DEMUX and self.demux is not None:
            raise OurMistake(
                f"{rule.prefix} is already being listened on (listener {self.demux.listener_id})"
            )
        same_priority = self.set_at(rule.priority, broadcast=False)
        if same_priority is None:
            return
        other = next((each for each in same_priority.targets if each is not instead_of), None)
        if other is None:
            return
        alone = rule.type if rule.type in _ALONE else other.type
        if alone in _ALONE:
            raise OurMistake(
                f"{rule.prefix} already has a {describe(other)} at priority {rule.priority}, and a "
                f"{alone.name} rule shares its priority with no other: give another priority or remove that one"
            )

    def snapshot(self) -> dict[str, object]:
        """For `show services`: numbers and texts only. Absent addresses and numbers are None."""
        return {
            "prefix": str(self.prefix),
            "service_id": self.prefix.service_id.hex_text,
            "bits": self.prefix.bits,
            "packets_resolved": self.packets_resolved,
            "bytes_resolved": self.bytes_resolved,
            "packets_dropped": self.packets_dropped,
            "targets": [target_snapshot(target) for target in self.targets()],
        }


def describe(target: Target) -> str:
    """A target as it is called in messages."""
    if target.type is RuleType.FORWARD:
        return f"{'broadcast' if target.broadcast else 'FORWARD'} rule to {format_address(target.address)}"
    if target.type is RuleType.DEMUX:
        return f"DEMUX rule of listener {target.listener_id}"
    return f"{target.type.name} rule"


def target_snapshot(target: Target) -> dict[str, object]:
    """A target as numbers and texts. `down` is why it is passed over, None while it is not."""
    lifetime = target.lifetime
    return {
        "type": target.type.name,
        "priority": target.priority,
        "weight": target.weight,
        "address": format_address(target.address) if target.address else None,
        "interface_index": target.interface_index or None,
        "listener_id": target.listener_id or None,
        "broadcast": target.broadcast,
        "origin": target.origin,
        "idle_timeout_s": (lifetime.idle_timeout_s or None) if lifetime else None,
        "hard_timeout_s": (lifetime.hard_timeout_s or None) if lifetime else None,
        "down": target.mark.reason if target.mark else None,
        "packets_resolved": target.packets_resolved,
        "bytes_resolved": target.bytes_resolved,
        "packets_dropped": target.packets_dropped,
    }
