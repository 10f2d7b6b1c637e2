"""Moves in each framing, under load, and moves to a path that passes another framing only."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lab.hosts import Lab
from lab.waiting import wait_for
from serval_core.framing import Framing
from tests.serval_core.stack_thread import StackThread
from tests.serval_core.test_migration_kernel import QUICK, Ends
from tests.serval_core.two_paths import Transfer, two_paths

MOVES = 50  # of each end


def resets(ends: Ends) -> list[int]:
    """How many TCP resets the kernels of both hosts have sent."""

    def sent() -> int:
        with open("/proc/thread-self/net/snmp") as table:
            names, values = (line.split() for line in table if line.startswith("Tcp:"))
        return int(dict(zip(names, values, strict=True))["OutRsts"])

    return [host.call(sent) for host in (ends.client_host, ends.server_host)]


def framings(ends: Ends) -> set[object]:
    return {flow["framing"] for stack in (ends.client, ends.server) for flow in stack.flows()}


@pytest.mark.parametrize("framing", [Framing.SAL, Framing.UDP, Framing.NATIVE])
def test_a_hundred_moves_under_load(lab: Lab, framing: Framing) -> None:
    hosts = two_paths(lab)
    sal = replace(QUICK, framing=framing)
    with StackThread(hosts[0], sal=sal) as client, StackThread(hosts[1], sal=sal) as server:
        ends = Ends(hosts, client, server)
        transfers = Transfer(ends.near, ends.far), Transfer(ends.far, ends.near)
        resets_before = resets(ends)
        for number in range(MOVES):
            interface = ("eth1", "eth0")[number % 2]
            ends.near_mover.begin(ends.near_id, interface)
            ends.far_mover.begin(ends.far_id, interface)
            assert ends.near_mover.outcome(ends.near_id, "local")["event"] == "flow_migrated"
            assert ends.far_mover.outcome(ends.far_id, "local")["event"] == "flow_migrated"
        wait_for(lambda: framings(ends) == {framing.value}, f"data in framing {framing}")
        assert resets(ends) == resets_before, "all that arrives on old and new paths is the flow's"
        for transfer in transfers:
            assert transfer.finish() > 0
        ends.close()


def test_a_move_to_a_path_that_passes_nothing_but_udp(lab: Lab) -> None:
    """Native data at first; RSYNs find the new way, and data takes it as well."""
    hosts = two_paths(lab)
    rule = "oifname eth1 meta l4proto { 144, tcp } drop; iifname eth1 meta l4proto { 144, tcp } drop;"
    table = f"table ip middlebox {{ chain forward {{ type filter hook forward priority 0; {rule} }}; }};"
    hosts[2].run(["nft", "-f", "-"], input=table)
    sal = replace(QUICK, migration_retransmissions=8)
    with StackThread(hosts[0], sal=sal) as client, StackThread(hosts[1], sal=sal) as server:
        ends = Ends(hosts, client, server)
        transfers = Transfer(ends.near, ends.far), Transfer(ends.far, ends.near)
        wait_for(lambda: framings(ends) == {"native"}, "native data")
        assert ends.near_mover.move(ends.near_id, "eth1")["event"] == "flow_migrated"
        wait_for(lambda: framings(ends) == {"udp"}, "data inside UDP")
        before = [each.received_bytes for each in transfers]
        wait_for(lambda: all(each.received_bytes > b for each, b in zip(transfers, before, strict=True)), "data")
        for transfer in transfers:
            assert transfer.finish() > 0
        ends.close()
