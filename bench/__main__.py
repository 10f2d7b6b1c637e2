"""`make bench`: which contenders, how long, and where do the results go?"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from bench import lpm, migration, router
from bench.machine import facts
from bench.report import summarize, table, write_json, write_plot
from bench.run import FAILURES, FULL, QUICK, run

BUSY_SHARE_MAX = 0.1
RESULTS = Path(__file__).parent / "results"


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
            results = run(plan, lambda text: status.update(escape(text)), arguments.only)
    except PermissionError as error:
        console.print(f"[red]{escape(str(error))}[/]")
        return 1
    others: dict[str, object] = {}
    if not arguments.only:
        with console.status("a service table with a million prefixes"):
            try:
                large = lpm.measure_apart(lookups=lpm.QUICK_LOOKUPS if arguments.quick else lpm.LOOKUPS)
            except RuntimeError as error:
                results.failures.append(str(error))
            else:
                others["service_table"] = large._asdict()
        with console.status("a service router") as status:
            rounds, seconds = (
                (router.QUICK_ROUNDS, router.QUICK_SECONDS)
                if arguments.quick
                else (router.ROUNDS, router.SECONDS)
            )
            try:
                routing = router.measure(rounds, seconds, lambda text: status.update(escape(text)))
            except FAILURES as error:
                results.failures.append(str(error))
            else:
                others["service_router"] = routing._asdict()
        with console.status("migration") as status:
            rounds, moves = (
                (migration.QUICK_ROUNDS, migration.QUICK_MOVES)
                if arguments.quick
                else (migration.ROUNDS, migration.MOVES)
            )
            try:
                gaps = migration.measure(rounds, moves, lambda text: status.update(escape(text)))
            except FAILURES as error:
                results.failures.append(str(error))
            else:
                others["migration"] = gaps._asdict()
    summary = summarize(results)
    console.print(table(summary))
    if "service_table" in others:
        console.print(lpm.sentence(large))
    if "service_router" in others:
        console.print(router.sentence(routing))
    if "migration" in others:
        console.print(migration.sentence(gaps))
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
    write_json(stem.with_suffix(".json"), plan, machine, results, summary, others)
    write_plot(stem.with_suffix(".png"), summary)
    console.print(f"{time.monotonic() - started:.0f} s; written: {stem}.json, {stem}.png")
    return 1 if results.failures else 0


if __name__ == "__main__":
    sys.exit(main())
