"""What can be typed after `serval`? The command that shows, changes and tries out the stack of this network namespace.

It talks to whichever program runs the stack, servald or a translator. Exit statuses are those of `command_line`.
"""

from __future__ import annotations

from collections.abc import Sequence

import rich_click as click

from serval_core import command_line
from serval_core.commands import balancing, echoes, identities, migrating, services, transfers, watching

PROGRAM = "serval"


@click.group(
    context_settings=command_line.CONTEXT_SETTINGS,
    epilog="Example: serval service add 76568 10.0.0.2 priority 1 weight 2",
)
@click.version_option(package_name=command_line.DISTRIBUTION, prog_name=PROGRAM)
def cli() -> None:
    """Show, change and try out the Serval stack that runs in this network namespace.

    IDs: 76568 · 0x00012b18[:BITS] · 64 hex digits · default.
    """


for command in (
    services.service,
    services.resolve,
    migrating.migrate,
    balancing.balance,
    watching.flows,
    watching.events,
    watching.stats,
    watching.registrations,
    watching.routers,
    identities.keygen,
    identities.service_id,
    transfers.tcp_server,
    transfers.tcp_client,
    echoes.udp_echo,
    echoes.ping,
):
    cli.add_command(command)


def main(arguments: Sequence[str] | None = None) -> None:
    """The program. Ends the process with an exit status."""
    command_line.run(cli, PROGRAM, arguments)
