"""Are SAL headers written as they are read, and is every broken rule of SPEC 2.3 found and named?"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serval_core.errors import OurMistake
from serval_core.names import ServiceID
from serval_core.wire import sal
from serval_core.wire.checksum import internet_checksum
from serval_core.wire.sal import Control, SalPacket

from .mistakes import reason_for
from .strategies import controls, octets, sal_packets, words32

packets = sal_packets(octets, st.binary(max_size=60))

CONTROL = bytes.fromhex("1014a000 00001000 00002000 1122334455667788")
SERVICE = bytes.fromhex("20240000") + bytes(range(32))
OTHER_SERVICE = bytes.fromhex("20240000") + bytes(range(32, 64))
ADDRESS = bytes.fromhex("3010 0000 00000001 00000002 0a000001")
SOURCE = bytes.fromhex("400c0000 0a000001 0a000009")
KEY = bytes.fromhex("50240000") + bytes(range(32))
PROOF = bytes.fromhex("60140000") + bytes(range(16))
PAD = b"\0"
EXTENSIONS = {
    "control": CONTROL,
    "service": SERVICE,
    "address": ADDRESS,
    "source": SOURCE,
    "key": KEY,
    "proof": PROOF,
}

A_CONTROL = Control(sal.SYN | sal.ACK, 0x1000, 0x2000, bytes.fromhex("1122334455667788"))
A_SERVICE = ServiceID(bytes(range(32)))
ANOTHER_SERVICE = ServiceID(bytes(range(32, 64)))


def header(*extensions: bytes, words: int | None = None, transport: bytes = b"") -> bytes:
    """A SAL header with these extensions and a right checksum; `words` is the length that it states."""
    body = b"".join(extensions)
    data = bytearray(bytes.fromhex("00000002 00000003"))
    data += bytes((3 + len(body) // 4 if words is None else words, 6, 0, 0)) + body
    covered = data[: 4 * data[8]]
    data[10:12] = internet_checksum(covered).to_bytes(2, "big")
    return bytes(data) + transport


def reason(*extensions: bytes, words: int | None = None) -> str | None:
    return reason_for(sal.parse, header(*extensions, words=words))


@given(packets)
def test_what_is_written_is_read(packet: SalPacket) -> None:
    assert sal.parse(sal.emit(packet)) == packet


@given(packets, controls)
def test_the_shortcut_for_control_packets_writes_the_same(packet: SalPacket, control: Control) -> None:
    packet = packet._replace(control=control, services=packet.services[:1])
    written = sal.emit_control(
        packet.src_flow_id,
        packet.dst_flow_id,
        packet.protocol,
        *control,
        packet.services[0] if packet.services else None,
        packet.source_addresses,
        packet.transport,
        packet.key,
        packet.proof,
    )
    assert written == sal.emit(packet)


@given(words32, words32, octets)
def test_the_shortcut_for_data_writes_the_same(src_flow_id: int, dst_flow_id: int, protocol: int) -> None:
    packet = SalPacket(src_flow_id, dst_flow_id, protocol, None, (), (), b"")
    assert sal.data_header(src_flow_id, dst_flow_id, protocol) == sal.emit(packet)


@given(packets)
def test_the_direct_readers_agree_with_the_general_one(packet: SalPacket) -> None:
    # Four PAD bytes in front make any shape one that only the general reader knows.
    data = sal.emit(packet)
    header_bytes = 4 * data[8]
    padded = bytearray(data[:12] + bytes(4) + data[12:])
    padded[8] += 1
    padded[10:12] = b"\0\0"
    padded[10:12] = internet_checksum(padded[: header_bytes + 4]).to_bytes(2, "big")
    assert sal.parse(bytes(padded)) == sal.parse(data) == packet


@given(st.binary(max_size=120))
def test_random_bytes_are_refused_with_a_listed_reason(data: bytes) -> None:
    assert reason_for(sal.parse, data) in {None, *sal.REASONS}


extension_like = st.builds(
    lambda kind, length, body: bytes((kind, length)) + body,
    st.sampled_from([0x00, 0x10, 0x2F, 0x30, 0x40, 0x50, 0xF0]),
    st.sampled_from([0, 1, 2, 3, 4, 8, 12, 16, 20, 36, 84, 88, 255]),
    st.binary(max_size=90),
)


@given(st.lists(extension_like | st.sampled_from([*EXTENSIONS.values(), bytes(4)]), max_size=12), st.data())
def test_random_extensions_are_refused_with_a_listed_reason(bodies: list[bytes], data: st.DataObject) -> None:
    body = b"".join(bodies)
    body += bytes(-len(body) % 4)
    words = data.draw(st.integers(0, min(255, 3 + len(body) // 4)))
    assert reason_for(sal.parse, header(body[:1008], words=words)) in {None, *sal.REASONS}


def test_extensions_come_in_any_order() -> None:
    packet = sal.parse(header(SOURCE, SERVICE, CONTROL, OTHER_SERVICE, transport=b"rest"))
    assert packet.control == A_CONTROL
    assert packet.services == (A_SERVICE, ANOTHER_SERVICE)
    assert packet.source_addresses == (0x0A000001, 0x0A000009)
    assert packet.transport == b"rest"


def test_padding_and_address_extensions_are_skipped() -> None:
    packet = sal.parse(header(PAD, PAD, CONTROL, PAD, ADDRESS, ADDRESS, SERVICE, PAD))
    assert (packet.control, packet.services) == (A_CONTROL, (A_SERVICE,))


@given(octets, octets, st.binary(min_size=2, max_size=2))
def test_reserved_bits_are_ignored(low: int, reserved: int, service_reserved: bytes) -> None:
    control = bytes((0x10 | low & 0x0F, 20, 0xA0 | reserved & 3, reserved)) + CONTROL[4:]
    service = bytes((0x20 | low & 0x0F, 36)) + service_reserved + SERVICE[4:]
    assert sal.parse(header(control)) == sal.parse(header(CONTROL))
    assert sal.parse(header(control, service)) == sal.parse(header(CONTROL, SERVICE))
    source = bytes((0x40 | low >> 4, 12)) + service_reserved + SOURCE[4:]
    assert sal.parse(header(control, source)) == sal.parse(header(CONTROL, SOURCE))


def test_a_short_packet_is_truncated() -> None:
    whole = header(CONTROL, SERVICE, transport=b"")
    for size in range(len(whole)):
        assert reason_for(sal.parse, whole[:size]) == sal.TRUNCATED
    assert reason_for(sal.parse, whole) is None


@pytest.mark.parametrize("words", [0, 1, 2])
def test_a_header_below_the_base_is_refused(words: int) -> None:
    assert reason(words=words) == sal.HEADER_LENGTH


@pytest.mark.parametrize("shape", [(), (CONTROL,), (CONTROL, SERVICE), (SERVICE, OTHER_SERVICE)])
def test_every_damaged_bit_is_found(shape: tuple[bytes, ...]) -> None:
    whole = header(*shape)
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        assert reason_for(sal.parse, bytes(damaged)) is not None
    flow_id_damaged = bytes((whole[0] ^ 1,)) + whole[1:]
    assert reason_for(sal.parse, flow_id_damaged) == sal.WRONG_CHECKSUM


@pytest.mark.parametrize("kind", range(7, 16))
def test_an_unknown_extension_is_refused(kind: int) -> None:
    assert reason(bytes((kind << 4, 4, 0, 0))) == sal.UNKNOWN_EXTENSION
    assert reason(CONTROL, bytes((kind << 4, 4, 0, 0))) == sal.UNKNOWN_EXTENSION


@pytest.mark.parametrize(
    ("extension", "lengths"),
    [
        (CONTROL, {20}),
        (SERVICE, {36}),
        (ADDRESS, set(range(12, 256))),
        (SOURCE, set(range(4, 256, 4))),
        (KEY, {36}),
        (PROOF, {20}),
    ],
    ids=EXTENSIONS,
)
def test_a_length_that_a_type_cannot_have_is_refused(extension: bytes, lengths: set[int]) -> None:
    for length in set(range(256)) - lengths:
        assert reason(extension[:1] + bytes((length,)) + extension[2:]) == sal.EXTENSION_LENGTH
        assert reason(PAD * 4, extension[:1] + bytes((length,)) + extension[2:]) == sal.EXTENSION_LENGTH


@pytest.mark.parametrize("extension", EXTENSIONS.values(), ids=EXTENSIONS)
def test_an_extension_reaching_beyond_the_header_is_refused(extension: bytes) -> None:
    for words in range(4, 3 + len(extension) // 4):
        assert reason(extension, words=words) == sal.EXTENSION_OVERRUN
        assert reason(OTHER_SERVICE, extension, words=words + 9) == sal.EXTENSION_OVERRUN
    # What is left of the header is too short for the length byte.
    assert reason(PAD * 3, extension[:1]) == sal.EXTENSION_OVERRUN


def test_the_header_ends_where_the_last_extension_does() -> None:
    assert reason(CONTROL, words=8) is None
    assert reason(CONTROL, PAD * 4, words=9) is None
    # The transport part is no place for an extension, and an extension none for the transport part.
    assert sal.parse(header(CONTROL, SERVICE, words=8)).transport == SERVICE


def test_repeated_extensions_are_refused() -> None:
    assert reason(CONTROL, CONTROL) == sal.SECOND_CONTROL
    assert reason(CONTROL, SERVICE, CONTROL) == sal.SECOND_CONTROL
    assert reason(SERVICE, OTHER_SERVICE) is None
    assert reason(SERVICE, OTHER_SERVICE, SERVICE) == sal.THIRD_SERVICE
    assert reason(SOURCE, SOURCE) == sal.SECOND_SOURCE
    assert reason(SOURCE, CONTROL, SOURCE) == sal.SECOND_SOURCE
    assert reason(KEY, KEY) == sal.SECOND_KEY
    assert reason(CONTROL, PROOF, KEY, PROOF) == sal.SECOND_KEY


def test_a_source_extension_has_2_to_20_addresses() -> None:
    for count in range(63):
        source = bytes((0x40, 4 + 4 * count, 0, 0)) + bytes(range(4)) * count
        assert reason(source) == (None if 2 <= count <= 20 else sal.SOURCE_ADDRESSES)


def test_more_than_ten_extensions_are_refused() -> None:
    assert reason(PAD * 8) is None
    assert reason(CONTROL, PAD * 8) is None
    assert reason(CONTROL, SERVICE, PAD * 8) is None
    assert reason(CONTROL, SERVICE, SOURCE, PAD * 8) == sal.TOO_MANY_EXTENSIONS
    assert reason(PAD * 12) == sal.TOO_MANY_EXTENSIONS


def test_every_reason_has_been_seen() -> None:
    """The examples above reach each reason that the parser lists."""
    damaged = bytearray(header(CONTROL))
    damaged[0] ^= 1
    seen = {
        reason_for(sal.parse, b""),
        reason(words=2),
        reason(b"\x70\x04\0\0"),
        reason(b"\x10\x10\0\0"),
        reason(b"\x10\x14\0\0"),
        reason(PAD * 12),
        reason(CONTROL, CONTROL),
        reason(SERVICE, SERVICE, SERVICE),
        reason(SOURCE, SOURCE),
        reason(KEY, KEY),
        reason(b"\x40\x04\0\0"),
        reason_for(sal.parse, bytes(damaged)),
    }
    assert seen == sal.REASONS


@pytest.mark.parametrize(
    ("packet", "said"),
    [
        (SalPacket(1, 2, 6, A_CONTROL._replace(nonce=b"short"), (), (), b""), "8 bytes, not 5"),
        (SalPacket(1, 2, 6, None, (A_SERVICE,) * 3, (), b""), "not 3"),
        (SalPacket(1, 2, 6, None, (), (1,), b""), "not 1"),
        (SalPacket(1, 2, 6, None, (), (), b"", b"key"), "32 bytes, not 3"),
        (SalPacket(1, 2, 6, None, (), (), b"", b"", b"proof"), "16 bytes, not 5"),
        (SalPacket(1, 2, 6, None, (), (1,) * 21, b""), "not 21"),
    ],
)
def test_what_no_header_can_say_is_not_written(packet: SalPacket, said: str) -> None:
    with pytest.raises(OurMistake, match=said):
        sal.emit(packet)
