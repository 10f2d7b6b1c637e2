"""Loads that are to be balanced, with every distribution tried as the judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from serval_core.balance import Load, Move, balanced
from serval_core.names import FlowID

BOTH = frozenset({2, 3})
EQUAL = {2: 1.0, 3: 1.0}


def on(index: int, *rates: float, first: int = 1, reachable: frozenset[int] = BOTH) -> list[Load]:
    return [Load(FlowID(first + place), index, reachable, rate) for place, rate in enumerate(rates)]


def peak(flows: Sequence[Load], places: Sequence[int], weights: Mapping[int, float]) -> float:
    carried = dict.fromkeys(weights, 0.0)
    for flow, place in zip(flows, places, strict=True):
        carried[place] += flow.bytes_per_s
    return max(carried[index] / weight for index, weight in weights.items())


def places_after(flows: Sequence[Load], moves: Sequence[Move]) -> list[int]:
    moved = {move.flow_id: move.interface_index for move in moves}
    assert len(moved) == len(moves)
    return [moved.get(flow.flow_id, flow.interface_index) for flow in flows]


def test_half_of_the_load_leaves_the_only_interface_in_use() -> None:
    assert balanced(on(2, 60.0, 40.0), EQUAL) == [Move(FlowID(1), 3)]


def test_what_is_balanced_stays() -> None:
    assert balanced([*on(2, 50.0, 50.0), *on(3, 98.0, first=9)], EQUAL) == []


def test_one_large_flow_is_not_carried_back_and_forth() -> None:
    assert balanced(on(2, 100.0), EQUAL) == []


def test_idle_flows_stay() -> None:
    assert balanced(on(2, 100.0, 0.0, 0.0), EQUAL) == []


def test_weights_say_what_is_equal() -> None:
    flows = on(2, *[10.0] * 11)
    assert len(balanced(flows, {2: 1.0, 3: 10.0})) == 10


def test_flows_elsewhere_and_without_a_path_stay() -> None:
    assert balanced([*on(7, 500.0), *on(2, 50.0, 50.0, first=5, reachable=frozenset({2}))], EQUAL) == []


def test_ten_thousand_flows_are_no_matter() -> None:
    flows = on(2, *[float(each % 97 + 1) for each in range(10_000)])
    moves = balanced(flows, EQUAL)
    assert peak(flows, places_after(flows, moves), EQUAL) < sum(each.bytes_per_s for each in flows) * 0.53


@given(
    st.lists(
        st.tuples(st.sampled_from((2, 3, 4)), st.integers(0, 1000), st.sets(st.sampled_from((2, 3, 4)))),
        max_size=7,
    )
)
def test_never_worse_than_before_and_never_twice_the_best(drawn: list[tuple[int, int, set[int]]]) -> None:
    weights = {2: 1.0, 3: 1.0, 4: 1.0}
    flows = [
        Load(FlowID(number), index, frozenset({index, *reachable}), float(rate))
        for number, (index, rate, reachable) in enumerate(drawn, 1)
    ]
    places = places_after(flows, balanced(flows, weights))
    assert all(place in flow.reachable for flow, place in zip(flows, places, strict=True))
    after = peak(flows, places, weights)
    assert after <= peak(flows, [flow.interface_index for flow in flows], weights)
    if all(flow.reachable == weights.keys() for flow in flows):
        best = min((peak(flows, each, weights) for each in product(weights, repeat=len(flows))), default=0.0)
        assert after <= 2 * best
