"""Is data that was lost with a path repeated before TCP's timer has run out, and only then?"""

from __future__ import annotations

from lab.hosts import Lab
from lab.waiting import wait_for
from tests.serval_core.stack_thread import StackThread
from tests.serval_core.test_migration_kernel import QUICK, Ends
from tests.serval_core.two_paths import Transfer, cut, two_paths

TRIES = 20  # on a busy machine the timer may be faster


def test_what_was_under_way_on_a_broken_path_is_repeated(lab: Lab) -> None:
    """The sender moves after its path was cut."""
    hosts = two_paths(lab)
    with StackThread(hosts[0], sal=QUICK) as client, StackThread(hosts[1], sal=QUICK) as server:
        ends = Ends(hosts, client, server)
        transfer = Transfer(ends.near, ends.far)
        for number in range(TRIES):
            before = transfer.received_bytes
            wait_for(lambda before=before: transfer.received_bytes > before + 1_000_000, "data")
            cut(hosts[2], ("eth0", "eth1")[number % 2])
            assert ends.near_mover.move(ends.near_id, ("eth1", "eth0")[number % 2])["event"] == "flow_migrated"
            before = transfer.received_bytes
            wait_for(lambda before=before: transfer.received_bytes > before + 1_000_000, "data on the other path")
            hosts[2].run(["nft", "delete", "table", "ip", "cut"])
            if client.counters()["repeated_after_moves"]:
                break
        assert client.counters()["repeated_after_moves"] > 0
        assert transfer.finish() > 0
        ends.close()
        assert not client.stack._streams.lost_with_path._waiting


def test_an_idle_flow_repeats_nothing(lab: Lab) -> None:
    hosts = two_paths(lab)
    with StackThread(hosts[0], sal=QUICK) as client, StackThread(hosts[1], sal=QUICK) as server:
        ends = Ends(hosts, client, server)
        for interface in ("eth1", "eth0", "eth1"):
            ends.near_mover.move(ends.near_id, interface)
        assert not client.stack._streams.lost_with_path._waiting
        assert client.counters()["repeated_after_moves"] == 0
        transfer = Transfer(ends.near, ends.far)
        assert transfer.finish() >= 0
        ends.close()
