"""Which pair is served when, and when is a pair over, in the pure Python engine? The counterpart of
splice_worker.pxd.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import socket
import struct
import termios
import threading
import time
from collections import OrderedDict
from collections.abc import Callable

from translator.splice_fallback_direction import Mover, Pair, opened
from translator.splice_types import COUNTER_NAMES, LINGER_CHECK_S, CompletionReason, DirectionState

__all__ = ["Pair", "Worker"]

EVENTS_AT_ONCE = 256
WANTED_EVENTS = select.EPOLLIN | select.EPOLLOUT | select.EPOLLPRI | select.EPOLLRDHUP | select.EPOLLET
ABOUT_READING = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR | select.EPOLLPRI
ABOUT_THE_END = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
ABOUT_WRITING = select.EPOLLOUT | select.EPOLLHUP | select.EPOLLERR
TIMER_IDLE, TIMER_LEFT_FIN = 0, 1
RESETS = (CompletionReason.LEFT_RESET, CompletionReason.RIGHT_RESET)
EXPIRED = (
    CompletionReason.IDLE_TIMEOUT,
    CompletionReason.LEFT_FIN_TIMEOUT,
    CompletionReason.RIGHT_FIN_TIMEOUT,
)


class Worker:
    """The loop of one engine thread. Other threads use submit(), request_stop() and the counters only.

    `publish` is called in the thread with pairs that are over; they are not touched again.
    Raises OSError when there are no descriptors left.
    """

    def __init__(
        self, sizes: list[int], timeouts_s: tuple[float, float, float], publish: Callable[[list[Pair]], None]
    ) -> None:
        self.counters = dict.fromkeys(COUNTER_NAMES, 0)
        self.completed = dict.fromkeys(CompletionReason, 0)
        self._mover = Mover(sizes, self.counters)
        self._timeouts_s = timeouts_s
        self._publish = publish
        self._lock = threading.Lock()
        self._submitted: dict[Pair, None] = {}
        self._stopping = False
        self._ends: dict[int, tuple[Pair, int]] = {}
        self._timers: tuple[OrderedDict[Pair, None], ...] = (OrderedDict(), OrderedDict(), OrderedDict())
        self._timer_of: dict[Pair, int] = {}
        self._lingering: dict[Pair, None] = {}
        self._next_linger_check_s = 0.0
        self._finished: list[Pair] = []
        self._epoll = select.epoll()
        try:
            self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        except OSError:
            self._epoll.close()
            raise
        self._epoll.register(self._wake_fd, select.EPOLLIN)

    def pairs_active(self) -> int:
        return self.counters["pairs_total"] - sum(self.completed.values())

    def submit(self, pair: Pair, is_new: bool = False) -> None:
        """Have a new pair started, or a cancelled one ended; nothing happens to one that is over."""
        with self._lock:
            if is_new:
                self.counters["pairs_total"] += 1
            if not pair.completed_s:
                if not self._submitted:
                    os.eventfd_write(self._wake_fd, 1)
                self._submitted[pair] = None

    def request_stop(self) -> None:
        with self._lock:
            self._stopping = True
            os.eventfd_write(self._wake_fd, 1)

    def close(self) -> None:
        """After the thread has ended."""
        self._epoll.close()
        os.close(self._wake_fd)
        self._mover.pool.close()

    def run(self) -> None:
        """The thread: until a stop is requested."""
        # Signals are for the main thread. SIGPIPE, which splice(2) to a dead socket raises, stays blocked
        # here.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            while self._round():
                continue
        finally:
            # Also when the thread dies of a programming error: its pairs must not be lost with it.
            for timer in self._timers:
                while timer:
                    self._complete(next(iter(timer)), CompletionReason.CANCELLED)
            self._hand_over()

    def _round(self) -> bool:
        """Wait for events and work them off. False: a stop was requested."""
        events = self._epoll.poll(self._next_wait_s(), EVENTS_AT_ONCE)
        self.counters["wakeups"] += 1
        self._mover.now_s = time.monotonic()
        woken = False
        for fd, flags in events:
            if fd == self._wake_fd:
                woken = True
            else:
                self._note_event(fd, flags)
        self._serve_ready()
        stopping = woken and self._take_submissions()
        self._check_lingering()
        self._expire()
        self._hand_over()
        return not stopping

    def _hand_over(self) -> None:
        if self._finished:
            self._publish(self._finished)
            self._finished = []

    def _complete(self, pair: Pair, reason: CompletionReason) -> None:
        """Take the pair out of everything and put it on the finished list."""
        for end, direction in zip(pair.ends, pair.directions, strict=True):
            if end.registered:
                try:
                    self._epoll.unregister(end.fd)
                except OSError:
                    self.counters["epoll_errors"] += 1
                del self._ends[end.fd]
                end.registered = False
            if end.socket is not None:
                end.socket.detach()
                end.socket = None
            self._mover.discard(direction)
        self._mover.ready.pop(pair, None)
        self._lingering.pop(pair, None)
        self._set_timer(pair, None)
        pair.reason = reason
        self.completed[reason] += 1
        with self._lock:
            pair.completed_s = time.monotonic()
            self._submitted.pop(pair, None)
        self._finished.append(pair)

    def _set_timer(self, pair: Pair, timer: int | None) -> None:
        """Put the pair at the end of a timer's list; each list is sorted by active_s because of that."""
        before = self._timer_of.pop(pair, None)
        if before is not None:
            del self._timers[before][pair]
        if timer is not None:
            self._timers[timer][pair] = None
            self._timer_of[pair] = timer

    def _note_event(self, fd: int, flags: int) -> None:
        pair, side = self._ends[fd]
        end = pair.ends[side]
        if flags & ABOUT_READING:
            pair.directions[side].readable = True
            if flags & ABOUT_THE_END:
                end.hangup = True
            if flags & select.EPOLLERR:
                end.check_error = True
            if flags & select.EPOLLPRI:
                pair.directions[side].urgent = True
        if flags & ABOUT_WRITING:
            end.writable = True
        self._mover.ready[pair] = None

    def _serve_ready(self) -> None:
        """Serve each ready pair once; those that become ready meanwhile wait for the next round."""
        mover = self._mover
        for pair in list(mover.ready):
            del mover.ready[pair]
            for side in (0, 1):
                if pair.ends[side].check_error:
                    pair.ends[side].check_error = False
                    mover.take_error(pair, side)
            first = mover.serve(pair, 0)
            second = mover.serve(pair, 1)
            if not first or not second:
                mover.ready[pair] = None
            self._settle(pair)

    def _settle(self, pair: Pair) -> None:
        """After serving: is the pair over, and if not, what does it wait for?"""
        left_to_right, right_to_left = pair.directions
        if pair.failed_errno:
            self._complete(pair, CompletionReason.FAILED)
            return
        if pair.reset_side >= 0:
            state = pair.directions[pair.reset_side].state
            if pair.ends[1 - pair.reset_side].error or state is DirectionState.CUT_OFF:
                self._complete(pair, RESETS[pair.reset_side])
                return
            if state in (DirectionState.DELIVERED, DirectionState.SHUT):
                if is_acknowledged(pair, 1 - pair.reset_side):
                    self._complete(pair, RESETS[pair.reset_side])
                    return
                if not self._lingering:
                    self._next_linger_check_s = self._mover.now_s + LINGER_CHECK_S
                self._lingering[pair] = None
        elif left_to_right.state is right_to_left.state is DirectionState.SHUT:
            self._complete(pair, CompletionReason.FINISHED)
            return
        if pair.active_s == self._mover.now_s:
            self._set_timer(pair, awaited_timer(pair))

    def _take_submissions(self) -> bool:
        """Start new pairs, cancel others. True when the engine stops."""
        os.eventfd_read(self._wake_fd)
        with self._lock:
            batch, self._submitted = self._submitted, {}
            stopping = self._stopping
        # Pairs that were added since poll() returned must not be older than their add().
        self._mover.now_s = time.monotonic()
        for pair in batch:
            if pair.cancel_wanted:
                self._complete(pair, CompletionReason.CANCELLED)
            else:
                self._start(pair)
        return stopping

    def _start(self, pair: Pair) -> None:
        """Register both ends. What is waiting in them already comes back as their first event, in the next
        round.
        """
        pair.active_s = self._mover.now_s
        self._set_timer(pair, TIMER_IDLE)
        for side, end in enumerate(pair.ends):
            try:
                opened(end).setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
                self._epoll.register(end.fd, WANTED_EVENTS)
            except OSError as error:
                end.error = error.errno or 0
                self._complete(pair, CompletionReason.FAILED)
                return
            end.registered = True
            self._ends[end.fd] = (pair, side)

    def _check_lingering(self) -> None:
        now_s = self._mover.now_s
        if self._lingering and now_s >= self._next_linger_check_s:
            self._next_linger_check_s = now_s + LINGER_CHECK_S
            for pair in list(self._lingering):
                if is_acknowledged(pair, 1 - pair.reset_side):
                    self._complete(pair, RESETS[pair.reset_side])

    def _expire(self) -> None:
        """Complete the pairs whose timeout is over: they stand at the front of their list."""
        for timer, timeout_s, reason in zip(self._timers, self._timeouts_s, EXPIRED, strict=True):
            while timer:
                pair = next(iter(timer))
                if pair.active_s + timeout_s > self._mover.now_s:
                    break
                self._complete(pair, RESETS[pair.reset_side] if pair.reset_side >= 0 else reason)

    def _next_wait_s(self) -> float:
        """How long epoll may sleep: -1 forever."""
        if self._mover.ready:
            return 0.0
        due = [
            next(iter(timer)).active_s + timeout_s
            for timer, timeout_s in zip(self._timers, self._timeouts_s, strict=True)
            if timer
        ]
        if self._lingering:
            due.append(self._next_linger_check_s)
        if not due:
            return -1
        return min(max(min(due) - time.monotonic(), 0.0), 3600.0)


def awaited_timer(pair: Pair) -> int:
    """Which timeout applies: for whom does the pair wait?"""
    if pair.reset_side >= 0:
        return TIMER_LEFT_FIN + 1 - pair.reset_side
    for side in (0, 1):
        if pair.directions[side].state is DirectionState.SHUT:
            # Direction 1 - side is the one that is left: it reads from end 1 - side and writes to end `side`.
            full = pair.directions[1 - side].state is DirectionState.DESTINATION_FULL
            return TIMER_LEFT_FIN + (side if full else 1 - side)
    return TIMER_IDLE


def is_acknowledged(pair: Pair, side: int) -> bool:
    """Has the peer of the socket on `side` acknowledged all that was written? A reset then cannot destroy any
    of it.
    """
    try:
        answer = fcntl.ioctl(opened(pair.ends[side]), termios.TIOCOUTQ, bytes(4))
    except OSError:
        return True
    return bool(struct.unpack("i", answer)[0] == 0)
