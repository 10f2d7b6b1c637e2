# cython: language_level=3, embedsignature=True, cdivision=True
"""How does Python hand pairs of sockets to the compiled splice engine, and get them back?

The Python side of the engine: it allocates pairs, queues them to the engine's threads and collects
completions. What the threads do is in splice_worker.pxd (which pair, when), splice_direction.pxd (moving
bytes) and splice_pipes.pxd (pipes).
"""

import threading

from libc.errno cimport errno
from libc.stdint cimport int64_t, uint64_t
from libc.stdlib cimport calloc, free, malloc

from translator.splice_direction cimport (
    STATE_DESTINATION_FULL, STATE_DRAINING, STATE_SOURCE_EMPTY, STATE_SOURCE_READY, Pair, Worker, held_bytes)
from translator.splice_pipes cimport PIPE_SIZES_AT_MOST, PIPES_KEPT_AT_MOST, pipe_pool_close
from translator.splice_system cimport (
    EFD_CLOEXEC, EFD_NONBLOCK, EPOLL_CLOEXEC, EPOLL_CTL_ADD, EPOLLIN, F_GETFL, O_NONBLOCK, Link, close,
    epoll_create1, epoll_ctl, epoll_event, eventfd, eventfd_read, eventfd_write, fcntl, list_empty, list_init,
    monotonic_ns, move_all, move_to_end, pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock,
    pthread_mutex_unlock, unlink)
from translator.splice_worker cimport TIMER_IDLE, TIMER_LEFT_FIN, TIMER_RIGHT_FIN, TIMERS, run_worker

from serval_core.errors import KernelRefused, OurMistake
from translator import splice_types
from translator.splice_types import COUNTER_NAMES, Completion, CompletionReason, DirectionState, PairCounters

cdef tuple REASON_OBJECTS = tuple(CompletionReason)
cdef tuple STATE_OBJECTS = tuple(DirectionState)


cdef int64_t timeout_ns(double timeout_s):
    """Seconds to nanoseconds; -1 (never) for what lies beyond a century."""
    return <int64_t> (timeout_s * 1e9) if timeout_s < 3e9 else -1


cdef void check_socket(int fd) except *:
    cdef int flags = fcntl(fd, F_GETFL)
    if flags < 0:
        raise OurMistake(f"descriptor {fd} is not open")
    if not flags & O_NONBLOCK:
        raise OurMistake(f"descriptor {fd} is blocking: set it nonblocking, or it holds up others")


cdef class SpliceEngine:
    """Passes bytes between pairs of connected TCP sockets in threads of its own, by splice(2) where that
    pays.

    pipe_bytes: size asked for each pipe; smaller ones are tried when the kernel refuses, then bytes are
    copied. 0: always copy. The timeouts are explained in splice_types.py; math.inf switches one off. The
    methods may be called from any Python thread. Raises OurMistake for settings that make no sense,
    KernelRefused when there are no descriptors left for the engine itself.
    """

    def __cinit__(self):
        self.notification = -1
        list_init(&self.ended)
        pthread_mutex_init(&self.ended_mutex, NULL)

    def __init__(self, *, int pipe_bytes=1 << 20, double idle_timeout_s=3600.0,
                 double left_fin_timeout_s=60.0, double right_fin_timeout_s=60.0, int threads=1):
        cdef int index
        cdef Worker *worker
        splice_types.check_settings(
            pipe_bytes, idle_timeout_s, left_fin_timeout_s, right_fin_timeout_s, threads)
        if self.workers != NULL:
            raise OurMistake("a splice engine is initialised once")
        self.pairs = {}
        self.threads = []
        self.workers = <Worker *> calloc(threads, sizeof(Worker))
        if self.workers == NULL:
            raise MemoryError
        self.worker_count = threads
        for index in range(threads):
            self.workers[index].epoll_fd = self.workers[index].wake_fd = -1
        self.notification = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        try:
            if self.notification < 0:
                raise KernelRefused("eventfd", errno, "Raise the limit of open files (ulimit -n).")
            for index in range(threads):
                self.open_worker(index)
                worker = &self.workers[index]
                worker.timeout_ns[TIMER_IDLE] = timeout_ns(idle_timeout_s)
                worker.timeout_ns[TIMER_LEFT_FIN] = timeout_ns(left_fin_timeout_s)
                worker.timeout_ns[TIMER_RIGHT_FIN] = timeout_ns(right_fin_timeout_s)
                for size in splice_types.pipe_sizes(pipe_bytes)[:PIPE_SIZES_AT_MOST]:
                    worker.pool.sizes[worker.pool.size_count] = size
                    worker.pool.size_count += 1
        except BaseException:
            self.stopped = True
            self.close_descriptors()
            raise
        # Daemon threads: a program that exits without stop() must not hang in the wait for them.
        for index in range(threads):
            thread = threading.Thread(target=self._run, args=(index,), name=f"splice-{index}", daemon=True)
            self.threads.append(thread)
            thread.start()

    cdef void open_worker(self, int index) except *:
        cdef Worker *worker = &self.workers[index]
        cdef epoll_event event
        cdef int timer
        pthread_mutex_init(&worker.mutex, NULL)
        list_init(&worker.submitted)
        list_init(&worker.ready)
        list_init(&worker.lingering)
        list_init(&worker.finished)
        for timer in range(TIMERS):
            list_init(&worker.timers[timer])
        worker.completions = &self.ended
        worker.completions_mutex = &self.ended_mutex
        worker.notification_fd = self.notification
        worker.linger_check_ns = timeout_ns(splice_types.LINGER_CHECK_S)
        worker.buffer_bytes = splice_types.BUFFER_BYTES
        worker.copy_bytes = splice_types.COPY_BYTES
        worker.budget_bytes = splice_types.BUDGET_BYTES
        worker.small_drains = splice_types.SMALL_DRAINS
        worker.pool.retry_ns = timeout_ns(splice_types.PIPE_RETRY_S)
        worker.pool.idle_limit = min(splice_types.IDLE_PIPES, PIPES_KEPT_AT_MOST)
        worker.buffer = <char *> malloc(worker.buffer_bytes)
        if worker.buffer == NULL:
            raise MemoryError
        worker.epoll_fd = epoll_create1(EPOLL_CLOEXEC)
        worker.wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        event.events = EPOLLIN
        event.data.u64 = 0
        if worker.epoll_fd < 0 or worker.wake_fd < 0 or epoll_ctl(
                worker.epoll_fd, EPOLL_CTL_ADD, worker.wake_fd, &event) < 0:
            raise KernelRefused("epoll_create1", errno, "Raise the limit of open files (ulimit -n).")

    def _run(self, int index):
        cdef Worker *worker = &self.workers[index]
        with nogil:
            run_worker(worker)

    def __dealloc__(self):
        # Only reached when no thread runs: each holds a reference to the engine.
        cdef Pair *pair
        self.close_descriptors()
        while not list_empty(&self.ended):
            pair = <Pair *> self.ended.next.owner
            unlink(&pair.queued)
            free(pair)
        free(self.workers)
        pthread_mutex_destroy(&self.ended_mutex)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.stop()

    @property
    def notification_fd(self):
        """An eventfd that is readable while completions wait. Owned by the engine; closed by stop()."""
        return self.notification

    def add(self, int64_t pair_id, int left_fd, int right_fd):
        """Start passing bytes between two connected nonblocking TCP sockets.

        Both are borrowed until the pair's completion has been taken: do not read, write, shut or close them
        before. SO_OOBINLINE is set on them, so that urgent data can be passed on. Raises OurMistake for a
        pair_id in use, a descriptor that is closed or blocking, and a stopped engine.
        """
        cdef Worker *worker
        cdef Pair *pair
        cdef int side
        if self.stopped:
            raise OurMistake("the splice engine is stopped")
        if pair_id in self.pairs:
            raise OurMistake(f"pair {pair_id} exists already")
        if left_fd == right_fd:
            raise OurMistake(f"descriptor {left_fd} cannot be both sides of a pair")
        check_socket(left_fd)
        check_socket(right_fd)
        pair = <Pair *> calloc(1, sizeof(Pair))
        if pair == NULL:
            raise MemoryError
        pair.pair_id = pair_id
        pair.reset_side = -1
        pair.ends[0].fd = left_fd
        pair.ends[1].fd = right_fd
        for side in range(2):
            pair.ends[side].writable = True
            pair.directions[side].pipe.read_fd = pair.directions[side].pipe.write_fd = -1
        pair.ready.owner = pair.timer.owner = pair.lingering.owner = pair.queued.owner = pair
        pair.added_ns = monotonic_ns()
        worker = &self.workers[self.least_busy()]
        pair.worker = worker
        worker.counters.pairs_total += 1
        self.pairs[pair_id] = <size_t> pair
        self.wake_with(worker, pair)

    cdef int least_busy(self) noexcept:
        """The thread with the fewest pairs."""
        cdef int index, reason, best = 0
        cdef int64_t active, fewest = -1
        if self.worker_count == 1:
            return 0
        for index in range(self.worker_count):
            active = self.workers[index].counters.pairs_total
            for reason in range(len(REASON_OBJECTS)):
                active -= self.workers[index].counters.completed[reason]
            if fewest < 0 or active < fewest:
                fewest = active
                best = index
        return best

    cdef void wake_with(self, Worker *worker, Pair *pair) noexcept:
        """Queue the pair, unless it is queued already or over; wake the thread when its queue was empty."""
        cdef bint was_empty
        pthread_mutex_lock(&worker.mutex)
        if not pair.completed and pair.queued.next == NULL:
            was_empty = list_empty(&worker.submitted)
            move_to_end(&worker.submitted, &pair.queued)
            if was_empty:
                eventfd_write(worker.wake_fd, 1)
        pthread_mutex_unlock(&worker.mutex)

    cdef Pair *find(self, object pair_id) except? NULL:
        return <Pair *> <size_t> self.pairs.get(pair_id, 0)

    def cancel(self, int64_t pair_id):
        """End a pair now; its completion (CANCELLED, unless it ended otherwise first) still has to be taken.

        False when no such pair is known, which is normal for one whose completion has just been taken.
        """
        cdef Pair *pair = self.find(pair_id)
        if pair == NULL:
            return False
        if not self.stopped:
            pthread_mutex_lock(&pair.worker.mutex)
            pair.cancel_wanted = True
            pthread_mutex_unlock(&pair.worker.mutex)
            self.wake_with(pair.worker, pair)
        return True

    def completions(self):
        """Take the completions of all pairs that have ended since the last call; works after stop() as
        well.
        """
        cdef Link taken
        cdef Pair *pair
        cdef uint64_t ignored
        cdef list found = []
        list_init(&taken)
        pthread_mutex_lock(&self.ended_mutex)
        if not list_empty(&self.ended):
            if self.notification >= 0:
                eventfd_read(self.notification, &ignored)
            move_all(&self.ended, &taken)
        pthread_mutex_unlock(&self.ended_mutex)
        while not list_empty(&taken):
            pair = <Pair *> taken.next.owner
            found.append(Completion(
                pair.pair_id,
                REASON_OBJECTS[pair.reason],
                pair.directions[0].delivered_bytes,
                pair.directions[1].delivered_bytes,
                pair.ends[0].error,
                pair.ends[1].error,
                (pair.completed_ns - pair.added_ns) / 1e9,
            ))
            unlink(&pair.queued)
            del self.pairs[pair.pair_id]
            free(pair)
        return found

    def pair_counters(self, int64_t pair_id):
        """Where a pair stands, or None when it is unknown (its completion has been taken).

        Read while the thread works on it, without a lock: the numbers need not be from one instant.
        """
        cdef Pair *pair = self.find(pair_id)
        cdef int side
        cdef int[2] states
        if pair == NULL:
            return None
        for side in range(2):
            states[side] = pair.directions[side].state
            if states[side] == STATE_SOURCE_EMPTY and pair.directions[side].readable:
                states[side] = STATE_SOURCE_READY
            elif states[side] == STATE_DESTINATION_FULL and pair.ends[side].hangup:
                states[side] = STATE_DRAINING
        return PairCounters(
            pair.directions[0].delivered_bytes,
            pair.directions[1].delivered_bytes,
            max(<int64_t> held_bytes(&pair.directions[0]), 0),
            max(<int64_t> held_bytes(&pair.directions[1]), 0),
            STATE_OBJECTS[states[0]],
            STATE_OBJECTS[states[1]],
            ((pair.completed_ns or monotonic_ns()) - pair.added_ns) / 1e9,
        )

    def counters(self):
        """The engine's totals, by the names in splice_types.COUNTER_NAMES, "pairs_active" and
        "completed_<reason>".
        """
        cdef Worker *worker
        cdef int index
        totals = dict.fromkeys(COUNTER_NAMES, 0)
        completed = [0] * len(REASON_OBJECTS)
        for index in range(self.worker_count):
            worker = &self.workers[index]
            totals["pairs_total"] += worker.counters.pairs_total
            totals["left_to_right_bytes"] += worker.counters.delivered_bytes[0]
            totals["right_to_left_bytes"] += worker.counters.delivered_bytes[1]
            totals["undelivered_bytes"] += worker.counters.undelivered_bytes
            totals["spliced_bytes"] += worker.counters.spliced_bytes
            totals["copied_bytes"] += worker.counters.copied_bytes
            totals["splice_calls"] += worker.counters.splice_calls
            totals["copy_calls"] += worker.counters.copy_calls
            totals["wakeups"] += worker.counters.wakeups
            totals["budget_used_up"] += worker.counters.budget_used_up
            totals["false_ends"] += worker.counters.false_ends
            totals["urgent_bytes"] += worker.counters.urgent_bytes
            totals["pipes_open"] += worker.pool.open_now
            totals["pipes_lent"] += worker.pool.lent_now
            totals["pipes_lent_high_water"] += worker.pool.lent_high_water
            totals["pipes_created"] += worker.pool.created
            totals["pipes_discarded"] += worker.pool.discarded
            totals["pipes_refused"] += worker.pool.refused
            totals["epoll_errors"] += worker.counters.epoll_errors
            for reason in range(len(completed)):
                completed[reason] += worker.counters.completed[reason]
        totals["pairs_active"] = totals["pairs_total"] - sum(completed)
        for reason in REASON_OBJECTS:
            totals[f"completed_{reason.name.lower()}"] = completed[reason]
        return totals

    def stop(self):
        """Cancel every pair, end the threads, close all descriptors of the engine. Completions can still be
        taken.

        Take notification_fd out of any event loop before. Calling it again does nothing.
        """
        cdef int index
        if self.stopped:
            return
        self.stopped = True
        for index in range(self.worker_count):
            pthread_mutex_lock(&self.workers[index].mutex)
            self.workers[index].stopping = True
            eventfd_write(self.workers[index].wake_fd, 1)
            pthread_mutex_unlock(&self.workers[index].mutex)
        for thread in self.threads:
            thread.join()
        self.close_descriptors()

    cdef void close_descriptors(self) noexcept:
        cdef int index
        cdef Worker *worker
        for index in range(self.worker_count):
            worker = &self.workers[index]
            if worker.epoll_fd >= 0:
                close(worker.epoll_fd)
            if worker.wake_fd >= 0:
                close(worker.wake_fd)
            worker.epoll_fd = worker.wake_fd = -1
            pipe_pool_close(&worker.pool)
            free(worker.buffer)
            worker.buffer = NULL
        if self.notification >= 0:
            close(self.notification)
        self.notification = -1
