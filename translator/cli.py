"""What can be typed after `serval-translator`, and which exit status comes back?

0: it ended as asked. 1: this machine or its state does not allow it (privilege, another stack, none running).
2: an option or the configuration is wrong. Every failure is one sentence on standard error.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import rich_click as click

from serval_core import command_line
from serval_core.command_line import log_options, routing_options, section_option, stack_options
from serval_core.config_file import Names
from serval_core.configured_rules import parse_rule, rule_text
from serval_core.number_types import Real, Whole
from translator import show as show_module
from translator.config import KEEPALIVE_MAX_S, Settings
from translator.config_file import LoadedFile, load
from translator.port_map import parse_map, parse_reverse

PROGRAM = "serval-translator"

T = TypeVar("T")

_FILE = click.Path(dir_okay=False, path_type=Path)
_SECONDS = Real(min=0, min_open=True, max=31_536_000)


@click.group(
    invoke_without_command=True,
    context_settings=command_line.CONTEXT_SETTINGS,
    epilog="Without a command the translator runs until SIGTERM (finish what is open) or SIGINT (stop now)."
    " SIGHUP reads the configuration file again.",
)
@click.option(
    "--map",
    "-m",
    "maps",
    multiple=True,
    metavar="[ADDR:]PORT=ID",
    help="Legacy clients of PORT (or FIRST-LAST) reach service ID. Repeatable.",
)
@click.option(
    "--reverse",
    "-r",
    "reverses",
    multiple=True,
    metavar="ID[:BITS]=HOST:PORT,...",
    help="Serval clients of ID reach the legacy service at HOST:PORT. Repeatable.",
)
@click.option(
    "--service",
    "-s",
    "rules",
    multiple=True,
    metavar="ID=IP[@WEIGHT],...",
    help="Where instances (or a service router) of ID are; `default=IP` for all others. Repeatable.",
)
@click.option(
    "--config",
    "-c",
    type=_FILE,
    help="Configuration file (TOML); options above add to it, below override it.",
)
@stack_options
@section_option(
    "stack",
    "congestion_control",
    "--congestion-control",
    metavar="NAME",
    help="Of Serval flows. [default: cubic]",
)
@routing_options()
@section_option(
    "health",
    "check",
    "--health-check",
    type=click.Choice(["connect", "none"]),
    help="How legacy services are watched; a service without one that works is registered nowhere. [default: connect]",
)
@section_option(
    "legacy",
    "no_answer",
    "--no-answer",
    type=click.Choice(["reset", "close"]),
    help="What a client sees if its service cannot be reached. [default: reset]",
)
@section_option(
    "legacy",
    "keepalive_s",
    "--keepalive",
    type=Whole(0, KEEPALIVE_MAX_S),
    metavar="S",
    help="Probe silent legacy connections after S seconds; 0: never. [default: 600]",
)
@section_option(
    "limits",
    "connections",
    "--connection-limit",
    type=Whole(1, 10_000_000),
    metavar="N",
    help="Clients at a time; more wait in the queue. [default: 20000]",
)
@section_option(
    "timeouts",
    "connect_s",
    "--connect-timeout",
    type=_SECONDS,
    metavar="S",
    help="For opening a Serval flow. [default: 10]",
)
@section_option(
    "timeouts",
    "target_connect_s",
    "--target-timeout",
    type=_SECONDS,
    metavar="S",
    help="For reaching a legacy service. [default: 5]",
)
@section_option(
    "timeouts",
    "idle_s",
    "--idle-timeout",
    type=_SECONDS,
    metavar="S",
    help="No byte either way. [default: 3600]",
)
@section_option(
    "timeouts",
    "client_fin_s",
    "--client-fin-timeout",
    type=_SECONDS,
    metavar="S",
    help="Half-closed, and silence of the side that opened. [default: 300]",
)
@section_option(
    "timeouts",
    "server_fin_s",
    "--server-fin-timeout",
    type=_SECONDS,
    metavar="S",
    help="Half-closed, and silence of the other side. [default: 300]",
)
@section_option(
    "timeouts",
    "drain_s",
    "--drain-timeout",
    type=_SECONDS,
    metavar="S",
    help="From SIGTERM until what is still open is reset. [default: 30]",
)
@log_options
@click.version_option(package_name=PROGRAM, prog_name=PROGRAM)
@click.pass_context
def cli(
    context: click.RichContext,
    /,
    maps: Sequence[str],
    reverses: Sequence[str],
    rules: Sequence[str],
    config: Path | None,
    **sections: Any,
) -> None:
    """Let programs that only speak TCP/IP use Serval services, and serve them.

    A legacy client dials a mapped port; the embedded Serval stack resolves the serviceID and opens a flow;
    on the other side a reverse translator hands the flow to a legacy service.

    IDs: 76568 · 0x00012b18[:BITS] · 64 hex digits · a name from the configuration file · default.

    Example: serval-translator --map 80=76568 --service 76568=10.0.0.2
    """
    if context.invoked_subcommand is not None:
        return
    read = functools.partial(collect_settings, maps, reverses, rules, config, sections)
    _run(read(), read if config is not None else None)


@cli.command()
@click.argument("file", type=_FILE)
def check(file: Path) -> None:
    """Say whether a configuration FILE is right, and what it means."""
    settings = load(file).settings.checked()
    for each in settings.maps:
        click.echo(f"map      {each.listen_text} -> {each.service_text} ({each.service_id.hex_text[:8]}...)")
    for reverse in settings.reverses:
        click.echo(f"reverse  {reverse.service_text} -> {', '.join(map(str, reverse.targets))}")
    for rule in settings.rules:
        click.echo(f"rule     {rule_text(rule)}")
    for router in settings.registration.routers:
        click.echo(f"router   {router}")
    click.echo(f"{file}: ok")


@cli.command()
def doctor() -> None:
    """Say what this machine lacks for running here, and how to get it."""
    from translator import doctor as doctor_module

    raise SystemExit(doctor_module.run())


@cli.command()
@click.argument("what", type=click.Choice(show_module.TOPICS))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(what: str, as_json: bool) -> None:
    """Print flows, services, maps or counters of the stack that runs in this network namespace."""
    show_module.show(what, as_json=as_json)


def collect_settings(
    maps: Sequence[str],
    reverses: Sequence[str],
    rules: Sequence[str],
    config: Path | None,
    sections: dict[str, Any],
) -> Settings:
    """One checked `Settings` from the options and the file. Raises Misconfigured."""
    loaded = load(config) if config is not None else LoadedFile(Settings(), {})
    file, names = loaded
    added = msgspec.structs.replace(
        file,
        maps=(*file.maps, *_parse_all("--map", maps, parse_map, names)),
        reverses=(*file.reverses, *_parse_all("--reverse", reverses, parse_reverse, names)),
        rules=(*file.rules, *_parse_all("--service", rules, parse_rule, names)),
    )
    return added.with_values(command_line.section_values(sections)).checked()


def _parse_all(
    option: str, texts: Sequence[str], parse: Callable[[str, Names, str], T], names: Names
) -> list[T]:
    return [parse(text, names, f"{option} {text}") for text in texts]


def _run(settings: Settings, read_again: Callable[[], Settings] | None) -> None:
    # The stack is loaded only now: --help, check and show need none of it.
    from serval_core.logging_setup import set_up_logging
    from translator.appliance import Appliance, new_event_loop

    async def serve() -> None:
        appliance = Appliance(settings, read_again)
        await appliance.start()
        await appliance.run_until_stopped()

    set_up_logging(settings.log)
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(serve())


def main(arguments: Sequence[str] | None = None) -> None:
    """The program. Ends the process with an exit status."""
    command_line.run(cli, PROGRAM, arguments)
