"""One SAL by itself, and a peer whose every word a test chooses. No network, no transport, no sleep."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import NamedTuple, TypeVar

from serval_core.dataplane.memory_network import WIRE_INDEX, MemoryPaths
from serval_core.effects import ConnectFailed, Effect, SendPacket
from serval_core.names import FlowID, ServiceID, parse_address, parse_service
from serval_core.rules import Rule
from serval_core.sal import SalSettings, ServiceAccessLayer
from serval_core.service_table import ServiceTable
from serval_core.wire import ipv4, sal, tcp_segment
from serval_core.wire.sal import Control, SalPacket
from serval_core.wire.tcp_segment import NO_OPTIONS, TcpOptions, TcpSegment

SERVICE = parse_service("76568")
SERVICE_ID = SERVICE.service_id
LOCAL = parse_address("10.0.0.1")
REMOTE = parse_address("10.0.0.2")
OTHER = parse_address("10.0.0.3")
BROADCAST = parse_address("10.0.0.255")

PROTOTYPE_OPTIONS = TcpOptions(mss=1448, window_scale=1)
OUR_OPTIONS = TcpOptions(1448, 10, True, (77777776, 0), 0)
NO_CONTROL = Control(0, 0, 0, bytes(8))

AnyEffect = TypeVar("AnyEffect")


class Sent(NamedTuple):
    """A packet that the SAL sent, taken apart. `control` stands for an absent extension as NO_CONTROL."""

    destination: int
    interface_index: int
    packet: bytes
    source: int
    sal: SalPacket
    control: Control
    segment: TcpSegment | None


def dissect(effect: SendPacket) -> Sent:
    """Every packet must be well-formed and carry right checksums."""
    ip = ipv4.parse(effect.packet)
    assert ip.destination == effect.destination
    assert ip.protocol == sal.PROTOCOL_SAL
    parsed = sal.parse(ip.payload)
    segment = None
    if parsed.transport and parsed.protocol == sal.PROTOCOL_TCP:
        segment = tcp_segment.parse(parsed.transport, ip.source, ip.destination)
    return Sent(
        effect.destination,
        effect.interface_index,
        effect.packet,
        ip.source,
        parsed,
        parsed.control or NO_CONTROL,
        segment,
    )


class LoneHost:
    """The SAL under test, at address LOCAL unless it has other paths. `now` only moves when `advance` is called."""

    def __init__(
        self, settings: SalSettings | None = None, seed: int = 1, paths: MemoryPaths | None = None
    ) -> None:
        self.now = 1000.0
        self.table = ServiceTable()
        self.paths = paths or MemoryPaths(LOCAL, 1500)
        self.sal = ServiceAccessLayer(settings or SalSettings(), self.table, self.paths, Random(seed))
        self.log: list[Effect] = []

    def forward(self, *addresses: int) -> None:
        for address in addresses:
            self.table.add(Rule.forward(SERVICE, address))

    def listen(self, backlog: int = 16) -> int:
        return self.sal.listen(SERVICE, backlog, self.now)

    def connect(self, destination: int = 0) -> FlowID:
        return self.sal.connect(SERVICE_ID, self.now, destination)

    def effects(self) -> list[Effect]:
        """Everything since the last call."""
        effects = self.sal.take_effects()
        self.log += effects
        return effects

    def packets(self) -> list[Sent]:
        """The packets since the last call; other effects are dropped into `log`."""
        return [dissect(effect) for effect in self.effects() if isinstance(effect, SendPacket)]

    def only_packet(self) -> Sent:
        (packet,) = self.packets()
        return packet

    def news(self, kind: type[AnyEffect]) -> list[AnyEffect]:
        """All effects of one kind since the start."""
        self.effects()
        return [effect for effect in self.log if isinstance(effect, kind)]

    def receive(self, packet: bytes, broadcast: bool = False, interface_index: int = WIRE_INDEX) -> None:
        self.sal.packet_received(packet, interface_index, broadcast, self.now)

    def advance(self, seconds: float) -> list[tuple[float, Sent]]:
        """Let time pass, timer by timer. What was sent, with the seconds since the start of the call."""
        start, until = self.now, self.now + seconds
        sent = [(0.0, packet) for packet in self.packets()]
        while (due := self.sal.next_timeout()) is not None and due <= until:
            self.now = max(self.now, due)
            self.sal.handle_timeouts(self.now)
            sent += [(round(self.now - start, 6), packet) for packet in self.packets()]
        self.now = until
        return sent

    def dropped(self, reason: str) -> int:
        return self.sal.counters.get(f"dropped_{reason}", 0)

    def states(self) -> list[str]:
        return [str(flow["state"]) for flow in self.sal.flows()]


def drops(host: LoneHost) -> int:
    """How many packets it has dropped, for any reason."""
    return sum(count for name, count in host.sal.counters.items() if name.startswith("dropped_"))


class Peer:
    """The other end of one flow, like a prototype unless `options` say otherwise.

    Numbers follow the protocol as long as the test does not give others.
    """

    def __init__(
        self,
        address: int = REMOTE,
        options: TcpOptions = PROTOTYPE_OPTIONS,
        flow_id: int = 3,
        nonce: bytes = b"peers.no",
        verno: int = 0xFFFFFFFF,
        sequence: int = 0xFFFFFFF0,
        window: int = 0,
    ) -> None:
        self.address = address
        self.options = options
        self.flow_id = flow_id
        self.nonce = nonce
        self.initial_verno = verno
        self.initial_sequence = sequence
        self.window = window
        self.host_address = LOCAL
        self.host_flow_id = 0
        self.host_nonce = b""
        self.host_verno = 0
        self.host_sequence = 0

    @property
    def verno(self) -> int:
        """The version number of the first control packet after the SYN or SYN-ACK."""
        return self.initial_verno + 1 & 0xFFFFFFFF

    @property
    def ackno(self) -> int:
        """What acknowledges the host's SYN or SYN-ACK."""
        return self.host_verno + 1 & 0xFFFFFFFF

    def learn(self, sent: Sent) -> None:
        """Take the host's names and numbers from its SYN or SYN-ACK."""
        assert sent.segment is not None
        self.host_address = sent.source
        self.host_flow_id = sent.sal.src_flow_id
        self.host_nonce = sent.control.nonce
        self.host_verno = sent.control.verno
        self.host_sequence = sent.segment.sequence

    def syn(
        self,
        service: ServiceID | None = SERVICE_ID,
        destination: int = LOCAL,
        source_addresses: Sequence[int] = (),
        **changes: int,
    ) -> bytes:
        segment = TcpSegment(0, 0, self.initial_sequence, 0, 2, self.window, 0, self.options, b"")
        return self.packet(
            Control(sal.SYN, self.initial_verno, 0, self.nonce),
            tcp_segment.emit(segment._replace(**changes), self.address, destination),
            services=() if service is None else (service,),
            source_addresses=tuple(source_addresses),
            destination=destination,
        )

    def syn_ack(
        self,
        ackno: int | None = None,
        source_addresses: Sequence[int] = (),
        flags: int = sal.SYN | sal.ACK,
        window: int = 5792,
        **changes: int,
    ) -> bytes:
        segment = TcpSegment(
            0,
            0,
            self.initial_sequence,
            self.host_sequence + 1 & 0xFFFFFFFF,
            0x12,
            window,
            0,
            self.options,
            b"",
        )
        segment = segment._replace(**changes)
        return self.packet(
            Control(flags, self.initial_verno, self.ackno if ackno is None else ackno, self.nonce),
            tcp_segment.emit(segment, self.address, self.host_address),
            source_addresses=tuple(source_addresses),
        )

    def segment(self, payload: bytes = b"", flags: int = 0x10, window: int = 2896, **changes: int) -> bytes:
        """A TCP segment of the peer, the first after its SYN."""
        segment = TcpSegment(
            0,
            0,
            self.initial_sequence + 1 & 0xFFFFFFFF,
            self.host_sequence + 1 & 0xFFFFFFFF,
            flags,
            window,
            0,
            NO_OPTIONS,
            payload,
        )
        return tcp_segment.emit(segment._replace(**changes), self.address, self.host_address)

    def handshake_ack(self, bare: bool = False, **changes: int) -> bytes:
        """The client's ACK, or the bare one with which a prototype answers a repeated SYN-ACK."""
        return self.packet(
            Control(sal.ACK, self.verno, self.ackno, self.nonce),
            b"" if bare else self.segment(**changes),
            services=() if bare else (SERVICE_ID,),
        )

    def data(self, payload: bytes = b"data", **changes: int) -> bytes:
        return self.packet(None, self.segment(payload, 0x18, **changes))

    def control(
        self, flags: int, verno: int | None = None, ackno: int | None = None, nonce: bytes | None = None
    ) -> bytes:
        """A control packet without transport: ACK, FIN, RST, RSYN."""
        return self.packet(
            Control(
                flags,
                self.verno if verno is None else verno,
                self.ackno if ackno is None else ackno,
                self.nonce if nonce is None else nonce,
            )
        )

    def packet(
        self,
        control: Control | None,
        transport: bytes = b"",
        services: tuple[ServiceID, ...] = (),
        source_addresses: tuple[int, ...] = (),
        destination: int | None = None,
    ) -> bytes:
        packet = SalPacket(
            self.flow_id,
            self.host_flow_id,
            sal.PROTOCOL_TCP,
            control,
            services,
            source_addresses,
            transport,
        )
        return ipv4.emit(
            self.address,
            self.host_address if destination is None else destination,
            sal.PROTOCOL_SAL,
            sal.emit(packet),
        )


def requesting_host(
    settings: SalSettings | None = None, peer: Peer | None = None
) -> tuple[LoneHost, Peer, FlowID]:
    """A host that has sent its SYN, which the peer knows."""
    host, peer = LoneHost(settings), peer or Peer(options=OUR_OPTIONS)
    host.forward(REMOTE)
    flow_id = host.connect()
    peer.learn(host.only_packet())
    return host, peer, flow_id


def connected_host(
    settings: SalSettings | None = None, peer: Peer | None = None
) -> tuple[LoneHost, Peer, FlowID]:
    """A host with one open connection that it began itself; its packets so far are taken."""
    host, peer, flow_id = requesting_host(settings, peer)
    host.receive(peer.syn_ack())
    host.effects()
    assert host.states() == ["CONNECTED"]
    return host, peer, flow_id


def half_open_host(settings: SalSettings | None = None, peer: Peer | None = None) -> tuple[LoneHost, Peer]:
    """A host that has answered the peer's SYN, which the peer knows."""
    host, peer = LoneHost(settings), peer or Peer(options=OUR_OPTIONS)
    host.listen()
    host.receive(peer.syn())
    peer.learn(host.only_packet())
    return host, peer


def accepted_host(
    settings: SalSettings | None = None, peer: Peer | None = None
) -> tuple[LoneHost, Peer, FlowID]:
    """A host with one open connection that the peer began; its packets so far are taken."""
    host, peer = half_open_host(settings, peer)
    host.receive(peer.handshake_ack())
    host.effects()
    assert host.states() == ["CONNECTED"]
    return host, peer, FlowID(peer.host_flow_id)


def failure(host: LoneHost) -> ConnectFailed:
    """How the only connection attempt of a host failed; nothing is left of it."""
    (failed,) = host.news(ConnectFailed)
    assert not host.sal.flows()
    assert host.sal.next_timeout() == host.table.next_expiry()  # at most the mark of a target that is down
    return failed


def times(sent: list[tuple[float, Sent]]) -> list[float]:
    """When these packets were sent."""
    return [at for at, _ in sent]
