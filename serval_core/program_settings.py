"""What do the settings of every program that runs a stack have in common, servald's and a translator's?

Rules, access, the stack, mobility, the log and the service controller: the same sections and keys, read in the same way. A program
adds sections of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import msgspec
from msgspec import Struct

from serval_core.access_policy import AccessRule
from serval_core.config_file import ConfigFile, Names
from serval_core.config_sections import AccessEntry, LogSection, StackSection, read_access, read_stack
from serval_core.configured_rules import RuleEntry, ServiceRule, read_rules
from serval_core.controller.plan import ControllerPlan, dotted, plan
from serval_core.controller.settings import (
    ControllerSettings,
    RegistrationSection,
    ResolverSection,
    RouterSection,
)
from serval_core.mobility_settings import MobilitySection, MobilitySettings, read_mobility


class ProgramSettings(Struct, frozen=True, kw_only=True):
    """What an operator can say to any of them. `names`: the services that the configuration names."""

    rules: tuple[ServiceRule, ...] = ()
    access: tuple[AccessRule, ...] = ()
    stack: StackSection = StackSection()
    mobility: MobilitySettings = MobilitySettings()
    log: LogSection = LogSection()
    registration: RegistrationSection = RegistrationSection()
    router: RouterSection = RouterSection()
    resolver: ResolverSection = ResolverSection()
    names: Names = {}

    @property
    def controller(self) -> ControllerSettings:
        """What the service controller is told."""
        return ControllerSettings(registration=self.registration, router=self.router, resolver=self.resolver)

    def controller_plan(self, place: Callable[..., str] = dotted) -> ControllerPlan:
        """What that means. Key files are read. Raises Misconfigured."""
        return plan(self.controller, self.names, place)

    def with_values(self, values: dict[tuple[str, str], Any]) -> Self:
        """A copy in which the given (section, key) pairs have new values."""
        sections: dict[str, dict[str, Any]] = {}
        for (section, key), value in values.items():
            sections.setdefault(section, {})[key] = value
        replaced = {
            section: msgspec.structs.replace(getattr(self, section), **keys)
            for section, keys in sections.items()
        }
        return msgspec.structs.replace(self, **replaced)


class ProgramFile(Struct, forbid_unknown_fields=True):
    """The sections of their configuration files."""

    services: dict[str, str | int] = {}
    rule: list[RuleEntry] = []
    access: list[AccessEntry] = []
    stack: StackSection = StackSection()
    mobility: MobilitySection = MobilitySection()
    log: LogSection = LogSection()
    registration: RegistrationSection = RegistrationSection()
    router: RouterSection = RouterSection()
    resolver: ResolverSection = ResolverSection()


def common_settings(file: ConfigFile, content: ProgramFile) -> ProgramSettings:
    """What `content`, read from `file`, says of what they have in common. Raises Misconfigured."""
    names = file.names(content.services)
    return ProgramSettings(
        rules=read_rules(file, content.rule, names),
        access=read_access(file, content.access, names),
        stack=read_stack(file, content.stack, names),
        mobility=read_mobility(file, content.mobility, names),
        log=content.log,
        registration=content.registration,
        router=content.router,
        resolver=content.resolver,
        names=names,
    )
