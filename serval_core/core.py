"""What do the parts of the service access layer share? The tables, the clockwork, the outbox, and the way a
flow takes a step.

Knows no protocol: active_open, passive_open and close register what each action does, and call `step`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Protocol

from serval_core.control_authentication import KeyPairs
from serval_core.delay_queue import DelayQueue
from serval_core.effects import Effect, FlowEnded, Happened, SendPacket
from serval_core.flow import Flow
from serval_core.flow_table import FlowTable
from serval_core.framing import Framing, Framings, NativePorts
from serval_core.liveness import Liveness
from serval_core.names import ServiceID
from serval_core.path_quality import PathQuality
from serval_core.paths import Path, PathFinder
from serval_core.retransmission import RoundTrips
from serval_core.sal_settings import SalSettings
from serval_core.service_table import ServiceTable
from serval_core.states import CONNECTION, Action, Event, ImpossibleEvent, State
from serval_core.timers import NO_TIMER, Timers
from serval_core.wire import encapsulation
from serval_core.wire.ipv4 import IPv4Packet, OuterPorts
from serval_core.wire.sal import (
    PROTOCOL_TCP,
    RSYN,
    Control,
    SalPacket,
    emit,
    emit_control,
)

Handler = Callable[[Flow, float], None]

_EVENTS = 16  # more than there are; spreads (state, event) over small integers


class RandomSource(Protocol):
    """What we ask of randomness: `random.SystemRandom` in production, `random.Random` in tests."""

    def getrandbits(self, k: int, /) -> int:
        """A number of `k` random bits."""

    def random(self) -> float:
        """A number in [0, 1)."""


class Core:
    """The state of one service access layer. Its parts write to it freely; nobody else sees it."""

    __slots__ = (
        "_handlers",
        "_steps",
        "counters",
        "delayed",
        "effects",
        "flows",
        "framings",
        "key_pairs",
        "last_listener_id",
        "liveness",
        "native_ports",
        "path_quality",
        "paths",
        "paths_of",
        "random",
        "round_trips",
        "settings",
        "table",
        "timers",
    )

    def __init__(
        self,
        settings: SalSettings,
        table: ServiceTable,
        paths: PathFinder,
        random: RandomSource,
        native_ports: NativePorts,
    ) -> None:
        self.settings = settings
        self.framings = Framings(settings.framing, settings.service_framings)
        self.native_ports = native_ports
        self.table = table
        self.paths = paths
        self.paths_of: Callable[[ServiceID], PathFinder] = lambda _: paths  # of flows that this host opens
        self.path_quality = PathQuality()
        self.random = random
        self.key_pairs = KeyPairs(random.getrandbits)
        self.flows = FlowTable(settings.time_wait_s, settings.time_wait_limit)
        self.timers = Timers()
        self.round_trips = RoundTrips()
        self.liveness = Liveness(settings, table)
        self.delayed = DelayQueue(settings.delay_limit, settings.delay_timeout_s, self.timers, self.report)
        self.effects: list[Effect] = []
        self.last_listener_id = 0
        self.counters: defaultdict[str, int] = defaultdict(int)
        self._handlers: dict[Action, Handler] = {}
        self._steps: dict[int, tuple[State, tuple[Handler, ...]]] = {}

    def register(self, handlers: Mapping[Action, Handler]) -> None:
        """Say who carries out which action."""
        self._handlers.update(handlers)

    def prepare_steps(self) -> None:
        """Resolve the table of states.py to functions. KeyError if nobody carries out one of its actions."""
        self._steps = {
            state * _EVENTS + event: (step.next_state, tuple(self._handlers[each] for each in step.actions))
            for (state, event), step in CONNECTION.items()
        }

    def step(self, flow: Flow, event: Event, now: float) -> None:
        """Let `event` happen to the flow. Raises ImpossibleEvent when the table has no row for it."""
        found = self._steps.get(flow.state * _EVENTS + event)
        if found is None:
            raise ImpossibleEvent(flow.state, event)
        flow.state, handlers = found
        for handler in handlers:
            handler(flow, now)

    def report(self, kind: str, fields: dict[str, object]) -> None:
        """Tell whoever subscribed to events of this kind."""
        self.effects.append(Happened(kind, fields))

    def new_listener_id(self) -> int:
        """A number for whatever a DEMUX rule is to lead to, from 1."""
        self.last_listener_id += 1
        return self.last_listener_id

    def drop(self, reason: str) -> None:
        """Count a packet that is not processed any further."""
        self.counters[f"dropped_{reason}"] += 1

    def send_control(
        self,
        flow: Flow,
        flags: int,
        verno: int,
        service: ServiceID | None = None,
        source_addresses: tuple[int, ...] = (),
        transport: bytes = b"",
        key: bytes = b"",
    ) -> bytes:
        """Send a control packet of the flow to its peer, and return the IPv4 packet."""
        packet = self.control_packet(flow, flags, verno, service, source_addresses, transport, key)
        self.effects.append(SendPacket(packet, flow.peer_address, flow.interface_index))
        return packet

    def control_packet(
        self,
        flow: Flow,
        flags: int,
        verno: int,
        service: ServiceID | None = None,
        source_addresses: tuple[int, ...] = (),
        transport: bytes = b"",
        key: bytes = b"",
    ) -> bytes:
        """The IPv4 packet that `send_control` sends."""
        source, destination = flow.local_address, flow.peer_address
        if flow.proofs is not None:
            ends = covered(flow.outer_ports, source, destination)
            payload = self.proven_control(flow, flags, verno, *ends, service, transport, key)
        else:
            payload = _unproven_control(flow, flags, verno, service, source_addresses, transport, key)
        return encapsulation.emit(source, destination, flow.outer_ports, payload)

    def send_control_on(
        self,
        flow: Flow,
        flags: int,
        verno: int,
        path: Path,
        destination: int,
        outer_ports: OuterPorts | None,
        service: ServiceID | None = None,
    ) -> None:
        """Send a control packet of the flow on another path than its own, to `destination`.

        One that names a service may be passed on to somewhere else, so its proof says nothing of addresses.
        """
        source = path.source_address
        if flow.proofs is not None:
            ends = covered(outer_ports, source, destination) if service is None else (0, 0)
            pair = flow.key_pair if flags & RSYN else None  # the peer may have none of our packets with our key
            key = b"" if pair is None else pair.public
            payload = self.proven_control(flow, flags, verno, *ends, service, key=key)
        else:
            payload = _unproven_control(flow, flags, verno, service)
        packet = encapsulation.emit(source, destination, outer_ports, payload)
        self.effects.append(SendPacket(packet, destination, path.interface_index))

    def proven_control(
        self,
        flow: Flow,
        flags: int,
        verno: int,
        source: int,
        destination: int,
        service: ServiceID | None = None,
        transport: bytes = b"",
        key: bytes = b"",
    ) -> bytes:
        """The SAL part of a control packet with its proof, which says that it goes from `source` to `destination`."""
        assert flow.proofs is not None
        said = SalPacket(
            flow.flow_id,
            flow.peer_flow_id,
            flow.protocol,
            Control(flags, verno, flow.receive_next, flow.local_nonce),
            () if service is None else (service,),
            (),
            transport,
            key,
        )
        return emit(said._replace(proof=flow.proofs.make(source, destination, said)))

    def check_proof(self, flow: Flow, ip: IPv4Packet, said: SalPacket) -> None:
        """Whether the peer has said this, if the flow's control packets are authenticated. Raises TheirMistake."""
        if flow.proofs is not None:
            flow.proofs.check(*covered_by(ip, said), said)

    def restart_retransmission(self, flow: Flow, deadline: float, callback: Handler) -> None:
        """Set the flow's retransmission timer, in place of the one that may be running."""
        if flow.retransmission_timer != NO_TIMER:
            self.timers.cancel(flow.retransmission_timer)
        flow.retransmission_timer = self.timers.start(deadline, callback, flow)

    def stop_retransmission(self, flow: Flow, now: float) -> None:
        """The flow waits for no acknowledgement of a control packet."""
        if flow.retransmission_timer != NO_TIMER:
            self.timers.cancel(flow.retransmission_timer)
            flow.retransmission_timer = NO_TIMER
        flow.retransmissions = 0

    def restart_lifetime(self, flow: Flow, deadline: float, callback: Handler) -> None:
        """Set the timer that bounds the flow's present state, in place of the one that may be running."""
        if flow.lifetime_timer != NO_TIMER:
            self.timers.cancel(flow.lifetime_timer)
        flow.lifetime_timer = self.timers.start(deadline, callback, flow)

    def stop_timers(self, flow: Flow, now: float) -> None:
        """Nothing is going to happen to the flow by itself."""
        self.stop_retransmission(flow, now)
        if flow.lifetime_timer != NO_TIMER:
            self.timers.cancel(flow.lifetime_timer)
            flow.lifetime_timer = NO_TIMER

    def leave_backlog(self, flow: Flow) -> None:
        """The flow does not count against its listener's backlog any more."""
        if flow.waits_in_backlog and flow.listener is not None:
            flow.waits_in_backlog = False
            flow.listener.waiting -= 1

    def offer_native(self, flow: Flow) -> None:
        """Have a port for framing `native` ready, if it is wanted and there is one."""
        if flow.framing in (Framing.AUTO, Framing.NATIVE) and flow.protocol == PROTOCOL_TCP:
            flow.native_port = self.native_ports.take()

    def forget(self, flow: Flow, now: float) -> None:
        """Take the flow out of every table without a word."""
        if flow.native_port:
            self.native_ports.release(flow.native_port)
            flow.native_port = 0
        self.stop_timers(flow, now)
        self.leave_backlog(flow)
        if flow.keepalive_timer != NO_TIMER:
            self.timers.cancel(flow.keepalive_timer)
            flow.keepalive_timer = NO_TIMER
        if flow.moves is not None:
            self.timers.cancel(flow.moves.timer)
            self.timers.cancel(flow.moves.answer_timer)
        if flow.search is not None and flow.search.parked is not None:
            self.delayed.withdraw(flow.search.parked)
        self.flows.remove(flow)

    def end_flow(self, flow: Flow, now: float) -> None:
        """Forget a flow that the application knows of, and tell it."""
        self.forget(flow, now)
        self.effects.append(FlowEnded(flow.flow_id, flow.errno))


def covered(outer_ports: OuterPorts | None, source: int, destination: int) -> tuple[int, int]:
    """The addresses that proofs say something of: none that a NAT, which UDP encapsulation is for, may change."""
    return (0, 0) if outer_ports is not None else (source, destination)


def covered_by(ip: IPv4Packet, said: SalPacket) -> tuple[int, int]:
    """The addresses that the proof of a packet that came says something of."""
    if said.services and said.control is not None and said.control.flags & RSYN:
        return (0, 0)  # a service router may have passed it on
    return covered(ip.outer_ports, ip.source, ip.destination)


def _unproven_control(
    flow: Flow,
    flags: int,
    verno: int,
    service: ServiceID | None = None,
    source_addresses: tuple[int, ...] = (),
    transport: bytes = b"",
    key: bytes = b"",
) -> bytes:
    """The SAL part of a control packet of a flow whose peer proves nothing."""
    return emit_control(
        flow.flow_id,
        flow.peer_flow_id,
        flow.protocol,
        flags,
        verno,
        flow.receive_next,
        flow.local_nonce,
        service,
        source_addresses,
        transport,
        key,
    )
