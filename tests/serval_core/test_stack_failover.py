"""Failover on the real kernel: instances that are killed, cut off, filtered or refuse, and connects that do not notice."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from lab.hosts import Host, Lab
from serval_core.names import parse_address
from serval_core.sal_settings import SalSettings
from tests.serval_core.stack_thread import Accepting, StackThread

SERVICE = "76568"
ADDRESSES = {
    "killed": "10.1.0.2",
    "cut off": "10.1.0.3",
    "refuses": "10.1.0.4",
    "filtered": "10.1.0.5",
    "alive": "10.1.0.6",
}

INSTANCE = """
import asyncio
from serval_core.names import parse_service
from serval_core.stack import ServalStack
async def main():
    stack = await ServalStack.start()
    stack.listen(parse_service("76568"), lambda connection: connection.abort())
    print("ready", flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


class Site(NamedTuple):
    """A client that knows five instances, of which the last is the one that will live."""

    lab: Lab
    client_host: Host
    client: StackThread
    hosts: dict[str, Host]
    instances: dict[str, StackThread]
    accepting: dict[str, Accepting]
    doomed: subprocess.Popen[str]


@pytest.fixture
def site(lab: Lab) -> Iterator[Site]:
    client_host = lab.host("client")
    hosts = {name: lab.host(name.replace(" ", "")) for name in ADDRESSES}
    lab.switch("net", {client_host: "10.1.0.1/24", **{hosts[name]: f"{ADDRESSES[name]}/24" for name in hosts}})
    doomed = hosts["killed"].popen([sys.executable, "-c", INSTANCE], stdout=subprocess.PIPE, text=True)
    refusing = SalSettings(refuse_unknown_services=True)
    threads = {name: StackThread(host, sal=refusing) for name, host in hosts.items() if name != "killed"}
    with (
        StackThread(client_host, broadcast=False) as client,
        threads["cut off"],
        threads["refuses"],
        threads["filtered"],
        threads["alive"],
    ):
        accepting = {name: each.listen(SERVICE) for name, each in threads.items()}
        assert doomed.stdout is not None
        assert doomed.stdout.readline() == "ready\n"
        for address in ADDRESSES.values():
            client.forward(SERVICE, address)
        yield Site(lab, client_host, client, hosts, threads, accepting, doomed)
        doomed.kill()
        doomed.wait(10)
        doomed.stdout.close()


def why_down(client: StackThread) -> dict[str, str]:
    """The instances that the client passes over, and why."""
    (entry,) = client.call(client.stack.table.snapshot)
    targets = entry["targets"]
    assert isinstance(targets, list)
    names = {address: name for name, address in ADDRESSES.items()}
    return {names[each["address"]]: each["down"] for each in targets if each["down"]}


def test_no_connect_fails_while_one_instance_lives(site: Site) -> None:
    site.doomed.send_signal(signal.SIGKILL)
    site.doomed.wait(10)
    site.hosts["cut off"].run(["ip", "link", "set", next(iter(site.hosts["cut off"].interfaces)), "down"])
    site.accepting["refuses"].close()
    for command in (
        "add table ip test",
        "add chain ip test out { type filter hook output priority 0; }",
        f"add rule ip test out ip daddr {ADDRESSES['filtered']} drop",
    ):
        site.client_host.run(["nft", command])
    seen: dict[str, str] = {}
    for number in range(60):
        stream = site.client.connect(SERVICE)
        assert stream.connection.peer_address == parse_address(ADDRESSES["alive"])
        stream.socket.sendall(b"%d" % number)
        far = site.accepting["alive"].accept()
        assert far.socket.recv(10) == b"%d" % number
        stream.release()
        far.release()
        seen |= why_down(site.client)
        if len(seen) == 4:
            break
    # A filter and an ICMP error say at once that a host cannot be reached, silence only the second time.
    assert seen == {"killed": "unreachable", "filtered": "unreachable", "refuses": "refused", "cut off": "silent"}
    assert site.client.counters()["syns_undeliverable"] >= 2
