"""How is the Internet checksum computed, and how does it change when a few fields do? (RFC 1071, RFC 1624)

A one's complement sum of 16-bit words is the number that the words spell, modulo 65535: that lets Python's
big integers do the loop. One's complement has two zeros, and a sum over anything but zeros comes out as
0xFFFF, never as 0.
"""

from __future__ import annotations

Octets = bytes | bytearray | memoryview

_MODULUS = 0xFFFF


def internet_checksum(data: Octets, initial_sum: int = 0) -> int:
    """The 16-bit checksum of `data`, as if a zero byte were added to an odd length.

    `initial_sum` is added first; any sum of 16-bit words, folded or not, such as that of a pseudo header.
    Over data that contains its own right checksum the result is 0.
    """
    number = int.from_bytes(data, "big")
    if len(data) & 1:
        number <<= 8
    return checksum_of_sum(number + initial_sum)


def checksum_of_sum(total: int) -> int:
    """The checksum of words that add up to `total` (32-bit and longer fields may be added in whole)."""
    return _MODULUS - (total % _MODULUS or _MODULUS) if total else _MODULUS


def pseudo_header_sum(source: int, destination: int, protocol: int, length_bytes: int) -> int:
    """The folded sum of the pseudo header (RFC 9293 3.1). `length_bytes`: transport header and data."""
    return (source + destination + protocol + length_bytes) % _MODULUS or _MODULUS


def update_checksum(checksum: int, old: int | Octets, new: int | Octets) -> int:
    """The checksum after the field `old` became `new` (RFC 1624, equation 3).

    A field is a number or bytes, starts at an even offset, and has an even length. Not for data that is zero
    throughout afterwards.
    """
    old_sum = old if isinstance(old, int) else int.from_bytes(old, "big")
    new_sum = new if isinstance(new, int) else int.from_bytes(new, "big")
    return _MODULUS - ((_MODULUS - checksum - old_sum + new_sum) % _MODULUS or _MODULUS)
