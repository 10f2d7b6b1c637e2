"""What ends by itself in the service table, and when? Rules with timeouts, and the marks of targets that are down.

Times are seconds of the caller's clock. An idle timeout is looked after by comparing packet counters, so that
resolving costs nothing more and packets that a fast path counts later are not missed. For that an idle rule
may stay up to a quarter of its timeout longer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from serval_core.errors import OurMistake
from serval_core.rules import Rule
from serval_core.selection import Lifetime, Mark, Target
from serval_core.service_entry import Entry
from serval_core.timers import NO_TIMER, Timers

_CHECKS_PER_IDLE_TIMEOUT = 4


class Placed(NamedTuple):
    """A target and where it stands."""

    entry: Entry
    target: Target


class RuleEndings:
    """The timers of one service table. `on_expired` and `on_up` are called when something ends."""

    __slots__ = ("_on_expired", "_on_up", "_timers")

    def __init__(
        self, on_expired: Callable[[Entry, Target], None], on_up: Callable[[Entry, Target], None]
    ) -> None:
        self._on_expired = on_expired
        self._on_up = on_up
        self._timers = Timers()

    def run(self, now: float) -> None:
        """Let end what is due."""
        self._timers.run(now)

    def next_deadline(self) -> float | None:
        """When something ends or has to be looked at next; None: nothing does."""
        return self._timers.next_deadline()

    def begin(self, entry: Entry, target: Target, rule: Rule, now: float | None) -> None:
        """Let the rule end when its timeouts say."""
        if not (rule.idle_timeout_s or rule.hard_timeout_s):
            return
        assert now is not None
        lifetime = Lifetime(rule.idle_timeout_s, rule.hard_timeout_s, now, 0, now, NO_TIMER)
        self._await_end(Placed(entry, target), lifetime, now)

    def mark(self, entry: Entry, target: Target, until: float, reason: str) -> bool:
        """Mark a target; whether it was not marked before."""
        before = target.mark
        if before is None:
            entry.set_of(target).marked += 1
        else:
            self._timers.cancel(before.timer)
        timer = self._timers.start(until, self._mark_ends, Placed(entry, target))
        target.mark = Mark(until, reason, timer)
        return before is None

    def unmark(self, entry: Entry, target: Target) -> bool:
        """Take a mark away; whether there was one."""
        if target.mark is None:
            return False
        self._timers.cancel(target.mark.timer)
        target.mark = None
        entry.set_of(target).marked -= 1
        return True

    def forget(self, target: Target) -> None:
        """The target has left the table."""
        if target.lifetime is not None:
            self._timers.cancel(target.lifetime.timer)
        if target.mark is not None:
            self._timers.cancel(target.mark.timer)

    def _mark_ends(self, placed: Placed, now: float) -> None:
        if self.unmark(placed.entry, placed.target):
            self._on_up(placed.entry, placed.target)

    def _await_end(self, placed: Placed, lifetime: Lifetime, now: float) -> None:
        deadlines = []
        if lifetime.hard_timeout_s:
            deadlines.append(lifetime.added_at + lifetime.hard_timeout_s)
        if lifetime.idle_timeout_s:
            idle_at = lifetime.idle_since + lifetime.idle_timeout_s
            deadlines.append(min(idle_at, now + lifetime.idle_timeout_s / _CHECKS_PER_IDLE_TIMEOUT))
        timer = self._timers.start(min(deadlines), self._look, placed)
        placed.target.lifetime = lifetime._replace(timer=timer)

    def _look(self, placed: Placed, now: float) -> None:
        entry, target = placed
        lifetime = target.lifetime
        assert lifetime is not None
        packets = target.packets_resolved + target.packets_dropped
        if packets != lifetime.packets_then:
            lifetime = lifetime._replace(packets_then=packets, idle_since=now)
        is_old = lifetime.hard_timeout_s and now >= lifetime.added_at + lifetime.hard_timeout_s
        is_idle = lifetime.idle_timeout_s and now >= lifetime.idle_since + lifetime.idle_timeout_s
        if is_old or is_idle:
            self._on_expired(entry, target)
        else:
            self._await_end(placed, lifetime, now)


def check_time_is_known(rule: Rule, now: float | None) -> None:
    """Raise OurMistake if the rule has timeouts and nobody says from when they count."""
    if now is None and (rule.idle_timeout_s or rule.hard_timeout_s):
        raise OurMistake(f"the {rule.type.name} rule for {rule.prefix} has a timeout: say from when it counts")
