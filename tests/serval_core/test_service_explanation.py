"""What `explain` says is what `resolve` does, and it says why."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serval_core.names import DEFAULT_PREFIX, ServiceID, ServicePrefix, format_address, parse_address
from serval_core.rules import Rule, RuleType
from serval_core.service_table import ServiceTable

WEB = ServiceID.from_number(76568)
PREFIX = ServicePrefix.of(WEB)
A, B, C = (parse_address(f"10.0.0.{number}") for number in (1, 2, 3))


def table_with(*rules: Rule) -> ServiceTable:
    table = ServiceTable()
    for rule in rules:
        table.add(rule)
    return table


def test_it_shows_the_lookup_the_sets_and_the_draw() -> None:
    table = table_with(
        Rule.forward(DEFAULT_PREFIX, A),
        Rule.drop(ServicePrefix.of(WEB, 16)),
        Rule.forward(PREFIX, A, priority=5, weight=1),
        Rule.forward(PREFIX, B, priority=5, weight=3),
        Rule.forward(PREFIX, C, priority=2, origin="registered"),
    )
    said = json.loads(json.dumps(table.explain(WEB, 10.0)))
    assert said["lookup"] == [
        {"prefix": "76568", "bits": 256, "decides": True},
        {"prefix": "0x0001:16", "bits": 16, "decides": False},
        {"prefix": "default", "bits": 0, "decides": False},
    ]
    assert [(each["priority"], each["used"]) for each in said["sets"]] == [(5, True), (2, False)]
    assert [(each["address"], each["probability"]) for each in said["sets"][0]["targets"]] == [
        ("10.0.0.1", 0.25),
        ("10.0.0.2", 0.75),
    ]
    assert said["sets"][1]["targets"][0]["probability"] == 0
    assert said["sets"][1]["targets"][0]["origin"] == "registered"
    assert (said["verdict"], said["targets"]) == ("FORWARD", ["10.0.0.1", "10.0.0.2"])
    assert said["why"] == "76568 is the longest prefix that covers it; one of 2 targets is drawn by weight"
    assert table.counters["packets_resolved"] == 0


def test_it_says_who_is_down_and_for_how_long() -> None:
    table = table_with(Rule.forward(PREFIX, A), Rule.forward(PREFIX, B), Rule.forward(PREFIX, C))
    table.mark_down(B, 15.0, PREFIX, "refused")
    said = json.loads(json.dumps(table.explain(WEB, 10.0)))
    marked = said["sets"][0]["targets"][1]
    assert (marked["down"], marked["down_for_s"], marked["probability"]) == ("refused", 5.0, 0.0)
    assert said["why"].endswith("one of 2 targets is drawn by weight (1 passed over, being down)")


@pytest.mark.parametrize(
    ("rules", "down", "verdict", "targets", "why"),
    [
        ((), (), None, [], "no rule covers the service, and there is no default rule"),
        (
            (Rule.drop(PREFIX),),
            (),
            "DROP",
            ["DROP"],
            "76568 is the longest prefix that covers it, and its DROP rule refuses the service",
        ),
        (
            (Rule.delay(PREFIX),),
            (),
            "DELAY",
            ["DELAY"],
            "76568 is the longest prefix that covers it, and its DELAY rule makes packets wait for a resolver",
        ),
        (
            (Rule.demux(PREFIX, 4), Rule.forward(PREFIX, A)),
            (),
            "DEMUX",
            ["listener 4"],
            "76568 is the longest prefix that covers it, with DEMUX rule of listener 4 at priority 32000",
        ),
        (
            (Rule.forward(PREFIX, A, priority=3), Rule.forward(PREFIX, B, priority=2)),
            (A,),
            "FORWARD",
            ["10.0.0.2"],
            "76568 is the longest prefix that covers it; no target of higher priority than 2 is alive",
        ),
        (
            (Rule.forward(PREFIX, A), Rule.forward(PREFIX, B)),
            (A, B),
            "FORWARD",
            ["10.0.0.1", "10.0.0.2"],
            "76568 is the longest prefix that covers it; all its targets are down, so they are used all the same",
        ),
    ],
)
def test_it_says_why(
    rules: tuple[Rule, ...], down: tuple[int, ...], verdict: str | None, targets: list[str], why: str
) -> None:
    table = table_with(*rules)
    for address in down:
        table.mark_down(address, 5.0)
    said = table.explain(WEB)
    assert (said["verdict"], said["targets"], said["why"]) == (verdict, targets, why)


def test_broadcast_asks_everybody_at_once() -> None:
    table = ServiceTable()
    table.replace_broadcast_rules([Rule.broadcast_on(A, 2), Rule.broadcast_on(B, 3)])
    said = table.explain(WEB)
    assert said["targets"] == ["10.0.0.1", "10.0.0.2"]
    assert str(said["why"]).endswith("everybody on 2 network(s) is asked at once")


settled = st.tuples(
    st.sampled_from([A, B, C, 0]), st.integers(1, 3), st.integers(1, 4), st.booleans()
)


@given(st.lists(settled, max_size=5, unique_by=lambda each: each[0]), st.booleans(), st.integers())
def test_what_it_says_is_what_resolve_does(
    rules: list[tuple[int, int, int, bool]], dropping: bool, seed: int
) -> None:
    table = ServiceTable()
    if dropping:
        table.add(Rule.drop(PREFIX, priority=10 if seed % 2 else 0))
    for address, priority, weight, marked in rules:
        if address:
            table.add(Rule.forward(PREFIX, address, priority=priority, weight=weight))
            if marked:
                table.mark_down(address, 5.0)
        else:
            table.add(Rule.delay(PREFIX, priority=priority + 20 if marked else 30))
    said = table.explain(WEB)
    source = random.Random(seed)
    drawn: Counter[str] = Counter()
    for _ in range(40):
        resolution = table.resolve(WEB, source.random)
        assert (resolution.rule_type.name if resolution.rule_type else None) == said["verdict"]
        drawn.update(format_address(target.address) for target in resolution.targets)
    targets = said["targets"]
    assert isinstance(targets, list)
    if said["verdict"] == RuleType.FORWARD.name:
        assert set(drawn) <= set(targets)
        assert len(targets) > 1 or set(drawn) == set(targets)
