"""Does the benchmark of service routers measure all ways of forwarding, and each the right way?"""

from __future__ import annotations

from bench.router import CONTENDERS, IN_KERNEL, IP_FORWARDING, RoutingRates, measure, syn_packet
from serval_core.wire import ipv4, sal


def test_each_contender_forwards(root: None) -> None:
    """`measure` raises when a contender did not forward in its own way."""
    found = measure(rounds=1, seconds=0.1)
    assert found.rates.keys() == set(CONTENDERS)
    assert all(rate > 0 for rates in found.rates.values() for rate in rates)


def test_ratio_is_that_of_the_rounds() -> None:
    rates = {name: [100.0, 300.0, 200.0] for name in CONTENDERS} | {IN_KERNEL: [100.0, 150.0, 400.0]}
    found = RoutingRates(rates)
    assert found.to_ip(IN_KERNEL) == 1.0
    assert found.median(IP_FORWARDING) == 200.0
    assert "(1.00)" in found.sentence()


def test_the_packet_is_what_a_prototype_sends() -> None:
    packet = ipv4.parse(syn_packet("10.2.0.2"))
    assert 20 + len(packet.payload) == 116
    assert sal.parse(packet.payload).source_addresses == ()
