"""Which instance gets the next SYN of a flow, and what follows from one that did not answer as hoped?

An active open asks instances in rounds: each at most once, by priority and weight, those that are down last.
An instance that refused or cannot be reached is followed by the next at once, a silent one when its answer is
overdue. Only between rounds is there a pause, which grows. So a connect succeeds as long as one instance
lives, and fails with ECONNREFUSED only when all of them have refused.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, auto
from errno import EADDRNOTAVAIL, EHOSTUNREACH, ENOSPC

from serval_core.addresses import LOOPBACK
from serval_core.core import Core
from serval_core.flow import Flow, Search
from serval_core.rules import RuleType
from serval_core.ways import ways_of, ways_to


class Choice(Enum):
    """What came of looking for an instance."""

    FOUND = auto()
    ROUND_OVER = auto()
    DELAYED = auto()
    NO_PATH = auto()
    NO_RULE = auto()
    DROP_RULE = auto()
    NOT_PARKED = auto()


HOPELESS: dict[Choice, tuple[int, str]] = {
    Choice.NO_RULE: (EADDRNOTAVAIL, "no rule covers the service"),
    Choice.DROP_RULE: (EHOSTUNREACH, "a DROP rule refuses the service"),
    Choice.NOT_PARKED: (ENOSPC, "a DELAY rule holds the service, and nothing more can be parked"),
}
"""Choices with which a connect fails before it has begun, and how."""


class Failover:
    """Chooses instances for the active opens of one stack. `resume` and `end` are told of parked flows."""

    __slots__ = ("_core", "_end", "_resume", "syn_bytes")

    def __init__(
        self,
        core: Core,
        resume: Callable[[Flow, float], None],
        end: Callable[[Flow, str, float], None],
    ) -> None:
        self._core = core
        self._resume = resume
        self._end = end
        self.syn_bytes = 0

    def choose(self, flow: Flow, search: Search, now: float) -> Choice:
        """Set `flow.ways` to where the next SYN goes. Of the instances of this round none is asked twice."""
        core = self._core
        flow.ways = ()
        if flow.advisory_address:
            if search.asked:
                return Choice.ROUND_OVER
            flow.ways = ways_to(core.paths_of(flow.service_id), flow.advisory_address)
            return Choice.FOUND if flow.ways else Choice.NO_PATH
        unreachable: set[int] = set()
        paths = core.paths_of(flow.service_id)
        while True:
            rule_type, targets = core.table.resolve(
                flow.service_id, core.random.random, search.asked | unreachable, self.syn_bytes
            )
            if not targets:
                break
            if rule_type is RuleType.DEMUX and LOOPBACK in search.asked:
                return Choice.ROUND_OVER
            flow.ways = ways_of(paths, targets)
            if flow.ways:
                search.broadcast = targets[0].broadcast
                return Choice.FOUND
            search.out_of_reach = True
            addresses = {target.address for target in targets}
            if addresses <= unreachable | {0}:
                break
            unreachable |= addresses
        # Rules of lower rank do not speak against instances that only lost a packet.
        if search.asked:
            return Choice.ROUND_OVER
        if rule_type is RuleType.DELAY:
            return self._park(flow, search, now)
        if rule_type is RuleType.DROP:
            return Choice.DROP_RULE
        return Choice.NO_RULE if rule_type is None else Choice.NO_PATH

    def silent(self, flow: Flow, search: Search, now: float) -> None:
        """The answer to the last SYN is overdue."""
        for destination, path in flow.ways:
            search.asked.add(destination)
            if not search.broadcast:
                self._core.path_quality.silent((path.interface_index, destination), now)
                self._core.liveness.silent(flow.service_id, destination, now)

    def refused(self, flow: Flow, search: Search, address: int, now: float) -> None:
        """The instance at `address`, which was asked in this round, does not have the service."""
        search.asked.add(address)
        search.refused.add(address)
        self._core.liveness.refused(flow.service_id, address, now)

    def unreachable(self, flow: Flow, search: Search, address: int, now: float) -> None:
        """The last SYN could not be brought to `address`."""
        search.asked.add(address)
        search.out_of_reach = True
        self._core.liveness.unreachable(flow.service_id, address, now)

    @staticmethod
    def all_refused(search: Search) -> bool:
        """Whether every instance there is has refused in this round."""
        return not search.out_of_reach and search.asked <= search.refused

    def _park(self, flow: Flow, search: Search, now: float) -> Choice:
        search.parked = self._core.delayed.park(
            flow.service_id,
            "connect",
            lambda now: self._resume(flow, now),
            lambda reason, now: self._end(flow, reason, now),
            now,
        )
        return Choice.NOT_PARKED if search.parked is None else Choice.DELAYED
