"""Which of the targets that compete at one priority gets the packet?

The draw is weighted and independent for every packet (SPEC 6.4): no flow needs to come back to the same
instance, since the answer to a SYN fixes the peer's address. Knows nothing of prefixes; the order between
priorities is `service_table`'s.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Sequence
from itertools import accumulate
from typing import NamedTuple

from serval_core.names import ServicePrefix
from serval_core.rules import Rule


class Mark(NamedTuple):
    """Why a target is passed over while others are left, and until when (seconds of the caller's clock)."""

    until: float
    reason: str
    timer: int


class Lifetime(NamedTuple):
    """How long a rule stays (seconds, 0: for ever) and since when; `timer` is what ends it."""

    idle_timeout_s: float
    hard_timeout_s: float
    added_at: float
    packets_then: int
    idle_since: float
    timer: int


class Target:
    """A rule that stands in the table, with its counters. Read it, hand it around; only the table changes
    it.
    """

    __slots__ = (
        "address",
        "broadcast",
        "bytes_resolved",
        "interface_index",
        "lifetime",
        "listener_id",
        "mark",
        "origin",
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
        self.origin = rule.origin
        self.packets_resolved = 0
        self.bytes_resolved = 0
        self.packets_dropped = 0
        self.lifetime: Lifetime | None = None
        self.mark: Mark | None = None

    def rule(self, prefix: ServicePrefix) -> Rule:
        """The rule that the target was made from; `prefix` is that of its entry."""
        lifetime = self.lifetime
        return Rule(
            prefix,
            self.type,
            self.priority,
            self.weight,
            self.address,
            self.interface_index,
            self.listener_id,
            self.broadcast,
            self.origin,
            lifetime.idle_timeout_s if lifetime else 0.0,
            lifetime.hard_timeout_s if lifetime else 0.0,
        )


class TargetSet:
    """The targets of one prefix that compete: they have one priority, and all of them are broadcast or
    none. `marked` counts those with a mark.
    """

    __slots__ = ("_cumulative", "broadcast", "marked", "priority", "targets")

    def __init__(self, priority: int, broadcast: bool) -> None:
        self.priority = priority
        self.broadcast = broadcast
        self.marked = 0
        # A tuple takes less memory than a list, and tables have as many of these as prefixes.
        self.targets: tuple[Target, ...] = ()
        # Sums of weights, made when first asked for: most sets have one target, for which nothing is drawn.
        self._cumulative: list[int] | None = None

    @property
    def rank(self) -> tuple[int, bool]:
        """Sets of one prefix are asked in ascending rank.

        Of two sets with the same priority the configured one comes before the broadcast one: who configures
        where a service is does not want to ask everybody as well.
        """
        return -self.priority, self.broadcast

    def add(self, target: Target) -> None:
        """Append a target."""
        self.targets = (*self.targets, target)
        self._cumulative = None

    def remove(self, target: Target) -> None:
        """Take a target out. ValueError when it is not in the set."""
        at = self.targets.index(target)
        self.targets = self.targets[:at] + self.targets[at + 1 :]
        self._cumulative = None

    def replace(self, old: Target, new: Target) -> None:
        """Put a target in the place of another. ValueError when that is not in the set."""
        at = self.targets.index(old)
        self.targets = (*self.targets[:at], new, *self.targets[at + 1 :])
        self._cumulative = None

    def candidates(self, exclude: Collection[int], even_marked: bool) -> Sequence[Target]:
        """The targets that may be chosen: addresses in `exclude` never, marked ones only if asked for."""
        if not exclude and (even_marked or not self.marked):
            return self.targets
        return [
            each
            for each in self.targets
            if not each.address or (each.address not in exclude and (even_marked or each.mark is None))
        ]

    def select(
        self, random: Callable[[], float], exclude: Collection[int], even_marked: bool = False
    ) -> tuple[Target, ...]:
        """The targets to use: one drawn by weight, or all of a broadcast set; none if there is no candidate.

        `exclude` holds addresses. `random` returns a number in [0, 1) and is called at most once. Excluded
        addresses and marks concern FORWARD targets only.
        """
        targets = self.targets
        if not exclude and not self.marked:
            if len(targets) == 1:
                return targets
            if not self.broadcast:
                cumulative = self._cumulative
                if cumulative is None:
                    cumulative = self._cumulative = list(accumulate(each.weight for each in targets))
                return (targets[bisect_right(cumulative, int(random() * cumulative[-1]))],)
        candidates = self.candidates(exclude, even_marked)
        if self.broadcast or len(candidates) < 2:
            return tuple(candidates)
        cumulative = list(accumulate(each.weight for each in candidates))
        return (candidates[bisect_right(cumulative, int(random() * cumulative[-1]))],)
