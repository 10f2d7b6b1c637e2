"""The checks for real: what root finds here, what an ordinary user is told, and that remedies help."""

from __future__ import annotations

import gc
import json
import os
import shlex
import socket
import sys
from pathlib import Path

import pytest

from lab.hosts import Host, Lab
from serval_core import kernel_probes, tuning_check
from serval_core.findings import Finding, Plan, Severity
from serval_core.requirements_check import check_requirements

NOBODY = 65534

# The interpreter may be unreadable for others: what the checks import must be loaded before the user changes.
UNPRIVILEGED_PROGRAM = """
import dataclasses, json, os, sys
from serval_core.requirements_check import check_requirements
check_requirements()
os.setgroups([])
os.setgid(int(sys.argv[1]))
os.setuid(int(sys.argv[1]))
findings = [dataclasses.asdict(finding) for finding in check_requirements()]
print(json.dumps([finding | {"severity": finding["severity"].value} for finding in findings]))
"""

PROGRAM = """
import dataclasses, json
from serval_core.requirements_check import check_requirements
findings = [dataclasses.asdict(finding) for finding in check_requirements()]
print(json.dumps([finding | {"severity": finding["severity"].value} for finding in findings]))
"""


@pytest.fixture
def host(lab: Lab) -> Host:
    return lab.host("examined")


def named(findings: list[Finding], name: str) -> Finding:
    (finding,) = [each for each in findings if each.name == name]
    return finding


def from_program(output: str) -> list[Finding]:
    return [Finding(**row | {"severity": Severity(row["severity"])}) for row in json.loads(output)]


# The whole


def test_root_finds_all_that_is_required_here(host: Host) -> None:
    findings = host.call(check_requirements)
    assert [each for each in findings if each.severity is Severity.REQUIRED and not each.ok] == []
    names = [each.name for each in findings]
    assert len(set(names)) == len(names)
    assert {"CAP_NET_ADMIN", "BPF programs", "our BPF programs", "TCP_REPAIR", "veth", "clsact"} <= set(names)
    assert named(findings, "data plane").found == "starts and stops"
    severities = [each.severity for each in findings]
    assert severities == sorted(severities, key=lambda severity: severity is not Severity.REQUIRED)


def test_every_finding_that_is_not_in_order_has_a_remedy_in_one_line(host: Host) -> None:
    unprivileged = host.run([sys.executable, "-c", UNPRIVILEGED_PROGRAM, NOBODY])
    for finding in [*host.call(check_requirements), *from_program(unprivileged.stdout)]:
        assert bool(finding.remedy) != finding.ok
        assert "\n" not in finding.remedy + finding.found + finding.needed


def test_the_checks_leave_nothing_behind(host: Host) -> None:
    def traces() -> object:
        gc.collect()  # what earlier tests left to it would vanish meanwhile
        return (
            sorted(os.listdir("/proc/self/fd")),
            host.run(["ip", "-j", "link"]).stdout,
            host.run(["nft", "list", "ruleset"]).stdout,
            host.run(["ip", "-j", "route", "show", "table", "all"]).stdout,
            sorted(name for name in os.listdir("/run/netns") if not name.startswith("serval-lab.")),
            Path(f"/proc/self/task/{os.getpid()}/children").read_text(),
        )

    host.call(check_requirements)
    before = traces()
    host.call(check_requirements)
    assert traces() == before


def test_an_unprivileged_user_is_told_what_is_missing_and_how_to_get_it(host: Host) -> None:
    findings = from_program(host.run([sys.executable, "-c", UNPRIVILEGED_PROGRAM, NOBODY]).stdout)
    for capability in ("NET_ADMIN", "NET_RAW", "BPF"):
        assert named(findings, f"CAP_{capability}") == Finding(
            f"CAP_{capability}",
            Severity.REQUIRED,
            False,
            "missing",
            named(findings, f"CAP_{capability}").needed,
            f"run it as root (sudo serval-translator ...), with AmbientCapabilities=CAP_{capability} in its "
            f"systemd unit, or with --cap-add {capability} in a container",
        )
    assert "CAP_NET_ADMIN" in named(findings, "TCP_REPAIR").remedy
    assert "CAP_NET_RAW" in named(findings, "raw socket, protocol 144").remedy
    assert "CAP_BPF" in named(findings, "BPF programs").remedy
    assert "CAP_BPF" in named(findings, "BPF maps").remedy
    assert "data plane" not in [each.name for each in findings]
    assert not named(findings, "nft").ok


@pytest.mark.parametrize(
    ("dropped", "refused", "allowed"),
    [
        ("-net_raw", "raw socket, protocol 144", "TCP_REPAIR"),
        ("-net_admin", "TCP_REPAIR", "raw socket, protocol 144"),
        ("-bpf,-sys_admin", "BPF programs", "TCP_REPAIR"),
    ],
)
def test_a_single_missing_capability_is_found(host: Host, dropped: str, refused: str, allowed: str) -> None:
    command = ["setpriv", "--bounding-set", dropped, "--inh-caps", dropped, sys.executable, "-c", PROGRAM]
    findings = from_program(host.run(command).stdout)
    capability = f"CAP_{dropped[1:].partition(',')[0].upper()}"
    assert not named(findings, capability).ok
    assert not named(findings, refused).ok
    assert capability in named(findings, refused).remedy
    assert named(findings, allowed).ok


def test_capabilities_beside_those_of_root_suffice_for_a_user(host: Host) -> None:
    """What the remedies recommend to users of systemd: an ordinary user with ambient capabilities."""
    program = UNPRIVILEGED_PROGRAM.replace("os.setuid(int(sys.argv[1]))", "grant_and_leave()").replace(
        "import dataclasses", GRANT_PROGRAM + "import dataclasses"
    )
    findings = from_program(host.run([sys.executable, "-c", program, NOBODY]).stdout)
    for name in ("CAP_NET_ADMIN", "CAP_NET_RAW", "CAP_BPF", "BPF programs", "BPF maps", "TCP_REPAIR"):
        assert named(findings, name).ok, name
    own = named(findings, "our BPF programs")
    assert own.ok or "CAP_PERFMON" in own.remedy


GRANT_PROGRAM = """
def grant_and_leave():
    import ctypes, struct
    libc = ctypes.CDLL(None, use_errno=True)
    keep_capabilities, version_3 = 8, 0x20080522
    assert libc.prctl(keep_capabilities, 1, 0, 0, 0) == 0
    os.setuid(int(sys.argv[1]))
    wanted = 1 << 12 | 1 << 13 | 1 << 39
    header = struct.pack("Ii", version_3, 0)
    low, high = wanted & 0xFFFFFFFF, wanted >> 32
    assert libc.capset(header, struct.pack("6I", low, low, 0, high, high, 0)) == 0

"""


# Each remedy is carried out, and the finding is in order afterwards


def carry_out(host: Host, remedy: str) -> None:
    host.run(shlex.split(remedy.partition(" (")[0]))


@pytest.mark.parametrize(
    ("name", "sysctl", "bad"),
    [
        ("reverse path filter", "net.ipv4.conf.all.rp_filter", "1"),
        ("path MTU probing", "net.ipv4.tcp_mtu_probing", "0"),
    ],
)
def test_sysctl_remedies_help(host: Host, name: str, sysctl: str, bad: str) -> None:
    host.sysctl(sysctl, bad)
    before = named(host.call(tuning_check.check_tuning, Plan()), name)
    assert not before.ok
    assert before.found.startswith(bad)
    carry_out(host, before.remedy)
    assert named(host.call(tuning_check.check_tuning, Plan()), name).ok


@pytest.mark.parametrize(
    "chain",
    [
        "table inet filter { chain input { type filter hook input priority 0; policy drop; }\n}",
        "table ip mine { chain incoming { type filter hook input priority 0; policy drop; "
        "ct state established accept; ip protocol 144 drop; tcp dport 144 accept; }\n}",
    ],
)
def test_a_closed_firewall_is_found_and_its_remedy_lets_our_packets_in(host: Host, chain: str) -> None:
    assert named(host.call(tuning_check.check_tuning, Plan()), "host firewall").ok
    host.run(["nft", "-f", "-"], input=chain)

    def arrives() -> bool:
        with (
            socket.socket(socket.AF_INET, socket.SOCK_RAW, 144) as sender,
            socket.socket(socket.AF_INET, socket.SOCK_RAW, 144) as receiver,
        ):
            receiver.bind(("127.0.0.1", 0))
            receiver.setblocking(False)
            sender.sendto(b"probe", ("127.0.0.1", 0))
            try:
                return receiver.recv(100).endswith(b"probe")
            except BlockingIOError:
                return False

    finding = named(host.call(tuning_check.check_tuning, Plan()), "host firewall")
    assert not finding.ok
    assert not host.call(arrives)
    carry_out(host, finding.remedy)
    assert host.call(arrives)
    assert named(host.call(tuning_check.check_tuning, Plan()), "host firewall").ok


@pytest.mark.parametrize("rule", ["ip protocol { 47, 144 } accept", "meta l4proto 144 counter accept"])
def test_a_firewall_that_lets_our_packets_in_is_left_alone(host: Host, rule: str) -> None:
    chain = f"type filter hook input priority 0; policy drop; {rule};"
    host.run(["nft", "-f", "-"], input=f"table ip filter {{ chain input {{ {chain} }}\n}}")
    assert named(host.call(tuning_check.check_tuning, Plan()), "host firewall").ok


@pytest.mark.parametrize(
    ("route", "ok"),
    [
        ("100.64.0.0/10", False),
        ("100.126.7.0/24", False),
        ("100.127.255.1/32", False),
        ("10.0.0.0/8", True),
        ("100.127.0.0/17", True),
        ("0.0.0.0/1", True),
        ("64.0.0.0/2", True),
    ],
)
def test_addresses_in_use_elsewhere_are_found(host: Host, lab: Lab, route: str, ok: bool) -> None:
    lab.connect(host, "192.0.2.1/24", lab.host("other"), "192.0.2.2/24")
    host.add_route(route, "192.0.2.2")
    finding = named(host.call(check_requirements), "virtual network")
    assert finding.ok is ok
    assert ok or f"{route} on eth0" in finding.found


def test_an_ordinary_user_gets_fewer_large_pipes_and_is_told_which_limit(host: Host) -> None:
    findings = from_program(host.run([sys.executable, "-c", UNPRIVILEGED_PROGRAM, NOBODY]).stdout)
    pipes = named(findings, "pipes")
    soft_pages = int(kernel_probes.read_sysctl("fs.pipe-user-pages-soft") or 0)
    if soft_pages and soft_pages < 65536:
        assert not pipes.ok
        assert pipes.found.endswith(" of 256 pipes of 1 MiB")
        assert pipes.remedy.startswith("sysctl -w fs.pipe-user-pages-soft=65536")


def test_few_descriptors_are_found_and_do_not_break_the_checks(host: Host) -> None:
    command = ["prlimit", "--nofile=64:64", sys.executable, "-c", PROGRAM]
    findings = from_program(host.run(command).stdout)
    assert named(findings, "file descriptors").found == "64 (hard limit 64)"
    assert named(findings, "file descriptors").remedy.startswith("ulimit -n 8712")
    assert not named(findings, "pipes").ok
