# What <netinet/in.h> declares, as far as extensions here use it.

from libc.stdint cimport uint16_t, uint32_t

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
    uint16_t htons(uint16_t value)
    int AF_INET, AF_PACKET, IPPROTO_IP, IPPROTO_TCP, IP_PKTINFO
