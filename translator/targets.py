"""How is an unmodified service reached, and what if it is down?

`TargetSet` knows the targets of one reverse map: they take turns, one that has just failed comes last for a
while, and one that is down (`health`) gets no connections. `TargetDialer` opens the TCP connections:
nonblocking, next target on refusal, one deadline for all. A connection to this host is usually complete when
connect(2) returns, and then no event loop is involved.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Callable
from typing import Any

from serval_core.config_file import Misconfigured
from translator.legacy_side import SocketOptions
from translator.port_map import LegacyTarget, ReverseMap

# How long a target that refused or did not answer is tried after the others only.
AVOID_S = 5.0
_UNDECIDED = frozenset({errno.EINPROGRESS, errno.EALREADY})

_HEALTH = {None: "not checked", True: "up", False: "down"}

OnTarget = Callable[[socket.socket, "Target"], None]
OnNoTarget = Callable[[int], None]


class TargetHealth:
    """Whether a target works, as far as is known. `up` None: not known; `errno`: what was wrong last."""

    __slots__ = ("contradictions", "errno", "up")

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Nothing is known any more."""
        self.up: bool | None = None
        self.contradictions = 0  # results in a row that speak against `up`
        self.errno = 0

    def learn(self, code: int, needed: int) -> bool:
        """Take a result: the errno of connecting, 0 if the target works. Whether `up` has changed.

        The first result decides at once, later ones when `needed` in a row contradict what was believed.
        """
        works = code == 0
        if not works:
            self.errno = code
        if works == self.up:
            self.contradictions = 0
            return False
        self.contradictions += 1
        if self.up is not None and self.contradictions < needed:
            return False
        self.up = works
        self.contradictions = 0
        return True


class Target:
    """One address of one target. `on_outcome(target, errno)` is told of failures, and (0) of the success after one."""

    __slots__ = (
        "avoid_until_s",
        "connections",
        "failures",
        "family",
        "health",
        "on_outcome",
        "socket_address",
        "text",
    )

    def __init__(self, text: str, family: int, socket_address: Any) -> None:
        self.text = text
        self.family = family
        self.socket_address = socket_address
        self.avoid_until_s = 0.0
        self.connections = 0
        self.failures = 0
        self.health = TargetHealth()
        self.on_outcome: Callable[[Target, int], None] | None = None

    def connected(self) -> None:
        """A connection was opened."""
        self.connections += 1
        if self.health.contradictions and self.on_outcome is not None:
            self.on_outcome(self, 0)

    def failed(self, code: int, now: float) -> None:
        """A connection could not be opened."""
        self.failures += 1
        self.avoid_until_s = now + AVOID_S
        if self.on_outcome is not None:
            self.on_outcome(self, code)

    def as_dict(self, now: float) -> dict[str, object]:
        """For JSON."""
        return {
            "target": self.text,
            "connections": self.connections,
            "failures": self.failures,
            "avoided": now < self.avoid_until_s,
            "health": _HEALTH[self.health.up],
            "down_because": os.strerror(self.health.errno) if self.health.up is False else None,
        }


class TargetSet:
    """The targets of one reverse map, in turn."""

    __slots__ = ("_next", "_usable", "targets")

    def __init__(self, targets: list[Target]) -> None:
        self.targets = targets
        self._next = 0
        self.health_changed()

    @property
    def usable(self) -> bool:
        """Whether any target is not known to be down."""
        return bool(self._usable)

    @property
    def proven(self) -> bool:
        """Whether any target is known to be up."""
        return any(each.health.up for each in self.targets)

    def health_changed(self) -> None:
        """Call it when a target went up or down."""
        self._usable = [each for each in self.targets if each.health.up is not False]

    def succeed(self, earlier: TargetSet) -> None:
        """Take the place of `earlier`: what was known of a target that is still there stays known."""
        known = {(each.text, each.family, each.socket_address): each for each in earlier.targets}
        self.targets = [
            known.get((each.text, each.family, each.socket_address), each) for each in self.targets
        ]
        self.health_changed()

    def in_order(self, now: float) -> list[Target]:
        """All that are not down, those to be avoided last, otherwise beginning with the one whose turn it is."""
        targets = self._usable
        if len(targets) < 2:
            return targets
        start = self._next % len(targets)
        self._next = (start + 1) % len(targets)
        turned = targets[start:] + targets[:start]
        if any(target.avoid_until_s > now for target in turned):
            turned.sort(key=lambda target: target.avoid_until_s > now)  # stable
        return turned


def resolve_targets(reverse: ReverseMap) -> TargetSet:
    """Look up the host names of a reverse map. Blocks; raises Misconfigured for a name without address."""
    found: dict[tuple[int, Any], Target] = {}
    for target in reverse.targets:
        for family, socket_address in _addresses(target, reverse.origin):
            found.setdefault((family, socket_address), Target(str(target), family, socket_address))
    return TargetSet(list(found.values()))


def _addresses(target: LegacyTarget, origin: str) -> list[tuple[int, Any]]:
    try:
        answers = socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise Misconfigured(origin, f"the host name of target {target} has no address ({why})") from None
    return [(answer[0], answer[4]) for answer in answers]


class Dial:
    """One attempt to reach any target of a set. Ends with exactly one callback, or none after `cancel()`."""

    __slots__ = (
        "_candidates",
        "_dialer",
        "_on_failed",
        "_on_target",
        "_position",
        "_socket",
        "deadline_s",
        "last_s",
    )

    def __init__(
        self,
        dialer: TargetDialer,
        candidates: list[Target],
        on_target: OnTarget,
        on_failed: OnNoTarget,
        last_s: float,
    ) -> None:
        self._dialer = dialer
        self._candidates = candidates
        self._on_target = on_target
        self._on_failed = on_failed
        self._position = -1
        self._socket: socket.socket | None = None
        self.last_s = last_s  # when all is over
        self.deadline_s = last_s  # when the present target has had its time

    @property
    def undecided(self) -> bool:
        """Whether a callback is still to come."""
        return self._socket is not None

    def cancel(self) -> None:
        """Give up silently."""
        self._forget_socket()

    def try_next(self, now: float, code: int) -> None:
        """Go on to the next target; `code` is why the one before failed."""
        options = self._dialer.options
        while True:
            self._position += 1
            left = len(self._candidates) - self._position
            if left <= 0 or now >= self.last_s:
                self._on_failed(code)
                return
            target = self._candidates[self._position]
            try:
                connection = socket.socket(target.family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            except OSError as error:
                code = error.errno or errno.EMFILE
                continue
            options.apply(connection)
            code = connection.connect_ex(target.socket_address)
            if code in _UNDECIDED:
                # On loopback the handshake was done inside connect(2), after its result was determined.
                code = connection.connect_ex(target.socket_address)
            if code == 0:
                target.connected()
                self._on_target(connection, target)
                return
            if code in _UNDECIDED:
                self._socket = connection
                self.deadline_s = now + (self.last_s - now) / left
                self._dialer.wait_for(self, connection)
                return
            connection.close()
            target.failed(code, now)

    def decided(self) -> None:
        """The socket became writable: connected or refused."""
        connection, target = self._socket, self._candidates[self._position]
        assert connection is not None
        code = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self._forget_socket()
            now = self._dialer.time()
            target.failed(code, now)
            self.try_next(now, code)
            return
        self._dialer.forget(self, connection)
        self._socket = None
        target.connected()
        self._on_target(connection, target)

    def too_late(self, now: float) -> None:
        """The present target did not answer in its share of the time."""
        self._forget_socket()
        self._candidates[self._position].failed(errno.ETIMEDOUT, now)
        self.try_next(now, errno.ETIMEDOUT)

    def _forget_socket(self) -> None:
        if self._socket is not None:
            self._dialer.forget(self, self._socket)
            self._socket.close()
            self._socket = None


class TargetDialer:
    """Opens connections to targets. Owns a socket until it is handed to `on_target`."""

    def __init__(self, options: SocketOptions, timeout_s: float) -> None:
        self.options = options
        self.timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self.time = self._loop.time
        self._waiting: set[Dial] = set()

    @property
    def waiting(self) -> int:
        """How many dials are undecided."""
        return len(self._waiting)

    def dial(self, targets: TargetSet, on_target: OnTarget, on_failed: OnNoTarget) -> Dial | None:
        """Connect to one of `targets`. None when it was decided, a callback called, before this returns."""
        now = self.time()
        dial = Dial(self, targets.in_order(now), on_target, on_failed, now + self.timeout_s)
        dial.try_next(now, errno.EHOSTUNREACH)
        return dial if dial.undecided else None

    def sweep(self, now: float) -> None:
        """End what took too long; call it a few times per second."""
        for dial in [each for each in self._waiting if each.deadline_s <= now]:
            dial.too_late(now)

    def wait_for(self, dial: Dial, connection: socket.socket) -> None:
        """Watch an undecided socket."""
        self._waiting.add(dial)
        self._loop.add_writer(connection.fileno(), dial.decided)

    def forget(self, dial: Dial, connection: socket.socket) -> None:
        """Stop watching it."""
        self._waiting.discard(dial)
        self._loop.remove_writer(connection.fileno())
