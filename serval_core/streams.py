"""What does the stack hold for programs that use streams? `Streams`: connections, connects under way and listeners.

It owns the handles of `connection`, carries out the effects that concern streams, and passes those on that concern datagram
flows. Kernel sockets are opened, reset and taken down here, except those that other programs hold (`unattended`).
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from typing import Any

import structlog

from serval_core.connection import Connection, Listener, OnAccept, OnConnected, OnFailed, PendingConnect
from serval_core.datagram_flows import DatagramFlows
from serval_core.dataplane import tcp_repair
from serval_core.dataplane.kernel import FlowCounters, KernelDataPlane
from serval_core.effect_loop import EffectLoop
from serval_core.effects import (
    Accepted,
    CloseTransport,
    Connected,
    ConnectFailed,
    Effect,
    EndOfStream,
    FlowEnded,
    InjectSegment,
    MovePath,
    OpenTransport,
    ResetTransport,
)
from serval_core.errors import KernelRefused
from serval_core.lost_with_path import LostWithPath
from serval_core.names import FlowID, ServiceID, ServicePrefix
from serval_core.sal import ServiceAccessLayer
from serval_core.stack_services import StackServices
from serval_core.unattended import Holder, UnattendedFlows

log = structlog.get_logger("serval_core.stack")

# A FIN of the peer's SAL without a TCP FIN (SPEC 4.5) ends the stream when nothing has arrived for this time.
END_OF_STREAM_GRACE_S = 1.0
RESET_RETRY_S = 0.005  # doubles
RESET_ATTEMPTS = 10
TCP_CLOSED = 7  # linux/tcp.h
NO_DESCRIPTOR = -1  # of a connection whose socket another program has
READING_STATES = frozenset({1, 4, 5})  # ESTABLISHED, FIN_WAIT1, FIN_WAIT2: no FIN of the peer yet


class Streams:
    """The streams of one stack. All calls and callbacks are made on the stack's loop."""

    def __init__(
        self,
        sal: ServiceAccessLayer,
        dataplane: KernelDataPlane,
        services: StackServices,
        unattended: UnattendedFlows,
        datagram_flows: DatagramFlows,
        effects: EffectLoop,
    ) -> None:
        self._sal = sal
        self._dataplane = dataplane
        self._services = services
        self._unattended = unattended
        self._datagram_flows = datagram_flows
        self._run_effects, self._run_effects_soon = effects.run, effects.run_soon
        self._loop = asyncio.get_running_loop()
        self.connections: dict[int, Connection] = {}
        self._pending: dict[int, PendingConnect] = {}
        self._listeners: dict[int, Listener] = {}
        self.wrong_injected = 0
        self.lost_with_path = LostWithPath(dataplane.sockets.look, dataplane.segment_limits.repeat_all)
        self.carry_out: dict[type[Effect], Callable[[Any], None]] = {
            OpenTransport: self._open_transport,
            MovePath: self._move_path,
            InjectSegment: self._inject_segment,
            EndOfStream: self._end_of_stream,
            ResetTransport: self._reset_transport,
            CloseTransport: self._close_transport,
            Connected: self._connected,
            ConnectFailed: self._connect_failed,
            Accepted: self._accepted,
            FlowEnded: self._flow_ended,
        }
        """What is to be done for which effect."""

    def abandon(self) -> None:
        """The stack stops: connects under way are cancelled, listeners closed."""
        for pending in list(self._pending.values()):
            pending.cancel()
        for listener in list(self._listeners.values()):
            listener.close()

    def abort_all(self) -> None:
        """Reset every connection."""
        for connection in list(self.connections.values()):
            connection.abort()

    def forget_all(self) -> None:
        """Take down what is left, silently."""
        self.lost_with_path.close()
        for connection in list(self.connections.values()):
            self._forget(connection)

    def flow_counters(self, flow_id: FlowID) -> FlowCounters:
        """Owner: packets and bytes of a flow on the wire."""
        return self._dataplane.flow_counters(flow_id)

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
        self._run_effects_soon()
        return pending

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
        self._unattended.take(flow_id, fd, holder)
        if connection.ended:
            # Reset while it waited to be handed over.
            self._unattended.deliver_reset(flow_id)
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

    def _open_transport(self, effect: OpenTransport) -> None:
        try:
            fd = self._dataplane.open_transport(effect)
        except KernelRefused as error:
            log.error("cannot open a transport", flow=effect.flow_id, error=str(error))
            self._dataplane.forget_expected(effect.flow_id)
            self._sal.transport_failed(effect.flow_id, error.errno, time.monotonic())
            return
        self.connections[effect.flow_id] = Connection(self, effect, fd)

    def _move_path(self, effect: MovePath) -> None:
        connection = self.connections.get(effect.flow_id)
        if connection is None:
            self._datagram_flows.moved(effect)
            return
        connection.local_address, connection.peer_address = effect.local_address, effect.peer_address
        if self._dataplane.move(effect):
            self.lost_with_path.moved(effect.flow_id)

    def _inject_segment(self, effect: InjectSegment) -> None:
        if effect.flow_id in self.connections and not self._dataplane.sockets.inject(
            effect.flow_id, effect.segment, effect.source, effect.destination
        ):
            self.wrong_injected += 1

    def _end_of_stream(self, effect: EndOfStream) -> None:
        """Usually the kernel has read the TCP FIN long ago. A peer that only sends the SAL FIN needs our help."""
        connection = self.connections.get(effect.flow_id)
        if connection is None:
            self._datagram_flows.end_of_stream(effect)
        elif connection.fd == NO_DESCRIPTOR:
            self._unattended.end_stream(effect.flow_id)
        elif tcp_repair.state(connection.fd) in READING_STATES:
            self._end_stream_when_quiet(connection, -1)

    def _end_stream_when_quiet(self, connection: Connection, packets_before: int) -> None:
        """End what the application reads once no packet has arrived for the grace time."""
        if self.connections.get(connection.flow_id) is not connection:
            return
        if connection.fd == NO_DESCRIPTOR:
            self._unattended.end_stream(FlowID(connection.flow_id))
            return
        packets = connection.counters().packets_in
        if packets == packets_before:
            tcp_repair.shut_down(connection.fd, socket.SHUT_RD)
        else:
            self._loop.call_later(END_OF_STREAM_GRACE_S, self._end_stream_when_quiet, connection, packets)

    def _reset_transport(self, effect: ResetTransport) -> None:
        connection = self.connections.get(effect.flow_id)
        if connection is None:
            return
        self._dataplane.remove_flow(effect.flow_id)
        if connection.fd == NO_DESCRIPTOR:
            self._unattended.deliver_reset(effect.flow_id)
        else:
            self._deliver_reset(connection, 0)

    def _deliver_reset(self, connection: Connection, attempt: int) -> None:
        """Hand the socket a reset until it has taken one: segments that were still in a queue of the kernel may move what it
        expects after we have read it, and a reset out of sequence is ignored (RFC 5961)."""
        if self.connections.get(connection.flow_id) is not connection or connection.released:
            return
        if tcp_repair.state(connection.fd) == TCP_CLOSED:
            return
        if attempt == RESET_ATTEMPTS:
            log.error("the kernel socket of a reset flow does not take the reset", flow=connection.flow_id)
            return
        self._dataplane.reset(FlowID(connection.flow_id), connection.fd)
        self._loop.call_later(RESET_RETRY_S * 2**attempt, self._deliver_reset, connection, attempt + 1)

    def _close_transport(self, effect: CloseTransport) -> None:
        if effect.flow_id in self.connections:
            self._dataplane.remove_flow(effect.flow_id)

    def _connected(self, effect: Connected) -> None:
        connection = self.connections.get(effect.flow_id)
        if connection is None:
            self._datagram_flows.connected(effect)
            return  # or the transport could not be opened; FlowEnded follows and tells
        pending = self._pending.pop(effect.flow_id, None)
        if pending is None:
            connection.abort()
            return
        connection.service_id = pending.service_id
        self._services.flow_opened(connection, "active")
        pending.on_connected(connection)

    def _connect_failed(self, effect: ConnectFailed) -> None:
        pending = self._pending.pop(effect.flow_id, None)
        if pending is None:
            self._datagram_flows.connect_failed(effect)
        else:
            pending.on_failed(effect.errno, effect.why)

    def _accepted(self, effect: Accepted) -> None:
        connection = self.connections.get(effect.flow_id)
        listener = self._listeners.get(effect.listener_id)
        if connection is None:
            self._datagram_flows.accepted(effect)
            return
        if listener is None or not listener.holds_backlog:
            self._sal.accepted_taken(effect.flow_id)
        connection.service_id = effect.service_id
        self._services.flow_opened(connection, "passive")
        if listener is None:
            connection.abort()
        else:
            listener.on_accept(connection)

    def _flow_ended(self, effect: FlowEnded) -> None:
        connection = self.connections.get(effect.flow_id)
        if connection is None:
            pending = self._pending.pop(effect.flow_id, None)
            if pending is None:
                self._datagram_flows.flow_ended(effect)
            else:
                pending.on_failed(effect.errno, "the kernel refused the transport")
            return
        connection.ended = True
        self._services.flow_ended(connection, effect.errno)
        if connection.released:
            self._forget(connection)
        elif connection.on_ended is not None:
            connection.on_ended(effect.errno)

    def _forget(self, connection: Connection) -> None:
        """The last step: flow gone, application done. The socket goes down silently."""
        if self.connections.pop(connection.flow_id, None) is not None:
            self._dataplane.remove_flow(FlowID(connection.flow_id))
            if connection.fd == NO_DESCRIPTOR:
                self._unattended.forget(FlowID(connection.flow_id))
            else:
                self._dataplane.take_down(connection.fd)
