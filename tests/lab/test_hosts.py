"""Do the laboratory's hosts behave like hosts, and is nothing left of them afterwards?"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from lab.hosts import CommandFailed, Host, Lab, remove_leftovers, shape, unshape
from lab.waiting import NeverHappened, wait_for

IP_UDP_HEADER_BYTES = 28
IP_MTU_DISCOVER, IP_PMTUDISC_DO = 10, 2  # linux/in.h; Python 3.11 has no names for them

NAMESPACES = Path("/run/netns")


def namespaces() -> set[str]:
    """Those of this process: other labs may come and go meanwhile."""
    names = {line.split()[0] for line in subprocess.check_output(["ip", "netns"], text=True).splitlines()}
    return {name for name in names if f".{os.getpid()}." in name}


def pair(lab: Lab) -> tuple[Host, Host]:
    left, right = lab.host("left"), lab.host("right")
    lab.connect(left, "10.1.0.1/24", right, "10.1.0.2/24")
    return left, right


def reaches(source: Host, address: str) -> bool:
    """A refused connection is an answer; silence and "unreachable" are none."""
    try:
        source.call(socket.create_connection, (address, 9), 1).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return True


def test_two_hosts_reach_each_other_and_keep_their_own_devices(lab: Lab) -> None:
    left, right = pair(lab)
    assert reaches(left, right.address())
    assert reaches(right, left.address())
    assert re.findall(r"^\d+: (\w+)", left.run(["ip", "link"]).stdout, re.MULTILINE) == ["lo", "eth0"]
    assert left.run(["ls", "/sys/class/net"]).stdout.split() == ["eth0", "lo"]


def test_call_runs_inside_the_namespace_and_sockets_stay_there(lab: Lab) -> None:
    left, right = pair(lab)
    server = right.call(socket.create_server, ("10.1.0.2", 4000))
    client = left.call(socket.create_connection, ("10.1.0.2", 4000), 5)
    accepted, (peer, _) = server.accept()
    with server, client, accepted:
        assert peer == "10.1.0.1"
        with pytest.raises(OSError, match="assign"):
            socket.create_server(("10.1.0.2", 4001)).close()
    with pytest.raises(ZeroDivisionError):
        left.call(divmod, 1, 0)


def test_a_router_between_two_networks(lab: Lab) -> None:
    left, middle, right = lab.host("left"), lab.host("middle"), lab.host("right")
    lab.connect(left, "10.1.0.1/24", middle, "10.1.0.254/24")
    lab.connect(middle, "10.2.0.254/24", right, "10.2.0.1/24")
    left.add_route("default", "10.1.0.254")
    right.add_route("default", "10.2.0.254")
    assert middle.address("eth1") == "10.2.0.254"
    assert not reaches(left, "10.2.0.1")
    middle.forward()
    assert reaches(left, "10.2.0.1")


def test_a_switch_joins_many_hosts(lab: Lab) -> None:
    hosts = {lab.host(f"h{n}"): f"10.3.0.{n}/24" for n in range(1, 5)}
    lab.switch("lan", hosts)
    first, *others = hosts
    for other in others:
        assert reaches(first, other.address())


def test_the_mtu_is_what_was_asked_for(lab: Lab) -> None:
    left, right = lab.host("left"), lab.host("right")
    lab.connect(left, "10.1.0.1/24", right, "10.1.0.2/24", mtu=1400)
    sender, receiver = (host.call(socket.socket, socket.AF_INET, socket.SOCK_DGRAM) for host in (left, right))
    with sender, receiver:
        receiver.bind(("10.1.0.2", 4000))
        receiver.settimeout(2)
        sender.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_DO)
        sender.sendto(bytes(1400 - IP_UDP_HEADER_BYTES), ("10.1.0.2", 4000))
        assert len(receiver.recv(2000)) == 1400 - IP_UDP_HEADER_BYTES
        with pytest.raises(OSError, match="too long"):
            sender.sendto(bytes(1401 - IP_UDP_HEADER_BYTES), ("10.1.0.2", 4000))


def test_shaping_is_set_replaced_and_removed(lab: Lab) -> None:
    left, _ = pair(lab)
    shape(left, "eth0", "10mbit")
    shape(left, "eth0", "20mbit")
    assert "rate 20Mbit" in left.run(["tc", "qdisc", "show", "dev", "eth0"]).stdout
    unshape(left, "eth0")
    assert "tbf" not in left.run(["tc", "qdisc", "show", "dev", "eth0"]).stdout


def test_a_failing_command_says_what_it_printed(lab: Lab) -> None:
    with pytest.raises(CommandFailed, match="no-such-device"):
        lab.host("alone").run(["ip", "link", "show", "dev", "no-such-device"])


def test_waiting_for_a_listener_sees_it_and_notices_a_dead_server(lab: Lab) -> None:
    host = lab.host("server")
    server = host.popen([sys.executable, "-m", "http.server", 8000], stderr=subprocess.PIPE)
    host.wait_listening(8000, server)
    assert host.listening_ports() == {8000}
    with pytest.raises(CommandFailed, match="ended with 3"):
        host.wait_listening(8001, host.popen(["sh", "-c", "exit 3"]))
    with pytest.raises(NeverHappened, match="server:8002"):
        host.wait_listening(8002, server, timeout_s=0.05)


def test_nothing_is_left_after_a_lab_not_even_grandchildren() -> None:
    before = namespaces()
    with Lab() as lab:
        host = lab.host("busy")
        shell = host.popen(["sh", "-c", "setsid sleep 1000 & echo $!; wait"], stdout=subprocess.PIPE)
        assert shell.stdout
        grandchild = int(shell.stdout.readline())
        directory = lab.directory
        (directory / "file").write_text("x")
        assert namespaces() - before == {host.namespace}
    assert not namespaces() - before
    assert not Path(f"/proc/{grandchild}").exists() or "Z" in Path(f"/proc/{grandchild}/stat").read_text()
    assert not directory.exists()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lab-")]


def test_an_exception_inside_a_lab_removes_it_too() -> None:
    before = namespaces()
    lab = Lab()
    with pytest.raises(ZeroDivisionError), lab:
        lab.host("one").call(divmod, 1, 0)
    assert not namespaces() - before


def test_what_a_killed_lab_left_is_removed_by_the_next_one_but_a_living_lab_is_kept() -> None:
    program = """
import subprocess, sys
from lab.hosts import Lab
with Lab() as lab:
    host = lab.host("orphan")
    child = host.popen(["sleep", "1000"])
    print(host.namespace, lab.directory, child.pid, flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as victim:
        assert victim.stdout
        namespace, directory, child = victim.stdout.readline().split()
        assert remove_leftovers() == []
        assert (NAMESPACES / namespace).exists()
        os.kill(victim.pid, signal.SIGKILL)
        victim.wait()
    with Lab():
        assert not (NAMESPACES / namespace).exists()
        assert not Path(directory).exists()
        wait_for(
            lambda: not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text(),
            "the orphan's child to end",
        )
