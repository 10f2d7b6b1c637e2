"""The BPF programs, one packet at a time (PROG_TEST_RUN): tables of description, packet in, verdict, packet out."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from serval_core.dataplane.bpf_loader import BpfObject
from serval_core.dataplane.flow_sockets import LOOK_PACKET
from serval_core.dataplane.layouts import (
    CONFIGURATION,
    DROP_REASONS,
    EVENT,
    FLOW,
    FLOW_COMPLETE_CHECKSUM,
    FLOW_EXPECTED,
    FLOW_FLAGS,
    FLOW_NEIGHBOUR_KNOWN,
    MAX_FLOWS,
    OBJECT_FILE,
    FlowState,
    fresh_state,
)
from serval_core.names import parse_address
from serval_core.wire import ipv4, sal, tcp_segment

TC_UNSPEC, TC_SHOT, TC_REDIRECT = 0xFFFFFFFF, 2, 7
VIRTUAL_LOCAL = parse_address("100.127.255.1")
VIRTUAL_REMOTE = parse_address("100.126.0.0")
VIRTUAL_PORT = 54324
US, PEER = parse_address("10.1.0.1"), parse_address("10.1.0.2")
OUR_FLOW, PEER_FLOW, HALF_OPEN, CHECKSUM_FLOW, UNKNOWN = (
    0x11223344,
    0x55667788,
    0x0A0B0C0D,
    0x22334455,
    0x7777BEEF,
)
ETHERNET = bytes.fromhex("02000000000a02000000000b0800")
DELIVERED = bytes.fromhex("02534 14c0000".replace(" ", "")) + bytes.fromhex("02000000000b0800")
TO_NEIGHBOUR = bytes.fromhex("0200000000bb0200000000aa0800")
WIRE_INDEX, ASK_NEIGHBOUR = 1, 0x80000000
SEQUENCE, ACKNOWLEDGEMENT = 1000, 2000


@pytest.fixture(scope="module")
def programs() -> Iterator[BpfObject]:
    configuration = CONFIGURATION.pack(
        VIRTUAL_LOCAL, VIRTUAL_REMOTE, VIRTUAL_PORT, *[struct.pack("=I", 1)] * 4
    )
    loaded = BpfObject(str(OBJECT_FILE), configuration)
    yield loaded
    loaded.close()


@pytest.fixture(autouse=True)
def flows(programs: BpfObject) -> None:
    """Slot 0: an open flow; slot 1: one whose peer needs complete checksums; a half-open one; nothing noted yet."""
    for slot in (0, 1):
        programs.map("flow_states").update(struct.pack("=I", slot), fresh_state(SEQUENCE))
    for flow_id, slot, flags in (
        (OUR_FLOW, 0, 0),
        (CHECKSUM_FLOW, 1, FLOW_COMPLETE_CHECKSUM),
        (HALF_OPEN, 0, FLOW_EXPECTED),
    ):
        programs.map("flows").update(
            struct.pack("!I", flow_id),
            flow_value(flow_id, slot, flags),
        )


def flow_value(
    flow_id: int,
    slot: int,
    flags: int,
    native_ports: tuple[int, int] = (0, 0),
    outer_ports: tuple[int, int] = (0, 0),
    path_number: int = 0,
    other_addresses: tuple[int, int] = (0, 0),
) -> bytes:
    """The entry of a flow between us and the peer, through interface 1."""
    return FLOW.pack(
        US,
        PEER,
        PEER,
        struct.pack("=I", 1),
        struct.pack("=I", slot),
        struct.pack("=I", flags),
        sal.data_header(flow_id, PEER_FLOW, 6),
        sal.data_header(PEER_FLOW, flow_id, 6),
        bytes.fromhex("0200000000bb"),
        bytes.fromhex("0200000000aa"),
        *native_ports,
        *outer_ports,
        path_number,
        *other_addresses,
    )


def segment(
    source: int,
    destination: int,
    ports: tuple[int, int],
    flags: int = tcp_segment.ACK,
    payload: bytes = b"hello",
) -> bytes:
    return tcp_segment.emit(
        tcp_segment.TcpSegment(
            *ports,
            SEQUENCE,
            ACKNOWLEDGEMENT,
            flags,
            512,
            0,
            tcp_segment.TcpOptions(None, None, False, None, None),
            payload,
        ),
        source,
        destination,
    )


def from_socket(flow_id: int, **how: object) -> bytes:
    """What the kernel's TCP hands to serval0."""
    remote = VIRTUAL_REMOTE | flow_id >> 16
    body = segment(VIRTUAL_LOCAL, remote, (VIRTUAL_PORT, flow_id & 0xFFFF), **how)  # type: ignore[arg-type]
    return ETHERNET + ipv4.emit(VIRTUAL_LOCAL, remote, 6, body)


def to_socket(flow_id: int) -> bytes:
    remote = VIRTUAL_REMOTE | flow_id >> 16
    return DELIVERED + ipv4.emit(
        remote, VIRTUAL_LOCAL, 6, segment(remote, VIRTUAL_LOCAL, (flow_id & 0xFFFF, VIRTUAL_PORT))
    )


def waiting(flow_id: int) -> bytes:
    """What serval_out makes of it for serval_insert."""
    header = sal.data_header(flow_id, PEER_FLOW, 6)
    return TO_NEIGHBOUR + header + ipv4.emit(US, PEER, 6, segment(US, PEER, (0, 0)))


def on_wire(
    source_flow: int, destination_flow: int, source: int = PEER, destination: int = US, **ip: int
) -> bytes:
    header = sal.data_header(source_flow, destination_flow, 6)
    return ETHERNET + ipv4.emit(source, destination, 144, header + segment(source, destination, (0, 0)), **ip)


def changed(packet: bytes, offset: int, value: bytes) -> bytes:
    return packet[:offset] + value + packet[offset + len(value) :]


CONTROL = ETHERNET + ipv4.emit(
    PEER, US, 144, sal.emit_control(PEER_FLOW, OUR_FLOW, 6, sal.FIN, 7, 8, bytes(8))
)


@dataclass(frozen=True)
class Row:
    description: str
    packet: bytes
    verdict: int
    result: bytes | None = None  # None: as it came in
    dropped_for: str | None = None


INCOMING = [
    Row("data of an open flow", on_wire(PEER_FLOW, OUR_FLOW), TC_REDIRECT, to_socket(OUR_FLOW)),
    Row(
        "data from another address of the peer (it migrated)",
        on_wire(PEER_FLOW, OUR_FLOW, source=parse_address("192.0.2.7")),
        TC_REDIRECT,
        to_socket(OUR_FLOW),
    ),
    Row("data of a half-open flow goes up", on_wire(PEER_FLOW, HALF_OPEN), TC_UNSPEC),
    Row("data of an unknown flow is not ours to judge", on_wire(PEER_FLOW, UNKNOWN), TC_UNSPEC),
    Row("control packet goes up", CONTROL, TC_UNSPEC),
    Row("guessed flow, wrong peer flow", on_wire(UNKNOWN, OUR_FLOW), TC_SHOT, dropped_for="in_wrong_header"),
    Row(
        "damaged SAL checksum",
        changed(on_wire(PEER_FLOW, OUR_FLOW), 14 + 20 + 10, b"\xde\xad"),
        TC_SHOT,
        dropped_for="in_wrong_header",
    ),
    Row("fragment goes up", on_wire(PEER_FLOW, OUR_FLOW, flags_fragment=0x2000), TC_UNSPEC),
    Row("plain TCP passes", ETHERNET + ipv4.emit(PEER, US, 6, segment(PEER, US, (1, 2))), TC_UNSPEC),
    Row(
        "nobody reaches a flow's socket past the SAL",
        ETHERNET
        + ipv4.emit(VIRTUAL_REMOTE | 0x1122, VIRTUAL_LOCAL, 6, segment(PEER, US, (0x3344, VIRTUAL_PORT))),
        TC_SHOT,
        dropped_for="in_virtual_address",
    ),
    Row("ARP passes", bytes(12) + b"\x08\x06" + bytes(28), TC_UNSPEC),
    Row("header cut short passes", on_wire(PEER_FLOW, OUR_FLOW)[:50], TC_UNSPEC),
    Row(
        "IP length too small for a segment",
        changed(on_wire(PEER_FLOW, OUR_FLOW), 16, struct.pack("!H", 40)),
        TC_SHOT,
        dropped_for="in_truncated",
    ),
]


def drops(programs: BpfObject) -> dict[str, int]:
    counters = programs.per_cpu_map("drop_counters")
    values = (counters.get(struct.pack("=I", index)) or b"" for index in range(len(DROP_REASONS)))
    return {
        name: sum(struct.unpack(f"={len(value) // 8}Q", value))
        for name, value in zip(DROP_REASONS, values, strict=True)
    }


@pytest.mark.parametrize("row", INCOMING, ids=lambda row: row.description)
def test_incoming(programs: BpfObject, row: Row) -> None:
    before = drops(programs)
    verdict, result, _ = programs.test_run("serval_in", row.packet)
    assert verdict == row.verdict
    if row.verdict != TC_SHOT:
        assert result.hex() == (row.result or row.packet).hex()
    counted = {name: count - before[name] for name, count in drops(programs).items() if count != before[name]}
    assert counted == ({row.dropped_for: 1} if row.dropped_for else {})


@pytest.mark.parametrize("flow_id", [OUR_FLOW, CHECKSUM_FLOW])
def test_outgoing_gets_wire_addresses_and_headers(programs: BpfObject, flow_id: int) -> None:
    """The SAL header waits before the IP header; the mark is the interface, and that its neighbour has to be asked for."""
    result = programs.test_run("serval_out", from_socket(flow_id))
    assert result[0] == TC_REDIRECT
    assert result[1].hex() == waiting(flow_id).hex()
    assert result[2] == WIRE_INDEX | ASK_NEIGHBOUR


def test_outgoing_to_a_known_neighbour(programs: BpfObject) -> None:
    key = struct.pack("!I", OUR_FLOW)
    entry = bytearray(programs.map("flows").get(key) or b"")
    entry[FLOW_FLAGS] = struct.pack("=I", FLOW_NEIGHBOUR_KNOWN)
    programs.map("flows").update(key, bytes(entry))
    assert programs.test_run("serval_out", from_socket(OUR_FLOW))[2] == WIRE_INDEX


def test_outgoing_without_flow_is_dropped(programs: BpfObject) -> None:
    before = drops(programs)["out_not_a_flow"]
    assert programs.test_run("serval_out", from_socket(UNKNOWN))[0] == TC_SHOT
    assert programs.test_run("serval_insert", waiting(OUR_FLOW), 0)[0] == TC_SHOT
    assert programs.test_run("serval_insert", waiting(UNKNOWN), WIRE_INDEX | ASK_NEIGHBOUR)[0] == TC_SHOT
    assert programs.test_run("serval_insert", waiting(OUR_FLOW)[:40], WIRE_INDEX)[0] == TC_SHOT
    assert drops(programs)["out_not_a_flow"] == before + 4


@pytest.mark.parametrize("neighbour", [0, ASK_NEIGHBOUR], ids=["known", "asked for"])
def test_insert_puts_the_header_before_tcp(programs: BpfObject, neighbour: int) -> None:
    verdict, result, mark = programs.test_run("serval_insert", waiting(OUR_FLOW), WIRE_INDEX | neighbour)
    assert (verdict, mark) == (TC_REDIRECT, 0)
    header = sal.data_header(OUR_FLOW, PEER_FLOW, 6)
    assert result.hex() == (TO_NEIGHBOUR + ipv4.emit(US, PEER, 144, header + segment(US, PEER, (0, 0)))).hex()


@pytest.mark.parametrize("length", [0, 1, 1447, 1448])
def test_insert_keeps_the_ip_checksum_right(programs: BpfObject, length: int) -> None:
    """It is changed, not computed: every carry has to go round."""
    for identification in (0, 1, 0x7FFF, 0xBEEF, 0xFFF3, 0xFFFF):
        body = segment(US, PEER, (0, 0), payload=bytes(length))
        header = sal.data_header(OUR_FLOW, PEER_FLOW, 6)
        before = TO_NEIGHBOUR + header + ipv4.emit(US, PEER, 6, body, identification=identification)
        _, result, _ = programs.test_run("serval_insert", before, WIRE_INDEX)
        after = ipv4.emit(US, PEER, 144, header + body, identification=identification)
        assert result[14:].hex() == after.hex()


def test_a_superpacket_counts_as_what_becomes_of_it(programs: BpfObject) -> None:
    payload = bytes(2 * 1000 + 500)
    programs.test_run("serval_out", from_socket(OUR_FLOW, payload=payload), 0, 3)
    programs.test_run("serval_out", from_socket(OUR_FLOW, payload=b""))
    state = FlowState.parse(programs.map("flow_states").get(struct.pack("=I", 0)) or b"")
    assert state[:2] == (3 + 1, 4 * (20 + 12 + 20) + len(payload))


def test_counters_and_the_acknowledgement_of_our_fin(programs: BpfObject) -> None:
    """FIN leaves with sequence 1000 and 5 bytes; only an acknowledgement of 1006 is the one, and it is told once."""
    events = programs.ring_buffer("flow_events")
    events.take()
    programs.test_run("serval_out", from_socket(OUR_FLOW, flags=tcp_segment.FIN | tcp_segment.ACK))
    wire = on_wire(PEER_FLOW, OUR_FLOW)
    acknowledged = 14 + 20 + 12 + 8
    for acknowledgement in (1005, 1007, 1006, 1006):
        programs.test_run("serval_in", changed(wire, acknowledged, struct.pack("!I", acknowledgement)))
    assert events.take() == [EVENT.pack(OUR_FLOW, struct.pack("=I", 1), 0, 0)]
    state = FlowState.parse(programs.map("flow_states").get(struct.pack("=I", 0)) or b"")
    assert (state.packets_in, state.bytes_in) == (4, 4 * (len(wire) - 14))


def test_reset_by_the_kernel_is_told_once_and_goes_out(programs: BpfObject) -> None:
    events = programs.ring_buffer("flow_events")
    events.take()
    for _ in range(2):
        assert (
            programs.test_run("serval_out", from_socket(OUR_FLOW, flags=tcp_segment.RST, payload=b""))[0]
            == TC_REDIRECT
        )
    assert events.take() == [EVENT.pack(OUR_FLOW, struct.pack("=I", 2), 0, 0)]


def test_reset_after_both_fins_stays_here(programs: BpfObject) -> None:
    """The kernel answers a late segment so when it has forgotten the connection; the flow ended well."""
    events = programs.ring_buffer("flow_events")
    events.take()
    before = drops(programs)["out_late_reset"]
    programs.test_run("serval_out", from_socket(OUR_FLOW, flags=tcp_segment.FIN | tcp_segment.ACK))
    wire = on_wire(PEER_FLOW, OUR_FLOW)
    flags = 14 + 20 + 12 + 13
    acknowledged = 14 + 20 + 12 + 8
    reset = from_socket(OUR_FLOW, flags=tcp_segment.RST, payload=b"")
    programs.test_run("serval_in", changed(wire, flags, bytes([tcp_segment.FIN | tcp_segment.ACK])))
    assert programs.test_run("serval_out", reset)[0] == TC_REDIRECT, "our FIN is not through"
    programs.test_run("serval_in", changed(wire, acknowledged, struct.pack("!I", 1006)))
    assert programs.test_run("serval_out", reset)[0] == TC_SHOT
    assert drops(programs)["out_late_reset"] == before + 1


@pytest.mark.parametrize(("flow_id", "passed"), [(OUR_FLOW, True), (HALF_OPEN, True), (UNKNOWN, False)])
def test_raw_socket_gets_data_of_known_flows_only(programs: BpfObject, flow_id: int, passed: bool) -> None:
    before = drops(programs)["in_unknown_flow"]
    packet = on_wire(PEER_FLOW, flow_id)
    # The test run takes the Ethernet header away, as the kernel does before a raw socket's filter.
    assert bool(programs.test_run("serval_control", packet)[0]) == passed
    assert drops(programs)["in_unknown_flow"] == before + (not passed)


def test_half_open_flows_find_room_when_every_slot_is_taken(programs: BpfObject) -> None:
    flows = programs.map("flows")
    entry = flows.get(struct.pack("!I", HALF_OPEN)) or b""
    keys = [struct.pack("!I", number) for number in range(1, MAX_FLOWS + 2000)]
    for key in keys:
        flows.update(key, entry)
    for key in keys:
        flows.delete(key)


def test_outgoing_of_a_socket_that_is_not_the_flows(programs: BpfObject) -> None:
    """Any program may connect a TCP socket of its own to a virtual tuple; nothing of it leaves."""
    remote = VIRTUAL_REMOTE | OUR_FLOW >> 16
    body = segment(VIRTUAL_LOCAL, remote, (VIRTUAL_PORT + 1, OUR_FLOW & 0xFFFF))
    before = drops(programs)["out_not_a_flow"]
    packet = ETHERNET + ipv4.emit(VIRTUAL_LOCAL, remote, 6, body)
    assert programs.test_run("serval_out", packet)[0] == TC_SHOT
    assert drops(programs)["out_not_a_flow"] == before + 1


def test_look_at_a_socket_that_does_not_exist(programs: BpfObject) -> None:
    assert programs.test_run("serval_look", LOOK_PACKET, UNKNOWN)[0] == TC_SHOT
