"""Are the systemd units what systemd understands, and do they give what the daemon needs and no more?"""

from __future__ import annotations

import configparser
import shutil
import subprocess
from pathlib import Path

import pytest

from serval_core.controller.settings import DEFAULT_DIRECTORY
from serval_core.native_protocol import NATIVE_SOCKET_ADDRESS
from serval_core.native_way import SYSTEM_USER

UNITS = Path(__file__).parents[2] / "configs" / "systemd"


def unit(name: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(UNITS / name)
    return parser


def test_service_has_three_capabilities_and_its_user() -> None:
    service = unit("servald.service")["Service"]
    assert service["AmbientCapabilities"] == service["CapabilityBoundingSet"] == "CAP_NET_ADMIN CAP_NET_RAW CAP_BPF"
    assert service["User"] == SYSTEM_USER
    assert service["Type"] == "notify"
    assert f"u {SYSTEM_USER} " in (UNITS / "serval.sysusers").read_text()


def test_directory_of_registrations_is_in_the_state_directory() -> None:
    service = unit("servald.service")["Service"]
    assert Path(DEFAULT_DIRECTORY).parent == Path("/var/lib") / service["StateDirectory"]
    assert service["ProtectSystem"] == "strict", "or StateDirectory would not be what lets it write there"


@pytest.mark.skipif(shutil.which("systemd-sysusers") is None, reason="there is no systemd here to ask")
def test_systemd_makes_the_user(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    subprocess.run(["systemd-sysusers", f"--root={tmp_path}", str(UNITS / "serval.sysusers")], check=True)
    user = next(line for line in (tmp_path / "etc/passwd").read_text().splitlines() if line.startswith(f"{SYSTEM_USER}:"))
    assert user.split(":")[5:] == [str(Path(DEFAULT_DIRECTORY).parent), "/usr/sbin/nologin"]


def test_reload_is_what_the_daemon_understands() -> None:
    assert unit("servald.service")["Service"]["ExecReload"] == "/bin/kill -HUP $MAINPID"


def test_socket_is_the_one_that_programs_ask() -> None:
    listening = unit("servald.socket")["Socket"]["ListenSequentialPacket"]
    assert listening == NATIVE_SOCKET_ADDRESS.replace("\0", "@")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd here to ask")
def test_systemd_understands_the_units(tmp_path: Path) -> None:
    for name in ("servald.service", "servald.socket"):
        text = (UNITS / name).read_text()
        (tmp_path / name).write_text(text.replace("/usr/local/bin/servald", "/bin/true"))
    found = subprocess.run(
        ["systemd-analyze", "verify", *map(str, sorted(tmp_path.iterdir()))], capture_output=True, text=True, check=False
    )
    complaints = [line for line in found.stderr.splitlines() if "servald" in line]
    assert complaints == []
