"""How do the bytes of one direction move, in the pure Python engine? The counterpart of splice_direction.pxd.

Small amounts are copied through the thread's buffer (recv, send), larger ones spliced through a lent pipe.
Bytes that the destination did not take are held in the pipe or, after a copy, in a buffer of their own; never
in both.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
import time
from typing import TYPE_CHECKING

from translator.splice_fallback_pipes import Pipe, PipePool
from translator.splice_types import (
    BUDGET_BYTES,
    BUFFER_BYTES,
    COPY_BYTES,
    SMALL_DRAINS,
    CompletionReason,
    DirectionState,
)

if TYPE_CHECKING:
    from translator.splice_fallback_worker import Worker

SIOCATMARK = 0x8905
OWN_FAILURES = frozenset((errno.EBADF, errno.ENOTSOCK, errno.EFAULT, errno.ENOMEM))
SPLICE_FLAGS = getattr(os, "SPLICE_F_MOVE", 1) | getattr(os, "SPLICE_F_NONBLOCK", 2)


class Endpoint:
    """One borrowed socket. `error` is the errno with which it failed; the flags are what events have said
    about it.
    """

    __slots__ = ("check_error", "error", "fd", "hangup", "registered", "socket", "writable")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.socket: socket.socket | None = None
        self.error = 0
        self.registered = False
        self.writable = True
        self.hangup = False
        self.check_error = False


class Direction:
    """One direction of a pair; the fields are explained in splice_direction.pxd."""

    __slots__ = (
        "bulk",
        "copy_only",
        "delivered_bytes",
        "drained_bytes",
        "held",
        "held_urgent",
        "pipe",
        "readable",
        "small_drains",
        "state",
        "urgent",
    )

    def __init__(self) -> None:
        self.state = DirectionState.SOURCE_EMPTY
        self.readable = False
        self.urgent = False
        self.copy_only = False
        self.bulk = False
        self.small_drains = 0
        self.drained_bytes = 0
        self.pipe: Pipe | None = None
        self.held = b""
        self.held_urgent = False
        self.delivered_bytes = 0

    def held_bytes(self) -> int:
        pipe = self.pipe
        return len(self.held) + (pipe.held_bytes if pipe is not None else 0)


class Pair:
    """Two borrowed sockets. Direction 0 reads from end 0 (left) and writes to end 1 (right), direction 1 the
    other way.
    """

    __slots__ = (
        "active_s",
        "added_s",
        "cancel_wanted",
        "completed_s",
        "directions",
        "ends",
        "failed_errno",
        "pair_id",
        "reason",
        "reset_side",
        "worker",
    )

    def __init__(self, pair_id: int, left_fd: int, right_fd: int, worker: Worker) -> None:
        self.pair_id = pair_id
        self.ends = (Endpoint(left_fd), Endpoint(right_fd))
        self.directions = (Direction(), Direction())
        self.worker = worker
        self.reset_side = -1
        self.failed_errno = 0
        self.reason = CompletionReason.FAILED
        self.cancel_wanted = False
        self.added_s = time.monotonic()
        self.active_s = 0.0
        self.completed_s = 0.0


class Mover:
    """Moves bytes for the pairs of one thread. `now_s` is set by the loop; `ready` is shared with it."""

    def __init__(self, sizes: list[int], counters: dict[str, int]) -> None:
        self.counters = counters
        self.pool = PipePool(sizes, counters)
        self.ready: dict[Pair, None] = {}
        self.now_s = 0.0
        self._buffer = memoryview(bytearray(BUFFER_BYTES))

    def serve(self, pair: Pair, index: int) -> bool:
        """Move bytes until the source is empty, the destination full or the budget used up. False: used up,
        call again.
        """
        direction = pair.directions[index]
        budget = BUDGET_BYTES
        while pair.failed_errno == 0:
            if direction.state is DirectionState.DESTINATION_FULL:
                if not self._deliver(pair, index):
                    return True
                direction.state = DirectionState.SOURCE_EMPTY
            if direction.state is not DirectionState.SOURCE_EMPTY or not direction.readable:
                return True
            if budget <= 0:
                self.counters["budget_used_up"] += 1
                return False
            if direction.bulk and not direction.copy_only and not direction.urgent:
                direction.pipe = self.pool.lend(self.now_s)
            if direction.pipe is not None:
                budget -= self._splice_once(pair, index, direction.pipe, budget)
            else:
                budget -= self._copy_once(pair, index)
        return True

    def discard(self, direction: Direction) -> None:
        """Let go of whatever the direction holds: it can no longer be delivered."""
        self.counters["undelivered_bytes"] += direction.held_bytes()
        self._return_pipe(direction)
        direction.held = b""

    def take_error(self, pair: Pair, side: int) -> None:
        """After EPOLLERR: learn what is wrong, if anything."""
        error = socket_error(pair.ends[side], 0)
        if error:
            self.end_failed(pair, side, error)

    def end_failed(self, pair: Pair, side: int, error: int) -> None:
        """The socket on `side` is dead: nothing more can be written to it, but what it has received can still
        be read.
        """
        towards = pair.directions[1 - side]
        if error == errno.ENOTCONN:
            error = socket_error(pair.ends[side], errno.ENOTCONN)  # shutdown(2) does not tell why
        if error in OWN_FAILURES:
            pair.failed_errno = error
        if pair.ends[side].error == 0:
            pair.ends[side].error = error
        if pair.reset_side < 0:
            pair.reset_side = side
        if towards.state is not DirectionState.SHUT:
            self.discard(towards)
            towards.state = DirectionState.CUT_OFF
        pair.directions[side].readable = True
        pair.active_s = self.now_s
        self.ready[pair] = None

    def _return_pipe(self, direction: Direction) -> None:
        if direction.pipe is not None:
            self.pool.give_back(direction.pipe)
            direction.pipe = None

    def _source_ended(self, pair: Pair, index: int) -> None:
        """Everything that the source had is delivered: pass the end on."""
        direction = pair.directions[index]
        direction.readable = False
        pair.active_s = self.now_s
        self._return_pipe(direction)
        if pair.ends[index].error:
            direction.state = DirectionState.DELIVERED
            return
        try:
            opened(pair.ends[1 - index]).shutdown(socket.SHUT_WR)
            direction.state = DirectionState.SHUT
        except OSError as error:
            self.end_failed(pair, 1 - index, error.errno or 0)

    def _delivered(self, pair: Pair, index: int, count: int, counter: str) -> None:
        pair.directions[index].delivered_bytes += count
        self.counters["right_to_left_bytes" if index else "left_to_right_bytes"] += count
        self.counters[counter] += count
        pair.active_s = self.now_s

    def _deliver(self, pair: Pair, index: int) -> bool:
        """Write what the direction holds. True when nothing is held any more."""
        direction = pair.directions[index]
        destination = pair.ends[1 - index]
        pipe = direction.pipe
        while direction.held_bytes() > 0:
            if not destination.writable:
                return False
            try:
                if pipe is not None:
                    self.counters["splice_calls"] += 1
                    count = os.splice(pipe.read_fd, destination.fd, pipe.held_bytes, flags=SPLICE_FLAGS)
                    pipe.held_bytes -= count
                    self._delivered(pair, index, count, "spliced_bytes")
                else:
                    self.counters["copy_calls"] += 1
                    count = opened(destination).send(direction.held, send_flags(direction.held_urgent))
                    direction.held = direction.held[count:]
                    self._delivered(pair, index, count, "copied_bytes")
            except BlockingIOError:
                destination.writable = False
            except OSError as error:
                self.end_failed(pair, 1 - index, error.errno or 0)
                return False
        direction.held_urgent = False
        self._return_pipe(direction)
        return True

    def _send_or_hold(self, pair: Pair, index: int, data: memoryview, urgent: bool) -> None:
        """Write bytes that were just copied from the source; what the destination does not take is held."""
        direction = pair.directions[index]
        destination = pair.ends[1 - index]
        sent = 0
        if destination.writable:
            self.counters["copy_calls"] += 1
            try:
                sent = opened(destination).send(data, send_flags(urgent))
            except BlockingIOError:
                destination.writable = False
            except OSError as error:
                self.counters["undelivered_bytes"] += len(data)
                self.end_failed(pair, 1 - index, error.errno or 0)
                return
            self._delivered(pair, index, sent, "copied_bytes")
        if sent < len(data):
            direction.held = bytes(data[sent:])
            direction.held_urgent = urgent
            direction.state = DirectionState.DESTINATION_FULL

    def _pass_urgent(self, pair: Pair, index: int) -> bool:
        """At the mark of urgent data, pass its byte on as urgent (RFC 6093 section 3). True when one was passed.

        It is read in line (SO_OOBINLINE): otherwise a read that begins at a mark would skip it.
        """
        source = opened(pair.ends[index])
        try:
            if struct.unpack("i", fcntl.ioctl(source, SIOCATMARK, bytes(4)))[0] == 0:
                return False
            byte = source.recv(1, socket.MSG_DONTWAIT)
        except OSError:
            # Not here yet (EAGAIN); a failed socket will say so when it is read.
            return False
        if not byte:
            return False
        self.counters["urgent_bytes"] += 1
        self._send_or_hold(pair, index, memoryview(byte), True)
        return True

    def _copy_once(self, pair: Pair, index: int) -> int:
        """Read into the thread's buffer and write from it. The number of bytes read; 0 when there was
        nothing.
        """
        direction = pair.directions[index]
        source = pair.ends[index]
        wanted = BUFFER_BYTES if direction.bulk or direction.copy_only else COPY_BYTES
        if direction.urgent and self._pass_urgent(pair, index):
            return 1
        self.counters["copy_calls"] += 1
        try:
            count = opened(source).recv_into(self._buffer, wanted, socket.MSG_DONTWAIT)
        except OSError as error:
            self._read_failed(pair, index, error)
            return 0
        if count == 0:
            self._source_ended(pair, index)
            return 0
        pair.active_s = self.now_s
        if count == wanted:
            direction.bulk = True
        elif not source.hangup and not direction.urgent:
            direction.readable = False  # less than asked for: the next byte brings a new edge (epoll(7))
        self._send_or_hold(pair, index, self._buffer[:count], False)
        return count

    def _read_failed(self, pair: Pair, index: int, error: OSError) -> None:
        if isinstance(error, BlockingIOError):
            pair.directions[index].readable = False
        else:
            self.end_failed(pair, index, error.errno or 0)
            self._source_ended(pair, index)

    def _splice_found_nothing(self, pair: Pair, index: int) -> None:
        """splice returned 0. That is the end of the stream only if a look at the queue says so: at the mark
        of urgent data it returns 0 as well.
        """
        try:
            seen = opened(pair.ends[index]).recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except OSError as error:
            self._read_failed(pair, index, error)
            return
        if seen:
            self.counters["false_ends"] += 1
            pair.directions[index].urgent = True
        else:
            self._source_ended(pair, index)

    def _splice_once(self, pair: Pair, index: int, pipe: Pipe, wanted: int) -> int:
        """Splice from the source into the (empty) lent pipe. The number of bytes read; 0 when there was
        nothing.
        """
        direction = pair.directions[index]
        self.counters["splice_calls"] += 1
        count = 0
        try:
            count = os.splice(pair.ends[index].fd, pipe.write_fd, wanted, flags=SPLICE_FLAGS)
            if count == 0:
                self._splice_found_nothing(pair, index)
        except BlockingIOError:
            # The pipe was empty, so this speaks of the source.
            direction.readable = False
            small = direction.drained_bytes < COPY_BYTES
            direction.small_drains = direction.small_drains + 1 if small else 0
            direction.drained_bytes = 0
            if direction.small_drains >= SMALL_DRAINS:
                direction.bulk = False
                direction.small_drains = 0
        except OSError as error:
            if error.errno == errno.EINVAL:
                direction.copy_only = True
            else:
                self._read_failed(pair, index, error)
        if count > 0:
            pair.active_s = self.now_s
            pipe.held_bytes = count
            direction.drained_bytes += count
            direction.state = DirectionState.DESTINATION_FULL
        elif direction.state is DirectionState.SOURCE_EMPTY:
            self._return_pipe(direction)
        return count


def opened(end: Endpoint) -> socket.socket:
    """The socket object around the borrowed descriptor, made at its first use."""
    if end.socket is None:
        end.socket = socket.socket(fileno=end.fd)
    return end.socket


def socket_error(end: Endpoint, otherwise: int) -> int:
    """The pending error of a socket, which is cleared by that; `otherwise` when there is none."""
    try:
        return opened(end).getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) or otherwise
    except OSError as error:
        return error.errno or otherwise


def send_flags(urgent: bool) -> int:
    return socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL | (socket.MSG_OOB if urgent else 0)
