"""Does every way of closing end well, and only when it should? (SPEC 3.8, 4.5)"""

from __future__ import annotations

from collections.abc import Callable
from errno import ECONNABORTED, ETIMEDOUT

import pytest

from serval_core.effects import (
    CloseTransport,
    EndOfStream,
    FlowEnded,
    InjectSegment,
    ResetTransport,
    SendPacket,
)
from serval_core.names import FlowID
from serval_core.sal import SalSettings
from serval_core.sent_resets import REMEMBERED_S
from serval_core.wire.sal import ACK, FIN, RST
from tests.serval_core.lone_host import (
    OUR_OPTIONS,
    LoneHost,
    Peer,
    Sent,
    accepted_host,
    connected_host,
)

Connected = tuple[LoneHost, Peer, FlowID]
both_roles = pytest.mark.parametrize("connect", [connected_host, accepted_host])
Connect = Callable[..., Connected]


def kinds(host: LoneHost) -> list[type]:
    return [type(effect) for effect in host.effects()]


def assert_ended(host: LoneHost, flow_id: FlowID, errno: int = 0) -> None:
    assert host.news(FlowEnded) == [FlowEnded(flow_id, errno)]
    assert host.sal.flows() == []


def own_numbers(peer: Peer, sent: Sent) -> tuple[int, int]:
    """Version number and acknowledgement relative to those after the handshake."""
    return sent.control.verno - peer.ackno & 0xFFFFFFFF, sent.control.ackno - peer.verno & 0xFFFFFFFF


def finwait1(connect: Connect = connected_host, settings: SalSettings | None = None) -> Connected:
    host, peer, flow_id = connect(settings)
    host.sal.fin_acknowledged(flow_id, host.now)
    host.effects()
    return host, peer, flow_id


def finwait2(connect: Connect = connected_host, settings: SalSettings | None = None) -> Connected:
    host, peer, flow_id = finwait1(connect, settings)
    host.receive(peer.control(ACK, ackno=peer.ackno + 1))
    assert host.effects() == []
    return host, peer, flow_id


def closewait(connect: Connect = connected_host, settings: SalSettings | None = None) -> Connected:
    host, peer, flow_id = connect(settings)
    host.receive(peer.control(FIN))
    host.effects()
    return host, peer, flow_id


def lastack(connect: Connect = connected_host, settings: SalSettings | None = None) -> Connected:
    host, peer, flow_id = closewait(connect, settings)
    host.sal.fin_acknowledged(flow_id, host.now)
    host.effects()
    return host, peer, flow_id


def closing(connect: Connect = connected_host, settings: SalSettings | None = None) -> Connected:
    host, peer, flow_id = finwait1(connect, settings)
    host.receive(peer.control(FIN))
    host.effects()
    return host, peer, flow_id


@both_roles
def test_the_sal_fin_follows_the_acknowledged_tcp_fin(connect: Connect) -> None:
    host, peer, flow_id = connect()
    assert host.advance(100.0) == []
    host.sal.fin_acknowledged(flow_id, host.now)
    fin = host.only_packet()
    assert fin.control.flags == FIN  # without ACK, as the prototype has it
    assert own_numbers(peer, fin) == (0, 0)
    assert fin.sal.transport == b""
    assert fin.sal.services == ()
    assert host.states() == ["FINWAIT1"]


@both_roles
def test_a_fin_is_acknowledged_at_once_and_ends_the_stream(connect: Connect) -> None:
    host, peer, flow_id = connect()
    host.receive(peer.control(FIN))
    send, end = host.effects()
    assert isinstance(send, SendPacket)
    assert end == EndOfStream(flow_id)
    assert host.states() == ["CLOSEWAIT"]


def test_the_acknowledgement_of_a_fin_is_a_pure_ack() -> None:
    host, peer, _ = connected_host()
    host.receive(peer.control(FIN))
    ack = host.only_packet()
    assert ack.control.flags == ACK
    assert own_numbers(peer, ack) == (0, 1)
    assert ack.control.nonce == peer.host_nonce
    assert ack.sal.transport == b""
    assert ack.sal.services == ()


@both_roles
def test_closing_first_ends_in_timewait(connect: Connect) -> None:
    host, peer, flow_id = finwait2(connect)
    assert host.states() == ["FINWAIT2"]
    host.sal.release(flow_id, host.now)
    host.receive(peer.control(FIN, ackno=peer.ackno + 1))
    assert kinds(host) == [SendPacket, EndOfStream, CloseTransport, FlowEnded]
    assert_ended(host, flow_id)
    assert len(host.sal._core.flows.time_wait) == 1
    host.advance(62.0)
    assert len(host.sal._core.flows.time_wait) == 0
    assert host.sal.next_timeout() is None


@both_roles
def test_closing_second_ends_at_once(connect: Connect) -> None:
    host, peer, flow_id = closewait(connect)
    host.sal.release(flow_id, host.now)
    host.sal.fin_acknowledged(flow_id, host.now)
    fin = host.only_packet()
    assert own_numbers(peer, fin) == (0, 1)
    assert host.states() == ["LASTACK"]
    host.receive(peer.control(ACK, verno=peer.verno + 1, ackno=peer.ackno + 1))
    assert kinds(host) == [CloseTransport, FlowEnded]
    assert_ended(host, flow_id)
    assert host.sal.next_timeout() is None


def test_closing_at_the_same_time_ends_in_timewait() -> None:
    host, peer, flow_id = closing()
    assert host.states() == ["CLOSING"]
    host.sal.release(flow_id, host.now)
    host.receive(peer.control(ACK, verno=peer.verno + 1, ackno=peer.ackno + 1))
    assert kinds(host) == [CloseTransport, FlowEnded]
    assert_ended(host, flow_id)
    assert len(host.sal._core.flows.time_wait) == 1


@pytest.mark.parametrize("flags", [FIN, FIN | ACK])
def test_a_fin_that_acknowledges_ours_needs_no_ack_before(flags: int) -> None:
    """The ACK of our FIN was lost and is never repeated: the acknowledgement in the peer's FIN counts."""
    host, peer, flow_id = finwait1()
    host.sal.release(flow_id, host.now)
    host.receive(peer.control(flags, ackno=peer.ackno + 1))
    assert kinds(host) == [SendPacket, EndOfStream, CloseTransport, FlowEnded]
    assert_ended(host, flow_id)


def test_a_fin_with_an_outdated_acknowledgement_is_a_fin_all_the_same() -> None:
    """It was sent before the ACK that overtook it; a prototype repeats it with the same bytes for ever."""
    host, peer, _ = finwait2()
    host.receive(peer.control(FIN, ackno=peer.ackno))
    assert host.states() == ["TIMEWAIT"]


@pytest.mark.parametrize("ackno_offset", [0, 2, 100, -1])
def test_only_an_ack_of_the_fin_ends_finwait1(ackno_offset: int) -> None:
    """A prototype would advance on any SAL ACK (SPEC 11.1, quirk 15)."""
    host, peer, _ = finwait1()
    host.receive(peer.control(ACK, ackno=peer.ackno + ackno_offset & 0xFFFFFFFF))
    assert host.states() == ["FINWAIT1"]
    assert host.dropped("wrong_ackno") == (ackno_offset != 0)


def test_half_close_lasts_as_long_as_the_application_wants() -> None:
    host, peer, flow_id = finwait2()
    assert host.advance(10_000.0) == []
    assert host.states() == ["FINWAIT2"]
    host.receive(peer.data(b"still talking"))
    assert len(host.news(InjectSegment)) == 1
    host.sal.release(flow_id, host.now)
    host.advance(59.9)
    assert host.states() == ["FINWAIT2"]
    host.advance(0.2)
    assert_ended(host, flow_id)
    assert host.news(CloseTransport) == [CloseTransport(flow_id)]


def test_a_flow_released_in_finwait1_stays_60_s_in_finwait2() -> None:
    host, peer, flow_id = finwait1()
    host.sal.release(flow_id, host.now)
    host.receive(peer.control(ACK, ackno=peer.ackno + 1))
    host.advance(59.9)
    assert host.states() == ["FINWAIT2"]
    host.advance(0.2)
    assert_ended(host, flow_id)


@pytest.mark.parametrize("reach", [finwait2, lastack, closing])
def test_the_transport_stays_until_the_application_has_read_everything(
    reach: Callable[[], Connected],
) -> None:
    host, peer, flow_id = reach()
    if reach is finwait2:
        host.receive(peer.control(FIN, ackno=peer.ackno + 1))
    else:
        host.receive(peer.control(ACK, verno=peer.verno + 1, ackno=peer.ackno + 1))
    assert host.states() == ["CLOSED" if reach is lastack else "TIMEWAIT"]
    host.advance(1000.0)
    assert host.news(CloseTransport) == []
    host.receive(peer.control(FIN))  # a late copy
    assert host.only_packet().control.flags == ACK
    host.sal.release(flow_id, host.now)
    assert kinds(host) == [CloseTransport, FlowEnded]
    assert_ended(host, flow_id)


@pytest.mark.parametrize("reach", [finwait1, lastack, closing])
def test_an_unacknowledged_fin_is_repeated_and_then_given_up(reach: Callable[..., Connected]) -> None:
    host, _peer, flow_id = reach(settings=SalSettings(control_retransmissions=4))
    sent = host.advance(1000.0)
    assert [at for at, _ in sent] == pytest.approx([0.2, 0.6, 1.4, 3.0])
    assert {packet.control.flags for _, packet in sent} == {FIN}
    assert len({packet.control.verno for _, packet in sent}) == 1
    assert host.news(ResetTransport) == [ResetTransport(flow_id, ETIMEDOUT)]
    assert_ended(host, flow_id, ETIMEDOUT)
    assert host.sal.next_timeout() is None


def test_a_released_flow_is_given_up_sooner() -> None:
    settings = SalSettings(control_retransmissions=15, released_retransmissions=2)
    host, _, flow_id = finwait1(settings=settings)
    host.sal.release(flow_id, host.now)
    assert len(host.advance(1000.0)) == 2
    assert_ended(host, flow_id, ETIMEDOUT)


def test_a_repeated_fin_acknowledges_what_has_come_meanwhile() -> None:
    host, peer, _ = finwait1()
    host.receive(peer.control(FIN))
    host.effects()
    (_, fin), *_ = host.advance(0.3)
    assert own_numbers(peer, fin) == (0, 1)


def test_the_fin_timeout_follows_the_measured_round_trip() -> None:
    host, peer = LoneHost(), Peer(options=OUR_OPTIONS)
    host.listen()
    host.receive(peer.syn())
    peer.learn(host.only_packet())
    host.now += 0.1
    host.receive(peer.handshake_ack())
    host.sal.fin_acknowledged(FlowID(peer.host_flow_id), host.now)
    host.effects()
    assert [at for at, _ in host.advance(1.0)] == pytest.approx([0.3, 0.9])


def test_without_a_measured_round_trip_the_fin_waits_a_second() -> None:
    host, peer = LoneHost(), Peer(options=OUR_OPTIONS)
    host.listen()
    host.receive(peer.syn())
    peer.learn(host.only_packet())
    host.receive(peer.data())
    host.sal.fin_acknowledged(FlowID(peer.host_flow_id), host.now)
    host.effects()
    assert [at for at, _ in host.advance(3.5)] == pytest.approx([1.0, 3.0])


def test_the_answer_to_a_repeated_fin_measures_nothing() -> None:
    host, peer, _ = finwait1()
    measured = host.sal.flows()[0]["round_trip_s"]
    host.advance(0.3)
    host.receive(peer.control(ACK, ackno=peer.ackno + 1))
    assert host.states() == ["FINWAIT2"]
    assert host.sal.flows()[0]["round_trip_s"] == measured


def test_the_fin_does_not_inherit_the_backoff_of_the_syn() -> None:
    host, peer = LoneHost(), Peer(options=OUR_OPTIONS)
    host.forward(peer.address)
    flow_id = host.connect()
    peer.learn(host.advance(2.0)[0][1])
    host.receive(peer.syn_ack())
    host.sal.fin_acknowledged(flow_id, host.now)
    host.effects()
    assert [at for at, _ in host.advance(3.5)] == pytest.approx([1.0, 3.0])


@pytest.mark.parametrize("reach", [connected_host, closewait])
def test_a_released_flow_whose_data_is_never_acknowledged_ends(reach: Callable[..., Connected]) -> None:
    host, _, flow_id = reach(settings=SalSettings(release_timeout_s=100.0))
    host.sal.release(flow_id, host.now)
    host.sal.release(flow_id, host.now + 50.0)
    assert host.advance(99.0) == []
    (_, reset), *copies = host.advance(2.0)
    assert reset.control.flags == RST | ACK
    assert {copy for _, copy in copies} == {reset}
    assert host.news(ResetTransport) == [ResetTransport(flow_id, ETIMEDOUT)]
    assert_ended(host, flow_id, ETIMEDOUT)


def test_release_before_the_last_acknowledgement_closes_in_order() -> None:
    host, peer, flow_id = connected_host()
    host.sal.release(flow_id, host.now)
    host.sal.fin_acknowledged(flow_id, host.now)
    assert host.only_packet().control.flags == FIN
    host.receive(peer.control(FIN, ackno=peer.ackno + 1))
    assert_ended(host, flow_id)


@pytest.mark.parametrize("reach", [finwait1, closing, closewait, lastack])
def test_a_fin_acknowledgement_reported_twice_changes_nothing(reach: Callable[..., Connected]) -> None:
    host, _, flow_id = reach()
    host.sal.fin_acknowledged(flow_id, host.now)
    host.effects()
    before = host.states()
    host.sal.fin_acknowledged(flow_id, host.now)
    assert host.effects() == []
    assert host.states() == before


@pytest.mark.parametrize(
    "reach", [connected_host, accepted_host, finwait1, finwait2, closewait, closing, lastack]
)
def test_abort_resets_the_peer(reach: Callable[..., Connected]) -> None:
    host, _peer, flow_id = reach()
    host.sal.abort(flow_id, host.now)
    reset, close, ended = host.effects()
    assert isinstance(reset, SendPacket)
    assert close == CloseTransport(flow_id)
    assert ended == FlowEnded(flow_id, ECONNABORTED)
    assert host.sal.flows() == []
    host.advance(REMEMBERED_S)
    assert host.sal.next_timeout() is None


def test_an_active_reset_is_as_the_prototype_sends_it() -> None:
    host, peer, flow_id = closewait()
    host.sal.transport_reset(flow_id, host.now)
    reset = host.only_packet()
    assert reset.control.flags == RST | ACK
    assert own_numbers(peer, reset) == (0, 1)
    assert reset.control.nonce == peer.host_nonce
    assert (reset.sal.dst_flow_id, reset.sal.transport) == (peer.flow_id, b"")


def test_a_failed_transport_resets_the_peer_and_says_why() -> None:
    host, _, flow_id = connected_host()
    host.sal.transport_failed(flow_id, ETIMEDOUT, host.now)
    assert kinds(host) == [SendPacket, CloseTransport, FlowEnded]
    assert_ended(host, flow_id, ETIMEDOUT)


def test_abort_after_both_fins_is_a_release() -> None:
    host, peer, flow_id = finwait2()
    host.receive(peer.control(FIN, ackno=peer.ackno + 1))
    host.effects()
    host.sal.abort(flow_id, host.now)
    assert kinds(host) == [CloseTransport, FlowEnded]
    assert_ended(host, flow_id)


@pytest.mark.parametrize("reach", [closewait, closing, lastack])
def test_a_repeated_fin_is_acknowledged_again(reach: Callable[..., Connected]) -> None:
    host, peer, _ = reach()
    before = host.states()
    for _ in range(3):
        host.receive(peer.control(FIN))
        ack = host.only_packet()
        assert ack.control.flags == ACK
        assert own_numbers(peer, ack)[1] == 1
    assert host.states() == before
    assert host.dropped("repeated_control") == 3
    assert len(host.news(EndOfStream)) == 1
