"""Do the stack and a prototype follow each other when flows migrate? Both hosts have two interfaces each."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playing import OUR_SERVICE, THEIR_SERVICE, LoseFirst, Playing, control_flags, options, random_data
from prototype_wire import QUICK, Wire, assert_idle, echo, serve, sha256
from scapy.packet import Packet

from lab.hosts import Lab
from tests.peers.application import Behaviour, PeerResult
from tests.peers.prototype import PrototypeServer
from tests.peers.prototype_flow import ACK, RSYN
from tests.peers.raw_wire import Direction
from tests.serval_core.stack_thread import StackThread, Stream, send_in_background
from tests.serval_core.two_paths import CLIENT, SERVER, Mover, two_paths

SIZE_BYTES = 2_000_000
OURS, THEIRS = CLIENT, SERVER


@pytest.fixture(scope="module")
def wire(root: None) -> Iterator[Wire]:
    """Our host and the prototype's, with a router between them and two ways to it from each."""
    with Lab() as lab:
        ours, theirs, _ = two_paths(lab)
        with StackThread(ours, sal=QUICK) as stack:
            stack.forward(str(THEIR_SERVICE), THEIRS[0])
            yield Wire(stack, stack.listen(str(OUR_SERVICE)), ours, theirs)
            assert_idle(stack)


def is_rsyn(packet: Packet) -> bool:
    return control_flags(packet) == RSYN


def is_rsyn_ack(packet: Packet) -> bool:
    return control_flags(packet) == RSYN | ACK


class LoseConfirmation(LoseFirst):
    """A wire that loses the first ACK in one direction after an RSYN-ACK in the other."""

    def __init__(self, direction: Direction) -> None:
        super().__init__(direction, lambda packet: self._answered and control_flags(packet) == ACK)
        self._answered = False

    def __call__(self, direction: Direction, packet: Packet) -> bool:
        self._answered |= is_rsyn_ack(packet)
        return super().__call__(direction, packet)


def losing(lost: str, mover_sends: Direction) -> LoseFirst:
    """A wire that loses the first RSYN, RSYN-ACK or confirmation; `mover_sends` as the prototype sees it."""
    other: Direction = "received" if mover_sends == "sent" else "sent"
    if lost == "rsyn":
        return LoseFirst(mover_sends, is_rsyn)
    if lost == "rsyn_ack":
        return LoseFirst(other, is_rsyn_ack)
    return LoseConfirmation(mover_sends)


def echoed(wire: Wire, stream: Stream, playing: Playing) -> PeerResult:
    """Our client sends to a prototype that echoes, and everything comes back."""
    sent = send_in_background(stream, SIZE_BYTES)
    received = stream.receive_all()
    stream.release()
    result = playing.finished()
    assert received == sent() == result.flows[0].received_sha256
    assert (result.flows[0].error, result.flows[0].state) == ("", "CLOSED")
    return result


@pytest.mark.parametrize("lost", ["rsyn", "rsyn_ack", "confirmation"])
def test_a_prototype_server_moves(wire: Wire, lost: str) -> None:
    lose = losing(lost, "sent")
    behaviour = Behaviour(echo=True, migrations=((500_000, THEIRS[1]), (2_000_000, THEIRS[0])))
    playing = Playing(wire.theirs, PrototypeServer(THEIR_SERVICE, behaviour, options(lose)))
    stream = wire.stack.connect(str(THEIR_SERVICE))
    mover = Mover(wire.stack)
    result = echoed(wire, stream, playing)
    # The second move may begin before the first is confirmed, and then counts alone.
    addresses = [mover.outcome(stream.connection.flow_id, "peer")["address"]]
    while addresses[-1] != THEIRS[0]:
        addresses.append(mover.outcome(stream.connection.flow_id, "peer")["address"])
    assert set(addresses) <= {*THEIRS}
    assert result.flows[0].counters["migrations"] == 2
    assert lose.lost == 1


@pytest.mark.parametrize("lost", ["rsyn", "rsyn_ack", "confirmation"])
def test_our_client_moves(wire: Wire, lost: str) -> None:
    lose = losing(lost, "received")
    playing = Playing(wire.theirs, PrototypeServer(THEIR_SERVICE, Behaviour(echo=True), options(lose)))
    stream = wire.stack.connect(str(THEIR_SERVICE))
    mover = Mover(wire.stack)
    for interface in ("eth1", "eth0", "eth1"):
        mover.move(stream.connection.flow_id, interface)
    result = echoed(wire, stream, playing)
    assert result.flows[0].peer_address == OURS[1]
    assert lose.lost == 1


def test_a_prototype_client_and_our_server_move(wire: Wire) -> None:
    data = random_data(SIZE_BYTES)
    behaviour = Behaviour(
        data, close_when="received", expected_bytes=len(data), migrations=((1_000_000, THEIRS[1]),)
    )
    playing = Playing(wire.theirs, wire.client(behaviour, options(), OURS[0]))
    stream = wire.listener.accept()
    mover = Mover(wire.stack)
    mover.move(stream.connection.flow_id, "eth1")
    server = serve(stream, echo)
    assert mover.outcome(stream.connection.flow_id, "peer")["address"] == THEIRS[1]
    result = playing.finished()
    server.join(20)
    (flow,) = result.flows
    assert (flow.received_sha256, flow.error, flow.peer_address) == (sha256(data), "", OURS[1])
    assert (flow.counters["migrations"], flow.counters["peer_migrations"]) == (1, 1)
