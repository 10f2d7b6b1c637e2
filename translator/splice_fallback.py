"""How are pairs of sockets relayed where the compiled engine is missing? The same engine in pure Python.

Same states, rules and API as splice_ext (see splice_types.py), with os.splice in one or more ordinary
threads; where os.splice is missing it copies. The method bodies follow splice_direction.pxd and
splice_worker.pxd one to one, and the same tests run against both.
"""

from __future__ import annotations

import os
import threading
import time
from types import TracebackType
from typing import Self

from serval_core.errors import KernelRefused, OurMistake
from translator.splice_fallback_worker import Pair, Worker
from translator.splice_types import (
    COUNTER_NAMES,
    Completion,
    CompletionReason,
    DirectionState,
    PairCounters,
    check_settings,
    pipe_sizes,
)

MORE_FILES = "Raise the limit of open files (ulimit -n)."


class CompletionQueue:
    """Completed pairs on their way from the threads to Python's callers, and the eventfd that announces
    them.
    """

    __slots__ = ("_lock", "_pairs", "notification_fd")

    def __init__(self) -> None:
        self.notification_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._lock = threading.Lock()
        self._pairs: list[Pair] = []

    def put(self, pairs: list[Pair]) -> None:
        with self._lock:
            if not self._pairs:
                os.eventfd_write(self.notification_fd, 1)
            self._pairs += pairs

    def take(self) -> list[Pair]:
        with self._lock:
            if self._pairs and self.notification_fd >= 0:
                os.eventfd_read(self.notification_fd)
            taken, self._pairs = self._pairs, []
        return taken

    def close(self) -> None:
        os.close(self.notification_fd)
        self.notification_fd = -1


class SpliceEngine:
    """Passes bytes between pairs of connected TCP sockets in threads of its own, by splice(2) where that
    pays.

    pipe_bytes: size asked for each pipe; smaller ones are tried when the kernel refuses, then bytes are
    copied. 0: always copy. The timeouts are explained in splice_types.py; math.inf switches one off. The
    methods may be called from any Python thread. Raises OurMistake for settings that make no sense,
    KernelRefused when there are no descriptors left for the engine itself.
    """

    def __init__(
        self,
        *,
        pipe_bytes: int = 1 << 20,
        idle_timeout_s: float = 3600.0,
        left_fin_timeout_s: float = 60.0,
        right_fin_timeout_s: float = 60.0,
        threads: int = 1,
    ) -> None:
        check_settings(pipe_bytes, idle_timeout_s, left_fin_timeout_s, right_fin_timeout_s, threads)
        sizes = pipe_sizes(pipe_bytes) if hasattr(os, "splice") else []
        timeouts = (idle_timeout_s, left_fin_timeout_s, right_fin_timeout_s)
        self._pairs: dict[int, Pair] = {}
        self._workers: list[Worker] = []
        self._stopped = False
        try:
            self._completed = CompletionQueue()
        except OSError as error:
            raise KernelRefused("eventfd", error.errno or 0, MORE_FILES) from error
        try:
            for _ in range(threads):
                self._workers.append(Worker(sizes, timeouts, self._completed.put))
        except OSError as error:
            for worker in self._workers:
                worker.close()
            self._completed.close()
            raise KernelRefused("epoll_create1", error.errno or 0, MORE_FILES) from error
        # Daemon threads: a program that exits without stop() must not hang in the wait for them.
        self._threads = [
            threading.Thread(target=worker.run, name=f"splice-{index}", daemon=True)
            for index, worker in enumerate(self._workers)
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def notification_fd(self) -> int:
        """An eventfd that is readable while completions wait. Owned by the engine; closed by stop()."""
        return self._completed.notification_fd

    def add(self, pair_id: int, left_fd: int, right_fd: int) -> None:
        """Start passing bytes between two connected nonblocking TCP sockets.

        Both are borrowed until the pair's completion has been taken: do not read, write, shut or close them
        before. SO_OOBINLINE is set on them, so that urgent data can be passed on. Raises OurMistake for a
        pair_id in use, a descriptor that is closed or blocking, and a stopped engine.
        """
        if self._stopped:
            raise OurMistake("the splice engine is stopped")
        if pair_id in self._pairs:
            raise OurMistake(f"pair {pair_id} exists already")
        if left_fd == right_fd:
            raise OurMistake(f"descriptor {left_fd} cannot be both sides of a pair")
        for fd in (left_fd, right_fd):
            try:
                blocking = os.get_blocking(fd)
            except OSError as error:
                raise OurMistake(f"descriptor {fd} is not open") from error
            if blocking:
                raise OurMistake(f"descriptor {fd} is blocking: set it nonblocking, or it holds up others")
        worker = min(self._workers, key=Worker.pairs_active)
        pair = Pair(pair_id, left_fd, right_fd, worker)
        self._pairs[pair_id] = pair
        worker.submit(pair, is_new=True)

    def cancel(self, pair_id: int) -> bool:
        """End a pair now; its completion (CANCELLED, unless it ended otherwise first) still has to be taken.

        False when no such pair is known, which is normal for one whose completion has just been taken.
        """
        pair = self._pairs.get(pair_id)
        if pair is None:
            return False
        if not self._stopped:
            pair.cancel_wanted = True
            pair.worker.submit(pair)
        return True

    def completions(self) -> list[Completion]:
        """Take the completions of all pairs that have ended since the last call; works after stop() as
        well.
        """
        found = []
        for pair in self._completed.take():
            left, right = pair.ends
            found.append(
                Completion(
                    pair.pair_id,
                    pair.reason,
                    pair.directions[0].delivered_bytes,
                    pair.directions[1].delivered_bytes,
                    left.error,
                    right.error,
                    pair.completed_s - pair.added_s,
                )
            )
            del self._pairs[pair.pair_id]
        return found

    def pair_counters(self, pair_id: int) -> PairCounters | None:
        """Where a pair stands, or None when it is unknown (its completion has been taken).

        Read while the thread works on it, without a lock: the numbers need not be from one instant.
        """
        pair = self._pairs.get(pair_id)
        if pair is None:
            return None
        states = []
        for direction, source in zip(pair.directions, pair.ends, strict=True):
            state = direction.state
            if state is DirectionState.SOURCE_EMPTY and direction.readable:
                state = DirectionState.SOURCE_READY
            elif state is DirectionState.DESTINATION_FULL and source.hangup:
                state = DirectionState.DRAINING
            states.append(state)
        return PairCounters(
            pair.directions[0].delivered_bytes,
            pair.directions[1].delivered_bytes,
            pair.directions[0].held_bytes(),
            pair.directions[1].held_bytes(),
            states[0],
            states[1],
            (pair.completed_s or time.monotonic()) - pair.added_s,
        )

    def counters(self) -> dict[str, int]:
        """The engine's totals, by the names in splice_types.COUNTER_NAMES, "pairs_active" and
        "completed_<reason>".
        """
        totals = {name: sum(worker.counters[name] for worker in self._workers) for name in COUNTER_NAMES}
        completed = {
            reason: sum(worker.completed[reason] for worker in self._workers) for reason in CompletionReason
        }
        totals["pairs_active"] = totals["pairs_total"] - sum(completed.values())
        for reason, count in completed.items():
            totals[f"completed_{reason.name.lower()}"] = count
        return totals

    def stop(self) -> None:
        """Cancel every pair, end the threads, close all descriptors of the engine. Completions can still be
        taken.

        Take notification_fd out of any event loop before. Calling it again does nothing.
        """
        if self._stopped:
            return
        self._stopped = True
        for worker in self._workers:
            worker.request_stop()
        for thread in self._threads:
            thread.join()
        for worker in self._workers:
            worker.close()
        self._completed.close()
