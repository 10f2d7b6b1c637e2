"""The service access layer: packets and calls go in, effects come out. It never touches a socket or a clock.

This is the facade that `stack` drives. It says which part a call concerns, and nothing about what that part does:
active_open, passive_open, close, migration; for packets `incoming` says so. Time is an argument, in seconds of any
clock that does not go back. Not thread-safe.

After every call, and when `next_timeout()` has come and `handle_timeouts` was called, carry out
`take_effects()` in order.
"""

from __future__ import annotations

from collections.abc import Callable
from errno import ECONNABORTED, EPIPE

from serval_core import path_mtu
from serval_core.active_open import ActiveOpen
from serval_core.close import Close
from serval_core.connected_datagrams import ConnectedDatagrams
from serval_core.core import Core, RandomSource
from serval_core.delay_queue import DelayQueue
from serval_core.effects import Effect
from serval_core.errors import OurMistake
from serval_core.flow import Flow
from serval_core.framing import NativePorts, NoNativePorts
from serval_core.incoming import Incoming
from serval_core.migration import Migration
from serval_core.migration_states import OwnMove
from serval_core.moves import LiveFlow
from serval_core.moving import MOVABLE
from serval_core.names import FlowID, ServiceID, ServicePrefix, format_address
from serval_core.passive_open import PassiveOpen
from serval_core.path_quality import PathQuality
from serval_core.paths import Path, PathFinder
from serval_core.sal_settings import SalSettings
from serval_core.sent_resets import SentResets
from serval_core.service_table import ServiceTable
from serval_core.states import State
from serval_core.unconnected import Endpoint, Unconnected
from serval_core.undeliverable import error_name, undelivered
from serval_core.wire.sal import PROTOCOL_TCP, PROTOCOL_UDP

__all__ = ["SalSettings", "ServiceAccessLayer"]


class ServiceAccessLayer:
    """One host's service access layer.

    Calls about a flow that is gone are no mistake: it may have ended while the caller was on its way.
    """

    def __init__(
        self,
        settings: SalSettings,
        table: ServiceTable,
        paths: PathFinder,
        random: RandomSource,
        native_ports: NativePorts | None = None,
    ) -> None:
        """`random` must be unpredictable (`random.SystemRandom`) wherever there may be attackers.

        `native_ports` None: framing `native` is not offered to anybody.
        """
        self._core = Core(settings, table, paths, random, NoNativePorts() if native_ports is None else native_ports)
        self._active_open = ActiveOpen(self._core)
        self._connected_datagrams = ConnectedDatagrams(self._core)
        self._passive_open = PassiveOpen(self._core, self._connected_datagrams)
        sent_resets = SentResets(self._core)
        self._migration = Migration(self._core)
        self._close = Close(self._core, sent_resets, self._connected_datagrams, self._migration)
        self._unconnected = Unconnected(self._core)
        incoming = Incoming(
            self._core, self._active_open, self._passive_open, self._close, sent_resets, self._unconnected
        )
        self.packet_received = incoming.packet_received
        self.encapsulated_received = incoming.encapsulated_received
        self.forwarding = incoming.forwarding
        """Switch `forwarding.enabled` to make this host a service router, or none any more."""
        self._core.prepare_steps()
        self.counters = self._core.counters
        """How often what happened since the start. `dropped_REASON` counts packets that had no effect but, at
        most, an acknowledgement or an RST in answer.
        """

    def listen(
        self, prefix: ServicePrefix, backlog: int, now: float, protocol: int = PROTOCOL_TCP
    ) -> int:
        """Accept TCP or UDP connections to the services under `prefix`; returns the listener's number.

        At most `backlog` accepted flows wait for `accepted_taken`. Raises OurMistake, e.g. if the prefix is
        being listened on.
        """
        return self._passive_open.listen(prefix, backlog, protocol)

    def close_listener(self, listener_id: int, now: float) -> None:
        """Stop listening. Flows that were not taken are reset, taken ones live on. OurMistake if unknown."""
        self._passive_open.close_listener(listener_id, now)

    def set_refusing(self, listener_id: int, refusing: bool) -> None:
        """Begin no more flows for a listener, and tell clients of ours to ask another instance; or begin flows again.

        Those that have begun go on. OurMistake if the listener is unknown, or cannot come back to the table.
        """
        self._passive_open.set_refusing(listener_id, refusing)

    @property
    def half_open(self) -> int:
        """How many flows have begun and are not accepted yet."""
        return self._core.flows.half_open

    def accepted_taken(self, flow_id: FlowID) -> None:
        """The application has taken an accepted flow: it leaves the backlog."""
        flow = self._core.flows.by_id.get(flow_id)
        if flow is not None:
            self._core.leave_backlog(flow)

    def connect(
        self, service_id: ServiceID, now: float, destination: int = 0, protocol: int = PROTOCOL_TCP
    ) -> FlowID:
        """Open a TCP or UDP connection to `service_id`, at address `destination` unless that is 0.

        The outcome is a Connected or ConnectFailed effect, which may be there already on return.
        """
        return self._active_open.connect(service_id, destination, protocol, now)

    def cancel_connect(self, flow_id: FlowID, now: float) -> None:
        """The application does not want the connection any more.

        A connection that is still being opened is forgotten without an effect; an open one is aborted.
        """
        self.abort(flow_id, now)

    def release(self, flow_id: FlowID, now: float) -> None:
        """The application is finished with both directions (its close()). The flow closes by itself, bounded
        in time; CloseTransport comes at the end, and not before this call.
        """
        flow = self._core.flows.by_id.get(flow_id)
        if flow is not None:
            self._close.release(flow, now)

    def unattend(self, flow_id: FlowID, now: float) -> None:
        """The flow's socket was handed to another program. There will be no `release`: the flow ends when both
        directions are closed, which its kernel socket does by itself.
        """
        flow = self._core.flows.by_id.get(flow_id)
        if flow is not None:
            self._close.unattend(flow, now)

    def state_of(self, flow_id: FlowID) -> State | None:
        """The state of a flow; None when the flow table has no such flow."""
        flow = self._core.flows.by_id.get(flow_id)
        return None if flow is None else flow.state

    def abort(self, flow_id: FlowID, now: float) -> None:
        """Close with an RST to the peer. FlowEnded says ECONNABORTED unless the flow was closed already."""
        self._abort(flow_id, ECONNABORTED, now)

    def migrate(self, flow_id: FlowID, path: Path, now: float, destination: int = 0) -> None:
        """Move this end of a flow to `path`, its source address included; a newer wish replaces an older one.

        The flow_migrated or migration_failed event says what became of it. Data takes the old path until the
        peer has answered on the new one. `destination`, unless 0: the peer is there, not where it was.
        OurMistake when there is no such flow, or it is being opened or closed already.
        """
        flow = self._core.flows.by_id.get(flow_id)
        if flow is None:
            raise OurMistake(f"there is no flow {flow_id}")
        self._migration.own.migrate(flow, path, destination, now)

    def live_flows(self) -> list[LiveFlow]:
        """The flows that `migrate` can move."""
        return [_live(flow) for flow in self._core.flows.by_id.values() if flow.state in MOVABLE]

    def live_flow(self, flow_id: FlowID) -> LiveFlow | None:
        """One of them; None if it is gone, or cannot be moved."""
        flow = self._core.flows.by_id.get(flow_id)
        return None if flow is None or flow.state not in MOVABLE else _live(flow)

    def flow_ids(self) -> list[FlowID]:
        """All flows, in whatever state."""
        return [flow.flow_id for flow in self._core.flows.by_id.values()]

    def path_lost(self, flow_id: FlowID, now: float) -> None:
        """The path of a flow is gone and there is no other one. It waits for `migrate`, or for a path to its peer
        to appear, and ends with ETIMEDOUT when that takes too long.
        """
        flow = self._core.flows.by_id.get(flow_id)
        if flow is not None:
            self._migration.own.path_lost(flow, now)

    @property
    def path_quality(self) -> PathQuality:
        """What is known about the ways to other hosts."""
        return self._core.path_quality

    def choose_paths(self, paths_of: Callable[[ServiceID], PathFinder]) -> None:
        """Find the paths of new flows of a service by what `paths_of` returns."""
        self._core.paths_of = paths_of

    def reroute(self, flow_id: FlowID) -> None:
        """Routing leads a flow's packets another way, through the interface that it is on already."""
        flow = self._core.flows.by_id.get(flow_id)
        if flow is not None and flow.state in MOVABLE:
            self._migration.own.reroute(flow)

    def bind_datagrams(self, prefix: ServicePrefix | None) -> Endpoint:
        """Receive unconnected datagrams for `prefix`, or a random serviceID. See `unconnected`."""
        return self._unconnected.bind(prefix)

    def close_datagrams(self, endpoint_id: int) -> None:
        """Receive no more datagrams at an endpoint. OurMistake if unknown."""
        self._unconnected.close(endpoint_id)

    def send_datagram(
        self,
        endpoint_id: int,
        payload: bytes,
        destination: ServiceID,
        now: float,
        address: int = 0,
        source: ServiceID | None = None,
    ) -> int:
        """Send an unconnected datagram; returns 0 or an errno. See `unconnected`."""
        return self._unconnected.send(endpoint_id, payload, destination, address, source, now)

    def send_on_flow(self, flow_id: FlowID, payload: bytes) -> int:
        """Send a datagram in a UDP flow; returns 0 or an errno, EPIPE when there is no such flow any more."""
        flow = self._core.flows.by_id.get(flow_id)
        return EPIPE if flow is None else self._connected_datagrams.send(flow, payload)

    def datagram_endpoints(self) -> list[dict[str, object]]:
        """One dict per endpoint of unconnected datagrams."""
        return self._unconnected.snapshot()

    def fin_acknowledged(self, flow_id: FlowID, now: float) -> None:
        """Data plane: the peer's TCP has acknowledged our TCP FIN, so the SAL FIN may go."""
        flow = self._core.flows.by_id.get(flow_id)
        if flow is not None:
            self._close.fin_acknowledged(flow, now)

    def transport_reset(self, flow_id: FlowID, now: float) -> None:
        """Data plane: the kernel socket sent a TCP RST, i.e. it was closed with unread data."""
        self._abort(flow_id, ECONNABORTED, now)

    def transport_failed(self, flow_id: FlowID, errno: int, now: float) -> None:
        """Data plane: the transport could not be opened, or its socket gave up. The peer gets an RST."""
        self._abort(flow_id, errno, now)

    def native_doubted(self, flow_id: FlowID, now: float) -> None:
        """Data plane: native data of the flow was repeated, and none has got through. Its repetitions go as `sal`."""
        flow = self._core.flows.by_id.get(flow_id)
        if flow is not None:
            self._core.framings.native_doubted(flow.peer_address, now)
            self._core.counters["framing_native_doubted"] += 1

    def native_proved(self, flow_id: FlowID) -> None:
        """Data plane: native data of the flow has got through, after all or for the first time since a doubt."""
        flow = self._core.flows.by_id.get(flow_id)
        if flow is not None:
            self._core.framings.native_proved(flow.peer_address)

    def peer_seen(self, flow_id: FlowID, address: int, port: int, now: float) -> None:
        """Data plane: the flow's encapsulated data comes from this address and UDP port, and not from where we send to."""
        flow = self._core.flows.by_id.get(flow_id)
        if flow is not None:
            self._close.peer_seen(flow, address, port, now)

    def can_encapsulate(self) -> None:
        """This host receives what comes inside UDP. Unless it is told so, the SAL sends no SYN that way."""
        self._core.framings.can_encapsulate = True

    def send_failed(self, packet: bytes, errno: int, now: float) -> None:
        """Data plane: a packet of ours, or one that an ICMP error quotes the beginning of, was not delivered.

        If it is a SYN, another instance is asked at once; an error never ends a connect by itself. If it is an
        unconnected datagram, later ones go to another instance.
        """
        if self._unconnected.undeliverable(packet, now):
            return
        lost = undelivered(packet)
        flow = None if lost is None else self._core.flows.by_id.get(lost.flow_id)
        if lost is None or flow is None or flow.state is not State.REQUEST:
            return
        if lost.nonce not in (None, flow.local_nonce):
            self._core.drop("spoofed_icmp_error")
            return
        self._core.counters["syns_undeliverable"] += 1
        self._active_open.unreachable(flow, lost.destination, error_name(errno), now)

    def packet_too_big(self, quoted: bytes, mtu_bytes: int) -> None:
        """Data plane: an ICMP error quotes a packet of ours that is larger than the path's MTU. See `path_mtu`."""
        path_mtu.reported(self._core, quoted, mtu_bytes)

    def try_smaller_packets(self, flow_id: FlowID) -> None:
        """A flow sends in vain, while its peer answers RSYNs: large packets may be what its path does not carry."""
        flow = self._core.flows.by_id.get(flow_id)
        if flow is not None and flow.state in MOVABLE:
            path_mtu.suspected(self._core, flow)

    def release_delayed(self, prefix: ServicePrefix, now: float) -> int:
        """Resolve anew what DELAY rules hold for services under `prefix`; returns how many those were."""
        return self._core.delayed.release(prefix, now)

    def drop_delayed(self, prefix: ServicePrefix, now: float, reason: str) -> int:
        """Give up what DELAY rules hold for services under `prefix`; returns how many those were."""
        return self._core.delayed.drop(prefix, now, reason)

    @property
    def delayed(self) -> DelayQueue:
        """What DELAY rules hold. Read only."""
        return self._core.delayed

    def paths_changed(self, now: float) -> None:
        """Interfaces, addresses or routes have changed: `paths` may have new answers."""
        for flow in list(self._core.flows.by_id.values()):
            if flow.state is State.REQUEST:
                self._active_open.paths_changed(flow, now)
            else:
                self._migration.own.paths_changed(flow, now)

    def handle_timeouts(self, now: float) -> None:
        """Do what is due."""
        self._core.timers.run(now)
        self._core.flows.expire(now)
        self._core.table.expire(now)

    def next_timeout(self) -> float | None:
        """When `handle_timeouts` has something to do; None: nothing is waiting."""
        core = self._core
        due = core.timers.next_deadline()
        for other in (core.flows.next_expiry(), core.table.next_expiry()):
            if due is None or (other is not None and other < due):
                due = other
        return due

    def take_effects(self) -> list[Effect]:
        """What is to be done, in order. The list is the caller's."""
        effects = self._core.effects
        self._core.effects = []
        return effects

    def flows(self) -> list[dict[str, object]]:
        """One dict per flow, for `show flows`. Flows in TIMEWAIT after their release are only counted."""
        return [_snapshot(flow, self._core) for flow in self._core.flows.by_id.values()]

    def _abort(self, flow_id: FlowID, errno: int, now: float) -> None:
        flow = self._core.flows.by_id.get(flow_id)
        if flow is not None:
            self._close.abort(flow, errno, now)


def _live(flow: Flow) -> LiveFlow:
    moves = flow.moves
    return LiveFlow(
        flow.flow_id,
        flow.service_id,
        flow.local_address,
        flow.peer_address,
        flow.interface_index,
        OwnMove.SETTLED if moves is None else moves.own,
        None if moves is None else moves.path,
        flow.options.capabilities is not None,
    )


def _snapshot(flow: Flow, core: Core) -> dict[str, object]:
    return {
        **({} if flow.traffic is None else flow.traffic.counters()),
        "flow_id": flow.flow_id,
        "peer_flow_id": flow.peer_flow_id,
        "state": flow.state.name,
        "protocol": "UDP" if flow.protocol == PROTOCOL_UDP else "TCP",
        "service": flow.service_id.text,
        "role": "passive" if flow.listener is not None else "active",
        "local_address": format_address(flow.local_address),
        "peer_address": format_address(flow.peer_address),
        "interface_index": flow.interface_index,
        "peer_is_ours": flow.options.capabilities is not None,
        "released": flow.released,
        "opened_at": flow.opened_at,
        "round_trip_s": core.round_trips.smoothed_s(flow.peer_address),
        "mtu_bytes": flow.mtu_bytes,
        "authenticated": flow.proofs is not None,
        "migration": "INITIAL" if flow.moves is None else flow.moves.name,
        "migrations": 0 if flow.moves is None else flow.moves.completed,
    }
