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
from collections.abc import Iterable
from typing import NamedTuple

from serval_core.controller.authentication import Signer
from serval_core.core import RandomSource
from serval_core.names import ServicePrefix
from serval_core.rules import FORWARD_PRIORITY, FORWARD_WEIGHT
from serval_core.wire.control_messages import MessageType, Registration, emit_registration
from serval_core.wire.registration_offer import Offer, emit_extension

PROTOTYPE_LIFETIME_S = 50  # SPEC 7.4: what a router assumes when nothing is said
# Nothing acknowledges the first registration, and the first packet to a host is the one that gets lost.
CONFIRMATION_S = 1.0
# Refreshes of many services spread over time instead of staying where they began.
REFRESH_SPREAD = 0.1


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
    """One registered prefix. `told`: per way, the address that its router has."""

    __slots__ = ("next_refresh", "priority", "told", "weight")

    def __init__(self, priority: int, weight: int) -> None:
        self.priority = priority
        self.weight = weight
        self.told: dict[int, int] = {}
        self.next_refresh = 0.0


class HostRole:
    """Keeps routers informed. Collect what is to be sent with `take_outgoing` after every call."""

    def __init__(
        self, refresh_s: float, lifetime_s: float, signer: Signer | None, random: RandomSource
    ) -> None:
        self._refresh_s = refresh_s
        self._lifetime_s = max(1, int(lifetime_s))
        self._signer = signer
        self._random = random
        self._ways: dict[int, Way] = {}
        self._services: dict[ServicePrefix, _Service] = {}
        self._refreshes: list[tuple[float, ServicePrefix]] = []
        self._outgoing: list[Outgoing] = []
        self._transaction_id = 0

    def offer(self, prefix: ServicePrefix, priority: int, weight: int, now: float, wall: float) -> None:
        """This host serves `prefix` from now on, or does so with another priority or weight."""
        service = self._services.get(prefix)
        if service is not None and (service.priority, service.weight) == (priority, weight):
            return
        if service is None:
            service = self._services[prefix] = _Service(priority, weight)
        else:
            service.priority, service.weight = priority, weight
        for way in self._ways.values():
            self._register(prefix, service, way, wall)
        self._schedule(prefix, service, now + min(CONFIRMATION_S, self._refresh_s))

    def withdraw(self, prefix: ServicePrefix, wall: float) -> None:
        """This host does not serve `prefix` any more. One that was not offered is no error."""
        service = self._services.pop(prefix, None)
        if service is None:
            return
        for way in self._ways.values():
            if way.key in service.told:
                self._send(MessageType.UNREGISTER, prefix, service, way, wall)

    def withdraw_all(self, wall: float) -> None:
        """This host serves nothing any more."""
        for prefix in list(self._services):
            self.withdraw(prefix, wall)

    def set_ways(self, ways: Iterable[Way], now: float, wall: float) -> None:
        """Which routers there are and how they are reached. What is new or changed is told at once.

        A way that goes and comes back, as when an interface gets another address, leads to the same router,
        which is told what replaces what.
        """
        before, self._ways = self._ways, {way.key: way for way in ways}
        changed = [way for key, way in self._ways.items() if before.get(key) != way]
        for prefix, service in self._services.items():
            for way in changed:
                self._register(prefix, service, way, wall)
            if changed:
                self._schedule(prefix, service, now + min(CONFIRMATION_S, self._refresh_s))

    def next_timeout(self) -> float | None:
        """When `handle_timeouts` has something to do, None if never."""
        self._drop_stale()
        return self._refreshes[0][0] if self._refreshes else None

    def handle_timeouts(self, now: float, wall: float) -> None:
        """Send the refreshes that are due."""
        self._drop_stale()
        while self._refreshes and self._refreshes[0][0] <= now:
            _, prefix = heapq.heappop(self._refreshes)
            service = self._services[prefix]
            for way in self._ways.values():
                self._register(prefix, service, way, wall)
            self._schedule(
                prefix, service, now + self._refresh_s * (1 - REFRESH_SPREAD * self._random.random())
            )
            self._drop_stale()

    def take_outgoing(self) -> list[Outgoing]:
        """What is to be sent, in order."""
        outgoing, self._outgoing = self._outgoing, []
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

    def _schedule(self, prefix: ServicePrefix, service: _Service, due: float) -> None:
        service.next_refresh = due
        heapq.heappush(self._refreshes, (due, prefix))

    def _register(self, prefix: ServicePrefix, service: _Service, way: Way, wall: float) -> None:
        self._send(MessageType.REGISTER, prefix, service, way, wall)
        service.told[way.key] = way.source

    def _send(
        self, kind: MessageType, prefix: ServicePrefix, service: _Service, way: Way, wall: float
    ) -> None:
        self._transaction_id = (self._transaction_id + 1) & 0xFFFFFFFF
        told = service.told.get(way.key, 0) if kind is MessageType.REGISTER else 0
        message = Registration(kind, self._transaction_id, prefix, bool(told), told)
        offer = Offer(service.priority, service.weight, self._lifetime_s)
        if self._signer is not None:
            payload = self._signer.sign(message, offer, way.source, wall)
        elif offer == (FORWARD_PRIORITY, FORWARD_WEIGHT, PROTOTYPE_LIFETIME_S):
            payload = emit_registration(message)
        else:
            payload = emit_registration(message) + emit_extension(offer)
        self._outgoing.append(Outgoing(payload, way.destination))
