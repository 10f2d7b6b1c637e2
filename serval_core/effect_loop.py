"""When is what the SAL wants carried out? `EffectLoop`: effects in order, until there are none, and the SAL's timer after them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from serval_core.effects import Effect
from serval_core.sal import ServiceAccessLayer


class EffectLoop:
    """Carries out the SAL's effects on the running asyncio loop. `carry_out` says how; others may add to it."""

    def __init__(self, sal: ServiceAccessLayer) -> None:
        self.carry_out: dict[type[Effect], Callable[[Any], None]] = {}
        self._sal = sal
        self._loop = asyncio.get_running_loop()
        self._running = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due = 0.0

    def run(self) -> None:
        """Carry out effects until there are none. Callbacks of the application may cause more: those wait for their turn."""
        if self._running:
            return
        self._running = True
        try:
            while effects := self._sal.take_effects():
                for effect in effects:
                    try:
                        self.carry_out[type(effect)](effect)
                    except Exception as error:
                        # One callback's defect must not cost other flows their effects.
                        self._loop.call_exception_handler(
                            {"message": f"while carrying out {type(effect).__name__}", "exception": error}
                        )
        finally:
            self._running = False
        self._arm_timer()

    def run_soon(self) -> None:
        """The same, after whatever is going on."""
        self._loop.call_soon(self.run)

    def close(self) -> None:
        """No timer fires any more."""
        if self._timer is not None:
            self._timer.cancel()

    def _timer_fired(self) -> None:
        self._timer = None
        self._sal.handle_timeouts(time.monotonic())
        self.run()

    def _arm_timer(self) -> None:
        due = self._sal.next_timeout()
        if self._timer is not None:
            # A timer that fires too early costs less than one cancelled per packet.
            if due is None or due >= self._timer_due:
                return
            self._timer.cancel()
            self._timer = None
        if due is not None:
            self._timer_due = due
            self._timer = self._loop.call_later(max(0.0, due - time.monotonic()), self._timer_fired)
