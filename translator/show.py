"""What does a running stack have to say? `serval-translator show flows|services|maps|counters`: tables or JSON."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from serval_core.stack_socket import RequestFailed, StackSocketClient

Row = Mapping[str, Any]

_UNITS = ("B", "kB", "MB", "GB", "TB")
_ENDS = {
    "finished": "finished",
    "reset": "reset",
    "timed_out": "timed out",
    "refused": "refused",
    "gave_up": "gave up",
}
# How wide a table may be that goes to a file or another program.
FILE_WIDTH = 200


def show(
    what: str, *, as_json: bool, client: StackSocketClient | None = None, console: Console | None = None
) -> None:
    """Print flows, services, maps or counters. Raises StackNotRunning or RequestFailed."""
    client = client or StackSocketClient()
    console = console or new_console()
    rows = _FETCH[what](client)
    if as_json:
        # Not through rich, which would break long lines.
        console.file.write(json.dumps(rows, indent=2) + "\n")
        return
    if not rows:
        console.print(f"no {what}")
        return
    console.print(_RENDER[what](rows))


def new_console() -> Console:
    """As wide as the terminal, or wide enough when there is none."""
    console = Console()
    return console if console.is_terminal else Console(width=FILE_WIDTH)


def fetch_flows(client: StackSocketClient) -> list[dict[str, Any]]:
    """The stack's flows, each with what the translator knows of its pair."""
    flows: list[dict[str, Any]] = client.request("flows")
    try:
        pairs = {pair["flow_id"]: pair for pair in client.request("pairs")}
    except RequestFailed:  # another program's stack: it has flows but no translator
        pairs = {}
    return [{**flow, **pairs.get(flow["flow_id"], {})} for flow in flows]


def bytes_text(count: int) -> str:
    """`count` bytes in three digits and a decimal unit."""
    amount, unit = float(count), 0
    while amount >= 999.5 and unit < len(_UNITS) - 1:
        amount, unit = amount / 1000, unit + 1
    return f"{count} B" if unit == 0 else f"{amount:.3g} {_UNITS[unit]}"


def _flow_table(flows: Sequence[Row]) -> Table:
    table = _table(
        "flow", "state", "service", "Serval peer", "legacy end", ">bytes to / from service", ">round trip"
    )
    for flow in flows:
        round_trip_s = flow.get("round_trip_s")
        table.add_row(
            str(flow["flow_id"]),
            escape(str(flow["state"])),
            escape(str(flow["service"])),
            str(flow["peer_address"]),
            escape(str(flow.get("legacy", ""))),
            _both_bytes(flow) if "bytes_to_service" in flow else "",
            f"{round_trip_s * 1000:.2f} ms" if round_trip_s else "",
        )
    return table


def _service_table(entries: Sequence[Row]) -> Table:
    table = _table("service", "rule", "target", ">priority", ">weight", ">packets resolved", ">dropped")
    for entry in entries:
        for index, target in enumerate(entry["targets"]):
            table.add_row(
                escape(str(entry["prefix"])) if index == 0 else "",
                str(target["type"]),
                escape(_target_text(target)),
                str(target["priority"]),
                str(target["weight"]),
                str(target["packets_resolved"]),
                str(target["packets_dropped"]),
            )
    return table


def _target_text(target: Row) -> str:
    if target["type"] == "DEMUX":
        return f"listener {target['listener_id']}"
    if target["type"] == "DROP":
        return ""
    where = f" on interface {target['interface_index']}" if target.get("interface_index") else ""
    return f"{'broadcast ' if target.get('broadcast') else ''}{target['address']}{where}"


def _map_table(maps: Sequence[Row]) -> Table:
    table = _table("", "from", "to", ">clients now", ">in all", "ended", ">bytes to / from service")
    for each in maps:
        avoided = [target["target"] for target in each["targets"] if target["avoided"]]
        ends = [f"{each[key]} {words}" for key, words in _ENDS.items() if each[key]]
        table.add_row(
            str(each["direction"]),
            escape(str(each["listen"]) + (" (removed)" if each["removed"] else "")),
            escape(str(each["service"]) + (f" (down: {', '.join(avoided)})" if avoided else "")),
            str(each["active"]),
            str(each["connections"]),
            ", ".join(ends),
            _both_bytes(each),
        )
    return table


def _both_bytes(row: Row) -> str:
    return f"{bytes_text(row['bytes_to_service'])} / {bytes_text(row['bytes_from_service'])}"


def _table(*columns: str) -> Table:
    """A table with these headings; a leading ">" aligns a column to the right."""
    table = Table(box=SIMPLE_HEAD)
    for column in columns:
        table.add_column(
            column.lstrip(">"), justify="right" if column[:1] == ">" else "left", overflow="fold"
        )
    return table


def fetch_counters(client: StackSocketClient) -> list[dict[str, Any]]:
    """What was counted since the start, zeros left out: packets dropped by reason, refusals of the kernel, flows.

    Those of the translator itself begin with "translator_".
    """
    counted: dict[str, int] = client.request("counters")
    with contextlib.suppress(RequestFailed):  # another program's stack
        own: dict[str, int] = client.request("translator_counters")
        counted |= {f"translator_{name}": value for name, value in own.items()}
    return [{"counter": name, "value": value} for name, value in sorted(counted.items()) if value]


def _counter_table(rows: Sequence[Row]) -> Table:
    table = Table(box=SIMPLE_HEAD)
    table.add_column("counter")
    table.add_column("value", justify="right")
    for row in rows:
        table.add_row(escape(row["counter"]), f"{row['value']:,}")
    return table


_FETCH: dict[str, Callable[[StackSocketClient], list[dict[str, Any]]]] = {
    "flows": fetch_flows,
    "services": lambda client: list(client.request("services")),
    "maps": lambda client: list(client.request("maps")),
    "counters": fetch_counters,
}
_RENDER: dict[str, Callable[[Sequence[Row]], Table]] = {
    "flows": _flow_table,
    "services": _service_table,
    "maps": _map_table,
    "counters": _counter_table,
}
TOPICS = tuple(_FETCH)
