"""How do the operator's rules get into the service table, and how are they replaced there?

Entries of others are left alone: broadcast rules, listeners, and what was added over the stack socket.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence

from serval_core.errors import OurMistake
from serval_core.rules import Rule, RuleType
from serval_core.service_table import ServiceTable
from translator.port_map import Misconfigured, ServiceRule


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
        entries = [Rule.drop(rule.prefix)]
    else:
        entries = [
            Rule.forward(rule.prefix, target.address, weight=target.weight) for target in rule.addresses
        ]
    if rule.priority is None:
        return entries
    return [dataclasses.replace(entry, priority=rule.priority) for entry in entries]
