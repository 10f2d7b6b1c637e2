"""Do the service router's fast paths make of each packet what `forwarding` makes of it, or leave it alone?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serval_core.dataplane.forward_batch import BatchForwarder, Decision
from serval_core.dataplane.next_hops import Link
from serval_core.dataplane.router_programs import RouterPrograms
from serval_core.effects import SendPacket
from serval_core.forwarding_plan import WHOLE_SHARE, Plan, PlannedTarget, impossible_targets, plan
from serval_core.names import ServicePrefix, parse_address, parse_service
from serval_core.rules import Rule
from serval_core.sal import SalSettings
from serval_core.wire import ipv4, sal, udp
from serval_core.wire.checksum import checksum_of_sum
from serval_core.wire.sal import Control, SalPacket
from tests.serval_core.lone_host import LOCAL, OTHER, REMOTE, SERVICE, SERVICE_ID, LoneHost, Peer

CLIENT = parse_address("10.0.0.77")
FROM_ELSEWHERE = parse_address("192.0.2.1")
UNKNOWN = parse_service("4711").service_id
# The test run of a tc program takes a frame for one to the host when it is addressed to the loopback device.
ETHERNET = bytes(6) + bytes.fromhex("0200000000aa0800")
TC_UNSPEC, TC_REDIRECT = 0xFFFFFFFF, 7
OTHERS = tuple(range(0x0B000001, 0x0B000015))

Forwards = Callable[[bytes], bytes | None]
"""A fast path: a packet to what becomes of it, or to None when it leaves it alone."""


def router() -> LoneHost:
    host = LoneHost(SalSettings(forwarding=True))
    host.forward(REMOTE)
    return host


def planned(host: LoneHost) -> Plan:
    entry = host.table.entry(SERVICE)
    assert entry is not None
    return plan(entry, impossible_targets(host.paths), host.paths)


@pytest.fixture(scope="module")
def programs() -> Iterator[RouterPrograms]:
    loaded = RouterPrograms()
    loaded.set_own_addresses(frozenset({LOCAL, parse_address("127.0.0.1")}))
    yield loaded
    loaded.close()


@pytest.fixture(autouse=True)
def lease(programs: RouterPrograms) -> None:
    programs.extend_lease()


def put(programs: RouterPrograms, prefix: ServicePrefix, plans: Plan, link: Link | None = None) -> None:
    for target in plans:
        programs.set_link((target.interface_index, target.next_hop), link)
    programs.put(prefix, plans)


@pytest.fixture(params=["program", "receive loop"])
def forwards(request: pytest.FixtureRequest, programs: RouterPrograms) -> Forwards:
    plans = planned(router())
    if request.param == "receive loop":
        decision = Decision(SERVICE, plans, [None])
        forwarder = BatchForwarder(lambda service: decision if service == SERVICE_ID else None, {LOCAL})

        def in_buffer(packet: bytes) -> bytes | None:
            result = forwarder.forwarded(packet)
            if result is None:
                return None
            assert result[1:] == (REMOTE, plans[0].interface_index)
            return result[0]

        return in_buffer
    put(programs, SERVICE, plans)

    def in_kernel(packet: bytes) -> bytes | None:
        programs.extend_lease()
        verdict, result, _ = programs.test_run(ETHERNET + packet)
        if verdict == TC_UNSPEC:
            assert result == ETHERNET + packet
            return None
        assert verdict == TC_REDIRECT
        return result[14 : 14 + int.from_bytes(result[16:18], "big")]  # what follows pads the frame

    return in_kernel


def oracle(packet: bytes) -> bytes | None:
    """What the SAL itself makes of it."""
    host = router()
    host.receive(packet)
    if not host.sal.counters["packets_forwarded"]:
        return None
    (sent,) = (effect for effect in host.effects() if isinstance(effect, SendPacket))
    return sent.packet


def datagram(
    payload: bytes = b"payload", source_addresses: tuple[int, ...] = (), checksummed: bool = True, **ip: int
) -> bytes:
    body = udp.emit(udp.UdpDatagram(0, 0, payload, checksummed), CLIENT, LOCAL)
    services = SERVICE_ID, parse_service("55555").service_id
    packet = SalPacket(5, 0, sal.PROTOCOL_UDP, None, services, source_addresses, body)
    return ipv4.emit(CLIENT, LOCAL, sal.PROTOCOL_SAL, sal.emit(packet), **ip)


def syn(source_addresses: tuple[int, ...] = (), source: int = CLIENT, destination: int = LOCAL) -> bytes:
    return Peer(address=source).syn(source_addresses=source_addresses, destination=destination)


def control_packet(flags: int, dst_flow_id: int = 0, services: tuple[bytes, ...] = (SERVICE_ID,)) -> bytes:
    packet = SalPacket(5, dst_flow_id, 6, Control(flags, 7, 8, b"a nonce."), services, (), bytes(20))  # type: ignore[arg-type]
    return ipv4.emit(CLIENT, LOCAL, sal.PROTOCOL_SAL, sal.emit(packet))


def changed(packet: bytes, at: int, value: bytes) -> bytes:
    return packet[:at] + value + packet[at + len(value) :]


@dataclass(frozen=True)
class Row:
    description: str
    packet: bytes
    goes_on: bool


ROWS = [
    Row("SYN", syn(), True),
    Row("SYN that a router has sent on", syn((CLIENT, OTHER)), True),
    Row("SYN with 19 addresses", syn((CLIENT, *OTHERS[:18])), True),
    Row("SYN with 20 addresses", syn((CLIENT, *OTHERS[:19])), False),
    Row("SYN without transport", ipv4.emit(CLIENT, LOCAL, 144, ipv4.parse(syn()).payload[:68]), True),
    Row("datagram", datagram(), True),
    Row("datagram with odd length", datagram(b"odd"), True),
    Row("datagram without checksum", datagram(checksummed=False), True),
    Row("datagram that a router has sent on", datagram(source_addresses=(CLIENT, OTHER)), True),
    Row("datagram with 19 addresses", datagram(source_addresses=(CLIENT, *OTHERS[:18])), True),
    Row("datagram that just fits", datagram(bytes(1500 - 20 - 84 - 8 - 12)), True),
    Row("datagram that outgrows the wire", datagram(bytes(1500 - 20 - 84 - 8 - 11)), False),
    Row(
        "header fields survive", datagram(ttl=7, identification=0x1234, tos=0xB8, flags_fragment=0x4000), True
    ),
    Row("loop: we are listed", syn((CLIENT, LOCAL)), False),
    Row("loop: the target is listed", syn((CLIENT, REMOTE)), False),
    Row("the client itself is the target", syn(source=REMOTE), False),
    Row("from ourselves", syn(source=LOCAL), False),
    Row("from a loopback address", syn(source=parse_address("127.0.0.9")), False),
    Row("from a multicast address", syn(source=parse_address("224.0.0.1")), False),
    Row("handshake ACK", control_packet(sal.ACK, 9), False),
    Row("RST", control_packet(sal.RST), False),
    Row("SYN to a flow", control_packet(sal.SYN, 9), False),
    Row("SYN with two services", control_packet(sal.SYN, 0, (SERVICE_ID, UNKNOWN)), False),
    Row("SYN for another service", control_packet(sal.SYN, 0, (UNKNOWN,)), False),
    Row("data", ipv4.emit(CLIENT, LOCAL, 144, sal.data_header(5, 0) + bytes(40)), False),
    Row("fragment", datagram(flags_fragment=0x2000), False),
    Row("time to live 1", datagram(ttl=1), False),
    Row("time to live 2", datagram(ttl=2), True),
    Row("damaged IP checksum", changed(syn(), 10, b"\xde\xad"), False),
    Row("damaged SAL header", changed(syn(), 20 + 50, b"\xde\xad"), False),
    Row("damaged SAL header with SOURCE", changed(syn((CLIENT, OTHER)), 20 + 50, b"\xde\xad"), False),
    Row("damaged transport", changed(syn(), 20 + 68 + 8, b"\xde\xad"), True),
    Row("damaged transport behind SOURCE", changed(syn((CLIENT, OTHER)), 20 + 80 + 8, b"\xde\xad"), True),
    Row("cut short", syn()[:70], False),
    Row("TCP", ipv4.emit(CLIENT, LOCAL, 6, bytes(100)), False),
    Row("an IP header alone", syn()[:20], False),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.description)
def test_fast_path_is_right_or_leaves_it(row: Row, forwards: Forwards) -> None:
    result = forwards(row.packet)
    assert (result is not None) == row.goes_on
    if result is not None:
        expected = oracle(row.packet)
        assert expected is not None
        assert result.hex() == expected.hex()


BASES = [row.packet for row in ROWS if row.goes_on]


@given(
    packet=st.sampled_from(BASES),
    changes=st.lists(st.tuples(st.integers(0, 120), st.integers(0, 255)), max_size=3),
    mend=st.booleans(),
)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_fast_path_never_differs(
    forwards: Forwards, packet: bytes, changes: list[tuple[int, int]], mend: bool
) -> None:
    """Whatever a packet says, a fast path leaves it alone or sends the same bytes as the SAL."""
    damaged = bytearray(packet)
    for at, value in changes:
        damaged[at % len(damaged)] = value
    if mend:  # let the checksums be right, so that what lies behind them is reached
        ip_bytes = (damaged[0] & 15) * 4
        sal_bytes = damaged[min(28, len(damaged) - 1)] * 4
        for start, end, check in ((0, ip_bytes, 10), (20, 20 + sal_bytes, 30)):
            damaged[check : check + 2] = bytes(2)
            damaged[check : check + 2] = checksum_of_sum(int.from_bytes(damaged[start:end], "big")).to_bytes(
                2, "big"
            )
    result = forwards(bytes(damaged))
    if result is not None:
        expected = oracle(bytes(damaged))
        assert expected is not None
        assert result.hex() == expected.hex()


def test_program_leaves_what_does_not_come_to_us(programs: RouterPrograms) -> None:
    """It may be on its way through this host, or a broadcast."""
    put(programs, SERVICE, planned(router()))
    passing = syn(destination=FROM_ELSEWHERE)
    assert programs.test_run(ETHERNET + passing)[0] == TC_UNSPEC
    to_another_host = b"\2" + ETHERNET[1:]
    assert programs.test_run(to_another_host + syn())[0] == TC_UNSPEC
    assert programs.test_run(b"\xff" * 6 + ETHERNET[6:] + syn())[0] == TC_UNSPEC


def test_program_does_nothing_without_lease(programs: RouterPrograms) -> None:
    put(programs, SERVICE, planned(router()))
    assert programs.test_run(ETHERNET + syn())[0] == TC_REDIRECT
    programs.end_lease()
    assert programs.test_run(ETHERNET + syn())[0] == TC_UNSPEC
    programs.extend_lease()
    assert programs.test_run(ETHERNET + syn())[0] == TC_REDIRECT


def test_program_writes_the_addresses_it_knows(programs: RouterPrograms) -> None:
    """The next hop is reachable, so no neighbour is looked up; otherwise the kernel's neighbour code writes them."""
    link = Link(bytes.fromhex("0200000000bb"), bytes.fromhex("0200000000aa"))
    put(programs, SERVICE, planned(router()), link)
    for packet in (syn(), syn((CLIENT, OTHER))):
        verdict, frame, _ = programs.test_run(ETHERNET + packet)
        assert (verdict, frame[:14].hex()) == (TC_REDIRECT, "0200000000bb0200000000aa0800")
        assert frame[14:] == oracle(packet)


def test_longest_prefix_decides(programs: RouterPrograms) -> None:
    """An empty plan is an answer: a longer prefix without one hides a shorter one with one."""
    wide, narrow = ServicePrefix.of(SERVICE_ID, 16), ServicePrefix.of(SERVICE_ID, 24)
    programs.delete(SERVICE)
    assert programs.test_run(ETHERNET + syn())[0] == TC_UNSPEC
    put(programs, wide, planned(router()))
    assert programs.test_run(ETHERNET + syn())[0] == TC_REDIRECT
    put(programs, narrow, ())
    assert programs.test_run(ETHERNET + syn())[0] == TC_UNSPEC
    programs.delete(narrow)
    assert programs.test_run(ETHERNET + syn())[0] == TC_REDIRECT
    programs.delete(wide)
    put(programs, ServicePrefix.of(SERVICE_ID, 0), planned(router()))
    assert programs.test_run(ETHERNET + syn())[0] == TC_REDIRECT
    programs.delete(ServicePrefix.of(SERVICE_ID, 0))


def targets_of(weights: list[int]) -> Plan:
    host = LoneHost()
    for number, weight in enumerate(weights):
        host.table.add(Rule.forward(SERVICE, OTHERS[number], weight=weight))
    return planned(host)


def test_program_draws_by_weight_and_counts(programs: RouterPrograms) -> None:
    put(programs, SERVICE, targets_of([3, 1]))
    list(programs.take_counts())
    chosen = Counter(ipv4.parse(programs.test_run(ETHERNET + syn())[1][14:]).destination for _ in range(1000))
    assert 690 < chosen[OTHERS[0]] < 810  # 750, within 4.4 standard deviations
    counts = {count.address: count for count in programs.take_counts()}
    assert {address: count.packets for address, count in counts.items()} == chosen
    assert counts[OTHERS[0]].bytes == chosen[OTHERS[0]] * (len(syn()) - 20 - 68)
    assert not list(programs.take_counts())


def test_receive_loop_draws_by_weight_and_counts() -> None:
    decision = Decision(SERVICE, targets_of([3, 1]), [None, None])
    forwarder = BatchForwarder(lambda _: decision, frozenset())
    results = [forwarder.forwarded(syn()) for _ in range(1000)]
    chosen = Counter(result[1] for result in results if result is not None)
    assert 690 < chosen[OTHERS[0]] < 810
    size = len(syn()) - 20 - 68
    assert {(address, packets, packets * size) for address, packets in chosen.items()} == set(
        decision.take_counts()
    )
    assert decision.take_counts() == []


def test_receive_loop_asks_once_for_each_service() -> None:
    asked: list[bytes] = []

    def decide(service_id: bytes) -> None:
        asked.append(service_id)

    forwarder = BatchForwarder(decide, frozenset())
    for _ in range(2):
        assert forwarder.forwarded(syn()) is None
    assert asked == [SERVICE_ID]
    forwarder.forget()
    forwarder.forwarded(syn())
    assert asked == [SERVICE_ID, SERVICE_ID]


def test_plan_shares_follow_the_weights() -> None:
    assert [target.share_end for target in targets_of([1, 2, 1])] == [
        WHOLE_SHARE // 4,
        WHOLE_SHARE * 3 // 4,
        WHOLE_SHARE,
    ]


def no_plan(host: LoneHost) -> bool:
    return planned(host) == ()


def test_what_has_no_plan() -> None:
    host = router()
    assert planned(host) == (PlannedTarget(REMOTE, WHOLE_SHARE, 2, REMOTE, 1500),)
    host.table.add(Rule.forward(SERVICE, OTHER, priority=0))
    assert not no_plan(host), "a lower priority does not matter"
    host.table.mark_down(OTHER, host.now + 1)
    assert no_plan(host), "something is down"
    host.table.mark_up(OTHER)
    host.table.add(Rule.forward(SERVICE, LOCAL))
    assert no_plan(host), "one of those that compete is this host"
    host.table.remove_rule(SERVICE, Rule.forward(SERVICE, LOCAL).type, LOCAL)
    host.listen()
    assert no_plan(host), "there is a listener"
    host = router()
    for number in range(16):
        host.table.add(Rule.forward(SERVICE, OTHERS[number]))
    assert no_plan(host), "too many"
    host = router()
    host.paths.up = False
    assert no_plan(host), "no way there"
    host = LoneHost()
    host.table.add(Rule.drop(SERVICE))
    assert no_plan(host), "a DROP rule"
