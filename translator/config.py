"""What can an operator choose, and what holds when nothing is said? The frozen settings of one translator.

The command line and the configuration file both end up as one `Settings`. The section classes below are also
the sections of the file, so a key has the same name, default and range everywhere; times are in seconds.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from translator.port_map import ForwardMap, Misconfigured, ReverseMap, ServiceRule, refuse_contradictions

CONNECTION_LIMIT = 20_000
KEEPALIVE_MAX_S = 32_767  # what TCP_KEEPIDLE takes

PositiveCount = Annotated[int, Meta(ge=1, le=10_000_000)]
Backlog = Annotated[int, Meta(ge=1, le=65_535)]
Seconds = Annotated[float, Meta(gt=0, le=31_536_000)]
KeepaliveSeconds = Annotated[int, Meta(ge=0, le=KEEPALIVE_MAX_S)]
Name = Annotated[str, Meta(min_length=1)]
_BYTE = r"(25[0-5]|2[0-4]\d|1?\d?\d)"
VirtualAddress = Annotated[str, Meta(pattern=rf"^{_BYTE}(\.{_BYTE}){{3}}$", description="an IPv4 address")]
VirtualNetwork = Annotated[str, Meta(pattern=rf"^{_BYTE}\.{_BYTE}\.0\.0$", description="the first address of a /16")]


class StackSection(Struct, frozen=True, forbid_unknown_fields=True):
    """The embedded stack. `interfaces` None: all that are up."""

    interfaces: Annotated[tuple[Name, ...], Meta(min_length=1)] | None = None
    congestion_control: Name = "cubic"
    virtual_network: VirtualNetwork = "100.126.0.0"  # a /16 that is used nowhere else
    virtual_address: VirtualAddress = "100.127.255.1"  # outside it
    peer_timeout_s: Annotated[int, Meta(ge=0, le=86_400)] = 120  # a silent host; 0: never
    broadcast_resolution: bool = True
    syn_initial_timeout_s: Seconds = 0.2
    syn_timeout_max_s: Seconds = 3.0
    backlog: Backlog = 1024


class LegacySection(Struct, frozen=True, forbid_unknown_fields=True):
    """The sockets of unmodified programs. `no_answer`: what a client sees if no instance can be had."""

    no_answer: Literal["reset", "close"] = "reset"
    tcp_nodelay: bool = True
    keepalive_s: KeepaliveSeconds = 600
    backlog: Backlog = 4096


class LimitsSection(Struct, frozen=True, forbid_unknown_fields=True):
    """`connections` None: CONNECTION_LIMIT, or fewer if the process may not have enough descriptors."""

    connections: PositiveCount | None = None


class TimeoutsSection(Struct, frozen=True, forbid_unknown_fields=True):
    """How long what may take."""

    connect_s: Seconds = 10.0  # opening a Serval flow
    target_connect_s: Seconds = 5.0  # reaching a legacy target, all targets of a map together
    idle_s: Seconds = 3600.0  # no byte in either direction
    client_fin_s: Seconds = 300.0  # half-closed, and silence from the side that opened
    server_fin_s: Seconds = 300.0  # half-closed, and silence from the other side
    drain_s: Seconds = 30.0  # from SIGTERM until what is still open is reset


class LogSection(Struct, frozen=True, forbid_unknown_fields=True):
    """What goes to standard error."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["console", "json"] = "console"


class Settings(Struct, frozen=True, kw_only=True):
    """All an operator can say to one translator."""

    maps: tuple[ForwardMap, ...] = ()
    reverses: tuple[ReverseMap, ...] = ()
    rules: tuple[ServiceRule, ...] = ()
    stack: StackSection = StackSection()
    legacy: LegacySection = LegacySection()
    limits: LimitsSection = LimitsSection()
    timeouts: TimeoutsSection = TimeoutsSection()
    log: LogSection = LogSection()

    def checked(self) -> Settings:
        """These settings. Raises Misconfigured when they contradict each other or leave nothing to do."""
        refuse_contradictions(self.maps, self.reverses, self.rules)
        if not self.maps and not self.reverses:
            raise Misconfigured(
                "nothing to do",
                "give at least one --map PORT=ID or --reverse ID=HOST:PORT, or a --config FILE that has one"
                " (serval-translator --help shows all options)",
            )
        return self

    def with_values(self, values: dict[tuple[str, str], Any]) -> Settings:
        """A copy in which the given (section, key) pairs have new values."""
        sections: dict[str, dict[str, Any]] = {}
        for (section, key), value in values.items():
            sections.setdefault(section, {})[key] = value
        replaced = {
            section: msgspec.structs.replace(getattr(self, section), **keys)
            for section, keys in sections.items()
        }
        return msgspec.structs.replace(self, **replaced)
