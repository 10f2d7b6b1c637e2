"""Which live flows are to go where, so that interfaces carry load in proportion to their weights? Arithmetic only.

The greedy rule: from the interface that is loaded most for its weight, that flow goes elsewhere which lowers the highest
load the most. It moves few flows, ends when no move helps or is needed, and with equal weights the busiest interface
then carries less than twice what it would in the best distribution, mostly just that.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from serval_core.names import FlowID

GOOD_ENOUGH = 1.05
"""Loads are equal when the highest is at most so many times what a perfect distribution would make it."""


class Load(NamedTuple):
    """A flow, where it is (an interface's index), where it could be, and what it carries in bytes per second."""

    flow_id: FlowID
    interface_index: int
    reachable: frozenset[int]
    bytes_per_s: float


class Move(NamedTuple):
    """A flow is to go to an interface."""

    flow_id: FlowID
    interface_index: int


class _Option(NamedTuple):
    """What becomes of the highest of two loads if a flow goes from one interface to the other."""

    peak: float
    flow_id: FlowID
    goal: int


def balanced(flows: Collection[Load], weights: Mapping[int, float]) -> list[Move]:
    """The moves after which `flows` are spread over the interfaces in `weights`, which are all more than 0.

    Flows elsewhere, and such as carry nothing, are left alone; no flow moves twice.
    """
    by_id = {each.flow_id: each for each in flows if each.interface_index in weights and each.bytes_per_s > 0}
    staying: dict[int, list[tuple[float, FlowID]]] = {index: [] for index in weights}
    carried = dict.fromkeys(weights, 0.0)
    for each in by_id.values():
        insort(staying[each.interface_index], (each.bytes_per_s, each.flow_id))
        carried[each.interface_index] += each.bytes_per_s
    perfect = sum(carried.values()) / sum(weights.values())
    moves: list[Move] = []
    while True:
        busiest = max(weights, key=lambda index: carried[index] / weights[index])
        options = [
            option
            for goal in weights
            if goal != busiest
            for option in _options(staying[busiest], by_id, busiest, goal, carried, weights)
        ]
        best = min(options, default=None)
        highest = carried[busiest] / weights[busiest]
        if best is None or best.peak >= highest or highest <= perfect * GOOD_ENOUGH:
            return moves
        rate = by_id[best.flow_id].bytes_per_s
        staying[busiest].remove((rate, best.flow_id))
        carried[busiest] -= rate
        carried[best.goal] += rate
        moves.append(Move(best.flow_id, best.goal))


def _options(
    staying: list[tuple[float, FlowID]],
    by_id: Mapping[FlowID, Load],
    busiest: int,
    goal: int,
    carried: Mapping[int, float],
    weights: Mapping[int, float],
) -> Iterable[_Option]:
    """The two flows that come closest to making both interfaces equal: one that carries too little, one too much."""
    from_weight, to_weight = weights[busiest], weights[goal]
    ideal = (carried[busiest] * to_weight - carried[goal] * from_weight) / (from_weight + to_weight)
    middle = bisect_left(staying, (ideal, FlowID(0)))
    for side in (range(middle - 1, -1, -1), range(middle, len(staying))):
        for at in side:
            rate, flow_id = staying[at]
            if goal in by_id[flow_id].reachable:
                peak = max((carried[busiest] - rate) / from_weight, (carried[goal] + rate) / to_weight)
                yield _Option(peak, flow_id, goal)
                break
