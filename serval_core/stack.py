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
from typing import Any

import structlog

from serval_core.access_policy import AccessPolicy
from serval_core.connection import Connection, Listener, OnAccept, OnConnected, OnFailed, PendingConnect
from serval_core.datagrams import Datagrams, Host
from serval_core.dataplane import tcp_repair
from serval_core.dataplane.kernel import DataPlaneSettings, FlowCounters, FlowEvent, KernelDataPlane
from serval_core.dataplane.router import Router
from serval_core.effects import (
    Accepted,
    CloseTransport,
    Connected,
    ConnectFailed,
    Effect,
    EndOfStream,
    ExpectData,
    FlowEnded,
    ForgetExpected,
    Happened,
    InjectSegment,
    LimitSegments,
    MovePath,
    OpenTransport,
    ResetTransport,
    SendPacket,
)
from serval_core.errors import KernelRefused
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
from serval_core.unattended import Holder, UnattendedFlows

log = structlog.get_logger("serval_core.stack")

# Batches of control packets per wake-up: between them the loop serves timers and relays.
BATCHES_PER_WAKE_UP = 4
BATCH_PACKETS = 64
# A FIN of the peer's SAL without a TCP FIN (SPEC 4.5) ends the stream when nothing has arrived for this time.
END_OF_STREAM_GRACE_S = 1.0
RESET_RETRY_S = 0.005  # doubles
RESET_ATTEMPTS = 10
TCP_CLOSED = 7  # linux/tcp.h
NO_DESCRIPTOR = -1  # of a connection whose socket another program has
READING_STATES = frozenset({1, 4, 5})  # ESTABLISHED, FIN_WAIT1, FIN_WAIT2: no FIN of the peer yet


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
        self._connections: dict[int, Connection] = {}
        self._pending: dict[int, PendingConnect] = {}
        self._listeners: dict[int, Listener] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due = 0.0
        self._running_effects = False
        self._send_errors: dict[int, int] = {}
        self._wrong_injected = 0
        self._broadcast_resolution = settings.broadcast_resolution
        self._host_observers: list[Callable[[], None]] = []
        self._carry_out: dict[type[Effect], Callable[[Any], None]] = {
            SendPacket: self._send_packet,
            OpenTransport: self._open_transport,
            MovePath: self._move_path,
            LimitSegments: lambda effect: self._dataplane.limit_segments(effect.flow_id, effect.mtu_bytes),
            ExpectData: lambda effect: self._dataplane.expect_data(effect.flow_id),
            ForgetExpected: lambda effect: self._dataplane.forget_expected(effect.flow_id),
            InjectSegment: self._inject_segment,
            EndOfStream: self._end_of_stream,
            ResetTransport: self._reset_transport,
            CloseTransport: self._close_transport,
            Connected: self._connected,
            ConnectFailed: self._connect_failed,
            Accepted: self._accepted,
            FlowEnded: self._flow_ended,
        }

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
        stack.services = StackServices(
            stack.events, stack.table, stack._sal, stack._dataplane.icmp_errors, stack._run_effects
        )
        stack.datagrams = Datagrams(
            stack._sal,
            Host(
                time.monotonic,
                stack._run_effects,
                lambda: stack._loop.call_soon(stack._run_effects),
                stack._dataplane.expect_data,
                stack.services.flow_opened,
                stack.services.flow_ended,
            ),
        )
        stack._carry_out |= stack.datagrams.carry_out
        stack._carry_out[Happened] = stack.services.happened
        stack.migrations = Migrations(
            stack._sal, stack._dataplane.paths, stack.events, stack._run_effects
        )
        stack.mobility = AutomaticMobility(
            stack.settings.mobility,
            stack._sal,
            stack._dataplane.paths,
            stack.events,
            stack._connections,
            stack._dataplane.neighbours,
            stack._dataplane.flow_counters,
            stack._run_effects,
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
        stack.unattended = UnattendedFlows(
            stack._dataplane, stack._sal, stack._take_events, stack._run_effects
        )
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
        for pending in list(self._pending.values()):
            pending.cancel()
        for listener in list(self._listeners.values()):
            listener.close()
        self.native.close()
        self.mobility.close()
        self.unattended.stop()
        for connection in list(self._connections.values()):
            connection.abort()
        self.datagrams.close()
        for connection in list(self._connections.values()):
            self._forget(connection)
        self.services.close()
        self._loop.remove_reader(self._dataplane.control_fd)
        for own in self._dataplane.encapsulation.sockets:
            self._loop.remove_reader(own)
        self._loop.remove_reader(self._dataplane.event_fd)
        self._loop.remove_reader(self._dataplane.monitor.fileno())
        self._loop.remove_reader(self._dataplane.too_big.fileno())
        self._loop.remove_reader(self._dataplane.neighbours.fileno())
        if self._timer is not None:
            self._timer.cancel()
        self.router.stop()
        self._dataplane.close()
        self.stack_socket.close()

    # -- calls of the application -------------------------------------------------------------------------------------

    def listen(self, prefix: ServicePrefix, on_accept: OnAccept, backlog: int = 1024) -> Listener:
        """Accept flows for a serviceID or prefix. Raises OurMistake (already bound, zero serviceID)."""
        listener_id = self._sal.listen(prefix, backlog, time.monotonic())
        listener = self._listeners[listener_id] = Listener(self, listener_id, prefix, on_accept)
        self._run_effects()
        return listener

    def connect(
        self, service_id: ServiceID, on_connected: OnConnected, on_failed: OnFailed, destination: int = 0
    ) -> PendingConnect:
        """Open a flow to a service; one of the two callbacks follows, never before this call returns.

        `destination`: advisory IPv4 address that skips resolution (SPEC 1.5). `on_failed` gets the errno of SPEC 3.10 and a reason.
        """
        flow_id = self._sal.connect(service_id, time.monotonic(), destination)
        pending = self._pending[flow_id] = PendingConnect(self, flow_id, service_id, on_connected, on_failed)
        self._loop.call_soon(self._run_effects)
        return pending

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
            "injected_wrong_checksum": self._wrong_injected,
            "framing_native_ports": len(self._dataplane.native_ports),
            "flow_map_entries": self._dataplane.entries(),
            **{f"native_{name}": count for name, count in self.native.counters.items()},
            "open_transports": len(self._connections),
            "unattended_flows": len(self.unattended),
            "unattended_given_up": self.unattended.given_up,
        }

    def connection_released(self, connection: Connection) -> None:
        """Owner: both directions are finished; the SAL closes, then the socket goes down."""
        if connection.ended:
            self._forget(connection)
            return
        tcp_repair.shut_down(connection.fd, socket.SHUT_WR)
        self._sal.release(FlowID(connection.flow_id), time.monotonic())
        self._run_effects()

    def connection_aborted(self, connection: Connection) -> None:
        """Owner: end the flow with a reset."""
        if connection.ended:
            self._forget(connection)
            return
        self._sal.abort(FlowID(connection.flow_id), time.monotonic())
        self._run_effects()

    def connection_handed_over(self, connection: Connection, holder: Holder) -> None:
        """Owner: another program has the socket, and from now on only it."""
        fd, connection.fd = connection.fd, NO_DESCRIPTOR
        flow_id = FlowID(connection.flow_id)
        self.unattended.take(flow_id, fd, holder)
        if connection.ended:
            # Reset while it waited to be handed over.
            self.unattended.deliver_reset(flow_id)
            self._forget(connection)
        self._run_effects()

    def connection_taken(self, connection: Connection) -> None:
        """Owner: the application of a listener that holds its backlog has the connection."""
        self._sal.accepted_taken(FlowID(connection.flow_id))

    def connect_cancelled(self, pending: PendingConnect) -> None:
        """Owner: nobody waits for this connect any more."""
        if self._pending.pop(pending.flow_id, None) is not None:
            self._sal.cancel_connect(pending.flow_id, time.monotonic())
            self._run_effects()

    def listener_refuses(self, listener: Listener, refusing: bool) -> None:
        """Owner: begin no new flows on this prefix, or begin them again."""
        if listener.listener_id in self._listeners:
            self._sal.set_refusing(listener.listener_id, refusing)

    def listener_closed(self, listener: Listener) -> None:
        """Owner: accept no more on this prefix."""
        if self._listeners.pop(listener.listener_id, None) is not None:
            self._sal.close_listener(listener.listener_id, time.monotonic())
            self._run_effects()

    # -- what comes in ------------------------------------------------------------------------------------------------

    def _packets_wait(self) -> None:
        receive, received = self._dataplane.receive, self._sal.packet_received
        for _ in range(BATCHES_PER_WAKE_UP):
            batch = receive()
            now = time.monotonic()
            for packet, interface_index, broadcast in batch:
                received(packet, interface_index, broadcast, now)
            self._run_effects()
            if len(batch) < BATCH_PACKETS:
                return

    def _encapsulated_wait(self, own: socket.socket) -> None:
        now = time.monotonic()
        for each in self._dataplane.encapsulation.receive(own):
            self._sal.encapsulated_received(*each, now)
        self._run_effects()

    def _events_wait(self) -> None:
        self._take_events()
        self._run_effects()

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

    def _too_big(self) -> None:
        for quoted, mtu_bytes in self._dataplane.too_big.take():
            self._sal.packet_too_big(quoted, mtu_bytes)
        self._run_effects()

    def _host_changed(self) -> None:
        self._dataplane.monitor.drain()
        self._dataplane.paths.refresh()
        self._dataplane.attach_interfaces()
        self._update_broadcast_rules()
        self.mobility.host_changed()
        self._sal.paths_changed(time.monotonic())
        self._run_effects()
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

    def _timer_fired(self) -> None:
        self._timer = None
        self._sal.handle_timeouts(time.monotonic())
        self._run_effects()

    def _arm_timer(self) -> None:
        due = self._sal.next_timeout()
        if self._timer is not None:
            # A timer that fires too early costs less than one cancelled per packet.
            if due is None or due >= self._timer_due:
                return
            self._timer.cancel()
            self._timer = None
        if due is not None:
            self._timer_due = due
            self._timer = self._loop.call_later(max(0.0, due - time.monotonic()), self._timer_fired)

    # -- effects of the SAL -------------------------------------------------------------------------------------------

    def _run_effects(self) -> None:
        """Carry out effects until there are none. Callbacks of the application may cause more: those wait for their turn."""
        if self._running_effects:
            return
        self._running_effects = True
        try:
            while effects := self._sal.take_effects():
                for effect in effects:
                    try:
                        self._carry_out[type(effect)](effect)
                    except Exception as error:
                        # One callback's defect must not cost other flows their effects.
                        self._loop.call_exception_handler(
                            {"message": f"while carrying out {type(effect).__name__}", "exception": error}
                        )
        finally:
            self._running_effects = False
        self._arm_timer()

    def _send_packet(self, effect: SendPacket) -> None:
        code = self._dataplane.send(effect.packet, effect.destination, effect.interface_index)
        if code:
            self._send_errors[code] = self._send_errors.get(code, 0) + 1
            self.services.send_failed(effect.packet, code)

    def _open_transport(self, effect: OpenTransport) -> None:
        try:
            fd = self._dataplane.open_transport(effect)
        except KernelRefused as error:
            log.error("cannot open a transport", flow=effect.flow_id, error=str(error))
            self._dataplane.forget_expected(effect.flow_id)
            self._sal.transport_failed(effect.flow_id, error.errno, time.monotonic())
            return
        self._connections[effect.flow_id] = Connection(self, effect, fd)

    def _move_path(self, effect: MovePath) -> None:
        connection = self._connections.get(effect.flow_id)
        if connection is None:
            self.datagrams.flows.moved(effect)
            return
        connection.local_address, connection.peer_address = effect.local_address, effect.peer_address
        self._dataplane.move(effect)

    def _inject_segment(self, effect: InjectSegment) -> None:
        if effect.flow_id in self._connections and not self._dataplane.inject(
            effect.flow_id, effect.segment, effect.source, effect.destination
        ):
            self._wrong_injected += 1

    def _end_of_stream(self, effect: EndOfStream) -> None:
        """Usually the kernel has read the TCP FIN long ago. A peer that only sends the SAL FIN needs our help."""
        connection = self._connections.get(effect.flow_id)
        if connection is None:
            self.datagrams.flows.end_of_stream(effect)
        elif connection.fd == NO_DESCRIPTOR:
            self.unattended.end_stream(effect.flow_id)
        elif tcp_repair.state(connection.fd) in READING_STATES:
            self._end_stream_when_quiet(connection, -1)

    def _end_stream_when_quiet(self, connection: Connection, packets_before: int) -> None:
        """End what the application reads once no packet has arrived for the grace time."""
        if self._connections.get(connection.flow_id) is not connection:
            return
        if connection.fd == NO_DESCRIPTOR:
            self.unattended.end_stream(FlowID(connection.flow_id))
            return
        packets = connection.counters().packets_in
        if packets == packets_before:
            tcp_repair.shut_down(connection.fd, socket.SHUT_RD)
        else:
            self._loop.call_later(END_OF_STREAM_GRACE_S, self._end_stream_when_quiet, connection, packets)

    def _reset_transport(self, effect: ResetTransport) -> None:
        connection = self._connections.get(effect.flow_id)
        if connection is None:
            return
        self._dataplane.remove_flow(effect.flow_id)
        if connection.fd == NO_DESCRIPTOR:
            self.unattended.deliver_reset(effect.flow_id)
        else:
            self._deliver_reset(connection, 0)

    def _deliver_reset(self, connection: Connection, attempt: int) -> None:
        """Hand the socket a reset until it has taken one: segments that were still in a queue of the kernel may move what it
        expects after we have read it, and a reset out of sequence is ignored (RFC 5961)."""
        if self._connections.get(connection.flow_id) is not connection or connection.released:
            return
        if tcp_repair.state(connection.fd) == TCP_CLOSED:
            return
        if attempt == RESET_ATTEMPTS:
            log.error("the kernel socket of a reset flow does not take the reset", flow=connection.flow_id)
            return
        self._dataplane.reset(FlowID(connection.flow_id), connection.fd)
        self._loop.call_later(RESET_RETRY_S * 2**attempt, self._deliver_reset, connection, attempt + 1)

    def _close_transport(self, effect: CloseTransport) -> None:
        if effect.flow_id in self._connections:
            self._dataplane.remove_flow(effect.flow_id)

    def _connected(self, effect: Connected) -> None:
        connection = self._connections.get(effect.flow_id)
        if connection is None:
            self.datagrams.flows.connected(effect)
            return  # or the transport could not be opened; FlowEnded follows and tells
        pending = self._pending.pop(effect.flow_id, None)
        if pending is None:
            connection.abort()
            return
        connection.service_id = pending.service_id
        self.services.flow_opened(connection, "active")
        pending.on_connected(connection)

    def _connect_failed(self, effect: ConnectFailed) -> None:
        pending = self._pending.pop(effect.flow_id, None)
        if pending is None:
            self.datagrams.flows.connect_failed(effect)
        else:
            pending.on_failed(effect.errno, effect.why)

    def _accepted(self, effect: Accepted) -> None:
        connection = self._connections.get(effect.flow_id)
        listener = self._listeners.get(effect.listener_id)
        if connection is None:
            self.datagrams.flows.accepted(effect)
            return
        if listener is None or not listener.holds_backlog:
            self._sal.accepted_taken(effect.flow_id)
        connection.service_id = effect.service_id
        self.services.flow_opened(connection, "passive")
        if listener is None:
            connection.abort()
        else:
            listener.on_accept(connection)

    def _flow_ended(self, effect: FlowEnded) -> None:
        connection = self._connections.get(effect.flow_id)
        if connection is None:
            pending = self._pending.pop(effect.flow_id, None)
            if pending is None:
                self.datagrams.flows.flow_ended(effect)
            else:
                pending.on_failed(effect.errno, "the kernel refused the transport")
            return
        connection.ended = True
        self.services.flow_ended(connection, effect.errno)
        if connection.released:
            self._forget(connection)
        elif connection.on_ended is not None:
            connection.on_ended(effect.errno)

    def _forget(self, connection: Connection) -> None:
        """The last step: flow gone, application done. The socket goes down silently."""
        if self._connections.pop(connection.flow_id, None) is not None:
            self._dataplane.remove_flow(FlowID(connection.flow_id))
            if connection.fd == NO_DESCRIPTOR:
                self.unattended.forget(FlowID(connection.flow_id))
            else:
                self._dataplane.take_down(connection.fd)
