"""Framing `udp` in the BPF programs, one packet at a time: headers, and checksums that nobody had to read the payload for."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serval_core.dataplane.bpf_loader import BpfObject
from serval_core.dataplane.layouts import (
    CONFIGURATION,
    EVENT,
    FLOW_COMPLETE_CHECKSUM,
    FLOW_EXPECTED,
    FLOW_KEY,
    FLOW_LOCAL,
    FLOW_NEIGHBOUR_KNOWN,
    FLOW_PATH_NUMBER,
    OBJECT_FILE,
    FlowEvent,
    FlowState,
    fresh_state,
)
from serval_core.names import parse_address
from serval_core.wire import encapsulation, ipv4, sal, tcp_segment
from serval_core.wire.ipv4 import OuterPorts
from tests.serval_core.dataplane.test_bpf_programs import (
    DELIVERED,
    ETHERNET,
    HALF_OPEN,
    OUR_FLOW,
    PEER,
    PEER_FLOW,
    TC_REDIRECT,
    TC_SHOT,
    TC_UNSPEC,
    TO_NEIGHBOUR,
    UNKNOWN,
    US,
    VIRTUAL_LOCAL,
    VIRTUAL_PORT,
    VIRTUAL_REMOTE,
    changed,
    drops,
    flow_value,
)

OURS = OuterPorts(54325, 4000)  # we are a server, and the client's NAT has chosen port 4000
THEIRS = OuterPorts(4000, 54325)
PRIVATE, ELSEWHERE = parse_address("192.168.7.2"), parse_address("192.0.2.7")
REMOTE = VIRTUAL_REMOTE | OUR_FLOW >> 16
VIRTUAL_PORTS_IN = OUR_FLOW & 0xFFFF, VIRTUAL_PORT
SLOT = struct.pack("=I", 0)
MARK_ENCAPSULATED = 0x40000000
SEQUENCE = 1000


@pytest.fixture(scope="module")
def programs() -> Iterator[BpfObject]:
    configuration = CONFIGURATION.pack(VIRTUAL_LOCAL, VIRTUAL_REMOTE, VIRTUAL_PORT, *[struct.pack("=I", 1)] * 4)
    loaded = BpfObject(str(OBJECT_FILE), configuration)
    for flow_id, flags in ((OUR_FLOW, FLOW_COMPLETE_CHECKSUM | FLOW_NEIGHBOUR_KNOWN), (HALF_OPEN, FLOW_EXPECTED)):
        value = flow_value(flow_id, 0, flags, outer_ports=OURS)
        loaded.map("flows").update(FLOW_KEY.pack(flow_id), value)
    yield loaded
    loaded.close()


@pytest.fixture(autouse=True)
def nothing_noted(programs: BpfObject) -> None:
    programs.map("flow_states").update(SLOT, fresh_state(SEQUENCE))
    programs.ring_buffer("flow_events").take()


def tcp(source: int, destination: int, ports: tuple[int, int], payload: bytes) -> bytes:
    segment = tcp_segment.TcpSegment(
        *ports, SEQUENCE, 5, tcp_segment.ACK, 512, 0, tcp_segment.NO_OPTIONS, payload
    )
    return tcp_segment.emit(segment, source, destination)


def on_wire(
    flow_id: int = OUR_FLOW,
    payload: bytes = b"hello",
    source: int = PEER,
    ports: OuterPorts = THEIRS,
    written_at: int = PEER,
    peer_flow: int = PEER_FLOW,
) -> bytes:
    """A packet of the peer, whose own address is `written_at`; a NAT made `source` of it."""
    inner = sal.data_header(peer_flow, flow_id, 6) + tcp(written_at, US, (0, 0), payload)
    written = encapsulation.emit(written_at, US, ports, inner)
    if written_at == source:
        return ETHERNET + written
    # The NAT corrects the outer checksum, and knows nothing of the inner one.
    return ETHERNET + encapsulation.emit(source, US, ports, inner)


def to_socket(payload: bytes = b"hello") -> bytes:
    return DELIVERED + ipv4.emit(REMOTE, VIRTUAL_LOCAL, 6, tcp(REMOTE, VIRTUAL_LOCAL, VIRTUAL_PORTS_IN, payload))


@dataclass(frozen=True)
class Row:
    description: str
    packet: bytes
    verdict: int
    result: bytes | None = None  # None: as it came in
    dropped_for: str | None = None


INCOMING = [
    Row("data", on_wire(), TC_REDIRECT, to_socket()),
    Row("data from behind a NAT", on_wire(written_at=PRIVATE), TC_REDIRECT, to_socket()),
    Row("data from another port", on_wire(ports=OuterPorts(4001, 54325)), TC_REDIRECT, to_socket()),
    Row("data to the client's port", on_wire(ports=OuterPorts(54325, 54324)), TC_REDIRECT, to_socket()),
    Row("an odd number of bytes", on_wire(payload=b"odd", written_at=PRIVATE), TC_REDIRECT, to_socket(b"odd")),
    Row("no outer checksum", changed(on_wire(), 14 + 26, bytes(2)), TC_REDIRECT, to_socket()),
    Row("data of a half-open flow goes up", on_wire(HALF_OPEN), TC_UNSPEC),
    Row("data of an unknown flow is the socket's business", on_wire(UNKNOWN), TC_UNSPEC),
    Row("another UDP port", on_wire(ports=OuterPorts(4000, 53)), TC_UNSPEC),
    Row("wrong peer flow", on_wire(peer_flow=UNKNOWN), TC_SHOT, dropped_for="in_wrong_header"),
    Row("a UDP length that is not the packet's", changed(on_wire(), 14 + 24, b"\0\x30"), TC_SHOT, dropped_for="in_truncated"),
    Row(
        "control goes up",
        ETHERNET + encapsulation.emit(PEER, US, THEIRS, sal.emit_control(PEER_FLOW, OUR_FLOW, 6, sal.FIN, 7, 8, bytes(8))),
        TC_UNSPEC,
    ),
    Row("cut short", on_wire()[:60], TC_UNSPEC),
]


@pytest.mark.parametrize("row", INCOMING, ids=lambda row: row.description)
def test_what_comes_in(programs: BpfObject, row: Row) -> None:
    before = drops(programs)
    verdict, result, _ = programs.test_run("serval_in", row.packet)
    assert (verdict, result.hex()) == (row.verdict, (row.result or row.packet).hex())
    changes = {name: count - before[name] for name, count in drops(programs).items() if count != before[name]}
    assert changes == ({row.dropped_for: 1} if row.dropped_for else {})


def test_damage_behind_a_nat_is_not_repaired(programs: BpfObject) -> None:
    """The difference that is put into the inner checksum is that of the addresses only."""
    damaged = on_wire(written_at=PRIVATE)[:-1] + b"!"
    _, result, _ = programs.test_run("serval_in", damaged)
    assert tcp_segment.checksum_state(result[34:], REMOTE, VIRTUAL_LOCAL) == "wrong"


def test_whether_a_nat_is_on_the_way(programs: BpfObject) -> None:
    def untranslated() -> int:
        return FlowState.parse(programs.map("flow_states").get(SLOT) or b"").untranslated

    key = FLOW_KEY.pack(OUR_FLOW)
    entry = programs.map("flows").get(key) or b""
    moved = bytearray(entry)
    moved[FLOW_LOCAL], moved[FLOW_PATH_NUMBER] = ELSEWHERE.to_bytes(4, "big"), bytes([0, 0, 0, 3])
    for what, packet, value, expected in (
        ("nothing has come", b"", entry, 0),
        ("as it was sent", on_wire(), entry, 1),
        ("translated", on_wire(written_at=PRIVATE), entry, 0),
        ("as it was sent again", on_wire(), entry, 1),
        ("no outer checksum to see it by", changed(on_wire(), 14 + 26, bytes(2)), entry, 0),
        ("an odd number of bytes", on_wire(payload=b"odd"), entry, 1),
        ("to the old address after a move", on_wire(written_at=PRIVATE), bytes(moved), 1),
    ):
        programs.map("flows").update(key, value)
        if packet:
            programs.test_run("serval_in", packet)
        assert untranslated() == expected, what
    moved[FLOW_LOCAL] = entry[FLOW_LOCAL]
    programs.map("flows").update(key, bytes(moved))
    programs.test_run("serval_in", on_wire())
    assert untranslated() == 1 + int.from_bytes(bytes([0, 0, 0, 3]), "little"), "on the new path"
    programs.map("flows").update(key, entry)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(payload=st.binary(max_size=1400))
def test_out_and_both_checksums_are_right(programs: BpfObject, payload: bytes) -> None:
    """serval_out writes both headers before the IP header, as for a superpacket; serval_insert makes the packet."""
    ports = VIRTUAL_PORT, OUR_FLOW & 0xFFFF
    sent = ETHERNET + ipv4.emit(VIRTUAL_LOCAL, REMOTE, 6, tcp(VIRTUAL_LOCAL, REMOTE, ports, payload))
    verdict, waiting, _ = programs.test_run("serval_out", sent)
    assert verdict == TC_REDIRECT
    verdict, packet, mark = programs.test_run("serval_insert", waiting, MARK_ENCAPSULATED | 1)
    inner = sal.data_header(OUR_FLOW, PEER_FLOW, 6) + tcp(US, PEER, (0, 0), payload)
    assert verdict == TC_REDIRECT
    assert packet.hex() == (TO_NEIGHBOUR + encapsulation.emit(US, PEER, OURS, inner)).hex()
    assert mark == 0


def test_a_superpacket_counts_with_all_its_headers(programs: BpfObject) -> None:
    ports = VIRTUAL_PORT, OUR_FLOW & 0xFFFF
    sent = ETHERNET + ipv4.emit(VIRTUAL_LOCAL, REMOTE, 6, tcp(VIRTUAL_LOCAL, REMOTE, ports, bytes(2500)))
    programs.test_run("serval_out", sent, 0, 3)
    state = FlowState.parse(programs.map("flow_states").get(SLOT) or b"")
    assert state[:2] == (3, 3 * (20 + 8 + 12 + 20) + 2500)


def test_a_peer_that_sends_from_elsewhere_is_told_once_for_each_place(programs: BpfObject) -> None:
    for source, port in ((PEER, 4000), (PEER, 4001), (PEER, 4001), (ELSEWHERE, 4001), (PEER, 4000)):
        programs.test_run("serval_in", on_wire(source=source, ports=OuterPorts(port, 54325), written_at=source))
    told = [EVENT.unpack(sample) for sample in programs.ring_buffer("flow_events").take()]
    kind = struct.pack("=I", FlowEvent.PEER_SEEN)
    assert told == [(OUR_FLOW, kind, PEER, 4001), (OUR_FLOW, kind, ELSEWHERE, 4001)]


@pytest.mark.parametrize(("flow_id", "passed"), [(OUR_FLOW, True), (HALF_OPEN, True), (UNKNOWN, False)])
def test_the_sockets_get_data_of_known_flows_only(programs: BpfObject, flow_id: int, passed: bool) -> None:
    # The test run takes the Ethernet header away; a UDP socket's filter begins at the UDP header.
    packet = ETHERNET + on_wire(flow_id)[34:]
    assert bool(programs.test_run("serval_outer", packet)[0]) == passed
