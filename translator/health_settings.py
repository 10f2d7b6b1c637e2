"""How are the targets of reverse maps watched? The section `[health]`, and what a single map says instead.

Times are in seconds.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from serval_core.config_sections import Seconds

Check = Literal["connect", "none"]
Times = Annotated[int, Meta(ge=1, le=1000)]


class HealthSection(Struct, frozen=True, forbid_unknown_fields=True):
    """A target goes down after `fall` failures in a row and up again after `rise` checks that succeed."""

    check: Check = "connect"  # a TCP connection that the service never sees; none: every target counts as up
    interval_s: Seconds = 2.0
    fast_interval_s: Seconds = 0.5  # after a result that contradicts what was believed
    timeout_s: Seconds = 1.0
    rise: Times = 2
    fall: Times = 3


class HealthOfMap(Struct, frozen=True, forbid_unknown_fields=True):
    """`health = {...}` of one map: keys that are absent are those of `[health]`."""

    check: Check | None = None
    interval_s: Seconds | None = None
    fast_interval_s: Seconds | None = None
    timeout_s: Seconds | None = None
    rise: Times | None = None
    fall: Times | None = None

    def over(self, section: HealthSection) -> HealthSection:
        """What holds for the map."""
        own = {key: value for key, value in msgspec.structs.asdict(self).items() if value is not None}
        return msgspec.structs.replace(section, **own)
