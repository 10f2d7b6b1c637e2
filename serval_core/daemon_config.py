"""What can an operator choose about servald, and what holds when nothing is said?

The command line and the configuration file both end up as one `DaemonSettings`; times are in seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec
from msgspec import Struct

from serval_core.config_file import ConfigFile, Names
from serval_core.config_sections import Seconds
from serval_core.configured_rules import refuse_repeated_rules
from serval_core.controller.plan import dotted
from serval_core.program_settings import ProgramFile, ProgramSettings, common_settings


class DaemonTimeouts(Struct, frozen=True, forbid_unknown_fields=True):
    """How long what may take."""

    connect_s: Seconds = 10.0  # opening a Serval flow


class DaemonSettings(ProgramSettings, frozen=True, kw_only=True):
    """All an operator can say to one servald."""

    timeouts: DaemonTimeouts = DaemonTimeouts()

    def checked(self) -> DaemonSettings:
        """These settings. Raises Misconfigured when they contradict each other."""
        refuse_repeated_rules(self.rules)
        self.controller_plan()
        return self


class _File(ProgramFile, forbid_unknown_fields=True):
    timeouts: DaemonTimeouts = DaemonTimeouts()


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
    common = common_settings(file, content)
    settings = DaemonSettings(**msgspec.structs.asdict(common), timeouts=content.timeouts)
    settings.controller_plan(file.place)
    return LoadedDaemonFile(settings, common.names, file.place)
