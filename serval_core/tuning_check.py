"""What would make the stack faster on this machine, or let it carry more? Nothing here keeps it from running.

Works like `requirements_check`: `check_tuning` looks, the `judge_...` functions judge.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
from collections.abc import Sequence
from typing import Any

from serval_core import kernel_probes
from serval_core.findings import Finding, Plan, Severity, grant
from serval_core.wire.sal import PROTOCOL_SAL

BACKLOG_ADVISED = 10_000
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
# What a process needs besides its connections and pipes: the stack's own sockets, maps, logs.
OTHER_DESCRIPTORS = 200
# How `nft -j` writes `ip protocol` and `meta l4proto`.
PROTOCOL_FIELDS = ({"payload": {"protocol": "ip", "field": "protocol"}}, {"meta": {"key": "l4proto"}})


def check_tuning(plan: Plan) -> list[Finding]:
    """Look at settings and limits as the calling process sees them."""
    return [
        judge_btf(os.access("/sys/kernel/btf/vmlinux", os.R_OK)),
        judge_jit(kernel_probes.read_sysctl("net.core.bpf_jit_enable")),
        judge_congestion_control(
            plan.congestion_control,
            kernel_probes.try_congestion_control(plan.congestion_control),
            kernel_probes.read_sysctl("net.ipv4.tcp_congestion_control"),
            kernel_probes.read_sysctl("net.core.default_qdisc"),
        ),
        judge_backlog(kernel_probes.read_sysctl("net.core.netdev_max_backlog")),
        judge_pipes(plan, kernel_probes.count_pipes(2 * plan.busy_pairs, plan.pipe_bytes)),
        judge_pipe_size(plan, kernel_probes.read_sysctl("fs.pipe-max-size")),
        judge_descriptors(plan, *resource.getrlimit(resource.RLIMIT_NOFILE)),
        judge_rp_filter(kernel_probes.read_sysctl("net.ipv4.conf.all.rp_filter")),
        judge_mtu_probing(kernel_probes.read_sysctl("net.ipv4.tcp_mtu_probing")),
        *_check_firewall(),
    ]


def judge_btf(there: bool) -> Finding:
    """Kernel type information; only tools such as bpftool need it for our programs."""
    remedy = "" if there else "use a kernel with CONFIG_DEBUG_INFO_BTF=y (Debian's have it)"
    found = "there" if there else "missing"
    return Finding("BTF", Severity.ADVICE, there, found, "readable dumps with bpftool", remedy)


def judge_jit(value: str | None) -> Finding:
    """net.core.bpf_jit_enable; kernels built with BPF_JIT_ALWAYS_ON show 1."""
    ok = value != "0"
    remedy = "" if ok else "sysctl -w net.core.bpf_jit_enable=1"
    return Finding("BPF compiler", Severity.ADVICE, ok, _shown(value), "net.core.bpf_jit_enable = 1", remedy)


def judge_congestion_control(ours: str, code: int, default: str | None, queueing: str | None) -> Finding:
    """`code`: errno of choosing `ours` for a socket; `default`, `queueing`: what the host uses.
    BBR wants fq to pace its packets; without it connections are slower and cost more CPU time.
    """
    name, needed = "congestion control", f"{ours} for our sockets; no bbr without fq for the others"
    if code:
        found = f"{ours}: {os.strerror(code)}"
        remedy = grant("CAP_NET_ADMIN") if code == errno.EPERM else f"modprobe tcp_{ours}"
        return Finding(name, Severity.ADVICE, False, found, needed, remedy)
    if default == "bbr" and queueing != "fq":
        found = f"bbr with {queueing or 'an unknown queueing discipline'}"
        remedy = "sysctl -w net.ipv4.tcp_congestion_control=cubic (or net.core.default_qdisc=fq)"
        return Finding(name, Severity.ADVICE, False, found, needed, remedy)
    found = f"{ours} for our sockets, {_shown(default)} for others"
    return Finding(name, Severity.ADVICE, True, found, needed)


def judge_backlog(value: str | None) -> Finding:
    """Each veth hop queues packets per CPU; overflow is silent loss."""
    ok = value is None or int(value) >= BACKLOG_ADVISED
    remedy = "" if ok else f"sysctl -w net.core.netdev_max_backlog={BACKLOG_ADVISED}"
    needed = f"net.core.netdev_max_backlog >= {BACKLOG_ADVISED}"
    return Finding("packet backlog", Severity.ADVICE, ok, _shown(value), needed, remedy)


def judge_pipes(plan: Plan, got: int) -> Finding:
    """`got`: how many of the pipes for `plan.busy_pairs` there were at full size."""
    wanted = 2 * plan.busy_pairs
    ok = got >= wanted
    pages = wanted * plan.pipe_bytes // PAGE_BYTES
    remedy = "" if ok else f"sysctl -w fs.pipe-user-pages-soft={pages} (or run as root)"
    found = f"{got} of {wanted} pipes of {_size_text(plan.pipe_bytes)}"
    needed = f"{plan.busy_pairs} pairs relaying at once; smaller pipes are used otherwise"
    return Finding("pipes", Severity.ADVICE, ok, found, needed, remedy)


def judge_pipe_size(plan: Plan, value: str | None) -> Finding:
    """fs.pipe-max-size binds those without CAP_SYS_RESOURCE."""
    ok = value is None or int(value) >= plan.pipe_bytes
    remedy = "" if ok else f"sysctl -w fs.pipe-max-size={plan.pipe_bytes}"
    found = _shown(value if value is None else _size_text(int(value)))
    needed = f"fs.pipe-max-size of {_size_text(plan.pipe_bytes)}"
    return Finding("pipe size", Severity.ADVICE, ok, found, needed, remedy)


def judge_descriptors(plan: Plan, soft: int, hard: int) -> Finding:
    """RLIMIT_NOFILE, -1 for unlimited: two sockets per connection, two ends per pipe, and some."""
    wanted = 2 * plan.connections + 4 * plan.busy_pairs + OTHER_DESCRIPTORS
    ok = soft == resource.RLIM_INFINITY or soft >= wanted
    found = f"{_limit_text(soft)} (hard limit {_limit_text(hard)})"
    remedy = "" if ok else f"ulimit -n {wanted} (LimitNOFILE={wanted} in the systemd unit)"
    needed = f"{wanted} for {plan.connections} connections"
    return Finding("file descriptors", Severity.ADVICE, ok, found, needed, remedy)


def judge_rp_filter(value: str | None) -> Finding:
    """The larger of this and the interface's value applies; 1 drops what arrives on another interface."""
    ok = value != "1"
    remedy = "" if ok else "sysctl -w net.ipv4.conf.all.rp_filter=2"
    needed = "net.ipv4.conf.all.rp_filter 0 or 2, for hosts with several interfaces"
    return Finding("reverse path filter", Severity.ADVICE, ok, _shown(value), needed, remedy)


def judge_mtu_probing(value: str | None) -> Finding:
    """Finds the path MTU where the ICMP messages about it are filtered."""
    ok = value is None or value in ("1", "2")
    remedy = "" if ok else "sysctl -w net.ipv4.tcp_mtu_probing=1"
    needed = "net.ipv4.tcp_mtu_probing = 1, against black holes"
    return Finding("path MTU probing", Severity.ADVICE, ok, _shown(value), needed, remedy)


def _check_firewall() -> list[Finding]:
    tracking = kernel_probes.read_sysctl("net.netfilter.nf_conntrack_max") is not None
    loose = kernel_probes.read_sysctl("net.netfilter.nf_conntrack_tcp_loose")
    command = shutil.which("nft", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if command is None:
        return [judge_nft(None, ""), judge_conntrack(tracking, loose, False)]
    result = subprocess.run(
        [command, "-j", "list", "ruleset"],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    works = result.returncode == 0
    findings = [
        judge_nft(result.returncode, result.stderr.strip().partition("\n")[0]),
        judge_conntrack(tracking, loose, works),
    ]
    return [*findings, judge_input_policy(json.loads(result.stdout)["nftables"])] if works else findings


def judge_nft(status: int | None, message: str) -> Finding:
    """`status`: exit status of `nft list ruleset`, None when there is no nft."""
    name, needed = "nft", "keeps our packets out of connection tracking"
    if status is None:
        return Finding(name, Severity.ADVICE, False, "not installed", needed, "apt-get install nftables")
    if status:
        found = message or f"ends with status {status}"
        return Finding(name, Severity.ADVICE, False, found, needed, grant("CAP_NET_ADMIN"))
    return Finding(name, Severity.ADVICE, True, "works", needed)


def judge_conntrack(tracking: bool, loose: str | None, nft: bool) -> Finding:
    """Conntrack sees no SYN of ours: harmless where we can exempt our packets, or if it is loose."""
    ok = not tracking or nft or loose != "0"
    found = "not in use" if not tracking else "in use" + (", strict about TCP" if loose == "0" else "")
    remedy = "" if ok else "apt-get install nftables (or sysctl -w net.netfilter.nf_conntrack_tcp_loose=1)"
    return Finding("connection tracking", Severity.ADVICE, ok, found, "our packets can bypass it", remedy)


def judge_input_policy(ruleset: Sequence[dict[str, Any]]) -> Finding:
    """`ruleset`: the list of `nft -j list ruleset`. A chain that drops by default must name our protocol."""
    dropping = [
        item["chain"]
        for item in ruleset
        if item.get("chain", {}).get("hook") == "input"
        and item["chain"].get("policy") == "drop"
        and item["chain"]["family"] in ("ip", "inet")
    ]
    rules = [item["rule"] for item in ruleset if "rule" in item]
    closed = [chain for chain in dropping if not any(_admits(rule, chain) for rule in rules)]
    name, needed = "host firewall", f"lets IP protocol {PROTOCOL_SAL} in"
    if not closed:
        return Finding(name, Severity.ADVICE, True, "no chain drops it by default", needed)
    where = " ".join((closed[0]["family"], closed[0]["table"], closed[0]["name"]))
    remedy = f"nft insert rule {where} meta l4proto {PROTOCOL_SAL} accept"
    return Finding(name, Severity.ADVICE, False, f"chain {where} drops by default", needed, remedy)


def _admits(rule: dict[str, Any], chain: dict[str, Any]) -> bool:
    if (rule["family"], rule["table"], rule["chain"]) != (chain["family"], chain["table"], chain["name"]):
        return False
    accepts = any("accept" in expression for expression in rule["expr"])
    return accepts and any(_matches_protocol(expression.get("match")) for expression in rule["expr"])


def _matches_protocol(match: dict[str, Any] | None) -> bool:
    """Whether a match names protocol 144, alone or in a set."""
    if match is None or match["left"] not in PROTOCOL_FIELDS:
        return False
    right = match["right"]
    values = right.get("set", []) if isinstance(right, dict) else [right]
    return PROTOCOL_SAL in values or str(PROTOCOL_SAL) in values


def _shown(value: str | None) -> str:
    return "not visible in this network namespace" if value is None else value


def _size_text(size_bytes: int) -> str:
    return f"{size_bytes >> 20} MiB" if size_bytes >= 1 << 20 else f"{size_bytes >> 10} KiB"


def _limit_text(limit: int) -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else str(limit)
