"""A client and several instances on a network: no connect fails as long as one of them lives."""

from __future__ import annotations

from collections import Counter
from errno import ECONNREFUSED

import pytest

from serval_core.rules import Rule
from tests.serval_core.instances import REFUSING, connect, instances, served_by
from tests.serval_core.lone_host import SERVICE, SERVICE_ID


@pytest.mark.parametrize("seed", range(5))
def test_instances_that_refuse_cost_a_round_trip_each(seed: int) -> None:
    network, client, servers = instances(3, REFUSING, seed)
    for server in servers[:2]:
        server.sal.close_listener(1, network.now)
    for _ in range(10):
        flow_id, took = connect(network, client)
        assert served_by(client, flow_id) == servers[2].address
        assert took < 0.05
    assert len(client.failed) == 0


@pytest.mark.parametrize("seed", range(5))
def test_instances_that_are_silent_cost_a_timeout_until_they_are_known(seed: int) -> None:
    network, client, servers = instances(3, seed=seed)
    for server in servers[:2]:
        server.paths.up = False
    took = []
    for _ in range(20):
        flow_id, duration = connect(network, client)
        assert served_by(client, flow_id) == servers[2].address
        took.append(duration)
    assert max(took) < 0.5
    # Two silences mark an instance for two seconds, and then one.
    assert sum(duration > 0.1 for duration in took) <= 5


def test_the_load_follows_the_weights_of_those_that_live() -> None:
    network, client, servers = instances(3)
    client.table.modify(SERVICE, servers[0].address, Rule.forward(SERVICE, servers[0].address, weight=3))
    servers[2].paths.up = False
    count: Counter[int] = Counter()
    for _ in range(400):
        flow_id, _ = connect(network, client)
        count[served_by(client, flow_id)] += 1
        client.sal.abort(flow_id, network.now)
        client.settle()
    assert set(count) == {servers[0].address, servers[1].address}
    assert 2.2 < count[servers[0].address] / count[servers[1].address] < 4.1


def test_lower_priorities_serve_while_the_higher_ones_are_dead_and_no_longer() -> None:
    network, client, servers = instances(2)
    preferred, reserve = servers
    client.table.modify(SERVICE, preferred.address, Rule.forward(SERVICE, preferred.address, priority=9))
    assert served_by(client, connect(network, client)[0]) == preferred.address
    preferred.paths.up = False
    for _ in range(5):
        assert served_by(client, connect(network, client)[0]) == reserve.address
    preferred.paths.up = True
    network.run(network.now + 31)
    assert served_by(client, connect(network, client)[0]) == preferred.address


def test_all_are_dead_and_one_returns() -> None:
    network, client, servers = instances(3)
    for server in servers:
        server.paths.up = False
    flow_id = client.sal.connect(SERVICE_ID, network.now)
    client.settle()
    network.run(network.now + 4)
    assert not client.failed
    servers[1].paths.up = True
    network.run(network.now + 5, lambda: flow_id in client.connected)
    assert served_by(client, flow_id) == servers[1].address


def test_all_refuse_and_one_returns() -> None:
    network, client, servers = instances(3, REFUSING)
    for server in servers:
        server.sal.close_listener(1, network.now)
    flow_id, took = connect(network, client)
    assert client.failed[flow_id].errno == ECONNREFUSED
    assert took < 0.1
    servers[1].sal.listen(SERVICE, 64, network.now)
    flow_id, took = connect(network, client)
    assert served_by(client, flow_id) == servers[1].address
    assert took < 0.1


@pytest.mark.parametrize("seed", range(8))
def test_instances_come_and_go_and_no_connect_fails(seed: int) -> None:
    """One of four lives at any time, which one changes, some die loudly and some silently."""
    network, client, servers = instances(4, REFUSING, seed)
    listening = dict.fromkeys(servers, 1)
    for turn in range(24):
        for server in servers:
            alive = server is servers[turn % 4]
            server.paths.up = alive or server.address % 2 == 0
            if alive and not listening[server]:
                listening[server] = server.sal.listen(SERVICE, 64, network.now)
            elif not alive and listening[server]:
                server.sal.close_listener(listening[server], network.now)
                listening[server] = 0
        flow_id, took = connect(network, client)
        assert not client.failed, f"turn {turn}"
        assert served_by(client, flow_id) == servers[turn % 4].address
        assert took < 1.5
