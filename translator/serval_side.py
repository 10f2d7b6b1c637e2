"""What is the translator's policy between a client and the embedded stack?

`ForwardSide`: a legacy client came, open a flow to its service. `ReverseSide`: a flow came, connect to a
target. Both hand the finished pair to the relay, and both end the waiting side at once when the other cannot
be had: nothing hangs. Timeouts of opening a flow are the stack's, those of reaching a target the dialer's.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import time
from collections.abc import Sequence
from typing import Protocol

import structlog

from serval_core.config_file import Misconfigured
from serval_core.connection import Connection, Listener, PendingConnect
from serval_core.errors import OurMistake
from serval_core.names import ServicePrefix
from serval_core.stack import ServalStack
from translator.accounting import Admission, MapTraffic
from translator.complaint import Complaint
from translator.config import Settings, Terms
from translator.health import HealthChecker
from translator.health_settings import HealthSection
from translator.legacy_side import Address, MappedPort, address_text
from translator.port_map import ReverseMap
from translator.relay import Pair, Relay
from translator.targets import Dial, Target, TargetDialer, TargetSet

log = structlog.get_logger("translator")

# How long a client must have been waiting for its flow before it is watched for going away.
WATCH_AFTER_S = 0.5


class ForwardPair(Pair):
    """A legacy client on its way to a service."""

    __slots__ = ("address", "pending", "side", "since_s")
    legacy_is_left = True

    def __init__(self, side: ForwardSide, client: socket.socket, address: Address, port: MappedPort) -> None:
        super().__init__(side.admission, port.traffic)
        self.side = side
        self.legacy = client
        self.address = address
        self.pending: PendingConnect | None = None
        self.since_s = time.monotonic()

    def legacy_text(self) -> str:
        """The client's address."""
        return address_text(self.address)

    def connected(self, connection: Connection) -> None:
        """The stack opened the flow."""
        self.pending = None
        self.connection = connection
        self.side.connecting.discard(self)
        self.side.relay.start(self)

    def failed(self, code: int, why: str) -> None:
        """The stack could not open it."""
        self.pending = None
        self.side.connecting.discard(self)
        self.side.refuse(self, code, why)

    def give_up(self) -> None:
        """Nobody waits for the flow any more."""
        pending, self.pending = self.pending, None
        self.side.connecting.discard(self)
        if pending is not None:
            pending.cancel()
        self.traffic.gave_up += 1
        self.end(properly=False)


class ForwardSide:
    """Legacy clients in, Serval flows out."""

    def __init__(
        self, stack: ServalStack, relay: Relay, admission: Admission, *, reset_unanswered: bool
    ) -> None:
        self.stack = stack
        self.relay = relay
        self.admission = admission
        self.connecting: set[ForwardPair] = set()
        self.failures: dict[str, int] = {}
        self._reset_unanswered = reset_unanswered
        self._complaints: dict[MapTraffic, Complaint] = {}

    def client(self, client: socket.socket, address: Address, port: MappedPort) -> None:
        """A client was accepted; takes the socket."""
        pair = ForwardPair(self, client, address, port)
        try:
            pair.pending = self.stack.connect(port.map.service_id, pair.connected, pair.failed)
        except OurMistake as mistake:
            self.refuse(pair, errno.EINVAL, str(mistake))
            return
        self.connecting.add(pair)

    def refuse(self, pair: ForwardPair, code: int, why: str) -> None:
        """No instance can be had: tell the client so."""
        name = errno.errorcode.get(code, str(code))
        self.failures[name] = self.failures.get(name, 0) + 1
        traffic = pair.traffic
        traffic.refused += 1
        if traffic not in self._complaints:
            self._complaints[traffic] = Complaint()
        self._complaints[traffic].say(
            "a client could not reach its service", map=traffic.listen, service=traffic.service, why=why
        )
        # A client that still sends would turn a plain close into a reset anyway; one that waits sees EOF.
        pair.end(properly=not self._reset_unanswered)

    def sweep(self, now: float) -> None:
        """Give up for clients that were reset while they waited. Call it about once per second.

        A client that has only sent its FIN stays: it may be waiting for the answer (`printf … | nc -N`).
        """
        watched = {
            pair.legacy.fileno(): pair
            for pair in self.connecting
            if pair.legacy is not None and now - pair.since_s > WATCH_AFTER_S
        }
        if not watched:
            return
        poll = select.poll()
        for fd in watched:
            poll.register(fd, 0)  # POLLHUP (both directions gone) and POLLERR come unasked
        for fd, _ in poll.poll(0):
            watched[fd].give_up()

    def give_up_all(self) -> None:
        """End everything that is still connecting."""
        for pair in list(self.connecting):
            pair.give_up()


class ReversePair(Pair):
    """A Serval client on its way to a target."""

    __slots__ = ("dial", "served", "target")
    legacy_is_left = False

    def __init__(self, served: ServedPrefix, connection: Connection) -> None:
        super().__init__(served.side.admission, served.traffic)
        self.served = served
        self.connection = connection
        self.target: Target | None = None
        self.dial: Dial | None = None

    def legacy_text(self) -> str:
        """The target's name."""
        return self.target.text if self.target is not None else ""

    def reached(self, connection: socket.socket, target: Target) -> None:
        """A target took the connection."""
        self._stop_waiting()
        self.legacy = connection
        self.target = target
        self.served.side.relay.start(self)

    def unreachable(self, code: int) -> None:
        """No target did."""
        self._stop_waiting()
        self.traffic.refused += 1
        self.served.complaint.say(
            "no target takes connections",
            service=self.traffic.listen,
            targets=self.traffic.service,
            why=os.strerror(code),
        )
        self.end(properly=False)

    def wait(self, dial: Dial) -> None:
        """The dial is not decided yet; meanwhile the client may go away."""
        assert self.connection is not None
        self.dial = dial
        self.connection.on_ended = self._client_went_away
        self.served.side.dialing.add(self)

    def give_up(self) -> None:
        """Nobody waits for the target any more."""
        if self.dial is not None:
            self.dial.cancel()
        self._stop_waiting()
        self.traffic.gave_up += 1
        self.end(properly=False)

    def _client_went_away(self, code: int) -> None:
        self.give_up()

    def _stop_waiting(self) -> None:
        if self.dial is not None:
            self.dial = None
            self.served.side.dialing.discard(self)
            if self.connection is not None:
                self.connection.on_ended = None


class Registrar(Protocol):
    """Who tells service routers what is served here: the service controller."""

    def withhold(self, prefix: ServicePrefix, *, withheld: bool) -> None:
        """Do not register what listens on `prefix`; or do so again."""

    def set_terms(self, prefix: ServicePrefix, priority: int, weight: int) -> None:
        """Register it with these."""


class ServedPrefix:
    """One reverse map at work: a listener, its registration, its targets and what watches them."""

    __slots__ = ("checker", "complaint", "listener", "map", "side", "targets", "traffic")

    def __init__(self, side: ReverseSide, reverse: ReverseMap, targets: TargetSet) -> None:
        self.side = side
        self.map = reverse
        self.targets = targets
        self.traffic = _traffic(reverse)
        self.complaint = Complaint()
        self.listener: Listener | None = None
        self.checker: HealthChecker | None = None

    def listen(self, stack: ServalStack, backlog: int) -> None:
        """Accept flows, and register the service once a target is known to be up. Raises OurMistake."""
        prefix = self.map.prefix
        self.side.registrar.withhold(prefix, withheld=True)
        self.listener = stack.listen(prefix, self.flow, backlog)

    def watch(self, terms: Terms, health: HealthSection) -> None:
        """Register with these `terms`, and watch the targets like this from now on."""
        if self.checker is not None:
            self.checker.stop()
        self.side.registrar.set_terms(self.map.prefix, terms.priority, terms.weight)
        self.checker = HealthChecker(self.map.service_text, self.targets, health, self._health_changed)
        self.checker.start()
        self._health_changed()

    def drain(self) -> None:
        """Let no new flows begin; those that have begun are still accepted."""
        if self.checker is not None:
            self.checker.stop()
        if self.listener is not None:
            self.listener.set_refusing(True)

    def close(self) -> None:
        """Accept no more flows; those that were accepted live on."""
        if self.checker is not None:
            self.checker.stop()
        if self.listener is not None:
            self.listener.close()
            self.listener = None
            self.side.registrar.withhold(self.map.prefix, withheld=False)

    def change(self, reverse: ReverseMap, targets: TargetSet) -> MapTraffic | None:
        """Take new flows to other targets; returns the account of the map as it was, if it differs."""
        targets.succeed(self.targets)
        before, self.map, self.targets = self.map, reverse, targets
        if (before.service_text, before.targets) == (reverse.service_text, reverse.targets):
            return None
        gone, self.traffic = self.traffic, _traffic(reverse)
        return gone

    def _health_changed(self) -> None:
        """With every target down the service is elsewhere, if anywhere: clients are told so, and routers."""
        assert self.listener is not None
        try:
            self.listener.set_refusing(not self.targets.usable)
        except OurMistake as mistake:
            log.error(
                "a service that works again is not served", service=self.map.service_text, why=str(mistake)
            )
        assert self.checker is not None
        offered = self.targets.proven or not self.checker.checks
        self.side.registrar.withhold(self.map.prefix, withheld=not offered)

    def flow(self, connection: Connection) -> None:
        """The stack accepted a flow."""
        side = self.side
        if side.admission.is_full():
            self.complaint.say(
                "the connection limit is reached: resetting new flows", limit=side.admission.limit
            )
            self.traffic.connections += 1
            self.traffic.refused += 1
            connection.abort()
            return
        pair = ReversePair(self, connection)
        dial = side.dialer.dial(self.targets, pair.reached, pair.unreachable)
        if dial is not None:
            pair.wait(dial)


def _traffic(reverse: ReverseMap) -> MapTraffic:
    return MapTraffic(reverse.service_text, ",".join(map(str, reverse.targets)))


class ReverseSide:
    """Serval flows in, legacy connections out."""

    def __init__(
        self, relay: Relay, admission: Admission, dialer: TargetDialer, registrar: Registrar
    ) -> None:
        self.relay = relay
        self.admission = admission
        self.dialer = dialer
        self.registrar = registrar
        self.dialing: set[ReversePair] = set()
        self.served: list[ServedPrefix] = []

    def serve(
        self, stack: ServalStack, reverse: ReverseMap, targets: TargetSet, backlog: int
    ) -> ServedPrefix:
        """Listen on the map's prefix; `watch` follows. Raises Misconfigured when the stack refuses it."""
        served = ServedPrefix(self, reverse, targets)
        try:
            served.listen(stack, backlog)
        except OurMistake as mistake:
            raise Misconfigured(reverse.origin, str(mistake)) from None
        self.served.append(served)
        return served

    def watch(self, settings: Settings) -> None:
        """Register what is served with the terms of `settings`, and check its targets as they say."""
        for served in self.served:
            served.watch(settings.terms_of(served.map), settings.health_of(served.map))

    def stop_serving(self, served: ServedPrefix) -> None:
        """Give one prefix up."""
        served.close()
        self.served.remove(served)

    def replace(self, settings: Settings, target_sets: Sequence[TargetSet]) -> list[MapTraffic]:
        """Serve the maps of `settings` instead, all of whose prefixes are served already.

        Returns the accounts of what is gone.
        """
        wanted = {
            reverse.prefix: (reverse, targets)
            for reverse, targets in zip(settings.reverses, target_sets, strict=True)
        }
        gone: list[MapTraffic] = []
        for served in list(self.served):
            if served.map.prefix not in wanted:
                self.stop_serving(served)
                gone.append(served.traffic)
            elif (account := served.change(*wanted[served.map.prefix])) is not None:
                gone.append(account)
        self.watch(settings)
        return gone

    def drain(self) -> None:
        """Let no new flows begin; those that have begun are still accepted."""
        for served in self.served:
            served.drain()

    def close(self) -> None:
        """Accept no more flows."""
        for served in self.served:
            served.close()

    def give_up_all(self) -> None:
        """End every flow that still waits for its target."""
        for pair in list(self.dialing):
            pair.give_up()
