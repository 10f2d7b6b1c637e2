"""What can be chosen of every program that runs a stack? The sections `[stack]`, `[log]`, `[[access]]` of its configuration.

A key has the same name, default and range in the file and everywhere else; times are in seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from msgspec import Meta, Struct
from msgspec.structs import replace

from serval_core.access_policy import AccessPolicy, AccessRule, Principals
from serval_core.config_file import ConfigFile, Misconfigured, Names, service_prefix
from serval_core.errors import OurMistake

PositiveCount = Annotated[int, Meta(ge=1, le=10_000_000)]
Backlog = Annotated[int, Meta(ge=1, le=65_535)]
Seconds = Annotated[float, Meta(gt=0, le=31_536_000)]
Name = Annotated[str, Meta(min_length=1)]
_BYTE = r"(25[0-5]|2[0-4]\d|1?\d?\d)"
VirtualAddress = Annotated[str, Meta(pattern=rf"^{_BYTE}(\.{_BYTE}){{3}}$", description="an IPv4 address")]
VirtualNetwork = Annotated[str, Meta(pattern=rf"^{_BYTE}\.{_BYTE}\.0\.0$", description="the first address of a /16")]


FramingName = Literal["auto", "sal", "udp", "native"]
Ports = Annotated[str, Meta(pattern=r"^\d{1,5}-\d{1,5}$", description="two port numbers with a dash between them")]


class StackSection(Struct, frozen=True, forbid_unknown_fields=True):
    """The embedded stack. `interfaces` None: all that are up."""

    interfaces: Annotated[tuple[Name, ...], Meta(min_length=1)] | None = None
    congestion_control: Name = "cubic"
    virtual_network: VirtualNetwork = "100.126.0.0"  # a /16 that is used nowhere else
    virtual_address: VirtualAddress = "100.127.255.1"  # outside it
    peer_timeout_s: Annotated[int, Meta(ge=0, le=86_400)] = 120  # a silent host; 0: never
    forward_in_kernel: bool = True  # a service router's fast path; false: every packet passes the firewall's input
    framing: FramingName = "auto"
    service_framing: dict[str, FramingName] = {}  # by serviceID, prefix or name; the longest prefix decides
    native_ports: Ports = "61000-65535"  # TCP ports that framing `native` may take
    authenticate: Literal["off", "offer", "require"] = "off"  # control packets between our own stacks carry proofs
    broadcast_resolution: bool = True
    syn_initial_timeout_s: Seconds = 0.2
    syn_timeout_max_s: Seconds = 3.0
    target_down_s: Seconds = 2.0  # how long an instance that does not answer is passed over; doubles
    target_down_max_s: Seconds = 30.0
    refuse_unknown_services: bool = False  # answer SYNs for services that nobody here listens on
    delay_limit: Backlog = 1024  # connects and packets that DELAY rules hold
    delay_timeout_s: Seconds = 5.0
    backlog: Backlog = 1024


class LogSection(Struct, frozen=True, forbid_unknown_fields=True):
    """What goes to standard error."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["console", "json"] = "console"


class AccessEntry(Struct, forbid_unknown_fields=True):
    """Who may use services under `service`: users, `%groups`, or `*`. A key that is absent leaves the default."""

    service: str | int
    bind: list[str | int] | None = None
    connect: list[str | int] | None = None


def port_range(text: str) -> tuple[int, int]:
    """The first and the last port of a key like `native_ports`. OurMistake if there are no such ports."""
    first, last = (int(port) for port in text.split("-"))
    if not 1024 <= first <= last <= 65535:
        raise OurMistake(f"{text} is no range of ports between 1024 and 65535")
    return first, last


def read_stack(file: ConfigFile, stack: StackSection, names: Names) -> StackSection:
    """The section with names replaced by what they stand for. Raises Misconfigured."""
    try:
        port_range(stack.native_ports)
    except OurMistake as mistake:
        raise Misconfigured(file.place("stack", "native_ports"), str(mistake)) from None
    framings = {
        str(service_prefix(text, names, file.place("stack", "service_framing", text))): framing
        for text, framing in stack.service_framing.items()
    }
    return replace(stack, service_framing=framings)


def read_access(file: ConfigFile, entries: Sequence[AccessEntry], names: Names) -> tuple[AccessRule, ...]:
    """The access rules of a configuration file. Raises Misconfigured."""
    rules = []
    for index, entry in enumerate(entries):
        prefix = service_prefix(str(entry.service), names, file.place("access", index, "service"))
        principals = {}
        for action, who in (("bind", entry.bind), ("connect", entry.connect)):
            try:
                principals[action] = None if who is None else Principals.parse(who)
            except OurMistake as mistake:
                raise Misconfigured(file.place("access", index, action), str(mistake)) from None
        rules.append(AccessRule(prefix, principals["bind"], principals["connect"]))
    try:
        AccessPolicy(rules)
    except OurMistake as mistake:
        raise Misconfigured(file.place("access"), str(mistake)) from None
    return tuple(rules)
