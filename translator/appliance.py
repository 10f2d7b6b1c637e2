"""In which order does the appliance come up and go down?

Everything or nothing: every port is bound and every name looked up before the stack starts, and nobody is let
in before all of it runs. SIGTERM drains (no new clients, the present ones finish until the deadline), a
second SIGTERM or SIGINT stops now; SIGHUP has the configuration read again, if it can be. The policies of the
parts are in legacy_side, serval_side, targets, relay and reload.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

import structlog

from serval_core.configured_rules import replace_rules, rule_text
from serval_core.configured_stack import refuse_unknown_names, stack_settings
from serval_core.controller.service_controller import ServiceController
from serval_core.descriptors import raise_descriptor_limit
from serval_core.reloading import reload_when_asked
from serval_core.stack import ServalStack
from serval_core.systemd import notify_systemd
from translator.accounting import Admission, MapTraffic
from translator.config import Settings
from translator.descriptors import connection_limit
from translator.legacy_side import LegacyAcceptor, MappedPort, SocketOptions
from translator.relay import Relay
from translator.reload import Parts, ReadAgain, Retired, prepare, put_into_effect
from translator.serval_side import ForwardSide, ReverseSide
from translator.splice_engine import FALLBACK_BECAUSE, SpliceEngine
from translator.targets import Target, TargetDialer, TargetSet, resolve_targets

log = structlog.get_logger("translator")

# How often deadlines of connections that are being opened are looked at.
SWEEP_INTERVAL_S = 0.25
WATCH_INTERVAL_S = 1.0
# How long flows whose clients have gone may still exchange their last FINs when the appliance ends.
FLOWS_END_S = 1.0
FLOWS_END_CHECK_S = 0.02


def new_event_loop() -> asyncio.AbstractEventLoop:
    """The loop that everything runs on, and the one place to choose another implementation.

    uvloop made no difference to CPU per connection (2 cores, 6000 short connections through two translators).
    """
    return asyncio.new_event_loop()


class Appliance:
    """A running translator. `start()`, then `run_until_stopped()`, in the same event loop.

    `read_again` returns the settings anew and is what SIGHUP asks for; without it SIGHUP is SIGTERM.
    """

    def __init__(self, settings: Settings, read_again: ReadAgain | None = None) -> None:
        self._settings = settings.checked()
        self._read_again = read_again
        self._loop = asyncio.get_running_loop()
        self._stop_wanted = asyncio.Event()
        self._stop_now = asyncio.Event()
        self._reload_wanted = asyncio.Event()
        self._retired: list[Retired] = []
        self._served_by_retired = 0
        self._undo: list[Callable[[], None]] = []
        self._sweep_timer: asyncio.TimerHandle | None = None
        self._next_watch_s = 0.0

    # -- coming up -------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start everything or nothing. Raises Misconfigured, StackBusy or KernelRefused.

        Signals are obeyed from now on: one that comes during the start takes effect right after it.
        """
        self._loop.set_exception_handler(report_defect)
        self._loop.add_signal_handler(signal.SIGTERM, self._terminate)
        # Without a configuration that could be read again SIGHUP says that the terminal is gone.
        reload = self._terminate if self._read_again is None else self._reload_wanted.set
        self._loop.add_signal_handler(signal.SIGHUP, reload)
        self._loop.add_signal_handler(signal.SIGINT, self._interrupt)
        try:
            await self._start()
        except BaseException:
            self._forget_signals()
            raise

    async def _start(self) -> None:
        settings = self._settings
        options = SocketOptions(settings.legacy.tcp_nodelay, settings.legacy.keepalive_s)
        self.admission = Admission(connection_limit(settings, raise_descriptor_limit()))
        refuse_unknown_names(settings.stack)
        controller_plan = settings.controller_plan()
        target_sets = [resolve_targets(reverse) for reverse in settings.reverses]
        self.acceptor = LegacyAcceptor(options, settings.legacy.backlog, self.admission, self._client)
        try:
            self.acceptor.bind(settings.maps)
            self._undo.append(self.acceptor.close)
            self.stack = await ServalStack.start(
                stack_settings(
                    settings.stack, settings.timeouts.connect_s, settings.access, settings.mobility
                )
            )
            self.controller = ServiceController(self.stack, controller_plan)
            try:
                await self._start_on_stack(options, target_sets)
            except BaseException:
                self._undo_all()
                await self.controller.stop()
                await self.stack.stop()
                raise
        except BaseException:
            self._undo_all()
            raise
        self._undo.clear()
        self._sweep()
        # What exists now stays: the collector need not look at it again while clients come and go.
        gc.collect()
        gc.freeze()

    async def _start_on_stack(self, options: SocketOptions, target_sets: list[TargetSet]) -> None:
        settings, timeouts = self._settings, self._settings.timeouts
        replace_rules(self.stack.table, (), settings.rules, contextlib.ExitStack())
        await self.controller.start()
        engine = SpliceEngine(
            idle_timeout_s=timeouts.idle_s,
            left_fin_timeout_s=timeouts.client_fin_s,
            right_fin_timeout_s=timeouts.server_fin_s,
        )
        self.relay = Relay(engine)
        self._undo.append(self.relay.stop)
        reset_unanswered = settings.legacy.no_answer == "reset"
        self.forward = ForwardSide(self.stack, self.relay, self.admission, reset_unanswered=reset_unanswered)
        self.dialer = TargetDialer(options, timeouts.target_connect_s)
        self.reverse = ReverseSide(self.relay, self.admission, self.dialer, self.controller)
        self._undo.append(self.reverse.close)
        self.stack.stack_socket.register("maps", lambda _: self.maps())
        self.stack.stack_socket.register("pairs", lambda _: self.relay.pairs())
        self.stack.stack_socket.register("translator_counters", lambda _: self.counters())
        for reverse, targets in zip(settings.reverses, target_sets, strict=True):
            self.reverse.serve(self.stack, reverse, targets, settings.stack.backlog)
        self.reverse.watch(settings)
        self.acceptor.listen()

    def _undo_all(self) -> None:
        while self._undo:
            self._undo.pop()()

    # -- running ---------------------------------------------------------------------------------------------

    async def run_until_stopped(self) -> None:
        """Serve until a signal asks to stop, then go down in order."""
        self._announce("serving")
        notify_systemd("READY=1")
        reloading = self._loop.create_task(
            reload_when_asked(self._reload_wanted, self._reload, log, self._report)
        )
        try:
            try:
                await self._stop_wanted.wait()
            finally:
                reloading.cancel()
            notify_systemd("STOPPING=1")
            await self._drain()
        finally:
            await self._stop()

    def stop(self, *, now: bool) -> None:
        """What SIGTERM does; with `now`, what SIGINT does."""
        self._stop_wanted.set()
        if now:
            self._stop_now.set()

    def maps(self) -> list[dict[str, object]]:
        """What `show maps` shows."""
        now, live = self._loop.time(), self.relay.live_bytes()
        listed: list[dict[str, object]] = []

        def add(
            direction: str, traffic: MapTraffic, targets: Sequence[Target] = (), removed: bool = False
        ) -> None:
            shown = traffic.as_dict(live.get(traffic))
            told = [target.as_dict(now) for target in targets]
            listed.append({"direction": direction, **shown, "targets": told, "removed": removed})

        for traffic in self.acceptor.traffic:
            add("forward", traffic)
        for served in self.reverse.served:
            add("reverse", served.traffic, served.targets.targets)
        for direction, traffic in self._retired:
            if traffic.active:
                add(direction, traffic, removed=True)
        return listed

    def counters(self) -> dict[str, int]:
        """The translator's own counters; the stack has others."""
        admission = self.admission
        return {
            "clients": admission.active,
            "clients_high_water": admission.high_water,
            "connection_limit": admission.limit,
            "connection_limit_reached": admission.times_full,
            "clients_connecting": len(self.forward.connecting),
            "flows_waiting_for_targets": len(self.reverse.dialing),
            **self.acceptor.counters,
            **{f"refused_{name}": count for name, count in self.forward.failures.items()},
            **{f"splice_{name}": count for name, count in self.relay.counters().items()},
        }

    def _client(self, client: socket.socket, address: object, port: MappedPort) -> None:
        self.forward.client(client, address, port)

    def _sweep(self) -> None:
        now = self._loop.time()
        self.dialer.sweep(now)
        if now >= self._next_watch_s:
            self._next_watch_s = now + WATCH_INTERVAL_S
            self.forward.sweep(time.monotonic())
        self._sweep_timer = self._loop.call_later(SWEEP_INTERVAL_S, self._sweep)

    def _announce(self, event: str) -> None:
        if FALLBACK_BECAUSE is not None:
            log.warning(
                "the compiled splice engine is missing, relaying costs more CPU", because=FALLBACK_BECAUSE
            )
        log.info(
            event,
            maps=[f"{each.listen_text}={each.service_text}" for each in self._settings.maps],
            reverse=[
                f"{each.service_text}={','.join(map(str, each.targets))}" for each in self._settings.reverses
            ],
            rules=[rule_text(rule) for rule in self._settings.rules],
            routers=list(self._settings.registration.routers),
            connection_limit=self.admission.limit,
        )

    def _report(self, what: str, error: Exception) -> None:
        report_defect(self._loop, {"message": what, "exception": error})

    async def _reload(self) -> None:
        """Read the configuration again and change what it changes. Raises Misconfigured, and then nothing has changed."""
        assert self._read_again is not None
        wanted = await asyncio.to_thread(prepare, self._read_again, self._settings)
        parts = Parts(self.stack, self.controller, self.admission, self.acceptor, self.reverse)
        retired = put_into_effect(parts, self._settings, wanted)
        self._settings = wanted.settings
        ended = [each for each in self._retired if not each.traffic.active]
        self._served_by_retired += sum(each.traffic.connections for each in ended)
        self._retired = [each for each in self._retired if each.traffic.active] + retired
        self._announce("reloaded")

    # -- going down ------------------------------------------------------------------------------------------

    def _forget_signals(self) -> None:
        for each in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            self._loop.remove_signal_handler(each)

    def _terminate(self) -> None:
        self.stop(now=self._stop_wanted.is_set())

    def _interrupt(self) -> None:
        self.stop(now=True)

    async def _drain(self) -> None:
        """Take no more clients; wait for those that are here, until the deadline or "stop now"."""
        self.acceptor.take_waiting()
        self.acceptor.close()
        self.reverse.drain()
        if self._stop_now.is_set():
            return
        deadline_s = self._settings.timeouts.drain_s
        await self._let_flows_begin(min(deadline_s, self.stack.settings.sal.request_expiry_s))
        if self.admission.active:
            log.info("draining", clients=self.admission.active, deadline_s=deadline_s)
            self.admission.on_empty = self._stop_now.set
            try:
                async with asyncio.timeout(deadline_s):
                    await self._stop_now.wait()
            except TimeoutError:
                log.warning(
                    "the drain deadline is over: resetting what is left", clients=self.admission.active
                )
        await self._let_flows_end()

    async def _let_flows_begin(self, deadline_s: float) -> None:
        """Clients whose handshake is under way believe, or will soon, that they are connected."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(deadline_s):
                while self.stack.half_open and not self._stop_now.is_set():
                    await asyncio.sleep(FLOWS_END_CHECK_S)

    async def _let_flows_end(self) -> None:
        """The clients' connections are closed, but the last FINs of their flows may still be on their way."""
        deadline_s = self._loop.time() + FLOWS_END_S
        while any(flow["released"] for flow in self.stack.flows()):
            if self._loop.time() >= deadline_s:
                return
            await asyncio.sleep(FLOWS_END_CHECK_S)

    async def _stop(self) -> None:
        """Reset what is left and remove every trace."""
        if self._sweep_timer is not None:
            self._sweep_timer.cancel()
        self.admission.on_empty = self.admission.on_room = None
        self.acceptor.close()
        self.reverse.close()
        self.forward.give_up_all()
        self.reverse.give_up_all()
        self.relay.stop()
        await self.controller.stop()
        await self.stack.stop()
        self._forget_signals()
        traffic = [
            *self.acceptor.traffic,
            *(served.traffic for served in self.reverse.served),
            *(retired.traffic for retired in self._retired),
        ]
        log.info("stopped", served=self._served_by_retired + sum(each.connections for each in traffic))


def report_defect(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """An exception that nobody expected, in some callback: the others go on."""
    log.error("a defect of the translator", what=context["message"], exc_info=context.get("exception"))
