"""Migration on the real kernel: live transfers between two hosts with two interfaces each, compared by hash."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lab.hosts import Host, Lab
from lab.waiting import wait_for
from serval_core.sal_settings import SalSettings
from tests.serval_core.stack_thread import StackThread, Stream
from tests.serval_core.two_paths import CLIENT, SERVER, Mover, Transfer, two_paths

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
