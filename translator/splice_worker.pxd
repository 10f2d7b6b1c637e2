# cython: language_level=3
"""Which pair is served when, and when is a pair over? The loop of one engine thread; it never takes the GIL.

Events only mark a pair and put it on the ready list; each round serves every ready pair once, so that a pair
that used up its byte budget comes after the others. Pairs arrive through `submitted` and leave through
`finished`, which is handed to Python after the whole batch of events has been worked off: no event can refer
to a pair that Python has freed.
"""

from libc.errno cimport errno
from libc.stdint cimport int64_t, uint32_t, uint64_t

from translator.splice_direction cimport (
    STATE_CUT_OFF, STATE_DELIVERED, STATE_DESTINATION_FULL, STATE_SHUT, Pair, Worker, discard, end_failed,
    serve_direction, take_socket_error)
from translator.splice_system cimport (
    EPOLL_CTL_ADD, EPOLL_CTL_DEL, EPOLLERR, EPOLLET, EPOLLHUP, EPOLLIN, EPOLLOUT, EPOLLPRI, EPOLLRDHUP,
    SIG_BLOCK, SIOCOUTQ, SO_OOBINLINE, SOL_SOCKET, Link, epoll_ctl, epoll_event, epoll_wait, eventfd_read, eventfd_write, ioctl,
    list_empty, list_init, monotonic_ns, move_all, move_to_end, pthread_mutex_lock, pthread_mutex_unlock,
    pthread_sigmask, setsockopt, sigfillset, sigset_t, unlink)

cdef enum:
    TIMER_IDLE = 0
    TIMER_LEFT_FIN = 1
    TIMER_RIGHT_FIN = 2
    TIMERS = 3

# The values of splice_types.CompletionReason.
cdef enum:
    REASON_FINISHED = 0
    REASON_LEFT_RESET = 1
    REASON_IDLE_TIMEOUT = 3
    REASON_CANCELLED = 6
    REASON_FAILED = 7

cdef enum:
    EVENTS_AT_ONCE = 256


cdef inline void complete(Worker *worker, Pair *pair, int reason) noexcept nogil:
    """Take the pair out of everything and put it on the finished list."""
    cdef int side
    for side in range(2):
        if pair.ends[side].registered:
            if epoll_ctl(worker.epoll_fd, EPOLL_CTL_DEL, pair.ends[side].fd, NULL) < 0:
                worker.counters.epoll_errors += 1
            pair.ends[side].registered = False
        discard(worker, &pair.directions[side])
    unlink(&pair.ready)
    unlink(&pair.timer)
    unlink(&pair.lingering)
    pair.reason = reason
    pair.completed_ns = monotonic_ns()
    worker.counters.completed[reason] += 1
    pthread_mutex_lock(&worker.mutex)
    pair.completed = True
    move_to_end(&worker.finished, &pair.queued)
    pthread_mutex_unlock(&worker.mutex)


cdef inline void publish(Worker *worker) noexcept nogil:
    """Hand the finished pairs to Python: the worker must not touch them again."""
    cdef bint was_empty
    if list_empty(&worker.finished):
        return
    pthread_mutex_lock(worker.completions_mutex)
    was_empty = list_empty(worker.completions)
    move_all(&worker.finished, worker.completions)
    if was_empty:
        eventfd_write(worker.notification_fd, 1)
    pthread_mutex_unlock(worker.completions_mutex)


cdef inline int awaited_timer(Pair *pair) noexcept nogil:
    """Which timeout applies: for whom does the pair wait?"""
    cdef int side
    if pair.reset_side >= 0:
        return TIMER_LEFT_FIN + (1 - pair.reset_side)
    for side in range(2):
        if pair.directions[side].state == STATE_SHUT:
            # Direction 1 - side is the one that is left: it reads from end 1 - side and writes to end `side`.
            if pair.directions[1 - side].state == STATE_DESTINATION_FULL:
                return TIMER_LEFT_FIN + side
            return TIMER_LEFT_FIN + 1 - side
    return TIMER_IDLE


cdef inline bint is_acknowledged(Pair *pair, int side) noexcept nogil:
    """Has the peer of the socket on `side` acknowledged all that was written? A reset then cannot destroy any
    of it.
    """
    cdef int unacknowledged = 0
    return ioctl(pair.ends[side].fd, SIOCOUTQ, &unacknowledged) < 0 or unacknowledged == 0


cdef inline void settle(Worker *worker, Pair *pair) noexcept nogil:
    """After serving: is the pair over, and if not, what does it wait for?"""
    cdef int state
    if pair.failed_errno != 0:
        complete(worker, pair, REASON_FAILED)
        return
    if pair.reset_side >= 0:
        state = pair.directions[pair.reset_side].state
        if pair.ends[1 - pair.reset_side].error != 0 or state == STATE_CUT_OFF:
            complete(worker, pair, REASON_LEFT_RESET + pair.reset_side)
            return
        if state == STATE_DELIVERED or state == STATE_SHUT:
            if is_acknowledged(pair, 1 - pair.reset_side):
                complete(worker, pair, REASON_LEFT_RESET + pair.reset_side)
                return
            if pair.lingering.next == NULL:
                if list_empty(&worker.lingering):
                    worker.next_linger_check_ns = worker.now_ns + worker.linger_check_ns
                move_to_end(&worker.lingering, &pair.lingering)
    elif pair.directions[0].state == STATE_SHUT and pair.directions[1].state == STATE_SHUT:
        complete(worker, pair, REASON_FINISHED)
        return
    if pair.active_ns == worker.now_ns:
        move_to_end(&worker.timers[awaited_timer(pair)], &pair.timer)


cdef inline void take_error(Worker *worker, Pair *pair, int side) noexcept nogil:
    cdef int error = take_socket_error(pair.ends[side].fd, 0)
    if error != 0:
        end_failed(worker, pair, side, error)


cdef inline void serve_ready(Worker *worker) noexcept nogil:
    """Serve each ready pair once; those that become ready meanwhile wait for the next round."""
    cdef Link turn
    cdef Pair *pair
    cdef int side
    cdef bint again
    list_init(&turn)
    move_all(&worker.ready, &turn)
    while not list_empty(&turn):
        pair = <Pair *> turn.next.owner
        unlink(&pair.ready)
        for side in range(2):
            if pair.ends[side].check_error:
                pair.ends[side].check_error = False
                take_error(worker, pair, side)
        again = not serve_direction(worker, pair, 0)
        again = not serve_direction(worker, pair, 1) or again
        if again:
            move_to_end(&worker.ready, &pair.ready)
        settle(worker, pair)


cdef inline void note_event(Worker *worker, uint64_t tag, uint32_t events) noexcept nogil:
    """Mark what an event says about one end of a pair. The tag is the pair's address, its lowest bit the
    side.
    """
    cdef Pair *pair = <Pair *> <size_t> (tag & ~(<uint64_t> 1))
    cdef int side = tag & 1
    if events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR | EPOLLPRI):
        pair.directions[side].readable = True
        if events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR):
            pair.ends[side].hangup = True
        if events & EPOLLERR:
            pair.ends[side].check_error = True
        if events & EPOLLPRI:
            pair.directions[side].urgent = True
    if events & (EPOLLOUT | EPOLLHUP | EPOLLERR):
        pair.ends[side].writable = True
    if pair.ready.next == NULL:
        move_to_end(&worker.ready, &pair.ready)


cdef inline void start_pair(Worker *worker, Pair *pair) noexcept nogil:
    """Register both ends. What is waiting in them already comes back as their first event, in the next
    round.
    """
    cdef epoll_event event
    cdef int side, inline_urgent = 1
    pair.active_ns = worker.now_ns
    move_to_end(&worker.timers[TIMER_IDLE], &pair.timer)
    event.events = EPOLLIN | EPOLLOUT | EPOLLPRI | EPOLLRDHUP | EPOLLET
    for side in range(2):
        event.data.u64 = <uint64_t> <size_t> pair | side
        if (setsockopt(pair.ends[side].fd, SOL_SOCKET, SO_OOBINLINE, &inline_urgent, sizeof(inline_urgent)) < 0
                or epoll_ctl(worker.epoll_fd, EPOLL_CTL_ADD, pair.ends[side].fd, &event) < 0):
            pair.ends[side].error = pair.failed_errno = errno
            complete(worker, pair, REASON_FAILED)
            return
        pair.ends[side].registered = True


cdef inline bint take_submissions(Worker *worker) noexcept nogil:
    """Start new pairs, cancel others. True when the engine stops."""
    cdef Link batch
    cdef Pair *pair
    cdef bint stopping, cancelled
    cdef uint64_t ignored
    eventfd_read(worker.wake_fd, &ignored)
    list_init(&batch)
    pthread_mutex_lock(&worker.mutex)
    stopping = worker.stopping
    move_all(&worker.submitted, &batch)
    pthread_mutex_unlock(&worker.mutex)
    # Pairs that were added since epoll_wait returned must not be older than their add().
    worker.now_ns = monotonic_ns()
    while True:
        # cancel() looks at `queued` and sets cancel_wanted while we do this, hence the lock.
        pthread_mutex_lock(&worker.mutex)
        if list_empty(&batch):
            pthread_mutex_unlock(&worker.mutex)
            return stopping
        pair = <Pair *> batch.next.owner
        unlink(&pair.queued)
        cancelled = pair.cancel_wanted
        pthread_mutex_unlock(&worker.mutex)
        if cancelled:
            complete(worker, pair, REASON_CANCELLED)
        else:
            start_pair(worker, pair)


cdef inline void check_lingering(Worker *worker) noexcept nogil:
    cdef Link *link
    cdef Pair *pair
    if list_empty(&worker.lingering) or worker.now_ns < worker.next_linger_check_ns:
        return
    worker.next_linger_check_ns = worker.now_ns + worker.linger_check_ns
    link = worker.lingering.next
    while link != &worker.lingering:
        pair = <Pair *> link.owner
        link = link.next
        if is_acknowledged(pair, 1 - pair.reset_side):
            complete(worker, pair, REASON_LEFT_RESET + pair.reset_side)


cdef inline void expire(Worker *worker) noexcept nogil:
    """Complete the pairs whose timeout is over: they stand at the front of their list."""
    cdef int timer
    cdef Pair *pair
    for timer in range(TIMERS):
        while worker.timeout_ns[timer] >= 0 and not list_empty(&worker.timers[timer]):
            pair = <Pair *> worker.timers[timer].next.owner
            if pair.active_ns + worker.timeout_ns[timer] > worker.now_ns:
                break
            if pair.reset_side >= 0:
                complete(worker, pair, REASON_LEFT_RESET + pair.reset_side)
            else:
                complete(worker, pair, REASON_IDLE_TIMEOUT + timer)


cdef inline int next_wait_ms(Worker *worker) noexcept nogil:
    """How long epoll_wait may sleep: -1 forever."""
    cdef int64_t earliest = -1
    cdef int64_t due
    cdef int timer
    if not list_empty(&worker.ready):
        return 0
    for timer in range(TIMERS):
        if worker.timeout_ns[timer] >= 0 and not list_empty(&worker.timers[timer]):
            due = (<Pair *> worker.timers[timer].next.owner).active_ns + worker.timeout_ns[timer]
            if earliest < 0 or due < earliest:
                earliest = due
    if not list_empty(&worker.lingering) and (earliest < 0 or worker.next_linger_check_ns < earliest):
        earliest = worker.next_linger_check_ns
    if earliest < 0:
        return -1
    due = earliest - monotonic_ns()
    if due <= 0:
        return 0
    # Rounded up: a wakeup a little early would find nothing expired and spin until it is.
    due = due // 1000000 + 1
    return <int> due if due < 3600000 else 3600000


cdef inline void cancel_all(Worker *worker) noexcept nogil:
    cdef int timer
    for timer in range(TIMERS):
        while not list_empty(&worker.timers[timer]):
            complete(worker, <Pair *> worker.timers[timer].next.owner, REASON_CANCELLED)


cdef inline void run_worker(Worker *worker) noexcept nogil:
    """The thread: until stopping is set and the thread woken."""
    cdef epoll_event[EVENTS_AT_ONCE] events
    cdef sigset_t signals
    cdef int count, index
    cdef bint woken, stopping = False
    # Signals are for Python's main thread. SIGPIPE, which splice(2) to a dead socket raises, stays blocked
    # here.
    sigfillset(&signals)
    pthread_sigmask(SIG_BLOCK, &signals, NULL)
    while not stopping:
        count = epoll_wait(worker.epoll_fd, events, EVENTS_AT_ONCE, next_wait_ms(worker))
        worker.counters.wakeups += 1
        worker.now_ns = monotonic_ns()
        woken = False
        for index in range(count):
            if events[index].data.u64 == 0:
                woken = True
            else:
                note_event(worker, events[index].data.u64, events[index].events)
        serve_ready(worker)
        if woken:
            stopping = take_submissions(worker)
        check_lingering(worker)
        expire(worker)
        publish(worker)
    cancel_all(worker)
    publish(worker)
