"""Which choices of a service router can be made ahead, for a fast path that only draws and rewrites?

A plan is what the service table says about one prefix, as long as that is simple: some FORWARD targets that
compete, each reachable, none of them marked or impossible. Whatever else a prefix says has the empty plan,
which means: ask `forwarding`, packet by packet. Plans go stale when the table, the paths or the addresses of
this host change.
"""

from __future__ import annotations

from collections.abc import Set
from typing import NamedTuple

from serval_core.paths import PathFinder
from serval_core.rules import RuleType
from serval_core.service_entry import Entry

PLANNED_TARGETS_MAX = 16
WHOLE_SHARE = 1 << 32


class PlannedTarget(NamedTuple):
    """A target, its way, and its share: it is meant by random numbers of 32 bits below `share_end` and not
    below that of the target before it. Addresses are in host order.
    """

    address: int
    share_end: int
    interface_index: int
    next_hop: int
    mtu_bytes: int


Plan = tuple[PlannedTarget, ...]


def plan(entry: Entry, impossible: Set[int], paths: PathFinder) -> Plan:
    """The plan for an entry of the service table. `impossible` are addresses that are never forwarded to."""
    target_set = entry.sets[0]
    if entry.marked or target_set.broadcast or len(target_set.targets) > PLANNED_TARGETS_MAX:
        return ()
    total = sum(target.weight for target in target_set.targets)
    planned = []
    weight_so_far = 0
    for target in target_set.targets:
        if target.type is not RuleType.FORWARD or target.address in impossible:
            return ()
        path = paths.path_to(target.address, target.interface_index)
        if path is None:
            return ()
        weight_so_far += target.weight
        share_end = weight_so_far * WHOLE_SHARE // total
        planned.append(
            PlannedTarget(target.address, share_end, path.interface_index, path.next_hop, path.mtu_bytes)
        )
    return tuple(planned)


def impossible_targets(paths: PathFinder) -> frozenset[int]:
    """The addresses that no packet is forwarded to, whatever it says: our own, and broadcast addresses."""
    interfaces = paths.interfaces()
    own = {each.address for each in interfaces}
    return frozenset(own | {each.broadcast_address for each in interfaces if each.broadcast_address})
