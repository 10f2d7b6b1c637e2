"""What does one end do, packet by packet, when it moves or its peer does, and who is believed?"""

from __future__ import annotations

from errno import ETIMEDOUT

import pytest

from serval_core.effects import ExpectPeer, FlowEnded, Happened, MovePath
from serval_core.errors import OurMistake
from serval_core.names import FlowID, parse_address
from serval_core.paths import Path
from serval_core.sal import SalSettings
from serval_core.wire.sal import ACK, FIN, RST, RSYN
from tests.serval_core.lone_host import (
    LOCAL,
    OTHER,
    OUR_OPTIONS,
    REMOTE,
    LoneHost,
    Peer,
    Sent,
    accepted_host,
    connected_host,
    half_open_host,
    requesting_host,
)

ELSEWHERE = parse_address("10.9.0.1")
NEW_PATH = Path(3, "wire1", ELSEWHERE, REMOTE, 1400)
NEWER_PATH = Path(4, "wire2", parse_address("10.8.0.1"), REMOTE, 1500)
IMPATIENT = SalSettings(migration_retransmissions=2, return_retransmissions=1, no_path_wait_s=10.0)
OLD_PLACE, NEW_PLACE = REMOTE, OTHER


def moved_peer(peer: Peer) -> Peer:
    """The same peer at its new address."""
    peer.address = NEW_PLACE
    return peer


def kinds(sent: list[Sent]) -> list[tuple[int, int, int]]:
    """Flags, source and destination."""
    return [(each.control.flags, each.source, each.destination) for each in sent]


def moving_host(settings: SalSettings | None = None) -> tuple[LoneHost, Peer, FlowID, Sent]:
    """A host whose RSYN is out."""
    host, peer, flow_id = accepted_host(settings)
    host.sal.migrate(flow_id, NEW_PATH, host.now)
    return host, peer, flow_id, host.only_packet()


def rsyn_ack(peer: Peer, rsyn: Sent, flags: int = RSYN | ACK, nonce: bytes | None = None) -> bytes:
    return peer.control(flags, ackno=rsyn.control.verno + 1 & 0xFFFFFFFF, nonce=nonce)


def migration(host: LoneHost) -> object:
    (flow,) = host.sal.flows()
    return flow["migration"]


# Our own move.


def test_the_new_path_is_taken_after_the_peer_has_answered_there() -> None:
    host, peer, _, rsyn = moving_host()
    assert kinds([rsyn]) == [(RSYN, ELSEWHERE, REMOTE)]
    assert rsyn.interface_index == NEW_PATH.interface_index
    assert migration(host) == "SENT"
    assert host.news(MovePath) == []
    host.receive(rsyn_ack(peer, rsyn))
    assert kinds(host.packets()) == [(ACK, ELSEWHERE, REMOTE)]
    (move,) = host.news(MovePath)
    assert move == MovePath(move.flow_id, ELSEWHERE, REMOTE, 3, 1400)
    assert host.log.index(move) + 1 < len(host.log)  # before the ACK
    (flow,) = host.sal.flows()
    assert (flow["migration"], flow["migrations"], flow["local_address"]) == ("INITIAL", 1, "10.9.0.1")
    (news,) = host.news(Happened)
    assert (news.kind, news.fields["end"], news.fields["address"]) == ("flow_migrated", "local", "10.9.0.1")


def test_an_rsyn_is_repeated_with_the_same_number() -> None:
    host, _, _, rsyn = moving_host()
    sent = host.advance(4.0)
    assert [at for at, _ in sent] == [0.2, 0.6, 1.4, 3.0]
    assert all(packet.packet == rsyn.packet for _, packet in sent)


def test_a_bare_ack_is_no_answer() -> None:
    """A prototype that has lost its RSYN-ACK sends one (SPEC 11.1, quirk 17)."""
    host, peer, _, rsyn = moving_host()
    host.receive(rsyn_ack(peer, rsyn, ACK))
    assert migration(host) == "SENT"
    assert host.news(MovePath) == []
    host.receive(rsyn_ack(peer, rsyn))
    assert migration(host) == "INITIAL"


def test_every_repeated_rsyn_ack_is_confirmed() -> None:
    host, peer, _, rsyn = moving_host()
    for _ in range(3):
        host.receive(rsyn_ack(peer, rsyn))
        assert kinds(host.packets()) == [(ACK, ELSEWHERE, REMOTE)]
    assert len(host.news(MovePath)) == 1


def test_a_newer_wish_replaces_an_older_one() -> None:
    host, peer, flow_id, old = moving_host()
    host.sal.migrate(flow_id, NEWER_PATH, host.now)
    new = host.only_packet()
    assert new.control.verno == old.control.verno + 1
    host.receive(rsyn_ack(peer, old))
    assert host.packets() == []
    assert host.dropped("old_migration") == 1
    host.receive(rsyn_ack(peer, new))
    assert host.news(MovePath)[0].local_address == NEWER_PATH.source_address


def test_a_move_that_fails_is_taken_back() -> None:
    host, peer, _, rsyn = moving_host(IMPATIENT)
    sent = host.advance(1.5)
    back = sent[-1][1]
    assert kinds([back]) == [(RSYN, LOCAL, REMOTE)]
    assert back.control.verno == rsyn.control.verno + 1
    assert migration(host) == "RETURNING"
    host.receive(rsyn_ack(peer, back))
    assert kinds(host.packets()) == [(ACK, LOCAL, REMOTE)]
    assert migration(host) == "INITIAL"
    assert host.states() == ["CONNECTED"]
    (news,) = host.news(Happened)
    assert (news.kind, news.fields["reason"]) == ("migration_failed", "the peer does not answer on the new path")


def test_without_any_path_that_works_the_flow_waits_and_ends() -> None:
    host, _, _, _ = moving_host(IMPATIENT)
    host.advance(7.0)
    assert migration(host) == "STRANDED"
    host.advance(10.0)
    assert host.news(FlowEnded)[0].errno == ETIMEDOUT
    assert host.sal.flows() == []


def test_a_flow_without_a_path_resumes_when_one_appears() -> None:
    host, peer, flow_id = accepted_host()
    host.paths.up = False
    host.sal.path_lost(flow_id, host.now)
    assert migration(host) == "STRANDED"
    host.sal.paths_changed(host.now)
    assert host.packets() == []
    host.paths.up = True
    host.sal.paths_changed(host.now)
    rsyn = host.only_packet()
    host.receive(rsyn_ack(peer, rsyn))
    assert migration(host) == "INITIAL"


def test_the_last_path_is_tried_now_and_then() -> None:
    """It may work again without anything having changed here."""
    host, peer, _, _ = moving_host(IMPATIENT)
    host.advance(7.0)
    assert migration(host) == "STRANDED"
    _, rsyn = host.advance(IMPATIENT.migration_timeout_max_s)[-1]
    assert kinds([rsyn]) == [(RSYN, LOCAL, REMOTE)]
    host.receive(rsyn_ack(peer, rsyn))
    assert migration(host) == "INITIAL"


def test_only_open_flows_migrate() -> None:
    host, _, flow_id = requesting_host()
    with pytest.raises(OurMistake, match="still being opened"):
        host.sal.migrate(flow_id, NEW_PATH, host.now)
    with pytest.raises(OurMistake, match="there is no flow 5"):
        host.sal.migrate(FlowID(5), NEW_PATH, host.now)
    assert host.packets() == []


# Closing meanwhile.


def test_a_fin_goes_with_the_rsyn_that_is_out() -> None:
    host, peer, flow_id, rsyn = moving_host()
    host.sal.fin_acknowledged(flow_id, host.now)
    both = host.only_packet()
    assert kinds([both]) == [(RSYN | FIN, ELSEWHERE, REMOTE)]
    assert both.control.verno == rsyn.control.verno + 1
    host.receive(rsyn_ack(peer, both))
    assert host.states() == ["FINWAIT2"]
    assert migration(host) == "INITIAL"


def test_a_fin_goes_on_alone_when_only_the_rsyn_was_answered() -> None:
    host, peer, flow_id, rsyn = moving_host()
    host.sal.fin_acknowledged(flow_id, host.now)
    both = host.only_packet()
    host.receive(rsyn_ack(peer, rsyn))
    assert kinds(host.packets()) == [(ACK, ELSEWHERE, REMOTE), (FIN, ELSEWHERE, REMOTE)]
    assert host.states() == ["FINWAIT1"]
    host.receive(rsyn_ack(peer, both, ACK))
    assert host.states() == ["FINWAIT2"]


def test_an_rsyn_takes_an_unacknowledged_fin_along() -> None:
    host, peer, flow_id = accepted_host()
    host.sal.fin_acknowledged(flow_id, host.now)
    fin = host.only_packet()
    host.sal.migrate(flow_id, NEW_PATH, host.now)
    both = host.only_packet()
    assert kinds([both]) == [(RSYN | FIN, ELSEWHERE, REMOTE)]
    host.receive(rsyn_ack(peer, fin, ACK))  # the peer got the first FIN, and its ACK was late
    assert host.states() == ["FINWAIT2"]
    assert migration(host) == "SENT"
    _, again = host.advance(0.5)[-1]
    assert kinds([again]) == [(RSYN, ELSEWHERE, REMOTE)]


def test_an_rsyn_ack_may_carry_a_fin() -> None:
    host, peer, _, rsyn = moving_host()
    host.receive(rsyn_ack(peer, rsyn, RSYN | ACK | FIN))
    assert host.states() == ["CLOSEWAIT"]
    assert migration(host) == "INITIAL"
    assert {each.control.flags for each in host.packets()} == {ACK}


def test_a_flow_that_is_closed_moves_no_more() -> None:
    host, _, flow_id, _ = moving_host()
    host.sal.release(flow_id, host.now)
    host.sal.abort(flow_id, host.now)
    assert host.sal.flows() == []
    assert {each.control.flags for _, each in host.advance(100.0)} == {RST | ACK}


# The peer's move.


def test_the_peer_is_followed_when_it_has_our_answer() -> None:
    host, peer, _ = connected_host()
    moved_peer(peer)
    host.receive(peer.control(RSYN))
    answer = host.only_packet()
    assert kinds([answer]) == [(RSYN | ACK, LOCAL, NEW_PLACE)]
    assert answer.control.ackno == peer.verno + 1 & 0xFFFFFFFF
    assert host.news(MovePath) == []
    assert migration(host) == "RECV"
    host.receive(peer.control(ACK, verno=peer.verno + 1 & 0xFFFFFFFF, ackno=answer.control.verno))
    (move,) = host.news(MovePath)
    assert (move.local_address, move.peer_address) == (LOCAL, NEW_PLACE)
    assert migration(host) == "INITIAL"


@pytest.mark.parametrize(("native_port", "expected"), [(0, []), (61000, [NEW_PLACE])])
def test_native_data_from_a_new_place_is_expected_before_the_peer_is_told_that_it_may_move(
    native_port: int, expected: list[int]
) -> None:
    host, peer, flow_id = connected_host()
    host.sal._core.flows.by_id[flow_id].native_port = native_port
    host.receive(peer.control(RSYN))
    assert host.news(ExpectPeer) == [], "it is where it was"
    moved_peer(peer)
    host.receive(peer.control(RSYN, verno=peer.verno + 1 & 0xFFFFFFFF))
    assert [each.address for each in host.news(ExpectPeer)] == expected


def test_the_confirmation_may_come_from_anywhere() -> None:
    host, peer, _ = connected_host()
    moved_peer(peer)
    host.receive(peer.control(RSYN))
    answer = host.only_packet()
    peer.address = OLD_PLACE
    host.receive(peer.control(ACK, verno=peer.verno + 1 & 0xFFFFFFFF, ackno=answer.control.verno))
    assert host.news(MovePath)[0].peer_address == NEW_PLACE


def test_a_repeated_rsyn_gets_the_answer_again() -> None:
    host, peer, _ = connected_host()
    moved_peer(peer)
    for _ in range(3):
        host.receive(peer.control(RSYN))
        assert kinds(host.packets()) == [(RSYN | ACK, LOCAL, NEW_PLACE)]
    host.receive(peer.control(ACK, verno=peer.verno + 1 & 0xFFFFFFFF))
    host.packets()
    host.receive(peer.control(RSYN))  # a late copy: the peer has moved, and is answered all the same
    assert kinds(host.packets()) == [(RSYN | ACK, LOCAL, NEW_PLACE)]
    assert len(host.news(MovePath)) == 1


def test_the_answer_is_repeated_and_given_up() -> None:
    host, peer, _ = connected_host(IMPATIENT)
    moved_peer(peer)
    host.receive(peer.control(RSYN))
    sent = host.advance(60.0)
    assert [each.control.flags for _, each in sent] == [RSYN | ACK] * 3
    assert migration(host) == "INITIAL"
    assert host.news(MovePath) == []
    assert host.states() == ["CONNECTED"]
    assert host.news(Happened)[0].kind == "migration_failed"


def test_an_ack_that_answers_something_else_confirms_nothing() -> None:
    """An ACK of our FIN says nothing about where it can be reached."""
    host, peer, flow_id = connected_host()
    moved_peer(peer)
    host.receive(peer.control(RSYN))
    host.sal.fin_acknowledged(flow_id, host.now)
    fin = host.packets()[-1]
    acks = fin.control.verno + 1 & 0xFFFFFFFF
    host.receive(peer.control(ACK, verno=peer.verno + 1 & 0xFFFFFFFF, ackno=acks))
    assert host.states() == ["FINWAIT2"]
    assert migration(host) == "RECV"


def test_a_fin_with_the_rsyn_is_processed_after_it() -> None:
    host, peer, _ = connected_host()
    moved_peer(peer)
    host.receive(peer.control(RSYN | FIN))
    sent = host.packets()
    assert {each.control.flags for each in sent} == {RSYN | ACK}  # no bare ACK may overtake it
    assert {each.destination for each in sent} == {NEW_PLACE}
    assert host.states() == ["CLOSEWAIT"]


def test_an_rsyn_completes_a_handshake_whose_ack_was_lost() -> None:
    host, peer = half_open_host(peer=Peer(options=OUR_OPTIONS))
    moved_peer(peer)
    host.receive(peer.control(RSYN))
    assert host.states() == ["CONNECTED"]
    assert kinds(host.packets()) == [(RSYN | ACK, LOCAL, NEW_PLACE)]


# Both at once.


def test_both_ends_move_at_once() -> None:
    host, peer, _, rsyn = moving_host()
    moved_peer(peer)
    host.receive(peer.control(RSYN))
    assert migration(host) == "SENT_RECV"
    answer = host.only_packet()
    assert kinds([answer]) == [(RSYN | ACK, LOCAL, NEW_PLACE)]
    host.receive(peer.control(ACK, verno=peer.verno + 1 & 0xFFFFFFFF, ackno=host_verno(answer)))
    again = host.only_packet()
    assert kinds([again]) == [(RSYN, ELSEWHERE, NEW_PLACE)]  # at once, and to where the peer is now
    host.receive(rsyn_ack(peer, rsyn))
    assert kinds(host.packets()) == [(ACK, ELSEWHERE, NEW_PLACE)]
    assert (host.news(MovePath)[-1].local_address, host.news(MovePath)[-1].peer_address) == (ELSEWHERE, NEW_PLACE)
    assert migration(host) == "INITIAL"


def host_verno(answer: Sent) -> int:
    """What a peer that has not seen our RSYN acknowledges: one less than what comes next."""
    return answer.control.verno - 1 & 0xFFFFFFFF


# Who is believed.


@pytest.mark.parametrize("flags", [RSYN, RSYN | FIN, RSYN | ACK, RSYN | ACK | FIN, ACK, FIN, RST, RST | ACK])
@pytest.mark.parametrize("state", ["settled", "moving", "proving"])
def test_a_wrong_nonce_changes_nothing(flags: int, state: str) -> None:
    if state == "moving":
        host, peer, _, _ = moving_host()
    else:
        host, peer, _ = accepted_host()
    if state == "proving":
        moved_peer(peer)
        host.receive(peer.control(RSYN))
        host.packets()
    before = host.sal.flows()
    ackno = (before_number(host) + 1) & 0xFFFFFFFF
    for nonce in (bytes(7) + b"\1", b"guessed!"):
        host.receive(peer.control(flags, verno=peer.verno + 1 & 0xFFFFFFFF, ackno=ackno, nonce=nonce))
    assert host.sal.flows() == before
    assert host.effects() == []
    assert host.dropped("wrong_nonce") + host.dropped("spoofed_reset") == 2


def before_number(host: LoneHost) -> int:
    (flow,) = host.sal._core.flows.by_id.values()
    return flow.send_next - 1


@pytest.mark.parametrize("flags", [RSYN, RSYN | FIN, FIN, RST | ACK])
def test_an_old_version_number_moves_and_closes_nothing(flags: int) -> None:
    host, peer, _ = accepted_host()
    host.receive(peer.control(flags, verno=peer.verno - 1 & 0xFFFFFFFF))
    assert host.states() == ["CONNECTED"]
    assert host.news(MovePath) == []
    assert migration(host) == "INITIAL"
    dropped = sum(count for name, count in host.sal.counters.items() if name.startswith("dropped_"))
    assert dropped == 1


def test_a_guessed_flow_id_finds_no_flow() -> None:
    host, peer, _ = accepted_host()
    peer.host_flow_id ^= 1
    host.receive(peer.control(RSYN))
    assert host.effects() == []
    assert host.dropped("unknown_flow") == 1


def test_nobody_is_followed_to_an_address_that_is_none() -> None:
    host, peer, _ = accepted_host()
    peer.address = parse_address("224.0.0.1")
    host.receive(peer.control(RSYN))
    assert host.effects() == []
    assert host.dropped("not_unicast") == 1


def test_an_answer_to_something_that_was_never_said_is_counted() -> None:
    host, peer, _, rsyn = moving_host()
    host.receive(peer.control(RSYN | ACK, ackno=rsyn.control.verno + 2 & 0xFFFFFFFF))
    assert host.dropped("wrong_ackno") == 1
    assert migration(host) == "SENT"
    settled, peer, _ = accepted_host()
    settled.receive(peer.control(RSYN | ACK))
    assert settled.dropped("unexpected_rsyn_ack") == 1
