"""servald, `serval` and native programs as a user runs them, on two hosts."""

from __future__ import annotations

import asyncio
import datetime
import hashlib
import json
import os
import signal
import socket as system
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from lab.chain import TranslatorProcess, kernel_traces
from lab.hosts import Host, Lab
from lab.native import SERVAL, SERVALD, bound, left_over, running, serval, serval_json, start_servald
from lab.traffic import PROJECT
from lab.waiting import wait_for
from serval_core import aio

SERVICE = "76568"
NOBODY = 65534
# The unit's three, and one that lets it read an interpreter that lives in root's home.
CAPABILITIES = "-all,+net_admin,+net_raw,+bpf,+dac_read_search"


class Site:
    """Two hosts with a servald each."""

    def __init__(self, lab: Lab) -> None:
        self.directory = lab.directory
        self.near, self.far = lab.host("near"), lab.host("far")
        lab.connect(self.near, "10.1.0.1/24", self.far, "10.1.0.2/24")
        self.near_daemon = start_servald(self.near, self.directory / "near.log")
        self.far_daemon = start_servald(self.far, self.directory / "far.log")

    def assert_nothing_left(self) -> None:
        for daemon in (self.near_daemon, self.far_daemon):
            wait_for(lambda daemon=daemon: set(left_over(daemon).values()) == {0}, "nothing is left of the flows", 20)


@pytest.fixture
def site(lab: Lab) -> Iterator[Site]:
    made = Site(lab)
    yield made
    assert [made.near_daemon.stop(), made.far_daemon.stop()] == [0, 0]
    assert [*kernel_traces(made.near), *kernel_traces(made.far)] == []


# -- examples -----------------------------------------------------------------------------------------------------------


def test_echo_example(site: Site) -> None:
    text = "".join(f"line {number}\n" for number in range(10_000))
    with running(site.far, sys.executable, "examples/echo_server.py", SERVICE, serving=SERVICE):
        client = site.near.run(
            [sys.executable, "examples/echo_client.py", SERVICE],
            cwd=PROJECT,
            env={**os.environ, "PYTHONPATH": str(PROJECT)},
            input=text,
        )
        assert client.stdout == text
        site.assert_nothing_left()


def certificate(directory: Path, name: str) -> tuple[Path, Path]:
    """A self-signed certificate and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    files = directory / "certificate.pem", directory / "key.pem"
    files[0].write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    files[1].write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return files


def test_tls_example(site: Site) -> None:
    """The standard library's ssl wraps the sockets of both ends."""
    public, private = certificate(site.directory, "service.example")
    with running(site.far, sys.executable, "examples/tls_server.py", SERVICE, public, private, serving=SERVICE):
        client = site.near.run(
            [sys.executable, "examples/tls_client.py", SERVICE, public, "service.example", "a line"],
            cwd=PROJECT,
            env={**os.environ, "PYTHONPATH": str(PROJECT)},
        )
        assert client.stdout == "hello 10.1.0.1\na line\nTLSv1.3\n"


# -- tools --------------------------------------------------------------------------------------------------------------


def test_file_transfer(site: Site) -> None:
    content = os.urandom(20_000_001)
    sent, stored = site.directory / "sent", site.directory / "stored"
    sent.write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    server = (*SERVAL, "tcp-server", "-s", SERVICE, "-f", stored, "-n", 2, "--json")
    with running(site.far, *server, serving=SERVICE) as receiving:
        told = serval_json(site.near, "tcp-client", "-s", SERVICE, "-f", sent)
        assert told["sha256"] == digest
        assert told["bytes"] == len(content)
        text = serval(site.near, "tcp-client", "-s", SERVICE, "-f", sent).stdout
        assert f"sha256 {digest}" in text
        output, _ = receiving.communicate(timeout=20)
        assert output.count(digest) == 2
    assert stored.read_bytes() == content
    site.assert_nothing_left()
    refused = serval(site.near, "tcp-client", "-f", site.directory / "nothing", check=False)
    assert refused.returncode == 2
    assert "No such file" in refused.stderr


def test_ping_of_an_echo_service_and_of_a_stream_service(site: Site) -> None:
    with running(site.far, *SERVAL, "udp-echo", "-s", SERVICE, serving=SERVICE):
        answers = serval_json(site.near, "ping", SERVICE, "-c", 3, "-i", 0, "--size", 1400)
        assert [answer["from"] for answer in answers] == ["10.1.0.2"] * 3
        assert "3 of 3 answered" in serval(site.near, "ping", SERVICE, "-c", 3, "-i", 0).stdout
    with running(site.far, *SERVAL, "tcp-server", "-s", SERVICE, serving=SERVICE):
        assert "2 of 2 answered" in serval(site.near, "ping", "--tcp", SERVICE, "-c", 2, "-i", 0).stdout
    silent = serval(site.near, "ping", "99", "-c", 1, "-W", 0.2, check=False)
    assert silent.returncode == 1
    assert "0 of 1 answered" in silent.stdout


# -- the command --------------------------------------------------------------------------------------------------------


def test_service_table_by_hand(site: Site) -> None:
    near = site.near

    def rules(service: str) -> list[dict[str, object]]:
        entries = serval_json(near, "service", "show", service)
        return [target for entry in entries for target in entry["targets"]]

    serval(near, "service", "add", "7", "10.1.0.9", "priority", 3, "weight", 2)
    serval(near, "service", "add", "7", "10.1.0.8", "idle", 60, "hard", 3600, "dev", "eth0")
    assert [(rule["address"], rule["priority"], rule["weight"]) for rule in rules("7")] == [
        ("10.1.0.9", 3, 2),
        ("10.1.0.8", 1, 1),
    ]
    assert (rules("7")[1]["idle_timeout_s"], rules("7")[1]["hard_timeout_s"]) == (60, 3600)
    serval(near, "service", "mod", "7", "10.1.0.9", "10.1.0.7", "weight", 5)
    assert (rules("7")[0]["address"], rules("7")[0]["weight"]) == ("10.1.0.7", 5)
    explained = serval_json(near, "resolve", "7")
    assert (explained["verdict"], explained["targets"]) == ("FORWARD", ["10.1.0.7"])
    assert "FORWARD to 10.1.0.7" in serval(near, "resolve", "7").stdout
    serval(near, "service", "del", "7", "10.1.0.7")
    assert [rule["address"] for rule in rules("7")] == ["10.1.0.8"]
    serval(near, "service", "add", "0xabcd:16", "drop")
    serval(near, "service", "add", "0xabce:16", "delay")
    assert [rules("0xabcd:16")[0]["type"], rules("0xabce:16")[0]["type"]] == ["DROP", "DELAY"]
    assert "DROP" in serval(near, "resolve", "0xabcd01").stdout
    for service in ("7", "0xabcd:16", "0xabce:16"):
        serval(near, "service", "delete", service)
        assert rules(service) == []


WRONG_WORDS = (
    (("service", "add", "7", "10.1.0.9", "prioritty", "3"), 2, 'nearest: "priority"'),
    (("service", "add", "7", "10.1.0.9", "weight", "0"), 2, "nearest: 1"),
    (("service", "add", "7", "10.1.0.9", "dev", "eth9"), 2, 'nearest: "eth0"'),
    (("service", "add", "76x", "10.1.0.9"), 2, "neither a serviceID"),
    (("service", "mod", "7", "10.1.0.9"), 2, "nothing is to be changed"),
    (("service", "mod", "7", "10.1.0.9", "weight", "2"), 1, "no rule"),
    (("service", "del", "7"), 1, "no rule"),
    (("resolve", "0xab:8"), 2, "is a prefix"),
    (("events", "--kind", "rule_ad"), 1, "rule_added"),
    (("flow",), 2, "No such command 'flow'"),
)


def test_wrong_words(lab: Lab) -> None:
    """One sentence each; 2 for what is wrong in itself, 1 for what the stack does not have."""
    near = lab.host("near")
    lab.connect(near, "10.1.0.1/24", lab.host("far"), "10.1.0.2/24")
    daemon = start_servald(near, lab.directory / "near.log")
    for words, status, hint in WRONG_WORDS:
        result = serval(near, *words, check=False)
        assert (words, result.returncode) == (words, status)
        assert hint in result.stderr
        assert len(result.stderr.splitlines()) == 1
    assert daemon.stop() == 0


def test_without_a_stack(lab: Lab) -> None:
    result = serval(lab.host("empty"), "flows", check=False)
    assert result.returncode == 1
    assert "start servald" in result.stderr


def test_events_flows_and_counters_of_a_connection(site: Site) -> None:
    followed = (*SERVAL, "events", "--json", "-k", "flow_opened", "-k", "flow_ended", "-k", "rule_added")
    with running(site.near, *followed) as following:
        assert following.stdout is not None
        wait_for(
            lambda: serval(site.near, "service", "add", "5", "10.1.0.9").stdout
            and serval(site.near, "service", "del", "5").stdout
            and select_readable(following),
            "the first event",
            20,
        )
        with running(site.far, *SERVAL, "tcp-server", "-s", SERVICE, serving=SERVICE):
            connection = site.near.call(asyncio.run, aio.connect(SERVICE))
            flows = serval_json(site.near, "flows")
            assert (flows[0]["flow_id"], flows[0]["pid"]) == (connection.flow_id, os.getpid())
            assert f"pid {os.getpid()}" in serval(site.near, "flows").stdout
            connection.close()
            kinds = []
            while "flow_ended" not in kinds:
                kinds.append(json.loads(following.stdout.readline())["event"])
            assert kinds[-2:] == ["flow_opened", "flow_ended"]
    counters = {each["counter"]: each["value"] for each in serval_json(site.near, "stats")}
    assert counters["native_connected"] == 1


def select_readable(process: subprocess.Popen[str]) -> bool:
    import select

    return bool(select.select([process.stdout], [], [], 0)[0])


def test_keys_and_identifiers(lab: Lab) -> None:
    host, key = lab.host("keys"), lab.directory / "key"
    public = serval(host, "keygen", key).stdout.strip()
    assert key.stat().st_mode & 0o777 == 0o600
    own = serval(host, "id", "0x0001:32", key).stdout.strip()
    assert serval(host, "id", "0x0001:32", public).stdout.strip() == own
    assert serval(host, "id", own, public).stdout.strip() == own
    other = serval(host, "keygen", lab.directory / "other").stdout.strip()
    assert serval(host, "id", own, other, check=False).returncode == 1
    assert "exists" in serval(host, "keygen", key, check=False).stderr


# -- the daemon ---------------------------------------------------------------------------------------------------------


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
        daemon.terminate()
        assert notified.recv(100) == b"STOPPING=1"
        assert daemon.wait(20) == 0


# -- many ---------------------------------------------------------------------------------------------------------------


async def hold_many(count: int) -> None:
    """So many connections at once, each used."""
    streams = await asyncio.gather(*(aio.open_connection(SERVICE) for _ in range(count)))
    for number, (_, writer) in enumerate(streams):
        writer.write(number.to_bytes(4, "big"))
    for number, (reader, _) in enumerate(streams):
        assert await reader.readexactly(4) == number.to_bytes(4, "big")
    for _, writer in streams:
        writer.close()


def more_files(daemon: TranslatorProcess, before: dict[str, int]) -> bool:
    return any(count > before.get(kind, 0) for kind, count in daemon.descriptors().items())


def test_500_connections_at_once_leave_nothing(site: Site) -> None:
    with running(site.far, sys.executable, "examples/echo_server.py", SERVICE, serving=SERVICE):
        site.near.call(asyncio.run, hold_many(1))
        site.assert_nothing_left()
        daemons = site.near_daemon, site.far_daemon
        before = [daemon.descriptors() for daemon in daemons]
        site.near.call(asyncio.run, hold_many(500))
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
