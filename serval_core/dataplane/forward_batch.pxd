from libc.stdint cimport uint32_t, uint64_t

DEF TARGETS_MAX = 16


cdef struct Onward:
    unsigned char *start
    int length
    uint32_t destination
    int interface_index
    unsigned char *neighbour    # MAC address; NULL: the kernel's routing finds the way


cdef class Decision:
    cdef readonly object prefix
    cdef int targets
    cdef uint32_t addresses[TARGETS_MAX]
    cdef uint64_t share_ends[TARGETS_MAX]
    cdef int interfaces[TARGETS_MAX]
    cdef int mtus[TARGETS_MAX]
    cdef bint neighbour_known[TARGETS_MAX]
    cdef unsigned char neighbours[TARGETS_MAX][6]
    cdef uint64_t packets[TARGETS_MAX]
    cdef uint64_t bytes[TARGETS_MAX]

    cdef int choose(self, uint32_t number) noexcept


cdef class BatchForwarder:
    cdef object decide
    cdef dict decisions
    cdef object own
    cdef uint64_t random_state
    cdef readonly uint64_t packets_forwarded
    cdef readonly uint64_t send_errors

    cdef int rewrite(self, unsigned char *packet, int length, Onward *onward) except -1
    cdef Decision decision_for(self, unsigned char *service)
    cdef uint32_t random(self) noexcept
