"""Are our registrations the prototype's, byte for byte, and does our router do with its what its own router did?"""

from __future__ import annotations

from typing import NamedTuple

import pytest

from serval_core.controller.registration import Outgoing, Way
from serval_core.names import ServiceID, ServicePrefix, format_address, parse_address, parse_service
from serval_core.wire import ipv4, sal, udp
from serval_core.wire.control_messages import MessageType, parse_registration
from tests.serval_core.wire.captures import CAPTURES

from .memory import CLIENT_ID, ROUTER_ID, Host, Router, register

REGISTRATION_BYTES = 48
ROUTER_ADDRESS = parse_address("10.77.0.3")


class Recorded(NamedTuple):
    """A registration datagram that a prototype sent."""

    source: str
    destination: int
    payload: bytes
    services: tuple[ServiceID, ...]


def recorded(name: str) -> list[Recorded]:
    (capture,) = [each for each in CAPTURES if each.name == name]
    found = []
    for packet in capture.packets():
        ip = ipv4.parse(packet)
        parsed = sal.parse(ip.payload)
        if len(parsed.services) == 2:
            payload = udp.parse(parsed.transport, ip.source, ip.destination).payload
            found.append(Recorded(format_address(ip.source), ip.destination, payload, parsed.services))
    return found


def of_host(address: str) -> list[Recorded]:
    return [each for each in recorded("13_servd_c.pcap") if each.source == address]


@pytest.mark.parametrize("address", ["10.77.0.1", "10.77.0.2", "10.77.0.3"])
def test_our_host_says_what_the_prototype_said(address: str) -> None:
    """Told what happened to the prototype, our host role sends the same payloads to the same places.

    It began by broadcasting, then learned where its router is, then programs bound and closed services.
    """
    source, broadcast, router = parse_address(address), parse_address("10.77.0.255"), ROUTER_ADDRESS
    ways = iter([Way(-1, broadcast, source), Way(router, router, source)])
    known: set[ServicePrefix] = set()
    host = Host()
    host.role.set_ways([next(ways)], host.now)
    sent: list[Outgoing] = []
    for each in of_host(address):
        message = parse_registration(each.payload)
        if message.kind is MessageType.UNREGISTER:
            host.withdraw(message.prefix)
        elif message.prefix in known:
            host.role.set_ways([next(ways)], host.now)
        else:
            host.offer(message.prefix)
            known.add(message.prefix)
        sent += host.outgoing()
    assert sent == [Outgoing(each.payload, each.destination) for each in of_host(address)]


def test_our_router_does_what_the_prototypes_router_did() -> None:
    """While service 76568 is registered by 10.77.0.2 its SYNs go there, and afterwards it is unknown."""
    router = Router()
    for each in recorded("13_servd_c.pcap"):
        assert each.services == (ROUTER_ID, CLIENT_ID) or each.source == "10.77.0.3"
        router.receive(each.payload, parse_address(each.source), each.services[1])
        if parse_registration(each.payload).kind is MessageType.UNREGISTER:
            assert str(parse_registration(each.payload).prefix) not in {rule[0] for rule in router.rules()}
        if str(parse_registration(each.payload).prefix) == "76568":
            here = {rule for rule in router.rules() if rule[0] == "76568"}
            registered = parse_registration(each.payload).kind is MessageType.REGISTER
            assert here == ({("76568", "10.77.0.2", 1, 1)} if registered else set())
    assert router.rules() == set()
    assert router.role.registrations.counters["registered"] == 4
    assert router.role.registrations.counters["unregistered"] == 4
    # Control services of the prototypes themselves are no services; the router's own comes from its own service.
    assert router.role.counters["control_services"] == 4
    assert router.refusals() == {"wrong_source_service": 1}


def test_worked_vectors_of_registration_and_refresh() -> None:
    """VECTORS 8.1 and 8.2."""
    service = bytes.fromhex("00012b18") + bytes(28)
    first = bytes.fromhex("00000030 01000000 00000000 00000000") + service
    again = bytes.fromhex("00000030 02000000 01000000 0a000001") + service
    host = Host()
    host.offer()
    assert host.payloads() == [first]
    ((_, refresh),) = host.advance(1.5)
    assert refresh.payload == again
    router = Router()
    router.receive(first)
    router.receive(again)
    assert router.rules() == {("76568", "10.0.0.1", 1, 1)}
    assert router.role.registrations.counters["refreshed"] == 1


def test_what_the_prototype_marks_with_a_refresh_flag_but_never_told_us_is_registered() -> None:
    """SPEC 7.4: a refresh without a matching registration counts as one; old addresses may be stale."""
    router = Router()
    router.receive(register(refresh=True, old_address=parse_address("10.77.1.1")))
    assert router.rules() == {("76568", "10.0.0.1", 1, 1)}


def test_a_prefix_of_256_bits_is_written_as_zero_and_shorter_ones_as_they_are() -> None:
    host = Host()
    host.role.set_ways([Way(1, 2, 3)], host.now)
    for prefix in (parse_service("0xabcd:16"), ServicePrefix.of(ServiceID(b"\xab" * 32), 256)):
        host.offer(prefix)
        payload = host.payloads()[-1]
        assert payload[10] == prefix.bits & 0xFF
        assert len(payload) == REGISTRATION_BYTES
        assert parse_registration(payload).prefix == prefix
