"""What does the service access layer do on a bad network? Hosts, a wire and a clock inside one process.

The network is deterministic: the same seed gives the same run, packet for packet, and time is a number that
jumps to the next thing due. Hosts check on the way that effects come in the order that `effects` promises.
Instead of the kernel's TCP there is `ToyTransport`, which is just good enough to carry a few kilobytes
reliably and to tell the SAL when its FIN has been acknowledged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from random import Random

from serval_core.addresses import LOOPBACK
from serval_core.dataplane.toy_transport import ToyTransport
from serval_core.effects import (
    Accepted,
    CloseTransport,
    Connected,
    ConnectFailed,
    DatagramRefused,
    DeliverDatagram,
    DeliverFlowDatagram,
    Effect,
    EndOfStream,
    ExpectData,
    FlowEnded,
    ForgetExpected,
    Happened,
    InjectSegment,
    MovePath,
    OpenDatagrams,
    OpenTransport,
    ResetTransport,
    SendPacket,
)
from serval_core.names import FlowID, ServiceID
from serval_core.paths import Interface, Path
from serval_core.sal import SalSettings, ServiceAccessLayer
from serval_core.service_table import ServiceTable
from serval_core.wire import ipv4, sal
from serval_core.wire.sal import PROTOCOL_SAL

PREFIX_LENGTH = 24
LOOPBACK_INDEX = 1
WIRE_INDEX = 2


@dataclass(frozen=True, slots=True)
class Faults:
    """What the wire does to packets. Probabilities of 0 to 1 per packet; times in seconds.

    Each copy takes `delay_s` and up to `jitter_s` more; with probability `reordering` it is held up for
    another `reordering_s`, so that later ones overtake it.
    """

    loss: float = 0.0
    duplication: float = 0.0
    reordering: float = 0.0
    delay_s: float = 0.005
    jitter_s: float = 0.001
    reordering_s: float = 0.1


class MemoryPaths:
    """The `PathFinder` of a host whose interfaces are all on the one network, each with an address of its own.

    The first one that is up is preferred. `down` holds the indexes of those that are not; `up` false is all.
    """

    def __init__(self, address: int, mtu_bytes: int, more: Sequence[int] = ()) -> None:
        host_bits = 32 - PREFIX_LENGTH
        self.loopback = Interface(LOOPBACK_INDEX, "lo", LOOPBACK, 8, 0, 65536)
        self.wires = [
            Interface(
                WIRE_INDEX + number,
                f"wire{number or ''}",
                each,
                PREFIX_LENGTH,
                each | (1 << host_bits) - 1,
                mtu_bytes,
            )
            for number, each in enumerate((address, *more))
        ]
        self.down: set[int] = set()

    @property
    def wire(self) -> Interface:
        """The first interface."""
        return self.wires[0]

    @property
    def up(self) -> bool:
        """Whether any wire can be used."""
        return any(each.index not in self.down for each in self.wires)

    @up.setter
    def up(self, up: bool) -> None:
        self.down = set() if up else {each.index for each in self.wires}

    def wire_of(self, address: int) -> Interface | None:
        """The interface that has this address, if it is up."""
        found = (each for each in self.wires if each.address == address and each.index not in self.down)
        return next(found, None)

    def has_address(self, address: int) -> bool:
        """See `paths.PathFinder`."""
        return self.wire_of(address) is not None

    def path_to(self, address: int, interface_index: int = 0) -> Path | None:
        """See `paths.PathFinder`."""
        own = {LOOPBACK, *(each.address for each in self.wires)}
        usable = [self.loopback] if address in own else [each for each in self.wires if each.index not in self.down]
        for interface in usable:
            if interface_index in (0, interface.index):
                source = address if address in own else interface.address
                return Path(interface.index, interface.name, source, address, interface.mtu_bytes)
        return None

    def interfaces(self) -> list[Interface]:
        """See `paths.PathFinder`."""
        return [self.loopback, *(each for each in self.wires if each.index not in self.down)]


class MemoryHost:
    """A host: a SAL, its table, and the transports of its flows.

    What the application would be told is kept in `accepted`, `connected`, `failed`, `ended`, `datagrams` and
    `refusals`; `on_open(host, transport)` is called for each new TCP connection. UDP flows have what they received
    in `flow_datagrams`, and are in `closed_by_peer` after its FIN.
    """

    def __init__(
        self,
        network: MemoryNetwork,
        address: int,
        settings: SalSettings,
        random: Random,
        more: Sequence[int] = (),
    ) -> None:
        self.network = network
        self.address = address
        self.table = ServiceTable()
        self.paths = MemoryPaths(address, network.mtu_bytes, more)
        self.sal = ServiceAccessLayer(settings, self.table, self.paths, random)
        self.transports: dict[FlowID, ToyTransport] = {}
        self.expected: set[FlowID] = set()
        self.accepted: dict[FlowID, ServiceID] = {}
        self.connected: list[FlowID] = []
        self.failed: dict[FlowID, ConnectFailed] = {}
        self.ended: dict[FlowID, int] = {}
        self.finished: list[ToyTransport] = []
        self.datagrams: list[DeliverDatagram] = []
        self.refusals: list[DatagramRefused] = []
        self.flow_datagrams: dict[FlowID, list[bytes]] = {}
        self.closed_by_peer: list[FlowID] = []
        self.happened: list[tuple[str, dict[str, object]]] = []
        self.on_open: Callable[[MemoryHost, ToyTransport], None] = lambda host, transport: None

    def packet_arrived(self, packet: bytes, broadcast: bool) -> None:
        """Do with a packet what the data plane does: data goes to its transport, all else to the SAL."""
        network = self.network
        transport = self._transport_of(packet)
        if transport is None:
            wire = self.paths.wire_of(int.from_bytes(packet[16:20], "big"))
            index = LOOPBACK_INDEX if packet[16] == 127 else WIRE_INDEX if wire is None else wire.index
            self.sal.packet_received(packet, index, broadcast, network.now)
        else:
            source, destination = (int.from_bytes(packet[at : at + 4], "big") for at in (12, 16))
            transport.segment_received(packet[20 + 12 :], source, destination)
        self.settle()

    def handle_timeouts(self) -> None:
        """Do what is due now."""
        self.sal.handle_timeouts(self.network.now)
        for transport in list(self.transports.values()):
            transport.handle_timeout()
        self.settle()

    def next_timeout(self) -> float | None:
        """When something is due next."""
        times = [transport.deadline for transport in self.transports.values()]
        times.append(self.sal.next_timeout())
        return min((each for each in times if each is not None), default=None)

    def settle(self) -> None:
        """Carry out effects, and let transports and SAL talk, until both have nothing more to say."""
        while effects := self.sal.take_effects():
            for effect in effects:
                self._carry_out(effect)
            self._report_transports()
        if self._report_transports():
            self.settle()

    def _report_transports(self) -> bool:
        """Tell the SAL what became of the transports' FINs; whether there was anything to tell."""
        told = False
        for flow_id, transport in list(self.transports.items()):
            if transport.fin_acknowledged and not transport.reported:
                told = transport.reported = True
                self.sal.fin_acknowledged(flow_id, self.network.now)
            if transport.gave_up and flow_id in self.transports:
                told, transport.gave_up = True, False
                self.sal.transport_failed(flow_id, transport.errno, self.network.now)
        return told

    def _transport_of(self, packet: bytes) -> ToyTransport | None:
        if len(packet) < 32 or packet[20 + 8] != 3:
            return None
        return self.transports.get(FlowID(int.from_bytes(packet[24:28], "big")))

    def _carry_out(self, effect: Effect) -> None:
        match effect:
            case SendPacket(packet, destination, interface_index):
                self.network.transmit(self, packet, destination, interface_index)
            case ExpectData(flow_id):
                assert flow_id not in {*self.expected, *self.transports}
                self.expected.add(flow_id)
            case ForgetExpected(flow_id):
                self.expected.remove(flow_id)
            case OpenTransport(flow_id):
                assert flow_id not in {*self.transports, *self.ended}
                self.expected.discard(flow_id)
                self.transports[flow_id] = ToyTransport(effect, self._transmit_segment, self._clock)
            case MovePath(flow_id, local_address, peer_address, interface_index):
                assert flow_id in {*self.transports, *self.flow_datagrams}
                if flow_id in self.transports:
                    self.transports[flow_id].move(local_address, peer_address, interface_index)
            case Happened(kind, fields):
                self.happened.append((kind, fields))
            case InjectSegment(flow_id, segment, source, destination):
                self.transports[flow_id].segment_received(segment, source, destination)
            case OpenDatagrams(flow_id):
                assert flow_id not in {*self.flow_datagrams, *self.ended}
                self.expected.add(flow_id)
                self.flow_datagrams[flow_id] = []
            case DeliverFlowDatagram(flow_id, payload):
                assert flow_id in {*self.accepted, *self.connected}
                self.flow_datagrams[flow_id].append(payload)
            case EndOfStream(flow_id):
                if flow_id in self.flow_datagrams:
                    self.closed_by_peer.append(flow_id)
                else:
                    self.transports[flow_id].end_stream()
            case ResetTransport(flow_id, errno):
                self._take_down(flow_id, errno)
            case CloseTransport(flow_id):
                self._take_down(flow_id, 0)
            case FlowEnded(flow_id, errno):
                assert flow_id not in {*self.transports, *self.ended}
                assert flow_id in {*self.accepted, *self.connected}
                self.ended[flow_id] = errno
            case Connected(flow_id):
                self.connected.append(flow_id)
                if flow_id not in self.flow_datagrams:
                    self.on_open(self, self.transports[flow_id])
            case Accepted(_, flow_id, service_id):
                assert flow_id not in self.accepted
                self.accepted[flow_id] = service_id
                self.sal.accepted_taken(flow_id)
                if flow_id not in self.flow_datagrams:
                    self.on_open(self, self.transports[flow_id])
            case ConnectFailed(flow_id):
                assert flow_id not in {*self.connected, *self.failed}
                self.failed[flow_id] = effect
            case DeliverDatagram():
                self.datagrams.append(effect)
            case DatagramRefused():
                self.refusals.append(effect)

    def _clock(self) -> float:
        return self.network.now

    def _take_down(self, flow_id: FlowID, errno: int) -> None:
        transport = self.transports.pop(flow_id)
        transport.errno = transport.errno or errno
        transport.deadline = None
        self.finished.append(transport)

    def _transmit_segment(self, opened: OpenTransport, segment: bytes) -> None:
        header = sal.data_header(opened.flow_id, opened.peer_flow_id)
        packet = ipv4.emit(opened.local_address, opened.peer_address, PROTOCOL_SAL, header + segment)
        self.network.transmit(self, packet, opened.peer_address, opened.interface_index)


class MemoryNetwork:
    """One wire with hosts on it. `now` is in seconds and starts at 1000."""

    def __init__(self, seed: int, faults: Faults | None = None, mtu_bytes: int = 1500) -> None:
        self.random = Random(seed)
        self.faults = faults or Faults()
        self.mtu_bytes = mtu_bytes
        self.now = 1000.0
        self.hosts: dict[int, MemoryHost] = {}
        self.captured: list[bytes] | None = None
        self._in_flight: list[tuple[float, int, MemoryHost, bytes, bool]] = []
        self._sent = 0

    def add_host(
        self, address: int, settings: SalSettings | None = None, more: Sequence[int] = ()
    ) -> MemoryHost:
        """Connect a new host, with `more` interfaces that have these addresses."""
        random = Random(self.random.getrandbits(64))
        host = MemoryHost(self, address, settings or SalSettings(), random, more)
        self.hosts[address] = host
        return host

    def transmit(self, sender: MemoryHost, packet: bytes, destination: int, interface_index: int) -> None:
        """Put a packet on the wire of `sender`. Packets to nobody are lost, as on a real one."""
        if self.captured is not None:
            self.captured.append(packet)
        if interface_index == LOOPBACK_INDEX:
            self._deliver(sender, packet, False, self.now)
            return
        if not sender.paths.up or interface_index in sender.paths.down:
            return
        broadcast = destination in (sender.paths.wire.broadcast_address, 0xFFFFFFFF)
        for host in self.hosts.values():
            wire = host.paths.wire_of(destination)
            if wire is not None or (broadcast and host is not sender and host.paths.up):
                self._subject_to_faults(host, packet, broadcast)

    def inject(self, host: MemoryHost, packet: bytes, broadcast: bool = False) -> None:
        """Deliver a packet that nobody on this network sent, next and without faults."""
        self._deliver(host, packet, broadcast, self.now)

    def run(self, until: float | None = None, done: Callable[[], bool] = lambda: False) -> None:
        """Let time pass up to `until` (None: while anything is due), or until `done()` holds."""
        while not done():
            due = self._next_due()
            if due is None or (until is not None and due > until):
                break
            self.now = max(self.now, due)
            if self._in_flight and self._in_flight[0][0] <= self.now:
                _, _, host, packet, broadcast = heappop(self._in_flight)
                host.packet_arrived(packet, broadcast)
            else:
                for host in self.hosts.values():
                    timeout = host.next_timeout()
                    if timeout is not None and timeout <= self.now:
                        host.handle_timeouts()
        if until is not None and not done():
            self.now = max(self.now, until)

    def _next_due(self) -> float | None:
        times = [host.next_timeout() for host in self.hosts.values()]
        if self._in_flight:
            times.append(self._in_flight[0][0])
        return min((each for each in times if each is not None), default=None)

    def _subject_to_faults(self, host: MemoryHost, packet: bytes, broadcast: bool) -> None:
        faults, random = self.faults, self.random
        copies = 2 if random.random() < faults.duplication else 1
        for _ in range(copies):
            if random.random() < faults.loss:
                continue
            delay_s = faults.delay_s + random.random() * faults.jitter_s
            if random.random() < faults.reordering:
                delay_s += random.random() * faults.reordering_s
            self._deliver(host, packet, broadcast, self.now + delay_s)

    def _deliver(self, host: MemoryHost, packet: bytes, broadcast: bool, arrival: float) -> None:
        self._sent += 1
        heappush(self._in_flight, (arrival, self._sent, host, packet, broadcast))
