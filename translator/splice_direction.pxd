# cython: language_level=3
"""How do the bytes of one direction move from its source to its destination?

The states and their transitions are in the docstring of splice_types.py. Two ways of moving: small amounts
are copied through the thread's buffer (recv, send), larger ones spliced through a lent pipe. Bytes that the
destination did not take are held in the pipe or, after a copy, in a buffer of their own; never in both.
"""

from libc.errno cimport EAGAIN, EBADF, EFAULT, EINTR, EINVAL, ENOMEM, ENOTCONN, ENOTSOCK, errno
from libc.stdint cimport int64_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

from translator.splice_pipes cimport Pipe, PipePool, pipe_give_back, pipe_lend
from translator.splice_system cimport (
    MSG_DONTWAIT, MSG_NOSIGNAL, MSG_OOB, MSG_PEEK, SHUT_WR, SIOCATMARK, SO_ERROR, SOL_SOCKET, SPLICE_F_MOVE,
    SPLICE_F_NONBLOCK, Link, getsockopt, ioctl, move_to_end, pthread_mutex_t, recv, send, shutdown, splice)

# The values of splice_types.DirectionState. Two are not stored: SOURCE_READY is SOURCE_EMPTY with `readable`
# set, DRAINING is DESTINATION_FULL with `hangup` set on the source.
cdef enum:
    STATE_SOURCE_EMPTY = 0
    STATE_SOURCE_READY = 1
    STATE_DESTINATION_FULL = 2
    STATE_DRAINING = 3
    STATE_SHUT = 4
    STATE_DELIVERED = 5
    STATE_CUT_OFF = 6

cdef enum:
    REASONS = 8


# A worker runs one thread's loop.
cdef struct Worker


cdef struct Counters:
    uint64_t pairs_total
    uint64_t[2] delivered_bytes
    uint64_t undelivered_bytes
    uint64_t spliced_bytes
    uint64_t copied_bytes
    uint64_t splice_calls
    uint64_t copy_calls
    uint64_t wakeups
    uint64_t budget_used_up
    uint64_t false_ends
    uint64_t urgent_bytes
    uint64_t epoll_errors
    uint64_t[REASONS] completed


cdef struct Endpoint:
    int fd              # borrowed
    int error           # errno with which the socket failed; 0: it is well
    bint registered     # in the epoll
    bint writable       # cleared by EAGAIN, set by an event
    bint hangup         # the end of the stream is near: a short read does not prove that it is empty
    bint check_error    # an event said EPOLLERR: SO_ERROR has not been read yet


cdef struct Direction:
    int state
    bint readable       # the source may have something: an event said so and nothing has disproved it
    bint urgent         # urgent data was announced: reads stop at its mark, only EAGAIN proves emptiness
    bint copy_only      # the source cannot be spliced
    bint bulk           # the last reads were large: splice
    int small_drains
    uint64_t drained_bytes
    Pipe pipe           # read_fd is -1 while none is lent
    uint64_t pipe_bytes
    char *held          # copied bytes that the destination did not take
    uint64_t held_start
    uint64_t held_end
    bint held_urgent    # they are one byte of urgent data
    uint64_t delivered_bytes


# Direction 0 reads from end 0 (left) and writes to end 1 (right); direction 1 the other way round.
cdef struct Pair:
    int64_t pair_id
    Endpoint[2] ends
    Direction[2] directions
    int reset_side          # the first side that failed, -1: none
    int failed_errno        # the engine's own failure
    int reason
    bint cancel_wanted      # guarded by the worker's mutex
    bint completed          # guarded by the worker's mutex
    Worker *worker          # whose loop serves the pair
    int64_t added_ns
    int64_t active_ns       # when a byte moved last
    int64_t completed_ns
    Link ready
    Link timer
    Link lingering
    Link queued             # worker.submitted (guarded), then worker.finished, then worker.completions


cdef struct Worker:
    int epoll_fd
    int wake_fd
    int notification_fd     # the engine's
    pthread_mutex_t mutex   # guards submitted, stopping
    Link submitted
    bint stopping
    Link ready
    Link[3] timers          # by TIMER_*; sorted by active_ns, as each move to the end carries the newest time
    int64_t[3] timeout_ns   # -1: never
    Link lingering
    Link finished
    int64_t linger_check_ns
    int64_t next_linger_check_ns
    pthread_mutex_t *completions_mutex
    Link *completions       # the engine's list
    PipePool pool
    char *buffer
    uint64_t buffer_bytes
    uint64_t copy_bytes
    int64_t budget_bytes
    int small_drains
    int64_t now_ns          # time of the last return from epoll_wait
    Counters counters


cdef inline uint64_t held_bytes(Direction *direction) noexcept nogil:
    return direction.pipe_bytes + direction.held_end - direction.held_start


cdef inline void return_pipe(Worker *worker, Direction *direction) noexcept nogil:
    if direction.pipe.read_fd >= 0:
        pipe_give_back(&worker.pool, &direction.pipe, direction.pipe_bytes == 0)
        direction.pipe_bytes = 0


cdef inline void discard(Worker *worker, Direction *direction) noexcept nogil:
    """Let go of whatever the direction holds: it can no longer be delivered."""
    worker.counters.undelivered_bytes += held_bytes(direction)
    return_pipe(worker, direction)
    free(direction.held)
    direction.held = NULL
    direction.held_start = direction.held_end = 0


cdef inline int take_socket_error(int fd, int otherwise) noexcept nogil:
    """The pending error of a socket, which is cleared by that; `otherwise` when there is none."""
    cdef int error = 0
    cdef unsigned int size = sizeof(error)
    if getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &size) < 0:
        return errno
    return error if error != 0 else otherwise


cdef inline void end_failed(Worker *worker, Pair *pair, int side, int error) noexcept nogil:
    """The socket on `side` is dead: nothing more can be written to it, but what it has received can still be
    read.
    """
    cdef Direction *towards = &pair.directions[1 - side]
    cdef Direction *away = &pair.directions[side]
    if error == ENOTCONN:
        error = take_socket_error(pair.ends[side].fd, ENOTCONN)     # shutdown(2) does not tell why
    if error == EBADF or error == ENOTSOCK or error == EFAULT or error == ENOMEM:
        pair.failed_errno = error
    if pair.ends[side].error == 0:
        pair.ends[side].error = error
    if pair.reset_side < 0:
        pair.reset_side = side
    if towards.state != STATE_SHUT:
        discard(worker, towards)
        towards.state = STATE_CUT_OFF
    away.readable = True
    pair.active_ns = worker.now_ns
    move_to_end(&worker.ready, &pair.ready)


cdef inline void source_ended(Worker *worker, Pair *pair, int index) noexcept nogil:
    """Everything that the source had is delivered: pass the end on."""
    cdef Direction *direction = &pair.directions[index]
    direction.readable = False
    pair.active_ns = worker.now_ns
    return_pipe(worker, direction)
    if pair.ends[index].error != 0:
        direction.state = STATE_DELIVERED
    elif shutdown(pair.ends[1 - index].fd, SHUT_WR) == 0:
        direction.state = STATE_SHUT
    else:
        end_failed(worker, pair, 1 - index, errno)


cdef inline void delivered(Worker *worker, Pair *pair, int index, uint64_t count) noexcept nogil:
    pair.directions[index].delivered_bytes += count
    worker.counters.delivered_bytes[index] += count
    pair.active_ns = worker.now_ns


cdef inline bint deliver(Worker *worker, Pair *pair, int index) noexcept nogil:
    """Write what the direction holds. True when nothing is held any more.

    SPLICE_F_MORE is never set: whether more is queued is not known here, and a wrong guess delays the last segment.
    Between the pages of one splice the kernel sets it by itself.
    """
    cdef Direction *direction = &pair.directions[index]
    cdef Endpoint *destination = &pair.ends[1 - index]
    cdef ssize_t count
    while held_bytes(direction) > 0:
        if not destination.writable:
            return False
        if direction.pipe_bytes > 0:
            count = splice(direction.pipe.read_fd, NULL, destination.fd, NULL, direction.pipe_bytes,
                           SPLICE_F_MOVE | SPLICE_F_NONBLOCK)
            worker.counters.splice_calls += 1
        else:
            count = send(destination.fd, direction.held + direction.held_start,
                         direction.held_end - direction.held_start,
                         MSG_DONTWAIT | MSG_NOSIGNAL | (MSG_OOB if direction.held_urgent else 0))
            worker.counters.copy_calls += 1
        if count > 0:
            delivered(worker, pair, index, count)
            if direction.pipe_bytes > 0:
                direction.pipe_bytes -= count
                worker.counters.spliced_bytes += count
            else:
                direction.held_start += count
                worker.counters.copied_bytes += count
        elif count < 0 and errno == EAGAIN:
            destination.writable = False
        elif count == 0 or errno != EINTR:
            end_failed(worker, pair, 1 - index, errno if count < 0 else EINVAL)
            return False
    if direction.held != NULL:
        free(direction.held)
        direction.held = NULL
        direction.held_start = direction.held_end = 0
        direction.held_urgent = False
    return_pipe(worker, direction)
    return True


cdef inline void hold(Worker *worker, Pair *pair, int index, const char *data, uint64_t count,
                      bint urgent) noexcept nogil:
    cdef Direction *direction = &pair.directions[index]
    direction.held = <char *> malloc(count)
    if direction.held == NULL:
        pair.failed_errno = ENOMEM
        return
    memcpy(direction.held, data, count)
    direction.held_start = 0
    direction.held_end = count
    direction.held_urgent = urgent
    direction.state = STATE_DESTINATION_FULL


cdef inline void send_or_hold(Worker *worker, Pair *pair, int index, const char *data, uint64_t count,
                              bint urgent) noexcept nogil:
    """Write bytes that were just copied from the source; what the destination does not take is held."""
    cdef Endpoint *destination = &pair.ends[1 - index]
    cdef ssize_t sent = -1
    if destination.writable:
        sent = send(destination.fd, data, count, MSG_DONTWAIT | MSG_NOSIGNAL | (MSG_OOB if urgent else 0))
        worker.counters.copy_calls += 1
        if sent >= 0:
            delivered(worker, pair, index, sent)
            worker.counters.copied_bytes += sent
            if <uint64_t> sent == count:
                return
        elif errno == EAGAIN:
            destination.writable = False
        elif errno != EINTR:
            worker.counters.undelivered_bytes += count
            end_failed(worker, pair, 1 - index, errno)
            return
    if sent < 0:
        sent = 0
    hold(worker, pair, index, data + sent, count - sent, urgent)


cdef inline bint pass_urgent(Worker *worker, Pair *pair, int index) noexcept nogil:
    """At the mark of urgent data, pass its byte on as urgent (RFC 6093 section 3). True when one was passed.

    The byte is read in line (SO_OOBINLINE): otherwise a read that begins at a mark which has just come up would
    skip it, and it would be lost.
    """
    cdef int at_mark = 0
    cdef char byte
    if ioctl(pair.ends[index].fd, SIOCATMARK, &at_mark) < 0 or not at_mark:
        return False
    if recv(pair.ends[index].fd, &byte, 1, MSG_DONTWAIT) != 1:
        return False
    worker.counters.urgent_bytes += 1
    send_or_hold(worker, pair, index, &byte, 1, True)
    return True


cdef inline int64_t copy_once(Worker *worker, Pair *pair, int index) noexcept nogil:
    """Read into the thread's buffer and write from it. The number of bytes read; 0 when there was nothing."""
    cdef Direction *direction = &pair.directions[index]
    cdef Endpoint *source = &pair.ends[index]
    # Without a pipe, larger steps; with one, just enough to learn whether splicing would pay.
    cdef uint64_t wanted = worker.buffer_bytes if direction.bulk or direction.copy_only else worker.copy_bytes
    if direction.urgent and pass_urgent(worker, pair, index):
        return 1
    cdef ssize_t count = recv(source.fd, worker.buffer, wanted, MSG_DONTWAIT)
    worker.counters.copy_calls += 1
    if count > 0:
        pair.active_ns = worker.now_ns
        if <uint64_t> count == wanted:
            direction.bulk = True
        elif not source.hangup and not direction.urgent:
            direction.readable = False      # less than asked for: the next byte brings a new edge (epoll(7))
        send_or_hold(worker, pair, index, worker.buffer, count, False)
        return count
    if count == 0:
        source_ended(worker, pair, index)
    elif errno == EAGAIN:
        direction.readable = False
    elif errno != EINTR:
        end_failed(worker, pair, index, errno)
        source_ended(worker, pair, index)
    return 0


cdef inline void splice_found_nothing(Worker *worker, Pair *pair, int index) noexcept nogil:
    """splice returned 0. That is the end of the stream only if a look at the queue says so: at the mark of
    urgent data it returns 0 as well.
    """
    cdef char byte
    cdef ssize_t count = recv(pair.ends[index].fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT)
    if count == 0:
        source_ended(worker, pair, index)
    elif count > 0:
        worker.counters.false_ends += 1
        pair.directions[index].urgent = True
    elif errno == EAGAIN:
        pair.directions[index].readable = False
    elif errno != EINTR:
        end_failed(worker, pair, index, errno)
        source_ended(worker, pair, index)


cdef inline int64_t splice_once(Worker *worker, Pair *pair, int index, uint64_t wanted) noexcept nogil:
    """Splice from the source into the (empty) lent pipe and on. The number of bytes read; 0 when there was
    nothing.
    """
    cdef Direction *direction = &pair.directions[index]
    cdef ssize_t count = splice(pair.ends[index].fd, NULL, direction.pipe.write_fd, NULL, wanted,
                                SPLICE_F_MOVE | SPLICE_F_NONBLOCK)
    worker.counters.splice_calls += 1
    if count > 0:
        pair.active_ns = worker.now_ns
        direction.pipe_bytes = count
        direction.drained_bytes += count
        direction.state = STATE_DESTINATION_FULL
        return count
    if count == 0:
        splice_found_nothing(worker, pair, index)
    elif errno == EAGAIN:
        # The pipe was empty, so this speaks of the source.
        direction.readable = False
        if direction.drained_bytes >= worker.copy_bytes:
            direction.small_drains = 0
        else:
            direction.small_drains += 1
            if direction.small_drains >= worker.small_drains:
                direction.bulk = False
                direction.small_drains = 0
        direction.drained_bytes = 0
    elif errno == EINVAL:
        direction.copy_only = True
    elif errno != EINTR:
        end_failed(worker, pair, index, errno)
        source_ended(worker, pair, index)
    if direction.state == STATE_SOURCE_EMPTY:
        return_pipe(worker, direction)
    return 0


cdef inline bint serve_direction(Worker *worker, Pair *pair, int index) noexcept nogil:
    """Move bytes until the source is empty, the destination full or the budget used up. False: used up, call
    again.
    """
    cdef Direction *direction = &pair.directions[index]
    cdef int64_t budget = worker.budget_bytes
    while pair.failed_errno == 0:
        if direction.state == STATE_DESTINATION_FULL:
            if not deliver(worker, pair, index):
                return True
            direction.state = STATE_SOURCE_EMPTY
        if direction.state != STATE_SOURCE_EMPTY or not direction.readable:
            return True
        if budget <= 0:
            worker.counters.budget_used_up += 1
            return False
        if (direction.bulk and not direction.copy_only and not direction.urgent
                and pipe_lend(&worker.pool, &direction.pipe, worker.now_ns)):
            budget -= splice_once(worker, pair, index, budget)
        else:
            budget -= copy_once(worker, pair, index)
    return True
