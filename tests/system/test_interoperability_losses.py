"""Do the stack and the prototype understand each other on a wire that loses, doubles and reorders packets?"""

from __future__ import annotations

import pytest
from playing import (
    OUR_SERVICE,
    THEIR_SERVICE,
    Kind,
    LoseFirst,
    Playing,
    is_acknowledgement,
    is_fin,
    is_syn,
    is_syn_ack,
    is_tcp_fin,
    options,
    random_data,
)
from prototype_wire import (
    OURS,
    QUICK,
    THEIRS,
    Wire,
    assert_idle,
    exchange_as_client,
    exchange_as_server,
    sha256,
)

from lab.hosts import Lab
from lab.loss import Faults, FaultyWire
from tests.peers.application import Behaviour
from tests.peers.prototype import PrototypeServer
from tests.peers.raw_wire import Direction
from tests.serval_core.stack_thread import StackThread


@pytest.mark.parametrize("role", ["client", "server"])
@pytest.mark.parametrize(
    "faults",
    [
        pytest.param(Faults(drop=0.02, protocol=144), id="loss"),
        pytest.param(Faults(duplicate=0.1, reorder=0.1, protocol=144), id="duplicates-and-disorder"),
        pytest.param(Faults(duplicate=1.0, protocol=144), id="everything-twice"),
    ],
)
def test_an_echo_over_a_bad_wire(lab: Lab, role: str, faults: Faults) -> None:
    """`role` is the prototype's."""
    ours, theirs = lab.host("ours"), lab.host("theirs")
    ends = (ours, f"{OURS}/24", theirs, f"{THEIRS}/24")
    with (
        FaultyWire(lab, *ends, seed=4, left_to_right=faults, right_to_left=faults) as bad,
        StackThread(ours, sal=QUICK) as stack,
    ):
        wire = Wire(stack, stack.listen(str(OUR_SERVICE)), ours, theirs)
        data = random_data(300_000)
        if role == "client":
            behaviour = Behaviour(data, close_when="received", expected_bytes=len(data))
            exchange_as_server(wire, wire.client(behaviour, options()), data)
        else:
            exchange_as_client(
                wire, PrototypeServer(THEIR_SERVICE, Behaviour(echo=True), options()), len(data)
            )
        assert_idle(stack)
        for direction in (bad.left_to_right, bad.right_to_left):
            assert (direction.dropped > 0) == (faults.drop > 0)
            assert (direction.duplicated + direction.reordered > 0) == (faults.duplicate > 0)


LOSSES_OF_A_CLIENT: dict[str, tuple[Direction, Kind]] = {
    "its SYN": ("sent", is_syn),
    "our SYN-ACK": ("received", is_syn_ack),
    "its handshake ACK": ("sent", is_acknowledgement),
    "its TCP FIN": ("sent", is_tcp_fin),
    "its SAL FIN": ("sent", is_fin),
    "our ACK of its SAL FIN": ("received", is_acknowledgement),
    "our TCP FIN": ("received", is_tcp_fin),
    "our SAL FIN": ("received", is_fin),
}


@pytest.mark.parametrize("lost", LOSSES_OF_A_CLIENT)
def test_a_prototype_client_whose_wire_loses(wire: Wire, lost: str) -> None:
    lose = LoseFirst(*LOSSES_OF_A_CLIENT[lost])
    data = random_data(20_000)
    behaviour = Behaviour(data, close_when="received", expected_bytes=len(data))
    exchange_as_server(wire, wire.client(behaviour, options(lose)), data)
    assert lose.lost == 1


def test_a_prototype_client_that_only_listens_survives_a_lost_handshake_ack(wire: Wire) -> None:
    """It sends no data that could complete the handshake: our SYN-ACK is repeated, it answers with a bare SAL ACK."""
    lose = LoseFirst("sent", is_acknowledgement)
    playing = Playing(wire.theirs, wire.client(Behaviour(), options(lose)))
    stream = wire.listener.accept()
    sent = stream.send_random(50_000)
    stream.receive_all()
    stream.release()
    (flow,) = playing.finished().flows
    assert lose.lost == 1
    assert flow.counters["stale_control_packets"] >= 1
    assert flow.received_sha256 == sent


LOSSES_OF_A_SERVER: dict[str, tuple[Direction, Kind]] = {
    "our SYN": ("received", is_syn),
    "its SYN-ACK": ("sent", is_syn_ack),
    "our handshake ACK": ("received", is_acknowledgement),
    "our TCP FIN": ("received", is_tcp_fin),
    "our SAL FIN": ("received", is_fin),
    "its ACK of our SAL FIN": ("sent", is_acknowledgement),
    "its TCP FIN": ("sent", is_tcp_fin),
    "its SAL FIN": ("sent", is_fin),
}


@pytest.mark.parametrize("lost", LOSSES_OF_A_SERVER)
def test_a_prototype_server_whose_wire_loses(wire: Wire, lost: str) -> None:
    lose = LoseFirst(*LOSSES_OF_A_SERVER[lost])
    exchange_as_client(wire, PrototypeServer(THEIR_SERVICE, Behaviour(echo=True), options(lose)), 20_000)
    assert lose.lost == 1


def test_a_prototype_server_that_speaks_first_survives_a_lost_handshake_ack(wire: Wire) -> None:
    """Its handshake never completes by itself; our ACK is repeated, SERVICE included, though nobody asks for it."""
    lose = LoseFirst("received", is_acknowledgement, how_many=2)
    data = random_data(50_000)
    behaviour = Behaviour(data, close_when="acknowledged")
    playing = Playing(wire.theirs, PrototypeServer(THEIR_SERVICE, behaviour, options(lose)))
    stream = wire.stack.connect(str(THEIR_SERVICE))
    assert stream.receive_all() == sha256(data)
    stream.release()
    playing.finished()
    assert lose.lost == 2
