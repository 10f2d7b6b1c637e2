"""What may a rule of the service table say?

A rule tells what happens to packets for the serviceIDs that its prefix covers (SPEC 6.1). This file describes
one rule and says when it makes no sense; how rules of one prefix compete is the business of `selection` and
`service_table`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Literal, TypedDict, Unpack, get_args

from serval_core.errors import OurMistake
from serval_core.names import DEFAULT_PREFIX, ServicePrefix

FORWARD_PRIORITY = 1
FORWARD_WEIGHT = 1
DEMUX_PRIORITY = 32000
DEMUX_WEIGHT = 1024
NUMBER_MAX = 0xFFFFFFFF
TIMEOUT_MAX_S = 10.0 * 365 * 86400

Origin = Literal["configured", "manual", "registered", "resolved", "default", "bound"]
"""Who made a rule: the configuration, an operator at run time, a registration, a resolver's answer, the stack
itself (broadcast and router default rules), or a program that listens.
"""
ORIGINS: tuple[Origin, ...] = get_args(Origin)


class RuleType(Enum):
    """What happens to a packet. The numbers are those of the prototype's control messages (SPEC 6.1)."""

    FORWARD = 1
    DEMUX = 2
    DELAY = 3
    DROP = 4


class _OriginAndEnd(TypedDict, total=False):
    """What may be said of every rule that somebody adds, under the names that it has in `Rule`."""

    origin: Origin
    idle_timeout_s: float
    hard_timeout_s: float


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule. FORWARD has an address and perhaps an interface (0: routing decides), DEMUX has a listener.

    Larger `priority` wins; within one priority a target is drawn in proportion to `weight`. `address` is a
    32-bit number in host order. Instead of drawing one, all `broadcast` rules of a prefix are used together,
    one packet copy each: the default rule is made of one per interface, and its address is that interface's
    broadcast address (SPEC 6.6).

    A rule goes by itself `hard_timeout_s` after it was added, or when no packet was resolved by it for
    `idle_timeout_s`; 0 means never.
    """

    prefix: ServicePrefix
    type: RuleType
    priority: int = FORWARD_PRIORITY
    weight: int = FORWARD_WEIGHT
    address: int = 0
    interface_index: int = 0
    listener_id: int = 0
    broadcast: bool = False
    origin: Origin = "manual"
    idle_timeout_s: float = 0.0
    hard_timeout_s: float = 0.0

    @classmethod
    def forward(
        cls,
        prefix: ServicePrefix,
        address: int,
        *,
        interface_index: int = 0,
        priority: int = FORWARD_PRIORITY,
        weight: int = FORWARD_WEIGHT,
        **more: Unpack[_OriginAndEnd],
    ) -> Rule:
        """Send to the instance (or service router) at `address`."""
        return cls(prefix, RuleType.FORWARD, priority, weight, address, interface_index, **more)

    @classmethod
    def broadcast_on(cls, address: int, interface_index: int) -> Rule:
        """The default rule's part for one interface with this broadcast address: ask everybody there."""
        return cls(
            DEFAULT_PREFIX,
            RuleType.FORWARD,
            address=address,
            interface_index=interface_index,
            broadcast=True,
            origin="default",
        )

    @classmethod
    def demux(
        cls,
        prefix: ServicePrefix,
        listener_id: int,
        *,
        priority: int = DEMUX_PRIORITY,
        weight: int = DEMUX_WEIGHT,
    ) -> Rule:
        """Deliver to listener `listener_id` of this stack. Listener numbers start at 1."""
        return cls(prefix, RuleType.DEMUX, priority, weight, listener_id=listener_id, origin="bound")

    @classmethod
    def drop(
        cls, prefix: ServicePrefix, *, priority: int = DEMUX_PRIORITY, **more: Unpack[_OriginAndEnd]
    ) -> Rule:
        """Refuse connections to the service, whatever rules of lower priority say."""
        return cls(prefix, RuleType.DROP, priority, **more)

    @classmethod
    def delay(
        cls, prefix: ServicePrefix, *, priority: int = FORWARD_PRIORITY, **more: Unpack[_OriginAndEnd]
    ) -> Rule:
        """Park packets for the service until somebody has said where it is, or the delay queue loses patience."""
        return cls(prefix, RuleType.DELAY, priority, **more)


def check_rule(rule: Rule) -> None:
    """Raise OurMistake with one sentence if the rule makes no sense by itself."""
    _check_prefix(rule)
    _check_numbers(rule)
    name = f"{rule.type.name} rule for {rule.prefix}"
    if rule.type is RuleType.FORWARD and not rule.address:
        raise OurMistake(f"the {name} has no address: give that of an instance or service router")
    if rule.type is not RuleType.FORWARD and (rule.address or rule.interface_index):
        raise OurMistake(f"the {name} has an address or interface, which only FORWARD rules have")
    if rule.type is RuleType.DEMUX and not rule.listener_id:
        raise OurMistake(f"the {name} names no listener: DEMUX rules are made by listening")
    if rule.type is not RuleType.DEMUX and rule.listener_id:
        raise OurMistake(f"the {name} names a listener, which only DEMUX rules do")
    if rule.broadcast and rule.type is not RuleType.FORWARD:
        raise OurMistake(f"the {name} is a broadcast rule, which only FORWARD rules can be")
    if rule.origin not in ORIGINS:
        raise OurMistake(f'the {name} has the origin "{rule.origin}", which is none of {", ".join(ORIGINS)}')
    _check_timeouts(rule, name)


def _check_timeouts(rule: Rule, name: str) -> None:
    for field, timeout_s in (
        ("idle_timeout_s", rule.idle_timeout_s),
        ("hard_timeout_s", rule.hard_timeout_s),
    ):
        if not 0 <= timeout_s <= TIMEOUT_MAX_S:  # which a NaN is not
            raise OurMistake(
                f"the {name} has {field} {timeout_s:g}; only 0 (never) to {TIMEOUT_MAX_S:.0f} are possible"
            )
    if (rule.idle_timeout_s or rule.hard_timeout_s) and (rule.broadcast or rule.type is RuleType.DEMUX):
        raise OurMistake(f"the {name} has a timeout, but it belongs to an interface or listener, which ends it")


def _check_prefix(rule: Rule) -> None:
    prefix = rule.prefix
    if prefix != ServicePrefix.of(prefix.service_id, prefix.bits):
        raise OurMistake(f"bits beyond the first {prefix.bits} are set: make prefixes with ServicePrefix.of")
    if any(prefix.service_id):
        return
    if prefix.bits:
        raise OurMistake(f"a prefix of {prefix.bits} zero bits cannot be used: the default rule has 0 bits")
    if rule.type is RuleType.DEMUX:
        raise OurMistake("nothing can listen on the default service: give the serviceID that is served")


def _check_numbers(rule: Rule) -> None:
    if not 0 <= rule.priority <= NUMBER_MAX:
        raise OurMistake(
            f"the rule for {rule.prefix} has priority {rule.priority}; only 0 to {NUMBER_MAX} are possible"
        )
    if not 1 <= rule.weight <= NUMBER_MAX:
        raise OurMistake(
            f"the rule for {rule.prefix} has weight {rule.weight}; only 1 to {NUMBER_MAX} are possible: "
            "remove the rule to take an instance out"
        )
    if not 0 <= rule.address <= 0xFFFFFFFF:
        raise OurMistake(f"the rule for {rule.prefix} has address {rule.address}, which has not 32 bits")
    if rule.interface_index < 0 or rule.listener_id < 0:
        raise OurMistake(f"the rule for {rule.prefix} has a negative interface index or listener number")
