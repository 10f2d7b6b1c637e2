"""Does the bad wire do what its seed says, no more and no less?"""

from __future__ import annotations

import random
import socket
import threading
from dataclasses import replace
from functools import partial

import pytest

from lab.hosts import Host, Lab
from lab.loss import SO_RCVBUFFORCE, Direction, Faults, FaultyWire
from lab.waiting import wait_for

ETHERNET_IPV4 = bytes(12) + b"\x08\x00"
ETHERNET_ARP = bytes(12) + b"\x08\x06"
DATAGRAMS = 400


def frame(number: int, protocol: int = 17) -> bytes:
    return ETHERNET_IPV4 + bytes(9) + bytes([protocol]) + bytes(10) + number.to_bytes(4, "big")


def fates(faults: Faults, seed: int, count: int = 500) -> list[bytes]:
    direction = Direction(faults, random.Random(seed))
    frames = [out for number in range(count) for out in direction.pass_on(frame(number), number * 1e-3)]
    return frames + direction.due(float("inf"))


def test_the_same_seed_gives_the_same_fates_and_another_seed_others() -> None:
    faults = Faults(drop=0.1, duplicate=0.1, reorder=0.1, delay_s=0.01, jitter_s=0.01)
    assert fates(faults, 1) == fates(faults, 1)
    assert fates(faults, 1) != fates(faults, 2)


def test_a_perfect_wire_changes_nothing() -> None:
    assert fates(Faults(), 1) == [frame(number) for number in range(500)]


def test_dropping_loses_about_the_share_asked_for_and_keeps_the_order() -> None:
    kept = fates(Faults(drop=0.2), 3)
    assert 350 < len(kept) < 450
    assert kept == sorted(kept)


def test_the_share_of_one_fault_does_not_change_the_fates_of_another() -> None:
    dropping = Direction(Faults(drop=0.2), random.Random(9))
    both = Direction(Faults(drop=0.2, duplicate=0.5), random.Random(9))
    for number in range(300):
        dropping.pass_on(frame(number), 0.0)
        both.pass_on(frame(number), 0.0)
    assert dropping.dropped == both.dropped
    assert both.duplicated > 0


def test_duplicates_follow_their_original() -> None:
    doubled = fates(Faults(duplicate=1.0), 1, count=3)
    assert doubled == [frame(0), frame(0), frame(1), frame(1), frame(2), frame(2)]


def test_a_reordered_packet_is_overtaken_by_the_next_and_none_is_lost() -> None:
    out = fates(Faults(reorder=0.2), 4)
    assert sorted(out) == [frame(number) for number in range(500)]
    assert out != sorted(out)


def test_a_reordered_packet_that_nothing_follows_still_goes() -> None:
    direction = Direction(Faults(reorder=1.0, reorder_hold_s=0.5), random.Random(1))
    assert direction.pass_on(frame(0), 10.0) == []
    assert direction.next_due() == 10.5
    assert direction.due(10.4) == []
    assert direction.due(10.5) == [frame(0)]
    assert direction.next_due() is None


def test_delay_keeps_the_order_and_jitter_does_not() -> None:
    assert fates(Faults(delay_s=0.05), 1) == [frame(number) for number in range(500)]
    jittered = fates(Faults(jitter_s=0.05), 1)
    assert jittered != sorted(jittered)
    assert sorted(jittered) == [frame(number) for number in range(500)]


def test_chosen_packets_of_one_protocol_are_dropped_and_no_others() -> None:
    direction = Direction(Faults(drop=0.0, protocol=144, drop_exactly=frozenset({1})), random.Random(1))
    assert direction.pass_on(frame(0, 144), 0.0) == [frame(0, 144)]
    assert direction.pass_on(frame(1, 6), 0.0) == [frame(1, 6)]
    assert direction.pass_on(ETHERNET_ARP, 0.0) == [ETHERNET_ARP]
    assert direction.pass_on(frame(2, 144), 0.0) == []
    assert direction.pass_on(frame(3, 144), 0.0) == [frame(3, 144)]
    assert (direction.seen, direction.dropped) == (3, 1)


def bad_wire(lab: Lab, seed: int, faults: Faults) -> tuple[Host, Host, FaultyWire]:
    left, right = lab.host("left"), lab.host("right")
    wire = FaultyWire(lab, left, "10.1.0.1/24", right, "10.1.0.2/24", seed=seed, left_to_right=faults)
    return left, right, wire


def has_seen(wire: FaultyWire, packets: int) -> bool:
    return wire.left_to_right.seen == packets


def datagrams_through(lab: Lab, seed: int, faults: Faults) -> list[int]:
    """Numbers of the datagrams that arrived, in the order of arrival; the last one always does."""
    left, right, wire = bad_wire(lab, seed, faults)
    sender, receiver = (host.call(socket.socket, socket.AF_INET, socket.SOCK_DGRAM) for host in (left, right))
    with wire, sender, receiver:
        receiver.bind(("10.1.0.2", 4000))
        receiver.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 4096 * DATAGRAMS)
        receiver.settimeout(5)
        arrived = []
        for number in range(DATAGRAMS):
            sender.sendto(number.to_bytes(4, "big"), ("10.1.0.2", 4000))
            # One at a time: veth itself reorders what is sent from several CPUs.
            wait_for(partial(has_seen, wire, number + 1), "the wire to see it", interval_s=1e-4)
        wire.left_to_right.faults = Faults()
        sender.sendto(b"last", ("10.1.0.2", 4000))
        while (datagram := receiver.recv(100)) != b"last":
            arrived.append(int.from_bytes(datagram, "big"))
    return arrived


def test_a_real_wire_does_to_packets_what_the_seed_says(lab: Lab) -> None:
    faults = Faults(drop=0.05, duplicate=0.05)
    expected = [int.from_bytes(out[-4:], "big") for out in fates_of_wire(7, faults)]
    assert datagrams_through(lab, 7, faults) == expected
    assert len(expected) != len(set(expected))


def fates_of_wire(seed: int, faults: Faults) -> list[bytes]:
    direction = Direction(faults, random.Random(f"{seed} left to right"))
    return [out for number in range(DATAGRAMS) for out in direction.pass_on(frame(number), 0.0)]


def test_tcp_gets_a_megabyte_through_loss_duplication_and_reordering(lab: Lab) -> None:
    faults = Faults(drop=0.02, duplicate=0.02, reorder=0.02)
    left, right, wire = bad_wire(lab, 11, faults)
    wire.right_to_left.faults = replace(faults, drop=0.01)
    sent = random.Random(1).randbytes(1 << 20)
    received = bytearray()
    with wire, right.call(socket.create_server, ("10.1.0.2", 4000)) as server:

        def receive() -> None:
            connection, _ = server.accept()
            with connection:
                while chunk := connection.recv(1 << 16):
                    received.extend(chunk)

        reader = threading.Thread(target=receive)
        reader.start()
        with left.call(socket.create_connection, ("10.1.0.2", 4000)) as sender:
            sender.sendall(sent)
        reader.join(timeout=30)
        assert bytes(received) == sent
        assert wire.left_to_right.dropped
        assert wire.left_to_right.duplicated
        assert wire.left_to_right.reordered
        assert wire.right_to_left.dropped


def test_a_relay_that_failed_says_so(lab: Lab) -> None:
    left, right, wire = bad_wire(lab, 1, Faults(drop=0.5))
    wire.left_to_right.random = None  # type: ignore[assignment]
    with left.call(socket.socket, socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.sendto(b"x", (right.address(), 4000))
    wire._thread.join(timeout=5)
    with pytest.raises(AttributeError):
        wire.close()
