"""servald as a user runs it: configuration, policy, privileges, its end, and many programs at once."""

from __future__ import annotations

import asyncio
import os
import signal
import socket as system
import subprocess
import sys

import pytest
from servald_site import Site

from lab.chain import TranslatorProcess, kernel_traces
from lab.hosts import Host, Lab
from lab.native import SERVAL, SERVALD, bound, hold_many, running, start_servald
from lab.traffic import PROJECT
from lab.waiting import wait_for
from serval_core import aio
from serval_core.stack_socket import StackSocketClient

SERVICE = "76568"
NOBODY = 65534
# The unit's three, and one that lets it read an interpreter that lives in root's home.
CAPABILITIES = "-all,+net_admin,+net_raw,+bpf,+dac_read_search"


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("[stack]\ncongestion = 1\n", "c.toml:2: stack.congestion"),
        ('[[access]]\nservice = "76568"\nbind = ["nosuchuser"]\n', 'c.toml:3: access.bind: this machine has no user "nosuchuser"'),
        ('[[access]]\nservice = "5"\n[[access]]\nservice = "5"\n', "two access rules for 5"),
        ('[[rule]]\nservice = "5"\ntargets = ["10.0.0"]\n', "c.toml:3: rule.targets"),
        ('[registration]\nrouters = ["x"]\n', "c.toml:2: registration.routers"),
        ("[router]\nenabled = 1\n", "c.toml:2: router.enabled"),
    ],
)
def test_wrong_configuration(lab: Lab, text: str, hint: str) -> None:
    file = lab.directory / "c.toml"
    file.write_text(text)
    result = lab.host("h").run([*SERVALD, "--check", "--config", file], cwd=PROJECT, check=False)
    assert result.returncode == 2
    assert hint in result.stderr
    assert len(result.stderr.splitlines()) == 1


POLICY = """
[[access]]
service = "0x0001:16"
bind = ["nobody"]

[[access]]
service = "0x000105:24"
bind = []

[[access]]
service = "99"
connect = ["%root"]
"""

TRYING = """
import os, sys
from serval_core import sockets
os.setgid(65534); os.setuid(int(sys.argv[1]))
try:
    made = getattr(sockets, sys.argv[2])(sys.argv[3])
    print("ok")
except OSError as error:
    print(error.errno, error.strerror)
"""


def test_policy_says_who_may_bind_and_connect(lab: Lab) -> None:
    host = lab.host("policy")
    lab.connect(host, "10.1.0.1/24", lab.host("other"), "10.1.0.2/24")
    file = lab.directory / "policy.toml"
    file.write_text(POLICY + "[timeouts]\nconnect_s = 0.3\n")
    daemon = start_servald(host, lab.directory / "policy.log", "--config", file)

    def attempt(uid: int, call: str, service: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
        return host.run([sys.executable, "-c", TRYING, uid, call, service], env=environment).stdout

    assert attempt(NOBODY, "create_server", "0x000107") == "ok\n"
    assert attempt(NOBODY - 1, "create_server", "0x000107").startswith("13 uid 65533 may not bind to 67328: the access rule for")
    assert "0x000105:24 does not name it" in attempt(NOBODY, "create_server", "0x00010501")
    assert "0x000105:24 does not name it" in attempt(NOBODY, "create_server", "0x0001:16"), "a part of it is somebody else's"
    assert "no access rule lets it" in attempt(NOBODY, "create_server", "5")
    assert attempt(NOBODY, "create_connection", "5").startswith("110 "), "connecting is allowed, and times out"
    assert attempt(NOBODY, "create_connection", "99").startswith("13 uid 65534 may not connect to 99")
    assert attempt(0, "create_server", "5") == "ok\n"
    assert daemon.ask("counters")["native_refused_by_policy"] == 5
    assert daemon.stop() == 0


def test_daemon_with_three_capabilities_of_an_unprivileged_user(lab: Lab) -> None:
    """What the systemd unit gives it; a program of another user is served by it, with a reset by the peer among the rest."""
    near, far = lab.host("near"), lab.host("far")
    lab.connect(near, "10.1.0.1/24", far, "10.1.0.2/24")
    as_user = ["setpriv", "--reuid", NOBODY, "--regid", NOBODY, "--clear-groups"]
    bounded = ["--inh-caps", CAPABILITIES, "--ambient-caps", CAPABILITIES, "--bounding-set", CAPABILITIES]
    state, file = lab.directory / "state", lab.directory / "near.toml"
    state.mkdir(0o700)
    os.chown(state, NOBODY, NOBODY)
    file.write_text(f"[router]\nenabled = true\ndirectory = '{state}/registrations.sqlite'\n")
    file.chmod(0o644)
    daemon = start_servald(
        near, lab.directory / "near.log", "--config", file, command=[*as_user, *bounded, "--no-new-privs", *SERVALD]
    )
    assert (state / "registrations.sqlite").owner() == "nobody"
    assert "reject with tcp reset" in near.run(["nft", "list", "table", "netdev", "serval"]).stdout
    server = start_servald(far, lab.directory / "far.log")
    with running(far, sys.executable, "examples/echo_server.py", SERVICE, serving=SERVICE) as serving:
        connection = near.call(asyncio.run, aio.connect(SERVICE))
        connection.settimeout(10)
        connection.sendall(b"hello")
        assert connection.recv(5) == b"hello"
        os.kill(serving.pid, signal.SIGSTOP)
        connection.sendall(b"never read")
        wait_for(lambda: connection.getsockopt(system.IPPROTO_TCP, system.TCP_INFO, 256)[24:28] == bytes(4), "it was acknowledged")
        os.kill(serving.pid, signal.SIGKILL)
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
        connection.close()
    assert [daemon.stop(), server.stop()] == [0, 0]
    assert [*kernel_traces(near), *kernel_traces(far)] == []


@pytest.mark.parametrize("how", ["restart", "clean up"])
def test_kill_of_the_daemon_ends_the_connections_of_programs(site: Site, how: str) -> None:
    with running(site.far, sys.executable, "examples/echo_server.py", SERVICE, serving=SERVICE):
        connection = site.near.call(asyncio.run, aio.connect(SERVICE))
        connection.settimeout(10)
        connection.sendall(b"x")
        assert connection.recv(1) == b"x"
        site.near_daemon.stop(signal.SIGKILL)
        if how == "clean up":
            site.near.run([*SERVALD, "--clean-up"], cwd=PROJECT)
            assert kernel_traces(site.near) == []
        site.near_daemon = start_servald(site.near, site.directory / "again.log")
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
        connection.close()
        again = site.near.call(asyncio.run, aio.connect(SERVICE))
        again.close()


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_native_server_outlives_its_daemon(site: Site, how: signal.Signals) -> None:
    with running(site.far, sys.executable, "examples/echo_server.py", SERVICE, serving=SERVICE):
        for number in range(2):
            connection = site.near.call(asyncio.run, aio.connect(SERVICE))
            connection.settimeout(10)
            connection.sendall(b"x")
            assert connection.recv(1) == b"x"
            connection.close()
            site.far_daemon.stop(how)
            site.far_daemon = start_servald(site.far, site.directory / f"far-{number}.log")
            wait_for(lambda: bound(site.far, SERVICE), "it is served again", 20)


def test_kill_of_the_daemon_resets_programs_at_their_next_word(site: Site) -> None:
    """Without a successor: one that sends at once, one that only reads when its socket probes the peer."""
    with running(site.far, sys.executable, "examples/echo_server.py", SERVICE, serving=SERVICE):
        sending, reading = (site.near.call(asyncio.run, aio.connect(SERVICE)) for _ in range(2))
        for each in (sending, reading):
            each.settimeout(20)
            each.sendall(b"x")
            assert each.recv(1) == b"x"
        site.near_daemon.stop(signal.SIGKILL)
        sending.sendall(b"x")
        with pytest.raises(ConnectionResetError):
            sending.recv(1)
        reading.setsockopt(system.IPPROTO_TCP, system.TCP_KEEPIDLE, 1)
        with pytest.raises(ConnectionResetError):
            reading.recv(1)
        sending.close()
        reading.close()
    site.near_daemon = start_servald(site.near, site.directory / "again.log")


def test_end_of_the_daemon_unregisters_and_resets(site: Site) -> None:
    with running(site.far, sys.executable, "examples/echo_server.py", SERVICE, serving=SERVICE):
        connection = site.near.call(asyncio.run, aio.connect(SERVICE))
        connection.settimeout(10)
        assert site.far_daemon.stop() == 0
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
        connection.close()
        assert kernel_traces(site.far) == []
    site.far_daemon = start_servald(site.far, site.directory / "again.log")


def test_program_that_is_killed_is_unregistered_at_once(site: Site) -> None:
    """Not when its registration expires: the router forgets it because it was told to."""
    site.near_daemon.stop()
    site.near_daemon = start_servald(site.near, site.directory / "router.log", "--router")

    def registered() -> list[str]:
        return [each["prefix"] for each in site.near.call(StackSocketClient(5).request, "registrations")["received"]]

    with running(site.far, sys.executable, "examples/echo_server.py", SERVICE, serving=SERVICE) as program:
        wait_for(lambda: registered() == [SERVICE], "the registration", 30)
        program.kill()
        wait_for(lambda: registered() == [], "its end", 30)
    counters = site.near.call(StackSocketClient(5).request, "controller_counters")
    assert counters["router_unregistered"] == 1
    assert "router_expired" not in counters


ACTIVATED = 'LISTEN_PID=$$ exec "$@" 3<&0 </dev/null'


def test_started_by_the_service_manager(lab: Lab) -> None:
    """A socket that was opened before servald: a program that came too early is served. Readiness is told."""
    host = lab.host("activated")
    lab.connect(host, "10.1.0.1/24", lab.host("other"), "10.1.0.2/24")

    def listening() -> system.socket:
        made = system.socket(system.AF_UNIX, system.SOCK_SEQPACKET)
        made.bind("\0serval-sockets")
        made.listen()
        return made

    listener = host.call(listening)
    notified = system.socket(system.AF_UNIX, system.SOCK_DGRAM)
    notified.bind(str(lab.directory / "notify"))
    notified.settimeout(20)
    with listener, notified, running(host, *SERVAL, "tcp-server", "-s", SERVICE):
        environment = {**os.environ, "LISTEN_FDS": "1", "NOTIFY_SOCKET": str(lab.directory / "notify")}
        command = ["sh", "-c", ACTIVATED, "sh", *SERVALD]
        daemon = host.popen(command, cwd=PROJECT, env=environment, stdin=listener.fileno(), stderr=subprocess.DEVNULL)
        assert notified.recv(100) == b"READY=1"
        wait_for(lambda: bound(host, SERVICE), "the program that waited is served", 20)
        daemon.kill()
        daemon.wait(20)
        daemon = host.popen(command, cwd=PROJECT, env=environment, stdin=listener.fileno(), stderr=subprocess.DEVNULL)
        assert notified.recv(100) == b"READY=1"
        wait_for(lambda: bound(host, SERVICE), "the program waited for the next daemon, too", 20)
        daemon.terminate()
        assert notified.recv(100) == b"STOPPING=1"
        assert daemon.wait(20) == 0



def more_files(daemon: TranslatorProcess, before: dict[str, int]) -> bool:
    return any(count > before.get(kind, 0) for kind, count in daemon.descriptors().items())


def test_500_connections_at_once_leave_nothing(site: Site) -> None:
    with running(site.far, sys.executable, "examples/echo_server.py", SERVICE, serving=SERVICE):
        site.near.call(asyncio.run, hold_many(SERVICE, 1))
        site.assert_nothing_left()
        daemons = site.near_daemon, site.far_daemon
        before = [daemon.descriptors() for daemon in daemons]
        site.near.call(asyncio.run, hold_many(SERVICE, 500))
        site.assert_nothing_left()
        for daemon, files in zip(daemons, before, strict=True):
            wait_for(lambda daemon=daemon, files=files: not more_files(daemon, files), "no descriptor is left")


def test_asyncio_says_why_it_could_not_connect(lab: Lab) -> None:
    host: Host = lab.host("lonely")
    daemon = start_servald(host, lab.directory / "lonely.log")
    with pytest.raises(OSError, match=r"no rule|no way|unreachable|rule") as caught:
        host.call(asyncio.run, aio.connect("5"))
    assert caught.value.errno
    assert daemon.stop() == 0
