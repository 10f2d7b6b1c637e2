"""Does a prototype at the other end of a translator notice that it talks to a legacy program, or the program anything?

curl — forward translator — prototype server;   prototype client — reverse translator — legacy services
"""

from __future__ import annotations

import hashlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from odd_prototypes import HttpFlow, OddClient, OddServer, RememberingFlow, SalFinFlow
from playing import OUR_SERVICE, Playing, options, random_data
from translator_pair import PORT, SERVICE, TIMEOUT_S, Pair, ending

from lab.chain import TranslatorProcess
from lab.hosts import Lab
from lab.traffic import WebServer, hash_file, write_random_file
from lab.waiting import wait_for
from tests.peers.application import Behaviour
from tests.peers.prototype import PrototypeClient, lose_at_random
from tests.peers.prototype_flow import Flow
from tests.peers.prototype_peer import Options

NEAR, FAR, EVERYBODY = "10.9.0.1", "10.9.0.2", "10.9.0.255"
WEB = 80
ECHO_PORT = 7
URL = f"http://127.0.0.1:{PORT}/file"

assert int(SERVICE) == OUR_SERVICE


@pytest.fixture
def pair(lab: Lab) -> Iterator[Pair]:
    pair = Pair(lab)
    yield pair
    pair.end()


@pytest.fixture(params=["configured", "broadcast"])
def forward(pair: Pair, request: pytest.FixtureRequest) -> TranslatorProcess:
    """The forward side, told where the service is or asking everybody."""
    if request.param == "configured":
        return pair.forward()
    return pair.start(pair.near, "--map", f"{PORT}={SERVICE}", ports=[PORT])


def assert_idle(side: TranslatorProcess) -> None:
    def idle() -> bool:
        counters = side.ask("counters")
        held = counters["open_transports"], counters["flow_map_entries"], len(side.flows())
        return not any(held)

    wait_for(idle, "the translator to let go of its flows")


def lossy(seed: int) -> Options:
    """Stays long enough in TIMEWAIT to answer a FIN that we repeat after a second, should its acknowledgement be what is lost."""
    return options(lose_at_random(0.02, seed=seed), linger_s=2.5)


def http_server(answer: bytes, how: Options | None = None) -> OddServer:
    return OddServer(HttpFlow, OUR_SERVICE, Behaviour(answer), how or options())


def curl(pair: Pair, *arguments: str | Path) -> str:
    return str(pair.near.run(["curl", "-sSf", *arguments, URL]).stdout)


def test_curl_downloads_from_a_prototype_server(pair: Pair, forward: TranslatorProcess) -> None:
    body = random_data(1 << 20)
    playing = Playing(pair.far, http_server(body))
    curl(pair, "-o", pair.directory / "down")
    assert (pair.directory / "down").read_bytes() == body
    (flow,) = playing.finished().flows
    assert (flow.state, flow.error, flow.peer_address) == ("TIMEWAIT", "", NEAR)
    assert_idle(forward)


def test_curl_uploads_to_a_prototype_server(pair: Pair) -> None:
    forward = pair.forward()
    digest = write_random_file(pair.directory / "up", 1 << 20, seed=2)
    server = http_server(b"thank you")
    playing = Playing(pair.far, server)
    assert curl(pair, "-T", pair.directory / "up") == "thank you"
    assert playing.finished().flows[0].error == ""
    (flow,) = server.played
    assert isinstance(flow, HttpFlow)
    _, _, body = bytes(flow.received).partition(b"\r\n\r\n")
    assert hashlib.sha256(body).hexdigest() == digest
    assert_idle(forward)


def test_curl_downloads_over_a_lossy_wire(pair: Pair) -> None:
    forward = pair.forward()
    body = random_data(200_000)
    playing = Playing(pair.far, http_server(body, lossy(seed=5)))
    curl(pair, "-o", pair.directory / "down")
    assert (pair.directory / "down").read_bytes() == body
    playing.finished()
    assert_idle(forward)


def test_a_reset_by_a_prototype_server_reaches_the_legacy_client(pair: Pair) -> None:
    forward = pair.forward()
    server = OddServer(Flow, OUR_SERVICE, Behaviour(stop_reading_at=100), options())
    playing = Playing(pair.far, server)
    client = pair.dial()
    client.sendall(bytes(100_000))
    assert ending(client) == "reset"
    assert playing.finished().flows[0].counters["resets_sent"] == 1
    assert_idle(forward)


def test_an_end_at_the_sal_alone_reaches_the_legacy_client(pair: Pair) -> None:
    forward = pair.forward()
    data = random_data(50_000)
    server = OddServer(SalFinFlow, OUR_SERVICE, Behaviour(data, close_when="acknowledged"), options())
    playing = Playing(pair.far, server)
    client = pair.dial()
    received = bytearray()
    while piece := client.recv(1 << 16):
        received += piece
    client.close()
    assert received == data
    assert playing.finished().flows[0].state == "TIMEWAIT"
    assert_idle(forward)


@pytest.mark.parametrize("destination", [FAR, EVERYBODY])
def test_a_prototype_client_downloads_from_a_legacy_web_server(pair: Pair, destination: str) -> None:
    served = pair.directory / "served"
    served.mkdir()
    digest = write_random_file(served / "file", 1 << 20, seed=3)
    WebServer(pair.far, served, WEB)
    reverse = pair.reverse(f"127.0.0.1:{WEB}")
    request = b"GET /file HTTP/1.1\r\nHost: far\r\nConnection: close\r\n\r\n"
    client = OddClient(RememberingFlow, OUR_SERVICE, destination, Behaviour(request), options())
    (flow,) = Playing(pair.near, client).finished().flows
    assert (flow.state, flow.error, flow.end_of_stream) == ("CLOSED", "", True)
    (played,) = client.played
    assert isinstance(played, RememberingFlow)
    head, _, body = bytes(played.received).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    assert hashlib.sha256(body).hexdigest() == digest
    assert_idle(reverse)


def test_a_prototype_client_uploads_to_a_legacy_web_server(pair: Pair) -> None:
    served = pair.directory / "served"
    served.mkdir()
    WebServer(pair.far, served, WEB)
    reverse = pair.reverse(f"127.0.0.1:{WEB}")
    body = random_data(1 << 20)
    head = f"PUT /up HTTP/1.1\r\nHost: far\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    client = PrototypeClient(OUR_SERVICE, FAR, Behaviour(head.encode() + body), options())
    (flow,) = Playing(pair.near, client).finished().flows
    assert (flow.error, flow.end_of_stream) == ("", True)
    assert hash_file(served / "up") == hashlib.sha256(body).hexdigest()
    assert_idle(reverse)


def echo(connection: socket.socket) -> None:
    with connection:
        while data := connection.recv(1 << 16):
            connection.sendall(data)


def test_a_prototype_client_gets_an_echo_from_a_legacy_server_over_a_lossy_wire(pair: Pair) -> None:
    listener = pair.listen(ECHO_PORT)
    reverse = pair.reverse(f"127.0.0.1:{ECHO_PORT}")
    data = random_data(200_000)
    behaviour = Behaviour(data, close_when="received", expected_bytes=len(data))
    client = PrototypeClient(OUR_SERVICE, FAR, behaviour, lossy(seed=6))
    playing = Playing(pair.near, client)
    server = threading.Thread(target=echo, args=(pair.accept(listener),))
    server.start()
    (flow,) = playing.finished().flows
    server.join(TIMEOUT_S)
    assert (flow.received_sha256, flow.error) == (hashlib.sha256(data).hexdigest(), "")
    assert_idle(reverse)


def test_a_reset_by_a_legacy_server_reaches_a_prototype_client(pair: Pair) -> None:
    listener = pair.listen(ECHO_PORT)
    reverse = pair.reverse(f"127.0.0.1:{ECHO_PORT}")
    client = PrototypeClient(OUR_SERVICE, FAR, Behaviour(b"hello"), options())
    playing = Playing(pair.near, client)
    server = pair.accept(listener)
    assert server.recv(5, socket.MSG_WAITALL) == b"hello"
    server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes((1, 0, 0, 0, 0, 0, 0, 0)))
    server.close()
    result = playing.result()
    assert (result.flows[0].state, result.flows[0].error) == ("CLOSED", "ECONNRESET")
    assert not result.timed_out
    assert_idle(reverse)
