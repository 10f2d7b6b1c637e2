"""What is wrong with a packet that must be dropped? A table of packets, each with the reason that has to be counted.

The packets go from ATTACKER to SERVER, where a service is listened on; see `test_hostile_input`.
"""

from __future__ import annotations

from typing import NamedTuple

from hostile import (
    PROTOCOL_UDP,
    SYN,
    TCP_ACK,
    TCP_FIN,
    TCP_RST,
    TCP_SYN,
    UNKNOWN_SERVICE_NUMBER,
    control,
    sal,
    service,
    source,
    tcp,
)

CLIENT, SERVER, ATTACKER = "10.1.0.1", "10.1.0.2", "10.1.0.3"
ENDS = (ATTACKER, SERVER)
SYN_CONTROL, SERVED = control(SYN), service()
GOOD_TCP = tcp(ENDS)
ADDRESS = bytes.fromhex("3010 0000 00000001 00000002 0a000001")
SOURCE = source(ATTACKER, "10.1.0.9")


class Row(NamedTuple):
    """A packet, from its SAL header on, and the reason for which it must be dropped."""

    what: str
    payload: bytes
    reason: str


def syn(*more: bytes, transport: bytes = GOOD_TCP, **how: int) -> bytes:
    """A SYN that would be answered but for what is said about it."""
    return sal(SYN_CONTROL, SERVED, *more, **how) + transport  # type: ignore[arg-type]


def with_length(extension: bytes, stated: int) -> bytes:
    """The extension, stating a length that it does not have."""
    return extension[:1] + bytes([stated]) + extension[2:]


EXTENSIONS = {"CONTROL": SYN_CONTROL, "SERVICE": SERVED, "ADDRESS": ADDRESS, "SOURCE": SOURCE}

MALFORMED = [
    Row("nothing at all", b"", "sal_truncated"),
    Row("half a base header", sal()[:6], "sal_truncated"),
    Row("a header longer than the packet", sal(SYN_CONTROL, words=200), "sal_truncated"),
    *(Row(f"a header of {words} words", syn(words=words), "sal_header_length") for words in (0, 1, 2)),
    *(
        Row(f"{name} of {len(whole) - 4} bytes", sal(with_length(whole[:-4], len(whole) - 4)), reason)
        for (name, whole), reason in zip(
            EXTENSIONS.items(),
            ("sal_extension_length", "sal_extension_length", "sal_source_addresses", "sal_source_addresses"),
            strict=True,
        )
        if name != "ADDRESS"
    ),
    Row("ADDRESS of 8 bytes", sal(with_length(ADDRESS[:8], 8)), "sal_extension_length"),
    *(
        Row(f"{name} of {len(whole) + 4} bytes", sal(with_length(whole, len(whole) + 4), bytes(4)), "sal_extension_length")
        for name, whole in EXTENSIONS.items()
        if name in ("CONTROL", "SERVICE")
    ),
    *(
        Row(f"{name} cut off by the end of the header", sal(whole, words=2 + len(whole) // 4), "sal_extension_overrun")
        for name, whole in EXTENSIONS.items()
    ),
    *(
        Row(f"{name} of length {length}", sal(with_length(whole, length)), "sal_extension_length")
        for name, whole in EXTENSIONS.items()
        for length in (0, 1, 2, 3)
    ),
    Row("SOURCE of 14 bytes", sal(with_length(SOURCE, 14), bytes(4)), "sal_extension_length"),
    Row("SOURCE of one address", syn(source(ATTACKER)), "sal_source_addresses"),
    Row("SOURCE of none", syn(source()), "sal_source_addresses"),
    Row("SOURCE of 21 addresses", syn(source(*[ATTACKER] * 21)), "sal_source_addresses"),
    Row("two CONTROLs", sal(SYN_CONTROL, SYN_CONTROL, SERVED) + GOOD_TCP, "sal_second_control"),
    Row("three SERVICEs", syn(SERVED, SERVED), "sal_third_service"),
    Row("two SOURCEs", syn(SOURCE, SOURCE), "sal_second_source"),
    Row("eleven extensions", syn(bytes(12)), "sal_too_many_extensions"),
    Row("a header full of ADDRESSes", sal(*[with_length(ADDRESS[:12], 12)] * 20), "sal_too_many_extensions"),
    *(
        Row(f"an extension of type {kind}", syn(bytes((kind << 4, 4, 0, 0))), "sal_unknown_extension")
        for kind in (7, 8, 15)
    ),
    Row("a wrong SAL checksum", syn(damage=0x0100), "sal_checksum"),
    Row("a SYN without SERVICE", sal(SYN_CONTROL) + GOOD_TCP, "syn_without_service"),
    Row("a SYN for UDP", syn(protocol=PROTOCOL_UDP), "wrong_protocol"),
    Row("a SYN from flow 0", sal(SYN_CONTROL, SERVED, flows=(0, 0)) + GOOD_TCP, "flow_id_zero"),
    Row("a SYN for nobody", sal(SYN_CONTROL, service(UNKNOWN_SERVICE_NUMBER)) + GOOD_TCP, "no_listener"),
    Row("a SYN from a full list of forwarders", syn(source(*[ATTACKER] * 20)), "source_full"),
    *(
        Row(f"a SYN to be answered to {address}", syn(source(address, "10.1.0.9")), reason)
        for address, reason in (
            ("0.0.0.0", "not_unicast"),
            ("10.1.0.255", "not_unicast"),
            ("224.0.0.1", "not_unicast"),
            ("255.255.255.255", "not_unicast"),
            ("198.51.100.1", "no_path_back"),
            ("100.126.1.1", "no_path_back"),
        )
    ),
    Row("a wrong TCP checksum in a SYN", syn(transport=tcp(ENDS, damage=1)), "tcp_checksum"),
    Row("a TCP checksum over other addresses", syn(transport=tcp((CLIENT, SERVER))), "tcp_checksum"),
    Row("no TCP header", syn(transport=b""), "tcp_truncated"),
    Row("half a TCP header", syn(transport=GOOD_TCP[:11]), "tcp_truncated"),
    Row("TCP options beyond the packet", syn(transport=tcp(ENDS, words=15)), "tcp_truncated"),
    Row("a TCP header of 16 bytes", syn(transport=tcp(ENDS, words=4)), "tcp_header_length"),
    *(
        Row(f"TCP options {options.hex()}", syn(transport=tcp(ENDS, options=options)), "tcp_option_length")
        for options in (b"\x02\x00\x05\xa8", b"\x02\x01\0\0", b"\x03\x04\x01\0", b"\x08\x28\0\0", b"\1\1\1\x02")
    ),
    *(
        Row(f"a SYN whose TCP flags are {flags:#x}", syn(transport=tcp(ENDS, flags=flags)), "handshake_segment")
        for flags in (0, TCP_ACK, TCP_FIN, TCP_SYN | TCP_RST, TCP_SYN | TCP_ACK, 0x3F)
    ),
]
