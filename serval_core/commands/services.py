"""`serval service` and `serval resolve`: the service table, as an operator sees and changes it.

The words of the prototype's `serv` are understood: `add 76568 10.0.0.1 priority 1 weight 2`, `mod`, `del` (SPEC 9.3).
"""

from __future__ import annotations

import itertools
import math
import socket
from difflib import get_close_matches
from typing import Any

import rich_click as click
from rich.console import Group
from rich.text import Text

from serval_core.commands.options import (
    address_argument,
    json_option,
    prefix_argument,
    service_argument,
    show,
)
from serval_core.config_file import Misconfigured
from serval_core.nearest import nearest
from serval_core.rules import NUMBER_MAX
from serval_core.stack_socket import RequestFailed, StackSocketClient
from serval_core.tables import Row, new_console, new_table, print_json, service_table, target_text

VERDICTS = ("delay", "drop")
_ALIASES = {"del": "delete", "mod": "modify", "list": "show"}
# Words that may follow, the argument of the request they fill, and what their value is.
_WORDS: dict[str, tuple[str, type]] = {
    "priority": ("priority", int),
    "weight": ("weight", int),
    "idle": ("idle_timeout_s", float),
    "hard": ("hard_timeout_s", float),
    "dev": ("interface_index", str),
}

# A negative number is to be refused as such, not as an option.
_NUMBERS = {"ignore_unknown_options": True}


class _Aliases(click.RichGroup):
    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return super().get_command(ctx, _ALIASES.get(cmd_name, cmd_name))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        _, command, rest = super().resolve_command(ctx, args)
        return command.name if command else None, command, rest


@click.group(cls=_Aliases)
def service() -> None:
    """Show and change the service table of the running stack."""


@service.command(context_settings=_NUMBERS)
@click.argument("service", metavar="ID[:BITS]")
@click.argument("words", nargs=-1, required=True, metavar="IP|delay|drop [priority N] [weight N] [idle S] [hard S] [dev NAME]")
@json_option
def add(service: str, words: tuple[str, ...], as_json: bool) -> None:
    """Add a rule: where instances of a service are, or that it is to be delayed or dropped.

    Larger priorities win; within one, targets are drawn by weight. A rule ends when nothing used it for `idle` seconds, and in any
    case after `hard` seconds.
    """
    prefix = prefix_argument(service)
    target = words[0]
    request: dict[str, Any] = {"service": str(prefix), **_numbers(words[1:])}
    request |= _target(target)
    _done(StackSocketClient().request("service_add", **request), f"added {prefix} to {target}", as_json)


@service.command(context_settings=_NUMBERS)
@click.argument("service", metavar="ID[:BITS]")
@click.argument("old", metavar="IP")
@click.argument("words", nargs=-1, metavar="[NEW_IP] [priority N] [weight N] [idle S] [hard S] [dev NAME]")
@json_option
def modify(service: str, old: str, words: tuple[str, ...], as_json: bool) -> None:
    """Change the rule that sends a service to IP; what is not given stays (also: mod)."""
    prefix = prefix_argument(service)
    request: dict[str, Any] = {"service": str(prefix), "old_address": address_argument(old)}
    if len(words) % 2 and words[0] not in _WORDS:
        request["address"] = address_argument(words[0])
        words = words[1:]
    request.update(_numbers(words))
    if len(request) == 2:
        raise Misconfigured("service modify", "nothing is to be changed; give a new address, or priority N, weight N ...")
    _done(StackSocketClient().request("service_modify", **request), f"modified {prefix}", as_json)


@service.command()
@click.argument("service", metavar="ID[:BITS]")
@click.argument("target", metavar="IP|delay|drop", required=False)
@json_option
def delete(service: str, target: str | None, as_json: bool) -> None:
    """Delete a rule (also: del). Without a target: all rules for exactly this prefix, except those of listeners."""
    prefix = prefix_argument(service)
    client = StackSocketClient()
    if target is not None:
        requests = [_target(target)]
    else:
        entries = [entry for entry in client.request("services") if entry["prefix"] == str(prefix)]
        requests = [
            {"address": each["address"]} if each["address"] else {"type": each["type"].lower()}
            for entry in entries
            for each in entry["targets"]
            if each["type"] != "DEMUX" and not each["broadcast"]
        ]
        if not requests:
            raise RequestFailed(f"there is no rule for {prefix} that could be deleted")
    for request in requests:
        client.request("service_delete", service=str(prefix), **request)
    _done({"prefix": str(prefix), "deleted": len(requests)}, f"deleted {len(requests)} rule(s) for {prefix}", as_json)


@service.command("show")
@click.argument("service", metavar="[ID[:BITS]]", required=False)
@json_option
def show_services(service: str | None, as_json: bool) -> None:
    """Show all rules, or those for exactly one prefix (also: list)."""
    prefix = None if service is None else str(prefix_argument(service))
    entries = StackSocketClient().request("services")
    if prefix is not None:
        entries = [entry for entry in entries if entry["prefix"] == prefix]
    show(entries, "rules" if service is None else f"rules for {service}", service_table, as_json)


@click.command()
@click.argument("service", metavar="ID")
@json_option
def resolve(service: str, as_json: bool) -> None:
    """Say what would happen to a SYN for a service: which rule decides, which target, and why."""
    explained = StackSocketClient().request("resolve", service=service_argument(service).text)
    console = new_console()
    if as_json:
        print_json(console, explained)
        return
    table = new_table("", ">priority", ">weight", ">probability", "rule", "target")
    for each in explained["sets"]:
        for target in each["targets"]:
            table.add_row(
                "*" if each["used"] and target["probability"] else "",
                str(each["priority"]),
                str(target["weight"]),
                f"{target['probability']:.0%}",
                str(target["type"]),
                target_text(target),
            )
    covering = ", ".join(each["prefix"] for each in explained["lookup"]) or "none"
    goal = ", ".join(explained["targets"])
    verdict = f"{explained['verdict'] or 'no rule'}{f' to {goal}' if goal and goal != explained['verdict'] else ''}"
    parts = [Text(f"{explained['service']}: {verdict}"), Text(explained["why"]), Text(f"prefixes that cover it: {covering}")]
    console.print(Group(*parts, *([table] if explained["sets"] else [])))


def _target(text: str) -> Row:
    """The argument of a request for `10.0.0.2`, `delay` or `drop`. Raises Misconfigured."""
    if text in VERDICTS:
        return {"type": text}
    try:
        return {"address": address_argument(text)}
    except Misconfigured as mistake:
        hint = nearest(text, VERDICTS) if get_close_matches(text, VERDICTS) else ""
        raise Misconfigured(mistake.origin, mistake.sentence + hint) from None


def _numbers(words: tuple[str, ...]) -> dict[str, Any]:
    """The values behind `priority`, `weight` ... Raises Misconfigured."""
    given: dict[str, Any] = {}
    for word, value in itertools.zip_longest(words[::2], words[1::2]):
        if word not in _WORDS:
            raise Misconfigured(word, f"is no word to follow here{nearest(word, _WORDS)}")
        name, kind = _WORDS[word]
        if value is None or value in _WORDS:
            raise Misconfigured(word, "has no value behind it")
        if name in given:
            raise Misconfigured(word, "is given twice; give it once")
        given[name] = _interface(value) if kind is str else _number(word, value, kind)
    return given


def _number(word: str, text: str, kind: type) -> float:
    try:
        number = kind(text)
    except ValueError:
        number = math.nan
    if math.isnan(number):
        raise Misconfigured(f"{word} {text}", "is no whole number" if kind is int else "is no number")
    smallest = 1 if word == "weight" else 0
    if not smallest <= number <= NUMBER_MAX:
        closest = smallest if number < smallest else NUMBER_MAX
        raise Misconfigured(f"{word} {text}", f"is out of range {smallest} to {NUMBER_MAX} (nearest: {closest})")
    return float(number) if kind is float else int(number)


def _interface(name: str) -> int:
    try:
        return socket.if_nametoindex(name)
    except OSError:
        names = [each for _, each in socket.if_nameindex()]
        raise Misconfigured(f"dev {name}", f"there is no such interface{nearest(name, names)}") from None


def _done(result: object, sentence: str, as_json: bool) -> None:
    if as_json:
        print_json(new_console(), result)
    else:
        click.echo(sentence)
