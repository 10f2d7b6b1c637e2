"""Which differences of two configurations are seen, and how are they named?"""

from __future__ import annotations

import msgspec
import pytest

from serval_core.config_changes import fixed_differences, refuse_differences
from serval_core.config_file import Misconfigured
from serval_core.daemon_config import DaemonSettings
from serval_core.mobility_settings import MobilitySection, MobilitySettings


def test_keys_are_named_with_their_sections() -> None:
    running = DaemonSettings()
    wanted = running.with_values(
        {("stack", "backlog"): 7, ("router", "enabled"): True, ("router", "weight_max"): 5, ("log", "level"): "debug"}
    )
    assert fixed_differences(running, running, ()) == []
    assert fixed_differences(running, wanted, {"router.weight_max", "log"}) == ["stack.backlog", "router.enabled"]


def test_what_was_read_is_one_with_what_it_means() -> None:
    key = msgspec.structs.fields(MobilitySection)[0].name
    other = msgspec.structs.replace(MobilitySection(), **{key: ("eth9",)})
    running, wanted = DaemonSettings(), DaemonSettings(mobility=MobilitySettings(section=other))
    assert fixed_differences(running, wanted, ()) == [f"mobility.{key}"]
    assert fixed_differences(running, wanted, {"mobility"}) == []


def test_differences_are_refused_together() -> None:
    refuse_differences([])
    with pytest.raises(Misconfigured, match=r"^a\.b, c\.d: cannot change while it runs; restart it"):
        refuse_differences(["a.b", "c.d"])
