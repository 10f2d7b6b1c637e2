"""What do all demonstrations have in common? A console, findings, how they begin and end, and transfers: watched, and
compared.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from lab.chain import TranslatorProcess, kernel_traces
from lab.hosts import CommandFailed, Host, Lab, remove_leftovers
from lab.waiting import NeverHappened, wait_for

REFRESH_S = 0.05
TRANSFER_TIMEOUT_S = 120
IDLE_TIMEOUT_S = 20.0

console = Console()


@dataclass
class Findings:
    """What a demonstration saw. `problems` is empty if all is as it should be."""

    problems: list[str] = field(default_factory=list)

    def expect(self, holds: bool, problem: str) -> None:
        """Note `problem` unless it holds."""
        if not holds:
            self.problems.append(problem)


Seen = TypeVar("Seen", bound=Findings)


def run(
    findings: Seen, demonstrate: Callable[[Lab, Seen], None], report: Callable[[Seen, float], None]
) -> int:
    """Demonstrate in a lab, report what was seen and in how many seconds, and judge it; the exit status."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    started = time.monotonic()
    try:
        for name in remove_leftovers():
            console.print(f"removed what a killed run had left: {escape(name)}")
        with Lab() as lab:
            demonstrate(lab, findings)
    except (PermissionError, CommandFailed, NeverHappened, subprocess.TimeoutExpired) as error:
        console.print(f"[red]The demonstration could not go on:[/] {escape(str(error))}")
        return 1
    report(findings, time.monotonic() - started)
    for problem in findings.problems:
        console.print(f"[red]not as it should be:[/] {escape(problem)}")
    if findings.problems:
        return 1
    console.print("[green]Everything was as it should be.[/]")
    return 0


def curl(host: Host, *options: Any) -> subprocess.Popen[Any]:
    """A curl, silent unless it fails."""
    return host.popen(["curl", "-sSf", *options], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


@contextmanager
def transfer_progress() -> Iterator[Progress]:
    """Bars for transfers, with their rate."""
    columns = (TextColumn("{task.description:14}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console) as progress:
        yield progress


def watch(progress: Progress, name: str, process: subprocess.Popen[Any], path: Path, size_bytes: int) -> None:
    """Draw how `path` grows until the process ends; CommandFailed if it ended badly."""
    task = progress.add_task(name, total=size_bytes)
    deadline = time.monotonic() + TRANSFER_TIMEOUT_S
    while process.poll() is None:
        if time.monotonic() > deadline:
            raise subprocess.TimeoutExpired(process.args, TRANSFER_TIMEOUT_S)
        progress.update(task, completed=path.stat().st_size if path.exists() else 0)
        time.sleep(REFRESH_S)
    if process.returncode != 0:
        _, errors = process.communicate()
        raise CommandFailed(
            "client", subprocess.CompletedProcess(process.args, process.returncode, "", errors)
        )
    progress.update(task, completed=path.stat().st_size)


class Hashed(NamedTuple):
    """A transfer, with the SHA-256 of what was sent and of what arrived."""

    name: str
    size_bytes: int
    sent: str
    received: str


def hashes_table(what: str, hashed: list[Hashed]) -> Table:
    """One row for each; `what` they are, in the singular."""
    table = Table(
        what, "bytes", "SHA-256 sent", "SHA-256 received", title=f"{what.capitalize()}s, hashed at both ends"
    )
    for name, size_bytes, sent, received in hashed:
        style = "" if sent == received else "red"
        table.add_row(name, f"{size_bytes:,}", sent[:16] + "…", received[:16] + "…", style=style)
    return table


def expect_idle(findings: Findings, name: str, side: TranslatorProcess) -> None:
    """No flow is open soon, none is left in the kernel's flow map."""
    try:
        wait_for(partial(_is_idle, side), "its flows to end", IDLE_TIMEOUT_S)
    except NeverHappened as error:
        findings.expect(False, f"{name}: {error}")


def _is_idle(side: TranslatorProcess) -> bool:
    return not side.flows() and side.ask("counters")["flow_map_entries"] == 0


def end(findings: Findings, name: str, side: TranslatorProcess) -> None:
    """Stop a stack; it has to end well and leave nothing in the kernel."""
    status = side.stop()
    findings.expect(status == 0, f"{name}: ended with {status}\n{side.log()}")
    left = kernel_traces(side.host)
    findings.expect(not left, f"{name}: left in the kernel: {', '.join(left)}")
