"""What does the directory not know yet, and when is it told?

New and ended registrations at once, refreshes and moments within SAVE_INTERVAL_S, in batches. A failure is tried
again later. Knows which registrations have changed; what they say now it is given (`registrations`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import islice
from typing import Protocol

from serval_core.controller.authentication import Moment, Signed
from serval_core.controller.directory import (
    Changes,
    Directory,
    DirectoryFailed,
    Instance,
    StoredRegistration,
)

# What has not been written after this time is. A batch takes some 5 ms, in which the stack does nothing else.
SAVE_INTERVAL_S = 5.0
SAVE_BATCH = 1000
FORGET_INTERVAL_S = 60.0


class Storable(Protocol):
    """A registration that is in force."""

    def stored(self, now: float, wall: float) -> StoredRegistration:
        """What the directory keeps of it."""


class DirectoryWriter:
    """Writes to one directory. `failed` is called with the reason when that fails. `due`: when `write` has something
    to do, None if never. `moments_s`: for how long the times of signed messages are kept.
    """

    __slots__ = (
        "_directory",
        "_failed",
        "_forget_at",
        "_instances",
        "_moments",
        "_moments_s",
        "_not_before",
        "due",
    )

    def __init__(
        self, directory: Directory, moments_s: float, failed: Callable[[str], None], now: float
    ) -> None:
        self._directory = directory
        self._moments_s = moments_s
        self._failed = failed
        self._instances: dict[Instance, None] = {}
        self._moments: dict[Signed, Moment] = {}
        self._not_before = now  # the directory has just failed, and an attempt may hold up everything
        self._forget_at = now + FORGET_INTERVAL_S
        self.due: float | None = None

    def changed(self, instance: Instance) -> None:
        """A registration is new, has changed or has ended. `hurry` or `in_time` says when that is written."""
        self._instances[instance] = None

    def signed(self, signed: Signed, moment: Moment) -> None:
        """A signed message was accepted. Written as `changed`."""
        self._moments[signed] = moment

    def hurry(self, now: float) -> None:
        """Write at once, or as soon as it makes sense after a failure."""
        self.due = max(now, self._not_before)

    def in_time(self, now: float) -> None:
        """Write within SAVE_INTERVAL_S."""
        if self.due is None:
            self.due = now + SAVE_INTERVAL_S

    def write_all(self, records: Mapping[Instance, Storable], now: float, wall: float) -> None:
        """Write everything, or until it fails."""
        self.due = now
        while self.due == now and (self._instances or self._moments):
            self.write(records, now, wall)

    def write(self, records: Mapping[Instance, Storable], now: float, wall: float) -> None:
        """Write what is to be written, at most SAVE_BATCH at a time: the rest is due at once.

        `records` are the registrations in force; what is not among them has ended.
        """
        batch = list(islice(self._instances, SAVE_BATCH))
        moments = dict(islice(self._moments.items(), SAVE_BATCH))
        forget_before_us = 0
        if now >= self._forget_at:
            forget_before_us = int((wall - self._moments_s) * 1_000_000)
            self._forget_at = now + FORGET_INTERVAL_S
        changes = Changes(
            [records[instance].stored(now, wall) for instance in batch if instance in records],
            [instance for instance in batch if instance not in records],
            tuple(moments.items()),
            forget_before_us,
        )
        try:
            self._directory.write(changes)
        except DirectoryFailed as failure:
            self.due = self._not_before = now + SAVE_INTERVAL_S
            self._failed(str(failure))
            return
        for instance in batch:
            del self._instances[instance]
        for signed in moments:
            del self._moments[signed]
        self.due = now if self._instances or self._moments else None
