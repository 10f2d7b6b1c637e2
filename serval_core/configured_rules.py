"""What do the operator's rules say, and how do they get into the service table and are replaced there?

Entries of others are left alone: broadcast rules, listeners, and what was added over the stack socket.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple

from msgspec import Meta, Struct

from serval_core.config_file import ConfigFile, Misconfigured, Names, service_prefix
from serval_core.errors import OurMistake
from serval_core.names import ServicePrefix, format_address, parse_address
from serval_core.rules import NUMBER_MAX, Rule, RuleType
from serval_core.service_table import ServiceTable

WEIGHT_MAX = 1 << 20


class RuleEntry(Struct, forbid_unknown_fields=True):
    """One `[[rule]]` of a configuration file."""

    service: str | int
    type: Literal["forward", "drop", "delay"] = "forward"
    targets: list[str] = []
    priority: Annotated[int, Meta(ge=1, le=NUMBER_MAX)] | None = None


class WeightedAddress(NamedTuple):
    """One FORWARD target of the service table: an IPv4 address (host order) and its weight."""

    address: int
    weight: int


class ServiceRule(NamedTuple):
    """Entries for the service table: FORWARD to `addresses`, or DROP or DELAY with none.

    `priority` None stands for the default of the type.
    """

    prefix: ServicePrefix
    rule_type: RuleType
    addresses: tuple[WeightedAddress, ...]
    priority: int | None
    service_text: str
    origin: str


def rule_text(rule: ServiceRule) -> str:
    """A rule as an operator writes it."""
    if rule.rule_type is not RuleType.FORWARD:
        return f"{rule.service_text}={rule.rule_type.name.lower()}"
    targets = [
        format_address(target.address) + (f"@{target.weight}" if target.weight != 1 else "")
        for target in rule.addresses
    ]
    return f"{rule.service_text}={','.join(targets)}"


def read_rules(file: ConfigFile, entries: Sequence[RuleEntry], names: Names) -> tuple[ServiceRule, ...]:
    """The rules of a configuration file. Raises Misconfigured."""
    return tuple(_read_rule(file, index, entry, names) for index, entry in enumerate(entries))


def _read_rule(file: ConfigFile, index: int, entry: RuleEntry, names: Names) -> ServiceRule:
    place, targets = file.place("rule", index, "service"), file.place("rule", index, "targets")
    prefix = service_prefix(str(entry.service), names, place)
    rule_type = RuleType[entry.type.upper()]
    if rule_type is not RuleType.FORWARD:
        if entry.targets:
            raise Misconfigured(targets, f'a rule of type "{entry.type}" has no targets; leave them out')
        return ServiceRule(prefix, rule_type, (), entry.priority, str(entry.service), place)
    addresses = weighted_addresses(entry.targets, targets)
    return ServiceRule(prefix, rule_type, addresses, entry.priority, str(entry.service), place)


def parse_rule(text: str, names: Names, origin: str) -> ServiceRule:
    """`ID[:BITS]=IP[@WEIGHT][,IP…]`. Raises Misconfigured."""
    service, targets = split_assignment(text, origin, "ID=IP[@WEIGHT][,IP...]")
    addresses = weighted_addresses(targets.split(","), origin)
    return ServiceRule(
        service_prefix(service, names, origin), RuleType.FORWARD, addresses, None, service, origin
    )


def weighted_addresses(texts: Sequence[str], origin: str) -> tuple[WeightedAddress, ...]:
    """FORWARD targets from `IP[@WEIGHT]` texts; none or a repeated one is refused."""
    if not texts:
        raise Misconfigured(origin, "give at least one target, for example 10.0.0.2 or 10.0.0.2@3")
    parsed: dict[int, WeightedAddress] = {}
    for text in texts:
        target = parse_weighted_address(text.strip(), origin)
        if target.address in parsed:
            raise Misconfigured(
                origin,
                f"the address {text.strip().partition('@')[0]} is given twice; give it once with one weight",
            )
        parsed[target.address] = target
    return tuple(parsed.values())


def split_assignment(text: str, origin: str, forms: str) -> tuple[str, str]:
    """The two sides of the first equals sign, neither empty."""
    left, equals, right = text.partition("=")
    left, right = left.strip(), right.strip()
    if not equals or not left or not right:
        raise Misconfigured(origin, f"is not of the form {forms}")
    return left, right


def parse_weighted_address(text: str, origin: str) -> WeightedAddress:
    """`IP[@WEIGHT]`: an IPv4 address (Serval runs over IPv4 only, SPEC 1.1) and a weight of at least 1."""
    address_text, at, weight_text = text.partition("@")
    try:
        address = parse_address(address_text)
    except OurMistake:
        raise Misconfigured(
            origin,
            f'"{address_text}" is no IPv4 address of a host that serves; write four numbers such as 10.0.0.2',
        ) from None
    if not at:
        return WeightedAddress(address, 1)
    if not (weight_text.isascii() and weight_text.isdigit()):
        raise Misconfigured(origin, f'the weight "{weight_text}" is no number (1 to {WEIGHT_MAX})')
    weight = int(weight_text)
    if not 1 <= weight <= WEIGHT_MAX:
        nearest = 1 if weight < 1 else WEIGHT_MAX
        raise Misconfigured(
            origin, f"the weight {weight_text} is out of range 1 to {WEIGHT_MAX} (nearest: {nearest})"
        )
    return WeightedAddress(address, weight)


def refuse_repeated_rules(rules: Sequence[ServiceRule]) -> None:
    """Raise Misconfigured if two rules want one target of one prefix."""
    ruled: dict[tuple[ServicePrefix, int | None], ServiceRule] = {}
    for rule in rules:
        keys: list[int | None] = [target.address for target in rule.addresses] or [None]
        for address in keys:
            if (earlier := ruled.setdefault((rule.prefix, address), rule)) is not rule:
                what = rule.rule_type.name if address is None else format_address(address)
                sentence = (
                    f"the service {rule.service_text} already has the target {what} from {earlier.origin}"
                )
                raise Misconfigured(rule.origin, f"{sentence}; give it once")


def replace_rules(
    table: ServiceTable,
    running: Sequence[ServiceRule],
    wanted: Sequence[ServiceRule],
    undo: contextlib.ExitStack,
) -> None:
    """Turn the entries of `running` into those of `wanted`; what stays keeps its counters.

    Raises Misconfigured when the table refuses one. Closing `undo` puts back what was there.
    """
    before = dict.fromkeys(entry for rule in running for entry in table_rules(rule))
    after = {entry: rule.origin for rule in wanted for entry in table_rules(rule)}
    for entry in before:
        if entry not in after:
            try:
                table.remove(entry.prefix, entry.type, entry.address)
            except OurMistake:
                continue  # an operator has already taken it out of the running table
            undo.callback(table.add, entry)
    for entry, origin in after.items():
        if entry not in before:
            try:
                table.add(entry)
            except OurMistake as mistake:
                raise Misconfigured(origin, str(mistake)) from None
            undo.callback(table.remove, entry.prefix, entry.type, entry.address)


def table_rules(rule: ServiceRule) -> list[Rule]:
    """The entries of the service table that a rule of the operator stands for."""
    if rule.rule_type is RuleType.DROP:
        entries = [Rule.drop(rule.prefix, origin="configured")]
    elif rule.rule_type is RuleType.DELAY:
        entries = [Rule.delay(rule.prefix, origin="configured")]
    else:
        entries = [
            Rule.forward(rule.prefix, target.address, weight=target.weight, origin="configured")
            for target in rule.addresses
        ]
    if rule.priority is None:
        return entries
    return [dataclasses.replace(entry, priority=rule.priority) for entry in entries]
