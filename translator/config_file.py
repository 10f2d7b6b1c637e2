"""What does a translator's configuration file say?

Its shape here, its texts by `port_map`, lines and refusals by `serval_core.config_file`. The result is a
`Settings`, not yet checked against contradictions.
"""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Annotated

from msgspec import Meta, Struct

from serval_core.config_file import ConfigFile, Names
from serval_core.config_sections import AccessEntry, LogSection, StackSection, read_access, read_stack
from serval_core.configured_rules import RuleEntry, read_rules
from serval_core.mobility_settings import MobilitySection, read_mobility
from translator.config import LegacySection, LimitsSection, Settings, TimeoutsSection
from translator.port_map import ForwardMap, ReverseMap, forward_map, reverse_map


class _Map(Struct, forbid_unknown_fields=True):
    listen: str | int
    service: str | int


class _Reverse(Struct, forbid_unknown_fields=True):
    service: str | int
    targets: Annotated[list[str], Meta(min_length=1)]


class _File(Struct, forbid_unknown_fields=True):
    services: dict[str, str | int] = {}
    map: list[_Map] = []
    reverse: list[_Reverse] = []
    rule: list[RuleEntry] = []
    stack: StackSection = StackSection()
    mobility: MobilitySection = MobilitySection()
    legacy: LegacySection = LegacySection()
    limits: LimitsSection = LimitsSection()
    timeouts: TimeoutsSection = TimeoutsSection()
    log: LogSection = LogSection()
    access: list[AccessEntry] = []


class LoadedFile(typing.NamedTuple):
    """What a file says, and the service names it defines (the command line may use them too)."""

    settings: Settings
    names: Names


def load(path: Path) -> LoadedFile:
    """Read a configuration file. Raises Misconfigured."""
    file = ConfigFile(path)
    content = file.read(_File)
    names = file.names(content.services)
    settings = Settings(
        maps=tuple(_map(file, index, each, names) for index, each in enumerate(content.map)),
        reverses=tuple(_reverse(file, index, each, names) for index, each in enumerate(content.reverse)),
        rules=read_rules(file, content.rule, names),
        stack=read_stack(file, content.stack, names),
        mobility=read_mobility(file, content.mobility, names),
        legacy=content.legacy,
        limits=content.limits,
        timeouts=content.timeouts,
        log=content.log,
        access=read_access(file, content.access, names),
    )
    return LoadedFile(settings, names)


def _map(file: ConfigFile, index: int, each: _Map, names: Names) -> ForwardMap:
    listen, service = file.place("map", index, "listen"), file.place("map", index, "service")
    return forward_map(str(each.listen), str(each.service), names, listen, service)


def _reverse(file: ConfigFile, index: int, each: _Reverse, names: Names) -> ReverseMap:
    service, targets = file.place("reverse", index, "service"), file.place("reverse", index, "targets")
    return reverse_map(str(each.service), each.targets, names, service, targets)
