"""What does a translator's configuration file say?

Its shape here, its texts by `port_map`, lines and refusals by `serval_core.config_file`. The result is a
`Settings`, not yet checked against contradictions.
"""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from serval_core.config_file import ConfigFile, Names
from serval_core.controller.settings import RuleNumber
from serval_core.program_settings import ProgramFile, common_settings
from translator.config import LegacySection, LimitsSection, Settings, TimeoutsSection
from translator.health_settings import HealthOfMap, HealthSection
from translator.port_map import ForwardMap, ReverseMap, forward_map, reverse_map


class _Map(Struct, forbid_unknown_fields=True):
    listen: str | int
    service: str | int


class _Reverse(Struct, forbid_unknown_fields=True):
    service: str | int
    targets: Annotated[list[str], Meta(min_length=1)]
    weight: RuleNumber | None = None
    priority: RuleNumber | None = None
    health: HealthOfMap = HealthOfMap()


class _File(ProgramFile, forbid_unknown_fields=True):
    map: tuple[_Map, ...] = ()
    reverse: tuple[_Reverse, ...] = ()
    legacy: LegacySection = LegacySection()
    limits: LimitsSection = LimitsSection()
    timeouts: TimeoutsSection = TimeoutsSection()
    health: HealthSection = HealthSection()


class LoadedFile(typing.NamedTuple):
    """What a file says, and the service names it defines (the command line may use them too)."""

    settings: Settings
    names: Names


def load(path: Path) -> LoadedFile:
    """Read a configuration file. Raises Misconfigured."""
    file = ConfigFile(path)
    content = file.read(_File)
    common = common_settings(file, content)
    settings = Settings(
        **msgspec.structs.asdict(common),
        maps=tuple(_map(file, index, each, common.names) for index, each in enumerate(content.map)),
        reverses=tuple(
            _reverse(file, index, each, common.names) for index, each in enumerate(content.reverse)
        ),
        legacy=content.legacy,
        limits=content.limits,
        timeouts=content.timeouts,
        health=content.health,
    )
    settings.controller_plan(file.place)
    return LoadedFile(settings, common.names)


def _map(file: ConfigFile, index: int, each: _Map, names: Names) -> ForwardMap:
    listen, service = file.place("map", index, "listen"), file.place("map", index, "service")
    return forward_map(str(each.listen), str(each.service), names, listen, service)


def _reverse(file: ConfigFile, index: int, each: _Reverse, names: Names) -> ReverseMap:
    service, targets = file.place("reverse", index, "service"), file.place("reverse", index, "targets")
    read = reverse_map(str(each.service), each.targets, names, service, targets)
    return read._replace(weight=each.weight, priority=each.priority, health=each.health)
