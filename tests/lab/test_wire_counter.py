"""Does the kernel count for us exactly what passed?"""

from __future__ import annotations

import socket

from lab.hosts import Lab
from lab.wire_counter import WireCounter

PROTOCOL_SAL = 144
PROTOCOL_UDP = 17


def test_it_counts_one_protocol_in_both_directions_and_nothing_else(lab: Lab) -> None:
    left, right = lab.host("left"), lab.host("right")
    lab.connect(left, "10.1.0.1/24", right, "10.1.0.2/24")
    with (
        left.call(socket.socket, socket.AF_INET, socket.SOCK_RAW, PROTOCOL_SAL) as from_left,
        right.call(socket.socket, socket.AF_INET, socket.SOCK_RAW, PROTOCOL_SAL) as from_right,
        left.call(socket.socket, socket.AF_INET, socket.SOCK_DGRAM) as datagram,
        WireCounter(right, "eth0", PROTOCOL_SAL) as sal,
        WireCounter(right, "eth0", PROTOCOL_SAL, longer_than_bytes=1000) as long_sal,
        WireCounter(right, "eth0", PROTOCOL_UDP) as udp,
    ):
        for number in range(3000):
            from_left.sendto(bytes(980 + number % 2), ("10.1.0.2", 0))
        for _ in range(10):
            from_right.sendto(bytes(20), ("10.1.0.1", 0))
        datagram.sendto(b"x", ("10.1.0.2", 4000))
        # Raw and datagram sockets hand packets over before the call returns: veth has no queue of its own.
        assert (sal.count(), long_sal.count(), udp.count()) == (3010, 1500, 1)
        from_left.sendto(bytes(20), ("10.1.0.2", 0))
        assert sal.count() == 3011
