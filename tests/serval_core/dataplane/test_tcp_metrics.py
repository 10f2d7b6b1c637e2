"""Does a flow begin with what the kernel measured on a flow to another peer?"""

from __future__ import annotations

import socket
import struct

from lab.hosts import Lab
from lab.waiting import wait_for
from serval_core.dataplane import tcp_repair
from serval_core.names import parse_address
from tests.serval_core.stack_thread import StackThread

SERVICE = "76568"
LOCAL, LOCAL_PORT = "100.127.255.1", 54324
TCP_INFO_RTO = struct.Struct("=8xI")  # microseconds


def first_timeout_s(remote: str) -> float:
    """When a new socket to this virtual address would repeat its first segment."""
    addresses = (parse_address(LOCAL), LOCAL_PORT, parse_address(remote), 7)
    fd = tcp_repair.create_established(*addresses, 1, 1, 1400, 7, 7, False, None, 65535, 65535, b"cubic")
    with socket.socket(fileno=fd) as opened:
        information = opened.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        tcp_repair.take_down(opened.detach())
    return float(TCP_INFO_RTO.unpack_from(information)[0]) / 1e6


def test_a_virtual_address_that_was_used_before_has_no_past(lab: Lab) -> None:
    near, far = lab.host("near"), lab.host("far")
    lab.connect(near, "10.1.0.1/24", far, "10.1.0.2/24")

    def used_addresses() -> list[str]:
        listed = near.run(["ip", "tcp_metrics", "show"]).stdout.split()
        return [word for word in listed if word.startswith("100.126.")]

    with StackThread(near) as client, StackThread(far) as server:
        listener = server.listen(SERVICE)
        client.forward(SERVICE, "10.1.0.2")
        stream = client.connect(SERVICE)
        other = listener.accept()
        stream.send_random(100_000)
        other.receive_all()
        other.release()
        stream.receive_all()
        stream.release()
        (used,) = wait_for(used_addresses, "the kernel to remember the flow's destination")
        assert near.call(first_timeout_s, used) > 0.9
