"""How much is going on, altogether and per map, and is there room for more?

Plain counters, touched a few times per connection and read by `show maps`. Knows neither sockets nor flows.
"""

from __future__ import annotations

from collections.abc import Callable


class MapTraffic:
    """What one map has carried. Bytes are those of ended pairs, delivered to the side that they were for."""

    __slots__ = (
        "active",
        "bytes_from_service",
        "bytes_to_service",
        "connections",
        "finished",
        "gave_up",
        "listen",
        "refused",
        "reset",
        "service",
        "timed_out",
    )

    def __init__(self, listen: str, service: str) -> None:
        self.listen = listen  # where clients come in, as text
        self.service = service  # where they are taken, as text
        self.connections = 0  # clients that came
        self.active = 0  # clients that are here now, connecting or connected
        self.finished = 0  # both directions ended properly
        self.reset = 0  # ended by a reset of either side
        self.timed_out = 0  # ended by the idle or a fin timeout
        self.refused = 0  # never got through: no instance answered, or no target did
        self.gave_up = 0  # clients that went away before they were connected
        self.bytes_to_service = 0
        self.bytes_from_service = 0

    def as_dict(self, live_bytes: tuple[int, int] | None = None) -> dict[str, object]:
        """For JSON. `live_bytes`: what the pairs that are still open have carried to and from the service."""
        shown: dict[str, object] = {name: getattr(self, name) for name in self.__slots__}
        if live_bytes is not None:
            shown["bytes_to_service"] = self.bytes_to_service + live_bytes[0]
            shown["bytes_from_service"] = self.bytes_from_service + live_bytes[1]
        return shown


class Admission:
    """The connection limit: how many clients are here, and who wants to know when that changes.

    `on_room` is called when the number falls below the limit again after `is_full` said so; `on_empty` when
    the last client has gone.
    """

    __slots__ = (
        "_resume_at",
        "_waiting",
        "active",
        "high_water",
        "limit",
        "on_empty",
        "on_room",
        "times_full",
    )

    def __init__(self, limit: int) -> None:
        self.active = 0
        self.high_water = 0
        self.times_full = 0
        self.on_room: Callable[[], None] | None = None
        self.on_empty: Callable[[], None] | None = None
        self._waiting = False
        self.change_limit(limit)

    def change_limit(self, limit: int) -> None:
        """Set another limit; who is here beyond it stays."""
        self.limit = limit
        # Some room at once instead of pausing and resuming for each single client.
        self._resume_at = limit - max(1, min(limit // 32, 256))

    def is_full(self) -> bool:
        """Whether no client may be admitted now; then `on_room` will be called."""
        if self.active < self.limit:
            return False
        if not self._waiting:
            self._waiting = True
            self.times_full += 1
        return True

    def enter(self) -> None:
        """A client is here."""
        self.active += 1
        self.high_water = max(self.high_water, self.active)

    def leave(self) -> None:
        """A client has gone."""
        self.active -= 1
        if self._waiting and self.active <= self._resume_at:
            self._waiting = False
            if self.on_room is not None:
                self.on_room()
        if not self.active and self.on_empty is not None:
            self.on_empty()
