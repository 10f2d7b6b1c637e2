"""`serval flows`, `events`, `stats`, `registrations`, `routers`: what the running stack does."""

from __future__ import annotations

import contextlib
import json
from datetime import datetime
from typing import Any

import rich_click as click

from serval_core.commands.options import json_option, show
from serval_core.config_file import Misconfigured
from serval_core.nearest import nearest
from serval_core.service_events import KINDS
from serval_core.stack_socket import RequestFailed, StackSocketClient
from serval_core.tables import any_table, counter_table, flow_table, new_console, print_json


@click.command()
@json_option
def flows(as_json: bool) -> None:
    """Show all flows: connections of native programs, of a translator, and those that are being opened or closed."""
    show(fetch_flows(StackSocketClient()), "flows", flow_table, as_json)


@click.command()
@click.option("--kind", "-k", "kinds", multiple=True, metavar="KIND", help="Only events of this kind. Repeatable.")
@json_option
def events(kinds: tuple[str, ...], as_json: bool) -> None:
    """Follow what happens: services that come and go, rules, delayed packets, flows. One line each, until interrupted.

    The exit status is 1 when the stack ends.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise Misconfigured(f"--kind {kind}", f"there is no such event{nearest(kind, sorted(KINDS))}")
    arguments = {"kinds": list(kinds)} if kinds else {}
    with contextlib.suppress(KeyboardInterrupt):
        for event in StackSocketClient().stream("events", **arguments):
            click.echo(json.dumps(event) if as_json else _event_text(event))
        raise RequestFailed("the Serval stack of this network namespace has ended")


@click.command()
@json_option
def stats(as_json: bool) -> None:
    """Show what was counted since the stack started; zeros are left out of the table."""
    counted = fetch_counters(StackSocketClient())
    if as_json:
        show([{"counter": name, "value": value} for name, value in counted.items()], "counters", counter_table, True)
        return
    rows = [{"counter": name, "value": value} for name, value in counted.items() if value]
    show(rows, "counters", counter_table, False)


@click.command()
@json_option
def registrations(as_json: bool) -> None:
    """Show which services other hosts have registered at this service router, and which this host offers to routers."""
    found = StackSocketClient().request("registrations")
    console = new_console()
    if as_json:
        print_json(console, found)
        return
    for what, rows in (("registered here", found["received"]), ("offered to service routers", found["sent"])):
        if rows is not None:
            console.print(f"{what}:" if rows else f"{what}: nothing")
            if rows:
                console.print(any_table(rows))


@click.command()
@json_option
def routers(as_json: bool) -> None:
    """Show the service routers that this host registers its services at."""
    show(StackSocketClient().request("routers"), "service routers", any_table, as_json)


def fetch_flows(client: StackSocketClient) -> list[dict[str, Any]]:
    """The stack's flows, each with what a translator knows of its pair."""
    found: list[dict[str, Any]] = client.request("flows")
    try:
        pairs = {pair["flow_id"]: pair for pair in client.request("pairs")}
    except RequestFailed:  # no translator
        pairs = {}
    return [{**flow, **pairs.get(flow["flow_id"], {})} for flow in found]


def fetch_counters(client: StackSocketClient) -> dict[str, int]:
    """Every counter, by name. Those of a translator begin with "translator_"."""
    counted: dict[str, Any] = client.request("counters")
    for request, prefix in (
        ("stats", "services_"),
        ("controller_counters", "controller_"),
        ("translator_counters", "translator_"),
    ):
        with contextlib.suppress(RequestFailed):  # not every program that runs a stack has all of them
            counted |= _flat(client.request(request), prefix)
    return dict(sorted(counted.items()))


def _flat(counted: dict[str, Any], prefix: str) -> dict[str, int]:
    """Numbers only, those of nested dicts with longer names."""
    found: dict[str, int] = {}
    for name, value in counted.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}_")
        elif isinstance(value, int):
            found[f"{prefix}{name}"] = value
    return found


def _event_text(event: dict[str, Any]) -> str:
    at = datetime.fromtimestamp(event.pop("at", 0.0)).strftime("%H:%M:%S.%f")[:-3]
    kind = event.pop("event", "?")
    return f"{at} {kind:<20} " + " ".join(f"{name}={value}" for name, value in event.items() if value is not None)
