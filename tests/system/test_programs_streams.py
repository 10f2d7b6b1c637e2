"""Does a connection through the translators behave like one of TCP? Half-close, small writes, resets."""

from __future__ import annotations

import hashlib
import random
import socket
import subprocess
import threading

import pytest
from through_chain import NOBODY, RAW, dial, dial_through

from lab.chain import Chain
from translator.legacy_side import reset

pytestmark = pytest.mark.usefixtures("nothing_left")


def receive_all(connection: socket.socket) -> bytes:
    chunks = []
    while chunk := connection.recv(1 << 16):
        chunks.append(chunk)
    return b"".join(chunks)


def write_for_ever(connection: socket.socket) -> None:
    while True:
        connection.send(b"x")


def test_netcat_half_closes_and_still_gets_its_answer(chain: Chain, listener: socket.socket) -> None:
    question = random.Random(1).randbytes(300_000)
    netcat = chain.client.popen(
        ["nc", "-N", chain.front, RAW], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=False
    )
    answers: list[bytes] = []
    talking = threading.Thread(target=lambda: answers.append(netcat.communicate(question, timeout=20)[0]))
    talking.start()
    server, _ = listener.accept()
    with server:
        server.settimeout(10)
        assert receive_all(server) == question
        server.sendall(hashlib.sha256(question).hexdigest().encode())
    talking.join(30)
    assert netcat.returncode == 0
    assert answers == [hashlib.sha256(question).hexdigest().encode()]


def test_a_server_that_half_closes_still_receives(chain: Chain, listener: socket.socket) -> None:
    client, server = dial_through(chain, listener)
    with client, server:
        server.sendall(b"that is all from me")
        server.shutdown(socket.SHUT_WR)
        assert receive_all(client) == b"that is all from me"
        data = random.Random(2).randbytes(500_000)
        sending = threading.Thread(target=lambda: (client.sendall(data), client.shutdown(socket.SHUT_WR)))
        sending.start()
        assert receive_all(server) == data
        sending.join(10)


def test_both_directions_at_once_then_both_ends_close(chain: Chain, listener: socket.socket) -> None:
    client, server = dial_through(chain, listener)
    up, down = random.Random(3).randbytes(3_000_000), random.Random(4).randbytes(3_000_000)
    with client, server:
        senders = [
            threading.Thread(target=lambda: (client.sendall(up), client.shutdown(socket.SHUT_WR))),
            threading.Thread(target=lambda: (server.sendall(down), server.shutdown(socket.SHUT_WR))),
        ]
        received: dict[str, bytes] = {}
        receiver = threading.Thread(target=lambda: received.update(up=receive_all(server)))
        for thread in (*senders, receiver):
            thread.start()
        assert receive_all(client) == down
        for thread in (*senders, receiver):
            thread.join(20)
        assert received == {"up": up}


def test_single_bytes_go_one_by_one_and_in_order(chain: Chain, listener: socket.socket) -> None:
    client, server = dial_through(chain, listener)
    with client, server:
        for end in (client, server):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for number in range(300):
            client.sendall(bytes([number % 256]))
            assert server.recv(10) == bytes([number % 256])
            server.sendall(bytes([255 - number % 256]))
            assert client.recv(10) == bytes([255 - number % 256])
        expected = bytes(number % 251 for number in range(5000))
        for byte in expected:
            client.send(bytes([byte]))
        client.shutdown(socket.SHUT_WR)
        assert receive_all(server) == expected


def test_a_connection_without_a_byte_ends_quietly(chain: Chain, listener: socket.socket) -> None:
    client, server = dial_through(chain, listener)
    with server:
        client.close()
        assert server.recv(1) == b""


def test_the_server_speaks_first(chain: Chain, listener: socket.socket) -> None:
    client, server = dial_through(chain, listener)
    with client, server:
        server.sendall(b"220 hello\r\n")
        assert client.recv(100) == b"220 hello\r\n"


@pytest.mark.parametrize("who", ["client", "server"])
def test_a_reset_reaches_the_other_side(chain: Chain, listener: socket.socket, who: str) -> None:
    client, server = dial_through(chain, listener)
    resetting, other = (client, server) if who == "client" else (server, client)
    with other:
        resetting.sendall(b"x")
        assert other.recv(1) == b"x"
        reset(resetting)
        with pytest.raises(ConnectionResetError):
            other.recv(1)


def test_what_was_sent_before_a_close_arrives_however_slow_the_reader(
    chain: Chain, listener: socket.socket
) -> None:
    client, server = dial_through(chain, listener)
    data = random.Random(5).randbytes(8_000_000)
    with client:
        sending = threading.Thread(target=lambda: (server.sendall(data), server.close()))
        sending.start()
        received = bytearray()
        while chunk := client.recv(10_000):
            received += chunk
        sending.join(10)
        assert bytes(received) == data


def test_a_target_that_is_down_is_a_reset_for_the_client(chain: Chain) -> None:
    # The reset may come before the client's connect() has returned.
    with pytest.raises(ConnectionResetError), dial(chain, NOBODY) as client:
        client.recv(1)


def test_a_hundred_connections_one_after_the_other(chain: Chain, listener: socket.socket) -> None:
    for number in range(100):
        client, server = dial_through(chain, listener)
        with client, server:
            client.sendall(number.to_bytes(4, "big"))
            client.shutdown(socket.SHUT_WR)
            assert receive_all(server) == number.to_bytes(4, "big")
            server.sendall(b"ok")
            server.close()
            assert receive_all(client) == b"ok"


def test_a_connected_client_that_writes_after_the_server_has_gone_gets_an_error(
    chain: Chain, listener: socket.socket
) -> None:
    client, server = dial_through(chain, listener)
    with client:
        server.close()
        assert client.recv(1) == b""
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            write_for_ever(client)


def test_a_reset_amid_full_speed_ends_the_other_end_too(chain: Chain, listener: socket.socket) -> None:
    """And that end, to which nobody has sent anything, receives nothing."""
    block = bytes(1 << 20)
    outcomes: list[tuple[str, bytes]] = []

    def flood(connection: socket.socket) -> None:
        with connection:
            try:
                while True:
                    connection.sendall(block)
            except OSError as error:
                outcomes.append((type(error).__name__, connection.recv(1)))

    for number in range(20):
        client, server = dial_through(chain, listener)
        resetting, flooding = (client, server) if number % 2 else (server, client)
        flooder = threading.Thread(target=flood, args=(flooding,))
        flooder.start()
        received = 0
        while received <= number << 18:
            received += len(resetting.recv(1 << 20))
        reset(resetting)
        flooder.join(15)
    assert set(outcomes) <= {("ConnectionResetError", b""), ("BrokenPipeError", b"")}
    assert len(outcomes) == 20
