"""The weighted draw within a target set: its statistics, and what exclusion and broadcast do to it."""

from __future__ import annotations

import random
from collections import Counter
from functools import partial
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serval_core.names import ServiceID, ServicePrefix
from serval_core.rules import Rule, RuleType
from serval_core.selection import Target, TargetSet

PREFIX = ServicePrefix.of(ServiceID.from_number(76568))
DRAWS = 20_000

# Upper 0.1 % points of the chi-square distribution (any table of it), by degrees of freedom.
CHI_SQUARE_LIMIT = {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47, 5: 20.52}


def set_of(weights: dict[int, int], broadcast: bool = False) -> TargetSet:
    """A set of FORWARD targets by address."""
    target_set = TargetSet(1, broadcast)
    for address, weight in weights.items():
        target_set.add(Target(Rule(PREFIX, RuleType.FORWARD, 1, weight, address, broadcast=broadcast)))
    return target_set


def draw(target_set: TargetSet, source: random.Random, exclude: tuple[int, ...] = ()) -> Counter[int]:
    drawn: Counter[int] = Counter()
    for _ in range(DRAWS):
        (target,) = target_set.select(source.random, exclude)
        drawn[target.address] += 1
    return drawn


def chi_square(drawn: Counter[int], weights: dict[int, int]) -> float:
    total = sum(weights.values())
    expected = {address: DRAWS * weight / total for address, weight in weights.items()}
    assert set(drawn) <= set(expected)
    return sum((drawn[address] - count) ** 2 / count for address, count in expected.items())


@pytest.mark.parametrize(
    "weights",
    [
        {1: 1, 2: 1},
        {1: 1, 2: 3},
        {1: 10, 2: 1, 3: 5},
        {1: 1, 2: 1, 3: 1, 4: 1, 5: 1, 6: 1},
        {1: 4294967295, 2: 4294967295, 3: 2147483648},
    ],
)
def test_targets_are_drawn_in_proportion_to_their_weights(weights: dict[int, int]) -> None:
    drawn = draw(set_of(weights), random.Random(20260727))
    assert chi_square(drawn, weights) < CHI_SQUARE_LIMIT[len(weights) - 1]


def test_chi_square_notices_a_wrong_proportion() -> None:
    drawn = draw(set_of({1: 10, 2: 11}), random.Random(20260727))
    assert chi_square(drawn, {1: 1, 2: 1}) > CHI_SQUARE_LIMIT[1]


def test_the_rest_keeps_its_proportions_when_one_is_excluded() -> None:
    drawn = draw(set_of({1: 7, 2: 1, 3: 2}), random.Random(3), exclude=(1,))
    assert chi_square(drawn, {2: 1, 3: 2}) < CHI_SQUARE_LIMIT[1]


def test_proportions_follow_removals() -> None:
    target_set = set_of({1: 7, 2: 1, 3: 2})
    target_set.remove(target_set.targets[0])
    drawn = draw(target_set, random.Random(4))
    assert chi_square(drawn, {2: 1, 3: 2}) < CHI_SQUARE_LIMIT[1]


@given(st.lists(st.integers(1, 100), min_size=2, max_size=8))
def test_every_share_of_the_random_range_goes_to_its_target(weights: list[int]) -> None:
    target_set = set_of(dict(enumerate(weights, start=1)))
    total = sum(weights)
    draws = [partial(float, (at + 0.5) / total) for at in range(total)]
    chosen = [target_set.select(draw, ())[0].address for draw in draws]
    assert all(left <= right for left, right in pairwise(chosen))
    assert [chosen.count(address) for address in range(1, len(weights) + 1)] == weights


def test_the_ends_of_the_random_range_are_covered() -> None:
    target_set = set_of({1: 1, 2: 1})
    assert target_set.select(lambda: 0.0, ())[0].address == 1
    assert target_set.select(lambda: 1 - 2**-53, ())[0].address == 2
    heavy = set_of({1: 4294967295, 2: 4294967295})
    assert heavy.select(lambda: 1 - 2**-53, ())[0].address == 2


def test_nothing_is_drawn_when_all_are_excluded() -> None:
    assert set_of({1: 1, 2: 1}).select(random.Random(5).random, {1, 2}) == ()
    assert set_of({1: 1, 2: 1}, broadcast=True).select(random.Random(5).random, {1, 2}) == ()


def test_a_single_target_needs_no_random_number() -> None:
    def never() -> float:
        pytest.fail("a random number was drawn")

    assert set_of({9: 1}).select(never, ())[0].address == 9
    assert set_of({9: 1, 8: 1}).select(never, (8,))[0].address == 9


def test_all_targets_of_a_broadcast_set_are_used() -> None:
    target_set = set_of({1: 1, 2: 5, 3: 1}, broadcast=True)
    assert [target.address for target in target_set.select(random.Random(6).random, ())] == [1, 2, 3]
    assert [target.address for target in target_set.select(random.Random(6).random, (2,))] == [1, 3]


def test_exclusion_by_address_does_not_hit_listeners() -> None:
    target_set = TargetSet(32000, False)
    target_set.add(Target(Rule.demux(PREFIX, listener_id=4)))
    (target,) = target_set.select(random.Random(7).random, {0, 1})
    assert target.listener_id == 4


def test_removing_a_stranger_is_an_error() -> None:
    with pytest.raises(ValueError, match="not in tuple"):
        set_of({1: 1}).remove(Target(Rule.forward(PREFIX, 1)))
