"""Are our additions to the control plane written as they are read, and malformed ones refused with the reason?"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serval_core.wire import registration_offer, router_discovery
from serval_core.wire.registration_offer import Offer, Proof
from serval_core.wire.router_discovery import Announcement

from .mistakes import reason_for

words32 = st.integers(0, 0xFFFFFFFF)
offers = st.builds(Offer, words32, words32, words32)
proofs = st.builds(
    Proof,
    words32,
    st.integers(0, 2**64 - 1),
    words32,
    st.binary(min_size=32, max_size=32),
    st.binary(min_size=64, max_size=64),
)
nonces = st.binary(min_size=8, max_size=8)
announcements = st.tuples(nonces, words32, words32).map(lambda fields: Announcement(*fields)) | st.builds(
    Announcement,
    nonces,
    words32,
    words32,
    st.binary(min_size=32, max_size=32),
    st.binary(min_size=64, max_size=64),
)
MESSAGE = bytes(48)
OFFER = Offer(1, 2, 50)
PROOF = Proof(0x0A000001, 1, 2, b"k" * 32, b"s" * 64)


@given(offers, st.none() | proofs)
def test_an_offer_is_read_as_it_was_written(offer: Offer, proof: Proof | None) -> None:
    payload = MESSAGE + registration_offer.emit_extension(offer, proof)
    assert registration_offer.parse_extension(payload) == (offer, proof)


@given(announcements)
def test_an_announcement_is_read_as_it_was_written(announcement: Announcement) -> None:
    data = router_discovery.emit_announcement(announcement)
    assert router_discovery.parse_announcement(data) == announcement


@given(nonces)
def test_a_solicitation_is_read_as_it_was_written(nonce: bytes) -> None:
    assert router_discovery.parse_solicitation(router_discovery.emit_solicitation(nonce)) == nonce


def test_layouts_are_as_documented() -> None:
    """Other implementations rely on these bytes."""
    signed = registration_offer.emit_extension(OFFER, PROOF)
    assert signed.hex() == (
        "5376526f 01 01 0084 00000001 00000002 00000032".replace(" ", "")
        + "0a000001 0000000000000001 00000002".replace(" ", "")
        + (b"k" * 32).hex()
        + (b"s" * 64).hex()
    )
    assert registration_offer.emit_extension(OFFER).hex() == "5376526f01000014000000010000000200000032"
    assert router_discovery.emit_solicitation(b"12345678").hex() == "5376526401010010" + b"12345678".hex()
    plain = router_discovery.emit_announcement(Announcement(b"12345678", 60, 0x0A0000FE))
    assert plain.hex() == "5376526401020018" + b"12345678".hex() + "0000003c0a0000fe"


def test_a_message_of_the_prototype_offers_nothing() -> None:
    assert registration_offer.parse_extension(MESSAGE) == (None, None)


@pytest.mark.parametrize(
    ("parse", "good", "reasons"),
    [
        (
            lambda data: registration_offer.parse_extension(MESSAGE + data),
            registration_offer.emit_extension(OFFER, PROOF),
            registration_offer.REASONS,
        ),
        (
            lambda data: registration_offer.parse_extension(MESSAGE + data),
            registration_offer.emit_extension(OFFER),
            registration_offer.REASONS,
        ),
        (
            router_discovery.parse_solicitation,
            router_discovery.emit_solicitation(bytes(8)),
            router_discovery.REASONS,
        ),
        (
            router_discovery.parse_announcement,
            router_discovery.emit_announcement(Announcement(bytes(8), 1, 2)),
            router_discovery.REASONS,
        ),
        (
            router_discovery.parse_announcement,
            router_discovery.emit_announcement(Announcement(bytes(8), 1, 2, b"k" * 32, b"s" * 64)),
            router_discovery.REASONS,
        ),
    ],
)
def test_malformed_messages_are_refused_with_a_documented_reason(
    parse: Callable[[bytes], object], good: bytes, reasons: frozenset[str]
) -> None:
    parse(good)
    for length in range(1, len(good)):
        assert reason_for(parse, good[:length]) in reasons
    assert reason_for(parse, good + b"x") in reasons
    for at in range(8):  # magic, version, kind or parts, length
        assert reason_for(parse, good[:at] + bytes([good[at] ^ 0x40]) + good[at + 1 :]) in reasons


def test_the_discovery_messages_are_not_taken_for_each_other() -> None:
    solicitation = router_discovery.emit_solicitation(bytes(8))
    announcement = router_discovery.emit_announcement(Announcement(bytes(8), 1, 2))
    unknown = router_discovery.UNKNOWN_MESSAGE
    assert reason_for(router_discovery.parse_announcement, solicitation) == unknown
    assert reason_for(router_discovery.parse_solicitation, announcement) == unknown
