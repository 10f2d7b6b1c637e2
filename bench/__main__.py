"""`make bench`: which contenders, how long, and where do the results go?"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from rich.console import Console
from rich.markup import escape
from rich.status import Status

from bench import lpm, migration, router
from bench.machine import facts
from bench.report import pair_sentences, summarize, table, write_json, write_plot
from bench.run import FAILURES, FULL, QUICK, run

BUSY_SHARE_MAX = 0.1
RESULTS = Path(__file__).parent / "results"

Progress = Callable[[str], None]


class Finding(Protocol):
    """Figures that are not about contenders."""

    def _asdict(self) -> dict[str, Any]: ...

    def sentence(self) -> str:
        """The figures in one line."""


class Other(NamedTuple):
    """A measurement that is not about contenders. `quick` is None when a quick run leaves it out."""

    key: str  # in the JSON
    title: str
    full: Callable[[Progress], Finding]
    quick: Callable[[Progress], Finding] | None


OTHERS = (
    Other(
        "service_table",
        "a large service table",
        full=lambda progress: lpm.measure_apart(lpm.PREFIXES, lpm.LOOKUPS),
        quick=lambda progress: lpm.measure_apart(lpm.QUICK_PREFIXES, lpm.QUICK_LOOKUPS),
    ),
    Other(
        "service_router",
        "a service router",
        full=lambda progress: router.measure(router.ROUNDS, router.SECONDS, progress),
        quick=lambda progress: router.measure(router.QUICK_ROUNDS, router.QUICK_SECONDS, progress),
    ),
    Other(
        "migration",
        "migration",
        full=lambda progress: migration.measure(migration.ROUNDS, migration.MOVES, progress),
        quick=None,
    ),
)


def main() -> int:
    """Measure, report; the exit status is 1 when a measurement failed."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few short rounds: within 3 minutes")
    parser.add_argument(
        "--only", action="append", default=[], metavar="WORD", help="contenders named like this"
    )
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="directory for the JSON and the picture"
    )
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    console = Console(width=None if sys.stdout.isatty() else 200)
    plan = QUICK if arguments.quick else FULL
    machine = facts()
    started = time.monotonic()
    try:
        with console.status("setting up") as status:
            results = run(plan, shown_by(status), arguments.only)
    except PermissionError as error:
        console.print(f"[red]{escape(str(error))}[/]")
        return 1
    others: dict[str, Finding] = {}
    if not arguments.only:
        others = measure_others(arguments.quick, console, results.failures)
    summary = summarize(results)
    console.print(table(summary))
    for line in (*pair_sentences(summary), *(found.sentence() for found in others.values())):
        console.print(line, highlight=False)
    if arguments.quick:
        console.print(f"left out, because quick: {'; '.join(left_out())}")
    for name, why in results.absent.items():
        console.print(f"absent: {name}: {why}")
    if results.idle_busy_share > BUSY_SHARE_MAX:
        console.print(
            f"[yellow]The machine was not idle:[/] others used {results.idle_busy_share:.2f} CPUs before the run. "
            "Do not trust CPU-s/GB, and repeat the run for the other figures."
        )
    for failure, times in Counter(results.failures).items():
        console.print(f"[red]failed[/] ({times} x): {escape(failure)}")
    arguments.results.mkdir(parents=True, exist_ok=True)
    stem = arguments.results / time.strftime("%Y%m%d-%H%M%S")
    figures = {key: found._asdict() for key, found in others.items()}
    write_json(stem.with_suffix(".json"), plan, machine, results, summary, figures)
    write_plot(stem.with_suffix(".png"), summary)
    console.print(f"{time.monotonic() - started:.0f} s; written: {stem}.json, {stem}.png")
    return 1 if results.failures else 0


def measure_others(quick: bool, console: Console, failures: list[str]) -> dict[str, Finding]:
    """What was found, by key in the JSON; appends to `failures` why something was not."""
    found: dict[str, Finding] = {}
    for other in OTHERS:
        measure = other.quick if quick else other.full
        if measure is None:
            continue
        with console.status(other.title) as status:
            try:
                found[other.key] = measure(shown_by(status))
            except FAILURES as error:
                failures.append(f"{other.title}: {error}")
    return found


def shown_by(status: Status) -> Progress:
    """Says on the terminal what is going on."""
    return lambda text: status.update(escape(text))


def left_out() -> list[str]:
    """What a full run measures and a quick one does not."""
    left = [other.title for other in OTHERS if other.quick is None]
    if not QUICK.framings_in_every_stage:
        left.append("single hops and framings native and udp, except in throughput unshaped")
    return left


if __name__ == "__main__":
    sys.exit(main())
