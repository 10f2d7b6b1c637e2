"""What can somebody who is on no path of a live flow do to it? Nothing, in any framing, and what he tries is counted."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest

from lab.hosts import Host, Lab
from lab.waiting import wait_for
from serval_core.framing import Framing
from serval_core.names import FlowID, parse_address
from serval_core.wire import encapsulation, ipv4, sal, tcp_segment
from serval_core.wire.encapsulation import CLIENT_PORT, SERVER_PORT
from serval_core.wire.ipv4 import OuterPorts
from serval_core.wire.sal import ACK, FIN, PROTOCOL_TCP, RST, RSYN, Control, SalPacket
from tests.serval_core.stack_thread import StackThread
from tests.serval_core.test_migration_kernel import QUICK, Ends
from tests.serval_core.two_paths import CLIENT, SERVER, Transfer, two_paths

ATTACKER = "10.6.6.6"
GUESSED_NONCE = b"guessing"
COPIES = 3


@dataclass(frozen=True)
class Target:
    """All that there is to know of a flow, as its server sees it. Who spoofs knows what each attempt says, and no more."""

    flow_id: int
    peer_flow_id: int
    receive_next: int
    send_next: int
    peer_nonce: bytes
    outer_ports: OuterPorts | None
    native_port: int
    peer_native_port: int


class Attacker:
    """A host on a network of its own. The router lets it say that it is somebody else."""

    def __init__(self, lab: Lab, router: Host) -> None:
        self.host = lab.host("attacker")
        lab.connect(self.host, f"{ATTACKER}/24", router, "10.6.6.1/24")
        self.host.add_route("default", "10.6.6.1")
        for scope in ("all", "eth4"):
            router.sysctl(f"net.ipv4.conf.{scope}.rp_filter", 0)
        self._raw = self.host.call(lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW))

    def send(self, packet: bytes) -> None:
        """Put an IPv4 packet on the wire as it is."""
        self._raw.sendto(packet, (socket.inet_ntoa(packet[16:20]), 0))

    def close(self) -> None:
        """Give up."""
        self._raw.close()


class Siege:
    """A flow that carries data both ways, and an attacker."""

    def __init__(self, ends: Ends, attacker: Attacker) -> None:
        self.ends, self.attacker = ends, attacker
        self.transfers = Transfer(ends.near, ends.far), Transfer(ends.far, ends.near)
        wait_for(lambda: all(each.received_bytes for each in self.transfers), "data both ways")
        core = ends.server.stack._sal._core
        flow = core.flows.by_id[ends.far_id]
        self.target = Target(
            flow.flow_id,
            flow.peer_flow_id,
            flow.receive_next,
            flow.send_next,
            flow.peer_nonce,
            flow.outer_ports,
            flow.native_port,
            flow.options.native_port,
        )

    def drops(self) -> dict[str, int]:
        """What the server has dropped, by reason."""
        counters = self.ends.server.counters()
        return {
            name: count
            for name, count in counters.items()
            if name.startswith(("dropped_", "dataplane_drop_"))
        }

    def place(self) -> list[dict[str, object]]:
        """Where the server's flow is, and in which state."""
        names = ("flow_id", "state", "local_address", "peer_address", "framing", "migration", "migrations")
        return [{name: flow[name] for name in names} for flow in self.ends.server.flows()]

    def goes_on(self) -> None:
        """Return once some more has arrived, both ways."""
        before = [each.received_bytes for each in self.transfers]
        wait_for(
            lambda: all(
                each.received_bytes > seen + 1_000_000
                for each, seen in zip(self.transfers, before, strict=True)
            ),
            "data both ways",
        )

    def withstands(self, packet: bytes, reason: str) -> None:
        """Send a packet some times: each is counted with this reason, if there is one, and nothing else comes of it."""
        place, before = self.place(), self.drops()
        for _ in range(COPIES):
            self.attacker.send(packet)
        expected = {reason: COPIES} if reason else {}
        if reason:
            wait_for(
                lambda: self.drops().get(reason, 0) >= before.get(reason, 0) + COPIES, f"{reason} to be counted"
            )
        else:
            self.goes_on()
        after = self.drops()
        news = {name: count - before.get(name, 0) for name, count in after.items() if count != before.get(name, 0)}
        assert news == expected
        assert self.place() == place
        self.goes_on()

    def finish(self) -> None:
        """Nothing that the attacker said is in what arrived, and nothing is left of the flow."""
        assert self.place()[0]["migrations"] == 0
        for transfer in self.transfers:
            assert transfer.finish() > 0
        self.ends.close()


@pytest.fixture(params=[Framing.SAL, Framing.UDP, Framing.NATIVE], ids=str)
def siege(lab: Lab, request: pytest.FixtureRequest) -> Iterator[Siege]:
    hosts = two_paths(lab)
    attacker = Attacker(lab, hosts[2])
    settings = replace(QUICK, framing=request.param)
    with StackThread(hosts[0], sal=settings) as client, StackThread(hosts[1], sal=settings) as server:
        made = Siege(Ends(hosts, client, server), attacker)
        wait_for(lambda: made.place()[0]["framing"] == request.param.value, "data in that framing")
        yield made
        made.finish()
        attacker.close()


def carried(siege: Siege, source: str, payload: bytes, peer_port: int = 0) -> bytes:
    """A SAL packet to the server, as the flow's framing has it; inside UDP from the peer's port unless another is given."""
    ports = siege.target.outer_ports
    outer = None if ports is None else OuterPorts(peer_port or ports.peer, ports.local)
    return encapsulation.emit(parse_address(source), parse_address(SERVER[0]), outer, payload)


def control(siege: Siege, flags: int, **wrong: object) -> bytes:
    """A control packet that is right but for what is `wrong`: verno, nonce, flow_id."""
    target = siege.target
    verno = wrong.get("verno", target.receive_next)
    nonce = wrong.get("nonce", target.peer_nonce)
    flow_id = wrong.get("flow_id", target.flow_id)
    assert isinstance(verno, int)
    assert isinstance(nonce, bytes)
    assert isinstance(flow_id, int)
    said = Control(flags, verno & 0xFFFFFFFF, target.send_next, nonce)
    return sal.emit(SalPacket(FlowID(target.peer_flow_id), FlowID(flow_id), PROTOCOL_TCP, said, (), (), b""))


def segment(
    source: str, ports: tuple[int, int] = (0, 0), flags: int = tcp_segment.ACK, payload: bytes = b"forged"
) -> bytes:
    """A TCP segment to the server whose sequence number is a guess."""
    made = tcp_segment.TcpSegment(*ports, 12345, 54321, flags, 500, 0, tcp_segment.NO_OPTIONS, payload)
    return tcp_segment.emit(made, parse_address(source), parse_address(SERVER[0]))


def test_control_packets(siege: Siege) -> None:
    """Wrong nonce, guessed flowID, old version number: from the peer's address, and from another one."""
    target = siege.target
    for source in (CLIENT[0], CLIENT[1], ATTACKER):
        for flags in (RSYN, RSYN | ACK, RSYN | FIN, FIN, ACK):
            siege.withstands(
                carried(siege, source, control(siege, flags, nonce=GUESSED_NONCE)), "dropped_wrong_nonce"
            )
        for flags in (RST, RST | ACK):
            reason = "dropped_spoofed_reset"
            siege.withstands(carried(siege, source, control(siege, flags, nonce=GUESSED_NONCE)), reason)
        for flags in (RSYN, FIN, RST):
            guessed = control(siege, flags, flow_id=target.flow_id ^ 1)
            siege.withstands(carried(siege, source, guessed), "dropped_unknown_flow")
    for flags, reason in (
        (RSYN, "dropped_old_migration"),
        (RSYN | FIN, "dropped_old_migration"),
        (RSYN | ACK, "dropped_unexpected_rsyn_ack"),
        (FIN, "dropped_repeated_control"),
        (RST, "dropped_spoofed_reset"),
        (RST | ACK, "dropped_spoofed_reset"),
    ):
        old = carried(siege, CLIENT[0], control(siege, flags, verno=target.receive_next - 1))
        siege.withstands(old, reason)


def test_data(siege: Siege) -> None:
    """One flowID or the other is a guess. With both right, TCP's sequence numbers are what is left to guess."""
    target = siege.target
    for source in (CLIENT[0], ATTACKER):
        for ends, reason in (
            ((target.peer_flow_id ^ 1, target.flow_id), "dataplane_drop_in_wrong_header"),
            ((target.peer_flow_id, target.flow_id ^ 1), "dataplane_drop_in_unknown_flow"),
        ):
            header = sal.data_header(FlowID(ends[0]), FlowID(ends[1]), PROTOCOL_TCP)
            siege.withstands(carried(siege, source, header + segment(source)), reason)
    for flags in (tcp_segment.ACK, tcp_segment.RST, tcp_segment.SYN, tcp_segment.FIN | tcp_segment.ACK):
        header = sal.data_header(FlowID(target.peer_flow_id), FlowID(target.flow_id), PROTOCOL_TCP)
        place = siege.place()
        siege.attacker.send(carried(siege, CLIENT[0], header + segment(CLIENT[0], flags=flags)))
        siege.goes_on()
        assert siege.place() == place


def test_the_ways_that_only_one_framing_has(siege: Siege) -> None:
    """Native ports and those of the encapsulation, from a third host, another port, or with flags that end connections."""
    target = siege.target
    if target.native_port:
        ours, theirs = target.native_port, target.peer_native_port
        for source, ports, flags, reason in (
            (CLIENT[0], (theirs, ours), tcp_segment.RST, "dataplane_drop_in_native_reset"),
            (CLIENT[0], (theirs, ours), tcp_segment.RST | tcp_segment.ACK, "dataplane_drop_in_native_reset"),
            (CLIENT[0], (theirs, ours), tcp_segment.SYN, "dataplane_drop_in_native_reset"),
            # What follows is left to the host, where no socket is connected to such a port.
            (CLIENT[0], (theirs ^ 1, ours), tcp_segment.ACK, ""),
            (CLIENT[0], (theirs ^ 1, ours), tcp_segment.SYN, ""),
            (ATTACKER, (theirs, ours), tcp_segment.ACK, ""),
            (ATTACKER, (theirs, ours), tcp_segment.RST, ""),
            (ATTACKER, (theirs, ours), tcp_segment.SYN, ""),
            (ATTACKER, (theirs, ours), tcp_segment.FIN | tcp_segment.ACK, ""),
        ):
            packet = segment(source, ports, flags)
            siege.withstands(ipv4.emit(parse_address(source), parse_address(SERVER[0]), PROTOCOL_TCP, packet), reason)
    for port in (CLIENT_PORT, SERVER_PORT):
        outer = OuterPorts(port, port)
        for flags in (RSYN, FIN, RST):
            said = control(siege, flags, nonce=GUESSED_NONCE)
            reason = "dropped_spoofed_reset" if flags == RST else "dropped_wrong_nonce"
            siege.withstands(
                encapsulation.emit(parse_address(ATTACKER), parse_address(SERVER[0]), outer, said), reason
            )
    if target.outer_ports is not None:
        # With both flowIDs right: the server asks the third host whether it is the peer, and goes on as before.
        header = sal.data_header(FlowID(target.peer_flow_id), FlowID(target.flow_id), PROTOCOL_TCP)
        before = siege.place()
        siege.attacker.send(carried(siege, ATTACKER, header + segment(ATTACKER), 4444))
        wait_for(lambda: siege.ends.server.counters().get("nat_rebindings"), "the question to be asked")
        siege.goes_on()
        assert siege.place()[0]["peer_address"] == before[0]["peer_address"]
        assert siege.ends.far_mover.outcome(target.flow_id, "local")["event"] == "migration_failed"
        wait_for(lambda: siege.place() == before, "the server to be sure of its peer again")
