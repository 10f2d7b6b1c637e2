"""What does a host remember of closed flows, for how long, and at what price? (SPEC 3.8)"""

from __future__ import annotations

import tracemalloc

import pytest

from serval_core.effects import SendPacket
from serval_core.flow_table import FlowTable
from serval_core.names import FlowID
from serval_core.sal import SalSettings
from serval_core.wire.sal import ACK, FIN, RST
from tests.serval_core.lone_host import LoneHost, Peer, Sent, connected_host


def closed_host(settings: SalSettings | None = None) -> tuple[LoneHost, Peer, Sent]:
    """A host whose only flow has just entered TIMEWAIT, and the acknowledgement that it sent last."""
    host, peer, flow_id = connected_host(settings)
    host.sal.fin_acknowledged(flow_id, host.now)
    host.sal.release(flow_id, host.now)
    host.effects()
    host.receive(peer.control(FIN, ackno=peer.ackno + 1))
    acknowledgement = host.only_packet()
    assert host.sal.flows() == []
    return host, peer, acknowledgement


def test_a_repeated_fin_gets_the_same_acknowledgement() -> None:
    host, peer, acknowledgement = closed_host()
    host.advance(59.0)
    for _ in range(3):
        host.receive(peer.control(FIN, ackno=peer.ackno + 1))
        again = host.only_packet()
        assert again == acknowledgement
    assert again.control.flags == ACK
    assert again.control.ackno == peer.verno + 1


def test_nothing_else_is_answered() -> None:
    host, peer, _ = closed_host()
    host.receive(peer.control(FIN, nonce=b"guessing"))
    assert host.dropped("wrong_nonce") == 1
    host.receive(peer.control(ACK))
    host.receive(peer.control(RST | ACK))
    host.receive(peer.data())
    host.receive(peer.handshake_ack())
    assert host.dropped("time_wait") == 4
    assert host.effects() == []


def test_after_a_minute_the_flow_is_unknown() -> None:
    host, peer, _ = closed_host()
    host.advance(61.5)
    host.receive(peer.control(FIN))
    assert host.effects() == []
    assert host.dropped("unknown_flow") == 1
    assert host.sal.next_timeout() is None


def test_the_oldest_give_way() -> None:
    table = FlowTable(60.0, 3)
    record = (b"nonce---", b"packet", 1, 2)
    for number in range(5):
        table.keep_in_time_wait(FlowID(number), record, 1000.0 + number)  # type: ignore[arg-type]
    assert set(table.time_wait) == {2, 3, 4}
    table.expire(1062.0)
    assert set(table.time_wait) == {3, 4}
    table.expire(1100.0)
    assert not table.time_wait
    assert table.next_expiry() is None


def test_timewait_can_be_switched_off() -> None:
    host, peer, _ = closed_host(SalSettings(time_wait_limit=0))
    assert host.sal.next_timeout() is None
    host.receive(peer.control(FIN))
    assert host.dropped("unknown_flow") == 1


def test_flow_ids_in_timewait_are_not_given_out() -> None:
    table = FlowTable(60.0, 10)
    table.keep_in_time_wait(FlowID(0x00010001), (b"", b"", 0, 0), 0.0)  # type: ignore[arg-type]
    numbers = iter((0x00010001, 0, 0xFFFF0001, 0x00000001, 0x00010000, 0x00010002))
    assert table.new_flow_id(lambda bits: next(numbers)) == 0x00010002


def test_many_expiries_do_not_mean_many_wake_ups() -> None:
    host = LoneHost()
    flows = host.sal._core.flows
    for number in range(3000):
        flows.keep_in_time_wait(FlowID(number), (b"", b"", 0, 0), host.now + number / 3000)  # type: ignore[arg-type]
    wake_ups = 0
    while (due := host.sal.next_timeout()) is not None:
        host.sal.handle_timeouts(due)
        wake_ups += 1
    assert wake_ups <= 2


def test_whatever_is_due_first_wakes_the_stack() -> None:
    host, _, _ = closed_host()
    expiry = host.sal.next_timeout()
    assert expiry == host.now + 61.0
    host.connect()
    assert host.sal.next_timeout() == pytest.approx(host.now + 0.2)
    host.sal._core.timers.run(host.now + 10.0)
    timer = host.sal._core.timers.start(host.now + 100.0, lambda flow, now: None, host.sal._core)  # type: ignore[arg-type]
    assert host.sal.next_timeout() == expiry
    host.sal._core.timers.cancel(timer)


def test_a_closed_flow_costs_less_than_half_a_kilobyte() -> None:
    """At 3000 connections per second, 65536 of them are kept: about 30 MB."""
    host = LoneHost()
    host.listen()

    def close_one(number: int) -> None:
        peer = Peer(flow_id=number, nonce=number.to_bytes(8, "big"))
        host.receive(peer.syn())
        syn_ack = next(each for each in host.sal.take_effects() if isinstance(each, SendPacket))
        peer.host_flow_id = int.from_bytes(syn_ack.packet[20:24], "big")
        peer.host_verno = int.from_bytes(syn_ack.packet[36:40], "big")
        host.receive(peer.handshake_ack(bare=True))
        flow_id = FlowID(peer.host_flow_id)
        host.sal.release(flow_id, host.now)
        host.sal.fin_acknowledged(flow_id, host.now)
        host.receive(peer.control(FIN, ackno=peer.ackno + 1))
        host.sal.take_effects()

    for number in range(1, 200):
        close_one(number)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for number in range(1000, 3000):
        close_one(number)
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert len(host.sal._core.flows.time_wait) == 2199
    assert grown / 2000 < 512
