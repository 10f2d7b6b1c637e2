"""What do the prototype's control messages say, and how are they written? (SPEC 7.2, 7.4, OBSERVED 1)

A message starts with a common header; what follows depends on its type. `Registration` is the one that
crosses the network, as the payload of a Serval datagram. `ServiceChange` and `Migration` pass between the
prototype's stack and its tools on one host; they are here so that its tools can be read and answered.
Integers are in the byte order of the host that wrote them, taken to be little endian; only the length of a
message that crosses the network is big endian. Addresses and serviceIDs are in network order.
"""

from __future__ import annotations

from enum import IntEnum
from struct import Struct
from typing import NamedTuple

from serval_core.errors import TheirMistake
from serval_core.names import DEFAULT_PREFIX, SERVICE_ID_BITS, ServiceID, ServicePrefix

TRUNCATED = "control_truncated"
LENGTH = "control_length"
UNKNOWN_TYPE = "control_unknown_type"

REASONS = frozenset(
    {
        TRUNCATED,  # shorter than its header, or than the length it states
        LENGTH,  # states a length that its type cannot have
        UNKNOWN_TYPE,
    }
)
"""Every reason that the parsers give with TheirMistake."""


class MessageType(IntEnum):
    """The types that are read and written here."""

    REGISTER = 0
    UNREGISTER = 1
    ADD_SERVICE = 3
    DEL_SERVICE = 4
    MOD_SERVICE = 5
    MIGRATE = 9


_REGISTRATIONS = frozenset({MessageType.REGISTER, MessageType.UNREGISTER})
_CHANGES = frozenset({MessageType.ADD_SERVICE, MessageType.DEL_SERVICE, MessageType.MOD_SERVICE})

_LOCAL_HEADER = Struct("<BBHI")
_REGISTRATION = Struct("<BB2sIBxBB")
_SERVICE_INFO = Struct("<HBBIIIII")
_REGISTRATION_BYTES = 48
_REGISTRATION_LENGTH = _REGISTRATION_BYTES.to_bytes(2, "big")
_REFRESH_FLAG = 1
_CHANGE_BYTES = 12
_SERVICE_INFO_BYTES = 60
_MIGRATION_BYTES = 57


class Registration(NamedTuple):
    """REGISTER or UNREGISTER: a host tells a service router whether it serves `prefix`, at its IP source.

    `refresh` marks a repetition, whose `old_address` is the one registered before (0: none). `return_code` is
    0 in requests.
    """

    kind: MessageType
    transaction_id: int
    prefix: ServicePrefix
    refresh: bool = False
    old_address: int = 0
    service_flags: int = 0
    return_code: int = 0


class ServiceInfo(NamedTuple):
    """A rule as the prototype's tools describe it. `interface_index` 0xFFFFFFFF: let the stack route."""

    rule_type: int
    prefix: ServicePrefix
    address: int
    interface_index: int = 0xFFFFFFFF
    priority: int = 1
    weight: int = 0
    service_flags: int = 0
    idle_timeout_s: int = 0
    hard_timeout_s: int = 0


class ServiceChange(NamedTuple):
    """ADD_SERVICE, DEL_SERVICE or MOD_SERVICE: change rules; the last one lists pairs of old and new."""

    kind: MessageType
    transaction_id: int
    services: tuple[ServiceInfo, ...]
    inner_transaction_id: int = 0
    return_code: int = 0


class Migration(NamedTuple):
    """MIGRATE: move the flows of `subject` to `to_interface`.

    `subject` is a field of 32 bytes that holds, by `kind`, an interface name (0), a flow ID (1) or a
    serviceID (2).
    """

    transaction_id: int
    kind: int
    subject: bytes
    to_interface: str
    return_code: int = 0


def parse_registration(data: bytes) -> Registration:
    """Read the payload of a registration datagram. Raises TheirMistake."""
    if len(data) < _REGISTRATION_BYTES:
        raise TheirMistake(TRUNCATED)
    kind, return_code, length, transaction_id, flags, bits, service_flags = _REGISTRATION.unpack_from(data)
    if kind not in _REGISTRATIONS:
        raise TheirMistake(UNKNOWN_TYPE)
    if length != _REGISTRATION_LENGTH:
        raise TheirMistake(LENGTH)
    return Registration(
        MessageType(kind),
        transaction_id,
        _prefix(data[16:48], bits),
        bool(flags & _REFRESH_FLAG),
        int.from_bytes(data[12:16], "big"),
        service_flags,
        return_code,
    )


def emit_registration(message: Registration) -> bytes:
    """Write the payload of a registration datagram."""
    head = _REGISTRATION.pack(
        message.kind,
        message.return_code,
        _REGISTRATION_LENGTH,
        message.transaction_id,
        _REFRESH_FLAG if message.refresh else 0,
        _prefix_byte(message.prefix),
        message.service_flags,
    )
    return head + message.old_address.to_bytes(4, "big") + message.prefix.service_id


def parse_service_change(data: bytes) -> ServiceChange:
    """Read an ADD_SERVICE, DEL_SERVICE or MOD_SERVICE message of a local tool. Raises TheirMistake."""
    kind, return_code, transaction_id = _parse_local_header(data)
    if kind not in _CHANGES:
        raise TheirMistake(UNKNOWN_TYPE)
    body = data[_CHANGE_BYTES:]
    if len(data) < _CHANGE_BYTES or len(body) % _SERVICE_INFO_BYTES:
        raise TheirMistake(LENGTH)
    starts = range(0, len(body), _SERVICE_INFO_BYTES)
    services = tuple(_parse_service_info(body[i : i + _SERVICE_INFO_BYTES]) for i in starts)
    inner_transaction_id = int.from_bytes(data[8:12], "little")
    return ServiceChange(MessageType(kind), transaction_id, services, inner_transaction_id, return_code)


def emit_service_change(message: ServiceChange) -> bytes:
    """Write an ADD_SERVICE, DEL_SERVICE or MOD_SERVICE message."""
    length = _CHANGE_BYTES + len(message.services) * _SERVICE_INFO_BYTES
    head = _LOCAL_HEADER.pack(message.kind, message.return_code, length, message.transaction_id)
    body = b"".join(_emit_service_info(service) for service in message.services)
    return head + message.inner_transaction_id.to_bytes(4, "little") + body


def parse_migration(data: bytes) -> Migration:
    """Read a MIGRATE message of a local tool. Raises TheirMistake."""
    kind, return_code, transaction_id = _parse_local_header(data)
    if kind != MessageType.MIGRATE:
        raise TheirMistake(UNKNOWN_TYPE)
    if len(data) != _MIGRATION_BYTES:
        raise TheirMistake(LENGTH)
    to_interface = data[41:].partition(b"\0")[0].decode("utf-8", "surrogateescape")
    return Migration(transaction_id, data[8], data[9:41], to_interface, return_code)


def emit_migration(message: Migration) -> bytes:
    """Write a MIGRATE message. The subject is filled up with zeros to 32 bytes, the interface name to 16."""
    head = _LOCAL_HEADER.pack(
        MessageType.MIGRATE, message.return_code, _MIGRATION_BYTES, message.transaction_id
    )
    name = message.to_interface.encode("utf-8", "surrogateescape")
    return head + bytes((message.kind,)) + message.subject.ljust(32, b"\0") + name.ljust(16, b"\0")


def _parse_local_header(data: bytes) -> tuple[int, int, int]:
    if len(data) < _LOCAL_HEADER.size:
        raise TheirMistake(TRUNCATED)
    kind, return_code, length, transaction_id = _LOCAL_HEADER.unpack_from(data)
    if length != len(data):
        raise TheirMistake(TRUNCATED if length > len(data) else LENGTH)
    return kind, return_code, transaction_id


def _parse_service_info(data: bytes) -> ServiceInfo:
    rule_type, bits, flags, interface, priority, weight, idle_s, hard_s = _SERVICE_INFO.unpack_from(data)
    address = int.from_bytes(data[24:28], "big")
    prefix = _prefix(data[28:], bits)
    return ServiceInfo(rule_type, prefix, address, interface, priority, weight, flags, idle_s, hard_s)


def _emit_service_info(service: ServiceInfo) -> bytes:
    head = _SERVICE_INFO.pack(
        service.rule_type,
        _prefix_byte(service.prefix),
        service.service_flags,
        service.interface_index,
        service.priority,
        service.weight,
        service.idle_timeout_s,
        service.hard_timeout_s,
    )
    return head + service.address.to_bytes(4, "big") + service.prefix.service_id


def _prefix(service_id: bytes, bits: int) -> ServicePrefix:
    """The prefix byte 0 means all 256 bits, and none at all with the all-zero serviceID (SPEC 1.2.2)."""
    if not any(service_id):
        return DEFAULT_PREFIX
    return ServicePrefix.of(ServiceID(service_id), bits or SERVICE_ID_BITS)


def _prefix_byte(prefix: ServicePrefix) -> int:
    return prefix.bits & 0xFF
