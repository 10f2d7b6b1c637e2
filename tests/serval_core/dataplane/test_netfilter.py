"""Our rules in the kernel's firewall: there when they are needed, and only then."""

from __future__ import annotations

import json
import sys

from lab.hosts import Host, Lab
from serval_core.dataplane import netfilter
from tests.serval_core.stack_thread import StackThread, exchange

SERVICE = "76568"
# A firewall that takes what it did not see from its SYN on for an attack.
STRICT = """
table inet firewall {
  chain input { type filter hook input priority 0; policy accept; ct state invalid counter drop; }
  chain output { type filter hook output priority 0; policy accept; ct state invalid counter drop; }
}
"""
SAY_SOMETHING = "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 9))"


def our_tables(host: Host) -> set[str]:
    """Families of the tables that are named like ours."""
    listed = json.loads(host.run(["nft", "-j", "list", "tables"]).stdout)["nftables"]
    return {item["table"]["family"] for item in listed if item.get("table", {}).get("name") == "serval"}


def test_segments_bypass_connection_tracking_where_there_is_any(lab: Lab) -> None:
    near, far = lab.host("near"), lab.host("far")
    lab.connect(near, "10.1.0.1/24", far, "10.1.0.2/24")
    near.run(["nft", "-f", "-"], input=STRICT)
    near.sysctl("net.netfilter.nf_conntrack_tcp_loose", 0)
    with StackThread(near) as client, StackThread(far) as server:
        assert [our_tables(near), our_tables(far)] == [{"netdev"}, {"netdev"}]
        listener = server.listen(SERVICE)
        client.forward(SERVICE, "10.1.0.2")
        exchange(client.connect(SERVICE), listener.accept(), 3_000_000, 3_000_000)
        assert [our_tables(near), our_tables(far)] == [{"netdev", "ip"}, {"netdev"}]
    assert near.run(["nft", "list", "ruleset"]).stdout.count("counter packets 0 ") == 2
    assert [our_tables(near), our_tables(far)] == [set(), set()]


def test_looks_for_tracked_connections_once_a_second_at_most(lab: Lab) -> None:
    host = lab.host("host")
    rules = netfilter.NetfilterRules("lo", "lo", "192.0.2.1")
    host.run(["nft", "-f", "-"], input=STRICT)
    host.call(rules.connection_begins, 10.0)
    assert our_tables(host) == set(), "nothing is tracked yet"
    host.run([sys.executable, "-c", SAY_SOMETHING])
    host.call(rules.connection_begins, 10.9)
    assert our_tables(host) == set()
    host.call(rules.connection_begins, 11.0)
    assert our_tables(host) == {"ip"}
    assert host.call(rules.remove) == ["nft table ip serval"]
