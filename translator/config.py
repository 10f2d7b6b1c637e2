"""What can an operator choose, and what holds when nothing is said? The frozen settings of one translator.

The command line and the configuration file both end up as one `Settings`. The section classes below are also
the sections of the file, so a key has the same name, default and range everywhere; times are in seconds.
"""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

from msgspec import Meta, Struct

from serval_core.config_file import Misconfigured
from serval_core.config_sections import Backlog, PositiveCount, Seconds
from serval_core.program_settings import ProgramSettings
from translator.health_settings import HealthSection
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


class Terms(NamedTuple):
    """What a service is registered with."""

    priority: int
    weight: int


class Settings(ProgramSettings, frozen=True, kw_only=True):
    """All an operator can say to one translator."""

    maps: tuple[ForwardMap, ...] = ()
    reverses: tuple[ReverseMap, ...] = ()
    legacy: LegacySection = LegacySection()
    limits: LimitsSection = LimitsSection()
    timeouts: TimeoutsSection = TimeoutsSection()
    health: HealthSection = HealthSection()

    def checked(self) -> Settings:
        """These settings. Raises Misconfigured when they contradict each other or leave nothing to do."""
        refuse_contradictions(self.maps, self.reverses, self.rules)
        self.controller_plan()
        if not self.maps and not self.reverses and not self.router.enabled:
            raise Misconfigured(
                "nothing to do",
                "give at least one --map PORT=ID or --reverse ID=HOST:PORT, or a --config FILE that has one"
                " (serval-translator --help shows all options)",
            )
        return self

    def terms_of(self, reverse: ReverseMap) -> Terms:
        """How a reverse map is registered."""
        usual = self.registration
        return Terms(reverse.priority or usual.priority, reverse.weight or usual.weight)

    def health_of(self, reverse: ReverseMap) -> HealthSection:
        """How its targets are watched."""
        return reverse.health.over(self.health)
