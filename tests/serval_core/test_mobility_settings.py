"""The section [mobility]: what it means, what is refused, and that both programs have it."""

from __future__ import annotations

from math import inf
from pathlib import Path

import pytest

from serval_core import daemon_config
from serval_core.config_file import Misconfigured
from serval_core.mobility_settings import MobilitySettings
from serval_core.names import parse_service
from translator import config_file

WEB = parse_service("76568").service_id
VOICE = parse_service("0x0102").service_id
TEXT = """
[services]
web = 76568

[[map]]
listen = "8080"
service = "web"

[mobility]
prefer = ["eth0", "wlan*"]
return_after_s = 10

[[mobility.interface]]
name = "wwan*"
metered = true
cost = 10

[[mobility.interface]]
name = "*"
cost = 1

[[mobility.service]]
service = "web"
choose = "cost"

[[mobility.service]]
service = "0x01:8"
prefer = ["wlan0"]
choose = "rtt"
"""


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.fixture
def settings(tmp_path: Path) -> MobilitySettings:
    return config_file.load(written(tmp_path / "settings.toml", TEXT)).settings.mobility


def test_both_programs_read_the_same(tmp_path: Path, settings: MobilitySettings) -> None:
    daemon = written(tmp_path / "daemon.toml", TEXT.replace('[[map]]\nlisten = "8080"\nservice = "web"\n', ""))
    assert daemon_config.load(daemon).settings.mobility == settings
    assert settings.section.return_after_s == 10


def test_nothing_is_preferred_unless_it_is_said() -> None:
    settings = MobilitySettings()
    assert not settings.ranks
    assert not settings.measures
    assert settings.section.automatic
    assert settings.rank(WEB, "eth0") == settings.rank(WEB, "wwan0")


def test_preferences_come_after_metered_interfaces(settings: MobilitySettings) -> None:
    names = ["wwan0", "eth7", "wlan3", "eth0"]
    assert sorted(names, key=lambda name: settings.rank(WEB, name)) == ["eth0", "wlan3", "eth7", "wwan0"]
    assert settings.rank(WEB, "wwan0") == (True, inf)
    assert (settings.cost("wwan0"), settings.cost("eth7")) == (10, 1)


def test_what_a_service_says_replaces_what_holds_for_all(settings: MobilitySettings) -> None:
    assert settings.choice(VOICE) == "rtt"
    assert settings.choice(WEB) == "cost"
    assert min(("eth0", "wlan0", "wlan1"), key=lambda name: settings.rank(VOICE, name)) == "wlan0"
    assert settings.preference(WEB, "wlan1") == 1
    assert settings.measures


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ('choose = "rtt"', 'choose = "rt"', "rtt"),
        ("metered = true", "meterd = true", "metered"),
        ("cost = 10", "cost = -1", "at least 0 (nearest: 0)"),
        ('service = "0x01:8"', 'service = "webb"', "web"),
        ('prefer = ["eth0", "wlan*"]', "prefer = [7]", "a text in quotes"),
        ("return_after_s = 10", "return_after_s = -1", "at least 0"),
    ],
)
def test_what_cannot_be_obeyed_is_refused_with_its_line(tmp_path: Path, old: str, new: str, sentence: str) -> None:
    assert old in TEXT
    text = TEXT.replace(old, new)
    path = written(tmp_path / "wrong.toml", text)
    with pytest.raises(Misconfigured) as refusal:
        config_file.load(path)
    place, _, what = str(refusal.value).partition(": ")
    lines = text.splitlines()
    line = int(place.rpartition(":")[2])
    assert new.split(" = ", maxsplit=1)[0] in what
    assert sentence in what
    assert new in lines[line - 1 : line + 3]
