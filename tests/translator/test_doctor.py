"""What `serval-translator doctor` prints and returns, for findings made up here and for this machine."""

from __future__ import annotations

import io
import sys

import pytest
from rich.console import Console

from lab.hosts import Lab
from serval_core.findings import Finding, Severity
from translator import doctor

GOOD = Finding("veth", Severity.REQUIRED, True, "works", "anchors of our sockets")
ADVICE = Finding("packet backlog", Severity.ADVICE, False, "1000", ">= 10000", "sysctl -w net.core.x=10000")
MISSING = Finding("clsact", Severity.REQUIRED, False, "No such file", "our filters", "modprobe sch_ingress")

# The interpreter may be unreadable for others: what the checks import must be loaded before the user changes.
UNPRIVILEGED_PROGRAM = """
import io, os, sys
from rich.console import Console
from translator import doctor
doctor.run(Console(file=io.StringIO()))
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
sys.exit(doctor.run())
"""


def shown(findings: list[Finding]) -> tuple[int, str]:
    output = io.StringIO()
    status = doctor.show(findings, Console(file=output, width=100))
    return status, output.getvalue()


def test_all_in_order_is_said_in_one_sentence() -> None:
    status, output = shown([GOOD])
    assert status == 0
    assert "The translator can run here." in output
    assert "Advice" not in output
    assert "To be able to run" not in output


def test_advice_does_not_fail() -> None:
    status, output = shown([GOOD, ADVICE])
    assert status == 0
    assert "Advice:\n  packet backlog: sysctl -w net.core.x=10000\nThe translator can run here.\n" in output


def test_something_missing_fails_and_names_the_remedy() -> None:
    status, output = shown([GOOD, MISSING, ADVICE])
    assert status == 1
    assert "To be able to run:\n  clsact: modprobe sch_ingress\nAdvice:" in output
    assert output.endswith("The translator cannot run here.\n")


def test_a_remedy_for_several_findings_is_shown_once() -> None:
    other = Finding("ingress", Severity.REQUIRED, False, "", "", MISSING.remedy)
    assert "  clsact, ingress: modprobe sch_ingress\n" in shown([MISSING, other])[1]


def test_texts_with_brackets_are_shown_as_they_are() -> None:
    odd = Finding("a [b]", Severity.ADVICE, False, "[red]c", "[d]", "e [f]")
    output = shown([odd])[1]
    for text in ("a [b]", "[red]c", "[d]", "e [f]"):
        assert text in output


def test_remedies_are_not_broken_into_lines() -> None:
    remedy = "sysctl -w " + "x" * 200
    assert remedy in shown([Finding("long", Severity.ADVICE, False, "", "", remedy)])[1]


def test_a_missing_splice_engine_is_advice() -> None:
    finding = doctor.judge_splice_engine({"translator.splice_ext": "No module named 'translator.splice_ext'"})
    assert (finding.severity, finding.ok) == (Severity.ADVICE, False)
    assert "make setup" in finding.remedy


def test_root_may_run_the_translator_here(lab: Lab) -> None:
    output = io.StringIO()
    status = lab.host("examined").call(doctor.run, Console(file=output, width=200))
    assert status == 0
    assert "splice engine" in output.getvalue()


@pytest.mark.parametrize("capability", ["NET_ADMIN", "NET_RAW", "BPF"])
def test_an_ordinary_user_may_not_and_is_told_why(lab: Lab, capability: str) -> None:
    result = lab.host("examined").run([sys.executable, "-c", UNPRIVILEGED_PROGRAM], check=False)
    assert result.returncode == 1
    assert f"AmbientCapabilities=CAP_{capability} in its systemd unit" in result.stdout
    assert result.stdout.endswith("The translator cannot run here.\n")
