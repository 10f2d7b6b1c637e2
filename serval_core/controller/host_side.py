"""How does a host keep in touch with its service routers? The host role and the search for routers, on a stack.

Registrations go to the routers that the operator has named, and with none by broadcast to whatever router is
on the attached networks. What this host cannot resolve itself goes to its routers too, by a default rule each:
in place of the broadcast ones for routers that were named, and before them for routers that were found, which
may not know every host of the network. The protocol is `registration` and `discovery`.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterable

import structlog

from serval_core.controller.authentication import Signer
from serval_core.controller.discovery import Network, RouterFinder
from serval_core.controller.offers import Offers
from serval_core.controller.plan import ControllerPlan
from serval_core.controller.registration import HostRole, Outgoing, Way
from serval_core.datagrams import Datagram, DatagramEndpoint
from serval_core.errors import OurMistake, TheirMistake
from serval_core.names import DEFAULT_PREFIX, ServiceID, ServicePrefix, format_address
from serval_core.rules import FORWARD_PRIORITY, Rule, RuleType
from serval_core.stack import ServalStack
from serval_core.wire.router_discovery import DISCOVERY_SERVICE

log = structlog.get_logger("serval_core.controller")

# Above broadcasting, which is the last resort.
DISCOVERED_PRIORITY = FORWARD_PRIORITY + 1
_OPERATORS = frozenset({"configured", "manual"})


class HostSide:
    """Made and stopped by `ServiceController`, whose `wake` gets `run` called soon."""

    def __init__(self, stack: ServalStack, plan: ControllerPlan, wake: Callable[[], None]) -> None:
        registration = plan.settings.registration
        self.counters: Counter[str] = Counter()
        self._stack = stack
        self._plan = plan
        self._wake = wake
        numbers = random.SystemRandom()
        self.role = HostRole(
            registration.refresh_s, registration.lifetime_s, _signer(plan), numbers, time.monotonic()
        )
        self.finder = RouterFinder(registration.refresh_s, plan.router_keys, numbers)
        self.offers = Offers(
            registration.priority, registration.weight, plan.aggregates, self._offer, self._withdraw
        )
        self._control_services = frozenset({plan.router_id, plan.client_id, DISCOVERY_SERVICE})
        self._routed: set[int] = set()
        self._broadcasts_before = stack.broadcast_resolution
        self._endpoint: DatagramEndpoint | None = None

    @property
    def routers(self) -> tuple[int, ...]:
        """The addresses of the routers that this host knows."""
        return self._plan.routers or self.finder.routers

    def start(self) -> None:
        """Begin. Raises OurMistake when the client service is taken."""
        self._endpoint = self._stack.datagrams.bind(
            ServicePrefix.of(self._plan.client_id), self._datagram_received
        )
        self._unsubscribe = self._stack.table.on_change(self._table_changed)
        for prefix in self._stack.bound_services():
            self._bound(prefix, bound=True)
        self.host_changed()

    def stop(self) -> None:
        """Tell the routers that nothing is served here any more, and leave the table as it was."""
        if self._endpoint is None:
            return
        self._unsubscribe()
        self.role.withdraw_all()
        outgoing = self.role.take_outgoing(time.monotonic(), time.time(), unlimited=True)
        self._send(outgoing, self._plan.router_id)
        for router in list(self._routed):
            self._unroute(router)
        self._stack.broadcast_resolution = self._broadcasts_before
        self._endpoint.close()
        self._endpoint = None

    def reconfigure(self, plan: ControllerPlan) -> None:
        """Other routers, other keys, another priority and weight. Routers that we leave are told, and so is everyone whom we have
        told under another key: a router lets nobody but the key that made a registration change it.
        """
        if plan.identities != self._plan.identities or bool(plan.routers) != bool(self._plan.routers):
            left = self.role.ways
        else:
            left = tuple(set(self.role.ways) & set(self._plan.routers) - set(plan.routers))
        farewell = self.role.leave(left, time.monotonic(), time.time())
        self._send(farewell, self._plan.router_id)
        self._plan = plan
        self.role.set_signer(_signer(plan))
        registration = plan.settings.registration
        self.offers.set_usual_terms(registration.priority, registration.weight)
        self.host_changed()
        self._update_default_rules()

    def host_changed(self) -> None:
        """Addresses, interfaces or routes have changed."""
        now = time.monotonic()
        self.role.set_ways(self._ways(), now)
        settings = self._plan.settings
        looking = settings.registration.discover and not self._plan.routers and not settings.router.enabled
        self.finder.set_networks(
            (
                Network(each.broadcast_address, each.address)
                for each in self._stack.paths.interfaces()
                if each.broadcast_address and looking
            ),
            now,
        )
        self._wake()

    def next_timeout(self) -> float | None:
        """When `run` has something to do, None if never."""
        due = (self.role.next_timeout(), self.finder.next_timeout())
        return min((each for each in due if each is not None), default=None)

    def run(self, now: float, wall: float) -> None:
        """Do what is due, send what is to be sent, and keep the default rules right."""
        self.role.handle_timeouts(now)
        self.finder.handle_timeouts(now)
        self._send(self.finder.take_outgoing(), DISCOVERY_SERVICE)
        self._send(self.role.take_outgoing(now, wall), self._plan.router_id)
        self._update_default_rules()

    def snapshot(self) -> list[dict[str, object]]:
        """One dict per router, for `serval routers`."""
        how = "configured" if self._plan.routers else "discovered"
        return [
            {"address": format_address(each), "how": how, "default_rule": each in self._routed}
            for each in self.routers
        ]

    # -- within ----------------------------------------------------------------------------------------------

    def _ways(self) -> Iterable[Way]:
        paths = self._stack.paths
        if self._plan.routers:
            for router in self._plan.routers:
                path = paths.path_to(router)
                if path is not None:
                    yield Way(router, router, path.source_address)
        elif not self._plan.settings.router.enabled:
            # Routers do not tell each other by broadcast what they were told by broadcast.
            for each in paths.interfaces():
                if each.broadcast_address:
                    yield Way(-each.index, each.broadcast_address, each.address)

    def _offer(self, prefix: ServicePrefix, priority: int, weight: int) -> None:
        self.role.offer(prefix, priority, weight, time.monotonic())
        self._wake()

    def _withdraw(self, prefix: ServicePrefix) -> None:
        self.role.withdraw(prefix)
        self._wake()

    def _table_changed(self, kind: str, rule: Rule) -> None:
        if rule.type is RuleType.DEMUX:
            self._bound(rule.prefix, bound=kind == "rule_added")

    def _bound(self, prefix: ServicePrefix, *, bound: bool) -> None:
        if prefix.service_id in self._control_services:
            return
        if bound:
            self.offers.bound(prefix)
        else:
            self.offers.unbound(prefix)

    def _send(self, outgoing: list[Outgoing], service: ServiceID) -> None:
        assert self._endpoint is not None
        for each in outgoing:
            code = self._endpoint.send(each.payload, service, each.destination)
            self.counters["send_failures" if code else "messages_sent"] += 1

    def _datagram_received(self, datagram: Datagram) -> None:
        if datagram.source_service != DISCOVERY_SERVICE:
            self.counters["unexpected_datagrams"] += 1
            return
        source = datagram.source_address
        known = source in self.finder.routers
        try:
            self.finder.announcement_received(datagram.payload, source, time.monotonic())
        except TheirMistake as mistake:
            log.debug("an announcement is not believed", host=format_address(source), why=mistake.reason)
            return
        if not known:
            log.info("found a service router", address=format_address(source))
        self._wake()

    def _update_default_rules(self) -> None:
        wanted = set(self.routers)
        if not self._plan.routers and self._operator_has_default():
            wanted = set()
        for router in self._routed - wanted:
            log.info("a service router is not used any more", address=format_address(router))
            self._unroute(router)
        priority = FORWARD_PRIORITY if self._plan.routers else DISCOVERED_PRIORITY
        for router in wanted - self._routed:
            rule = Rule.forward(DEFAULT_PREFIX, router, priority=priority, origin="default")
            try:
                self._stack.table.add(rule)
            except OurMistake:
                self.counters["default_rules_refused"] += 1  # the operator says more about this router
                continue
            self._routed.add(router)
        self._stack.broadcast_resolution = self._broadcasts_before and not self._plan.routers

    def _operator_has_default(self) -> bool:
        return any(rule.origin in _OPERATORS for rule in self._default_rules())

    def _default_rules(self) -> list[Rule]:
        entry = self._stack.table.entry(DEFAULT_PREFIX)
        return [] if entry is None else [target.rule(DEFAULT_PREFIX) for target in entry.targets()]

    def _unroute(self, router: int) -> None:
        self._routed.discard(router)
        for rule in self._default_rules():
            if rule.address == router and rule.origin == "default" and not rule.broadcast:
                self._stack.table.remove(DEFAULT_PREFIX, RuleType.FORWARD, router)


def _signer(plan: ControllerPlan) -> Signer | None:
    return Signer(plan.identities) if plan.identities else None
