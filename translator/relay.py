"""Who owns the two sockets of a pair, and what becomes of them when the pair ends?

The legacy socket is owned by its `Pair`, the kernel socket of the flow by the stack; the splice engine
borrows both until its completion has been taken. What then happens follows from the completion's reason
alone: FINISHED closes both sides properly, everything else is passed on as a reset to whoever is still there.
"""

from __future__ import annotations

import asyncio
import socket
from abc import ABC, abstractmethod
from typing import Any

import structlog

from serval_core.connection import Connection
from serval_core.errors import ServalError
from translator.accounting import Admission, MapTraffic
from translator.legacy_side import reset
from translator.splice_engine import Completion, CompletionReason, SpliceEngine

log = structlog.get_logger("translator.relay")

_TIMEOUTS = frozenset(
    {CompletionReason.IDLE_TIMEOUT, CompletionReason.LEFT_FIN_TIMEOUT, CompletionReason.RIGHT_FIN_TIMEOUT}
)


class Pair(ABC):
    """A legacy TCP connection and a Serval flow that belong together; either may not exist yet.

    The left side is the one that opened: the legacy client of a forward map (`legacy_is_left`), the Serval
    client of a reverse map. `end()` comes exactly once, from a side or after the engine's
    completion.
    """

    __slots__ = ("admission", "connection", "legacy", "pair_id", "traffic")
    legacy_is_left: bool

    def __init__(self, admission: Admission, traffic: MapTraffic) -> None:
        self.admission = admission
        self.traffic = traffic
        self.legacy: socket.socket | None = None
        self.connection: Connection | None = None
        self.pair_id = 0
        admission.enter()
        traffic.connections += 1
        traffic.active += 1

    @abstractmethod
    def legacy_text(self) -> str:
        """Who is at the legacy end."""

    def end(self, properly: bool) -> None:
        """Give both sides up, with FINs or with resets, and leave."""
        legacy, connection = self.legacy, self.connection
        self.legacy = self.connection = None
        if connection is not None:
            connection.on_ended = None
            if properly:
                connection.release()
            else:
                connection.abort()
        if legacy is not None:
            if properly:
                legacy.close()
            else:
                reset(legacy)
        self.traffic.active -= 1
        self.admission.leave()


class Relay:
    """Hands pairs to the splice engine and takes them back. Owns the engine."""

    def __init__(self, engine: SpliceEngine) -> None:
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._pairs: dict[int, Pair] = {}
        self._last_pair_id = 0
        self._loop.add_reader(engine.notification_fd, self._take_completions)

    def __len__(self) -> int:
        return len(self._pairs)

    def start(self, pair: Pair) -> None:
        """Begin to pass bytes; both sides of the pair are there."""
        legacy, connection = pair.legacy, pair.connection
        assert legacy is not None
        assert connection is not None
        self._last_pair_id = pair.pair_id = pair_id = self._last_pair_id + 1
        try:
            if pair.legacy_is_left:
                self._engine.add(pair_id, legacy.fileno(), connection.fd)
            else:
                self._engine.add(pair_id, connection.fd, legacy.fileno())
        except ServalError as error:
            log.error("cannot relay a connection", map=pair.traffic.listen, error=str(error))
            pair.traffic.refused += 1
            pair.end(properly=False)
            return
        self._pairs[pair_id] = pair

    def stop(self) -> None:
        """Cancel what is left, take it back, and end the engine."""
        self._loop.remove_reader(self._engine.notification_fd)
        self._engine.stop()
        self._take_completions()

    def counters(self) -> dict[str, int]:
        """The engine's counters."""
        return self._engine.counters()

    def live_bytes(self) -> dict[MapTraffic, tuple[int, int]]:
        """What the live pairs of each map have carried so far, to and from the service."""
        sums: dict[MapTraffic, tuple[int, int]] = {}
        for pair_id, pair in self._pairs.items():
            counters = self._engine.pair_counters(pair_id)
            if counters is not None:
                to_service, from_service = sums.get(pair.traffic, (0, 0))
                sums[pair.traffic] = (
                    to_service + counters.left_to_right_bytes,
                    from_service + counters.right_to_left_bytes,
                )
        return sums

    def pairs(self) -> list[dict[str, Any]]:
        """Live pairs with the bytes they have carried, for `show flows`."""
        listed = []
        for pair_id, pair in self._pairs.items():
            connection, counters = pair.connection, self._engine.pair_counters(pair_id)
            if connection is None or counters is None:
                continue
            to_service, from_service = counters.left_to_right_bytes, counters.right_to_left_bytes
            listed.append(
                {
                    "flow_id": connection.flow_id,
                    "direction": "forward" if pair.legacy_is_left else "reverse",
                    "legacy": pair.legacy_text(),
                    "map": f"{pair.traffic.listen} -> {pair.traffic.service}",
                    "bytes_to_service": to_service,
                    "bytes_from_service": from_service,
                    "duration_s": round(counters.duration_s, 3),
                }
            )
        return listed

    def _take_completions(self) -> None:
        for completion in self._engine.completions():
            pair = self._pairs.pop(completion.pair_id)
            _account(pair, completion)
            pair.end(properly=completion.reason is CompletionReason.FINISHED)


def _account(pair: Pair, completion: Completion) -> None:
    traffic, reason = pair.traffic, completion.reason
    traffic.bytes_to_service += completion.left_to_right_bytes
    traffic.bytes_from_service += completion.right_to_left_bytes
    if reason is CompletionReason.FINISHED:
        traffic.finished += 1
    elif reason in _TIMEOUTS:
        traffic.timed_out += 1
    else:
        traffic.reset += 1
        if reason is CompletionReason.FAILED:
            errors = (completion.left_errno, completion.right_errno)
            log.error("the splice engine gave a pair up", map=traffic.listen, left_right_errno=errors)
