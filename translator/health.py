"""Does a target of a reverse map work? Connect checks, and what real connections find out, with rise and fall.

`TargetHealth` draws the conclusions and does no I/O. `HealthChecker` watches the targets of one map: it opens a
TCP connection at intervals, jittered so that many translators do not ask at the same moment, and resets it
before the service's accept(2) sees it. A real connection that fails counts as a check that failed.
"""

from __future__ import annotations

import asyncio
import errno
import os
import random
import socket
import struct
from collections.abc import Callable

import structlog

from translator.health_settings import HealthSection
from translator.targets import Target, TargetSet

log = structlog.get_logger("translator.health")

JITTER = 0.1
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)
# What this says about is our host, not the target.
_OUR_TROUBLE = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL})


class HealthChecker:
    """Watches the targets of one map from `start` until `stop`; `on_change` is called when one goes up or down."""

    def __init__(
        self, service: str, targets: TargetSet, settings: HealthSection, on_change: Callable[[], None]
    ) -> None:
        self._service = service
        self._targets = targets
        self._settings = settings
        self._on_change = on_change
        self._tasks: dict[Target, asyncio.Task[None]] = {}
        self._early: dict[Target, asyncio.Event] = {}

    @property
    def checks(self) -> bool:
        """Whether anything is checked at all."""
        return self._settings.check != "none"

    def start(self) -> None:
        """Begin, with a check of each target at once; its first result decides without rise and fall."""
        for target in self._targets.targets:
            if self.checks:
                target.on_outcome = self._outcome
                self._early[target] = asyncio.Event()
                self._tasks[target] = asyncio.create_task(self._watch(target))
            else:
                target.health.forget()
        self._targets.health_changed()

    def stop(self) -> None:
        """Watch no more. What was found out stays."""
        for target, task in self._tasks.items():
            target.on_outcome = None
            task.cancel()
        self._tasks.clear()
        self._early.clear()

    async def _watch(self, target: Target) -> None:
        settings, early = self._settings, self._early[target]
        while True:
            early.clear()
            self._learn(target, await connect_errno(target, settings.timeout_s))
            interval_s = settings.fast_interval_s if target.health.contradictions else settings.interval_s
            try:
                async with asyncio.timeout(interval_s * random.uniform(1 - JITTER, 1 + JITTER)):
                    await early.wait()
            except TimeoutError:
                continue
            # Real connections have failed: look again soon, however many of them there are.
            await asyncio.sleep(settings.fast_interval_s)

    def _outcome(self, target: Target, code: int) -> None:
        """A real connection has come to this."""
        if code:
            self._early[target].set()
        self._learn(target, code)

    def _learn(self, target: Target, code: int) -> None:
        health, settings = target.health, self._settings
        known = health.up is not None
        if code in _OUR_TROUBLE or not health.learn(code, settings.fall if health.up else settings.rise):
            return
        if not health.up:
            log.warning("a target is down", service=self._service, target=target.text, why=os.strerror(code))
        elif known:
            log.info("a target is up", service=self._service, target=target.text)
        self._targets.health_changed()
        self._on_change()


async def connect_errno(target: Target, timeout_s: float) -> int:
    """What connecting to `target` comes to: 0, or an errno."""
    try:
        with socket.socket(target.family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as connection:
            # The kernel holds the last ACK of the handshake back, and close(2) then sends a reset in its place.
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 0)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            async with asyncio.timeout(timeout_s):
                await asyncio.get_running_loop().sock_connect(connection, target.socket_address)
    except TimeoutError:
        return errno.ETIMEDOUT
    except OSError as error:
        return error.errno or errno.EIO
    return 0
