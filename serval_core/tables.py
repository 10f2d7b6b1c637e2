"""How is what a stack says shown to people and to programs? Tables by rich, or JSON. Knows no request."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

Row = Mapping[str, Any]

_UNITS = ("B", "kB", "MB", "GB", "TB")
# How wide a table may be that goes to a file or another program.
FILE_WIDTH = 200


def new_console() -> Console:
    """As wide as the terminal, or wide enough when there is none."""
    console = Console()
    return console if console.is_terminal else Console(width=FILE_WIDTH)


def print_json(console: Console, value: object) -> None:
    """Not through rich, which would break long lines."""
    console.file.write(json.dumps(value, indent=2) + "\n")


def bytes_text(count: int) -> str:
    """`count` bytes in three digits and a decimal unit."""
    amount, unit = float(count), 0
    while amount >= 999.5 and unit < len(_UNITS) - 1:
        amount, unit = amount / 1000, unit + 1
    return f"{count} B" if unit == 0 else f"{amount:.3g} {_UNITS[unit]}"


def new_table(*columns: str) -> Table:
    """A table with these headings; a leading ">" aligns a column to the right."""
    table = Table(box=SIMPLE_HEAD)
    for column in columns:
        table.add_column(
            column.lstrip(">"), justify="right" if column[:1] == ">" else "left", overflow="fold"
        )
    return table


def any_table(rows: Sequence[Row]) -> Table:
    """A table of rows whose keys are the headings."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    numbers = {key for key in keys if all(isinstance(row.get(key, 0), (int, float)) for row in rows)}
    table = new_table(*(f"{'>' if key in numbers else ''}{key.replace('_', ' ')}" for key in keys))
    for row in rows:
        table.add_row(*(_cell(row.get(key)) for key in keys))
    return table


def flow_table(flows: Sequence[Row]) -> Table:
    """The flows of a stack; with what a translator or a native program has to do with them, where there is one."""
    table = new_table(
        "flow", "state", "service", "Serval peer", "own address", "framing", "local end", ">bytes to / from service", ">round trip"
    )
    for flow in flows:
        round_trip_s = flow.get("round_trip_s")
        table.add_row(
            str(flow["flow_id"]),
            escape(_flow_state(flow)),
            escape(str(flow["service"])),
            str(flow["peer_address"]),
            str(flow.get("local_address", "")),
            str(flow.get("framing", "")),
            escape(_local_end(flow)),
            _flow_bytes(flow),
            f"{round_trip_s * 1000:.2f} ms" if round_trip_s else "",
        )
    return table


def _flow_state(flow: Row) -> str:
    """The connection's state, with that of a migration under way."""
    migration = flow.get("migration", "INITIAL")
    return str(flow["state"]) if migration == "INITIAL" else f"{flow['state']}, {migration}"


def _local_end(flow: Row) -> str:
    if "legacy" in flow:
        return str(flow["legacy"])
    return f"pid {flow['pid']} (uid {flow['uid']})" if "pid" in flow else ""


def _flow_bytes(flow: Row) -> str:
    """What a translator counted (of the streams), or else what is counted of the packets."""
    if "bytes_to_service" in flow:
        return f"{bytes_text(flow['bytes_to_service'])} / {bytes_text(flow['bytes_from_service'])}"
    if "bytes_out" not in flow:
        return ""
    there, back = ("bytes_in", "bytes_out") if flow.get("role") == "passive" else ("bytes_out", "bytes_in")
    return f"{bytes_text(flow[there])} / {bytes_text(flow[back])}"


def service_table(entries: Sequence[Row]) -> Table:
    """The service table of a stack."""
    table = new_table(
        "service", "rule", "target", "origin", ">priority", ">weight", "timeouts", ">packets resolved", ">dropped"
    )
    for entry in entries:
        for index, target in enumerate(entry["targets"]):
            table.add_row(
                escape(str(entry["prefix"])) if index == 0 else "",
                str(target["type"]),
                escape(target_text(target)),
                str(target.get("origin") or ""),
                str(target["priority"]),
                str(target["weight"]),
                _timeouts_text(target),
                str(target["packets_resolved"]),
                str(target["packets_dropped"]),
            )
    return table


def target_text(target: Row) -> str:
    """Where a rule leads."""
    if target["type"] == "DEMUX":
        return f"listener {target['listener_id']}"
    if target["type"] != "FORWARD":
        return ""
    where = f" on interface {target['interface_index']}" if target.get("interface_index") else ""
    down = f" (down: {target['down']})" if target.get("down") else ""
    return f"{'broadcast ' if target.get('broadcast') else ''}{target['address']}{where}{down}"


def _timeouts_text(target: Row) -> str:
    given = (("idle", target.get("idle_timeout_s")), ("hard", target.get("hard_timeout_s")))
    return ", ".join(f"{name} {seconds:g} s" for name, seconds in given if seconds)


def counter_table(rows: Sequence[Row]) -> Table:
    """Rows of "counter" and "value"."""
    table = new_table("counter", ">value")
    for row in rows:
        table.add_row(escape(row["counter"]), f"{row['value']:,}")
    return table


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}" if abs(value) < 1e9 else f"{value:.3f}"
    if isinstance(value, (dict, list)):
        return escape(json.dumps(value))
    return escape(str(value))
