# cython: language_level=3
"""How does user space forward packets without making a Python object of each? What `forwarding` does, in the receive buffers.

Takes the shapes that senders use: a SYN or an unconnected datagram, with or without SOURCE, whose serviceID has a plan
(`forwarding_plan`). Everything else, also whatever has to be refused and counted, is left to the SAL. The packet is rewritten
where it was received: the headers move towards the front, and the room behind them takes the SOURCE extension (SPEC 6.5).
"""

import os

from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.string cimport memcpy, memmove

DEF TARGETS_MAX = 16
DEF IPV4_BYTES = 20
DEF BASE_BYTES = 12
DEF SYN_BYTES = 68           # base, CONTROL, SERVICE
DEF DATAGRAM_BYTES = 84      # base, SERVICE, SERVICE
DEF SOURCE_BYTES = 12        # a SOURCE extension with two addresses
DEF SOURCE_BYTES_MAX = 80    # one with 19, which may grow once more
DEF SERVICE_ID_BYTES = 32
DEF DECISIONS_MAX = 65536    # serviceIDs may be invented by anybody
HEADROOM_BYTES = 16


cdef inline uint32_t read_32(const unsigned char *at) noexcept:
    return <uint32_t>at[0] << 24 | <uint32_t>at[1] << 16 | <uint32_t>at[2] << 8 | at[3]


cdef inline uint32_t read_16(const unsigned char *at) noexcept:
    return <uint32_t>at[0] << 8 | at[1]


cdef inline void write_32(unsigned char *at, uint32_t value) noexcept:
    at[0], at[1], at[2], at[3] = value >> 24, value >> 16 & 0xFF, value >> 8 & 0xFF, value & 0xFF


cdef inline void write_16(unsigned char *at, uint32_t value) noexcept:
    at[0], at[1] = value >> 8 & 0xFF, value & 0xFF


cdef inline uint32_t fold(uint64_t total) noexcept:
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return <uint32_t>total


cdef inline uint32_t sum_of(const unsigned char *at, int length) noexcept:
    """The folded sum of 16-bit words. `length` is a multiple of 4."""
    cdef uint64_t total = 0
    cdef int i
    for i in range(0, length, 4):
        total += read_32(at + i)
    return fold(total)


cdef inline uint32_t changed_checksum(uint32_t checksum, uint64_t change) noexcept:
    """RFC 1624: `change` is the sum of the new words and of the complements of the old ones."""
    return ~fold((~checksum & 0xFFFF) + change) & 0xFFFF


cdef inline bint is_extension(const unsigned char *at, int kind, int length) noexcept:
    return at[0] >> 4 == kind and at[1] == length


cdef class Decision:
    """A plan as C numbers, and how often each of its targets was chosen."""

    def __init__(self, prefix, plan, links):
        """`links` has the MAC addresses for each target of the plan, or None."""
        cdef int i
        cdef bytes neighbour
        if len(plan) > TARGETS_MAX:
            raise ValueError(f"a decision has at most {TARGETS_MAX} targets")
        self.prefix = prefix
        self.targets = len(plan)
        for i, (target, link) in enumerate(zip(plan, links, strict=True)):
            self.neighbour_known[i] = link is not None
            if link is not None:
                neighbour = link.neighbour
                memcpy(self.neighbours[i], <const unsigned char *>neighbour, 6)
            self.addresses[i] = target.address
            self.share_ends[i] = target.share_end
            self.interfaces[i] = target.interface_index
            self.mtus[i] = target.mtu_bytes
            self.packets[i] = self.bytes[i] = 0

    cdef int choose(self, uint32_t number) noexcept:
        cdef int i = 0
        while i < self.targets - 1 and number >= self.share_ends[i]:
            i += 1
        return i

    def take_counts(self) -> list[tuple[int, int, int]]:
        """(address, packets, bytes behind the SAL header) of the targets chosen since the last call."""
        cdef int i
        counts = []
        for i in range(self.targets):
            if self.packets[i]:
                counts.append((self.addresses[i], self.packets[i], self.bytes[i]))
                self.packets[i] = self.bytes[i] = 0
        return counts


cdef class BatchForwarder:
    """`decide(service_id)` gives the Decision for a serviceID, or None to leave it to the SAL; answers are remembered."""

    def __init__(self, decide, own):
        self.decide = decide
        self.own = own
        self.decisions = {}
        self.random_state = int.from_bytes(os.urandom(8), "little") | 1

    def set_own_addresses(self, own) -> None:
        """The addresses of this host: nothing that pretends to come from them goes on."""
        self.own = own

    def forget(self) -> None:
        """Ask anew for every serviceID: rules, paths or addresses have changed."""
        self.decisions.clear()

    def forwarded(self, bytes packet) -> tuple[bytes, int, int] | None:
        """What becomes of one packet: (packet, destination, interface index), or None if it is left to the SAL."""
        cdef unsigned char buffer[16 + 65536]
        cdef Onward onward
        memcpy(buffer + 16, <const unsigned char *>packet, len(packet))
        if not self.rewrite(buffer + 16, len(packet), &onward):
            return None
        return (
            PyBytes_FromStringAndSize(<char *>onward.start, onward.length),
            onward.destination,
            onward.interface_index,
        )

    cdef uint32_t random(self) noexcept:
        # xorshift64*; which instance gets a SYN is no secret.
        self.random_state ^= self.random_state >> 12
        self.random_state ^= self.random_state << 25
        self.random_state ^= self.random_state >> 27
        return <uint32_t>(self.random_state * <uint64_t>0x2545F4914F6CDD1D >> 32)

    cdef Decision decision_for(self, unsigned char *service):
        key = PyBytes_FromStringAndSize(<char *>service, SERVICE_ID_BYTES)
        try:
            return self.decisions[key]
        except KeyError:
            if len(self.decisions) >= DECISIONS_MAX:
                self.decisions.clear()
            found = self.decisions[key] = self.decide(key)
            return found

    cdef int rewrite(self, unsigned char *packet, int length, Onward *onward) except -1:
        """Rewrite a packet, before which 12 bytes may be written to; 1 if it goes on, 0 if it is left as it was."""
        cdef unsigned char *sal = packet + IPV4_BYTES
        cdef unsigned char *source
        cdef unsigned char *transport
        cdef unsigned char *check
        cdef unsigned char *moved
        cdef uint32_t from_address, own_address, target_address, checksum
        cdef int header_bytes, source_at, growth, i, service_at, chosen, check_at
        cdef uint64_t change
        cdef Decision decision

        if length < IPV4_BYTES + SYN_BYTES or packet[0] != 0x45 or packet[9] != 144 or packet[8] <= 1:
            return 0
        if read_16(packet + 6) & 0x3FFF or <int>read_16(packet + 2) != length:
            return 0
        header_bytes = sal[8] * 4
        if header_bytes < SYN_BYTES or IPV4_BYTES + header_bytes > length or read_32(sal + 4):
            return 0
        if sal[9] != 6 and sal[9] != 17:
            return 0
        if is_extension(sal + 12, 1, 20) and sal[14] & 0xFC == 0x80 and is_extension(sal + 32, 2, 36):
            source_at, service_at = SYN_BYTES, 36
        elif header_bytes >= DATAGRAM_BYTES and is_extension(sal + 12, 2, 36) and is_extension(sal + 48, 2, 36):
            source_at, service_at = DATAGRAM_BYTES, 16
        else:
            return 0
        source = sal + source_at
        if header_bytes > source_at and (
            header_bytes - source_at < SOURCE_BYTES
            or header_bytes - source_at > SOURCE_BYTES_MAX
            or not is_extension(source, 4, header_bytes - source_at)
        ):
            return 0
        if sum_of(packet, IPV4_BYTES) != 0xFFFF or sum_of(sal, header_bytes) != 0xFFFF:
            return 0
        from_address, own_address = read_32(packet + 12), read_32(packet + 16)
        if from_address < 0x01000000 or from_address >= 0xE0000000 or from_address >> 24 == 127:
            return 0

        decision = self.decision_for(sal + service_at)
        if decision is None or from_address in self.own:
            return 0
        chosen = decision.choose(self.random()) if decision.targets > 1 else 0
        target_address = decision.addresses[chosen]
        if target_address == from_address:
            return 0
        for i in range(source_at + 4, header_bytes, 4):
            if read_32(sal + i) == own_address or read_32(sal + i) == target_address:
                return 0
        growth = SOURCE_BYTES if header_bytes == source_at else 4
        if length + growth > decision.mtus[chosen]:
            return 0

        transport = sal + header_bytes
        check_at = 16 if sal[9] == 6 else 6
        if length >= IPV4_BYTES + header_bytes + check_at + 2:
            check = transport + check_at
            if sal[9] == 6 or read_16(check):
                # The transport checksum follows the address, so that a wrong one stays wrong. UDP: 0 is none.
                checksum = changed_checksum(read_16(check), <uint64_t><uint32_t>~own_address + target_address)
                write_16(check, 0xFFFF if checksum == 0 and sal[9] == 17 else checksum)

        moved = packet - growth
        memmove(moved, packet, IPV4_BYTES + header_bytes)
        sal = moved + IPV4_BYTES
        if growth == SOURCE_BYTES:
            write_32(sal + header_bytes, 0x400C0000)
            write_32(sal + header_bytes + 4, from_address)
            write_32(sal + header_bytes + 8, own_address)
            change = <uint64_t>0x400C0000 + from_address + own_address
        else:
            sal[source_at + 1] += 4
            write_32(sal + header_bytes, own_address)
            change = <uint64_t>own_address + 4
        sal[8] += growth // 4
        write_16(sal + 10, changed_checksum(read_16(sal + 10), change + (growth // 4 << 8)))
        write_16(moved + 2, length + growth)
        moved[8] -= 1
        write_32(moved + 16, target_address)
        write_16(moved + 10, 0)
        write_16(moved + 10, ~sum_of(moved, IPV4_BYTES) & 0xFFFF)

        decision.packets[chosen] += 1
        decision.bytes[chosen] += length - IPV4_BYTES - header_bytes
        self.packets_forwarded += 1
        onward.start = moved
        onward.length = length + growth
        onward.destination = target_address
        onward.interface_index = decision.interfaces[chosen]
        onward.neighbour = decision.neighbours[chosen] if decision.neighbour_known[chosen] else NULL
        return 1
