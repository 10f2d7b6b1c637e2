"""What can be typed after `servald`? The stack as a daemon: native programs, service routing, registration; no translation.

Exit statuses are those of `command_line`; what runs is `daemon_life`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import rich_click as click

from serval_core import command_line
from serval_core.command_line import log_options, routing_options, stack_options
from serval_core.configured_rules import parse_rule, rule_text
from serval_core.daemon_config import LoadedDaemonFile, load, without_file
from serval_core.descriptors import raise_descriptor_limit

PROGRAM = "servald"

_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command(context_settings=command_line.CONTEXT_SETTINGS)
@click.option("--config", "-c", type=_FILE, help="Configuration file (TOML); options add to it or override it.")
@click.option(
    "--service",
    "rules",
    multiple=True,
    metavar="ID=IP[@WEIGHT],...",
    help="Where instances (or a service router) of ID are; `default=IP` for all others. Repeatable.",
)
@stack_options
@routing_options("-r")
@log_options
@click.option("--check", is_flag=True, help="Only say whether the configuration is right.")
@click.option(
    "--clean-up",
    is_flag=True,
    help="Only remove what a crashed stack has left in this network namespace, and reset its programs' connections.",
)
@click.version_option(package_name=command_line.DISTRIBUTION, prog_name=PROGRAM)
def cli(config: Path | None, rules: Sequence[str], check: bool, clean_up: bool, **sections: Any) -> None:
    """Run the Serval stack of this network namespace for native programs, and as a service router.

    Programs use it through serval_core.sockets; `serval` shows what it does and changes its service table.
    """
    # What reads keys and asks DNS, and the stack, are loaded only now: --help needs none of it.
    from serval_core.controller.plan import plan
    from serval_core.daemon_life import Daemon, Told
    from serval_core.logging_setup import set_up_logging

    def read() -> Told:
        loaded = collect_settings(config, rules, sections)
        return Told(loaded.settings, plan(loaded.settings.controller, loaded.names, loaded.place))

    told = read()
    settings = told.settings
    if check:
        for rule in settings.rules:
            click.echo(f"rule     {rule_text(rule)}")
        click.echo(f"{config or 'options'}: ok")
        return
    set_up_logging(settings.log)
    raise_descriptor_limit()
    daemon = Daemon(told, read if config is not None else None)
    asyncio.run(daemon.clean_up() if clean_up else daemon.run())


def collect_settings(config: Path | None, rules: Sequence[str], sections: dict[str, Any]) -> LoadedDaemonFile:
    """What the options and the file say together, checked. Raises Misconfigured."""
    loaded = load(config) if config is not None else without_file()
    added = tuple(parse_rule(text, loaded.names, f"--service {text}") for text in rules)
    with_rules = msgspec.structs.replace(loaded.settings, rules=(*loaded.settings.rules, *added))
    return loaded._replace(settings=with_rules.with_values(command_line.section_values(sections)).checked())


def main(arguments: Sequence[str] | None = None) -> None:
    """The program. Ends the process with an exit status."""
    command_line.run(cli, PROGRAM, arguments)
