"""Is our checksum the one of RFC 1071, and does updating it agree with computing it anew?"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serval_core.wire.checksum import (
    checksum_of_sum,
    internet_checksum,
    pseudo_header_sum,
    update_checksum,
)

from .strategies import addresses, words


def obvious_sum(data: bytes) -> int:
    """The one's complement sum, word by word, with the carry added after each."""
    total = 0
    for i in range(0, len(data), 2):
        total += int.from_bytes(data[i : i + 2].ljust(2, b"\0"), "big")
        total = (total & 0xFFFF) + (total >> 16)
    return total


def test_the_example_of_rfc_1071() -> None:
    assert internet_checksum(bytes.fromhex("0001f203f4f5f6f7")) == 0xFFFF - 0xDDF2


@pytest.mark.parametrize("data", [b"", b"\0", bytes(20)])
def test_nothing_but_zeros_sums_to_zero(data: bytes) -> None:
    assert internet_checksum(data) == 0xFFFF
    assert checksum_of_sum(0) == 0xFFFF


@given(st.binary(max_size=1600))
def test_it_is_the_complement_of_the_obvious_sum(data: bytes) -> None:
    assert internet_checksum(data) == 0xFFFF - obvious_sum(data)
    for other in (bytearray(data), memoryview(data)):
        assert internet_checksum(other) == internet_checksum(data)


@given(st.binary(max_size=80), st.binary(max_size=80).filter(lambda data: len(data) % 2 == 0))
def test_a_sum_may_be_given_in_front(data: bytes, front: bytes) -> None:
    assert internet_checksum(data, obvious_sum(front)) == internet_checksum(front + data)


@given(st.binary(min_size=20, max_size=60).filter(any))
def test_data_with_its_checksum_sums_to_zero(data: bytes) -> None:
    blank = data[:10] + b"\0\0" + data[12:]
    checksum = internet_checksum(blank)
    if any(blank):
        assert internet_checksum(blank[:10] + checksum.to_bytes(2, "big") + blank[12:]) == 0


@given(addresses, addresses, st.integers(0, 255), words)
def test_the_pseudo_header_is_summed(source: int, destination: int, protocol: int, length: int) -> None:
    pseudo_header = b"".join(
        (
            source.to_bytes(4, "big"),
            destination.to_bytes(4, "big"),
            protocol.to_bytes(2, "big"),
            length.to_bytes(2, "big"),
        )
    )
    if any(pseudo_header):
        assert pseudo_header_sum(source, destination, protocol, length) == obvious_sum(pseudo_header)


@given(
    st.binary(min_size=40, max_size=60),
    st.integers(0, 8),
    st.binary(min_size=8, max_size=8),
    st.sampled_from([2, 4, 8]),
)
def test_an_update_agrees_with_computing_anew(data: bytes, word: int, new: bytes, size: int) -> None:
    new = new[:size]
    start = 2 * word
    old = data[start : start + size]
    changed = data[:start] + new + data[start + size :]
    if not any(changed):
        return
    before = internet_checksum(data)
    assert update_checksum(before, old, new) == internet_checksum(changed)
    as_numbers = update_checksum(before, int.from_bytes(old, "big"), int.from_bytes(new, "big"))
    assert as_numbers == internet_checksum(changed)
