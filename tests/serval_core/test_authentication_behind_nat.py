"""Do both ends agree on what a proof covers when packets are encapsulated, NATs change, or the framing does?"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from serval_core.framing import Framing
from serval_core.sal import SalSettings
from serval_core.sal_settings import Authenticate
from serval_core.wire.sal import ACK, FIN, RSYN
from tests.serval_core.exchanges import SERVER_ADDRESS
from tests.serval_core.nat_wire import NAT_ADDRESS, End, NatWire, at_nat


def opened(framing: Framing, passes_plain: bool = True) -> NatWire:
    """An authenticated flow."""
    wire = NatWire(SalSettings(authenticate=Authenticate.REQUIRE, framing=framing), passes_plain)
    wire.open()
    assert [end.flow["authenticated"] for end in (wire.client, wire.server)] == [True, True]
    assert at_nat(wire.server) is (framing is Framing.UDP)
    return wire


def finish(wire: NatWire, end: End) -> None:
    """Both directions of an end are over, as far as it is concerned."""
    flow_id = end.flow_id
    end.sal.fin_acknowledged(flow_id, wire.now)
    end.sal.release(flow_id, wire.now)


def rebind(wire: NatWire) -> None:
    """The NAT forgets the client, which does not know."""
    wire.nat_port += 1


def test_a_flow_follows_its_nat() -> None:
    wire = opened(Framing.UDP)
    rebind(wire)
    wire.server.sal.peer_seen(wire.server.flow_id, NAT_ADDRESS, wire.nat_port, wire.now)
    wire.run(2.0)
    assert wire.server.sal.counters["nat_rebindings"] == wire.server.sal.counters["flows_migrated"] == 1
    finish(wire, wire.server)
    wire.run(1.0)
    finish(wire, wire.client)
    wire.run(1.0)
    assert wire.client.ended == wire.server.ended == [0]
    assert wire.client.dropped() == wire.server.dropped() == set()


def move_off_plain(wire: NatWire) -> None:
    """From now on nothing but UDP gets through, and the client moves."""
    wire.passes_plain = False
    path = wire.client.paths.path_to(SERVER_ADDRESS)
    assert path is not None
    wire.client.sal.migrate(wire.client.flow_id, path, wire.now)


def nothing(wire: NatWire) -> None:
    """All stays as it is."""


@pytest.mark.parametrize(
    ("framing", "happens"),
    [
        (Framing.SAL, nothing),
        (Framing.UDP, nothing),
        (Framing.UDP, rebind),
        (Framing.AUTO, move_off_plain),
    ],
)
def test_the_last_ack_is_said_again_from_time_wait(framing: Framing, happens: Callable[[NatWire], None]) -> None:
    """The server waits there. The client's FIN, which it repeats, may come another way than the first."""
    wire = opened(framing)
    finish(wire, wire.server)
    wire.run(1.0)
    assert [wire.client.flow["state"], wire.server.flow["state"]] == ["CLOSEWAIT", "FINWAIT2"]
    finish(wire, wire.client)
    wire.deliver_to_the_server_only()
    assert (wire.server.sal.flows(), wire.server.ended) == ([], [0])
    assert wire.client.flow["state"] == "LASTACK"
    happens(wire)
    wire.said.clear()
    wire.run(20.0)
    assert wire.client.ended == [0]
    answers = [each for each in wire.said if each[1].control is not None and each[1].control.flags == ACK]
    assert {len(said.proof) for _, said in answers} == {16}
    assert {encapsulated for encapsulated, _ in answers} == {framing is Framing.UDP or happens is move_off_plain}
    assert wire.client.dropped() == set()
    assert wire.server.dropped() == {"dropped_repeated_control"}


def test_a_flow_goes_over_to_udp() -> None:
    wire = opened(Framing.AUTO)
    move_off_plain(wire)
    wire.run(20.0)
    assert at_nat(wire.server)
    assert wire.client.sal.counters["flows_migrated"] == 1
    for end in (wire.client, wire.server):
        finish(wire, end)
    wire.run(5.0)
    assert wire.client.ended == wire.server.ended == [0]
    assert wire.client.dropped() == wire.server.dropped() == set()


def test_an_rsyn_through_a_router_is_answered_from_time_wait() -> None:
    """It has the client's FIN with it and names the service, so its proof says nothing of addresses (`rendezvous`)."""
    wire = opened(Framing.SAL)
    finish(wire, wire.server)
    wire.run(1.0)
    finish(wire, wire.client)
    wire.deliver_to_the_server_only()
    core = wire.client.sal._core
    (flow,) = core.flows.by_id.values()
    way = wire.client.paths.path_to(SERVER_ADDRESS, wire.client.paths.wires[1].index)
    assert way is not None
    core.send_control_on(flow, RSYN | FIN, flow.send_next - 1, way, SERVER_ADDRESS, None, flow.service_id)
    wire.run(0.001)
    assert wire.client.ended == [0]
    assert wire.server.dropped() == {"dropped_repeated_control"}
