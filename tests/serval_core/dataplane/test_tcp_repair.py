"""Sockets that start in ESTABLISHED: two of them facing each other over loopback exchange data like any others."""

from __future__ import annotations

import errno
import socket
import struct
import subprocess
import threading

import pytest

from lab.hosts import Host, Lab
from serval_core.dataplane import tcp_repair
from serval_core.errors import KernelRefused
from serval_core.names import parse_address

LOOPBACK = parse_address("127.0.0.1")
ESTABLISHED, CLOSED = 1, 7


@pytest.fixture
def host(lab: Lab) -> Host:
    return lab.host("host")


def established(
    host: Host,
    here: int,
    there: int,
    send_next: int,
    receive_next: int,
    *,
    address: int = LOOPBACK,
    scale: int = 7,
    timestamp: int | None = 5000,
    control: bytes = b"cubic",
) -> socket.socket:
    fd = host.call(
        tcp_repair.create_established,
        LOOPBACK, here, address, there, send_next, receive_next, 1400, scale, scale, True, timestamp, 65535, 65535, control,
    )  # fmt: skip
    return socket.socket(fileno=fd)


def pair(host: Host, **how: object) -> tuple[socket.socket, socket.socket]:
    return (
        established(host, 1001, 1002, 100, 4_294_967_200, **how),  # type: ignore[arg-type]
        established(host, 1002, 1001, 4_294_967_200, 100, **how),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("how", [{}, {"scale": -1}, {"timestamp": None}, {"control": b""}], ids=str)
def test_data_flows_both_ways_across_a_sequence_wrap(host: Host, how: dict[str, object]) -> None:
    near, far = pair(host, **how)
    for end in (near, far):
        end.settimeout(10)
    payload = bytes(range(256)) * 400
    for end in (near, far):
        threading.Thread(target=end.sendall, args=(payload,)).start()
    for end in (near, far):
        received = b""
        while len(received) < len(payload):
            received += end.recv(65536)
        assert received == payload
    near.shutdown(socket.SHUT_WR)
    assert far.recv(1) == b""
    for end in (near, far):
        end.close()


def test_negotiated_values_are_in_force(host: Host) -> None:
    near, far = pair(host)
    information = near.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 24)
    state, _, _, _, _, options, scales = struct.unpack_from("=7B", information)
    assert state == ESTABLISHED
    assert options & 0x7 == 0x7  # timestamps, SACK, window scaling
    assert scales == 0x77
    assert near.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0") == b"cubic"
    for end in (near, far):
        tcp_repair.take_down(end.detach())


def test_taking_down_is_silent(host: Host) -> None:
    near, far = pair(host)
    tcp_repair.take_down(near.detach())
    far.settimeout(0.2)
    with pytest.raises(TimeoutError):
        far.recv(1)
    assert tcp_repair.state(far.fileno()) == ESTABLISHED
    assert "TIME-WAIT" not in host.run(["ss", "-tan"]).stdout
    tcp_repair.take_down(far.detach())


def test_how_far_the_expected_sequence_number_has_moved(host: Host) -> None:
    near, far = pair(host)
    assert tcp_repair.received(far.fileno()) == 0
    near.sendall(b"12345")
    far.settimeout(10)
    assert far.recv(10) == b"12345"
    assert tcp_repair.received(far.fileno()) == 5
    near.shutdown(socket.SHUT_WR)
    assert far.recv(10) == b""
    assert tcp_repair.received(far.fileno()) == 6
    for end in (near, far):
        tcp_repair.take_down(end.detach())


def test_asking_how_far_it_has_moved_does_not_disturb_who_is_writing(host: Host) -> None:
    """In repair mode the socket would take what is written for something that it has received."""
    near, far = pair(host)
    for end in (near, far):
        end.settimeout(None)
    with (
        subprocess.Popen(["head", "-c", "100000000", "/dev/zero"], stdout=near) as writer,
        subprocess.Popen(["wc", "-c"], stdin=far, stdout=subprocess.PIPE) as reader,
    ):
        while writer.poll() is None:
            assert tcp_repair.received(near.fileno()) == 0
        near.shutdown(socket.SHUT_WR)
        assert reader.communicate(timeout=10)[0] == b"100000000\n"
    near.setblocking(False)
    with pytest.raises(BlockingIOError):
        near.recv(1)
    for end in (near, far):
        tcp_repair.take_down(end.detach())


def test_the_step_that_failed_is_named(host: Host) -> None:
    with pytest.raises(KernelRefused, match="TCP_CONGESTION") as caught:
        established(host, 1, 2, 0, 0, control=b"no-such-thing")
    assert caught.value.errno == errno.ENOENT
    with pytest.raises(KernelRefused, match="connect"):
        established(host, 1, 2, 0, 0, address=parse_address("192.0.2.1"))
