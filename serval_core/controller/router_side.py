"""How does a service router meet its hosts? The router role and the answers to hosts that look for one, on a stack.

The protocol is `router` and `discovery`; here are the services that it listens on, its log and its directory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

import structlog

from serval_core.controller.directory import Directory
from serval_core.controller.discovery import Announcer
from serval_core.controller.flood_limits import TokenBucket
from serval_core.controller.plan import ControllerPlan
from serval_core.controller.policy import RegistrationPolicy
from serval_core.controller.router import RegistrationRouter
from serval_core.datagrams import Datagram, DatagramEndpoint
from serval_core.errors import TheirMistake
from serval_core.names import ServicePrefix, format_address
from serval_core.stack import ServalStack
from serval_core.wire.router_discovery import DISCOVERY_SERVICE

log = structlog.get_logger("serval_core.controller")

REFUSALS_LOGGED_EVERY_S = 10.0
NEWS_LOGGED_PER_S = 10.0
NEWS_LOGGED_AT_ONCE = 100


class RouterSide:
    """Made and stopped by `ServiceController`, whose `wake` gets `run` called soon. `upstream` tells the routers
    above this one, `prefix_changed` is told what is registered.
    """

    def __init__(
        self,
        stack: ServalStack,
        plan: ControllerPlan,
        directory: Directory,
        upstream: Callable[[], Collection[int]],
        prefix_changed: Callable[[ServicePrefix, int], None],
        wake: Callable[[], None],
    ) -> None:
        self._stack = stack
        self._plan = plan
        self._upstream = upstream
        self._wake = wake
        self._refusals = _RefusalLog()
        self._news = _NewsLog(time.monotonic())
        router = plan.settings.router
        self.announcer = Announcer(router.announced_s, plan.router_identity)
        self.role = RegistrationRouter(
            stack.table,
            directory,
            _policy(plan),
            plan.limits,
            plan.client_id,
            (plan.router_id, plan.client_id, DISCOVERY_SERVICE),
            lambda: {each.address for each in stack.paths.interfaces()},
            upstream,
            self._publish,
            prefix_changed,
            time.monotonic(),
        )
        self._endpoint: DatagramEndpoint | None = None
        self._discovery: DatagramEndpoint | None = None
        self._forwarding_before = stack.forwarding

    def start(self) -> None:
        """Begin. Raises OurMistake when one of the services is taken, DirectoryFailed."""
        datagrams = self._stack.datagrams
        self._endpoint = datagrams.bind(ServicePrefix.of(self._plan.router_id), self._registration)
        if self._plan.settings.router.advertise:
            self._discovery = datagrams.bind(ServicePrefix.of(DISCOVERY_SERVICE), self._solicitation)
        restored = self.role.restore(time.monotonic(), time.time())
        if restored:
            log.info("registrations from before", count=restored)
        self._stack.forwarding = True
        self._wake()

    def stop(self) -> None:
        """Be no router any more; the registrations stay in the directory."""
        self._stack.forwarding = self._forwarding_before
        for endpoint in (self._endpoint, self._discovery):
            if endpoint is not None:
                endpoint.close()
        self._endpoint = self._discovery = None
        self.role.registrations.stop(time.monotonic(), time.time())

    def reconfigure(self, plan: ControllerPlan) -> None:
        """Another policy, other limits."""
        self._plan = plan
        self.role.set_policy(_policy(plan), plan.limits, time.monotonic())

    def next_timeout(self) -> float | None:
        """When `run` has something to do, None if never."""
        return self.role.registrations.next_timeout()

    def run(self, now: float, wall: float) -> None:
        """Do what is due."""
        self.role.registrations.handle_timeouts(now, wall)

    def _registration(self, datagram: Datagram) -> None:
        self.role.message_received(
            datagram.payload,
            datagram.source_service,
            datagram.source_address,
            time.monotonic(),
            time.time(),
        )
        self._wake()

    def _solicitation(self, datagram: Datagram) -> None:
        assert self._discovery is not None
        source = datagram.source_address
        path = self._stack.paths.path_to(source)
        if path is None:
            return
        if any(self._leads_to(router, path.interface_index) for router in self._upstream()):
            self.announcer.counters["left_to_upstream_router"] += 1
            return
        try:
            answer = self.announcer.answer(datagram.payload, source, path.source_address, time.monotonic())
        except TheirMistake as mistake:
            log.debug("a solicitation gets no answer", host=format_address(source), why=mistake.reason)
            return
        self._discovery.send(answer, datagram.source_service, source)

    def _leads_to(self, router: int, interface_index: int) -> bool:
        """Whether the router above is on that network, where hosts had better ask it than us."""
        path = self._stack.paths.path_to(router)
        return path is not None and path.interface_index == interface_index and path.next_hop == router

    def _publish(self, kind: str, /, **fields: object) -> None:
        if kind == "directory_failed":
            log.error("registrations are not saved; trying again", **fields)
            return
        if kind == "registration_refused":
            self._refusals.refused(fields, time.monotonic())
        else:
            self._news.happened(kind, fields, time.monotonic())
        self._stack.events.publish(kind, **fields)


def _policy(plan: ControllerPlan) -> RegistrationPolicy:
    return RegistrationPolicy(plan.policy, plan.default_policy, plan.settings.router.shortest_prefix_bits)


class _RefusalLog:
    """Says for every reason what was refused, and how often since it was last said."""

    def __init__(self) -> None:
        self._next: dict[object, float] = {}
        self._unsaid: dict[object, int] = {}

    def refused(self, fields: dict[str, object], now: float) -> None:
        reason = fields["reason"]
        if now < self._next.get(reason, now):
            self._unsaid[reason] = self._unsaid.get(reason, 0) + 1
            return
        self._next[reason] = now + REFUSALS_LOGGED_EVERY_S
        log.warning("registration refused", **fields, more_since_last=self._unsaid.pop(reason, 0))


class _NewsLog:
    """Says what comes and goes; when that is much, some of it, and how much more there was."""

    def __init__(self, now: float) -> None:
        self._bucket = TokenBucket(NEWS_LOGGED_PER_S, NEWS_LOGGED_AT_ONCE, now)
        self._unsaid = 0

    def happened(self, kind: str, fields: dict[str, object], now: float) -> None:
        if not self._bucket.take(now):
            self._unsaid += 1
            return
        more = {"more_since_last": self._unsaid} if self._unsaid else {}
        self._unsaid = 0
        log.info(kind, **fields, **more)
