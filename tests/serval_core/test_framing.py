"""Which framing is chosen, what is remembered of addresses, and how SYNs find the way that is open."""

from __future__ import annotations

import pytest

from serval_core.framing import (
    ADDRESSES_LIMIT,
    ENCAPSULATED_S,
    NATIVE_PAUSE_MAX_S,
    NATIVE_PAUSE_S,
    Framing,
    Framings,
    NativePath,
    ServiceFraming,
)
from serval_core.names import parse_service
from serval_core.wire import encapsulation, ipv4, udp
from serval_core.wire.encapsulation import ACTIVE_PORTS
from serval_core.wire.ipv4 import OuterPorts

PEER = 0x0A000002


def native(framings: Framings, now: float, address: int = PEER) -> NativePath:
    path = framings.native_path(61000, 62000, address, now)
    assert path is not None
    return path


def test_the_longest_prefix_decides() -> None:
    services = [
        ServiceFraming(parse_service("0xab:8"), Framing.SAL),
        ServiceFraming(parse_service("0xabcd:16"), Framing.UDP),
    ]
    framings = Framings(Framing.NATIVE, services)
    chosen = [framings.of_service(parse_service(text).service_id) for text in ("0xabcd01", "0xabce01", "0xac01")]
    assert chosen == [Framing.UDP, Framing.SAL, Framing.NATIVE]


@pytest.mark.parametrize("ports", [(0, 62000), (61000, 0), (0, 0)])
def test_native_needs_a_port_of_both_ends(ports: tuple[int, int]) -> None:
    assert Framings(Framing.AUTO).native_path(*ports, PEER, 0.0) is None


def test_a_doubt_lasts_longer_each_time_until_a_proof_ends_it() -> None:
    framings = Framings(Framing.AUTO)
    assert native(framings, 0.0) == (61000, 62000, True, False)
    now, pause_s = 0.0, NATIVE_PAUSE_S
    for _ in range(10):
        framings.native_doubted(PEER, now)
        framings.native_doubted(PEER, now)  # of another flow that began at the same time
        assert not native(framings, now + pause_s - 0.1).sending
        assert native(framings, now + pause_s) == (61000, 62000, True, True), "tried again, and its outcome is news"
        now += pause_s
        pause_s = min(2 * pause_s, NATIVE_PAUSE_MAX_S)
    assert native(framings, now, PEER + 1).sending
    framings.native_proved(PEER)
    assert native(framings, now) == (61000, 62000, True, False)
    framings.native_doubted(PEER, now)
    assert native(framings, now + NATIVE_PAUSE_S).sending


def test_what_is_remembered_is_bounded() -> None:
    framings = Framings(Framing.AUTO)
    framings.can_encapsulate = True
    for address in range(1, ADDRESSES_LIMIT + 2):
        framings.native_doubted(address, 0.0)
        framings.answered(address, True, 0.0)
    assert native(framings, 0.0, 1).sending
    assert not native(framings, 0.0, 2).sending
    assert framings.ways_of_syn(Framing.AUTO, 1, False, 0.0) == (None,)
    assert framings.ways_of_syn(Framing.AUTO, 2, False, 0.0) == (ACTIVE_PORTS,)


@pytest.mark.parametrize(
    ("wanted", "first", "repeated"),
    [
        (Framing.AUTO, (None,), (None, ACTIVE_PORTS)),
        (Framing.SAL, (None,), (None,)),
        (Framing.NATIVE, (None,), (None,)),
        (Framing.UDP, (ACTIVE_PORTS,), (ACTIVE_PORTS,)),
    ],
)
def test_a_syn_goes_the_ways_that_are_wanted(
    wanted: Framing, first: tuple[OuterPorts | None, ...], repeated: tuple[OuterPorts | None, ...]
) -> None:
    framings = Framings(wanted)
    assert framings.ways_of_syn(wanted, PEER, True, 0.0) == (None,), "without sockets nothing comes back"
    framings.can_encapsulate = True
    assert framings.ways_of_syn(wanted, PEER, False, 0.0) == first
    assert framings.ways_of_syn(wanted, PEER, True, 0.0) == repeated


def test_a_syn_begins_with_the_way_that_was_answered_for_a_while() -> None:
    framings = Framings(Framing.AUTO)
    framings.can_encapsulate = True
    framings.answered(PEER, True, 0.0)
    assert framings.ways_of_syn(Framing.AUTO, PEER, False, ENCAPSULATED_S - 1) == (ACTIVE_PORTS,)
    assert framings.ways_of_syn(Framing.AUTO, PEER, False, ENCAPSULATED_S) == (None,)
    framings.answered(PEER, False, 1.0)
    assert framings.ways_of_syn(Framing.AUTO, PEER, False, 2.0) == (None,)


def test_a_packet_inside_udp_is_what_spec_8_says() -> None:
    whole = encapsulation.emit(1, 2, OuterPorts(54324, 54325), b"what the SAL says")
    outer = ipv4.parse(whole)
    datagram = udp.parse(outer.payload, 1, 2)
    assert (outer.protocol, datagram.source_port, datagram.destination_port) == (17, 54324, 54325)
    assert datagram.payload == encapsulation.payload_of(whole) == b"what the SAL says"
    plain = encapsulation.emit(1, 2, None, b"what the SAL says")
    assert ipv4.parse(plain).protocol == 144
    assert encapsulation.payload_of(plain) == b"what the SAL says"


def test_an_answer_goes_back_the_way_that_it_was_asked() -> None:
    asked = ipv4.IPv4Packet(1, 2, 144, 64, 0, 0, 0, b"", OuterPorts(54325, 4000))
    answer = ipv4.parse(encapsulation.answer(asked, b"no"))
    assert (answer.source, answer.destination) == (2, 1)
    assert udp.parse(answer.payload, 2, 1)[:2] == (54325, 4000)
