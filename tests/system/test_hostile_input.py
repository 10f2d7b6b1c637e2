"""Do malformed, forged and random packets change anything? Each is counted with its reason, and that is all.

Three hosts on one LAN: a client and a server with real stacks and a transfer between them, and an attacker who
knows everything but the nonces and the peers' flowIDs.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from hostile import (
    ACK,
    FIN,
    HANDSHAKE_OPTIONS,
    NACK,
    PROTOCOL_UDP,
    RST,
    RSYN,
    SERVICE_NUMBER,
    SYN,
    TCP_ACK,
    TCP_FIN,
    TCP_RST,
    TCP_SYN,
    UNKNOWN_SERVICE_NUMBER,
    Attacker,
    LiveTransfer,
    control,
    sal,
    service,
    tcp,
)
from malformed import (
    ATTACKER,
    CLIENT,
    ENDS,
    GOOD_TCP,
    MALFORMED,
    SERVED,
    SERVER,
    SYN_CONTROL,
    syn,
)

from lab.hosts import Lab, shape
from lab.waiting import wait_for
from serval_core.sal_settings import SalSettings
from tests.serval_core.stack_thread import Accepting, StackThread, Stream

QUICK = SalSettings(connect_timeout_s=10.0, time_wait_s=0.2, fin_wait2_s=0.5, request_expiry_s=0.5)
DATA_HEADERS_BYTES = 12 + 20
DROPPED = ("dropped_", "dataplane_drop_")
WRONG = bytes.fromhex("deadbeefdeadbeef")


class Field(NamedTuple):
    """The hosts while a transfer goes on from client to server."""

    client: StackThread
    server: StackThread
    listener: Accepting
    attacker: Attacker
    near: Stream
    far: Stream
    transfer: LiveTransfer

    def flows(self) -> tuple[int, int]:
        """The client's flowID and the server's."""
        return self.near.connection.flow_id, self.far.connection.flow_id

    def new_drops(self, before: dict[str, int]) -> dict[str, int]:
        """What the server has dropped since its counters were `before`, by reason."""
        found = {}
        for name, count in self.server.counters().items():
            if name.startswith(DROPPED) and count > before.get(name, 0):
                found[name.partition("_")[2] if name.startswith("dropped_") else name] = count - before.get(name, 0)
        return found

    def send_and_count(self, payload: bytes, sender: str = "") -> dict[str, int]:
        """The drops that one packet causes."""
        before = self.server.counters()
        self.attacker.send(payload, sender=sender)
        wait_for(lambda: self.new_drops(before), f"a packet to be counted: {payload.hex()}", timeout_s=5)
        return self.new_drops(before)


class Hosts(NamedTuple):
    """The stacks, which all tests share."""

    client: StackThread
    server: StackThread
    listener: Accepting
    attacker: Attacker


@pytest.fixture(scope="module")
def hosts(root: None) -> Iterator[Hosts]:
    with Lab() as lab:
        client, server, attacker = lab.host("client"), lab.host("server"), lab.host("attacker")
        addresses = {client: f"{CLIENT}/24", server: f"{SERVER}/24", attacker: f"{ATTACKER}/24"}
        lab.switch("switch", addresses)
        shape(client, "eth0", "40mbit")
        with StackThread(client, sal=QUICK) as near, StackThread(server, sal=QUICK) as far:
            yield Hosts(near, far, far.listen(str(SERVICE_NUMBER)), Attacker(attacker, SERVER))


@pytest.fixture
def field(hosts: Hosts, caplog: pytest.LogCaptureFixture) -> Iterator[Field]:
    """A transfer during the test, and what must hold after it: hash, no flow left over, no exception in a callback."""
    near = hosts.client.connect(str(SERVICE_NUMBER))
    far = hosts.listener.accept()
    transfer = LiveTransfer(near.socket, far.socket)
    field = Field(*hosts, near, far, transfer)
    hosts.attacker.answers()
    yield field
    transfer.goes_on()
    transfer.finish()
    far.release()
    near.release()
    for stack in (hosts.client, hosts.server):
        wait_for(lambda stack=stack: not stack.flows(), "no flow is left")  # type: ignore[misc]
        assert stack.counters()["flow_map_entries"] == 0
    assert hosts.listener.waiting() == 0
    assert [record.getMessage() for record in caplog.get_records("call") if record.name == "asyncio"] == []


def test_each_malformed_packet_is_counted_with_its_reason(field: Field) -> None:
    """Nothing is answered, and no flow begins."""
    wrong = {}
    for row in MALFORMED:
        drops = field.send_and_count(row.payload)
        if drops != {row.reason: 1}:
            wrong[row.what] = drops
    assert wrong == {}
    assert [flow["state"] for flow in field.server.flows()] == ["CONNECTED"]
    assert field.server.counters()["flow_map_entries"] == 1
    assert field.attacker.answers() == []


def test_the_packet_that_they_are_made_from_is_a_good_one(field: Field) -> None:
    """Or the test above would prove nothing."""
    field.attacker.send(syn())
    wait_for(lambda: len(field.server.flows()) == 2, "a half-open flow")
    wait_for(lambda: len(field.server.flows()) == 1, "the end of its patience")
    (answer, *_) = field.attacker.answers()
    assert answer[14] == SYN | ACK


def test_random_bytes_are_all_counted(field: Field) -> None:
    numbers = random.Random(1)
    before = field.server.counters()
    total = 4000
    for number in range(total):
        field.attacker.send(numbers.randbytes(numbers.randrange(120)))
        if number % 500 == 499:
            wait_for(lambda: sum(field.new_drops(before).values()) == number + 1, "every packet to be counted")  # noqa: B023
    assert [flow["state"] for flow in field.server.flows()] == ["CONNECTED"]
    assert field.attacker.answers() == []


def test_mutated_packets_are_counted_or_open_a_flow_that_expires(field: Field) -> None:
    """Bytes of a good SYN are replaced and the checksums made right again, so that they reach what is behind."""
    numbers = random.Random(2)
    before = field.server.counters()
    good = sal(SYN_CONTROL, SERVED)
    total = 2000
    for number in range(total):
        extensions, segment = bytearray(good[12:]), bytearray(GOOD_TCP)
        for _ in range(numbers.randrange(1, 4)):
            part = numbers.choice((extensions, segment))
            part[numbers.randrange(len(part))] = numbers.randrange(256)
        options = bytes(segment[20:])
        transport = tcp(ENDS, flags=segment[13], options=options, words=segment[12] >> 4)
        field.attacker.send(sal(bytes(extensions), flows=(number + 1, 0)) + transport)
    received = before["packets_received"] + total

    def settled() -> bool:
        counters = field.server.counters()
        return counters["packets_received"] >= received and len(field.server.flows()) == 1

    wait_for(settled, "all packets to be looked at and half-open flows to expire")
    assert sum(field.new_drops(before).values()) > total / 4
    assert field.server.counters()["flow_map_entries"] == 1


FORGED_CONTROL = [
    ("an RST", RST | ACK, "spoofed_reset"),
    ("a bare RST", RST, "spoofed_reset"),
    ("a FIN", FIN, "wrong_nonce"),
    ("a FIN with ACK", FIN | ACK, "wrong_nonce"),
    ("an ACK", ACK, "wrong_nonce"),
    ("an RSYN", RSYN, "wrong_nonce"),
    ("an RSYN with ACK", RSYN | ACK, "wrong_nonce"),
    ("a SYN-ACK", SYN | ACK, "wrong_nonce"),
    ("a NACK", NACK, "wrong_nonce"),
    ("no flag at all", 0, "wrong_nonce"),
    ("every flag", 0xFC, "spoofed_reset"),
]


@pytest.mark.parametrize("nonce", [WRONG, bytes(8)], ids=["wrong-nonce", "no-nonce"])
def test_control_packets_of_somebody_else_change_nothing(field: Field, nonce: bytes) -> None:
    """The attacker knows addresses and flowIDs, but not the nonce. Without one, an RST must guess the version number."""
    for what, flags, reason in FORGED_CONTROL:
        for verno in (0, 1000, 0x7FFFFFFF, 0xFFFFFFFF):
            payload = sal(control(flags, verno, verno, nonce), flows=field.flows())
            assert field.send_and_count(payload, CLIENT) == {reason: 1}, what
    assert [flow["state"] for flow in field.server.flows()] == ["CONNECTED"]


def test_guessed_flow_ids_are_counted_and_hit_nobody(field: Field) -> None:
    numbers = random.Random(3)
    before = field.server.counters()
    data = tcp((CLIENT, SERVER), flags=TCP_ACK, options=b"", payload=b"forged")
    for _ in range(300):
        flows = numbers.getrandbits(32), numbers.getrandbits(32)
        for flags in (RST, FIN, ACK):
            field.attacker.send(sal(control(flags, nonce=numbers.randbytes(8)), flows=flows), sender=CLIENT)
        field.attacker.send(sal(flows=flows) + data, sender=CLIENT)
    expected = {"unknown_flow": 900, "dataplane_drop_in_unknown_flow": 300}
    wait_for(lambda: sum(field.new_drops(before).values()) == 1200, "all packets to be counted")
    assert field.new_drops(before) == expected


def test_data_from_a_wrong_flow_never_reaches_the_socket(field: Field) -> None:
    """To inject data, both flowIDs are needed, in whatever shape it comes: plain, padded, in fragments, with IP options."""
    _, flow_id = field.flows()
    guess = (0x12345678, flow_id)
    segment = tcp((CLIENT, SERVER), flags=TCP_ACK, options=b"", payload=b"forged" * 10)
    plain, padded, named = sal(flows=guess), sal(bytes(4), flows=guess), sal(SERVED, flows=guess)
    before = field.server.counters()
    for header in (plain, padded, named):
        field.attacker.send(header + segment, sender=CLIENT)
        field.attacker.send_fragmented(header + segment, sender=CLIENT)
        field.attacker.send(header + segment, sender=CLIENT, options=b"\1\1\1\0")
    wait_for(lambda: sum(field.new_drops(before).values()) == 9, "all packets to be counted")
    assert field.new_drops(before) == {"dataplane_drop_in_wrong_header": 1, "wrong_peer_flow": 8}
    damaged = sal(flows=field.flows(), damage=0x55) + segment
    assert field.send_and_count(damaged, sender=CLIENT) == {"dataplane_drop_in_wrong_header": 1}


def test_segments_with_both_flow_ids_are_left_to_tcp(field: Field) -> None:
    """An attacker on the path would still have to find the window: RST, FIN, data and ACK elsewhere are TCP's daily bread."""
    for flags in (TCP_RST, TCP_RST | TCP_ACK, TCP_FIN | TCP_ACK, TCP_SYN, TCP_SYN | TCP_ACK, TCP_ACK, 0):
        for sequence in (0, 0x40000000, 0x80000000, 0xC0000000):
            forged = tcp(
                (CLIENT, SERVER), flags=flags, sequence=sequence, acknowledgement=sequence, options=b"", payload=b"forged"
            )
            field.attacker.send(sal(flows=field.flows()) + forged, sender=CLIENT)
            field.attacker.send(sal(flows=field.flows()) + tcp((CLIENT, SERVER), damage=1), sender=CLIENT)
    field.transfer.goes_on()
    assert [flow["state"] for flow in field.server.flows()] == ["CONNECTED"]


def test_fragments(field: Field) -> None:
    """The kernel puts them together: whole SYNs count, pieces do not, and too large a whole is counted."""
    before = field.server.counters()
    for identification in range(1, 50):
        field.attacker.send(syn()[:64], fragment=0x2000, identification=identification)
        field.attacker.send(syn()[64:], fragment=64 // 8 + 1, identification=identification + 100)
    field.attacker.send_fragmented(sal(SYN_CONTROL, service(UNKNOWN_SERVICE_NUMBER)) + GOOD_TCP)
    wait_for(lambda: field.new_drops(before), "the whole packet")
    assert field.new_drops(before) == {"no_listener": 1}
    before = field.server.counters()
    large = syn(transport=GOOD_TCP + bytes(3000))
    for offset in range(0, len(large), 1024):
        more = 0x2000 if offset + 1024 < len(large) else 0
        field.attacker.send(large[offset : offset + 1024], fragment=more | offset // 8, identification=7000)
    wait_for(lambda: field.new_drops(before), "the large packet")
    assert set(field.new_drops(before)) <= {"ipv4_truncated", "tcp_checksum"}


def open_half(field: Field, flow_id: int) -> tuple[int, int, int]:
    """Begin a handshake; returns the server's flowID, version number and TCP sequence number."""
    field.attacker.answers()
    field.attacker.send(sal(SYN_CONTROL, SERVED, flows=(flow_id, 0)) + GOOD_TCP)
    return read_syn_ack(field.attacker.answer())


def read_syn_ack(packet: bytes) -> tuple[int, int, int]:
    """Source flowID, version number and TCP sequence number."""
    flow_id, verno, sequence = struct.unpack_from("!I12xI16xI", packet)
    return flow_id, verno, sequence


def test_half_open_flows_are_completed_by_nothing_but_the_right_packet(field: Field) -> None:
    flow_id, verno, sequence = open_half(field, 77)
    flows = 77, flow_id

    def ack(
        flags: int = ACK, verno_in: int = 1001, ackno: int = verno + 1, nonce: bytes = control(0)[-8:], **how: int
    ) -> bytes:
        transport = tcp(ENDS, flags=TCP_ACK, sequence=7001, options=b"", **{"acknowledgement": sequence + 1, **how})  # type: ignore[arg-type]
        return sal(control(flags, verno_in, ackno, nonce), SERVED, flows=flows) + transport

    def data(**how: object) -> bytes:
        chosen = {"flags": TCP_ACK, "sequence": 7001, "acknowledgement": sequence + 1, "options": b"", **how}
        return tcp(ENDS, payload=b"early", **chosen)  # type: ignore[arg-type]

    wrong = [
        (ack(nonce=WRONG), "wrong_nonce"),
        (ack(verno_in=1002), "wrong_verno"),
        (ack(ackno=verno + 2), "wrong_ackno"),
        (ack(ackno=verno), "wrong_ackno"),
        (ack(acknowledgement=sequence + 2), "handshake_segment"),
        (ack(damage=1), "tcp_checksum"),
        (ack(flags=FIN), "not_a_handshake_ack"),
        (ack(flags=RST | ACK, nonce=WRONG), "spoofed_reset"),
        (sal(flows=flows) + data(acknowledgement=sequence), "handshake_segment"),
        (sal(flows=flows) + data(flags=TCP_RST), "handshake_segment"),
        (sal(flows=flows) + data(damage=1), "tcp_checksum"),
        (sal(flows=flows) + data(words=4), "tcp_header_length"),
        (sal(flows=flows, damage=1) + data(), "sal_checksum"),
        (sal(flows=(78, flow_id)) + data(), "wrong_peer_flow"),
        (sal(flows=flows, protocol=PROTOCOL_UDP) + data(), "wrong_protocol"),
    ]
    found = [(field.send_and_count(payload), {reason: 1}) for payload, reason in wrong]
    assert [seen for seen, _ in found] == [expected for _, expected in found]
    assert field.listener.waiting() == 0
    field.attacker.send(sal(flows=flows) + data())
    stream = field.listener.accept()
    assert stream.socket.recv(10) == b"early"
    stream.abort()


@pytest.mark.parametrize(
    "options",
    [
        b"",
        b"\x02\x04\x00\x00",
        b"\x02\x04\xff\xff",
        b"\x02\x04\x00\x01\x01\x03\x03\xff",
        b"\x02\x04\x05\xa8\x04\x02\x08\x0a" + b"\xff" * 8,
        HANDSHAKE_OPTIONS + b"\xfe\x06\x53\x41\xff\xff\x00\x00",
    ],
    ids=lambda options: options.hex() or "none",
)
def test_extreme_options_open_a_flow_that_works(field: Field, options: bytes) -> None:
    field.attacker.send(sal(SYN_CONTROL, SERVED, flows=(91, 0)) + tcp(ENDS, options=options))
    flow_id, verno, sequence = read_syn_ack(field.attacker.answer())
    flows = 91, flow_id
    transport = tcp(ENDS, flags=TCP_ACK, sequence=7001, acknowledgement=sequence + 1, options=b"", window=4000)
    field.attacker.send(sal(control(ACK, 1001, verno + 1), SERVED, flows=flows) + transport)
    stream = field.listener.accept()
    stream.socket.sendall(bytes(3000))
    data = field.attacker.answer(longer_than_bytes=DATA_HEADERS_BYTES + 12)
    assert len(data) <= 1480
    stream.abort()
