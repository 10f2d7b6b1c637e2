"""What do all our programs do when they are asked to read their configuration again (SIGHUP)?

Rules, service names, access rules, mobility, and what `ServiceController.reconfigure` takes change; all or nothing. What else
can change, the program knows.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from serval_core.access_policy import AccessPolicy
from serval_core.configured_rules import replace_rules
from serval_core.controller.plan import CHANGEABLE as CONTROLLER_CHANGEABLE
from serval_core.controller.plan import ControllerPlan
from serval_core.controller.service_controller import ServiceController
from serval_core.errors import ServalError
from serval_core.program_settings import ProgramSettings
from serval_core.stack import ServalStack
from serval_core.systemd import notify_systemd

CHANGEABLE = CONTROLLER_CHANGEABLE | {"rules", "names", "access", "mobility"}


@contextmanager
def changing(
    stack: ServalStack,
    controller: ServiceController,
    running: ProgramSettings,
    wanted: ProgramSettings,
    plan: ControllerPlan,
) -> Iterator[ExitStack]:
    """Put `wanted` (with its `plan`) into effect. Raises Misconfigured, and then nothing has changed.

    The body makes what the program adds, and registers with the ExitStack how that is taken back; if it raises, all is taken back.
    """
    access = AccessPolicy(wanted.access)
    with ExitStack() as undo:
        replace_rules(stack.table, running.rules, wanted.rules, undo)
        yield undo
        controller.reconfigure(plan)
        undo.pop_all()
    stack.native.policy = access
    stack.mobility.settings = wanted.mobility


async def reload_when_asked(
    asked: asyncio.Event,
    reload: Callable[[], Awaitable[None]],
    log: Any,
    report_defect: Callable[[str, Exception], None],
) -> None:
    """Call `reload` each time `asked` is set, tell the service manager, and go on after a refusal. Runs until cancelled."""
    while True:
        await asked.wait()
        asked.clear()
        notify_systemd(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            await reload()
        except ServalError as refusal:
            log.error("not reloaded, everything stays as it was", why=str(refusal))
        except Exception as error:
            report_defect("reload failed", error)
        notify_systemd("READY=1")
