"""What do the operator's maps mean, and do they contradict each other?

Reads the text forms of --map and --reverse; knows nothing about sockets or files. Every refusal is
a `Misconfigured`: one sentence that begins with where the text stood ("--map 80=x", "site.toml:12:
map.listen") and ends, where there is one, with the nearest text that would be right.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence
from typing import NamedTuple

from serval_core.config_file import Misconfigured, Names, service_prefix
from serval_core.configured_rules import ServiceRule, refuse_repeated_rules, split_assignment
from serval_core.names import DEFAULT_SERVICE, ServiceID, ServicePrefix
from translator.health_settings import HealthOfMap

PORT_MAX = 65535
EVERY_ADDRESS = ""


class ForwardMap(NamedTuple):
    """Legacy clients that dial `address` at a port of first_port..last_port reach the service `service_id`.

    `address` is a canonical IPv4 or IPv6 literal (IPv6 may carry a %scope), or EVERY_ADDRESS.
    """

    address: str
    first_port: int
    last_port: int
    service_id: ServiceID
    service_text: str
    origin: str

    @property
    def listen_text(self) -> str:
        """The listening place as an operator writes it."""
        ports = (
            str(self.first_port)
            if self.first_port == self.last_port
            else f"{self.first_port}-{self.last_port}"
        )
        return f"{host_text(self.address)}:{ports}"


class LegacyTarget(NamedTuple):
    """Where an unmodified service listens. `host` is a literal, or a name that is looked up at the start."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{host_text(self.host)}:{self.port}"


class ReverseMap(NamedTuple):
    """Serval flows to any serviceID under `prefix` go to one of `targets` (never empty).

    `weight` and `priority` are those it is registered with; None: those of `[registration]`.
    """

    prefix: ServicePrefix
    targets: tuple[LegacyTarget, ...]
    service_text: str
    origin: str
    weight: int | None = None
    priority: int | None = None
    health: HealthOfMap = HealthOfMap()


def host_text(host: str) -> str:
    """`host` as it stands before a colon: IPv6 in brackets, EVERY_ADDRESS as a star."""
    if host == EVERY_ADDRESS:
        return "*"
    return f"[{host}]" if ":" in host else host


def parse_map(text: str, names: Names, origin: str) -> ForwardMap:
    """`PORT=ID`, `ADDR:PORT=ID`, `[v6]:PORT=ID`; PORT may be FIRST-LAST. Raises Misconfigured."""
    listen, service = split_assignment(text, origin, "PORT=ID, ADDR:PORT=ID, [v6]:PORT=ID or FIRST-LAST=ID")
    return forward_map(listen, service, names, origin, origin)


def forward_map(
    listen: str, service: str, names: Names, listen_origin: str, service_origin: str
) -> ForwardMap:
    """A map from its two halves, each with its own place for the message."""
    address, first_port, last_port = parse_listen(listen, listen_origin)
    prefix = service_prefix(service, names, service_origin)
    if prefix.service_id == DEFAULT_SERVICE:
        raise Misconfigured(
            service_origin,
            "a client cannot be sent to the default service (all zeros), because no program"
            " can serve it; give the serviceID of a service",
        )
    return ForwardMap(address, first_port, last_port, prefix.service_id, service, listen_origin)


def parse_reverse(text: str, names: Names, origin: str) -> ReverseMap:
    """`ID[:BITS]=HOST:PORT[,HOST:PORT…]`. Raises Misconfigured."""
    service, targets = split_assignment(text, origin, "ID[:BITS]=HOST:PORT[,HOST:PORT...]")
    return reverse_map(service, targets.split(","), names, origin, origin)


def reverse_map(
    service: str, targets: Sequence[str], names: Names, service_origin: str, target_origin: str
) -> ReverseMap:
    """A reverse map from its parts, each with its own place for the message."""
    prefix = service_prefix(service, names, service_origin)
    if prefix.bits == 0:
        raise Misconfigured(
            service_origin,
            "the default service (all zeros) cannot be served; give a serviceID, or a prefix"
            " of at least one bit such as 0x00:1",
        )
    if not targets:
        raise Misconfigured(target_origin, "give at least one target, for example 127.0.0.1:80")
    parsed = tuple(parse_target(target.strip(), target_origin) for target in targets)
    repeated = next((target for index, target in enumerate(parsed) if target in parsed[:index]), None)
    if repeated is not None:
        raise Misconfigured(target_origin, f"the target {repeated} is given twice; leave one out")
    return ReverseMap(prefix, parsed, service, service_origin)


def parse_listen(text: str, origin: str) -> tuple[str, int, int]:
    """(address, first port, last port) of `PORT`, `FIRST-LAST`, `ADDR:PORT`, `[v6]:PORT` or `*:PORT`."""
    host, colon, ports = text.rpartition(":")
    first, dash, last = (ports if colon else text).partition("-")
    first_port = parse_port(first, origin)
    last_port = parse_port(last, origin) if dash else first_port
    if last_port < first_port:
        raise Misconfigured(
            origin, f"the port range {first_port}-{last_port} runs backwards; write {last_port}-{first_port}"
        )
    if not colon or host == "*":
        return EVERY_ADDRESS, first_port, last_port
    return parse_listen_address(host, origin), first_port, last_port


def parse_listen_address(host: str, origin: str) -> str:
    """A canonical literal; host names are refused because one name may stand for several addresses."""
    bracketed = host.startswith("[") and host.endswith("]")
    try:
        address = ipaddress.ip_address(host[1:-1] if bracketed else host)
    except ValueError:
        hint = (
            "; write 127.0.0.1 or [::1]"
            if host == "localhost"
            else "; write a number such as 10.0.0.1 or [2001:db8::1]"
        )
        raise Misconfigured(origin, f'"{host}" is no IP address to listen on{hint}') from None
    if isinstance(address, ipaddress.IPv6Address):
        if not bracketed:
            raise Misconfigured(origin, f"an IPv6 address needs brackets; write [{address}]")
        return str(address.ipv4_mapped or address)
    if bracketed:
        raise Misconfigured(origin, f"an IPv4 address takes no brackets; write {address}")
    return str(address)


def parse_port(text: str, origin: str) -> int:
    """A TCP port, 1..65535."""
    if not (text.isascii() and text.isdigit()):
        raise Misconfigured(origin, f'"{text}" is no port number{_well_known_port(text)}')
    port = int(text)
    if not 1 <= port <= PORT_MAX:
        raise Misconfigured(
            origin, f"port {text} is out of range 1 to {PORT_MAX} (nearest: {1 if port < 1 else PORT_MAX})"
        )
    return port


def _well_known_port(name: str) -> str:
    try:
        return f"; write {socket.getservbyname(name, 'tcp')}"
    except (OSError, UnicodeError, ValueError):
        return f" (1 to {PORT_MAX})"


def parse_target(text: str, origin: str) -> LegacyTarget:
    """`HOST:PORT`; HOST is a name, an IPv4 literal or an IPv6 literal in brackets."""
    host, colon, port_text = text.rpartition(":")
    if not colon or not host:
        guess = f"127.0.0.1:{text}" if text.isdigit() else f"{text or '127.0.0.1'}:80"
        raise Misconfigured(
            origin, f'the target "{text}" is not of the form HOST:PORT; write for example {guess}'
        )
    port = parse_port(port_text, origin)
    if host.startswith("[") and host.endswith("]"):
        try:
            return LegacyTarget(str(ipaddress.IPv6Address(host[1:-1])), port)
        except ValueError:
            raise Misconfigured(origin, f'"{host[1:-1]}" is no IPv6 address') from None
    if ":" in host:
        raise Misconfigured(origin, f"an IPv6 target needs brackets; write [{host}]:{port}")
    if host.replace(".", "").isdigit():
        try:
            return LegacyTarget(str(ipaddress.IPv4Address(host)), port)
        except ValueError:
            raise Misconfigured(
                origin, f'"{host}" is no IPv4 address; write four numbers of 0 to 255 such as 127.0.0.1'
            ) from None
    if any(character.isspace() or character in "[]@/" for character in host):
        raise Misconfigured(origin, f'"{host}" is no host name')
    return LegacyTarget(host, port)


def refuse_contradictions(
    maps: Sequence[ForwardMap], reverses: Sequence[ReverseMap], rules: Sequence[ServiceRule]
) -> None:
    """Raise Misconfigured if two maps want one port, two reverse maps one prefix, or two rules one target."""
    _refuse_port_overlaps(maps)
    served: dict[ServicePrefix, ReverseMap] = {}
    for reverse in reverses:
        if (other := served.setdefault(reverse.prefix, reverse)) is not reverse:
            raise Misconfigured(
                reverse.origin,
                f"the service {reverse.service_text} is already served by {other.origin};"
                " put all its targets into one list, separated by commas",
            )
    refuse_repeated_rules(rules)


def _refuse_port_overlaps(maps: Sequence[ForwardMap]) -> None:
    order = {id(item): position for position, item in enumerate(maps)}
    still_open: list[ForwardMap] = []
    for item in sorted(maps, key=lambda item: item.first_port):
        still_open = [other for other in still_open if other.last_port >= item.first_port]
        for other in still_open:
            if addresses_overlap(item.address, other.address):
                later, earlier = (item, other) if order[id(item)] > order[id(other)] else (other, item)
                first, last = item.first_port, min(item.last_port, other.last_port)
                what = f"port {first} is" if first == last else f"ports {first}-{last} are"
                raise Misconfigured(
                    later.origin,
                    f"{what} already mapped by {earlier.origin}; each port of an address can"
                    " stand for one service only",
                )
        still_open.append(item)


def addresses_overlap(one: str, other: str) -> bool:
    """Would the kernel refuse to let both listen on the same port?"""
    if one == other or EVERY_ADDRESS in (one, other):
        return True
    if (":" in one) != (":" in other):
        return False
    return ("::" if ":" in one else "0.0.0.0") in (one, other)
