"""`serval balance`: live flows are spread over the interfaces of this host, by what they carry."""

from __future__ import annotations

import math

import rich_click as click

from serval_core.commands.migrating import leave_with, show_outcomes
from serval_core.commands.options import json_option
from serval_core.config_file import Misconfigured
from serval_core.number_types import Real
from serval_core.stack_socket import StackSocketClient
from serval_core.tables import Row, new_console, new_table, print_json


@click.command()
@click.argument("interfaces", nargs=-1, required=True, metavar="IF1[=WEIGHT] IF2[=WEIGHT] ...")
@click.option(
    "--measure", "measure_s", type=Real(0.01, 60), default=1.0, metavar="S", help="How long to measure. [default: 1]"
)
@click.option("--dry-run", is_flag=True, help="Measure, and only say what would move.")
@json_option
def balance(interfaces: tuple[str, ...], measure_s: float, dry_run: bool, as_json: bool) -> None:
    """Spread live flows over interfaces by measured load, in proportion to the weights (1 unless given).

    Only flows that are on one of these interfaces take part, and as few as possible move.
    """
    if len(interfaces) < 2:
        raise Misconfigured("balance", f"{interfaces[0]} alone leaves nothing to balance: name at least two interfaces")
    named = [_weighted(each) for each in interfaces]
    twice = next((name for name, _ in named if [each for each, _ in named].count(name) > 1), None)
    if twice is not None:
        raise Misconfigured("balance", f"{twice} is named twice; name each interface once")
    lines: list[Row] = list(
        StackSocketClient().stream(
            "balance",
            interfaces=[name for name, _ in named],
            weights=[weight for _, weight in named],
            measure_s=measure_s,
            dry_run=dry_run,
        )
    )
    loads = [each for each in lines if "interface" in each]
    outcomes = [each for each in lines if "outcome" in each]
    console = new_console()
    if as_json:
        print_json(console, {"interfaces": loads, "flows": outcomes})
    else:
        table = new_table("interface", ">flows", ">Mbit/s", ">flows wanted", ">Mbit/s wanted")
        for each in loads:
            table.add_row(
                str(each["interface"]),
                str(each["flows"]),
                f"{each['bytes_per_s'] * 8 / 1e6:.1f}",
                str(each["flows_wanted"]),
                f"{each['bytes_per_s_wanted'] * 8 / 1e6:.1f}",
            )
        console.print(table)
        if outcomes:
            show_outcomes(outcomes)
    leave_with(outcomes)


def _weighted(text: str) -> tuple[str, float]:
    """The name and weight in `eth0=10`. Raises Misconfigured."""
    name, equals, number = text.partition("=")
    try:
        weight = float(number) if equals else 1.0
    except ValueError:
        raise Misconfigured(text, "has no number as its weight; write it as eth0=10") from None
    if not 0 < weight <= 1e9 or math.isnan(weight):
        raise Misconfigured(text, "is out of range; a weight is more than 0 and at most 1e9 (nearest: 1)")
    return name, weight
