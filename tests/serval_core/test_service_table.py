"""The service table: which rule decides, what may stand beside what, what is counted, what errors say."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serval_core.errors import OurMistake
from serval_core.names import DEFAULT_PREFIX, DEFAULT_SERVICE, ServiceID, ServicePrefix, parse_address
from serval_core.rules import Rule, RuleType
from serval_core.service_table import Resolution, ServiceTable

WEB = ServiceID.from_number(76568)
WEB_PREFIX = ServicePrefix.of(WEB)
WEB_BEGIN = ServicePrefix.of(WEB, 16)
A, B, C = (parse_address(f"10.0.0.{number}") for number in (1, 2, 3))
BROADCAST_1, BROADCAST_2 = parse_address("10.0.0.255"), parse_address("10.1.0.255")

low: Callable[[], float] = lambda: 0.0  # noqa: E731


def addresses(resolution: Resolution) -> list[int]:
    return [target.address for target in resolution.targets]


def table_with(*rules: Rule) -> ServiceTable:
    table = ServiceTable()
    for rule in rules:
        table.add(rule)
    return table


def number(value: object) -> int:
    assert isinstance(value, int)
    return value


# Longest prefix match


def test_without_rules_there_is_no_entry() -> None:
    table = ServiceTable()
    assert table.resolve(WEB, low) == Resolution(None, ())
    assert table.resolve_local(WEB) is None
    assert table.counters["dropped_no_entry"] == 2


def test_the_longest_prefix_decides() -> None:
    table = table_with(
        Rule.forward(DEFAULT_PREFIX, A, priority=99),
        Rule.forward(ServicePrefix.of(WEB, 16), B),
        Rule.forward(WEB_PREFIX, C),
    )
    assert addresses(table.resolve(WEB, low)) == [C]
    assert addresses(table.resolve(ServiceID(WEB[:2] + bytes(30)), low)) == [B]
    assert addresses(table.resolve(ServiceID(b"\xff" * 32), low)) == [A]
    table.remove(WEB_PREFIX, RuleType.FORWARD, C)
    assert addresses(table.resolve(WEB, low)) == [B]
    table.remove(ServicePrefix.of(WEB, 16), RuleType.FORWARD, B)
    assert addresses(table.resolve(WEB, low)) == [A]


def test_an_exhausted_longest_match_does_not_fall_back_to_a_shorter_prefix() -> None:
    table = table_with(Rule.forward(DEFAULT_PREFIX, A), Rule.forward(WEB_PREFIX, B))
    assert table.resolve(WEB, low, exclude={B}) == Resolution(RuleType.FORWARD, ())


nested = st.builds(
    ServicePrefix.of,
    st.integers(1, 15).map(lambda top: ServiceID(bytes([top << 4 | 1]) * 32)),
    st.sampled_from([4, 6, 8, 12, 256]),
)


@given(st.dictionaries(nested, st.sampled_from(["FORWARD", "DEMUX", "BOTH"]), max_size=20))
def test_local_lookup_sees_only_prefixes_with_a_listener(kinds: dict[ServicePrefix, str]) -> None:
    table = ServiceTable()
    listener_of: dict[ServicePrefix, int] = {}
    for prefix, kind in kinds.items():
        if kind in ("FORWARD", "BOTH"):
            table.add(Rule.forward(prefix, A))
        if kind in ("DEMUX", "BOTH"):
            listener_of[prefix] = len(listener_of) + 1
            table.add(Rule.demux(prefix, listener_of[prefix]))
    for top in range(16):
        service_id = ServiceID(bytes([top << 4 | 1]) * 32)
        listening = [prefix for prefix in listener_of if prefix.covers(service_id)]
        everything = [prefix for prefix in kinds if prefix.covers(service_id)]
        target = table.resolve_local(service_id)
        resolution = table.resolve(service_id, low)
        if listening:
            assert target is not None
            assert target.listener_id == listener_of[max(listening, key=lambda prefix: prefix.bits)]
        else:
            assert target is None
        if not everything:
            assert resolution.rule_type is None
        elif kinds[max(everything, key=lambda prefix: prefix.bits)] == "FORWARD":
            assert resolution.rule_type is RuleType.FORWARD
        else:
            assert resolution.rule_type is RuleType.DEMUX


# Priorities, exclusion, broadcast


def test_only_the_set_of_highest_priority_is_used() -> None:
    table = table_with(
        Rule.forward(WEB_PREFIX, A, priority=5),
        Rule.forward(WEB_PREFIX, B, priority=9),
        Rule.forward(WEB_PREFIX, C, priority=1, weight=1_000_000),
    )
    source = random.Random(1)
    assert {addresses(table.resolve(WEB, source.random))[0] for _ in range(200)} == {B}


def test_excluded_targets_make_room_for_lower_priorities() -> None:
    table = table_with(
        Rule.forward(WEB_PREFIX, A, priority=5),
        Rule.forward(WEB_PREFIX, B, priority=9),
        Rule.forward(WEB_PREFIX, C, priority=1),
    )
    assert addresses(table.resolve(WEB, low, exclude=[B])) == [A]
    assert addresses(table.resolve(WEB, low, exclude=[B, A])) == [C]
    assert table.resolve(WEB, low, exclude=[B, A, C]) == Resolution(RuleType.FORWARD, ())
    assert addresses(table.resolve(WEB, low, exclude=[A, C])) == [B]


def test_a_listener_here_comes_before_instances_elsewhere() -> None:
    table = table_with(Rule.forward(WEB_PREFIX, A), Rule.demux(WEB_PREFIX, 7))
    resolution = table.resolve(WEB, low)
    assert resolution.rule_type is RuleType.DEMUX
    assert resolution.targets[0].listener_id == 7
    table.remove_listener(7)
    assert addresses(table.resolve(WEB, low)) == [A]


def test_drop_beats_what_has_lower_priority_and_ends_what_has_higher() -> None:
    table = table_with(
        Rule.forward(WEB_PREFIX, A, priority=3),
        Rule.drop(WEB_PREFIX, priority=2),
        Rule.forward(WEB_PREFIX, B, priority=1),
    )
    assert addresses(table.resolve(WEB, low)) == [A]
    assert table.resolve(WEB, low, exclude={A}) == Resolution(RuleType.DROP, ())
    table.remove(WEB_PREFIX, RuleType.DROP)
    assert addresses(table.resolve(WEB, low, exclude={A})) == [B]


def test_a_drop_rule_keeps_the_default_rule_from_answering() -> None:
    table = table_with(Rule.drop(WEB_PREFIX), Rule.forward(DEFAULT_PREFIX, A))
    assert table.resolve(WEB, low) == Resolution(RuleType.DROP, ())
    assert table.counters["dropped_by_rule"] == 1


def test_broadcast_uses_one_copy_per_interface() -> None:
    table = ServiceTable()
    table.replace_broadcast_rules([Rule.broadcast_on(BROADCAST_1, 2), Rule.broadcast_on(BROADCAST_2, 3)])
    resolution = table.resolve(WEB, low)
    assert resolution.rule_type is RuleType.FORWARD
    assert [(each.address, each.interface_index) for each in resolution.targets] == [
        (BROADCAST_1, 2),
        (BROADCAST_2, 3),
    ]


def test_two_interfaces_may_share_a_broadcast_address() -> None:
    table = ServiceTable()
    table.replace_broadcast_rules([Rule.broadcast_on(BROADCAST_1, 2), Rule.broadcast_on(BROADCAST_1, 3)])
    assert [each.interface_index for each in table.resolve(WEB, low).targets] == [2, 3]
    table.replace_broadcast_rules([Rule.broadcast_on(BROADCAST_1, 3)])
    assert [each.interface_index for each in table.resolve(WEB, low).targets] == [3]


def test_a_configured_default_rule_is_asked_before_everybody() -> None:
    table = ServiceTable()
    table.replace_broadcast_rules([Rule.broadcast_on(BROADCAST_1, 2)])
    table.add(Rule.forward(DEFAULT_PREFIX, A))
    source = random.Random(2)
    assert {addresses(table.resolve(WEB, source.random))[0] for _ in range(50)} == {A}
    assert addresses(table.resolve(WEB, low, exclude={A})) == [BROADCAST_1]


def test_new_broadcast_rules_leave_configured_rules_alone() -> None:
    table = ServiceTable()
    table.replace_broadcast_rules([Rule.broadcast_on(BROADCAST_1, 2)])
    table.add(Rule.forward(DEFAULT_PREFIX, A))
    table.add(Rule.forward(DEFAULT_PREFIX, BROADCAST_1, priority=0))
    table.add(Rule.forward(WEB_PREFIX, B))
    table.replace_broadcast_rules([])
    assert addresses(table.resolve(DEFAULT_SERVICE, low)) == [A]
    assert addresses(table.resolve(DEFAULT_SERVICE, low, exclude={A})) == [BROADCAST_1]
    assert addresses(table.resolve(WEB, low)) == [B]


def test_removing_a_configured_rule_leaves_a_broadcast_rule_to_the_same_address() -> None:
    table = ServiceTable()
    table.replace_broadcast_rules([Rule.broadcast_on(BROADCAST_1, 2)])
    with pytest.raises(OurMistake, match=r"it has: broadcast rule to 10\.0\.0\.255"):
        table.remove(DEFAULT_PREFIX, RuleType.FORWARD, BROADCAST_1)
    table.add(Rule.forward(DEFAULT_PREFIX, BROADCAST_1))
    table.remove(DEFAULT_PREFIX, RuleType.FORWARD, BROADCAST_1)
    assert table.resolve(WEB, low).targets[0].broadcast


def test_broadcast_rules_that_stay_keep_their_counters() -> None:
    table = ServiceTable()
    table.replace_broadcast_rules([Rule.broadcast_on(BROADCAST_1, 2)])
    table.resolve(WEB, low)
    table.replace_broadcast_rules([Rule.broadcast_on(BROADCAST_1, 2), Rule.broadcast_on(BROADCAST_2, 3)])
    assert [each.packets_resolved for each in table.resolve(WEB, low).targets] == [2, 1]


def test_a_wrong_broadcast_rule_changes_nothing() -> None:
    table = ServiceTable()
    table.replace_broadcast_rules([Rule.broadcast_on(BROADCAST_1, 2)])
    with pytest.raises(OurMistake, match="among the broadcast rules is none"):
        table.replace_broadcast_rules([Rule.broadcast_on(BROADCAST_2, 3), Rule.forward(WEB_PREFIX, A)])
    with pytest.raises(OurMistake, match="has no address"):
        table.replace_broadcast_rules([Rule.broadcast_on(BROADCAST_2, 3), Rule.broadcast_on(0, 4)])
    assert addresses(table.resolve(WEB, low)) == [BROADCAST_1]


# Listeners


def test_a_listener_may_serve_several_prefixes_and_leaves_them_together() -> None:
    other = ServicePrefix.of(ServiceID.from_number(5), 32)
    table = table_with(Rule.demux(WEB_PREFIX, 1), Rule.demux(other, 1), Rule.demux(WEB_BEGIN, 2))
    table.remove_listener(1)
    target = table.resolve_local(WEB)
    assert target is not None
    assert target.listener_id == 2
    table.remove_listener(2)
    assert table.resolve_local(WEB) is None
    assert table.snapshot() == []
    table.remove_listener(2)


def test_remove_takes_a_listener_off_one_prefix() -> None:
    table = table_with(Rule.demux(WEB_PREFIX, 1), Rule.demux(WEB_BEGIN, 1))
    table.remove(WEB_PREFIX, RuleType.DEMUX)
    target = table.resolve_local(WEB)
    assert target is not None
    table.remove_listener(1)
    assert table.resolve_local(WEB) is None


# What is counted


def test_packets_and_bytes_are_counted_per_target_per_entry_and_in_total() -> None:
    table = table_with(Rule.forward(WEB_PREFIX, A), Rule.forward(WEB_PREFIX, B, priority=0))
    for _ in range(3):
        table.resolve(WEB, low, packet_bytes=116)
    table.resolve(WEB, low, exclude={A}, packet_bytes=50)
    table.resolve(WEB, low, exclude={A, B}, packet_bytes=1000)
    (entry,) = table.snapshot()
    assert (entry["packets_resolved"], entry["bytes_resolved"], entry["packets_dropped"]) == (4, 398, 0)
    targets = entry["targets"]
    assert isinstance(targets, list)
    assert [(each["packets_resolved"], each["bytes_resolved"]) for each in targets] == [(3, 348), (1, 50)]
    assert table.counters == {
        "packets_resolved": 4,
        "bytes_resolved": 398,
        "dropped_no_entry": 0,
        "dropped_by_rule": 0,
        "delayed": 0,
        "all_excluded": 1,
    }


def test_what_a_drop_rule_refused_is_counted_there() -> None:
    table = table_with(Rule.drop(WEB_PREFIX))
    table.resolve(WEB, low)
    table.resolve(WEB, low)
    (entry,) = table.snapshot()
    targets = entry["targets"]
    assert isinstance(targets, list)
    assert (entry["packets_dropped"], targets[0]["packets_dropped"], entry["packets_resolved"]) == (2, 2, 0)


def test_local_resolutions_are_counted() -> None:
    table = table_with(Rule.demux(WEB_PREFIX, 1))
    table.resolve_local(WEB, packet_bytes=10)
    (entry,) = table.snapshot()
    assert (entry["packets_resolved"], entry["bytes_resolved"]) == (1, 10)


@given(st.lists(st.tuples(st.sampled_from([A, B, C]), st.integers(0, 2)), max_size=60), st.integers())
def test_no_resolution_escapes_the_books(questions: list[tuple[int, int]], seed: int) -> None:
    table = table_with(
        Rule.forward(WEB_PREFIX, A, weight=2),
        Rule.forward(WEB_PREFIX, B),
        Rule.forward(WEB_PREFIX, C, priority=0),
    )
    source = random.Random(seed)
    for address, times in questions:
        for _ in range(times):
            table.resolve(WEB, source.random, exclude={address})
    (entry,) = table.snapshot()
    targets = entry["targets"]
    assert isinstance(targets, list)
    asked = sum(times for _, times in questions)
    assert sum(each["packets_resolved"] for each in targets) == number(entry["packets_resolved"]) == asked


def test_snapshot_is_plain_and_readable() -> None:
    table = table_with(Rule.demux(WEB_PREFIX, 3), Rule.forward(ServicePrefix.of(WEB, 24), A, weight=5))
    table.replace_broadcast_rules([Rule.broadcast_on(BROADCAST_1, 2)])
    rows = json.loads(json.dumps(table.snapshot()))
    assert [row["prefix"] for row in rows] == ["76568", "0x00012b:24", "default"]
    assert rows[0]["service_id"] == WEB.hex_text
    assert rows[0]["targets"][0] == {
        "type": "DEMUX",
        "priority": 32000,
        "weight": 1024,
        "address": None,
        "interface_index": None,
        "listener_id": 3,
        "broadcast": False,
        "origin": "bound",
        "idle_timeout_s": None,
        "hard_timeout_s": None,
        "down": None,
        "packets_resolved": 0,
        "bytes_resolved": 0,
        "packets_dropped": 0,
    }
    assert rows[1]["targets"][0]["address"] == "10.0.0.1"
    assert rows[2]["targets"][0]["broadcast"] is True


# What is refused, and how it is said


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


# Adding and removing in any order


changes = st.tuples(st.booleans(), nested, st.sampled_from([A, B, C]), st.integers(0, 3), st.integers(1, 5))


@given(st.lists(changes, max_size=60))
def test_the_table_equals_a_list_of_rules(steps: list[tuple[bool, ServicePrefix, int, int, int]]) -> None:
    table = ServiceTable()
    rules: list[Rule] = []
    for adding, prefix, address, priority, weight in steps:
        there = [rule for rule in rules if rule.prefix == prefix and rule.address == address]
        if adding:
            rule = Rule.forward(prefix, address, priority=priority, weight=weight)
            if there:
                with pytest.raises(OurMistake):
                    table.add(rule)
            else:
                table.add(rule)
                rules.append(rule)
        elif there:
            table.remove(prefix, RuleType.FORWARD, address)
            rules.remove(there[0])
        else:
            with pytest.raises(OurMistake):
                table.remove(prefix, RuleType.FORWARD, address)
    for top in range(16):
        service_id = ServiceID(bytes([top << 4 | 1]) * 32)
        covering = [rule for rule in rules if rule.prefix.covers(service_id)]
        longest = max((rule.prefix.bits for rule in covering), default=0)
        matching = [rule for rule in covering if rule.prefix.bits == longest]
        highest = max((rule.priority for rule in matching), default=0)
        possible = {rule.address for rule in matching if rule.priority == highest}
        for at in (0.0, 0.25, 0.5, 0.75, 0.999):
            resolution = table.resolve(service_id, partial(float, at))
            if possible:
                assert resolution.targets[0].address in possible
            else:
                assert resolution == Resolution(None, ())
