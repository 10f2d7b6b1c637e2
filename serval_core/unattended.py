"""What becomes of a flow whose socket another program holds? The kernel closes it, and this file notices.

A connection that was handed to a native program has no descriptor in this process: one would keep the socket open after the program
has closed it, or died. The kernel then sends TCP FIN or RST by itself, the BPF programs tell, and the SAL follows. What remains:

- a reset by the peer must reach the program: as an RST segment with the sequence number that the socket expects, which
  `FlowSockets.look` tells;
- a socket that the kernel gave up on without a segment (retransmissions exhausted) is found by looking at the sockets now and then;
- a stack that stops leaves nobody waiting: the sockets are reset.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from errno import ETIMEDOUT
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import structlog

from serval_core.names import FlowID
from serval_core.states import State

if TYPE_CHECKING:
    from serval_core.dataplane.flow_sockets import SocketState
    from serval_core.dataplane.kernel import KernelDataPlane
    from serval_core.sal import ServiceAccessLayer

log = structlog.get_logger("serval_core.stack")

# linux/tcp_states.h
TCP_TIME_WAIT = 6
TCP_CLOSED = 7
READING_STATES = frozenset({1, 4, 5})  # ESTABLISHED, FIN_WAIT1, FIN_WAIT2: no FIN of the peer yet

RESET_RETRY_S = 0.005  # doubles
RESET_ATTEMPTS = 10
END_OF_STREAM_GRACE_S = 1.0
LOOK_INTERVAL_S = 1.0
SOCKETS_PER_LOOK = 2048
# The SAL waits for an acknowledgement of its own in all other states, and its timers bound that.
STATES_WITH_A_SOCKET = frozenset({State.CONNECTED, State.CLOSEWAIT, State.FINWAIT2})


class Holder(NamedTuple):
    """The program that a connection was handed to, as the kernel knew it then."""

    pid: int
    uid: int


class UnattendedFlows:
    """The flows of one stack whose sockets are elsewhere. All calls are made on the stack's loop."""

    def __init__(
        self,
        dataplane: KernelDataPlane,
        sal: ServiceAccessLayer,
        take_events: Callable[[], None],
        run_effects: Callable[[], None],
    ) -> None:
        """`take_events` feeds the SAL what the BPF programs have told so far; `run_effects` carries out what it wants."""
        self._dataplane = dataplane
        self._sal = sal
        self._take_events = take_events
        self._run_effects = run_effects
        self._loop = asyncio.get_running_loop()
        self._holders: dict[FlowID, Holder] = {}
        self._flows_of_user: dict[int, int] = {}
        self._looked_at = 0
        self._timer: asyncio.TimerHandle | None = None
        self._stopped = False
        self.given_up = 0

    def __len__(self) -> int:
        return len(self._holders)

    def take(self, flow_id: FlowID, fd: int, holder: Holder) -> None:
        """The program has its descriptor now; ours (`fd`, taken) is closed."""
        self._dataplane.let_go(fd)
        self._holders[flow_id] = holder
        self._flows_of_user[holder.uid] = self._flows_of_user.get(holder.uid, 0) + 1
        self._sal.unattend(flow_id, time.monotonic())
        if self._timer is None:
            self._timer = self._loop.call_later(LOOK_INTERVAL_S, self._look)

    def forget(self, flow_id: FlowID) -> None:
        """The flow has left the SAL."""
        holder = self._holders.pop(flow_id, None)
        if holder is not None:
            left = self._flows_of_user[holder.uid] - 1
            if left:
                self._flows_of_user[holder.uid] = left
            else:
                del self._flows_of_user[holder.uid]

    def holder(self, flow_id: FlowID) -> Holder | None:
        """Which program was given the flow's socket; None if none was."""
        return self._holders.get(flow_id)

    def flows_of(self, uid: int) -> int:
        """How many flows programs of this user hold."""
        return self._flows_of_user.get(uid, 0)

    def stop(self) -> None:
        """End all flows: their peers get an RST of the SAL, the programs an RST of TCP."""
        self._stopped = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for flow_id in list(self._holders):
            seen = self._dataplane.sockets.look(flow_id)
            self._sal.abort(flow_id, time.monotonic())
            if seen is not None and seen.state != TCP_TIME_WAIT:
                self._dataplane.sockets.reset_unattended(flow_id, seen)
        self._run_effects()

    # -- what the peer did --------------------------------------------------------------------------------------------

    def deliver_reset(self, flow_id: FlowID, attempt: int = 0) -> None:
        """Hand the socket a reset until it has taken one; segments still under way may move what it expects (RFC 5961)."""
        if self._stopped:
            return
        seen = self._dataplane.sockets.look(flow_id)
        if seen is None or seen.state in (TCP_TIME_WAIT, TCP_CLOSED):
            return
        if attempt == RESET_ATTEMPTS:
            log.error("the kernel socket of a reset flow does not take the reset", flow=flow_id)
            return
        self._dataplane.sockets.reset_unattended(flow_id, seen)
        self._loop.call_later(RESET_RETRY_S * 2**attempt, self.deliver_reset, flow_id, attempt + 1)

    def end_stream(self, flow_id: FlowID, before: SocketState | None = None) -> None:
        """The peer's SAL has closed, its TCP perhaps not: then the stream ends when nothing more has arrived for a while."""
        if self._stopped or flow_id not in self._holders:
            return
        seen = self._dataplane.sockets.look(flow_id)
        if seen is None or seen.state not in READING_STATES:
            return
        if before is not None and seen.receive_next == before.receive_next:
            self._dataplane.sockets.finish_unattended(flow_id, seen)
        else:
            self._loop.call_later(END_OF_STREAM_GRACE_S, self.end_stream, flow_id, seen)

    # -- what the kernel did ------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Look at some of the sockets, in turn."""
        self._timer = self._loop.call_later(LOOK_INTERVAL_S, self._look) if self._holders else None
        if self._looked_at >= len(self._holders):
            self._looked_at = 0
        flows = list(islice(self._holders, self._looked_at, self._looked_at + SOCKETS_PER_LOOK))
        self._looked_at += len(flows)
        gone = [flow_id for flow_id in flows if self._dataplane.sockets.look(flow_id) is None]
        if gone:
            # A socket that has just closed in order has told so already.
            self._take_events()
            for flow_id in gone:
                self._gone(flow_id)
            self._run_effects()

    def _gone(self, flow_id: FlowID) -> None:
        """The kernel has no socket for this flow any more, and its SAL waits for one."""
        state = self._sal.state_of(flow_id)
        if state is State.FINWAIT2:
            self._sal.release(flow_id, time.monotonic())
        elif state in STATES_WITH_A_SOCKET:
            self.given_up += 1
            self._sal.transport_failed(flow_id, ETIMEDOUT, time.monotonic())
