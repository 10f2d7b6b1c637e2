"""What can an operator choose, and what holds when nothing is said? The frozen settings of one translator.

The command line and the configuration file both end up as one `Settings`. The section classes below are also
the sections of the file, so a key has the same name, default and range everywhere; times are in seconds.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from serval_core.access_policy import AccessRule
from serval_core.config_file import Misconfigured
from serval_core.config_sections import Backlog, LogSection, PositiveCount, Seconds, StackSection
from serval_core.configured_rules import ServiceRule
from serval_core.mobility_settings import MobilitySettings
from translator.port_map import ForwardMap, ReverseMap, refuse_contradictions

CONNECTION_LIMIT = 20_000
KEEPALIVE_MAX_S = 32_767  # what TCP_KEEPIDLE takes

KeepaliveSeconds = Annotated[int, Meta(ge=0, le=KEEPALIVE_MAX_S)]


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


class Settings(Struct, frozen=True, kw_only=True):
    """All an operator can say to one translator."""

    maps: tuple[ForwardMap, ...] = ()
    reverses: tuple[ReverseMap, ...] = ()
    rules: tuple[ServiceRule, ...] = ()
    stack: StackSection = StackSection()
    mobility: MobilitySettings = MobilitySettings()
    legacy: LegacySection = LegacySection()
    limits: LimitsSection = LimitsSection()
    timeouts: TimeoutsSection = TimeoutsSection()
    log: LogSection = LogSection()
    access: tuple[AccessRule, ...] = ()

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
