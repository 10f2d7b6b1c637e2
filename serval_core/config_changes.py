"""Which keys differ between a configuration that is in force and one that was read again, and may they?"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import msgspec

from serval_core.config_file import Misconfigured


def fixed_differences(running: Any, wanted: Any, changeable: Collection[str], within: str = "") -> list[str]:
    """The keys, as `section.key`, that differ and are neither themselves nor with their section in `changeable`."""
    if running == wanted or within in changeable:
        return []
    if not isinstance(running, msgspec.Struct):
        return [within]
    differ = []
    for field in msgspec.structs.fields(running):
        # What was read is kept next to what it means: to the operator they are one.
        name = within if field.name == "section" else f"{within}.{field.name}".lstrip(".")
        differ += fixed_differences(getattr(running, field.name), getattr(wanted, field.name), changeable, name)
    return differ


def refuse_differences(differ: Collection[str]) -> None:
    """Raise Misconfigured if there are any."""
    if differ:
        raise Misconfigured(
            ", ".join(differ), "cannot change while it runs; restart it, or take the change back"
        )
