"""Do stacks get along with what real wires do? Loss, reordering, and the sizes of packets."""

from __future__ import annotations

import pytest

from lab.hosts import Lab
from lab.loss import Faults, FaultyWire
from lab.wire_counter import WireCounter
from serval_core.framing import Framing
from serval_core.sal_settings import SalSettings
from tests.serval_core.stack_thread import StackThread, assert_idle, exchange, send_in_background

SERVICE = "76568"


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_transfer_over_a_bad_wire(lab: Lab, seed: int) -> None:
    """Loss, duplication and reordering of control and data packets alike."""
    client, server = lab.host("client"), lab.host("server")
    faults = Faults(drop=0.05, duplicate=0.05, reorder=0.05, protocol=144)
    with (
        FaultyWire(
            lab,
            client,
            "10.1.0.1/24",
            server,
            "10.1.0.2/24",
            seed=seed,
            left_to_right=faults,
            right_to_left=faults,
        ) as wire,
        StackThread(client) as near,
        StackThread(server) as far,
    ):
        listener = far.listen(SERVICE)
        for _ in range(3):
            stream = near.connect(SERVICE)
            exchange(stream, listener.accept(), 300_000, 300_000)
        assert_idle(near, far)
        assert wire.left_to_right.dropped > 0


@pytest.mark.parametrize("mtu", [1500, 9000])
def test_data_that_overtakes_the_handshake_is_not_lost(lab: Lab, mtu: int) -> None:
    """The handshake ACK is dropped, so the first data completes the handshake; nothing waits for a retransmission timeout."""
    client, server = lab.host("client"), lab.host("server")
    lost_ack = Faults(drop_exactly=frozenset({1}), protocol=144)  # 0 is the SYN
    with (
        FaultyWire(lab, client, "10.1.0.1/24", server, "10.1.0.2/24", seed=0, left_to_right=lost_ack, mtu=mtu),
        StackThread(client) as near,
        StackThread(server) as far,
    ):
        listener = far.listen(SERVICE)
        stream = near.connect(SERVICE)
        sent = send_in_background(stream, 60 * mtu)
        accepted = listener.accept()
        assert accepted.receive_all() == sent()
        accepted.socket.close()
        stream.release()
        near_tcp = near.counters()
        assert near_tcp["dataplane_drop_out_not_a_flow"] == 0
        counters = far.counters()
        assert {name: count for name, count in counters.items() if name.startswith("dropped_")} == {}
        assert counters["packets_received"] <= 20, "only what came before the handshake's end goes through user space"


@pytest.mark.parametrize("mtu", [1280, 1500, 9000])
def test_nothing_above_the_mtu_leaves(lab: Lab, mtu: int) -> None:
    client, server = lab.host("client"), lab.host("server")
    names = lab.connect(client, "10.1.0.1/24", server, "10.1.0.2/24", mtu=mtu)
    sal = SalSettings(framing=Framing.SAL)
    with (
        StackThread(client, sal=sal) as near,
        StackThread(server, sal=sal) as far,
        WireCounter(client, names[0], 144, longer_than_bytes=mtu) as oversize,
        WireCounter(client, names[0], 144, longer_than_bytes=mtu - 20) as full,
    ):
        listener = far.listen(SERVICE)
        stream = near.connect(SERVICE)
        exchange(stream, listener.accept(), 5_000_000, 5_000_000)
        assert oversize.count() == 0
        assert full.count() > 500
