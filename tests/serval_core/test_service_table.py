"""Which rule of the service table decides?"""

from __future__ import annotations

import random
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serval_core.errors import OurMistake
from serval_core.names import DEFAULT_PREFIX, DEFAULT_SERVICE, ServiceID, ServicePrefix
from serval_core.rules import Rule, RuleType
from serval_core.service_table import Resolution, ServiceTable
from tests.serval_core.tables import (
    BROADCAST_1,
    BROADCAST_2,
    WEB,
    WEB_BEGIN,
    WEB_PREFIX,
    A,
    B,
    C,
    addresses,
    low,
    table_with,
)

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
