"""Do two SALs open, use and close connections over networks of every badness? Thousands of seeds."""

from __future__ import annotations

from errno import ECONNABORTED, ECONNRESET, ETIMEDOUT
from random import Random

import pytest

from serval_core.dataplane.memory_network import Faults, MemoryNetwork
from tests.serval_core.exchanges import Exchange, leftovers, two_hosts

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
