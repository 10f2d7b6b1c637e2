# cython: language_level=3
"""How does a kernel socket start in ESTABLISHED? With TCP_REPAIR, in this order (DESIGN 2.5):

1. socket, congestion control, user MSS (before connect: the kernel derives its segment size there)
2. TCP_REPAIR on (needs CAP_NET_ADMIN), which also lets any number of sockets share the local address and port
3. TCP_QUEUE_SEQ of the receive queue = rcv_nxt and of the send queue = snd_nxt
4. bind, connect: no packet leaves, the state is ESTABLISHED
5. TCP_REPAIR_OPTIONS {MSS, window scales, SACK, timestamps}, only while nothing was sent; TCP_TIMESTAMP
6. TCP_REPAIR_WINDOW
7. TCP_REPAIR off without a window probe

Taking a socket down is the reverse: TCP_REPAIR on, close; nothing leaves either. In between TCP_REPAIR stays off: the socket may
be in use by another thread.
"""

from libc.errno cimport ENOTCONN, errno
from libc.stdint cimport uint16_t, uint32_t, uint64_t
from libc.string cimport memset, strlen
from posix.unistd cimport close

from serval_core.dataplane.inet cimport AF_INET, IPPROTO_TCP, htonl, htons, sockaddr_in
from serval_core.errors import KernelRefused

cdef extern from "<sys/socket.h>" nogil:
    int socket(int family, int type, int protocol)
    int bind(int fd, const void *address, unsigned int length)
    int connect(int fd, const void *address, unsigned int length)
    int setsockopt(int fd, int level, int option, const void *value, unsigned int length)
    int getsockopt(int fd, int level, int option, void *value, unsigned int *length)
    int shutdown(int fd, int how)
    int SOCK_STREAM, SOCK_CLOEXEC, SOCK_NONBLOCK, SOL_SOCKET, SO_KEEPALIVE

cdef extern from "<linux/tcp.h>" nogil:
    cdef struct tcp_repair_opt:
        uint32_t opt_code
        uint32_t opt_val
    cdef struct tcp_repair_window:
        uint32_t snd_wl1
        uint32_t snd_wnd
        uint32_t max_window
        uint32_t rcv_wnd
        uint32_t rcv_wup
    cdef struct tcp_info:
        uint64_t tcpi_bytes_received
    int TCP_REPAIR, TCP_REPAIR_QUEUE, TCP_QUEUE_SEQ, TCP_REPAIR_OPTIONS, TCP_TIMESTAMP, TCP_REPAIR_WINDOW, TCP_MAXSEG
    int TCP_KEEPIDLE, TCP_KEEPINTVL, TCP_KEEPCNT, TCP_USER_TIMEOUT, TCP_INFO, TCP_CONGESTION, TCP_NODELAY, TCP_RECV_QUEUE, TCP_SEND_QUEUE, TCP_REPAIR_ON, TCP_REPAIR_OFF_NO_WP

# Numbers of the TCP options as the kernel expects them in TCP_REPAIR_OPTIONS (RFC 9293, 7323, 2018).
DEF OPTION_MSS = 2
DEF OPTION_WINDOW_SCALE = 3
DEF OPTION_SACK_PERMITTED = 4
DEF OPTION_TIMESTAMP = 8

HINTS = {
    "TCP_CONGESTION": "Choose one that net.ipv4.tcp_available_congestion_control lists.",
    "connect": "The route to the virtual network is missing: something removed the devices of the stack.",
}


cdef int set_int(int fd, int option, int value) noexcept nogil:
    return setsockopt(fd, IPPROTO_TCP, option, &value, sizeof(value))


cdef const char *establish(int fd, sockaddr_in *local, sockaddr_in *remote, const char *congestion_control, uint32_t send_next,
                           uint32_t receive_next, int mss, int send_scale, int receive_scale, bint sack, bint timestamps,
                           uint32_t timestamp, tcp_repair_window *window) noexcept nogil:
    """The recipe. Returns NULL, or the name of the step that failed (errno says how)."""
    cdef tcp_repair_opt options[4]
    cdef int count = 0
    if congestion_control[0] and setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, congestion_control, strlen(congestion_control)):
        return b"TCP_CONGESTION"
    if set_int(fd, TCP_MAXSEG, mss):
        return b"TCP_MAXSEG"
    if set_int(fd, TCP_REPAIR, TCP_REPAIR_ON):
        return b"TCP_REPAIR"
    if set_int(fd, TCP_REPAIR_QUEUE, TCP_RECV_QUEUE) or set_int(fd, TCP_QUEUE_SEQ, <int>receive_next):
        return b"TCP_QUEUE_SEQ (receive)"
    if set_int(fd, TCP_REPAIR_QUEUE, TCP_SEND_QUEUE) or set_int(fd, TCP_QUEUE_SEQ, <int>send_next):
        return b"TCP_QUEUE_SEQ (send)"
    if bind(fd, local, sizeof(local[0])):
        return b"bind"
    if connect(fd, remote, sizeof(remote[0])):
        return b"connect"
    options[count].opt_code = OPTION_MSS
    options[count].opt_val = mss
    count += 1
    # Not negotiated is scale 0, and has to be said: connect() has chosen a scale for the receive window by itself, and would
    # advertise windows shifted by it that the peer takes at face value.
    options[count].opt_code = OPTION_WINDOW_SCALE
    options[count].opt_val = max(send_scale, 0) | max(receive_scale, 0) << 16
    count += 1
    if sack:
        options[count].opt_code = OPTION_SACK_PERMITTED
        options[count].opt_val = 0
        count += 1
    if timestamps:
        options[count].opt_code = OPTION_TIMESTAMP
        options[count].opt_val = 0
        count += 1
    if setsockopt(fd, IPPROTO_TCP, TCP_REPAIR_OPTIONS, options, count * sizeof(options[0])):
        return b"TCP_REPAIR_OPTIONS"
    if timestamps and set_int(fd, TCP_TIMESTAMP, <int>timestamp):
        return b"TCP_TIMESTAMP"
    if setsockopt(fd, IPPROTO_TCP, TCP_REPAIR_WINDOW, window, sizeof(window[0])):
        return b"TCP_REPAIR_WINDOW"
    if set_int(fd, TCP_REPAIR, TCP_REPAIR_OFF_NO_WP):
        return b"TCP_REPAIR off"
    if set_int(fd, TCP_NODELAY, 1):
        return b"TCP_NODELAY"
    return NULL


cdef const char *watch_peer(int fd, int peer_timeout_s) noexcept nogil:
    """Probe a silent peer after half the time, four times; give up on one that acknowledges nothing for all of it."""
    cdef int on = 1
    if setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof(on)):
        return b"SO_KEEPALIVE"
    if set_int(fd, TCP_KEEPIDLE, max(peer_timeout_s // 2, 1)) or set_int(fd, TCP_KEEPINTVL, max(peer_timeout_s // 8, 1)):
        return b"TCP_KEEPIDLE"
    if set_int(fd, TCP_KEEPCNT, 4) or set_int(fd, TCP_USER_TIMEOUT, peer_timeout_s * 1000):
        return b"TCP_USER_TIMEOUT"
    return NULL


def create_established(uint32_t local_address, uint16_t local_port, uint32_t remote_address, uint16_t remote_port,
                       uint32_t send_next, uint32_t receive_next, int mss_bytes, int send_window_scale, int receive_window_scale,
                       bint sack, timestamp, uint32_t send_window_bytes, uint32_t receive_window_bytes,
                       bytes congestion_control, int peer_timeout_s=0) -> int:
    """A nonblocking kernel TCP socket in ESTABLISHED; the caller owns the fd.

    Addresses and ports in host order; windows in bytes; scales are shift counts, -1: not negotiated; `timestamp` is the next
    TSval or None; `congestion_control` may be empty (the system's default). A peer from which nothing is heard for
    `peer_timeout_s` ends the connection with ETIMEDOUT (0: never). Raises KernelRefused naming the step.
    """
    cdef sockaddr_in local, remote
    cdef tcp_repair_window window
    cdef const char *failed
    cdef int error
    cdef bint timestamps = timestamp is not None
    cdef uint32_t next_timestamp = timestamp if timestamps else 0
    cdef const char *algorithm = congestion_control
    cdef int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0)
    if fd < 0:
        raise KernelRefused("socket", errno, "Raise RLIMIT_NOFILE (LimitNOFILE= in the unit).")
    memset(&local, 0, sizeof(local))
    memset(&remote, 0, sizeof(remote))
    local.sin_family = remote.sin_family = AF_INET
    local.sin_addr.s_addr = htonl(local_address)
    local.sin_port = htons(local_port)
    remote.sin_addr.s_addr = htonl(remote_address)
    remote.sin_port = htons(remote_port)
    window.snd_wl1 = receive_next
    window.snd_wnd = send_window_bytes
    window.max_window = send_window_bytes
    window.rcv_wnd = receive_window_bytes
    window.rcv_wup = receive_next
    with nogil:
        failed = establish(fd, &local, &remote, algorithm, send_next, receive_next, mss_bytes, send_window_scale,
                           receive_window_scale, sack, timestamps, next_timestamp, &window)
        if failed is NULL and peer_timeout_s:
            failed = watch_peer(fd, peer_timeout_s)
    if failed is not NULL:
        error = errno
        close(fd)
        step = (<bytes>failed).decode()
        raise KernelRefused(step, error, HINTS.get(step, "Needs CAP_NET_ADMIN and CONFIG_CHECKPOINT_RESTORE; run `serval-translator doctor`."))
    return fd


def take_down(int fd) -> None:
    """Close without a FIN, an RST or a TIME_WAIT socket. Takes the fd."""
    set_int(fd, TCP_REPAIR, TCP_REPAIR_ON)
    close(fd)


def received(int fd) -> int:
    """By how much rcv_nxt has moved since the socket was established: bytes in order, and 1 for a FIN. Raises KernelRefused.

    Works without TCP_REPAIR, which would do harm here: what another thread writes to a socket in repair mode ends up in its own
    receive queue.
    """
    cdef tcp_info information
    cdef unsigned int length = sizeof(information)
    memset(&information, 0, sizeof(information))
    if getsockopt(fd, IPPROTO_TCP, TCP_INFO, &information, &length):
        raise KernelRefused("getsockopt(TCP_INFO)", errno, "The fd is not a socket of this stack.")
    return information.tcpi_bytes_received


def shut_down(int fd, int how) -> None:
    """shutdown(2); a socket that the kernel has already closed is left as it is."""
    if shutdown(fd, how) and errno != ENOTCONN:
        raise KernelRefused("shutdown", errno, "The fd is not a socket of this stack.")


def state(int fd) -> int:
    """The kernel's TCP state (linux/tcp.h: 1 ESTABLISHED, 8 CLOSE_WAIT …)."""
    cdef unsigned char information[1]
    cdef unsigned int length = 1
    if getsockopt(fd, IPPROTO_TCP, TCP_INFO, information, &length):
        raise KernelRefused("getsockopt(TCP_INFO)", errno, "The fd is not a socket of this stack.")
    return information[0]
