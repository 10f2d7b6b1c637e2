"""How does a bad network behave? A wire that drops, duplicates, reorders and delays packets as its seed says.

`FaultyWire` lays a wire between two hosts with a host in the middle; a thread there moves every frame from
one side to the other. What happens to the n-th packet of a direction follows from the seed alone, so a run
that failed can be had again. ARP always passes. Superpackets are switched off on both ends: the relay sees
what a real wire would carry.
"""

from __future__ import annotations

import heapq
import itertools
import os
import random
import select
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from lab.hosts import Host, Lab
from lab.wire_counter import ETH_P_ALL, SOL_PACKET, packet_statistics

ETHERTYPE_IPV4 = b"\x08\x00"
ETHERTYPE_FIELD = slice(12, 14)
PROTOCOL_OFFSET = 14 + 9
PACKET_IGNORE_OUTGOING = 23
SO_RCVBUFFORCE = 33
RECEIVE_BUFFER_BYTES = 64 << 20
FRAME_BYTES_MAX = 65536 + 14
FRAMES_PER_TURN = 256


@dataclass(frozen=True)
class Faults:
    """What one direction of a wire does to the IPv4 packets it is meant for. Probabilities are 0..1.

    `protocol` limits the faults to one IP protocol (144: the SAL), None means all. A reordered packet goes
    after the next one, or after `reorder_hold_s` of silence. `drop_exactly` holds positions (from 0) among
    the packets concerned.
    """

    drop: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    delay_s: float = 0.0
    jitter_s: float = 0.0
    protocol: int | None = None
    drop_exactly: frozenset[int] = frozenset()
    reorder_hold_s: float = 0.02


PERFECT = Faults()


@dataclass
class Direction:
    """One direction of a wire: its dice, what has happened so far, its faults (may be replaced any time)."""

    faults: Faults
    random: random.Random
    seen: int = 0
    dropped: int = 0
    duplicated: int = 0
    reordered: int = 0
    _held: list[tuple[float, int, bytes]] = field(default_factory=list)
    _serial: itertools.count[int] = field(default_factory=itertools.count)

    def pass_on(self, frame: bytes, now: float) -> list[bytes]:
        """The frames that leave at once because `frame` came; others may follow by `due`."""
        faults = self.faults
        if not _concerns(faults, frame):
            return [frame]
        position = self.seen
        self.seen += 1
        # Every packet costs the same number of throws, whatever its fate: fates do not depend on each other.
        drop, duplicate, reorder, jitter = (self.random.random() for _ in range(4))
        if drop < faults.drop or position in faults.drop_exactly:
            self.dropped += 1
            return []
        copies = 1
        if duplicate < faults.duplicate:
            self.duplicated += 1
            copies = 2
        delay_s = faults.delay_s + jitter * faults.jitter_s
        if reorder < faults.reorder:
            self.reordered += 1
            self._hold(frame, now + delay_s + faults.reorder_hold_s, copies)
            return []
        if delay_s:
            self._hold(frame, now + delay_s, copies)
            return []
        overtaken = [held for _, _, held in sorted(self._held)]
        self._held.clear()
        return [frame] * copies + overtaken

    def due(self, now: float) -> list[bytes]:
        """The held frames whose time has come."""
        frames = []
        while self._held and self._held[0][0] <= now:
            frames.append(heapq.heappop(self._held)[2])
        return frames

    def next_due(self) -> float | None:
        """When the next held frame must go."""
        return self._held[0][0] if self._held else None

    def _hold(self, frame: bytes, until: float, copies: int) -> None:
        for _ in range(copies):
            heapq.heappush(self._held, (until, next(self._serial), frame))


class FaultyWire:
    """A bad wire between two hosts. Use as a context manager inside the lab's own; `close` stops the relay.

    `left_to_right` and `right_to_left` are its two `Direction`s; `interfaces` the names at the two hosts.
    """

    def __init__(
        self,
        lab: Lab,
        left: Host,
        left_address: str,
        right: Host,
        right_address: str,
        *,
        seed: int,
        left_to_right: Faults = PERFECT,
        right_to_left: Faults = PERFECT,
        mtu: int = 1500,
    ) -> None:
        self.left_to_right = Direction(left_to_right, random.Random(f"{seed} left to right"))
        self.right_to_left = Direction(right_to_left, random.Random(f"{seed} right to left"))
        self._middle = middle = lab.host(f"wire{len(lab.hosts)}")
        middle.sysctl("net.ipv6.conf.default.disable_ipv6", 1)
        left_name, right_name = left.next_interface(), right.next_interface()
        lab.connect(left, left_address, middle, "", mtu=mtu, names=(left_name, "left"))
        lab.connect(right, right_address, middle, "", mtu=mtu, names=(right_name, "right"))
        self.interfaces = (left_name, right_name)
        for host, interface in ((left, left_name), (right, right_name)):
            host.offload(interface, tso=False, gso=False, tx=False)
        left_socket, right_socket = (self._open(name) for name in ("left", "right"))
        self._routes = {
            left_socket.fileno(): (left_socket, right_socket, self.left_to_right),
            right_socket.fileno(): (right_socket, left_socket, self.right_to_left),
        }
        self._wake_read, self._wake_write = os.pipe()
        self._failure: list[BaseException] = []
        self._thread = threading.Thread(target=self._relay_guarded, name="lab-faulty-wire", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the relay; raises what went wrong in it, also that it was too slow and lost packets itself."""
        os.close(self._wake_write)
        self._thread.join()
        lost = 0
        for receiving, _, _ in self._routes.values():
            lost += packet_statistics(receiving).dropped
            receiving.close()
        os.close(self._wake_read)
        if self._failure:
            raise self._failure[0]
        if lost:
            raise OverflowError(f"the faulty wire lost {lost} packets that its seed had not condemned")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self, interface: str) -> socket.socket:
        packet_socket = self._middle.call(socket.socket, socket.AF_PACKET, socket.SOCK_RAW, 0)
        packet_socket.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
        packet_socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BUFFER_BYTES)
        packet_socket.setblocking(False)
        packet_socket.bind((interface, ETH_P_ALL))
        return packet_socket

    def _relay_guarded(self) -> None:
        try:
            self._relay()
        except BaseException as error:
            self._failure.append(error)

    def _relay(self) -> None:
        poll = select.poll()
        for fd in (*self._routes, self._wake_read):
            poll.register(fd, select.POLLIN)
        while True:
            due = [direction.next_due() for *_, direction in self._routes.values()]
            next_due = min((when for when in due if when is not None), default=None)
            wait_ms = None if next_due is None else max(0.0, (next_due - time.monotonic()) * 1000)
            for fd, _ in poll.poll(wait_ms):
                if fd == self._wake_read:
                    return
                receiving, sending, direction = self._routes[fd]
                _move(receiving, sending, direction)
            now = time.monotonic()
            for _, sending, direction in self._routes.values():
                for frame in direction.due(now):
                    _send(sending, frame)


def _move(receiving: socket.socket, sending: socket.socket, direction: Direction) -> None:
    receive: Callable[[int], bytes] = receiving.recv
    for _ in range(FRAMES_PER_TURN):
        try:
            frame = receive(FRAME_BYTES_MAX)
        except BlockingIOError:
            return
        for outgoing in direction.pass_on(frame, time.monotonic()):
            _send(sending, outgoing)


def _send(sending: socket.socket, frame: bytes) -> None:
    """Put a frame on the wire, waiting when the queue is full: the relay itself must not lose any."""
    while True:
        try:
            sending.send(frame)
        except BlockingIOError:
            select.select([], [sending], [])
        else:
            return


def _concerns(faults: Faults, frame: bytes) -> bool:
    if frame[ETHERTYPE_FIELD] != ETHERTYPE_IPV4:
        return False
    return faults.protocol is None or frame[PROTOCOL_OFFSET] == faults.protocol
