"""How does servald come up, live and go down? Entirely or not at all, and without a trace.

SIGTERM and SIGINT stop it: services are unregistered, and programs that still have connections see them reset. SIGHUP has the
configuration read again: rules, names, access and much of the controller change, or nothing does.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable
from typing import Any, NamedTuple

import structlog

from serval_core.config_changes import fixed_differences, refuse_differences
from serval_core.configured_rules import replace_rules, rule_text
from serval_core.configured_stack import refuse_unknown_names, stack_settings
from serval_core.controller.plan import ControllerPlan
from serval_core.controller.service_controller import ServiceController
from serval_core.daemon_config import DaemonSettings
from serval_core.dataplane.kernel import KernelDataPlane
from serval_core.native_protocol import NATIVE_SOCKET_ADDRESS
from serval_core.reloading import CHANGEABLE, changing, reload_when_asked
from serval_core.stack import ServalStack
from serval_core.stack_socket_server import StackSocketServer
from serval_core.systemd import inherited_sockets, notify_systemd

log = structlog.get_logger("servald")


class Told(NamedTuple):
    """What an operator has said, and what that means for the controller."""

    settings: DaemonSettings
    controller: ControllerPlan


class Daemon:
    """One servald. `run()` or `clean_up()`, in an event loop of its own.

    `read_again` reads the configuration anew (and blocks) and is what SIGHUP asks for; without it SIGHUP is SIGTERM.
    """

    def __init__(self, told: Told, read_again: Callable[[], Told] | None = None) -> None:
        self._settings, self._plan = told
        self._read_again = read_again

    async def run(self) -> None:
        """Serve until a signal asks to stop. Raises Misconfigured, StackBusy or KernelRefused, leaving nothing behind."""
        loop, stop = asyncio.get_running_loop(), asyncio.Event()
        loop.set_exception_handler(report_defect)
        reload = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        # Without a configuration that could be read again SIGHUP says that the terminal is gone.
        loop.add_signal_handler(signal.SIGHUP, stop.set if self._read_again is None else reload.set)
        settings = self._settings
        refuse_unknown_names(settings.stack)
        stack = await ServalStack.start(
            stack_settings(
                settings.stack, settings.timeouts.connect_s, settings.access, settings.mobility
            ),
            inherited_sockets().get(NATIVE_SOCKET_ADDRESS.encode()),
        )
        try:
            replace_rules(stack.table, (), settings.rules, contextlib.ExitStack())
            controller = ServiceController(stack, self._plan)
            await controller.start()
            reloading = loop.create_task(
                reload_when_asked(reload, lambda: self._reload(stack, controller), log, _report)
            )
            try:
                self._announce("serving")
                notify_systemd("READY=1")
                await stop.wait()
                notify_systemd("STOPPING=1")
            finally:
                reloading.cancel()
                await controller.stop()
        finally:
            await stack.stop()
        log.info("stopped")

    async def _reload(self, stack: ServalStack, controller: ServiceController) -> None:
        """Read the configuration again and change what it changes. Raises Misconfigured, and then nothing has changed."""
        assert self._read_again is not None
        settings, plan = await asyncio.to_thread(self._read_again)
        refuse_differences(fixed_differences(self._settings, settings, CHANGEABLE))
        with changing(stack, controller, self._settings, settings, plan):
            pass
        self._settings = settings
        self._announce("reloaded")

    def _announce(self, event: str) -> None:
        settings = self._settings
        log.info(event, router=settings.router.enabled, rules=[rule_text(rule) for rule in settings.rules])

    async def clean_up(self) -> None:
        """Remove what a crashed stack has left; programs that it gave connections to see them reset. Raises StackBusy."""
        lock = StackSocketServer()
        lock.open()
        try:
            settings = self._settings
            told = stack_settings(
                settings.stack, settings.timeouts.connect_s, settings.access, settings.mobility
            )
            data_plane = KernelDataPlane(told.dataplane)
            leftovers = data_plane.open()
            data_plane.close()
        finally:
            lock.close()
        log.info("cleaned up", found=leftovers)


def report_defect(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """An exception that nobody expected, in some callback: the others go on."""
    log.error("a defect of the stack", what=context["message"], exc_info=context.get("exception"))


def _report(what: str, error: Exception) -> None:
    log.error("a defect of the stack", what=what, exc_info=error)
