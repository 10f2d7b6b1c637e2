"""`serval migrate`: live flows are sent another way.

The words of the prototype's `serv` are understood: `migrate flow N IF`, `migrate interface IF1 IF2`,
`migrate service ID IF` (SPEC 9.3).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import rich_click as click
from click.exceptions import Exit

from serval_core.command_line import NOT_POSSIBLE
from serval_core.commands.options import json_option, prefix_argument
from serval_core.config_file import Misconfigured
from serval_core.errors import OurMistake
from serval_core.names import parse_address
from serval_core.number_types import Whole
from serval_core.stack_socket import StackSocketClient
from serval_core.tables import Row, new_console, new_table, print_json


class _InterfacesByDefault(click.RichGroup):
    """`migrate eth0 eth1` means `migrate interface eth0 eth1`."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        words = [each for each in args if not each.startswith("-")]
        if len(words) in (1, 2) and words[0] not in self.commands:
            args = ["interface", *args]
        return super().resolve_command(ctx, args)


@click.group(cls=_InterfacesByDefault)
def migrate() -> None:
    """Move live flows to another interface or address of this host. Neither end of a connection notices.

    `serval migrate IF1 IF2` moves all flows from one interface to another.
    """


def _to_option(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--to", metavar="ADDR", help="Move to this address of this host, instead of an interface.")(
        function
    )


@migrate.command()
@click.argument("flow_id", metavar="FLOW", type=Whole(1, 0xFFFFFFFF))
@click.argument("interface", metavar="[IF]", required=False)
@_to_option
@json_option
def flow(flow_id: int, interface: str | None, to: str | None, as_json: bool) -> None:
    """Move one flow; `serval flows` shows their numbers."""
    _migrate("migrate_flow", as_json, flow_id=flow_id, **_goal(interface, to))


@migrate.command("interface")
@click.argument("old", metavar="IF1")
@click.argument("new", metavar="IF2")
@json_option
def between_interfaces(old: str, new: str, as_json: bool) -> None:
    """Move every flow from one interface to another."""
    _migrate("migrate_interface", as_json, interface=old, to_interface=new)


@migrate.command()
@click.argument("service", metavar="ID[:BITS]")
@click.argument("interface", metavar="[IF]", required=False)
@_to_option
@json_option
def service(service: str, interface: str | None, to: str | None, as_json: bool) -> None:
    """Move every flow of a service or prefix, whether this host serves it or uses it."""
    _migrate("migrate_service", as_json, service=str(prefix_argument(service)), **_goal(interface, to))


def _goal(interface: str | None, to: str | None) -> dict[str, str]:
    """The arguments that say where to go. Raises Misconfigured."""
    if (interface is None) == (to is None):
        raise Misconfigured("migrate", "say where to: either the name of an interface, or --to with an address")
    if to is None:
        return {"interface": str(interface)}
    try:
        parse_address(to)
    except OurMistake as mistake:
        raise Misconfigured(f"--to {to}", str(mistake)) from None
    return {"to": to}


def _migrate(request: str, as_json: bool, **arguments: object) -> None:
    """Ask, wait for every outcome, and show them."""
    outcomes: list[Row] = list(StackSocketClient().stream(request, wait=True, **arguments))
    if as_json:
        print_json(new_console(), outcomes)
    else:
        show_outcomes(outcomes)
    leave_with(outcomes)


def show_outcomes(outcomes: Sequence[Row]) -> None:
    """A table of what became of flows that were to move."""
    console = new_console()
    if outcomes:
        table = new_table("flow", "outcome", "now at", ">took", "why not")
        for each in outcomes:
            seconds = each.get("duration_s")
            table.add_row(
                str(each["flow_id"]),
                str(each["outcome"]),
                str(each.get("address") or "") if each["outcome"] == "migrated" else "",
                "" if seconds is None else f"{seconds * 1000:.1f} ms",
                str(each.get("why") or ""),
            )
        console.print(table)
    else:
        console.print("no flows to migrate")


def leave_with(outcomes: Sequence[Row]) -> None:
    """End with exit status 1 if a flow did not move."""
    if any(each["outcome"] != "migrated" for each in outcomes):
        raise Exit(NOT_POSSIBLE)
