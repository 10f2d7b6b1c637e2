"""The embedded stack on the real kernel: two hosts, a wire, data compared by hash, nothing left behind."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest

from lab.hosts import Host, Lab
from lab.waiting import wait_for
from serval_core.dataplane.devices import OWN_DEVICES
from serval_core.dataplane.kernel import DataPlaneSettings
from serval_core.errors import KernelRefused
from serval_core.names import parse_service
from serval_core.rules import Rule
from serval_core.sal_settings import SalSettings
from serval_core.stack_socket_server import StackBusy
from tests.serval_core.stack_thread import StackThread, Stream, assert_idle, exchange, send_in_background

SERVICE = "76568"
QUICK = SalSettings(connect_timeout_s=1.0, time_wait_s=0.2, fin_wait2_s=0.5)


@pytest.fixture
def wire(lab: Lab) -> tuple[Host, Host]:
    """Client and server, one wire."""
    client, server = lab.host("client"), lab.host("server")
    lab.connect(client, "10.1.0.1/24", server, "10.1.0.2/24")
    return client, server


@pytest.fixture
def stacks(wire: tuple[Host, Host]) -> Iterator[tuple[StackThread, StackThread]]:
    with StackThread(wire[0], sal=QUICK) as client, StackThread(wire[1], sal=QUICK) as server:
        yield client, server
    for host in wire:
        assert_no_traces(host)


def assert_no_traces(host: Host) -> None:
    names = {
        link.split(":")[1].split("@")[0].strip()
        for link in host.run(["ip", "-o", "link"]).stdout.splitlines()
    }
    assert not names & OWN_DEVICES
    for interface in [*host.interfaces, "lo"]:
        assert "clsact" not in host.run(["tc", "qdisc", "show", "dev", interface]).stdout
    assert "100.126" not in host.run(["ip", "route", "show", "table", "all"]).stdout
    assert "serval" not in host.run(["nft", "list", "tables"]).stdout


def test_transfer_with_nothing_configured(stacks: tuple[StackThread, StackThread]) -> None:
    """The default rule broadcasts; the instance answers; data flows both ways; everything is closed in the end."""
    client, server = stacks
    listener = server.listen(SERVICE)
    near = client.connect(SERVICE)
    exchange(near, listener.accept(), 20_000_000, 5_000_000)
    assert_idle(client, server)


def test_listener_on_a_prefix_learns_the_exact_service(stacks: tuple[StackThread, StackThread]) -> None:
    client, server = stacks
    listener = server.listen("0xabcd:16")
    near = client.connect("0xabcd0123")
    far = listener.accept()
    assert far.connection.service_id == parse_service("0xabcd0123").service_id
    exchange(near, far, 1000, 1000)


def test_forward_rule_goes_to_its_address(lab: Lab) -> None:
    """Two servers offer the service; the client's rule names one of them."""
    client, first, second = lab.host("client"), lab.host("first"), lab.host("second")
    lab.switch("switch", {client: "10.1.0.1/24", first: "10.1.0.2/24", second: "10.1.0.3/24"})
    with StackThread(client) as near, StackThread(first) as left, StackThread(second) as right:
        listeners = left.listen(SERVICE), right.listen(SERVICE)
        near.forward(SERVICE, "10.1.0.3")
        for _ in range(5):
            stream = near.connect(SERVICE)
            exchange(stream, listeners[1].accept(), 10, 10)
        assert listeners[0].waiting() == 0


def test_across_a_router(lab: Lab) -> None:
    client, router, server = lab.host("client"), lab.host("router"), lab.host("server")
    lab.connect(client, "10.1.0.1/24", router, "10.1.0.254/24")
    lab.connect(router, "10.2.0.254/24", server, "10.2.0.1/24")
    router.forward()
    client.add_route("10.2.0.0/24", "10.1.0.254")
    server.add_route("10.1.0.0/24", "10.2.0.254")
    with StackThread(client) as near, StackThread(server) as far:
        listener = far.listen(SERVICE)
        stream = near.connect(SERVICE, destination="10.2.0.1")
        exchange(stream, listener.accept(), 3_000_000, 3_000_000)


def test_client_and_server_on_one_stack(lab: Lab) -> None:
    host = lab.host("alone")
    with StackThread(host) as stack:
        listener = stack.listen(SERVICE)
        near = stack.connect(SERVICE)
        exchange(near, listener.accept(), 5_000_000, 5_000_000)
        assert_idle(stack)
    assert_no_traces(host)


def test_half_close_leaves_the_other_direction_open(stacks: tuple[StackThread, StackThread]) -> None:
    client, server = stacks
    listener = server.listen(SERVICE)
    near = client.connect(SERVICE)
    far = listener.accept()
    question = near.send_random(10)
    assert far.receive_all() == question
    wait_for(lambda: client.flows()[0]["state"] == "FINWAIT2", "the SAL closed one direction")
    answer = send_in_background(far, 3_000_000)
    assert near.receive_all() == answer()
    near.release()
    far.release()
    assert_idle(client, server)


@pytest.mark.parametrize("aborting", ["client", "server"])
def test_abort_reaches_the_other_end_as_a_reset(
    stacks: tuple[StackThread, StackThread], aborting: str
) -> None:
    client, server = stacks
    listener = server.listen(SERVICE)
    ends = {"client": client.connect(SERVICE), "server": listener.accept()}
    other = ends["server" if aborting == "client" else "client"]
    ends[aborting].abort()
    with pytest.raises(ConnectionResetError):
        other.socket.recv(1)
    assert other.ended.get(timeout=10) == errno.ECONNRESET
    other.release()
    assert_idle(client, server)


def test_close_with_unread_data_is_a_reset(stacks: tuple[StackThread, StackThread]) -> None:
    """The kernel's own RST leaves and the SAL's follows."""
    client, server = stacks
    listener = server.listen(SERVICE)
    near, far = client.connect(SERVICE), listener.accept()
    near.socket.sendall(b"never read")
    wait_for(lambda: far.connection.counters().packets_in > 0, "the data arrived")
    far.abort()
    with pytest.raises(ConnectionResetError):
        near.receive_all()
    near.release()
    assert_idle(client, server)


def test_unknown_service_fails_after_the_timeout(stacks: tuple[StackThread, StackThread]) -> None:
    client, server = stacks
    with pytest.raises(TimeoutError) as caught:
        client.connect("99")
    assert caught.value.errno == errno.ETIMEDOUT
    assert server.counters()["dropped_no_listener"] > 1
    assert_idle(client, server)


def test_no_rule_and_drop_rule_fail_at_once(wire: tuple[Host, Host]) -> None:
    with StackThread(wire[0], broadcast=False) as client:
        with pytest.raises(OSError, match="no rule") as caught:
            client.connect(SERVICE)
        assert caught.value.errno == errno.EADDRNOTAVAIL
        client.call(lambda: client.stack.table.add(Rule.drop(parse_service(SERVICE))))
        with pytest.raises(OSError, match="DROP") as caught:
            client.connect(SERVICE)
        assert caught.value.errno == errno.EHOSTUNREACH


def test_service_that_appears_while_connecting(stacks: tuple[StackThread, StackThread]) -> None:
    client, server = stacks
    outcome = client.begin_connect(SERVICE)
    wait_for(lambda: server.counters().get("dropped_no_listener", 0) > 0, "the first SYN came too early")
    listener = server.listen(SERVICE)
    near = outcome.get(timeout=10)
    assert isinstance(near, Stream)
    exchange(near, listener.accept(), 100, 100)


def test_interface_that_appears_later_is_used(lab: Lab) -> None:
    client, server = lab.host("client"), lab.host("server")
    with StackThread(client) as near, StackThread(server) as far:
        listener = far.listen(SERVICE)
        near.forward(SERVICE, "10.1.0.2")
        outcome = near.begin_connect(SERVICE)
        lab.connect(client, "10.1.0.1/24", server, "10.1.0.2/24")
        stream = outcome.get(timeout=15)
        assert isinstance(stream, Stream)
        exchange(stream, listener.accept(), 1_000_000, 1_000_000)


def test_refusal_of_the_kernel_is_told_to_whoever_connects(wire: tuple[Host, Host]) -> None:
    """An unknown congestion control: the transport cannot be created, on the client's side and on the server's."""
    unknown = DataPlaneSettings(congestion_control="nosuch")
    with StackThread(wire[0], sal=QUICK, dataplane=unknown) as client, StackThread(wire[1], sal=QUICK) as server:
        server.listen(SERVICE)
        with pytest.raises(FileNotFoundError):  # ENOENT is what TCP_CONGESTION says
            client.connect(SERVICE)
        assert_idle(client)
    with StackThread(wire[0], sal=QUICK) as client, StackThread(wire[1], sal=QUICK, dataplane=unknown) as server:
        listener = server.listen(SERVICE)
        stream = client.connect(SERVICE)
        assert stream.ended.get(timeout=10) == errno.ECONNRESET
        stream.release()
        assert listener.waiting() == 0
        assert_idle(client, server)


def test_a_failing_callback_costs_nobody_else_anything(stacks: tuple[StackThread, StackThread]) -> None:
    client, server = stacks
    listener = server.listen(SERVICE)
    reported: queue.Queue[dict[str, object]] = queue.Queue()

    def provoke() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.put(context))
        client.stack.connect(parse_service(SERVICE).service_id, lambda _: 1 // 0, lambda *_: None)

    client.call(provoke)
    assert isinstance(reported.get(timeout=10)["exception"], ZeroDivisionError)
    listener.accept()
    exchange(client.connect(SERVICE), listener.accept(), 100, 100)


def test_next_hop_that_changes_its_mac_address_is_followed(stacks: tuple[StackThread, StackThread]) -> None:
    """Reachable, stale, replaced (as after the failover of a gateway), unknown: data keeps arriving in each state."""
    client, server = stacks
    listener = server.listen(SERVICE)
    near, far = client.connect(SERVICE), listener.accept()
    new_mac = "02:00:00:00:00:77"

    def move() -> None:
        server.host.run(["ip", "link", "set", "eth0", "address", new_mac])
        client.host.run(["ip", "neigh", "replace", "10.1.0.2", "lladdr", new_mac, "dev", "eth0", "nud", "reachable"])

    changes: list[Callable[[], object]] = [
        lambda: None,
        lambda: client.host.run(["ip", "neigh", "change", "10.1.0.2", "dev", "eth0", "nud", "stale"]),
        move,
        lambda: client.host.run(["ip", "neigh", "flush", "dev", "eth0"]),
    ]
    for change in changes:
        change()
        payload = os.urandom(200_000)
        sender = threading.Thread(target=near.socket.sendall, args=(payload,))
        sender.start()
        received = b""
        while len(received) < len(payload):
            received += far.socket.recv(65536)
        sender.join()
        assert received == payload
    near.abort()
    far.release()


def test_many_connections_leave_nothing(stacks: tuple[StackThread, StackThread]) -> None:
    client, server = stacks
    listener = server.listen(SERVICE)
    gc.collect()  # sockets of earlier tests
    descriptors = len(os.listdir("/proc/self/fd"))
    for _ in range(100):
        near = client.connect(SERVICE)
        exchange(near, listener.accept(), 100, 100)
    outcomes = [client.begin_connect(SERVICE) for _ in range(100)]
    streams = [outcome.get(timeout=20) for outcome in outcomes]
    for stream in streams:
        assert isinstance(stream, Stream)
        stream.abort()
    for _ in range(100):
        listener.accept().release()
    assert_idle(client, server)
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_second_stack_in_a_namespace_is_refused(wire: tuple[Host, Host]) -> None:
    with StackThread(wire[0]), pytest.raises(StackBusy, match=str(os.getpid())), StackThread(wire[0]):
        pass


CRASHING = """
import asyncio, sys
from serval_core.names import parse_service
from serval_core.stack import ServalStack

async def main():
    stack = await ServalStack.start()
    stack.listen(parse_service("76568"), lambda connection: None)
    print("ready", flush=True)
    await asyncio.sleep(3600)

asyncio.run(main())
"""


def test_start_after_a_crash_removes_what_was_left(wire: tuple[Host, Host]) -> None:
    client, server = wire
    crashing = server.popen([sys.executable, "-c", CRASHING], stdout=subprocess.PIPE)
    assert crashing.stdout is not None
    assert crashing.stdout.readline() == "ready\n"
    os.kill(crashing.pid, signal.SIGKILL)
    crashing.wait()
    assert "serval0" in server.run(["ip", "-o", "link"]).stdout
    with StackThread(client) as near, StackThread(server) as far:
        listener = far.listen(SERVICE)
        stream = near.connect(SERVICE)
        exchange(stream, listener.accept(), 1000, 1000)
    assert_no_traces(server)


def test_without_privilege_the_refusal_says_what_to_do(wire: tuple[Host, Host]) -> None:
    """Root without CAP_NET_ADMIN, as in an unprivileged container."""
    setpriv = ["setpriv", "--bounding-set", "-net_admin", "--inh-caps", "-net_admin"]
    result = wire[0].run([*setpriv, sys.executable, "-c", CRASHING], check=False)
    assert KernelRefused.__name__ in result.stderr
    assert "CAP_NET_ADMIN" in result.stderr
    assert_no_traces(wire[0])
