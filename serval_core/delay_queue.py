"""Who waits until somebody knows where a service is? What a DELAY rule has parked (SPEC 6.8).

Anything can wait: a connect, a datagram, a packet on its way through. The queue is bounded in number and
age; it knows only how to call each back. A verdict concerns all that wait for the services under a prefix:
`release` resolves them anew, `drop` ends them. What is released and meets a DELAY rule again is dropped, or a
hasty verdict could go round in circles.

The first to wait for a service is announced with a `delayed` event: that is when a resolver goes to work.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from serval_core.names import ServiceID, ServicePrefix
from serval_core.timers import Timers

Origin = Literal["connect", "datagram", "forwarded"]
"""Whose the waiting thing is: a connect of ours, a datagram of ours, or a packet of others."""


# Of so many places one is kept free of packets of others, which anybody can send.
_RESERVED_ONE_OF = 4


class Parked:
    """One that waits. `resume(now)` and `end(reason, now)` are called at most once, and only one of them."""

    __slots__ = ("end", "origin", "resume", "service_id", "timer")

    def __init__(
        self,
        service_id: ServiceID,
        origin: Origin,
        resume: Callable[[float], None],
        end: Callable[[str, float], None],
    ) -> None:
        self.service_id = service_id
        self.origin = origin
        self.resume = resume
        self.end = end
        self.timer = 0


class DelayQueue:
    """What waits in one stack: at most `limit`, of packets of others three quarters of that, each at most
    `timeout_s` seconds. `notify(kind, fields)` gets the news, of the kinds delayed, delay_released and
    delay_dropped (`service_events`).
    """

    __slots__ = (
        "_count",
        "_forwarded",
        "_forwarded_limit",
        "_limit",
        "_notify",
        "_releasing",
        "_timeout_s",
        "_timers",
        "_waiting",
        "counters",
    )

    def __init__(
        self,
        limit: int,
        timeout_s: float,
        timers: Timers,
        notify: Callable[[str, dict[str, object]], None],
    ) -> None:
        self._count = 0
        self._forwarded = 0
        self._limit = limit
        self._forwarded_limit = limit - limit // _RESERVED_ONE_OF
        self._timeout_s = timeout_s
        self._timers = timers
        self._notify = notify
        self._releasing = False
        self._waiting: dict[ServiceID, dict[Parked, None]] = {}
        self.counters: dict[str, int] = {
            "parked": 0,
            "released": 0,
            "dropped_by_verdict": 0,
            "dropped_full": 0,
            "dropped_still_delayed": 0,
            "dropped_too_old": 0,
        }

    def __len__(self) -> int:
        return self._count

    def services(self) -> dict[ServiceID, int]:
        """The services that are waited for, and by how many."""
        return {service_id: len(waiting) for service_id, waiting in self._waiting.items()}

    def park(
        self,
        service_id: ServiceID,
        origin: Origin,
        resume: Callable[[float], None],
        end: Callable[[str, float], None],
        now: float,
    ) -> Parked | None:
        """Let something wait for `service_id`; returns what `withdraw` takes.

        `resume(now)` is called to resolve it anew, `end(reason, now)` to give it up. None, and neither is
        ever called: there is no room, or this is a resumption that meets a DELAY rule again.
        """
        if self._releasing:
            self._dropped("still_delayed", service_id, 1)
            return None
        forwarded = origin == "forwarded"
        if self._count >= self._limit or (forwarded and self._forwarded >= self._forwarded_limit):
            self._dropped("full", service_id, 1)
            return None
        parked = Parked(service_id, origin, resume, end)
        waiting = self._waiting.setdefault(service_id, {})
        waiting[parked] = None
        self._count += 1
        self._forwarded += forwarded
        parked.timer = self._timers.start(now + self._timeout_s, self._too_old, parked)
        self.counters["parked"] += 1
        if len(waiting) == 1:
            fields: dict[str, object] = {
                "service": service_id.text,
                "service_id": service_id.hex_text,
                "origin": origin,
            }
            self._notify("delayed", fields)
        return parked

    def withdraw(self, parked: Parked) -> None:
        """It waits no longer, for reasons of its own. Harmless when it does not wait any more."""
        waiting = self._waiting.get(parked.service_id)
        if waiting is None or parked not in waiting:
            return
        self._timers.cancel(parked.timer)
        del waiting[parked]
        self._gone(parked)
        if not waiting:
            del self._waiting[parked.service_id]

    def release(self, prefix: ServicePrefix, now: float) -> int:
        """Resolve anew all that waits for services under `prefix`; returns how many those were."""
        released = self._take(prefix)
        self.counters["released"] += sum(len(each) for each in released.values())
        for service_id, waiting in released.items():
            self._notify("delay_released", {"service": service_id.text, "count": len(waiting)})
        self._releasing = True
        try:
            for waiting in released.values():
                for parked in waiting:
                    parked.resume(now)
        finally:
            self._releasing = False
        return sum(len(each) for each in released.values())

    def drop(self, prefix: ServicePrefix, now: float, reason: str = "nobody knows the service") -> int:
        """Give up all that waits for services under `prefix`; returns how many those were."""
        dropped = self._take(prefix)
        for service_id, waiting in dropped.items():
            self._dropped("by_verdict", service_id, len(waiting))
            for parked in waiting:
                parked.end(reason, now)
        return sum(len(each) for each in dropped.values())

    def _take(self, prefix: ServicePrefix) -> dict[ServiceID, dict[Parked, None]]:
        covered = [service_id for service_id in self._waiting if prefix.covers(service_id)]
        taken = {service_id: self._waiting.pop(service_id) for service_id in covered}
        for waiting in taken.values():
            for parked in waiting:
                self._timers.cancel(parked.timer)
                self._gone(parked)
        return taken

    def _gone(self, parked: Parked) -> None:
        self._count -= 1
        self._forwarded -= parked.origin == "forwarded"

    def _too_old(self, parked: Parked, now: float) -> None:
        self.withdraw(parked)
        self._dropped("too_old", parked.service_id, 1)
        parked.end(f"nobody said within {self._timeout_s:g} s where the service is", now)

    def _dropped(self, reason: str, service_id: ServiceID, count: int) -> None:
        self.counters[f"dropped_{reason}"] += count
        self._notify("delay_dropped", {"service": service_id.text, "reason": reason, "count": count})
