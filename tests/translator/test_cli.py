"""Is what is typed obeyed, or refused with one sentence and the right exit status?"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from serval_core.config_file import Misconfigured
from translator.cli import cli, collect_settings, main
from translator.config import Settings

FILE = """\
[services]
web = 76568

[[map]]
listen = 80
service = "web"

[limits]
connections = 10

[timeouts]
connect_s = 3
"""


@pytest.fixture(autouse=True)
def logging_of_others() -> Iterator[None]:
    """`main` sets logging up for the whole process, with the standard error of this test."""
    yield
    structlog.reset_defaults()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "site.toml"
    path.write_text(FILE)
    return path


def settings_of(*arguments: str) -> Settings:
    """What the program would run with."""
    context = cli.make_context("serval-translator", list(arguments))
    parameters: dict[str, Any] = dict(context.params)
    fixed = [parameters.pop(name) for name in ("maps", "reverses", "rules", "config")]
    return collect_settings(*fixed, parameters)


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Exit status and message of a run that goes wrong."""
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    output = capsys.readouterr()
    assert output.out == ""
    assert isinstance(end.value.code, int)
    return end.value.code, output.err


def test_options_add_to_the_file_and_override_it(file: Path) -> None:
    settings = settings_of(
        *(
            "--config",
            str(file),
            "--map",
            "81=web",
            "--reverse",
            "web=127.0.0.1:80",
            "--service",
            "default=10.0.0.1",
        ),
        *("--connection-limit", "7", "--drain-timeout", "2.5", "-i", "eth0", "-i", "eth1", "--no-broadcast"),
    )
    assert [each.listen_text for each in settings.maps] == ["*:80", "*:81"]
    assert settings.reverses[0].prefix.service_id == settings.maps[0].service_id
    assert settings.rules[0].service_text == "default"
    assert settings.limits.connections == 7
    assert (settings.timeouts.connect_s, settings.timeouts.drain_s, settings.timeouts.idle_s) == (
        3,
        2.5,
        3600,
    )
    assert settings.stack.interfaces == ("eth0", "eth1")
    assert not settings.stack.broadcast_resolution


def test_every_option_reaches_its_setting() -> None:
    settings = settings_of(
        *("--map", "80=1", "--congestion-control", "reno", "--no-answer", "close", "--keepalive", "0"),
        *(
            "--connect-timeout",
            "1",
            "--target-timeout",
            "2",
            "--idle-timeout",
            "3",
            "--client-fin-timeout",
            "4",
        ),
        *("--server-fin-timeout", "5", "--log-level", "debug", "--log-format", "json", "--broadcast"),
    )
    assert settings.stack.congestion_control == "reno"
    assert settings.stack.broadcast_resolution
    assert (settings.legacy.no_answer, settings.legacy.keepalive_s) == ("close", 0)
    timeouts = settings.timeouts
    assert (timeouts.connect_s, timeouts.target_connect_s, timeouts.idle_s) == (1, 2, 3)
    assert (timeouts.client_fin_s, timeouts.server_fin_s) == (4, 5)
    assert (settings.log.level, settings.log.format) == ("debug", "json")


def test_without_options_the_defaults_of_file_and_command_line_agree() -> None:
    settings = settings_of("--map", "80=1")
    assert settings == Settings(maps=settings.maps)


def test_a_port_of_the_file_cannot_be_mapped_again(file: Path) -> None:
    with pytest.raises(
        Misconfigured, match=rf"--map 80=1: port 80 is already mapped by {file}:5: map.listen"
    ):
        settings_of("--config", str(file), "--map", "80=1")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "nothing to do: give at least one --map PORT=ID or --reverse ID=HOST:PORT"),
        (("--service", "1=10.0.0.1"), "nothing to do"),
        (("--map", "80=7656x"), '--map 80=7656x: "7656x" is neither a serviceID'),
        (("--map", "80=1", "--map", "80=2"), "--map 80=2: port 80 is already mapped by --map 80=1"),
        (("--mpa", "80=1"), "No such option '--mpa'. Did you mean '--map'?"),
        (("--map",), "Option '--map' requires an argument"),
        (("--map", "80=1", "--connection-limit", "0"), "Invalid value for '--connection-limit'"),
        (("--map", "80=1", "--connect-timeout", "soon"), "'soon' is no number"),
        (("--map", "80=1", "--idle-timeout", "0"), "Invalid value for '--idle-timeout'"),
        (("--map", "80=1", "--no-answer", "drop"), "'drop' is not one of 'reset', 'close'"),
        (("--config", "/nonexistent.toml"), "--config /nonexistent.toml: cannot be read"),
        (("check", "/nonexistent.toml"), "/nonexistent.toml: cannot be read"),
        (("chekc",), "No such command 'chekc'"),
        (("show", "flow"), "'flow' is not one of 'flows', 'services', 'maps'"),
        (
            ("--map", "80=1", "--interface", "nope0"),
            "--interface nope0 (stack.interfaces): there is no such interface",
        ),
        (("--map", "80=1", "--congestion-control", "cubik"), '(nearest: "cubic")'),
        (
            ("--map", "192.0.2.1:80=1"),
            "--map 192.0.2.1:80=1: cannot listen on 192.0.2.1:80: that address belongs",
        ),
        (("--reverse", "1=nowhere.invalid:80"), "the host name of target nowhere.invalid:80 has no address"),
        (
            ("--map", "80=1", "--connection-limit", "9999999"),
            "--connection-limit 9999999 (limits.connections): ",
        ),
    ],
)
def test_wrong_use(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], sentence: str) -> None:
    status, message = fails(capsys, *arguments)
    assert status == 2
    assert sentence in message
    assert message.startswith("serval-translator: ")
    assert message.count("\n") == 1


def test_check_names_file_line_and_key(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.toml"
    wrong.write_text(FILE + "idel_s = 3\n")
    status, message = fails(capsys, "check", str(wrong))
    assert status == 2
    assert (
        message
        == f'serval-translator: {wrong}:13: timeouts.idel_s: there is no such key (nearest: "idle_s")\n'
    )


def test_check_says_what_a_right_file_means(capsys: pytest.CaptureFixture[str], file: Path) -> None:
    with pytest.raises(SystemExit) as end:
        main(["check", str(file)])
    assert end.value.code == 0
    output = capsys.readouterr().out
    assert "*:80 -> web (00012b18...)" in output
    assert output.endswith(f"{file}: ok\n")


def test_as_a_program() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "translator", "--map", "80"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("serval-translator: --map 80: is not of the form PORT=ID, ADDR:PORT=ID, ")
    assert result.stderr.count("\n") == 1


def test_help_names_every_command() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "translator", "--help"], capture_output=True, text=True, check=True, timeout=60
    )
    for word in ("--map", "--reverse", "--service", "--config", "check", "doctor", "show"):
        assert word in result.stdout


@pytest.mark.parametrize("form", ["console", "json"])
def test_log_lines_are_of_the_wanted_form_and_level(form: str) -> None:
    program = f"""
import structlog
from serval_core.config_sections import LogSection
from serval_core.logging_setup import set_up_logging
set_up_logging(LogSection(level="warning", format={form!r}))
structlog.get_logger("x").info("unheard")
structlog.get_logger("x").warning("heard", number=3)
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stdout == ""
    assert "unheard" not in result.stderr
    wanted = '"number": 3' if form == "json" else "heard number=3"
    assert wanted in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_defect_is_logged_with_its_trace() -> None:
    program = """
import asyncio
from translator.appliance import report_defect
from serval_core.config_sections import LogSection
from serval_core.logging_setup import set_up_logging

async def main():
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(report_defect)
    loop.call_soon(lambda: 1 / 0)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    print("still running")

set_up_logging(LogSection())
asyncio.run(main())
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stdout == "still running\n"
    assert "a defect of the translator" in result.stderr
    assert "ZeroDivisionError" in result.stderr
