"""How does an operator spread live flows over several interfaces? Load is measured for a while, then flows move.

A request of the stack socket, answered by one line with the loads, and then by one line per flow that was to move:

    balance  interfaces (names), weights (one per interface; default: all the same), measure_s, dry_run

Which flows move is `balance`'s question; how, that of `stack_migration`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from typing import Annotated

import msgspec
from msgspec import Meta

from serval_core.balance import Load, Move, balanced
from serval_core.dataplane.kernel import FlowCounters
from serval_core.errors import OurMistake
from serval_core.moves import LiveFlow
from serval_core.names import FlowID
from serval_core.sal import ServiceAccessLayer
from serval_core.service_requests import checked
from serval_core.stack_migration import Begun, Goal, Migrations
from serval_core.stack_socket_server import Handler


class _Balance(msgspec.Struct, forbid_unknown_fields=True):
    interfaces: Annotated[list[str], Meta(min_length=2)]
    weights: list[Annotated[float, Meta(gt=0, le=1e9)]] | None = None
    measure_s: Annotated[float, Meta(ge=0.01, le=60)] = 1.0
    dry_run: bool = False


class Balancer:
    """Balances the flows of one stack. Belongs to its loop."""

    def __init__(
        self,
        sal: ServiceAccessLayer,
        migrations: Migrations,
        flow_counters: Callable[[FlowID], FlowCounters],
    ) -> None:
        self._sal = sal
        self._migrations = migrations
        self._flow_counters = flow_counters

    def handlers(self) -> dict[str, Handler]:
        """By the names under which they are asked for."""
        return {"balance": checked(_Balance, self._asked)}

    def _asked(self, asked: _Balance) -> AsyncGenerator[object, None]:
        goals = [self._migrations.goal(name) for name in asked.interfaces]
        weights = asked.weights or [1.0] * len(goals)
        if len(weights) != len(goals):
            raise OurMistake(f"{len(goals)} interfaces need as many weights, not {len(weights)}")
        if len({goal.interface_index for goal in goals}) < len(goals):
            raise OurMistake("an interface is named twice: give different ones")
        return self._balance(goals, weights, asked.measure_s, asked.dry_run)

    async def _balance(
        self, goals: list[Goal], weights: list[float], measure_s: float, dry_run: bool
    ) -> AsyncGenerator[object, None]:
        by_index = {goal.interface_index: goal for goal in goals}
        flows = await self._measured(by_index, measure_s)
        moves = balanced(flows, {goal.interface_index: weight for goal, weight in zip(goals, weights, strict=True)})
        moving = {move.flow_id: move for move in moves}
        for goal in goals:
            index = goal.interface_index
            after = [each for each in flows if _place(each, moving) == index]
            yield {
                "interface": goal.interface_name,
                "flows": sum(each.interface_index == index for each in flows),
                "bytes_per_s": round(sum(each.bytes_per_s for each in flows if each.interface_index == index)),
                "flows_wanted": len(after),
                "bytes_per_s_wanted": round(sum(each.bytes_per_s for each in after)),
            }
        if dry_run or not moves:
            return
        async for outcome in self._migrations.until_known(lambda: self._begin(moves, by_index)):
            yield outcome

    async def _measured(self, by_index: dict[int, Goal], measure_s: float) -> list[Load]:
        """What the flows on these interfaces carry, both ways together."""
        began, before = time.monotonic(), self._bytes()
        await asyncio.sleep(measure_s)
        took_s, after = time.monotonic() - began, self._bytes()
        return [
            Load(
                flow.flow_id,
                flow.interface_index,
                frozenset(index for index, goal in by_index.items() if self._migrations.path_for(flow, goal) is not None),
                max(0, after[flow.flow_id] - before[flow.flow_id]) / took_s,
            )
            for flow in self._sal.live_flows()
            if flow.interface_index in by_index and flow.flow_id in before and flow.flow_id in after
        ]

    def _bytes(self) -> dict[FlowID, int]:
        counted = {flow_id: self._flow_counters(flow_id) for flow_id in self._sal.flow_ids()}
        return {flow_id: each.bytes_in + each.bytes_out for flow_id, each in counted.items()}

    def _begin(self, moves: list[Move], by_index: dict[int, Goal]) -> Begun:
        flows: dict[FlowID, LiveFlow] = {each.flow_id: each for each in self._sal.live_flows()}
        begun = Begun([], {})
        for goal in by_index.values():
            wanted = (each.flow_id for each in moves if each.interface_index == goal.interface_index)
            there = [flows[flow_id] for flow_id in wanted if flow_id in flows]
            some = self._migrations.migrate_all(there, goal)
            begun.migrating.extend(some.migrating)
            begun.refused.update(some.refused)
        return begun


def _place(load: Load, moving: dict[FlowID, Move]) -> int:
    move = moving.get(load.flow_id)
    return load.interface_index if move is None else move.interface_index
