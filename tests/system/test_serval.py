"""`serval`, its tools and the examples as a user runs them, on two hosts with servald."""

from __future__ import annotations

import asyncio
import datetime
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from servald_site import Site

from lab.hosts import Lab
from lab.native import SERVAL, running, serval, serval_json, start_servald
from lab.traffic import PROJECT
from lab.waiting import wait_for
from serval_core import aio
from serval_core.stack_socket import StackSocketClient

SERVICE = "76568"

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
    (("events", "--kind", "rule_ad"), 2, "rule_added"),
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


def test_events_end_with_the_stack_or_an_interrupt(lab: Lab) -> None:
    host = lab.host("h")
    daemon = start_servald(host, lab.directory / "h.log")

    def told(follower: subprocess.Popen[str]) -> bool:
        for request in ("service_add", "service_delete"):
            host.call(StackSocketClient(5).request, request, service="5", address="10.1.0.9")
        return select_readable(follower)

    with running(host, *SERVAL, "events") as interrupted, running(host, *SERVAL, "events", "--json") as left:
        for follower in (interrupted, left):
            wait_for(lambda follower=follower: told(follower), "it follows", 20)
        interrupted.send_signal(signal.SIGINT)
        _, complaint = interrupted.communicate(timeout=20)
        assert (complaint, interrupted.returncode) == ("", 0)
        assert daemon.stop() == 0
        _, complaint = left.communicate(timeout=20)
        assert (complaint, left.returncode) == ("serval: the Serval stack of this network namespace has ended\n", 1)


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
