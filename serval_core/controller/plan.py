"""What do the settings of a service controller mean? Texts become serviceIDs, addresses, networks and keys.

Whatever cannot be obeyed is a Misconfigured that names its key; with `place` from a configuration file also its
line. Key files are read here, so that a wrong one is noticed before anything starts.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import dns.name

from serval_core.addresses import is_unicast
from serval_core.config_changes import fixed_differences, refuse_differences
from serval_core.config_file import Misconfigured, Names, service_prefix
from serval_core.controller.dns_source import parse_nameserver, parse_zone
from serval_core.controller.policy import PrefixPolicy, Requirement
from serval_core.controller.router import RouterLimits
from serval_core.controller.settings import ControllerSettings, PolicyEntry, Service
from serval_core.errors import OurMistake
from serval_core.identity import Identity, load_identity, parse_public_key
from serval_core.names import SERVICE_ID_BITS, ServiceID, ServicePrefix, parse_address
from serval_core.wire.router_discovery import DISCOVERY_SERVICE

# What `ServiceController.reconfigure` obeys.
CHANGEABLE = frozenset(
    {
        "registration.routers",
        "registration.keys",
        "registration.priority",
        "registration.weight",
        "router.default_policy",
        "router.policy",
        "router.shortest_prefix_bits",
        "router.expiry_s",
        "router.lifetime_max_s",
        "router.priority_max",
        "router.weight_max",
        "router.registrations_max",
        "router.registrations_per_host",
        "router.registrations_per_prefix",
        "router.messages_per_host_s",
        "router.new_registrations_s",
    }
)

Place = Callable[..., str]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ControllerPlan:
    """The settings, understood. Sections keep what is a number; here is the rest."""

    settings: ControllerSettings
    router_id: ServiceID
    client_id: ServiceID
    routers: tuple[int, ...]
    identities: tuple[Identity, ...]
    router_keys: tuple[bytes, ...]
    router_identity: Identity | None
    policy: tuple[PrefixPolicy, ...]
    default_policy: Requirement
    limits: RouterLimits
    aggregates: tuple[ServicePrefix, ...]
    delayed_prefixes: tuple[ServicePrefix, ...]
    zone: dns.name.Name | None
    nameservers: tuple[tuple[str, int], ...]


def dotted(*path: str | int) -> str:
    """`section.key` of a path, where no file is at hand."""
    return ".".join(str(step) for step in path if isinstance(step, str))


def plan(settings: ControllerSettings, names: Names | None = None, place: Place = dotted) -> ControllerPlan:
    """Understand the settings. `names`: the services that the configuration names. Raises Misconfigured."""
    reader = _Reader(names or {}, place)
    registration, router, resolver = settings.registration, settings.router, settings.resolver
    understood = ControllerPlan(
        settings=settings,
        router_id=reader.service_id(registration.router_id, "registration", "router_id"),
        client_id=reader.service_id(registration.client_id, "registration", "client_id"),
        routers=tuple(reader.each(registration.routers, _router_address, "registration", "routers")),
        identities=tuple(reader.each(registration.keys, _identity, "registration", "keys")),
        router_keys=tuple(
            reader.each(registration.router_keys, parse_public_key, "registration", "router_keys")
        ),
        router_identity=(
            reader.obeyed(_identity, router.key, "router", "key") if router.key is not None else None
        ),
        policy=tuple(reader.policy(index, entry) for index, entry in enumerate(router.policy)),
        default_policy=Requirement(router.default_policy),
        limits=RouterLimits(
            expiry_s=router.expiry_s,
            lifetime_max_s=max(router.lifetime_max_s, router.expiry_s),
            priority_max=router.priority_max,
            weight_max=router.weight_max,
            registrations_max=router.registrations_max,
            registrations_per_host=router.registrations_per_host,
            registrations_per_prefix=router.registrations_per_prefix,
            messages_per_host_s=router.messages_per_host_s,
            new_registrations_s=router.new_registrations_s,
            clock_tolerance_s=router.clock_tolerance_s,
        ),
        aggregates=reader.prefixes(router.aggregates, "router", "aggregates"),
        delayed_prefixes=reader.prefixes(resolver.prefixes, "resolver", "prefixes"),
        zone=(
            reader.obeyed(parse_zone, resolver.zone, "resolver", "zone")
            if resolver.zone is not None
            else None
        ),
        nameservers=tuple(reader.each(resolver.nameservers, parse_nameserver, "resolver", "nameservers")),
    )
    _refuse_contradictions(understood, place)
    return understood


def refuse_fixed_plan(running: ControllerPlan, wanted: ControllerPlan) -> None:
    """Raise Misconfigured if something differs that a controller is told at its start only."""
    differ = fixed_differences(running.settings, wanted.settings, CHANGEABLE)
    for name in ("router_id", "client_id", "router_keys", "router_identity", "aggregates", "delayed_prefixes"):
        if not differ and getattr(running, name) != getattr(wanted, name):
            differ.append(f"what a service name or key file stands for ({name})")
    refuse_differences(differ)


def _refuse_contradictions(understood: ControllerPlan, place: Place) -> None:
    settings = understood.settings
    registration = settings.registration
    services = {understood.router_id, understood.client_id, DISCOVERY_SERVICE}
    if len(services) < 3:
        raise Misconfigured(
            place("registration", "client_id"),
            f"client_id, router_id and the discovery service ({DISCOVERY_SERVICE.text}) must differ",
        )
    if registration.lifetime_s < registration.refresh_s:
        raise Misconfigured(
            place("registration", "lifetime_s"),
            f"{registration.lifetime_s:g} is shorter than refresh_s: a registration would lapse between two "
            f"refreshes (nearest: {2.5 * registration.refresh_s:g})",
        )
    if settings.router.aggregates and not understood.routers:
        raise Misconfigured(
            place("router", "aggregates"),
            "there is no router to register them at: give its address (registration.routers)",
        )
    if len(set(understood.aggregates)) < len(understood.aggregates):
        raise Misconfigured(place("router", "aggregates"), "a prefix occurs twice")
    seen: set[ServicePrefix] = set()
    for index, entry in enumerate(understood.policy):
        if entry.prefix in seen:
            raise Misconfigured(
                place("router", "policy", index, "prefix"), f"{entry.prefix} has two policies: keep one"
            )
        seen.add(entry.prefix)


class _Reader:
    """Reads texts, and says where one is wrong."""

    def __init__(self, names: Mapping[str, ServicePrefix], place: Place) -> None:
        self._names = names
        self._place = place

    def obeyed(self, parse: Callable[[str], T], text: str, *path: str | int) -> T:
        """What a text means. Raises Misconfigured."""
        try:
            return parse(text)
        except OurMistake as mistake:
            raise Misconfigured(self._place(*path), str(mistake)) from None

    def each(self, texts: tuple[str, ...], parse: Callable[[str], T], *path: str | int) -> list[T]:
        """What each of several texts means. Raises Misconfigured."""
        return [self.obeyed(parse, text, *path) for text in texts]

    def prefix(self, service: Service, *path: str | int) -> ServicePrefix:
        """A serviceID or prefix, not the default one."""
        prefix = service_prefix(str(service), self._names, self._place(*path))
        if not prefix.bits:
            raise Misconfigured(self._place(*path), '"default" is not possible here: name a prefix')
        return prefix

    def prefixes(self, services: tuple[Service, ...], *path: str | int) -> tuple[ServicePrefix, ...]:
        """Several of them."""
        return tuple(self.prefix(service, *path) for service in services)

    def service_id(self, service: Service, *path: str | int) -> ServiceID:
        """A whole serviceID."""
        prefix = self.prefix(service, *path)
        if prefix.bits != SERVICE_ID_BITS:
            raise Misconfigured(
                self._place(*path), f'"{service}" is a prefix, and a whole serviceID is needed here'
            )
        return prefix.service_id

    def policy(self, index: int, entry: PolicyEntry) -> PrefixPolicy:
        """One `[[router.policy]]`."""
        path = ("router", "policy", index)
        return PrefixPolicy(
            self.prefix(entry.prefix, *path, "prefix"),
            Requirement(entry.require),
            frozenset(self.each(entry.keys, parse_public_key, *path, "keys")),
            tuple(self.each(entry.networks, _network, *path, "networks")),
        )


def _router_address(text: str) -> int:
    address = parse_address(text)
    if not is_unicast(address) or address >> 24 == 127:
        raise OurMistake(f"{text} is not the address of another host")
    return address


def _network(text: str) -> ipaddress.IPv4Network:
    try:
        return ipaddress.IPv4Network(text)
    except ValueError as error:
        raise OurMistake(f'"{text}" is no IPv4 network such as "10.2.0.0/16": {error}') from None


def _identity(text: str) -> Identity:
    return load_identity(Path(text))
