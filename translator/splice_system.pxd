# cython: language_level=3
"""Which system calls, constants and list operations does the splice engine's C part use?"""

from libc.stdint cimport int64_t, uint32_t, uint64_t


cdef extern from "<sys/epoll.h>" nogil:
    const uint32_t EPOLLIN
    const uint32_t EPOLLOUT
    const uint32_t EPOLLPRI
    const uint32_t EPOLLERR
    const uint32_t EPOLLHUP
    const uint32_t EPOLLRDHUP
    const uint32_t EPOLLET
    const int EPOLL_CTL_ADD
    const int EPOLL_CTL_DEL
    const int EPOLL_CLOEXEC
    ctypedef union epoll_data_t:
        uint64_t u64
    cdef struct epoll_event:
        uint32_t events
        epoll_data_t data
    int epoll_create1(int flags)
    int epoll_ctl(int epoll_fd, int operation, int fd, epoll_event *event)
    int epoll_wait(int epoll_fd, epoll_event *events, int count, int timeout_ms)


cdef extern from "<sys/eventfd.h>" nogil:
    const int EFD_CLOEXEC
    const int EFD_NONBLOCK
    int eventfd(unsigned int initial, int flags)
    int eventfd_read(int fd, uint64_t *value)
    int eventfd_write(int fd, uint64_t value)


cdef extern from "<fcntl.h>" nogil:
    const unsigned int SPLICE_F_MOVE
    const unsigned int SPLICE_F_NONBLOCK
    const int F_SETPIPE_SZ
    const int F_GETPIPE_SZ
    const int F_GETFL
    const int O_NONBLOCK
    const int O_CLOEXEC
    ssize_t splice(int source, int64_t *source_offset, int target, int64_t *target_offset, size_t length,
                   unsigned int flags)
    int fcntl(int fd, int command, ...)


cdef extern from "<sys/socket.h>" nogil:
    const int MSG_PEEK
    const int MSG_DONTWAIT
    const int MSG_NOSIGNAL
    const int MSG_OOB
    const int SHUT_WR
    const int SOL_SOCKET
    const int SO_ERROR
    const int SO_OOBINLINE
    ssize_t recv(int fd, void *buffer, size_t length, int flags)
    ssize_t send(int fd, const void *buffer, size_t length, int flags)
    int shutdown(int fd, int how)
    int setsockopt(int fd, int level, int option, const void *value, unsigned int length)
    int getsockopt(int fd, int level, int option, void *value, unsigned int *length)


cdef extern from "<sys/ioctl.h>" nogil:
    int ioctl(int fd, unsigned long request, ...)


cdef extern from "<linux/sockios.h>" nogil:
    const unsigned long SIOCOUTQ
    const unsigned long SIOCATMARK


cdef extern from "<unistd.h>" nogil:
    int pipe2(int *fds, int flags)
    int close(int fd)


cdef extern from "<time.h>" nogil:
    const int CLOCK_MONOTONIC
    cdef struct timespec:
        int64_t tv_sec
        int64_t tv_nsec
    int clock_gettime(int clock, timespec *value)


cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    int pthread_mutex_init(pthread_mutex_t *mutex, void *attributes)
    int pthread_mutex_lock(pthread_mutex_t *mutex)
    int pthread_mutex_unlock(pthread_mutex_t *mutex)
    int pthread_mutex_destroy(pthread_mutex_t *mutex)


cdef extern from "<signal.h>" nogil:
    ctypedef struct sigset_t:
        pass
    const int SIG_BLOCK
    int sigfillset(sigset_t *signals)
    int pthread_sigmask(int how, const sigset_t *signals, sigset_t *before)


cdef inline int64_t monotonic_ns() noexcept nogil:
    cdef timespec value
    clock_gettime(CLOCK_MONOTONIC, &value)
    return value.tv_sec * 1000000000 + value.tv_nsec


# A link of a circular doubly linked list. The list itself is a link whose owner is NULL; a link that is in no
# list points nowhere. Intrusive, so that moving a pair between lists allocates nothing and cannot fail.
cdef struct Link:
    Link *previous
    Link *next
    void *owner


cdef inline void list_init(Link *head) noexcept nogil:
    head.previous = head.next = head
    head.owner = NULL


cdef inline bint list_empty(Link *head) noexcept nogil:
    return head.next == head


cdef inline void unlink(Link *link) noexcept nogil:
    if link.next != NULL:
        link.previous.next = link.next
        link.next.previous = link.previous
        link.previous = link.next = NULL


cdef inline void move_to_end(Link *head, Link *link) noexcept nogil:
    unlink(link)
    link.previous = head.previous
    link.next = head
    head.previous.next = link
    head.previous = link


cdef inline void move_all(Link *source, Link *target) noexcept nogil:
    """Append everything in `source` to `target`; `source` is empty afterwards."""
    if source.next == source:
        return
    source.next.previous = target.previous
    target.previous.next = source.next
    source.previous.next = target
    target.previous = source.previous
    list_init(source)
