"""Where does a direction of the pure Python engine get a pipe? The counterpart of splice_pipes.pxd.

A pool per thread. A pipe is lent only while bytes are pending, and comes back only when it is empty: one that
still holds bytes of a dead connection is closed, since the next borrower would deliver them to someone else.
When the kernel refuses a pipe the caller copies instead; the pool asks again after a pause.
"""

from __future__ import annotations

import fcntl
import os

from translator.splice_types import IDLE_PIPES, PIPE_RETRY_S


class Pipe:
    """Both descriptors of a pipe, and how many bytes are in it."""

    __slots__ = ("held_bytes", "read_fd", "write_fd")

    def __init__(self, read_fd: int, write_fd: int) -> None:
        self.read_fd = read_fd
        self.write_fd = write_fd
        self.held_bytes = 0


class PipePool:
    """Pipes of one thread: lent only while bytes are pending, taken back only when empty (else closed)."""

    __slots__ = ("_counters", "_idle", "_refused_until_s", "_sizes")

    def __init__(self, sizes: list[int], counters: dict[str, int]) -> None:
        self._sizes = sizes
        self._counters = counters
        self._idle: list[Pipe] = []
        self._refused_until_s = 0.0

    def lend(self, now_s: float) -> Pipe | None:
        """An empty pipe, or None: then copy."""
        if self._idle:
            pipe = self._idle.pop()
        elif not self._sizes or now_s < self._refused_until_s:
            return None
        else:
            created = self._create()
            if created is None:
                self._counters["pipes_refused"] += 1
                self._refused_until_s = now_s + PIPE_RETRY_S
                return None
            pipe = created
        counters = self._counters
        counters["pipes_lent"] += 1
        counters["pipes_lent_high_water"] = max(counters["pipes_lent_high_water"], counters["pipes_lent"])
        return pipe

    def _create(self) -> Pipe | None:
        try:
            pipe = Pipe(*os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC))
        except OSError:
            return None
        for size in self._sizes:
            try:
                fcntl.fcntl(pipe.write_fd, fcntl.F_SETPIPE_SZ, size)
                break
            except OSError:
                continue
        else:
            # Above pipe-user-pages-soft a new pipe has two pages and cannot grow.
            if fcntl.fcntl(pipe.write_fd, fcntl.F_GETPIPE_SZ) < self._sizes[-1]:
                os.close(pipe.read_fd)
                os.close(pipe.write_fd)
                return None
        self._counters["pipes_open"] += 1
        self._counters["pipes_created"] += 1
        return pipe

    def give_back(self, pipe: Pipe) -> None:
        self._counters["pipes_lent"] -= 1
        if pipe.held_bytes == 0 and len(self._idle) < IDLE_PIPES:
            self._idle.append(pipe)
            return
        if pipe.held_bytes:
            self._counters["pipes_discarded"] += 1
        self._close(pipe)

    def _close(self, pipe: Pipe) -> None:
        os.close(pipe.read_fd)
        os.close(pipe.write_fd)
        self._counters["pipes_open"] -= 1

    def close(self) -> None:
        while self._idle:
            self._close(self._idle.pop())
