"""What do clients see when a translator dies, a service is unknown, or nothing is configured about it?"""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator

import pytest
from through_chain import RAW, dial, dial_through

from lab.chain import COMMAND, Chain, TranslatorProcess, kernel_traces
from lab.hosts import Lab
from lab.traffic import PROJECT
from lab.waiting import wait_for

UNKNOWN = 7001
UNKNOWN_SERVICE = "424242"


@pytest.fixture
def own_chain(lab: Lab) -> Chain:
    """Hosts whose translators each test starts and kills as it likes."""
    return Chain(lab, {RAW: "17000"})


@pytest.fixture
def listener(own_chain: Chain) -> Iterator[socket.socket]:
    """A listening socket on the server."""
    with own_chain.server.call(socket.create_server, (own_chain.direct, RAW)) as server:
        server.settimeout(10)
        yield server


def works(chain: Chain, listener: socket.socket) -> None:
    client, server = dial_through(chain, listener)
    with client, server:
        client.sendall(b"ping")
        assert server.recv(10) == b"ping"
        server.sendall(b"pong")
        assert client.recv(10) == b"pong"


@pytest.mark.parametrize("side", ["translator", "reverse"])
def test_a_killed_translator_is_replaced_and_leaves_nothing_in_the_way(
    own_chain: Chain, listener: socket.socket, side: str
) -> None:
    own_chain.start()
    client, server = dial_through(own_chain, listener)
    with client, server:
        client.sendall(b"ping")
        assert server.recv(10) == b"ping"
        victim: TranslatorProcess = getattr(own_chain, side)
        assert victim.stop(signal.SIGKILL) == -signal.SIGKILL
        assert kernel_traces(victim.host) != [], "a killed stack cannot clean up: the next start must"
        own_chain.start_translator() if side == "translator" else own_chain.start_reverse()
        works(own_chain, listener)
        # The kernel of the dead translator's host closes what it had open towards its legacy end.
        legacy_end = client if side == "translator" else server
        legacy_end.settimeout(10)
        assert legacy_end.recv(1) == b""
    assert own_chain.stop() == (0, 0)
    assert kernel_traces(victim.host) == []


def test_nothing_configured_finds_the_service_by_broadcast(own_chain: Chain, listener: socket.socket) -> None:
    own_chain.start_reverse()
    arguments = ["--map", f"{RAW}=17000"]
    own_chain.translator = TranslatorProcess(
        own_chain.translator_host, arguments, own_chain.directory / "broadcast.log"
    )
    own_chain.translator.wait_ready(ports=[RAW])
    works(own_chain, listener)


def test_an_unknown_service_is_a_reset_after_the_connect_timeout(own_chain: Chain) -> None:
    own_chain.start_reverse()
    own_chain.start_translator(["--map", f"{UNKNOWN}={UNKNOWN_SERVICE}", "--connect-timeout", "1"])
    with dial(own_chain, UNKNOWN) as client, pytest.raises(ConnectionResetError):
        client.recv(1)
    wait_for(lambda: not own_chain.translator.flows(), "the attempt to be forgotten")


def test_a_second_translator_in_the_same_namespace_is_refused_in_one_sentence(own_chain: Chain) -> None:
    own_chain.start()
    second = own_chain.translator_host.run(
        [*COMMAND, "--map", f"{UNKNOWN}={UNKNOWN_SERVICE}"], cwd=PROJECT, check=False
    )
    assert second.returncode == 1
    assert f"pid {own_chain.translator.process.pid}" in second.stderr
    assert len(second.stderr.strip().splitlines()) == 1
    assert own_chain.translator.ask("maps")


def test_a_drained_translator_lets_open_connections_finish(own_chain: Chain, listener: socket.socket) -> None:
    own_chain.start()
    client, server = dial_through(own_chain, listener)
    with client, server:
        own_chain.translator.process.send_signal(signal.SIGTERM)
        wait_for(lambda: RAW not in own_chain.translator_host.listening_ports(), "the port to close")
        client.sendall(b"still here")
        assert server.recv(100) == b"still here"
        client.close()
        assert server.recv(1) == b""
        server.close()
        assert own_chain.translator.process.wait(20) == 0
    assert kernel_traces(own_chain.translator_host) == []


def test_the_lab_sees_what_a_running_stack_adds_to_the_kernel(own_chain: Chain) -> None:
    own_chain.start_reverse()
    assert any("serval0" in trace for trace in kernel_traces(own_chain.reverse_host))
    assert "table netdev serval" in kernel_traces(own_chain.reverse_host)
