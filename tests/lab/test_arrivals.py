"""Is every byte noted that arrives, and is the longest silence the longest one?"""

from __future__ import annotations

import socket
from itertools import pairwise

from hypothesis import assume, given
from hypothesis import strategies as st

from lab.arrivals import Arrivals, Gap, Timeline
from lab.hosts import Lab
from lab.waiting import wait_for


def timeline(*arrivals: tuple[float, int]) -> Timeline:
    made = Timeline()
    for at, size_bytes in arrivals:
        made.add(at, size_bytes)
    return made


def test_a_silence_counts_when_some_of_it_lies_in_the_time_asked_for() -> None:
    seen = timeline((1.0, 10), (2.0, 10), (5.0, 10), (5.5, 10), (9.0, 10))
    assert seen.gap(1.2, 1.8) == Gap(1.0, 1.0)
    assert seen.gap(1.2, 2.5) == Gap(2.0, 3.0)
    assert seen.gap(5.1, 5.4) == Gap(5.0, 0.5)
    assert seen.gap(0.0, 10.0) == Gap(5.5, 3.5)
    assert Timeline().gap(3.0, 4.0) == Gap(3.0, 1.0), "nothing has ever arrived"


@given(st.lists(st.integers(0, 1000), min_size=2).map(sorted), st.integers(0, 1000), st.integers(0, 1000))
def test_the_longest_silence_is_the_longest_of_all_pairs(times: list[int], first: int, second: int) -> None:
    began, ended = min(first, second), max(first, second)
    lengths = [after - before for before, after in pairwise(times) if after > began and before < ended]
    assume(lengths and began < ended)
    assert timeline(*((at, 1) for at in times)).gap(began, ended).length_s == max(lengths)


def test_rates_hold_what_arrived() -> None:
    seen = timeline((0.5, 99), (1.0, 100), (1.2, 25), (2.6, 50), (3.0, 99))
    assert seen.rates(1.0, 3.0, 0.5) == [2000.0, 0.0, 0.0, 800.0]
    assert seen.received_bytes() == 373


def test_all_that_arrives_is_noted_by_port(lab: Lab) -> None:
    sender, receiver = lab.host("sender"), lab.host("receiver")
    lab.connect(sender, "10.1.0.1/24", receiver, "10.1.0.2/24")
    server = sender.call(socket.create_server, ("10.1.0.1", 5000))
    with server, Arrivals(receiver, "eth0", 5000) as arrivals:
        for size_bytes in (1, 300_000):
            client = receiver.call(socket.create_connection, ("10.1.0.1", 5000), 10)
            accepted, (_, port) = server.accept()
            with client, accepted:
                accepted.sendall(bytes(size_bytes))
                client.sendall(b"what the receiver sends does not count")
                received = 0
                while received < size_bytes:
                    received += len(client.recv(65536))
            here = arrivals.to(port)
            wait_for(lambda here=here, wanted=size_bytes: here.received_bytes() == wanted, "all bytes to be noted")
        assert arrivals.missed() == 0
