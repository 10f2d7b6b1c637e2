"""Do two SALs open, use and close connections over networks of every badness? Thousands of seeds."""

from __future__ import annotations

from errno import ECONNABORTED, ECONNRESET, ETIMEDOUT
from random import Random

import pytest

from serval_core.dataplane.memory_network import Faults, MemoryHost, MemoryNetwork
from serval_core.dataplane.toy_transport import ToyTransport
from serval_core.rules import Rule
from tests.serval_core.exchanges import (
    CLIENT_ADDRESS,
    SERVER_ADDRESS,
    SERVICE,
    Exchange,
    leftovers,
    two_hosts,
)

SEEDS = 2000
SEEDS_PER_TEST = 100


def random_faults(random: Random, worst_loss: float) -> Faults:
    return Faults(
        loss=random.choice((0.0, 0.02, worst_loss / 2, worst_loss)),
        duplication=random.choice((0.0, 0.05, 0.3)),
        reordering=random.choice((0.0, 0.1, 0.5)),
        delay_s=random.choice((0.0001, 0.005, 0.08, 0.25)),
        jitter_s=random.choice((0.0, 0.001, 0.05)),
        reordering_s=random.choice((0.001, 0.1, 0.6)),
    )


def run_exchange(seed: int, faults: Faults) -> Exchange:
    random = Random(seed)
    network, client, server = two_hosts(seed, faults)
    exchange = Exchange(
        network,
        client,
        server,
        request=random.randbytes(random.choice((0, 1, 5000))),
        reply=random.randbytes(random.choice((0, 1, 5000))),
        server_waits=random.random() < 0.5,
    )
    exchange.client_waits = not exchange.server_waits and random.random() < 0.5
    exchange.start()
    network.run()
    # An end whose peer is gone may wait for ever, as in TCP, unless its application loses patience.
    for host in (client, server):
        for flow_id in list(host.transports):
            host.sal.abort(flow_id, network.now)
            host.settle()
    network.run()
    return exchange


def assert_nothing_is_left(exchange: Exchange) -> None:
    for host in (exchange.client, exchange.server):
        assert not any(leftovers(host).values()), leftovers(host)
        assert set(host.ended) == set(host.accepted) | set(host.connected)
        assert {transport.opened.flow_id for transport in host.finished} == set(host.ended)


@pytest.mark.parametrize("first_seed", range(0, SEEDS, SEEDS_PER_TEST))
def test_every_exchange_completes_or_fails_cleanly(first_seed: int) -> None:
    completed = impatient = 0
    for seed in range(first_seed, first_seed + SEEDS_PER_TEST):
        exchange = run_exchange(seed, random_faults(Random(seed), 0.25))
        client, server = exchange.client, exchange.server
        assert_nothing_is_left(exchange)
        assert len(server.accepted) <= 1
        if exchange.flow_id in client.failed:
            assert client.failed[exchange.flow_id].errno == ETIMEDOUT
            assert not client.connected
        else:
            assert client.connected == [exchange.flow_id]
        outcomes = {*client.ended.values(), *server.ended.values()}
        assert outcomes <= {0, ETIMEDOUT, ECONNRESET, ECONNABORTED}, f"seed {seed}: {outcomes}"
        impatient += ECONNABORTED in outcomes
        if client.ended.get(exchange.flow_id) == 0:
            # Nobody believes that all is well unless all is well.
            assert exchange.complete(), f"seed {seed}"
        completed += exchange.complete()
    assert completed > 0.95 * SEEDS_PER_TEST
    assert impatient < 0.02 * SEEDS_PER_TEST


@pytest.mark.parametrize("first_seed", range(0, 500, SEEDS_PER_TEST))
def test_mild_loss_never_fails_a_connection(first_seed: int) -> None:
    for seed in range(first_seed, first_seed + SEEDS_PER_TEST):
        exchange = run_exchange(seed, random_faults(Random(seed), 0.05))
        assert exchange.complete(), f"seed {seed}"
        assert set(exchange.client.ended.values()) == set(exchange.server.ended.values()) == {0}
        assert_nothing_is_left(exchange)


@pytest.mark.parametrize("broadcast", [False, True])
def test_of_several_instances_one_accepts(broadcast: bool) -> None:
    """All get copies of the SYN, sooner or later; the client answers one."""
    addresses = [SERVER_ADDRESS + number for number in range(3)]
    for seed in range(150):
        network = MemoryNetwork(seed, random_faults(Random(seed), 0.2))
        client = network.add_host(CLIENT_ADDRESS)
        servers = [network.add_host(address) for address in addresses]
        for server in servers:
            server.sal.listen(SERVICE, 16, network.now)
            if not broadcast:
                client.table.add(Rule.forward(SERVICE, server.address))
        if broadcast:
            rule = Rule.broadcast_on(client.paths.wire.broadcast_address, client.paths.wire.index)
            client.table.replace_broadcast_rules([rule])
        flow_id = client.sal.connect(SERVICE.service_id, network.now)
        client.settle()
        network.run(network.now + 30.0)
        accepted = sum(len(server.accepted) for server in servers)
        assert accepted <= 1, f"seed {seed}"
        if flow_id in client.connected and flow_id not in client.ended:
            assert accepted == 1, f"seed {seed}"
        client.sal.abort(flow_id, network.now)
        client.settle()
        network.run()
        assert not any(leftovers(client).values())
        assert all(not leftovers(server)["half open"] for server in servers)


def test_many_connections_at_once_do_not_mix() -> None:
    network, client, server = two_hosts(5, Faults(loss=0.05, duplication=0.1, reordering=0.3))
    said: dict[bytes, int] = {}

    def opened(host: MemoryHost, transport: ToyTransport) -> None:
        def changed(transport: ToyTransport) -> None:
            if transport.end_of_stream:
                said[transport.received] = said.get(transport.received, 0) + 1
                if host is server:
                    transport.write(transport.received)
                    transport.finish()
                host.sal.release(transport.opened.flow_id, network.now)

        transport.on_change = changed
        if host is client:
            transport.write(b"connection %d" % len(client.connected))
            transport.finish()

    client.on_open = server.on_open = opened
    server.sal.close_listener(1, network.now)
    server.sal.listen(SERVICE, 300, network.now)
    for _ in range(200):
        client.sal.connect(SERVICE.service_id, network.now)
        client.settle()
        network.run(network.now + 0.001)
    network.run()
    assert said == {b"connection %d" % number: 2 for number in range(1, 201)}
    assert not any(leftovers(client).values())
    assert not any(leftovers(server).values())


def test_the_same_seed_gives_the_same_packets() -> None:
    def packets(seed: int) -> list[bytes]:
        network, client, server = two_hosts(seed, Faults(loss=0.2, duplication=0.2, reordering=0.3))
        network.captured = []
        Exchange(network, client, server).start()
        network.run()
        return network.captured

    assert packets(7) == packets(7)
    assert packets(7) != packets(8)


def test_a_network_without_hosts_has_nothing_to_do() -> None:
    network = MemoryNetwork(1)
    network.run()
    assert network.now == 1000.0
