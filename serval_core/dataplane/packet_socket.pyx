# cython: language_level=3
"""How do control packets get in and out? One raw socket for protocol 144, many packets per system call.

Reception: `recvmmsg`, with IP_PKTINFO telling interface and whether the packet was a broadcast. Transmission: whole IPv4 packets
(IP_HDRINCL); the kernel fills in identification and header checksum. A packet socket on the anchor device injects segments.
"""

import socket as python_socket

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport uint16_t, uint32_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset

from serval_core.errors import KernelRefused

cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <sys/socket.h>
    #include <netinet/in.h>
    """

cdef extern from "<sys/socket.h>" nogil:
    cdef struct iovec:
        void *iov_base
        size_t iov_len
    cdef struct msghdr:
        void *msg_name
        unsigned int msg_namelen
        iovec *msg_iov
        size_t msg_iovlen
        void *msg_control
        size_t msg_controllen
        int msg_flags
    cdef struct mmsghdr:
        msghdr msg_hdr
        unsigned int msg_len
    cdef struct cmsghdr:
        size_t cmsg_len
        int cmsg_level
        int cmsg_type
    cmsghdr *CMSG_FIRSTHDR(msghdr *message)
    unsigned char *CMSG_DATA(cmsghdr *header)
    size_t CMSG_SPACE(size_t length)
    size_t CMSG_LEN(size_t length)
    int recvmmsg(int fd, mmsghdr *messages, unsigned int count, int flags, void *timeout)
    ssize_t sendmsg(int fd, const msghdr *message, int flags)
    int MSG_DONTWAIT, MSG_TRUNC

cdef extern from "<netinet/in.h>" nogil:
    cdef struct in_addr:
        uint32_t s_addr
    cdef struct sockaddr_in:
        unsigned short sin_family
        uint16_t sin_port
        in_addr sin_addr
    cdef struct in_pktinfo:
        int ipi_ifindex
        in_addr ipi_spec_dst
        in_addr ipi_addr
    uint32_t htonl(uint32_t value)
    int IPPROTO_IP, IP_PKTINFO, AF_INET

DEF BATCH = 64
DEF PACKET_BYTES = 65536     # a datagram may be as long as IPv4 allows: the kernel has put its fragments together
DEF CONTROL_BYTES = 64

PROTOCOL_SAL = 144
SO_ATTACH_BPF = 50
SO_RCVBUFFORCE = 33
IP_PKTINFO_OPTION = 8


cdef class RawSocket:
    """The protocol-144 socket of the stack. Owns its fd until `close()`."""

    cdef object socket
    cdef readonly int fd
    cdef char *buffers           # BATCH of them; no page exists before a packet needs it
    cdef char controls[BATCH][CONTROL_BYTES]
    cdef mmsghdr messages[BATCH]
    cdef iovec vectors[BATCH]

    def __init__(self, int filter_program_fd, int receive_buffer_bytes=8 << 20):
        """Opens with the filter in place, so that nothing unwanted is ever queued. Raises KernelRefused."""
        cdef int i
        hint = "Needs CAP_NET_RAW; run `serval-translator doctor`."
        try:
            self.socket = python_socket.socket(python_socket.AF_INET, python_socket.SOCK_RAW, PROTOCOL_SAL)
        except OSError as error:
            raise KernelRefused("socket(AF_INET, SOCK_RAW, 144)", error.errno, hint) from error
        try:
            self.socket.setblocking(False)
            self.socket.setsockopt(python_socket.SOL_SOCKET, SO_ATTACH_BPF, filter_program_fd)
            self.socket.setsockopt(python_socket.IPPROTO_IP, python_socket.IP_HDRINCL, 1)
            self.socket.setsockopt(python_socket.IPPROTO_IP, IP_PKTINFO_OPTION, 1)
            self.socket.setsockopt(python_socket.SOL_SOCKET, python_socket.SO_BROADCAST, 1)
            self.socket.setsockopt(python_socket.SOL_SOCKET, SO_RCVBUFFORCE, receive_buffer_bytes)
        except OSError as error:
            self.socket.close()
            raise KernelRefused("setsockopt on the raw socket", error.errno, hint) from error
        self.buffers = <char *>malloc(BATCH * PACKET_BYTES)
        if self.buffers is NULL:
            self.socket.close()
            raise MemoryError
        self.fd = self.socket.fileno()
        for i in range(BATCH):
            self.vectors[i].iov_base = self.buffers + i * PACKET_BYTES
            self.vectors[i].iov_len = PACKET_BYTES
            memset(&self.messages[i], 0, sizeof(mmsghdr))
            self.messages[i].msg_hdr.msg_iov = &self.vectors[i]
            self.messages[i].msg_hdr.msg_iovlen = 1

    def __dealloc__(self):
        free(self.buffers)

    def close(self) -> None:
        self.socket.close()

    def receive(self) -> list[tuple[bytes, int, bool]]:
        """Up to 64 packets that wait: (whole IPv4 packet, interface index, was it a broadcast). Empty when none waits."""
        cdef int count, i
        cdef cmsghdr *control
        cdef in_pktinfo *information
        for i in range(BATCH):
            self.messages[i].msg_hdr.msg_control = self.controls[i]
            self.messages[i].msg_hdr.msg_controllen = CONTROL_BYTES
        count = recvmmsg(self.fd, self.messages, BATCH, MSG_DONTWAIT, NULL)
        if count < 0:
            if errno == EAGAIN or errno == EINTR:
                return []
            raise KernelRefused("recvmmsg", errno, "")
        received = []
        for i in range(count):
            interface = 0
            broadcast = False
            control = CMSG_FIRSTHDR(&self.messages[i].msg_hdr)
            if control is not NULL and control.cmsg_level == IPPROTO_IP and control.cmsg_type == IP_PKTINFO:
                information = <in_pktinfo *>CMSG_DATA(control)
                interface = information.ipi_ifindex
                broadcast = information.ipi_spec_dst.s_addr != information.ipi_addr.s_addr
            received.append((PyBytes_FromStringAndSize(self.buffers + i * PACKET_BYTES, self.messages[i].msg_len), interface, broadcast))
        return received

    def send(self, bytes packet, uint32_t destination, int interface_index) -> int:
        """Send one IPv4 packet to `destination` (host order), through one interface if the index is not 0. Returns 0 or errno."""
        cdef sockaddr_in address
        cdef msghdr message
        cdef iovec vector
        cdef char control[CONTROL_BYTES]
        cdef cmsghdr *header
        cdef in_pktinfo *information
        memset(&message, 0, sizeof(message))
        memset(&address, 0, sizeof(address))
        address.sin_family = AF_INET
        address.sin_addr.s_addr = htonl(destination)
        vector.iov_base = PyBytes_AS_STRING(packet)
        vector.iov_len = len(packet)
        message.msg_name = &address
        message.msg_namelen = sizeof(address)
        message.msg_iov = &vector
        message.msg_iovlen = 1
        if interface_index:
            memset(control, 0, sizeof(control))
            message.msg_control = control
            message.msg_controllen = CMSG_SPACE(sizeof(in_pktinfo))
            header = CMSG_FIRSTHDR(&message)
            header.cmsg_level = IPPROTO_IP
            header.cmsg_type = IP_PKTINFO
            header.cmsg_len = CMSG_LEN(sizeof(in_pktinfo))
            information = <in_pktinfo *>CMSG_DATA(header)
            information.ipi_ifindex = interface_index
        if sendmsg(self.fd, &message, MSG_DONTWAIT) < 0:
            return errno
        return 0
