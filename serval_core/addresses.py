"""What kind of IPv4 address is this? Addresses are 32-bit integers in host order (RFC 1122 3.2.1.3)."""

from __future__ import annotations

LOOPBACK = 0x7F000001


def is_loopback(address: int) -> bool:
    """Whether this address never leaves a host."""
    return address >> 24 == 127


def is_unicast(address: int) -> bool:
    """Whether a single host can have this address, as far as the number tells: a subnet's broadcast address
    looks like any other.
    """
    return 0x01000000 <= address < 0xE0000000
