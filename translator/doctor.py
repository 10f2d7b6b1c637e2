"""What does this machine lack for `serval-translator`, shown as a table?

What is looked at is `serval_core.requirements_check`'s business; this file adds the translator's own part and
prints.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from serval_core.findings import REBUILD, Finding, Plan, Severity
from serval_core.requirements_check import check_requirements, import_errors

MARKS = {
    (Severity.REQUIRED, True): "[green]ok[/green]",
    (Severity.ADVICE, True): "[green]ok[/green]",
    (Severity.REQUIRED, False): "[bold red]missing[/bold red]",
    (Severity.ADVICE, False): "[yellow]advice[/yellow]",
}


def run(console: Console | None = None, plan: Plan | None = None) -> int:
    """Probe this machine in the current network namespace and print findings. 0: we can run, else 1."""
    findings = [*check_requirements(plan), judge_splice_engine(import_errors(["translator.splice_ext"]))]
    return show(findings, console or Console())


def judge_splice_engine(errors: dict[str, str]) -> Finding:
    """`errors`: why the compiled engine cannot be imported, if it cannot; there is a substitute in Python."""
    found = "; ".join(errors.values()) or "compiled"
    needed = "compiled: the substitute in Python is several times slower"
    remedy = REBUILD if errors else ""
    return Finding("splice engine", Severity.ADVICE, not errors, found, needed, remedy)


def show(findings: Sequence[Finding], console: Console) -> int:
    """Print findings, then what to do about those that are not in order. Returns the exit status of `run`."""
    table = Table(box=SIMPLE_HEAD)
    for heading in ("", "what", "found", "needed"):
        table.add_column(heading, overflow="fold")
    for finding in findings:
        mark = MARKS[finding.severity, finding.ok]
        table.add_row(mark, *map(escape, (finding.name, finding.found, finding.needed)))
    console.print(table)
    missing = [each for each in findings if each.severity is Severity.REQUIRED and not each.ok]
    advised = [each for each in findings if each.severity is Severity.ADVICE and not each.ok]
    _show_remedies(missing, "To be able to run:", console)
    _show_remedies(advised, "Advice:", console)
    if missing:
        console.print("[bold red]The translator cannot run here.[/bold red]")
        return 1
    console.print("[green]The translator can run here.[/green]")
    return 0


def _show_remedies(findings: Sequence[Finding], heading: str, console: Console) -> None:
    """One line per remedy, after the names of all that it helps."""
    names_by_remedy: dict[str, list[str]] = {}
    for finding in findings:
        names_by_remedy.setdefault(finding.remedy, []).append(finding.name)
    if names_by_remedy:
        console.print(heading)
    for remedy, names in names_by_remedy.items():
        line = f"  [bold]{escape(', '.join(names))}[/bold]: {escape(remedy)}"
        console.print(line, highlight=False, soft_wrap=True)
