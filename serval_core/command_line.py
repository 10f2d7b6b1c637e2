"""What do our commands have in common? Exit statuses, the one sentence of every failure, options that override a file.

0: it ended as asked. 1: this machine, its state or the network does not allow it. 2: an option or the configuration is wrong.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

import rich_click as click

from serval_core.config_file import Misconfigured
from serval_core.errors import ServalError

NOT_POSSIBLE = 1
WRONG_USE = 2
CONTEXT_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
DISTRIBUTION = "serval-translator"  # which brings all commands, and whose version they print

Function = TypeVar("Function", bound=Callable[..., Any])


def section_option(section: str, key: str, *names: str, **attributes: Any) -> Callable[[Function], Function]:
    """An option that overrides one key of the configuration file."""
    return click.option(*names, f"{section}__{key}", **attributes)


def routing_options(*short: str) -> Callable[[Function], Function]:
    """`--router` and `--router-ip`, the latter also with these short names."""
    role = section_option(
        "router",
        "enabled",
        "--router/--no-router",
        default=None,
        help="Be a service router for others. [default: off]",
    )
    routers = section_option(
        "registration",
        "routers",
        "--router-ip",
        *short,
        multiple=True,
        metavar="IP",
        help="Register at this service router, and ask it for services. Repeatable."
        " [default: those that announce themselves]",
    )
    return lambda command: role(routers(command))


def stack_options(command: Function) -> Function:
    """What is said about the stack that a command runs."""
    for option in reversed(
        (
            section_option(
                "stack",
                "interfaces",
                "--interface",
                "-i",
                multiple=True,
                metavar="NAME",
                help="Use only this interface. Repeatable.",
            ),
            section_option(
                "stack",
                "framing",
                "--framing",
                type=click.Choice(["auto", "sal", "udp", "native"]),
                help="How data travels: behind a SAL header, in UDP, or as plain TCP between stacks of ours. [default: auto]",
            ),
            section_option(
                "stack",
                "broadcast_resolution",
                "--broadcast/--no-broadcast",
                default=None,
                help="Ask all interfaces for services that no rule covers. [default: on]",
            ),
        )
    ):
        command = option(command)
    return command


def log_options(command: Function) -> Function:
    """What is logged, and how."""
    level = section_option(
        "log", "level", "--log-level", type=click.Choice(["debug", "info", "warning", "error"]), help="[default: info]"
    )
    layout = section_option(
        "log", "format", "--log-format", type=click.Choice(["console", "json"]), help="[default: console]"
    )
    return level(layout(command))


def section_values(options: dict[str, Any]) -> dict[tuple[str, str], Any]:
    """What was given of the options that `section_option` made, by section and key."""
    given = {}
    for name, value in options.items():
        if value is not None and value != ():
            section, _, key = name.partition("__")
            given[section, key] = value
    return given


def run(command: click.Command, program: str, arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command as the whole program; ends the process."""
    try:
        sys.exit(command.main(arguments, prog_name=program, standalone_mode=False) or 0)
    except Misconfigured as mistake:
        _complain(program, str(mistake), WRONG_USE)
    except click.UsageError as mistake:
        sentence = mistake.format_message().rstrip(".")
        _complain(program, f"{sentence} ({program} --help shows all options)", WRONG_USE)
    except click.ClickException as mistake:
        _complain(program, mistake.format_message(), WRONG_USE)
    except (click.Abort, KeyboardInterrupt):
        _complain(program, "interrupted", NOT_POSSIBLE)
    except BrokenPipeError:
        # Whoever read our output has seen enough (serval events | head).
        sys.stderr.close()
        sys.exit(NOT_POSSIBLE)
    except ServalError as error:
        _complain(program, str(error), NOT_POSSIBLE)
    except OSError as error:
        _complain(program, error.strerror or str(error), NOT_POSSIBLE)


def _complain(program: str, sentence: str, status: int) -> NoReturn:
    print(f"{program}: {sentence}", file=sys.stderr)
    sys.exit(status)
