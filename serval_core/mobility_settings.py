"""What can be chosen about interfaces? The section `[mobility]`: which ones flows prefer, and when they change.

    [mobility]
    prefer = ["eth0", "wlan*"]       # best first; all others come after them

    [[mobility.interface]]
    name = "wwan*"                   # shell patterns
    metered = true                   # used only while there is nothing else
    cost = 10

    [[mobility.service]]             # of all that cover a service, the longest prefix counts
    service = "76568"
    choose = "rtt"

Times are in seconds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Annotated, Literal, NamedTuple

from msgspec import Meta, Struct

from serval_core.config_file import ConfigFile, Names, service_prefix
from serval_core.config_sections import Name
from serval_core.names import ServiceID, ServicePrefix

Wait = Annotated[float, Meta(ge=0, le=86_400)]
Choice = Literal["route", "cost", "rtt", "loss"]
Rank = tuple[bool, float]


class InterfaceEntry(Struct, frozen=True, forbid_unknown_fields=True):
    """What interfaces whose name matches `name` are like. The first entry that matches counts."""

    name: Name
    metered: bool = False
    cost: Annotated[int, Meta(ge=0, le=1_000_000)] = 0


class ServiceEntry(Struct, frozen=True, forbid_unknown_fields=True):
    """What is different for one service or prefix. What is absent is as for all others."""

    service: str | int
    choose: Choice | None = None
    prefer: tuple[Name, ...] | None = None


class MobilitySection(Struct, frozen=True, forbid_unknown_fields=True):
    """The section as it stands in the file, and its defaults.

    `automatic`: flows leave a path that is lost, or on which nothing comes back, and go where they are better off.
    An interface has to be good for `return_after_s` before flows go to it without need; each time that it fails
    soon afterwards doubles that, up to `return_after_max_s`. `silence_s`: sending without an answer for so long
    makes a flow try another path (0: never). `choose`: what decides where new flows begin.
    """

    automatic: bool = True
    prefer: tuple[Name, ...] = ()
    return_after_s: Wait = 5.0
    return_after_max_s: Wait = 300.0
    try_path_s: Annotated[float, Meta(ge=0.1, le=3600)] = 3.0  # before a flow without a path tries the next one
    silence_s: Wait = 1.5
    choose: Choice = "route"
    interface: tuple[InterfaceEntry, ...] = ()
    service: tuple[ServiceEntry, ...] = ()


class ServiceMobility(NamedTuple):
    """A `[[mobility.service]]` whose service is known."""

    prefix: ServicePrefix
    choose: Choice | None
    prefer: tuple[str, ...] | None


class MobilitySettings(Struct, frozen=True):
    """What holds: the section, and what its services are."""

    section: MobilitySection = MobilitySection()
    services: tuple[ServiceMobility, ...] = ()

    def is_metered(self, interface: str) -> bool:
        """Whether an interface is to be used only while there is nothing else."""
        entry = self._entry(interface)
        return entry is not None and entry.metered

    def cost(self, interface: str) -> int:
        """What an interface costs; 0 unless something is said about it."""
        entry = self._entry(interface)
        return 0 if entry is None else entry.cost

    def choice(self, service_id: ServiceID) -> Choice:
        """What decides where new flows of a service begin."""
        own = self._of_service(service_id)
        return self.section.choose if own is None or own.choose is None else own.choose

    def preference(self, service_id: ServiceID, interface: str) -> float:
        """The place of an interface in the list of those that flows of this service prefer, from 0."""
        own = self._of_service(service_id)
        prefer = self.section.prefer if own is None or own.prefer is None else own.prefer
        return next((place for place, name in enumerate(prefer) if fnmatchcase(interface, name)), math.inf)

    def rank(self, service_id: ServiceID, interface: str) -> Rank:
        """How good an interface is for flows of a service, by what the operator says: the smaller, the better."""
        return self.is_metered(interface), self.preference(service_id, interface)

    @property
    def ranks(self) -> bool:
        """Whether anything is said that makes one interface better than another."""
        section = self.section
        return bool(
            section.prefer or section.interface or section.choose != "route" or self.services
        )

    @property
    def measures(self) -> bool:
        """Whether round-trip times or losses decide about anything."""
        choices = {self.section.choose, *(each.choose for each in self.services)}
        return not choices.isdisjoint({"rtt", "loss"})

    def _entry(self, interface: str) -> InterfaceEntry | None:
        return next((each for each in self.section.interface if fnmatchcase(interface, each.name)), None)

    def _of_service(self, service_id: ServiceID) -> ServiceMobility | None:
        covering = [each for each in self.services if each.prefix.covers(service_id)]
        return max(covering, key=lambda each: each.prefix.bits, default=None)


def read_mobility(file: ConfigFile, section: MobilitySection, names: Names) -> MobilitySettings:
    """What a configuration file says. Raises Misconfigured."""
    return MobilitySettings(section, tuple(_services(file, section.service, names)))


def _services(file: ConfigFile, entries: Sequence[ServiceEntry], names: Names) -> list[ServiceMobility]:
    return [
        ServiceMobility(
            service_prefix(str(each.service), names, file.place("mobility", "service", index, "service")),
            each.choose,
            each.prefer,
        )
        for index, each in enumerate(entries)
    ]
