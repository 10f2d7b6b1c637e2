# cython: language_level=3
"""How do control packets get in and out? One raw socket for protocol 144, many packets per system call.

Reception: `recvmmsg`, with IP_PKTINFO telling interface and whether the packet was a broadcast. Transmission: whole IPv4 packets
(IP_HDRINCL); the kernel fills in identification and header checksum. A packet socket on the anchor device injects segments.
With a forwarder, packets for services of other hosts go on from the buffers they were received in, as frames where the next
hop's MAC address is known (a packet socket, `sendmmsg`): the kernel's way for raw packets costs twice as much.
"""

import socket as python_socket

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport uint16_t, uint32_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from serval_core.dataplane.forward_batch cimport BatchForwarder, Onward
from serval_core.dataplane.inet cimport AF_INET, AF_PACKET, IP_PKTINFO, IPPROTO_IP, htonl, htons, in_pktinfo, sockaddr_in
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
    int sendmmsg(int fd, mmsghdr *messages, unsigned int count, int flags)
    ssize_t sendmsg(int fd, const msghdr *message, int flags)
    int MSG_DONTWAIT, MSG_TRUNC

cdef extern from "<linux/if_packet.h>" nogil:
    cdef struct sockaddr_ll:
        unsigned short sll_family
        uint16_t sll_protocol
        int sll_ifindex
        unsigned char sll_halen
        unsigned char sll_addr[8]

DEF BATCH = 64
DEF PACKET_BYTES = 65536     # a datagram may be as long as IPv4 allows: the kernel has put its fragments together
DEF CONTROL_BYTES = 64
DEF HEADROOM = 16            # for what a forwarder inserts
DEF SLOT_BYTES = PACKET_BYTES + 320    # no power of 2, so that the slots do not compete for the same cache lines
DEF MAC_BYTES = 6
DEF ETHERTYPE_IPV4 = 0x0800
DEF ROUNDS = 8               # of receiving while there is nothing but packets to forward

PROTOCOL_SAL = 144
SO_ATTACH_BPF = 50
SO_RCVBUFFORCE = 33
IP_PKTINFO_OPTION = 8


cdef class RawSocket:
    """The protocol-144 socket of the stack. Owns its fd until `close()`."""

    cdef object socket
    cdef readonly int fd
    cdef BatchForwarder forwarder
    cdef object link_socket
    cdef int link_fd
    cdef char *buffers           # BATCH of them; no page exists before a packet needs it
    cdef char controls[BATCH][CONTROL_BYTES]
    cdef mmsghdr messages[BATCH]
    cdef iovec vectors[BATCH]
    cdef sockaddr_ll onward_addresses[BATCH]
    cdef mmsghdr onward_messages[BATCH]
    cdef iovec onward_vectors[BATCH]

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
        self.buffers = <char *>malloc(BATCH * SLOT_BYTES)
        if self.buffers is NULL:
            self.socket.close()
            raise MemoryError
        self.fd = self.socket.fileno()
        for i in range(BATCH):
            self.vectors[i].iov_base = self.buffers + i * SLOT_BYTES + HEADROOM
            self.vectors[i].iov_len = PACKET_BYTES
            memset(&self.messages[i], 0, sizeof(mmsghdr))
            self.messages[i].msg_hdr.msg_iov = &self.vectors[i]
            self.messages[i].msg_hdr.msg_iovlen = 1
            self.prepare_onward(i)

    def __dealloc__(self):
        free(self.buffers)

    def close(self) -> None:
        self.forward_with(None)
        self.socket.close()

    def forward_with(self, BatchForwarder forwarder) -> None:
        """Give received packets to `forwarder` first; None: to nobody any more. Raises KernelRefused."""
        self.forwarder = None
        if self.link_socket is not None:
            self.link_socket.close()
            self.link_socket = None
        if forwarder is not None:
            try:
                self.link_socket = python_socket.socket(python_socket.AF_PACKET, python_socket.SOCK_DGRAM, 0)
            except OSError as error:
                raise KernelRefused("socket(AF_PACKET, SOCK_DGRAM)", error.errno, "Needs CAP_NET_RAW.") from error
            self.link_fd = self.link_socket.fileno()
        self.forwarder = forwarder

    cdef void prepare_onward(self, int i) noexcept:
        """What all frames that go on have in common."""
        cdef msghdr *message = &self.onward_messages[i].msg_hdr
        memset(&self.onward_messages[i], 0, sizeof(mmsghdr))
        memset(&self.onward_addresses[i], 0, sizeof(sockaddr_ll))
        self.onward_addresses[i].sll_family = AF_PACKET
        self.onward_addresses[i].sll_protocol = htons(ETHERTYPE_IPV4)
        self.onward_addresses[i].sll_halen = MAC_BYTES
        message.msg_name = &self.onward_addresses[i]
        message.msg_namelen = sizeof(sockaddr_ll)
        message.msg_iov = &self.onward_vectors[i]
        message.msg_iovlen = 1

    def receive(self) -> list[tuple[bytes, int, bool]]:
        """Up to 64 packets that wait: (whole IPv4 packet, interface index, was it a broadcast). Empty when none waits.

        What the forwarder takes is sent on and not among them.
        """
        cdef int count, i, onward_count, rounds = ROUNDS
        cdef BatchForwarder forwarder = self.forwarder
        cdef cmsghdr *control
        cdef in_pktinfo *information
        cdef Onward onward
        cdef char *packet
        received = []
        while rounds:
            rounds -= 1
            for i in range(BATCH):
                self.messages[i].msg_hdr.msg_control = self.controls[i]
                self.messages[i].msg_hdr.msg_controllen = CONTROL_BYTES
            count = recvmmsg(self.fd, self.messages, BATCH, MSG_DONTWAIT, NULL)
            if count < 0:
                if errno == EAGAIN or errno == EINTR:
                    return received
                raise KernelRefused("recvmmsg", errno, "")
            onward_count = 0
            for i in range(count):
                packet = self.buffers + i * SLOT_BYTES + HEADROOM
                interface = 0
                broadcast = False
                control = CMSG_FIRSTHDR(&self.messages[i].msg_hdr)
                if control is not NULL and control.cmsg_level == IPPROTO_IP and control.cmsg_type == IP_PKTINFO:
                    information = <in_pktinfo *>CMSG_DATA(control)
                    interface = information.ipi_ifindex
                    broadcast = information.ipi_spec_dst.s_addr != information.ipi_addr.s_addr
                if forwarder is not None and not broadcast and forwarder.rewrite(
                    <unsigned char *>packet, self.messages[i].msg_len, &onward
                ):
                    if onward.neighbour is NULL:
                        message = PyBytes_FromStringAndSize(<char *>onward.start, onward.length)
                        forwarder.send_errors += self.send(message, onward.destination, onward.interface_index) != 0
                    else:
                        self.put_onward(onward_count, &onward)
                        onward_count += 1
                    continue
                received.append((PyBytes_FromStringAndSize(packet, self.messages[i].msg_len), interface, broadcast))
            if onward_count:
                forwarder.send_errors += self.send_onward(onward_count)
            if count < BATCH or received:
                break
        return received

    cdef void put_onward(self, int i, Onward *onward) noexcept:
        self.onward_addresses[i].sll_ifindex = onward.interface_index
        memcpy(self.onward_addresses[i].sll_addr, onward.neighbour, MAC_BYTES)
        self.onward_vectors[i].iov_base = onward.start
        self.onward_vectors[i].iov_len = onward.length

    cdef int send_onward(self, int count) noexcept:
        """Send the frames that were put; returns how many the kernel refused."""
        cdef int done = 0, sent, refused = 0
        while done < count:
            sent = sendmmsg(self.link_fd, self.onward_messages + done, count - done, MSG_DONTWAIT)
            if sent < 0:
                if errno == EINTR:
                    continue
                refused += 1
                sent = 1
            done += sent
        return refused

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
