# cython: language_level=3
"""Where does a direction get a pipe, and what becomes of it afterwards?

A pool per thread, so there is no lock. A pipe is lent only while bytes are pending, and comes back only when
it is empty: one that still holds bytes of a dead connection is closed, since the next borrower would deliver
them to someone else. When the kernel refuses a pipe the caller copies instead; the pool asks again after a
pause, not at every wakeup.
"""

from libc.stdint cimport int64_t, uint64_t

from translator.splice_system cimport F_GETPIPE_SZ, F_SETPIPE_SZ, O_CLOEXEC, O_NONBLOCK, close, fcntl, pipe2

cdef enum:
    PIPES_KEPT_AT_MOST = 256
    PIPE_SIZES_AT_MOST = 4


cdef struct Pipe:
    int read_fd
    int write_fd


cdef struct PipePool:
    Pipe[PIPES_KEPT_AT_MOST] idle
    int idle_count
    int idle_limit
    int[PIPE_SIZES_AT_MOST] sizes       # to try in this order
    int size_count
    int64_t retry_ns                    # how long to copy after a refusal
    int64_t refused_until_ns
    uint64_t open_now
    uint64_t lent_now
    uint64_t lent_high_water
    uint64_t created
    uint64_t discarded
    uint64_t refused


cdef inline void pipe_close(PipePool *pool, Pipe *pipe) noexcept nogil:
    close(pipe.read_fd)
    close(pipe.write_fd)
    pipe.read_fd = pipe.write_fd = -1
    pool.open_now -= 1


cdef inline bint pipe_create(PipePool *pool, Pipe *pipe) noexcept nogil:
    cdef int[2] fds
    cdef int index
    if pipe2(fds, O_NONBLOCK | O_CLOEXEC) < 0:
        return False
    for index in range(pool.size_count):
        if fcntl(fds[1], F_SETPIPE_SZ, pool.sizes[index]) >= 0:
            break
    else:
        # Above pipe-user-pages-soft a new pipe has two pages and cannot grow: each splice would move next to
        # nothing.
        if fcntl(fds[1], F_GETPIPE_SZ) < pool.sizes[pool.size_count - 1]:
            close(fds[0])
            close(fds[1])
            return False
    pipe.read_fd = fds[0]
    pipe.write_fd = fds[1]
    pool.open_now += 1
    pool.created += 1
    return True


cdef inline bint pipe_lend(PipePool *pool, Pipe *pipe, int64_t now_ns) noexcept nogil:
    """Fill in an empty pipe, or say False: then copy."""
    if pool.idle_count > 0:
        pool.idle_count -= 1
        pipe[0] = pool.idle[pool.idle_count]
    elif pool.size_count == 0 or now_ns < pool.refused_until_ns:
        return False
    elif not pipe_create(pool, pipe):
        pool.refused += 1
        pool.refused_until_ns = now_ns + pool.retry_ns
        return False
    pool.lent_now += 1
    if pool.lent_now > pool.lent_high_water:
        pool.lent_high_water = pool.lent_now
    return True


cdef inline void pipe_give_back(PipePool *pool, Pipe *pipe, bint is_empty) noexcept nogil:
    pool.lent_now -= 1
    if is_empty and pool.idle_count < pool.idle_limit:
        pool.idle[pool.idle_count] = pipe[0]
        pool.idle_count += 1
        pipe.read_fd = pipe.write_fd = -1
        return
    if not is_empty:
        pool.discarded += 1
    pipe_close(pool, pipe)


cdef inline void pipe_pool_close(PipePool *pool) noexcept nogil:
    while pool.idle_count > 0:
        pool.idle_count -= 1
        pipe_close(pool, &pool.idle[pool.idle_count])
