"""What does the service table refuse, and does it say why in one sentence?"""

from __future__ import annotations

import pytest

from serval_core.errors import OurMistake
from serval_core.names import DEFAULT_PREFIX, DEFAULT_SERVICE, ServicePrefix
from serval_core.rules import Rule, RuleType
from serval_core.service_table import ServiceTable
from tests.serval_core.tables import (
    BROADCAST_1,
    WEB,
    WEB_PREFIX,
    A,
    B,
    table_with,
)


@pytest.mark.parametrize(
    ("rule", "sentence"),
    [
        (
            Rule.forward(WEB_PREFIX, 0),
            "the FORWARD rule for 76568 has no address: give that of an instance or service router",
        ),
        (
            Rule(WEB_PREFIX, RuleType.DROP, address=A),
            "the DROP rule for 76568 has an address or interface, which only FORWARD rules have",
        ),
        (
            Rule(WEB_PREFIX, RuleType.DEMUX, interface_index=2, listener_id=1),
            "the DEMUX rule for 76568 has an address or interface, which only FORWARD rules have",
        ),
        (
            Rule.demux(WEB_PREFIX, 0),
            "the DEMUX rule for 76568 names no listener: DEMUX rules are made by listening",
        ),
        (
            Rule(WEB_PREFIX, RuleType.FORWARD, address=A, listener_id=1),
            "the FORWARD rule for 76568 names a listener, which only DEMUX rules do",
        ),
        (
            Rule(WEB_PREFIX, RuleType.DROP, broadcast=True),
            "the DROP rule for 76568 is a broadcast rule, which only FORWARD rules can be",
        ),
        (
            Rule.broadcast_on(BROADCAST_1, 2),
            "broadcast rules are set together, with replace_broadcast_rules",
        ),
        (
            Rule.demux(DEFAULT_PREFIX, 1),
            "nothing can listen on the default service: give the serviceID that is served",
        ),
        (
            Rule.forward(ServicePrefix(DEFAULT_SERVICE, 32), A),
            "a prefix of 32 zero bits cannot be used: the default rule has 0 bits",
        ),
        (
            Rule.forward(ServicePrefix(WEB, 8), A),
            "bits beyond the first 8 are set: make prefixes with ServicePrefix.of",
        ),
        (
            Rule.forward(WEB_PREFIX, A, weight=0),
            "the rule for 76568 has weight 0; only 1 to 4294967295 are possible: "
            "remove the rule to take an instance out",
        ),
        (
            Rule.forward(WEB_PREFIX, A, priority=-1),
            "the rule for 76568 has priority -1; only 0 to 4294967295 are possible",
        ),
        (
            Rule.forward(WEB_PREFIX, 1 << 32),
            "the rule for 76568 has address 4294967296, which has not 32 bits",
        ),
        (
            Rule.forward(WEB_PREFIX, A, interface_index=-1),
            "the rule for 76568 has a negative interface index or listener number",
        ),
    ],
)
def test_senseless_rules_are_refused(rule: Rule, sentence: str) -> None:
    table = ServiceTable()
    with pytest.raises(OurMistake) as caught:
        table.add(rule)
    assert str(caught.value) == sentence
    assert table.snapshot() == []


@pytest.mark.parametrize(
    ("first", "second", "sentence"),
    [
        (
            Rule.forward(WEB_PREFIX, A, priority=2, weight=3),
            Rule.forward(WEB_PREFIX, A),
            "76568 already has a FORWARD rule to 10.0.0.1 (priority 2, weight 3): "
            "remove it first to change it",
        ),
        (
            Rule.demux(WEB_PREFIX, 1),
            Rule.demux(WEB_PREFIX, 2, priority=1),
            "76568 is already being listened on (listener 1)",
        ),
        (
            Rule.forward(WEB_PREFIX, A),
            Rule.drop(WEB_PREFIX, priority=1),
            "76568 already has a FORWARD rule to 10.0.0.1 at priority 1, and a DROP rule shares its "
            "priority with no other: give another priority or remove that one",
        ),
        (
            Rule.drop(WEB_PREFIX),
            Rule.demux(WEB_PREFIX, 2),
            "76568 already has a DROP rule at priority 32000, and a DROP rule shares its priority "
            "with no other: give another priority or remove that one",
        ),
        (
            Rule.drop(WEB_PREFIX),
            Rule.drop(WEB_PREFIX),
            "76568 already has a DROP rule at priority 32000, and a DROP rule shares its priority "
            "with no other: give another priority or remove that one",
        ),
    ],
)
def test_contradictions_are_refused(first: Rule, second: Rule, sentence: str) -> None:
    table = table_with(first)
    before = table.snapshot()
    with pytest.raises(OurMistake) as caught:
        table.add(second)
    assert str(caught.value) == sentence
    assert table.snapshot() == before


def test_removing_what_is_not_there_says_what_is() -> None:
    table = table_with(Rule.forward(WEB_PREFIX, A), Rule.demux(WEB_PREFIX, 4))
    with pytest.raises(OurMistake) as caught:
        table.remove(WEB_PREFIX, RuleType.FORWARD, B)
    assert str(caught.value) == (
        "76568 has no FORWARD rule to 10.0.0.2; it has: DEMUX rule of listener 4, FORWARD rule to 10.0.0.1"
    )
    with pytest.raises(OurMistake) as caught:
        table.remove(WEB_PREFIX, RuleType.DROP)
    there = "DEMUX rule of listener 4, FORWARD rule to 10.0.0.1"
    assert str(caught.value) == f"76568 has no DROP rule; it has: {there}"
    with pytest.raises(OurMistake) as caught:
        table.remove(ServicePrefix.of(WEB, 24), RuleType.FORWARD, A)
    assert str(caught.value) == "there is no rule for exactly 0x00012b:24"
