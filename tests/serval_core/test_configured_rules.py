"""Are the operator's rules replaced entirely or not at all, and those of others left alone?"""

from __future__ import annotations

import contextlib

import pytest

from serval_core.config_file import Misconfigured
from serval_core.configured_rules import ServiceRule, parse_rule, replace_rules
from serval_core.names import DEFAULT_PREFIX, parse_address, parse_service
from serval_core.rules import Rule, RuleType
from serval_core.service_table import ServiceTable

WEB, FILES = "76568", "76569"


def rules(*texts: str) -> list[ServiceRule]:
    return [parse_rule(text, {}, f"--service {text}") for text in texts]


def targets(table: ServiceTable) -> set[tuple[object, ...]]:
    """(prefix, address, weight, how often chosen) of everything in the table."""
    found: set[tuple[object, ...]] = set()
    for entry in table.snapshot():
        listed = entry["targets"]
        assert isinstance(listed, list)
        found |= {
            (entry["prefix"], each["address"], each["weight"], each["packets_resolved"]) for each in listed
        }
    return found


@pytest.fixture
def table() -> ServiceTable:
    """With two rules of the operator, the first of which was used once, and two of others."""
    table = ServiceTable()
    table.replace_broadcast_rules([Rule.broadcast_on(parse_address("10.0.0.255"), 1)])
    table.add(Rule.forward(parse_service(FILES), parse_address("10.0.0.77")))
    replace_rules(table, (), rules(f"{WEB}=10.0.0.2", f"{FILES}=10.0.0.3"), contextlib.ExitStack())
    table.resolve(parse_service(WEB).service_id, lambda: 0.0)
    return table


OTHERS = {(str(DEFAULT_PREFIX), "10.0.0.255", 1, 0), (FILES, "10.0.0.77", 1, 0)}
RUNNING = (f"{WEB}=10.0.0.2", f"{FILES}=10.0.0.3")


def test_what_stays_keeps_its_counters(table: ServiceTable) -> None:
    replace_rules(
        table,
        rules(*RUNNING),
        rules(f"{FILES}=10.0.0.3@5", f"{WEB}=10.0.0.2,10.0.0.4"),
        contextlib.ExitStack(),
    )
    assert targets(table) == OTHERS | {
        (WEB, "10.0.0.2", 1, 1),
        (WEB, "10.0.0.4", 1, 0),
        (FILES, "10.0.0.3", 5, 0),
    }


def test_a_refusal_can_be_undone(table: ServiceTable) -> None:
    before = targets(table)
    wanted = rules("7=10.0.0.9", f"{FILES}=10.0.0.3@5", f"{WEB}=10.0.0.2", f"{FILES}=10.0.0.77")
    refusal = r"^--service 76569=10.0.0.77: 76569 already has a FORWARD rule"
    with pytest.raises(Misconfigured, match=refusal), contextlib.ExitStack() as undo:
        replace_rules(table, rules(*RUNNING), wanted, undo)
    assert targets(table) == before


def test_what_an_operator_has_taken_out_meanwhile_is_no_obstacle(table: ServiceTable) -> None:
    table.remove(parse_service(FILES), RuleType.FORWARD, parse_address("10.0.0.3"))
    replace_rules(table, rules(*RUNNING), rules(f"{WEB}=10.0.0.2"), contextlib.ExitStack())
    assert targets(table) == OTHERS | {(WEB, "10.0.0.2", 1, 1)}
