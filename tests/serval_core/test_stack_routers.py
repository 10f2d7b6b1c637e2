"""Service routers on the real kernel: a client, two routers, servers on one LAN; both ways of forwarding, nothing left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import pytest

from bench.router import syn_packet
from lab.hosts import Lab
from lab.waiting import wait_for
from serval_core.dataplane.kernel import DataPlaneSettings
from serval_core.names import parse_address, parse_service
from serval_core.rules import Rule, RuleType
from serval_core.sal_settings import SalSettings
from serval_core.wire import ipv4, sal
from tests.serval_core.stack_thread import StackThread, send_in_background
from tests.serval_core.test_stack import assert_no_traces

SERVICE = "76568"
TIMES = SalSettings(connect_timeout_s=2.0, time_wait_s=0.2, fin_wait2_s=0.5)
ROUTING = SalSettings(connect_timeout_s=2.0, time_wait_s=0.2, fin_wait2_s=0.5, forwarding=True)
ADDRESSES = {
    "client": "10.1.0.1",
    "first": "10.1.0.11",
    "second": "10.1.0.12",
    "left": "10.1.0.21",
    "right": "10.1.0.22",
}


@dataclass
class World:
    """The stacks, by host name; a rule leads from the client over the first to the second router."""

    stacks: dict[str, StackThread]
    counter: str

    def forwarded(self, router: str) -> int:
        return self.stacks[router].counters()[self.counter]


@pytest.fixture(params=["forwarded_in_kernel", "forwarded_in_batches"])
def world(lab: Lab, request: pytest.FixtureRequest) -> Iterator[World]:
    hosts = {name: lab.host(name) for name in ADDRESSES}
    lab.switch("lan", {host: f"{ADDRESSES[name]}/24" for name, host in hosts.items()})
    in_kernel = DataPlaneSettings(forward_in_kernel=request.param == "forwarded_in_kernel")
    with ExitStack() as stacks:
        running = {
            name: stacks.enter_context(
                StackThread(
                    host,
                    sal=ROUTING if name in ("first", "second") else TIMES,
                    broadcast=False,
                    dataplane=in_kernel,
                )
            )
            for name, host in hosts.items()
        }
        running["client"].forward(SERVICE, ADDRESSES["first"])
        running["first"].forward(SERVICE, ADDRESSES["second"])
        yield World(running, request.param)
    for host in hosts.values():
        assert_no_traces(host)


def exchange(client: StackThread, server: StackThread, accepting: object) -> None:
    """A transfer over a new connection, compared by hash."""
    stream = client.connect(SERVICE)
    accepted = accepting.accept()  # type: ignore[attr-defined]
    sent = send_in_background(stream, 300_000)
    assert accepted.receive_all() == sent()
    assert accepted.connection.service_id == parse_service(SERVICE).service_id
    stream.release()
    accepted.release()


def test_connections_through_two_routers(world: World) -> None:
    """SYNs take both routers, everything else is direct; the next hop's MAC address is unknown at first."""
    client, second, server = (world.stacks[name] for name in ("client", "second", "left"))
    second.forward(SERVICE, ADDRESSES["left"])
    accepting = server.listen(SERVICE)
    for _ in range(5):
        exchange(client, server, accepting)
    assert [world.forwarded(router) for router in ("first", "second")] == [5, 5]
    (rule,) = second.call(second.stack.table.snapshot)
    (target,) = rule["targets"]  # type: ignore[attr-defined]
    assert target["packets_resolved"] == 5
    assert all(flow["peer_address"] == ADDRESSES["left"] for flow in client.flows())


def test_rules_and_marks_are_followed_at_once(world: World) -> None:
    client, first, second = (world.stacks[name] for name in ("client", "first", "second"))
    service = parse_service(SERVICE)
    accepting = {name: world.stacks[name].listen(SERVICE) for name in ("left", "right")}

    def reached() -> str:
        stream = client.connect(SERVICE)
        wait_for(lambda: any(each.waiting() for each in accepting.values()), "the server's end")
        (name,) = (name for name, each in accepting.items() if each.waiting())
        accepting[name].accept().release()
        stream.release()
        return name

    second.forward(SERVICE, ADDRESSES["left"])
    assert reached() == "left"
    second.call(
        lambda: second.stack.table.add(Rule.forward(service, parse_address(ADDRESSES["right"]), priority=2))
    )
    assert reached() == "right"
    down = second.call(lambda: second.stack.table.mark_down(parse_address(ADDRESSES["right"]), 1e12))
    assert (down, reached()) == (1, "left")
    second.call(lambda: second.stack.table.mark_up(parse_address(ADDRESSES["right"])))
    assert reached() == "right"
    second.call(
        lambda: second.stack.table.remove_rule(service, RuleType.FORWARD, parse_address(ADDRESSES["right"]))
    )
    assert reached() == "left"
    first.call(lambda: setattr(first.stack, "forwarding", False))
    before = world.forwarded("second")
    with pytest.raises(OSError, match="no answer"):
        client.connect(SERVICE)
    first.call(lambda: setattr(first.stack, "forwarding", True))
    assert reached() == "left"
    assert world.forwarded("second") >= before


def test_split_and_counters(world: World) -> None:
    client, second = world.stacks["client"], world.stacks["second"]
    accepting = {name: world.stacks[name].listen(SERVICE) for name in ("left", "right")}
    service = parse_service(SERVICE)
    for name, weight in (("left", 3), ("right", 1)):
        rule = Rule.forward(service, parse_address(ADDRESSES[name]), weight=weight)
        second.call(lambda rule=rule: second.stack.table.add(rule))  # type: ignore[misc]
    streams = [client.connect(SERVICE) for _ in range(60)]
    wait_for(lambda: sum(each.waiting() for each in accepting.values()) == 60, "the servers' ends")
    chosen = Counter({name: each.waiting() for name, each in accepting.items()})
    assert 30 < chosen["left"] < 58  # 45, within 4.4 standard deviations
    second.counters()
    (rule_shown,) = second.call(second.stack.table.snapshot)
    counted = {target["address"]: target["packets_resolved"] for target in rule_shown["targets"]}  # type: ignore[attr-defined]
    assert counted == {ADDRESSES[name]: count for name, count in chosen.items()}
    for stream in streams:
        stream.abort()


CRASHING = """
import asyncio
from serval_core.names import parse_address, parse_service
from serval_core.rules import Rule
from serval_core.sal_settings import SalSettings
from serval_core.stack import ServalStack, StackSettings
async def main():
    stack = await ServalStack.start(StackSettings(SalSettings(forwarding=True)))
    stack.table.add(Rule.forward(parse_service("76568"), parse_address("10.2.0.2")))
    print("ready", flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


class Path:
    """client 10.1.0.1 - 10.1.0.254 router 10.2.0.254 - 10.2.0.2 sink, all without a stack; the router forwards IP as well."""

    def __init__(self, lab: Lab) -> None:
        self.client, self.router, self.sink = lab.host("client"), lab.host("router"), lab.host("sink")
        lab.connect(self.client, "10.1.0.1/24", self.router, "10.1.0.254/24")
        lab.connect(self.router, "10.2.0.254/24", self.sink, "10.2.0.2/24")
        self.client.add_route("default", "10.1.0.254")
        self.router.forward()
        self._raw = self.client.call(socket.socket, socket.AF_INET, socket.SOCK_RAW, sal.PROTOCOL_SAL)
        self._udp = self.client.call(socket.socket, socket.AF_INET, socket.SOCK_DGRAM)
        self._arrived = self.sink.call(
            socket.socket, socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x0800)
        )
        self._arrived.settimeout(10)
        self._fences = 0

    def close(self) -> None:
        for each in (self._raw, self._udp, self._arrived):
            each.close()

    def send_syn(self) -> None:
        """A SYN for the service, to the router."""
        self._raw.sendto(ipv4.parse(syn_packet("10.1.0.254")).payload, ("10.1.0.254", 0))

    def syn_arrives(self) -> bool:
        """Whether the sink gets a SYN that is sent now: between one fence and the next."""
        self._fence()
        self.send_syn()
        return self._fence()

    def _fence(self) -> bool:
        """Send something through and wait for it; whether a SAL packet came before it."""
        self._fences += 1
        fence = b"fence %d" % self._fences
        self._udp.sendto(fence, ("10.2.0.2", 9))
        seen = False
        while not (packet := self._arrived.recv(2000)).endswith(fence):
            seen = seen or packet[9] == sal.PROTOCOL_SAL
        return seen


@pytest.fixture
def path(lab: Lab) -> Iterator[Path]:
    path = Path(lab)
    yield path
    path.close()


def test_nothing_of_a_crashed_router_goes_on(path: Path) -> None:
    crashing = path.router.popen([sys.executable, "-c", CRASHING], stdout=subprocess.PIPE)
    assert crashing.stdout
    assert crashing.stdout.readline() == "ready\n"
    wait_for(path.syn_arrives, "a SYN to be forwarded")
    os.kill(crashing.pid, signal.SIGKILL)
    crashing.wait()
    with StackThread(path.router, sal=TIMES):
        assert not path.syn_arrives()
    assert not path.syn_arrives()
    assert_no_traces(path.router)


def forwards_in(router: StackThread, path: Path, counter: str) -> bool:
    """Whether a SYN that is sent now is forwarded that way."""
    before = router.counters()
    path.send_syn()

    def forwarded() -> bool:
        now = router.counters()
        return any(now[name] > before[name] for name in ("forwarded_in_kernel", "forwarded_in_batches"))

    wait_for(forwarded, "the SYN to be forwarded")
    return router.counters()[counter] > before[counter]


def test_program_follows_the_interfaces(path: Path) -> None:
    with StackThread(path.router, sal=ROUTING) as router:
        router.forward(SERVICE, "10.2.0.2")
        assert forwards_in(router, path, "forwarded_in_kernel")
        for state in ("down", "up"):
            path.router.run(["ip", "link", "set", "eth0", state])
        path.client.add_route("default", "10.1.0.254")
        wait_for(lambda: forwards_in(router, path, "forwarded_in_kernel"), "the program to be there again")
        router.call(lambda: setattr(router.stack, "forwarding", False))
        assert not path.syn_arrives()
    assert_no_traces(path.router)


def test_strict_reverse_path_is_left_to_the_kernel(path: Path) -> None:
    """What the kernel would refuse for its source address must not get past it."""
    path.router.sysctl("net.ipv4.conf.eth0.rp_filter", 1)
    with StackThread(path.router, sal=ROUTING) as router:
        router.forward(SERVICE, "10.2.0.2")
        assert forwards_in(router, path, "forwarded_in_batches")
    assert_no_traces(path.router)


def test_target_behind_another_route(path: Path) -> None:
    """The way to a target changes: it gets its SYNs through the new one."""
    with StackThread(path.router, sal=ROUTING) as router:
        router.forward(SERVICE, "10.9.0.9")
        path.send_syn()
        wait_for(lambda: router.counters()["forwarding_without_target"], "the SYN that has no way")
        path.router.add_route("10.9.0.0/24", "10.2.0.2")
        wait_for(path.syn_arrives, "a SYN on the new way")
