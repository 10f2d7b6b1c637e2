"""The service table against a router that is obviously right: random tables, changes and lookups, nested prefixes."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serval_core.names import SERVICE_ID_BITS, ServiceID, ServicePrefix
from serval_core.rules import Rule, RuleType
from serval_core.service_table import ServiceTable


class SlowRouter:
    """All rules in one list; everything is found by looking at each of them, bit by bit."""

    def __init__(self) -> None:
        self.rules: list[Rule] = []

    def longest(self, service_id: ServiceID) -> list[Rule]:
        """The rules of the longest prefix that covers `service_id`."""
        text = _bits(service_id)
        covering = [
            rule for rule in self.rules if text.startswith(_bits(rule.prefix.service_id)[: rule.prefix.bits])
        ]
        longest = max((rule.prefix.bits for rule in covering), default=-1)
        return [rule for rule in covering if rule.prefix.bits == longest]

    def used(self, service_id: ServiceID, exclude: set[int], down: set[tuple[ServicePrefix, int]]) -> set[int]:
        """The addresses of which one may be drawn."""
        left = [rule for rule in self.longest(service_id) if rule.address not in exclude]
        alive = [rule for rule in left if (rule.prefix, rule.address) not in down] or left
        highest = max((rule.priority for rule in alive), default=0)
        return {rule.address for rule in alive if rule.priority == highest}


def _bits(service_id: ServiceID) -> str:
    return "".join(f"{byte:08b}" for byte in service_id)


# A tree of a few branches: prefixes of all lengths along random paths, so that they nest and lookups hit them.
trunks = st.sampled_from([ServiceID(bytes([byte]) * 32) for byte in (0x55, 0x57, 0xAA, 0xF0)])
lengths = st.one_of(st.integers(1, SERVICE_ID_BITS), st.sampled_from([1, 2, 7, 8, 9, 31, 32, 33, 255, 256]))
branches = st.builds(
    lambda trunk, flip: ServiceID((int.from_bytes(trunk, "big") ^ (1 << flip)).to_bytes(32, "big")),
    trunks,
    st.integers(0, 255),
)
service_ids = st.one_of(trunks, branches)
prefixes = st.builds(ServicePrefix.of, service_ids, lengths).filter(lambda prefix: any(prefix.service_id))
addresses = st.integers(1, 5)
rules = st.builds(
    lambda prefix, address, priority, weight: Rule.forward(prefix, address, priority=priority, weight=weight),
    prefixes,
    addresses,
    st.integers(0, 2),
    st.integers(1, 9),
)
changes = st.tuples(st.sampled_from(["add", "add", "add", "remove", "modify", "down", "up"]), rules)
questions = st.tuples(service_ids, st.sets(addresses, max_size=3), st.floats(0, 1, exclude_max=True))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(changes, max_size=40), st.lists(questions, min_size=1, max_size=12))
def test_the_table_answers_like_the_slow_router(
    steps: list[tuple[str, Rule]], asked: list[tuple[ServiceID, set[int], float]]
) -> None:
    table, slow = ServiceTable(), SlowRouter()
    down: set[tuple[ServicePrefix, int]] = set()
    for step, rule in steps:
        key = rule.prefix, rule.address
        there = next((each for each in slow.rules if (each.prefix, each.address) == key), None)
        if step == "add" and there is None:
            table.add(rule)
            slow.rules.append(rule)
        elif there is not None and step in ("remove", "modify"):
            down.discard(key)
            slow.rules.remove(there)
            if step == "remove":
                assert table.remove_rule(rule.prefix, RuleType.FORWARD, rule.address) == there
            else:
                table.modify(rule.prefix, rule.address, replace(rule, origin="registered"))
                slow.rules.append(replace(rule, origin="registered"))
        elif there is not None and step == "down":
            assert table.mark_down(rule.address, 1.0, rule.prefix) == 1
            down.add(key)
        elif there is not None and step == "up":
            assert table.mark_up(rule.address, rule.prefix) == (key in down)
            down.discard(key)
    assert sorted(map(repr, table.rules())) == sorted(map(repr, slow.rules))
    everything = [*asked, *((rule.prefix.service_id, set(), 0.5) for rule in slow.rules)]
    for service_id, exclude, random in everything:
        resolution = table.resolve(service_id, lambda random=random: random, exclude)  # type: ignore[misc]
        matching = slow.longest(service_id)
        possible = slow.used(service_id, exclude, down)
        assert table.matching_prefix(service_id) == (matching[0].prefix if matching else None)
        assert (resolution.rule_type is None) == (not matching)
        assert {target.address for target in resolution.targets} <= possible
        assert bool(resolution.targets) == bool(possible)
