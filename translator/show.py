"""What does a running stack have to say? `serval-translator show flows|services|maps|counters`: tables or JSON."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from serval_core.commands.watching import fetch_flows
from serval_core.stack_socket import RequestFailed, StackSocketClient
from serval_core.tables import (
    Row,
    bytes_text,
    counter_table,
    flow_table,
    new_console,
    new_table,
    print_json,
    service_table,
)

_ENDS = {
    "finished": "finished",
    "reset": "reset",
    "timed_out": "timed out",
    "refused": "refused",
    "gave_up": "gave up",
}


def show(
    what: str, *, as_json: bool, client: StackSocketClient | None = None, console: Console | None = None
) -> None:
    """Print flows, services, maps or counters. Raises StackNotRunning or RequestFailed."""
    client = client or StackSocketClient()
    console = console or new_console()
    rows = _FETCH[what](client)
    if as_json:
        print_json(console, rows)
        return
    if not rows:
        console.print(f"no {what}")
        return
    console.print(_RENDER[what](rows))


def _map_table(maps: Sequence[Row]) -> Table:
    table = new_table(
        "", "from", "to", "health", ">clients now", ">in all", "ended", ">bytes to / from service"
    )
    for each in maps:
        ends = [f"{each[key]} {words}" for key, words in _ENDS.items() if each[key]]
        table.add_row(
            str(each["direction"]),
            escape(str(each["listen"]) + (" (removed)" if each["removed"] else "")),
            escape(str(each["service"])),
            escape(_health(each["targets"])),
            str(each["active"]),
            str(each["connections"]),
            ", ".join(ends),
            _both_bytes(each),
        )
    return table


def _health(targets: Sequence[Row]) -> str:
    """`up`, `2 up`, or who is down and why; empty for a map without targets."""
    told = [
        f"{target['target']} down: {target['down_because']}"
        for target in targets
        if target["health"] == "down"
    ]
    # Of targets that are not checked, those are told that real connections avoid just now.
    told += [
        f"{target['target']} avoided"
        for target in targets
        if target["avoided"] and target["health"] != "down"
    ]
    counted = Counter(target["health"] for target in targets if target["health"] != "down")
    alike = [state if len(targets) == 1 else f"{count} {state}" for state, count in counted.items()]
    return ", ".join([*alike, *told])


def _both_bytes(row: Row) -> str:
    return f"{bytes_text(row['bytes_to_service'])} / {bytes_text(row['bytes_from_service'])}"


def fetch_counters(client: StackSocketClient) -> list[dict[str, Any]]:
    """What was counted since the start, zeros left out: packets dropped by reason, refusals of the kernel, flows.

    Those of the translator itself begin with "translator_".
    """
    counted: dict[str, int] = client.request("counters")
    with contextlib.suppress(RequestFailed):  # another program's stack
        own: dict[str, int] = client.request("translator_counters")
        counted |= {f"translator_{name}": value for name, value in own.items()}
    return [{"counter": name, "value": value} for name, value in sorted(counted.items()) if value]


_FETCH: dict[str, Callable[[StackSocketClient], list[dict[str, Any]]]] = {
    "flows": fetch_flows,
    "services": lambda client: list(client.request("services")),
    "maps": lambda client: list(client.request("maps")),
    "counters": fetch_counters,
}
_RENDER: dict[str, Callable[[Sequence[Row]], Table]] = {
    "flows": flow_table,
    "services": service_table,
    "maps": _map_table,
    "counters": counter_table,
}
TOPICS = tuple(_FETCH)
