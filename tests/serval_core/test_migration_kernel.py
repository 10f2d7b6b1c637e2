"""Migration on the real kernel: live transfers between two hosts with two interfaces each, compared by hash."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from dataclasses import replace
from time import monotonic, sleep

import pytest

from lab.hosts import Host, Lab
from lab.waiting import wait_for
from serval_core.datagrams import DatagramFlow
from serval_core.names import FlowID, parse_service
from serval_core.sal_settings import Authenticate, SalSettings
from tests.serval_core.stack_thread import StackThread, Stream
from tests.serval_core.two_paths import CLIENT, SERVER, Mover, Transfer, cut, two_paths

SERVICE = "76568"
QUICK = SalSettings(
    connect_timeout_s=2.0, time_wait_s=0.2, fin_wait2_s=0.5, migration_retransmissions=3, return_retransmissions=2
)


class Ends:
    """Both stacks, and one flow between them."""

    def __init__(self, hosts: tuple[Host, Host, Host], client: StackThread, server: StackThread) -> None:
        self.client_host, self.server_host, self.router = hosts
        self.client, self.server = client, server
        listener = server.listen(SERVICE)
        client.forward(SERVICE, SERVER[0])
        self.near: Stream = client.connect(SERVICE)
        self.far: Stream = listener.accept()
        self.near_mover, self.far_mover = Mover(client), Mover(server)
        self.near_id, self.far_id = self.near.connection.flow_id, self.far.connection.flow_id

    def close(self) -> None:
        self.near.release()
        self.far.release()
        for stack in (self.client, self.server):
            wait_for(lambda stack=stack: stack.counters()["open_transports"] == 0, "all transports are closed")
            assert stack.counters()["flow_map_entries"] == 0
            assert stack.flows() == []


@pytest.fixture
def ends(lab: Lab) -> Iterator[Ends]:
    hosts = two_paths(lab)
    with StackThread(hosts[0], sal=QUICK) as client, StackThread(hosts[1], sal=QUICK) as server:
        yield Ends(hosts, client, server)


def test_either_end_moves_a_live_transfer(ends: Ends) -> None:
    transfer = Transfer(ends.near, ends.far)
    assert ends.near_mover.move(ends.near_id, "eth1")["address"] == CLIENT[1]
    assert ends.far_mover.outcome(ends.far_id, "peer")["address"] == CLIENT[1]
    assert ends.far_mover.move(ends.far_id, "eth1")["address"] == SERVER[1]
    assert ends.near_mover.outcome(ends.near_id, "peer")["address"] == SERVER[1]
    before = transfer.received_bytes
    wait_for(lambda: transfer.received_bytes > before + 10_000_000, "data on the new paths")
    (flow,) = ends.client.flows()
    assert (flow["local_address"], flow["peer_address"]) == (CLIENT[1], SERVER[1])
    assert (flow["migration"], flow["migrations"]) == ("INITIAL", 2)
    assert transfer.finish() > 0
    ends.close()


@pytest.mark.parametrize("upload", [True, False], ids=["the mover sends", "the mover receives"])
def test_a_transfer_goes_on_after_its_path_has_died(ends: Ends, upload: bool) -> None:
    """The router drops everything without a word, TCP repeats in vain, then the client moves."""
    transfer = Transfer(ends.near, ends.far) if upload else Transfer(ends.far, ends.near)
    wait_for(lambda: transfer.received_bytes > 1_000_000, "the transfer has begun")
    cut(ends.router, "eth0")
    sender = ends.client if upload else ends.server
    flow_id = FlowID(ends.near_id if upload else ends.far_id)
    wait_for(lambda: _timeouts(sender, flow_id) >= 2, "two timeouts")
    assert ends.near_mover.move(ends.near_id, "eth1")["address"] == CLIENT[1]
    before = transfer.received_bytes
    wait_for(lambda: transfer.received_bytes > before + 1_000_000, "the transfer goes on")
    transfer.finish()
    ends.close()


def _timeouts(stack: StackThread, flow_id: FlowID) -> int:
    seen = stack.call(lambda: stack.stack._dataplane.sockets.look(flow_id))
    return 0 if seen is None else seen.timeouts


def test_a_smaller_mtu_of_the_new_path_is_obeyed(lab: Lab) -> None:
    """The second wires carry 1280 bytes. Both ends move, so each sees its own limit."""
    hosts = two_paths(lab, second_mtu=1280)
    with StackThread(hosts[0], sal=QUICK) as client, StackThread(hosts[1], sal=QUICK) as server:
        ends = Ends(hosts, client, server)
        transfers = Transfer(ends.near, ends.far), Transfer(ends.far, ends.near)
        ends.near_mover.move(ends.near_id, "eth1")
        ends.far_mover.move(ends.far_id, "eth1")
        before = [each.received_bytes for each in transfers]
        for transfer, bytes_before in zip(transfers, before, strict=True):
            wait_for(lambda t=transfer, b=bytes_before: t.received_bytes > b + 3_000_000, "data on the new path")
            transfer.finish()
        ends.close()


def test_a_smaller_mtu_is_not_forgotten(lab: Lab) -> None:
    """The kernel forgets it after a while (ten minutes, if nobody says otherwise), and no router would complain."""
    hosts = two_paths(lab, second_mtu=1280)
    hosts[0].run(["sysctl", "-qw", "net.ipv4.route.mtu_expires=6"])
    with StackThread(hosts[0], sal=QUICK) as client, StackThread(hosts[1], sal=QUICK) as server:
        ends = Ends(hosts, client, server)
        transfer = Transfer(ends.near, ends.far)
        ends.near_mover.move(ends.near_id, "eth1")
        sizes = set()
        until = monotonic() + 8.0
        while monotonic() < until:
            seen = client.call(lambda: client.stack._dataplane.sockets.look(ends.near_id))
            assert seen is not None
            sizes.add(seen.mss_bytes)
            sleep(0.05)
        assert max(sizes) < 1280
        transfer.finish()
        ends.near_mover.move(ends.near_id, "eth0")
        assert not client.stack._dataplane.segment_limits._limits, "the first path carries what the handshake allowed for"
        ends.close()


def test_authenticated_flows_move(lab: Lab) -> None:
    hosts = two_paths(lab)
    proven = replace(QUICK, authenticate=Authenticate.REQUIRE)
    with StackThread(hosts[0], sal=proven) as client, StackThread(hosts[1], sal=proven) as server:
        ends = Ends(hosts, client, server)
        assert [flow["authenticated"] for stack in (client, server) for flow in stack.flows()] == [True, True]
        transfer = Transfer(ends.near, ends.far)
        ends.near_mover.move(ends.near_id, "eth1")
        ends.far_mover.move(ends.far_id, "eth1")
        assert transfer.finish() > 0
        ends.close()
        for stack in (client, server):
            assert not [name for name, count in stack.counters().items() if name.startswith("dropped_") and count]


def test_a_move_during_the_close(ends: Ends) -> None:
    """The FIN is out and its ACK is not in when the flow moves."""
    transfer = Transfer(ends.near, ends.far)
    wait_for(lambda: transfer.received_bytes > 1_000_000, "the transfer has begun")
    transfer.finish()
    ends.near_mover.begin(ends.near_id, "eth1")
    ends.near_mover.outcome(ends.near_id, "local")
    back = Transfer(ends.far, ends.near)  # half closed, the other direction goes on
    wait_for(lambda: back.received_bytes > 1_000_000, "data the other way")
    ends.far_mover.move(ends.far_id, address=SERVER[1])
    back.finish()
    ends.close()


def test_a_connected_datagram_flow_moves(lab: Lab) -> None:
    hosts = two_paths(lab)
    with StackThread(hosts[0], sal=QUICK) as client, StackThread(hosts[1], sal=QUICK) as server:
        flows: queue.Queue[DatagramFlow] = queue.Queue()
        received: queue.Queue[bytes] = queue.Queue()

        def accepted(flow: DatagramFlow) -> None:
            flow.on_datagram = received.put
            flows.put(flow)

        prefix = parse_service(SERVICE)
        server.call(lambda: server.stack.datagrams.listen(prefix, accepted))
        client.forward(SERVICE, SERVER[0])
        connect = client.stack.datagrams.connect
        client.call(lambda: connect(prefix.service_id, flows.put, lambda code, why: None))
        near, far = sorted((flows.get(timeout=5), flows.get(timeout=5)), key=lambda each: each.local_address)
        near_mover, far_mover = Mover(client), Mover(server)
        assert near_mover.move(near.flow_id, "eth1")["address"] == CLIENT[1]
        assert far_mover.outcome(far.flow_id, "peer")["address"] == CLIENT[1]
        cut(hosts[2], "eth0")
        assert client.call(lambda: near.send(b"over the other one")) == 0
        assert received.get(timeout=5) == b"over the other one"
        assert far.peer_address == near.local_address
        client.call(near.close)
        server.call(far.close)
