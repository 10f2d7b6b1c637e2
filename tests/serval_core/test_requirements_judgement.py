"""What follows from what the probes have found: values of other machines in, findings out."""

from __future__ import annotations

import errno
import resource
from pathlib import Path

import pytest

from serval_core import kernel_probes, requirements_check, tuning_check
from serval_core.findings import Finding, Plan, Severity


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
