"""What do the subcommands have in common? The option --json, names of services and hosts, how a result is printed."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import rich_click as click
from rich.console import RenderableType

from serval_core.config_file import Misconfigured
from serval_core.errors import OurMistake
from serval_core.names import (
    DEFAULT_SERVICE,
    SERVICE_ID_BITS,
    ServiceID,
    ServicePrefix,
    format_address,
    parse_address,
    parse_service,
)
from serval_core.tables import Row, new_console, print_json

Function = TypeVar("Function", bound=Callable[..., Any])


def json_option(function: Function) -> Function:
    """The option --json, as the argument `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(function)


def show(rows: Sequence[Row], what: str, table: Callable[[Sequence[Row]], RenderableType], as_json: bool) -> None:
    """Print rows as a table or as JSON; `what` they are, should there be none."""
    console = new_console()
    if as_json:
        print_json(console, rows)
    elif rows:
        console.print(table(rows))
    else:
        console.print(f"no {what}")


def prefix_argument(text: str) -> ServicePrefix:
    """A serviceID or prefix. Raises Misconfigured."""
    try:
        return parse_service(text)
    except OurMistake as mistake:
        raise Misconfigured(text, str(mistake)) from None


def service_argument(text: str) -> ServiceID:
    """A serviceID, which a packet can carry. Raises Misconfigured."""
    prefix = prefix_argument(text)
    if prefix.bits != SERVICE_ID_BITS:
        raise Misconfigured(text, "is a prefix, and a whole serviceID is needed here: leave the bits out")
    return prefix.service_id


def served_argument(text: str) -> ServicePrefix:
    """A serviceID or prefix that a program can bind. Raises Misconfigured."""
    prefix = prefix_argument(text)
    if prefix.service_id == DEFAULT_SERVICE:
        raise Misconfigured(text, "is all zeros, which nothing can be bound to: name a serviceID, for example 76568")
    return prefix


def address_argument(text: str) -> str:
    """An IPv4 address, or a host name that has one. Raises Misconfigured."""
    if re.fullmatch(r"[0-9.]*", text):
        try:
            return format_address(parse_address(text))
        except OurMistake as mistake:
            raise Misconfigured(text, str(mistake)) from None
    try:
        return socket.gethostbyname(text)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise Misconfigured(text, f"is neither an IPv4 address nor a host that has one ({why})") from None
