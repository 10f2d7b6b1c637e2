"""Which of the targets that compete at one priority gets the packet?

The draw is weighted and independent for every packet (SPEC 6.4): no flow needs to come back to the same
instance, since the answer to a SYN fixes the peer's address. Knows nothing of prefixes; the order between
priorities is `service_table`'s.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Sequence
from itertools import accumulate

from serval_core.rules import Rule


class Target:
    """A rule that stands in the table, with its counters. Read it, hand it around; only the table changes
    it.
    """

    __slots__ = (
        "address",
        "broadcast",
        "bytes_resolved",
        "interface_index",
        "listener_id",
        "packets_dropped",
        "packets_resolved",
        "priority",
        "type",
        "weight",
    )

    def __init__(self, rule: Rule) -> None:
        self.type = rule.type
        self.priority = rule.priority
        self.weight = rule.weight
        self.address = rule.address
        self.interface_index = rule.interface_index
        self.listener_id = rule.listener_id
        self.broadcast = rule.broadcast
        self.packets_resolved = 0
        self.bytes_resolved = 0
        self.packets_dropped = 0


class TargetSet:
    """The targets of one prefix that compete: they have one priority, and all of them are broadcast or
    none.
    """

    __slots__ = ("_cumulative", "broadcast", "priority", "targets")

    def __init__(self, priority: int, broadcast: bool) -> None:
        self.priority = priority
        self.broadcast = broadcast
        self.targets: list[Target] = []
        self._cumulative: list[int] = []

    @property
    def rank(self) -> tuple[int, bool]:
        """Sets of one prefix are asked in ascending rank.

        Of two sets with the same priority the configured one comes before the broadcast one: who configures
        where a service is does not want to ask everybody as well.
        """
        return -self.priority, self.broadcast

    def add(self, target: Target) -> None:
        """Append a target."""
        self._cumulative.append(target.weight + (self._cumulative[-1] if self._cumulative else 0))
        self.targets.append(target)

    def remove(self, target: Target) -> None:
        """Take a target out. ValueError when it is not in the set."""
        self.targets.remove(target)
        self._cumulative = list(accumulate(each.weight for each in self.targets))

    def select(self, random: Callable[[], float], exclude: Collection[int]) -> tuple[Target, ...]:
        """The targets to use: one drawn by weight, or all of a broadcast set; none if all are excluded.

        `exclude` holds addresses. `random` returns a number in [0, 1) and is called at most once. Excluded
        addresses concern FORWARD targets only.
        """
        targets: Sequence[Target] = self.targets
        cumulative = self._cumulative
        if exclude:
            targets = [each for each in targets if not each.address or each.address not in exclude]
            if len(targets) != len(cumulative):
                cumulative = list(accumulate(each.weight for each in targets))
        if self.broadcast:
            return tuple(targets)
        if len(targets) > 1:
            return (targets[bisect_right(cumulative, int(random() * cumulative[-1]))],)
        return tuple(targets)
