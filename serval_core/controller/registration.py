"""What does a host tell service routers about what it serves, and when?

The prototype's exchange (SPEC 7.4, OBSERVED "servd registration"): REGISTER when a service is bound, the same
with the refresh flag and the address known before every 20 s, or at once after the address changed, UNREGISTER
when it is closed; never an answer. What differs from the prototype's defaults, or is to be signed, stands behind
its 48 bytes (`wire.registration_offer`). Takes calls and the time, gives payloads with destinations: knows no
sockets.

`now` is monotonic; `wall` is seconds since 1970, for signatures.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable
from typing import NamedTuple

from serval_core.controller.authentication import Signer
from serval_core.controller.flood_limits import TokenBucket
from serval_core.core import RandomSource
from serval_core.names import ServicePrefix
from serval_core.rules import FORWARD_PRIORITY, FORWARD_WEIGHT
from serval_core.wire.control_messages import MessageType, Registration, emit_registration
from serval_core.wire.registration_offer import Offer, emit_extension

# What a router assumes when nothing is said (SPEC 7.4).
PROTOTYPE_OFFER = Offer(FORWARD_PRIORITY, FORWARD_WEIGHT, 50)
# Nothing acknowledges the first registration, and the first packet to a host is the one that gets lost.
CONFIRMATION_S = 1.0
# Refreshes of many services spread over time instead of staying where they began.
REFRESH_SPREAD = 0.1
# Well below what a router of ours takes of one host (`settings.RouterSection.messages_per_host_s`).
MESSAGES_PER_S = 150.0
MESSAGES_BURST = 500.0


class Way(NamedTuple):
    """How registrations reach a router (or, by broadcast, every one on a network).

    `key` names the way for as long as it exists: a router's address, or the negative index of an interface.
    Datagrams to `destination` leave with `source` as their IP source.
    """

    key: int
    destination: int
    source: int


class Outgoing(NamedTuple):
    """A datagram to the router service at `destination`, an IPv4 address."""

    payload: bytes
    destination: int


class _Service:
    """One offered prefix."""

    __slots__ = ("next_refresh", "priority", "weight")

    def __init__(self, priority: int, weight: int) -> None:
        self.priority = priority
        self.weight = weight
        self.next_refresh = 0.0


class HostRole:
    """Keeps routers informed. Collect what is to be sent with `take_outgoing` after every call.

    What is sent is limited in rate, as routers take no more of one host. A service that comes and goes before its
    turn causes no message at all.
    """

    def __init__(
        self, refresh_s: float, lifetime_s: float, signer: Signer | None, random: RandomSource, now: float
    ) -> None:
        self._refresh_s = refresh_s
        self._lifetime_s = max(1, int(lifetime_s))
        self._signer = signer
        self._random = random
        self._ways: dict[int, Way] = {}
        self._services: dict[ServicePrefix, _Service] = {}
        self._refreshes: list[tuple[float, ServicePrefix]] = []
        # Per prefix and way, the address that the router there has been told. Outlives the offer until the
        # router was told of its end.
        self._told: dict[ServicePrefix, dict[int, int]] = {}
        self._pending: dict[tuple[ServicePrefix, int], MessageType] = {}
        self._bucket = TokenBucket(MESSAGES_PER_S, MESSAGES_BURST, now)
        self._transaction_id = 0

    def offer(self, prefix: ServicePrefix, priority: int, weight: int, now: float) -> None:
        """This host serves `prefix` from now on, or does so with another priority or weight."""
        service = self._services.get(prefix)
        if service is not None and (service.priority, service.weight) == (priority, weight):
            return
        if service is None:
            service = self._services[prefix] = _Service(priority, weight)
        else:
            service.priority, service.weight = priority, weight
        self._register(prefix, service, self._ways, now + min(CONFIRMATION_S, self._refresh_s))

    def withdraw(self, prefix: ServicePrefix) -> None:
        """This host does not serve `prefix` any more. One that was not offered is no error."""
        if self._services.pop(prefix, None) is None:
            return
        told = self._told.pop(prefix, {})
        for key in self._ways:
            self._pending.pop((prefix, key), None)
            if key in told:
                self._pending[prefix, key] = MessageType.UNREGISTER
                self._told.setdefault(prefix, {})[key] = told[key]

    def withdraw_all(self) -> None:
        """This host serves nothing any more."""
        for prefix in list(self._services):
            self.withdraw(prefix)

    def set_ways(self, ways: Iterable[Way], now: float) -> None:
        """Which routers there are and how they are reached. What is new or changed is told at once.

        A way that goes and comes back, as when an interface gets another address, leads to the same router,
        which is told what replaces what.
        """
        before, self._ways = self._ways, {way.key: way for way in ways}
        changed = [key for key, way in self._ways.items() if before.get(key) != way]
        if changed:
            for prefix, service in self._services.items():
                self._register(prefix, service, changed, now + min(CONFIRMATION_S, self._refresh_s))

    def leave(self, keys: Iterable[int], now: float, wall: float) -> list[Outgoing]:
        """Have nothing to do with these ways any more; the messages that say so. Until `set_ways` names them again."""
        farewell = []
        for key in keys:
            way = self._ways.pop(key)
            for prefix in [prefix for prefix, told in self._told.items() if key in told]:
                self._pending.pop((prefix, key), None)
                service = self._services.get(prefix)
                farewell.append(self._message(MessageType.UNREGISTER, prefix, service, way, wall))
        return farewell

    def set_signer(self, signer: Signer | None) -> None:
        """Sign with other keys from now on."""
        self._signer = signer

    @property
    def ways(self) -> Collection[int]:
        """The keys of all ways."""
        return tuple(self._ways)

    def next_timeout(self) -> float | None:
        """When `handle_timeouts` or `take_outgoing` has something to do, None if never."""
        self._drop_stale()
        due = [self._refreshes[0][0]] if self._refreshes else []
        if self._pending:
            due.append(self._bucket.ready_at())
        return min(due, default=None)

    def handle_timeouts(self, now: float) -> None:
        """See to the refreshes that are due."""
        self._drop_stale()
        while self._refreshes and self._refreshes[0][0] <= now:
            _, prefix = heapq.heappop(self._refreshes)
            spread = 1 - REFRESH_SPREAD * self._random.random()
            self._register(prefix, self._services[prefix], self._ways, now + self._refresh_s * spread)
            self._drop_stale()

    def take_outgoing(self, now: float, wall: float, *, unlimited: bool = False) -> list[Outgoing]:
        """What is to be sent now, in order. `unlimited`: there is no later."""
        outgoing = []
        while self._pending:
            prefix, key = next(iter(self._pending))
            way, service = self._ways.get(key), self._services.get(prefix)
            if way is not None:
                if not self._bucket.take(now) and not unlimited:
                    break
                outgoing.append(self._message(self._pending[prefix, key], prefix, service, way, wall))
            del self._pending[prefix, key]
        return outgoing

    def snapshot(self) -> list[dict[str, object]]:
        """One dict per offered prefix."""
        return [
            {"prefix": str(prefix), "priority": service.priority, "weight": service.weight}
            for prefix, service in self._services.items()
        ]

    def _drop_stale(self) -> None:
        """An entry that was superseded, or whose service is gone."""
        while self._refreshes:
            due, prefix = self._refreshes[0]
            service = self._services.get(prefix)
            if service is not None and service.next_refresh == due:
                return
            heapq.heappop(self._refreshes)

    def _register(
        self, prefix: ServicePrefix, service: _Service, keys: Iterable[int], next_refresh: float
    ) -> None:
        for key in keys:
            self._pending[prefix, key] = MessageType.REGISTER
        service.next_refresh = next_refresh
        heapq.heappush(self._refreshes, (next_refresh, prefix))

    def _message(
        self, kind: MessageType, prefix: ServicePrefix, service: _Service | None, way: Way, wall: float
    ) -> Outgoing:
        self._transaction_id = (self._transaction_id + 1) & 0xFFFFFFFF
        before, offer = 0, Offer(FORWARD_PRIORITY, FORWARD_WEIGHT, self._lifetime_s)
        told = self._told.setdefault(prefix, {})
        if service is not None and kind is MessageType.REGISTER:
            before = told.get(way.key, 0)
            told[way.key] = way.source
            offer = Offer(service.priority, service.weight, self._lifetime_s)
        else:
            del told[way.key]
            if not told:
                del self._told[prefix]
        message = Registration(kind, self._transaction_id, prefix, bool(before), before)
        if self._signer is not None:
            payload = self._signer.sign(message, offer, way.source, wall)
        elif kind is MessageType.UNREGISTER or offer == PROTOTYPE_OFFER:
            payload = emit_registration(message)
        else:
            payload = emit_registration(message) + emit_extension(offer)
        return Outgoing(payload, way.destination)
