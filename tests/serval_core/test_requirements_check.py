"""The checks for real: what root finds here, what an ordinary user is told, and that remedies help."""

from __future__ import annotations

import errno
import json
import os
import resource
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lab.hosts import Host, Lab
from serval_core import kernel_probes, requirements_check, tuning_check
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
        return (
            sorted(os.listdir("/proc/self/fd")),
            host.run(["ip", "-j", "link"]).stdout,
            host.run(["nft", "list", "ruleset"]).stdout,
            host.run(["ip", "-j", "route", "show", "table", "all"]).stdout,
            sorted(os.listdir("/run/netns")),
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


# Judgement alone


def test_a_package_without_bpf_programs_is_found(tmp_path: Path) -> None:
    assert requirements_check.judge_bpf_objects(tmp_path).found == f"none in {tmp_path}"
    (tmp_path / "one.bpf.c").touch()
    (tmp_path / "two.bpf.c").touch()
    (tmp_path / "one.bpf.o").touch()
    finding = requirements_check.judge_bpf_objects(tmp_path)
    assert (finding.ok, finding.found) == (False, "not compiled: two.bpf")
    assert finding.remedy.startswith("build it again: make setup")
    (tmp_path / "two.bpf.o").touch()
    assert requirements_check.judge_bpf_objects(tmp_path) == Finding(
        "compiled BPF programs", Severity.REQUIRED, True, "one.bpf, two.bpf", "data plane"
    )


def test_an_extension_that_cannot_be_imported_is_named() -> None:
    errors = requirements_check.import_errors(["serval_core.dataplane.no_such", "json"])
    finding = requirements_check.judge_extensions(errors)
    assert not finding.ok
    assert finding.found.startswith("serval_core.dataplane.no_such: No module named")


def test_a_long_error_is_shown_by_its_ends() -> None:
    error = "load serval.bpf.o: Permission denied.\n" + "150: (63) ...\n" * 500 + "invalid read from stack"
    finding = requirements_check.judge_verifier(error, {"CAP_BPF"})
    assert finding.found.startswith("load serval.bpf.o: Permission denied. 150:")
    assert finding.found.endswith("invalid read from stack")
    assert len(finding.found) < 400
    assert "CAP_PERFMON" in finding.remedy
    assert "kernel" in requirements_check.judge_verifier(error, {"CAP_BPF", "CAP_PERFMON"}).remedy


@pytest.mark.parametrize(("version", "ok"), [("1.1", True), ("2.0.3", True), ("0.8", False), ("0", False)])
def test_old_libbpf_is_refused(version: str, ok: bool) -> None:
    assert requirements_check.judge_libbpf(version).ok is ok


def test_locked_memory_and_missing_privilege_are_told_apart() -> None:
    assert requirements_check.judge_bpf_map(0, errno.EPERM).remedy.startswith("ulimit -l")
    assert "CAP_BPF" in requirements_check.judge_bpf_map(errno.EPERM, errno.EPERM).remedy
    assert requirements_check.judge_bpf_map(0, 0).ok


def test_what_could_not_be_tried_is_advice_and_what_crashed_is_not() -> None:
    (finding,) = requirements_check.judge_namespace({"namespace": errno.EPERM})
    assert (finding.severity, finding.ok) == (Severity.ADVICE, False)
    assert finding.found == "not tried: Operation not permitted"
    (finding,) = requirements_check.judge_namespace({"crashed": "the probe ended with wait status 11"})
    assert (finding.severity, finding.ok) == (Severity.REQUIRED, False)


def test_a_kernel_without_veth_is_told_apart_from_a_missing_privilege() -> None:
    results: dict[str, int | str] = {"namespace": 0, "clsact": kernel_probes.NOT_TRIED}
    (finding,) = requirements_check.judge_namespace(results | {"veth": errno.EOPNOTSUPP})
    assert finding.remedy == "modprobe veth, or use a kernel with CONFIG_VETH"
    (finding,) = requirements_check.judge_namespace(results | {"veth": errno.EPERM})
    assert "CAP_NET_ADMIN" in finding.remedy


@pytest.mark.parametrize(
    ("default", "queueing", "code", "ok"),
    [
        ("cubic", "pfifo_fast", 0, True),
        ("bbr", "fq", 0, True),
        ("bbr", "fq_codel", 0, False),
        ("bbr", None, 0, False),
        ("cubic", "fq", errno.ENOENT, False),
        ("cubic", "fq", errno.EPERM, False),
    ],
)
def test_bbr_needs_fq(default: str, queueing: str | None, code: int, ok: bool) -> None:
    assert tuning_check.judge_congestion_control("cubic", code, default, queueing).ok is ok


@pytest.mark.parametrize(
    ("finding", "ok"),
    [
        (tuning_check.judge_backlog("1000"), False),
        (tuning_check.judge_backlog("10000"), True),
        (tuning_check.judge_backlog(None), True),
        (tuning_check.judge_jit("0"), False),
        (tuning_check.judge_jit("1"), True),
        (tuning_check.judge_btf(False), False),
        (tuning_check.judge_pipe_size(Plan(), "65536"), False),
        (tuning_check.judge_pipe_size(Plan(), "1048576"), True),
        (tuning_check.judge_pipes(Plan(), 255), False),
        (tuning_check.judge_pipes(Plan(), 256), True),
        (tuning_check.judge_descriptors(Plan(), 1024, 524288), False),
        (tuning_check.judge_descriptors(Plan(connections=100, busy_pairs=10), 1024, 1024), True),
        (tuning_check.judge_descriptors(Plan(), resource.RLIM_INFINITY, resource.RLIM_INFINITY), True),
        (tuning_check.judge_nft(None, ""), False),
        (tuning_check.judge_conntrack(True, "0", nft=False), False),
        (tuning_check.judge_conntrack(True, "0", nft=True), True),
        (tuning_check.judge_conntrack(True, "1", nft=False), True),
        (tuning_check.judge_conntrack(False, None, nft=False), True),
    ],
    ids=lambda value: value.name if isinstance(value, Finding) else str(value),
)
def test_judgement_of_single_values(finding: Finding, ok: bool) -> None:
    assert finding.ok is ok
    assert bool(finding.remedy) != ok


# Probes that go wrong


def test_a_probe_that_crashes_is_an_answer() -> None:
    def crash() -> dict[str, int | str]:
        os.kill(os.getpid(), signal.SIGKILL)
        return {}

    how = f"the probe ended with wait status {signal.SIGKILL.value}"
    assert kernel_probes._in_child(crash) == {"crashed": how}


def test_a_probe_that_raises_is_an_answer() -> None:
    answer = kernel_probes._in_child(lambda: {"veth": 1 // 0})
    assert "ZeroDivisionError" in str(answer["crashed"])


def test_a_probe_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_probes, "CHILD_TIMEOUT_S", 0.05)

    def hang() -> dict[str, int | str]:
        while True:
            signal.pause()

    assert kernel_probes._in_child(hang) == {"crashed": "the probe did not end within 0.05 s"}


def test_pipes_are_counted_up_to_what_there_is() -> None:
    assert kernel_probes.count_pipes(3, 1 << 16) == 3
    limit = subprocess.run(
        ["prlimit", "--nofile=64:64", sys.executable, "-c", COUNT_PROGRAM],
        check=True,
        capture_output=True,
        text=True,
    )
    got, open_after = map(int, limit.stdout.split())
    assert 20 <= got <= 31
    assert open_after < 10


COUNT_PROGRAM = """
import os
from serval_core.kernel_probes import count_pipes
print(count_pipes(1000, 65536), len(os.listdir("/proc/self/fd")))
"""


def test_a_congestion_control_that_does_not_exist_is_refused() -> None:
    assert kernel_probes.try_congestion_control("no-such") == errno.ENOENT
