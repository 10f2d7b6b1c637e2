"""How are services, flows, control packets and hosts named, and how are those names written?

Covers the binary identities and their text forms (SPEC 1.2, 1.3), and the order of version numbers. Knows
nothing of tables, packets or configuration files.
"""

from __future__ import annotations

import difflib
import ipaddress
import re
from collections.abc import Mapping
from typing import NamedTuple, NewType

from serval_core.errors import OurMistake

SERVICE_ID_BYTES = 32
SERVICE_ID_BITS = 256

FlowID = NewType("FlowID", int)
"""32 bits, chosen by the host that packets carrying it as destination go to. 0 on the wire means unknown."""

_SERIAL_MASK = 0xFFFFFFFF
_SERIAL_HALF = 0x80000000

_HEX_DIGITS = re.compile(r"[0-9a-fA-F]*")
_WHOLE_ID = re.compile(r"[0-9a-fA-F]{64}")


class NameMistake(OurMistake):
    """A text is no serviceID, prefix or address. The message is one sentence that an operator can act on."""


class ServiceID(bytes):
    """A service's name: exactly 32 opaque bytes, most significant bit first (SPEC 1.2).

    OurMistake for any other length.
    """

    __slots__ = ()

    def __new__(cls, data: bytes) -> ServiceID:
        if len(data) != SERVICE_ID_BYTES:
            raise OurMistake(f"a serviceID has {SERVICE_ID_BYTES} bytes, not {len(data)}")
        return bytes.__new__(cls, data)

    @classmethod
    def from_number(cls, number: int) -> ServiceID:
        """The serviceID that the decimal text form of `number` denotes: 32 bits in front, zeros behind."""
        if not 0 <= number <= 0xFFFFFFFF:
            raise OurMistake(f"{number} does not fit into the first 32 bits of a serviceID")
        return cls(number.to_bytes(4, "big") + bytes(28))

    @property
    def hex_text(self) -> str:
        """64 lower-case hex digits without 0x, as the prototype prints serviceIDs."""
        return self.hex()

    @property
    def text(self) -> str:
        """The shortest text that `parse_service` reads back as this ID ("default" for the all-zero one)."""
        return str(ServicePrefix(self, SERVICE_ID_BITS if any(self) else 0))

    def __repr__(self) -> str:
        text = self.text
        return f"ServiceID({text if len(text) <= 18 else text[:18] + '…'})"


DEFAULT_SERVICE = ServiceID(bytes(SERVICE_ID_BYTES))
"""The all-zero serviceID. It stands in rules, where it covers everything; nothing can be bound to it."""


class ServicePrefix(NamedTuple):
    """The serviceIDs whose first `bits` (0..256) equal those of `service_id`.

    Make it with `of`, which clears the other bits.
    """

    service_id: ServiceID
    bits: int

    @staticmethod
    def of(service_id: ServiceID, bits: int = SERVICE_ID_BITS) -> ServicePrefix:
        """The prefix of `bits` bits of `service_id`. OurMistake unless 0 <= bits <= 256."""
        if bits == SERVICE_ID_BITS:
            return ServicePrefix(service_id, bits)
        if not 0 <= bits < SERVICE_ID_BITS:
            raise OurMistake(f"a prefix has 0 to {SERVICE_ID_BITS} bits, not {bits}")
        beyond = SERVICE_ID_BITS - bits
        number = int.from_bytes(service_id, "big") >> beyond << beyond
        return ServicePrefix(ServiceID(number.to_bytes(SERVICE_ID_BYTES, "big")), bits)

    def covers(self, service_id: ServiceID) -> bool:
        """Whether `service_id` begins with this prefix."""
        difference = int.from_bytes(self.service_id, "big") ^ int.from_bytes(service_id, "big")
        return difference >> (SERVICE_ID_BITS - self.bits) == 0

    def __str__(self) -> str:
        """The shortest text that `parse_service` reads back as this prefix."""
        if self.bits == 0:
            return "default"
        suffix = "" if self.bits == SERVICE_ID_BITS else f":{self.bits}"
        if self.bits >= 32 and not any(self.service_id[4:]):
            return f"{int.from_bytes(self.service_id[:4], 'big')}{suffix}"
        digits = bytes(self.service_id).rstrip(b"\0").hex() or "00"
        return f"0x{digits}{suffix}"


DEFAULT_PREFIX = ServicePrefix(DEFAULT_SERVICE, 0)
"""Covers every serviceID."""


def parse_service(text: str, names: Mapping[str, ServicePrefix] | None = None) -> ServicePrefix:
    """Read a serviceID or a prefix of serviceIDs (SPEC 1.2.1).

    `default`; a decimal number (big endian in the first four bytes: 76568 is 00012b18 and zeros); `0x` and an
    even number of hex digits, left-aligned; 64 hex digits; the last three with an optional `:BITS`; or a key
    of `names`. Raises NameMistake.
    """
    if text == "default":
        return DEFAULT_PREFIX
    body, colon, bits_text = text.partition(":")
    if body.startswith(("0x", "0X")):
        service_id = _from_hex(body)
    elif _WHOLE_ID.fullmatch(body):
        service_id = ServiceID(bytes.fromhex(body))
    elif body.isascii() and body.isdigit():
        service_id = _from_decimal(body)
    else:
        return _from_names(text, names or {})
    if not any(service_id):
        raise NameMistake(f'"{text}" is all zero, which only the default rule may be: write "default"')
    prefix = ServicePrefix.of(service_id, _parse_bits(bits_text, text) if colon else SERVICE_ID_BITS)
    if not any(prefix.service_id):
        raise NameMistake(
            f'the first {prefix.bits} bits of "{body}" are all zero, '
            'which only the default rule may be: write "default"'
        )
    return prefix


def _from_hex(body: str) -> ServiceID:
    digits = body[2:]
    valid = _HEX_DIGITS.match(digits)
    if valid is None or valid.end() != len(digits):
        wrong = digits[valid.end() if valid else 0]
        raise NameMistake(f'"{body}" is no serviceID: "{wrong}" is not a hex digit')
    if not digits:
        raise NameMistake(f'"{body}" is no serviceID: hex digits are missing after 0x')
    if len(digits) > 2 * SERVICE_ID_BYTES:
        raise NameMistake(f'"{body}" is no serviceID: it has {len(digits)} hex digits, and 64 are the most')
    if len(digits) % 2:
        raise NameMistake(
            f'"{body}" has an odd number of hex digits, so write the one that you mean: '
            f"0x{digits}0 (as the prototype reads it) or 0x{digits[:-1]}0{digits[-1]}"
        )
    return ServiceID(bytes.fromhex(digits).ljust(SERVICE_ID_BYTES, b"\0"))


def _from_decimal(body: str) -> ServiceID:
    # int() refuses very long numerals with an error of its own, hence the look at the length first.
    if len(body) > 64 or int(body) > 0xFFFFFFFF:
        raise NameMistake(
            f'"{body}" is too large for a decimal serviceID (32 bits, at most 4294967295): '
            "write longer ones as 0x and hex digits"
        )
    return ServiceID.from_number(int(body))


def _parse_bits(bits_text: str, text: str) -> int:
    if not (bits_text.isascii() and bits_text.isdigit()) or len(bits_text) > 9:
        raise NameMistake(f'"{text}" has no number of bits after the colon: write 1 to 256')
    bits = int(bits_text)
    if not 1 <= bits <= SERVICE_ID_BITS:
        raise NameMistake(f'"{text}" has a prefix of {bits} bits, and only 1 to 256 are possible')
    return bits


def _from_names(text: str, names: Mapping[str, ServicePrefix]) -> ServicePrefix:
    if text in names:
        return names[text]
    nearest = difflib.get_close_matches(text, [*names, "default"], n=1)
    if nearest:
        raise NameMistake(
            f'"{text}" is neither a serviceID nor a known service name: did you mean "{nearest[0]}"?'
        )
    raise NameMistake(
        f'"{text}" is neither a serviceID (a decimal number, 0x and hex digits, or "default") '
        "nor a known service name"
    )


def before(a: int, b: int) -> bool:
    """Whether 32-bit serial number `a` comes before `b` (RFC 1982, with the signed difference deciding)."""
    return (a - b) & _SERIAL_MASK >= _SERIAL_HALF


def after(a: int, b: int) -> bool:
    """Whether 32-bit serial number `a` comes after `b`."""
    return (b - a) & _SERIAL_MASK >= _SERIAL_HALF


def parse_address(text: str) -> int:
    """An IPv4 address in dotted form as a 32-bit number in host order. Raises NameMistake."""
    try:
        return int(ipaddress.IPv4Address(text))
    except ValueError:
        raise NameMistake(f'"{text}" is no IPv4 address: write four numbers of 0 to 255 and dots') from None


def format_address(address: int) -> str:
    """The dotted form of a 32-bit address in host order."""
    return f"{address >> 24 & 255}.{address >> 16 & 255}.{address >> 8 & 255}.{address & 255}"
