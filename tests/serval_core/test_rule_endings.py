"""What ends by itself in the service table, and what takes whose place: timeouts, marks, modified rules."""

from __future__ import annotations

import math
import random

import pytest

from serval_core.errors import OurMistake
from serval_core.names import DEFAULT_PREFIX, ServiceID, ServicePrefix, parse_address
from serval_core.rules import Rule, RuleType
from serval_core.service_table import Resolution, ServiceTable

WEB = ServiceID.from_number(76568)
PREFIX = ServicePrefix.of(WEB)
OTHER_PREFIX = ServicePrefix.of(WEB, 16)
A, B, C = (parse_address(f"10.0.0.{number}") for number in (1, 2, 3))
SOURCE = random.Random(3)


class Watched(ServiceTable):
    """A table and what its observers were told."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, Rule]] = []
        self.on_change(lambda kind, rule: self.seen.append((kind, rule)))

    def news(self) -> list[tuple[str, int]]:
        """Kinds and addresses since the last call."""
        news = [(kind, rule.address) for kind, rule in self.seen]
        self.seen.clear()
        return news


def drawn(table: ServiceTable, times: int = 60, exclude: tuple[int, ...] = ()) -> set[int]:
    """The addresses that come up."""
    found = set()
    for _ in range(times):
        found |= {target.address for target in table.resolve(WEB, SOURCE.random, exclude).targets}
    return found


# Timeouts


def test_a_rule_goes_when_its_hard_timeout_is_over() -> None:
    table = Watched()
    table.add(Rule.forward(PREFIX, A, hard_timeout_s=10.0), 100.0)
    table.add(Rule.forward(PREFIX, B))
    assert table.next_expiry() == 110.0
    for now in (105.0, 109.9):
        drawn(table)
        table.expire(now)
    assert drawn(table) == {A, B}
    table.news()
    table.expire(110.0)
    assert drawn(table) == {B}
    assert table.news() == [("rule_expired", A)]
    assert table.next_expiry() is None


def test_an_idle_rule_goes_and_a_used_one_stays() -> None:
    table = ServiceTable()
    table.add(Rule.forward(PREFIX, A, idle_timeout_s=4.0), 0.0)
    now = 0.0
    while now < 40.0:
        now = table.next_expiry() or math.inf
        table.resolve(WEB, SOURCE.random)
        table.expire(now)
    last_used = now
    while (due := table.next_expiry()) is not None:
        now = due
        table.expire(now)
    assert 4.0 <= now - last_used <= 5.0
    assert table.resolve(WEB, SOURCE.random) == Resolution(None, ())


def test_packets_that_a_fast_path_counts_keep_an_idle_rule() -> None:
    table = ServiceTable()
    table.add(Rule.forward(PREFIX, A, idle_timeout_s=4.0), 0.0)
    for second in range(1, 20):
        assert table.count_forwarded(PREFIX, A, 7, 700)
        table.expire(float(second))
    assert len(table) == 1
    assert table.counters["packets_resolved"] == 7 * 19
    assert not table.count_forwarded(PREFIX, B, 1, 1)
    assert not table.count_forwarded(OTHER_PREFIX, A, 1, 1)


@pytest.mark.parametrize("rule", [Rule.drop(PREFIX, idle_timeout_s=2.0), Rule.delay(PREFIX, hard_timeout_s=2.0)])
def test_drop_and_delay_rules_end_as_well(rule: Rule) -> None:
    table = ServiceTable()
    table.add(rule, 0.0)
    table.expire(2.0)
    assert len(table) == 0


def test_what_was_removed_in_time_does_not_end_twice() -> None:
    table = Watched()
    table.add(Rule.forward(PREFIX, A, hard_timeout_s=10.0), 0.0)
    table.remove(PREFIX, RuleType.FORWARD, A)
    table.add(Rule.forward(PREFIX, A), 0.0)
    table.news()
    table.expire(100.0)
    assert table.news() == []
    assert drawn(table) == {A}


def test_a_rule_with_a_timeout_needs_to_know_the_time() -> None:
    table = ServiceTable()
    with pytest.raises(OurMistake, match="say from when it counts"):
        table.add(Rule.forward(PREFIX, A, hard_timeout_s=10.0))
    assert len(table) == 0


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (Rule.forward(PREFIX, A, idle_timeout_s=-1.0), "has idle_timeout_s -1; only 0 "),
        (Rule.forward(PREFIX, A, hard_timeout_s=math.nan), "has hard_timeout_s nan; only 0 "),
        (Rule.forward(PREFIX, A, hard_timeout_s=1e12), r"has hard_timeout_s 1e\+12; only 0 \(never\) to 315360000"),
        (Rule(PREFIX, RuleType.DEMUX, listener_id=1, hard_timeout_s=1.0), "belongs to an interface or listener"),
        (Rule(PREFIX, RuleType.FORWARD, address=A, origin="god"), 'has the origin "god"'),  # type: ignore[arg-type]
    ],
)
def test_senseless_timeouts_and_origins_are_refused(rule: Rule, words: str) -> None:
    with pytest.raises(OurMistake, match=words):
        ServiceTable().add(rule, 0.0)


# Marks


def test_a_marked_target_is_passed_over_until_the_mark_ends() -> None:
    table = Watched()
    for address in (A, B):
        table.add(Rule.forward(PREFIX, address))
    table.news()
    assert table.mark_down(A, 12.0, PREFIX, "silent") == 1
    assert drawn(table) == {B}
    table.expire(11.9)
    assert drawn(table) == {B}
    table.expire(12.0)
    assert drawn(table) == {A, B}
    assert table.news() == [("target_down", A), ("target_up", A)]


def test_a_second_mark_prolongs_the_first_and_is_no_news() -> None:
    table = Watched()
    table.add(Rule.forward(PREFIX, A))
    table.add(Rule.forward(PREFIX, B))
    table.mark_down(A, 5.0, PREFIX)
    table.news()
    table.mark_down(A, 9.0, PREFIX)
    assert table.news() == []
    table.expire(6.0)
    assert drawn(table) == {B}
    assert table.mark_up(A, PREFIX) == 1
    assert table.mark_up(A, PREFIX) == 0
    assert table.news() == [("target_up", A)]
    assert drawn(table) == {A, B}
    assert table.next_expiry() is None


def test_lower_priorities_serve_while_a_higher_one_is_down_and_all_count_when_all_are() -> None:
    table = ServiceTable()
    table.add(Rule.forward(PREFIX, A, priority=9))
    table.add(Rule.forward(PREFIX, B, priority=5))
    table.mark_down(A, 5.0)
    assert drawn(table) == {B}
    assert drawn(table, exclude=(B,)) == {A}
    table.mark_down(B, 5.0)
    assert drawn(table) == {A}
    assert drawn(table, exclude=(A,)) == {B}
    assert drawn(table, exclude=(A, B)) == set()


def test_a_drop_rule_below_targets_that_are_down_does_not_refuse_the_service() -> None:
    table = ServiceTable()
    table.add(Rule.forward(PREFIX, A, priority=9))
    table.add(Rule.drop(PREFIX, priority=5))
    table.mark_down(A, 5.0)
    assert drawn(table) == {A}
    assert table.resolve(WEB, SOURCE.random, exclude=(A,)).rule_type is RuleType.DROP


def test_a_delay_rule_below_targets_that_are_down_asks_for_others() -> None:
    table = ServiceTable()
    table.add(Rule.forward(PREFIX, A, priority=9))
    table.add(Rule.delay(PREFIX, priority=5))
    assert drawn(table) == {A}
    table.mark_down(A, 5.0)
    assert table.resolve(WEB, SOURCE.random) == Resolution(RuleType.DELAY, ())
    assert table.counters["delayed"] == 1


def test_a_mark_concerns_one_prefix_or_all() -> None:
    table = Watched()
    for prefix in (PREFIX, OTHER_PREFIX, DEFAULT_PREFIX):
        table.add(Rule.forward(prefix, A))
    assert table.mark_down(A, 5.0, OTHER_PREFIX) == 1
    assert table.mark_down(B, 5.0) == 0
    assert table.mark_down(A, 5.0, ServicePrefix.of(WEB, 20)) == 0
    table.news()
    assert table.mark_down(A, 5.0) == 3
    assert table.news() == [("target_down", A)] * 2
    assert table.mark_up(A) == 3


def test_broadcast_targets_and_listeners_are_never_down() -> None:
    table = ServiceTable()
    table.replace_broadcast_rules([Rule.broadcast_on(B, 2)])
    table.add(Rule.demux(PREFIX, 1))
    assert table.mark_down(B, 5.0) == table.mark_down(0, 5.0) == 0
    with pytest.raises(OurMistake, match="has no FORWARD rule"):
        table.remove(PREFIX, RuleType.FORWARD, 0)


def test_a_mark_goes_with_its_target() -> None:
    table = ServiceTable()
    table.add(Rule.forward(PREFIX, A))
    table.add(Rule.forward(PREFIX, B))
    table.mark_down(A, 5.0)
    table.remove(PREFIX, RuleType.FORWARD, A)
    assert table.next_expiry() is None
    table.add(Rule.forward(PREFIX, A))
    assert drawn(table) == {A, B}


# Modify


def test_a_modified_rule_keeps_its_place_and_counters() -> None:
    table = Watched()
    for address in (A, B):
        table.add(Rule.forward(PREFIX, address, origin="registered"))
    for _ in range(5):
        table.resolve(WEB, lambda: 0.0)
    table.mark_down(A, 5.0)
    table.news()
    table.modify(PREFIX, A, Rule.forward(PREFIX, C, weight=3, origin="registered"))
    assert table.news() == [("rule_removed", A), ("rule_added", C)]
    (entry,) = table.snapshot()
    targets = entry["targets"]
    assert isinstance(targets, list)
    assert [(each["address"], each["weight"], each["packets_resolved"], each["down"]) for each in targets] == [
        ("10.0.0.3", 3, 5, None),
        ("10.0.0.2", 1, 0, None),
    ]
    assert table.next_expiry() is None
    assert drawn(table) == {B, C}


def test_a_modified_rule_may_change_its_priority() -> None:
    table = ServiceTable()
    table.add(Rule.forward(PREFIX, A))
    table.add(Rule.forward(PREFIX, B))
    table.modify(PREFIX, A, Rule.forward(PREFIX, A, priority=7))
    assert drawn(table) == {A}
    table.modify(PREFIX, A, Rule.forward(PREFIX, A, priority=0))
    assert drawn(table) == {B}
    table.modify(PREFIX, B, Rule.forward(PREFIX, B, priority=0, hard_timeout_s=3.0), 10.0)
    assert drawn(table) == {A, B}
    table.expire(13.0)
    assert drawn(table) == {A}


@pytest.mark.parametrize(
    ("old", "rule", "words"),
    [
        (C, Rule.forward(PREFIX, C), r"76568 has no FORWARD rule to 10\.0\.0\.3; it has: DROP rule, FORWARD"),
        (A, Rule.forward(PREFIX, B), r"already has a FORWARD rule to 10\.0\.0\.2"),
        (A, Rule.forward(PREFIX, A, priority=5), "a DROP rule shares its priority with no other"),
        (A, Rule.forward(PREFIX, A, weight=0), "has weight 0"),
        (A, Rule.drop(PREFIX), "can only become another one for it"),
        (A, Rule.forward(OTHER_PREFIX, A), "can only become another one for it"),
        (A, Rule.forward(PREFIX, A, hard_timeout_s=1.0), "say from when it counts"),
    ],
)
def test_modifications_that_make_no_sense_change_nothing(old: int, rule: Rule, words: str) -> None:
    table = ServiceTable()
    table.add(Rule.forward(PREFIX, A))
    table.add(Rule.forward(PREFIX, B))
    table.add(Rule.drop(PREFIX, priority=5))
    before = table.snapshot()
    with pytest.raises(OurMistake, match=words):
        table.modify(PREFIX, old, rule)
    assert table.snapshot() == before


# DELAY, and who may remove what


def test_a_delay_rule_answers_and_is_counted() -> None:
    table = ServiceTable()
    table.add(Rule.delay(PREFIX))
    assert table.resolve(WEB, SOURCE.random, packet_bytes=9) == Resolution(RuleType.DELAY, ())
    (entry,) = table.snapshot()
    assert (entry["packets_resolved"], entry["packets_dropped"]) == (1, 0)
    with pytest.raises(OurMistake, match="a DELAY rule shares its priority with no other"):
        table.add(Rule.forward(PREFIX, A))
    assert table.remove_rule(PREFIX, RuleType.DELAY) == Rule.delay(PREFIX)
    assert len(table) == 0


def test_managers_remove_rules_and_get_back_what_they_were() -> None:
    table = ServiceTable()
    rules = [
        Rule.forward(PREFIX, A, priority=4, weight=2, interface_index=3, origin="resolved", hard_timeout_s=7.5),
        Rule.drop(PREFIX, priority=3, idle_timeout_s=2.0),
        Rule.demux(PREFIX, 1),
    ]
    for rule in rules:
        table.add(rule, 0.0)
    assert set(table.rules()) == set(rules)
    assert table.rules_of(PREFIX) == [rules[2], rules[0], rules[1]]
    assert table.remove_rule(PREFIX, RuleType.FORWARD, A) == rules[0]
    assert table.remove_rule(PREFIX, RuleType.DROP) == rules[1]
    with pytest.raises(OurMistake, match="belongs to a listener: close that"):
        table.remove_rule(PREFIX, RuleType.DEMUX)
    assert table.bound() == [PREFIX]


def test_observers_hear_of_every_change_until_they_have_enough() -> None:
    table = ServiceTable()
    seen: list[tuple[str, Rule]] = []
    end = table.on_change(lambda kind, rule: seen.append((kind, rule)))
    rules = [Rule.demux(PREFIX, 1), Rule.forward(PREFIX, A), Rule.drop(OTHER_PREFIX)]
    for rule in rules:
        table.add(rule)
    table.replace_broadcast_rules([Rule.broadcast_on(B, 2)])
    table.replace_broadcast_rules([])
    table.remove_listener(1)
    end()
    table.remove(PREFIX, RuleType.FORWARD, A)
    broadcast = Rule.broadcast_on(B, 2)
    assert seen == [
        *[("rule_added", rule) for rule in rules],
        ("rule_added", broadcast),
        ("rule_removed", broadcast),
        ("rule_removed", rules[0]),
    ]
