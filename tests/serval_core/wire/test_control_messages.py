"""Are control messages written as they are read, and malformed ones refused with the right reason?"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serval_core.names import DEFAULT_PREFIX, ServiceID, ServicePrefix
from serval_core.wire import control_messages
from serval_core.wire.control_messages import (
    MessageType,
    Migration,
    Registration,
    ServiceChange,
    ServiceInfo,
)

from .mistakes import reason_for
from .strategies import octets, service_ids, words, words32

prefixes = st.just(DEFAULT_PREFIX) | st.builds(ServicePrefix.of, service_ids, st.integers(1, 256)).filter(
    lambda prefix: any(prefix.service_id)
)
registrations = st.builds(
    Registration,
    kind=st.sampled_from([MessageType.REGISTER, MessageType.UNREGISTER]),
    transaction_id=words32,
    prefix=prefixes,
    refresh=st.booleans(),
    old_address=words32,
    service_flags=octets,
    return_code=octets,
)
services = st.builds(
    ServiceInfo,
    rule_type=words,
    prefix=prefixes,
    address=words32,
    interface_index=words32,
    priority=words32,
    weight=words32,
    service_flags=octets,
    idle_timeout_s=words32,
    hard_timeout_s=words32,
)
changes = st.builds(
    ServiceChange,
    kind=st.sampled_from([MessageType.ADD_SERVICE, MessageType.DEL_SERVICE, MessageType.MOD_SERVICE]),
    transaction_id=words32,
    services=st.lists(services, max_size=3).map(tuple),
    inner_transaction_id=words32,
    return_code=octets,
)
migrations = st.builds(
    Migration,
    transaction_id=words32,
    kind=octets,
    subject=st.binary(min_size=32, max_size=32),
    to_interface=st.from_regex(r"[a-z0-9.]{1,15}", fullmatch=True),
    return_code=octets,
)

REGISTER = control_messages.emit_registration(Registration(MessageType.REGISTER, 1, DEFAULT_PREFIX))
CHANGE = control_messages.emit_service_change(
    ServiceChange(MessageType.ADD_SERVICE, 1, (ServiceInfo(1, DEFAULT_PREFIX, 7),))
)
MIGRATE = control_messages.emit_migration(Migration(1, 0, b"eth0", "eth1"))
PARSERS = (
    control_messages.parse_registration,
    control_messages.parse_service_change,
    control_messages.parse_migration,
)


@given(registrations)
def test_a_registration_is_read_as_it_was_written(message: Registration) -> None:
    data = control_messages.emit_registration(message)
    assert len(data) == 48
    assert control_messages.parse_registration(data) == message


@given(changes)
def test_a_service_change_is_read_as_it_was_written(message: ServiceChange) -> None:
    data = control_messages.emit_service_change(message)
    assert len(data) == 12 + 60 * len(message.services)
    assert control_messages.parse_service_change(data) == message


@given(migrations)
def test_a_migration_is_read_as_it_was_written(message: Migration) -> None:
    data = control_messages.emit_migration(message)
    assert len(data) == 57
    assert control_messages.parse_migration(data) == message


@given(st.binary(max_size=80))
def test_random_bytes_are_refused_with_a_listed_reason(data: bytes) -> None:
    for parse in PARSERS:
        assert reason_for(parse, data) in {None, *control_messages.REASONS}


@pytest.mark.parametrize("parse", PARSERS)
def test_what_is_short_is_truncated(parse: object) -> None:
    whole = {PARSERS[0]: REGISTER, PARSERS[1]: CHANGE, PARSERS[2]: MIGRATE}[parse]
    for size in range(len(whole)):
        assert reason_for(parse, whole[:size]) == control_messages.TRUNCATED


def test_a_wrong_length_is_refused() -> None:
    # The length that crosses the network is big endian; a local one is little endian.
    little_endian = REGISTER[:2] + b"\x30\x00" + REGISTER[4:]
    assert reason_for(control_messages.parse_registration, little_endian) == control_messages.LENGTH
    assert reason_for(control_messages.parse_migration, MIGRATE + b"\0") == control_messages.LENGTH
    longer = MIGRATE[:2] + b"\x3a\x00" + MIGRATE[4:] + b"\0"
    assert reason_for(control_messages.parse_migration, longer) == control_messages.LENGTH
    half_a_service = CHANGE[:2] + b"\x2a\x00" + CHANGE[4:42]
    assert reason_for(control_messages.parse_service_change, half_a_service) == control_messages.LENGTH
    bare = CHANGE[:2] + b"\x08\x00" + CHANGE[4:8]
    assert reason_for(control_messages.parse_service_change, bare) == control_messages.LENGTH


def test_another_type_is_refused() -> None:
    for parse, data in zip(PARSERS, (REGISTER, CHANGE, MIGRATE), strict=True):
        assert reason_for(parse, b"\x0e" + data[1:]) == control_messages.UNKNOWN_TYPE
        assert reason_for(parse, data) is None


def test_prefix_bits_0_mean_all_of_them_except_for_the_default() -> None:
    service_id = ServiceID.from_number(76568)
    message = Registration(MessageType.REGISTER, 1, ServicePrefix.of(service_id))
    data = control_messages.emit_registration(message)
    assert data[10] == 0
    assert control_messages.parse_registration(data).prefix == ServicePrefix(service_id, 256)
    assert control_messages.parse_registration(REGISTER).prefix == DEFAULT_PREFIX
    with_bits = REGISTER[:10] + b"\x20" + REGISTER[11:]
    assert control_messages.parse_registration(with_bits).prefix == DEFAULT_PREFIX
