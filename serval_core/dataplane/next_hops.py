"""How do the frames of forwarded packets look? The MAC addresses of next hops that nobody's flow may use (`neighbours`)."""

from __future__ import annotations

from typing import NamedTuple

from serval_core.dataplane.neighbours import Key, Neighbours


class Link(NamedTuple):
    """The MAC addresses of a frame to a next hop: its own, and that of our interface."""

    neighbour: bytes
    own: bytes


class NextHops:
    """The next hops of a service router among the users of `Neighbours`, which flows are as well.

    Users are numbers there: ours are negative, flowIDs are not.
    """

    def __init__(self, neighbours: Neighbours) -> None:
        self._neighbours = neighbours
        self._user_of: dict[Key, int] = {}
        self._key_of: dict[int, Key] = {}
        self._macs: dict[Key, bytes | None] = {}
        self._last_user = 0

    def use(self, key: Key) -> bytes | None:
        """The MAC address of a next hop that is in use from now on, or None."""
        if key not in self._user_of:
            self._last_user -= 1
            self._user_of[key], self._key_of[self._last_user] = self._last_user, key
            self._macs[key] = self._neighbours.use(self._last_user, key)
        return self._macs[key]

    def release_all(self) -> None:
        """No next hop is in use any more."""
        for user in self._key_of:
            self._neighbours.release(user)
        self._user_of.clear()
        self._key_of.clear()
        self._macs.clear()

    def changed(self, user: int, mac: bytes | None) -> Key | None:
        """Note a change that `Neighbours` reported of one of ours: the next hop."""
        key = self._key_of.get(user)
        if key is not None:
            self._macs[key] = mac
        return key
