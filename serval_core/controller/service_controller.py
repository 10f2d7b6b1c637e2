"""Who keeps the stack's service table and the routers informed of each other? `ServiceController`, on a running stack.

    controller = ServiceController(stack, settings)
    await controller.start()
    ...
    await controller.stop()      # before the stack stops

It composes what the settings ask for: the host side (what programs bind here is registered with routers), the
router side (other hosts register here), and the resolver (what a DELAY rule holds is looked for). It serves the
stack socket requests `registrations`, `routers` and `controller_counters`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable

from serval_core.controller.answers import AnswerSource
from serval_core.controller.directory import IN_MEMORY, Directory, SqliteDirectory
from serval_core.controller.dns_source import DnsSource
from serval_core.controller.host_side import HostSide
from serval_core.controller.plan import ControllerPlan, plan, refuse_fixed_plan
from serval_core.controller.resolver import DirectorySource, Resolver, UpstreamSource
from serval_core.controller.router_side import RouterSide
from serval_core.controller.settings import ControllerSettings
from serval_core.names import ServiceID, ServicePrefix
from serval_core.service_events import Event
from serval_core.stack import ServalStack
from serval_core.stack_socket_server import Handler

RETRY_S = 1.0


class ServiceController:
    """The controller of one stack. All calls are made on the stack's loop."""

    def __init__(self, stack: ServalStack, settings: ControllerSettings | ControllerPlan) -> None:
        """Raises Misconfigured, an OurMistake, when the settings cannot be obeyed."""
        self._stack = stack
        self._plan = settings if isinstance(settings, ControllerPlan) else plan(settings)
        self._loop = asyncio.get_running_loop()
        self._host: HostSide | None = None
        self._router: RouterSide | None = None
        self._resolver: Resolver | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._woken: asyncio.Handle | None = None
        self._undo = contextlib.ExitStack()

    async def start(self) -> None:
        """Start everything or nothing. Raises OurMistake (a service or the directory is not to be had)."""
        try:
            with contextlib.ExitStack() as undo:
                self._start(undo)
                self._undo = undo.pop_all()
        except BaseException:
            self._forget()
            raise
        self._wake()

    async def stop(self) -> None:
        """Unregister, save, and leave the stack as it was found. Stopping twice is harmless."""
        self._undo.close()
        self._forget()

    def reconfigure(self, settings: ControllerPlan) -> None:
        """Have another policy, other limits, routers, keys and terms from now on. Raises Misconfigured, and then nothing has
        changed, when something else differs.
        """
        refuse_fixed_plan(self._plan, settings)
        before, self._plan = self._plan, settings
        if self._host is not None:
            self._host.reconfigure(settings)
        if self._router is not None:
            self._router.reconfigure(settings)
            if settings.routers and not before.routers:
                self._router.role.registrations.tell_weights()
        self._wake()

    def withhold(self, prefix: ServicePrefix, *, withheld: bool) -> None:
        """Do not register what is bound to `prefix`, because it does not work just now; or do so again."""
        if self._host is not None:
            self._host.offers.withhold(prefix, withheld=withheld)

    def set_terms(self, prefix: ServicePrefix, priority: int, weight: int) -> None:
        """Register `prefix` with another priority and weight than the usual ones."""
        if self._host is not None:
            self._host.offers.set_terms(prefix, priority, weight)

    @property
    def routers(self) -> tuple[int, ...]:
        """The addresses of the routers that this host knows."""
        return () if self._host is None else self._host.routers

    def registrations(self) -> dict[str, object]:
        """What `serval registrations` shows: those of other hosts here, and ours at the routers."""
        now = time.monotonic()
        return {
            "received": None if self._router is None else self._router.role.registrations.snapshot(now),
            "sent": None if self._host is None else self._host.role.snapshot(),
        }

    def counters(self) -> dict[str, int]:
        """What was received, refused (by reason), sent, resolved."""
        counted: dict[str, int] = {}
        if self._host is not None:
            counted |= {f"host_{name}": count for name, count in self._host.counters.items()}
            counted |= {f"host_{name}": count for name, count in self._host.finder.counters.items()}
        if self._router is not None:
            counted |= {f"router_{name}": count for name, count in self._router.role.counters.items()}
            counted |= {
                f"router_{name}": count for name, count in self._router.role.registrations.counters.items()
            }
            counted |= {f"router_{name}": count for name, count in self._router.announcer.counters.items()}
        if self._resolver is not None:
            counted |= {f"resolver_{name}": count for name, count in self._resolver.counters.items()}
        return counted

    # -- within ----------------------------------------------------------------------------------------------

    def _start(self, undo: contextlib.ExitStack) -> None:
        stack, settings = self._stack, self._plan.settings
        directory: Directory | None = None
        if settings.router.enabled or self._plan.delayed_prefixes:
            directory = SqliteDirectory(settings.router.directory if settings.router.enabled else IN_MEMORY)
            undo.callback(directory.close)
        if settings.registration.enabled:
            self._host = HostSide(stack, self._plan, self._wake)
            undo.callback(self._host.stop)
            self._host.start()
        if settings.router.enabled and directory is not None:
            self._router = RouterSide(
                stack,
                self._plan,
                directory,
                lambda: self._plan.routers,
                self._prefix_changed,
                self._wake,
            )
            undo.callback(self._router.stop)
            self._router.start()
        if self._plan.delayed_prefixes and directory is not None:
            self._resolver = self._make_resolver(directory)
            undo.callback(self._resolver.stop)
            self._resolver.start()
            undo.callback(stack.events.subscribe(self._delayed, ["delayed"]))
        undo.callback(stack.on_host_change(self._host_changed))
        requests: dict[str, Callable[[], object]] = {
            "registrations": self.registrations,
            "routers": self._listed_routers,
            "controller_counters": self.counters,
        }
        for name, answer in requests.items():
            stack.stack_socket.register(name, _handler(answer))
            undo.callback(stack.stack_socket.unregister, name)

    def _forget(self) -> None:
        for handle in (self._timer, self._woken):
            if handle is not None:
                handle.cancel()
        self._timer = self._woken = None
        self._host = self._router = self._resolver = None

    def _make_resolver(self, directory: Directory) -> Resolver:
        settings, stack = self._plan.settings.resolver, self._stack
        known: dict[str, AnswerSource] = {"directory": DirectorySource(directory, time.time)}
        known["upstream"] = UpstreamSource(lambda: self.routers, settings.rule_lifetime_s)
        if self._plan.zone is not None:
            known["dns"] = DnsSource(self._plan.zone, self._plan.nameservers, settings.timeout_s)
        return Resolver(
            self._plan.delayed_prefixes,
            [(name, known[name]) for name in settings.sources if name in known],
            stack.table,
            stack.release_delayed,
            stack.drop_delayed,
            time.monotonic,
            settings.timeout_s,
            settings.failure_lifetime_s,
            settings.rules_max,
        )

    def _listed_routers(self) -> list[dict[str, object]]:
        return [] if self._host is None else self._host.snapshot()

    def _prefix_changed(self, prefix: ServicePrefix, weight: int) -> None:
        if self._host is not None and self._plan.routers:
            self._host.offers.registered(prefix, weight)

    def _delayed(self, event: Event) -> None:
        if self._resolver is not None:
            service_id = ServiceID(bytes.fromhex(str(event.fields["service_id"])))
            self._resolver.delayed(service_id, own=event.fields["origin"] != "forwarded")

    def _host_changed(self) -> None:
        if self._host is not None:
            self._host.host_changed()

    def _wake(self) -> None:
        """Have `_run` called soon: never within a call of the stack, which may be in the middle of something."""
        if self._woken is None:
            self._woken = self._loop.call_soon(self._run)

    def _run(self) -> None:
        self._woken = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        sides = [side for side in (self._host, self._router) if side is not None]
        now, wall = time.monotonic(), time.time()
        due: float | None = now + RETRY_S  # unless all goes well; the loop says what did not
        try:
            for side in sides:
                side.run(now, wall)
            due = min((each for side in sides if (each := side.next_timeout()) is not None), default=None)
        finally:
            if due is not None:
                self._timer = self._loop.call_later(max(0.0, due - time.monotonic()), self._wake)


def _handler(answer: Callable[[], object]) -> Handler:
    """A request that takes no arguments."""
    return lambda _: answer()
