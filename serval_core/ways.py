"""Which copies of a packet go where, once the service table has chosen its targets?

One copy to the target's address, or with broadcast rules one per interface, each from that interface's own
address (SPEC 6.3, 6.6). Knows paths and nothing of packets.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from serval_core.addresses import LOOPBACK
from serval_core.paths import Path, PathFinder
from serval_core.rules import RuleType
from serval_core.selection import Target


class Way(NamedTuple):
    """Where a packet goes and how."""

    destination: int
    path: Path


def ways_of(paths: PathFinder, targets: Collection[Target]) -> tuple[Way, ...]:
    """The ways to `targets`, of which there is at least one; none if no path leads there."""
    first = next(iter(targets))
    if first.broadcast:
        return _broadcast_ways(paths, targets)
    if first.type is RuleType.DEMUX:
        return ways_to(paths, LOOPBACK)
    return ways_to(paths, first.address, first.interface_index)


def ways_to(paths: PathFinder, address: int, interface_index: int = 0) -> tuple[Way, ...]:
    """The way to one address, if there is one; through a certain interface unless the index is 0."""
    path = paths.path_to(address, interface_index)
    return () if path is None else (Way(address, path),)


def _broadcast_ways(paths: PathFinder, targets: Collection[Target]) -> tuple[Way, ...]:
    interfaces = {each.index: each for each in paths.interfaces()}
    ways = []
    for target in targets:
        interface = interfaces.get(target.interface_index)
        if interface is not None:
            path = Path(
                interface.index, interface.name, interface.address, target.address, interface.mtu_bytes
            )
            ways.append(Way(target.address, path))
    return tuple(ways)
