"""Which stored prefix of serviceIDs is the longest that covers a given one?

A prefix trie flattened to one hash table per prefix length in use. A lookup asks them from the longest to the
shortest, so its cost is the number of different lengths in use (at most 257, a handful in practice) and does
not grow with the number of prefixes. Knows nothing of rules: it maps prefixes to values of any kind.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar

from serval_core.names import SERVICE_ID_BITS, ServiceID, ServicePrefix

V = TypeVar("V")


class PrefixTrie(Generic[V]):
    """Maps `ServicePrefix` to values; `longest_match` finds the deepest one covering a serviceID (SPEC 6.3).

    Values must not be None. Prefixes are compared by their first `bits` bits only.
    """

    __slots__ = ("_levels", "_shorter", "_whole")

    def __init__(self) -> None:
        # Whole serviceIDs are by far the most common key: they are found by their bytes, without making a
        # number of them.
        self._whole: dict[bytes, V] = {}
        # Bits to drop -> leading bits as a number -> value, and the same as a list in the order in which
        # lookups ask it.
        self._levels: dict[int, dict[int, V]] = {}
        self._shorter: list[tuple[int, dict[int, V]]] = []

    def __len__(self) -> int:
        return len(self._whole) + sum(len(level) for level in self._levels.values())

    def values(self) -> Iterator[V]:
        """The stored values, those of the longest prefixes first."""
        yield from self._whole.values()
        for _, level in self._shorter:
            yield from level.values()

    def get(self, prefix: ServicePrefix) -> V | None:
        """The value stored for exactly this prefix, or None."""
        if prefix.bits == SERVICE_ID_BITS:
            return self._whole.get(prefix.service_id)
        drop, leading = _split(prefix)
        level = self._levels.get(drop)
        return None if level is None else level.get(leading)

    def set(self, prefix: ServicePrefix, value: V) -> None:
        """Store `value` for this prefix, in place of what was there."""
        if prefix.bits == SERVICE_ID_BITS:
            self._whole[prefix.service_id] = value
            return
        drop, leading = _split(prefix)
        if drop in self._levels:
            self._levels[drop][leading] = value
        else:
            self._levels[drop] = {leading: value}
            self._shorter = sorted(self._levels.items())

    def remove(self, prefix: ServicePrefix) -> None:
        """Forget this prefix. KeyError when it is not stored."""
        if prefix.bits == SERVICE_ID_BITS:
            del self._whole[prefix.service_id]
            return
        drop, leading = _split(prefix)
        level = self._levels[drop]
        del level[leading]
        if not level:
            del self._levels[drop]
            self._shorter = sorted(self._levels.items())

    def matches(self, service_id: ServiceID) -> Iterator[V]:
        """The values of all stored prefixes that cover `service_id`, the longest first."""
        value = self._whole.get(service_id)
        if value is not None:
            yield value
        number = int.from_bytes(service_id, "big")
        for drop, level in self._shorter:
            value = level.get(number >> drop)
            if value is not None:
                yield value

    def longest_match(self, service_id: ServiceID) -> V | None:
        """The value of the longest stored prefix that covers `service_id`, or None."""
        value = self._whole.get(service_id)
        if value is not None or not self._shorter:
            return value
        number = int.from_bytes(service_id, "big")
        for drop, level in self._shorter:
            value = level.get(number >> drop)
            if value is not None:
                return value
        return None


def _split(prefix: ServicePrefix) -> tuple[int, int]:
    drop = SERVICE_ID_BITS - prefix.bits
    return drop, int.from_bytes(prefix.service_id, "big") >> drop
