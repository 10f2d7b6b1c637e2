"""Who may register which serviceIDs? The operator's answer, per prefix.

Says nothing about whether a signature is right (`authentication`) or how much is too much (`flood_limits`).
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from ipaddress import IPv4Address, IPv4Network
from typing import NamedTuple

from serval_core.identity import certifies
from serval_core.names import DEFAULT_PREFIX, SERVICE_ID_BITS, ServicePrefix

FOREIGN_PREFIX = "foreign_prefix"
FOREIGN_NETWORK = "foreign_network"
TOO_BROAD = "prefix_too_broad"
NOT_SIGNED = "not_signed"
UNKNOWN_KEY = "unknown_key"
NOT_SELF_CERTIFYING = "not_self_certifying"


class Requirement(Enum):
    """What a registration must bring along."""

    OPEN = "open"
    SIGNED = "signed"
    SELF_CERTIFYING = "self-certifying"
    NOBODY = "nobody"


class PrefixPolicy(NamedTuple):
    """What is asked of registrations within `prefix`. Empty `keys`: any key. Empty `networks`: from anywhere."""

    prefix: ServicePrefix
    requirement: Requirement
    keys: frozenset[bytes] = frozenset()
    networks: tuple[IPv4Network, ...] = ()

    def refusal(self, prefix: ServicePrefix, source: int, public_key: bytes | None) -> str | None:
        """Why a registration of `prefix` from `source` is refused, None if it is not."""
        if self.requirement is Requirement.NOBODY:
            return FOREIGN_PREFIX
        if self.networks and not any(IPv4Address(source) in network for network in self.networks):
            return FOREIGN_NETWORK
        if public_key is not None and self.keys and public_key not in self.keys:
            return UNKNOWN_KEY
        if self.requirement is Requirement.OPEN:
            return None
        if public_key is None:
            return NOT_SIGNED
        if self.requirement is Requirement.SELF_CERTIFYING and not (
            prefix.bits == SERVICE_ID_BITS and certifies(public_key, prefix.service_id)
        ):
            return NOT_SELF_CERTIFYING
        return None


class RegistrationPolicy:
    """All of the operator's answers. The longest prefix that covers a registration decides about it.

    A registration that itself covers prefixes with policies of their own must satisfy these too: otherwise a
    broad one would catch what they protect.
    """

    def __init__(
        self, entries: Sequence[PrefixPolicy], default: Requirement, shortest_prefix_bits: int
    ) -> None:
        self._entries = sorted(entries, key=lambda entry: -entry.prefix.bits)
        self._default = PrefixPolicy(DEFAULT_PREFIX, default)
        self._shortest_prefix_bits = shortest_prefix_bits

    def refusal(self, prefix: ServicePrefix, source: int, public_key: bytes | None) -> str | None:
        """Why a registration is refused, None if it is not. `public_key`: of its signer, None if unsigned."""
        deciding = None
        for entry in self._entries:
            if entry.prefix.bits > prefix.bits:
                if prefix.covers(entry.prefix.service_id) and (
                    reason := entry.refusal(prefix, source, public_key)
                ):
                    return reason
            elif entry.prefix.covers(prefix.service_id):
                deciding = entry
                break
        if deciding is None:
            deciding = self._default
            if prefix.bits < self._shortest_prefix_bits:
                return TOO_BROAD
        return deciding.refusal(prefix, source, public_key)
