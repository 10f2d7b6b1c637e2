"""Framing `native` in the BPF programs, one packet at a time: when is a segment plain TCP, and what becomes of such a one?"""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from serval_core.dataplane.bpf_loader import BpfObject
from serval_core.dataplane.layouts import (
    CONFIGURATION,
    EVENT,
    FLOW_KEY,
    FLOW_NATIVE,
    FLOW_NEIGHBOUR_KNOWN,
    FLOW_TELL_PROOF,
    NATIVE_DOUBTS,
    OBJECT_FILE,
    FlowEvent,
    FlowState,
    fresh_state,
)
from serval_core.wire import ipv4, sal, tcp_segment
from tests.serval_core.dataplane.test_bpf_programs import (
    DELIVERED,
    ETHERNET,
    OUR_FLOW,
    PEER,
    PEER_FLOW,
    TC_REDIRECT,
    TC_SHOT,
    TC_UNSPEC,
    TO_NEIGHBOUR,
    US,
    VIRTUAL_LOCAL,
    VIRTUAL_PORT,
    VIRTUAL_REMOTE,
    drops,
    flow_value,
)

OUR_PORT, PEER_PORT, GONE_PORT = 61000, 62000, 61001
OTHER_US, OTHER_PEER, STRANGER = US + 5, PEER + 5, PEER + 9
START = 1000  # the first sequence number
REMOTE = VIRTUAL_REMOTE | OUR_FLOW >> 16
SLOT = struct.pack("=I", 0)


@pytest.fixture(scope="module")
def programs() -> Iterator[BpfObject]:
    loaded = BpfObject(
        str(OBJECT_FILE), CONFIGURATION.pack(VIRTUAL_LOCAL, VIRTUAL_REMOTE, VIRTUAL_PORT, *[struct.pack("=I", 1)] * 4)
    )
    for port, flow_id in ((OUR_PORT, OUR_FLOW), (GONE_PORT, 0x7777)):
        loaded.map("native_ports").update(struct.pack("=I", port), struct.pack("!I", flow_id) + struct.pack("=I", 1))
    yield loaded
    loaded.close()


@pytest.fixture(autouse=True)
def flow(programs: BpfObject) -> None:
    put_flow(programs, FLOW_NATIVE)
    programs.map("flow_states").update(SLOT, fresh_state(START))
    programs.ring_buffer("flow_events").take()


def put_flow(programs: BpfObject, flags: int, path_number: int = 0) -> None:
    value = flow_value(
        OUR_FLOW,
        0,
        flags | FLOW_NEIGHBOUR_KNOWN,
        native_ports=(OUR_PORT, PEER_PORT),
        path_number=path_number,
        other_addresses=(OTHER_US, OTHER_PEER),
    )
    programs.map("flows").update(FLOW_KEY.pack(OUR_FLOW), value)


def tcp(
    source: int, destination: int, ports: tuple[int, int], sequence: int, acknowledgement: int, payload: bytes, flags: int
) -> bytes:
    segment = tcp_segment.TcpSegment(
        *ports, sequence, acknowledgement, flags, 512, 0, tcp_segment.NO_OPTIONS, payload
    )
    return ipv4.emit(source, destination, 6, tcp_segment.emit(segment, source, destination))


def send(programs: BpfObject, sequence: int, payload: bytes = b"hello", flags: int = tcp_segment.ACK) -> str:
    """Let the kernel's TCP send; which framing did it become?"""
    ports = VIRTUAL_PORT, OUR_FLOW & 0xFFFF
    verdict, packet, _ = programs.test_run(
        "serval_out", ETHERNET + tcp(VIRTUAL_LOCAL, REMOTE, ports, sequence, 0, payload, flags)
    )
    assert verdict == TC_REDIRECT
    if packet == TO_NEIGHBOUR + tcp(US, PEER, (OUR_PORT, PEER_PORT), sequence, 0, payload, flags):
        return "native"
    header = sal.data_header(OUR_FLOW, PEER_FLOW, 6)
    assert packet == TO_NEIGHBOUR + header + tcp(US, PEER, (0, 0), sequence, 0, payload, flags)
    return "sal"


def arrive(programs: BpfObject, acknowledgement: int = START, payload: bytes = b"", framing: str = "native") -> None:
    """A segment of the peer."""
    if framing == "native":
        packet = tcp(PEER, US, (PEER_PORT, OUR_PORT), 5, acknowledgement, payload, tcp_segment.ACK)
    else:
        plain = tcp(PEER, US, (0, 0), 5, acknowledgement, payload, tcp_segment.ACK)
        packet = ipv4.emit(PEER, US, 144, sal.data_header(PEER_FLOW, OUR_FLOW, 6) + plain[20:])
    assert programs.test_run("serval_in", ETHERNET + packet)[0] == TC_REDIRECT


def events(programs: BpfObject) -> list[FlowEvent]:
    samples = programs.ring_buffer("flow_events").take()
    return [FlowEvent(int.from_bytes(EVENT.unpack(sample)[1], "little")) for sample in samples]


@dataclass(frozen=True)
class Row:
    description: str
    ports: tuple[int, int]
    verdict: int
    flags: int = tcp_segment.ACK
    dropped_for: str | None = None
    addresses: tuple[int, int] = (PEER, US)


INCOMING = [
    Row("a flow's segment", (PEER_PORT, OUR_PORT), TC_REDIRECT),
    Row("to another port of this host", (PEER_PORT, 80), TC_UNSPEC),
    Row("to the port of a flow that is gone", (PEER_PORT, GONE_PORT), TC_SHOT, dropped_for="in_native_unknown"),
    Row("from another port than the peer's, for whom NAT may have chosen ours", (PEER_PORT + 1, OUR_PORT), TC_UNSPEC),
    Row("from another host with the peer's port", (PEER_PORT, OUR_PORT), TC_UNSPEC, addresses=(STRANGER, US)),
    Row("from the peer to a host behind this one", (PEER_PORT, OUR_PORT), TC_UNSPEC, addresses=(PEER, STRANGER)),
    Row("from where the peer was, or is about to be", (PEER_PORT, OUR_PORT), TC_REDIRECT, addresses=(OTHER_PEER, US)),
    Row("to where we were", (PEER_PORT, OUR_PORT), TC_REDIRECT, addresses=(PEER, OTHER_US)),
    Row(
        "a reset, which ports alone would forge",
        (PEER_PORT, OUR_PORT),
        TC_SHOT,
        tcp_segment.RST | tcp_segment.ACK,
        "in_native_reset",
    ),
    Row("a SYN", (PEER_PORT, OUR_PORT), TC_SHOT, tcp_segment.SYN, "in_native_reset"),
]


@pytest.mark.parametrize("row", INCOMING, ids=lambda row: row.description)
def test_what_comes_in(programs: BpfObject, row: Row) -> None:
    packet = ETHERNET + tcp(*row.addresses, row.ports, 5, 6, b"hello", row.flags)
    expected = packet
    if row.verdict == TC_REDIRECT:
        ports = OUR_FLOW & 0xFFFF, VIRTUAL_PORT
        expected = DELIVERED + tcp(REMOTE, VIRTUAL_LOCAL, ports, 5, 6, b"hello", row.flags)
    before = drops(programs)
    verdict, result, _ = programs.test_run("serval_in", packet)
    assert (verdict, result) == (row.verdict, expected)
    changes = {name: count - before[name] for name, count in drops(programs).items() if count != before[name]}
    assert changes == ({row.dropped_for: 1} if row.dropped_for else {})


def test_begins_when_the_peer_has_shown_that_it_has_a_socket(programs: BpfObject) -> None:
    assert send(programs, START) == "sal"
    arrive(programs, START + 5, framing="sal")
    assert send(programs, START + 5) == "native"
    assert send(programs, START + 10, b"") == "native", "an acknowledgement"
    assert send(programs, START + 10, b"", tcp_segment.RST) == "sal", "a reset"


def test_repeats_in_sal_until_something_native_was_acknowledged(programs: BpfObject) -> None:
    arrive(programs)
    assert [send(programs, START), send(programs, START + 5), send(programs, START)] == ["native", "native", "sal"]
    assert send(programs, START + 10) == "native", "one loss says little"
    arrive(programs, START + 5)
    assert events(programs) == [FlowEvent.NATIVE_DOUBTED], "what was acknowledged may have been the copy"
    arrive(programs, START + 10)
    assert events(programs) == [FlowEvent.NATIVE_PROVED]
    assert send(programs, START + 10) == "native", "a repetition on a path that is proved"


def test_gives_native_up_when_repetitions_are_all_that_gets_through(programs: BpfObject) -> None:
    arrive(programs)
    for step in range(2):
        assert send(programs, START + 5 * step) == "native"
        assert send(programs, START + 5 * step) == "sal"
        arrive(programs, START + 5 * step + 5, framing="sal")
    assert [send(programs, START + 10), send(programs, START + 15)] == ["sal", "sal"]
    assert events(programs) == [FlowEvent.NATIVE_DOUBTED]


def test_doubts_at_any_sequence_number(programs: BpfObject) -> None:
    """Half of all numbers lie before 0."""
    for start in (1, 0x7FFFFFF0, 0x80000010, 0xFFFFFFF0):
        programs.map("flow_states").update(SLOT, fresh_state(start))
        arrive(programs, start)
        assert [send(programs, start), send(programs, start)] == ["native", "sal"]
        assert events(programs) == [FlowEvent.NATIVE_DOUBTED]


def test_a_proved_path_is_doubted_when_one_segment_is_repeated_again_and_again(programs: BpfObject) -> None:
    arrive(programs)
    assert send(programs, START) == "native"
    arrive(programs, START + 5)
    assert send(programs, START + 5) == "native"
    assert [send(programs, START + 5) for _ in range(4)] == ["native", "native", "native", "sal"]
    assert send(programs, START + 10) == "native", "one more chance"
    assert [send(programs, START + 5), send(programs, START + 15)] == ["sal", "sal"]
    assert events(programs) == [FlowEvent.NATIVE_DOUBTED]


def test_follows_a_peer_that_sends_data_in_sal(programs: BpfObject) -> None:
    arrive(programs)
    for _ in range(2):
        assert send(programs, START, b"") == "native"
        arrive(programs, payload=b"data", framing="sal")
    arrive(programs, framing="sal")
    assert send(programs, START, b"") == "sal"
    arrive(programs, payload=b"data")
    assert send(programs, START, b"") == "native"


def test_begins_anew_after_a_move(programs: BpfObject) -> None:
    arrive(programs)
    assert send(programs, START) == "native"
    arrive(programs, START + 5)
    put_flow(programs, FLOW_NATIVE, path_number=1)
    assert [send(programs, START + 5), send(programs, START + 5)] == ["native", "sal"]
    arrive(programs, START + 5)
    assert events(programs) == [FlowEvent.NATIVE_DOUBTED], "what went the old way proves nothing"


def test_what_is_late_because_of_a_move_says_nothing_about_the_new_path(programs: BpfObject) -> None:
    arrive(programs)
    assert [send(programs, START + 5 * step) for step in range(4)] == ["native"] * 4
    put_flow(programs, FLOW_NATIVE, path_number=1)
    assert send(programs, START + 20) == "native"
    assert [send(programs, START + 5 * step) for step in range(4)] == ["sal"] * 4, "repeated so that it gets through"
    assert events(programs) == []
    assert send(programs, START + 25) == "native"
    arrive(programs, START + 25)
    assert send(programs, START + 25) == "native", "proved"
    assert events(programs) == []


def test_what_native_data_overtook_says_nothing_about_native_data(programs: BpfObject) -> None:
    assert [send(programs, START + 5 * step) for step in range(4)] == ["sal"] * 4
    arrive(programs, framing="sal")
    assert send(programs, START + 20) == "native"
    assert [send(programs, START + 5 * step) for step in range(4)] == ["sal"] * 4, "repeated as it was sent"
    assert send(programs, START + 25) == "native"
    assert events(programs) == []
    assert [send(programs, START + 20), send(programs, START + 25)] == ["sal", "sal"], "but these had been native"
    assert send(programs, START + 30) == "sal"
    assert events(programs) == [FlowEvent.NATIVE_DOUBTED]


def test_what_was_sent_in_sal_to_follow_the_peer_says_nothing_either(programs: BpfObject) -> None:
    for _ in range(2):
        arrive(programs, payload=b"data", framing="sal")
    assert [send(programs, START), send(programs, START + 5)] == ["sal", "sal"]
    arrive(programs, payload=b"data")
    assert send(programs, START + 10) == "native"
    assert [send(programs, START), send(programs, START + 5)] == ["sal", "sal"]
    assert send(programs, START + 15) == "native"
    assert events(programs) == []


def noted(programs: BpfObject) -> FlowState:
    return FlowState.parse(programs.map("flow_states").get(SLOT) or b"")


def retry_now(programs: BpfObject) -> None:
    """As if the time for another try had come."""
    programs.map("flow_states").update(SLOT, noted(programs)._replace(native_retry_s=1).emit())


def test_one_segment_tries_again_and_proves_the_path(programs: BpfObject) -> None:
    programs.map("flow_states").update(SLOT, fresh_state(START, NATIVE_DOUBTS))
    arrive(programs)
    assert send(programs, START) == "sal", "the time begins to run"
    retry_now(programs)
    assert send(programs, START) == "sal", "what is repeated must get through"
    assert send(programs, START + 5, b"") == "sal", "nobody acknowledges an acknowledgement"
    assert [send(programs, START + 5), send(programs, START + 10)] == ["native", "sal"]
    arrive(programs, START + 5, framing="sal")
    assert events(programs) == [], "all before it"
    arrive(programs, START + 10, framing="sal")
    assert events(programs) == [FlowEvent.NATIVE_PROVED]
    assert send(programs, START + 15) == "native"


def test_a_try_that_fails_is_repeated_after_twice_the_time(programs: BpfObject) -> None:
    programs.map("flow_states").update(SLOT, fresh_state(START, NATIVE_DOUBTS))
    arrive(programs)
    for number, wait_s in enumerate([4 << doublings for doublings in (0, 1, 2, 3, 4, 5, 6, 7, 7, 7)]):
        sequence = START + 10 * number
        began = time.clock_gettime(time.CLOCK_MONOTONIC)
        assert send(programs, sequence) == ("native" if number else "sal")
        ended = time.clock_gettime(time.CLOCK_MONOTONIC)
        assert began + wait_s - 2 < noted(programs).native_retry_s < ended + wait_s + 1
        assert send(programs, sequence + 5) == "sal"
        assert send(programs, sequence) == "sal", "it did not get through"
        arrive(programs, sequence + 10, framing="sal")
        retry_now(programs)
    assert events(programs) == []


def test_tries_again_beside_a_peer_that_sends_in_sal(programs: BpfObject) -> None:
    """Or two ends that follow each other would do so for ever. The one segment shows the peer that native data arrives."""
    for _ in range(3):
        arrive(programs, payload=b"data", framing="sal")
    assert send(programs, START) == "sal"
    retry_now(programs)
    assert [send(programs, START + 5), send(programs, START + 10)] == ["native", "sal"]
    arrive(programs, START + 15, b"data")
    assert send(programs, START + 15) == "native"


def test_tells_a_proof_when_asked(programs: BpfObject) -> None:
    put_flow(programs, FLOW_NATIVE | FLOW_TELL_PROOF)
    arrive(programs)
    send(programs, START)
    for _ in range(2):
        arrive(programs, START + 5)
    assert events(programs) == [FlowEvent.NATIVE_PROVED]


def test_accepts_but_does_not_send_without_the_flag(programs: BpfObject) -> None:
    put_flow(programs, 0)
    arrive(programs)
    assert send(programs, START) == "sal"


def test_a_superpacket_counts_as_what_it_is_on_the_wire(programs: BpfObject) -> None:
    arrive(programs)
    ports = VIRTUAL_PORT, OUR_FLOW & 0xFFFF
    packet = ETHERNET + tcp(VIRTUAL_LOCAL, REMOTE, ports, START, 0, bytes(2500), tcp_segment.ACK)
    programs.test_run("serval_out", packet, 0, 3)
    state = FlowState.parse(programs.map("flow_states").get(SLOT) or b"")
    assert state[:2] == (3, 3 * 40 + 2500)
