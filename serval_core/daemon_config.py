"""What can an operator choose about servald, and what holds when nothing is said?

The command line and the configuration file both end up as one `DaemonSettings`. Sections and keys that a translator has as
well mean the same there; times are in seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from msgspec import Struct

from serval_core.access_policy import AccessRule
from serval_core.config_file import ConfigFile, Names
from serval_core.config_sections import (
    AccessEntry,
    LogSection,
    Seconds,
    StackSection,
    read_access,
    read_stack,
)
from serval_core.configured_rules import RuleEntry, ServiceRule, read_rules, refuse_repeated_rules
from serval_core.controller.plan import ControllerPlan, dotted, plan
from serval_core.controller.settings import (
    ControllerSettings,
    RegistrationSection,
    ResolverSection,
    RouterSection,
)
from serval_core.mobility_settings import MobilitySection, MobilitySettings, read_mobility


class DaemonTimeouts(Struct, frozen=True, forbid_unknown_fields=True):
    """How long what may take."""

    connect_s: Seconds = 10.0  # opening a Serval flow


class DaemonSettings(Struct, frozen=True, kw_only=True):
    """All an operator can say to one servald."""

    rules: tuple[ServiceRule, ...] = ()
    access: tuple[AccessRule, ...] = ()
    stack: StackSection = StackSection()
    mobility: MobilitySettings = MobilitySettings()
    timeouts: DaemonTimeouts = DaemonTimeouts()
    log: LogSection = LogSection()
    registration: RegistrationSection = RegistrationSection()
    router: RouterSection = RouterSection()
    resolver: ResolverSection = ResolverSection()
    names: Names = {}

    @property
    def controller(self) -> ControllerSettings:
        """What the service controller is told."""
        return ControllerSettings(
            registration=self.registration, router=self.router, resolver=self.resolver
        )

    def controller_plan(self) -> ControllerPlan:
        """What that means. Raises Misconfigured."""
        return plan(self.controller, self.names)

    def checked(self) -> DaemonSettings:
        """These settings. Raises Misconfigured when they contradict each other."""
        refuse_repeated_rules(self.rules)
        self.controller_plan()
        return self

    def with_values(self, values: dict[tuple[str, str], Any]) -> DaemonSettings:
        """A copy in which the given (section, key) pairs have new values."""
        sections: dict[str, dict[str, Any]] = {}
        for (section, key), value in values.items():
            sections.setdefault(section, {})[key] = value
        return msgspec.structs.replace(
            self,
            **{
                section: msgspec.structs.replace(getattr(self, section), **keys)
                for section, keys in sections.items()
            },
        )


class _File(Struct, forbid_unknown_fields=True):
    services: dict[str, str | int] = {}
    rule: list[RuleEntry] = []
    access: list[AccessEntry] = []
    stack: StackSection = StackSection()
    mobility: MobilitySection = MobilitySection()
    timeouts: DaemonTimeouts = DaemonTimeouts()
    log: LogSection = LogSection()
    registration: RegistrationSection = RegistrationSection()
    router: RouterSection = RouterSection()
    resolver: ResolverSection = ResolverSection()


class LoadedDaemonFile(NamedTuple):
    """What a file says, the service names it defines (the command line may use them too), and where its keys are."""

    settings: DaemonSettings
    names: Names
    place: Callable[..., str]


def without_file() -> LoadedDaemonFile:
    """What holds when there is no configuration file."""
    return LoadedDaemonFile(DaemonSettings(), {}, dotted)


def load(path: Path) -> LoadedDaemonFile:
    """Read a configuration file. Raises Misconfigured."""
    file = ConfigFile(path)
    content = file.read(_File)
    names = file.names(content.services)
    settings = DaemonSettings(
        rules=read_rules(file, content.rule, names),
        access=read_access(file, content.access, names),
        stack=read_stack(file, content.stack, names),
        mobility=read_mobility(file, content.mobility, names),
        timeouts=content.timeouts,
        log=content.log,
        registration=content.registration,
        router=content.router,
        resolver=content.resolver,
        names=names,
    )
    plan(settings.controller, names, file.place)
    return LoadedDaemonFile(settings, names, file.place)
