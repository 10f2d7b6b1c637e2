"""How does a program use Serval? `ServalStack`: the sans-IO SAL married to the kernel data plane on an asyncio loop.

It carries out the SAL's effects in order, feeds it packets, events and time, and hands connections to the application as ordinary
kernel TCP sockets. It knows no protocol rule (that is `sal`) and no kernel interface (that is `dataplane`).
All callbacks run on the loop's thread; none may block.
"""

from __future__ import annotations

import asyncio
import errno
import random
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog

from serval_core.access_policy import AccessPolicy
from serval_core.connection import Listener, OnAccept, OnConnected, OnFailed, PendingConnect
from serval_core.datagrams import Datagrams, Host
from serval_core.dataplane.kernel import DataPlaneSettings, FlowCounters, KernelDataPlane
from serval_core.dataplane.layouts import FlowEvent
from serval_core.dataplane.router import Router
from serval_core.effect_loop import EffectLoop
from serval_core.effects import (
    ExpectData,
    ExpectPeer,
    ForgetExpected,
    Happened,
    LimitSegments,
    SendPacket,
)
from serval_core.mobility_settings import MobilitySettings
from serval_core.names import FlowID, ServiceID, ServicePrefix
from serval_core.native_service import NativeService
from serval_core.paths import PathFinder
from serval_core.rules import Rule
from serval_core.sal import SalSettings, ServiceAccessLayer
from serval_core.service_events import ServiceEvents
from serval_core.service_requests import ServiceRequests
from serval_core.service_table import ServiceTable
from serval_core.stack_balance import Balancer
from serval_core.stack_migration import Migrations
from serval_core.stack_mobility import AutomaticMobility
from serval_core.stack_services import StackServices, report_defect
from serval_core.stack_socket_server import StackSocketServer
from serval_core.streams import Streams
from serval_core.unattended import UnattendedFlows

log = structlog.get_logger("serval_core.stack")

REMINDER_INTERVAL_S = 1.0  # sockets are told again how large their packets may be

# Batches of control packets per wake-up: between them the loop serves timers and relays.
BATCHES_PER_WAKE_UP = 4
BATCH_PACKETS = 64


@dataclass(frozen=True)
class StackSettings:
    """Everything an operator can set about the embedded stack."""

    sal: SalSettings = field(default_factory=SalSettings)
    dataplane: DataPlaneSettings = field(default_factory=DataPlaneSettings)
    broadcast_resolution: bool = True
    access: AccessPolicy = field(default_factory=AccessPolicy)  # of native programs
    mobility: MobilitySettings = field(default_factory=MobilitySettings)


class ServalStack:
    """The embedded stack; one per network namespace. Made by `start()`."""

    _loop: asyncio.AbstractEventLoop
    unattended: UnattendedFlows
    _sal: ServiceAccessLayer
    _effects: EffectLoop
    _reminder: asyncio.TimerHandle
    _streams: Streams
    datagrams: Datagrams
    router: Router
    services: StackServices
    migrations: Migrations
    mobility: AutomaticMobility

    def __init__(self, settings: StackSettings) -> None:
        self.settings = settings
        self.table = ServiceTable()
        self.events = ServiceEvents(time.time, report_defect)
        self.stack_socket = StackSocketServer()
        self.native = NativeService(self, settings.access)
        self._dataplane = KernelDataPlane(settings.dataplane)
        self._send_errors: dict[int, int] = {}
        self._broadcast_resolution = settings.broadcast_resolution
        self._host_observers: list[Callable[[], None]] = []

    # -- life ---------------------------------------------------------------------------------------------------------

    @classmethod
    async def start(
        cls, settings: StackSettings | None = None, native_listener: socket.socket | None = None
    ) -> ServalStack:
        """Take the namespace, clean up after a crashed predecessor, set the data plane up, serve the stack socket.

        `native_listener` (taken): a listening socket for native programs that the service manager has opened.
        Raises StackBusy when another stack runs here, KernelRefused when a privilege or a kernel feature is missing; then nothing
        is left behind.
        """
        stack = cls(settings or StackSettings())
        stack._loop = asyncio.get_running_loop()
        stack.stack_socket.open()
        try:
            stack.native.open(native_listener)
            leftovers = stack._dataplane.open()
        except BaseException:
            stack.native.close()
            stack.stack_socket.close()
            raise
        if leftovers:
            log.warning("removed what an earlier process had left behind", found=leftovers)
        stack._sal = ServiceAccessLayer(
            stack.settings.sal,
            stack.table,
            stack._dataplane.paths,
            random.SystemRandom(),
            stack._dataplane.native_ports,
        )
        effects = stack._effects = EffectLoop(stack._sal)
        stack.services = StackServices(
            stack.events, stack.table, stack._sal, stack._dataplane.icmp_errors, effects.run
        )
        stack.datagrams = Datagrams(
            stack._sal,
            Host(
                time.monotonic,
                effects.run,
                effects.run_soon,
                stack._dataplane.expect_data,
                stack.services.flow_opened,
                stack.services.flow_ended,
            ),
        )
        stack.unattended = UnattendedFlows(
            stack._dataplane, stack._sal, stack._take_events, effects.run
        )
        stack._streams = Streams(
            stack._sal,
            stack._dataplane,
            stack.services,
            stack.unattended,
            stack.datagrams.flows,
            effects,
        )
        effects.carry_out |= {
            SendPacket: stack._send_packet,
            ExpectPeer: lambda effect: stack._dataplane.expect_peer(effect.flow_id, effect.address),
            LimitSegments: stack._dataplane.limit_segments,
            ExpectData: lambda effect: stack._dataplane.expect_data(effect.flow_id),
            ForgetExpected: lambda effect: stack._dataplane.forget_expected(effect.flow_id),
            Happened: stack.services.happened,
            **stack._streams.carry_out,
            **stack.datagrams.carry_out,
        }
        stack.migrations = Migrations(
            stack._sal, stack._dataplane.paths, stack.events, effects.run
        )
        stack.mobility = AutomaticMobility(
            stack.settings.mobility,
            stack._sal,
            stack._dataplane.paths,
            stack.events,
            stack._streams.connections,
            stack._dataplane.neighbours,
            stack._dataplane.flow_counters,
            effects.run,
        )
        stack.migrations.on_placed = stack.mobility.mobility.placed
        balancer = Balancer(stack._sal, stack.migrations, stack._dataplane.flow_counters)
        stack._update_broadcast_rules()
        stack.router = Router(
            stack.table,
            stack._dataplane,
            stack._loop.call_later,
            stack.settings.dataplane.forward_in_kernel,
        )
        stack.on_host_change(stack.router.host_changed)
        stack.forwarding = stack.settings.sal.forwarding
        stack._loop.add_reader(stack._dataplane.control_fd, stack._packets_wait)
        for own in stack._dataplane.encapsulation.sockets:
            stack._loop.add_reader(own, stack._encapsulated_wait, own)
        if in_use := stack._dataplane.encapsulation.ports_in_use:
            log.warning("no UDP encapsulation: another program has its ports", ports=in_use)
        else:
            stack._sal.can_encapsulate()
        stack._loop.add_reader(stack._dataplane.event_fd, stack._events_wait)
        stack._loop.add_reader(stack._dataplane.monitor.fileno(), stack._host_changed)
        stack._loop.add_reader(stack._dataplane.too_big.fileno(), stack._too_big)
        stack._loop.add_reader(stack._dataplane.neighbours.fileno(), stack._dataplane.neighbours_changed)
        stack._remind()
        stack.stack_socket.register("flows", lambda _: stack.flows())
        stack.stack_socket.register("endpoints", lambda _: stack.datagrams.snapshot())
        for name, handler in ServiceRequests(stack.services).handlers().items():
            stack.stack_socket.register(name, handler)
        for name, handler in stack.migrations.handlers().items():
            stack.stack_socket.register(name, handler)
        for name, handler in balancer.handlers().items():
            stack.stack_socket.register(name, handler)
        stack.stack_socket.register("counters", lambda _: stack.counters())
        return stack

    async def stop(self) -> None:
        """Reset what is still open and remove every trace."""
        self._streams.abandon()
        self.native.close()
        self.mobility.close()
        self.unattended.stop()
        self._streams.abort_all()
        self.datagrams.close()
        self._streams.forget_all()
        self.services.close()
        self._loop.remove_reader(self._dataplane.control_fd)
        for own in self._dataplane.encapsulation.sockets:
            self._loop.remove_reader(own)
        self._loop.remove_reader(self._dataplane.event_fd)
        self._loop.remove_reader(self._dataplane.monitor.fileno())
        self._loop.remove_reader(self._dataplane.too_big.fileno())
        self._loop.remove_reader(self._dataplane.neighbours.fileno())
        self._effects.close()
        self._reminder.cancel()
        self.router.stop()
        self._dataplane.close()
        self.stack_socket.close()

    # -- calls of the application -------------------------------------------------------------------------------------

    def listen(self, prefix: ServicePrefix, on_accept: OnAccept, backlog: int = 1024) -> Listener:
        """Accept flows for a serviceID or prefix. Raises OurMistake (already bound, zero serviceID)."""
        return self._streams.listen(prefix, on_accept, backlog)

    def connect(
        self, service_id: ServiceID, on_connected: OnConnected, on_failed: OnFailed, destination: int = 0
    ) -> PendingConnect:
        """Open a flow to a service; one of the two callbacks follows, never before this call returns.

        `destination`: advisory IPv4 address that skips resolution (SPEC 1.5). `on_failed` gets the errno of SPEC 3.10 and a reason.
        """
        return self._streams.connect(service_id, on_connected, on_failed, destination)

    @property
    def forwarding(self) -> bool:
        """Whether this host is a service router. May be switched at any time."""
        return self._sal.forwarding.enabled

    @forwarding.setter
    def forwarding(self, enabled: bool) -> None:
        self._sal.forwarding.enabled = enabled
        if enabled:
            self.router.start()
        else:
            self.router.stop()

    @property
    def broadcast_resolution(self) -> bool:
        """Whether services without a rule are looked for by broadcast. May be switched at any time."""
        return self._broadcast_resolution

    @broadcast_resolution.setter
    def broadcast_resolution(self, enabled: bool) -> None:
        if enabled != self._broadcast_resolution:
            self._broadcast_resolution = enabled
            self._update_broadcast_rules()

    @property
    def paths(self) -> PathFinder:
        """The interfaces of this host, and the ways that lead from it."""
        return self._dataplane.paths

    def on_host_change(self, observer: Callable[[], None]) -> Callable[[], None]:
        """Call `observer` after interfaces, addresses or routes have changed; returns what ends that."""
        self._host_observers = [*self._host_observers, observer]

        def unsubscribe() -> None:
            self._host_observers = [each for each in self._host_observers if each is not observer]

        return unsubscribe

    def flow_counters(self, flow_id: FlowID) -> FlowCounters:
        """Packets and bytes of a flow on the wire."""
        return self._dataplane.flow_counters(flow_id)

    def flows(self) -> list[dict[str, object]]:
        """All flows with their states and wire counters, for `show flows`."""
        listed = self._sal.flows()
        for flow in listed:
            flow_id = FlowID(int(str(flow["flow_id"])))
            flow |= {**self._dataplane.flow_counters(flow_id)._asdict(), **flow}  # of UDP flows the SAL counts
            flow["framing"] = self._dataplane.framing(flow_id).value
            if holder := self.unattended.holder(flow_id):
                flow.update(pid=holder.pid, uid=holder.uid)
        return listed

    def bound_services(self) -> list[ServicePrefix]:
        """The prefixes that something listens on here."""
        return self.table.bound()

    @property
    def half_open(self) -> int:
        """How many flows have begun and are not accepted yet, for all listeners."""
        return self._sal.half_open

    def release_delayed(self, prefix: ServicePrefix) -> int:
        """Resolve anew all that DELAY rules hold for services under `prefix`; returns how many those were."""
        return self.services.release_delayed(prefix)

    def drop_delayed(self, prefix: ServicePrefix, reason: str) -> int:
        """Give that up instead; programs are told `reason`."""
        return self.services.drop_delayed(prefix, reason)

    def counters(self) -> dict[str, int]:
        """Counters of the SAL (drops by reason …) and of the data plane."""
        return {
            **self._sal.counters,
            **{f"table_{name}": count for name, count in self.table.counters.items()},
            **{f"delay_{name}": count for name, count in self.services.delay_counters().items()},
            **{f"stack_socket_{name}": count for name, count in self.stack_socket.counters.items()},
            **self._dataplane.counters(),
            **self.router.counters(),
            **self.mobility.counters,
            **{
                f"send_error_{errno.errorcode.get(code, code)}": count
                for code, count in self._send_errors.items()
            },
            "injected_wrong_checksum": self._streams.wrong_injected,
            "framing_native_ports": len(self._dataplane.native_ports),
            "flow_map_entries": self._dataplane.entries(),
            **{f"native_{name}": count for name, count in self.native.counters.items()},
            "open_transports": len(self._streams.connections),
            "repeated_after_moves": self._streams.lost_with_path.repeated,
            "unattended_flows": len(self.unattended),
            "unattended_given_up": self.unattended.given_up,
        }

    # -- what comes in ------------------------------------------------------------------------------------------------

    def _packets_wait(self) -> None:
        receive, received = self._dataplane.receive, self._sal.packet_received
        for _ in range(BATCHES_PER_WAKE_UP):
            batch = receive()
            now = time.monotonic()
            for packet, interface_index, broadcast in batch:
                received(packet, interface_index, broadcast, now)
            self._effects.run()
            if len(batch) < BATCH_PACKETS:
                return

    def _encapsulated_wait(self, own: socket.socket) -> None:
        now = time.monotonic()
        for each in self._dataplane.encapsulation.receive(own):
            self._sal.encapsulated_received(*each, now)
        self._effects.run()

    def _events_wait(self) -> None:
        self._take_events()
        self._effects.run()

    def _take_events(self) -> None:
        now = time.monotonic()
        for flow_id, event, address, port in self._dataplane.take_events():
            if event is FlowEvent.FIN_ACKNOWLEDGED:
                self._sal.fin_acknowledged(flow_id, now)
            elif event is FlowEvent.RESET_SENT:
                self._sal.transport_reset(flow_id, now)
            elif event is FlowEvent.NATIVE_DOUBTED:
                self._sal.native_doubted(flow_id, now)
            elif event is FlowEvent.PEER_SEEN:
                self._sal.peer_seen(flow_id, address, port, now)
            else:
                self._sal.native_proved(flow_id)

    def _remind(self) -> None:
        self._dataplane.segment_limits.remind()
        self._reminder = self._loop.call_later(REMINDER_INTERVAL_S, self._remind)

    def _too_big(self) -> None:
        for quoted, mtu_bytes in self._dataplane.too_big.take():
            self._sal.packet_too_big(quoted, mtu_bytes)
        self._effects.run()

    def _host_changed(self) -> None:
        self._dataplane.monitor.drain()
        self._dataplane.paths.refresh()
        self._dataplane.attach_interfaces()
        self._update_broadcast_rules()
        self.mobility.host_changed()
        self._sal.paths_changed(time.monotonic())
        self._effects.run()
        for observer in self._host_observers:
            observer()

    def _update_broadcast_rules(self) -> None:
        self.table.replace_broadcast_rules(
            [
                Rule.broadcast_on(interface.broadcast_address, interface.index)
                for interface in self._dataplane.paths.interfaces()
                if interface.broadcast_address and self._broadcast_resolution
            ]
        )

    # -- effects of the SAL -------------------------------------------------------------------------------------------

    def _send_packet(self, effect: SendPacket) -> None:
        code = self._dataplane.send(effect.packet, effect.destination, effect.interface_index)
        if code:
            self._send_errors[code] = self._send_errors.get(code, 0) + 1
            self.services.send_failed(effect.packet, code)
