"""What does a program hold of connected Serval UDP? Flows, listeners and connects under way, and what makes them.

As with streams (`connection`), handles know only their owner. All calls and callbacks are made on the stack's
loop. The protocol is `connected_datagrams`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from serval_core.connection import Attempt, OnFailed
from serval_core.effects import (
    Accepted,
    Connected,
    ConnectFailed,
    DeliverFlowDatagram,
    Effect,
    EndOfStream,
    FlowEnded,
    MovePath,
    OpenDatagrams,
)
from serval_core.errors import KernelRefused
from serval_core.names import FlowID, ServiceID, ServicePrefix
from serval_core.sal import ServiceAccessLayer
from serval_core.wire.sal import PROTOCOL_UDP

OnAccept = Callable[["DatagramFlow"], None]


class DatagramFlow:
    """An open UDP flow. Set `on_datagram(payload)` at once: what arrives without it is lost.

    `on_ended(errno)` is told once that nothing more will come: 0 when the peer has closed, else why the flow is
    dead (ECONNRESET, ETIMEDOUT …). Finish in any case with exactly one of `close()` and `abort()`.
    """

    __slots__ = (
        "_owner",
        "_told",
        "finished",
        "flow_id",
        "local_address",
        "on_datagram",
        "on_ended",
        "peer_address",
        "service_id",
    )

    def __init__(self, owner: DatagramFlows, opened: OpenDatagrams) -> None:
        self._owner = owner
        self.finished = False
        self._told = False
        self.flow_id = opened.flow_id
        self.local_address = opened.local_address
        self.peer_address = opened.peer_address
        self.service_id: ServiceID | None = None
        self.on_datagram: Callable[[bytes], None] | None = None
        self.on_ended: Callable[[int], None] | None = None

    def send(self, payload: bytes) -> int:
        """Send a datagram of 1 to FLOW_PAYLOAD_BYTES_MAX bytes to the peer.

        Returns 0, or an errno: EPIPE when the flow has ended or was closed, EHOSTUNREACH when no path leads to
        the peer now. PayloadSize, an OurMistake with an `errno`, for a wrong size.
        """
        return self._owner.send(self, payload)

    def close(self) -> None:
        """The application is finished: the peer is told with a FIN. Does nothing the second time."""
        if not self.finished:
            self.finished = True
            self._owner.closed(self)

    def abort(self) -> None:
        """End the flow with a reset."""
        if not self.finished:
            self.finished = True
            self._owner.aborted(self)

    def tell_ended(self, errno: int) -> None:
        """For the owner."""
        if not self._told and not self.finished:
            self._told = True
            if self.on_ended is not None:
                self.on_ended(errno)


class PendingDatagramFlow(Attempt[DatagramFlow]):
    """A connect of a UDP flow."""

    __slots__ = ()


class DatagramListener:
    """A serviceID prefix on which UDP flows are accepted."""

    __slots__ = ("_owner", "listener_id", "on_accept", "prefix")

    def __init__(
        self, owner: DatagramFlows, listener_id: int, prefix: ServicePrefix, on_accept: OnAccept
    ) -> None:
        self._owner = owner
        self.listener_id = listener_id
        self.prefix = prefix
        self.on_accept = on_accept

    def close(self) -> None:
        """Stop accepting; flows that were accepted live on. Does nothing the second time."""
        self._owner.listener_closed(self)


class Host(NamedTuple):
    """What is needed of the stack around: the SAL's time in seconds; to do what the SAL wants done, now or after
    the present callback; to let the data of a flow through to the SAL, which may raise KernelRefused; to publish
    that a flow was opened (as "active" or "passive") and has ended (with an errno).
    """

    now: Callable[[], float]
    run_effects: Callable[[], None]
    run_effects_soon: Callable[[], object]
    expect_data: Callable[[FlowID], None]
    flow_opened: Callable[[DatagramFlow, str], None]
    flow_ended: Callable[[DatagramFlow, int], None]


class DatagramFlows:
    """The UDP flows of one stack, as programs see them."""

    def __init__(self, sal: ServiceAccessLayer, host: Host) -> None:
        self._sal = sal
        self._host = host
        self._flows: dict[int, DatagramFlow] = {}
        self._pending: dict[int, PendingDatagramFlow] = {}
        self._listeners: dict[int, DatagramListener] = {}
        self.carry_out: dict[type[Effect], Callable[[Any], None]] = {
            OpenDatagrams: self._open,
            DeliverFlowDatagram: self._deliver,
        }
        """What is to be done for which effect. The stack passes others on that concern no stream."""

    def __len__(self) -> int:
        return len(self._flows)

    def listen(self, prefix: ServicePrefix, on_accept: OnAccept, backlog: int) -> DatagramListener:
        """Accept flows for a serviceID or prefix. Raises OurMistake."""
        listener_id = self._sal.listen(prefix, backlog, self._host.now(), PROTOCOL_UDP)
        listener = self._listeners[listener_id] = DatagramListener(self, listener_id, prefix, on_accept)
        self._host.run_effects()
        return listener

    def connect(
        self, service_id: ServiceID, on_connected: OnAccept, on_failed: OnFailed, destination: int
    ) -> PendingDatagramFlow:
        """Open a flow; one of the callbacks follows, never before this call returns."""
        flow_id = self._sal.connect(service_id, self._host.now(), destination, PROTOCOL_UDP)
        pending = self._pending[flow_id] = PendingDatagramFlow(
            self, flow_id, service_id, on_connected, on_failed
        )
        self._host.run_effects_soon()
        return pending

    def close(self) -> None:
        """The stack stops: reset whatever is open."""
        for pending in list(self._pending.values()):
            pending.cancel()
        for listener in list(self._listeners.values()):
            listener.close()
        for flow in list(self._flows.values()):
            flow.abort()

    # For the handles.

    def send(self, flow: DatagramFlow, payload: bytes) -> int:
        """Send in a flow."""
        errno = self._sal.send_on_flow(flow.flow_id, payload)
        self._host.run_effects()
        return errno

    def closed(self, flow: DatagramFlow) -> None:
        """The application has closed a flow, which may have ended before."""
        if flow.flow_id in self._flows:
            self._sal.release(flow.flow_id, self._host.now())
            self._host.run_effects()

    def aborted(self, flow: DatagramFlow) -> None:
        """The application wants a flow reset, which may have ended before."""
        if flow.flow_id in self._flows:
            self._sal.abort(flow.flow_id, self._host.now())
            self._host.run_effects()

    def connect_cancelled(self, pending: PendingDatagramFlow) -> None:
        """Nobody waits for a connect any more."""
        if self._pending.pop(pending.flow_id, None) is not None:
            self._sal.cancel_connect(pending.flow_id, self._host.now())
            self._host.run_effects()

    def listener_closed(self, listener: DatagramListener) -> None:
        """Nobody accepts any more."""
        if self._listeners.pop(listener.listener_id, None) is not None:
            self._sal.close_listener(listener.listener_id, self._host.now())
            self._host.run_effects()

    # Effects of the SAL.

    def _open(self, effect: OpenDatagrams) -> None:
        try:
            self._host.expect_data(effect.flow_id)
        except KernelRefused as refusal:
            self._sal.transport_failed(effect.flow_id, refusal.errno, self._host.now())
            return
        self._flows[effect.flow_id] = DatagramFlow(self, effect)

    def _deliver(self, effect: DeliverFlowDatagram) -> None:
        flow = self._flows.get(effect.flow_id)
        if flow is not None and flow.on_datagram is not None and not flow.finished:
            flow.on_datagram(effect.payload)

    def moved(self, effect: MovePath) -> None:
        """An end of a flow is elsewhere. Its datagrams find the way by themselves."""
        flow = self._flows.get(effect.flow_id)
        if flow is not None:
            flow.local_address, flow.peer_address = effect.local_address, effect.peer_address

    def connected(self, effect: Connected) -> None:
        """A flow is open that this host began."""
        flow = self._flows.get(effect.flow_id)
        pending = self._pending.pop(effect.flow_id, None)
        if flow is None:
            return
        if pending is None:
            flow.abort()
            return
        flow.service_id = pending.service_id
        self._host.flow_opened(flow, "active")
        pending.on_connected(flow)

    def connect_failed(self, effect: ConnectFailed) -> None:
        """A connect has failed."""
        pending = self._pending.pop(effect.flow_id, None)
        if pending is not None:
            pending.on_failed(effect.errno, effect.why)

    def accepted(self, effect: Accepted) -> None:
        """A flow is open that a client began."""
        flow = self._flows.get(effect.flow_id)
        if flow is None:
            return
        self._sal.accepted_taken(effect.flow_id)
        flow.service_id = effect.service_id
        self._host.flow_opened(flow, "passive")
        listener = self._listeners.get(effect.listener_id)
        if listener is None:
            flow.abort()
        else:
            listener.on_accept(flow)

    def end_of_stream(self, effect: EndOfStream) -> None:
        """The peer has closed."""
        flow = self._flows.get(effect.flow_id)
        if flow is not None:
            flow.tell_ended(0)

    def flow_ended(self, effect: FlowEnded) -> None:
        """A flow is gone."""
        flow = self._flows.pop(effect.flow_id, None)
        if flow is not None:
            self._host.flow_ended(flow, effect.errno)
            flow.tell_ended(effect.errno)
            return
        pending = self._pending.pop(effect.flow_id, None)
        if pending is not None:
            pending.on_failed(effect.errno, "the data plane has no room for the flow")
