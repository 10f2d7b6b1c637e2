"""Who wants to know what happens in the stack? Events, from whoever knows to whoever asked.

The kinds of events are KINDS; what each says beyond that is given where it is published. Events never hold
anything up: a callback runs at once and must not block, and `EventQueue` is for whoever takes his time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from typing import NamedTuple

from serval_core.errors import OurMistake

KINDS = frozenset(
    {
        "service_bound",
        "service_unbound",
        "registered",
        "unregistered",
        "registration_refused",
        "rule_added",
        "rule_removed",
        "rule_expired",
        "rule_hit",
        "delayed",
        "delay_released",
        "delay_dropped",
        "target_down",
        "target_up",
        "flow_opened",
        "flow_ended",
        "flow_migrated",
        "migration_failed",
    }
)
LOST = "events_lost"
QUEUE_LIMIT = 1024


class Event(NamedTuple):
    """Something that happened. `at`: seconds of the wall clock; `fields`: what msgspec can turn into JSON."""

    kind: str
    at: float
    fields: dict[str, object]

    def as_dict(self) -> dict[str, object]:
        """The event as one flat dict, with "event" and "at" in front."""
        return {"event": self.kind, "at": self.at, **self.fields}


Callback = Callable[[Event], None]


class ServiceEvents:
    """The events of one stack. Belongs to the stack's thread.

    `clock` tells the wall-clock time; `on_error` gets what a callback raised, which concerns no other one.
    """

    __slots__ = ("_by_kind", "_clock", "_on_error", "_subscriptions")

    def __init__(self, clock: Callable[[], float], on_error: Callable[[Exception], None]) -> None:
        self._clock = clock
        self._on_error = on_error
        self._subscriptions: list[tuple[Callback, frozenset[str]]] = []
        self._by_kind: dict[str, tuple[Callback, ...]] = {}

    def subscribe(self, callback: Callback, kinds: Collection[str] | None = None) -> Callable[[], None]:
        """Call `callback` with every event of these kinds (None: all); returns what ends that.

        OurMistake if a kind is unknown.
        """
        wanted = KINDS if kinds is None else frozenset(kinds)
        check_kinds(wanted)
        subscription = (callback, wanted)
        self._subscriptions.append(subscription)
        self._sort()

        def unsubscribe() -> None:
            # By identity: somebody else may have subscribed the same callback to the same kinds.
            self._subscriptions = [each for each in self._subscriptions if each is not subscription]
            self._sort()

        return unsubscribe

    def wanted(self, kind: str) -> bool:
        """Whether anybody wants events of this kind."""
        return kind in self._by_kind

    def publish(self, kind: str, **fields: object) -> None:
        """Tell everybody who wants to know. Costs next to nothing when nobody does."""
        callbacks = self._by_kind.get(kind)
        if callbacks is None:
            if kind not in KINDS:
                raise OurMistake(f'"{kind}" is no kind of event')
            return
        event = Event(kind, self._clock(), fields)
        for callback in callbacks:
            try:
                callback(event)
            except Exception as error:
                # A subscriber's defect must cost neither the publisher nor the other subscribers anything.
                self._on_error(error)

    def _sort(self) -> None:
        self._by_kind = {
            kind: tuple(callback for callback, kinds in self._subscriptions if kind in kinds)
            for kind in KINDS
            if any(kind in kinds for _, kinds in self._subscriptions)
        }


class EventQueue:
    """Keeps events for one reader until it takes them: at most `limit`, then the newest are lost and counted.

    `on_first` is called when the queue stops being empty. Give `put` to `ServiceEvents.subscribe`.
    """

    __slots__ = ("_events", "_limit", "_lost", "_lost_at", "_on_first")

    def __init__(self, on_first: Callable[[], None], limit: int = QUEUE_LIMIT) -> None:
        self._on_first = on_first
        self._limit = limit
        self._events: deque[Event] = deque()
        self._lost = 0
        self._lost_at = 0.0

    def put(self, event: Event) -> None:
        """Keep the event, or count it as lost."""
        if len(self._events) >= self._limit:
            self._lost += 1
            self._lost_at = event.at
            return
        self._events.append(event)
        if len(self._events) == 1:
            self._on_first()

    def take(self) -> list[Event]:
        """What has happened since the last call, oldest first. If events were lost in the meantime, the last
        one is of kind `events_lost` and says how many ("count").
        """
        events = list(self._events)
        self._events.clear()
        if self._lost:
            events.append(Event(LOST, self._lost_at, {"count": self._lost}))
            self._lost = 0
        return events


def check_kinds(kinds: Collection[str]) -> None:
    """Raise OurMistake, naming the known ones, if one of these is no kind of event."""
    for kind in kinds:
        if kind not in KINDS:
            raise OurMistake(f'"{kind}" is no kind of event; there are: {", ".join(sorted(KINDS))}')
