"""Does a configuration file mean what it says, and does a wrong one name its line?"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serval_core.config_file import Misconfigured, line_of
from serval_core.config_sections import LogSection
from serval_core.names import ServicePrefix
from serval_core.rules import RuleType
from translator.config import LegacySection, Settings
from translator.config_file import LoadedFile, load

EXAMPLES = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))

WHOLE = """\
[services]
web = 76568
farm = "0x00012b18:32"

[[map]]
listen = 80
service = "web"

[[map]]
listen = "[::1]:8000-8009"
service = "0x00012b18"

[[reverse]]
service = "farm"
targets = [
  "127.0.0.1:80",
  "localhost:81",
]

[[rule]]
service = "web"
targets = ["10.0.0.1@3"]
priority = 7

[[rule]]
service = "default"
type = "drop"

[stack]
interfaces = ["eth0"]

[legacy]
no_answer = "close"

[limits]
connections = 10

[timeouts]
connect_s = 3
idle_s = 0.5

[log]
level = "debug"
"""


def read(directory: Path, text: str) -> LoadedFile:
    file = directory / "site.toml"
    file.write_text(text)
    return load(file)


def test_everything_that_a_file_can_say(tmp_path: Path) -> None:
    settings, names = read(tmp_path, WHOLE)
    assert set(names) == {"web", "farm"}
    assert [each.listen_text for each in settings.maps] == ["*:80", "[::1]:8000-8009"]
    assert settings.reverses[0].prefix.bits == 32
    assert [str(target) for target in settings.reverses[0].targets] == ["127.0.0.1:80", "localhost:81"]
    assert [(rule.rule_type, rule.priority) for rule in settings.rules] == [
        (RuleType.FORWARD, 7),
        (RuleType.DROP, None),
    ]
    assert settings.stack.interfaces == ("eth0",)
    assert settings.legacy == LegacySection(no_answer="close")
    assert settings.limits.connections == 10
    assert (settings.timeouts.connect_s, settings.timeouts.idle_s, settings.timeouts.drain_s) == (3, 0.5, 30)
    assert settings.log == LogSection(level="debug")
    settings.checked()


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert read(tmp_path, "").settings == Settings()


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_the_examples_are_right(example: Path) -> None:
    load(example).settings.checked()


def test_there_are_examples() -> None:
    assert {path.name for path in EXAMPLES} >= {
        "minimal.toml",
        "two-sites-east.toml",
        "reverse-front-end.toml",
    }


@pytest.mark.parametrize(
    ("text", "line", "sentence"),
    [
        ("[stak]\n", 1, 'stak: there is no such key (nearest: "stack")'),
        (
            "\n[limits]\n\nconections = 3\n",
            4,
            'limits.conections: there is no such key (nearest: "connections")',
        ),
        (
            "[[map]]\nlisten = 1\nservice = 1\n[[map]]\nlisten = 2\nservise = 3\n",
            6,
            "map.servise: there is no such key",
        ),
        ("[[map]]\nlisten = 1\nservice = 1\n[[map]]\nlisten = 2\n", 4, 'map: the key "service" is missing'),
        (
            "[limits]\nconnections = 0\n",
            2,
            "limits.connections: 0 is out of range; it must be at least 1 (nearest: 1)",
        ),
        ("[limits]\nconnections = 1.5\n", 2, "limits.connections: write a whole number instead of 1.5"),
        ("[limits]\nconnections = true\n", 2, "write a whole number instead of true"),
        ("[timeouts]\nidle_s = 0\n", 2, "timeouts.idle_s: 0 is out of range; it must be more than 0"),
        ("[timeouts]\nidle_s = nan\n", 2, "timeouts.idle_s: "),
        ("[timeouts]\nidle_s = inf\n", 2, "timeouts.idle_s: "),
        ("[log]\nlevel = 'inof'\n", 2, 'log.level: "inof" is not possible (nearest: "info")'),
        ("[log]\nlevel = 'loud'\n", 2, 'log.level: "loud" is not possible'),
        ("[legacy]\nno_answer = 3\n", 2, "legacy.no_answer: write a text in quotes instead of 3"),
        ("[stack]\ninterfaces = []\n", 2, "stack.interfaces: the list must not be empty"),
        ("[stack]\ninterfaces = [\n 'a',\n 3]\n", 2, "stack.interfaces: write a text in quotes instead of 3"),
        ("[stack]\nvirtual_network = '10.0.0.1'\n", 2, "stack.virtual_network: \"10.0.0.1\" is not what is expected"),
        ("[stack]\nvirtual_address = '10.0.0.256'\n", 2, "stack.virtual_address: \"10.0.0.256\" is not what"),
        ("[stack]\ncongestion_control = ''\n", 2, "stack.congestion_control: the text must not be empty"),
        ("stack = 3\n", 1, "stack: write a section of its own instead of 3"),
        ("[[map]]\nlisten = 80\nservice = 'wbe'\n[services]\nweb = 1\n", 3, 'did you mean "web"?'),
        ("[[map]]\nlisten = 70000\nservice = 1\n", 2, "map.listen: port 70000 is out of range"),
        ("[[map]]\nservice = 1\nlisten = [80]\n", 3, "map.listen: write"),
        (
            "[[reverse]]\nservice = 1\ntargets = [\n'a:1',\n'b']\n",
            3,
            'reverse.targets: the target "b" is not of the form',
        ),
        ("[[reverse]]\nservice = 'default'\ntargets = ['a:1']\n", 2, "reverse.service: the default service"),
        ("[[rule]]\nservice = 1\n", 1, "rule.targets: give at least one target"),
        ("[[rule]]\nservice = 1\ntype = 'drop'\ntargets = ['10.0.0.1']\n", 4, "rule.targets: a rule of type"),
        ("[[rule]]\nservice = 1\ntype = 'dorp'\n", 3, '"dorp" is not possible (nearest: "drop")'),
        ("[services]\nweb = '0x123'\n", 2, "services.web: "),
        ("[services]\nok = 1\n'0x12' = 3\n", 3, "services.0x12: is no name for a service"),
        ("[services]\nok = 1\ndefault = 3\n", 3, "services.default: is no name for a service"),
        ("[services]\nok = 1\nbad = []\n", 3, "services.bad: write"),
        ("a = 1\na = 2\n", 2, "is no TOML: cannot overwrite a value"),
        ("[log]\nlevel = \n", 2, "is no TOML: invalid value at column 9"),
        ("[log]\nx = [1,\n", 2, "is no TOML: invalid value at its end"),
    ],
)
def test_wrong_files(tmp_path: Path, text: str, line: int, sentence: str) -> None:
    with pytest.raises(Misconfigured) as refusal:
        read(tmp_path, text)
    message = str(refusal.value)
    assert message.startswith(f"{tmp_path}/site.toml:{line}: ")
    assert sentence in message
    assert "\n" not in message


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(Misconfigured, match=r"nothere\.toml: cannot be read: No such file or directory"):
        load(tmp_path / "nothere.toml")


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    file = tmp_path / "site.toml"
    file.write_bytes(b"[log]\n\xff\xfe\n")
    with pytest.raises(Misconfigured, match=r"site\.toml:2: the file is not UTF-8 text"):
        load(file)


def test_contradictions_between_file_and_options_name_both_places(tmp_path: Path) -> None:
    settings = read(
        tmp_path, "[[map]]\nlisten = 80\nservice = 1\n[[map]]\nlisten = 80\nservice = 2\n"
    ).settings
    with pytest.raises(Misconfigured) as refusal:
        settings.checked()
    assert f"{tmp_path}/site.toml:5: map.listen: port 80 is already mapped by {tmp_path}/site.toml:2" in str(
        refusal.value
    )


keys = st.sampled_from(["a", "b", "c"])
values: st.SearchStrategy[Any] = st.one_of(
    st.integers(0, 9),
    st.lists(st.integers(0, 9), max_size=3),
    st.just('text with # and [[x]]\n"""'),
    st.booleans(),
)


@st.composite
def documents(draw: st.DrawFn) -> tuple[str, dict[tuple[str | int, ...], int]]:
    """A TOML text laid out in odd ways, and the line of every statement in it."""
    lines: list[str] = []
    where: dict[tuple[str | int, ...], int] = {}
    counts: dict[str, int] = {}
    for name in draw(st.lists(st.sampled_from(["x", "y"]), max_size=4)):
        lines += draw(st.lists(st.sampled_from(["", "# a = 1", "  # [[x]]"]), max_size=2))
        index = counts[name] = counts.get(name, -1) + 1
        lines.append(f"[[{name}]]")
        where[name, index] = len(lines)
        for key, value in draw(st.dictionaries(keys, values, max_size=3)).items():
            where[name, index, key] = len(lines) + 1
            if isinstance(value, list):
                lines += [f"{key} = [", *(f"  {item}," for item in value), "]"]
            elif isinstance(value, str):
                lines += [f"{key} = '''", "[[x]]", "a = 3 # no statement", "'''"]
            else:
                lines.append(f"{key} = {str(value).lower()}")
    return "\n".join(lines) + "\n", where


@given(documents())
def test_lines_are_found_exactly(document: tuple[str, dict[tuple[str | int, ...], int]]) -> None:
    text, where = document
    tomllib.loads(text)
    for path, line in where.items():
        assert line_of(text, path) == line


def test_a_name_is_a_prefix_where_it_says_so(tmp_path: Path) -> None:
    _, names = read(tmp_path, "[services]\nfarm = '0x4c4142:24'\n")
    assert isinstance(names["farm"], ServicePrefix)
    assert str(names["farm"]) == "0x4c4142:24"
