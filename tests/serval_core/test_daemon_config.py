"""Does servald's configuration mean what it says? What is wrong with a wrong one: tests/system/test_servald.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from serval_core.access_policy import Principals
from serval_core.controller.plan import plan
from serval_core.daemon import collect_settings
from serval_core.daemon_config import DaemonSettings, load
from serval_core.names import parse_address, parse_service
from serval_core.rules import RuleType

EXAMPLES = sorted((Path(__file__).parents[2] / "configs" / "servald").glob("*.toml"))

WHOLE = """
[services]
web = 76568

[[rule]]
service = "web"
targets = ["10.0.0.1@3"]
priority = 7

[[rule]]
service = "0xab:8"
type = "delay"

[[access]]
service = "web"
bind = [1000, "root", "%root"]

[[access]]
service = "5"
connect = ["*"]

[stack]
interfaces = ["eth0"]

[timeouts]
connect_s = 3

[registration]
routers = ["10.0.0.254"]

[router]
enabled = true

[resolver]
prefixes = ["0xab:8"]

[log]
level = "debug"
"""


def test_whole_file(tmp_path: Path) -> None:
    file = tmp_path / "servald.toml"
    file.write_text(WHOLE)
    settings, names, place = load(file)
    assert names == {"web": parse_service("76568")}
    assert [(rule.rule_type, rule.priority) for rule in settings.rules] == [(RuleType.FORWARD, 7), (RuleType.DELAY, None)]
    web, other = settings.access
    assert web.bind == Principals(False, frozenset({0, 1000}), frozenset({0}))
    assert web.connect is None
    assert other.connect == Principals(everybody=True)
    assert settings.timeouts.connect_s == 3
    planned = plan(settings.controller, names, place)
    assert planned.routers == (parse_address("10.0.0.254"),)
    assert planned.settings.router.enabled
    assert planned.delayed_prefixes == (parse_service("0xab:8"),)


def test_options_add_and_override(tmp_path: Path) -> None:
    file = tmp_path / "servald.toml"
    file.write_text(WHOLE)
    options = {"stack__interfaces": ("eth1",), "router__enabled": False, "log__level": None, "registration__routers": ()}
    settings = collect_settings(file, ["web=10.0.0.2"], options).settings
    assert settings.stack.interfaces == ("eth1",)
    assert not settings.router.enabled
    assert settings.log.level == "debug"
    assert settings.registration.routers == ("10.0.0.254",)
    assert len(settings.rules) == 3


def test_nothing_said() -> None:
    assert collect_settings(None, [], {}).settings == DaemonSettings()


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_examples(example: Path) -> None:
    settings, names, place = load(example)
    settings.checked()
    plan(settings.controller, names, place)
