"""Does the played TCP deliver what was written, whatever happens on the way?"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.packet import Packet

from serval_core.wire.scapy_layers import SAL, ServalTCP

from .prototype_receiver import NEVER, signed_difference
from .prototype_tcp import ACK, FIN, PSH, SYN, PrototypeTcp, handshake_options, segment_bytes_for

DELAY_S = 0.01


def as_received(layer: Packet) -> Packet:
    """The segment as it comes out of a packet."""
    return SAL(bytes(SAL() / layer))[ServalTCP]


def peer_syn(sequence: int, **options: int) -> Packet:
    chosen = list(options.items()) or handshake_options()
    return as_received(ServalTCP(seq=sequence, flags=SYN, options=chosen))


class Pair:
    """Two ends and a wire between them that loses, repeats and delays; time passes in leaps."""

    def __init__(self, seed: int, loss: float, initial: tuple[int, int] = (7, 0xFFFFF000)) -> None:
        self.numbers = random.Random(seed)
        self.loss = loss
        self.received = (bytearray(), bytearray())
        self.ends = tuple(
            PrototypeTcp(initial[i], peer_syn(initial[1 - i]), self.received[i].extend, 0.5) for i in range(2)
        )
        self.on_the_way: list[tuple[float, int, int, Packet]] = []
        self.serial = itertools.count()
        self.now = 0.0
        for end in self.ends:
            end.set_unscaled_window(5792)

    def flush(self) -> None:
        for i, end in enumerate(self.ends):
            for layer in end.take_output():
                segment = as_received(layer)
                copies = 2 if self.numbers.random() < self.loss / 2 else 1
                for _ in range(copies):
                    if self.numbers.random() < self.loss:
                        continue
                    is_late = self.numbers.random() < self.loss
                    arrival = self.now + DELAY_S * (1 + 10 * is_late * self.numbers.random())
                    heapq.heappush(self.on_the_way, (arrival, next(self.serial), 1 - i, segment))

    def run(self, until: Callable[[], bool] = lambda: False) -> None:
        """Let time pass until nothing more happens."""
        for _ in range(50_000):
            self.flush()
            if until():
                return
            arrival = self.on_the_way[0][0] if self.on_the_way else NEVER
            timeout = min(end.next_timeout() for end in self.ends)
            if min(arrival, timeout) == NEVER:
                return
            self.now = min(arrival, timeout)
            if arrival <= timeout:
                _, _, i, segment = heapq.heappop(self.on_the_way)
                self.ends[i].received(segment, self.now)
            else:
                for end in self.ends:
                    end.handle_timeout(self.now)
        pytest.fail("the two ends never come to rest")


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    loss=st.sampled_from([0.0, 0.02, 0.15]),
    forth=st.integers(0, 60_000),
    back=st.integers(0, 20_000),
)
def test_what_is_written_arrives_once_and_in_order(seed: int, loss: float, forth: int, back: int) -> None:
    pair = Pair(seed, loss)
    numbers = random.Random(seed)
    data = (numbers.randbytes(forth), numbers.randbytes(back))
    for end, written in zip(pair.ends, data, strict=True):
        middle = len(written) // 3
        end.write(written[:middle], 0.0)
        end.write(written[middle:], 0.0)
        end.finish(0.0)
    pair.run()
    assert (bytes(pair.received[1]), bytes(pair.received[0])) == data
    for end in pair.ends:
        assert end.fin_acknowledged
        assert end.receiver.fin_received
        assert not end.gave_up
        assert "bytes_beyond_window" not in end.receiver.counters


def test_losses_are_repaired_by_both_kinds_of_retransmission() -> None:
    pair = Pair(3, 0.03)
    pair.ends[0].write(bytes(600_000), 0.0)
    pair.run()
    assert len(pair.received[1]) == 600_000
    assert pair.ends[0].counters["fast_retransmissions"] > 0
    assert pair.ends[0].counters["timeouts"] > 0
    assert pair.ends[1].receiver.counters["segments_out_of_order"] > 0


def test_a_closed_window_is_probed_until_it_opens() -> None:
    pair = Pair(1, 0.0)
    sender, receiver = pair.ends
    receiver.receiver.reading = False
    sender.write(bytes(100_000), 0.0)
    pair.run(until=lambda: receiver.receiver.window == 0 and sender.counters["window_probes"] > 2)
    assert not sender.everything_acknowledged
    receiver.receiver.reading = True
    receiver.receiver.unread_bytes = 0
    pair.run()
    assert sender.everything_acknowledged


def test_what_is_sent_again_still_fits_the_window() -> None:
    tcp = PrototypeTcp(1, peer_syn(5), bytearray().extend, 0.5)
    tcp.set_unscaled_window(1000)
    tcp.write(bytes(5000), 0.0)
    assert [len(segment.payload) for segment in tcp.take_output()] == [1000]
    tcp.handle_timeout(0.5)
    assert [len(segment.payload) for segment in tcp.take_output()] == [1000]


def test_a_silent_peer_is_given_up_on() -> None:
    pair = Pair(1, 1.0)
    pair.ends[0].write(b"hello", 0.0)
    pair.run()
    assert pair.ends[0].gave_up
    assert pair.ends[0].counters["timeouts"] == 15


@pytest.mark.parametrize(
    ("mss", "expected"),
    [(1448, 1408), (1460, 1408), (1400, 1408), (536, 1408), (1280, 48), (1024, 48), (512, 48), (None, 1408)],
)
def test_the_peers_mss_is_read_with_its_bytes_swapped(mss: int | None, expected: int) -> None:
    assert segment_bytes_for(mss) == expected


def test_windows_are_scaled_only_if_the_peer_scales() -> None:
    for options, expected in (({"MSS": 1448}, 5792), ({"MSS": 1448, "WScale": 7}, 2896)):
        tcp = PrototypeTcp(1, peer_syn(5, **options), bytearray().extend)
        assert tcp.receiver.window == expected


def test_the_last_segment_of_a_write_is_pushed_and_the_fin_rides_on_it() -> None:
    tcp = PrototypeTcp(1, peer_syn(5), bytearray().extend)
    tcp.set_unscaled_window(60_000)
    tcp.write(bytes(1408 + 10), 0.0)
    first, second = tcp.take_output()
    assert (int(first.flags), len(first.payload), first.seq) == (ACK, 1408, 2)
    assert (int(second.flags), len(second.payload), second.seq) == (ACK | PSH, 10, 2 + 1408)
    # A second small segment has to wait, unless it is the last one.
    tcp.write(b"x", 0.0)
    assert tcp.take_output() == []
    tcp.finish(0.0)
    (third,) = tcp.take_output()
    assert (int(third.flags), bytes(third.payload)) == (ACK | PSH | FIN, b"x")


def test_serial_numbers_are_compared_across_the_wrap() -> None:
    assert signed_difference(2, 0xFFFFFFFF) == 3
    assert signed_difference(0xFFFFFFFF, 2) == -3
