"""Are names read, written, compared and refused as SPEC 1.2 and the contract of the command line say?"""

from __future__ import annotations

import ipaddress
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serval_core.errors import OurMistake
from serval_core.names import (
    DEFAULT_PREFIX,
    DEFAULT_SERVICE,
    NameMistake,
    ServiceID,
    ServicePrefix,
    after,
    before,
    format_address,
    parse_address,
    parse_service,
)

service_ids = st.binary(min_size=32, max_size=32).map(ServiceID)
sparse_service_ids = st.builds(
    lambda head, size: ServiceID(head[:size].ljust(32, b"\0")),
    st.binary(min_size=32, max_size=32),
    st.integers(0, 32),
)
addresses = st.integers(0, 0xFFFFFFFF)
serials = st.integers(0, 0xFFFFFFFF)


def bit_string(service_id: bytes) -> str:
    return "".join(f"{byte:08b}" for byte in service_id)


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_service_id_has_32_bytes(size: int) -> None:
    with pytest.raises(OurMistake, match=f"not {size}"):
        ServiceID(bytes(size))


def test_a_service_id_is_bytes_with_a_text() -> None:
    service_id = ServiceID.from_number(76568)
    assert service_id == bytes.fromhex("00012b18") + bytes(28)
    assert hash(service_id) == hash(bytes(service_id))
    assert service_id.hex_text == "00012b18" + "00" * 28
    assert service_id.text == "76568"
    assert repr(service_id) == "ServiceID(76568)"
    assert repr(ServiceID(bytes(range(32)))) == "ServiceID(0x0001020304050607…)"
    assert DEFAULT_SERVICE.text == "default"


@pytest.mark.parametrize("number", [-1, 1 << 32])
def test_a_number_beyond_32_bits_is_no_service_id(number: int) -> None:
    with pytest.raises(OurMistake):
        ServiceID.from_number(number)


@given(service_ids, st.integers(0, 256), service_ids, st.integers(0, 256))
def test_a_prefix_covers_what_begins_with_it(
    service_id: ServiceID, bits: int, other: ServiceID, shared: int
) -> None:
    prefix = ServicePrefix.of(service_id, bits)
    assert bit_string(prefix.service_id) == bit_string(service_id)[:bits].ljust(256, "0")
    assert prefix.covers(service_id)
    related = int(bit_string(service_id)[:shared] + bit_string(other)[shared:], 2).to_bytes(32, "big")
    assert prefix.covers(ServiceID(related)) == (bit_string(related)[:bits] == bit_string(service_id)[:bits])


@pytest.mark.parametrize("bits", [-1, 257])
def test_a_prefix_has_at_most_256_bits(bits: int) -> None:
    with pytest.raises(OurMistake, match="0 to 256"):
        ServicePrefix.of(DEFAULT_SERVICE, bits)


@pytest.mark.parametrize(
    ("text", "head", "bits"),
    [
        ("76568", "00012b18", 256),
        ("76568:32", "00012b18", 32),
        ("4294967295", "ffffffff", 256),
        ("0x00012b18", "00012b18", 256),
        ("0X00012B18", "00012b18", 256),
        ("0x00012b18:20", "000120", 20),
        ("0x80:1", "80", 1),
        ("0x" + "ab" * 32, "ab" * 32, 256),
        ("ab" * 32, "ab" * 32, 256),
        ("AB" * 32 + ":8", "ab", 8),
        # 64 digits are a whole serviceID even when all of them are decimal.
        ("10" * 32, "10" * 32, 256),
    ],
)
def test_text_is_read(text: str, head: str, bits: int) -> None:
    expected = ServicePrefix(ServiceID(bytes.fromhex(head).ljust(32, b"\0")), bits)
    assert parse_service(text) == expected


def test_default_is_the_empty_prefix() -> None:
    assert parse_service("default") == DEFAULT_PREFIX
    assert DEFAULT_PREFIX.covers(ServiceID(b"\xff" * 32))
    assert str(DEFAULT_PREFIX) == "default"


def test_a_name_stands_for_its_prefix_but_never_hides_a_number() -> None:
    web = ServicePrefix.of(ServiceID.from_number(80), 32)
    assert parse_service("web", {"web": web}) == web
    assert parse_service("80", {"80": DEFAULT_PREFIX}) == ServicePrefix.of(ServiceID.from_number(80))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0x00zz", '"z" is not a hex digit'),
        ("0x00_1", '"_" is not a hex digit'),
        ("0x", "missing after 0x"),
        ("0x" + "00" * 33, "66 hex digits, and 64 are the most"),
        ("0x0000005", "0x00000050 (as the prototype reads it) or 0x00000005"),
        ("4294967296", "too large"),
        ("9" * 5000, "too large"),
        ("0", 'write "default"'),
        ("0x00", 'write "default"'),
        ("0x0001:8", 'write "default"'),
        ("76568:0", "prefix of 0 bits"),
        ("76568:257", "prefix of 257 bits"),
        ("76568:", "no number of bits"),
        ("76568:-1", "no number of bits"),
        ("76568:x", "no number of bits"),
        ("76568:" + "9" * 5000, "no number of bits"),
        ("76568:³", "no number of bits"),
        ("webb", 'did you mean "web"'),
        ("defalt", 'did you mean "default"'),
        ("something else", "nor a known service name"),
        ("", "nor a known service name"),
        ("-5", "nor a known service name"),
        ("١٢٣", "nor a known service name"),
        ("12ab", "nor a known service name"),
        ("ab" * 31, "nor a known service name"),
    ],
)
def test_what_is_no_service_is_refused_with_one_clear_sentence(text: str, said: str) -> None:
    with pytest.raises(NameMistake) as mistake:
        parse_service(text, {"web": DEFAULT_PREFIX})
    assert said in str(mistake.value)
    assert "\n" not in str(mistake.value)


@given(st.text())
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        prefix = parse_service(text)
    except NameMistake:
        return
    assert parse_service(str(prefix)) == prefix


@given(service_ids | sparse_service_ids, st.integers(1, 256))
def test_the_text_of_a_prefix_is_read_back(service_id: ServiceID, bits: int) -> None:
    prefix = ServicePrefix.of(service_id, bits)
    if any(prefix.service_id):
        assert parse_service(str(prefix)) == prefix
    assert parse_service(service_id.text).service_id == service_id


@given(serials, serials)
def test_serial_numbers_are_ordered_by_their_signed_difference(a: int, b: int) -> None:
    signed = struct.unpack("!i", struct.pack("!I", (a - b) % 2**32))[0]
    assert before(a, b) == (signed < 0)
    assert after(a, b) == before(b, a)


def test_serial_numbers_wrap() -> None:
    assert before(0xFFFFFFFF, 0)
    assert after(0, 0xFFFFFFFF)
    assert not before(7, 7)
    assert not after(7, 7)


@given(addresses)
def test_addresses_are_written_and_read(address: int) -> None:
    assert format_address(address) == str(ipaddress.IPv4Address(address))
    assert parse_address(format_address(address)) == address


@pytest.mark.parametrize("text", ["", "10.0.0", "10.0.0.256", "10.0.0.01", "::1", "host", " 10.0.0.1"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(NameMistake, match="no IPv4 address"):
        parse_address(text)
