"""What happens to a packet for this serviceID?

The service table of SPEC section 6: longest prefix match to an entry, then the entry's target sets by
descending priority, then the choice within a set (`selection`). Does no forwarding and knows no packets: it
is asked and answers.

Targets that are down carry a mark (`mark_down`): they are passed over as long as anything else is left, at any
priority, and used all the same when nothing is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import NamedTuple

from serval_core.errors import OurMistake
from serval_core.names import ServiceID, ServicePrefix
from serval_core.prefix_trie import PrefixTrie
from serval_core.rule_endings import RuleEndings, check_time_is_known
from serval_core.rules import Rule, RuleType, check_rule
from serval_core.selection import Target
from serval_core.service_entry import Entry
from serval_core.service_explanation import explain

Observer = Callable[[str, Rule], None]
"""Called with a kind of change and the rule concerned: rule_added, rule_removed, rule_expired, target_down,
target_up. A modified rule is removed and added.
"""


class Resolution(NamedTuple):
    """The table's answer.

    `rule_type` None: no entry covers the serviceID. FORWARD or DEMUX: use every one of `targets`, which are
    several only for broadcast rules; FORWARD without targets: the entry's are all excluded. DROP and DELAY
    have no targets.
    """

    rule_type: RuleType | None
    targets: tuple[Target, ...]


_NO_ENTRY = Resolution(None, ())
_DROP = Resolution(RuleType.DROP, ())
_DELAY = Resolution(RuleType.DELAY, ())
_ALL_EXCLUDED = Resolution(RuleType.FORWARD, ())


class ServiceTable:
    """The service table of one stack. Not thread-safe: belongs to the thread that runs the stack."""

    def __init__(self) -> None:
        self._entries: PrefixTrie[Entry] = PrefixTrie()
        self._local: PrefixTrie[Entry] = PrefixTrie()
        self._listeners: dict[int, list[Entry]] = {}
        self._broadcast: dict[Rule, Target] = {}
        self._observers: tuple[Observer, ...] = ()
        self._endings = RuleEndings(self._expired, self._up_again)
        self.on_hit: Callable[[ServicePrefix, Target], None] | None = None
        """Called for each packet that a target got or dropped; None: nobody wants to know."""
        self.counters: dict[str, int] = {
            "packets_resolved": 0,
            "bytes_resolved": 0,
            "dropped_no_entry": 0,
            "dropped_by_rule": 0,
            "delayed": 0,
            "all_excluded": 0,
        }

    # -- changes ------------------------------------------------------------------------------------------------------

    def add(self, rule: Rule, now: float | None = None) -> None:
        """Install a rule. OurMistake, saying why in one sentence, if it is invalid or contradicts another.

        A prefix has at most one DEMUX rule, at most one FORWARD rule per address, and DROP and DELAY share
        their priority with nothing. `now` is needed for rules with a timeout.
        """
        check_rule(rule)
        check_time_is_known(rule, now)
        if rule.broadcast:
            raise OurMistake("broadcast rules are set together, with replace_broadcast_rules")
        entry = self._entries.get(rule.prefix)
        if entry is not None:
            entry.check_conflict(rule)
        self._insert(rule, now)

    def modify(self, prefix: ServicePrefix, old_address: int, rule: Rule, now: float | None = None) -> None:
        """Put `rule` in the place of the FORWARD rule of exactly `prefix` to `old_address` (SPEC 6.2).

        It keeps the counters; its timeouts count from `now`, and it is not marked down. OurMistake, and no
        change, if there is no such rule or the new one is invalid, of another prefix or type, or contradicts
        a third.
        """
        check_rule(rule)
        check_time_is_known(rule, now)
        if rule.type is not RuleType.FORWARD or rule.broadcast or rule.prefix != prefix:
            raise OurMistake(
                f"a FORWARD rule for {prefix} can only become another one for it: remove it and add what you mean"
            )
        entry = self._existing(prefix)
        old = entry.find(RuleType.FORWARD, old_address)
        entry.check_conflict(rule, instead_of=old)
        new = Target(rule)
        new.packets_resolved = old.packets_resolved
        new.bytes_resolved = old.bytes_resolved
        new.packets_dropped = old.packets_dropped
        before = old.rule(prefix)
        self._endings.forget(old)
        entry.replace(old, new)
        self._endings.begin(entry, new, rule, now)
        self._tell("rule_removed", before)
        self._tell("rule_added", rule)

    def remove(self, prefix: ServicePrefix, rule_type: RuleType, address: int = 0) -> None:
        """Remove the rule with exactly this prefix, type and (for FORWARD) address. OurMistake if there is
        none.
        """
        entry = self._existing(prefix)
        self._take_out(entry, entry.find(rule_type, address))

    def remove_rule(self, prefix: ServicePrefix, rule_type: RuleType, address: int = 0) -> Rule:
        """As `remove`, for whoever manages the table: not for DEMUX, which ends with its listener.

        Returns what was removed.
        """
        if rule_type is RuleType.DEMUX:
            raise OurMistake(f"the DEMUX rule for {prefix} belongs to a listener: close that")
        rule = self.rule(prefix, rule_type, address)
        self.remove(prefix, rule_type, address)
        return rule

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
            self._take_out(self._existing(rule.prefix), self._broadcast.pop(rule))
        for rule in wanted:
            if rule not in self._broadcast:
                self._broadcast[rule] = self._insert(rule, None)

    # -- questions ----------------------------------------------------------------------------------------------------

    def resolve(
        self,
        service_id: ServiceID,
        random: Callable[[], float],
        exclude: Collection[int] = (),
        packet_bytes: int = 0,
    ) -> Resolution:
        """Where a packet for `service_id` goes (SPEC 6.3 "any" lookup, mode ANYCAST), and count it.

        The longest matching prefix decides, however good its targets are. Within it the set of highest
        priority decides that still has a target that is not down and whose address is not in `exclude`; a
        DROP rule below targets that are down does not decide. If that leaves nothing, targets that are down
        count as the others. `random` returns a number in [0, 1). When all are excluded nothing counts as
        dropped: the caller may ask again with fewer.
        """
        entry = self._entries.longest_match(service_id)
        if entry is None:
            self.counters["dropped_no_entry"] += 1
            return _NO_ENTRY
        skipped = False
        for target_set in entry.sets:
            targets = target_set.select(random, exclude)
            if targets and not (skipped and targets[0].type is RuleType.DROP):
                return self._decided(entry, targets, packet_bytes)
            skipped = skipped or target_set.marked > 0
        if skipped:
            for target_set in entry.sets:
                targets = target_set.select(random, exclude, even_marked=True)
                if targets:
                    return self._decided(entry, targets, packet_bytes)
        self.counters["all_excluded"] += 1
        return _ALL_EXCLUDED

    def resolve_local(self, service_id: ServiceID, packet_bytes: int = 0) -> Target | None:
        """Which listener gets a packet that arrived for `service_id` (SPEC 6.3 "local" lookup), and count it.

        None if nothing listens. Only entries with a DEMUX target take part in the match: FORWARD, DROP and
        DELAY rules do not keep packets from a listener.
        """
        entry = self._local.longest_match(service_id)
        if entry is None:
            self.counters["dropped_no_entry"] += 1
            return None
        target = entry.demux
        assert target is not None
        self._count(entry, target, packet_bytes)
        return target

    def listener_of(self, service_id: ServiceID) -> int:
        """Which listener packets for `service_id` would get to, 0 for none. Counts nothing."""
        entry = self._local.longest_match(service_id)
        return 0 if entry is None or entry.demux is None else entry.demux.listener_id

    def explain(self, service_id: ServiceID, now: float | None = None) -> dict[str, object]:
        """What `resolve` would answer, and why, as numbers and texts; see `service_explanation`."""
        return explain(service_id, list(self._entries.matches(service_id)), now)

    def matching_prefix(self, service_id: ServiceID) -> ServicePrefix | None:
        """The prefix of the entry that decides about `service_id`."""
        entry = self._entries.longest_match(service_id)
        return None if entry is None else entry.prefix

    def entry(self, prefix: ServicePrefix) -> Entry | None:
        """All rules of exactly this prefix, to be read only."""
        return self._entries.get(prefix)

    def entry_for(self, service_id: ServiceID) -> Entry | None:
        """The entry that decides about `service_id`, to be read only."""
        return self._entries.longest_match(service_id)

    def prefixes(self) -> list[ServicePrefix]:
        """The prefixes that have rules."""
        return [entry.prefix for entry in self._entries.values()]

    def bound(self) -> list[ServicePrefix]:
        """The prefixes that something listens on."""
        return [entry.prefix for entry in self._local.values()]

    def rule(self, prefix: ServicePrefix, rule_type: RuleType, address: int = 0) -> Rule:
        """The rule with exactly this prefix, type and (for FORWARD) address. OurMistake if there is none."""
        return self._existing(prefix).find(rule_type, address).rule(prefix)

    def rules_of(self, prefix: ServicePrefix) -> list[Rule]:
        """The rules of exactly this prefix, those of the highest priority first."""
        entry = self._entries.get(prefix)
        return [] if entry is None else [target.rule(prefix) for target in entry.targets()]

    def rules(self) -> Iterator[Rule]:
        """All rules, broadcast and DEMUX rules included. The table must not change meanwhile."""
        for entry in self._entries.values():
            for target in entry.targets():
                yield target.rule(entry.prefix)

    def snapshot(self) -> list[dict[str, object]]:
        """One dict per entry with its "targets", for `show services`. Absent addresses and numbers are
        None.
        """
        return [entry.snapshot() for entry in self._entries.values()]

    def __len__(self) -> int:
        """How many prefixes have rules."""
        return len(self._entries)

    # -- what happens to rules ----------------------------------------------------------------------------------------

    def on_change(self, observer: Observer) -> Callable[[], None]:
        """Call `observer` after every change; returns what ends that."""
        self._observers = (*self._observers, observer)

        def unsubscribe() -> None:
            self._observers = tuple(each for each in self._observers if each is not observer)

        return unsubscribe

    def mark_down(
        self, address: int, until: float, prefix: ServicePrefix | None = None, reason: str = "down"
    ) -> int:
        """Pass the FORWARD target `address` of `prefix` over until that time; returns how many were found.

        `prefix` None: that of every entry, which costs a walk through the table. Broadcast targets are never
        down. `reason` is for people.
        """
        found = self._forward_targets(address, prefix)
        for entry, target in found:
            if self._endings.mark(entry, target, until, reason):
                self._tell_of("target_down", entry, target)
        return len(found)

    def mark_up(self, address: int, prefix: ServicePrefix | None = None) -> int:
        """Take such marks away; returns how many there were."""
        marked = 0
        for entry, target in self._forward_targets(address, prefix):
            if self._endings.unmark(entry, target):
                marked += 1
                self._tell_of("target_up", entry, target)
        return marked

    def count_forwarded(self, prefix: ServicePrefix, address: int, packets: int, packet_bytes: int) -> bool:
        """Count what a fast path has forwarded by the rule of exactly `prefix` to `address`; False: no such
        rule.
        """
        entry = self._entries.get(prefix)
        target = None if entry is None else entry.forward(address)
        if entry is None or target is None:
            return False
        for counted in (entry, target):
            counted.packets_resolved += packets
            counted.bytes_resolved += packet_bytes
        self.counters["packets_resolved"] += packets
        self.counters["bytes_resolved"] += packet_bytes
        return True

    def expire(self, now: float) -> None:
        """Remove rules whose time is over, and marks."""
        self._endings.run(now)

    def next_expiry(self) -> float | None:
        """When `expire` has something to do; None: nothing has an end."""
        return self._endings.next_deadline()

    # -- within -------------------------------------------------------------------------------------------------------

    def _existing(self, prefix: ServicePrefix) -> Entry:
        entry = self._entries.get(prefix)
        if entry is None:
            raise OurMistake(f"there is no rule for exactly {prefix}")
        return entry

    def _forward_targets(self, address: int, prefix: ServicePrefix | None) -> list[tuple[Entry, Target]]:
        if prefix is None:
            entries = list(self._entries.values())
        else:
            only = self._entries.get(prefix)
            entries = [] if only is None else [only]
        found = ((entry, entry.forward(address)) for entry in entries)
        return [(entry, target) for entry, target in found if target is not None]

    def _insert(self, rule: Rule, now: float | None) -> Target:
        entry = self._entries.get(rule.prefix)
        if entry is None:
            entry = Entry(rule.prefix)
            self._entries.set(rule.prefix, entry)
        target = Target(rule)
        entry.insert(target)
        if rule.type is RuleType.DEMUX:
            self._local.set(rule.prefix, entry)
            self._listeners.setdefault(rule.listener_id, []).append(entry)
        self._endings.begin(entry, target, rule, now)
        self._tell("rule_added", rule)
        return target

    def _take_out(self, entry: Entry, target: Target, kind: str = "rule_removed") -> None:
        self._endings.forget(target)
        entry.take_out(target)
        if target.type is RuleType.DEMUX:
            self._local.remove(entry.prefix)
            served = self._listeners[target.listener_id]
            served.remove(entry)
            if not served:
                del self._listeners[target.listener_id]
        if not entry.sets:
            self._entries.remove(entry.prefix)
        self._tell_of(kind, entry, target)

    def _expired(self, entry: Entry, target: Target) -> None:
        self._take_out(entry, target, "rule_expired")

    def _up_again(self, entry: Entry, target: Target) -> None:
        self._tell_of("target_up", entry, target)

    def _tell_of(self, kind: str, entry: Entry, target: Target) -> None:
        if self._observers:
            self._tell(kind, target.rule(entry.prefix))

    def _tell(self, kind: str, rule: Rule) -> None:
        for observer in self._observers:
            observer(kind, rule)

    def _decided(self, entry: Entry, targets: tuple[Target, ...], packet_bytes: int) -> Resolution:
        rule_type = targets[0].type
        if rule_type is RuleType.DROP:
            return self._dropped(entry, targets[0])
        for target in targets:
            self._count(entry, target, packet_bytes)
        if rule_type is RuleType.DELAY:
            self.counters["delayed"] += 1
            return _DELAY
        return Resolution(rule_type, targets)

    def _count(self, entry: Entry, target: Target, packet_bytes: int) -> None:
        target.packets_resolved += 1
        target.bytes_resolved += packet_bytes
        entry.packets_resolved += 1
        entry.bytes_resolved += packet_bytes
        self.counters["packets_resolved"] += 1
        self.counters["bytes_resolved"] += packet_bytes
        if self.on_hit is not None:
            self.on_hit(entry.prefix, target)

    def _dropped(self, entry: Entry, target: Target) -> Resolution:
        target.packets_dropped += 1
        entry.packets_dropped += 1
        self.counters["dropped_by_rule"] += 1
        if self.on_hit is not None:
            self.on_hit(entry.prefix, target)
        return _DROP
